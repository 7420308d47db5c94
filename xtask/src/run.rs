//! `cargo xtask run`, `bench`, `mutants` and `soak`: programs of the workspace in release mode, with everything they need built first.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use xshell::{Shell, cmd};

use crate::build;
use crate::workspace;

/// Builds what is missing and becomes `ferromoe COMMAND ARGS`: same terminal, same working directory, same exit code.
///
/// # Errors
/// When something does not build; else it does not return.
pub fn run(command: &str, args: &[OsString]) -> Result<()> {
    let args: Vec<_> = std::iter::once(command.into()).chain(args.iter().cloned()).collect();
    become_binary("ferromoe", "ferromoe", &args)
}

/// Builds what is missing and becomes the binary `name` of the tests.
///
/// # Errors
/// As [`run`].
pub fn run_tests(name: &str, args: &[OsString]) -> Result<()> {
    become_binary("ferromoe-tests", name, args)
}

fn become_binary(package: &str, name: &str, args: &[OsString]) -> Result<()> {
    build::ensure()?;
    let binary = build_binary(package, name)?;
    let error = Command::new(&binary).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", binary.display()))
}

fn build_binary(package: &str, name: &str) -> Result<PathBuf> {
    let shell = Shell::new()?;
    let cargo = workspace::cargo();
    let manifest = workspace::root().join("Cargo.toml");
    let build = ["build", "--release", "--package", package, "--bin", name, "--message-format=json-render-diagnostics"];
    let messages = cmd!(shell, "{cargo} {build...} --manifest-path {manifest}").quiet().read()?;
    let executable = messages.lines().rev().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    });
    executable.with_context(|| format!("cargo built no executable {name} of the package {package}"))
}
