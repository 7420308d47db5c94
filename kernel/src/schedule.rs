//! The order of work: which rows, tiles and tasks there are, the same for every CTA of a rank.
//!
//! GEMM tasks are claimed from one ticket, one for each CTA of a cluster at once. An expert's tiles are cut into parts. Ticket by ticket, a part's linear 1 is followed by linear
//! 2 of the part that lies two waves of token tiles before it, and at the end come the combine chunks. A task's dependencies always have smaller tickets.
//!
//! Routed experts' rows lie in a ring of tiles ([`TileRing`]): a row is pulled when linear 2 of the tile that had its place is through. [`Cut::least_ring`] says why that always comes.

use crate::format::Format;
use crate::layout::Shape;
use crate::task::{Phase, Task};
use crate::tile::{Tiles, WEIGHT_TILE};
use crate::warps::WARP;

/// Choices that a lane of a warp that routes has under way at once.
pub const ROUTE_PASSES: u32 = 4;

/// The most steps that one warp takes alone. Each is a trip to the L2 cache and back for its slots; a hand-over of chunks is three, and a fence of the system.
const ROUTE_ALONE_STEPS: u32 = 2;

/// Tokens that a warp routes in one step: a lane for each choice, in [`ROUTE_PASSES`] passes.
pub const fn route_step(top_k: u32) -> u32 {
    ROUTE_PASSES * WARP / top_k.next_power_of_two()
}

/// Tokens that one route ticket stands for: all while they are few, so that one warp routes and publishes them with nothing handed over.
pub const fn route_tokens(tokens: u32, top_k: u32) -> u32 {
    let step = route_step(top_k);
    if tokens > ROUTE_ALONE_STEPS * step {
        step
    } else if tokens == 0 {
        1
    } else {
        tokens
    }
}

/// Waves of token tiles whose linear 1 comes between linear 1 and linear 2 of a part: so many that its linear 1 is done, not only claimed, when its linear 2 is claimed.
pub const WAVES_AHEAD: u32 = 2;

/// The most tokens that one combine task stands for.
pub const MAX_COMBINE_TOKENS: u32 = 16;

/// Chunks that `tokens` tokens are routed in: at least one, for a rank without tokens publishes its counts too.
pub const fn route_chunks(tokens: u32, top_k: u32) -> u32 {
    let chunks = tokens.div_ceil(route_tokens(tokens, top_k));
    if chunks == 0 { 1 } else { chunks }
}

/// The most rows that one pull ticket stands for, a power of two: a lane copies each.
pub const MAX_PULL_ROWS: u32 = 8;

/// Rows of one pull ticket, a power of two: a single one while rows are few, so that all CTAs share them, then more, so that one
/// CTA has several on their way.
pub const fn pull_rows(rows: u32, ctas: u32) -> u32 {
    let mut batch = MAX_PULL_ROWS;
    while batch > 1 && batch * 4 * ctas > rows {
        batch /= 2;
    }
    batch
}

/// Tokens of one combine task, so that few tokens spread over all CTAs and many need few tickets.
pub const fn combine_tokens(tokens: u32, ctas: u32) -> u32 {
    let even = tokens.div_ceil(ctas);
    if even < 1 {
        1
    } else if even > MAX_COMBINE_TOKENS {
        MAX_COMBINE_TOKENS
    } else {
        even
    }
}

/// Combine tasks for `tokens` tokens.
pub const fn combine_chunks(tokens: u32, ctas: u32) -> u32 {
    tokens.div_ceil(combine_tokens(tokens, ctas))
}

/// Tasks of `per_task` weight rows that `rows` of them give for one token tile, as many for each CTA of a cluster.
pub const fn weight_tasks(rows: u32, per_task: u32, cluster: u32) -> u32 {
    rows.div_ceil(per_task * cluster) * cluster
}

/// Binary logarithm of the bytes of tokens that may stay in the L2 cache while an expert's weights go through it: 16 MB, two thirds of what each
/// half of Hopper's 50 MB keeps for its SMs.
const GROUP_BYTES: u32 = 24;

