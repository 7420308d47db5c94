//! What goes into the layer: a recorded safetensors file, or random numbers.

use std::path::Path;

use ferromoe_kernel::quantise::GROUP;
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::error::{Error, Result};
use crate::matrix::Bytes;
use crate::router::Routing;
use crate::tensors::TensorFile;
use crate::tokens::Fp8Tokens;

/// The tokens of one forward pass over all ranks, and what is known about them.
#[derive(Clone, Debug)]
pub struct MoeInput {
    /// Number of tokens, T.
    pub tokens: usize,
    /// Width of a hidden state, H.
    pub hidden: usize,
    /// `[T, H]` what enters the layer. Of FP8 tokens, what they stand for, rounded.
    pub hidden_states: Vec<bf16>,
    /// The same as FP8 tokens, where the file has them so.
    pub fp8: Option<Fp8Tokens>,
    /// The recorded routing. Ids are as in the file, those beyond i32 at its nearest end; the device checks them.
    pub routing: Option<Routing>,
    /// `[T]` token ids, which hash-routed layers route by.
    pub input_ids: Option<Vec<i64>>,
    /// `[T, H]` what the layer is expected to give.
    pub output_f32: Option<Vec<f32>>,
    /// The layer the input was recorded at.
    pub layer: Option<usize>,
    /// The tensors of the file that nobody reads.
    pub unread: Vec<String>,
}

/// The tensors that are read.
const READ: [&str; 6] = ["hidden_states", "hidden_scales", "topk_idx", "topk_weights", "input_ids", "output_f32"];

impl MoeInput {
    /// Reads a safetensors file with `hidden_states` BF16 `[T, H]`, or F8_E4M3 with `hidden_scales` F32 `[T, ceil(H / 128)]`, and, each if it
    /// is there, `topk_idx` I64 `[T, K]` with
    /// `topk_weights` F32 `[T, K]`, `input_ids` I64 `[T]` and `output_f32` F32 `[T, H]`; its metadata may name the `layer`. Other
    /// tensors are left in [`MoeInput::unread`].
    ///
    /// # Errors
    /// A file that cannot be read, tensors of other kinds or shapes, and tensors whose names are almost those of the ones that are read.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(&TensorFile::open(path)?)
    }

    /// The same of a file that is in memory; `name` stands for its path in errors.
    pub(crate) fn embedded(name: &str, bytes: Bytes) -> Result<Self> {
        Self::read(&TensorFile::new(Path::new(name), bytes)?)
    }

    /// Random hidden states of unit variance, and token ids below `vocabulary` where that is given.
    pub fn random(tokens: usize, hidden: usize, vocabulary: Option<usize>, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let bound = 3f32.sqrt();
        let hidden_states = (0..tokens * hidden).map(|_| bf16::from_f32(random.random_range(-bound..=bound))).collect();
        let input_ids = vocabulary
            .filter(|&ids| ids > 0)
            .map(|ids| (0..tokens).map(|_| random.random_range(0..ids as i64)).collect());
        Self {
            tokens,
            hidden,
            hidden_states,
            fp8: None,
            routing: None,
            input_ids,
            output_f32: None,
            layer: None,
            unread: Vec::new(),
        }
    }

    fn read(file: &TensorFile) -> Result<Self> {
        let unread = unread(file)?;
        let states = file.tensor("hidden_states")?;
        let (tokens, hidden) = states.matrix_shape()?;
        let fp8 = read_fp8(file)?;
        let output_f32 = match file.find("output_f32") {
            Some(tensor) => Some(tensor.shaped(&[tokens, hidden])?.f32_exactly()?),
            None => None,
        };
        let input_ids = match file.find("input_ids") {
            Some(tensor) => Some(tensor.shaped(&[tokens])?.i64()?),
            None => None,
        };
        Ok(Self {
            tokens,
            hidden,
            hidden_states: match &fp8 {
                Some(tokens) => tokens.to_bf16(),
                None if states.is_float() => states.bf16()?,
                None => return Err(states.dtype_error("BF16, or F8_E4M3 with `hidden_scales` beside it")),
            },
            fp8,
            routing: read_routing(file, tokens)?,
            input_ids,
            output_f32,
            layer: read_layer(file)?,
            unread,
        })
    }
}

