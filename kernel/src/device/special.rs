//! Special registers, clocks and the register file.

use core::arch::asm;
use core::arch::nvptx::{_block_idx_x, _grid_dim_x};

/// `%tid.x`.
#[inline(always)]
pub fn thread() -> u32 {
    let thread: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %tid.x;", out(reg32) thread) };
    thread
}

/// `%laneid`.
#[inline(always)]
pub fn lane() -> u32 {
    let lane: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %laneid;", out(reg32) lane) };
    lane
}

/// `%ctaid.x`.
#[inline(always)]
pub fn cta() -> u32 {
    // SAFETY: reads a special register.
    (unsafe { _block_idx_x() }) as u32
}

/// `%nctaid.x`.
#[inline(always)]
pub fn ctas() -> u32 {
    // SAFETY: reads a special register.
    (unsafe { _grid_dim_x() }) as u32
}

/// `%smid`.
#[inline(always)]
pub fn smid() -> u32 {
    let sm: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %smid;", out(reg32) sm) };
    sm
}

/// `%globaltimer`, in nanoseconds.
#[inline(always)]
pub fn globaltimer() -> u64 {
    let time: u64;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u64 {0}, %globaltimer;", out(reg64) time) };
    time
}

/// `nanosleep.u32`: sleeps for about this long, at most a millisecond.
#[inline(always)]
pub fn nanosleep(nanoseconds: u32) {
    // SAFETY: sleeps.
    unsafe { asm!("nanosleep.u32 {0};", in(reg32) nanoseconds) };
}

/// `setmaxnreg.inc.sync.aligned.u32`: waits for registers.
#[inline(always)]
pub fn setmaxnreg_inc<const REGISTERS: u32>() {
    // SAFETY: every warp of the warpgroup comes here once.
    unsafe { asm!("setmaxnreg.inc.sync.aligned.u32 {0};", const REGISTERS) };
}

/// `setmaxnreg.dec.sync.aligned.u32`: gives registers back.
#[inline(always)]
pub fn setmaxnreg_dec<const REGISTERS: u32>() {
    // SAFETY: every warp of the warpgroup comes here once.
    unsafe { asm!("setmaxnreg.dec.sync.aligned.u32 {0};", const REGISTERS) };
}