/// Token tiles of an expert that take turns at each block of weights, a power of two: as many as stay in the L2 cache meanwhile, when a product sums over rows of `row_bytes`.
pub const fn group_tiles(tiles: Tiles, row_bytes: u32) -> u32 {
    1 << (GROUP_BYTES - tiles.widest().next_power_of_two().ilog2())
        .saturating_sub(row_bytes.next_power_of_two().ilog2())
}

/// The SMs that workspaces are made for: those of an H100 or H200.
const SMS: u32 = 132;

/// The most tiles of a group that a part need hold: as many rows as this use a block of weights while it is in the L2 cache have long paid for it.
const MAX_PART_GROUP: u32 = 32;

/// How the order of work is cut, in token tiles, and the ring that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Tiles of one wave, at least 1.
    pub wave_tiles: u32,
    /// The most tiles of a part, at least 1.
    pub part_tiles: u32,
    /// Tiles of the ring.
    pub ring_tiles: u32,
}

impl Cut {
    /// What is fast on so many SMs, with a ring in which rows are pulled at least a wave ahead. A wave's linear 1 gives every SM two tasks; a part has at least a wave, in whole
    /// groups, so that weights are not read for a few tiles.
    pub const fn new(shape: &Shape, format: &Format, sms: u32) -> Self {
        let wave = (2 * sms).div_ceil(weight_tasks(2 * shape.intermediate, format.linear1_rows(), 1));
        let wave_tiles = if wave == 0 { 1 } else { wave };
        let group = group_tiles(format.tiles, format.row_bytes(shape.hidden));
        let part_tiles = wave_tiles.next_multiple_of(if group < MAX_PART_GROUP { group } else { MAX_PART_GROUP });
        let least = Self::least_ring(wave_tiles, part_tiles);
        Self { wave_tiles, part_tiles, ring_tiles: least + wave_tiles }
    }

    /// Tiles of the ring of a workspace whose largest layer is this one: as many as there can be at most are enough.
    pub const fn workspace_ring(shape: &Shape, format: &Format) -> u32 {
        let (ring, all) = (Self::new(shape, format, SMS).ring_tiles, shape.routed_tiles(format));
        if ring < all { ring } else { all }
    }

    /// The same with a ring of `ring_tiles` tiles, when there are at most `all` tiles: if it holds neither them nor what the waves and parts need, these are smaller.
    pub const fn within(self, ring_tiles: u32, all: u32) -> Self {
        let share = ring_tiles.saturating_sub(MAX_PULL_ROWS) / 4;
        if ring_tiles >= all || ring_tiles >= Self::least_ring(self.wave_tiles, self.part_tiles) {
            Self { ring_tiles, ..self }
        } else {
            assert!(share > 0);
            Self { wave_tiles: share, part_tiles: share, ring_tiles }
        }
    }

    /// The fewest tiles of a ring with which no pull waits in vain, were there only one CTA. Before linear 2 of a part come products of linear 1 of its own tiles, of those of
    /// the waves behind it, and of one part that begins in these. The rows of all those must find place, and with them those that share the last one's pull ticket,
    /// while the tiles of the part have theirs.
    pub const fn least_ring(wave_tiles: u32, part_tiles: u32) -> u32 {
        WAVES_AHEAD * wave_tiles + 2 * part_tiles + MAX_PULL_ROWS
    }
}

/// Where tiles have their rows in the pools. Shared experts' rows come first, each expert's behind the last one's: their number is known, and all of them are written at the start. Those of routed
/// experts lie tile by tile in places of the same size, as many as the ring has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileRing {
    /// The first tile of a routed expert.
    pub first_tile: u32,
    /// The pools' first row of the ring.
    pub first_row: u32,
    /// Rows of a place.
    pub place_rows: u32,
    /// Places.
    pub tiles: u32,
}

impl TileRing {
    /// Rows of a place: those of the widest tile that there can be.
    pub const fn place_rows(shape: &Shape, format: &Format) -> u32 {
        format.tiles.width(format.tiles.index(shape.ranks * shape.max_tokens))
    }

    /// First pool row of a routed expert's tile.
    #[inline(always)]
    pub const fn pool_row(self, tile: u32) -> u32 {
        self.first_row + (tile - self.first_tile) % self.tiles * self.place_rows
    }

