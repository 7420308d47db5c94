//! Pull: dispatch warps claim pool rows in expert order and copy each from its source rank into the token pool.
//!
//! A ticket stands for a few rows, a lane for each: their pieces are under way together. What a token has for several experts of this rank comes
//! once, with the row that leads, which is the first in this order: other lanes store it for the rows that follow, whose own tickets have nothing to do. Where not all tiles of the
//! launch have a place in the ring at once, none follows: it would have to wait for what the row that leads keeps from happening.

use crate::cta::{CountedRows, Cta, FORMAT, Ring};
use crate::device::atomic::red_add_release_gpu;
use crate::device::barrier::bar_warp_sync;
use crate::device::bulk::{bulk_commit_group, bulk_load, bulk_store, bulk_wait_group, bulk_wait_group_read};
use crate::device::cluster::cluster_ctas;
use crate::device::fence::fence_proxy_async_global;
use crate::device::global::{ld_acquire_gpu_u32, ld_relaxed_gpu_u64, ld_weak_u32, ld_weak_u64};
use crate::device::special::ctas;
use crate::device::warp::{ballot, redux_add, shfl_idx};
use crate::launch::Launch;
use crate::layout::{FOLLOWER, ListPlace, MAX_RANKS, RowMeta};
use crate::main_loop::{Loop, MainLoop};
use crate::schedule::{
    ExpertRows, MAX_PULL_ROWS, PoolPosition, Row, RowCursor, TileRing, pull_rows, shared_row, weight_tasks,
};
use crate::shared::PULL_BUFFERS;
use crate::sources::{Sources, place_of, source_at};
use crate::status::{Stage, Timeout};
use crate::tile::WEIGHT_TILE;
use crate::warps::WARP;

/// Pieces are multiples of so many bytes, as rows are: whole lines.
const PIECE_STEP: u32 = 128;

/// Bytes of a piece when `rows` rows share a pull buffer. As many as the next power of two could: a division takes its time.
const fn piece_bytes(rows: u32) -> u32 {
    FORMAT.pull_bytes >> rows.next_power_of_two().ilog2()
}

const _: () = assert!(piece_bytes(MAX_PULL_ROWS).is_multiple_of(PIECE_STEP) && piece_bytes(MAX_PULL_ROWS) > 0);

/// Pulls rows until none is left: those of shared experts, which come first and need no counts, then those of routed ones.
#[inline(always)]
pub fn pull(launch: &Launch, cta: Cta, warp: u32, lane: u32) {
    let shape = &launch.params().shape;
    let claim = || shfl_idx(launch.claim(launch.params().workspace.counter.pull_ticket, lane), 0);
    let shared_rows = shape.shared_experts * launch.tokens();
    // In a format with scales, who quantises a token writes it to the shared experts' rows.
    let to_pull = if FORMAT.scaled { 0 } else { shared_rows };
    let batch = pull_rows(to_pull, ctas());
    let shared_tickets = (to_pull + batch - 1) >> batch.ilog2();
    // SAFETY: asked for nothing before the counts are there.
    let rows = unsafe { CountedRows::new(cta, shape.local_experts()) };
    let tiles = launch.tile_ring();
    let mut puller = Puller { launch, cta, warp, lane, rows, batch, tiles, follows: true, ring: Ring::new() };
    let mut ticket = claim();
    while ticket < shared_tickets {
        mark!(launch, Pull, ticket * batch);
        puller.copy_shared(ticket * batch + lane);
        mark!(launch, ClaimRows);
        ticket = claim();
    }
    mark!(launch, WaitForCounts);
    cta.counted().wait(0);
    Loop::wait_for_records(launch, lane < shape.ranks, lane);
    let (rows, tiles) = count_rows(&puller.rows, lane);
    puller.batch = pull_rows(rows - shared_rows, ctas());
    puller.follows = tiles - puller.tiles.first_tile <= puller.tiles.tiles;
    let mut cursor = RowCursor::new(FORMAT.tiles, puller.tiles);
    loop {
        let number = shared_rows + (ticket - shared_tickets) * puller.batch + lane;
        let row = if lane < puller.batch { cursor.seek(number, &puller.rows) } else { None };
        if ballot(row.is_some()) == 0 {
            return;
        }
        mark!(launch, Pull, number - lane);
        puller.copy(row);
        mark!(launch, ClaimRows);
        ticket = claim();
    }
}

