//! Route: each valid (token, k) gets a slot in its expert's list on the rank that owns the expert.
//!
//! Dispatch warps claim chunks of tokens. The warp that finishes a rank's last chunk publishes the rank's counts to every rank.

use crate::device::atomic::{atom_add_acq_rel_gpu, atom_add_relaxed_gpu, red_min_relaxed_gpu_u64};
use crate::device::barrier::bar_warp_sync;
use crate::device::fence::fence_acq_rel_sys;
use crate::device::global::{ld_relaxed_gpu_u32, ld_weak_f32, st_relaxed_sys_u64, st_weak_u64};
use crate::device::warp::shfl_idx;
use crate::launch::Launch;
use crate::layout::RowMeta;
use crate::roles::choice::{Choice, choose};
use crate::schedule::{ROUTE_TOKENS, route_chunks};
use crate::shared::WARP;
use crate::status::BadChoice;

/// Routes chunks until none is left.
#[inline(always)]
pub fn route(launch: &Launch, lane: u32) {
    let counters = &launch.params().workspace.counter;
    let tokens = launch.tokens();
    let chunks = route_chunks(tokens);
    let ticket = launch.counter(counters.route_ticket, 0);
    loop {
        let chunk = claim(ticket, lane);
        if chunk >= chunks {
            return;
        }
        mark!(launch, Route, chunk);
        route_chunk(launch, tokens, chunk, lane);
        // The lists of the whole warp, then of all warps, come before the counts that are published.
        bar_warp_sync();
        let mut routed = 0;
        if lane == 0 {
            fence_acq_rel_sys();
            // SAFETY: a counter of this launch.
            routed = unsafe { atom_add_acq_rel_gpu(launch.counter(counters.routed_chunks, 0), 1) } + 1;
        }
        if shfl_idx(routed, 0) == chunks {
            mark!(launch, PublishCounts);
            publish(launch, lane);
        }
    }
}

/// The next ticket, for a whole warp.
#[inline(always)]
pub fn claim(ticket: *mut u32, lane: u32) -> u32 {
    let mut claimed = 0;
    if lane == 0 {
        // SAFETY: a counter of this launch.
        claimed = unsafe { atom_add_relaxed_gpu(ticket, 1) };
    }
    shfl_idx(claimed, 0)
}

/// Routes one chunk: a lane for each choice, as many tokens at once as fit the warp.
#[inline(always)]
fn route_chunk(launch: &Launch, tokens: u32, chunk: u32, lane: u32) {
    let params = launch.params();
    let shape = &params.shape;
    let lanes_per_token = shape.top_k.next_power_of_two();
    let k = lane % lanes_per_token;
    let mut token = chunk * ROUTE_TOKENS + lane / lanes_per_token;
    let end = tokens.min((chunk + 1) * ROUTE_TOKENS);
    let mut first = chunk * ROUTE_TOKENS;
    while first < end {
        match choose(launch, token, k, k < shape.top_k && token < end, lane) {
            Choice::Expert(expert) => send(launch, token, k, expert),
            Choice::Bad(fault) => {
                let report = BadChoice { token, k, fault }.pack();
                // SAFETY: the status words lie in the workspace.
                unsafe { red_min_relaxed_gpu_u64(&raw mut (*launch.status()).bad_choice, report) };
            }
            Choice::None => {}
        }
        token += WARP / lanes_per_token;
        first += WARP / lanes_per_token;
    }
}

/// Puts one choice into its expert's list.
#[inline(always)]
fn send(launch: &Launch, token: u32, k: u32, expert: u32) {
    let params = launch.params();
    let shape = &params.shape;
    let (owner, local) = (expert / shape.routed_experts(), expert % shape.routed_experts());
    // SAFETY: `expert` is below the number of experts, and a token names an expert at most once: the slot is below the maximum of tokens.
    unsafe {
        let slot = atom_add_relaxed_gpu(launch.counter(params.workspace.counter.sent, expert), 1);
        let weight = ld_weak_f32(launch.topk_weight(token * shape.top_k + k));
        let entry = RowMeta { combine_row: token * shape.slots() + k, rank: 0, weight };
        let list = (params.rank * shape.routed_experts() + local) as u64 * shape.max_tokens as u64;
        st_weak_u64(launch.symmetric(owner, params.symmetric.lists, list + slot as u64), entry.pack());
    }
}

/// Tells every rank how many rows it gets for each of its experts, and where this rank's hidden states are.
#[inline(always)]
fn publish(launch: &Launch, lane: u32) {
    let params = launch.params();
    let shape = &params.shape;
    if lane < shape.ranks {
        let distance = launch.hidden_states().wrapping_sub(launch.symmetric_base(params.rank));
        // SAFETY: every rank has a place for every source's distance.
        unsafe { st_weak_u64(launch.hidden_distance(lane, params.rank), distance) };
    }
    bar_warp_sync();
    fence_acq_rel_sys();
    let epoch = launch.epoch();
    let mut expert = lane;
    while expert < shape.experts {
        let (owner, local) = (expert / shape.routed_experts(), expert % shape.routed_experts());
        // SAFETY: every rank has a place for every source's count of each of its experts.
        unsafe {
            let count = ld_relaxed_gpu_u32(launch.counter(params.workspace.counter.sent, expert));
            let place = launch.symmetric(owner, params.symmetric.counts, launch.count_index(params.rank, local));
            st_relaxed_sys_u64(place, (epoch as u64) << 32 | count as u64);
        }
        expert += WARP;
    }
}
