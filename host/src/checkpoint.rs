//! Hugging Face checkpoint folders: one layer's experts and router.

use std::collections::BTreeSet;
use std::path::Path;

use ferromoe_kernel::quantise::ScaleKind;
use half::bf16;
use rayon::prelude::*;

use crate::config::MoeConfig;
use crate::error::{Error, Result};
use crate::family::{BLOCKS, Experts, Family, LAYER_PREFIXES, Layout, Parts, SHARED_GATE, Shared, Stored};
use crate::files::{Files, LayerTensors, read};
use crate::matrix::{Bytes, Matrix};
use crate::model::{LayerKind, ModelConfig, Parsed};
use crate::recognise;
use crate::router::Router;
use crate::tensors::Tensor;
use crate::weight_matrix::WeightMatrix;
use crate::weights::{Expert, ExpertWeights};

const CONFIG: &str = "config.json";

/// A checkpoint folder as `save_pretrained` of `transformers` writes it, or as the model's makers publish it: `config.json`, and
/// `model.safetensors` or several files with `model.safetensors.index.json`.
///
/// The families are those of README's table. Weights may be FP8: e4m3 with block scales, as published.
pub struct Checkpoint {
    config: ModelConfig,
    files: Files,
}

/// The MoE block of one layer. Its weights stay in the mapped files where those are bf16 or e4m3: the files must not be
/// changed while the layer is in use.
#[derive(Debug)]
pub struct HfLayer {
    /// The model family.
    pub family: Family,
    /// The layer's number.
    pub layer: usize,
    /// The experts.
    pub weights: ExpertWeights,
    /// The router.
    pub router: Router,
    hidden: usize,
    intermediate: usize,
    swiglu_limit: Option<f32>,
    scales: ScaleKind,
}

impl HfLayer {
    /// Reads the MoE block of layer `layer` of the checkpoint in the folder `dir`.
    ///
    /// # Errors
    /// Files that are missing, truncated or of another kind, an unknown family, settings that are not supported, a layer that does not
    /// exist or is dense, tensors that are missing, of a wrong dtype or shape, or that nobody reads.
    pub fn open(dir: &Path, layer: usize) -> Result<Self> {
        Checkpoint::open(dir)?.layer(layer)
    }

    /// The layer's configuration for at most so many tokens per rank.
    pub fn config(&self, max_tokens_per_rank: usize) -> MoeConfig {
        MoeConfig {
            hidden: self.hidden,
            intermediate: self.intermediate,
            experts: self.weights.experts.len(),
            top_k: self.router.top_k,
            max_tokens_per_rank,
            swiglu_limit: self.swiglu_limit,
            shared_experts: self.weights.shared.len(),
            experts_format: self.weights.format(),
            scales: self.scales,
        }
    }
}

