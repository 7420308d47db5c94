//! Layouts of the buffers in device memory, computed once by the host and carried in the parameter block.

use crate::format::Format;
use crate::quantise::groups;
use crate::schedule::{Cut, TileRing};
use crate::status::Status;

/// The most ranks of one group.
pub const MAX_RANKS: u32 = 8;

/// The most choices of one token: a warp looks at one choice a lane.
pub const MAX_TOP_K: u32 = 32;

/// The most experts on one rank, shared ones included: their row counts lie in shared memory.
pub const MAX_LOCAL_EXPERTS: u32 = 512;

/// The most tokens of one rank: a slot in a list and its expert share 32 bits of a [`ListPlace`].
pub const MAX_TOKENS: u64 = 1 << (32 - EXPERT_BITS);

/// The most layers of one workspace: a layer and a token share a word of [`Status`].
pub const MAX_LAYERS: u32 = 1 << 16;

/// The most rows of a combine buffer: a row's number and its rank share 32 bits of a [`RowMeta`].
pub const MAX_COMBINE_ROWS: u64 = 1 << COMBINE_ROW_BITS;

/// Bits of a routed expert of a rank in a [`ListPlace`].
const EXPERT_BITS: u32 = MAX_LOCAL_EXPERTS.ilog2();

/// Bits of a combine row in a [`RowMeta`].
const COMBINE_ROW_BITS: u32 = 26;

/// Bytes of one bf16 element.
pub const BF16_BYTES: u64 = 2;

/// Alignment of every part of a buffer, in bytes.
const PART_ALIGNMENT: u64 = 256;

/// The sizes of a layer and of the group that runs it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Shape {
    /// Elements of a hidden state, a multiple of 64.
    pub hidden: u32,
    /// Elements of an expert's intermediate state, a multiple of 64.
    pub intermediate: u32,
    /// Routed experts of the whole layer, a multiple of `ranks`.
    pub experts: u32,
    /// Shared experts: every rank holds all of them and runs them on its own tokens.
    pub shared_experts: u32,
    /// Choices of a token, 1 to [`MAX_TOP_K`].
    pub top_k: u32,
    /// The most tokens of one rank.
    pub max_tokens: u32,
    /// Ranks of the group, 1 to [`MAX_RANKS`].
    pub ranks: u32,
}

impl Shape {
    /// Routed experts that one rank owns.
    pub const fn routed_experts(&self) -> u32 {
        self.experts / self.ranks
    }

    /// Experts whose weights one rank holds: the shared ones, then its routed ones. A shared expert has all tokens of its rank, and so the widest tiles:
    /// were they the last, few CTAs would be busy with them at the end.
    pub const fn local_experts(&self) -> u32 {
        self.routed_experts() + self.shared_experts
    }

    /// Rows of the combine buffer for one token: one a choice, then one a shared expert.
    pub const fn slots(&self) -> u32 {
        self.top_k + self.shared_experts
    }

    /// Rows of the pools for shared experts: all tokens of the rank for each.
    pub const fn shared_rows(&self, format: &Format) -> u32 {
        // Scales of neighbouring rows are copied 16 bytes at once.
        (self.shared_experts * (self.max_tokens + format.tiles.max_padding())).next_multiple_of(8)
    }

    /// The most tiles of routed experts that any routing can give: each expert has at most one more than its rows fill.
    pub const fn routed_tiles(&self, format: &Format) -> u32 {
        let choices = if self.top_k < self.routed_experts() { self.top_k } else { self.routed_experts() };
        self.max_tokens * self.ranks * choices / format.tiles.widest() + self.routed_experts()
    }

    /// The most tiles that any routing can give.
    pub const fn most_tiles(&self, format: &Format) -> u32 {
        self.shared_experts * format.tiles.tiles(self.max_tokens) + self.routed_tiles(format)
    }
}

