//! `config.json` of the supported model families: sizes, router settings, and which layers have experts.

use std::path::Path;

use crate::error::{Error, Result};
use crate::family::{Family, Groups, Layers, Normalize, SETTINGS, ScoringSpec, Shared, Size};
use crate::fields::{Fields, Plain};
use crate::quantisation::Quantisation;
use crate::router::{ExpertGroups, GroupScore, Scoring};

/// What a layer's feed-forward block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerKind {
    Dense,
    Moe,
    /// Experts chosen by token id.
    HashMoe,
}

/// What `config.json` says about the MoE layers.
#[derive(Debug)]
pub(crate) struct ModelConfig {
    pub family: Family,
    pub quantisation: Option<Quantisation>,
    pub layers: Vec<LayerKind>,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
    /// How many experts of the routed ones' width the shared expert is.
    pub shared_experts: usize,
    pub swiglu_limit: Option<f32>,
    pub scoring: Scoring,
    pub normalize: bool,
    pub scaling: f32,
    pub least_sum: f32,
    pub groups: Option<ExpertGroups>,
    pub vocabulary: usize,
}

/// What `config.json` says: a model that can be read, or a `model_type` that nobody knows.
#[derive(Debug)]
pub(crate) enum Parsed {
    Known(ModelConfig),
    Unknown { model_type: String },
}

impl ModelConfig {
    /// Reads `config.json`; absent fields have the defaults of `transformers`. A model with several parts has its language model's settings
    /// in `text_config`.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Parsed> {
        let whole = Fields::parse(path, text)?;
        let nested = whole.nested("text_config")?;
        let fields = nested.as_ref().unwrap_or(&whole);
        let model_type = match fields.find_text("model_type")? {
            Some(model_type) if nested.is_none() || Family::find(model_type).is_some() => model_type,
            _ => whole.text("model_type")?,
        };
        let Some(family) = Family::find(model_type) else {
            return Ok(Parsed::Unknown { model_type: model_type.to_owned() });
        };
        let quantisation = match (Quantisation::read(&whole)?, &nested) {
            (None, Some(nested)) => Quantisation::read(nested)?,
            (quantisation, _) => quantisation,
        };
        Self::read(fields, family, quantisation).map(Parsed::Known)
    }

    /// The first layer with experts.
    pub fn first_moe(&self) -> Option<usize> {
        self.layers.iter().position(|&kind| kind != LayerKind::Dense)
    }

    fn read(fields: &Fields, family: Family, quantisation: Option<Quantisation>) -> Result<Self> {
        let spec = family.spec;
        let unsupported = |what: &str| Error::Unsupported {
            path: fields.path().to_owned(),
            family: spec.name,
            what: what.to_owned(),
        };
        if let Some(what) = spec.unsupported {
            return Err(unsupported(what));
        }
        for (field, allowed) in spec.only {
            fields.is(field, allowed)?;
        }
        let intermediate = spec.intermediate.positive(fields)?;
        let experts = spec.experts.read(fields)?;
        let top_k = spec.top_k.read(fields)?;
        if !(1..=experts).contains(&top_k) {
            return Err(Error::TopK { top_k, experts });
        }
        let of_width = |field: &str, width: usize| {
            let what = format!("a shared expert of width {width} (`{field}`) beside experts of width {intermediate}");
            if width.is_multiple_of(intermediate) { Ok(width / intermediate) } else { Err(unsupported(&what)) }
        };
        let shared_experts = match &spec.shared {
            Shared::None => 0,
            Shared::Count(size) if size.fields.iter().any(|field| fields.is_null(field)) => 0,
            Shared::Count(size) => size.read(fields)?,
            Shared::Width(field) => of_width(field, fields.find_size(field)?.unwrap_or(0))?,
            Shared::Gated(field) => of_width(field, fields.size(field, None)?)?,
        };
        let router = &spec.router;
        let config = Self {
            family,
            quantisation,
            layers: layer_kinds(&spec.layers, fields)?,
            hidden: fields.positive("hidden_size")?,
            intermediate,
            experts,
            top_k,
            shared_experts,
            swiglu_limit: match spec.limit {
                Some(_) if fields.is_null("swiglu_limit") => None,
                Some(default) => Some(fields.number("swiglu_limit", Some(default))?),
                None => None,
            },
            scoring: scoring(fields, family)?,
            normalize: match router.normalize {
                Normalize::Field(default) => fields.flag("norm_topk_prob", default)?,
                Normalize::Fixed(always) => {
                    fields.is("norm_topk_prob", &[Plain::Flag(always)])?;
                    always
                }
            },
            scaling: match router.scaling {
                Some(default) => fields.number("routed_scaling_factor", Some(default))?,
                None => 1.0,
            },
            least_sum: match router.least_sum {
                Some(field) => fields.number(field, Some(1e-12))?,
                None => 0.0,
            },
            groups: expert_groups(fields, &router.groups, experts, top_k)?,
            vocabulary: match spec.layers {
                Layers::Hashed { .. } => fields.size("vocab_size", Some(129280))?,
                _ => 0,
            },
        };
        let settings = SETTINGS.iter().filter(|(field, _)| !spec.ignored.contains(field));
        for (field, allowed) in settings {
            fields.unread_is(field, allowed)?;
        }
        Ok(config)
    }
}

