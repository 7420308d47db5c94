//! `cargo xtask lint`: the PTX through ptxas, the Rust through rustfmt and clippy.

use std::fs;

use anyhow::{Result, bail};
use xshell::{Shell, cmd};

use crate::nvidia::NvidiaTools;
use crate::{build, progress, ptxas, workspace};

/// Runs every check.
///
/// # Errors
/// What each check that failed said.
pub fn lint() -> Result<()> {
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    let checks = [ptx(), rust("fmt", &["fmt", "--all", "--check"]), rust("clippy", &clippy)];
    let failures: Vec<String> =
        checks.into_iter().filter_map(Result::err).map(|error| format!("\n  {error:#}")).collect();
    if !failures.is_empty() {
        bail!("{}", failures.concat());
    }
    Ok(())
}

/// Assembles the committed PTX and prints what it needs.
///
/// # Errors
/// When ptxas rejects it, spills, uses a stack frame, or serialises wgmma.
fn ptx() -> Result<()> {
    let tools = NvidiaTools::find_or_install()?;
    let file = workspace::root().join(workspace::PTX_FILE);
    let cubin = workspace::target_dir().join("ptx/ferromoe.cubin");
    if let Some(folder) = cubin.parent() {
        fs::create_dir_all(folder)?;
    }
    let label = format!("ptxas {} on {}", tools.release, workspace::PTX_FILE);
    let report = progress::step(&label, || ptxas::assemble(&tools, build::ARCH, &file, &cubin))?;
    print!("{report}");
    for (name, wgmma, all) in ptxas::count_wgmma(&tools, &cubin)?.iter().filter(|(_, wgmma, _)| *wgmma > 0) {
        println!("{name}: {all} SASS instructions, {wgmma} of them wgmma");
    }
    let faults = report.faults();
    if !faults.is_empty() {
        bail!("{} is not as it must be:\n  {}", workspace::PTX_FILE, faults.join("\n  "));
    }
    Ok(())
}

/// Runs a cargo subcommand that is a component of the toolchain; says so where it is not installed.
fn rust(component: &str, args: &[&str]) -> Result<()> {
    let shell = Shell::new()?;
    shell.change_dir(workspace::root());
    let cargo = workspace::cargo();
    if cmd!(shell, "{cargo} {component} --version").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        eprintln!(
            "cargo {component}: skipped, not installed; type `rustup component add {}`",
            component.replace("fmt", "rustfmt")
        );
        return Ok(());
    }
    eprintln!("cargo {}", args.join(" "));
    cmd!(shell, "{cargo} {args...}").quiet().run()?;
    Ok(())
}
