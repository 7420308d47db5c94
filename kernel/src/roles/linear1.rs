//! The end of a linear 1 task: SwiGLU, routing weight, bf16, and to the publisher, which stores it in the intermediate pool.

use crate::cta::Ring;
use crate::device::convert::{bf16x2, ex2, rcp};
use crate::device::fence::fence_proxy_async;
use crate::device::matrix::{stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::shared::{STAGING_BUFFERS, linear1_staging_tokens};

/// Quads that are staged at once.
const fn staged_quads(quads: usize) -> usize {
    linear1_staging_tokens(8 * quads as u32) as usize / 8
}

/// Finishes a task. A quad holds, for two tokens, the gates (first two values) and ups of one intermediate column.
#[inline(always)]
pub fn finish<const QUADS: usize>(
    consumer: Consumer<'_>,
    staging: &mut Ring<STAGING_BUFFERS>,
    accumulators: &Accumulators<QUADS>,
) {
    // The metas are in place.
    consumer.sync();
    unroll!(CHUNK < QUADS / staged_quads(QUADS), {
        consumer.take_staging(staging);
        stage::<QUADS, CHUNK>(consumer, accumulators);
        // The rows were written by ordinary stores, and will be read by a bulk copy.
        fence_proxy_async();
        consumer.hand_over(staging);
    });
    // All warps are done with the metas.
    consumer.sync();
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
        let quad = CHUNK * staged_quads(QUADS) + 4 * GROUP;
        if 4 * GROUP < staged_quads(QUADS) {
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
