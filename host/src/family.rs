//! The model families: what of each is special, as one table.
//!
//! A family is a [`FamilySpec`]: what its sizes are called in `config.json`, which layers have experts, how tokens choose experts, and where the
//! tensors are. The values are those of the definitions in `transformers` 5.24, and of the models' own repositories where `transformers` has
//! none. A family that is another's layer under another name is one line and the fields that differ.

use std::fmt;

use crate::fields::Plain;
use crate::router::Scoring;

/// A model family: its row of the table, and the `model_type` it was found by.
#[derive(Clone, Copy)]
pub struct Family {
    pub(crate) spec: &'static FamilySpec,
    model_type: &'static str,
}

impl Family {
    /// The family's name for people.
    pub fn name(self) -> &'static str {
        self.spec.name
    }

    /// The `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        self.model_type
    }

    pub(crate) fn find(model_type: &str) -> Option<Self> {
        FAMILIES.iter().find_map(|spec| {
            let model_type = spec.model_types.iter().find(|known| **known == model_type)?;
            Some(Self { spec, model_type })
        })
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.model_type)
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

impl Eq for Family {}

/// All that the loader has to know of a family.
#[derive(Debug)]
pub(crate) struct FamilySpec {
    pub name: &'static str,
    /// What `config.json` may call it.
    pub model_types: &'static [&'static str],
    pub layers: Layers,
    /// An expert's intermediate size.
    pub intermediate: Size,
    /// The number of experts.
    pub experts: Size,
    pub top_k: Size,
    pub shared: Shared,
    pub router: RouterSpec,
    /// Where there is a clamp before the activation: `swiglu_limit`, or this.
    pub limit: Option<f32>,
    /// How the tensors may be stored.
    pub layouts: &'static [Layout],
    /// Fields of `config.json` that may only have these values.
    pub only: &'static [(&'static str, &'static [Plain])],
    /// Fields that others read, and that this family's definition passes over.
    pub ignored: &'static [&'static str],
    /// What of the family's definition the kernel cannot do.
    pub unsupported: Option<&'static str>,
}

impl FamilySpec {
    /// Whether the kernel can run the family's layers; where it is one setting that stands in the way, with that setting.
    pub fn can_run(&self) -> bool {
        self.unsupported.is_none() && !matches!(self.shared, Shared::Gated(_))
    }
}

/// A size in `config.json`: the first of these fields that is there, or the default.
#[derive(Debug)]
pub(crate) struct Size {
    pub fields: &'static [&'static str],
    pub default: Option<usize>,
    /// It may be a list with a number for each layer, all the same.
    pub of_layers: bool,
}

/// Which layers have experts.
#[derive(Debug)]
pub(crate) enum Layers {
    All,
    /// `mlp_layer_types`; where it is absent all but the first `first_k_dense_replace`.
    AfterDense {
        default: usize,
    },
    /// All of `decoder_sparse_step` except `mlp_only_layers`.
    Stepped,
    /// All; `mlp_layer_types` or `num_hash_layers` say which route by token id.
    Hashed {
        default: usize,
    },
    /// Every `moe_layer_interval`-th from `moe_layer_start_index` to `moe_layer_end_index`.
    Interval,
}

