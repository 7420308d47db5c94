//! Compiles a device crate to PTX.
//!
//! rustc makes one unoptimised LLVM module of the whole program, [`ir::mark`] adds what rustc leaves out, and `opt` and `llc`
//! of the same LLVM finish it. Letting rustc emit the PTX itself duplicates barriers into divergent branches.

use std::env;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::cmd;

use crate::device_compiler::{DeviceCompiler, TARGET};
use crate::ir::{self, LaunchBounds};
use crate::{progress, stamp, workspace};

/// What rustc is told for every crate of the program, `core` included.
/// JumpThreading copies barriers into both sides of a branch, even LLVM's convergent intrinsics.
const RUSTC_FLAGS: [&str; 1] = ["-Zmir-enable-passes=-JumpThreading"];

/// The release profile of device code, as cargo's environment variables.
const PROFILE: [(&str, &str); 5] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3"),
    ("CARGO_PROFILE_RELEASE_LTO", "fat"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    ("CARGO_PROFILE_RELEASE_PANIC", "abort"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "line-directives-only"),
];

/// Variables of the outer cargo or of the user that would change what the inner cargo does.
const FOREIGN: [&str; 6] = [
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET",
    "CARGO_INCREMENTAL",
];

/// Compiles one crate to PTX; the counterpart of rust-cuda's `cuda_builder`.
pub struct CudaBuilder {
    crate_dir: PathBuf,
    arch: String,
    ptx_isa: String,
    bounds: LaunchBounds,
    features: Vec<String>,
}

/// PTX text, stamped with the digest of its sources.
pub struct Ptx {
    /// The whole file.
    pub text: String,
    /// How many kernels it has.
    pub kernels: usize,
}

impl CudaBuilder {
    /// A builder for the crate in `crate_dir`: sm_90a, PTX ISA 8.6, CTAs of at most 1024 threads.
    pub fn new(crate_dir: impl Into<PathBuf>) -> Self {
        let bounds = LaunchBounds { threads: 1024, ctas_per_sm: 1 };
        Self {
            crate_dir: crate_dir.into(),
            arch: "sm_90a".into(),
            ptx_isa: "ptx86".into(),
            bounds,
            features: Vec::new(),
        }
    }

    /// The GPU to compile for, as LLVM's NVPTX back end names it.
    pub fn arch(mut self, arch: &str) -> Self {
        self.arch = arch.into();
        self
    }

    /// The launch bounds of every kernel.
    pub fn launch_bounds(mut self, bounds: LaunchBounds) -> Self {
        self.bounds = bounds;
        self
    }

    /// A feature of the crate to compile it with, beside its default ones.
    pub fn feature(mut self, name: &str) -> Self {
        self.features.push(name.into());
        self
    }

    /// The digest that PTX made from the sources as they are now is stamped with.
    pub fn digest(&self) -> Result<String> {
        let LaunchBounds { threads, ctas_per_sm } = self.bounds;
        let Self { arch, ptx_isa, features, .. } = self;
        let recipe = format!("{arch} {ptx_isa} {threads} {ctas_per_sm} {RUSTC_FLAGS:?} {PROFILE:?} {features:?}");
        stamp::digest(&self.crate_dir, &recipe)
    }

    /// Finds or installs the device compiler and builds.
    ///
    /// # Errors
    /// When there is no compiler and none can be installed, or the crate does not compile, or has no kernel.
    pub fn build(&self) -> Result<Ptx> {
        self.build_with(&DeviceCompiler::find_or_install()?)
    }

    /// Builds with `compiler`.
    ///
    /// # Errors
    /// When the crate does not compile, or has no kernel.
    pub fn build_with(&self, compiler: &DeviceCompiler) -> Result<Ptx> {
        let digest = self.digest()?;
        let package = self.package_name()?;
        let version = compiler.rustc_version.split(' ').nth(1).unwrap_or("unknown");
        let target_dir = workspace::target_dir().join("ptx").join(version);
        let base = target_dir.join([&[package.clone()][..], &self.features].concat().join("-"));
        let name = base.file_name().unwrap_or_default().to_string_lossy();
        let label = format!("{name}: rustc to LLVM IR (the first time compiles core)");
        let module = progress::step(&label, || self.emit_llvm(compiler, &package, &target_dir))?;
        let (marked, kernels) = ir::mark(&module, self.bounds);
        if kernels == 0 {
            bail!("{} has no `extern \"ptx-kernel\"` function", self.crate_dir.display());
        }
        let ptx = progress::step(&format!("{name}: LLVM IR to PTX"), || self.generate(compiler, &marked, &base))?;
        let compilers = format!("{}, {}, {}", compiler.versions(), self.arch, self.ptx_isa);
        Ok(Ptx { text: stamp::apply(&digest, &compilers, &ptx), kernels })
    }

    /// The package's name, from the crate's manifest.
    fn package_name(&self) -> Result<String> {
        let manifest = self.crate_dir.join("Cargo.toml");
        let text = fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
        let name = text.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
        Ok(name.with_context(|| format!("{} has no `name = \"..\"`", manifest.display()))?.to_owned())
    }

