//! The end of a linear 1 task: SwiGLU, routing weight, bf16, and into the intermediate pool.

use crate::device::address::SharedAddress;
use crate::device::convert::{bf16x2, ex2, max_nan, min_nan, rcp};
use crate::device::matrix::{stmatrix_x1_trans, stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::schedule::Task;
use crate::shared::WARPGROUP;
use crate::tile::WARPGROUP_ROWS;

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
pub fn finish<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, accumulators: &Accumulators<QUADS>) {
    let params = consumer.launch.params();
    let column = task.weight_row / 2 + consumer.warpgroup * COLUMNS;
    // The last CTA of a cluster may have no weight rows left.
    if column >= params.shape.intermediate {
        return;
    }
    let row_bytes = params.shape.intermediate * 2;
    let (token, chunk) = (consumer.thread() / LANES_PER_ROW, consumer.lane % LANES_PER_ROW);
    let at = (task.pool_row + token) as u64 * row_bytes as u64 + (column * 2 + chunk * 16) as u64;
    let mut row: *mut u8 = consumer.launch.workspace(params.workspace.intermediate, at);
    let stores = QUADS >= PASS_QUADS || token < 8 * QUADS as u32;
    let place = |pass: usize| {
        if pass > 0 {
            row = row.wrapping_add((TOKENS_PER_PASS * row_bytes) as usize);
        }
        (row, stores)
    };
    let stage = |pass, area| stage(consumer, pass, area, accumulators);
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
fn stage<const QUADS: usize>(
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

/// `silu(gate) * up`, with the optional clamp of both.
#[inline(always)]
fn swiglu(gate: f32, up: f32, limit: f32) -> f32 {
    // NaN stays NaN.
    let gate = min_nan(gate, limit);
    let up = max_nan(min_nan(up, limit), -limit);
    gate * rcp(1.0 + ex2(-gate * core::f32::consts::LOG2_E)) * up
}
