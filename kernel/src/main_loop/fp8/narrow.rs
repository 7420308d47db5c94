//! Few tokens: weights are A. The first two warpgroups have 64 of a tile's 128 weight rows each, the third none.

use super::super::activation::swiglu;
use super::super::linear2;
use super::{group, pass, weight_scales};
use crate::consumer::{Consumer, PAIR_BARRIER};
use crate::cta::Ring;
use crate::device::barrier::{bar_sync, bar_warp_sync};
use crate::device::convert::{bf16x2, fma};
use crate::device::matrix::{stmatrix_x1_trans, stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::{Accumulators, E4m3Product, MatrixDescriptor, wgmma_commit_group, wgmma_fence};
use crate::format::{FORMAT, WEIGHT_STAGE_BYTES};
use crate::task::Task;
use crate::tile::{K_BLOCK_BYTES, K_STEP_BYTES, WARPGROUP_ROWS};
use crate::warps::WARPGROUP;

/// Warpgroups that multiply.
const WARPGROUPS: u32 = 2;

/// 16-byte chunks of a row that one warpgroup makes of a tile: half of its weight rows are gates.
const TILE_CHUNKS: u32 = WARPGROUP_ROWS / 2 / 8;
/// Chunks of a row that one warpgroup stages.
const CHUNKS: u32 = TILE_CHUNKS * FORMAT.linear1_tiles;

/// A task with a token tile of `8 * QUADS` tokens.
#[inline(always)]
pub fn run<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, ring: &mut Ring)
where
    Accumulators<QUADS>: E4m3Product,
{
    if consumer.warpgroup >= WARPGROUPS {
        pass(consumer, task, ring);
        return;
    }
    let shape = &consumer.launch.params().shape;
    // A full stage means that the tile's rows are there.
    consumer.cta.stage_full(ring.slot).wait(ring.parity);
    consumer.load_rows::<QUADS>(task, 0);
    if !task.is_linear1() {
        let sums = multiply::<QUADS>(consumer, task, ring);
        let consumer = consumer.read_again();
        consumer.await_rows();
        consumer.sync();
        linear2::finish(consumer, task, &sums);
        return;
    }
    for tile in 0..task.weight_tiles(&FORMAT, shape) {
        let sums = multiply::<QUADS>(consumer, task, ring);
        let consumer = consumer.read_again();
        if tile == 0 {
            consumer.await_rows();
            consumer.sync();
        }
        let limit = consumer.launch.params().swiglu_limit;
        let activate = |quad: usize| {
            let [weight0, weight1] = consumer.row_weights(8 * quad as u32 + 2 * (consumer.lane % 4));
            let [gate0, gate1, up0, up1] = sums[quad];
            bf16x2(swiglu(gate0, up0, limit) * weight0, swiglu(gate1, up1, limit) * weight1)
        };
        let area = consumer.cta.staging(consumer.warpgroup);
        let chunk = tile * TILE_CHUNKS + consumer.warp;
        unroll!(PASS < QUADS.div_ceil(4), {
            // A chunk of each token is this warp's; lanes behind the last token give no address.
            let row = area.offset(group::staged(CHUNKS, PASS as u32 * 32 + consumer.lane, chunk));
            let quad = 4 * PASS;
            // SAFETY: the area holds every token's row, and this chunk of each is this warp's.
            unsafe {
                match QUADS {
                    1 => stmatrix_x1_trans(row, activate(quad)),
                    2 => stmatrix_x2_trans(row, [activate(quad), activate(quad + 1)]),
                    _ => stmatrix_x4_trans(
                        row,
                        [activate(quad), activate(quad + 1), activate(quad + 2), activate(quad + 3)],
                    ),
                }
            }
        });
    }
    let consumer = consumer.read_again();
    bar_sync::<PAIR_BARRIER, { WARPGROUPS * WARPGROUP }>();
    let thread = consumer.warpgroup * WARPGROUP + consumer.thread();
    // A tile's chunks, by turns: the first warpgroup's, then the second's.
    group::store::<QUADS>(consumer, task, (0, task.rows), (thread, WARPGROUPS * WARPGROUP), |row, chunk| {
        let (tile, of_tile) = (chunk / (WARPGROUPS * TILE_CHUNKS), chunk % (WARPGROUPS * TILE_CHUNKS));
        let area = consumer.cta.staging(of_tile / TILE_CHUNKS);
        area.offset(group::staged(CHUNKS, row, tile * TILE_CHUNKS + of_tile % TILE_CHUNKS))
    });
    // The areas are written again behind this.
    bar_sync::<PAIR_BARRIER, { WARPGROUPS * WARPGROUP }>();
}

/// The product of this warpgroup's 64 weight rows with the tile's tokens, over all k-blocks of a weight tile.
#[inline(always)]
fn multiply<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, ring: &mut Ring) -> Accumulators<QUADS>
where
    Accumulators<QUADS>: E4m3Product,
{
    let Consumer { cta, warpgroup, lane, .. } = consumer;
    mark!(consumer.launch, Multiply);
    let pipeline = cta.pipeline(task);
    // SAFETY: zeros are valid f32. An array expression would be built in local memory, and stay there.
    let mut sums: Accumulators<QUADS> = unsafe { core::mem::zeroed() };
    let first_row = warpgroup * WARPGROUP_ROWS * K_BLOCK_BYTES;
    let mut rest = FORMAT.k_blocks(task.columns(&consumer.launch.params().shape));
    while rest > 0 {
        rest -= 1;
        let stage = ring.slot;
        cta.stage_full(stage).wait(ring.parity);
        wgmma_fence();
        let weights = MatrixDescriptor::new(pipeline.weights(stage)).offset(first_row).uniform();
        let tokens = weights.offset(WEIGHT_STAGE_BYTES - first_row);
        // SAFETY: the stage is full, and released only after the group was waited for.
        let mut products = unsafe { Accumulators::<QUADS>::start_mma_async(weights, tokens) };
        unroll!(STEP < (K_BLOCK_BYTES / K_STEP_BYTES) as usize, {
            if STEP > 0 {
                let bytes = STEP as u32 * K_STEP_BYTES;
                // SAFETY: as above.
                unsafe { products.mma_async(weights.offset(bytes), tokens.offset(bytes)) };
            }
        });
        wgmma_commit_group();
        // Keeps ptxas from moving what follows between the products.
        bar_warp_sync();
        // SAFETY: the stage's scales have come with it.
        let [gate, up] = unsafe { weight_scales(cta, stage).load_v2() }.map(f32::from_bits);
        // SAFETY: zeros are valid f32.
        let mut scales: [[f32; 2]; QUADS] = unsafe { core::mem::zeroed() };
        unroll!(QUAD < QUADS, {
            let token = 8 * QUAD as u32 + 2 * (lane % 4);
            // SAFETY: as above.
            scales[QUAD] = unsafe { cta.scales(stage).offset(token * 4).load_v2() }.map(f32::from_bits);
        });
        products.wait();
        // All lanes have read the scales.
        bar_warp_sync();
        consumer.give_back(stage);
        unroll!(QUAD < QUADS, {
            let [first, second] = scales[QUAD];
            sums[QUAD][0] = fma(products[QUAD][0], first * gate, sums[QUAD][0]);
            sums[QUAD][1] = fma(products[QUAD][1], second * gate, sums[QUAD][1]);
            sums[QUAD][2] = fma(products[QUAD][2], first * up, sums[QUAD][2]);
            sums[QUAD][3] = fma(products[QUAD][3], second * up, sums[QUAD][3]);
        });
        ring.advance(pipeline.stages);
    }
    mark!(consumer.launch, Epilogue);
    sums
}
