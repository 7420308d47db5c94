//! Tests with quantised checkpoints, which are made from the recorded bf16 ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ferromoe_kernel::quantise::{GroupScale, ScaleKind};
use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checkpoint::HfLayer;
use crate::config::{ExpertFormat, MoeConfig};
use crate::float8::{from_e4m3, from_e8m0, to_e4m3};
use crate::fp8::scale_shape;
use crate::testing::fixture;
use crate::weight_matrix::WeightMatrix;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// How a test checkpoint is quantised.
#[derive(Clone, Copy)]
struct Scheme {
    fixture: &'static str,
    block: usize,
    scale_dtype: Dtype,
    /// What the tensor of scales is called beside `weight`.
    scale_name: &'static str,
}

const V3: Scheme =
    Scheme { fixture: "deepseek-v3", block: 128, scale_dtype: Dtype::F32, scale_name: "weight_scale_inv" };
const QWEN: Scheme = Scheme { fixture: "qwen3-moe", scale_dtype: Dtype::BF16, ..V3 };
const V4: Scheme = Scheme { fixture: "deepseek-v4", block: 32, scale_dtype: Dtype::F8_E8M0, scale_name: "scale" };

impl Scheme {
    /// The fixture with its experts quantised, changed by the test.
    fn checkpoint(&self, change: impl FnOnce(&mut Tensors, &mut Value)) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let bytes = fs::read(fixture(self.fixture).join("model.safetensors")).unwrap();
        let mut tensors = Tensors::new();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let (shape, data) = (view.shape().to_vec(), view.data());
            match name.strip_suffix(".weight").filter(|_| name.contains("experts.")) {
                Some(matrix) => {
                    let [codes, scales] = self.quantised(data, [shape[0], shape[1]]);
                    let scale_shape = scale_shape([shape[0], shape[1]], self.block).to_vec();
                    tensors.insert(name.to_owned(), (Dtype::F8_E4M3, shape, codes));
                    tensors.insert(format!("{matrix}.{}", self.scale_name), (self.scale_dtype, scale_shape, scales));
                }
                None => drop(tensors.insert(name.to_owned(), (view.dtype(), shape, data.to_vec()))),
            }
        }
        let text = fs::read(fixture(self.fixture).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        config["quantization_config"] =
            json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [self.block, self.block]});
        if self.scale_dtype == Dtype::F8_E8M0 {
            config["quantization_config"]["scale_fmt"] = json!("ue8m0");
        }
        change(&mut tensors, &mut config);
        let views = tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }

    /// Codes and scales of a bf16 matrix.
    fn quantised(&self, data: &[u8], [rows, cols]: [usize; 2]) -> [Vec<u8>; 2] {
        let values: Vec<f32> =
            data.as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect();
        let [scale_rows, scale_cols] = scale_shape([rows, cols], self.block);
        let block_of = |at: usize| at / cols / self.block * scale_cols + at % cols / self.block;
        let mut largest = vec![0f32; scale_rows * scale_cols];
        for (at, value) in values.iter().enumerate() {
            largest[block_of(at)] = largest[block_of(at)].max(value.abs());
        }
        let mut bytes = Vec::new();
        let scale = |&largest: &f32| match self.scale_dtype {
            Dtype::F8_E8M0 => {
                let scale = GroupScale::new(largest, ScaleKind::PowerOfTwo, f32::recip).scale;
                bytes.push((scale.to_bits() >> 23) as u8);
                scale
            }
            Dtype::BF16 => {
                let scale = bf16::from_f32(largest / 448.0);
                bytes.extend(scale.to_le_bytes());
                scale.to_f32()
            }
            _ => {
                bytes.extend((largest / 448.0).to_le_bytes());
                largest / 448.0
            }
        };
        let scales: Vec<f32> = largest.iter().map(scale).collect();
        let codes = values.iter().enumerate().map(|(at, value)| to_e4m3(value / scales[block_of(at)])).collect();
        [codes, bytes]
    }

    fn message(&self, change: impl FnOnce(&mut Tensors, &mut Value)) -> String {
        HfLayer::open(self.checkpoint(change).path(), 0).unwrap_err().to_string()
    }
}

fn matrices(layer: &HfLayer) -> impl Iterator<Item = &WeightMatrix> {
    let experts = layer.weights.experts.iter().chain(&layer.weights.shared);
    experts.flat_map(|expert| [&expert.gate, &expert.up, &expert.down])
}

