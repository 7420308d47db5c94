//! The end of a linear 1 task: SwiGLU, routing weight, bf16, and into the intermediate pool.

use crate::device::address::SharedAddress;
use crate::device::convert::{bf16x2, ex2, max_nan, min_nan, rcp};
use crate::device::global::st_weak_v4;
use crate::device::matrix::{stmatrix_x1_trans, stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::schedule::Task;
use crate::shared::{PASS_BYTES, STAGED_PASSES, WARPGROUP};
use crate::tile::WARPGROUP_ROWS;

/// Intermediate columns that one warpgroup makes: half of its rows are gates.
const COLUMNS: u32 = WARPGROUP_ROWS / 2;

/// Lanes that write one token's 64 bytes, 16 each.
const LANES_PER_ROW: u32 = COLUMNS * 2 / 16;

/// Tokens that a warpgroup writes in a pass.
const TOKENS_PER_PASS: u32 = WARPGROUP / LANES_PER_ROW;

/// Quads of a pass.
const PASS_QUADS: usize = TOKENS_PER_PASS as usize / 8;

/// Finishes a task. A quad holds, for two tokens, the gates (first two values) and ups of one intermediate column. All rows of the tile are
/// written, for linear 2 loads whole tiles: those behind the last token are this expert's too.
#[inline(always)]
pub fn finish<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, accumulators: &Accumulators<QUADS>) {
    let params = consumer.launch.params();
    let row_bytes = params.shape.intermediate * 2;
    let column = task.weight_row / 2 + consumer.warpgroup * COLUMNS;
    // The last CTA of a cluster may have no weight rows left.
    if column >= params.shape.intermediate {
        return;
    }
    let staging = consumer.cta.staging(consumer.warpgroup);
    let (token, chunk) = (consumer.thread() / LANES_PER_ROW, consumer.lane % LANES_PER_ROW);
    let source = staged(staging, token, chunk);
    let at = (task.pool_row + token) as u64 * row_bytes as u64 + (column * 2 + chunk * 16) as u64;
    let mut row: *mut u8 = consumer.launch.workspace(params.workspace.intermediate, at);
    // 16 of a row's 64 bytes are a warp's. The address is that of the first pass.
    let place = staged(staging, consumer.lane % (8 * QUADS as u32), consumer.warp);
    let passes = QUADS.div_ceil(PASS_QUADS);
    // A pass is on its way while the one that lies half of the buffer behind it is staged.
    unroll!(STEP < passes + STAGED_PASSES / 2, {
        let sent = STEP.wrapping_sub(STAGED_PASSES / 2);
        if 0 < sent && sent < passes {
            row = row.wrapping_add((TOKENS_PER_PASS * row_bytes) as usize);
        }
        let sends = sent < passes && token < 8 * QUADS as u32;
        // SAFETY: the row was staged before the last barrier, and is written again behind the next.
        let columns = if sends { unsafe { source.offset(area(sent)).load_v4() } } else { [0; 4] };
        if STEP < passes {
            stage::<QUADS, STEP>(consumer, place.offset(area(STEP)), accumulators);
        }
        if sends {
            // SAFETY: the pool has all rows of the tile, and these 16 bytes of one have no other writer.
            unsafe { st_weak_v4(row, columns) };
        }
        if STEP < passes && (STEP % 2 == 1 || STEP + 1 == passes) {
            consumer.sync();
        }
    });
}

/// Where the staging buffer has a token's 16 bytes of a number, in rows of 64 bytes with the 64-byte swizzle: neither rows nor columns of eight meet in a bank.
#[inline(always)]
fn staged(staging: SharedAddress, token: u32, chunk: u32) -> SharedAddress {
    staging.offset(token * COLUMNS * 2 + (chunk ^ (token >> 1 & 3)) * 16)
}

/// Where a pass is staged.
#[inline(always)]
fn area(pass: usize) -> u32 {
    (pass % STAGED_PASSES) as u32 * PASS_BYTES
}

/// Activates and transposes the accumulators of one pass. `place` is the lane's row.
#[inline(always)]
fn stage<const QUADS: usize, const PASS: usize>(
    consumer: Consumer<'_>,
    place: SharedAddress,
    accumulators: &Accumulators<QUADS>,
) {
    let limit = consumer.launch.params().swiglu_limit;
    let activate = |quad: usize| {
        let quad = PASS * PASS_QUADS + quad;
        let [weight0, weight1] = consumer.row_weights(8 * quad as u32 + 2 * (consumer.lane % 4));
        let [gate0, gate1, up0, up1] = accumulators[quad];
        bf16x2(swiglu(gate0, up0, limit) * weight0, swiglu(gate1, up1, limit) * weight1)
    };
    if QUADS == 1 {
        // SAFETY: the staging buffer holds every token's row, and these 16 bytes are this warp's.
        unsafe { stmatrix_x1_trans(place, activate(0)) };
    } else if QUADS == 2 {
        // SAFETY: as above.
        unsafe { stmatrix_x2_trans(place, [activate(0), activate(1)]) };
    } else {
        // SAFETY: as above.
        unsafe { stmatrix_x4_trans(place, [activate(0), activate(1), activate(2), activate(3)]) };
    }
}

/// `silu(gate) * up`, with the optional clamp of both.
#[inline(always)]
fn swiglu(gate: f32, up: f32, limit: f32) -> f32 {
    // NaN stays NaN.
    let gate = min_nan(gate, limit);
    let up = max_nan(min_nan(up, limit), -limit);
    gate * rcp(1.0 + ex2(-gate * core::f32::consts::LOG2_E)) * up
}
