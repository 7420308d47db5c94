//! The end of a linear 1 task: SwiGLU, routing weight, bf16, and to the publisher, which stores it in the intermediate pool.

use crate::cta::Ring;
use crate::device::address::SharedAddress;
use crate::device::convert::{bf16x2, ex2, max_nan, min_nan, rcp};
use crate::device::fence::fence_proxy_async_shared;
use crate::device::matrix::{stmatrix_x1_trans, stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::shared::{LINEAR1_STAGING_TOKENS, STAGING_BUFFERS};

/// Quads that are staged at once.
const STAGED_QUADS: usize = LINEAR1_STAGING_TOKENS as usize / 8;

const _: () = assert!(STAGED_QUADS == 8);

/// Finishes a task; all staging buffers are taken. A quad holds, for two tokens, the gates (first two values) and ups of one
/// intermediate column.
#[inline(always)]
pub fn finish<const QUADS: usize>(consumer: Consumer<'_>, staging: &mut Ring, accumulators: &Accumulators<QUADS>) {
    unroll!(CHUNK < QUADS.div_ceil(STAGED_QUADS), {
        if CHUNK >= STAGING_BUFFERS as usize {
            consumer.take_staging(*staging);
        }
        stage::<QUADS, CHUNK>(consumer, consumer.cta.staging(consumer.warpgroup, staging.slot), accumulators);
        // The rows were written by ordinary stores, and will be read by a bulk copy.
        fence_proxy_async_shared();
        consumer.hand_over(staging);
    });
}

/// Activates and transposes one chunk of the accumulators into rows of 32 columns a token, 64-byte swizzle.
#[inline(always)]
fn stage<const QUADS: usize, const CHUNK: usize>(
    consumer: Consumer<'_>,
    staging: SharedAddress,
    accumulators: &Accumulators<QUADS>,
) {
    let limit = consumer.launch.params().swiglu_limit;
    let activate = |quad: usize| {
        let [weight0, weight1] = consumer.row_weights(8 * quad as u32 + 2 * (consumer.lane % 4));
        let [gate0, gate1, up0, up1] = accumulators[quad];
        bf16x2(swiglu(gate0, up0, limit) * weight0, swiglu(gate1, up1, limit) * weight1)
    };
    // 16 of a row's 64 bytes are this warp's.
    let address = |token: u32| staging.offset(token * 64 + ((consumer.warp ^ (token >> 1 & 3)) * 16));
    let first = CHUNK * STAGED_QUADS;
    if QUADS == 1 {
        // SAFETY: the staging buffer holds every token's row, and these 16 bytes are this warp's.
        unsafe { stmatrix_x1_trans(address(consumer.lane % 8), activate(0)) };
    } else if QUADS == 2 {
        // SAFETY: as above.
        unsafe { stmatrix_x2_trans(address(consumer.lane % 16), [activate(0), activate(1)]) };
    } else {
        unroll!(GROUP < STAGED_QUADS / 4, {
            let quad = first + 4 * GROUP;
            if quad < QUADS {
                let columns = [activate(quad), activate(quad + 1), activate(quad + 2), activate(quad + 3)];
                // SAFETY: as above.
                unsafe { stmatrix_x4_trans(address(32 * GROUP as u32 + consumer.lane), columns) };
            }
        });
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
