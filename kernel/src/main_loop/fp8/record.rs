//! A rank's tokens as records: e4m3 elements, then the f32 scales of their groups, where all ranks read them.

use crate::device::address::SharedAddress;
use crate::device::atomic::atom_add_acq_rel_gpu;
use crate::device::barrier::bar_warp_sync;
use crate::device::convert::{abs_bf16x2, e4m3x4, max_nan_bf16x2, rcp, unpack_bf16x2};
use crate::device::fence::fence_proxy_async_global;
use crate::device::global::{
    ld_acquire_gpu_u32, ld_acquire_sys_u32, ld_weak_u32, ld_weak_u64, ld_weak_v4, st_relaxed_sys_u32, st_weak_u32,
    st_weak_u64,
};
use crate::device::warp::shfl_idx;
use crate::format::FORMAT;
use crate::launch::Launch;
use crate::layout::RowMeta;
use crate::quantise::{GROUP, GroupScale, ScaleKind, groups};
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
    let (per_token, units) = (units_of_token(launch), units(launch));
    let claim = || launch.claim(counters.quantise_ticket, lane);
    let at = |unit: u32| (unit / per_token, unit % per_token * UNIT_COLUMNS);
    let mut unit = shfl_idx(claim(), 0);
    let (mut values, mut claimed) = (load(launch, at(unit), lane), 0);
    if unit < units {
        claimed = claim();
    }
    let mut done = 0;
    while unit < units {
        let next = shfl_idx(claimed, 0);
        // Under way while this unit is written, as is the claim of the one behind.
        let ahead = load(launch, at(next), lane);
        if next < units {
            claimed = claim();
        }
        let (token, columns) = at(unit);
        if token < launch.tokens() {
            if columns == 0 && lane < shape.shared_experts {
                let combine_row = token * shape.slots() + shape.top_k + lane;
                let meta = RowMeta { combine_row, rank: params.rank, weight: 1.0 };
                launch.write_row(shared_row(launch, lane, token), meta);
            }
            if launch.hidden_scales() == 0 {
                quantise(launch, (token, columns), &values, lane);
            } else {
                copy(launch, token, columns, lane);
            }
        }
        (unit, values) = (next, ahead);
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

/// Units of a token.
#[inline(always)]
fn units_of_token(launch: &Launch) -> u32 {
    launch.params().shape.hidden.div_ceil(UNIT_COLUMNS)
}

/// Units of a rank: one that has no tokens has one too, for others wait for it.
#[inline(always)]
fn units(launch: &Launch) -> u32 {
    (launch.tokens() * units_of_token(launch)).max(1)
}

/// Whether all units of this rank are written.
#[inline(always)]
pub fn all_written(launch: &Launch) -> bool {
    let done = launch.counter(launch.params().workspace.counter.quantised, 0);
    // SAFETY: a counter of this launch.
    unsafe { ld_acquire_gpu_u32(done) >= units(launch) }
}

/// The pool's row of a token for a shared expert: they come first, each with all tokens.
#[inline(always)]
fn shared_row(launch: &Launch, expert: u32, token: u32) -> u32 {
    expert * FORMAT.tiles.padded_rows(launch.tokens()) + token
}

/// Stores eight columns of a token, and in the group's first lane its scale, to the token's record and to its rows of the shared experts.
#[inline(always)]
fn store(launch: &Launch, token: u32, column: u32, values: u64, scale: u32, lane: u32) {
    let params = launch.params();
    let (workspace, hidden, group) = (&params.workspace, params.shape.hidden, column / GROUP);
    let record = address(launch, params.rank, token);
    // SAFETY: the record is this rank's, the rows are this token's, and both have a place for every column and every group.
    unsafe {
        st_weak_u64(record.wrapping_add(column as usize).cast(), values);
        if lane % GROUP_LANES == 0 {
            st_weak_u32(record.wrapping_add((hidden + group * 4) as usize).cast(), scale);
        }
        for expert in 0..params.shape.shared_experts {
            let row = shared_row(launch, expert, token);
            st_weak_u64(launch.pool_row(workspace.tokens, hidden, row).wrapping_add(column as usize).cast(), values);
            if lane % GROUP_LANES == 0 {
                let place = launch.workspace(workspace.token_scales, group as u64 * workspace.pool_rows + row as u64);
                st_weak_u32(place, scale);
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

/// What a lane has of a unit in bf16.
type Values = [[u32; 4]; ACCESSES];

/// Starts to load a unit of bf16, if the token exists.
#[inline(always)]
fn load(launch: &Launch, (token, first): (u32, u32), lane: u32) -> Values {
    let source = (launch.hidden_states() + token as u64 * launch.row_bytes() as u64) as *const u8;
    // SAFETY: zeros are valid u32.
    let mut values: Values = unsafe { core::mem::zeroed() };
    if token < launch.tokens() && launch.hidden_scales() == 0 {
        unroll!(ACCESS < ACCESSES, {
            if let Some(column) = column(launch, first, ACCESS, lane) {
                // SAFETY: the hidden states have this row.
                values[ACCESS] = unsafe { ld_weak_v4(source.wrapping_add(2 * column as usize)) };
            }
        });
    }
    values
}

/// Quantises a unit of bf16.
#[inline(always)]
fn quantise(launch: &Launch, (token, first): (u32, u32), values: &Values, lane: u32) {
    // SAFETY: zeros are valid u32. All accesses go through each step together: none waits for the one before.
    let mut largest: [u32; ACCESSES] = unsafe { core::mem::zeroed() };
    unroll!(ACCESS < ACCESSES, {
        unroll!(PAIR < 4, { largest[ACCESS] = max_nan_bf16x2(largest[ACCESS], abs_bf16x2(values[ACCESS][PAIR])) });
    });
    unroll!(STEP < GROUP_LANES.ilog2() as usize, {
        unroll!(ACCESS < ACCESSES, {
            largest[ACCESS] = max_nan_bf16x2(largest[ACCESS], shfl_idx(largest[ACCESS], lane ^ (1 << STEP)));
        });
    });
    unroll!(ACCESS < ACCESSES, {
        if let Some(column) = column(launch, first, ACCESS, lane) {
            let scale = GroupScale::new(larger_half(largest[ACCESS]), scale_kind(launch), rcp);
            let [a, b, c, d] = values[ACCESS];
            let word = e4m3_of([a, b], scale.inverse) as u64 | (e4m3_of([c, d], scale.inverse) as u64) << 32;
            store(launch, token, column, word, scale.scale.to_bits(), lane);
        }
    });
}

/// A unit of e4m3 that has its scales.
#[inline(always)]
fn copy(launch: &Launch, token: u32, first: u32, lane: u32) {
    let hidden = launch.params().shape.hidden;
    let source = (launch.hidden_states() + token as u64 * hidden as u64) as *const u8;
    let scales = (launch.hidden_scales() as *const u32).wrapping_add((token * groups(hidden)) as usize);
    unroll!(ACCESS < ACCESSES, {
        if let Some(column) = column(launch, first, ACCESS, lane) {
            // SAFETY: the hidden states have this row, and a scale for each of its groups.
            let (values, scale) = unsafe {
                let values = ld_weak_u64(source.wrapping_add(column as usize).cast());
                (values, ld_weak_u32(scales.wrapping_add((column / GROUP) as usize)))
            };
            store(launch, token, column, values, scale, lane);
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
