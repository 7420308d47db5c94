//! Ordinary Rust as LLVM 22 compiles it for the GPU. `compiled_o1.ptx` and `compiled_o3.ptx` are made from this, as a
//! `cdylib` for `nvptx64-nvidia-cuda` with `-Cdebuginfo=line-directives-only` and `-C no-prepopulate-passes`, by `opt`
//! and `llc` at those levels for `sm_90a`. `tests/compiled.rs` runs them.
#![no_std]
#![feature(abi_ptx, stdarch_nvptx)]

mod compute;

use core::arch::nvptx::{_block_dim_x, _block_idx_x, _thread_idx_x, trap};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: ends the kernel.
    unsafe { trap() }
}

/// Stores `compute(i)` at `out[i]` for every thread `i`.
///
/// # Safety
/// `out` holds `length` words.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn k(out: *mut u64, length: u64) {
    // SAFETY: special registers can always be read.
    let index = unsafe { _block_idx_x() as u64 * _block_dim_x() as u64 + _thread_idx_x() as u64 };
    if index < length {
        // SAFETY: within the buffer.
        unsafe { out.add(index as usize).write(compute::compute(index)) };
    }
}
