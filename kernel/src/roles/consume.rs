//! The consumer warpgroups: the tensor-core products, then linear 1's or linear 2's results, then combine.
//!
//! A warpgroup has 64 of a task's 128 weight rows. The two meet only through the stages.

use crate::cta::{Cta, Pipeline, Ring, TaskReader};
use crate::device::address::SharedAddress;
use crate::device::barrier::{bar_sync, bar_warp_sync};
use crate::device::cluster::cluster_ctas;
use crate::device::global::{ld_weak_u64, st_weak_v4};
use crate::device::mbarrier::ClusterMbarrier;
use crate::device::special;
use crate::device::wgmma::{
    Accumulators, MatrixDescriptor, MmaAsync, wgmma_commit_group, wgmma_fence, wgmma_wait_group,
};
use crate::launch::{CONSUMERS_BARRIER, FIRST_WARPGROUP_BARRIER, Launch, SECOND_WARPGROUP_BARRIER};
use crate::layout::RowMeta;
use crate::roles::combine::Combiner;
use crate::roles::{linear1, linear2};
use crate::schedule::{Phase, Task};
use crate::shared::{
    CONSUMER_WARPS, PASS_BYTES, STAGED_PASSES, UNANNOUNCED_TASKS, WARP, WARPGROUP, WEIGHT_STAGE_BYTES,
};
use crate::tile::{K_BLOCK, K_STEP, MAX_TOKEN_TILE};

/// Metas that a thread loads of the widest tile.
const METAS_PER_THREAD: usize = (MAX_TOKEN_TILE / WARPGROUP) as usize;

/// Passes that are staged ahead of those that are stored: half of the buffer.
const AHEAD: usize = STAGED_PASSES / 2;

/// One consumer warp.
#[derive(Clone, Copy)]
pub struct Consumer<'a> {
    /// The launch.
    pub launch: &'a Launch,
    /// The CTA's shared memory.
    pub cta: Cta,
    /// Consumer warpgroup of the CTA, 0 or 1.
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
        if self.warpgroup == 0 {
            bar_sync::<FIRST_WARPGROUP_BARRIER, WARPGROUP>();
        } else {
            bar_sync::<SECOND_WARPGROUP_BARRIER, WARPGROUP>();
        }
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

    /// Passes over what is left of a round of the last task's stages, as the producer does.
    #[inline(always)]
    fn retire(&self, stages: u32, ring: &mut Ring) {
        ring.finish_round(stages, |Ring { slot, parity }| {
            self.cta.stage_full(slot).wait(parity);
            if self.lane < cluster_ctas() {
                self.cta.stage_empty(slot).of(self.lane).arrive();
            }
        });
    }

    /// Hands the finished task of this number, and so all that was stored for it, to the publisher. Every warp calls this.
    #[inline(always)]
    fn hand_over(&self, number: u32) {
        bar_warp_sync();
        if self.lane == 0 {
            self.cta.task_finished(number % UNANNOUNCED_TASKS).arrive();
        }
    }

    /// Thread of the warpgroup.
    #[inline(always)]
    pub fn thread(&self) -> u32 {
        self.warp * WARP + self.lane
    }

    /// Where the result of a row of the current tile goes: in linear 2.
    #[inline(always)]
    pub fn result_row(&self, row: u32) -> u64 {
        // SAFETY: `keep_row_metas` wrote it, before the last `sync`.
        unsafe { self.cta.row_meta(self.warpgroup, row).load_u64() }
    }

    /// The routing weights of a row of the current tile, an even one, and of the next: in linear 1.
    #[inline(always)]
    pub fn row_weights(&self, row: u32) -> [f32; 2] {
        // SAFETY: as above.
        let [first, weight0, second, weight1] = unsafe { self.cta.row_meta(self.warpgroup, row).load_v4() };
        [(first, weight0), (second, weight1)]
            .map(|(lower, upper)| RowMeta::unpack((upper as u64) << 32 | lower as u64).weight)
    }

    /// Starts to load the metas of the tile's rows: zeros behind the last.
    #[inline(always)]
    fn load_row_metas<const QUADS: usize>(&self, task: &Task) -> [u64; METAS_PER_THREAD] {
        let metas = self.launch.params().workspace.row_meta;
        let mut loaded = [0; METAS_PER_THREAD];
        unroll!(INDEX < METAS_PER_THREAD, {
            let row = INDEX as u32 * WARPGROUP + self.thread();
            if INDEX * (WARPGROUP as usize) < 8 * QUADS && row < task.rows {
                // SAFETY: the row lies in the pool; its meta was written before it was counted into the tile, which the producer has seen.
                loaded[INDEX] = unsafe { ld_weak_u64(self.launch.workspace(metas, (task.pool_row + row) as u64)) };
            }
        });
        loaded
    }

    /// Puts the metas, in linear 2 the addresses of the result rows, where the whole warpgroup finds them. All warps are done with the last tile's: they
    /// read them before the last `sync`.
    #[inline(always)]
    fn keep_row_metas<const QUADS: usize>(&self, metas: [u64; METAS_PER_THREAD], linear1: bool) {
        let (row_bytes, results) = (self.launch.row_bytes() as u64, self.launch.params().symmetric.combine);
        unroll!(INDEX < METAS_PER_THREAD, {
            let row = INDEX as u32 * WARPGROUP + self.thread();
            if INDEX * (WARPGROUP as usize) < 8 * QUADS && row < 8 * QUADS as u32 {
                let RowMeta { combine_row, rank, .. } = RowMeta::unpack(metas[INDEX]);
                let result = self.launch.symmetric_base(rank) + results + combine_row as u64 * row_bytes;
                // SAFETY: the array has a place for every row of the widest tile.
                unsafe {
                    self.cta.row_meta(self.warpgroup, row).store_u64(if linear1 { metas[INDEX] } else { result })
                };
            }
        });
    }
}

