//! Pull: dispatch warps claim pool rows in expert order and copy each from its source rank into the token pool.

use crate::cta::{Cta, Ring};
use crate::device::atomic::red_add_release_gpu;
use crate::device::barrier::bar_sync;
use crate::device::bulk::{bulk_commit_group, bulk_load, bulk_store, bulk_wait_group, bulk_wait_group_read};
use crate::device::fence::fence_proxy_async;
use crate::device::global::{ld_relaxed_gpu_u64, ld_weak_u64, st_weak_u64};
use crate::device::warp::shfl_idx;
use crate::launch::{COUNTS_BARRIER, Launch};
use crate::layout::RowMeta;
use crate::roles::route::claim;
use crate::roles::schedule::COUNTS_THREADS;
use crate::schedule::{Row, RowCursor};
use crate::shared::{PULL_BUFFERS, PULL_BYTES};

/// Pulls rows until none is left.
#[inline(always)]
pub fn pull(launch: &Launch, cta: Cta, warp: u32, lane: u32) {
    let params = launch.params();
    let experts = params.shape.local_experts();
    bar_sync::<COUNTS_BARRIER>(COUNTS_THREADS);
    // SAFETY: the scheduler warp wrote the counts before the barrier.
    let rows = |expert: u32| unsafe { cta.expert_rows(expert).load_u32() };
    let mut cursor = RowCursor::new();
    let mut ring = Ring::new();
    let next = launch.counter(params.workspace.counter.pull_ticket, 0);
    let rows_ready = launch.counter(params.workspace.counter.rows_ready, 0);
    loop {
        let ticket = claim(next, lane);
        let Some(row) = cursor.seek(ticket, experts, rows) else {
            return;
        };
        let (meta, token) = source_of(launch, row, lane);
        if lane == 0 {
            copy_row(launch, cta, warp, &mut ring, meta.rank, token, row.pool_row);
            // SAFETY: the row and its tile lie in the pools, and this warp alone has claimed the row.
            unsafe {
                st_weak_u64(launch.workspace(params.workspace.row_meta, row.pool_row as u64), meta.pack());
                red_add_release_gpu(rows_ready.add(row.tile as usize), 1);
            }
        }
    }
}

/// Where a pool row comes from: its meta, and the token's number on its rank. All lanes call this.
#[inline(always)]
fn source_of(launch: &Launch, row: Row, lane: u32) -> (RowMeta, u32) {
    let params = launch.params();
    let shape = &params.shape;
    let routed = shape.routed_experts();
    if row.expert >= routed {
        let slot = shape.top_k + row.expert - routed;
        let combine_row = row.row * shape.slots() + slot;
        return (RowMeta { combine_row, rank: params.rank, weight: 1.0 }, row.row);
    }
    let mut count = 0;
    if lane < shape.ranks {
        count = count_from(launch, lane, row.expert);
    }
    // Rows of one expert come source rank by source rank.
    let (mut source, mut slot) = (0, row.row);
    loop {
        let count = shfl_idx(count, source);
        if slot < count || source + 1 == shape.ranks {
            break;
        }
        slot -= count;
        source += 1;
    }
    let list = (source * routed + row.expert) as u64 * shape.max_tokens as u64;
    // SAFETY: the source has published `count` entries, and `slot` is below it.
    let entry = unsafe { ld_weak_u64(launch.symmetric(params.rank, params.symmetric.lists, list + slot as u64)) };
    let entry = RowMeta { rank: source, ..RowMeta::unpack(entry) };
    (entry, entry.combine_row / shape.slots())
}

/// Rows that `source` sends to a local expert in this launch; 0 if it has not published (the wait for it ran out).
#[inline(always)]
pub fn count_from(launch: &Launch, source: u32, expert: u32) -> u32 {
    let params = launch.params();
    let place = launch.symmetric(params.rank, params.symmetric.counts, launch.count_index(source, expert));
    // SAFETY: a place in the counts.
    let word = unsafe { ld_relaxed_gpu_u64(place) };
    if (word >> 32) as u32 == launch.epoch() { word as u32 } else { 0 }
}

/// Copies a token's hidden state from its rank into the pool, in pieces: one is loaded while the one before is stored.
#[inline(always)]
fn copy_row(launch: &Launch, cta: Cta, warp: u32, ring: &mut Ring<PULL_BUFFERS>, rank: u32, token: u32, pool_row: u32) {
    let params = launch.params();
    let bytes = launch.row_bytes();
    let buffers = warp * PULL_BUFFERS;
    // SAFETY: the source published the distance before its counts, and the token is one of its tokens; the pool holds the row.
    let (source, destination) = unsafe {
        let distance = ld_weak_u64(launch.hidden_distance(params.rank, rank));
        let source = launch.symmetric_base(rank).wrapping_add(distance) + token as u64 * bytes as u64;
        let destination = launch.workspace::<u8>(params.workspace.tokens, pool_row as u64 * bytes as u64);
        (source as *const u8, destination)
    };
    let load = |ring: Ring<PULL_BUFFERS>, at: u32| {
        let length = PULL_BYTES.min(bytes - at);
        let full = cta.pull_full(buffers + ring.slot);
        full.arrive_expect_tx(length);
        // SAFETY: rows are multiples of 128 bytes; the buffer's last store has been read.
        unsafe { bulk_load(cta.pull_buffer(buffers + ring.slot), source.add(at as usize), length, full) };
    };
    let mut loading = *ring;
    load(loading, 0);
    loading.advance();
    let mut at = 0;
    while at < bytes {
        if at + PULL_BYTES < bytes {
            bulk_wait_group_read::<0>();
            load(loading, at + PULL_BYTES);
            loading.advance();
        }
        cta.pull_full(buffers + ring.slot).wait(ring.parity);
        // SAFETY: the piece has landed, and its place in the pool is this warp's.
        unsafe {
            bulk_store(destination.add(at as usize), cta.pull_buffer(buffers + ring.slot), PULL_BYTES.min(bytes - at))
        };
        bulk_commit_group();
        ring.advance();
        at += PULL_BYTES;
    }
    bulk_wait_group::<0>();
    // The row was written, and will be read, by bulk copies; the release that follows is an ordinary one.
    fence_proxy_async();
}
