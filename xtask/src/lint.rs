//! `cargo xtask lint`: the PTX through ptxas and nvdisasm, the Rust through rustfmt, clippy and rustdoc.

use std::fs;

use anyhow::{Result, bail};
use xshell::{Shell, cmd};

use crate::nvidia::NvidiaTools;
use crate::{build, limits, progress, ptxas, sass, size, workspace};

/// Runs every check.
///
/// # Errors
/// What each check that failed said.
pub fn lint() -> Result<()> {
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    let checks = [ptx(), rust("fmt", &["fmt", "--all", "--check"]), rust("clippy", &clippy), documentation()];
    let failures: Vec<String> =
        checks.into_iter().filter_map(Result::err).map(|error| format!("\n  {error:#}")).collect();
    if !failures.is_empty() {
        bail!("{}", failures.concat());
    }
    Ok(())
}

/// Assembles the committed PTX and prints what it needs, and how its loops look.
///
/// # Errors
/// When ptxas rejects it, or a figure is beyond its limit.
fn ptx() -> Result<()> {
    let tools = NvidiaTools::find_or_install()?;
    let device = size::device_side(&workspace::kernel_crate().join("src"))?;
    let mut faults = Vec::new();
    for ptx in build::COMMITTED {
        let cubin = workspace::target_dir().join("ptx").join(format!("{}.cubin", ptx.name()));
        if let Some(folder) = cubin.parent() {
            fs::create_dir_all(folder)?;
        }
        let label = format!("ptxas {} on {}", tools.release, ptx.file);
        let report =
            progress::step(&label, || ptxas::assemble(&tools, build::ARCH, &workspace::root().join(ptx.file), &cubin))?;
        report.warnings.iter().for_each(|warning| println!("{warning}"));
        if ptx.traced {
            faults.extend(limits::spills(&report, &ptx.format).map(|fault| format!("{}: {fault}", ptx.file)));
            continue;
        }
        let kernels = sass::disassemble(&tools, &cubin)?;
        for table in [limits::entries(&report, &kernels, &ptx.format), limits::loops(&kernels, &ptx.format)] {
            println!("{table}");
            faults.extend(table.faults());
        }
    }
    let table = limits::sources(&device);
    println!("{table}");
    faults.extend(table.faults());
    if !faults.is_empty() {
        bail!("the kernel is not as it must be:\n    {}", faults.join("\n    "));
    }
    Ok(())
}

/// The documentation's links. The kernel's crate page names modules that only the device compiles.
fn documentation() -> Result<()> {
    let shell = Shell::new()?;
    shell.change_dir(workspace::root());
    shell.set_var("RUSTDOCFLAGS", "-D warnings");
    let args = ["doc", "--workspace", "--exclude", "ferromoe-kernel", "--no-deps", "--quiet"];
    let cargo = workspace::cargo();
    eprintln!("cargo {}", args.join(" "));
    cmd!(shell, "{cargo} {args...}").quiet().run()?;
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
