//! `config.json` of the supported model families: sizes, router settings, and which layers have experts.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::router::{ExpertGroups, Scoring};

/// A model family, which decides tensor names and the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `mixtral`
    Mixtral,
    /// `qwen3_moe`
    Qwen3Moe,
    /// `deepseek_v3`
    DeepseekV3,
    /// `deepseek_v4`
    DeepseekV4,
}

/// Beyond any model; keeps products of sizes within a usize.
const MAX_SIZE: usize = 1 << 24;

const FAMILIES: [Family; 4] = [Family::Mixtral, Family::Qwen3Moe, Family::DeepseekV3, Family::DeepseekV4];

/// What a layer's feed-forward block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerKind {
    Dense,
    Moe,
    /// Experts chosen by token id.
    HashMoe,
}

/// Where a family keeps the tensors of a block.
pub(crate) struct TensorNames {
    /// The block within `model.layers.N`.
    pub block: &'static str,
    /// The gate, up and down matrices of an expert.
    pub expert: [&'static str; 3],
    /// The router's correction bias within the block.
    pub correction_bias: Option<&'static str>,
}

/// What `config.json` says about the MoE layers.
#[derive(Debug)]
pub(crate) struct ModelConfig {
    pub family: Family,
    pub layers: Vec<LayerKind>,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
    pub shared_experts: usize,
    pub swiglu_limit: Option<f32>,
    pub scoring: Scoring,
    pub normalize: bool,
    pub scaling: f32,
    pub groups: Option<ExpertGroups>,
    pub vocabulary: usize,
}

impl Family {
    /// The family's `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
            Family::Qwen3Moe => "qwen3_moe",
            Family::DeepseekV3 => "deepseek_v3",
            Family::DeepseekV4 => "deepseek_v4",
        }
    }

    pub(crate) fn tensor_names(self) -> TensorNames {
        const BY_NUMBER: [&str; 3] = ["w1", "w3", "w2"];
        const BY_ROLE: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
        let (block, expert, correction_bias) = match self {
            Family::Mixtral => ("block_sparse_moe", BY_NUMBER, None),
            Family::Qwen3Moe => ("mlp", BY_ROLE, None),
            Family::DeepseekV3 => ("mlp", BY_ROLE, Some("gate.e_score_correction_bias")),
            Family::DeepseekV4 => ("ffn", BY_NUMBER, Some("gate.bias")),
        };
        TensorNames { block, expert, correction_bias }
    }
}

