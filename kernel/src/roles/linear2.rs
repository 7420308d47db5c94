//! The end of a linear 2 task: bf16 rows straight into the combine buffers of the ranks that own the tokens.

use crate::cta::Ring;
use crate::device::address::SharedAddress;
use crate::device::convert::bf16x2;
use crate::device::global::st_weak_v4;
use crate::device::matrix::{stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::schedule::Task;
use crate::shared::{LINEAR2_STAGING_TOKENS, STAGING_BUFFERS, STAGING_BYTES, WARPGROUP};
use crate::tile::WARPGROUP_ROWS;

/// Lanes that write one token's 128 bytes, 16 each.
const LANES_PER_ROW: u32 = 8;

/// Tokens that a warpgroup writes at once.
const TOKENS_PER_PASS: u32 = WARPGROUP / LANES_PER_ROW;

/// Quads that are staged at once.
const STAGED_QUADS: usize = LINEAR2_STAGING_TOKENS as usize / 8;

// A buffer is written again two chunks later, when every warp has passed the barrier between, and so has read what was in it.
const _: () = assert!(STAGING_BUFFERS == 2);

/// What a thread has to do with every chunk.
#[derive(Clone, Copy)]
struct Places<'a> {
    consumer: Consumer<'a>,
    /// Where it writes its row of the first matrix of the first chunk.
    staged: SharedAddress,
    /// Where it reads 16 bytes of a token of the first chunk.
    read: SharedAddress,
    /// That token.
    token: u32,
    /// Where those bytes are in a result row.
    at: u64,
    /// Rows of the tile that hold tokens; 0 behind the last column.
    rows: u32,
}

/// Finishes a task; all staging buffers are taken. A quad holds, for two tokens, two hidden columns eight apart. While one chunk is read from
/// its buffer, the next is written to the other.
#[inline(always)]
pub fn finish<const QUADS: usize>(
    consumer: Consumer<'_>,
    task: &Task,
    staging: &mut Ring,
    accumulators: &Accumulators<QUADS>,
) {
    let places = Places::new(consumer, task);
    if places.rows > 0 {
        places.stage::<QUADS, 0>(accumulators);
    }
    unroll!(CHUNK < QUADS.div_ceil(STAGED_QUADS), {
        if first_token(CHUNK) < places.rows {
            consumer.sync();
            places.send::<CHUNK>(|| {
                if first_token(CHUNK + 1) < places.rows {
                    places.stage::<QUADS, { CHUNK + 1 }>(accumulators);
                }
            });
        }
    });
    consumer.hand_over(staging);
}

/// First token of a chunk.
const fn first_token(chunk: usize) -> u32 {
    chunk as u32 * LINEAR2_STAGING_TOKENS
}

/// Byte offset of a chunk's buffer from the first one's.
const fn buffer(chunk: usize) -> u32 {
    chunk as u32 % STAGING_BUFFERS * STAGING_BYTES
}

impl<'a> Places<'a> {
    #[inline(always)]
    fn new(consumer: Consumer<'a>, task: &Task) -> Self {
        let (warp, lane) = (consumer.warp, consumer.lane);
        let staging = consumer.cta.staging(consumer.warpgroup, 0);
        // Rows of 64 columns a token, 128-byte swizzle.
        let place = |token: u32, chunk: u32| staging.offset(token * 128 + (chunk ^ (token % 8)) * 16);
        let (token, chunk) = (consumer.thread() / LANES_PER_ROW, lane % LANES_PER_ROW);
        let column = task.weight_row + consumer.warpgroup * WARPGROUP_ROWS;
        Self {
            consumer,
            // Matrices: eight tokens by columns 0..8, the same by 8..16, then the next eight tokens.
            staged: place(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2),
            read: place(token, chunk),
            token,
            at: (column * 2 + chunk * 16) as u64,
            // The second half of the last block lies outside when the hidden size is an odd multiple of 64.
            rows: if column < consumer.launch.params().shape.hidden { task.rows } else { 0 },
        }
    }

    /// Transposes one chunk of the accumulators into its buffer.
    #[inline(always)]
    fn stage<const QUADS: usize, const CHUNK: usize>(&self, accumulators: &Accumulators<QUADS>) {
        if QUADS == 1 {
            let [a0, a1, a2, a3] = accumulators[0];
            // SAFETY: the staging buffer holds the chunk's rows, and these 32 bytes of each are this warp's. Lanes from 16 on give no address.
            unsafe { stmatrix_x2_trans(self.staged, [bf16x2(a0, a1), bf16x2(a2, a3)]) };
            return;
        }
        unroll!(PAIR < STAGED_QUADS / 2, {
            let quad = CHUNK * STAGED_QUADS + 2 * PAIR;
            if quad < QUADS {
                let [a0, a1, a2, a3] = accumulators[quad];
                let [b0, b1, b2, b3] = accumulators[quad + 1];
                let matrices = [bf16x2(a0, a1), bf16x2(a2, a3), bf16x2(b0, b1), bf16x2(b2, b3)];
                // SAFETY: as above.
                unsafe { stmatrix_x4_trans(self.staged.offset(buffer(CHUNK) + PAIR as u32 * 16 * 128), matrices) };
            }
        });
    }

    /// Writes a chunk's 64 columns of each token into its owner's combine buffer; `meanwhile` runs while they come from the staging buffer.
    #[inline(always)]
    fn send<const CHUNK: usize>(&self, meanwhile: impl FnOnce()) {
        const PASSES: usize = (LINEAR2_STAGING_TOKENS / TOKENS_PER_PASS) as usize;
        let token = |pass: usize| first_token(CHUNK) + pass as u32 * TOKENS_PER_PASS + self.token;
        let (mut results, mut values) = ([0; PASSES], [[0; 4]; PASSES]);
        unroll!(PASS < PASSES, {
            if token(PASS) < self.rows {
                results[PASS] = self.consumer.result_row(token(PASS));
                // SAFETY: the row is staged.
                values[PASS] =
                    unsafe { self.read.offset(buffer(CHUNK) + PASS as u32 * TOKENS_PER_PASS * 128).load_v4() };
            }
        });
        meanwhile();
        unroll!(PASS < PASSES, {
            if token(PASS) < self.rows {
                // SAFETY: the combine buffer has a row for every (token, k) of its rank, and this one has no other writer.
                unsafe { st_weak_v4((results[PASS] + self.at) as *mut u8, values[PASS]) };
            }
        });
    }
}