fn open(dir: &Path, layer: usize) -> HfLayer {
    let layer = HfLayer::open(dir, layer).unwrap();
    let config = layer.config(16);
    layer.weights.check(&config).unwrap();
    assert_eq!(config.experts_format, ExpertFormat::Fp8);
    layer
}

#[test]
fn published_forms_are_read_in_place() {
    for (scheme, number, kind) in [(V3, 0, ScaleKind::F32), (QWEN, 0, ScaleKind::F32), (V4, 1, ScaleKind::PowerOfTwo)] {
        let dir = scheme.checkpoint(|_, _| {});
        let (quantised, plain) = (open(dir.path(), number), HfLayer::open(&fixture(scheme.fixture), number).unwrap());
        assert_eq!(quantised.config(1).scales, kind);
        for (quantised, plain) in matrices(&quantised).zip(matrices(&plain)) {
            let WeightMatrix::Fp8(matrix) = quantised else { panic!("{quantised:?}") };
            assert!(matrix.values().is_in_place() && matrix.block() == scheme.block);
            for row in 0..plain.rows() {
                let scale = |col: usize| f64::from(matrix.scales().row(row / scheme.block)[col / scheme.block]);
                let pairs = quantised.row_f64(row).into_iter().zip(plain.row_f64(row)).enumerate();
                for (col, (found, expected)) in pairs {
                    // Scales that were rounded to bf16 let the largest saturate.
                    let allowed = (expected.abs() / 15.9).max(scale(col) / 1024.0);
                    assert!((found - expected).abs() <= allowed, "[{row}, {col}]: {found}, expected {expected}");
                    assert_eq!(quantised.row(row)[col], bf16::from_f64(found));
                }
            }
        }
    }
}

#[test]
fn scales_may_be_in_another_file_than_their_weights() {
    for scheme in [V3, V4] {
        let dir = scheme.checkpoint(|_, _| {});
        let whole = dir.path().join("model.safetensors");
        let bytes = fs::read(&whole).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let shard = |name: &str| if name.ends_with(scheme.scale_name) { "scales" } else { "weights" };
        for part in ["scales", "weights"] {
            let views = file.iter().filter(|(name, _)| shard(name) == part);
            fs::write(dir.path().join(part), safetensors::serialize(views, None).unwrap()).unwrap();
        }
        let weight_map: BTreeMap<_, _> = file.names().into_iter().map(|name| (name, shard(name))).collect();
        let index = json!({ "weight_map": weight_map }).to_string();
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let expected = open(dir.path(), 0);
        fs::remove_file(whole).unwrap();
        let found = open(dir.path(), 0);
        assert!(matrices(&found).zip(matrices(&expected)).all(|(found, expected)| found.row(3) == expected.row(3)));
    }
}

#[test]
fn matrices_that_were_left_in_bf16_are_read_as_such() {
    let plain = HfLayer::open(&fixture("deepseek-v3"), 0).unwrap();
    let bytes: Vec<u8> =
        (0..64).flat_map(|row| bytemuck::cast_slice::<_, u8>(&plain.weights.shared[0].up.row(row)).to_vec()).collect();
    let dir = V3.checkpoint(|tensors, _| {
        tensors.insert("model.layers.0.mlp.shared_experts.up_proj.weight".into(), (Dtype::BF16, vec![64, 192], bytes));
        tensors.remove("model.layers.0.mlp.shared_experts.up_proj.weight_scale_inv");
    });
    let layer = open(dir.path(), 0);
    assert_eq!(layer.weights.shared[0].up.format(), ExpertFormat::Bf16);
    assert_eq!(layer.weights.shared[0].up.row(5), plain.weights.shared[0].up.row(5));
    layer.weights.prepare_fp8(&layer.config(16), 0, 2).unwrap();
}

#[test]
fn both_kernels_get_the_numbers_of_the_file() {
    for (scheme, number) in [(V3, 0), (V4, 1)] {
        let dir = scheme.checkpoint(|_, _| {});
        let layer = open(dir.path(), number);
        let config = layer.config(16);
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let (fp8, plain) =
            (layer.weights.prepare_fp8(&config, 1, 2).unwrap(), layer.weights.prepare(&config, 1, 2).unwrap());
        let (h_blocks, tiles) = (hidden.div_ceil(128), intermediate / 64);
        for (at, expected) in plain.linear1.iter().enumerate() {
            let (row, col) = (at / hidden, at % hidden);
            let tile = row / (2 * intermediate) * tiles + row % (2 * intermediate) / 128;
            let scale = fp8.linear1_scales[(tile * h_blocks + col / 128) * 4 + row / 8 % 2];
            let found = from_e4m3(fp8.linear1[at]) * scale;
            // In blocks of 32 x 32 some numbers were finer than the smallest steps of the blocks of 128 x 128.
            let allowed = if scheme.block == 128 { 0.0 } else { scale / 1024.0 };
            let rounding = expected.to_f32().abs() / 256.0;
            assert!((found - expected.to_f32()).abs() <= allowed + rounding, "[{row}, {col}]: {found}, {expected}");
        }
    }
}

