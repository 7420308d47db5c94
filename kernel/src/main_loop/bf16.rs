//! Everything in bf16: weights are A, tokens B, and accumulators sum over all k-blocks. A warpgroup has 64 of a task's 128 weight rows.

use super::activation::swiglu;
use super::{MainLoop, linear2};
use crate::consumer::Consumer;
use crate::cta::{Cta, Pipeline, Ring};
use crate::device::address::SharedAddress;
use crate::device::cluster::cluster_ctas;
use crate::device::convert::bf16x2;
use crate::device::global::ld_weak_u64;
use crate::device::matrix::{stmatrix_x1_trans, stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::mbarrier::ClusterMbarrier;
use crate::device::wgmma::{
    Accumulators, Bf16Product, MatrixDescriptor, wgmma_commit_group, wgmma_fence, wgmma_wait_group,
};
use crate::format::{FORMAT, WEIGHT_STAGE_BYTES};
use crate::launch::Launch;
use crate::task::{Block, Task};
use crate::tile::{K_BLOCK_BYTES, K_STEP_BYTES, WARPGROUP_ROWS};
use crate::warps::WARPGROUP;

/// The main loop of bf16.
pub struct Bf16;

impl MainLoop for Bf16 {
    type Scales = ();

    #[inline(always)]
    fn quantise(_: &Launch, _: u32) {}

    #[inline(always)]
    fn rows_there(launch: &Launch, task: &Task) -> bool {
        launch.are_pulled(task)
    }

    #[inline(always)]
    fn wait_for_records(_: &Launch, _: bool, _: u32) {}

    /// Other ranks read the hidden states themselves.
    #[inline(always)]
    fn token(launch: &Launch, source: u32, token: u32) -> u64 {
        let params = launch.params();
        let at = token as u64 * launch.row_bytes() as u64;
        if source == params.rank {
            return launch.hidden_states() + at;
        }
        // SAFETY: the source has written the distance before its counts.
        let distance = unsafe { ld_weak_u64(launch.hidden_distance(params.rank, source)) };
        launch.symmetric_base(source).wrapping_add(distance) + at
    }

    #[inline(always)]
    fn store_scales(_: &Launch, _: SharedAddress, _: u32, _: u32, _: u32) {}

    #[inline(always)]
    fn scales(_: &Launch, _: &Task) {}

    #[inline(always)]
    fn scale_bytes(_: u32) -> u32 {
        0
    }

    #[inline(always)]
    fn load_weight_scales(_: &(), _: Cta, _: u32, _: Block) {}

    #[inline(always)]
    fn load_token_scales(_: &(), _: Cta, _: &Task, _: u32, _: Block) {}

    #[inline(always)]
    fn run(consumer: Consumer<'_>, task: &Task, ring: &mut Ring) {
        match task.width {
            0 => run::<1>(consumer, task, ring),
            1 => run::<2>(consumer, task, ring),
            2 => run::<4>(consumer, task, ring),
            3 => run::<8>(consumer, task, ring),
            4 => run::<12>(consumer, task, ring),
            5 => run::<16>(consumer, task, ring),
            6 => run::<20>(consumer, task, ring),
            7 => run::<24>(consumer, task, ring),
            8 => run::<28>(consumer, task, ring),
            _ => run::<32>(consumer, task, ring),
        }
    }
}

/// A task with a token tile of `8 * QUADS` tokens.
#[inline(always)]
fn run<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, ring: &mut Ring)
where
    Accumulators<QUADS>: Bf16Product,
{
    let shape = &consumer.launch.params().shape;
    // A full stage means that the tile's rows are there.
    consumer.cta.stage_full(ring.slot).wait(ring.parity);
    consumer.load_rows::<QUADS>(task, 0);
    let k_blocks = FORMAT.k_blocks(task.columns(shape));
    let accumulators = multiply::<QUADS>(consumer, consumer.cta.pipeline(task), k_blocks, ring);
    consumer.await_rows();
    consumer.sync();
    if task.is_linear1() {
        finish_linear1(consumer, task, &accumulators);
    } else {
        linear2::finish(consumer, task, &accumulators);
    }
}

