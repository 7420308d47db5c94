//! End-to-end correctness tests of ferromoe: random layers, run by the kernel and held against the f64 reference.
//!
//! The tests run in the simulator, or on GPUs when `FERROMOE_TEST_DEVICE` is `cuda`.

pub mod repeat;
pub mod small;

use std::sync::Arc;

use ferromoe::{
    Device, DeviceGroup, ExpertFormat, ExpertWeights, FusedMoe, MoeConfig, RankBatch, RankOutput, Routing, ScaleKind,
    SimOptions, Workspace, WorkspaceSizes, reference,
};
use half::bf16;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// The largest relative L2 error of a right result: operands, intermediate and combine rows are bf16; in FP8 the tensor cores keep 14 bits of a sum, and what of the intermediate lies near
/// the middle of two e4m3 numbers goes the other way.
pub fn tolerance(format: ExpertFormat) -> f64 {
    if format == ExpertFormat::Fp8 { 1e-2 } else { 6e-3 }
}

/// How tokens choose experts.
#[derive(Clone, Copy, Debug)]
pub enum Choices {
    /// Distinct experts at random.
    Random,
    /// Distinct experts at random, every third entry -1.
    Sparse,
    /// Every token's first choice is this expert, the others are random.
    AllTo(usize),
    /// Only the experts below this number, at random.
    Below(usize),
    /// -1 everywhere.
    Nobody,
}

/// A layer, the tokens of one forward pass, and how to run it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The layer; `max_tokens_per_rank` is raised to what `tokens` needs.
    pub config: MoeConfig,
    /// Tokens of each rank; its length is the number of ranks.
    pub tokens: Vec<usize>,
    /// How they choose experts.
    pub choices: Choices,
    /// How simulated ranks run.
    pub sim: SimOptions,
    /// Seed of weights and tokens.
    pub data: u64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            config: MoeConfig {
                hidden: 64,
                intermediate: 64,
                experts: 8,
                top_k: 2,
                max_tokens_per_rank: 0,
                swiglu_limit: None,
                shared_experts: 0,
                experts_format: ExpertFormat::Bf16,
                scales: ScaleKind::F32,
            },
            tokens: vec![7],
            choices: Choices::Random,
            sim: SimOptions::default(),
            data: 1,
        }
    }
}

/// The tokens of every rank, in host memory.
pub struct Tokens {
    /// [T, H] of each rank.
    pub hidden_states: Vec<Vec<bf16>>,
    /// The routing of each rank.
    pub routing: Vec<Routing>,
}

impl Tokens {
    /// Random tokens.
    pub fn random(config: &MoeConfig, tokens: &[usize], choices: Choices, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let hidden_states = tokens.iter().map(|&tokens| states(&mut random, tokens * config.hidden)).collect();
        let routing = tokens.iter().map(|&tokens| route(&mut random, config, tokens, choices)).collect();
        Self { hidden_states, routing }
    }

    /// What [`FusedMoe::forward`] takes.
    pub fn batch(&self) -> Vec<RankBatch<'_>> {
        self.hidden_states
            .iter()
            .zip(&self.routing)
            .map(|(states, routing)| RankBatch {
                hidden_states: states.as_slice().into(),
                topk_idx: routing.topk_idx(),
                topk_weights: routing.topk_weights(),
            })
            .collect()
    }
}

fn states(random: &mut StdRng, count: usize) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32(random.random_range(-1.7..1.7))).collect()
}

fn route(random: &mut StdRng, config: &MoeConfig, tokens: usize, choices: Choices) -> Routing {
    let mut ids = Vec::new();
    let mut experts: Vec<i32> = (0..config.experts as i32).collect();
    for token in 0..tokens {
        experts.shuffle(random);
        let mut chosen: Vec<i32> = match choices {
            Choices::Below(limit) => experts.iter().copied().filter(|&id| id < limit as i32).collect(),
            Choices::AllTo(expert) => {
                let others = experts.iter().copied().filter(|&id| id != expert as i32);
                std::iter::once(expert as i32).chain(others).collect()
            }
            _ => experts.clone(),
        };
        chosen.resize(config.top_k, -1);
        for (k, id) in chosen.into_iter().enumerate() {
            let masked = match choices {
                Choices::Nobody => true,
                Choices::Sparse => (token + k) % 3 == 0,
                _ => false,
            };
            ids.push(if masked { -1 } else { id });
        }
    }
    let weights = ids.iter().map(|_| random.random_range(0.05..1.0)).collect();
    Routing::new(config.top_k, ids, weights).expect("ids and weights of one length")
}

/// The group to run `ranks` ranks on, with all checks of the simulator. A machine with fewer GPUs lets the ranks share one.
pub fn group(ranks: usize, sim: SimOptions) -> DeviceGroup {
    open(ranks, sim, true)
}

