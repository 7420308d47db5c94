//! Finds, or installs, a compiler for device code: a rustc with the sources of `core` and the NVPTX back end, and
//! `opt` and `llc` of the LLVM it was built on.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::cmd;

use crate::progress;
use crate::workspace;

/// rustc's target for device code.
pub const TARGET: &str = "nvptx64-nvidia-cuda";

/// Names the one rustc to use, instead of searching.
const RUSTC_OVERRIDE: &str = "FERROMOE_DEVICE_RUSTC";

/// Debian's packages of a recent rustc; the LLVM tools are a package named after rustc's LLVM version.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// The first rustc that compiles the workspace (`rust-version` in Cargo.toml).
const OLDEST: (u32, u32) = (1, 95);

const ADVICE: &str = "install one with `rustup component add rust-src llvm-tools`, or on Debian \
    `apt-get install rustc-web rust-web-src llvm-22`, or name a rustc that has its sources in FERROMOE_DEVICE_RUSTC";

/// A complete set of tools for device code, all of one LLVM major version.
#[derive(Clone, Debug)]
pub struct DeviceCompiler {
    /// The cargo that drives `rustc`.
    pub cargo: PathBuf,
    /// The compiler.
    pub rustc: PathBuf,
    /// Its version with commit and date, as in `rustc 1.95.0 (..)`.
    pub rustc_version: String,
    /// The folder that holds `core/`: the standard library's sources.
    pub library: PathBuf,
    /// LLVM's optimiser.
    pub opt: PathBuf,
    /// LLVM's code generator.
    pub llc: PathBuf,
    /// The version of `opt` and `llc`.
    pub llvm_version: String,
}

impl DeviceCompiler {
    /// The first complete compiler among the rustup toolchains (the active one first) and the rustcs on the path.
    ///
    /// # Errors
    /// One line per rustc that was looked at, saying what it lacks.
    pub fn find() -> Result<Self> {
        let mut lacking = Vec::new();
        for rustc in candidates() {
            match Self::complete(&rustc) {
                Ok(compiler) => return Ok(compiler),
                Err(lack) => lacking.push(format!("  {}: {lack:#}", rustc.display())),
            }
        }
        bail!("no compiler for device code found:\n{}", lacking.join("\n"))
    }

    /// As [`Self::find`]; where there is none, installs the missing rustup components, else Debian's packages.
    ///
    /// # Errors
    /// What was tried and what to type, when nothing could be installed.
    pub fn find_or_install() -> Result<Self> {
        let missing = match Self::find() {
            Ok(compiler) => return Ok(compiler),
            Err(missing) if env::var_os(RUSTC_OVERRIDE).is_some() => {
                return Err(missing.context(format!("{RUSTC_OVERRIDE} names a rustc that cannot compile device code")));
            }
            Err(missing) => missing,
        };
        eprintln!("{missing:#}");
        let mut tried = Vec::new();
        for (name, install) in [("rustup", install_with_rustup as fn() -> Result<()>), ("apt", install_with_apt)] {
            match install().and_then(|()| Self::find()) {
                Ok(compiler) => {
                    eprintln!("device compiler installed with {name}: {}", compiler.describe());
                    return Ok(compiler);
                }
                Err(error) => tried.push(format!("  with {name}: {error:#}")),
            }
        }
        bail!("no compiler for device code could be installed:\n{}\n{ADVICE}", tried.join("\n"))
    }

    /// The versions in one line.
    pub fn versions(&self) -> String {
        format!("{}, LLVM {}", self.rustc_version, self.llvm_version)
    }

    /// The versions and the place.
    pub fn describe(&self) -> String {
        format!("{} ({})", self.versions(), self.rustc.display())
    }

    /// Everything that belongs to `rustc`, or what is missing.
    fn complete(rustc: &Path) -> Result<Self> {
        let about = Rustc::ask(rustc)?;
        if about.release() < Some(OLDEST) {
            bail!("{} is older than {}.{}", about.version, OLDEST.0, OLDEST.1);
        }
        let library = about.sysroot.join("lib/rustlib/src/rust/library");
        if !library.join("core/src/lib.rs").is_file() {
            bail!("{} has no sources of core (rust-src)", about.version);
        }
        let cpus = run(rustc, &["--print", "target-cpus", "--target", TARGET])?;
        if !cpus.contains("sm_90a") {
            bail!("{} was built without LLVM's NVPTX back end", about.version);
        }
        let major = about.llvm_version.split('.').next().unwrap_or_default();
        let tools = about.sysroot.join("lib/rustlib").join(&about.host).join("bin");
        let (opt, llvm_version) = llvm_tool("opt", &tools, major)?;
        let (llc, _) = llvm_tool("llc", &tools, major)?;
        let own_cargo = about.sysroot.join("bin/cargo");
        let cargo =
            if is_rustup_toolchain(&about.sysroot) && own_cargo.is_file() { own_cargo } else { workspace::cargo() };
        Ok(Self { cargo, rustc: rustc.into(), rustc_version: about.version, library, opt, llc, llvm_version })
    }
}

/// What a rustc says of itself.
struct Rustc {
    version: String,
    host: String,
    llvm_version: String,
    sysroot: PathBuf,
}

impl Rustc {
    fn ask(rustc: &Path) -> Result<Self> {
        let about = run(rustc, &["-vV"])?;
        let field = |name: &str| {
            let value = about.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
            value.with_context(|| format!("`{} -vV` says no `{name}`", rustc.display()))
        };
        Ok(Self {
            version: about.lines().next().unwrap_or_default().to_owned(),
            host: field("host: ")?,
            llvm_version: field("LLVM version: ")?,
            sysroot: run(rustc, &["--print", "sysroot"])?.into(),
        })
    }

