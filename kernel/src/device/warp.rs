//! Exchanges among the lanes of a warp; all 32 take part.

use core::arch::asm;

/// `shfl.sync.idx.b32`: the value of another lane.
#[inline(always)]
pub fn shfl_idx(value: u32, lane: u32) -> u32 {
    let result: u32;
    // SAFETY: exchanges registers.
    unsafe {
        asm!("shfl.sync.idx.b32 {0}, {1}, {2}, 0x1f, 0xffffffff;", out(reg32) result, in(reg32) value, in(reg32) lane)
    };
    result
}

/// `vote.sync.ballot.b32`: the lanes for which `condition` holds.
#[inline(always)]
pub fn ballot(condition: bool) -> u32 {
    let lanes: u32;
    // SAFETY: exchanges predicates.
    unsafe {
        asm!("{{",
            ".reg .pred condition;",
            "setp.ne.u32 condition, {1}, 0;",
            "vote.sync.ballot.b32 {0}, condition, 0xffffffff;",
            "}}",
            out(reg32) lanes, in(reg32) condition as u32)
    };
    lanes
}

/// `match.any.sync.b32`: the lanes that hold the same value.
#[inline(always)]
pub fn match_any(value: u32) -> u32 {
    let lanes: u32;
    // SAFETY: exchanges registers.
    unsafe { asm!("match.any.sync.b32 {0}, {1}, 0xffffffff;", out(reg32) lanes, in(reg32) value) };
    lanes
}

/// `redux.sync.add.u32`: the sum over all lanes.
#[inline(always)]
pub fn redux_add(value: u32) -> u32 {
    let sum: u32;
    // SAFETY: exchanges registers.
    unsafe { asm!("redux.sync.add.u32 {0}, {1}, 0xffffffff;", out(reg32) sum, in(reg32) value) };
    sum
}

/// `redux.sync.max.u32`: the greatest over all lanes.
#[inline(always)]
pub fn redux_max(value: u32) -> u32 {
    let greatest: u32;
    // SAFETY: exchanges registers.
    unsafe { asm!("redux.sync.max.u32 {0}, {1}, 0xffffffff;", out(reg32) greatest, in(reg32) value) };
    greatest
}
