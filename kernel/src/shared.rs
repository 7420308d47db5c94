//! The layout of a CTA's dynamic shared memory, and the shape of a CTA.

use crate::layout::MAX_LOCAL_EXPERTS;
use crate::schedule::TASK_BYTES;
use crate::tile::{K_BLOCK, MAX_TOKEN_TILE, TOKEN_TILES, WEIGHT_TILE, tile_index, token_tile};

/// Threads of a warp.
pub const WARP: u32 = 32;
/// Threads of a warpgroup.
pub const WARPGROUP: u32 = 128;
/// Warps that route and pull.
pub const DISPATCH_WARPS: u32 = 1;
/// Warpgroups that multiply, store and combine.
pub const CONSUMER_WARPGROUPS: u32 = 2;
/// Warps of all consumer warpgroups.
pub const CONSUMER_WARPS: u32 = CONSUMER_WARPGROUPS * WARPGROUP / WARP;
/// The producer warp's number in the CTA, behind the dispatch warps.
pub const PRODUCER_WARP: u32 = DISPATCH_WARPS;
/// The scheduler warp's number.
pub const SCHEDULER_WARP: u32 = PRODUCER_WARP + 1;
/// The publisher warp's number.
pub const PUBLISHER_WARP: u32 = SCHEDULER_WARP + 1;
/// The first consumer warp's number; consumers are whole warpgroups.
pub const CONSUMER_WARP: u32 = PUBLISHER_WARP + 1;
/// Threads of a CTA.
pub const THREADS: u32 = (CONSUMER_WARP + CONSUMER_WARPS) * WARP;

/// Registers of a thread of the warps that are not consumers, after `setmaxnreg`.
pub const HELPER_REGISTERS: u32 = 88;
/// Registers of a consumer thread, after `setmaxnreg`.
pub const CONSUMER_REGISTERS: u32 = 208;

/// Bytes of the TMA pipeline: four stages of the widest token tile.
pub const PIPELINE_BYTES: u32 = 4 * stage_bytes(MAX_TOKEN_TILE);
/// The most stages of the pipeline. More would only queue at the memory, and flags and fences behind them.
pub const MAX_STAGES: u32 = 6;
/// Bytes of one stage's weight tile.
pub const WEIGHT_STAGE_BYTES: u32 = WEIGHT_TILE * K_BLOCK * 2;
/// Bytes of one stage for token tiles of up to `width` tokens: the weight tile, then the token tile.
pub const fn stage_bytes(width: u32) -> u32 {
    WEIGHT_STAGE_BYTES + width * K_BLOCK * 2
}
/// The width for which the pipeline of a launch is cut whose widest token tile has this index: no narrower one than that of which [`MAX_STAGES`] stages fit.
pub const fn pipeline_width(widest: u32) -> u32 {
    const LEAST: u32 = tile_index((PIPELINE_BYTES / MAX_STAGES - WEIGHT_STAGE_BYTES) / (K_BLOCK * 2));
    token_tile(if widest < LEAST { LEAST } else { widest })
}
/// Stages of such a launch: as many as the pipeline's bytes hold.
pub const fn stages(widest: u32) -> u32 {
    // A table would lie in memory, and a division takes its time.
    const STAGES: u64 = {
        let (mut packed, mut index) = (0, 0);
        while index < TOKEN_TILES.len() {
            packed |= ((PIPELINE_BYTES / stage_bytes(pipeline_width(index as u32))) as u64) << (4 * index);
            index += 1;
        }
        packed
    };
    (STAGES >> (4 * widest)) as u32 & 0xf
}
/// Bytes that a consumer warpgroup stores at once: 16 a thread.
pub const PASS_BYTES: u32 = WARPGROUP * 16;
/// Passes in the buffer in which a consumer warpgroup transposes its results: one half is written while the other is read.
pub const STAGED_PASSES: usize = 4;
/// Bytes of the staging buffer of one consumer warpgroup.
pub const STAGING_BYTES: u32 = STAGED_PASSES as u32 * PASS_BYTES;
/// Task slots, which take turns: the producer has its next task while other roles have not yet come to the one before.
pub const TASK_SLOTS: u32 = 2;
/// Tasks that the consumers may have finished and the publisher not announced: the one it is at, the next, which it has taken, and those in the slots.
pub const UNANNOUNCED_TASKS: u32 = TASK_SLOTS + 2;
/// Bytes of one buffer for pulling rows, piece by piece: an equal share of it for each row that is on its way.
pub const PULL_BYTES: u32 = 6144;
/// Pull buffers of one dispatch warp.
pub const PULL_BUFFERS: u32 = 2;
/// Bytes of one piece of a combine row.
pub const COMBINE_BYTES: u32 = 2048;
/// Pieces that one consumer warp has in flight while it combines.
pub const COMBINE_BUFFERS: u32 = 8;

/// Bytes of an mbarrier object.
pub const MBARRIER_BYTES: u32 = 8;

