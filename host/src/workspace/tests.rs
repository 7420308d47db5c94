//! Several layers of one workspace.

use super::*;
use crate::config::ExpertFormat;
use crate::fused::FusedMoe;
use crate::group::{Device, SimOptions};
use crate::testing::{EngineRank, Tokens, small_config};
use crate::weights::ExpertWeights;

fn group(ranks: usize) -> DeviceGroup {
    DeviceGroup::open(Device::Sim(SimOptions::default()), ranks).unwrap()
}

/// Two layers of different sizes, with their weights: neither has the larger one of every size.
fn configs() -> [MoeConfig; 2] {
    let config = small_config();
    [
        MoeConfig { experts: 12, intermediate: 128, shared_experts: 0, ..config.clone() },
        MoeConfig { experts: 6, top_k: 3, max_tokens_per_rank: 20, experts_format: ExpertFormat::Fp8, ..config },
    ]
}

fn make(workspace: &Workspace, configs: &[MoeConfig]) -> Vec<(FusedMoe, ExpertWeights)> {
    let one = |(number, config): (usize, &MoeConfig)| {
        let weights = ExpertWeights::random(config, number as u64);
        let layer = FusedMoe::new(workspace, config, &weights).unwrap();
        assert_eq!(layer.number(), number);
        (layer, weights)
    };
    configs.iter().enumerate().map(one).collect()
}

/// An engine's memory for each layer and rank, with tokens in it.
fn engines(group: &DeviceGroup, configs: &[MoeConfig]) -> Vec<Vec<(EngineRank, Tokens)>> {
    let rank = |layer: usize, config: &MoeConfig, rank: usize| {
        let tokens = Tokens::random(config, 5 + 3 * rank + layer, (10 * layer + rank) as u64);
        let engine = EngineRank::new(group, config, rank);
        engine.write(&tokens);
        (engine, tokens)
    };
    let layer =
        |(layer, config): (usize, &MoeConfig)| (0..group.ranks()).map(|number| rank(layer, config, number)).collect();
    configs.iter().enumerate().map(layer).collect()
}

/// Queues layers on a rank in this order.
fn queue(layers: &[(FusedMoe, ExpertWeights)], engines: &[Vec<(EngineRank, Tokens)>], rank: usize, order: &[usize]) {
    for &layer in order {
        let (engine, _) = &engines[layer][rank];
        // SAFETY: the engine's memory is as large as it says, and lives to the end of the test.
        unsafe { layers[layer].0.enqueue(rank, engine.stream.raw(), engine.inputs()) }.unwrap();
    }
}

fn check_outputs(layers: &[(FusedMoe, ExpertWeights)], engines: &[Vec<(EngineRank, Tokens)>]) {
    for (number, ((layer, weights), engines)) in layers.iter().zip(engines).enumerate() {
        for (engine, tokens) in engines {
            tokens.check(layer.config(), weights, &engine.output(tokens), &format!("layer {number}"));
        }
    }
}

#[test]
fn layers_of_different_sizes_queue_behind_each_other() {
    let (group, configs) = (group(3), configs());
    let workspace = Workspace::new(&group, &WorkspaceSizes::of(&configs)).unwrap();
    let (layers, engines) = (make(&workspace, &configs), engines(&group, &configs));
    for rank in 0..3 {
        queue(&layers, &engines, rank, &[0, 1, 1, 0, 1]);
    }
    engines[0].iter().for_each(|(engine, _)| engine.stream.synchronize().unwrap());
    workspace.check().unwrap();
    check_outputs(&layers, &engines);
}

#[test]
fn a_rank_that_launches_another_layer_is_named_and_all_layers_work_again() {
    let (group, configs) = (group(3), configs());
    let workspace = Workspace::new(&group, &WorkspaceSizes::of(&configs)).unwrap();
    let (layers, engines) = (make(&workspace, &configs), engines(&group, &configs));
    for astray in 0..3 {
        for rank in 0..3 {
            let order = if rank == astray { [1, 0] } else { [0, 1] };
            queue(&layers, &engines, rank, &order);
        }
        let error = workspace.check().unwrap_err();
        let Error::LayerOrder { rank, layer, other, other_layer } = error else { panic!("{error}") };
        assert_ne!((rank, layer), (other, other_layer), "{error}");
        assert!(rank == astray || other == astray, "{error}");
        let of = |rank| usize::from(rank == astray);
        assert_eq!((layer, other_layer), (of(rank), of(other)), "{error}");
        (0..3).for_each(|rank| queue(&layers, &engines, rank, &[1, 0]));
        workspace.check().unwrap();
        check_outputs(&layers, &engines);
    }
}

#[test]
fn layers_of_one_shape_in_the_wrong_order_are_an_error_too() {
    let (group, config) = (group(2), small_config());
    let configs = [config.clone(), config];
    let workspace = Workspace::new(&group, &WorkspaceSizes::of(&configs)).unwrap();
    let (layers, engines) = (make(&workspace, &configs), engines(&group, &configs));
    queue(&layers, &engines, 0, &[0]);
    queue(&layers, &engines, 1, &[1]);
    let error = workspace.check().unwrap_err().to_string();
    assert!(error.contains("all ranks must launch its layers in the same order"), "{error}");
}