/// All rows, and all tiles.
#[inline(always)]
fn count_rows(rows: &CountedRows, lane: u32) -> (u32, u32) {
    let (mut sum, mut tiles) = (0, 0);
    let mut expert = lane;
    while expert < rows.experts() {
        let count = rows.rows(expert);
        sum += count;
        tiles += FORMAT.tiles.tiles(count);
        expert += WARP;
    }
    (redux_add(sum), redux_add(tiles))
}

/// Rows of a routed expert of this rank by source; 0 for one that has not published in this launch (the wait for it ran out). All counts are under way
/// together: behind the last rank, its count once more.
#[inline(always)]
pub fn sources_of(launch: &Launch, expert: u32) -> Sources {
    let params = launch.params();
    let (rank, ranks, epoch) = (params.rank, params.shape.ranks, launch.epoch());
    // SAFETY: zeros are valid.
    let (mut words, mut counts): ([u64; MAX_RANKS as usize], [u32; MAX_RANKS as usize]) =
        unsafe { core::mem::zeroed() };
    unroll!(PLACE < MAX_RANKS as usize, {
        let source = source_at(rank, ranks, (PLACE as u32).min(ranks - 1));
        let place = launch.symmetric(rank, params.symmetric.counts, launch.count_index(source, expert));
        // SAFETY: a place in the counts.
        words[PLACE] = unsafe { ld_relaxed_gpu_u64(place) };
    });
    // Looked at together: one after the other, ptxas would load each when the last one has come.
    let mut old = 0;
    unroll!(PLACE < MAX_RANKS as usize, { old |= (words[PLACE] >> 32) as u32 ^ epoch });
    unroll!(PLACE < MAX_RANKS as usize, {
        let new = old == 0 || (words[PLACE] >> 32) as u32 == epoch;
        counts[PLACE] = if new && (PLACE as u32) < ranks { words[PLACE] as u32 } else { 0 };
    });
    Sources(counts)
}

/// A list's entry at a slot, with the rank that has written it: the meta of a row; then how many follow it, or [`FOLLOWER`].
#[inline(always)]
fn entry(launch: &Launch, source: u32, expert: u32, slot: u32) -> (RowMeta, u32) {
    // SAFETY: the source has written `count` entries before its counts, and `slot` is below `count`.
    let word = unsafe { ld_weak_u64(launch.list_place(launch.params().rank, source, expert, slot)) };
    let entry = RowMeta::unpack(word);
    (RowMeta { rank: source, ..entry }, entry.rank)
}

/// Where a routed expert's pool row comes from: its meta, how many follow it, and the token's hidden state.
#[inline(always)]
fn source_of(launch: &Launch, row: Row) -> (RowMeta, u32, u64) {
    let params = launch.params();
    let shape = &params.shape;
    let expert = row.expert - shape.shared_experts;
    let (source, slot) = if shape.ranks == 1 {
        // Its rows are in the order of its list: no counts to wait for.
        (params.rank, row.row)
    } else {
        let (place, slot) = sources_of(launch, expert).locate(row.row);
        (source_at(params.rank, shape.ranks, place), slot)
    };
    let (meta, followers) = entry(launch, source, expert, slot);
    (meta, followers, Loop::token(launch, source, meta.combine_row / shape.slots()))
}

/// A dispatch warp that copies rows.
struct Puller<'a> {
    launch: &'a Launch,
    cta: Cta,
    warp: u32,
    lane: u32,
    rows: CountedRows,
    /// Rows of a ticket.
    batch: u32,
    /// Where tiles have their rows.
    tiles: TileRing,
    /// Whether rows follow others: not where a row that follows may have no place yet.
    follows: bool,
    ring: Ring,
}

