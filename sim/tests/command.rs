//! The `ptx-sim` command.

use std::process::{Command, Output};

const NVCC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/nvcc.ptx");

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ptx-sim")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_kernel_runs_and_shows_its_result() {
    let ones = format!("f32s:{}", vec!["1"; 300].join(","));
    let output = run(&[
        "run", NVCC, "--entry", "reduce", "--grid", "3", "--block", "256", "--arg", &ones, "--arg", "zeros:4", "--arg",
        "u32:300", "--show", "1:f32", "--seeds", "2",
    ]);
    let stdout = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(stdout.matches("parameter 1: 300\n").count(), 2, "{stdout}");
    assert!(stdout.contains("reduce, seed 1: "), "{stdout}");
}

#[test]
fn errors_of_the_kernel_and_of_the_input_are_told_apart() {
    let too_short = ["run", NVCC, "--entry", "reduce", "--arg", "f32s:1,2", "--arg", "zeros:4", "--arg", "u32:3"];
    for (arguments, code, expected) in [
        (&too_short[..], 1, "out of bounds"),
        (&["run", NVCC], 2, "choose one with --entry"),
        (&["run", NVCC, "--entry", "nothing"], 2, "no such entry"),
        (&["run", "nothing.ptx"], 2, "cannot read nothing.ptx"),
        (&["run", NVCC, "--entry", "reduce", "--show", "0:f32"], 2, "parameter 0 is no buffer"),
    ] {
        let output = run(arguments);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}

#[test]
fn kernels_are_listed() {
    let output = run(&["list", NVCC]);
    assert!(text(&output.stdout).lines().any(|entry| entry == "product"), "{output:?}");
}
