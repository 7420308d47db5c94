//! `ferromoe trace` as a user meets it, on simulated ranks.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn trace(folder: &Path, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferromoe"))
        .arg("trace")
        .args(options)
        .current_dir(folder)
        .env("FERROMOE_CUDA_DRIVER", "/nonexistent/libcuda.so.1")
        .output()
        .unwrap()
}

#[test]
fn a_trace_is_a_file_and_tables() {
    let folder = tempfile::tempdir().unwrap();
    let output = trace(
        folder.path(),
        &["--shape", "v3", "--tokens", "20", "--ranks", "2", "--sms", "3", "--output", "t.json", "--svg", "t.svg"],
    );
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        text.starts_with("v3 in bf16: hidden 448, intermediate 128, top-8, 1 shared, 16 experts on 2 ranks"),
        "{text}"
    );
    for part in
        ["not a model of a GPU", "rank 1: ", "on 3 CTAs", "multiply, linear 2", "first rows pulled", "linear 1     "]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let svg = std::fs::read_to_string(folder.path().join("t.svg")).unwrap();
    for part in ["rank 1: ", "CTA 2<", "wave 0", "wait for first stage"] {
        assert!(svg.contains(part), "no {part:?} in the picture");
    }
    let json: Value = serde_json::from_slice(&std::fs::read(folder.path().join("t.json")).unwrap()).unwrap();
    let names: Vec<_> =
        json["traceEvents"].as_array().unwrap().iter().filter(|event| event["name"] == "thread_name").collect();
    assert_eq!(names.len(), 2 * 3 * 6);
    assert_eq!(names[5]["args"]["name"], "CTA 0 (SM 0) consumers 1");
}

#[test]
fn a_model_has_a_time_line_too() {
    let folder = tempfile::tempdir().unwrap();
    let options = [
        "--shape",
        "v3",
        "--tokens",
        "512",
        "--device",
        "model",
        "--machine",
        "H20",
        "--output",
        "t.json",
        "--svg",
        "t.svg",
    ];
    let output = trace(folder.path(), &options);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for part in ["on a modelled H20", "not a measurement", "on 78 CTAs", "multiply, linear 2"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let svg = std::fs::read_to_string(folder.path().join("t.svg")).unwrap();
    assert!(svg.contains("CTA 70<"), "{svg}");
}

#[test]
fn what_cannot_be_traced_is_told_by_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    for (options, code, expected) in [
        (&["--shape", "flash", "--output", "absent/t.json"][..], 2, "cannot write absent/t.json"),
        (&["--shape", "flash", "--output", "t.json", "--device", "cuda"], 3, "no CUDA driver found"),
        (&["--shape", "flash", "--output", "t.json", "--ranks", "9"], 2, "9 ranks are not possible"),
        (&["--shape", "flash", "--output", "t.json", "--tokens", "0"], 2, "0 is not in 1.."),
        (&["--shape", "flash"], 2, "--output"),
        (&["--shape", "flash", "--output", "t.json", "--svg", "./t.json"], 2, "--svg goes there too"),
        (&["--shape", "flash", "--output", "t.json", "--svg", "absent/t.svg"], 2, "cannot write absent/t.svg"),
        (&["--shape", "flash", "--output", "t.json", "--machine", "H20"], 2, "--machine H20 is the GPU to model"),
        (
            &["--shape", "flash", "--output", "t.json", "--device", "model", "--sms", "2"],
            2,
            "--sms is the size of a simulated rank",
        ),
    ] {
        let output = trace(folder.path(), options);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{options:?}: {text}");
        assert!(text.contains(expected), "{options:?}: {text}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{options:?}");
    }
}

#[test]
fn a_trace_that_fails_leaves_an_older_one() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("t.json"), "older").unwrap();
    let output = trace(folder.path(), &["--shape", "flash", "--output", "t.json", "--ranks", "9"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(std::fs::read(folder.path().join("t.json")).unwrap(), b"older");
}
