//! `cargo xtask doctor`: what is here, what is missing, and what to type.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::build::{COMMITTED, Freshness};
use crate::device_compiler::{DeviceCompiler, run};
use crate::nvidia::NvidiaTools;
use crate::workspace;

/// One line of the table.
struct Finding {
    what: &'static str,
    found: Result<String, String>,
    /// What to type, or why it does not matter, when it was not found.
    remedy: &'static str,
}

/// Prints the table.
///
/// # Errors
/// When the kernel's sources cannot be read.
pub fn doctor() -> Result<()> {
    let findings = [
        Finding { what: "cargo", found: version(&workspace::cargo()), remedy: "install Rust: https://rustup.rs" },
        Finding { what: "rustc", found: version(Path::new("rustc")), remedy: "install Rust: https://rustup.rs" },
        Finding {
            what: "device compiler",
            found: DeviceCompiler::find().map(|found| found.describe()).map_err(|error| format!("{error:#}")),
            remedy: "`cargo xtask build` installs one; needed only to change the kernel and to test",
        },
        Finding { what: "PTX", found: ptx()?, remedy: "`cargo xtask build`" },
        Finding {
            what: "ptxas, nvdisasm",
            found: NvidiaTools::find().map(describe).map_err(|error| format!("{error:#}")),
            remedy: "`cargo xtask lint` installs them; needed only for the lint",
        },
        Finding { what: "rustfmt", found: component("fmt"), remedy: "`rustup component add rustfmt`" },
        Finding { what: "clippy", found: component("clippy"), remedy: "`rustup component add clippy`" },
        Finding {
            what: "CUDA driver",
            found: driver(),
            remedy: "install NVIDIA's driver to run on GPUs; the simulator needs none",
        },
        Finding { what: "GPUs", found: gpus(), remedy: "none needed: without a GPU the kernel runs on the simulator" },
    ];
    for Finding { what, found, remedy } in findings {
        match found {
            Ok(found) => println!("{what:<16} ok  {}", indented(&found)),
            Err(lack) => println!("{what:<16} no  {}\n{:<20}-> {remedy}", indented(&lack), ""),
        }
    }
    Ok(())
}

fn indented(text: &str) -> String {
    text.trim_end().replace('\n', &format!("\n{:<20}", ""))
}

fn version(program: &Path) -> Result<String, String> {
    run(program, &["--version"]).map_err(|error| format!("{error:#}"))
}

fn component(name: &str) -> Result<String, String> {
    run(&workspace::cargo(), &[name, "--version"]).map_err(|_| "not installed".to_owned())
}

fn describe(tools: NvidiaTools) -> String {
    format!("CUDA {} ({}, {})", tools.release, tools.ptxas.display(), tools.nvdisasm.display())
}

/// The first committed file that is not as it must be.
fn ptx() -> Result<Result<String, String>> {
    for committed in COMMITTED {
        let file = committed.file;
        match committed.freshness()? {
            Freshness::Fresh => {}
            Freshness::Stale => return Ok(Err(format!("{file} was made from other sources than those in kernel/"))),
            Freshness::Missing => return Ok(Err(format!("{file} is not there or has no stamp"))),
        }
    }
    Ok(Ok("host/ptx/ was made from the sources in kernel/".into()))
}

/// The driver's library, where the dynamic linker would find it.
fn driver() -> Result<String, String> {
    const LIBRARY: &str = "libcuda.so.1";
    let cache = ["ldconfig", "/sbin/ldconfig"]
        .iter()
        .find_map(|program| run(Path::new(program), &["-p"]).ok())
        .unwrap_or_default();
    let cached = cache
        .lines()
        .filter(|line| line.contains(LIBRARY))
        .find_map(|line| Some(PathBuf::from(line.split_once("=> ")?.1)));
    let folders = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let named = env::split_paths(&folders).map(|folder| folder.join(LIBRARY)).find(|file| file.is_file());
    let library = named.or(cached).ok_or_else(|| format!("no {LIBRARY}"))?;
    Ok(library.display().to_string())
}

fn gpus() -> Result<String, String> {
    let query = ["--query-gpu=index,name,compute_cap,memory.total,driver_version", "--format=csv,noheader"];
    match run(Path::new("nvidia-smi"), &query) {
        Ok(list) if !list.is_empty() => Ok(list),
        Ok(_) => Err("nvidia-smi lists none".into()),
        Err(_) => Err("no nvidia-smi that answers".into()),
    }
}
