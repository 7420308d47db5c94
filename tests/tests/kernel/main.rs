//! The kernel against the reference. One program, so that the kernel's PTX is in it once.

mod errors;
mod fp8;
mod invariance;
mod launches;
mod layer;
mod model;
mod ring;
mod trace;
mod traffic;