/// Works on tasks until none is left: products, then combine. `warp` counts all consumer warps of the CTA.
#[inline(always)]
pub fn consume(launch: &Launch, cta: Cta, warp: u32, lane: u32) {
    let mut tasks = TaskReader::new(cta);
    let mut task = multiply_tasks(launch, cta, warp, &mut tasks);
    mark!(launch, WaitForWarpgroup);
    // The combine buffers are the stages: every warp must be done with its last product.
    bar_sync::<CONSUMERS_BARRIER, { CONSUMER_WARPS * WARP }>();
    let mut combiner = Combiner::new(launch, cta, warp, lane);
    while task.phase == Phase::Combine as u32 {
        combiner.combine(task.expert, &mut tasks);
        mark!(launch, WaitForTask);
        task = tasks.look_warp();
    }
}

/// Works on tasks until one comes that is no product, and returns it; its slot is not given back.
#[inline(always)]
fn multiply_tasks(launch: &Launch, cta: Cta, warp: u32, tasks: &mut TaskReader) -> Task {
    let warps = WARPGROUP / WARP;
    let mut ring = Ring::new();
    loop {
        mark!(launch, WaitForTask);
        // Read anew: what depends on the lane alone would be kept from task to task, and there are no registers for it.
        let lane = special::lane();
        let task = tasks.look_warp();
        if !task.is_product() {
            return task;
        }
        let number = tasks.number;
        tasks.release_warp(lane);
        mark!(launch, WaitForStage, &task);
        let consumer = Consumer { launch, cta, warpgroup: warp / warps, warp: warp % warps, lane };
        if task.old_stages > 0 {
            consumer.retire(task.old_stages, &mut ring);
        }
        match task.width {
            0 => run::<1>(consumer, &task, &mut ring, number),
            1 => run::<2>(consumer, &task, &mut ring, number),
            2 => run::<4>(consumer, &task, &mut ring, number),
            3 => run::<8>(consumer, &task, &mut ring, number),
            4 => run::<12>(consumer, &task, &mut ring, number),
            5 => run::<16>(consumer, &task, &mut ring, number),
            6 => run::<20>(consumer, &task, &mut ring, number),
            7 => run::<24>(consumer, &task, &mut ring, number),
            8 => run::<28>(consumer, &task, &mut ring, number),
            _ => run::<32>(consumer, &task, &mut ring, number),
        }
    }
}

