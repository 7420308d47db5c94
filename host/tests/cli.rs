//! The `ferromoe` binary as a user meets it: exit codes, what is printed, and what is written.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// `ferromoe run` in `folder`, on a machine without a CUDA driver.
fn command(folder: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferromoe"));
    command.arg("run").args(options).current_dir(folder).env("FERROMOE_CUDA_DRIVER", "/nonexistent/libcuda.so.1");
    command
}

fn run(folder: &Path, options: &[&str]) -> Output {
    command(folder, options).output().unwrap()
}

/// What was printed, on both.
fn printed(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Sets a value of row `row` of 192 bf16 or f32 values.
fn set<const BYTES: usize>(bytes: &mut [u8], row: usize, column: usize, value: [u8; BYTES]) {
    bytes[BYTES * (192 * row + column)..][..BYTES].copy_from_slice(&value);
}

const BF16_NAN: [u8; 2] = 0x7fc0u16.to_le_bytes();
const BF16_INFINITY: [u8; 2] = 0xff80u16.to_le_bytes();

/// The recorded DeepSeek-V3 input with one tensor's bytes changed, as `input` in `folder`.
fn changed_input(folder: &Path, tensor: &str, change: impl Fn(&mut [u8])) {
    changed(folder, &fixture("deepseek-v3/moe_io.safetensors"), tensor, change);
}

/// The same of another input.
fn changed(folder: &Path, input: &Path, tensor: &str, change: impl Fn(&mut [u8])) {
    let bytes = fs::read(input).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut data = file.tensor(tensor).unwrap().data().to_vec();
    change(&mut data);
    let views = file.tensors().into_iter().map(|(name, view)| {
        let data = if name == tensor { &data } else { view.data() };
        (name, TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap())
    });
    fs::write(folder.join("input"), safetensors::serialize(views, None).unwrap()).unwrap();
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
        assert!(error.contains("`topk_idx` of input: row 30, here rank 1, token 5, k 2: expert"), "{error}");
        assert!(error.contains(expected), "{error}");
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

#[test]
fn a_token_that_is_not_finite_is_named_and_the_others_are_held_to_the_recording() {
    let folder = tempfile::tempdir().unwrap();
    changed_input(folder.path(), "hidden_states", |bytes| {
        set(bytes, 30, 7, BF16_INFINITY);
        set(bytes, 3, 191, BF16_NAN);
        set(bytes, 3, 5, BF16_NAN);
    });
    let output = run(folder.path(), &["--device", "sim", "--input", "input"]);
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for part in [
        "token 3 of the input is not finite (hidden_states, column 5: NaN), nor is 1 more",
        "result   right: relative L2 error",
        "over 48 of 50 tokens, whose input is finite",
    ] {
        assert!(text.contains(part), "{text}\nlacks {part:?}");
    }
    let output = run(folder.path(), &["--device", "sim", "--input", "input", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = serde_json::json!(
        {"tokens": 2, "tensor": "hidden_states", "token": 3, "column": 5, "value": "NaN"}
    );
    assert_eq!((&report["input_not_finite"], &report["compared_tokens"]), (&expected, &48.into()));
    assert!(report["relative_l2_error"].as_f64().unwrap() <= 6e-3);
}

#[test]
fn beside_a_token_that_is_not_finite_a_wrong_one_is_still_wrong() {
    let folder = tempfile::tempdir().unwrap();
    // The routing weight of token 3, and the recorded output of token 4.
    changed_input(folder.path(), "topk_weights", |bytes| {
        bytes[4 * 4 * 3..][..4].copy_from_slice(&f32::NAN.to_le_bytes())
    });
    fs::rename(folder.path().join("input"), folder.path().join("weights")).unwrap();
    changed(folder.path(), &folder.path().join("weights"), "output_f32", |bytes| {
        set(bytes, 4, 0, 1e6f32.to_le_bytes());
    });
    let output = run(folder.path(), &["--device", "sim", "--input", "input"]);
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("token 3 of the input is not finite (topk_weights, column 0: NaN)"), "{text}");
    assert!(text.contains("result   WRONG: relative L2 error 1.00e0"), "{text}");
}

#[test]
fn without_anything_to_compare_there_is_no_verdict() {
    for (tensor, value, expected) in [
        (
            "hidden_states",
            &BF16_NAN[..],
            "`hidden_states` of input: no token is finite, so there is nothing to compare",
        ),
        ("output_f32", &f32::INFINITY.to_le_bytes(), "`output_f32` of input: token 0, column 0 is inf"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        changed_input(folder.path(), tensor, |bytes| {
            bytes.chunks_exact_mut(value.len()).for_each(|place| place.copy_from_slice(value));
        });
        let output = run(folder.path(), &["--device", "sim", "--input", "input", "--output", "out"]);
        let text = printed(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(expected) && !folder.path().join("out").exists(), "{text}");
    }

    let folder = tempfile::tempdir().unwrap();
    let empty = [("hidden_states", TensorView::new(Dtype::BF16, vec![0, 192], &[]).unwrap())];
    fs::write(folder.path().join("input"), safetensors::serialize(empty, None).unwrap()).unwrap();
    let output = run(folder.path(), &["--device", "sim", "--input", "input"]);
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("result   nothing to compare: the input has 0 tokens"), "{text}");
    let output = run(folder.path(), &["--device", "sim", "--input", "input", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["compared_tokens"], &report["relative_l2_error"]), (&0.into(), &Value::Null));
}

#[test]
fn a_report_that_cannot_be_written_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    for options in [&["--device", "sim", "--json"][..], &["--device", "sim"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = command(folder.path(), options).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(printed(&output).contains("error: cannot write the standard output: No space left"), "{output:?}");
    }
}

#[test]
fn the_output_goes_through_links_and_into_devices_and_pipes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let sim = |output: &str| {
        let output = run(folder.path(), &["--device", "sim", "--output", output]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    };
    sim("plain");
    let expected = fs::read(at("plain")).unwrap();

    sim("/dev/null");
    assert!(fs::symlink_metadata("/dev/null").unwrap().file_type().is_char_device());

    fs::write(at("secret"), "older").unwrap();
    fs::set_permissions(at("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    symlink("secret", at("link")).unwrap();
    sim("link");
    assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
    assert_eq!(fs::read(at("secret")).unwrap(), expected);
    assert_eq!(fs::metadata(at("secret")).unwrap().permissions().mode() & 0o777, 0o600);

    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = at("pipe");
        move || fs::read(pipe).unwrap()
    });
    sim("pipe");
    assert_eq!(reader.join().unwrap(), expected);
    assert!(fs::symlink_metadata(at("pipe")).unwrap().file_type().is_fifo());

    let output = run(folder.path(), &["--device", "sim", "--output", "/dev/full"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(printed(&output).contains("cannot write /dev/full: No space left"), "{output:?}");
}

#[test]
fn nothing_that_is_read_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("ck")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("mixtral").join(file), at("ck").join(file)).unwrap();
    }
    fs::copy(fixture("mixtral/moe_io.safetensors"), at("io")).unwrap();
    fs::hard_link(at("io"), at("hard")).unwrap();
    symlink("ck/config.json", at("soft")).unwrap();
    symlink("ck", at("way")).unwrap();
    let before: Vec<_> =
        ["ck/config.json", "ck/model.safetensors", "io"].map(|name| fs::read(at(name)).unwrap()).into();
    for output in
        ["io", "./io", "hard", "soft", "ck/config.json", "way/model.safetensors", "ck/model.safetensors.index.json"]
    {
        let ran = run(folder.path(), &["--device", "sim", "--checkpoint", "ck", "--input", "io", "--output", output]);
        let text = printed(&ran);
        assert_eq!(ran.status.code(), Some(2), "{output}: {text}");
        assert!(
            text.contains(&format!("cannot write {output}: it would replace ")) && text.contains("which is read"),
            "{text}"
        );
    }
    let after: Vec<_> = ["ck/config.json", "ck/model.safetensors", "io"].map(|name| fs::read(at(name)).unwrap()).into();
    assert!(before == after && !at("ck/model.safetensors.index.json").exists());

    // The shards that an index names, those that are not there included.
    let index = r#"{"weight_map": {"a": "part-1", "b": "part-2"}}"#;
    fs::write(at("ck/model.safetensors.index.json"), index).unwrap();
    fs::write(at("ck/part-1"), "precious").unwrap();
    for output in ["ck/part-1", "ck/part-2"] {
        let ran = run(folder.path(), &["--device", "sim", "--checkpoint", "ck", "--output", output]);
        assert_eq!(ran.status.code(), Some(2));
        assert!(printed(&ran).contains("which is read"), "{ran:?}");
    }
    assert_eq!(fs::read(at("ck/part-1")).unwrap(), b"precious");

    // Another file of the folder is nobody's business.
    let ran = run(folder.path(), &["--device", "sim", "--checkpoint", "ck", "--input", "io", "--output", "ck/out"]);
    assert_eq!(ran.status.code(), Some(0), "{ran:?}");
}

#[test]
fn the_report_and_the_output_do_not_share_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let report = File::create(folder.path().join("out")).unwrap();
    let output = command(folder.path(), &["--device", "sim", "--output", "out"]).stdout(report).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(printed(&output).contains("cannot write out: it is the standard output"), "{output:?}");
}

#[test]
fn an_input_may_be_a_pipe_but_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut cat =
        Command::new("cat").arg(fixture("deepseek-v3/moe_io.safetensors")).stdout(Stdio::piped()).spawn().unwrap();
    let piped = cat.stdout.take().unwrap();
    let output = command(folder.path(), &["--device", "sim", "--input", "/dev/stdin"]).stdin(piped).output().unwrap();
    assert!(cat.wait().unwrap().success());
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("against output_f32 of the input file"), "{text}");

    for (input, expected) in [
        (".", "cannot read .: it is a folder; it must be a safetensors file"),
        ("/dev/null", "cannot read /dev/null: it is a device"),
    ] {
        let output = run(folder.path(), &["--device", "sim", "--input", input]);
        assert_eq!(output.status.code(), Some(2));
        assert!(printed(&output).contains(expected), "{output:?}");
    }
}

