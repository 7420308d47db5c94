//! A rank's tokens as records: e4m3 elements, then the f32 scales of their groups, where all ranks read them.

use crate::device::address::SharedAddress;
use crate::device::atomic::atom_add_acq_rel_gpu;
use crate::device::barrier::bar_warp_sync;
use crate::device::convert::{abs_bf16x2, e4m3x4, max_nan_bf16x2, rcp, unpack_bf16x2};
use crate::device::fence::fence_proxy_async_global;
use crate::device::global::{
    ld_acquire_sys_u32, ld_weak_u32, ld_weak_u64, ld_weak_v4, st_relaxed_sys_u32, st_weak_u32, st_weak_u64,
};
use crate::device::warp::shfl_idx;
use crate::format::FORMAT;
use crate::launch::Launch;
use crate::quantise::{GROUP, GroupScale, ScaleKind, groups};
use crate::roles::route::claim;
use crate::status::{Stage, Timeout};
use crate::warps::WARP;

/// Columns of one lane's access.
const LANE_COLUMNS: u32 = 8;
/// Columns of a warp's access.
const WARP_COLUMNS: u32 = WARP * LANE_COLUMNS;
/// Accesses of a warp that are under way together: a unit.
const ACCESSES: usize = 4;
/// Columns of a unit.
const UNIT_COLUMNS: u32 = WARP_COLUMNS * ACCESSES as u32;
/// Lanes that share a group.
const GROUP_LANES: u32 = GROUP / LANE_COLUMNS;

/// What kind of scales the layer has.
#[inline(always)]
pub fn scale_kind(launch: &Launch) -> ScaleKind {
    if launch.params().scale_kind == ScaleKind::PowerOfTwo as u32 { ScaleKind::PowerOfTwo } else { ScaleKind::F32 }
}

/// The record of a token of rank `source`.
#[inline(always)]
pub fn address(launch: &Launch, source: u32, token: u32) -> *mut u8 {
    let params = launch.params();
    let at = token as u64 * FORMAT.record_bytes(params.shape.hidden) as u64;
    launch.symmetric(source, params.symmetric.records, at)
}

/// Claims units of tokens and writes them to their records, until none is left. The warp that finishes the rank's last unit tells all ranks.
#[inline(always)]
pub fn write(launch: &Launch, lane: u32) {
    let params = launch.params();
    let (shape, counters) = (&params.shape, &params.workspace.counter);
    let per_token = shape.hidden.div_ceil(UNIT_COLUMNS);
    // A rank without tokens has a unit too, for others wait for it.
    let units = (launch.tokens() * per_token).max(1);
    let ticket = launch.counter(counters.quantise_ticket, 0);
    let mut claimed = claim(ticket, lane);
    let mut done = 0;
    loop {
        let unit = shfl_idx(claimed, 0);
        if unit >= units {
            break;
        }
        // Under way while this one is written.
        claimed = claim(ticket, lane);
        let (token, columns) = (unit / per_token, unit % per_token * UNIT_COLUMNS);
        if token < launch.tokens() {
            if launch.hidden_scales() == 0 {
                quantise(launch, token, columns, lane);
            } else {
                copy(launch, token, columns, lane);
            }
        }
        done += 1;
    }
    bar_warp_sync();
    if lane == 0 && done > 0 {
        launch.fence();
        // SAFETY: a counter of this launch.
        if unsafe { atom_add_acq_rel_gpu(launch.counter(counters.quantised, 0), done) } + done == units {
            launch.fence();
            for rank in 0..shape.ranks {
                let flag = launch.symmetric(rank, params.symmetric.quantised, params.rank as u64);
                // SAFETY: every rank has a flag for every source.
                unsafe { st_relaxed_sys_u32(flag, launch.epoch()) };
            }
        }
    }
}

/// First column of a lane's access of this number, if it exists.
#[inline(always)]
fn column(launch: &Launch, first: u32, access: usize, lane: u32) -> Option<u32> {
    let column = first + access as u32 * WARP_COLUMNS + lane * LANE_COLUMNS;
    (column < launch.params().shape.hidden).then_some(column)
}