impl Checkpoint {
    /// Reads a folder's configuration; tensors are read with the layer.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let config = read(&path)?;
        let parsed = ModelConfig::parse(&path, &config)?;
        Self::new(&path, parsed, Files::open(dir))
    }

    /// A checkpoint of one file that is in memory; `name` stands for its folder in errors.
    pub(crate) fn embedded(name: &str, config: &[u8], model: Bytes) -> Result<Self> {
        let dir = Path::new(name);
        let path = dir.join(CONFIG);
        Self::new(&path, ModelConfig::parse(&path, config)?, Files::embedded(dir, model))
    }

    fn new(path: &Path, parsed: Parsed, files: Result<Files>) -> Result<Self> {
        match parsed {
            Parsed::Known(config) => Ok(Self { config, files: files? }),
            Parsed::Unknown { model_type } => {
                let fits = files.map_or(Vec::new(), |files| recognise::families_that_fit(&files));
                Err(recognise::unknown_model_type(path, &model_type, &fits))
            }
        }
    }

    /// The model family.
    pub fn family(&self) -> Family {
        self.config.family
    }

    /// The first layer with experts, if there is one.
    pub fn first_moe_layer(&self) -> Option<usize> {
        self.config.first_moe()
    }

    /// Reads the MoE block of one layer; see [`HfLayer::open`].
    pub fn layer(&self, layer: usize) -> Result<HfLayer> {
        let read = self.read(layer)?;
        match read.router.shared_gate {
            None => Ok(read),
            Some(_) => Err(Error::Unsupported {
                path: self.files.path().to_owned(),
                family: read.family.name(),
                what: format!("the shared expert's sigmoid gate (`{SHARED_GATE}`), a weight for each token,"),
            }),
        }
    }

    /// As [`Checkpoint::layer`], with what the kernel cannot do yet.
    pub(crate) fn read(&self, layer: usize) -> Result<HfLayer> {
        let config = &self.config;
        let layers = config.layers.len();
        let kind = *config.layers.get(layer).ok_or(Error::NoSuchLayer { layer, layers })?;
        if kind == LayerKind::Dense {
            return Err(Error::DenseLayer { layer, first_moe: config.first_moe() });
        }
        let (tensors, layout) = self.find_block(layer)?;
        let block = Block { config, tensors, layout };
        let read = HfLayer {
            family: config.family,
            layer,
            weights: ExpertWeights { experts: block.experts()?, shared: block.shared_experts()? },
            router: block.router(kind)?,
            hidden: config.hidden,
            intermediate: config.intermediate,
            swiglu_limit: config.swiglu_limit,
            scales: config.quantisation.map_or(ScaleKind::F32, |quantisation| quantisation.scales),
        };
        let names = block.tensors.unread();
        match names.is_empty() {
            true => Ok(read),
            false => {
                let path = block.tensors.path().to_owned();
                Err(Error::UnreadTensors { path, family: config.family.name(), names })
            }
        }
    }

    /// The tensors of a layer, under the one prefix that the checkpoint has, and how its experts are stored. Where they are not there at
    /// all, what the family has first, for an error that names a tensor.
    fn find_block(&self, layer: usize) -> Result<(LayerTensors<'_>, &'static Layout)> {
        let layouts = self.config.family.spec.layouts;
        let prefixes = LAYER_PREFIXES.map(|prefix| format!("{prefix}{layer}."));
        let names: BTreeSet<&str> = self.files.names().collect();
        let places = prefixes.iter().flat_map(|prefix| layouts.iter().map(move |layout| (prefix, layout)));
        let mut found =
            places.filter(|(prefix, layout)| names.contains(format!("{prefix}{}", layout.experts.first()).as_str()));
        let (prefix, layout) = match (found.next(), found.next()) {
            (Some((prefix, layout)), Some((other_prefix, other))) => {
                return Err(Error::TwoLayouts {
                    path: self.files.path().to_owned(),
                    first: format!("{prefix}{}", layout.experts.first()),
                    second: format!("{other_prefix}{}", other.experts.first()),
                });
            }
            (Some(place), None) => place,
            (None, _) => {
                let in_block = |name: &str| BLOCKS.iter().any(|block| name.starts_with(block));
                let used = |prefix: &&String| {
                    names.iter().any(|name| name.strip_prefix(prefix.as_str()).is_some_and(in_block))
                };
                (prefixes.iter().find(used).unwrap_or(&prefixes[0]), &layouts[0])
            }
        };
        Ok((self.files.of_layer(prefix)?, layout))
    }
}

/// The MoE block of one layer, in its files.
struct Block<'a> {
    config: &'a ModelConfig,
    tensors: LayerTensors<'a>,
    layout: &'static Layout,
}

