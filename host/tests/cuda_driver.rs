//! The `ferromoe` command with and without a CUDA driver. The driver is the fake one (`tests/fake-driver`), which runs
//! the kernel in the simulator.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn ferromoe(driver: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferromoe"))
        .args(arguments)
        .env("FERROMOE_CUDA_DRIVER", driver)
        .output()
        .expect("the command starts")
}

/// Cargo builds it, as a dev-dependency, next to this test.
fn fake_driver() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libfake_cuda_driver.so")
}

fn no_driver() -> PathBuf {
    PathBuf::from("/nonexistent/libcuda.so.1")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn without_a_driver_cuda_ends_with_one_line_and_exit_code_3() {
    let result = ferromoe(&no_driver(), &["run", "--device", "cuda"]);
    assert_eq!(result.status.code(), Some(3));
    assert_eq!(text(&result.stdout), "");
    let error = text(&result.stderr);
    assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    assert!(error.contains("no CUDA driver found (/nonexistent/libcuda.so.1"), "{error}");
    assert!(error.contains("--device sim"), "{error}");
}

#[test]
fn without_a_driver_auto_simulates_and_says_why() {
    let result = ferromoe(&no_driver(), &["run", "--device", "auto"]);
    let report = text(&result.stdout);
    assert_eq!(result.status.code(), Some(0), "{report}{}", text(&result.stderr));
    assert!(report.contains("2 simulated ranks of 4 SMs (no CUDA driver found)\n"), "{report}");
}

#[test]
fn with_gpus_auto_takes_them() {
    let result = ferromoe(&fake_driver(), &["run", "--device", "auto"]);
    let report = text(&result.stdout);
    assert_eq!(result.status.code(), Some(0), "{report}{}", text(&result.stderr));
    assert!(report.contains("2 x Fake GPU"), "{report}");
}

#[test]
fn more_ranks_than_gpus_are_an_error_that_lists_the_gpus() {
    let result = ferromoe(&fake_driver(), &["run", "--device", "cuda", "--ranks", "4"]);
    assert_ne!(result.status.code(), Some(0));
    let error = text(&result.stderr);
    assert!(error.contains("4 rank(s) need") && error.contains("found Fake GPU (9.0), Fake GPU (9.0)"), "{error}");
}

#[test]
fn the_output_on_gpus_is_the_simulators_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let output = |device: &str, ranks: &str| {
        let file = folder.path().join(format!("{device}-{ranks}.safetensors"));
        let arguments = ["run", "--device", device, "--ranks", ranks, "--output", file.to_str().unwrap()];
        let result = ferromoe(&fake_driver(), &arguments);
        assert_eq!(result.status.code(), Some(0), "{}{}", text(&result.stdout), text(&result.stderr));
        std::fs::read(file).unwrap()
    };
    for ranks in ["1", "2"] {
        assert!(output("cuda", ranks) == output("sim", ranks), "{ranks} ranks");
    }
}
