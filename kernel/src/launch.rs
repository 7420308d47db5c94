//! One rank's launch as its warps see it: addresses, the epoch, and waits with a deadline.

use crate::cta::FORMAT;
use crate::device::atomic::{atom_cas_relaxed_gpu_u64, atom_inc_relaxed_gpu};
use crate::device::fence::{fence_acq_rel_gpu, fence_acq_rel_sys};
use crate::device::global::{ld_acquire_gpu_u32, ld_relaxed_gpu_u64, ld_weak_u32, st_weak_u32, st_weak_u64};
use crate::device::special::{globaltimer, nanosleep};
use crate::layout::{BF16_BYTES, RowMeta};
use crate::params::{Arguments, Params};
use crate::schedule::TileRing;
use crate::status::{Status, Timeout};
use crate::task::Task;

/// Longest pause between two looks at a condition, in nanoseconds.
const MAX_PAUSE_NS: u32 = 256;

/// What every role gets. Consumers have no register to spare, and load again what they need; the other roles [`Self::keep`] it.
#[derive(Clone, Copy)]
pub struct Launch {
    params: &'static Params,
    arguments: Arguments,
    /// The epoch of the last finished launch, and the caller's count of tokens.
    kept: Option<(u32, u32)>,
}

impl Launch {
    /// # Safety
    /// The arguments are valid for the whole launch.
    #[inline(always)]
    pub const unsafe fn new(params: &'static Params, arguments: Arguments) -> Self {
        Self { params, arguments, kept: None }
    }

    /// Loads once what most addresses depend on: later uses wait for no load.
    #[inline(always)]
    pub fn keep(self) -> Self {
        // SAFETY: initialised device memory.
        let words = unsafe { (ld_weak_u32(self.epoch_address()), ld_weak_u32(self.arguments.tokens as *const u32)) };
        Self { kept: Some(words), ..self }
    }

    /// Number of this launch, from 1; the same on every rank.
    #[inline(always)]
    pub fn epoch(&self) -> u32 {
        // SAFETY: initialised device memory, which changes only after every CTA of the launch has ended.
        let last = self.kept.map_or_else(|| unsafe { ld_weak_u32(self.epoch_address()) }, |(last, _)| last);
        last + 1
    }

    /// Tokens of this rank; 0 if the caller's count exceeds the maximum.
    #[inline(always)]
    pub fn tokens(&self) -> u32 {
        let tokens = self.claimed_tokens();
        if tokens <= self.params().shape.max_tokens { tokens } else { 0 }
    }