impl Puller<'_> {
    /// Copies the rows of a ticket for shared experts, a lane each, its own of this number: they are all tokens of this rank. All lanes call this.
    #[inline(always)]
    fn copy_shared(&mut self, number: u32) {
        let (launch, shape) = (self.launch, &self.launch.params().shape);
        let row = if self.lane < self.batch {
            shared_row(FORMAT.tiles, shape.shared_experts, launch.tokens(), number)
        } else {
            None
        };
        let token = row.map_or(0, |row| row.row);
        let source = Loop::token(launch, launch.params().rank, token);
        let destination = |_: &Self| {
            let row = row?;
            let combine_row = token * shape.slots() + shape.top_k + row.expert;
            Some((RowMeta { combine_row, rank: launch.params().rank, weight: 1.0 }, row))
        };
        self.copy_pieces(ballot(row.is_some()), self.lane, source as *const u8, destination);
    }

    /// Copies the rows of a ticket, one of each lane that has one, and those that follow them. All lanes call this.
    #[inline(always)]
    fn copy(&mut self, row: Option<Row>) {
        // Where rows follow others, all have a place.
        if let Some(Row { tile, .. }) = row {
            self.wait_for_place(tile);
        }
        let nothing = (RowMeta { combine_row: 0, rank: 0, weight: 0.0 }, FOLLOWER, 0);
        let (meta, followers, source) = row.map_or(nothing, |row| source_of(self.launch, row));
        let followers = if self.follows || row.is_none() { followers } else { 0 };
        let own = (meta, row.unwrap_or(Row { expert: 0, row: 0, pool_row: 0, tile: 0 }));
        let mut leads = followers != FOLLOWER;
        while ballot(leads) != 0 {
            let (leaders, follower) = self.share_lanes(leads, followers);
            let loads = leaders >> self.lane & 1 == 1;
            let destination = |puller: &Self| {
                let of_follower = puller.follower(own, follower);
                if loads { Some(own) } else { of_follower }
            };
            let leader = follower.map_or(self.lane, |(leader, _)| leader);
            self.copy_pieces(leaders, leader, source as *const u8, destination);
            leads &= !loads;
        }
    }

    /// The leaders, as lanes, that are copied together, such that there is a lane for each of their rows; and of a lane that leads none of them, the
    /// leader of a row that it stores, and the number of the row among those that follow. All lanes call this.
    #[inline(always)]
    fn share_lanes(&self, leads: bool, followers: u32) -> (u32, Option<(u32, u32)>) {
        let all = ballot(leads);
        if ballot(leads && followers > 0) == 0 {
            return (all, None);
        }
        let (mut leaders, mut rows) = (0, 0);
        for leader in 0..self.batch {
            let more = 1 + shfl_idx(followers, leader);
            // The first fits: a token has at most as many choices as there are lanes.
            if all >> leader & 1 == 1 && rows + more <= WARP {
                leaders |= 1 << leader;
                rows += more;
            }
        }
        let free: u32 = !leaders;
        let mut number = (free & ((1 << self.lane) - 1)).count_ones();
        let mut stores = None;
        for leader in 0..self.batch {
            let count = shfl_idx(followers, leader);
            if leaders >> leader & 1 == 1 && free >> self.lane & 1 == 1 && stores.is_none() {
                if number < count {
                    stores = Some((leader, number));
                } else {
                    number -= count;
                }
            }
        }
        (leaders, stores)
    }

    /// Where a lane's follower goes, as [`Self::share_lanes`] gave it; `own` is its own row. All lanes call this.
    #[inline(always)]
    fn follower(&self, own: (RowMeta, Row), follower: Option<(u32, u32)>) -> Option<(RowMeta, Row)> {
        if ballot(follower.is_some()) == 0 {
            return None;
        }
        let params = self.launch.params();
        let shape = &params.shape;
        let (leader, number) = follower.unwrap_or((0, 0));
        let (meta, row) = own;
        let (source, combine_row) = (shfl_idx(meta.rank, leader), shfl_idx(meta.combine_row, leader));
        let mut position = PoolPosition {
            expert: shfl_idx(row.expert, leader),
            tile: shfl_idx(row.tile - FORMAT.tiles.tile_of_row(row.row, self.rows.rows(row.expert)), leader),
        };
        follower?;
        // SAFETY: the source has written the places of all followers before its counts.
        let word = unsafe {
            ld_weak_u32(self.launch.follower_place(params.rank, source, combine_row / shape.slots(), number))
        };
        let ListPlace { expert, slot } = ListPlace::unpack(word);
        // The leader's expert is the first of all, but for what a launch reads that is past its deadline.
        let local = shape.shared_experts + expert;
        if local < position.expert {
            return None;
        }
        let (meta, _) = entry(self.launch, source, expert, slot);
        let row = sources_of(self.launch, expert).index_of(place_of(params.rank, shape.ranks, source), slot);
        while position.expert < local {
            position = position.next(FORMAT.tiles, &self.rows);
        }
        Some((meta, position.row(FORMAT.tiles, self.tiles, row, self.rows.rows(local))))
    }

    /// Waits until linear 2 of the tile that had the place of this one before is through.
    #[inline(always)]
    fn wait_for_place(&self, tile: u32) {
        let Some(before) = self.tiles.before(tile) else { return };
        let params = self.launch.params();
        let done = self.launch.counter(params.workspace.counter.tile_done, before);
        let tasks = weight_tasks(params.shape.hidden, WEIGHT_TILE, cluster_ctas());
        let missing = || Timeout { stage: Stage::Ring, rank: params.rank, subject: before };
        // SAFETY: a counter of this launch.
        self.launch.wait_until(missing, || unsafe { ld_acquire_gpu_u32(done) } >= tasks);
        // The rows were read, and will be written, by bulk copies; the acquire is an ordinary one.
        fence_proxy_async_global();
    }

    /// Copies the rows of all `leaders` piece by piece: one piece is loaded while the one before is stored, by every lane that has a `destination`,
    /// from what was loaded for the lane `leader`; then the rows are counted into their tiles. All lanes call this.
    #[inline(always)]
    fn copy_pieces(
        &mut self,
        leaders: u32,
        leader: u32,
        source: *const u8,
        destination: impl FnOnce(&Self) -> Option<(RowMeta, Row)>,
    ) {
        let Self { launch, cta, warp, lane, .. } = *self;
        let hidden = launch.params().shape.hidden;
        let (bytes, rows) = (FORMAT.record_bytes(hidden), leaders.count_ones());
        let row_bytes = FORMAT.row_bytes(hidden);
        let piece = piece_bytes(rows);
        let part = |ring: Ring| {
            let number = (leaders & ((1 << leader) - 1)).count_ones();
            cta.pull_buffer(warp * PULL_BUFFERS + ring.slot).offset(number * piece)
        };
        let load = |ring: Ring, at: u32| {
            let length = piece.min(bytes - at);
            let full = cta.pull_full(warp * PULL_BUFFERS + ring.slot);
            if lane == 0 {
                full.arrive_expect_tx(length * rows);
            }
            bar_warp_sync();
            if leaders >> lane & 1 == 1 {
                // SAFETY: the token is one of its rank's, its row a multiple of 128 bytes; all lanes' last stores from the buffer have been read.
                unsafe { bulk_load(part(ring), source.wrapping_add(at as usize), length, full) };
            }
        };
        let mut loading = self.ring;
        load(loading, 0);
        loading.advance(PULL_BUFFERS);
        // While the first pieces are on their way.
        let workspace = &launch.params().workspace;
        let destination = destination(self).map(|(meta, row)| {
            launch.write_row(row.pool_row, meta);
            row
        });
        let mut at = 0;
        while at < bytes {
            if at + piece < bytes {
                bulk_wait_group_read::<0>();
                load(loading, at + piece);
                loading.advance(PULL_BUFFERS);
            }
            cta.pull_full(warp * PULL_BUFFERS + self.ring.slot).wait(self.ring.parity);
            if let Some(Row { pool_row, .. }) = destination {
                let row = launch.pool_row(workspace.tokens, hidden, pool_row);
                let elements = piece.min(row_bytes.saturating_sub(at));
                if elements > 0 {
                    // SAFETY: the piece has landed, and the row in the pool is this lane's.
                    unsafe { bulk_store(row.wrapping_add(at as usize), part(self.ring), elements) };
                    bulk_commit_group();
                }
                Loop::store_scales(launch, part(self.ring), at, piece.min(bytes - at), pool_row);
            }
            self.ring.advance(PULL_BUFFERS);
            at += piece;
        }
        if let Some(Row { tile, .. }) = destination {
            bulk_wait_group::<0>();
            // The row was written, and will be read, by bulk copies; the release is an ordinary one.
            fence_proxy_async_global();
            // SAFETY: a counter of this launch.
            unsafe { red_add_release_gpu(launch.counter(workspace.counter.rows_ready, tile), 1) };
        }
    }
}