/// The task of this number, with a token tile of `8 * QUADS` tokens.
#[inline(always)]
fn run<const QUADS: usize>(consumer: Consumer<'_>, task: &Task, ring: &mut Ring, number: u32)
where
    Accumulators<QUADS>: MmaAsync,
{
    let shape = &consumer.launch.params().shape;
    let linear1 = task.phase == Phase::Linear1 as u32;
    // A full stage means that the tile's rows, and so their metas, are there.
    consumer.cta.stage_full(ring.slot).wait(ring.parity);
    let metas = consumer.load_row_metas::<QUADS>(task);
    let accumulators = multiply::<QUADS>(consumer, consumer.cta.pipeline(task), task.k_blocks(shape), ring);
    consumer.keep_row_metas::<QUADS>(metas, linear1);
    consumer.sync();
    if linear1 {
        linear1::finish(consumer, task, &accumulators);
    } else {
        linear2::finish(consumer, task, &accumulators);
    }
    consumer.hand_over(number);
}

/// The product of this warpgroup's 64 weight rows with the tile's tokens. One stage's products stay in flight while the next are issued.
#[inline(always)]
fn multiply<const QUADS: usize>(
    consumer: Consumer<'_>,
    pipeline: Pipeline,
    k_blocks: u32,
    ring: &mut Ring,
) -> Accumulators<QUADS>
where
    Accumulators<QUADS>: MmaAsync,
{
    let Consumer { cta, warpgroup, lane, .. } = consumer;
    mark!(consumer.launch, Multiply);
    // SAFETY: zeros are valid f32. An array expression would be built in local memory, and stay there.
    let mut accumulators: Accumulators<QUADS> = unsafe { core::mem::zeroed() };
    // Every producer of the cluster writes to a stage: a lane for each gives it back.
    let (releases, stage_empty) = (lane < cluster_ctas(), cta.stage_empty(0).of(lane.min(cluster_ctas() - 1)));
    let first_row = warpgroup * (WEIGHT_STAGE_BYTES / 2);
    let mut previous: Option<ClusterMbarrier> = None;
    let mut rest = k_blocks;
    while rest > 0 {
        // Up to the ring's end a stage, and its barriers, lie behind those of the one before.
        let stages = rest.min(pipeline.stages - ring.slot);
        rest -= stages;
        let mut next = MatrixDescriptor::new(pipeline.weights(ring.slot)).offset(first_row);
        let (mut full, mut empty) = (cta.stage_full(ring.slot), stage_empty.offset(ring.slot));
        let end = full.offset(stages);
        while full != end {
            full.wait(ring.parity);
            wgmma_fence();
            let weights = next.uniform();
            let tokens = weights.offset(WEIGHT_STAGE_BYTES - first_row);
            unroll!(STEP < (K_BLOCK / K_STEP) as usize, {
                let bytes = STEP as u32 * K_STEP * 2;
                // SAFETY: the stage is full, and released only after the group was waited for.
                unsafe { accumulators.mma_async(weights.offset(bytes), tokens.offset(bytes)) };
            });
            wgmma_commit_group();
            wgmma_wait_group::<1>();
            // No lane waits for the others: each has waited for the products of the whole warp.
            if releases && let Some(stage) = previous {
                stage.arrive();
            }
            previous = Some(empty);
            (full, empty) = (full.offset(1), empty.offset(1));
            next = next.offset(pipeline.stage_bytes);
        }
        ring.slot += stages;
        ring.wrap(pipeline.stages);
    }
    wgmma_wait_group::<0>();
    let last = if ring.slot == 0 { pipeline.stages } else { ring.slot } - 1;
    if releases {
        stage_empty.offset(last).arrive();
    }
    mark!(consumer.launch, Epilogue);
    accumulators
}
