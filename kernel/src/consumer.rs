//! A consumer warp, and what all main loops need of it: barriers, what a tile's rows have, and stores of results.

use crate::cta::{Cta, FORMAT, Ring};
use crate::device::address::SharedAddress;
use crate::device::barrier::{bar_sync_of_three, bar_warp_sync};
use crate::device::cluster::cluster_ctas;
use crate::device::copy::{cp_async, cp_async_wait_all};
use crate::device::global::st_weak_v4;
use crate::device::special;
use crate::device::warp::shfl_idx;
use crate::launch::Launch;
use crate::shared::{PASS_BYTES, UNANNOUNCED_TASKS};
use crate::task::Task;
use crate::warps::{CONSUMER_WARP, WARP, WARPGROUP};

/// Named barrier of all consumer warps.
pub const CONSUMERS_BARRIER: u32 = 1;
/// Named barrier of the first consumer warpgroup; those of the others follow.
const FIRST_WARPGROUP_BARRIER: u32 = 2;
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

impl<'a> Consumer<'a> {
    /// This thread's warp. What depends on the thread alone is computed anew behind each call: kept from task to task, or beside a product's sums, it would need registers that
    /// there are not.
    #[inline(always)]
    pub fn read(launch: &'a Launch) -> Self {
        let thread = special::thread();
        let warp = shfl_idx(thread / WARP, 0) - CONSUMER_WARP;
        let warps = WARPGROUP / WARP;
        Self { launch, cta: Cta::new(), warpgroup: warp / warps, warp: warp % warps, lane: thread % WARP }
    }

    /// The same, read anew.
    #[inline(always)]
    pub fn read_again(&self) -> Self {
        Self::read(self.launch)
    }

    /// Waits for the other warps of the warpgroup.
    #[inline(always)]
    pub fn sync(&self) {
        bar_sync_of_three::<FIRST_WARPGROUP_BARRIER, WARPGROUP>(self.warpgroup);
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
        self.give_back(slot);
    }

    /// Gives a stage back to every producer that writes to it: a lane for each.
    #[inline(always)]
    pub fn give_back(&self, stage: u32) {
        let empty = self.cta.stage_empty(stage);
        if FORMAT.max_cluster > 1 {
            if self.lane < cluster_ctas() {
                empty.of(self.lane).arrive();
            }
        } else if self.lane == 0 {
            empty.arrive();
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

    /// Starts to load what `8 * QUADS` rows of the tile from `first` on have, to where the whole warpgroup finds it: weights in linear 1, addresses of results in linear 2; zeros for rows
    /// behind the last token. All warps are done with that of the last tile. It is there behind [`Self::await_rows`] and the next `sync`.
    #[inline(always)]
    pub fn load_rows<const QUADS: usize>(&self, task: &Task, first: u32) {
        let workspace = &self.launch.params().workspace;
        let rows = self.cta.rows(self.warpgroup);
        unroll!(INDEX < (8 * QUADS).div_ceil(WARPGROUP as usize), {
            let row = INDEX as u32 * WARPGROUP + self.thread();
            if row < 8 * QUADS as u32 {
                let exists = first + row < task.rows;
                let source = (task.pool_row + if exists { first + row } else { 0 }) as u64;
                // SAFETY: the row lies in the pool; what it has was written before it was counted into the tile, which the producer has seen.
                unsafe {
                    if task.is_linear1() {
                        let weight: *const u32 = self.launch.workspace(workspace.row_weight, source);
                        cp_async::<4>(rows.offset(row * 4), weight.cast(), if exists { 4 } else { 0 });
                    } else {
                        let result: *const u64 = self.launch.workspace(workspace.row_result, source);
                        cp_async::<8>(rows.offset(row * 8), result.cast(), if exists { 8 } else { 0 });
                    }
                }
            }
        });
    }

    /// Waits for what this thread loads of the rows.
    #[inline(always)]
    pub fn await_rows(&self) {
        cp_async_wait_all();
    }

    /// Where the result of a row of the current tile goes: in linear 2.
    #[inline(always)]
    pub fn result_row(&self, row: u32) -> u64 {
        // SAFETY: loaded, and waited for before the last `sync`.
        unsafe { self.cta.rows(self.warpgroup).offset(row * 8).load_u64() }
    }

    /// The routing weight of a row of the current tile: in linear 1.
    #[inline(always)]
    pub fn row_weight(&self, row: u32) -> f32 {
        // SAFETY: as above.
        f32::from_bits(unsafe { self.cta.rows(self.warpgroup).offset(row * 4).load_u32() })
    }

    /// The routing weights of a row of the current tile, an even one, and of the next: in linear 1.
    #[inline(always)]
    pub fn row_weights(&self, row: u32) -> [f32; 2] {
        // SAFETY: as above.
        unsafe { self.cta.rows(self.warpgroup).offset(row * 4).load_v2() }.map(f32::from_bits)
    }
}