    /// Major and minor version, out of `rustc 1.95.0 (..)`.
    fn release(&self) -> Option<(u32, u32)> {
        let mut numbers = self.version.split(' ').nth(1)?.split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

/// The rustcs to look at: the one named by the override, or rustup's toolchains and those on the path.
fn candidates() -> Vec<PathBuf> {
    if let Some(rustc) = env::var_os(RUSTC_OVERRIDE) {
        return vec![rustc.into()];
    }
    let mut found = rustup_toolchains();
    let elsewhere = workspace::all_on_path("rustc").chain(["/usr/bin/rustc".into()]).filter(|rustc| rustc.is_file());
    found.extend(elsewhere.filter(|rustc| !is_rustup_proxy(rustc)));
    let mut seen = Vec::new();
    found.retain(|rustc| {
        let real = rustc.canonicalize().unwrap_or_else(|_| rustc.clone());
        let new = !seen.contains(&real);
        seen.push(real);
        new
    });
    found
}

/// The rustcs of the installed rustup toolchains, the active one first.
fn rustup_toolchains() -> Vec<PathBuf> {
    let active = env::var("RUSTUP_TOOLCHAIN").unwrap_or_default();
    let mut toolchains: Vec<PathBuf> = workspace::rustup_home()
        .and_then(|home| home.join("toolchains").read_dir().ok())
        .map_or_else(Vec::new, |entries| entries.flatten().map(|entry| entry.path()).collect());
    toolchains.sort_by_key(|path| (path.file_name().is_none_or(|name| name != active.as_str()), path.clone()));
    toolchains.into_iter().map(|toolchain| toolchain.join("bin/rustc")).filter(|rustc| rustc.is_file()).collect()
}

fn is_rustup_toolchain(sysroot: &Path) -> bool {
    workspace::rustup_home().is_some_and(|home| sysroot.starts_with(home))
}

/// rustup's stand-in, which only forwards to a toolchain.
fn is_rustup_proxy(rustc: &Path) -> bool {
    let real = rustc.canonicalize().unwrap_or_else(|_| rustc.to_owned());
    real.file_name().is_some_and(|name| name == "rustup") || rustc.with_file_name("rustup").is_file()
}

/// The tool `name` of LLVM `major`, in rustc's own folder or where distributions put it, with its version.
fn llvm_tool(name: &str, rustc_tools: &Path, major: &str) -> Result<(PathBuf, String)> {
    let places = [rustc_tools.join(name), format!("/usr/lib/llvm-{major}/bin/{name}").into()];
    let named = workspace::all_on_path(&format!("{name}-{major}")).chain(workspace::all_on_path(name));
    for tool in places.into_iter().filter(|tool| tool.is_file()).chain(named) {
        let Ok(about) = run(&tool, &["--version"]) else { continue };
        let version = about.split_once("LLVM version ").and_then(|(_, rest)| rest.split_whitespace().next());
        if let Some(version) = version.filter(|version| version.split('.').next() == Some(major)) {
            return Ok((tool, version.to_owned()));
        }
    }
    bail!("no `{name}` of its LLVM version, {major} (llvm-tools, or Debian's llvm-{major})")
}

fn install_with_rustup() -> Result<()> {
    let rustup = workspace::on_path("rustup").context("there is no rustup on the path")?;
    progress::step("rustup component add rust-src llvm-tools (compiler for device code)", || {
        run(&rustup, &["component", "add", "rust-src", "llvm-tools"]).map(drop)
    })
}

fn install_with_apt() -> Result<()> {
    apt_install(&DEBIAN_PACKAGES)?;
    let rustc = Path::new("/usr/bin/rustc");
    let llvm = Rustc::ask(rustc)?.llvm_version;
    let package = format!("llvm-{}", llvm.split('.').next().unwrap_or_default());
    apt_install(&[&package])
}

/// Installs Debian packages, where this is Debian and we are root.
///
/// # Errors
/// When it is not, or apt fails; with what to type.
pub fn apt_install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    let apt = workspace::on_path("apt-get").context("there is no apt-get on the path")?;
    if run(Path::new("id"), &["-u"])? != "0" {
        bail!("not root; type `sudo apt-get install {names}`");
    }
    progress::step(&format!("apt-get update, apt-get install {names}"), || {
        run(&apt, &["update", "-qq"])?;
        let install = ["install", "-y", "-qq", "--no-install-recommends"];
        run(&apt, &[&install[..], packages].concat()).map(drop)
    })
}

/// Runs a program and returns its trimmed output.
///
/// # Errors
/// With the last lines of what it wrote to stderr.
pub fn run(program: &Path, args: &[&str]) -> Result<String> {
    let shell = workspace::shell()?;
    shell.set_var("DEBIAN_FRONTEND", "noninteractive");
    let output = cmd!(shell, "{program} {args...}").quiet().ignore_status().output()?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = errors.lines().collect();
        let last = lines[lines.len().saturating_sub(8)..].join("\n");
        bail!("`{} {}` failed: {last}", program.display(), args.join(" "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rustc_releases_compare_as_numbers() {
        let release = |version: &str| {
            let [host, llvm_version] = [String::new(), String::new()];
            Rustc { version: version.to_owned(), host, llvm_version, sysroot: PathBuf::new() }.release()
        };
        assert!(release("rustc 1.100.0 (ac68faa20 2027-01-01)") > Some(OLDEST));
        assert!(release("rustc 1.97.0-nightly (e50aa6fba 2026-05-19)") > Some(OLDEST));
        assert!(release("rustc 1.85.0") < Some(OLDEST));
        assert_eq!(release("something else"), None);
    }
}
