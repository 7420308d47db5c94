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

/// What the committed PTX is against the kernel's sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Made from the sources as they are.
    Fresh,
    /// Made from other sources.
    Stale,
    /// Not there, or without a stamp.
    Missing,
}

/// The builder of the kernel crate.
pub fn builder() -> CudaBuilder {
    CudaBuilder::new(workspace::kernel_crate()).arch(ARCH).launch_bounds(BOUNDS)
}

/// Compares the committed PTX's stamp with the kernel's sources.
pub fn freshness() -> Result<Freshness> {
    let digest = builder().digest()?;
    let Ok(ptx) = fs::read_to_string(workspace::root().join(workspace::PTX_FILE)) else {
        return Ok(Freshness::Missing);
    };
    Ok(match stamp::read(&ptx) {
        Some(stamp) if stamp == digest => Freshness::Fresh,
        Some(_) => Freshness::Stale,
        None => Freshness::Missing,
    })
}

/// Fails unless the committed PTX was made from the sources as they are.
pub fn check() -> Result<()> {
    let file = workspace::PTX_FILE;
    match freshness()? {
        Freshness::Fresh => Ok(()),
        Freshness::Stale => {
            bail!("{file} was made from other kernel sources than those in kernel/; type `cargo xtask build`")
        }
        Freshness::Missing => bail!("{file} is missing or has no stamp; type `cargo xtask build`"),
    }
}

/// Builds the PTX unless it is fresh; `force` builds it anyway.
pub fn build(force: bool) -> Result<()> {
    let file = workspace::PTX_FILE;
    if !force && freshness()? == Freshness::Fresh {
        eprintln!("{file} is up to date with kernel/");
        return Ok(());
    }
    let ptx = builder().build()?;
    let path = workspace::root().join(file);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&path, &ptx.text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("{file}: kernels: {}, lines: {}", ptx.kernels, ptx.text.lines().count());
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_committed_ptx_is_made_from_the_sources_as_they_are() {
        super::check().unwrap();
    }
}
