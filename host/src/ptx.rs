//! The kernel's PTX, as `cargo xtask build` made it.

/// The PTX module with the kernel, for sm_90a. Its first line is the stamp: a digest of the kernel's sources.
pub const PTX: &str = include_str!("../ptx/ferromoe.ptx");
