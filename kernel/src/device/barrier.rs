//! Barriers among the threads of a CTA.

use core::arch::asm;

/// `bar.sync id, threads`: waits until `threads` threads (a multiple of 32) have come to barrier `ID` (0 to 15).
#[inline(always)]
pub fn bar_sync<const ID: u32>(threads: u32) {
    // SAFETY: synchronises, and touches no memory.
    unsafe { asm!("bar.sync {0}, {1};", const ID, in(reg32) threads) };
}

/// `bar.sync id, threads` with an id known only at run time.
#[inline(always)]
pub fn bar_sync_id(id: u32, threads: u32) {
    // SAFETY: as for [`bar_sync`].
    unsafe { asm!("bar.sync {0}, {1};", in(reg32) id, in(reg32) threads) };
}

/// `bar.warp.sync` of the whole warp.
#[inline(always)]
pub fn bar_warp_sync() {
    // SAFETY: as for [`bar_sync`].
    unsafe { asm!("bar.warp.sync 0xffffffff;") };
}
