//! The example of an engine, as CI can run it: in the simulator, and with captured graphs on the fake driver.

use std::path::Path;
use std::process::Command;

/// Runs the example, which cargo builds with the tests, and returns what it printed.
fn serve(device: &str, driver: &Path) -> String {
    let example = std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples").join("serving_layer");
    let output = Command::new(&example)
        .args(["--device", device, "--ranks", "2", "--steps", "4"])
        .env("FERROMOE_CUDA_DRIVER", driver)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; `cargo test` builds it", example.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Tokens and digests of the outputs, without the times.
fn steps(printed: &str) -> Vec<&str> {
    printed.lines().skip(1).map(|line| line.rsplit_once(',').unwrap().0).collect()
}

#[test]
fn the_engine_decodes_in_the_simulator_and_with_graphs() {
    let fake = std::env::current_exe().unwrap().with_file_name("libfake_cuda_driver.so");
    let simulated = serve("auto", Path::new("/nonexistent/libcuda.so.1"));
    assert!(simulated.starts_with("2 simulated ranks of 4 SMs (no CUDA driver found)\n"), "{simulated}");
    let on_gpus = serve("auto", &fake);
    assert!(on_gpus.starts_with("2 x Fake GPU"), "{on_gpus}");
    assert_eq!(steps(&simulated), steps(&on_gpus));
    assert_eq!(steps(&simulated).len(), 2 * 4);
}