/// Byte offset of the pipeline stages; 1024-byte aligned for the 128-byte swizzle.
pub const STAGES_OFFSET: u32 = 0;
/// Byte offset of the consumer warps' combine buffers: the stages' memory, which is free once a CTA combines.
pub const COMBINE_OFFSET: u32 = STAGES_OFFSET;
/// Byte offset of the staging buffers, one a consumer warpgroup.
pub const STAGING_OFFSET: u32 = STAGES_OFFSET + PIPELINE_BYTES;
/// Byte offset of the pull buffers, [`PULL_BUFFERS`] a dispatch warp.
pub const PULL_OFFSET: u32 = STAGING_OFFSET + CONSUMER_WARPGROUPS * STAGING_BYTES;
/// Byte offset of the row metas of the current tile (u64), one array a consumer warpgroup.
pub const ROW_META_OFFSET: u32 = PULL_OFFSET + DISPATCH_WARPS * PULL_BUFFERS * PULL_BYTES;
/// Byte offset of the row counts (u32) of the local experts.
pub const EXPERT_ROWS_OFFSET: u32 = ROW_META_OFFSET + CONSUMER_WARPGROUPS * MAX_TOKEN_TILE * 8;
/// Byte offset of the bits of the local experts that have rows, in words of [`WARP`].
pub const HIT_EXPERTS_OFFSET: u32 = EXPERT_ROWS_OFFSET + MAX_LOCAL_EXPERTS * 4;
/// Byte offset of the task slots.
pub const TASK_OFFSET: u32 = HIT_EXPERTS_OFFSET + MAX_LOCAL_EXPERTS / WARP * 4;
/// Byte offset of the mbarriers that say a stage is full.
pub const STAGE_FULL_OFFSET: u32 = TASK_OFFSET + TASK_SLOTS * TASK_BYTES;
/// Byte offset of the mbarriers that say a stage is free.
pub const STAGE_EMPTY_OFFSET: u32 = STAGE_FULL_OFFSET + MAX_STAGES * MBARRIER_BYTES;
/// Byte offset of the mbarriers that say a task slot is full.
pub const TASK_FULL_OFFSET: u32 = STAGE_EMPTY_OFFSET + MAX_STAGES * MBARRIER_BYTES;
/// Byte offset of the mbarriers that say a task slot is free.
pub const TASK_EMPTY_OFFSET: u32 = TASK_FULL_OFFSET + TASK_SLOTS * MBARRIER_BYTES;
/// Byte offset of the mbarrier that says the next task is to be claimed.
pub const TASK_WANTED_OFFSET: u32 = TASK_EMPTY_OFFSET + TASK_SLOTS * MBARRIER_BYTES;
/// Byte offset of the mbarrier that says the local experts' rows are counted.
pub const COUNTED_OFFSET: u32 = TASK_WANTED_OFFSET + MBARRIER_BYTES;
/// Byte offset of the mbarriers that say the consumers have finished a task.
pub const TASK_FINISHED_OFFSET: u32 = COUNTED_OFFSET + MBARRIER_BYTES;
/// Byte offset of the mbarriers of the pull buffers.
pub const PULL_FULL_OFFSET: u32 = TASK_FINISHED_OFFSET + UNANNOUNCED_TASKS * MBARRIER_BYTES;
/// Byte offset of the mbarriers of the combine buffers.
pub const COMBINE_FULL_OFFSET: u32 = PULL_FULL_OFFSET + DISPATCH_WARPS * PULL_BUFFERS * MBARRIER_BYTES;
/// Bytes of dynamic shared memory of a CTA.
pub const SHARED_BYTES: u32 = COMBINE_FULL_OFFSET + CONSUMER_WARPS * COMBINE_BUFFERS * MBARRIER_BYTES;

/// Dynamic shared memory of a CTA on Hopper (CUDA programming guide, compute capability 9.0: 227 KB).
pub const SHARED_LIMIT: u32 = 227 * 1024;

const _: () = assert!(SHARED_BYTES <= SHARED_LIMIT);
const _: () = assert!(stage_bytes(TOKEN_TILES[0]).is_multiple_of(1024) && WEIGHT_STAGE_BYTES.is_multiple_of(1024));
const _: () = assert!(STAGING_OFFSET.is_multiple_of(1024) && STAGING_BYTES.is_multiple_of(1024));
const _: () = assert!(MAX_STAGES < 16 && stages(0) == MAX_STAGES);
const _: () = assert!(TASK_OFFSET.is_multiple_of(16) && STAGE_FULL_OFFSET.is_multiple_of(MBARRIER_BYTES));
const _: () = assert!(TASK_SLOTS.is_power_of_two() && UNANNOUNCED_TASKS.is_power_of_two());
const _: () = assert!(CONSUMER_WARPS * COMBINE_BUFFERS * COMBINE_BYTES <= PIPELINE_BYTES);
// The register file holds 64 Ki registers, and setmaxnreg takes multiples of 8 (PTX ISA 8.6, setmaxnreg).
const _: () = assert!(WARP * (CONSUMER_WARP * HELPER_REGISTERS + CONSUMER_WARPS * CONSUMER_REGISTERS) <= 65536);
const _: () = assert!(HELPER_REGISTERS.is_multiple_of(8) && CONSUMER_REGISTERS.is_multiple_of(8));
const _: () = assert!((CONSUMER_WARP * WARP).is_multiple_of(WARPGROUP));