/// The product of this warpgroup's 64 weight rows with the tile's tokens. One stage's products stay in flight while the next are issued.
#[inline(always)]
fn multiply<const QUADS: usize>(
    consumer: Consumer<'_>,
    pipeline: Pipeline,
    k_blocks: u32,
    ring: &mut Ring,
) -> Accumulators<QUADS>
where
    Accumulators<QUADS>: Bf16Product,
{
    let Consumer { cta, warpgroup, lane, .. } = consumer;
    mark!(consumer.launch, Multiply);
    // SAFETY: zeros are valid f32. An array expression would be built in local memory, and stay there.
    let mut accumulators: Accumulators<QUADS> = unsafe { core::mem::zeroed() };
    // Every producer of the cluster writes to a stage: a lane for each gives it back.
    let (releases, stage_empty) = (lane < cluster_ctas(), cta.stage_empty(0).of(lane.min(cluster_ctas() - 1)));
    let first_row = warpgroup * (WEIGHT_STAGE_BYTES / 2);
    let mut previous: Option<ClusterMbarrier> = None;
    let mut rest = k_blocks;
    while rest > 0 {
        // Up to the ring's end a stage, and its barriers, lie behind those of the one before.
        let stages = rest.min(pipeline.stages - ring.slot);
        rest -= stages;
        let mut next = MatrixDescriptor::new(pipeline.weights(ring.slot)).offset(first_row);
        let (mut full, mut empty) = (cta.stage_full(ring.slot), stage_empty.offset(ring.slot));
        let end = full.offset(stages);
        while full != end {
            full.wait(ring.parity);
            wgmma_fence();
            let weights = next.uniform();
            let tokens = weights.offset(WEIGHT_STAGE_BYTES - first_row);
            unroll!(STEP < (K_BLOCK_BYTES / K_STEP_BYTES) as usize, {
                let bytes = STEP as u32 * K_STEP_BYTES;
                // SAFETY: the stage is full, and released only after the group was waited for.
                unsafe { accumulators.mma_async(weights.offset(bytes), tokens.offset(bytes)) };
            });
            wgmma_commit_group();
            wgmma_wait_group::<1>();
            // No lane waits for the others: each has waited for the products of the whole warp.
            if releases && let Some(stage) = previous {
                stage.arrive();
            }
            previous = Some(empty);
            (full, empty) = (full.offset(1), empty.offset(1));
            next = next.offset(pipeline.stage_bytes);
        }
        ring.slot += stages;
        ring.wrap(pipeline.stages);
    }
    wgmma_wait_group::<0>();
    let last = if ring.slot == 0 { pipeline.stages } else { ring.slot } - 1;
    if releases {
        stage_empty.offset(last).arrive();
    }
    mark!(consumer.launch, Epilogue);
    accumulators
}

/// Intermediate columns that one warpgroup makes: half of its rows are gates.
const COLUMNS: u32 = WARPGROUP_ROWS / 2;

/// Lanes that store one token's 64 bytes, 16 each.
const LANES_PER_ROW: u32 = COLUMNS * 2 / 16;

/// Tokens that a warpgroup stores in a pass.
const TOKENS_PER_PASS: u32 = WARPGROUP / LANES_PER_ROW;

/// Quads of a pass.
const PASS_QUADS: usize = TOKENS_PER_PASS as usize / 8;

/// Finishes a task. A quad holds, for two tokens, the gates (first two values) and ups of one intermediate column. All rows of the tile are stored:
/// those behind the last token are this expert's too, and what they hold reaches no other row.
#[inline(always)]
fn finish_linear1<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, accumulators: &Accumulators<QUADS>) {
    let params = consumer.launch.params();
    let column = task.weight_row / 2 + consumer.warpgroup * COLUMNS;
    // The last CTA of a cluster may have no weight rows left.
    if column >= params.shape.intermediate {
        return;
    }
    let row_bytes = params.shape.intermediate * 2;
    let (token, chunk) = (consumer.thread() / LANES_PER_ROW, consumer.lane % LANES_PER_ROW);
    let first =
        consumer.launch.pool_row(params.workspace.intermediate, params.shape.intermediate, task.pool_row + token);
    let mut row = first.wrapping_add((column * 2 + chunk * 16) as usize);
    let stores = QUADS >= PASS_QUADS || token < 8 * QUADS as u32;
    let place = |pass: usize| {
        if pass > 0 {
            row = row.wrapping_add((TOKENS_PER_PASS * row_bytes) as usize);
        }
        (row, stores)
    };
    let stage = |pass, area| stage_activated(consumer, pass, area, accumulators);
    let source = staged(token % (8 * QUADS.min(PASS_QUADS) as u32), chunk);
    consumer.store_passes(QUADS.div_ceil(PASS_QUADS), source, stage, place);
}

/// Where a pass has one of the four 16-byte chunks of a token: rows of 64 bytes, 64-byte swizzle.
#[inline(always)]
fn staged(token: u32, chunk: u32) -> u32 {
    token * COLUMNS * 2 + (chunk ^ (token >> 1 & 3)) * 16
}

/// Activates and transposes the accumulators of a pass.
#[inline(always)]
fn stage_activated<const QUADS: usize>(
    consumer: Consumer<'_>,
    pass: usize,
    area: SharedAddress,
    accumulators: &Accumulators<QUADS>,
) {
    let limit = consumer.launch.params().swiglu_limit;
    let activate = |quad: usize| {
        let quad = pass * PASS_QUADS + quad;
        let [weight0, weight1] = consumer.row_weights(8 * quad as u32 + 2 * (consumer.lane % 4));
        let [gate0, gate1, up0, up1] = accumulators[quad];
        bf16x2(swiglu(gate0, up0, limit) * weight0, swiglu(gate1, up1, limit) * weight1)
    };
    // A chunk of each token is this warp's; lanes behind the last token give no address.
    let row = area.offset(staged(consumer.lane, consumer.warp));
    // SAFETY: the area holds every token's row, and this chunk of each is this warp's.
    unsafe {
        match QUADS {
            1 => stmatrix_x1_trans(row, activate(0)),
            2 => stmatrix_x2_trans(row, [activate(0), activate(1)]),
            _ => stmatrix_x4_trans(row, [activate(0), activate(1), activate(2), activate(3)]),
        }
    }
}