/// A unit of bf16.
#[inline(always)]
fn quantise(launch: &Launch, token: u32, first: u32, lane: u32) {
    let hidden = launch.params().shape.hidden;
    let source = (launch.hidden_states() + token as u64 * launch.row_bytes() as u64) as *const u8;
    let record = address(launch, launch.params().rank, token);
    // SAFETY: zeros are valid u32.
    let mut values: [[u32; 4]; ACCESSES] = unsafe { core::mem::zeroed() };
    unroll!(ACCESS < ACCESSES, {
        if let Some(column) = column(launch, first, ACCESS, lane) {
            // SAFETY: the hidden states have this row.
            values[ACCESS] = unsafe { ld_weak_v4(source.wrapping_add(2 * column as usize)) };
        }
    });
    unroll!(ACCESS < ACCESSES, {
        let [a, b, c, d] = values[ACCESS];
        let [ab, cd] = [(a, b), (c, d)].map(|(x, y)| max_nan_bf16x2(abs_bf16x2(x), abs_bf16x2(y)));
        let mut largest = max_nan_bf16x2(ab, cd);
        let mut step = 1;
        while step < GROUP_LANES {
            largest = max_nan_bf16x2(largest, shfl_idx(largest, lane ^ step));
            step *= 2;
        }
        let scale = GroupScale::new(larger_half(largest), scale_kind(launch), rcp);
        if let Some(column) = column(launch, first, ACCESS, lane) {
            let word = e4m3_of([a, b], scale.inverse) as u64 | (e4m3_of([c, d], scale.inverse) as u64) << 32;
            // SAFETY: the record is this rank's, and has a place for every column and every group.
            unsafe {
                st_weak_u64(record.wrapping_add(column as usize).cast(), word);
                if lane % GROUP_LANES == 0 {
                    let place = record.wrapping_add((hidden + column / GROUP * 4) as usize);
                    st_weak_u32(place.cast(), scale.scale.to_bits());
                }
            }
        }
    });
}

/// A unit of e4m3 that has its scales.
#[inline(always)]
fn copy(launch: &Launch, token: u32, first: u32, lane: u32) {
    let hidden = launch.params().shape.hidden;
    let source = (launch.hidden_states() + token as u64 * hidden as u64) as *const u8;
    let scales = (launch.hidden_scales() as *const u32).wrapping_add((token * groups(hidden)) as usize);
    let record = address(launch, launch.params().rank, token);
    unroll!(ACCESS < ACCESSES, {
        if let Some(column) = column(launch, first, ACCESS, lane) {
            // SAFETY: the hidden states have this row, and a scale for each of its groups; as above.
            unsafe {
                let word = ld_weak_u64(source.wrapping_add(column as usize).cast());
                st_weak_u64(record.wrapping_add(column as usize).cast(), word);
                if lane % GROUP_LANES == 0 {
                    let scale = ld_weak_u32(scales.wrapping_add((column / GROUP) as usize));
                    st_weak_u32(record.wrapping_add((hidden + column / GROUP * 4) as usize).cast(), scale);
                }
            }
        }
    });
}

/// The larger of both halves, as f32. NaN if either is.
#[inline(always)]
pub fn larger_half(values: u32) -> f32 {
    f32::from_bits(max_nan_bf16x2(values, values << 16) & 0xffff_0000)
}

/// Four bf16 as e4m3, after a multiplication.
#[inline(always)]
pub fn e4m3_of([low, high]: [u32; 2], factor: f32) -> u32 {
    let [[a, b], [c, d]] = [low, high].map(unpack_bf16x2);
    e4m3x4([a * factor, b * factor, c * factor, d * factor])
}

/// Waits until rank `source` has written its records, if this lane `waits`.
#[inline(always)]
pub fn wait(launch: &Launch, waits: bool, source: u32) {
    let params = launch.params();
    if waits {
        let flag = launch.symmetric(params.rank, params.symmetric.quantised, source as u64);
        let epoch = launch.epoch();
        let missing = || Timeout { stage: Stage::Records, rank: source, subject: 0 };
        // SAFETY: a flag of this rank.
        launch.wait_until(missing, || unsafe { ld_acquire_sys_u32(flag) } == epoch);
    }
    bar_warp_sync();
    // Records were acquired by ordinary loads, and will be read by bulk copies.
    fence_proxy_async_global();
}

/// Stores what of a token's scales lies in a piece of its record, `bytes` bytes from `at` on, to the pool's row.
#[inline(always)]
pub fn store_scales(launch: &Launch, piece: SharedAddress, at: u32, bytes: u32, pool_row: u32) {
    let params = launch.params();
    let (workspace, hidden) = (&params.workspace, params.shape.hidden);
    let end = (at + bytes).min(hidden + groups(hidden) * 4);
    let mut place = at.max(hidden);
    while place < end {
        let index = ((place - hidden) / 4) as u64 * workspace.pool_rows + pool_row as u64;
        // SAFETY: the piece has landed; the pool has a scale for every group of every row, and this row is this lane's.
        unsafe { st_weak_u32(launch.workspace(workspace.token_scales, index), piece.offset(place - at).load_u32()) };
        place += 4;
    }
}