impl Size {
    /// The field that counts: the first that has a value, else the first that is there, else the first.
    fn field(&self, fields: &Fields) -> &'static str {
        let valued = self.fields.iter().find(|field| fields.has(field));
        let there = || self.fields.iter().find(|field| fields.is_null(field));
        valued.or_else(there).unwrap_or(&self.fields[0])
    }

    fn read(&self, fields: &Fields) -> Result<usize> {
        let field = self.field(fields);
        if self.of_layers { fields.size_of_layers(field, self.default) } else { fields.size(field, self.default) }
    }

    fn positive(&self, fields: &Fields) -> Result<usize> {
        match self.read(fields)? {
            0 => Err(fields.error(self.field(fields), "is 0; it must be at least 1".into())),
            size => Ok(size),
        }
    }
}

fn scoring(fields: &Fields, family: Family) -> Result<Scoring> {
    let router = &family.spec.router;
    let scoring = match router.scoring {
        ScoringSpec::Fixed(scoring) => scoring,
        ScoringSpec::SparseMixer { jitter } => {
            Scoring::SparseMixer { jitter: fields.number("router_jitter_noise", Some(jitter))? }
        }
        ScoringSpec::SqrtSoftplusOrSigmoid => match fields.find_text("scoring_func")?.unwrap_or("sqrtsoftplus") {
            "sqrtsoftplus" => Scoring::SqrtSoftplus,
            "sigmoid" => Scoring::Sigmoid,
            other => {
                let problem = format!("is {other:?}; supported are \"sqrtsoftplus\" and \"sigmoid\"");
                return Err(fields.error("scoring_func", problem));
            }
        },
    };
    let same = Plain::Text(match scoring {
        Scoring::Softmax => "softmax",
        Scoring::Sigmoid => "sigmoid",
        Scoring::SqrtSoftplus => "sqrtsoftplus",
        Scoring::SparseMixer { .. } => "sparsemixer",
    });
    match router.scoring_alias {
        Some(alias) => fields.is("scoring_func", &[same, Plain::Text(alias)])?,
        None => fields.is("scoring_func", &[same])?,
    }
    Ok(scoring)
}

