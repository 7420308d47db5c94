//! What the unit tests share: the fixtures, a small layer, and an engine that runs it.

use std::path::PathBuf;

use ferromoe_kernel::quantise::ScaleKind;
use half::bf16;
use rand::rngs::StdRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};

use crate::config::{ExpertFormat, MoeConfig};
use crate::error::Result;
use crate::fused::{FusedMoe, RankBatch, RankInputs};
use crate::group::DeviceGroup;
use crate::memory::{DeviceBuffer, Stream};
use crate::reference;
use crate::router::Routing;
use crate::weights::ExpertWeights;
use crate::workspace::{Workspace, WorkspaceSizes};

/// The four recorded checkpoints.
pub const FIXTURES: [&str; 4] = ["mixtral", "qwen3-moe", "deepseek-v3", "deepseek-v4"];

/// The folder of one of them.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Four experts of 64 x 64, top-2, one shared expert.
pub fn small_config() -> MoeConfig {
    MoeConfig {
        hidden: 64,
        intermediate: 64,
        experts: 4,
        top_k: 2,
        max_tokens_per_rank: 16,
        swiglu_limit: None,
        shared_experts: 1,
        experts_format: ExpertFormat::Bf16,
        scales: ScaleKind::F32,
    }
}

/// A layer with a workspace of its own.
pub fn layer(group: &DeviceGroup, config: &MoeConfig, weights: &ExpertWeights) -> Result<FusedMoe> {
    FusedMoe::new(&Workspace::new(group, &WorkspaceSizes::of([config]))?, config, weights)
}

/// Random tokens of one rank.
pub struct Tokens {
    /// [T, H]
    pub hidden_states: Vec<bf16>,
    pub routing: Routing,
}

impl Tokens {
    pub fn random(config: &MoeConfig, count: usize, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let hidden_states =
            (0..count * config.hidden).map(|_| bf16::from_f32(random.random_range(-1.7..1.7))).collect();
        let ids: Vec<i32> = (0..count)
            .flat_map(|_| index::sample(&mut random, config.experts, config.top_k).into_iter().map(|id| id as i32))
            .collect();
        let weights = ids.iter().map(|_| random.random_range(0.05..1.0)).collect();
        Self { hidden_states, routing: Routing::new(config.top_k, ids, weights).unwrap() }
    }

    pub fn batch(&self) -> RankBatch<'_> {
        RankBatch {
            hidden_states: self.hidden_states.as_slice().into(),
            topk_idx: self.routing.topk_idx(),
            topk_weights: self.routing.topk_weights(),
        }
    }

    /// Holds an output against the reference; bf16 operands, intermediate and combine rows allow an error of 6e-3.
    pub fn check(&self, config: &MoeConfig, weights: &ExpertWeights, output: &[bf16], what: &str) {
        let expected = reference::of_format(config, weights, &self.hidden_states, &self.routing).unwrap();
        let error = reference::relative_l2(output, &expected);
        assert!(error <= 6e-3, "{what}: a relative L2 error of {error:.2e}");
    }
}

/// One rank's memory and stream, as an engine would own them.
pub struct EngineRank {
    hidden_states: DeviceBuffer,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    output: DeviceBuffer,
    most_tokens: u32,
    pub stream: Stream,
}

impl EngineRank {
    pub fn new(group: &DeviceGroup, config: &MoeConfig, rank: usize) -> Self {
        let states = (config.max_tokens_per_rank * config.hidden * 2) as u64;
        let choices = (config.max_tokens_per_rank * config.top_k * 4) as u64;
        let alloc = |bytes, name| group.alloc(rank, bytes, name).unwrap();
        Self {
            hidden_states: alloc(states, "hidden states"),
            topk_idx: alloc(choices, "expert ids"),
            topk_weights: alloc(choices, "routing weights"),
            tokens: alloc(4, "token count"),
            output: alloc(states, "output"),
            most_tokens: config.max_tokens_per_rank as u32,
            stream: group.stream(rank).unwrap(),
        }
    }

    pub fn inputs(&self) -> RankInputs {
        RankInputs {
            hidden_states: self.hidden_states.address(),
            hidden_scales: 0,
            topk_idx: self.topk_idx.address(),
            topk_weights: self.topk_weights.address(),
            tokens: self.tokens.address(),
            output: self.output.address(),
            most_tokens: self.most_tokens,
        }
    }

    /// Puts tokens where the next launch finds them.
    pub fn write(&self, tokens: &Tokens) {
        let batch = tokens.batch();
        self.hidden_states.write(batch.hidden_states.bytes()).unwrap();
        self.topk_idx.write(bytemuck::cast_slice(batch.topk_idx)).unwrap();
        self.topk_weights.write(bytemuck::cast_slice(batch.topk_weights)).unwrap();
        self.write_count(tokens.routing.tokens() as u32);
    }

    pub fn write_count(&self, tokens: u32) {
        self.tokens.write(&tokens.to_ne_bytes()).unwrap();
    }

    pub fn output(&self, tokens: &Tokens) -> Vec<bf16> {
        let mut output = vec![bf16::ZERO; tokens.hidden_states.len()];
        self.output.read(bytemuck::cast_slice_mut(&mut output)).unwrap();
        output
    }
}
