//! Many tokens: tokens are A, the 128 weight rows of a tile B. A warpgroup has 64 of the tile's tokens, and nothing to do with the others.

use super::super::activation::swiglu;
use super::{group, pass, weight_scales};
use crate::consumer::Consumer;
use crate::cta::Ring;
use crate::device::barrier::bar_warp_sync;
use crate::device::convert::{bf16x2, fma};
use crate::device::global::st_weak_v4;
use crate::device::matrix::stmatrix_x4;
use crate::device::wgmma::{Accumulators, E4m3Product, MatrixDescriptor, wgmma_commit_group, wgmma_fence};
use crate::format::{FORMAT, WEIGHT_STAGE_BYTES};
use crate::task::Task;
use crate::tile::{K_BLOCK_BYTES, K_STEP_BYTES, WEIGHT_TILE};
use crate::warps::WARPGROUP;

/// Tokens of a warpgroup.
const TOKENS: u32 = FORMAT.warpgroup_tokens;

/// Quads of a thread: for every eight weight rows two of token `lane / 4` of the warp's sixteen, then two of the token eight behind.
const QUADS: usize = WEIGHT_TILE as usize / 8;

/// Sums of a warpgroup.
type Sums = Accumulators<QUADS>;

/// 16-byte chunks of a staged row; in linear 2 a lane stores each.
const CHUNKS: u32 = WEIGHT_TILE * 2 / 16;
/// Rows that a warpgroup stores at once, and how often.
const PASS_ROWS: u32 = WARPGROUP / CHUNKS;
const PASSES: usize = (TOKENS / PASS_ROWS) as usize;

/// A task whose tile is wide.
#[inline(always)]
pub fn run(consumer: Consumer<'_>, task: &Task, ring: &mut Ring) {
    let first = consumer.warpgroup * TOKENS;
    if first >= FORMAT.tiles.width(task.width) {
        pass(consumer, task, ring);
        return;
    }
    let shape = &consumer.launch.params().shape;
    // A full stage means that the tile's rows are there.
    consumer.cta.stage_full(ring.slot).wait(ring.parity);
    consumer.load_rows::<{ TOKENS as usize / 8 }>(task, first);
    for tile in 0..task.weight_tiles(&FORMAT, shape) {
        let sums = multiply(consumer, task, ring);
        let consumer = consumer.read_again();
        if tile == 0 {
            consumer.await_rows();
            consumer.sync();
        }
        // Matrices: eight tokens by columns 0..8, the next eight by the same, then both by the next eight columns.
        let (area, row) = (consumer.cta.staging(consumer.warpgroup), 16 * consumer.warp + consumer.lane % 16);
        let place = |chunk: u32| area.offset(group::staged(CHUNKS, row, chunk + consumer.lane / 16));
        if task.is_linear1() {
            stage_activated(consumer, &sums, |chunk| place(8 * tile + chunk));
        } else {
            unroll!(PAIR < QUADS / 2, {
                let [a, b] = [sums[2 * PAIR], sums[2 * PAIR + 1]].map(|[a, b, c, d]| [bf16x2(a, b), bf16x2(c, d)]);
                // SAFETY: these chunks of these rows are this warp's.
                unsafe { stmatrix_x4(place(2 * PAIR as u32), [a[0], a[1], b[0], b[1]]) };
            });
        }
    }
    let consumer = consumer.read_again();
    let (area, first) = (consumer.cta.staging(consumer.warpgroup), consumer.warpgroup * TOKENS);
    let rows = TOKENS.min(task.rows.saturating_sub(first));
    consumer.sync();
    if task.is_linear1() {
        if rows > 0 {
            let place = |row: u32, chunk: u32| area.offset(group::staged(CHUNKS, row, chunk));
            group::store::<{ TOKENS as usize / 8 }>(
                consumer,
                task,
                (first, rows),
                (consumer.thread(), WARPGROUP),
                place,
            );
        }
    } else {
        store_results(consumer, task, rows);
        // The addresses are written again behind this.
        consumer.sync();
    }
}

/// Stages the 64 intermediate columns of a tile, as bf16: quads hold gates and ups by turns.
#[inline(always)]
fn stage_activated(consumer: Consumer<'_>, sums: &Sums, place: impl Fn(u32) -> crate::device::address::SharedAddress) {
    let limit = consumer.launch.params().swiglu_limit;
    let token = 16 * consumer.warp + consumer.lane / 4;
    let (weight0, weight1) = (consumer.row_weight(token), consumer.row_weight(token + 8));
    unroll!(PAIR < QUADS / 4, {
        let activate = |quad: usize| {
            let ([g0, g1, g2, g3], [u0, u1, u2, u3]) = (sums[quad], sums[quad + 1]);
            [
                bf16x2(swiglu(g0, u0, limit) * weight0, swiglu(g1, u1, limit) * weight0),
                bf16x2(swiglu(g2, u2, limit) * weight1, swiglu(g3, u3, limit) * weight1),
            ]
        };
        let ([a, b], [c, d]) = (activate(4 * PAIR), activate(4 * PAIR + 2));
        // SAFETY: these chunks of these rows are this warp's.
        unsafe { stmatrix_x4(place(2 * PAIR as u32), [a, b, c, d]) };
    });
}

