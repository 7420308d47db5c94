//! How a checkpoint is quantised: the `quantization_config` of its `config.json`.

#[cfg(test)]
mod checkpoints;

use ferromoe_kernel::quantise::ScaleKind;

use crate::error::Result;
use crate::fields::Fields;
use crate::fp8::{self, BLOCKS, Fp8Matrix};
use crate::tensors::Tensor;

/// The field of `config.json`.
const FIELD: &str = "quantization_config";

/// Weights in e4m3 with a scale for each block, which is what can be read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quantisation {
    /// Rows and columns of a block, 128 or 32.
    pub block: usize,
    /// What the scales of tokens and intermediate may be.
    pub scales: ScaleKind,
}

impl Quantisation {
    /// Reads `config.json`; none where the checkpoint is not quantised.
    ///
    /// # Errors
    /// A quantisation that cannot be read, by its name.
    pub fn read(fields: &Fields) -> Result<Option<Self>> {
        let expert_dtype = fields.find_text("expert_dtype")?.unwrap_or("fp8");
        if !["fp8", "bf16", "bfloat16"].contains(&expert_dtype) {
            let problem = format!("is {expert_dtype:?}; experts can be \"fp8\" or \"bf16\"");
            return Err(fields.error("expert_dtype", problem));
        }
        match fields.nested(FIELD)? {
            Some(fields) => Self::of_config(&fields).map(Some),
            None => Ok(None),
        }
    }

    fn of_config(fields: &Fields) -> Result<Self> {
        let method = fields.text("quant_method")?;
        if method != "fp8" {
            let problem =
                format!("is {method:?}; of quantised checkpoints only \"fp8\" ones with block scales can be read");
            return Err(fields.error("quant_method", problem));
        }
        for (field, right) in [("fmt", "e4m3"), ("activation_scheme", "dynamic")] {
            let found = fields.find_text(field)?.unwrap_or(right);
            if found != right {
                return Err(fields.error(field, format!("is {found:?}; it must be {right:?}")));
            }
        }
        let scales = match fields.find_text("scale_fmt")?.unwrap_or("float") {
            "float" | "float32" => ScaleKind::F32,
            "ue8m0" => ScaleKind::PowerOfTwo,
            other => {
                let problem = format!("is {other:?}; it must be \"ue8m0\", or absent");
                return Err(fields.error("scale_fmt", problem));
            }
        };
        let found = fields.sizes("weight_block_size")?.unwrap_or_default();
        match BLOCKS.into_iter().find(|&block| found == [block, block]) {
            Some(block) => Ok(Self { block, scales }),
            None => {
                let found = if found.is_empty() { "is missing".into() } else { format!("is {found:?}") };
                Err(fields.error("weight_block_size", format!("{found}; it must be [128, 128] or [32, 32]")))
            }
        }
    }

    /// A matrix of e4m3 `values` [rows, cols], with its block scales.
    pub fn matrix(&self, values: Tensor<'_>, scales: Tensor<'_>, rows: usize, cols: usize) -> Result<Fp8Matrix> {
        let values = values.e4m3(rows, cols)?;
        let [scale_rows, scale_cols] = fp8::scale_shape([rows, cols], self.block);
        Fp8Matrix::new(values, scales.scales(scale_rows, scale_cols)?, self.block)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn read(config: &Value) -> Result<Option<Quantisation>> {
        Quantisation::read(&Fields::parse(Path::new("config.json"), config.to_string().as_bytes()).unwrap())
    }

    fn parse(config: Value) -> Result<Option<Quantisation>> {
        read(&json!({ FIELD: config }))
    }

    #[test]
    fn published_configurations_are_read() {
        let v3 = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]});
        assert_eq!(parse(v3).unwrap(), Some(Quantisation { block: 128, scales: ScaleKind::F32 }));
        let v4 = json!({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]});
        assert_eq!(parse(v4).unwrap(), Some(Quantisation { block: 32, scales: ScaleKind::PowerOfTwo }));
        assert_eq!(parse(Value::Null).unwrap(), None);
    }

    #[test]
    fn other_quantisations_are_refused_by_name() {
        for method in ["awq", "gptq", "bitsandbytes", "compressed-tensors", "mxfp4", "modelopt", "fbgemm_fp8"] {
            let text = parse(json!({ "quant_method": method, "bits": 4 })).unwrap_err().to_string();
            let expected = format!(
                "config.json: `quantization_config.quant_method` is {method:?}; of quantised checkpoints only \"fp8\""
            );
            assert!(text.starts_with(&expected), "{text}");
        }
        for (change, expected) in [
            (json!({"quant_method": null}), "`quantization_config.quant_method` is missing"),
            (json!({"quant_method": 8}), "`quantization_config.quant_method` is 8; it must be a string"),
            (json!({"fmt": "e5m2"}), "`quantization_config.fmt` is \"e5m2\"; it must be \"e4m3\""),
            (json!({"activation_scheme": "static"}), "is \"static\"; it must be \"dynamic\""),
            (json!({"scale_fmt": "e5m10"}), "`quantization_config.scale_fmt` is \"e5m10\""),
            (
                json!({"weight_block_size": null}),
                "`quantization_config.weight_block_size` is missing; it must be [128, 128] or [32, 32]",
            ),
            (json!({"weight_block_size": [1, 128]}), "is [1, 128]; it must be [128, 128] or [32, 32]"),
            (json!({"weight_block_size": [64, 64]}), "is [64, 64]; it must be"),
            (json!({"weight_block_size": "all"}), "is \"all\"; it must be a list of whole numbers"),
        ] {
            let mut config = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
            for (field, value) in change.as_object().unwrap() {
                config[field] = value.clone();
            }
            let text = parse(config).unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        }
        let text = read(&json!({"expert_dtype": "fp4"})).unwrap_err().to_string();
        assert_eq!(text, "config.json: `expert_dtype` is \"fp4\"; experts can be \"fp8\" or \"bf16\"");
        assert!(parse(json!("fp8")).unwrap_err().to_string().contains("it must be an object"));
    }
}