#[test]
fn shared_experts_that_share_a_block_are_refused() {
    let text = V3.message(|tensors, config| {
        config["n_shared_experts"] = json!(2);
        let weights =
            tensors.iter_mut().filter(|(name, _)| name.contains("shared_experts") && name.ends_with("weight"));
        for (name, (_, shape, data)) in weights {
            if name.contains("down") {
                *data = data.chunks(shape[1]).flat_map(|row| row.repeat(2)).collect();
                shape[1] *= 2;
            } else {
                *data = data.repeat(2);
                shape[0] *= 2;
            }
        }
    });
    assert!(text.contains("2 shared experts of width 64 cannot be cut") && text.contains("multiple of 128"), "{text}");
}

#[test]
fn scales_that_are_none_are_named() {
    let scale = "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv";
    let f32s = |values: [f32; 2]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    for (value, name) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf"), (0.0, "0"), (-0.25, "-0.25")] {
        let text = V3.message(|tensors, _| tensors.get_mut(scale).unwrap().2 = f32s([1.0, value]));
        let expected = format!("the scale [0, 1] is {name}; it must be finite and above 0");
        assert!(text.contains(scale) && text.contains(&expected), "{text}");
    }
    let text = V3.message(|tensors, _| drop(tensors.insert(scale.into(), (Dtype::F32, vec![2, 1], f32s([1.0, 1.0])))));
    assert!(text.contains(scale) && text.contains("has shape [2, 1]; it must be [1, 2]"), "{text}");
    let text = V3.message(|tensors, _| drop(tensors.remove(scale)));
    assert!(text.ends_with(&format!("has no tensor `{scale}`")), "{text}");
    let text = V3.message(|tensors, _| drop(tensors.insert(scale.into(), (Dtype::F16, vec![1, 2], vec![0; 4]))));
    assert!(text.contains(scale) && text.contains("is F16; it must be F32, BF16 or F8_E8M0"), "{text}");
    let scale = "model.layers.0.ffn.experts.3.w2.scale";
    let text = V4.message(|tensors, _| tensors.get_mut(scale).unwrap().2[9] = 0xff);
    assert!(text.contains(scale) && text.contains("the scale [4, 1] is NaN"), "{text}");
    assert_eq!(from_e8m0(126), 0.5);
}

#[test]
fn weights_of_other_kinds_are_named() {
    let weight = "model.layers.0.mlp.experts.3.up_proj.weight";
    let text = V3.message(|tensors, _| tensors.get_mut(weight).unwrap().0 = Dtype::F8_E5M2);
    assert!(text.contains(weight) && text.contains("is F8_E5M2; it must be F8_E4M3, BF16, F16 or F32"), "{text}");
    let text = V3.message(|_, config| config["quantization_config"] = Value::Null);
    let expected = "is F8_E4M3; it must be BF16, F16 or F32 where config.json has no `quantization_config`";
    assert!(text.contains(expected), "{text}");
    let text = V3.message(|_, config| config["quantization_config"]["quant_method"] = json!("awq"));
    assert!(text.contains("\"awq\""), "{text}");
    let text = V3.message(|tensors, _| tensors.get_mut(weight).unwrap().1 = vec![192, 64]);
    assert!(text.contains(weight) && text.contains("has shape [192, 64]; it must be [64, 192]"), "{text}");
}

/// What is small enough to be called a configuration that runs.
#[test]
fn a_bf16_checkpoint_can_be_run_in_fp8() {
    let layer = HfLayer::open(&fixture("qwen3-moe"), 0).unwrap();
    assert_eq!(layer.config(16).experts_format, ExpertFormat::Bf16);
    let config = MoeConfig { experts_format: ExpertFormat::Fp8, ..layer.config(16) };
    let prepared = layer.weights.prepare_fp8(&config, 0, 1).unwrap();
    assert!(prepared.linear1_scales.iter().chain(&prepared.linear2_scales).all(|scale| scale.is_finite()));
}
