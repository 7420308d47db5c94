//! `cargo xtask test`: everything that must hold before a change is kept.

use std::time::Instant;

use anyhow::{Result, bail};
use xshell::{Shell, cmd};

use crate::device_compiler::DeviceCompiler;
use crate::{build, lint, workspace};

/// A step's name and what it does.
type Step = (&'static str, fn() -> Result<()>);

/// Runs every check and test, installing what they need, and prints what each took.
///
/// # Errors
/// The steps that failed; the later ones run all the same.
pub fn test() -> Result<()> {
    let steps: [Step; 4] = [
        ("PTX stamp", build::check),
        ("device compiler", device_compiler),
        ("lint", lint::lint),
        ("cargo test", cargo_test),
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
