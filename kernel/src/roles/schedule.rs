//! The scheduler warp: waits for all ranks' counts; then that of a cluster's first CTA claims tickets and hands tasks to the other roles.

use crate::cta::{Cta, TaskWriter};
use crate::device::atomic::atom_add_relaxed_gpu;
use crate::device::barrier::{bar_sync, bar_warp_sync};
use crate::device::cluster::{cluster_cta, cluster_ctas};
use crate::device::global::{ld_acquire_sys_u64, st_weak_u32, st_weak_u64};
use crate::device::special::{cta as cta_index, ctas};
use crate::device::warp::redux_max;
use crate::launch::{COUNTS_BARRIER, Launch};
use crate::roles::pull::count_from;
use crate::schedule::{Phase, ScheduleShape, TaskCursor, combine_chunks};
use crate::shared::{DISPATCH_WARPS, WARP};
use crate::status::{Stage, Timeout};

/// Threads that meet when the counts are in shared memory: the scheduler and dispatch warps.
pub const COUNTS_THREADS: u32 = (1 + DISPATCH_WARPS) * WARP;

/// Schedules until no task is left.
#[inline(always)]
pub fn schedule(launch: &Launch, cta: Cta, lane: u32) {
    check_tokens(launch, lane);
    zero_next_counters(launch, lane);
    gather_counts(launch, cta, lane);
    // Lanes wait for counts apart from each other, and `bar.sync` is for whole warps.
    bar_warp_sync();
    bar_sync::<COUNTS_BARRIER, COUNTS_THREADS>();
    let most_rows = most_rows(launch, cta, lane);
    if lane == 0 && cluster_cta() == 0 {
        hand_out_tasks(launch, cta, most_rows);
    }
}

/// Reports a count of tokens beyond the maximum; such a rank runs as one without tokens.
#[inline(always)]
fn check_tokens(launch: &Launch, lane: u32) {
    let claimed = launch.claimed_tokens();
    if lane == 0 && cta_index() == 0 && claimed > launch.params().shape.max_tokens {
        // SAFETY: the status words lie in the workspace, and only this thread writes this one.
        unsafe { st_weak_u64(&raw mut (*launch.status()).excess_tokens, claimed as u64) };
    }
}

/// Zeroes this CTA's share of the counters that the next launch uses.
#[inline(always)]
fn zero_next_counters(launch: &Launch, lane: u32) {
    let words = (launch.params().workspace.counter.bytes / 4) as u32;
    let mut word = cta_index() * WARP + lane;
    while word < words {
        // SAFETY: a word of the other set of counters, which no CTA uses in this launch.
        unsafe { st_weak_u32(launch.next_counter(word), 0) };
        word += ctas() * WARP;
    }
}

/// Waits for every rank's counts, and writes the rows of every local expert to shared memory.
#[inline(always)]
fn gather_counts(launch: &Launch, cta: Cta, lane: u32) {
    let params = launch.params();
    let shape = &params.shape;
    let routed = shape.routed_experts();
    let epoch = launch.epoch();
    let mut expert = lane;
    while expert < shape.local_experts() {
        let mut rows = 0;
        if expert < routed {
            for source in 0..shape.ranks {
                let place = launch.symmetric(params.rank, params.symmetric.counts, launch.count_index(source, expert));
                let missing = || Timeout { stage: Stage::Counts, rank: source, subject: params.rank * routed + expert };
                // SAFETY: a place in the counts.
                launch.wait_until(missing, || (unsafe { ld_acquire_sys_u64(place) } >> 32) as u32 == epoch);
                rows += count_from(launch, source, expert);
            }
        } else {
            rows = launch.tokens();
        }
        // SAFETY: the array holds all local experts, and each has one writer.
        unsafe { cta.expert_rows(expert).store_u32(rows) };
        expert += WARP;
    }
}

/// Rows of the local expert that has the most.
#[inline(always)]
fn most_rows(launch: &Launch, cta: Cta, lane: u32) -> u32 {
    let mut most = 0;
    let mut expert = lane;
    while expert < launch.params().shape.local_experts() {
        // SAFETY: this warp wrote the counts.
        most = most.max(unsafe { cta.expert_rows(expert).load_u32() });
        expert += WARP;
    }
    redux_max(most)
}

/// Claims tickets and puts their tasks into the slots of the cluster's CTAs, in order, until the tasks end.
#[inline(always)]
fn hand_out_tasks(launch: &Launch, cta: Cta, most_rows: u32) {
    let params = launch.params();
    let shape = &params.shape;
    let mut cursor = TaskCursor::new(ScheduleShape {
        experts: shape.local_experts(),
        wave_experts: params.wave_experts,
        linear1_rows: 2 * shape.intermediate,
        linear2_rows: shape.hidden,
        combine_chunks: combine_chunks(launch.tokens(), ctas()),
        cluster: cluster_ctas(),
        most_rows,
    });
    let mut writer = TaskWriter::new(cta);
    let next = launch.counter(params.workspace.counter.task_ticket, 0);
    loop {
        // SAFETY: a counter of this launch.
        let ticket = unsafe { atom_add_relaxed_gpu(next, 1) };
        // SAFETY: this warp wrote the counts.
        let task = cursor.seek(ticket, |expert| unsafe { cta.expert_rows(expert).load_u32() });
        writer.put(task);
        if task.phase == Phase::End as u32 {
            return;
        }
    }
}
