//! The end of a linear 2 task: bf16 rows straight into the combine buffers of the ranks that own the tokens.

use crate::device::address::SharedAddress;
use crate::device::convert::bf16x2;
use crate::device::global::st_weak_v4;
use crate::device::matrix::{stmatrix_x2_trans, stmatrix_x4_trans};
use crate::device::wgmma::Accumulators;
use crate::roles::consume::Consumer;
use crate::schedule::Task;
use crate::shared::{PASS_BYTES, STAGED_PASSES, WARPGROUP};
use crate::tile::WARPGROUP_ROWS;

/// Lanes that write one token's 128 bytes, 16 each.
const LANES_PER_ROW: u32 = 8;

/// Tokens that a warpgroup writes in a pass.
const TOKENS_PER_PASS: u32 = WARPGROUP / LANES_PER_ROW;

/// Passes that are staged at once. Half of the buffer is written again two chunks later, when every warp has passed the barrier between, and so has
/// sent what was in it.
const CHUNK_PASSES: usize = STAGED_PASSES / 2;

/// Tokens that are staged at once.
const CHUNK_TOKENS: u32 = CHUNK_PASSES as u32 * TOKENS_PER_PASS;

/// Quads that are staged at once.
const CHUNK_QUADS: usize = CHUNK_TOKENS as usize / 8;

/// Passes of a chunk, one after the other.
type Passes<T> = [T; CHUNK_PASSES];

/// What a thread has to do with every chunk.
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

/// Finishes a task. A quad holds, for two tokens, two hidden columns eight apart. While one chunk is read from its half of the buffer, the next is
/// written to the other.
#[inline(always)]
pub fn finish<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, accumulators: &Accumulators<QUADS>) {
    let places = Places::new(consumer, task);
    if places.rows > 0 {
        places.stage::<QUADS, 0>(accumulators);
    }
    unroll!(CHUNK < QUADS.div_ceil(CHUNK_QUADS), {
        if first_token(CHUNK) < places.rows {
            // Before the barrier: behind the last, another warp may put the next tile's in their place.
            let results = places.results::<CHUNK>();
            consumer.sync();
            places.send::<CHUNK>(results, || {
                if first_token(CHUNK + 1) < places.rows {
                    places.stage::<QUADS, { CHUNK + 1 }>(accumulators);
                }
            });
        }
    });
}

/// First token of a chunk.
const fn first_token(chunk: usize) -> u32 {
    chunk as u32 * CHUNK_TOKENS
}

/// Byte offset of a pass of a chunk in the buffer.
const fn area(chunk: usize, pass: usize) -> u32 {
    (chunk % 2 * CHUNK_PASSES + pass) as u32 * PASS_BYTES
}

impl<'a> Places<'a> {
    #[inline(always)]
    fn new(consumer: Consumer<'a>, task: &Task) -> Self {
        let (warp, lane) = (consumer.warp, consumer.lane);
        // Rows of 64 columns a token, 128-byte swizzle.
        let staging = consumer.cta.staging(consumer.warpgroup);
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

    /// Transposes one chunk of the accumulators into its half of the buffer.
    #[inline(always)]
    fn stage<const QUADS: usize, const CHUNK: usize>(&self, accumulators: &Accumulators<QUADS>) {
        if QUADS == 1 {
            let [a0, a1, a2, a3] = accumulators[0];
            // SAFETY: the buffer holds the chunk's rows, and these 32 bytes of each are this warp's. Lanes from 16 on give no address.
            unsafe { stmatrix_x2_trans(self.staged, [bf16x2(a0, a1), bf16x2(a2, a3)]) };
            return;
        }
        unroll!(PASS < CHUNK_PASSES, {
            let quad = CHUNK * CHUNK_QUADS + 2 * PASS;
            if quad < QUADS {
                let [a0, a1, a2, a3] = accumulators[quad];
                let [b0, b1, b2, b3] = accumulators[quad + 1];
                let matrices = [bf16x2(a0, a1), bf16x2(a2, a3), bf16x2(b0, b1), bf16x2(b2, b3)];
                // SAFETY: as above.
                unsafe { stmatrix_x4_trans(self.staged.offset(area(CHUNK, PASS)), matrices) };
            }
        });
    }

    /// A thread's token in a pass of a chunk.
    #[inline(always)]
    fn token(&self, chunk: usize, pass: usize) -> u32 {
        first_token(chunk) + pass as u32 * TOKENS_PER_PASS + self.token
    }

    /// The result rows of a thread's tokens in a chunk.
    #[inline(always)]
    fn results<const CHUNK: usize>(&self) -> Passes<u64> {
        let mut results = [0; CHUNK_PASSES];
        unroll!(PASS < CHUNK_PASSES, {
            if self.token(CHUNK, PASS) < self.rows {
                results[PASS] = self.consumer.result_row(self.token(CHUNK, PASS));
            }
        });
        results
    }

    /// Writes a chunk's 64 columns of each token into its owner's combine buffer; `meanwhile` runs while they come from the staging buffer.
    #[inline(always)]
    fn send<const CHUNK: usize>(&self, results: Passes<u64>, meanwhile: impl FnOnce()) {
        let mut values = [[0; 4]; CHUNK_PASSES];
        unroll!(PASS < CHUNK_PASSES, {
            if self.token(CHUNK, PASS) < self.rows {
                // SAFETY: the row is staged.
                values[PASS] = unsafe { self.read.offset(area(CHUNK, PASS)).load_v4() };
            }
        });
        meanwhile();
        unroll!(PASS < CHUNK_PASSES, {
            if self.token(CHUNK, PASS) < self.rows {
                // SAFETY: the combine buffer has a row for every (token, k) of its rank, and this one has no other writer.
                unsafe { st_weak_v4((results[PASS] + self.at) as *mut u8, values[PASS]) };
            }
        });
    }
}