/// Where a row of an expert comes from and goes to: its weight, and its row in the combine buffer of its token's rank.
///
/// Bits 0..26 are the combine row (`token * slots + k`), bits 26..32 the rank, bits 32..64 the routing weight as f32. Entries of the
/// dispatch lists have the same form, but the list says the rank: in its place they have the number of followers, or [`FOLLOWER`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowMeta {
    /// Row in the owner's combine buffer.
    pub combine_row: u32,
    /// Rank that owns the token.
    pub rank: u32,
    /// Routing weight of this (token, expert).
    pub weight: f32,
}

/// What a list has for a choice that follows another. Of the choices of one token that go to the same rank, and not to its own, that of the lowest
/// expert leads: its row is read from the token's rank, and written for all of them.
pub const FOLLOWER: u32 = (1 << (32 - COMBINE_ROW_BITS)) - 1;

const _: () = assert!(MAX_TOP_K <= FOLLOWER && MAX_RANKS <= FOLLOWER);

impl RowMeta {
    /// The 64-bit form.
    pub const fn pack(self) -> u64 {
        (self.weight.to_bits() as u64) << 32 | (self.rank << COMBINE_ROW_BITS | self.combine_row) as u64
    }

    /// Reads the 64-bit form.
    pub const fn unpack(word: u64) -> Self {
        Self {
            combine_row: word as u32 % (1 << COMBINE_ROW_BITS),
            rank: word as u32 >> COMBINE_ROW_BITS,
            weight: f32::from_bits((word >> 32) as u32),
        }
    }
}

/// Where a follower is in the lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListPlace {
    /// Routed expert of the rank.
    pub expert: u32,
    /// Slot in the expert's list of the token's rank.
    pub slot: u32,
}

const _: () = assert!(MAX_LOCAL_EXPERTS.is_power_of_two());

impl ListPlace {
    /// The 32-bit form: the expert in the lowest bits.
    pub const fn pack(self) -> u32 {
        self.slot << EXPERT_BITS | self.expert
    }

    /// Reads the 32-bit form.
    pub const fn unpack(word: u32) -> Self {
        Self { expert: word % MAX_LOCAL_EXPERTS, slot: word >> EXPERT_BITS }
    }
}

/// Byte offsets in the symmetric buffer, the same on every rank and for all layers of a workspace. Other ranks write or read all of it.
///
/// It is laid out for the workspace's sizes, and a layer that is smaller uses a part. What lies apart by parity or by source rank does so whatever the
/// layer: a rank that is at its next layer writes nothing that one still at the last may read. Within that, arrays are as dense as the layer's own
/// sizes make them.
///
/// Counts and flags carry the epoch, so that a stale one is never taken for a new one. The counts are double-buffered by the
/// epoch's parity: a rank may begin launch n + 1 while a late CTA elsewhere still reads the counts of launch n. Lists, places of followers and
/// combine rows need no second copy: a rank ends launch n after all its own rows were pulled, those of followers too, and all its own results
/// have arrived, and only its own next launch causes them to be written again.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SymmetricLayout {
    /// u64 `[2][ranks][routed_experts]`: rows that a source rank sends to an expert of this rank, below the epoch in the upper half.
    pub counts: u64,
    /// Places of the counts of one parity.
    pub counts_of_parity: u64,
    /// u64 `[2][ranks]`: distance of a source rank's hidden states from the base of its symmetric buffer.
    pub hidden: u64,
    /// u64 `[2][ranks]`: the layer that a source rank has launched, below the epoch in the upper half.
    pub layers: u64,
    /// u32 `[experts + shared_experts]`: epoch of an expert's last complete result.
    pub flags: u64,
    /// u64 `[ranks][routed_experts][max_tokens]`: [`RowMeta`] of what a source rank sends to an expert of this rank.
    pub lists: u64,
    /// Entries of one source rank's lists.
    pub lists_of_source: u64,
    /// u32 `[ranks][max_tokens][top_k]`: [`ListPlace`] of the followers of a source rank's token; behind the last of them, nothing is read.
    pub followers: u64,
    /// Places of one source rank's followers.
    pub followers_of_source: u64,
    /// bf16 `[max_tokens][slots][hidden]`: results for this rank's tokens.
    pub combine: u64,
    /// u32 `[ranks]`: epoch of the last launch for which a source rank's records were complete; of a format with scales, as what follows.
    pub quantised: u64,
    /// `[max_tokens]` records of [`Format::record_bytes`]: this rank's tokens, elements and f32 scales of their groups, which all ranks read.
    pub records: u64,
}

