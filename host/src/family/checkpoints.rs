//! Small checkpoints of every family, made here, and what their layers give by the families' definitions.
//!
//! A checkpoint has random weights under the names, and a `config.json` with the fields, that the family's published models have; both are
//! after `transformers` 5.24 (`modeling_*.py`, `configuration_*.py`, and `conversion_mapping.py` for the names on disk) and, for Kimi-K2,
//! after its repository. What the layer gives is computed from the same numbers in f64, by functions that are written down here once more
//! and share nothing with the library but the numbers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::FAMILIES;
use crate::checkpoint::{Checkpoint, HfLayer};
use crate::config::MoeConfig;
use crate::reference;
use crate::router::Routing;
use crate::weights::{Expert, ExpertWeights};

const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 16;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;
const TOKENS: usize = 12;

/// A matrix by rows.
type Rows = Vec<Vec<f64>>;
/// A token's experts and their weights.
type Chosen = Vec<(usize, f64)>;
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// What the tokens of one layer meet.
struct Model {
    router: Rows,
    bias: Vec<f64>,
    /// Gate, up and down of each expert.
    experts: Vec<[Rows; 3]>,
    /// The shared expert, `shared` times as wide.
    shared: [Rows; 3],
    /// Its gate, where it has one.
    gate: Vec<f64>,
    states: Rows,
}

impl Model {
    fn new(seed: u64, shared: usize) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut matrix = |rows: usize, cols: usize, scale: f64| -> Rows {
            let mut value = || bf16::from_f64(random.random_range(-scale..scale)).to_f64();
            (0..rows).map(|_| (0..cols).map(|_| value()).collect()).collect()
        };
        let mut expert = |width| [matrix(width, HIDDEN, 0.5), matrix(width, HIDDEN, 0.5), matrix(HIDDEN, width, 0.5)];
        let experts = (0..EXPERTS).map(|_| expert(INTERMEDIATE)).collect();
        let shared = expert(shared * INTERMEDIATE);
        Self {
            experts,
            shared,
            router: matrix(EXPERTS, HIDDEN, 0.3),
            bias: matrix(1, EXPERTS, 0.4).remove(0),
            states: matrix(TOKENS, HIDDEN, 1.5),
            gate: matrix(1, HIDDEN, 0.3).remove(0),
        }
    }
}

/// How a family's checkpoint looks, and what it computes.
struct Case {
    /// Fields of `config.json` beside the sizes that all have.
    config: Value,
    /// How wide the shared expert is, in experts.
    shared: usize,
    /// The ways in which the tensors may be stored.
    stored: Vec<fn(&Model, &mut Tensors)>,
    /// The experts of a token and their weights, from its logits and the bias.
    choose: fn(&[f64], &[f64]) -> Chosen,
    limit: f64,
    /// Whether the shared expert has a gate.
    gated: bool,
}

fn case(model_type: &str, config: Value, stored: &[fn(&Model, &mut Tensors)]) -> Case {
    let mut whole =
        json!({"model_type": model_type, "hidden_size": HIDDEN, "num_hidden_layers": 3, "hidden_act": "silu"});
    whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    Case {
        config: whole,
        shared: 0,
        stored: stored.to_vec(),
        choose: softmax_renormalised,
        limit: f64::INFINITY,
        gated: false,
    }
}

