//! The end of linear 1: a token's 128 intermediate columns share a scale. They are staged as bf16, whichever way they were multiplied, and quantised from there.

use super::record::{e4m3_of, larger_half, scale_kind};
use crate::consumer::Consumer;
use crate::device::address::SharedAddress;
use crate::device::convert::{abs_bf16x2, max_nan_bf16x2, rcp};
use crate::device::global::{st_weak_u32, st_weak_u64};
use crate::device::warp::shfl_idx;
use crate::quantise::{GROUP, GroupScale};
use crate::task::Task;

/// Lanes that quantise a row.
const ROW_LANES: u32 = 8;

/// Where a staged row of `chunks` 16-byte chunks of eight columns has one of them: swizzled by row, so that neither eight rows nor eight chunks meet in a bank.
#[inline(always)]
pub const fn staged(chunks: u32, row: u32, chunk: u32) -> u32 {
    (row * chunks + (chunk ^ (row % 8))) * 16
}

/// Quantises `rows` staged rows, from row `first` of the tile on, and stores them and their scales into the intermediate pool. `place` says where one of the sixteen chunks of a row
/// is: all were staged before a barrier, but for those of the second weight tile where the task has none. `threads` threads call this, of which this is number `thread`.
#[inline(always)]
pub fn store(
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
    let mut begin = 0;
    while begin < rows {
        let row = begin + thread / ROW_LANES;
        let source = row.min(rows - 1);
        // SAFETY: the row is staged.
        let [a, b, c, d] = unsafe { place(source, chunk).load_v4() };
        let mut upper = [0; 4];
        if whole {
            // SAFETY: as above.
            upper = unsafe { place(source, chunk + ROW_LANES).load_v4() };
        }
        let [e, f, g, h] = upper;
        let mut largest = abs_bf16x2(a);
        for value in [b, c, d, e, f, g, h] {
            largest = max_nan_bf16x2(largest, abs_bf16x2(value));
        }
        let mut step = 1;
        while step < ROW_LANES {
            largest = max_nan_bf16x2(largest, shfl_idx(largest, consumer.lane ^ step));
            step *= 2;
        }
        let scale = GroupScale::new(larger_half(largest), scale_kind(consumer.launch), rcp);
        if row < rows {
            let pool_row = task.pool_row + first + row;
            let to = consumer.launch.pool_row(workspace.intermediate, intermediate, pool_row);
            let to = to.wrapping_add((column + chunk * 8) as usize);
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
                    st_weak_u32(consumer.launch.workspace(workspace.intermediate_scales, index), scale.scale.to_bits());
                }
            }
        }
        begin += threads / ROW_LANES;
    }
}
