//! PTX instructions as functions: one small function an instruction, named after it, and nothing else.
//!
//! Inline PTX lives in this folder only. Every statement is a side effect and a memory clobber to the compiler, and the build marks each as
//! convergent, so none is moved over another, duplicated or merged.

pub mod address;
pub mod atomic;
pub mod barrier;
pub mod bulk;
pub mod cluster;
pub mod convert;
pub mod copy;
pub mod fence;
pub mod global;
pub mod matrix;
pub mod mbarrier;
pub mod special;
pub mod warp;
pub mod wgmma;