/// The experts that every token goes to.
#[derive(Debug)]
pub(crate) enum Shared {
    None,
    /// As many experts' widths as the first of these fields says.
    Count(Size),
    /// One of the width that this field says.
    Width(&'static str),
    /// One of the width that this field says, whose output is scaled by the sigmoid of the token's product with [`SHARED_GATE`].
    Gated(&'static str),
}

/// How tokens choose experts.
#[derive(Debug)]
pub(crate) struct RouterSpec {
    pub scoring: ScoringSpec,
    /// What else `scoring_func` may say for the same.
    pub scoring_alias: Option<&'static str>,
    /// Whether there is a correction bias for the choice, except in layers that route by token id.
    pub bias: bool,
    pub groups: Groups,
    pub normalize: Normalize,
    /// The default of `routed_scaling_factor`; none where the family has no such factor.
    pub scaling: Option<f32>,
    /// A field that says what the sum of the chosen scores is at least taken for.
    pub least_sum: Option<&'static str>,
}

#[derive(Debug)]
pub(crate) enum ScoringSpec {
    Fixed(Scoring),
    /// `scoring_func` says sqrtsoftplus, the default, or sigmoid.
    SqrtSoftplusOrSigmoid,
    /// Sparse mixer with `router_jitter_noise`, or this.
    SparseMixer {
        jitter: f32,
    },
}

/// Whether the choice is limited to the best groups of experts.
#[derive(Debug)]
pub(crate) enum Groups {
    None,
    /// `n_group` and `topk_group` by the sum of a group's best two; the default of both.
    BestTwo(Option<(usize, usize)>),
    /// `topk_method` says whether; by a group's best.
    ByMethod,
}

#[derive(Debug)]
pub(crate) enum Normalize {
    Fixed(bool),
    /// `norm_topk_prob`, or this.
    Field(bool),
}

/// Where a layer's tensors are; all names are relative to the layer.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The router's matrix [E, H].
    pub router: &'static str,
    /// The router's correction bias [E] or [1, E].
    pub bias: &'static str,
    /// The routed experts.
    pub experts: Experts,
    /// The shared expert.
    pub shared: Stored,
}

/// How the routed experts are stored.
#[derive(Debug)]
pub(crate) enum Experts {
    /// Each in a folder `PREFIX.E`, its three matrices as [`Stored::Apart`].
    Each { prefix: &'static str, parts: Parts },
    /// Gate and up [E, 2I, H], gate first, and down [E, H, I].
    Fused { gate_up: &'static str, down: &'static str },
    /// As `Fused`, each matrix transposed: [E, H, 2I] and [E, I, H].
    Transposed { gate_up: &'static str, down: &'static str },
}

/// The names of the gate, up and down matrices of an expert.
pub(crate) type Parts = [&'static str; 3];

/// How one expert is stored.
#[derive(Debug)]
pub(crate) enum Stored {
    /// Three matrices `PREFIX.PART.weight`.
    Apart { prefix: &'static str, parts: Parts },
    /// Gate and up [2I, H], gate first, and down [H, I].
    Fused { gate_up: &'static str, down: &'static str },
}

impl Experts {
    /// The name of the first expert's first tensor, by which a layout is known.
    pub fn first(&self) -> String {
        match self {
            Self::Each { prefix, parts: [gate, ..] } => format!("{prefix}.0.{gate}.weight"),
            Self::Fused { gate_up, .. } | Self::Transposed { gate_up, .. } => (*gate_up).to_owned(),
        }
    }
}

/// The gate of a shared expert [1, H].
pub(crate) const SHARED_GATE: &str = "mlp.shared_expert_gate.weight";

/// The parts of a layer that may hold a feed-forward block, in any family: every tensor there must be read.
pub(crate) const BLOCKS: [&str; 7] =
    ["mlp.", "block_sparse_moe.", "ffn.", "feed_forward.", "shared_mlp.", "moe.", "shared_experts."];

/// What may stand before the number of a layer in the name of a tensor.
pub(crate) const LAYER_PREFIXES: [&str; 5] = [
    "model.layers.",
    "layers.",
    "model.language_model.layers.",
    "language_model.model.layers.",
    "language_model.layers.",
];

/// Fields of `config.json` that change what some family's layer computes, and the values with which they change nothing. A family whose
/// reader does not look at one of them refuses every other value. Null always counts as absent here.
pub(crate) const SETTINGS: [(&str, &[Plain]); 33] = [
    ("hidden_act", &[Plain::Text("silu"), Plain::Text("swish")]),
    ("moe_layer_freq", &[Plain::Number(1.0)]),
    ("topk_method", &[Plain::Text("greedy")]),
    ("n_group", &[Plain::Number(1.0), Plain::Number(0.0), Plain::Flag(false)]),
    ("topk_group", &[Plain::Number(1.0), Plain::Number(0.0), Plain::Flag(false)]),
    ("group_limited_greedy", &[Plain::Flag(false)]),
    ("routed_scaling_factor", &[Plain::Number(1.0), Plain::Flag(false)]),
    ("n_shared_experts", &[Plain::Number(0.0)]),
    ("num_shared_experts", &[Plain::Number(0.0)]),
    ("num_shared_expert", &[Plain::Number(0.0)]),
    ("moe_num_shared_experts", &[Plain::Number(0.0)]),
    ("shared_expert_intermediate_size", &[Plain::Number(0.0)]),
    ("shared_intermediate_size", &[Plain::Number(0.0)]),
    ("swiglu_limit", &[]),
    ("swiglu_alpha", &[Plain::Number(1.0)]),
    ("mlp_bias", &[Plain::Flag(false)]),
    ("use_bias", &[Plain::Flag(false)]),
    ("expert_bias", &[Plain::Flag(false)]),
    ("moe_bias", &[Plain::Flag(false)]),
    ("router_bias", &[Plain::Flag(false)]),
    ("use_routing_bias", &[Plain::Flag(false)]),
    ("moe_use_aux_free", &[Plain::Flag(false)]),
    ("first_k_dense_replace", &[Plain::Number(0.0)]),
    ("mlp_layer_types", &[]),
    ("decoder_sparse_step", &[Plain::Number(1.0)]),
    ("moe_layer_num_skipped", &[Plain::Number(0.0)]),
    ("interleave_moe_layer_step", &[Plain::Number(1.0)]),
    ("num_hash_layers", &[Plain::Number(0.0)]),
    ("zero_expert_num", &[Plain::Number(0.0)]),
    ("apply_router_weight_on_input", &[Plain::Flag(false)]),
    ("moe_latent_size", &[Plain::Number(0.0)]),
    ("routed_expert_hidden_size", &[]),
    ("router_logit_softcapping", &[]),
];

/// Every family. The kernel's users find them by `model_type`.
pub(crate) static FAMILIES: [FamilySpec; 24] = [
    MIXTRAL,
    QWEN2_MOE,
    FamilySpec { name: "Qwen3-MoE", model_types: &["qwen3_moe"], top_k: top_k(8), shared: Shared::None, ..QWEN2_MOE },
    FamilySpec {
        name: "Qwen3-VL-MoE",
        model_types: &["qwen3_vl_moe_text", "qwen3_vl_moe"],
        top_k: top_k(4),
        shared: Shared::None,
        router: RouterSpec { normalize: Normalize::Fixed(true), ..SOFTMAX },
        layouts: &[Layout {
            experts: Experts::Transposed { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" },
            ..MLP
        }],
        ..QWEN2_MOE
    },
    FamilySpec {
        name: "Qwen3-Next",
        model_types: &["qwen3_next"],
        top_k: top_k(10),
        router: RouterSpec { normalize: Normalize::Field(true), ..SOFTMAX },
        ..QWEN2_MOE
    },
    FamilySpec {
        name: "Qwen3.5-MoE",
        model_types: &["qwen3_5_moe_text", "qwen3_5_moe"],
        layers: Layers::All,
        top_k: top_k(8),
        router: RouterSpec { normalize: Normalize::Fixed(true), ..SOFTMAX },
        ..QWEN2_MOE
    },
    FamilySpec {
        name: "OLMoE",
        model_types: &["olmoe"],
        layers: Layers::All,
        intermediate: field(&["intermediate_size"]),
        experts: field(&["num_experts", "num_local_experts"]).or(64),
        top_k: top_k(8),
        shared: Shared::None,
        ..QWEN2_MOE
    },
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    FamilySpec {
        name: "DeepSeek-V3.2",
        model_types: &["deepseek_v32"],
        experts: field(&["num_experts", "n_routed_experts"]).or(256),
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "DeepSeek-V4",
        model_types: &["deepseek_v4"],
        layers: Layers::Hashed { default: 3 },
        top_k: top_k(6),
        router: RouterSpec {
            scoring: ScoringSpec::SqrtSoftplusOrSigmoid,
            groups: Groups::None,
            normalize: Normalize::Fixed(true),
            scaling: Some(1.5),
            ..NOAUX
        },
        limit: Some(10.0),
        layouts: &[
            Layout {
                router: "ffn.gate.weight",
                bias: "ffn.gate.bias",
                experts: Experts::Each { prefix: "ffn.experts", parts: BY_NUMBER },
                shared: Stored::Apart { prefix: "ffn.shared_experts", parts: BY_NUMBER },
            },
            MLP_FUSED,
        ],
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "Kimi-K2",
        model_types: &["kimi_k2", "kimi_k25"],
        layers: Layers::AfterDense { default: 0 },
        experts: field(&["n_routed_experts"]),
        top_k: field(&["num_experts_per_tok"]),
        shared: Shared::Count(field(&["n_shared_experts"]).or(0)),
        router: RouterSpec {
            groups: Groups::BestTwo(None),
            normalize: Normalize::Field(false),
            scaling: Some(1.0),
            ..NOAUX
        },
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "GLM-4.5",
        model_types: &["glm4_moe", "glm4v_moe_text", "glm4v_moe"],
        layers: Layers::AfterDense { default: 1 },
        experts: field(&["n_routed_experts"]).or(128),
        router: RouterSpec { groups: Groups::BestTwo(Some((1, 1))), scaling: Some(1.0), ..NOAUX },
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "GLM-4.7-Flash",
        model_types: &["glm4_moe_lite"],
        layers: Layers::AfterDense { default: 1 },
        experts: field(&["n_routed_experts"]).or(64),
        top_k: top_k(4),
        router: RouterSpec { groups: Groups::BestTwo(Some((1, 1))), scaling: Some(1.8), ..NOAUX },
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "GLM-5",
        model_types: &["glm_moe_dsa"],
        experts: field(&["num_experts", "n_routed_experts"]).or(256),
        router: RouterSpec { groups: Groups::BestTwo(Some((1, 1))), ..NOAUX },
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "GLM-5.3-Flash",
        model_types: &["glm5_next_text", "glm5_next"],
        router: RouterSpec { groups: Groups::BestTwo(Some((1, 1))), ..NOAUX },
        limit: Some(10.0),
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "dots1",
        model_types: &["dots1"],
        layers: Layers::AfterDense { default: 0 },
        experts: field(&["n_routed_experts"]),
        top_k: field(&["num_experts_per_tok"]),
        shared: Shared::Count(field(&["n_shared_experts"]).or(0)),
        router: RouterSpec {
            scoring_alias: Some("noaux_tc"),
            groups: Groups::BestTwo(Some((1, 1))),
            normalize: Normalize::Field(false),
            scaling: Some(1.0),
            ..NOAUX
        },
        ..DEEPSEEK_V3
    },
    FamilySpec {
        name: "MiniMax-M2",
        model_types: &["minimax_m2"],
        experts: field(&["num_local_experts", "num_experts"]).or(256),
        top_k: top_k(8),
        router: RouterSpec { groups: Groups::None, normalize: Normalize::Fixed(true), scaling: None, ..NOAUX },
        layouts: &[
            Layout { bias: "block_sparse_moe.e_score_correction_bias", ..SPARSE_BLOCK },
            Layout { bias: "mlp.e_score_correction_bias", ..MLP_FUSED },
        ],
        only: &[("use_routing_bias", &[Plain::Flag(true)])],
        ..MIXTRAL
    },
    FamilySpec {
        name: "ERNIE-4.5",
        model_types: &["ernie4_5_moe"],
        layers: Layers::Interval,
        experts: field(&["moe_num_experts", "num_experts"]).or(64),
        top_k: field(&["moe_k", "num_experts_per_tok"]).or(6),
        shared: Shared::Count(field(&["moe_num_shared_experts"]).or(2)),
        router: RouterSpec {
            bias: true,
            normalize: Normalize::Fixed(true),
            least_sum: Some("moe_norm_min"),
            ..SOFTMAX
        },
        layouts: &[
            Layout { bias: "mlp.moe_statics.e_score_correction_bias", ..MLP },
            Layout { bias: "mlp.gate.moe_statics.e_score_correction_bias", ..MLP_FUSED },
        ],
        only: &[("moe_use_aux_free", &[Plain::Flag(true)])],
        ignored: &[],
        ..DEEPSEEK_V2
    },
    FamilySpec {
        name: "Hunyuan",
        model_types: &["hunyuan_v1_moe"],
        layers: Layers::All,
        intermediate: field(&["moe_intermediate_size", "intermediate_size"]).of_layers(),
        experts: field(&["num_experts", "num_local_experts"]).of_layers(),
        top_k: field(&["moe_topk", "num_experts_per_tok"]).of_layers(),
        shared: Shared::Count(field(&["num_shared_expert"]).or(1).of_layers()),
        router: RouterSpec { normalize: Normalize::Fixed(true), ..SOFTMAX },
        layouts: &[
            Layout {
                router: "mlp.gate.wg.weight",
                shared: Stored::Apart { prefix: "mlp.shared_mlp", parts: BY_ROLE },
                ..MLP
            },
            Layout {
                router: "mlp.gate.wg.weight",
                shared: Stored::Apart { prefix: "mlp.shared_mlp", parts: BY_ROLE },
                ..MLP_FUSED
            },
        ],
        only: &[("use_mixed_mlp_moe", &[Plain::Flag(true)])],
        // They belong to `group_limited_greedy`, and to weights that are not normalised.
        ignored: &["n_group", "topk_group", "routed_scaling_factor"],
        ..MIXTRAL
    },
    FamilySpec {
        name: "Phi-3.5-MoE",
        model_types: &["phimoe"],
        experts: field(&["num_local_experts"]).or(16),
        router: RouterSpec {
            scoring: ScoringSpec::SparseMixer { jitter: 0.01 },
            normalize: Normalize::Fixed(false),
            ..SOFTMAX
        },
        layouts: &[SPARSE_BLOCK, Layout { router: "mlp.router.weight", ..MLP_FUSED }],
        only: &[("num_experts_per_tok", &[Plain::Number(2.0)])],
        ..MIXTRAL
    },
    FamilySpec {
        name: "Granite",
        model_types: &["granitemoe", "granitemoeshared", "granitemoehybrid"],
        shared: Shared::Width("shared_intermediate_size"),
        layouts: &[GRANITE, GRANITE_CURRENT],
        ..MIXTRAL
    },
    FamilySpec {
        name: "Llama-4",
        model_types: &["llama4_text", "llama4"],
        experts: field(&["num_local_experts"]).or(16),
        top_k: top_k(1),
        shared: Shared::Width("intermediate_size"),
        router: RouterSpec {
            scoring: ScoringSpec::Fixed(Scoring::Sigmoid),
            normalize: Normalize::Fixed(false),
            ..SOFTMAX
        },
        layouts: &[Layout {
            router: "feed_forward.router.weight",
            bias: "",
            experts: Experts::Transposed {
                gate_up: "feed_forward.experts.gate_up_proj",
                down: "feed_forward.experts.down_proj",
            },
            shared: Stored::Apart { prefix: "feed_forward.shared_expert", parts: BY_ROLE },
        }],
        unsupported: Some("a routing weight on the expert's input, in place of its output,"),
        ..MIXTRAL
    },
    FamilySpec {
        name: "gpt-oss",
        model_types: &["gpt_oss"],
        experts: field(&["num_local_experts"]).or(128),
        top_k: top_k(4),
        layouts: &[Layout {
            router: "mlp.router.weight",
            experts: Experts::Transposed { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" },
            ..MLP_FUSED
        }],
        unsupported: Some("an expert with biases, and its activation with alpha 1.702,"),
        ..MIXTRAL
    },
];

const MIXTRAL: FamilySpec = FamilySpec {
    name: "Mixtral",
    model_types: &["mixtral"],
    layers: Layers::All,
    intermediate: field(&["intermediate_size"]),
    experts: field(&["num_local_experts", "num_experts"]).or(8),
    top_k: top_k(2),
    shared: Shared::None,
    router: RouterSpec { normalize: Normalize::Fixed(true), ..SOFTMAX },
    limit: None,
    layouts: &[SPARSE_BLOCK, MLP_FUSED],
    only: &[],
    ignored: &[],
    unsupported: None,
};

const QWEN2_MOE: FamilySpec = FamilySpec {
    name: "Qwen2-MoE",
    model_types: &["qwen2_moe"],
    layers: Layers::Stepped,
    intermediate: field(&["moe_intermediate_size"]),
    experts: field(&["num_local_experts", "num_experts"]),
    top_k: top_k(4),
    shared: Shared::Gated("shared_expert_intermediate_size"),
    router: SOFTMAX,
    layouts: &[Layout { shared: QWEN_SHARED, ..MLP }, Layout { shared: QWEN_SHARED, ..MLP_FUSED }],
    ..MIXTRAL
};

const DEEPSEEK_V2: FamilySpec = FamilySpec {
    name: "DeepSeek-V2",
    model_types: &["deepseek_v2"],
    layers: Layers::AfterDense { default: 0 },
    intermediate: field(&["moe_intermediate_size"]),
    experts: field(&["n_routed_experts", "num_experts"]).or(64),
    top_k: field(&["num_experts_per_tok"]),
    shared: Shared::Count(field(&["n_shared_experts"]).or(2)),
    router: RouterSpec { groups: Groups::ByMethod, normalize: Normalize::Fixed(false), scaling: Some(1.0), ..SOFTMAX },
    layouts: &[MLP, MLP_FUSED],
    // Without a method that reads them they say nothing.
    ignored: &["n_group", "topk_group"],
    ..MIXTRAL
};

const DEEPSEEK_V3: FamilySpec = FamilySpec {
    name: "DeepSeek-V3",
    model_types: &["deepseek_v3"],
    layers: Layers::AfterDense { default: 3 },
    experts: field(&["n_routed_experts", "num_local_experts"]).or(256),
    top_k: top_k(8),
    shared: Shared::Count(field(&["n_shared_experts"]).or(1)),
    router: NOAUX,
    only: &[("topk_method", &[Plain::Text("noaux_tc")])],
    ..DEEPSEEK_V2
};

/// Softmax over all experts.
const SOFTMAX: RouterSpec = RouterSpec {
    scoring: ScoringSpec::Fixed(Scoring::Softmax),
    scoring_alias: None,
    bias: false,
    groups: Groups::None,
    normalize: Normalize::Field(false),
    scaling: None,
    least_sum: None,
};

/// DeepSeek-V3's router: sigmoid, and a bias for the choice in place of an auxiliary loss.
const NOAUX: RouterSpec = RouterSpec {
    scoring: ScoringSpec::Fixed(Scoring::Sigmoid),
    bias: true,
    groups: Groups::BestTwo(Some((8, 4))),
    normalize: Normalize::Field(true),
    scaling: Some(2.5),
    ..SOFTMAX
};

const BY_NUMBER: Parts = ["w1", "w3", "w2"];
const BY_ROLE: Parts = ["gate_proj", "up_proj", "down_proj"];

/// Qwen's shared expert.
const QWEN_SHARED: Stored = Stored::Apart { prefix: "mlp.shared_expert", parts: BY_ROLE };

/// Most families' names.
const MLP: Layout = Layout {
    router: "mlp.gate.weight",
    bias: "mlp.gate.e_score_correction_bias",
    experts: Experts::Each { prefix: "mlp.experts", parts: BY_ROLE },
    shared: Stored::Apart { prefix: "mlp.shared_experts", parts: BY_ROLE },
};

/// The same with all experts in two tensors, as `transformers` 5 holds them.
const MLP_FUSED: Layout =
    Layout { experts: Experts::Fused { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" }, ..MLP };

/// Mixtral's names.
const SPARSE_BLOCK: Layout = Layout {
    router: "block_sparse_moe.gate.weight",
    experts: Experts::Each { prefix: "block_sparse_moe.experts", parts: BY_NUMBER },
    ..MLP
};

const GRANITE: Layout = Layout {
    router: "block_sparse_moe.router.layer.weight",
    bias: "",
    experts: Experts::Fused {
        gate_up: "block_sparse_moe.input_linear.weight",
        down: "block_sparse_moe.output_linear.weight",
    },
    shared: Stored::Fused { gate_up: "shared_mlp.input_linear.weight", down: "shared_mlp.output_linear.weight" },
};

/// Granite's names within `transformers` 5.
const GRANITE_CURRENT: Layout = Layout {
    router: "block_sparse_moe.router.weight",
    experts: Experts::Fused {
        gate_up: "block_sparse_moe.experts.gate_up_proj",
        down: "block_sparse_moe.experts.down_proj",
    },
    ..GRANITE
};

const fn field(fields: &'static [&'static str]) -> Size {
    Size { fields, default: None, of_layers: false }
}

const fn top_k(default: usize) -> Size {
    field(&["num_experts_per_tok"]).or(default)
}

impl Size {
    const fn or(self, default: usize) -> Self {
        Self { default: Some(default), ..self }
    }

    const fn of_layers(self) -> Self {
        Self { of_layers: true, ..self }
    }
}

#[cfg(test)]
mod checkpoints;
