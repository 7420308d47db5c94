//! The publisher warp: waits for the consumers' stores to be complete, and says so, while the consumers go on.
//!
//! The two consumer warpgroups are served apart from each other, so that one multiplies while the other finishes its tile.

use crate::cta::{Cta, Ring, TaskReader};
use crate::device::atomic::{atom_add_relaxed_gpu, red_add_release_gpu};
use crate::device::bulk::{bulk_commit_group, bulk_wait_group, bulk_wait_group_read, tensor_store_2d};
use crate::device::fence::{fence_acq_rel_sys, fence_proxy_async_global};
use crate::device::global::st_relaxed_sys_u32;
use crate::launch::Launch;
use crate::layout::MAX_RANKS;
use crate::params::{ACTIVATION_MAPS, TensorMap};
use crate::roles::pull::sources_of;
use crate::schedule::{Phase, Task};
use crate::shared::{ACTIVATION_TOKENS, CONSUMER_WARPGROUPS, LINEAR1_STAGING_TOKENS, STAGING_BUFFERS};
use crate::sources::{Sources, source_at};
use crate::tile::token_tile;

/// Intermediate columns that one warpgroup makes: half of its 64 rows are gates.
const COLUMNS: u32 = 32;

/// Publishes the results of every task.
#[inline(always)]
pub fn publish(launch: &Launch, cta: Cta, lane: u32) {
    if lane != 0 {
        return;
    }
    let mut first = Publisher::new(launch, cta, 0);
    let mut second = Publisher::new(launch, cta, 1);
    const _: () = assert!(CONSUMER_WARPGROUPS == 2);
    mark!(launch, WaitForStaged);
    loop {
        let progress = first.poll() | second.poll();
        if !progress {
            first.announce_columns();
            second.announce_columns();
            if first.ended && second.ended {
                return;
            }
        }
    }
}

/// Publishes the results of one consumer warpgroup.
struct Publisher<'a> {
    launch: &'a Launch,
    cta: Cta,
    warpgroup: u32,
    tasks: TaskReader,
    /// The task whose results come next, if it was read.
    task: Option<Task>,
    /// The hand-over that comes next.
    ring: Ring,
    /// Tokens of the linear 1 task that were stored.
    stored: u32,
    /// A linear 1 task whose columns are under way, and not counted yet.
    unannounced: Option<Task>,
    ended: bool,
}

impl<'a> Publisher<'a> {
    #[inline(always)]
    fn new(launch: &'a Launch, cta: Cta, warpgroup: u32) -> Self {
        let tasks = TaskReader::new(cta);
        Self {
            launch,
            cta,
            warpgroup,
            tasks,
            task: None,
            ring: Ring::new(),
            stored: 0,
            unannounced: None,
            ended: false,
        }
    }

    /// Does what can be done without a wait for others; false if there is nothing.
    #[inline(always)]
    fn poll(&mut self) -> bool {
        let Some(task) = self.task else { return self.next_task() };
        if !self.cta.staging_full(self.warpgroup, self.ring.slot).try_wait(self.ring.parity) {
            return false;
        }
        if task.phase == Phase::Linear1 as u32 {
            self.store_columns(&task);
        } else {
            self.announce_results(&task);
            self.task = None;
        }
        self.cta.staging_empty(self.warpgroup, self.ring.slot).arrive();
        self.ring.advance(STAGING_BUFFERS);
        mark!(self.launch, WaitForStaged);
        true
    }

    /// Reads the next task, if there is one.
    #[inline(always)]
    fn next_task(&mut self) -> bool {
        if self.ended || !self.tasks.is_ready() {
            return false;
        }
        let task = self.tasks.look();
        self.tasks.release();
        self.ended = task.phase == Phase::End as u32;
        if task.phase == Phase::Linear1 as u32 || task.phase == Phase::Linear2 as u32 {
            self.task = Some(task);
        }
        true
    }

    /// Linear 1: stores a chunk of staged columns in the intermediate pool.
    #[inline(always)]
    fn store_columns(&mut self, task: &Task) {
        if self.stored == 0 {
            self.announce_columns();
        }
        mark!(self.launch, Store, task);
        let map = (task.width as usize).min(ACTIVATION_MAPS - 1);
        let map = (&raw const self.launch.params().maps.activation).cast::<TensorMap>().wrapping_add(map);
        let column = task.weight_row / 2 + self.warpgroup * COLUMNS;
        let staging = self.cta.staging(self.warpgroup, self.ring.slot);
        let width = token_tile(task.width);
        let end = width.min(self.stored + LINEAR1_STAGING_TOKENS);
        let mut token = self.stored;
        while token < end {
            // SAFETY: the box lies in the tile's padded rows, which are this expert's; the buffer is this warp's.
            unsafe {
                let source = staging.offset((token - self.stored) * COLUMNS * 2);
                tensor_store_2d(map, [column, task.pool_row + token], source);
            }
            token += ACTIVATION_TOKENS;
        }
        bulk_commit_group();
        bulk_wait_group_read::<0>();
        self.stored = end;
        if end == width {
            self.stored = 0;
            self.unannounced = Some(*task);
            self.task = None;
        }
    }

    /// Counts the columns of the last linear 1 task for their tile, when they are stored.
    #[inline(always)]
    fn announce_columns(&mut self) {
        let Some(task) = self.unannounced else { return };
        mark!(self.launch, Announce, &task);
        bulk_wait_group::<0>();
        // Written, and to be read, by bulk copies; the release is an ordinary one.
        fence_proxy_async_global();
        let stored = self.launch.counter(self.launch.params().workspace.counter.columns_ready, task.tile);
        // SAFETY: a counter of this launch.
        unsafe { red_add_release_gpu(stored, 1) };
        self.unannounced = None;
        mark!(self.launch, WaitForStaged);
    }

    /// Linear 2: counts a task's stores; the last of an expert raises its flag on every rank that sent it tokens.
    #[inline(always)]
    fn announce_results(&self, task: &Task) {
        let launch = self.launch;
        mark!(launch, Announce, task);
        let params = launch.params();
        let shape = &params.shape;
        let done = launch.counter(params.workspace.counter.expert_done, task.expert);
        // The warpgroup's stores to all ranks come before the count, and all counted stores before the flag: with the fences the count releases and acquires.
        fence_acq_rel_sys();
        // SAFETY: a counter of this launch.
        if unsafe { atom_add_relaxed_gpu(done, 1) } + 1 < task.expert_tasks * CONSUMER_WARPGROUPS {
            return;
        }
        fence_acq_rel_sys();
        let routed = shape.routed_experts();
        let epoch = launch.epoch();
        let raise = |rank: u32, flag: u32| {
            // SAFETY: every rank has a flag for every expert.
            unsafe { st_relaxed_sys_u32(launch.symmetric(rank, params.symmetric.flags, flag as u64), epoch) };
        };
        if task.expert < shape.shared_experts {
            raise(params.rank, shape.experts + task.expert);
            return;
        }
        let expert = task.expert - shape.shared_experts;
        let Sources(counts) = sources_of(launch, expert);
        let mut sent: u32 = 0;
        unroll!(PLACE < MAX_RANKS as usize, { sent |= ((counts[PLACE] > 0) as u32) << PLACE });
        while sent != 0 {
            let rank = source_at(params.rank, shape.ranks, sent.trailing_zeros());
            raise(rank, params.rank * routed + expert);
            sent &= sent - 1;
        }
    }
}