#[test]
fn options_that_would_be_ignored_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (options, expected) in [
        (&["--device", "cuda", "--sms", "4"][..], "--sms is the size of a simulated rank"),
        (&["--device", "cuda", "--seed", "0"], "--seed makes random tokens and the simulator's order"),
    ] {
        let output = run(folder.path(), options);
        assert_eq!(output.status.code(), Some(2));
        assert!(printed(&output).contains(expected), "{output:?}");
    }
    // Where `auto` finds GPUs, they are ignored as well.
    let fake = std::env::current_exe().unwrap().with_file_name("libfake_cuda_driver.so");
    let output = command(folder.path(), &["--sms", "4"]).env("FERROMOE_CUDA_DRIVER", fake).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(printed(&output).contains("--sms is the size of a simulated rank"), "{output:?}");
}

#[test]
fn a_router_that_contradicts_the_recording_is_not_right() {
    let folder = tempfile::tempdir().unwrap();
    // Every recorded expert is the next one.
    changed_input(folder.path(), "topk_idx", |bytes| {
        for value in bytes.chunks_exact_mut(8) {
            value[0] = (value[0] + 1) % 16;
        }
    });
    let options = ["--device", "sim", "--input", "input", "--route", "compute"];
    let output = run(folder.path(), &options);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("WRONG: the checkpoint's router contradicts the recorded routing at"), "{text}");
    assert!(text.contains("first at token 0: recorded experts ["), "{text}");
    let output = run(folder.path(), &[&options[..], &["--json"]].concat());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], false);
    assert!(report["route_check"]["contradictions"].as_u64().unwrap() > 40);
}

#[test]
fn a_routing_under_another_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(fixture("deepseek-v3/moe_io.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let renamed = |name: String| if name == "topk_idx" { "topk_ids".to_owned() } else { name };
    let views = file.tensors().into_iter().map(|(name, view)| (renamed(name), view));
    std::fs::write(folder.path().join("input"), safetensors::serialize(views, None).unwrap()).unwrap();
    let output = run(folder.path(), &["--device", "sim", "--input", "input"]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("`topk_ids`") && error.contains("is called `topk_idx`"), "{error}");
}
