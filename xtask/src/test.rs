//! `cargo xtask test`: everything that must hold before a change is kept.

use std::time::Instant;

use anyhow::{Result, bail};
use xshell::{Shell, cmd};

use crate::device_compiler::DeviceCompiler;
use crate::{build, lint, workspace};

/// How long the small matrix is run over fresh seeds.
const SOAK_SECONDS: &str = "60";

/// A step's name and what it does.
type Step = (&'static str, fn() -> Result<()>);

/// Runs every check and test, installing what they need, and prints what each took.
///
/// # Errors
/// The steps that failed; the later ones run all the same.
pub fn test() -> Result<()> {
    let steps: [Step; 5] = [
        ("PTX stamp", build::check),
        ("device compiler", device_compiler),
        ("lint", lint::lint),
        ("cargo test", cargo_test),
        ("soak", soak),
    ];
    let mut failures = Vec::new();
    let mut times = Vec::new();
    for (name, run) in steps {
        eprintln!("== {name}");
        let start = Instant::now();
        if let Err(error) = run() {
            failures.push(format!("\n  {name}: {error:#}"));
        }
        times.push(format!("{name} {:.0} s", start.elapsed().as_secs_f64()));
    }
    eprintln!("== {}", times.join(", "));
    if !failures.is_empty() {
        bail!("{} of {} steps failed:{}", failures.len(), steps.len(), failures.concat());
    }
    eprintln!("everything passed");
    Ok(())
}

fn device_compiler() -> Result<()> {
    eprintln!("{}", DeviceCompiler::find_or_install()?.describe());
    Ok(())
}

fn cargo_test() -> Result<()> {
    let shell = Shell::new()?;
    shell.change_dir(workspace::root());
    let cargo = workspace::cargo();
    cmd!(shell, "{cargo} test --workspace --no-fail-fast").quiet().run()?;
    Ok(())
}

/// What `cargo test` has built: the same profile, of the same packages.
fn soak() -> Result<()> {
    let shell = Shell::new()?;
    shell.change_dir(workspace::root());
    let cargo = workspace::cargo();
    cmd!(shell, "{cargo} run --quiet --bin soak -- --seconds {SOAK_SECONDS}").quiet().run()?;
    Ok(())
}
