//! The publisher warp: waits for the consumers' stores to be complete, and says so, while the consumers go on.

use crate::cta::{Cta, Ring, TaskReader};
use crate::device::atomic::{atom_add_acq_rel_sys, red_add_release_gpu};
use crate::device::bulk::{bulk_commit_group, bulk_wait_group, bulk_wait_group_read, tensor_store_2d};
use crate::device::fence::{fence_acq_rel_sys, fence_proxy_async};
use crate::device::global::st_relaxed_sys_u32;
use crate::launch::Launch;
use crate::params::TensorMap;
use crate::roles::pull::count_from;
use crate::schedule::{Phase, Task};
use crate::shared::{CONSUMER_WARPGROUPS, STAGING_BUFFERS, linear1_staging_tokens};
use crate::tile::token_tile;

/// Intermediate columns that one warpgroup makes: half of its 64 rows are gates.
const COLUMNS: u32 = 32;

/// Publishes the results of every task.
#[inline(always)]
pub fn publish(launch: &Launch, cta: Cta, lane: u32) {
    if lane != 0 {
        return;
    }
    let mut tasks = TaskReader::new(cta);
    let mut publisher = Publisher { launch, cta, ring: Ring::new() };
    loop {
        mark!(launch, WaitForTask);
        let task = tasks.take();
        mark!(launch, WaitForStaged, &task);
        if task.phase == Phase::Linear1 as u32 {
            publisher.store_columns(&task);
        } else if task.phase == Phase::Linear2 as u32 {
            publisher.announce_results(&task);
        } else if task.phase == Phase::End as u32 {
            return;
        }
    }
}

struct Publisher<'a> {
    launch: &'a Launch,
    cta: Cta,
    /// The hand-over that comes next, of both consumer warpgroups.
    ring: Ring<STAGING_BUFFERS>,
}

impl Publisher<'_> {
    /// Linear 1: stores the staged columns in the intermediate pool, chunk by chunk, and counts them for their tile.
    #[inline(always)]
    fn store_columns(&mut self, task: &Task) {
        let params = self.launch.params();
        let map = (&raw const params.maps.activation).cast::<TensorMap>().wrapping_add(task.width as usize);
        let width = token_tile(task.width);
        let mut token = 0;
        while token < width {
            for warpgroup in 0..CONSUMER_WARPGROUPS {
                self.cta.staging_full(warpgroup).wait(self.ring.parity);
                mark!(self.launch, Store);
                let column = task.weight_row / 2 + warpgroup * COLUMNS;
                // SAFETY: the box lies in the tile's padded rows, which are this expert's; the buffer is this warp's.
                unsafe { tensor_store_2d(map, [column, task.pool_row + token], self.cta.staging(warpgroup)) };
                bulk_commit_group();
            }
            bulk_wait_group_read::<0>();
            self.give_back();
            token += linear1_staging_tokens(width);
        }
        mark!(self.launch, Announce);
        bulk_wait_group::<0>();
        // Written, and to be read, by bulk copies; the release is an ordinary one.
        fence_proxy_async();
        let stored = self.launch.counter(params.workspace.counter.columns_ready, task.tile);
        // SAFETY: a counter of this launch.
        unsafe { red_add_release_gpu(stored, 1) };
    }

    /// Linear 2: counts a task's stores; the last of an expert raises its flag on every rank that sent it tokens.
    #[inline(always)]
    fn announce_results(&mut self, task: &Task) {
        for warpgroup in 0..CONSUMER_WARPGROUPS {
            self.cta.staging_full(warpgroup).wait(self.ring.parity);
        }
        self.give_back();
        let launch = self.launch;
        mark!(launch, Announce);
        let params = launch.params();
        let shape = &params.shape;
        let done = launch.counter(params.workspace.counter.expert_done, task.expert);
        // The warpgroups' stores to all ranks come before the count, and all counted stores before the flag.
        fence_acq_rel_sys();
        // SAFETY: a counter of this launch.
        if unsafe { atom_add_acq_rel_sys(done, 1) } + 1 < task.expert_tasks {
            return;
        }
        fence_acq_rel_sys();
        let routed = shape.routed_experts();
        let epoch = launch.epoch();
        let raise = |rank: u32, flag: u32| {
            // SAFETY: every rank has a flag for every expert.
            unsafe { st_relaxed_sys_u32(launch.symmetric(rank, params.symmetric.flags, flag as u64), epoch) };
        };
        if task.expert >= routed {
            raise(params.rank, shape.experts + task.expert - routed);
            return;
        }
        for rank in 0..shape.ranks {
            if count_from(launch, rank, task.expert) > 0 {
                raise(rank, params.rank * routed + task.expert);
            }
        }
    }

    /// Gives the staging buffers back to the consumers.
    #[inline(always)]
    fn give_back(&mut self) {
        for warpgroup in 0..CONSUMER_WARPGROUPS {
            self.cta.staging_empty(warpgroup).arrive();
        }
        self.ring.advance();
    }
}
