//! The layout of a CTA's dynamic shared memory.

use crate::format::{Format, TASK_SLOTS};
use crate::layout::MAX_LOCAL_EXPERTS;
use crate::task::TASK_BYTES;
use crate::warps::{DISPATCH_WARPS, WARP, WARPGROUP};

/// Tasks that the consumers may have finished and the publisher not announced: the one it is at, the next, which it has taken, and those in the slots.
pub const UNANNOUNCED_TASKS: u32 = TASK_SLOTS + 2;
/// Pull buffers of one dispatch warp.
pub const PULL_BUFFERS: u32 = 2;
/// Bytes that a consumer warpgroup stores at once: 16 a thread.
pub const PASS_BYTES: u32 = WARPGROUP * 16;
/// Bytes of one piece of a combine row.
pub const COMBINE_BYTES: u32 = 2048;
/// Pieces that one consumer warp has in flight while it combines.
pub const COMBINE_BUFFERS: u32 = 8;

/// Bytes of an mbarrier object.
pub const MBARRIER_BYTES: u32 = 8;

/// Dynamic shared memory of a CTA on Hopper (CUDA programming guide, compute capability 9.0: 227 KB).
pub const SHARED_LIMIT: u32 = 227 * 1024;

/// Byte offsets in a CTA's dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedLayout {
    /// Pipeline stages; 1024-byte aligned for the 128-byte swizzle.
    pub stages: u32,
    /// Staging buffers, one a consumer warpgroup; 1024-byte aligned.
    pub staging: u32,
    /// Pull buffers, [`PULL_BUFFERS`] a dispatch warp.
    pub pull: u32,
    /// The stages' scales.
    pub scales: u32,
    /// What the rows of the current tile have: weights (f32) in linear 1, addresses of results (u64) in linear 2; one array a consumer warpgroup.
    pub rows: u32,
    /// Row counts (u32) of the local experts.
    pub expert_rows: u32,
    /// Bits of the local experts that have rows, in words of [`WARP`].
    pub hit_experts: u32,
    /// Task slots.
    pub tasks: u32,
    /// mbarriers: a stage is full.
    pub stage_full: u32,
    /// mbarriers: a stage is free.
    pub stage_empty: u32,
    /// mbarriers: a task slot is full.
    pub task_full: u32,
    /// mbarriers: a task slot is free.
    pub task_empty: u32,
    /// mbarrier: the next task is to be claimed.
    pub task_wanted: u32,
    /// mbarrier: the local experts' rows are counted.
    pub counted: u32,
    /// mbarriers: the consumers have finished a task.
    pub task_finished: u32,
    /// mbarriers of the pull buffers.
    pub pull_full: u32,
    /// mbarriers of the combine buffers.
    pub combine_full: u32,
    /// Size.
    pub bytes: u32,
}

impl SharedLayout {
    /// The layout for a format. The combine buffers are the memory of stages and staging buffers, which is free once a CTA combines.
    pub const fn new(format: &Format) -> Self {
        let consumers = format.consumer_warps();
        let stages = 0;
        let staging = stages + format.pipeline_bytes();
        let pull = staging + format.consumer_warpgroups * format.staging_bytes;
        let scales = pull + DISPATCH_WARPS * PULL_BUFFERS * format.pull_bytes;
        let rows = scales + format.max_stages * format.scale_stage_bytes();
        let expert_rows = rows + format.consumer_warpgroups * format.warpgroup_tokens * 8;
        let hit_experts = expert_rows + MAX_LOCAL_EXPERTS * 4;
        let tasks = hit_experts + MAX_LOCAL_EXPERTS / WARP * 4;
        let stage_full = tasks + TASK_SLOTS * TASK_BYTES;
        let stage_empty = stage_full + format.max_stages * MBARRIER_BYTES;
        let task_full = stage_empty + format.max_stages * MBARRIER_BYTES;
        let task_empty = task_full + TASK_SLOTS * MBARRIER_BYTES;
        let task_wanted = task_empty + TASK_SLOTS * MBARRIER_BYTES;
        let counted = task_wanted + MBARRIER_BYTES;
        let task_finished = counted + MBARRIER_BYTES;
        let pull_full = task_finished + UNANNOUNCED_TASKS * MBARRIER_BYTES;
        let combine_full = pull_full + DISPATCH_WARPS * PULL_BUFFERS * MBARRIER_BYTES;
        let bytes = combine_full + consumers * COMBINE_BUFFERS * MBARRIER_BYTES;
        assert!(staging.is_multiple_of(1024) && format.staging_bytes.is_multiple_of(1024));
        assert!(scales.is_multiple_of(16) && pull.is_multiple_of(128) && rows.is_multiple_of(16));
        assert!(tasks.is_multiple_of(16) && stage_full.is_multiple_of(MBARRIER_BYTES));
        assert!(consumers * COMBINE_BUFFERS * COMBINE_BYTES <= pull);
        assert!(bytes <= SHARED_LIMIT);
        Self {
            stages,
            staging,
            pull,
            scales,
            rows,
            expert_rows,
            hit_experts,
            tasks,
            stage_full,
            stage_empty,
            task_full,
            task_empty,
            task_wanted,
            counted,
            task_finished,
            pull_full,
            combine_full,
            bytes,
        }
    }
}

const _: () = assert!(TASK_SLOTS.is_power_of_two() && UNANNOUNCED_TASKS.is_power_of_two());
const _: () = {
    let mut index = 0;
    while index < Format::ALL.len() {
        SharedLayout::new(&Format::ALL[index]);
        index += 1;
    }
};