    /// The tile that had the place of this one before.
    #[inline(always)]
    pub const fn before(self, tile: u32) -> Option<u32> {
        if tile - self.first_tile < self.tiles { None } else { Some(tile - self.tiles) }
    }

    /// First pool row of a tile of an expert with `rows` rows, the tile's first of which is `first`.
    #[inline(always)]
    const fn tile_row(self, tiles: Tiles, expert: u32, rows: u32, tile: u32, first: u32) -> u32 {
        if tile < self.first_tile { expert * tiles.padded_rows(rows) + first } else { self.pool_row(tile) }
    }
}

/// Rows of the local experts.
pub trait ExpertRows {
    /// Number of local experts.
    fn experts(&self) -> u32;

    /// Rows of an expert.
    fn rows(&self, expert: u32) -> u32;

    /// The first expert from this one on that has rows; [`Self::experts`] if there is none. Most have none when tokens are few, and every CTA goes past all of them
    /// before its first product can begin.
    fn next_hit(&self, expert: u32) -> u32;
}

impl ExpertRows for [u32] {
    fn experts(&self) -> u32 {
        self.len() as u32
    }

    fn rows(&self, expert: u32) -> u32 {
        self[expert as usize]
    }

    fn next_hit(&self, expert: u32) -> u32 {
        (expert..self.experts()).find(|&expert| self.rows(expert) > 0).unwrap_or(self.experts())
    }
}

/// Where an expert's tiles begin. Experts follow each other in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolPosition {
    /// Local expert.
    pub expert: u32,
    /// Its first tile.
    pub tile: u32,
}

impl PoolPosition {
    /// At the first expert.
    pub const FIRST: Self = Self { expert: 0, tile: 0 };

    /// At the next expert that has rows.
    #[inline(always)]
    pub fn next(self, tiles: Tiles, rows: &(impl ExpertRows + ?Sized)) -> Self {
        let count = rows.rows(self.expert);
        Self { expert: rows.next_hit(self.expert + 1), tile: self.tile + tiles.tiles(count) }
    }

    /// A row of the expert, which has `count`.
    #[inline(always)]
    pub fn row(self, tiles: Tiles, ring: TileRing, row: u32, count: u32) -> Row {
        let number = tiles.tile_of_row(row, count);
        let (first, tile) = (tiles.rows_of_tile(number, count).0, self.tile + number);
        let pool_row = ring.tile_row(tiles, self.expert, count, tile, first) + row - first;
        Row { expert: self.expert, row, pool_row, tile }
    }
}

/// Neighbouring tiles of an expert, as many as a part has, or what is left of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// Local expert.
    expert: u32,
    /// The first tile.
    tile: u32,
    /// Its number among those of its expert.
    number: u32,
}

impl Part {
    /// The first of the first expert that has rows.
    #[inline(always)]
    fn first(rows: &(impl ExpertRows + ?Sized)) -> Self {
        Self { expert: rows.next_hit(0), tile: 0, number: 0 }
    }

    /// Tiles of it, if its expert has `rows` rows.
    #[inline(always)]
    fn tiles(self, shape: &ScheduleShape, rows: u32) -> u32 {
        shape.part_tiles.min(shape.format.tiles.tiles(rows) - self.number)
    }

    /// The next one.
    #[inline(always)]
    fn next(self, shape: &ScheduleShape, rows: &(impl ExpertRows + ?Sized)) -> Self {
        let count = rows.rows(self.expert);
        let tiles = self.tiles(shape, count);
        let (tile, number) = (self.tile + tiles, self.number + tiles);
        if number < shape.format.tiles.tiles(count) {
            Self { tile, number, ..self }
        } else {
            Self { expert: rows.next_hit(self.expert + 1), tile, number: 0 }
        }
    }
}

/// Walks the rows to pull in ticket order: expert by expert.
pub struct RowCursor {
    tiles: Tiles,
    ring: TileRing,
    position: PoolPosition,
    first_ticket: u32,
}

/// The row of one pull ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Local expert.
    pub expert: u32,
    /// Number of the row within its expert.
    pub row: u32,
    /// Row in the pools.
    pub pool_row: u32,
    /// Tile that holds it.
    pub tile: u32,
}

