//! The CUDA side: real GPUs through `cust`, without a CUDA toolkit at build time.

mod backend;
mod driver;
mod error;
mod gpu;
mod graph;
#[cfg(test)]
mod tests;

pub(crate) use backend::CudaBackend;
pub use error::CudaError;
pub use gpu::{Gpu, find_gpus, share_gpu};
pub use graph::CapturedGraph;
