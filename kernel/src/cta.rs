//! A CTA's shared memory by name, and the rings that its roles walk.

use crate::device::address::SharedAddress;
use crate::device::barrier::bar_warp_sync;
use crate::device::cluster::{cluster_cta, cluster_ctas, mapa};
use crate::device::mbarrier::Mbarrier;
use crate::device::warp::shfl_idx;
use crate::format::{TASK_SLOTS, WEIGHT_STAGE_BYTES};
use crate::schedule::ExpertRows;
use crate::shared::{COMBINE_BYTES, SharedLayout};
use crate::task::{TASK_BYTES, Task};
use crate::warps::WARP;

pub use crate::format::FORMAT;

/// What its CTAs have where.
pub const SHARED: SharedLayout = SharedLayout::new(&FORMAT);
/// Warps of all its consumer warpgroups.
pub const CONSUMER_WARPS: u32 = FORMAT.consumer_warps();

/// The CTA's dynamic shared memory.
#[derive(Clone, Copy)]
pub struct Cta(SharedAddress);

macro_rules! mbarriers {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            #[inline(always)]
            pub fn $name(self, index: u32) -> Mbarrier {
                Mbarrier(self.0.offset(SHARED.$name)).offset(index)
            }
        )*
    };
}

impl Cta {
    /// This CTA's.
    #[inline(always)]
    pub fn new() -> Self {
        Self(SharedAddress::dynamic())
    }

    mbarriers! {
        /// A stage holds its weight and token tiles.
        stage_full;
        /// A stage was read by every consumer warp of the cluster.
        stage_empty;
        /// A task slot holds a task.
        task_full;
        /// In the first CTA of the cluster: every role of all its CTAs has given the task slot back.
        task_empty;
        /// Every consumer warp has stored its results of a task, one of the last [`crate::shared::UNANNOUNCED_TASKS`]: they are the publisher's to announce.
        task_finished;
        /// A pull buffer holds its piece.
        pull_full;
        /// A combine buffer holds its piece.
        combine_full;
    }

    /// In the first CTA of the cluster: the producers of all its CTAs are so far with their task that the next is to be claimed.
    #[inline(always)]
    pub fn task_wanted(self) -> Mbarrier {
        Mbarrier(self.0.offset(SHARED.task_wanted))
    }

    /// The scheduler warp has counted the local experts' rows.
    #[inline(always)]
    pub fn counted(self) -> Mbarrier {
        Mbarrier(self.0.offset(SHARED.counted))
    }

    /// The stages of the launch that a task is of.
    #[inline(always)]
    pub fn pipeline(self, task: &Task) -> Pipeline {
        let stage_bytes = FORMAT.stage_bytes(FORMAT.pipeline_width(task.widest));
        Pipeline { first: self.0.offset(SHARED.stages), stage_bytes, stages: stages(task.widest) }
    }

    /// The stages of a launch with wide tiles.
    #[inline(always)]
    pub fn wide_pipeline(self) -> Pipeline {
        const STAGES: u32 = stages(FORMAT.tiles.count - 1);
        let stage_bytes = FORMAT.stage_bytes(FORMAT.tiles.widest());
        Pipeline { first: self.0.offset(SHARED.stages), stage_bytes, stages: STAGES }
    }

    /// The staging buffer of a consumer warpgroup.
    #[inline(always)]
    pub fn staging(self, warpgroup: u32) -> SharedAddress {
        self.0.offset(SHARED.staging + warpgroup * FORMAT.staging_bytes)
    }

    /// A pull buffer.
    #[inline(always)]
    pub fn pull_buffer(self, index: u32) -> SharedAddress {
        self.0.offset(SHARED.pull + index * FORMAT.pull_bytes)
    }

    /// A combine buffer.
    #[inline(always)]
    pub fn combine_buffer(self, index: u32) -> SharedAddress {
        self.0.offset(SHARED.stages + index * COMBINE_BYTES)
    }

    /// The scales of a stage: a f32 for each token of the widest tile, then those of the weight tile.
    #[inline(always)]
    pub fn scales(self, stage: u32) -> SharedAddress {
        self.0.offset(SHARED.scales + stage * FORMAT.scale_stage_bytes())
    }

