//! The end of a linear 1 task: SwiGLU, routing weight, bf16, and into the intermediate pool.

use crate::device::atomic::red_add_release_gpu;
use crate::device::bulk::{bulk_commit_group, bulk_wait_group, bulk_wait_group_read, tensor_store_2d};
use crate::device::convert::{bf16x2, ex2, rcp};
use crate::device::fence::fence_proxy_async;
use crate::device::matrix::{stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::params::TensorMap;
use crate::roles::consume::Consumer;
use crate::schedule::Task;
use crate::shared::LINEAR1_STAGING_TOKENS;

/// Intermediate columns that one warpgroup makes: half of its 64 rows are gates.
const COLUMNS: u32 = 32;

/// Quads that are staged at once.
const STAGED_QUADS: usize = LINEAR1_STAGING_TOKENS as usize / 8;

/// Finishes a task. A quad holds, for two tokens, the gates (first two values) and ups of one intermediate column.
#[inline(always)]
pub fn finish<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, accumulators: &Accumulators<QUADS>) {
    unroll!(CHUNK < QUADS.div_ceil(STAGED_QUADS), {
        // The metas are in place, and the staging buffer's last store has been read.
        consumer.sync();
        stage::<QUADS, CHUNK>(consumer, accumulators);
        // The rows were written by ordinary stores, and will be read by a bulk copy.
        fence_proxy_async();
        consumer.sync();
        if consumer.thread() == 0 {
            store(consumer, task, CHUNK as u32 * LINEAR1_STAGING_TOKENS);
        }
    });
    if consumer.thread() == 0 {
        count(consumer, task);
    }
}

/// Activates and transposes one chunk of the accumulators into rows of 32 columns a token, 64-byte swizzle.
#[inline(always)]
fn stage<const QUADS: usize, const CHUNK: usize>(consumer: Consumer<'_>, accumulators: &Accumulators<QUADS>) {
    let limit = consumer.launch.params().swiglu_limit;
    let activate = |quad: usize| {
        let token = 8 * quad as u32 + 2 * (consumer.lane % 4);
        let [gate0, gate1, up0, up1] = accumulators[quad];
        bf16x2(
            swiglu(gate0, up0, limit) * consumer.row_meta(token).weight,
            swiglu(gate1, up1, limit) * consumer.row_meta(token + 1).weight,
        )
    };
    let staging = consumer.cta.staging(consumer.warpgroup);
    // 16 of a row's 64 bytes are this warp's.
    let address = |token: u32| staging.offset(token * 64 + ((consumer.warp ^ (token >> 1 & 3)) * 16));
    if QUADS == 2 {
        // SAFETY: the staging buffer holds every token's row, and these 16 bytes are this warp's.
        unsafe { stmatrix_x2_trans(address(consumer.lane % 16), [activate(0), activate(1)]) };
        return;
    }
    unroll!(GROUP < 4, {
        let quad = CHUNK * STAGED_QUADS + 4 * GROUP;
        if quad < QUADS {
            let columns = [activate(quad), activate(quad + 1), activate(quad + 2), activate(quad + 3)];
            // SAFETY: as above.
            unsafe { stmatrix_x4_trans(address(32 * GROUP as u32 + consumer.lane), columns) };
        }
    });
}

/// `silu(gate) * up`, with the optional clamp of both.
#[inline(always)]
fn swiglu(gate: f32, up: f32, limit: f32) -> f32 {
    // Comparisons, unlike min and max, let NaN through.
    let gate = if gate > limit { limit } else { gate };
    let up = if up > limit { limit } else { up };
    let up = if up < -limit { -limit } else { up };
    gate * rcp(1.0 + ex2(-gate * core::f32::consts::LOG2_E)) * up
}

/// Stores the staged columns of the tokens from `first_token` on.
#[inline(always)]
fn store(consumer: Consumer<'_>, task: &Task, first_token: u32) {
    let params = consumer.launch.params();
    let map = (&raw const params.maps.activation).cast::<TensorMap>().wrapping_add(task.width as usize);
    let column = task.weight_row / 2 + consumer.warpgroup * COLUMNS;
    let staging = consumer.cta.staging(consumer.warpgroup);
    // SAFETY: the box lies in the tile's padded rows, which are this expert's; the staging buffer is rewritten after the wait.
    unsafe { tensor_store_2d(map, [column, task.pool_row + first_token], staging) };
    bulk_commit_group();
    bulk_wait_group_read::<0>();
}

/// Counts the stored columns of the tile.
#[inline(always)]
fn count(consumer: Consumer<'_>, task: &Task) {
    bulk_wait_group::<0>();
    // Written, and to be read, by bulk copies; the release is an ordinary one.
    fence_proxy_async();
    let counters = &consumer.launch.params().workspace.counter;
    // SAFETY: a counter of this launch.
    unsafe { red_add_release_gpu(consumer.launch.counter(counters.columns_ready, task.tile), 1) };
}
