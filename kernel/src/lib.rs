//! The fused Mixture-of-Experts kernel of ferromoe.
//!
//! Compiled for `nvptx64-nvidia-cuda` this crate is the kernel: [`device`] wraps single PTX instructions, [`roles`] holds one
//! file a warp role, [`main_loop`] what depends on the number format, [`entry`] starts them. Compiled for the host it is the contract between host and device: the parameter block,
//! the layouts of every buffer, the tile table, the task order and the status words exist here and nowhere else.
#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, stdarch_nvptx, asm_experimental_arch))]

#[macro_use]
mod unroll;

pub mod format;
pub mod layout;
pub mod params;
pub mod quantise;
pub mod schedule;
pub mod shared;
pub mod sources;
pub mod status;
pub mod task;
pub mod tile;
pub mod trace;
pub mod warps;

#[cfg(target_arch = "nvptx64")]
#[macro_use]
pub mod record;
#[cfg(target_arch = "nvptx64")]
pub mod consumer;
#[cfg(target_arch = "nvptx64")]
pub mod cta;
#[cfg(target_arch = "nvptx64")]
pub mod device;
#[cfg(target_arch = "nvptx64")]
pub mod entry;
#[cfg(target_arch = "nvptx64")]
pub mod launch;
#[cfg(target_arch = "nvptx64")]
pub mod main_loop;
#[cfg(target_arch = "nvptx64")]
mod panic;
#[cfg(target_arch = "nvptx64")]
pub mod roles;