/// Byte offsets in a rank's own part of a workspace, which no other rank touches: for the workspace's sizes, the same for all its layers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct WorkspaceLayout {
    /// [`Status`].
    pub status: u64,
    /// u32: the epoch of the last finished launch, then u32: CTAs of the running launch that have ended.
    pub epoch: u64,
    /// Two sets of u32 counters, one a parity: a launch uses one and zeroes the other. See [`CounterLayout`].
    pub counters: u64,
    /// Offsets in one set.
    pub counter: CounterLayout,
    /// u64 `[pool_rows]`: address of a row's result, in the combine buffer of its token's rank.
    pub row_result: u64,
    /// f32 `[pool_rows]`: its routing weight.
    pub row_weight: u64,
    /// `[pool_rows][hidden]`: tokens, tile by tile.
    pub tokens: u64,
    /// f32 `[groups of hidden][pool_rows]`: the tokens' scales, if the format has any.
    pub token_scales: u64,
    /// `[pool_rows][intermediate]`: results of linear 1.
    pub intermediate: u64,
    /// f32 `[groups of intermediate][pool_rows]`: their scales.
    pub intermediate_scales: u64,
    /// The first row of the ring of routed experts' tiles; before it are shared experts' rows.
    pub ring_row: u64,
    /// Rows of the pools.
    pub pool_rows: u64,
    /// Size of the buffer.
    pub bytes: u64,
}

/// Byte offsets in one set of counters (all u32).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct CounterLayout {
    /// Next unit of tokens to quantise.
    pub quantise_ticket: u64,
    /// Units quantised.
    pub quantised: u64,
    /// Next chunk of tokens to route.
    pub route_ticket: u64,
    /// Chunks routed.
    pub routed_chunks: u64,
    /// Next row to pull.
    pub pull_ticket: u64,
    /// Next task of the schedule.
    pub task_ticket: u64,
    /// `[experts]`: rows that this rank sends to an expert.
    pub sent: u64,
    /// `[most_tiles]`: rows pulled into a tile.
    pub rows_ready: u64,
    /// `[most_tiles]`: blocks of intermediate columns stored for a tile, one for each linear 1 task.
    pub columns_ready: u64,
    /// `[most_tiles]`: linear 2 tasks of a tile whose results are stored: behind the last of them, its rows are read no more.
    pub tile_done: u64,
    /// `[local_experts]`: linear 2 tasks of an expert whose results are stored.
    pub expert_done: u64,
    /// Size of one set, a multiple of 4.
    pub bytes: u64,
}

/// Lays parts out one after the other.
struct Parts(u64);

impl Parts {
    const fn take(&mut self, bytes: u64, alignment: u64) -> u64 {
        let offset = self.0.next_multiple_of(alignment);
        self.0 = offset + bytes;
        offset
    }
}

impl SymmetricLayout {
    /// The layout for layers of these formats whose sizes are at most those of `sizes`.
    pub const fn new(sizes: &Shape, formats: &[Format]) -> Self {
        let (ranks, tokens) = (sizes.ranks as u64, sizes.max_tokens as u64);
        let counts_of_parity = ranks * sizes.routed_experts() as u64;
        let lists_of_source = sizes.routed_experts() as u64 * tokens;
        let followers_of_source = tokens * sizes.top_k as u64;
        let mut parts = Parts(0);
        Self {
            counts: parts.take(2 * counts_of_parity * 8, PART_ALIGNMENT),
            counts_of_parity,
            hidden: parts.take(2 * ranks * 8, PART_ALIGNMENT),
            layers: parts.take(2 * ranks * 8, PART_ALIGNMENT),
            flags: parts.take((sizes.experts + sizes.shared_experts) as u64 * 4, PART_ALIGNMENT),
            lists: parts.take(ranks * lists_of_source * 8, PART_ALIGNMENT),
            lists_of_source,
            followers: parts.take(ranks * followers_of_source * 4, PART_ALIGNMENT),
            followers_of_source,
            combine: parts.take(Self::combine_bytes(sizes), PART_ALIGNMENT),
            quantised: parts.take(ranks * 4, PART_ALIGNMENT),
            records: parts.take(Self::record_bytes(sizes, formats), PART_ALIGNMENT),
        }
    }

