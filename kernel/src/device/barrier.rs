//! Barriers among the threads of a CTA.

use core::arch::asm;

/// `bar.sync id, threads`: waits until `THREADS` threads (a multiple of 32) have come to barrier `ID` (0 to 15). Both are
/// immediates: with a register for either, ptxas sets all sixteen barriers aside.
#[inline(always)]
pub fn bar_sync<const ID: u32, const THREADS: u32>() {
    // SAFETY: synchronises, and touches no memory.
    unsafe { asm!("bar.sync {0}, {1};", const ID, const THREADS) };
}

/// `bar.warp.sync` of the whole warp.
#[inline(always)]
pub fn bar_warp_sync() {
    // SAFETY: as for [`bar_sync`].
    unsafe { asm!("bar.warp.sync 0xffffffff;") };
}
