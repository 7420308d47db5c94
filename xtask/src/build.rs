//! `cargo xtask build`: the kernel crate to the committed PTX.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::cuda_builder::CudaBuilder;
use crate::ir::LaunchBounds;
use crate::{stamp, workspace};

/// The GPU the kernel is written for.
pub const ARCH: &str = "sm_90a";

/// A CTA has the SM to itself.
const BOUNDS: LaunchBounds = LaunchBounds { threads: ferromoe_kernel::shared::THREADS, ctas_per_sm: 1 };

/// A PTX file that is committed.
#[derive(Clone, Copy)]
pub struct Committed {
    /// Relative to the repository's root.
    pub file: &'static str,
    /// The feature of the kernel crate that it is made with.
    feature: Option<&'static str>,
}

/// The kernel.
pub const KERNEL: Committed = Committed { file: workspace::PTX_FILE, feature: None };
/// The kernel that records a trace.
pub const TRACED: Committed = Committed { file: workspace::TRACED_PTX_FILE, feature: Some("trace") };

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
    fn builder(self) -> CudaBuilder {
        let builder = CudaBuilder::new(workspace::kernel_crate()).arch(ARCH).launch_bounds(BOUNDS);
        self.feature.into_iter().fold(builder, CudaBuilder::feature)
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
    KERNEL.check()?;
    TRACED.check()
}

/// Builds all committed PTX that is not fresh; `force` builds it anyway.
pub fn build(force: bool) -> Result<()> {
    KERNEL.build(force)?;
    TRACED.build(force)
}

/// Builds what is not fresh, and says nothing of the rest.
pub fn ensure() -> Result<()> {
    for ptx in [KERNEL, TRACED] {
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
