//! Pull: dispatch warps claim pool rows in expert order and copy each from its source rank into the token pool.
//!
//! A ticket stands for a few rows, a lane for each: their pieces are under way together.

use crate::cta::{Cta, Ring};
use crate::device::atomic::red_add_release_gpu;
use crate::device::barrier::{bar_sync, bar_warp_sync};
use crate::device::bulk::{bulk_commit_group, bulk_load, bulk_store, bulk_wait_group, bulk_wait_group_read};
use crate::device::fence::fence_proxy_async;
use crate::device::global::{ld_relaxed_gpu_u64, ld_weak_u64, st_weak_u64};
use crate::device::special::ctas;
use crate::device::warp::{ballot, redux_add};
use crate::launch::{COUNTS_BARRIER, Launch};
use crate::layout::{MAX_RANKS, RowMeta};
use crate::roles::route::claim;
use crate::roles::schedule::COUNTS_THREADS;
use crate::schedule::{Row, RowCursor, pull_rows};
use crate::shared::{PULL_BUFFERS, PULL_BYTES, WARP};

/// Pulls rows until none is left.
#[inline(always)]
pub fn pull(launch: &Launch, cta: Cta, warp: u32, lane: u32) {
    let params = launch.params();
    let experts = params.shape.local_experts();
    bar_sync::<COUNTS_BARRIER, COUNTS_THREADS>();
    // SAFETY: the scheduler warp wrote the counts before the barrier.
    let rows = |expert: u32| unsafe { cta.expert_rows(expert).load_u32() };
    let batch = pull_rows(count_rows(experts, lane, rows), ctas());
    let mut puller = Puller { launch, cta, warp, lane, piece: PULL_BYTES / batch, ring: Ring::new() };
    let next = launch.counter(params.workspace.counter.pull_ticket, 0);
    let mut cursor = RowCursor::new();
    loop {
        let first = claim(next, lane) * batch;
        let row = if lane < batch { cursor.seek(first + lane, experts, rows) } else { None };
        if ballot(row.is_some()) == 0 {
            return;
        }
        puller.copy(row);
    }
}

/// All rows to pull.
#[inline(always)]
fn count_rows(experts: u32, lane: u32, rows: impl Fn(u32) -> u32) -> u32 {
    let mut sum = 0;
    let mut expert = lane;
    while expert < experts {
        sum += rows(expert);
        expert += WARP;
    }
    redux_add(sum)
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

/// Where a pool row comes from: its meta, and the token's number on its rank.
#[inline(always)]
fn source_of(launch: &Launch, row: Row) -> (RowMeta, u32) {
    let params = launch.params();
    let shape = &params.shape;
    let routed = shape.routed_experts();
    if row.expert >= routed {
        let slot = shape.top_k + row.expert - routed;
        let combine_row = row.row * shape.slots() + slot;
        return (RowMeta { combine_row, rank: params.rank, weight: 1.0 }, row.row);
    }
    // Rows of one expert come source rank by source rank. All counts are loaded before the first is looked at.
    // SAFETY: zeros are valid u32.
    let mut counts: [u32; MAX_RANKS as usize] = unsafe { core::mem::zeroed() };
    unroll!(SOURCE < MAX_RANKS as usize, {
        if (SOURCE as u32) < shape.ranks {
            counts[SOURCE] = count_from(launch, SOURCE as u32, row.expert);
        }
    });
    let (mut source, mut slot, mut first) = (0, row.row, 0);
    unroll!(SOURCE < MAX_RANKS as usize, {
        if row.row >= first {
            source = SOURCE as u32;
            slot = row.row - first;
        }
        first += counts[SOURCE];
    });
    let list = (source * routed + row.expert) as u64 * shape.max_tokens as u64;
    // SAFETY: the source has published `count` entries, and `slot` is below it.
    let entry = unsafe { ld_weak_u64(launch.symmetric(params.rank, params.symmetric.lists, list + slot as u64)) };
    let entry = RowMeta { rank: source, ..RowMeta::unpack(entry) };
    (entry, entry.combine_row / shape.slots())
}

/// A dispatch warp that copies rows.
struct Puller<'a> {
    launch: &'a Launch,
    cta: Cta,
    warp: u32,
    lane: u32,
    /// Bytes of a row that are under way at once.
    piece: u32,
    ring: Ring,
}

impl Puller<'_> {
    /// Copies the rows of a ticket, one of each lane that has one, and counts them into their tiles. All lanes call this.
    #[inline(always)]
    fn copy(&mut self, row: Option<Row>) {
        let launch = self.launch;
        let workspace = &launch.params().workspace;
        let mut meta = RowMeta { combine_row: 0, rank: 0, weight: 0.0 };
        let (mut source, mut destination) = (core::ptr::null(), core::ptr::null_mut());
        if let Some(row) = row {
            let token;
            (meta, token) = source_of(launch, row);
            let bytes = launch.row_bytes() as u64;
            // SAFETY: the source published the distance before its counts.
            let distance = unsafe { ld_weak_u64(launch.hidden_distance(launch.params().rank, meta.rank)) };
            let hidden_states = launch.symmetric_base(meta.rank).wrapping_add(distance);
            source = (hidden_states + token as u64 * bytes) as *const u8;
            destination = launch.workspace(workspace.tokens, row.pool_row as u64 * bytes);
        }
        self.copy_pieces(row.is_some(), source, destination);
        if let Some(row) = row {
            bulk_wait_group::<0>();
            // The row was written, and will be read, by bulk copies; the release is an ordinary one.
            fence_proxy_async();
            // SAFETY: the row and its tile lie in the pools, and this lane alone has the row.
            unsafe {
                st_weak_u64(launch.workspace(workspace.row_meta, row.pool_row as u64), meta.pack());
                red_add_release_gpu(launch.counter(workspace.counter.rows_ready, row.tile), 1);
            }
        }
    }

    /// Copies the rows of all `active` lanes piece by piece: one piece is loaded while the one before is stored.
    #[inline(always)]
    fn copy_pieces(&mut self, active: bool, source: *const u8, destination: *mut u8) {
        let Self { launch, cta, warp, lane, piece, .. } = *self;
        let bytes = launch.row_bytes();
        let rows = ballot(active).count_ones();
        let buffer = |ring: Ring| warp * PULL_BUFFERS + ring.slot;
        let load = |ring: Ring, at: u32| {
            let length = piece.min(bytes - at);
            let full = cta.pull_full(buffer(ring));
            if lane == 0 {
                full.arrive_expect_tx(length * rows);
            }
            bar_warp_sync();
            if active {
                let part = cta.pull_buffer(buffer(ring)).offset(lane * piece);
                // SAFETY: the token is one of its rank's, its row a multiple of 128 bytes; the last store from this lane's part has been read.
                unsafe { bulk_load(part, source.wrapping_add(at as usize), length, full) };
            }
        };
        let mut loading = self.ring;
        load(loading, 0);
        loading.advance(PULL_BUFFERS);
        let mut at = 0;
        while at < bytes {
            if at + piece < bytes {
                bulk_wait_group_read::<0>();
                load(loading, at + piece);
                loading.advance(PULL_BUFFERS);
            }
            cta.pull_full(buffer(self.ring)).wait(self.ring.parity);
            if active {
                let part = cta.pull_buffer(buffer(self.ring)).offset(lane * piece);
                // SAFETY: the piece has landed, and the row in the pool is this lane's.
                unsafe { bulk_store(destination.wrapping_add(at as usize), part, piece.min(bytes - at)) };
                bulk_commit_group();
            }
            self.ring.advance(PULL_BUFFERS);
            at += piece;
        }
    }
}