/// The cases of all families that can be read. Layer 2 has experts in each.
#[expect(clippy::too_many_lines, reason = "a table")]
fn cases() -> Vec<Case> {
    let v3 = |model_type: &str, changes: Value| {
        let mut config = json!({"moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Case { shared: 1, choose: sigmoid_biased_2_5, ..case(model_type, config, &[mlp_each, mlp_fused]) }
    };
    let gated = |model_type: &str, normalised: bool, changes: Value| {
        let mut config = json!({"moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
            "norm_topk_prob": normalised, "shared_expert_intermediate_size": 2 * INTERMEDIATE});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let choose = if normalised { softmax_renormalised } else { softmax };
        Case { shared: 2, gated: true, choose, ..case(model_type, config, &[qwen_each_gated, qwen_fused_gated]) }
    };
    let qwen = json!({"moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": true});
    let mixtral =
        json!({"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K});
    vec![
        case("mixtral", mixtral.clone(), &[sparse_block_each, mlp_fused_unbiased]),
        case("qwen3_moe", qwen.clone(), &[mlp_each_unbiased, mlp_fused_unbiased]),
        Case {
            choose: softmax,
            ..case(
                "qwen3_moe",
                {
                    let mut config = qwen.clone();
                    config["norm_topk_prob"] = json!(false);
                    config
                },
                &[mlp_each_unbiased],
            )
        },
        gated("qwen2_moe", false, json!({"decoder_sparse_step": 1, "mlp_only_layers": []})),
        gated("qwen3_next", true, json!({"decoder_sparse_step": 1, "mlp_only_layers": []})),
        gated("qwen3_5_moe", true, json!({"text_config": gated("qwen3_5_moe_text", true, json!({})).config})),
        case(
            "qwen3_vl_moe",
            json!({"text_config": {"model_type": "qwen3_vl_moe_text", "hidden_size": HIDDEN, "num_hidden_layers": 3,
            "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}}),
            &[mlp_transposed_nested],
        ),
        Case {
            choose: softmax,
            ..case(
                "olmoe",
                json!({"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K, "norm_topk_prob": false}),
                &[mlp_each_unbiased, mlp_fused_unbiased],
            )
        },
        Case {
            shared: 2,
            choose: softmax_of_best_groups_16,
            ..case(
                "deepseek_v2",
                json!({"moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_shared_experts": 2, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": false,
            "routed_scaling_factor": 16.0, "n_group": 4, "topk_group": 2}),
                &[mlp_each_shared_unbiased],
            )
        },
        Case {
            shared: 2,
            choose: softmax,
            ..case(
                "deepseek_v2",
                json!({"moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_shared_experts": 2, "first_k_dense_replace": 1,
            "topk_method": "greedy", "norm_topk_prob": false, "n_group": 1, "topk_group": 1}),
                &[mlp_each_shared_unbiased],
            )
        },
        Case { choose: sigmoid_biased_of_best_groups_2_5, ..v3("deepseek_v3", json!({"n_group": 4, "topk_group": 2})) },
        Case { shared: 0, ..v3("deepseek_v3", json!({"n_shared_experts": null, "n_group": null, "topk_group": null})) },
        Case {
            choose: sigmoid_biased_of_best_groups_2_5,
            ..v3(
                "deepseek_v32",
                json!({"n_group": 4, "topk_group": 2,
            "mlp_layer_types": ["dense", "dense", "sparse"]}),
            )
        },
        v3("kimi_k2", json!({})),
        v3("kimi_k25", json!({"text_config": v3("kimi_k2", json!({})).config})),
        Case { choose: sigmoid_biased, ..v3("glm4_moe", json!({"routed_scaling_factor": 1.0})) },
        v3("glm4_moe_lite", json!({"first_k_dense_replace": null, "mlp_layer_types": ["dense", "sparse", "sparse"]})),
        v3("glm_moe_dsa", json!({})),
        Case { limit: 0.75, ..v3("glm5_next", json!({"swiglu_limit": 0.75})) },
        Case { shared: 2, ..v3("dots1", json!({"scoring_func": "noaux_tc", "n_shared_experts": 2})) },
        Case {
            shared: 1,
            choose: sqrt_softplus_biased_1_5,
            limit: 0.75,
            ..case(
                "deepseek_v4",
                json!({
            "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_shared_experts": 1,
            "num_hash_layers": 1, "scoring_func": "sqrtsoftplus", "norm_topk_prob": true, "routed_scaling_factor": 1.5,
            "topk_method": "noaux_tc", "swiglu_limit": 0.75, "vocab_size": 16}),
                &[v4_release, mlp_fused],
            )
        },
        Case {
            choose: sigmoid_biased,
            ..case(
                "minimax_m2",
                {
                    let mut config = mixtral.clone();
                    config.as_object_mut().unwrap().extend(
                        json!({"scoring_func": "sigmoid", "use_routing_bias": true,
                "shared_intermediate_size": 0})
                        .as_object()
                        .unwrap()
                        .clone(),
                    );
                    config
                },
                &[minimax_each, minimax_fused],
            )
        },
        Case {
            shared: 2,
            choose: softmax_biased_renormalised,
            ..case(
                "ernie4_5_moe",
                json!({"moe_intermediate_size": INTERMEDIATE,
            "moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
            "moe_layer_end_index": 2, "moe_layer_interval": 1, "moe_use_aux_free": true, "use_bias": false}),
                &[ernie_each, ernie_fused],
            )
        },
        Case {
            shared: 1,
            ..case(
                "hunyuan_v1_moe",
                json!({"intermediate_size": INTERMEDIATE, "moe_intermediate_size": [16, 16, 16],
            "num_experts": EXPERTS, "moe_topk": [2, 2, 2], "num_shared_expert": [1, 1, 1], "use_mixed_mlp_moe": true,
            "norm_topk_prob": true, "group_limited_greedy": false, "moe_layer_num_skipped": 0}),
                &[hunyuan_each, hunyuan_fused],
            )
        },
        Case {
            choose: sparse_mixer,
            ..case(
                "phimoe",
                {
                    let mut config = mixtral.clone();
                    config["router_jitter_noise"] = json!(0.2);
                    config
                },
                &[sparse_block_each, phi_fused],
            )
        },
        Case { choose: softmax_of_chosen, ..case("granitemoe", mixtral.clone(), &[granite]) },
        Case {
            shared: 2,
            choose: softmax_of_chosen,
            ..case(
                "granitemoeshared",
                {
                    let mut config = mixtral;
                    config["shared_intermediate_size"] = json!(2 * INTERMEDIATE);
                    config
                },
                &[granite, granite_current],
            )
        },
    ]
}

// What the definitions say of a token's experts.

fn top(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(count);
    order
}

fn probabilities(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
    logits.iter().map(|logit| logit.exp() / sum).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn chosen(scores: &[f64], experts: Vec<usize>) -> Chosen {
    experts.into_iter().map(|expert| (expert, scores[expert])).collect()
}

fn scaled(experts: Vec<(usize, f64)>, factor: f64) -> Chosen {
    experts.into_iter().map(|(expert, weight)| (expert, weight * factor)).collect()
}

fn renormalised(experts: Vec<(usize, f64)>) -> Chosen {
    let sum: f64 = experts.iter().map(|(_, weight)| weight).sum();
    scaled(experts, 1.0 / sum)
}

fn plus(scores: &[f64], bias: &[f64]) -> Vec<f64> {
    scores.iter().zip(bias).map(|(score, bias)| score + bias).collect()
}

/// Scores without those of groups that are not among the best two of four, judged by the sum of their best so many.
fn of_best_groups(scores: &[f64], judged_by: usize) -> Vec<f64> {
    let size = EXPERTS / 4;
    let groups: Vec<f64> =
        scores.chunks(size).map(|group| top(group, judged_by).into_iter().map(|expert| group[expert]).sum()).collect();
    let kept = top(&groups, 2);
    (0..EXPERTS)
        .map(|expert| if kept.contains(&(expert / size)) { scores[expert] } else { f64::NEG_INFINITY })
        .collect()
}

fn softmax(logits: &[f64], _: &[f64]) -> Chosen {
    let scores = probabilities(logits);
    chosen(&scores, top(&scores, TOP_K))
}

fn softmax_renormalised(logits: &[f64], bias: &[f64]) -> Chosen {
    renormalised(softmax(logits, bias))
}

fn softmax_of_chosen(logits: &[f64], _: &[f64]) -> Chosen {
    let experts = top(logits, TOP_K);
    let weights = probabilities(&experts.iter().map(|&expert| logits[expert]).collect::<Vec<_>>());
    experts.into_iter().zip(weights).collect()
}

fn softmax_of_best_groups_16(logits: &[f64], _: &[f64]) -> Chosen {
    let scores = probabilities(logits);
    scaled(chosen(&scores, top(&of_best_groups(&scores, 1), TOP_K)), 16.0)
}

fn softmax_biased_renormalised(logits: &[f64], bias: &[f64]) -> Chosen {
    let scores = probabilities(logits);
    renormalised(chosen(&scores, top(&plus(&scores, bias), TOP_K)))
}

fn sigmoid_biased(logits: &[f64], bias: &[f64]) -> Chosen {
    let scores: Vec<f64> = logits.iter().map(|&logit| sigmoid(logit)).collect();
    renormalised(chosen(&scores, top(&plus(&scores, bias), TOP_K)))
}

fn sigmoid_biased_2_5(logits: &[f64], bias: &[f64]) -> Chosen {
    scaled(sigmoid_biased(logits, bias), 2.5)
}

fn sigmoid_biased_of_best_groups_2_5(logits: &[f64], bias: &[f64]) -> Chosen {
    let scores: Vec<f64> = logits.iter().map(|&logit| sigmoid(logit)).collect();
    scaled(renormalised(chosen(&scores, top(&of_best_groups(&plus(&scores, bias), 2), TOP_K))), 2.5)
}

fn sqrt_softplus_biased_1_5(logits: &[f64], bias: &[f64]) -> Chosen {
    let scores: Vec<f64> = logits.iter().map(|logit| (1.0 + logit.exp()).ln().sqrt()).collect();
    scaled(renormalised(chosen(&scores, top(&plus(&scores, bias), TOP_K))), 1.5)
}

/// The first two by logit; each with its share among those that are near it, the second without the first. Jitter 0.2.
fn sparse_mixer(logits: &[f64], _: &[f64]) -> Chosen {
    let share = |best: usize, without: Option<usize>| {
        let far = |logit: f64| (logits[best] - logit) / logit.abs().max(logits[best]) > 0.4;
        let near = (0..EXPERTS).filter(|&expert| Some(expert) != without && !far(logits[expert]));
        logits[best].exp() / near.map(|expert| logits[expert].exp()).sum::<f64>()
    };
    let [first, second] = top(logits, 2)[..] else { panic!("two experts") };
    vec![(first, share(first, None)), (second, share(second, Some(first)))]
}

/// The layer's output.
fn defined(case: &Case, model: &Model) -> Rows {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let of_expert = |[gate, up, down]: &[Rows; 3], state: &[f64]| -> Vec<f64> {
        let inner: Vec<f64> = gate
            .iter()
            .zip(up)
            .map(|(gate, up)| {
                let gate = dot(gate, state).min(case.limit);
                gate * sigmoid(gate) * dot(up, state).clamp(-case.limit, case.limit)
            })
            .collect();
        down.iter().map(|row| dot(row, &inner)).collect()
    };
    let output = |state: &Vec<f64>| {
        let logits: Vec<f64> = model.router.iter().map(|row| dot(row, state)).collect();
        let mut output = if case.shared > 0 { of_expert(&model.shared, state) } else { vec![0.0; HIDDEN] };
        if case.gated {
            let weight = sigmoid(dot(&model.gate, state));
            output.iter_mut().for_each(|value| *value *= weight);
        }
        for (expert, weight) in (case.choose)(&logits, &model.bias) {
            output
                .iter_mut()
                .zip(of_expert(&model.experts[expert], state))
                .for_each(|(sum, part)| *sum += weight * part);
        }
        output
    };
    model.states.iter().map(output).collect()
}

// How the tensors are stored.

const LAYER: &str = "model.layers.2.";
const BY_NUMBER: [&str; 3] = ["w1", "w3", "w2"];
const BY_ROLE: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

fn put(tensors: &mut Tensors, name: &str, shape: &[usize], values: impl Iterator<Item = f64>) {
    let bytes = values.flat_map(|value| bf16::from_f64(value).to_le_bytes()).collect();
    tensors.insert(format!("{LAYER}{name}"), (Dtype::BF16, shape.to_vec(), bytes));
}

fn put_rows(tensors: &mut Tensors, name: &str, rows: &Rows) {
    put(tensors, name, &[rows.len(), rows[0].len()], rows.iter().flatten().copied());
}

fn put_bias(model: &Model, tensors: &mut Tensors, name: &str, shape: &[usize]) {
    let bytes = model.bias.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect();
    tensors.insert(format!("{LAYER}{name}"), (Dtype::F32, shape.to_vec(), bytes));
}

fn put_expert(tensors: &mut Tensors, prefix: &str, parts: [&str; 3], expert: &[Rows; 3]) {
    for (part, rows) in parts.iter().zip(expert) {
        put_rows(tensors, &format!("{prefix}.{part}.weight"), rows);
    }
}

fn put_each(model: &Model, tensors: &mut Tensors, prefix: &str, parts: [&str; 3]) {
    for (id, expert) in model.experts.iter().enumerate() {
        put_expert(tensors, &format!("{prefix}.{id}"), parts, expert);
    }
}

fn put_shared(model: &Model, tensors: &mut Tensors, prefix: &str, parts: [&str; 3]) {
    if !model.shared[0].is_empty() {
        put_expert(tensors, prefix, parts, &model.shared);
    }
}

fn put_fused(model: &Model, tensors: &mut Tensors, gate_up: &str, down: &str) {
    let both = model.experts.iter().flat_map(|[gate, up, _]| gate.iter().chain(up).flatten().copied());
    put(tensors, gate_up, &[EXPERTS, 2 * INTERMEDIATE, HIDDEN], both);
    let downs = model.experts.iter().flat_map(|[.., down]| down.iter().flatten().copied());
    put(tensors, down, &[EXPERTS, HIDDEN, INTERMEDIATE], downs);
}

fn sparse_block_each(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "block_sparse_moe.gate.weight", &model.router);
    put_each(model, tensors, "block_sparse_moe.experts", BY_NUMBER);
}

fn minimax_each(model: &Model, tensors: &mut Tensors) {
    sparse_block_each(model, tensors);
    put_bias(model, tensors, "block_sparse_moe.e_score_correction_bias", &[EXPERTS]);
}

fn mlp_each_unbiased(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "mlp.gate.weight", &model.router);
    put_each(model, tensors, "mlp.experts", BY_ROLE);
}

fn mlp_each_shared_unbiased(model: &Model, tensors: &mut Tensors) {
    mlp_each_unbiased(model, tensors);
    put_shared(model, tensors, "mlp.shared_experts", BY_ROLE);
}

fn mlp_each(model: &Model, tensors: &mut Tensors) {
    mlp_each_shared_unbiased(model, tensors);
    put_bias(model, tensors, "mlp.gate.e_score_correction_bias", &[EXPERTS]);
}

fn ernie_each(model: &Model, tensors: &mut Tensors) {
    mlp_each_shared_unbiased(model, tensors);
    put_bias(model, tensors, "mlp.moe_statics.e_score_correction_bias", &[1, EXPERTS]);
}

fn ernie_fused(model: &Model, tensors: &mut Tensors) {
    mlp_fused_unbiased(model, tensors);
    put_shared(model, tensors, "mlp.shared_experts", BY_ROLE);
    put_bias(model, tensors, "mlp.gate.moe_statics.e_score_correction_bias", &[1, EXPERTS]);
}

fn hunyuan_fused(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "mlp.gate.wg.weight", &model.router);
    put_fused(model, tensors, "mlp.experts.gate_up_proj", "mlp.experts.down_proj");
    put_shared(model, tensors, "mlp.shared_mlp", BY_ROLE);
}

fn hunyuan_each(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "mlp.gate.wg.weight", &model.router);
    put_each(model, tensors, "mlp.experts", BY_ROLE);
    put_shared(model, tensors, "mlp.shared_mlp", BY_ROLE);
}

fn mlp_fused_unbiased(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "mlp.gate.weight", &model.router);
    put_fused(model, tensors, "mlp.experts.gate_up_proj", "mlp.experts.down_proj");
}

fn mlp_fused(model: &Model, tensors: &mut Tensors) {
    mlp_fused_unbiased(model, tensors);
    put_shared(model, tensors, "mlp.shared_experts", BY_ROLE);
    put_bias(model, tensors, "mlp.gate.e_score_correction_bias", &[EXPERTS]);
}

fn minimax_fused(model: &Model, tensors: &mut Tensors) {
    mlp_fused_unbiased(model, tensors);
    put_bias(model, tensors, "mlp.e_score_correction_bias", &[EXPERTS]);
}

fn phi_fused(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "mlp.router.weight", &model.router);
    put_fused(model, tensors, "mlp.experts.gate_up_proj", "mlp.experts.down_proj");
}

fn qwen_each_gated(model: &Model, tensors: &mut Tensors) {
    mlp_each_unbiased(model, tensors);
    put_gated_shared(model, tensors);
}

fn qwen_fused_gated(model: &Model, tensors: &mut Tensors) {
    mlp_fused_unbiased(model, tensors);
    put_gated_shared(model, tensors);
}

fn put_gated_shared(model: &Model, tensors: &mut Tensors) {
    put_shared(model, tensors, "mlp.shared_expert", BY_ROLE);
    put_rows(tensors, "mlp.shared_expert_gate.weight", &vec![model.gate.clone()]);
}

/// Each expert's matrices transposed, under the prefix of a model with several parts.
fn mlp_transposed_nested(model: &Model, tensors: &mut Tensors) {
    let columns = |rows: Vec<&Vec<f64>>| -> Vec<f64> {
        (0..rows[0].len()).flat_map(|col| rows.iter().map(move |row| row[col]).collect::<Vec<_>>()).collect()
    };
    let both = model.experts.iter().flat_map(|[gate, up, _]| columns(gate.iter().chain(up).collect()));
    put(tensors, "mlp.experts.gate_up_proj", &[EXPERTS, HIDDEN, 2 * INTERMEDIATE], both);
    let downs = model.experts.iter().flat_map(|[.., down]| columns(down.iter().collect()));
    put(tensors, "mlp.experts.down_proj", &[EXPERTS, INTERMEDIATE, HIDDEN], downs);
    put_rows(tensors, "mlp.gate.weight", &model.router);
    rename(tensors, "model.", "model.language_model.");
}

/// DeepSeek's own names, without `model.`.
fn v4_release(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "ffn.gate.weight", &model.router);
    put_bias(model, tensors, "ffn.gate.bias", &[EXPERTS]);
    put_each(model, tensors, "ffn.experts", BY_NUMBER);
    put_shared(model, tensors, "ffn.shared_experts", BY_NUMBER);
    rename(tensors, "model.", "");
}

fn granite(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "block_sparse_moe.router.layer.weight", &model.router);
    put_fused(model, tensors, "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight");
    granite_shared(model, tensors);
}

fn granite_current(model: &Model, tensors: &mut Tensors) {
    put_rows(tensors, "block_sparse_moe.router.weight", &model.router);
    put_fused(model, tensors, "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj");
    granite_shared(model, tensors);
}

fn granite_shared(model: &Model, tensors: &mut Tensors) {
    let [gate, up, down] = &model.shared;
    if !gate.is_empty() {
        put_rows(tensors, "shared_mlp.input_linear.weight", &[gate.clone(), up.clone()].concat());
        put_rows(tensors, "shared_mlp.output_linear.weight", down);
    }
}

fn rename(tensors: &mut Tensors, from: &str, to: &str) {
    let renamed = |(name, tensor): (String, _)| (format!("{to}{}", name.strip_prefix(from).unwrap()), tensor);
    *tensors = std::mem::take(tensors).into_iter().map(renamed).collect();
}

fn write(config: &Value, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    assert!(bytes.len() < 100_000);
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    dir
}

/// The layer's output. A shared expert with a gate, which the kernel does not know yet, is here one more expert that every token chooses.
fn output(layer: &HfLayer, states: &[bf16]) -> Vec<f64> {
    let routing = layer.router.route(states, None).unwrap();
    let config = layer.config(TOKENS);
    let Some(weights) = layer.router.shared_weights(states) else {
        return reference::forward(&config, &layer.weights, states, &routing).unwrap();
    };
    let run = |config: MoeConfig, experts: &[Expert], routing: &Routing| {
        let weights = ExpertWeights { experts: experts.to_vec(), shared: Vec::new() };
        reference::forward(&config, &weights, states, routing).unwrap()
    };
    let count = layer.weights.shared.len();
    let of_all = (0..TOKENS).flat_map(|_| 0..count as i32).collect();
    let same = weights.iter().flat_map(|&weight| std::iter::repeat_n(weight, count)).collect();
    let everyone = Routing::new(count, of_all, same).unwrap();
    let shared = MoeConfig { experts: count, top_k: count, shared_experts: 0, ..config.clone() };
    let routed = run(MoeConfig { shared_experts: 0, ..config }, &layer.weights.experts, &routing);
    routed.iter().zip(run(shared, &layer.weights.shared, &everyone)).map(|(a, b)| a + b).collect()
}

/// The difference of the layer's output from what is defined, relative to it.
fn error(dir: &Path, model: &Model, defined: &Rows) -> f64 {
    let layer = Checkpoint::open(dir).unwrap().read(2).unwrap();
    let states: Vec<bf16> = model.states.iter().flatten().map(|&value| bf16::from_f64(value)).collect();
    let expected: Vec<f64> = defined.iter().flatten().copied().collect();
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = output(&layer, &states).into_iter().zip(&expected).map(|(a, e)| a - e).collect::<Vec<_>>();
    norm(&mut difference.into_iter()) / norm(&mut expected.iter().copied())
}

#[test]
fn every_family_s_layer_is_as_defined_however_it_is_stored() {
    for (seed, case) in cases().iter().enumerate() {
        let model = Model::new(seed as u64, case.shared);
        let defined = defined(case, &model);
        for (number, stored) in case.stored.iter().enumerate() {
            let mut tensors = Tensors::new();
            stored(&model, &mut tensors);
            let error = error(write(&case.config, &tensors).path(), &model, &defined);
            assert!(error < 1e-5, "{}, stored in way {number}: {error}", case.config);
        }
    }
}

#[test]
fn a_gated_shared_expert_is_refused_by_name() {
    for case in cases().iter().filter(|case| case.gated) {
        let mut tensors = Tensors::new();
        case.stored[0](&Model::new(0, case.shared), &mut tensors);
        let error = HfLayer::open(write(&case.config, &tensors).path(), 2).unwrap_err().to_string();
        let expected = "the shared expert's sigmoid gate (`mlp.shared_expert_gate.weight`), a weight for each token, is not supported yet";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn every_family_that_can_be_read_is_tested_here() {
    for family in FAMILIES.iter().filter(|family| family.unsupported.is_none()) {
        let tested = |case: &Case| family.model_types.iter().any(|model_type| case.config["model_type"] == *model_type);
        assert!(cases().iter().any(tested), "{}", family.name);
    }
}

#[test]
fn readme_has_every_family() {
    let readme = include_str!("../../../README.md");
    for family in &FAMILIES {
        assert!(readme.contains(&format!("| {} |", family.name)), "README's table lacks {}", family.name);
    }
}

#[test]
fn a_tensor_too_many_is_named() {
    for case in cases() {
        let model = Model::new(1, case.shared);
        let mut tensors = Tensors::new();
        case.stored[0](&model, &mut tensors);
        let first = tensors.keys().next().unwrap().clone();
        let layer = &first[..first.find("layers.2.").unwrap() + "layers.2.".len()];
        for extra in
            ["mlp.shared_expert_gate.bias", "block_sparse_moe.gate.bias", "mlp.experts.8.gate_proj.weight", "ffn.e"]
        {
            let mut more = tensors.clone();
            let name = format!("{layer}{extra}");
            more.insert(name.clone(), (Dtype::BF16, vec![1], vec![0; 2]));
            let error = HfLayer::open(write(&case.config, &more).path(), 2).unwrap_err().to_string();
            assert!(error.contains(&format!("has `{name}`, which a ")), "{error}");
        }
    }
}

#[test]
fn router_values_that_are_not_finite_are_named() {
    let all = cases();
    let case = all.iter().find(|case| case.config["model_type"] == "deepseek_v3").unwrap();
    for (name, at, size, expected) in [
        ("model.layers.2.mlp.gate.weight", 2 * (3 * HIDDEN + 5), 2, "has NaN at [3, 5]"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", 4 * 6, 4, "has NaN at [6]"),
    ] {
        let mut tensors = Tensors::new();
        mlp_each(&Model::new(1, case.shared), &mut tensors);
        tensors.get_mut(name).unwrap().2[at..at + size].fill(0xff);
        let error = HfLayer::open(write(&case.config, &tensors).path(), 2).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
}

#[test]
fn an_unknown_model_type_is_told_whose_tensors_it_has() {
    for (stored, expected) in [
        (mlp_each as fn(&Model, &mut Tensors), "the names of deepseek_v3 or deepseek_v32 or kimi_k2"),
        (sparse_block_each, "the names of mixtral or phimoe"),
        (hunyuan_each, "the names of hunyuan_v1_moe;"),
        (granite, "the names of granitemoe;"),
        (v4_release, "the names of deepseek_v4;"),
        (|_, _| {}, "supported are mixtral, qwen3_moe"),
    ] {
        let mut tensors = Tensors::new();
        stored(&Model::new(1, 1), &mut tensors);
        let error =
            Checkpoint::open(write(&json!({"model_type": "newer"}), &tensors).path()).err().unwrap().to_string();
        assert!(error.contains("`model_type` is \"newer\"") && error.contains(expected), "{error}");
    }
}

#[test]
fn experts_in_two_forms_are_refused() {
    let case = &cases()[0];
    let mut tensors = Tensors::new();
    sparse_block_each(&Model::new(1, 0), &mut tensors);
    mlp_fused_unbiased(&Model::new(2, 0), &mut tensors);
    let error = HfLayer::open(write(&case.config, &tensors).path(), 2).unwrap_err().to_string();
    assert!(error.contains("has both `model.layers.2.block_sparse_moe.experts.0.w1.weight` and"), "{error}");
}

#[test]
fn tensors_of_other_quantisations_are_called_that() {
    let all = cases();
    let case = all.iter().find(|case| case.config["model_type"] == "deepseek_v3").unwrap();
    for (packed, expected) in [("qweight", "awq or gptq"), ("weight_packed", "compressed-tensors")] {
        let mut tensors = Tensors::new();
        mlp_each(&Model::new(1, case.shared), &mut tensors);
        let renamed = |(name, tensor): (String, _)| match name.strip_suffix("proj.weight") {
            Some(stem) => (format!("{stem}proj.{packed}"), tensor),
            None => (name, tensor),
        };
        let tensors = tensors.into_iter().map(renamed).collect();
        let error = HfLayer::open(write(&case.config, &tensors).path(), 2).unwrap_err().to_string();
        assert!(error.contains(&format!("quantised ({expected})")), "{error}");
    }
}
