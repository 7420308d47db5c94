//! `ferromoe bench` as a user meets it, on simulated ranks.

use std::process::{Command, Output};

use serde_json::Value;

fn bench(options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferromoe"))
        .arg("bench")
        .args(options)
        .env("FERROMOE_CUDA_DRIVER", "/nonexistent/libcuda.so.1")
        .output()
        .unwrap()
}

#[test]
fn every_measurement_is_a_line_of_json() {
    let output =
        bench(&["--shape", "qwen3-30b,flash", "--ranks", "2", "--tokens", "1,40", "--routing", "skewed", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let what: Vec<_> =
        lines.iter().map(|line| (line["shape"].as_str().unwrap(), line["tokens"].as_u64().unwrap())).collect();
    assert_eq!(what, [("qwen3-30b", 1), ("qwen3-30b", 40), ("flash", 1), ("flash", 40)]);
    for line in &lines {
        let number = |field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field} of {line}"));
        assert!(number("relative_error") < 1e-2, "{line}");
        for (least, counted) in [
            ("least_ops", "tensor_ops"),
            ("least_memory_bytes", "memory_bytes"),
            ("least_nvlink_bytes", "nvlink_bytes"),
        ] {
            assert!(0.0 < number(least) && number(least) <= number(counted), "{least} of {line}");
        }
        assert_eq!(line["routing"], "skewed");
        let phases: Vec<_> =
            line["phases"].as_array().unwrap().iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
        assert_eq!(phases, ["dispatch", "linear 1", "linear 2", "combine", "control"], "{line}");
        for role in line["waits"].as_array().unwrap() {
            let [waits, met] = ["waits", "met"].map(|field| role[field].as_u64().unwrap());
            assert!(0 < waits && met < waits, "{role}");
        }
        let machines: Vec<_> = line["estimates"].as_array().unwrap().iter().map(|of| of["machine"].as_str()).collect();
        assert_eq!(machines, [Some("H200"), Some("H20")]);
    }
    let useful = |line: &Value| line["least_ops"].as_f64().unwrap() / line["tensor_ops"].as_f64().unwrap();
    assert!(useful(&lines[1]) > useful(&lines[0]));
}

/// 192 columns: a group of scales is partial.
#[test]
fn in_fp8_less_is_moved() {
    let lines = |experts: &str| -> Vec<Value> {
        let output = bench(&[
            "--shape",
            "gpt-oss-120b",
            "--ranks",
            "2",
            "--tokens",
            "3,100",
            "--routing",
            "one-expert",
            "--experts",
            experts,
            "--json",
        ]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for (fp8, bf16) in lines("fp8").iter().zip(&lines("bf16")) {
        assert_eq!((&fp8["format"], &fp8["routing"]), (&"fp8".into(), &"one-expert".into()));
        assert_eq!(fp8["least_ops"], bf16["least_ops"]);
        for field in ["least_memory_bytes", "memory_bytes", "least_nvlink_bytes", "nvlink_bytes", "compulsory_bytes"] {
            assert!(fp8[field].as_f64() < bf16[field].as_f64(), "{field} of {fp8}");
        }
        let busiest = fp8["tokens_per_expert"][4].as_u64();
        assert_eq!(busiest, fp8["tokens"].as_u64().map(|tokens| 2 * tokens));
    }
}

#[test]
fn people_read_a_table() {
    let output = bench(&["--shape", "pro", "--device", "sim", "--tokens", "3"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("pro in bf16: hidden 448, intermediate 192, top-6, 1 shared, 8 experts a rank"), "{text}");
    let rows: Vec<_> = text.lines().rev().take(11).filter_map(|line| line.split_whitespace().next()).collect();
    let expected =
        ["H20", "H200", "mbarrier", "limits:", "all", "control", "combine", "linear", "linear", "dispatch", "phase"];
    assert_eq!(rows, expected, "{text}");
    assert!(text.lines().any(|line| line.starts_with("3 tokens a rank: ")), "{text}");
}

#[test]
fn layers_run_one_after_the_other() {
    let options = ["--shape", "flash", "--device", "sim", "--ranks", "2", "--tokens", "3", "--layers", "4"];
    let output = bench(&[&options[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&line["layers"], &line["tokens"]), (&4.into(), &3.into()), "{line}");
    for field in ["workspace_bytes", "instructions", "memory_bytes", "nvlink_bytes", "relative_error"] {
        assert!(line[field].as_f64().unwrap() > 0.0, "{field} of {line}");
    }
    let text = String::from_utf8(bench(&options).stdout).unwrap();
    assert!(text.contains("4 layers with weights of their own; the mean of a layer:"), "{text}");
}

#[test]
fn a_model_says_what_full_shapes_should_take() {
    let output = bench(&["--shape", "v3,flash", "--device", "model", "--tokens", "8,8192", "--ranks", "8", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found: Vec<_> = lines
        .iter()
        .map(|line| ["device", "shape", "bottleneck"].map(|field| line[field].as_str().unwrap()))
        .zip(lines.iter().map(|line| line["tokens"].as_u64().unwrap()))
        .collect();
    let mut expected = Vec::new();
    for shape in ["v3", "flash"] {
        for device in ["H200", "H20"] {
            expected.extend([([device, shape, "memory"], 8), ([device, shape, "tensor cores"], 8192)]);
        }
    }
    assert_eq!(found, expected);
    for line in &lines {
        let number = |field: &str| line[field].as_f64().unwrap();
        let least = number("memory_us").max(number("tensor_us")).max(number("nvlink_us"));
        assert!(number("us") > least && number("us") < 2.0 * least, "{line}");
    }
}

#[test]
fn what_cannot_be_run_is_told_by_the_exit_code() {
    for (options, code, expected) in [
        (&["--shape", "flash", "--device", "cuda"][..], 3, "no CUDA driver found"),
        (&["--shape", "mixtral-8x7b", "--ranks", "3"], 2, "8 experts cannot be cut evenly over 3 ranks"),
        (&["--shape", "flash", "--ranks", "9"], 2, "9 ranks are not possible"),
        (&["--shape", "flash", "--experts-per-rank", "2"], 2, "top-k is 6"),
        (&["--shape", "flash", "--tokens", "8,0"], 2, "0 is not in 1.."),
        (&["--shape", "gpt"], 2, "mixtral-8x7b"),
        (&["--shape", "flash", "--device", "model", "--layers", "2"], 2, "--layers cannot be used with --device model"),
        (&["--shape", "flash", "--machine", "H20"], 2, "--machine H20 is the GPU to model"),
        (&[], 2, "--shape"),
    ] {
        let output = bench(options);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{options:?}: {text}");
        assert!(text.contains(expected), "{options:?}: {text}");
    }
}

#[test]
fn measurements_that_cannot_be_written_are_a_failure() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_ferromoe"))
        .args(["bench", "--shape", "flash", "--device", "model", "--tokens", "1", "--json"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write the standard output: No space left"));
}
