//! The publisher warp: waits for the consumers to have finished a task, and announces its results, while the consumers go on.

use crate::cta::{Cta, Ring, TaskReader};
use crate::device::atomic::{atom_add_relaxed_gpu, red_add_release_gpu};
use crate::device::global::st_relaxed_sys_u32;
use crate::launch::Launch;
use crate::layout::MAX_RANKS;
use crate::roles::pull::sources_of;
use crate::shared::UNANNOUNCED_TASKS;
use crate::sources::{Sources, source_at};
use crate::task::{Phase, Task};

/// Publishes the results of every product.
#[inline(always)]
pub fn publish(launch: &Launch, cta: Cta, lane: u32) {
    if lane != 0 {
        return;
    }
    let mut tasks = TaskReader::new(cta);
    let mut task = tasks.take();
    while task.is_product() {
        mark!(launch, WaitForTask);
        // First, for its slot is wanted.
        let next = tasks.take();
        mark!(launch, WaitForFinished);
        let Ring { slot, parity } = Ring::at(tasks.number - 2, UNANNOUNCED_TASKS);
        cta.task_finished(slot).wait(parity);
        mark!(launch, Announce, &task);
        if task.phase == Phase::Linear1 as u32 {
            announce_columns(launch, &task);
        } else {
            announce_results(launch, &task);
        }
        task = next;
    }
    while task.phase != Phase::End as u32 {
        task = tasks.take();
    }
}

/// Linear 1: counts a task's columns for their tile.
#[inline(always)]
fn announce_columns(launch: &Launch, task: &Task) {
    let stored = launch.counter(launch.params().workspace.counter.columns_ready, task.tile);
    // The hand-over has told this thread of all consumers' stores: the release is one of them too.
    // SAFETY: a counter of this launch.
    unsafe { red_add_release_gpu(stored, 1) };
}

/// Linear 2: counts a task for its tile, whose rows may be overwritten behind the last, and its stores; the last of an expert raises its flag on every rank that sent it tokens.
#[inline(always)]
fn announce_results(launch: &Launch, task: &Task) {
    let params = launch.params();
    let shape = &params.shape;
    let done = launch.counter(params.workspace.counter.expert_done, task.expert);
    let tile_done = launch.counter(params.workspace.counter.tile_done, task.tile);
    // As above: all consumers have read the tile's rows.
    // SAFETY: a counter of this launch.
    unsafe { red_add_release_gpu(tile_done, 1) };
    // The consumers' stores to all ranks come before the count, and all counted stores before the flag: with the fences the count releases and acquires.
    launch.fence();
    // SAFETY: a counter of this launch.
    if unsafe { atom_add_relaxed_gpu(done, 1) } + 1 < task.expert_tasks {
        return;
    }
    launch.fence();
    let routed = shape.routed_experts();
    let epoch = launch.epoch();
    let raise = |rank: u32, flag: u32| {
        // SAFETY: every rank has a flag for every expert.
        unsafe { st_relaxed_sys_u32(launch.symmetric(rank, params.symmetric.flags, flag as u64), epoch) };
    };
    if task.expert < shape.shared_experts {
        raise(params.rank, shape.experts + task.expert);
        return;
    }
    let expert = task.expert - shape.shared_experts;
    let Sources(counts) = sources_of(launch, expert);
    let mut sent: u32 = 0;
    unroll!(PLACE < MAX_RANKS as usize, { sent |= ((counts[PLACE] > 0) as u32) << PLACE });
    while sent != 0 {
        let rank = source_at(params.rank, shape.ranks, sent.trailing_zeros());
        raise(rank, params.rank * routed + expert);
        sent &= sent - 1;
    }
}