impl Block<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.tensors.tensor(name)
    }

    /// An expert that is stored as three matrices.
    fn expert(&self, prefix: &str, parts: &Parts, intermediate: usize) -> Result<Expert> {
        let hidden = self.config.hidden;
        let [gate, up, down] = parts.map(|part| format!("{prefix}.{part}"));
        Ok(Expert {
            gate: self.matrix(&gate, intermediate, hidden)?,
            up: self.matrix(&up, intermediate, hidden)?,
            down: self.matrix(&down, hidden, intermediate)?,
        })
    }

    /// A weight matrix [rows, cols]: `name.weight`, and its block scales where it is e4m3 of a quantised checkpoint.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix> {
        let weight = self.tensor(&format!("{name}.weight"))?;
        match self.config.quantisation {
            Some(quantisation) if weight.is_e4m3() => {
                // DeepSeek-V4's own release calls them `scale`.
                let short = format!("{name}.scale");
                let is_short = self.tensors.has(&short);
                let scales = self.tensor(&if is_short { short } else { format!("{name}.weight_scale_inv") })?;
                Ok(quantisation.matrix(weight, scales, rows, cols)?.into())
            }
            Some(_) if !weight.is_float() => Err(weight.dtype_error("F8_E4M3, BF16, F16 or F32")),
            None if weight.is_e4m3() => {
                Err(weight.dtype_error("BF16, F16 or F32 where config.json has no `quantization_config`"))
            }
            _ => Ok(weight.matrix(rows, cols)?.into()),
        }
    }

    fn experts(&self) -> Result<Vec<Expert>> {
        let ModelConfig { hidden, intermediate, experts, .. } = *self.config;
        match &self.layout.experts {
            Experts::Each { prefix, parts } => {
                let expert = |id: usize| self.expert(&format!("{prefix}.{id}"), parts, intermediate);
                (0..experts).into_par_iter().map(expert).collect()
            }
            Experts::Fused { gate_up, down } => {
                let gate_up = self.tensor(gate_up)?.stack(experts, 2 * intermediate, hidden)?;
                let down = self.tensor(down)?.stack(experts, hidden, intermediate)?;
                Ok(gate_up.iter().zip(down).map(|(gate_up, down)| fused(gate_up, down)).collect())
            }
            Experts::Transposed { gate_up, down } => {
                let gate_up = self.tensor(gate_up)?.stack(experts, hidden, 2 * intermediate)?;
                let down = self.tensor(down)?.stack(experts, intermediate, hidden)?;
                let expert = |(gate_up, down)| fused(&transposed(gate_up), transposed(down));
                Ok(gate_up.par_iter().zip(&down).map(expert).collect())
            }
        }
    }

    fn shared_experts(&self) -> Result<Vec<Expert>> {
        let ModelConfig { hidden, intermediate, shared_experts: count, .. } = *self.config;
        if count == 0 {
            return Ok(Vec::new());
        }
        let width = count * intermediate;
        let whole = match &self.layout.shared {
            Stored::Apart { prefix, parts } => self.expert(prefix, parts, width)?,
            Stored::Fused { gate_up, down } => {
                let gate_up = self.tensor(gate_up)?.matrix(2 * width, hidden)?;
                fused(&gate_up, self.tensor(down)?.matrix(hidden, width)?)
            }
        };
        whole.cut(count, intermediate).map_err(|error| match error {
            Error::BlockCut { block, .. } => Error::SharedBlocks { count, intermediate, block },
            other => other,
        })
    }

    fn router(&self, kind: LayerKind) -> Result<Router> {
        let config = self.config;
        let by_id = kind == LayerKind::HashMoe;
        let weight = self.tensor(self.layout.router)?.shaped(&[config.experts, config.hidden])?;
        let biased = config.family.spec.router.bias && !by_id;
        Ok(Router {
            hidden: config.hidden,
            weight: finite(&weight)?,
            top_k: config.top_k,
            scoring: config.scoring,
            correction_bias: if biased { Some(self.correction_bias()?) } else { None },
            groups: config.groups,
            normalize: config.normalize,
            least_sum: config.least_sum,
            shared_gate: match config.family.spec.shared {
                Shared::Gated(_) if config.shared_experts > 0 => {
                    Some(finite(&self.tensor(SHARED_GATE)?.shaped(&[1, config.hidden])?)?)
                }
                _ => None,
            },
            scaling: config.scaling,
            expert_of_id: if by_id { Some(self.expert_table()?) } else { None },
        })
    }

    fn correction_bias(&self) -> Result<Vec<f32>> {
        let tensor = self.tensor(self.layout.bias)?;
        let experts = self.config.experts;
        if tensor.shape() == [1, experts] { finite(&tensor) } else { finite(&tensor.shaped(&[experts])?) }
    }

    /// The table [vocabulary, K] of a hash-routed layer.
    fn expert_table(&self) -> Result<Vec<i32>> {
        let config = self.config;
        let tensor = self.tensor(&table_name(self.layout))?.shaped(&[config.vocabulary, config.top_k])?;
        let id = |id: i64| match usize::try_from(id) {
            Ok(expert) if expert < config.experts => Ok(expert as i32),
            _ => Err(tensor.value_error(format!("it has expert {id}; ids must be 0 to {}", config.experts - 1))),
        };
        tensor.integers()?.into_iter().map(id).collect()
    }
}

