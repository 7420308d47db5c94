//! Finds, or installs, NVIDIA's assembler and disassembler. They need neither a GPU nor a driver.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::device_compiler::{apt_install, run};
use crate::{progress, workspace};

/// The Python wheels that hold the tools. `--no-deps`: neither calls anything of the wheels it depends on.
const WHEELS: [&str; 2] = ["nvidia-cuda-nvcc==13.*", "nvidia-cuda-nvdisasm==13.*"];

/// The first CUDA release whose tools read PTX ISA 8.6 (PTX ISA, release notes).
const OLDEST: (u32, u32) = (12, 7);

const ADVICE: &str = "install the CUDA toolkit 12.7 or later and put its bin/ on the PATH (or set CUDA_HOME), \
    or `apt-get install python3-pip`, with which xtask installs the wheels nvidia-cuda-nvcc and nvidia-cuda-nvdisasm";

/// ptxas and nvdisasm.
#[derive(Clone, Debug)]
pub struct NvidiaTools {
    /// The assembler.
    pub ptxas: PathBuf,
    /// The disassembler.
    pub nvdisasm: PathBuf,
    /// The CUDA release of `ptxas`, as in `13.5`.
    pub release: String,
}

impl NvidiaTools {
    /// The tools on the path, in `CUDA_HOME`, or installed by us.
    ///
    /// # Errors
    /// When there are none that are recent enough.
    pub fn find() -> Result<Self> {
        let (ptxas, release) = tool("ptxas")?;
        let (nvdisasm, _) = tool("nvdisasm")?;
        Ok(Self { ptxas, nvdisasm, release })
    }

    /// As [`Self::find`]; where there are none, installs the Python wheels under `target/`.
    ///
    /// # Errors
    /// What failed and what to type.
    pub fn find_or_install() -> Result<Self> {
        Self::find().or_else(|_| {
            let tools = install_wheels()
                .and_then(|()| Self::find())
                .with_context(|| format!("no ptxas and nvdisasm: {ADVICE}"))?;
            eprintln!("ptxas and nvdisasm {} installed in {}", tools.release, install_dir().display());
            Ok(tools)
        })
    }
}

fn install_dir() -> PathBuf {
    workspace::target_dir().join("nvidia")
}

/// The first tool of that name which is recent enough, with its CUDA release.
fn tool(name: &str) -> Result<(PathBuf, String)> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let homes = homes.chain(["/usr/local/cuda".into()]).map(|home| home.join("bin").join(name));
    let ours = install_dir().join("nvidia/cu13/bin").join(name);
    for tool in workspace::all_on_path(name).chain(homes).chain([ours]).filter(|tool| tool.is_file()) {
        let Ok(about) = run(&tool, &["--version"]) else { continue };
        if let Some(release) = release(&about).filter(|release| parse(release) >= Some(OLDEST)) {
            return Ok((tool, release.to_owned()));
        }
    }
    bail!("no {name} of CUDA {}.{} or later", OLDEST.0, OLDEST.1)
}

/// `13.5` in `Cuda compilation tools, release 13.5, V13.5.37`.
fn release(about: &str) -> Option<&str> {
    about.split_once("release ")?.1.split(',').next()
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let (major, minor) = release.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn install_wheels() -> Result<()> {
    let python = python_with_pip()?;
    let target = install_dir();
    let target = target.to_str().context("the target folder's path is not UTF-8")?;
    progress::step("pip install nvidia-cuda-nvcc, nvidia-cuda-nvdisasm (ptxas, 150 MB)", || {
        let install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--upgrade",
            "--no-deps",
            "--target",
            target,
        ];
        run(&python, &[&install[..], &WHEELS].concat()).map(drop)
    })
}

fn python_with_pip() -> Result<PathBuf> {
    let find = || workspace::all_on_path("python3").find(|python| has_pip(python));
    if let Some(python) = find() {
        return Ok(python);
    }
    apt_install(&["python3-pip"]).context("there is no python3 with pip")?;
    find().context("python3 has no pip even with the package python3-pip")
}

fn has_pip(python: &Path) -> bool {
    run(python, &["-m", "pip", "--version"]).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_as_numbers() {
        let about = "ptxas: NVIDIA (R) Ptx optimizing assembler\nCuda compilation tools, release 12.10, V12.10.1\n";
        assert_eq!(release(about), Some("12.10"));
        assert!(parse("12.10") >= Some(OLDEST));
        assert!(parse("13.0") >= Some(OLDEST));
        assert!(parse("11.8") < Some(OLDEST));
        assert_eq!(parse("thirteen"), None);
    }
}
