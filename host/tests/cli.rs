//! The `ferromoe` binary as a user meets it: exit codes, what is printed, and what is written.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Runs `ferromoe run` in `folder`.
fn run(folder: &Path, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferromoe")).arg("run").args(options).current_dir(folder).output().unwrap()
}

/// The recorded DeepSeek-V3 input with one tensor's bytes changed, as `input` in `folder`.
fn changed_input(folder: &Path, tensor: &str, change: impl Fn(&mut [u8])) {
    let bytes = std::fs::read(fixture("deepseek-v3/moe_io.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut data = file.tensor(tensor).unwrap().data().to_vec();
    change(&mut data);
    let views = file.tensors().into_iter().map(|(name, view)| {
        let data = if name == tensor { &data } else { view.data() };
        (name, TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap())
    });
    std::fs::write(folder.join("input"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn the_example_runs_from_any_folder_and_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let output = run(folder.path(), &["--device", "sim", "--json", "--output", "out.safetensors"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["passed"], &report["compared_with"]), (&true.into(), &"output_f32".into()));
    assert!(report["relative_l2_error"].as_f64().unwrap() <= 6e-3);
    assert_eq!(report["cost"].as_array().unwrap().len(), 2);

    let bytes = std::fs::read(folder.path().join("out.safetensors")).unwrap();
    let written = SafeTensors::deserialize(&bytes).unwrap();
    let view = written.tensor("output").unwrap();
    assert_eq!((view.dtype(), view.shape()), (Dtype::BF16, &[50, 192][..]));
}

#[test]
fn a_wrong_result_is_told_by_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    // Ten times what the layer gives: a relative error of 0.9.
    changed_input(folder.path(), "output_f32", |bytes| {
        for value in bytes.chunks_exact_mut(4) {
            let number = f32::from_le_bytes(value.try_into().unwrap());
            value.copy_from_slice(&(10.0 * number).to_le_bytes());
        }
    });
    let output = run(folder.path(), &["--device", "sim", "--input", "input"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("WRONG: relative L2 error 9.00e-1"));
}

#[test]
fn bad_expert_ids_come_back_from_the_device() {
    for (id, expected) in [(99i64, "expert 99"), (i64::MIN, "expert -2147483648"), (-2, "expert -2")] {
        let folder = tempfile::tempdir().unwrap();
        // Token 30 is token 5 of rank 1.
        changed_input(folder.path(), "topk_idx", |bytes| {
            bytes[8 * (30 * 4 + 2)..][..8].copy_from_slice(&id.to_le_bytes())
        });
        let output = run(folder.path(), &["--device", "sim", "--input", "input", "--output", "out"]);
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("rank 1, token 5, k 2") && error.contains(expected), "{error}");
        assert!(output.stdout.is_empty() && !folder.path().join("out").exists());
    }
}

#[test]
fn bad_input_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (options, expected) in [
        (&["--ranks", "3"][..], "16 experts cannot be cut evenly over 3 ranks"),
        (&["--layer", "7"], "layer 7 does not exist"),
        (&["--checkpoint", "absent"], "absent/config.json"),
        (&["--input", "absent"], "cannot read absent"),
        (&["--sms", "0"], "--sms"),
    ] {
        let output = run(folder.path(), &[options, &["--output", "out"]].concat());
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains(expected), "{options:?}: {error}");
        assert!(output.stdout.is_empty() && std::fs::read_dir(folder.path()).unwrap().next().is_none());
    }
}