/// The tensors that are not read, none of which may be one of those under another name.
fn unread(file: &TensorFile) -> Result<Vec<String>> {
    let unread: Vec<String> = file.names().filter(|name| !READ.contains(name)).map(str::to_owned).collect();
    for name in &unread {
        let meant = READ.iter().find(|read| distance(read, name) <= 2);
        let of_routing = || if name.contains("weight") { "topk_weights" } else { "topk_idx" };
        if let Some(meant) = meant.copied().or_else(|| name.starts_with("topk").then(of_routing)) {
            let problem = format!("nobody reads it; what is read is called `{meant}`");
            return Err(Error::TensorValue { path: file.path().to_owned(), name: name.clone(), problem });
        }
    }
    Ok(unread)
}

/// How many letters have to be put in, left out or changed to make one name of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The tokens, if they are FP8.
fn read_fp8(file: &TensorFile) -> Result<Option<Fp8Tokens>> {
    let states = file.tensor("hidden_states")?;
    let (tokens, hidden) = states.matrix_shape()?;
    let shape = [tokens, hidden.div_ceil(GROUP as usize)];
    match (states.is_e4m3(), file.find("hidden_scales")) {
        (false, None) => Ok(None),
        (false, Some(scales)) => {
            Err(scales.value_error("`hidden_states` has no use for it; only F8_E4M3 ones have scales".into()))
        }
        (true, None) => {
            let problem = format!("it is F8_E4M3, and there is no `hidden_scales`; it must be F32, of shape {shape:?}");
            Err(states.value_error(problem))
        }
        (true, Some(scales)) => {
            scales.is_f32()?;
            let scales = scales.scales(shape[0], shape[1])?;
            let scales = (0..tokens).flat_map(|token| scales.row(token)).copied().collect();
            let values = states.e4m3(tokens, hidden)?;
            let values = (0..tokens).flat_map(|token| values.row(token)).copied().collect();
            Fp8Tokens::new(values, scales, hidden).map(Some)
        }
    }
}

fn read_routing(file: &TensorFile, tokens: usize) -> Result<Option<Routing>> {
    let (idx, weights) = match (file.find("topk_idx"), file.find("topk_weights")) {
        (None, None) => return Ok(None),
        _ => (file.tensor("topk_idx")?, file.tensor("topk_weights")?),
    };
    let &[rows, top_k] = idx.shape() else { return Err(idx.shape_error(format!("[{tokens}, top-k]"))) };
    if rows != tokens || top_k == 0 {
        return Err(idx.shape_error(format!("[{tokens}, top-k]")));
    }
    let saturated = |id: i64| id.clamp(i32::MIN.into(), i32::MAX.into()) as i32;
    let idx = idx.i64()?.into_iter().map(saturated).collect();
    Routing::new(top_k, idx, weights.shaped(&[tokens, top_k])?.f32_exactly()?).map(Some)
}

