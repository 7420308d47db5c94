//! The end of a linear 2 task: bf16 rows straight into the combine buffers of the ranks that own the tokens.

use crate::cta::Ring;
use crate::device::address::SharedAddress;
use crate::device::convert::bf16x2;
use crate::device::global::st_weak_v4;
use crate::device::matrix::{stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::schedule::Task;
use crate::shared::{LINEAR2_STAGING_TOKENS, STAGING_BUFFERS, WARPGROUP};
use crate::tile::WARPGROUP_ROWS;

/// Lanes that write one token's 128 bytes, 16 each.
const LANES_PER_ROW: u32 = 8;

/// Tokens that a warpgroup writes at once.
const TOKENS_PER_PASS: u32 = WARPGROUP / LANES_PER_ROW;

/// Quads that are staged at once.
const STAGED_QUADS: usize = LINEAR2_STAGING_TOKENS as usize / 8;

// A buffer is written again two chunks later, when every warp has passed the barrier between, and so has sent what was in it.
const _: () = assert!(STAGING_BUFFERS == 2);

/// Finishes a task; all staging buffers are taken. A quad holds, for two tokens, two hidden columns eight apart.
#[inline(always)]
pub fn finish<const QUADS: usize>(
    consumer: Consumer<'_>,
    task: &Task,
    staging: &mut Ring,
    accumulators: &Accumulators<QUADS>,
) {
    let column = task.weight_row + consumer.warpgroup * WARPGROUP_ROWS;
    // The second half of the last block lies outside when the hidden size is an odd multiple of 64.
    let rows = if column < consumer.launch.params().shape.hidden { task.rows } else { 0 };
    unroll!(CHUNK < QUADS.div_ceil(STAGED_QUADS), {
        let first_token = CHUNK as u32 * LINEAR2_STAGING_TOKENS;
        if first_token < rows {
            let buffer = consumer.cta.staging(consumer.warpgroup, CHUNK as u32 % STAGING_BUFFERS);
            stage::<QUADS, CHUNK>(consumer, buffer, accumulators);
            consumer.sync();
            send(consumer, buffer, column, first_token, rows);
        }
    });
    consumer.hand_over(staging);
}

/// Transposes one chunk of the accumulators into rows of 64 columns a token, 128-byte swizzle.
#[inline(always)]
fn stage<const QUADS: usize, const CHUNK: usize>(
    consumer: Consumer<'_>,
    staging: SharedAddress,
    accumulators: &Accumulators<QUADS>,
) {
    let lane = consumer.lane;
    // Matrices: eight tokens by columns 0..8, the same by 8..16, then the next eight tokens.
    let address = |pair: u32| {
        let token = 16 * pair + lane / 16 * 8 + lane % 8;
        let chunk = 2 * consumer.warp + lane / 8 % 2;
        staging.offset(token * 128 + (chunk ^ (token % 8)) * 16)
    };
    if QUADS == 1 {
        let [a0, a1, a2, a3] = accumulators[0];
        // SAFETY: the staging buffer holds the chunk's rows, and these 32 bytes of each are this warp's. Lanes from 16 on give no address.
        unsafe { stmatrix_x2_trans(address(0), [bf16x2(a0, a1), bf16x2(a2, a3)]) };
        return;
    }
    unroll!(PAIR < STAGED_QUADS / 2, {
        let quad = CHUNK * STAGED_QUADS + 2 * PAIR;
        if quad < QUADS {
            let [a0, a1, a2, a3] = accumulators[quad];
            let [b0, b1, b2, b3] = accumulators[quad + 1];
            let matrices = [bf16x2(a0, a1), bf16x2(a2, a3), bf16x2(b0, b1), bf16x2(b2, b3)];
            // SAFETY: as above.
            unsafe { stmatrix_x4_trans(address(PAIR as u32), matrices) };
        }
    });
}

/// Writes the staged tokens' 64 columns into their owners' combine buffers.
#[inline(always)]
fn send(consumer: Consumer<'_>, staging: SharedAddress, column: u32, first_token: u32, rows: u32) {
    let params = consumer.launch.params();
    let row_bytes = consumer.launch.row_bytes() as u64;
    let chunk = consumer.lane % LANES_PER_ROW;
    unroll!(PASS < (LINEAR2_STAGING_TOKENS / TOKENS_PER_PASS) as usize, {
        let token = PASS as u32 * TOKENS_PER_PASS + consumer.thread() / LANES_PER_ROW;
        if first_token + token < rows {
            let meta = consumer.row_meta(first_token + token);
            let source = staging.offset(token * 128 + (chunk ^ (token % 8)) * 16);
            let at = meta.combine_row as u64 * row_bytes + (column * 2 + chunk * 16) as u64;
            // SAFETY: the row is staged; the combine buffer has a row for every (token, k) of its rank, and this one has no other writer.
            unsafe { st_weak_v4(consumer.launch.symmetric(meta.rank, params.symmetric.combine, at), source.load_v4()) };
        }
    });
}