#[test]
fn a_fault_is_reported_with_the_sizes_of_its_layer() {
    let (group, configs) = (group(2), configs());
    let workspace = Workspace::new(&group, &WorkspaceSizes::of(&configs)).unwrap();
    let (layers, engines) = (make(&workspace, &configs), engines(&group, &configs));
    for (layer, max) in [(0, 16), (1, 20)] {
        engines[layer][1].0.write_count(max + 1);
        (0..2).for_each(|rank| queue(&layers, &engines, rank, &[0, 1]));
        let error = workspace.check().unwrap_err();
        assert!(
            matches!(error, Error::TooManyTokens { rank: 1, tokens, max: most } if (tokens, most) == (max as usize + 1, max as usize)),
            "{error}"
        );
        engines[layer][1].0.write(&engines[layer][1].1);
    }
}

#[test]
fn a_layer_that_does_not_fit_is_refused_with_what_is_too_large() {
    let (group, config) = (group(2), small_config());
    let workspace = Workspace::new(&group, &WorkspaceSizes::of([&config])).unwrap();
    let large = MoeConfig { intermediate: 192, max_tokens_per_rank: 17, experts: 2, ..config.clone() };
    let error = FusedMoe::new(&workspace, &large, &ExpertWeights::random(&large, 1)).err().unwrap();
    assert_eq!(
        error.to_string(),
        "the layer does not fit its workspace: it has an intermediate size of 192, 128 more than the 64 it was made for, \
         and a maximum of tokens per rank of 17, 1 more than the 16 it was made for"
    );
    let scaled = MoeConfig { experts_format: ExpertFormat::Fp8, ..config.clone() };
    let error = FusedMoe::new(&workspace, &scaled, &ExpertWeights::random(&scaled, 1)).err().unwrap();
    assert_eq!(error.to_string(), "the layer's experts run in fp8, and its workspace was made for bf16");
    let layer = FusedMoe::new(&workspace, &config, &ExpertWeights::random(&config, 1)).unwrap();
    assert_eq!(layer.number(), 0, "what was refused has no number");
}

#[test]
fn what_a_workspace_takes_is_known_before() {
    for config in configs() {
        let (group, sizes) = (group(2), WorkspaceSizes::of([&config]));
        let workspace = Workspace::new(&group, &sizes).unwrap();
        for (rank, symmetric) in workspace.shared.ranks.iter().zip(&workspace.shared._symmetric) {
            let InputBuffers { hidden_states: _, hidden_scales, topk_idx, topk_weights, tokens, output } = &rank.inputs;
            assert_eq!(hidden_scales.is_some(), config.experts_format == ExpertFormat::Fp8);
            let buffers =
                [symmetric, &rank.own, topk_idx, topk_weights, tokens, output].into_iter().chain(hidden_scales);
            assert_eq!(buffers.map(DeviceBuffer::bytes).sum::<u64>(), sizes.bytes(2).unwrap());
        }
        assert!(sizes.bytes(5).is_err());
    }
    assert!(WorkspaceSizes::of([]).bytes(1).is_err());
}

/// Models as REFERENCES.md and README's table have them: name, hidden, intermediate, experts, top-k, shared experts.
const MODELS: [(&str, [usize; 5]); 9] = [
    ("DeepSeek-V4-Flash", [4096, 2048, 256, 6, 1]),
    ("DeepSeek-V4-Pro", [7168, 3072, 384, 6, 1]),
    ("DeepSeek-V3", [7168, 2048, 256, 8, 1]),
    ("Kimi K2", [7168, 2048, 384, 8, 1]),
    ("GLM-5", [6144, 2048, 256, 8, 1]),
    ("Qwen3-30B", [2048, 768, 128, 8, 0]),
    ("Qwen3-235B", [4096, 1536, 128, 8, 0]),
    ("MiniMax-M2", [3072, 1536, 256, 8, 0]),
    ("Mixtral-8x7B", [4096, 14336, 8, 2, 0]),
];

/// GiB that a workspace of such a model takes on each of 8 ranks.
fn gib([hidden, intermediate, experts, top_k, shared_experts]: [usize; 5], format: ExpertFormat, tokens: usize) -> f64 {
    let formats = vec![format];
    let sizes = WorkspaceSizes { hidden, intermediate, experts, top_k, shared_experts, tokens, formats };
    sizes.bytes(8).unwrap() as f64 / f64::from(1 << 30)
}

#[test]
fn readme_says_what_a_workspace_takes() {
    let readme = include_str!("../../../README.md");
    for (name, sizes) in MODELS {
        let cell = |tokens| {
            format!("{:.2} ({:.2})", gib(sizes, ExpertFormat::Fp8, tokens), gib(sizes, ExpertFormat::Bf16, tokens))
        };
        let line = format!("| {name} | {} | {} | {} |", cell(512), cell(2048), cell(8192));
        assert!(readme.contains(&line), "README's table of workspaces lacks\n{line}");
    }
}

/// Whatever the routing: at 8192 tokens a rank, and in FP8 at 512.
#[test]
fn a_workspace_is_small() {
    for ((name, sizes), [fp8, bf16]) in MODELS.into_iter().zip([[1.0, 1.6], [1.5, 2.6], [1.6, 2.8]]) {
        assert!(gib(sizes, ExpertFormat::Fp8, 8192) <= fp8 && gib(sizes, ExpertFormat::Bf16, 8192) <= bf16, "{name}");
        assert!(gib(sizes, ExpertFormat::Fp8, 512) <= 0.35, "{name}");
    }
}
