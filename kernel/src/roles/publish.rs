//! The publisher warp: waits for the consumers to have finished a task, and announces its results, while the consumers go on.
//!
//! The two consumer warpgroups are served apart from each other, so that one multiplies while the other finishes its tile.

use crate::cta::{Cta, Ring, TaskReader};
use crate::device::atomic::{atom_add_relaxed_gpu, red_add_release_gpu};
use crate::device::fence::fence_acq_rel_sys;
use crate::device::global::st_relaxed_sys_u32;
use crate::launch::Launch;
use crate::layout::MAX_RANKS;
use crate::roles::pull::sources_of;
use crate::schedule::{Phase, Task};
use crate::shared::{CONSUMER_WARPGROUPS, UNANNOUNCED_TASKS};
use crate::sources::{Sources, source_at};

/// Publishes the results of every task.
#[inline(always)]
pub fn publish(launch: &Launch, cta: Cta, lane: u32) {
    if lane != 0 {
        return;
    }
    let mut first = Publisher::new(launch, cta, 0);
    let mut second = Publisher::new(launch, cta, 1);
    const _: () = assert!(CONSUMER_WARPGROUPS == 2);
    mark!(launch, WaitForFinished);
    while !(first.ended && second.ended) {
        first.poll();
        second.poll();
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
    finished: Ring,
    ended: bool,
}

impl<'a> Publisher<'a> {
    #[inline(always)]
    fn new(launch: &'a Launch, cta: Cta, warpgroup: u32) -> Self {
        Self { launch, cta, warpgroup, tasks: TaskReader::new(cta), task: None, finished: Ring::new(), ended: false }
    }

    /// Does what can be done without a wait for others.
    #[inline(always)]
    fn poll(&mut self) {
        let Some(task) = self.task else { return self.next_task() };
        if !self.cta.task_finished(self.warpgroup, self.finished.slot).try_wait(self.finished.parity) {
            return;
        }
        mark!(self.launch, Announce, &task);
        if task.phase == Phase::Linear1 as u32 {
            self.announce_columns(&task);
        } else {
            self.announce_results(&task);
        }
        self.task = None;
        self.finished.advance(UNANNOUNCED_TASKS);
        mark!(self.launch, WaitForFinished);
    }

    /// Reads the next task, if there is one.
    #[inline(always)]
    fn next_task(&mut self) {
        if self.ended || !self.tasks.is_ready() {
            return;
        }
        let task = self.tasks.look();
        self.tasks.release();
        self.ended = task.phase == Phase::End as u32;
        if task.phase == Phase::Linear1 as u32 || task.phase == Phase::Linear2 as u32 {
            self.task = Some(task);
        }
    }

    /// Linear 1: counts a task's columns for their tile.
    #[inline(always)]
    fn announce_columns(&self, task: &Task) {
        let stored = self.launch.counter(self.launch.params().workspace.counter.columns_ready, task.tile);
        // The hand-over has told this thread of the warpgroup's stores: the release is one of them too.
        // SAFETY: a counter of this launch.
        unsafe { red_add_release_gpu(stored, 1) };
    }

    /// Linear 2: counts a task's stores; the last of an expert raises its flag on every rank that sent it tokens.
    #[inline(always)]
    fn announce_results(&self, task: &Task) {
        let launch = self.launch;
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