/// A group for what runs into its deadline. From then on the kernel's waits fall through, and what it reads while the launch
/// drains is ordered by nothing: simulated ranks run without the checks of that.
pub fn group_that_times_out(ranks: usize, sim: SimOptions) -> DeviceGroup {
    open(ranks, sim, false)
}

/// As [`group`], with the kernel that records.
pub fn traced_group(ranks: usize, sim: SimOptions) -> DeviceGroup {
    repeat::name_failing_tests();
    let group = match on_gpus() {
        true => DeviceGroup::open_traced(Device::Cuda, ranks)
            .or_else(|_| DeviceGroup::open_traced(Device::SharedGpu, ranks)),
        false => simulated(ranks, sim, true).map(DeviceGroup::traced),
    };
    group.unwrap_or_else(|error| panic!("{ranks} ranks: {error}"))
}

fn open(ranks: usize, sim: SimOptions, checks: bool) -> DeviceGroup {
    repeat::name_failing_tests();
    let group = match on_gpus() {
        true => DeviceGroup::open(Device::Cuda, ranks).or_else(|_| DeviceGroup::open(Device::SharedGpu, ranks)),
        false => simulated(ranks, sim, checks),
    };
    group.unwrap_or_else(|error| panic!("{ranks} ranks: {error}"))
}

fn on_gpus() -> bool {
    std::env::var("FERROMOE_TEST_DEVICE").as_deref() == Ok("cuda")
}

fn simulated(ranks: usize, sim: SimOptions, checks: bool) -> ferromoe::Result<DeviceGroup> {
    let run = ptx_sim::RunOptions { checks, ..ptx_sim::RunOptions::default() };
    DeviceGroup::simulated(None, ranks, sim, run)
}

/// A layer with its weights, ready to run.
pub struct Layer {
    /// Its configuration.
    pub config: MoeConfig,
    /// Its weights.
    pub weights: Arc<ExpertWeights>,
    /// The layer.
    pub moe: FusedMoe,
}

impl Case {
    /// Ranks of the case.
    pub fn ranks(&self) -> usize {
        self.tokens.len()
    }

    /// The layer of this case.
    pub fn layer(&self) -> Layer {
        self.layer_on(&group(self.ranks(), self.sim))
    }

    /// The layer of this case, on a group of as many ranks.
    pub fn layer_on(&self, group: &DeviceGroup) -> Layer {
        let most = self.tokens.iter().copied().max().unwrap_or(0).max(self.config.max_tokens_per_rank).max(1);
        let config = MoeConfig { max_tokens_per_rank: most, ..self.config.clone() };
        let weights = Arc::new(ExpertWeights::random(&config, self.data));
        let moe = Workspace::new(group, &WorkspaceSizes::of([&config]))
            .and_then(|workspace| FusedMoe::new(&workspace, &config, &weights))
            .unwrap_or_else(|error| panic!("{self:?}: {error}"));
        Layer { config, weights, moe }
    }

    /// The tokens of this case.
    pub fn tokens(&self) -> Tokens {
        Tokens::random(&self.config, &self.tokens, self.choices, self.data.wrapping_mul(31).wrapping_add(7))
    }

    /// Runs the case once and returns every rank's output.
    pub fn run(&self) -> Vec<RankOutput> {
        self.layer().moe.forward(&self.tokens().batch()).unwrap_or_else(|error| panic!("{self:?}: {error}"))
    }

    /// Runs the case once and holds it against the reference.
    pub fn check(&self) {
        self.layer().check(&self.tokens(), &format!("{self:?}"));
    }
}

impl Layer {
    /// What the kernel is held against: the reference that quantises as the layer's format does.
    pub fn reference(&self, states: &[bf16], routing: &Routing) -> ferromoe::Result<Vec<f64>> {
        reference::of_format(&self.config, &self.weights, states, routing)
    }

    /// Runs `tokens`, holds every rank's output against the reference, and returns them.
    pub fn check(&mut self, tokens: &Tokens, what: &str) -> Vec<RankOutput> {
        let outputs = self.moe.forward(&tokens.batch()).unwrap_or_else(|error| panic!("{what}: {error}"));
        for (rank, output) in outputs.iter().enumerate() {
            let states = &tokens.hidden_states[rank];
            let expected =
                self.reference(states, &tokens.routing[rank]).unwrap_or_else(|error| panic!("{what}: {error}"));
            let error = reference::relative_l2(&output.output, &expected);
            assert!(
                error <= tolerance(self.config.experts_format),
                "{what}: rank {rank} has a relative L2 error of {error:.2e}"
            );
        }
        outputs
    }
}
