//! The end of a linear 2 task: bf16 rows straight into the combine buffers of the ranks that own the tokens.

use crate::cta::Ring;
use crate::device::convert::bf16x2;
use crate::device::global::st_weak_v4;
use crate::device::matrix::stmatrix_x4_trans;
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::schedule::Task;
use crate::shared::{LINEAR2_STAGING_TOKENS, STAGING_BUFFERS, WARPGROUP};
use crate::tile::WARPGROUP_ROWS;

/// Lanes that write one token's 128 bytes, 16 each.
const LANES_PER_ROW: u32 = 8;

/// Quads that are staged at once.
const STAGED_QUADS: usize = LINEAR2_STAGING_TOKENS as usize / 8;

/// Finishes a task. A quad holds, for two tokens, two hidden columns eight apart.
#[inline(always)]
pub fn finish<const QUADS: usize>(
    consumer: Consumer<'_>,
    task: &Task,
    staging: &mut Ring<STAGING_BUFFERS>,
    accumulators: &Accumulators<QUADS>,
) {
    let column = task.weight_row + consumer.warpgroup * WARPGROUP_ROWS;
    // The second half of the last block lies outside when the hidden size is an odd multiple of 64.
    let rows = if column < consumer.launch.params().shape.hidden { task.rows } else { 0 };
    consumer.take_staging(staging);
    unroll!(CHUNK < QUADS.div_ceil(STAGED_QUADS), {
        let first_token = CHUNK as u32 * LINEAR2_STAGING_TOKENS;
        if first_token < rows {
            // The metas are in place, and the chunk before has been sent.
            consumer.sync();
            stage::<QUADS, CHUNK>(consumer, accumulators);
            consumer.sync();
            send(consumer, column, first_token, rows);
        }
    });
    consumer.hand_over(staging);
    // All warps are done with the metas.
    consumer.sync();
}

/// Transposes one chunk of the accumulators into rows of 64 columns a token, 128-byte swizzle.
#[inline(always)]
fn stage<const QUADS: usize, const CHUNK: usize>(consumer: Consumer<'_>, accumulators: &Accumulators<QUADS>) {
    let staging = consumer.cta.staging(consumer.warpgroup);
    let lane = consumer.lane;
    unroll!(PAIR < STAGED_QUADS / 2, {
        let quad = CHUNK * STAGED_QUADS + 2 * PAIR;
        if quad < QUADS {
            let [a0, a1, a2, a3] = accumulators[quad];
            let [b0, b1, b2, b3] = accumulators[quad + 1];
            // Matrices: eight tokens by columns 0..8, the same by 8..16, then the next eight tokens.
            let token = 16 * PAIR as u32 + lane / 16 * 8 + lane % 8;
            let chunk = 2 * consumer.warp + lane / 8 % 2;
            let address = staging.offset(token * 128 + (chunk ^ (token % 8)) * 16);
            let matrices = [bf16x2(a0, a1), bf16x2(a2, a3), bf16x2(b0, b1), bf16x2(b2, b3)];
            // SAFETY: the staging buffer holds the chunk's rows, and these 32 bytes of each are this warp's.
            unsafe { stmatrix_x4_trans(address, matrices) };
        }
    });
}

/// Writes the staged tokens' 64 columns into their owners' combine buffers.
#[inline(always)]
fn send(consumer: Consumer<'_>, column: u32, first_token: u32, rows: u32) {
    let params = consumer.launch.params();
    let row_bytes = consumer.launch.row_bytes() as u64;
    let chunk = consumer.lane % LANES_PER_ROW;
    let end = (rows - first_token).min(LINEAR2_STAGING_TOKENS);
    let mut token = consumer.thread() / LANES_PER_ROW;
    while token < end {
        let meta = consumer.row_meta(first_token + token);
        let source = consumer.cta.staging(consumer.warpgroup).offset(token * 128 + (chunk ^ (token % 8)) * 16);
        let at = meta.combine_row as u64 * row_bytes + (column * 2 + chunk * 16) as u64;
        // SAFETY: the row is staged; the combine buffer has a row for every (token, k) of its rank, and this one has no other writer.
        unsafe { st_weak_v4(consumer.launch.symmetric(meta.rank, params.symmetric.combine, at), source.load_v4()) };
        token += WARPGROUP / LANES_PER_ROW;
    }
}
