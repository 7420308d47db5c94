//! `cargo xtask build`: the kernel crate to the committed PTX.

use std::fs;

use anyhow::{Context, Result, bail};

use ferromoe_kernel::format::Format;

use crate::cuda_builder::CudaBuilder;
use crate::ir::LaunchBounds;
use crate::{stamp, workspace};

/// The GPU the kernel is written for.
pub const ARCH: &str = "sm_90a";

/// A PTX file that is committed: the kernel in one number format.
#[derive(Clone, Copy)]
pub struct Committed {
    /// Relative to the repository's root.
    pub file: &'static str,
    /// The format, whose name is the feature of the kernel crate that it is made with.
    pub format: Format,
    /// Whether it records a trace.
    pub traced: bool,
}

/// All of them.
pub const COMMITTED: [Committed; 4] = [
    Committed { file: "host/ptx/bf16.ptx", format: Format::BF16, traced: false },
    Committed { file: "host/ptx/fp8.ptx", format: Format::FP8, traced: false },
    Committed { file: "host/ptx/bf16-trace.ptx", format: Format::BF16, traced: true },
    Committed { file: "host/ptx/fp8-trace.ptx", format: Format::FP8, traced: true },
];

/// What a committed PTX file is against the kernel's sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Made from the sources as they are.
    Fresh,
    /// Made from other sources.
    Stale,
    /// Not there, or without a stamp.
    Missing,
}

impl Committed {
    /// The file's name without its ending.
    pub fn name(self) -> &'static str {
        self.file.trim_start_matches("host/ptx/").trim_end_matches(".ptx")
    }

    fn builder(self) -> CudaBuilder {
        // A CTA has the SM to itself.
        let bounds = LaunchBounds { threads: self.format.threads(), ctas_per_sm: 1 };
        let builder = CudaBuilder::new(workspace::kernel_crate()).arch(ARCH).launch_bounds(bounds);
        let builder = builder.feature(self.format.name);
        if self.traced { builder.feature("trace") } else { builder }
    }

    /// Compares the file's stamp with the kernel's sources.
    pub fn freshness(self) -> Result<Freshness> {
        let digest = self.builder().digest()?;
        let Ok(ptx) = fs::read_to_string(workspace::root().join(self.file)) else {
            return Ok(Freshness::Missing);
        };
        Ok(match stamp::read(&ptx) {
            Some(stamp) if stamp == digest => Freshness::Fresh,
            Some(_) => Freshness::Stale,
            None => Freshness::Missing,
        })
    }

    fn check(self) -> Result<()> {
        let file = self.file;
        match self.freshness()? {
            Freshness::Fresh => Ok(()),
            Freshness::Stale => {
                bail!("{file} was made from other kernel sources than those in kernel/; type `cargo xtask build`")
            }
            Freshness::Missing => bail!("{file} is missing or has no stamp; type `cargo xtask build`"),
        }
    }

    /// Builds the file unless it is fresh; `force` builds it anyway.
    pub fn build(self, force: bool) -> Result<()> {
        let file = self.file;
        if !force && self.freshness()? == Freshness::Fresh {
            eprintln!("{file} is up to date with kernel/");
            return Ok(());
        }
        let ptx = self.builder().build()?;
        let path = workspace::root().join(file);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, &ptx.text).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("{file}: kernels: {}, lines: {}", ptx.kernels, ptx.text.lines().count());
        Ok(())
    }
}

/// Fails unless all committed PTX was made from the sources as they are.
pub fn check() -> Result<()> {
    COMMITTED.into_iter().try_for_each(Committed::check)
}

/// Builds all committed PTX that is not fresh; `force` builds it anyway.
pub fn build(force: bool) -> Result<()> {
    COMMITTED.into_iter().try_for_each(|ptx| ptx.build(force))
}

/// Builds what is not fresh, and says nothing of the rest.
pub fn ensure() -> Result<()> {
    for ptx in COMMITTED {
        if ptx.freshness()? != Freshness::Fresh {
            ptx.build(false)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_committed_ptx_is_made_from_the_sources_as_they_are() {
        super::check().unwrap();
    }
}
