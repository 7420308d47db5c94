//! The end of a linear 2 task whose A operand were weights: bf16 rows straight into the combine buffers of the ranks that own the tokens.

use crate::consumer::Consumer;
use crate::device::address::SharedAddress;
use crate::device::convert::bf16x2;
use crate::device::matrix::{stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::task::Task;
use crate::tile::WARPGROUP_ROWS;
use crate::warps::WARPGROUP;

/// Lanes that store one token's 128 bytes, 16 each.
const LANES_PER_ROW: u32 = WARPGROUP_ROWS * 2 / 16;

/// Tokens that a warpgroup stores in a pass: two quads.
const TOKENS_PER_PASS: u32 = WARPGROUP / LANES_PER_ROW;

const _: () = assert!(TOKENS_PER_PASS == 16);

/// Finishes a task. A quad holds, for two tokens, two hidden columns eight apart.
#[inline(always)]
pub fn finish<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, accumulators: &Accumulators<QUADS>) {
    let column = task.weight_row + consumer.warpgroup * WARPGROUP_ROWS;
    // The second half of the last block lies outside when the hidden size is an odd multiple of 64.
    if column >= consumer.launch.params().shape.hidden {
        return;
    }
    let (token, chunk) = (consumer.thread() / LANES_PER_ROW, consumer.lane % LANES_PER_ROW);
    let staged_token = token % (8 * QUADS.min(2) as u32);
    let at = (column * 2 + chunk * 16) as u64;
    let place = |pass: usize| {
        let first = pass as u32 * TOKENS_PER_PASS;
        ((consumer.result_row(first + staged_token) + at) as *mut u8, first + token < task.rows)
    };
    let stage = |pass, area| stage(consumer, pass, area, accumulators);
    consumer.store_passes(QUADS.div_ceil(2), staged(staged_token, chunk), stage, place);
}

/// Where a pass has one of the eight 16-byte chunks of a token: rows of 128 bytes, 128-byte swizzle.
#[inline(always)]
fn staged(token: u32, chunk: u32) -> u32 {
    token * WARPGROUP_ROWS * 2 + (chunk ^ (token % 8)) * 16
}

/// Transposes the accumulators of a pass.
#[inline(always)]
fn stage<const QUADS: usize>(
    consumer: Consumer<'_>,
    pass: usize,
    area: SharedAddress,
    accumulators: &Accumulators<QUADS>,
) {
    let lane = consumer.lane;
    let pack = |quad: usize| {
        let [a0, a1, b0, b1] = accumulators[quad];
        [bf16x2(a0, a1), bf16x2(b0, b1)]
    };
    // Matrices: eight tokens by columns 0..8, the same by 8..16, then the next eight tokens.
    let row = area.offset(staged(lane / 16 * 8 + lane % 8, 2 * consumer.warp + lane / 8 % 2));
    let [first, second] = pack(2 * pass);
    // SAFETY: the area holds every token's row, and these two chunks of each are this warp's. With one quad, lanes from 16 on give no address.
    unsafe {
        if QUADS == 1 {
            stmatrix_x2_trans(row, [first, second]);
        } else {
            let [third, fourth] = pack(2 * pass + 1);
            stmatrix_x4_trans(row, [first, second, third, fourth]);
        }
    }
}