    /// The parameter block.
    #[inline(always)]
    pub fn params(&self) -> &'static Params {
        self.params
    }

    /// 0 or 1, by turns from launch to launch.
    #[inline(always)]
    pub fn parity(&self) -> u32 {
        self.epoch() & 1
    }

    /// The caller's count of tokens, unchecked.
    #[inline(always)]
    pub fn claimed_tokens(&self) -> u32 {
        // SAFETY: initialised device memory.
        self.kept.map_or_else(|| unsafe { ld_weak_u32(self.arguments.tokens as *const u32) }, |(_, tokens)| tokens)
    }

    /// Base of a rank's symmetric buffer, as this rank sees it.
    #[inline(always)]
    pub fn symmetric_base(&self, rank: u32) -> u64 {
        let bases = (&raw const self.params().symmetric_bases).cast::<u64>();
        // SAFETY: `rank` is a rank of the group.
        unsafe { *bases.add(rank as usize) }
    }

    /// Element `index` of the array at `offset` in a rank's symmetric buffer.
    #[inline(always)]
    pub fn symmetric<T>(&self, rank: u32, offset: u64, index: u64) -> *mut T {
        (self.symmetric_base(rank) + offset + index * size_of::<T>() as u64) as *mut T
    }

    /// Index of (source rank, routed expert of the rank) in a rank's counts, for this launch's parity.
    #[inline(always)]
    pub fn count_index(&self, source: u32, expert: u32) -> u64 {
        let params = self.params();
        params.symmetric.count_index(&params.shape, self.parity(), source, expert)
    }

    /// Where a rank finds the entry at a slot of the list of `source` for one of its routed experts.
    #[inline(always)]
    pub fn list_place(&self, rank: u32, source: u32, expert: u32, slot: u32) -> *mut u64 {
        let symmetric = &self.params().symmetric;
        self.symmetric(rank, symmetric.lists, symmetric.list_index(&self.params().shape, source, expert, slot))
    }

    /// Where a rank finds the place of a follower of this number, of a token of `source`.
    #[inline(always)]
    pub fn follower_place(&self, rank: u32, source: u32, token: u32, number: u32) -> *mut u32 {
        let symmetric = &self.params().symmetric;
        self.symmetric(rank, symmetric.followers, symmetric.follower_index(&self.params().shape, source, token, number))
    }

    /// Where a rank finds the distance of `source`'s hidden states in this launch.
    #[inline(always)]
    pub fn hidden_distance(&self, rank: u32, source: u32) -> *mut u64 {
        let index = self.parity() * self.params().shape.ranks + source;
        self.symmetric(rank, self.params().symmetric.hidden, index as u64)
    }

    /// Where a rank finds the layer that `source` has launched, as [`Self::launched_layer`] gives this rank's.
    #[inline(always)]
    pub fn layer_place(&self, rank: u32, source: u32) -> *mut u64 {
        let index = self.parity() * self.params().shape.ranks + source;
        self.symmetric(rank, self.params().symmetric.layers, index as u64)
    }

    /// The layer of this launch, below its epoch.
    #[inline(always)]
    pub fn launched_layer(&self) -> u64 {
        (self.epoch() as u64) << 32 | self.params().layer as u64
    }

    /// Element `index` of the array at `offset` in the workspace.
    #[inline(always)]
    pub fn workspace<T>(&self, offset: u64, index: u64) -> *mut T {
        (self.params().workspace_base + offset + index * size_of::<T>() as u64) as *mut T
    }

    /// Element `index` of a counter array of this launch's set.
    #[inline(always)]
    pub fn counter(&self, offset: u64, index: u32) -> *mut u32 {
        let layout = &self.params().workspace;
        self.workspace(layout.counters + self.parity() as u64 * layout.counter.bytes + offset, index as u64)
    }

    /// Claims the next ticket of a counter of this launch: lane 0 has it.
    #[inline(always)]
    pub fn claim(&self, offset: u64, lane: u32) -> u32 {
        // SAFETY: a counter of this launch.
        if lane == 0 { unsafe { atom_inc_relaxed_gpu(self.counter(offset, 0)) } } else { 0 }
    }

    /// Where tiles have their rows in this launch.
    #[inline(always)]
    pub fn tile_ring(&self) -> TileRing {
        let params = self.params();
        TileRing {
            first_tile: params.shape.shared_experts * FORMAT.tiles.tiles(self.tokens()),
            first_row: params.workspace.ring_row as u32,
            place_rows: params.place_rows,
            tiles: params.ring_tiles,
        }
    }

    /// Writes down where the result of a pool's row goes, and what it is weighted with. One thread calls this for a row.
    #[inline(always)]
    pub fn write_row(&self, pool_row: u32, meta: RowMeta) {
        let (workspace, results) = (&self.params().workspace, self.params().symmetric.combine);
        let at = meta.combine_row as u64 * self.row_bytes() as u64;
        let result: *mut u8 = self.symmetric(meta.rank, results, at);
        // SAFETY: the row lies in the pool, and this thread alone has it.
        unsafe {
            st_weak_u64(self.workspace(workspace.row_result, pool_row as u64), result as u64);
            st_weak_u32(self.workspace(workspace.row_weight, pool_row as u64), meta.weight.to_bits());
        }
    }

    /// Whether all rows of a task's tile were pulled.
    #[inline(always)]
    pub fn are_pulled(&self, task: &Task) -> bool {
        let pulled = self.counter(self.params().workspace.counter.rows_ready, task.tile);
        // SAFETY: a counter of this launch.
        unsafe { ld_acquire_gpu_u32(pulled) >= task.rows }
    }

    /// Element `index` of the whole set that the next launch uses.
    #[inline(always)]
    pub fn next_counter(&self, index: u32) -> *mut u32 {
        let layout = &self.params().workspace;
        self.workspace(layout.counters + (self.parity() ^ 1) as u64 * layout.counter.bytes, index as u64)
    }

    /// The epoch of the last finished launch.
    #[inline(always)]
    pub fn epoch_address(&self) -> *mut u32 {
        self.workspace(self.params().workspace.epoch, 0)
    }

    /// The status words.
    #[inline(always)]
    pub fn status(&self) -> *mut Status {
        self.workspace(self.params().workspace.status, 0)
    }

    /// Address of this rank's hidden states.
    #[inline(always)]
    pub fn hidden_states(&self) -> u64 {
        self.arguments.hidden_states
    }

    /// 0, or the address of the scales of hidden states that are e4m3.
    #[inline(always)]
    pub fn hidden_scales(&self) -> u64 {
        self.arguments.hidden_scales
    }

    /// Row `row` of the pool at `offset`, rows of `columns` elements.
    #[inline(always)]
    pub fn pool_row(&self, offset: u64, columns: u32, row: u32) -> *mut u8 {
        self.workspace(offset, row as u64 * FORMAT.row_bytes(columns) as u64)
    }

    /// Bytes of a row of the output, and of one of results.
    #[inline(always)]
    pub fn row_bytes(&self) -> u32 {
        self.params().shape.hidden * BF16_BYTES as u32
    }

    /// Expert id at (token, k).
    #[inline(always)]
    pub fn topk_id(&self, index: u32) -> *const u32 {
        (self.arguments.topk_ids as *const u32).wrapping_add(index as usize)
    }

    /// Routing weight at (token, k).
    #[inline(always)]
    pub fn topk_weight(&self, index: u32) -> *const f32 {
        (self.arguments.topk_weights as *const f32).wrapping_add(index as usize)
    }

    /// Row `token` of the output.
    #[inline(always)]
    pub fn output_row(&self, token: u32) -> *mut u8 {
        (self.arguments.output as *mut u8).wrapping_add(token as usize * self.row_bytes() as usize)
    }

    /// Orders, for all ranks, what this thread has seen and written. One rank alone needs no wait for the whole system.
    #[inline(always)]
    pub fn fence(&self) {
        if self.params().shape.ranks == 1 {
            fence_acq_rel_gpu();
        } else {
            fence_acq_rel_sys();
        }
    }

    /// Reports what makes the launch useless, unless something was reported before: this and all later waits of the rank fall through.
    #[inline(always)]
    pub fn give_up(&self, why: Timeout) {
        // SAFETY: the status words lie in the workspace.
        unsafe { atom_cas_relaxed_gpu_u64(&raw mut (*self.status()).timeout, 0, why.pack(self.params().layer)) };
    }

    /// Waits until `ready`, at most for the deadline; then reports `missing`, and this and all later waits of the rank fall through.
    ///
    /// Every wait on another CTA or rank goes through here.
    #[inline(always)]
    pub fn wait_until(&self, missing: impl Fn() -> Timeout, mut ready: impl FnMut() -> bool) {
        if ready() {
            return;
        }
        // SAFETY: the status words lie in the workspace.
        let timeout = unsafe { &raw mut (*self.status()).timeout };
        let start = globaltimer();
        let mut pause = 32;
        loop {
            // Under way together with what is waited for.
            // SAFETY: as above.
            let given_up = unsafe { ld_relaxed_gpu_u64(timeout) } != 0;
            if ready() || given_up {
                return;
            }
            if globaltimer() - start > self.params().deadline_ns {
                self.give_up(missing());
                return;
            }
            nanosleep(pause);
            if pause < MAX_PAUSE_NS {
                pause *= 2;
            }
        }
    }
}