    /// What the rows have that a consumer warpgroup works on: 8 bytes for each.
    #[inline(always)]
    pub fn rows(self, warpgroup: u32) -> SharedAddress {
        self.0.offset(SHARED.rows + warpgroup * FORMAT.warpgroup_tokens * 8)
    }

    /// The count of rows of a local expert.
    #[inline(always)]
    pub fn expert_rows(self, expert: u32) -> SharedAddress {
        self.0.offset(SHARED.expert_rows + expert * 4)
    }

    /// The bits of [`WARP`] local experts, set for those that have rows.
    #[inline(always)]
    pub fn hit_experts(self, word: u32) -> SharedAddress {
        self.0.offset(SHARED.hit_experts + word * 4)
    }

    /// A task slot.
    #[inline(always)]
    fn task_slot(self, slot: u32) -> SharedAddress {
        self.0.offset(SHARED.tasks + slot * TASK_BYTES)
    }
}

/// Stages of a launch whose widest token tile has this index.
#[inline(always)]
pub const fn stages(widest: u32) -> u32 {
    const STAGES: u64 = FORMAT.packed_stages();
    (STAGES >> (4 * widest)) as u32 & 0xf
}

/// The stages of a launch: a weight tile and a token tile each.
#[derive(Clone, Copy)]
pub struct Pipeline {
    first: SharedAddress,
    /// Bytes of a stage.
    pub stage_bytes: u32,
    /// How many there are.
    pub stages: u32,
}

impl Pipeline {
    /// The weight tile of a stage: 128 rows of a k-block, 128-byte swizzle.
    #[inline(always)]
    pub fn weights(self, stage: u32) -> SharedAddress {
        self.first.offset(stage * self.stage_bytes)
    }

    /// The token tile of a stage: `width` rows of a k-block, 128-byte swizzle.
    #[inline(always)]
    pub fn tokens(self, stage: u32) -> SharedAddress {
        self.weights(stage).offset(WEIGHT_STAGE_BYTES)
    }
}

/// A position in a ring of slots, and the parity of the phase that its next use completes.
#[derive(Clone, Copy)]
pub struct Ring {
    /// The slot.
    pub slot: u32,
    /// 0 in the first round, then 1, and so on.
    pub parity: u32,
}

impl Ring {
    /// The first slot.
    #[inline(always)]
    pub const fn new() -> Self {
        Self { slot: 0, parity: 0 }
    }

    /// Where the use of this number, from 0, is in a ring of `slots` slots, a power of two.
    #[inline(always)]
    pub const fn at(number: u32, slots: u32) -> Self {
        Self { slot: number % slots, parity: number / slots % 2 }
    }

    /// Steps to the next of `slots` slots.
    #[inline(always)]
    pub fn advance(&mut self, slots: u32) {
        self.slot += 1;
        self.wrap(slots);
    }

    /// Passes over what is left of a round of `slots` slots, and goes on from the first.
    #[inline(always)]
    pub fn finish_round(&mut self, slots: u32, pass: impl Fn(Ring)) {
        while self.slot > 0 {
            pass(*self);
            self.advance(slots);
        }
    }

    /// From behind the last of `slots` slots to the first.
    #[inline(always)]
    pub fn wrap(&mut self, slots: u32) {
        if self.slot == slots {
            self.slot = 0;
            self.parity ^= 1;
        }
    }
}

/// The rows of the local experts, from when the scheduler warp has counted them.
pub struct CountedRows {
    cta: Cta,
    experts: u32,
}

impl CountedRows {
    /// Of so many local experts.
    ///
    /// # Safety
    /// The scheduler warp has written the counts and bits, and the caller has synchronised with it.
    #[inline(always)]
    pub unsafe fn new(cta: Cta, experts: u32) -> Self {
        Self { cta, experts }
    }
}

impl ExpertRows for CountedRows {
    #[inline(always)]
    fn experts(&self) -> u32 {
        self.experts
    }

    #[inline(always)]
    fn rows(&self, expert: u32) -> u32 {
        // SAFETY: the counts are there, as `new` demands.
        unsafe { self.cta.expert_rows(expert).load_u32() }
    }