    /// Place of a count of a source rank for an expert of the rank that has the buffer, when a layer of `shape` runs.
    #[inline(always)]
    pub const fn count_index(&self, shape: &Shape, parity: u32, source: u32, expert: u32) -> u64 {
        parity as u64 * self.counts_of_parity + (source * shape.routed_experts() + expert) as u64
    }

    /// Place of the entry at a slot of the list of a source rank for an expert of the rank that has the buffer, when a layer of `shape` runs.
    #[inline(always)]
    pub const fn list_index(&self, shape: &Shape, source: u32, expert: u32, slot: u32) -> u64 {
        source as u64 * self.lists_of_source + expert as u64 * shape.max_tokens as u64 + slot as u64
    }

    /// Place of the follower of this number of a source rank's token, when a layer of `shape` runs.
    #[inline(always)]
    pub const fn follower_index(&self, shape: &Shape, source: u32, token: u32, number: u32) -> u64 {
        source as u64 * self.followers_of_source + token as u64 * shape.top_k as u64 + number as u64
    }

    /// Size of the buffer.
    pub const fn bytes(&self, sizes: &Shape, formats: &[Format]) -> u64 {
        (self.records + Self::record_bytes(sizes, formats)).next_multiple_of(PART_ALIGNMENT)
    }

    const fn record_bytes(sizes: &Shape, formats: &[Format]) -> u64 {
        let (mut most, mut index) = (0, 0);
        while index < formats.len() {
            if formats[index].scaled {
                most = larger(most, formats[index].record_bytes(sizes.hidden) as u64);
            }
            index += 1;
        }
        sizes.max_tokens as u64 * most
    }

    const fn combine_bytes(sizes: &Shape) -> u64 {
        sizes.max_tokens as u64 * sizes.slots() as u64 * sizes.hidden as u64 * BF16_BYTES
    }
}

const fn larger(a: u64, b: u64) -> u64 {
    if a > b { a } else { b }
}

/// Bytes of the scales of a row.
const fn scale_bytes(format: &Format, columns: u32) -> u64 {
    if format.scaled { groups(columns) as u64 * 4 } else { 0 }
}

/// What the pools take for layers of any of some formats.
#[derive(Clone, Copy)]
struct PoolSizes {
    shared_rows: u64,
    ring_rows: u64,
    tiles: u64,
    token_bytes: u64,
    token_scales: u64,
    intermediate_bytes: u64,
    intermediate_scales: u64,
}

impl PoolSizes {
    const fn new(sizes: &Shape, formats: &[Format]) -> Self {
        let mut most = Self {
            shared_rows: 0,
            ring_rows: 0,
            tiles: 0,
            token_bytes: 0,
            token_scales: 0,
            intermediate_bytes: 0,
            intermediate_scales: 0,
        };
        let mut index = 0;
        while index < formats.len() {
            let format = &formats[index];
            most = Self {
                shared_rows: larger(most.shared_rows, sizes.shared_rows(format) as u64),
                ring_rows: larger(
                    most.ring_rows,
                    Cut::workspace_ring(sizes, format) as u64 * TileRing::place_rows(sizes, format) as u64,
                ),
                tiles: larger(most.tiles, sizes.most_tiles(format) as u64),
                token_bytes: larger(most.token_bytes, format.row_bytes(sizes.hidden) as u64),
                token_scales: larger(most.token_scales, scale_bytes(format, sizes.hidden)),
                intermediate_bytes: larger(most.intermediate_bytes, format.row_bytes(sizes.intermediate) as u64),
                intermediate_scales: larger(most.intermediate_scales, scale_bytes(format, sizes.intermediate)),
            };
            index += 1;
        }
        most
    }
}

