//! A model: many layers of different sizes in one workspace, queued behind each other without a wait.

use ferromoe::{
    DeviceBuffer, DeviceGroup, ExpertFormat, ExpertWeights, FusedMoe, MoeConfig, RankInputs, SimOptions, Workspace,
    WorkspaceSizes, reference,
};
use ferromoe_tests::{Case, Choices, Tokens, group, tolerance};
use half::bf16;

const LAYERS: usize = 60;
const RANKS: usize = 2;

/// Layers of several sizes and of both formats, and every tenth with more tokens.
fn config(layer: usize) -> MoeConfig {
    MoeConfig {
        hidden: 64,
        intermediate: 64 * (1 + layer % 3),
        experts: RANKS * (1 + layer * 5 % 7),
        top_k: 1 + layer % 2,
        shared_experts: layer % 4 % 3,
        experts_format: if layer % 5 < 3 { ExpertFormat::Fp8 } else { ExpertFormat::Bf16 },
        max_tokens_per_rank: if layer % 10 == 9 { 24 } else { 6 },
        ..Case::default().config
    }
}

struct Layer {
    moe: FusedMoe,
    weights: ExpertWeights,
    tokens: Tokens,
    /// Each rank's.
    buffers: Vec<RankBuffers>,
}

struct RankBuffers {
    hidden_states: DeviceBuffer,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    output: DeviceBuffer,
}

impl Layer {
    fn new(group: &DeviceGroup, workspace: &Workspace, number: usize) -> Self {
        let config = config(number);
        let weights = ExpertWeights::random(&config, number as u64);
        let count = |rank: usize| (number * 5 + rank * 3) % (config.max_tokens_per_rank + 1);
        let counts: Vec<_> = (0..RANKS).map(count).collect();
        let tokens = Tokens::random(&config, &counts, Choices::Random, number as u64);
        let buffers = (0..RANKS).map(|rank| RankBuffers::new(group, &tokens, rank)).collect();
        Self { moe: FusedMoe::new(workspace, &config, &weights).unwrap(), weights, tokens, buffers }
    }

    fn check(&self, number: usize) {
        for (rank, buffers) in self.buffers.iter().enumerate() {
            let (states, routing) = (&self.tokens.hidden_states[rank], &self.tokens.routing[rank]);
            let mut output = vec![bf16::NAN; states.len()];
            buffers.output.read(bytemuck::cast_slice_mut(&mut output)).unwrap();
            let expected = reference::of_format(self.moe.config(), &self.weights, states, routing).unwrap();
            let error = reference::relative_l2(&output, &expected);
            // The layers are so small that a few e4m3 numbers that went the other way are seen.
            let limit = 2.0 * tolerance(self.moe.config().experts_format);
            assert!(error <= limit, "layer {number}: rank {rank} has a relative L2 error of {error:.2e}");
        }
    }
}

impl RankBuffers {
    fn new(group: &DeviceGroup, tokens: &Tokens, rank: usize) -> Self {
        let with = |contents: &[u8], name| {
            let buffer = group.alloc(rank, contents.len().max(1) as u64, name).unwrap();
            buffer.write(contents).unwrap();
            buffer
        };
        let (states, routing) = (&tokens.hidden_states[rank], &tokens.routing[rank]);
        Self {
            hidden_states: with(bytemuck::cast_slice(states), "hidden states"),
            topk_idx: with(bytemuck::cast_slice(routing.topk_idx()), "expert ids"),
            topk_weights: with(bytemuck::cast_slice(routing.topk_weights()), "routing weights"),
            tokens: with(&(routing.tokens() as u32).to_ne_bytes(), "token count"),
            output: with(&vec![0xff; 2 * states.len()], "output"),
        }
    }

    fn inputs(&self, most_tokens: usize) -> RankInputs {
        RankInputs {
            hidden_states: self.hidden_states.address(),
            hidden_scales: 0,
            topk_idx: self.topk_idx.address(),
            topk_weights: self.topk_weights.address(),
            tokens: self.tokens.address(),
            output: self.output.address(),
            most_tokens: most_tokens as u32,
        }
    }
}

#[test]
fn sixty_layers_share_a_workspace() {
    let group = group(RANKS, SimOptions::default());
    let configs: Vec<_> = (0..LAYERS).map(config).collect();
    let workspace = Workspace::new(&group, &WorkspaceSizes::of(&configs)).unwrap();
    let layers: Vec<_> = (0..LAYERS).map(|number| Layer::new(&group, &workspace, number)).collect();
    let streams: Vec<_> = (0..RANKS).map(|rank| group.stream(rank).unwrap()).collect();
    for (rank, stream) in streams.iter().enumerate() {
        for layer in &layers {
            let inputs = layer.buffers[rank].inputs(layer.moe.config().max_tokens_per_rank);
            // SAFETY: the stream is the rank's, and the buffers are as large as their contents and live to the end of the test.
            unsafe { layer.moe.enqueue(rank, stream.raw(), inputs) }.unwrap();
        }
    }
    streams.iter().for_each(|stream| stream.synchronize().unwrap());
    workspace.check().unwrap();
    layers.iter().enumerate().for_each(|(number, layer)| layer.check(number));
}