/// The group-limited choice, checked so that every token finds its top-k.
fn expert_groups(fields: &Fields, groups: &Groups, experts: usize, top_k: usize) -> Result<Option<ExpertGroups>> {
    let (score, default) = match *groups {
        Groups::None => return Ok(None),
        Groups::BestTwo(default) => (GroupScore::BestTwo, default),
        Groups::ByMethod => match fields.find_text("topk_method")?.unwrap_or("greedy") {
            "greedy" => return Ok(None),
            "group_limited_greedy" => (GroupScore::Best, None),
            other => {
                let problem = format!("is {other:?}; supported are \"greedy\" and \"group_limited_greedy\"");
                return Err(fields.error("topk_method", problem));
            }
        },
    };
    // Null is no limit, where an absent field has a default.
    let unlimited = fields.is_null("n_group") || (default.is_none() && !fields.has("n_group"));
    if unlimited && score == GroupScore::BestTwo {
        return Ok(None);
    }
    let count = fields.size("n_group", default.map(|(count, _)| count))?;
    let kept = fields.size("topk_group", default.map(|(_, kept)| kept))?;
    if count == 0 || !experts.is_multiple_of(count) {
        return Err(fields.error("n_group", format!("is {count}; it must divide the {experts} experts")));
    }
    if kept > count || kept * (experts / count) < top_k {
        let problem = format!("is {kept}; that many of {count} groups must exist and hold {top_k} experts or more");
        return Err(fields.error("topk_group", problem));
    }
    Ok(Some(ExpertGroups { count, kept, score }))
}

fn layer_kinds(layers: &Layers, fields: &Fields) -> Result<Vec<LayerKind>> {
    let count = fields.positive("num_hidden_layers")?;
    let kinds = |moe: &dyn Fn(usize) -> bool| {
        (0..count).map(|layer| if moe(layer) { LayerKind::Moe } else { LayerKind::Dense }).collect()
    };
    Ok(match *layers {
        Layers::All => kinds(&|_| true),
        Layers::AfterDense { default } => {
            let said = fields.find_size("first_k_dense_replace")?;
            match named_kinds(fields, count, &[("sparse", LayerKind::Moe), ("moe", LayerKind::Moe)])? {
                Some(kinds) => kinds,
                None => {
                    let dense = fields.or_default("first_k_dense_replace", said, Some(default))?;
                    kinds(&|layer| layer >= dense)
                }
            }
        }
        Layers::Stepped => {
            let dense = fields.sizes("mlp_only_layers")?.unwrap_or_default();
            let step = fields.size("decoder_sparse_step", Some(1))?.max(1);
            kinds(&|layer| !dense.contains(&layer) && (layer + 1) % step == 0)
        }
        Layers::Hashed { default } => {
            let said = fields.find_size("num_hash_layers")?;
            match named_kinds(fields, count, &[("hash_moe", LayerKind::HashMoe), ("moe", LayerKind::Moe)])? {
                Some(kinds) => kinds,
                None => {
                    let hashed = fields.or_default("num_hash_layers", said, Some(default))?;
                    let kind = |layer| if layer < hashed { LayerKind::HashMoe } else { LayerKind::Moe };
                    (0..count).map(kind).collect()
                }
            }
        }
        Layers::Interval => {
            let first = fields.size("moe_layer_start_index", Some(1))?;
            let last = match fields.integer("moe_layer_end_index", -1)? {
                -1 => count as i64 - 1,
                last => last,
            };
            let interval = fields.size("moe_layer_interval", Some(1))?.max(1);
            kinds(&|layer| layer >= first && layer as i64 <= last && (layer + 1) % interval == 0)
        }
    })
}