    #[inline(always)]
    fn next_hit(&self, expert: u32) -> u32 {
        if expert >= self.experts {
            return self.experts;
        }
        // SAFETY: as above.
        let bits = |word: u32| unsafe { self.cta.hit_experts(word).load_u32() };
        let mut word = expert / WARP;
        let mut hit = bits(word) & u32::MAX << (expert % WARP);
        while hit == 0 {
            word += 1;
            if word * WARP >= self.experts {
                return self.experts;
            }
            hit = bits(word);
        }
        word * WARP + hit.trailing_zeros()
    }
}

/// The end of the task slots that the scheduler of a cluster's first CTA has.
pub struct TaskWriter {
    cta: Cta,
    ring: Ring,
    /// Of the phase that completes when the next task is wanted.
    wanted: u32,
}

impl TaskWriter {
    /// Before the first task.
    #[inline(always)]
    pub fn new(cta: Cta) -> Self {
        Self { cta, ring: Ring::new(), wanted: 0 }
    }

    /// Hands each CTA of the cluster its task, of which `task` is the first's. One thread calls this.
    #[inline(always)]
    pub fn put(&mut self, task: Task) {
        let slot = self.ring.slot;
        self.cta.task_empty(slot).wait(self.ring.parity ^ 1);
        let address = self.cta.task_slot(slot);
        let [first, second] = task.words();
        // SAFETY: the slot is this thread's until it arrives below.
        unsafe {
            address.store_v4(first);
            address.offset(16).store_v4(second);
        }
        self.cta.task_full(slot).arrive();
        for cta in 1..cluster_ctas() {
            let address = mapa(address, cta);
            let [first, second] = task.of(cta, &FORMAT).words();
            // SAFETY: as above; the CTA has not ended, for no `End` was put into its slot.
            unsafe {
                address.store_v4(first);
                address.offset(16).store_v4(second);
            }
            self.cta.task_full(slot).of(cta).arrive_release();
        }
    }

    /// Waits until the next task is to be claimed, `task` being the last that was put: a product's producers say when, a chunk to combine gives its slot back.
    #[inline(always)]
    pub fn wait(&mut self, task: &Task) {
        if task.is_product() {
            self.cta.task_wanted().wait(self.wanted);
            self.wanted ^= 1;
        } else {
            self.cta.task_empty(self.ring.slot).wait(self.ring.parity);
        }
        self.ring.advance(TASK_SLOTS);
    }
}

/// A role's end of the task slots.
pub struct TaskReader {
    cta: Cta,
    /// Number of the next task, from 0.
    pub number: u32,
}

impl TaskReader {
    /// Before the first task.
    #[inline(always)]
    pub fn new(cta: Cta) -> Self {
        Self { cta, number: 0 }
    }

    /// The next task. The slot stays this role's until it gives it back by [`Self::release_warp`].
    #[inline(always)]
    pub fn look(&self) -> Task {
        let Ring { slot, parity } = Ring::at(self.number, TASK_SLOTS);
        let full = self.cta.task_full(slot);
        // The first CTA's own scheduler has written the slot there.
        while !if cluster_cta() == 0 { full.try_wait(parity) } else { full.try_wait_cluster(parity) } {}
        let address = self.cta.task_slot(slot);
        // SAFETY: the slot is full, and stays so until this role arrives on `task_empty`.
        Task::from_words(unsafe { [address.load_v4(), address.offset(16).load_v4()] })
    }

    /// The next task, for all lanes of a warp: the same in all, and known to be, so that what it decides is a branch of the whole warp.
    #[inline(always)]
    pub fn look_warp(&self) -> Task {
        Task::from_words(self.look().words().map(|words| words.map(|word| shfl_idx(word, 0))))
    }

    /// The next task; gives its slot back.
    #[inline(always)]
    pub fn take(&mut self) -> Task {
        let task = self.look();
        self.give_back();
        self.number += 1;
        task
    }

    /// Gives the slot back when all lanes of the warp have read it.
    #[inline(always)]
    pub fn release_warp(&mut self, lane: u32) {
        bar_warp_sync();
        if lane == 0 {
            self.give_back();
        }
        self.number += 1;
    }

    #[inline(always)]
    fn give_back(&self) {
        self.cta.task_empty(self.number % TASK_SLOTS).of(0).arrive();
    }
}