impl CounterLayout {
    const fn new(sizes: &Shape, pools: &PoolSizes) -> Self {
        let mut parts = Parts(0);
        // Tickets lie in lines of their own: every CTA of the GPU adds to them.
        Self {
            quantise_ticket: parts.take(4, PART_ALIGNMENT),
            quantised: parts.take(4, PART_ALIGNMENT),
            route_ticket: parts.take(4, PART_ALIGNMENT),
            routed_chunks: parts.take(4, PART_ALIGNMENT),
            pull_ticket: parts.take(4, PART_ALIGNMENT),
            task_ticket: parts.take(4, PART_ALIGNMENT),
            sent: parts.take(sizes.experts as u64 * 4, PART_ALIGNMENT),
            rows_ready: parts.take(pools.tiles * 4, PART_ALIGNMENT),
            columns_ready: parts.take(pools.tiles * 4, PART_ALIGNMENT),
            tile_done: parts.take(pools.tiles * 4, PART_ALIGNMENT),
            expert_done: parts.take(sizes.local_experts() as u64 * 4, PART_ALIGNMENT),
            bytes: parts.take(0, PART_ALIGNMENT),
        }
    }
}

impl WorkspaceLayout {
    /// The layout for layers of these formats whose sizes are at most those of `sizes`.
    pub const fn new(sizes: &Shape, formats: &[Format]) -> Self {
        let pools = PoolSizes::new(sizes, formats);
        let counter = CounterLayout::new(sizes, &pools);
        let rows = pools.shared_rows + pools.ring_rows;
        let mut parts = Parts(0);
        Self {
            status: parts.take(size_of::<Status>() as u64, PART_ALIGNMENT),
            epoch: parts.take(8, PART_ALIGNMENT),
            counters: parts.take(2 * counter.bytes, PART_ALIGNMENT),
            counter,
            row_result: parts.take(rows * 8, PART_ALIGNMENT),
            row_weight: parts.take(rows * 4, PART_ALIGNMENT),
            tokens: parts.take(rows * pools.token_bytes, PART_ALIGNMENT),
            token_scales: parts.take(rows * pools.token_scales, PART_ALIGNMENT),
            intermediate: parts.take(rows * pools.intermediate_bytes, PART_ALIGNMENT),
            intermediate_scales: parts.take(rows * pools.intermediate_scales, PART_ALIGNMENT),
            ring_row: pools.shared_rows,
            pool_rows: rows,
            bytes: parts.take(0, PART_ALIGNMENT),
        }
    }
}

impl WorkspaceLayout {
    /// How the work of a layer that fits the workspace is cut on so many SMs.
    pub const fn cut(&self, shape: &Shape, format: &Format, sms: u32) -> Cut {
        let places = (self.pool_rows - self.ring_row) / TileRing::place_rows(shape, format) as u64;
        Cut::new(shape, format, sms).within(places as u32, shape.routed_tiles(format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_meta_keeps_what_was_packed() {
        for rank in [0, MAX_RANKS - 1, MAX_TOP_K, FOLLOWER] {
            let meta = RowMeta { combine_row: MAX_COMBINE_ROWS as u32 - 1, rank, weight: -0.37 };
            assert_eq!(RowMeta::unpack(meta.pack()), meta);
        }
    }

    #[test]
    fn list_places_keep_what_was_packed() {
        for (expert, slot) in [(0, MAX_TOKENS as u32 - 1), (MAX_LOCAL_EXPERTS - 1, 0), (5, 7)] {
            let place = ListPlace { expert, slot };
            assert_eq!(ListPlace::unpack(place.pack()), place);
        }
    }
}