/// The row of this number among those of the shared experts, which come first, each with all `tokens` tokens of its rank; `None` behind the last.
#[inline(always)]
pub fn shared_row(tiles: Tiles, shared_experts: u32, tokens: u32, mut number: u32) -> Option<Row> {
    let mut position = PoolPosition::FIRST;
    while position.expert < shared_experts {
        if number < tokens {
            let pool_row = position.expert * tiles.padded_rows(tokens) + number;
            let tile = position.tile + tiles.tile_of_row(number, tokens);
            return Some(Row { expert: position.expert, row: number, pool_row, tile });
        }
        number -= tokens;
        position.expert += 1;
        position.tile += tiles.tiles(tokens);
    }
    None
}

impl RowCursor {
    /// Before the first row.
    pub const fn new(tiles: Tiles, ring: TileRing) -> Self {
        Self { tiles, ring, position: PoolPosition::FIRST, first_ticket: 0 }
    }

    /// The row of `ticket`, `None` behind the last. Tickets must not decrease from call to call.
    #[inline(always)]
    pub fn seek(&mut self, ticket: u32, rows: &(impl ExpertRows + ?Sized)) -> Option<Row> {
        while self.position.expert < rows.experts() {
            let count = rows.rows(self.position.expert);
            let row = ticket - self.first_ticket;
            if row < count {
                return Some(self.position.row(self.tiles, self.ring, row, count));
            }
            self.first_ticket += count;
            self.position = self.position.next(self.tiles, rows);
        }
        None
    }
}

/// The sizes that the task order depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduleShape {
    /// How rows are cut into tiles, and what one task is.
    pub format: Format,
    /// Token tiles of one wave, at least 1.
    pub wave_tiles: u32,
    /// The most token tiles of a part, at least 1.
    pub part_tiles: u32,
    /// Where tiles have their rows.
    pub ring: TileRing,
    /// Rows of the linear 1 weights of one expert: twice the intermediate size.
    pub linear1_rows: u32,
    /// Rows of the linear 2 weights of one expert: the hidden size.
    pub linear2_rows: u32,
    /// Combine tasks.
    pub combine_chunks: u32,
    /// CTAs of a cluster, 1 to [`crate::tile::MAX_CLUSTER`].
    pub cluster: u32,
    /// Rows of the expert that has the most.
    pub most_rows: u32,
}

impl ScheduleShape {
    /// Tasks of one token tile in a GEMM phase, of which each stands for one a CTA of the cluster.
    #[inline(always)]
    const fn blocks(&self, phase: Phase) -> u32 {
        let linear1 = phase as u32 == Phase::Linear1 as u32;
        let rows = if linear1 { self.linear1_rows } else { self.linear2_rows };
        rows.div_ceil(self.task_rows(linear1) * self.cluster)
    }

    /// Weight rows of a task.
    #[inline(always)]
    const fn task_rows(&self, linear1: bool) -> u32 {
        if linear1 { self.format.linear1_rows() } else { WEIGHT_TILE }
    }

    /// The task of this number, for the first CTA of a cluster, of a part's in a GEMM phase with `blocks` of [`Self::blocks`]; its expert has `rows` rows.
    #[inline(always)]
    fn product(&self, phase: Phase, blocks: u32, part: Part, rows: u32, number: u32) -> Task {
        let linear1 = phase as u32 == Phase::Linear1 as u32;
        let columns = if linear1 { self.linear2_rows } else { self.linear1_rows / 2 };
        let cut = self.format.tiles;
        // Group by group of tiles, and in each block by block of weights: neighbouring tickets share a block of weights, which so is read once for the group, and its
        // tokens stay in the L2 cache.
        let (group, tiles) = (group_tiles(cut, self.format.row_bytes(columns)), part.tiles(self, rows));
        let first_tile = number / (group * blocks) * group;
        let turns = group.min(tiles - first_tile);
        let within = number - first_tile * blocks;
        let (number, block) = (first_tile + within % turns, within / turns);
        let (first_row, end) = cut.rows_of_tile(part.number + number, rows);
        let tile = part.tile + number;
        Task {
            phase: phase as u32,
            expert: part.expert,
            weight_row: block * self.cluster * self.task_rows(linear1),
            pool_row: self.ring.tile_row(cut, part.expert, rows, tile, first_row),
            rows: end - first_row,
            tile,
            width: cut.index(end - first_row),
            expert_tasks: cut.tiles(rows) * blocks * self.cluster,
            widest: cut.index(self.most_rows),
            old_stages: 0,
        }
    }