/// Stores the staged rows of linear 2 to where their tokens are.
#[inline(always)]
fn store_results(consumer: Consumer<'_>, task: &Task, rows: u32) {
    let area = consumer.cta.staging(consumer.warpgroup);
    let (chunk, first) = (consumer.thread() % CHUNKS, consumer.thread() / CHUNKS);
    let column = task.weight_row + chunk * 8;
    let exists = column < consumer.launch.params().shape.hidden;
    // All are loaded before the first is stored.
    // SAFETY: zeros are valid.
    let (mut results, mut places): ([[u32; 4]; PASSES], [u64; PASSES]) = unsafe { core::mem::zeroed() };
    unroll!(PASS < PASSES, {
        let row = first + PASS as u32 * PASS_ROWS;
        // SAFETY: the row is staged, or holds what no token has.
        results[PASS] = unsafe { area.offset(group::staged(CHUNKS, row, chunk)).load_v4() };
        places[PASS] = consumer.result_row(row) + column as u64 * 2;
    });
    unroll!(PASS < PASSES, {
        if exists && first + PASS as u32 * PASS_ROWS < rows {
            // SAFETY: the token's rank has a place for this row, and it has no other writer.
            unsafe { st_weak_v4(places[PASS] as *mut u8, results[PASS]) };
        }
    });
}

/// The product of this warpgroup's 64 tokens with a weight tile, over all k-blocks.
#[inline(always)]
fn multiply(consumer: Consumer<'_>, task: &Task, ring: &mut Ring) -> Sums {
    let Consumer { cta, warpgroup, warp, lane, .. } = consumer;
    mark!(consumer.launch, Multiply);
    let pipeline = cta.wide_pipeline();
    // SAFETY: zeros are valid f32. An array expression would be built in local memory, and stay there.
    let mut sums: Sums = unsafe { core::mem::zeroed() };
    // The one register that says which tokens are this thread's.
    let own = (TOKENS * warpgroup + 16 * warp + lane / 4) * 4;
    let mut rest = FORMAT.k_blocks(task.columns(&consumer.launch.params().shape));
    while rest > 0 {
        rest -= 1;
        let stage = ring.slot;
        cta.stage_full(stage).wait(ring.parity);
        wgmma_fence();
        let weights = MatrixDescriptor::new(pipeline.weights(stage)).uniform();
        let tokens = weights.offset(WEIGHT_STAGE_BYTES + own / (TOKENS * 4) * (TOKENS * K_BLOCK_BYTES));
        // SAFETY: the stage is full, and released only after the group was waited for.
        let mut products = unsafe { Sums::start_mma_async(tokens, weights) };
        unroll!(STEP < (K_BLOCK_BYTES / K_STEP_BYTES) as usize, {
            if STEP > 0 {
                let bytes = STEP as u32 * K_STEP_BYTES;
                // SAFETY: as above.
                unsafe { products.mma_async(tokens.offset(bytes), weights.offset(bytes)) };
            }
        });
        wgmma_commit_group();
        // Keeps ptxas from moving what follows between the products.
        bar_warp_sync();
        // SAFETY: the stage's scales have come with it.
        let ([gate, up], first, second) = unsafe {
            let own = cta.scales(stage).offset(own);
            (weight_scales(cta, stage).load_v2().map(f32::from_bits), own.load_u32(), own.offset(32).load_u32())
        };
        let (first, second) = (f32::from_bits(first), f32::from_bits(second));
        let scales = [[first * gate, second * gate], [first * up, second * up]];
        products.wait();
        // All lanes have read the scales.
        bar_warp_sync();
        consumer.give_back(stage);
        unroll!(QUAD < QUADS, {
            let [first, second] = scales[QUAD % 2];
            sums[QUAD][0] = fma(products[QUAD][0], first, sums[QUAD][0]);
            sums[QUAD][1] = fma(products[QUAD][1], first, sums[QUAD][1]);
            sums[QUAD][2] = fma(products[QUAD][2], second, sums[QUAD][2]);
            sums[QUAD][3] = fma(products[QUAD][3], second, sums[QUAD][3]);
        });
        ring.advance(pipeline.stages);
    }
    mark!(consumer.launch, Epilogue);
    sums
}
