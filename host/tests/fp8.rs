//! The `ferromoe` binary with FP8 checkpoints and FP8 tokens: what runs in which format, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ferromoe::{Fp8Tokens, ScaleKind};
use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

type Contents = (Dtype, Vec<usize>, Vec<u8>);
type Tensors = BTreeMap<String, Contents>;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/qwen3-moe-fp8")
}

/// A copy of the FP8 fixture in a folder of its own, with both files' tensors and the configuration changed.
fn copy(change: impl Fn(&mut Tensors), configure: impl Fn(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model.safetensors", "moe_io.safetensors"] {
        let bytes = fs::read(fixture().join(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (&str, TensorView)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let mut tensors: Tensors = file.iter().map(tensor).collect();
        change(&mut tensors);
        let views = tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        fs::write(folder.path().join(name), safetensors::serialize(views, None).unwrap()).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(fixture().join("config.json")).unwrap()).unwrap();
    configure(&mut config);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn run(folder: &Path, options: &[&str]) -> Output {
    let input = ["run", "--device", "sim", "--checkpoint", ".", "--input", "moe_io.safetensors"];
    Command::new(env!("CARGO_BIN_EXE_ferromoe")).args(input).args(options).current_dir(folder).output().unwrap()
}

fn report(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Replaces bf16 tokens by FP8 ones and their scales, which are powers of two, as the kernel would not make them for this checkpoint; what is recorded
/// is no longer what comes out.
fn quantise_tokens(tensors: &mut Tensors) {
    let Some((_, shape, data)) = tensors.get("hidden_states").cloned() else { return };
    let states: Vec<bf16> = data.as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes)).collect();
    let tokens = Fp8Tokens::quantise(&states, shape[1], ScaleKind::PowerOfTwo).unwrap();
    let scales = tokens.scales().iter().flat_map(|scale| scale.to_le_bytes()).collect();
    tensors.insert("hidden_scales".into(), (Dtype::F32, vec![shape[0], shape[1].div_ceil(128)], scales));
    tensors.insert("hidden_states".into(), (Dtype::F8_E4M3, shape, tokens.values().to_vec()));
    tensors.remove("output_f32");
}

#[test]
fn fp8_weights_run_as_bf16() {
    for options in [&["--experts", "bf16", "--json"][..], &["--experts", "bf16", "--json", "--route", "compute"]] {
        let report = report(&run(&fixture(), options));
        assert_eq!((&report["compared_with"], &report["experts_format"]), (&json!("output_f32"), &json!("bf16")));
        assert_eq!(report["checkpoint_format"], "fp8");
        assert!(report["relative_l2_error"].as_f64().unwrap() < 6e-3, "{report}");
    }
}

#[test]
fn fp8_tokens_run_as_bf16() {
    let folder = copy(quantise_tokens, |_| {});
    let report = report(&run(folder.path(), &["--experts", "bf16", "--json"]));
    assert_eq!(report["compared_with"], "reference");
    assert!(report["relative_l2_error"].as_f64().unwrap() < 6e-3, "{report}");
}

/// Also where ranks have unequal shares, each with the scales of its own tokens.
#[test]
fn fp8_tokens_run_as_they_are() {
    let folder = copy(quantise_tokens, |_| {});
    for options in [&["--json"][..], &["--json", "--ranks", "3"]] {
        let report = report(&run(folder.path(), options));
        assert_eq!((&report["compared_with"], &report["experts_format"]), (&json!("fp8_reference"), &json!("fp8")));
        assert!(report["relative_l2_error"].as_f64().unwrap() < 1e-2, "{report}");
    }
}

/// A change of some tensors, one of the configuration, and what the refusal names.
type Refused<'a> = (&'a dyn Fn(&mut Tensors), &'a dyn Fn(&mut Value), &'a [&'a str]);

#[test]
fn what_cannot_be_read_is_bad_input() {
    let up = "model.layers.0.mlp.experts.3.up_proj.weight";
    let scales = format!("{up}_scale_inv");
    let same = |_: &mut Tensors| {};
    let as_it_is = |_: &mut Value| {};
    let with = |name: &str, change: &dyn Fn(&mut Contents), tensors: &mut Tensors| {
        if let Some(tensor) = tensors.get_mut(name) {
            change(tensor);
        }
    };
    let nan = |tensors: &mut Tensors| with(&scales, &|tensor| tensor.2.fill(0xff), tensors);
    let flat = |tensors: &mut Tensors| with(&scales, &|tensor| tensor.1 = vec![2], tensors);
    let missing = |tensors: &mut Tensors| drop(tensors.remove(&scales));
    let e5m2 = |tensors: &mut Tensors| with(up, &|tensor| tensor.0 = Dtype::F8_E5M2, tensors);
    let scaleless = |tensors: &mut Tensors| {
        quantise_tokens(tensors);
        tensors.remove("hidden_scales");
    };
    let blocks = |config: &mut Value| config["quantization_config"]["weight_block_size"] = json!([64, 128]);
    let awq = |config: &mut Value| config["quantization_config"] = json!({"quant_method": "awq", "bits": 4});
    let cases: [Refused; 7] = [
        (&nan, &as_it_is, &[&scales, "the scale [0, 0] is NaN; it must be finite and above 0"]),
        (&flat, &as_it_is, &[&scales, "has shape [2]; it must be [1, 2]"]),
        (&missing, &as_it_is, &[&scales, "has no tensor"]),
        (&e5m2, &as_it_is, &[up, "is F8_E5M2; it must be F8_E4M3, BF16, F16 or F32"]),
        (&scaleless, &as_it_is, &["`hidden_states`", "there is no `hidden_scales`; it must be F32, of shape [7, 2]"]),
        (&same, &blocks, &["`quantization_config.weight_block_size` is [64, 128]", "[128, 128] or [32, 32]"]),
        (&same, &awq, &["`quantization_config.quant_method` is \"awq\"", "only \"fp8\""]),
    ];
    for (change, configure, parts) in cases {
        let folder = copy(change, configure);
        let output = run(folder.path(), &["--output", "out"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}\nlacks one of {parts:?}");
        assert!(output.stdout.is_empty() && !folder.path().join("out").exists());
    }
}
