//! What can go wrong between this crate and a CUDA driver.

use std::fmt;

/// A CUDA driver that is absent, GPUs that do not fit, or a driver call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver library could not be loaded.
    #[error(
        "no CUDA driver found ({reason}); install the NVIDIA driver, name its libcuda.so.1 in \
         FERROMOE_CUDA_DRIVER, or use `--device sim`"
    )]
    NoDriver {
        /// What the dynamic loader said.
        reason: String,
    },
    /// The machine has fewer suitable GPUs than there are ranks.
    #[error(
        "{ranks} rank(s) need as many GPUs with compute capability 9.0 (Hopper: H100, H200, H20), found {}; \
         ask for fewer ranks, or use `--device sim`", Listing(.found)
    )]
    TooFewGpus {
        /// Ranks asked for.
        ranks: usize,
        /// Every GPU of the machine as `name (compute capability)`.
        found: Vec<String>,
    },
    /// Two GPUs that cannot read each other's memory.
    #[error(
        "GPU {from} ({from_name}) cannot access the memory of GPU {to} ({to_name}); the ranks of a group must \
         be joined by NVLink or PCIe peer access: choose other GPUs with CUDA_VISIBLE_DEVICES"
    )]
    NoPeerAccess {
        /// CUDA ordinal of the GPU that would access.
        from: u32,
        /// Its name.
        from_name: String,
        /// CUDA ordinal of the GPU whose memory it would access.
        to: u32,
        /// Its name.
        to_name: String,
    },
    /// A driver call failed.
    #[error("{call} failed{}: {name} ({code}), {description}", Doing(.doing))]
    Call {
        /// The driver function, as exported by `libcuda.so.1`.
        call: &'static str,
        /// The `CUresult`.
        code: u32,
        /// The `CUresult`'s name, e.g. `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// The driver's description of the `CUresult`.
        description: String,
        /// What the call was for; empty when there is nothing to add.
        doing: String,
    },
    /// The driver's compiler rejected the kernel's PTX.
    #[error("GPU {gpu} ({name}) rejected the kernel's PTX: {source}\n{log}")]
    Ptx {
        /// CUDA ordinal.
        gpu: u32,
        /// The GPU's name.
        name: String,
        /// The driver compiler's error log.
        log: String,
        /// The failed call.
        #[source]
        source: Box<CudaError>,
    },
    /// A launch or tensor map that no driver would accept, found before calling it.
    #[error("{0}")]
    Invalid(String),
}

impl CudaError {
    /// What is missing, in a few words.
    pub(crate) fn brief(&self) -> String {
        match self {
            Self::NoDriver { .. } => "no CUDA driver found".into(),
            Self::TooFewGpus { ranks, found } => {
                format!("{ranks} rank{} need as many Hopper GPUs, found {}", plural(*ranks), Listing(found))
            }
            other => other.to_string(),
        }
    }

    /// The same error, saying what the call was for (`on rank 1`, `of 4096 bytes for pool on rank 0`).
    pub(crate) fn doing(mut self, what: impl FnOnce() -> String) -> Self {
        if let CudaError::Call { doing, .. } = &mut self
            && doing.is_empty()
        {
            *doing = what();
        }
        self
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// ` (what)`, or nothing.
struct Doing<'a>(&'a str);

impl fmt::Display for Doing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " {}", self.0) }
    }
}

/// `none`, or the items separated by commas.
struct Listing<'a>(&'a [String]);

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str("no GPU") } else { f.write_str(&self.0.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_call_says_what_it_was_for_once() {
        let error = CudaError::Call {
            call: "cuMemAlloc_v2",
            code: 2,
            name: "CUDA_ERROR_OUT_OF_MEMORY".into(),
            description: "out of memory".into(),
            doing: String::new(),
        };
        let error = error.doing(|| "for pool on rank 1".into()).doing(|| "elsewhere".into());
        assert_eq!(
            error.to_string(),
            "cuMemAlloc_v2 failed for pool on rank 1: CUDA_ERROR_OUT_OF_MEMORY (2), out of memory"
        );
    }

    #[test]
    fn too_few_gpus_lists_what_there_is() {
        let none = CudaError::TooFewGpus { ranks: 2, found: vec![] };
        assert!(none.to_string().contains("found no GPU;"), "{none}");
        let one = CudaError::TooFewGpus { ranks: 2, found: vec!["NVIDIA A100 (8.0)".into()] };
        assert!(one.to_string().contains("found NVIDIA A100 (8.0);"), "{one}");
    }
}
