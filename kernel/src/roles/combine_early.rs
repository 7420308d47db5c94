//! Combine, taken up early: when a dispatch warp has no rows left to pull, it sums tokens whose results are all there, while the consumers still multiply.
//!
//! It never waits for a result. What it leaves, the consumers sum when they have nothing left to multiply.

use crate::device::global::{ld_relaxed_gpu_u32, ld_relaxed_sys_u32, ld_weak_v4};
use crate::device::special::{cta as cta_index, ctas, nanosleep};
use crate::device::warp::{ballot, shfl_idx};
use crate::launch::Launch;
use crate::roles::choice::{Choice, choose};
use crate::roles::combine::{COLUMNS_PER_LANE, add, claim, flag_address, store, wait_for_results};
use crate::schedule::combines_early;
use crate::shared::WARP;

/// Nanoseconds between two looks at the same tokens.
const PAUSE_NS: u32 = 4096;
/// Results of a token that a lane loads at once.
const RESULTS_AT_ONCE: usize = 10;

/// Sums tokens until somebody has begun to sum each that this CTA looks at.
#[inline(always)]
pub fn combine_early(launch: &Launch, lane: u32) {
    if !combines_early(launch.tokens(), ctas()) {
        return;
    }
    // Tokens of a group are neighbours: a lane looks at one choice of one of them.
    let group = WARP / launch.params().shape.top_k.next_power_of_two();
    loop {
        let mut left = false;
        let mut first = cta_index() * group;
        while first < launch.tokens() {
            let open = open_tokens(launch, first, group, lane);
            if open != 0 {
                let complete = open & complete_tokens(launch, first, group, lane);
                left |= open != complete;
                if complete != 0 {
                    let mut claimed = claim(launch, first, complete, lane);
                    while claimed != 0 {
                        sum(launch, first + claimed.trailing_zeros(), lane);
                        claimed &= claimed - 1;
                    }
                }
            }
            first += ctas() * group;
        }
        // A wait that ran out is another role's; but the tokens may never be complete.
        if !left || shfl_idx(launch.has_timed_out() as u32, 0) != 0 {
            return;
        }
        mark!(launch, WaitForResults);
        nanosleep(PAUSE_NS);
    }
}

/// Those of `group` tokens from `first` on that nobody has begun to sum, a bit each: the same for all lanes.
#[inline(always)]
fn open_tokens(launch: &Launch, first: u32, group: u32, lane: u32) -> u32 {
    let exist = u32::MAX >> (WARP - group.min(launch.tokens() - first));
    let summed = launch.counter(launch.params().workspace.counter.summed, first / 32);
    // SAFETY: a word of this launch's counters; a group is a power of two, and lies in one.
    let begun = if lane == 0 { unsafe { ld_relaxed_gpu_u32(summed) } } else { 0 };
    exist & !(shfl_idx(begun, 0) >> (first % 32))
}

/// Those of `group` tokens from `first` on whose results are all there, a bit each.
#[inline(always)]
fn complete_tokens(launch: &Launch, first: u32, group: u32, lane: u32) -> u32 {
    let shape = &launch.params().shape;
    let epoch = launch.epoch();
    // SAFETY: a flag of this rank.
    let is_raised = |flag: u32| unsafe { ld_relaxed_sys_u32(flag_address(launch, flag)) } == epoch;
    let (lanes, tokens) = (WARP / group, launch.tokens());
    let (token, k) = (first + lane / lanes, lane % lanes);
    let choice = choose(launch, token, k, k < shape.top_k && token < tokens, lane);
    let misses = matches!(choice, Choice::Expert(expert) if !is_raised(expert));
    let misses_shared = lane < shape.shared_experts && !is_raised(shape.experts + lane);
    let (missing, all_missing) = (ballot(misses), ballot(misses_shared) != 0);
    let mut complete = 0;
    for index in 0..group {
        let of_token = u32::MAX >> (WARP - lanes) << (index * lanes);
        if missing & of_token == 0 && !all_missing {
            complete |= 1 << index;
        }
    }
    complete
}

/// Sums a token's results, which are complete.
#[inline(always)]
fn sum(launch: &Launch, token: u32, lane: u32) {
    let params = launch.params();
    let slots = wait_for_results(launch, token, lane);
    let mut column = lane * COLUMNS_PER_LANE;
    while column < params.shape.hidden {
        let mut sums = [0.0; COLUMNS_PER_LANE as usize];
        let mut rest = slots;
        while rest != 0 {
            // SAFETY: zeros are valid u32.
            let mut values: [[u32; 4]; RESULTS_AT_ONCE] = unsafe { core::mem::zeroed() };
            unroll!(RESULT < RESULTS_AT_ONCE, {
                if rest != 0 {
                    let row = token as u64 * params.shape.slots() as u64 + rest.trailing_zeros() as u64;
                    let at = row * launch.row_bytes() as u64 + column as u64 * 2;
                    // SAFETY: the row is this rank's, and complete.
                    values[RESULT] = unsafe { ld_weak_v4(launch.symmetric(params.rank, params.symmetric.combine, at)) };
                    rest &= rest - 1;
                }
            });
            unroll!(RESULT < RESULTS_AT_ONCE, { add(&mut sums, values[RESULT]) });
        }
        // SAFETY: the output has a row for every token.
        unsafe { store(launch.output_row(token).wrapping_add(column as usize * 2), sums) };
        column += WARP * COLUMNS_PER_LANE;
    }
}
