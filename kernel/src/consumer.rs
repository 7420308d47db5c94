//! A consumer warp, and what all main loops need of it: barriers, the metas of a tile's rows, and stores of results.

use crate::cta::{Cta, FORMAT, Ring};
use crate::device::address::SharedAddress;
use crate::device::barrier::{bar_sync, bar_warp_sync};
use crate::device::cluster::cluster_ctas;
use crate::device::copy::{cp_async_u64, cp_async_wait_all};
use crate::device::global::st_weak_v4;
use crate::launch::Launch;
use crate::layout::RowMeta;
use crate::shared::{PASS_BYTES, UNANNOUNCED_TASKS};
use crate::task::Task;
use crate::warps::{WARP, WARPGROUP};

/// Named barrier of all consumer warps.
pub const CONSUMERS_BARRIER: u32 = 1;
/// Named barriers of the consumer warpgroups.
const FIRST_WARPGROUP_BARRIER: u32 = 2;
const SECOND_WARPGROUP_BARRIER: u32 = 3;
const THIRD_WARPGROUP_BARRIER: u32 = 4;
/// Named barrier of the first two consumer warpgroups.
pub const PAIR_BARRIER: u32 = 5;

/// Passes in the buffer in which [`Consumer::store_passes`] has results transposed: one half is written while the other is read.
const STAGED_PASSES: usize = 4;
/// Passes that are staged ahead of those that are stored: half of the buffer.
const AHEAD: usize = STAGED_PASSES / 2;

const _: () = assert!(STAGED_PASSES as u32 * PASS_BYTES <= FORMAT.staging_bytes);

/// One consumer warp.
#[derive(Clone, Copy)]
pub struct Consumer<'a> {
    /// The launch.
    pub launch: &'a Launch,
    /// The CTA's shared memory.
    pub cta: Cta,
    /// Consumer warpgroup of the CTA, from 0.
    pub warpgroup: u32,
    /// Warp of the warpgroup, 0 to 3.
    pub warp: u32,
    /// Lane of the warp.
    pub lane: u32,
}

