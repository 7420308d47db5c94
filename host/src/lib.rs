//! Fused Mixture-of-Experts inference on NVIDIA Hopper GPUs: one kernel launch per GPU for the whole
//! expert-parallel layer.
//!
//! [`HfLayer::open`] reads the MoE block of a Hugging Face checkpoint, its [`Router`] chooses experts,
//! [`ExpertWeights::prepare`] and [`ExpertWeights::prepare_fp8`] lay the weights out for a rank, and [`reference::forward`] is the plain
//! definition that results are held against, [`reference::forward_a8`] the one for experts in FP8. [`DeviceGroup`] opens the ranks, GPUs or simulated ones,
//! [`Workspace`] holds what the layers of a model share on them, and [`FusedMoe`] runs a layer.

mod agreement;
mod backend;
pub mod bench;
mod checkpoint;
mod config;
pub mod cuda;
mod error;
pub mod example;
mod family;
mod fields;
mod files;
mod float8;
mod fp8;
mod fused;
mod group;
mod input;
mod maps;
mod matrix;
mod memory;
mod model;
mod ptx;
mod quantisation;
mod recognise;
pub mod reference;
mod rendezvous;
mod router;
mod simulated;
mod tensors;
#[cfg(test)]
mod testing;
mod tokens;
pub mod trace;
mod weight_matrix;
mod weights;
mod workspace;

pub use agreement::Agreement;
pub use checkpoint::{Checkpoint, HfLayer};
pub use config::{ExpertFormat, MAX_LOCAL_EXPERTS, MAX_RANKS, MAX_TOP_K, MoeConfig, SIZE_STEP, split_tokens};
pub use cuda::CudaError;
pub use error::{Error, Excess, Result};
pub use family::Family;
pub use ferromoe_kernel::quantise::ScaleKind;
pub use fp8::Fp8Matrix;
pub use fused::{DEFAULT_DEADLINE, FusedMoe, HiddenStates, RankBatch, RankInputs, RankOutput};
pub use group::{Device, DeviceGroup, SimOptions};
pub use input::MoeInput;
pub use matrix::Matrix;
pub use memory::{DeviceBuffer, Stream};
pub use ptx::kernel_ptx;
pub use rendezvous::{Member, Rendezvous, RendezvousAddress, RendezvousError};
pub use router::{ExpertGroups, GroupScore, Router, Routing, Scoring};
pub use tokens::Fp8Tokens;
pub use weight_matrix::WeightMatrix;
pub use weights::{Expert, ExpertWeights, Fp8RankWeights, RankWeights};
pub use workspace::{Workspace, WorkspaceSizes};