impl ModelConfig {
    /// Reads `config.json`; absent fields have the defaults of `transformers` 5.23.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let fields = Fields::parse(path, text)?;
        let model_type = fields.text("model_type")?;
        let family = FAMILIES.into_iter().find(|family| family.model_type() == model_type).ok_or_else(|| {
            let known = FAMILIES.map(Family::model_type).join(", ");
            fields.error("model_type", format!("is {model_type:?}; supported are {known}"))
        })?;
        let activation = fields.text_or("hidden_act", "silu")?;
        if activation != "silu" {
            return Err(fields.error("hidden_act", format!("is {activation:?}; only \"silu\" is supported")));
        }
        let config = match family {
            Family::Mixtral => Self::mixtral(&fields),
            Family::Qwen3Moe => Self::qwen3_moe(&fields),
            Family::DeepseekV3 => Self::deepseek_v3(&fields),
            Family::DeepseekV4 => Self::deepseek_v4(&fields),
        }?;
        if !(1..=config.experts).contains(&config.top_k) {
            return Err(Error::TopK { top_k: config.top_k, experts: config.experts });
        }
        Ok(config)
    }

    /// The first layer with experts.
    pub fn first_moe(&self) -> Option<usize> {
        self.layers.iter().position(|&kind| kind != LayerKind::Dense)
    }

    fn mixtral(fields: &Fields) -> Result<Self> {
        Ok(Self {
            intermediate: fields.positive("intermediate_size")?,
            experts: fields.size_or("num_local_experts", 8)?,
            top_k: fields.size_or("num_experts_per_tok", 2)?,
            ..Self::softmax(fields, Family::Mixtral)?
        })
    }

    fn qwen3_moe(fields: &Fields) -> Result<Self> {
        let dense = fields.sizes_or_empty("mlp_only_layers")?;
        let step = fields.size_or("decoder_sparse_step", 1)?.max(1);
        // Saved by transformers 5 as `num_local_experts`, by earlier versions as `num_experts`.
        let name = if fields.has("num_local_experts") { "num_local_experts" } else { "num_experts" };
        let base = Self::softmax(fields, Family::Qwen3Moe)?;
        let kind = |layer| match dense.contains(&layer) || (layer + 1) % step != 0 {
            true => LayerKind::Dense,
            false => LayerKind::Moe,
        };
        Ok(Self {
            layers: (0..base.layers.len()).map(kind).collect(),
            intermediate: fields.positive("moe_intermediate_size")?,
            experts: fields.size(name)?,
            top_k: fields.size_or("num_experts_per_tok", 8)?,
            normalize: fields.flag_or("norm_topk_prob", false)?,
            ..base
        })
    }

    fn deepseek_v3(fields: &Fields) -> Result<Self> {
        let first_moe = fields.size_or("first_k_dense_replace", 3)?;
        let base = Self::deepseek(fields, Family::DeepseekV3)?;
        let kind = |layer| if layer < first_moe { LayerKind::Dense } else { LayerKind::Moe };
        let top_k = fields.size_or("num_experts_per_tok", 8)?;
        Ok(Self {
            layers: (0..base.layers.len()).map(kind).collect(),
            top_k,
            scoring: Scoring::Sigmoid,
            normalize: fields.flag_or("norm_topk_prob", true)?,
            scaling: fields.number_or("routed_scaling_factor", 2.5)?,
            groups: Some(expert_groups(fields, base.experts, top_k)?),
            ..base
        })
    }

    fn deepseek_v4(fields: &Fields) -> Result<Self> {
        if fields.flag_or("mlp_bias", false)? {
            return Err(fields.error("mlp_bias", "is true; experts with a bias are not supported".into()));
        }
        let scoring = match fields.text_or("scoring_func", "sqrtsoftplus")? {
            "sqrtsoftplus" => Scoring::SqrtSoftplus,
            "sigmoid" => Scoring::Sigmoid,
            other => {
                return Err(fields
                    .error("scoring_func", format!("is {other:?}; supported are \"sqrtsoftplus\" and \"sigmoid\"")));
            }
        };
        let base = Self::deepseek(fields, Family::DeepseekV4)?;
        Ok(Self {
            layers: deepseek_v4_layers(fields, base.layers.len())?,
            top_k: fields.size_or("num_experts_per_tok", 6)?,
            swiglu_limit: Some(fields.number_or("swiglu_limit", 10.0)?),
            scoring,
            scaling: fields.number_or("routed_scaling_factor", 1.5)?,
            vocabulary: fields.size_or("vocab_size", 129280)?,
            ..base
        })
    }

    /// What Mixtral and Qwen3-MoE have in common; sizes of experts are left to the caller.
    fn softmax(fields: &Fields, family: Family) -> Result<Self> {
        Ok(Self {
            family,
            layers: vec![LayerKind::Moe; fields.positive("num_hidden_layers")?],
            hidden: fields.positive("hidden_size")?,
            intermediate: 0,
            experts: 0,
            top_k: 0,
            shared_experts: 0,
            swiglu_limit: None,
            scoring: Scoring::Softmax,
            normalize: true,
            scaling: 1.0,
            groups: None,
            vocabulary: 0,
        })
    }

    /// What the DeepSeek models have in common.
    fn deepseek(fields: &Fields, family: Family) -> Result<Self> {
        Ok(Self {
            intermediate: fields.positive("moe_intermediate_size")?,
            experts: fields.size_or("n_routed_experts", 256)?,
            shared_experts: fields.size_or("n_shared_experts", 1)?,
            ..Self::softmax(fields, family)?
        })
    }
}

/// DeepSeek-V3's group-limited choice, checked so that every token finds its top-k.
fn expert_groups(fields: &Fields, experts: usize, top_k: usize) -> Result<ExpertGroups> {
    let groups = ExpertGroups { count: fields.size_or("n_group", 8)?, kept: fields.size_or("topk_group", 4)? };
    let ExpertGroups { count, kept } = groups;
    if count == 0 || !experts.is_multiple_of(count) {
        return Err(fields.error("n_group", format!("is {count}; it must divide the {experts} experts")));
    }
    if kept > count || kept * (experts / count) < top_k {
        let problem = format!("is {kept}; that many of {count} groups must exist and hold {top_k} experts or more");
        return Err(fields.error("topk_group", problem));
    }
    Ok(groups)
}