impl Consumer<'_> {
    /// Waits for the other warps of the warpgroup.
    #[inline(always)]
    pub fn sync(&self) {
        match self.warpgroup {
            0 => bar_sync::<FIRST_WARPGROUP_BARRIER, WARPGROUP>(),
            1 => bar_sync::<SECOND_WARPGROUP_BARRIER, WARPGROUP>(),
            _ => bar_sync::<THIRD_WARPGROUP_BARRIER, WARPGROUP>(),
        }
    }

    /// Thread of the warpgroup.
    #[inline(always)]
    pub fn thread(&self) -> u32 {
        self.warp * WARP + self.lane
    }

    /// Stores the warpgroup's results in `passes` passes of 16 bytes a thread. `stage` puts those of a pass into an area of shared memory, where a thread's
    /// 16 bytes lie `source` bytes from the start; `place` says where they go, and whether they do. A pass is on its way while the one that lies half of
    /// the buffer behind it is staged. Neither closure is called behind the last `sync`.
    #[inline(always)]
    pub fn store_passes(
        &self,
        passes: usize,
        source: u32,
        stage: impl Fn(usize, SharedAddress),
        mut place: impl FnMut(usize) -> (*mut u8, bool),
    ) {
        let staging = self.cta.staging(self.warpgroup);
        let area = |pass: usize| staging.offset((pass % STAGED_PASSES) as u32 * PASS_BYTES);
        let mut places = [(core::ptr::null_mut(), false); AHEAD];
        unroll!(STEP < passes + AHEAD, {
            let next = &mut places[STEP % AHEAD];
            let (to, stores) = *next;
            // SAFETY: zeros are valid u32.
            let mut results: [u32; 4] = unsafe { core::mem::zeroed() };
            if STEP >= AHEAD {
                // SAFETY: the pass was staged before the last barrier, and its area is written again behind the next.
                results = unsafe { area(STEP + STAGED_PASSES - AHEAD).offset(source).load_v4() };
            }
            if STEP < passes {
                stage(STEP, area(STEP));
                *next = place(STEP);
            }
            if stores {
                // SAFETY: the caller's buffer has this place, and it has no other writer.
                unsafe { st_weak_v4(to, results) };
            }
            if STEP < passes && (STEP % AHEAD == AHEAD - 1 || STEP + 1 == passes) {
                self.sync();
            }
        });
    }

    /// Gives a stage back without looking at it.
    #[inline(always)]
    pub fn pass_stage(&self, Ring { slot, parity }: Ring) {
        self.cta.stage_full(slot).wait(parity);
        if self.lane < cluster_ctas() {
            self.cta.stage_empty(slot).of(self.lane).arrive();
        }
    }

    /// Hands the finished task of this number, and so all that was stored for it, to the publisher. Every warp calls this.
    #[inline(always)]
    pub fn hand_over(&self, number: u32) {
        bar_warp_sync();
        if self.lane == 0 {
            self.cta.task_finished(number % UNANNOUNCED_TASKS).arrive();
        }
    }

    /// Starts to load the metas of `rows` rows of the tile from `first` on to where the whole warpgroup finds them: zeros for those behind its last token. All
    /// warps are done with the last tile's.
    #[inline(always)]
    pub fn load_row_metas(&self, task: &Task, first: u32, rows: u32) {
        let metas = self.launch.params().workspace.row_meta;
        let mut row = self.thread();
        while row < rows {
            let exists = first + row < task.rows;
            let source = self.launch.workspace(metas, (task.pool_row + if exists { first + row } else { 0 }) as u64);
            // SAFETY: the row lies in the pool; its meta was written before it was counted into the tile, which the producer has seen.
            unsafe { cp_async_u64(self.cta.row_meta(self.warpgroup, row), source, if exists { 8 } else { 0 }) };
            row += WARPGROUP;
        }
    }

    /// Waits for the metas; in linear 2 makes them the addresses of the result rows. They are there for the whole warpgroup behind the next `sync`.
    #[inline(always)]
    pub fn keep_row_metas(&self, task: &Task, rows: u32) {
        cp_async_wait_all();
        if task.is_linear1() {
            return;
        }
        let (row_bytes, results) = (self.launch.row_bytes() as u64, self.launch.params().symmetric.combine);
        let mut row = self.thread();
        while row < rows {
            let place = self.cta.row_meta(self.warpgroup, row);
            // SAFETY: this thread has loaded the meta.
            let RowMeta { combine_row, rank, .. } = RowMeta::unpack(unsafe { place.load_u64() });
            let result = self.launch.symmetric_base(rank) + results + combine_row as u64 * row_bytes;
            // SAFETY: as above.
            unsafe { place.store_u64(result) };
            row += WARPGROUP;
        }
    }

    /// Where the result of a row of the current tile goes: in linear 2.
    #[inline(always)]
    pub fn result_row(&self, row: u32) -> u64 {
        // SAFETY: `keep_row_metas` wrote it, before the last `sync`.
        unsafe { self.cta.row_meta(self.warpgroup, row).load_u64() }
    }

    /// The routing weight of a row of the current tile: in linear 1.
    #[inline(always)]
    pub fn row_weight(&self, row: u32) -> f32 {
        // SAFETY: as above.
        RowMeta::unpack(unsafe { self.cta.row_meta(self.warpgroup, row).load_u64() }).weight
    }

    /// The routing weights of a row of the current tile, an even one, and of the next: in linear 1.
    #[inline(always)]
    pub fn row_weights(&self, row: u32) -> [f32; 2] {
        // SAFETY: as above.
        let [first, weight0, second, weight1] = unsafe { self.cta.row_meta(self.warpgroup, row).load_v4() };
        [(first, weight0), (second, weight1)]
            .map(|(lower, upper)| RowMeta::unpack((upper as u64) << 32 | lower as u64).weight)
    }
}