fn read_layer(file: &TensorFile) -> Result<Option<usize>> {
    let Some(layer) = file.metadata("layer") else { return Ok(None) };
    let wrong = |_| Error::Field {
        path: file.path().to_owned(),
        field: "layer".into(),
        problem: format!("of the metadata is {layer:?}; it must be a layer number"),
    };
    layer.parse().map(Some).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::testing::{FIXTURES, fixture};

    type Tensors<'a> = &'a [(&'a str, Dtype, &'a [usize], Vec<u8>)];

    fn read(tensors: Tensors, layer: Option<&str>) -> Result<MoeInput> {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
        let metadata = layer.map(|layer| HashMap::from([("layer".to_owned(), layer.to_owned())]));
        MoeInput::embedded("input.safetensors", Arc::new(safetensors::serialize(views, metadata).unwrap()))
    }

    fn states() -> (&'static str, Dtype, &'static [usize], Vec<u8>) {
        ("hidden_states", Dtype::BF16, &[2, 3], vec![0; 12])
    }

    #[test]
    fn the_fixtures_are_read() {
        let shapes = FIXTURES.map(|name| {
            let input = MoeInput::open(&fixture(name).join("moe_io.safetensors")).unwrap();
            assert_eq!(input.hidden_states.len(), input.tokens * input.hidden);
            assert_eq!(input.output_f32.unwrap().len(), input.tokens * input.hidden);
            assert_eq!(input.input_ids.unwrap().len(), input.tokens);
            let routing = input.routing.unwrap();
            assert_eq!(routing.tokens(), input.tokens);
            (input.tokens, input.hidden, routing.top_k(), input.layer)
        });
        assert_eq!(
            shapes,
            [(37, 256, 2, Some(0)), (64, 128, 4, Some(0)), (50, 192, 4, Some(0)), (61, 256, 6, Some(1))]
        );
    }

    #[test]
    fn fp8_tokens_come_with_their_scales() {
        let states = |dtype, bytes| ("hidden_states", dtype, &[2, 192][..], vec![0x38u8; bytes]);
        let scales = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let found = |dtype, shape: &[usize], data| {
            read(&[states(Dtype::F8_E4M3, 384), ("hidden_scales", dtype, shape, data)], None)
        };
        let input = found(Dtype::F32, &[2, 2], scales(&[1.0, 2.0, 3.0, 0.5])).unwrap();
        // 0x38 is 1.
        let values = [0, 128, 192, 383].map(|at| input.hidden_states[at].to_f32());
        assert_eq!(values, [1.0, 2.0, 3.0, 0.5]);
        assert_eq!(input.fp8.unwrap().scales(), [1.0, 2.0, 3.0, 0.5]);

        let message = |input: Result<MoeInput>| input.unwrap_err().to_string();
        let text = message(read(&[states(Dtype::F8_E4M3, 384)], None));
        let expected = "it is F8_E4M3, and there is no `hidden_scales`; it must be F32, of shape [2, 2]";
        assert!(text.contains("`hidden_states`") && text.contains(expected), "{text}");
        let text = message(found(Dtype::F32, &[4], scales(&[1.0; 4])));
        assert!(text.contains("`hidden_scales`") && text.contains("has shape [4]; it must be [2, 2]"), "{text}");
        let text = message(found(Dtype::F32, &[2, 2], scales(&[1.0, 2.0, f32::NAN, 1.0])));
        assert!(text.contains("`hidden_scales`") && text.contains("the scale [1, 0] is NaN"), "{text}");
        let text = message(found(Dtype::BF16, &[2, 2], vec![0; 8]));
        assert!(text.contains("`hidden_scales`") && text.contains("is BF16; it must be F32"), "{text}");
        let text = message(read(&[states(Dtype::F8_E5M2, 384)], None));
        assert!(text.contains("is F8_E5M2; it must be BF16, or F8_E4M3 with `hidden_scales`"), "{text}");
        let data = scales(&[1.0; 4]);
        let text = message(read(&[states(Dtype::BF16, 768), ("hidden_scales", Dtype::F32, &[2, 2], data)], None));
        assert!(text.contains("`hidden_scales`") && text.contains("no use for it"), "{text}");
    }

    #[test]
    fn hidden_states_are_enough() {
        let input = read(&[states()], None).unwrap();
        assert_eq!((input.tokens, input.hidden, input.layer), (2, 3, None));
        assert!(input.routing.is_none() && input.input_ids.is_none() && input.output_f32.is_none());
        let none = read(&[("hidden_states", Dtype::BF16, &[0, 64], vec![])], None).unwrap();
        assert_eq!(none.tokens, 0);
    }

    #[test]
    fn ids_beyond_i32_stay_out_of_range() {
        let ids: Vec<u8> = [-1i64, 5, i64::MAX, i64::MIN].iter().flat_map(|id| id.to_le_bytes()).collect();
        let input = read(
            &[states(), ("topk_idx", Dtype::I64, &[2, 2], ids), ("topk_weights", Dtype::F32, &[2, 2], vec![0; 16])],
            None,
        );
        assert_eq!(input.unwrap().routing.unwrap().topk_idx(), [-1, 5, i32::MAX, i32::MIN]);
    }

    #[test]
    fn what_is_not_read_is_known_and_what_is_misnamed_refused() {
        let input = read(&[states(), ("output_bf16", Dtype::BF16, &[2, 3], vec![0; 12])], None).unwrap();
        assert_eq!(input.unread, ["output_bf16"]);
        for (name, meant) in [
            ("topk_ids", "topk_idx"),
            ("topk_indices", "topk_idx"),
            ("topk_weights_", "topk_weights"),
            ("topk_scores_and_weights", "topk_weights"),
            ("hidden_state", "hidden_states"),
            ("input_id", "input_ids"),
            ("output_fp32", "output_f32"),
        ] {
            let error = read(&[states(), (name, Dtype::I64, &[1], vec![0; 8])], None).unwrap_err().to_string();
            let expected =
                format!("tensor `{name}` of input.safetensors: nobody reads it; what is read is called `{meant}`");
            assert_eq!(error, expected);
        }
        assert_eq!([distance("", "abc"), distance("kitten", "sitting"), distance("topk", "topk")], [3, 3, 0]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases: [(Tensors, &str); 9] = [
            (&[], "has no tensor `hidden_states`"),
            (
                &[("hidden_states", Dtype::F32, &[2, 3], vec![0; 24])],
                "tensor `hidden_states` of input.safetensors is F32; it must be BF16",
            ),
            (&[("hidden_states", Dtype::BF16, &[6], vec![0; 12])], "has shape [6]"),
            (&[states(), ("topk_idx", Dtype::I64, &[2, 1], vec![0; 16])], "has no tensor `topk_weights`"),
            (&[states(), ("topk_weights", Dtype::F32, &[2, 1], vec![0; 8])], "has no tensor `topk_idx`"),
            (
                &[
                    states(),
                    ("topk_idx", Dtype::I64, &[3, 1], vec![0; 24]),
                    ("topk_weights", Dtype::F32, &[3, 1], vec![0; 12]),
                ],
                "`topk_idx` of input.safetensors has shape [3, 1]; it must be [2, top-k]",
            ),
            (
                &[
                    states(),
                    ("topk_idx", Dtype::I32, &[2, 1], vec![0; 8]),
                    ("topk_weights", Dtype::F32, &[2, 1], vec![0; 8]),
                ],
                "`topk_idx` of input.safetensors is I32; it must be I64",
            ),
            (&[states(), ("input_ids", Dtype::I64, &[1], vec![0; 8])], "has shape [1]; it must be [2]"),
            (&[states(), ("output_f32", Dtype::BF16, &[2, 3], vec![0; 12])], "is BF16; it must be F32"),
        ];
        for (tensors, expected) in cases {
            let error = read(tensors, None).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        let error = read(&[states()], Some("first")).unwrap_err().to_string();
        assert!(error.contains("`layer` of the metadata is \"first\""), "{error}");
    }

    #[test]
    fn random_input_is_the_seed_s() {
        let a = MoeInput::random(100, 64, Some(10), 5);
        assert_eq!(a.hidden_states, MoeInput::random(100, 64, Some(10), 5).hidden_states);
        assert_ne!(a.hidden_states, MoeInput::random(100, 64, Some(10), 6).hidden_states);
        assert!(a.input_ids.unwrap().iter().all(|id| (0..10).contains(id)));
        let variance = a.hidden_states.iter().map(|x| x.to_f64().powi(2)).sum::<f64>() / 6400.0;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
    }
}