/// DeepSeek-V4's layers: `mlp_layer_types`, or the number of hash-routed layers at the start.
fn deepseek_v4_layers(fields: &Fields, layers: usize) -> Result<Vec<LayerKind>> {
    let Some(types) = fields.texts("mlp_layer_types")? else {
        let hashed = fields.size_or("num_hash_layers", 3)?;
        return Ok((0..layers).map(|layer| if layer < hashed { LayerKind::HashMoe } else { LayerKind::Moe }).collect());
    };
    if types.len() != layers {
        let problem = format!("has {} entries; it must have one for each of the {layers} layers", types.len());
        return Err(fields.error("mlp_layer_types", problem));
    }
    let kind =
        |name: &&str| match *name {
            "hash_moe" => Ok(LayerKind::HashMoe),
            "moe" => Ok(LayerKind::Moe),
            "dense" => Ok(LayerKind::Dense),
            other => Err(fields
                .error("mlp_layer_types", format!("has {other:?}; known are \"hash_moe\", \"moe\" and \"dense\""))),
        };
    types.iter().map(kind).collect()
}

/// The fields of a JSON object, with errors that name file and field. A field that is null counts as absent.
pub(crate) struct Fields {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Fields {
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let fields = serde_json::from_slice(text).map_err(|source| Error::Json { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), fields })
    }

    pub fn error(&self, field: &str, problem: String) -> Error {
        Error::Field { path: self.path.clone(), field: field.to_owned(), problem }
    }

    fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|value| !value.is_null())
    }

    /// A field converted, or none where it is absent.
    fn get<'a, T>(&'a self, field: &str, what: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.fields.get(field).filter(|value| !value.is_null()) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(field, format!("is {value}; it must be {what}")))
    }

    fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, "is missing".into()))
    }

    fn find_size(&self, field: &str) -> Result<Option<usize>> {
        self.get(field, &format!("a whole number, at most {MAX_SIZE}"), as_size)
    }

    fn size(&self, field: &str) -> Result<usize> {
        self.required(field, self.find_size(field)?)
    }

    /// A size that cannot be 0.
    fn positive(&self, field: &str) -> Result<usize> {
        match self.size(field)? {
            0 => Err(self.error(field, "is 0; it must be at least 1".into())),
            size => Ok(size),
        }
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.find_size(field)?.unwrap_or(default))
    }

    pub fn sizes_or_empty(&self, field: &str) -> Result<Vec<usize>> {
        let sizes = |value: &Value| value.as_array()?.iter().map(as_size).collect();
        Ok(self.get(field, "a list of whole numbers", sizes)?.unwrap_or_default())
    }

    fn number_or(&self, field: &str, default: f32) -> Result<f32> {
        Ok(self.get(field, "a number", Value::as_f64)?.map_or(default, |number| number as f32))
    }

    fn flag_or(&self, field: &str, default: bool) -> Result<bool> {
        Ok(self.get(field, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn text(&self, field: &str) -> Result<&str> {
        self.required(field, self.get(field, "a string", Value::as_str)?)
    }

    pub fn text_or<'a>(&'a self, field: &str, default: &'a str) -> Result<&'a str> {
        Ok(self.get(field, "a string", Value::as_str)?.unwrap_or(default))
    }

    fn texts(&self, field: &str) -> Result<Option<Vec<&str>>> {
        self.get(field, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// The fields of an object, each under its full name, "field.name"; none where the object is absent.
    pub fn nested(&self, field: &str) -> Result<Option<Self>> {
        let object = self.get(field, "an object", Value::as_object)?;
        let named = |(name, value): (&String, &Value)| (format!("{field}.{name}"), value.clone());
        Ok(object.map(|object| Self { path: self.path.clone(), fields: object.iter().map(named).collect() }))
    }

    /// An object field.
    pub fn object(&self, field: &str) -> Result<&Map<String, Value>> {
        self.required(field, self.get(field, "an object", Value::as_object)?)
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().map(|size| size as usize).filter(|&size| size <= MAX_SIZE)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{FIXTURES, fixture};

    fn parse(value: &Value) -> Result<ModelConfig> {
        ModelConfig::parse(Path::new("config.json"), value.to_string().as_bytes())
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
        assert_eq!((v3.groups, v3.scaling), (Some(ExpertGroups { count: 4, kept: 2 }), 2.5));
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
    fn errors_name_field_and_value() {
        for (name, changes, expected) in [
            ("mixtral", json!({"model_type": "llama"}), "`model_type` is \"llama\"; supported are mixtral, qwen3_moe"),
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
