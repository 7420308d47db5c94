//! Pull: dispatch warps claim pool rows in expert order and copy each from its source rank into the token pool.
//!
//! A ticket stands for a few rows, a lane for each: their pieces are under way together.

use crate::cta::{Cta, Ring};
use crate::device::atomic::red_add_release_gpu;
use crate::device::barrier::{bar_sync, bar_warp_sync};
use crate::device::bulk::{bulk_commit_group, bulk_load, bulk_store, bulk_wait_group, bulk_wait_group_read};
use crate::device::fence::fence_proxy_async_global;
use crate::device::global::{ld_relaxed_gpu_u64, ld_weak_u64, st_weak_u64};
use crate::device::special::ctas;
use crate::device::warp::{ballot, redux_add, shfl_idx};
use crate::launch::{COUNTS_BARRIER, Launch};
use crate::layout::{MAX_RANKS, RowMeta};
use crate::roles::route::claim;
use crate::roles::schedule::COUNTS_THREADS;
use crate::schedule::{Row, RowCursor, pull_rows};
use crate::shared::{PULL_BUFFERS, PULL_BYTES, WARP};
use crate::sources::{Sources, source_at};

/// Pulls rows until none is left.
#[inline(always)]
pub fn pull(launch: &Launch, cta: Cta, warp: u32, lane: u32) {
    let params = launch.params();
    let experts = params.shape.local_experts();
    let next = launch.counter(params.workspace.counter.pull_ticket, 0);
    // As the scheduler's first.
    let claimed = claim(next, lane);
    mark!(launch, WaitForCounts);
    bar_sync::<COUNTS_BARRIER, COUNTS_THREADS>();
    // SAFETY: the scheduler warp wrote the counts before the barrier.
    let rows = |expert: u32| unsafe { cta.expert_rows(expert).load_u32() };
    let batch = pull_rows(count_rows(experts, lane, rows), ctas());
    let mut puller = Puller { launch, cta, warp, lane, piece: PULL_BYTES / batch, ring: Ring::new() };
    let mut cursor = RowCursor::new();
    let mut ticket = shfl_idx(claimed, 0);
    loop {
        let row = if lane < batch { cursor.seek(ticket * batch + lane, experts, rows) } else { None };
        if ballot(row.is_some()) == 0 {
            return;
        }
        mark!(launch, Pull, ticket * batch);
        puller.copy(row);
        mark!(launch, ClaimRows);
        ticket = shfl_idx(claim(next, lane), 0);
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

/// Rows that `source` sends to a routed expert of this rank in this launch; 0 if it has not published (the wait for it ran out).
#[inline(always)]
pub fn count_from(launch: &Launch, source: u32, expert: u32) -> u32 {
    let params = launch.params();
    let place = launch.symmetric(params.rank, params.symmetric.counts, launch.count_index(source, expert));
    // SAFETY: a place in the counts.
    let word = unsafe { ld_relaxed_gpu_u64(place) };
    if (word >> 32) as u32 == launch.epoch() { word as u32 } else { 0 }
}

/// Rows of a routed expert of this rank by source. All counts are loaded before the first is looked at.
#[inline(always)]
fn sources_of(launch: &Launch, expert: u32) -> Sources {
    let (rank, ranks) = (launch.params().rank, launch.params().shape.ranks);
    // SAFETY: zeros are valid u32.
    let mut counts: [u32; MAX_RANKS as usize] = unsafe { core::mem::zeroed() };
    unroll!(PLACE < MAX_RANKS as usize, {
        if (PLACE as u32) < ranks {
            counts[PLACE] = count_from(launch, source_at(rank, ranks, PLACE as u32), expert);
        }
    });
    Sources(counts)
}

/// Where a pool row comes from: its meta, and the token's hidden state.
#[inline(always)]
fn source_of(launch: &Launch, row: Row) -> (RowMeta, u64) {
    let params = launch.params();
    let shape = &params.shape;
    let routed = shape.routed_experts();
    let bytes = launch.row_bytes() as u64;
    if row.expert < shape.shared_experts {
        let slot = shape.top_k + row.expert;
        let combine_row = row.row * shape.slots() + slot;
        let meta = RowMeta { combine_row, rank: params.rank, weight: 1.0 };
        return (meta, launch.hidden_states() + row.row as u64 * bytes);
    }
    let expert = row.expert - shape.shared_experts;
    let (place, slot) = sources_of(launch, expert).locate(row.row);
    let source = source_at(params.rank, shape.ranks, place);
    let list = (source * routed + expert) as u64 * shape.max_tokens as u64;
    let entry = launch.symmetric(params.rank, params.symmetric.lists, list + slot as u64);
    // SAFETY: the source has written the distance and `count` entries before its counts, and `slot` is below `count`.
    let (entry, distance) = unsafe { (ld_weak_u64(entry), ld_weak_u64(launch.hidden_distance(params.rank, source))) };
    let meta = RowMeta { rank: source, ..RowMeta::unpack(entry) };
    let token = meta.combine_row / shape.slots();
    (meta, launch.symmetric_base(source).wrapping_add(distance) + token as u64 * bytes)
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
        let (mut source, mut destination) = (0, core::ptr::null_mut());
        if let Some(row) = row {
            (meta, source) = source_of(launch, row);
            destination = launch.workspace(workspace.tokens, row.pool_row as u64 * launch.row_bytes() as u64);
        }
        self.copy_pieces(row.is_some(), source as *const u8, destination);
        if let Some(row) = row {
            bulk_wait_group::<0>();
            // The row was written, and will be read, by bulk copies; the release is an ordinary one.
            fence_proxy_async_global();
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