    /// The whole program as one LLVM module in text form: fat LTO, but no optimisation after it.
    fn emit_llvm(&self, compiler: &DeviceCompiler, package: &str, target_dir: &Path) -> Result<String> {
        let shell = workspace::shell()?;
        for (name, value) in PROFILE {
            shell.set_var(name, value);
        }
        shell.set_var("RUSTC_BOOTSTRAP", "1");
        shell.set_var("RUSTC", &compiler.rustc);
        shell.set_var("CARGO_ENCODED_RUSTFLAGS", self.rustc_flags(compiler).join("\u{1f}"));
        // Nothing is linked: the module is taken before that, and there is no linker for PTX.
        shell.set_var("CARGO_TARGET_NVPTX64_NVIDIA_CUDA_LINKER", "true");
        let cargo = &compiler.cargo;
        let features = self.features.join(",");
        let manifest = self.crate_dir.join("Cargo.toml");
        let color = if std::io::stderr().is_terminal() { "always" } else { "never" };
        let mut command = cmd!(
            shell,
            "{cargo} rustc --quiet --color {color} --manifest-path {manifest} --target-dir {target_dir} --release --lib
             --crate-type cdylib --target {TARGET} --features={features} -Zbuild-std=core -- --emit=llvm-ir -Cno-prepopulate-passes"
        );
        for name in FOREIGN {
            command = command.env_remove(name);
        }
        let output = command.quiet().ignore_status().output()?;
        let diagnostics = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("{package} does not compile for {TARGET}:\n{diagnostics}");
        }
        eprint!("{diagnostics}");
        let file = target_dir.join(TARGET).join("release/deps").join(format!("{}.ll", package.replace('-', "_")));
        fs::read_to_string(&file).with_context(|| format!("rustc left no {}", file.display()))
    }

    /// Flags for every crate, with all paths made relative to the repository.
    fn rustc_flags(&self, compiler: &DeviceCompiler) -> Vec<String> {
        let mut flags = vec![format!("-Ctarget-cpu={}", self.arch)];
        flags.extend(RUSTC_FLAGS.map(str::to_owned));
        let mut remap = |from: &Path, to: &str| {
            for from in [Some(from.to_owned()), from.canonicalize().ok()].into_iter().flatten() {
                flags.push(format!("--remap-path-prefix={}={to}", from.display()));
            }
        };
        remap(&workspace::root(), "");
        remap(&compiler.library, "rust/library");
        let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
        if let Some(home) = cargo_home.or_else(|| env::home_dir().map(|home| home.join(".cargo"))) {
            remap(&home, "cargo");
        }
        flags
    }

    /// Optimises the marked module and turns it into PTX.
    fn generate(&self, compiler: &DeviceCompiler, module: &str, base: &Path) -> Result<String> {
        let [ir, bitcode, ptx] = ["ll", "bc", "ptx"].map(|extension| base.with_extension(extension));
        fs::write(&ir, module).with_context(|| format!("cannot write {}", ir.display()))?;
        let shell = workspace::shell()?;
        let DeviceCompiler { opt, llc, .. } = compiler;
        cmd!(shell, "{opt} -passes=default<O3> {ir} -o {bitcode}").quiet().run()?;
        let (cpu, features) = (format!("-mcpu={}", self.arch), format!("-mattr=+{}", self.ptx_isa));
        cmd!(shell, "{llc} -O3 {cpu} {features} {bitcode} -o {ptx}").quiet().run()?;
        fs::read_to_string(&ptx).with_context(|| format!("llc left no {}", ptx.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    static FIXTURE: LazyLock<Ptx> = LazyLock::new(|| {
        let fixture = workspace::root().join("xtask/fixtures/barrier");
        let bounds = LaunchBounds { threads: 128, ctas_per_sm: 2 };
        CudaBuilder::new(fixture).launch_bounds(bounds).build().expect("the fixture compiles")
    });

    /// The text of one kernel, from its name to the end of its body.
    fn kernel(name: &str) -> &'static str {
        let start = FIXTURE.text.find(&format!(".entry {name}(")).expect("the kernel is there");
        let rest = &FIXTURE.text[start..];
        &rest[..rest.find("\n}").expect("the body ends")]
    }

    #[test]
    fn an_intrinsic_barrier_is_not_duplicated() {
        assert_eq!(kernel("intrinsic_barrier").matches("bar.sync").count(), 1);
    }

    #[test]
    fn an_inline_assembly_barrier_is_not_duplicated() {
        assert_eq!(kernel("assembly_barrier").matches("bar.sync").count(), 1);
    }

    #[test]
    fn kernels_have_launch_bounds_and_relative_source_lines() {
        assert_eq!(FIXTURE.kernels, 2);
        for name in ["intrinsic_barrier", "assembly_barrier"] {
            assert!(kernel(name).contains("\n.maxntid 128\n.minnctapersm 2"), "{}", kernel(name));
            assert!(kernel(name).contains("\t.loc\t"));
        }
        assert!(
            FIXTURE.text.contains("\"xtask/fixtures/barrier/src/lib.rs\"") || FIXTURE.text.contains("\"src/lib.rs\"")
        );
        assert!(!FIXTURE.text.contains(&*workspace::root().to_string_lossy()));
        let absolute = FIXTURE.text.lines().find(|line| line.contains(".file") && line.contains("\"/"));
        assert_eq!(absolute, None);
    }
}