/// An expert whose gate and up matrices lie below each other.
fn fused(gate_up: &Matrix, down: Matrix) -> Expert {
    let intermediate = gate_up.rows() / 2;
    let [gate, up] = [0..intermediate, intermediate..2 * intermediate].map(|rows| gate_up.rows_view(rows).into());
    Expert { gate, up, down: down.into() }
}

fn transposed(matrix: &Matrix) -> Matrix {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut values = vec![bf16::ZERO; rows * cols];
    for row in 0..rows {
        for (col, &value) in matrix.row(row).iter().enumerate() {
            values[col * rows + row] = value;
        }
    }
    Matrix::from_rows(values, cols, rows)
}

/// The values of a router's tensor, all of which must be finite.
fn finite(tensor: &Tensor) -> Result<Vec<f32>> {
    let values = tensor.f32()?;
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(place) => {
            let mut rest = place;
            let mut index: Vec<usize> = Vec::new();
            for &size in tensor.shape().iter().rev() {
                index.insert(0, rest % size);
                rest /= size;
            }
            Err(tensor.value_error(format!("it has {} at {index:?}; all values must be finite", values[place])))
        }
    }
}

/// The name of a hash-routed layer's table: it lies beside the router's matrix.
fn table_name(layout: &Layout) -> String {
    format!("{}tid2eid", layout.router.strip_suffix("weight").unwrap_or(layout.router))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use safetensors::tensor::TensorView;
    use safetensors::{Dtype, SafeTensors};
    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;
    use crate::files::{INDEX, SINGLE};
    use crate::testing::{FIXTURES, fixture};

    /// A copy of a fixture's checkpoint, for a test to break.
    fn copy(name: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in [CONFIG, SINGLE] {
            fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
        }
        dir
    }

    fn edit_config(dir: &TempDir, field: &str, value: Value) {
        let path = dir.path().join(CONFIG);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[field] = value;
        fs::write(&path, config.to_string()).unwrap();
    }

    /// Rewrites the tensors of a file: the change gives each tensor's new dtype, shape and bytes, or drops it.
    fn edit_tensors(dir: &TempDir, change: impl Fn(&str, &TensorView) -> Option<(Dtype, Vec<usize>, Vec<u8>)>) {
        let path = dir.path().join(SINGLE);
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let changed: BTreeMap<_, _> =
            file.iter().filter_map(|(name, view)| Some((name.to_owned(), change(name, &view)?))).collect();
        fs::write(&path, serialized(changed.iter())).unwrap();
    }

    fn serialized<'a>(tensors: impl Iterator<Item = (&'a String, &'a (Dtype, Vec<usize>, Vec<u8>))>) -> Vec<u8> {
        let view = |(name, (dtype, shape, data)): (&'a String, &'a (Dtype, Vec<usize>, Vec<u8>))| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        };
        safetensors::serialize(tensors.map(view), None).unwrap()
    }

    fn unchanged(view: &TensorView) -> Option<(Dtype, Vec<usize>, Vec<u8>)> {
        Some((view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    }

    fn assert_same(a: &HfLayer, b: &HfLayer) {
        let (experts, others) = (&a.weights, &b.weights);
        assert_eq!(experts.experts.len(), others.experts.len());
        assert_eq!(experts.shared.len(), others.shared.len());
        let pairs = experts.experts.iter().zip(&others.experts).chain(experts.shared.iter().zip(&others.shared));
        for (a, b) in pairs {
            for (a, b) in [(&a.gate, &b.gate), (&a.up, &b.up), (&a.down, &b.down)] {
                assert!((0..a.rows()).all(|row| a.row(row) == b.row(row)));
            }
        }
        assert_eq!(a.router.weight, b.router.weight);
        assert_eq!(a.router.correction_bias, b.router.correction_bias);
    }

    fn message(dir: &TempDir, layer: usize) -> String {
        HfLayer::open(dir.path(), layer).unwrap_err().to_string()
    }

    #[test]
    fn the_fixtures_open() {
        for (name, layer) in FIXTURES.into_iter().zip([0, 0, 0, 1]) {
            let open = HfLayer::open(&fixture(name), layer).unwrap();
            let config = open.config(32);
            config.validate(8).unwrap();
            open.weights.check(&config).unwrap();
            assert_eq!(open.router.correction_bias.is_some(), name.starts_with("deepseek"));
        }
        assert_eq!(HfLayer::open(&fixture("deepseek-v4"), 0).unwrap().router.vocabulary(), Some(256));
    }

    fn in_place(matrix: &WeightMatrix) -> bool {
        match matrix {
            WeightMatrix::Bf16(matrix) => matrix.is_in_place(),
            WeightMatrix::Fp8(matrix) => matrix.values().is_in_place(),
        }
    }

    #[test]
    fn bf16_weights_stay_in_the_mapped_file() {
        let open = HfLayer::open(&fixture("mixtral"), 0).unwrap();
        assert!(open.weights.experts.iter().all(|expert| in_place(&expert.gate) && in_place(&expert.down)));
    }

    #[test]
    fn a_sharded_checkpoint_is_the_same_layer() {
        for (name, layer) in FIXTURES.into_iter().zip([0, 0, 0, 1]) {
            let dir = copy(name);
            let bytes = fs::read(dir.path().join(SINGLE)).unwrap();
            fs::remove_file(dir.path().join(SINGLE)).unwrap();
            let mut shards: [BTreeMap<String, _>; 3] = Default::default();
            let mut weight_map = serde_json::Map::new();
            for (index, (tensor, view)) in SafeTensors::deserialize(&bytes).unwrap().iter().enumerate() {
                let shard = index % shards.len();
                shards[shard].insert(tensor.to_owned(), unchanged(&view).unwrap());
                weight_map.insert(tensor.to_owned(), format!("model-{shard}.safetensors").into());
            }
            for (shard, tensors) in shards.iter().enumerate() {
                let path = dir.path().join(format!("model-{shard}.safetensors"));
                fs::write(path, serialized(tensors.iter())).unwrap();
            }
            fs::write(dir.path().join(INDEX), json!({ "weight_map": weight_map }).to_string()).unwrap();
            assert_same(&HfLayer::open(dir.path(), layer).unwrap(), &HfLayer::open(&fixture(name), layer).unwrap());

            fs::remove_file(dir.path().join("model-1.safetensors")).unwrap();
            let error = message(&dir, layer);
            assert!(error.starts_with("cannot read") && error.contains("model-1.safetensors"), "{error}");
        }
    }

    #[test]
    fn shards_of_other_layers_are_not_opened() {
        let dir = copy("mixtral");
        fs::rename(dir.path().join(SINGLE), dir.path().join("a.safetensors")).unwrap();
        let names: Vec<String> = {
            let bytes = fs::read(dir.path().join("a.safetensors")).unwrap();
            SafeTensors::deserialize(&bytes).unwrap().names().into_iter().map(str::to_owned).collect()
        };
        let mut weight_map: serde_json::Map<String, Value> =
            names.into_iter().map(|name| (name, "a.safetensors".into())).collect();
        weight_map.insert("model.layers.1.block_sparse_moe.gate.weight".into(), "absent.safetensors".into());
        fs::write(dir.path().join(INDEX), json!({ "weight_map": weight_map }).to_string()).unwrap();
        HfLayer::open(dir.path(), 0).unwrap();
    }

    #[test]
    fn f32_tensors_are_converted() {
        let dir = copy("mixtral");
        edit_tensors(&dir, |_, view| {
            let values = view.data().as_chunks::<2>().0;
            let data = values.iter().flat_map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32().to_le_bytes());
            Some((Dtype::F32, view.shape().to_vec(), data.collect()))
        });
        assert_same(&HfLayer::open(dir.path(), 0).unwrap(), &HfLayer::open(&fixture("mixtral"), 0).unwrap());
    }

    #[test]
    fn a_wide_shared_expert_is_cut() {
        let dir = copy("deepseek-v3");
        edit_config(&dir, "n_shared_experts", json!(2));
        edit_tensors(&dir, |name, view| match name.contains("shared_experts") {
            // [I, H] twice below each other; [H, I] twice beside each other.
            true if name.contains("down") => {
                let data = view.data().chunks_exact(2 * view.shape()[1]).flat_map(|row| [row, row].concat());
                Some((view.dtype(), vec![view.shape()[0], 2 * view.shape()[1]], data.collect()))
            }
            true => Some((view.dtype(), vec![2 * view.shape()[0], view.shape()[1]], view.data().repeat(2))),
            false => unchanged(view),
        });
        let (cut, whole) = (HfLayer::open(dir.path(), 0).unwrap(), HfLayer::open(&fixture("deepseek-v3"), 0).unwrap());
        assert_eq!(cut.config(1).shared_experts, 2);
        let expected = &whole.weights.shared[0];
        for part in &cut.weights.shared {
            assert!((0..64).all(|row| part.gate.row(row) == expected.gate.row(row)));
            assert!((0..64).all(|row| part.up.row(row) == expected.up.row(row)));
            assert!((0..192).all(|row| part.down.row(row) == expected.down.row(row)));
        }
    }

    #[test]
    fn missing_and_broken_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(&dir, 0).contains("config.json"));
        fs::copy(fixture("mixtral").join(CONFIG), dir.path().join(CONFIG)).unwrap();
        let error = message(&dir, 0);
        assert!(error.ends_with("neither model.safetensors nor model.safetensors.index.json"), "{error}");
        for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "moe_io.safetensors"] {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        let error = message(&dir, 0);
        let shards = "only model-00001-of-00002.safetensors, model-00002-of-00002.safetensors; without an index";
        assert!(error.contains(shards), "{error}");
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
        for name in [SINGLE, INDEX] {
            fs::write(dir.path().join(name), pointer).unwrap();
            let error = message(&dir, 0);
            assert!(error.contains(name) && error.contains("Git LFS pointer"), "{error}");
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        let bytes = fs::read(fixture("mixtral").join(SINGLE)).unwrap();
        fs::write(dir.path().join(SINGLE), &bytes[..bytes.len() / 2]).unwrap();
        assert!(message(&dir, 0).contains("not a complete safetensors file"));
        fs::remove_file(dir.path().join(SINGLE)).unwrap();
        for (index, expected) in [
            ("{", "not valid JSON"),
            ("{}", "`weight_map` is missing"),
            (r#"{"weight_map": {"x": 1}}"#, "it must be a file name"),
            (r#"{"weight_map": {}}"#, "has no tensor `model.layers.0.block_sparse_moe.experts.0.w1.weight`"),
        ] {
            fs::write(dir.path().join(INDEX), index).unwrap();
            let error = message(&dir, 0);
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn layers_that_do_not_exist_or_are_dense_are_named() {
        let dir = copy("deepseek-v3");
        assert_eq!(message(&dir, 3), "layer 3 does not exist: the model has layers 0 to 0");
        edit_config(&dir, "num_hidden_layers", json!(4));
        edit_config(&dir, "first_k_dense_replace", json!(2));
        assert_eq!(message(&dir, 1), "layer 1 is dense, it has no experts; the first layer with experts is 2");
        assert_eq!(Checkpoint::open(dir.path()).unwrap().first_moe_layer(), Some(2));
    }

    #[test]
    fn wrong_tensors_are_named() {
        let gate = "model.layers.0.mlp.gate.weight";
        let down = "model.layers.0.mlp.experts.7.down_proj.weight";
        for (target, change, expected) in [
            (gate, None, "has no tensor `model.layers.0.mlp.gate.weight`"),
            (
                down,
                Some((Dtype::F8_E4M3, vec![128, 192], vec![0; 128 * 192])),
                "is F8_E4M3; it must be BF16, F16 or F32",
            ),
            (
                down,
                Some((Dtype::BF16, vec![192, 128], vec![0; 2 * 128 * 192])),
                "has shape [192, 128]; it must be [128, 192]",
            ),
        ] {
            let dir = copy("qwen3-moe");
            edit_tensors(&dir, |name, view| if name == target { change.clone() } else { unchanged(view) });
            let error = message(&dir, 0);
            assert!(error.contains(target) && error.contains(expected), "{error:?} lacks {expected:?}");
        }
        let dir = copy("deepseek-v4");
        edit_tensors(&dir, |name, view| {
            let data =
                if name.ends_with("tid2eid") { 16i64.to_le_bytes().repeat(256 * 6) } else { view.data().to_vec() };
            Some((view.dtype(), view.shape().to_vec(), data))
        });
        let error = message(&dir, 0);
        assert!(error.contains("tid2eid") && error.contains("expert 16; ids must be 0 to 15"), "{error}");
    }
}