    /// The task of `ticket` if it is linear 1 of the first part of the first shared expert, which comes first, and has all `tokens` tokens of its rank: nobody's choices change it, but for
    /// the widest tile, which is taken to be its own.
    #[inline(always)]
    pub fn early_task(&self, shared_experts: u32, tokens: u32, ticket: u32) -> Option<Task> {
        let blocks = self.blocks(Phase::Linear1);
        let part = Part { expert: 0, tile: 0, number: 0 };
        if shared_experts == 0 || ticket >= part.tiles(self, tokens) * blocks {
            return None;
        }
        let shape = Self { most_rows: tokens, ..*self };
        Some(shape.product(Phase::Linear1, blocks, part, tokens, ticket))
    }
}

/// Walks the tasks in ticket order.
pub struct TaskCursor {
    shape: ScheduleShape,
    /// [`ScheduleShape::blocks`] of each GEMM phase: a division takes its time, and every step would take it.
    blocks: [u32; 2],
    /// The next part of each GEMM phase.
    next: [Part; 2],
    /// The part whose tasks the cursor stands at.
    current: Part,
    phase: Phase,
    first_ticket: u32,
    tickets: u32,
}

impl TaskCursor {
    /// Before the first task.
    #[inline(always)]
    pub fn new(shape: ScheduleShape, rows: &(impl ExpertRows + ?Sized)) -> Self {
        let first = Part::first(rows);
        let blocks = [shape.blocks(Phase::Linear1), shape.blocks(Phase::Linear2)];
        Self { shape, blocks, next: [first; 2], current: first, phase: Phase::Linear1, first_ticket: 0, tickets: 0 }
    }

    /// The task of `ticket` for the first CTA of a cluster. Tickets must not decrease from call to call.
    #[inline(always)]
    pub fn seek(&mut self, ticket: u32, rows: &(impl ExpertRows + ?Sized)) -> Task {
        while ticket - self.first_ticket >= self.tickets {
            if !self.advance(rows) {
                return Task::plain(Phase::End, 0);
            }
        }
        let index = ticket - self.first_ticket;
        if self.phase as u32 == Phase::Combine as u32 {
            return Task::plain(Phase::Combine, index * self.shape.cluster);
        }
        let blocks = if self.phase as u32 == Phase::Linear1 as u32 { self.blocks[0] } else { self.blocks[1] };
        self.shape.product(self.phase, blocks, self.current, rows.rows(self.current.expert), index)
    }

    /// Steps to the next part in the next phase; false behind the last task.
    #[inline(always)]
    fn advance(&mut self, rows: &(impl ExpertRows + ?Sized)) -> bool {
        self.first_ticket += self.tickets;
        self.tickets = 0;
        // Each phase by itself: a position that is chosen at run time would lie in memory.
        let [linear1, linear2] = self.next;
        if linear2.expert < rows.experts() {
            let shape = &self.shape;
            let tiles = linear2.tiles(shape, rows.rows(linear2.expert));
            let ahead = linear2.tile + tiles + WAVES_AHEAD * shape.wave_tiles;
            if linear1.expert < rows.experts() && linear1.tile < ahead {
                self.tickets = linear1.tiles(shape, rows.rows(linear1.expert)) * self.blocks[0];
                self.next[0] = linear1.next(shape, rows);
                (self.phase, self.current) = (Phase::Linear1, linear1);
            } else {
                self.next[1] = linear2.next(shape, rows);
                (self.phase, self.current) = (Phase::Linear2, linear2);
                self.tickets = tiles * self.blocks[1];
            }
            return true;
        }
        if self.phase as u32 == Phase::Combine as u32 {
            return false;
        }
        self.phase = Phase::Combine;
        self.tickets = self.shape.combine_chunks.div_ceil(self.shape.cluster);
        true
    }
}
