//! The end of linear 1: a token's 128 intermediate columns share a scale. They are staged as bf16, whichever way they were multiplied, and quantised from there.

use super::record::{e4m3_of, larger_half, scale_kind};
use crate::consumer::Consumer;
use crate::device::address::SharedAddress;
use crate::device::convert::{abs_bf16x2, max_nan_bf16x2, rcp};
use crate::device::global::{st_weak_u32, st_weak_u64};
use crate::device::warp::shfl_idx;
use crate::quantise::{GROUP, GroupScale};
use crate::task::Task;
use crate::warps::WARPGROUP;

/// Lanes that quantise a row.
const ROW_LANES: u32 = 8;

/// The most rows that a thread quantises a part of: 64 rows, by a warpgroup.
const MOST_PASSES: usize = 64 / (WARPGROUP / ROW_LANES) as usize;

/// Where a staged row of `chunks` 16-byte chunks of eight columns has one of them: swizzled by row, so that neither eight rows nor eight chunks meet in a bank.
#[inline(always)]
pub const fn staged(chunks: u32, row: u32, chunk: u32) -> u32 {
    (row * chunks + (chunk ^ (row % 8))) * 16
}

/// Quantises `rows` of the `8 * QUADS` staged rows, from row `first` of the tile on, and stores them and their scales into the intermediate pool. `place` says where one of the sixteen
/// chunks of a row is: all were staged before a barrier, but for those of the second weight tile where the task has none. `threads` threads call this, of which this is number `thread`.
#[inline(always)]
pub fn store<const QUADS: usize>(
    consumer: Consumer<'_>,
    task: &Task,
    (first, rows): (u32, u32),
    (thread, threads): (u32, u32),
    place: impl Fn(u32, u32) -> SharedAddress,
) {
    let params = consumer.launch.params();
    let (workspace, intermediate) = (&params.workspace, params.shape.intermediate);
    let (chunk, column) = (thread % ROW_LANES, task.weight_row / 2);
    let whole = column + GROUP / 2 < intermediate;
    let row = |pass: usize| pass as u32 * threads / ROW_LANES + thread / ROW_LANES;
    let passes = (8 * QUADS).div_ceil((threads / ROW_LANES) as usize);
    // SAFETY: zeros are valid u32. All passes go through each step together: none waits for the one before.
    let (mut values, mut largest): ([[u32; 8]; MOST_PASSES], [u32; MOST_PASSES]) = unsafe { core::mem::zeroed() };
    unroll!(PASS < MOST_PASSES, {
        if PASS < passes {
            // With few tokens some threads have none: they look at another's.
            let row = row(PASS) % (8 * QUADS as u32);
            // SAFETY: the row is staged.
            let [a, b, c, d] = unsafe { place(row, chunk).load_v4() };
            let mut upper = [0; 4];
            if whole {
                // SAFETY: as above.
                upper = unsafe { place(row, chunk + ROW_LANES).load_v4() };
            }
            let [e, f, g, h] = upper;
            values[PASS] = [a, b, c, d, e, f, g, h];
        }
    });
    unroll!(PASS < MOST_PASSES, {
        if PASS < passes {
            unroll!(PAIR < 8, { largest[PASS] = max_nan_bf16x2(largest[PASS], abs_bf16x2(values[PASS][PAIR])) });
        }
    });
    unroll!(STEP < ROW_LANES.ilog2() as usize, {
        unroll!(PASS < MOST_PASSES, {
            if PASS < passes {
                largest[PASS] = max_nan_bf16x2(largest[PASS], shfl_idx(largest[PASS], consumer.lane ^ (1 << STEP)));
            }
        });
    });
    unroll!(PASS < MOST_PASSES, {
        if PASS < passes && row(PASS) < rows {
            let scale = GroupScale::new(larger_half(largest[PASS]), scale_kind(consumer.launch), rcp);
            let pool_row = task.pool_row + first + row(PASS);
            let to = consumer.launch.pool_row(workspace.intermediate, intermediate, pool_row);
            let to = to.wrapping_add((column + chunk * 8) as usize);
            let [a, b, c, d, e, f, g, h] = values[PASS];
            let eight = |low: [u32; 2], high: [u32; 2]| {
                e4m3_of(low, scale.inverse) as u64 | (e4m3_of(high, scale.inverse) as u64) << 32
            };
            // SAFETY: the row and its group are this task's.
            unsafe {
                st_weak_u64(to.cast(), eight([a, b], [c, d]));
                if whole {
                    st_weak_u64(to.wrapping_add(GROUP as usize / 2).cast(), eight([e, f], [g, h]));
                }
                if chunk == 0 {
                    let index = (column / GROUP) as u64 * workspace.pool_rows + pool_row as u64;
                    let place = consumer.launch.workspace(workspace.intermediate_scales, index);
                    st_weak_u32(place, scale.scale.to_bits());
                }
            }
        }
    });
}
