//! The CUDA side: real GPUs through `cust`, without a CUDA toolkit at build time.

mod backend;
mod driver;
mod error;
mod gpu;
mod graph;
mod limits;
#[cfg(test)]
mod tests;
mod timeline;

pub(crate) use backend::CudaBackend;
pub use error::CudaError;
pub(crate) use gpu::gpu_of;
pub use gpu::{Gpu, find_gpus, share_gpu};
pub use graph::CapturedGraph;
pub use limits::{CUBLAS_VARIABLE, Limits};
pub(crate) use timeline::time_rounds;
