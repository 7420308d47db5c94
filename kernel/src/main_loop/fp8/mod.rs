//! Weights, tokens and intermediate in e4m3. Every k-block has as many columns as share a scale: its products are summed by the tensor cores from 0, and
//! promoted: multiplied with both scales, and added in f32 (by one FMA, so that a result does not depend on which operand is A).
//!
//! With few tokens weights are A, as in bf16 ([`narrow`]). With many, tokens are A ([`wide`]): then a thread has two tokens, and so two scales of tokens, where
//! otherwise it would have one for every pair of accumulators.

mod group;
mod narrow;
mod record;
mod wide;

use super::MainLoop;
use crate::consumer::Consumer;
use crate::cta::{Cta, Ring};
use crate::device::address::SharedAddress;
use crate::device::bulk::bulk_load;
use crate::format::{FORMAT, WEIGHT_SCALES_BYTES};
use crate::launch::Launch;
use crate::quantise::{GROUP, groups};
use crate::task::{Block, Task};
use crate::tile::WEIGHT_TILE;

const _: () = assert!(FORMAT.k_block() == GROUP);

/// The main loop of e4m3.
pub struct Fp8;

/// Where a task's scales are in device memory.
pub struct Scales {
    /// Those of its first weight tile.
    weights: *const u8,
    /// Those of its first row's first group.
    tokens: *const u8,
    /// From a group of a row to the next, in bytes.
    group_bytes: u64,
    /// K-blocks of a weight tile.
    k_blocks: u32,
}

impl MainLoop for Fp8 {
    type Scales = Scales;

    #[inline(always)]
    fn quantise(launch: &Launch, lane: u32) {
        record::write(launch, lane);
    }

    #[inline(always)]
    fn rows_there(launch: &Launch, task: &Task) -> bool {
        if task.expert < launch.params().shape.shared_experts {
            record::all_written(launch)
        } else {
            launch.are_pulled(task)
        }
    }

    #[inline(always)]
    fn wait_for_records(launch: &Launch, waits: bool, source: u32) {
        record::wait(launch, waits, source);
    }

    #[inline(always)]
    fn token(launch: &Launch, source: u32, token: u32) -> u64 {
        record::address(launch, source, token) as u64
    }

    #[inline(always)]
    fn store_scales(launch: &Launch, piece: SharedAddress, at: u32, bytes: u32, pool_row: u32) {
        record::store_scales(launch, piece, at, bytes, pool_row);
    }

    #[inline(always)]
    fn scales(launch: &Launch, task: &Task) -> Scales {
        let params = launch.params();
        let (shape, workspace) = (&params.shape, &params.workspace);
        let (weights, rows, tokens) = if task.is_linear1() {
            (params.linear1_scales, 2 * shape.intermediate, workspace.token_scales)
        } else {
            (params.linear2_scales, shape.hidden, workspace.intermediate_scales)
        };
        let k_blocks = groups(task.columns(shape));
        let tile = task.expert * rows.div_ceil(WEIGHT_TILE) + task.weight_row / WEIGHT_TILE;
        let first = tile as u64 * (k_blocks * WEIGHT_SCALES_BYTES) as u64;
        Scales {
            weights: (weights + first) as *const u8,
            tokens: launch.workspace(tokens, task.pool_row as u64 * 4),
            group_bytes: workspace.pool_rows * 4,
            k_blocks,
        }
    }

    #[inline(always)]
    fn scale_bytes(width: u32) -> u32 {
        width * 4 + WEIGHT_SCALES_BYTES
    }

    #[inline(always)]
    fn load_weight_scales(scales: &Scales, cta: Cta, stage: u32, at: Block) {
        let block = at.tile * scales.k_blocks + at.k_block;
        let source = scales.weights.wrapping_add((block * WEIGHT_SCALES_BYTES) as usize);
        // SAFETY: the weights' scales have a place for every block; the stage is free, and its barrier expects these bytes.
        unsafe { bulk_load(weight_scales(cta, stage), source, WEIGHT_SCALES_BYTES, cta.stage_full(stage)) };
    }

    #[inline(always)]
    fn load_token_scales(scales: &Scales, cta: Cta, task: &Task, stage: u32, at: Block) {
        let source = scales.tokens.wrapping_add(at.k_block as usize * scales.group_bytes as usize);
        let bytes = FORMAT.tiles.width(task.width) * 4;
        // SAFETY: the tile lies in the pool, whose first rows of experts are multiples of 8; as above.
        unsafe { bulk_load(cta.scales(stage), source, bytes, cta.stage_full(stage)) };
    }

    #[inline(always)]
    fn run(consumer: Consumer<'_>, task: &Task, ring: &mut Ring) {
        match task.width {
            0 => narrow::run::<1>(consumer, task, ring),
            1 => narrow::run::<2>(consumer, task, ring),
            2 => narrow::run::<4>(consumer, task, ring),
            3 => narrow::run::<8>(consumer, task, ring),
            _ => wide::run(consumer, task, ring),
        }
    }
}

/// The scales of a stage's weight tile: of gate rows, then of up rows; in linear 2 the same twice.
#[inline(always)]
fn weight_scales(cta: Cta, stage: u32) -> SharedAddress {
    cta.scales(stage).offset(FORMAT.tiles.widest() * 4)
}

/// Gives all of a task's stages back: this warpgroup has no part of it.
#[inline(always)]
fn pass(consumer: Consumer<'_>, task: &Task, ring: &mut Ring) {
    let shape = &consumer.launch.params().shape;
    let stages = consumer.cta.pipeline(task).stages;
    for _ in 0..task.weight_tiles(&FORMAT, shape) * FORMAT.k_blocks(task.columns(shape)) {
        consumer.pass_stage(*ring);
        ring.advance(stages);
    }
}