/// `mlp_layer_types`, if it is there: `dense`, or one of these names.
fn named_kinds(fields: &Fields, count: usize, names: &[(&str, LayerKind)]) -> Result<Option<Vec<LayerKind>>> {
    let Some(types) = fields.texts("mlp_layer_types")? else { return Ok(None) };
    if types.len() != count {
        let problem = format!("has {} entries; it must have one for each of the {count} layers", types.len());
        return Err(fields.error("mlp_layer_types", problem));
    }
    let kind = |name: &&str| match names.iter().find(|(known, _)| known == name) {
        Some(&(_, kind)) => Ok(kind),
        None if *name == "dense" => Ok(LayerKind::Dense),
        None => {
            let known: Vec<String> = names.iter().map(|(known, _)| format!("{known:?}")).collect();
            let problem = format!("has {name:?}; known are {} and \"dense\"", known.join(", "));
            Err(fields.error("mlp_layer_types", problem))
        }
    };
    types.iter().map(kind).collect::<Result<_>>().map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::family::FAMILIES;
    use crate::recognise::unknown_model_type;
    use crate::testing::{FIXTURES, fixture};

    fn parse(value: &Value) -> Result<ModelConfig> {
        let path = Path::new("config.json");
        match ModelConfig::parse(path, value.to_string().as_bytes())? {
            Parsed::Known(config) => Ok(config),
            Parsed::Unknown { model_type } => Err(unknown_model_type(path, &model_type, &[])),
        }
    }

    /// The least that `config.json` of a family must say, and these fields.
    fn least(model_type: &str, fields: Value) -> Result<ModelConfig> {
        let mut config = json!({"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 4});
        let intermediate = match Family::find(model_type) {
            Some(family) => family.spec.intermediate.fields[0],
            None => "intermediate_size",
        };
        config[intermediate] = json!(64);
        for (field, value) in fields.as_object().unwrap() {
            config[field] = value.clone();
        }
        parse(&config)
    }

    fn with(name: &str, changes: Value) -> Result<ModelConfig> {
        let text = std::fs::read(fixture(name).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        let fields = config.as_object_mut().unwrap();
        for (field, value) in changes.as_object().unwrap() {
            fields.insert(field.clone(), value.clone());
        }
        parse(&config)
    }

    #[test]
    fn the_four_families_are_read() {
        let sizes = FIXTURES.map(|name| {
            let config = with(name, json!({})).unwrap();
            (config.hidden, config.intermediate, config.experts, config.top_k, config.shared_experts)
        });
        assert_eq!(sizes, [(256, 128, 8, 2, 0), (128, 192, 16, 4, 0), (192, 64, 16, 4, 1), (256, 64, 16, 6, 1)]);
        let v3 = with("deepseek-v3", json!({})).unwrap();
        assert_eq!(
            (v3.groups, v3.scaling),
            (Some(ExpertGroups { count: 4, kept: 2, score: GroupScore::BestTwo }), 2.5)
        );
        let v4 = with("deepseek-v4", json!({})).unwrap();
        assert_eq!(
            (v4.swiglu_limit, v4.scaling, v4.layers),
            (Some(1.0), 1.5, vec![LayerKind::HashMoe, LayerKind::Moe])
        );
    }

    #[test]
    fn layer_kinds_follow_each_family() {
        use LayerKind::{Dense, HashMoe, Moe};
        let layers = |name, changes| with(name, changes).unwrap().layers;
        let v3 = layers("deepseek-v3", json!({"num_hidden_layers": 4, "first_k_dense_replace": 3}));
        assert_eq!(v3, [Dense, Dense, Dense, Moe]);
        let qwen = json!({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]});
        assert_eq!(layers("qwen3-moe", qwen), [Dense, Moe, Dense, Dense, Dense, Moe]);
        let v4 = json!({"num_hidden_layers": 3, "mlp_layer_types": null, "num_hash_layers": 2});
        assert_eq!(layers("deepseek-v4", v4), [HashMoe, HashMoe, Moe]);
        assert_eq!(with("deepseek-v3", json!({"first_k_dense_replace": 1})).unwrap().first_moe(), None);
    }

    #[test]
    fn older_names_of_the_expert_count_are_known() {
        let config = with("qwen3-moe", json!({"num_local_experts": null, "num_experts": 32})).unwrap();
        assert_eq!(config.experts, 32);
    }

    #[test]
    fn absent_and_null_are_what_transformers_takes_them_for() {
        let v3 = |changes| with("deepseek-v3", changes);
        assert_eq!(v3(json!({"n_shared_experts": null})).unwrap().shared_experts, 0);
        assert_eq!(v3(json!({"n_group": null, "topk_group": null})).unwrap().groups, None);
        assert!(!v3(json!({"norm_topk_prob": null})).unwrap().normalize);
        assert!(v3(json!({"routed_scaling_factor": null})).unwrap_err().to_string().contains("is null"));
        assert_eq!(with("deepseek-v4", json!({"swiglu_limit": null})).unwrap().swiglu_limit, None);
        // DeepSeek-V3 has 8 groups where nothing is said, Kimi-K2 and dots1 have none and one.
        let groups = |model_type| {
            let fields = json!({"n_routed_experts": 16, "num_experts_per_tok": 2});
            least(model_type, fields).unwrap().groups.map(|groups| (groups.count, groups.kept))
        };
        assert_eq!([groups("deepseek_v3"), groups("kimi_k2"), groups("dots1")], [Some((8, 4)), None, Some((1, 1))]);
        let v2 = |fields: Value| {
            let mut all = json!({"num_experts_per_tok": 2});
            all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            least("deepseek_v2", all)
        };
        assert_eq!(v2(json!({"n_group": 8, "topk_group": 3})).unwrap().groups, None);
        let limited = json!({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3});
        let groups = ExpertGroups { count: 8, kept: 3, score: GroupScore::Best };
        assert_eq!(v2(limited).unwrap().groups, Some(groups));
        assert!(v2(json!({"norm_topk_prob": true})).unwrap_err().to_string().contains("only false is supported"));
    }

    #[test]
    fn settings_of_the_language_model_may_be_nested() {
        let nested = json!({"model_type": "kimi_k25", "vision_config": {"hidden_size": 9}, "text_config": {
            "model_type": "kimi_k2", "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "hidden_act": "silu"}});
        let config = parse(&nested).unwrap();
        assert_eq!((config.family.name(), config.hidden, config.experts), ("Kimi-K2", 64, 8));
        let mut without_type = nested.clone();
        without_type["text_config"].as_object_mut().unwrap().remove("model_type");
        assert_eq!(parse(&without_type).unwrap().family.model_type(), "kimi_k25");
        let mut wrong = nested;
        wrong["text_config"]["hidden_act"] = json!("gelu");
        assert!(parse(&wrong).unwrap_err().to_string().contains("`text_config.hidden_act` is \"gelu\""));
    }

    #[test]
    fn layers_with_experts_follow_each_family() {
        use LayerKind::{Dense, Moe};
        let layers = |model_type, fields| least(model_type, fields).unwrap().layers;
        let interval = json!({"moe_layer_start_index": 1, "moe_layer_end_index": 2});
        assert_eq!(layers("ernie4_5_moe", interval), [Dense, Moe, Moe, Dense]);
        assert_eq!(layers("ernie4_5_moe", json!({"moe_layer_interval": 2})), [Dense, Moe, Dense, Moe]);
        assert_eq!(layers("glm4_moe_lite", json!({})), [Dense, Moe, Moe, Moe]);
        let named = json!({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]});
        assert_eq!(layers("glm_moe_dsa", named), [Dense, Moe, Dense, Moe]);
        assert_eq!(layers("minimax_m2", json!({})), [Moe; 4]);
    }

    #[test]
    fn what_the_kernel_cannot_do_is_refused_by_name() {
        for (model_type, fields, expected) in [
            ("llama4_text", json!({}), "routing weight on the expert's input"),
            ("gpt_oss", json!({}), "an expert with biases"),
            ("granitemoeshared", json!({"shared_intermediate_size": 96}), "a shared expert of width 96"),
        ] {
            let error = least(model_type, fields).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("not supported yet"), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn settings_that_would_change_the_result_are_refused() {
        for (model_type, field, value) in [
            ("mixtral", "scoring_func", json!("sigmoid")),
            ("mixtral", "norm_topk_prob", json!(false)),
            ("mixtral", "n_shared_experts", json!(1)),
            ("mixtral", "routed_scaling_factor", json!(2.0)),
            ("qwen3_moe", "shared_expert_intermediate_size", json!(64)),
            ("qwen3_moe", "swiglu_limit", json!(7.0)),
            ("deepseek_v3", "scoring_func", json!("softmax")),
            ("deepseek_v3", "topk_method", json!("group_limited_greedy")),
            ("deepseek_v3", "moe_layer_freq", json!(2)),
            ("deepseek_v3", "mlp_bias", json!(true)),
            ("deepseek_v4", "norm_topk_prob", json!(false)),
            ("minimax_m2", "use_routing_bias", json!(false)),
            ("minimax_m2", "shared_intermediate_size", json!(64)),
            ("ernie4_5_moe", "use_bias", json!(true)),
            ("ernie4_5_moe", "moe_num_experts", json!([64, 64])),
            ("phimoe", "num_experts_per_tok", json!(1)),
            ("granitemoe", "hidden_act", json!("gelu")),
        ] {
            let error = least(model_type, json!({"num_experts": 64, field: value})).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}` is {value}")), "{model_type}: {error}");
        }
        let lists = json!({"num_experts": 8, "moe_topk": [2, 3, 2, 2]});
        assert!(least("hunyuan_v1_moe", lists).unwrap_err().to_string().contains("the same for every layer"));
        // What published files say, though it changes nothing.
        least("dots1", json!({"n_routed_experts": 8, "num_experts_per_tok": 2, "scoring_func": "noaux_tc"})).unwrap();
        least(
            "hunyuan_v1_moe",
            json!({"num_experts": 8, "moe_topk": [2, 2], "n_group": false, "routed_scaling_factor": 1.0}),
        )
        .unwrap();
    }

    #[test]
    fn quantised_checkpoints_are_called_that() {
        let awq = json!({"quant_method": "awq", "bits": 4});
        let error = with("deepseek-v3", json!({"quantization_config": awq.clone()})).unwrap_err().to_string();
        assert!(error.contains("`quantization_config.quant_method` is \"awq\""), "{error}");
        let nested =
            json!({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", "quantization_config": awq}});
        let error = parse(&nested).unwrap_err().to_string();
        assert!(error.contains("`text_config.quantization_config.quant_method` is \"awq\""), "{error}");
        with("deepseek-v3", json!({"quantization_config": null})).unwrap();
    }

    #[test]
    fn no_two_families_have_the_same_model_type() {
        let mut types: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
        let count = types.len();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), count);
    }

    #[test]
    fn errors_name_field_and_value() {
        for (name, changes, expected) in [
            (
                "mixtral",
                json!({"model_type": "llama"}),
                "`model_type` is \"llama\"; supported are mixtral, qwen3_moe, ",
            ),
            ("mixtral", json!({"model_type": null}), "`model_type` is missing"),
            ("mixtral", json!({"hidden_size": -1}), "`hidden_size` is -1; it must be a whole number"),
            ("mixtral", json!({"hidden_size": 0}), "`hidden_size` is 0; it must be at least 1"),
            ("mixtral", json!({"num_hidden_layers": u64::MAX}), "`num_hidden_layers` is 18446744073709551615"),
            ("mixtral", json!({"hidden_size": null}), "`hidden_size` is missing"),
            ("mixtral", json!({"hidden_act": "gelu"}), "`hidden_act` is \"gelu\""),
            ("mixtral", json!({"num_experts_per_tok": 9}), "top-k is 9; with 8 experts"),
            ("deepseek-v3", json!({"n_group": 3}), "`n_group` is 3; it must divide the 16 experts"),
            ("deepseek-v3", json!({"topk_group": 5}), "`topk_group` is 5"),
            ("deepseek-v4", json!({"scoring_func": "tanh"}), "`scoring_func` is \"tanh\""),
            ("deepseek-v4", json!({"mlp_layer_types": ["moe"]}), "`mlp_layer_types` has 1 entries"),
            ("deepseek-v4", json!({"mlp_layer_types": ["moe", "x"]}), "`mlp_layer_types` has \"x\""),
            ("deepseek-v4", json!({"mlp_bias": true}), "`mlp_bias` is true"),
        ] {
            let error = with(name, changes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        let error = ModelConfig::parse(Path::new("config.json"), b"{").unwrap_err().to_string();
        assert!(error.contains("config.json is not valid JSON"), "{error}");
    }
}
