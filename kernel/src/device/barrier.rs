//! Barriers among the threads of a CTA.

use core::arch::asm;

/// `bar.sync id, threads`: waits until `THREADS` threads (a multiple of 32) have come to barrier `ID` (0 to 15). Both are
/// immediates: with a register for either, ptxas sets all sixteen barriers aside.
#[inline(always)]
pub fn bar_sync<const ID: u32, const THREADS: u32>() {
    // SAFETY: synchronises, and touches no memory.
    unsafe { asm!("bar.sync {0}, {1};", const ID, const THREADS) };
}

/// [`bar_sync`] at barrier `FIRST + index`, `index` 0 to 2: one predicated instruction for each, for the number must be an immediate, and a branch by it would be an indirect one.
#[inline(always)]
pub fn bar_sync_of_three<const FIRST: u32, const THREADS: u32>(index: u32) {
    // SAFETY: synchronises, and touches no memory.
    unsafe {
        asm!("{{",
            ".reg .pred first, second, third;",
            "setp.eq.u32 first, {0}, 0;",
            "setp.eq.u32 second, {0}, 1;",
            "setp.eq.u32 third, {0}, 2;",
            "@first bar.sync {1}, {4};",
            "@second bar.sync {2}, {4};",
            "@third bar.sync {3}, {4};",
            "}}",
            in(reg32) index, const FIRST, const FIRST + 1, const FIRST + 2, const THREADS)
    };
}

/// `bar.warp.sync` of the whole warp.
#[inline(always)]
pub fn bar_warp_sync() {
    // SAFETY: as for [`bar_sync`].
    unsafe { asm!("bar.warp.sync 0xffffffff;") };
}
