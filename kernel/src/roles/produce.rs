//! The producer warp: keeps the stages full of weight and token tiles.

use crate::cta::{Cta, Pipeline, Ring, TaskReader, stages};
use crate::device::bulk::{
    prefetch_tensormap, tensor_load_2d, tensor_load_2d_multicast, tensor_load_3d, tensor_load_3d_evict_first,
};
use crate::device::cluster::{cluster_cta, cluster_ctas};
use crate::device::fence::fence_proxy_async_global;
use crate::device::global::ld_acquire_gpu_u32;
use crate::format::{FORMAT, WEIGHT_STAGE_BYTES};
use crate::launch::Launch;
use crate::main_loop::{Loop, MainLoop};
use crate::params::TensorMap;
use crate::schedule::weight_tasks;
use crate::status::{Stage, Timeout};
use crate::task::{Block, Phase, Task};
use crate::tile::{K_BLOCK_BYTES, MAX_TILES, WEIGHT_TILE, loaded_rows};

/// Loads the operands of every task.
#[inline(always)]
pub fn produce(launch: &Launch, cta: Cta, lane: u32) {
    if lane != 0 {
        return;
    }
    let maps = &launch.params().maps;
    // SAFETY: tensor maps in the parameter block.
    unsafe {
        prefetch_tensormap(&maps.linear1);
        prefetch_tensormap(&maps.linear2);
    }
    let mut producer = Producer { launch, cta, tasks: TaskReader::new(cta), ring: Ring::new() };
    loop {
        mark!(launch, WaitForTask);
        let task = producer.tasks.take();
        if task.phase == Phase::Linear1 as u32 {
            producer.load_linear1(&task);
        } else if task.phase == Phase::Linear2 as u32 {
            producer.load_linear2(&task);
        } else if task.phase == Phase::End as u32 {
            return;
        }
    }
}

struct Producer<'a> {
    launch: &'a Launch,
    cta: Cta,
    tasks: TaskReader,
    /// The stage that is loaded next.
    ring: Ring,
}

impl Producer<'_> {
    /// Linear 1 multiplies pulled rows: waits until all of the tile's rows are in the pool.
    #[inline(always)]
    fn load_linear1(&mut self, task: &Task) {
        let params = self.launch.params();
        let operands = [&raw const params.maps.linear1, map_of(&params.maps.tokens, task)];
        let missing = || Timeout { stage: Stage::Rows, rank: params.rank, subject: task.tile };
        let launch = self.launch;
        self.load(task, operands, missing, || Loop::rows_there(launch, task));
    }

    /// Linear 2 multiplies intermediate rows: waits until all of the tile's columns are in the pool.
    #[inline(always)]
    fn load_linear2(&mut self, task: &Task) {
        let params = self.launch.params();
        let stored = self.launch.counter(params.workspace.counter.columns_ready, task.tile);
        let operands = [&raw const params.maps.linear2, map_of(&params.maps.intermediate, task)];
        let missing = || Timeout { stage: Stage::Columns, rank: params.rank, subject: task.tile };
        let blocks = weight_tasks(2 * params.shape.intermediate, FORMAT.linear1_rows(), cluster_ctas());
        // SAFETY: a counter of this launch.
        self.load(task, operands, missing, || unsafe { ld_acquire_gpu_u32(stored) } >= blocks);
    }

    /// Passes over what is left of a round of the last task's stages, and waits until all of them are free: the next ones are cut otherwise.
    #[inline(always)]
    fn retire(&mut self, stages: u32) {
        let cta = self.cta;
        self.ring.finish_round(stages, |Ring { slot, parity }| {
            cta.stage_empty(slot).wait(parity ^ 1);
            cta.stage_full(slot).arrive();
        });
        for slot in 0..stages {
            cta.stage_empty(slot).wait(self.ring.parity ^ 1);
        }
    }

    /// Loads all k-blocks of a task: this CTA's weights, and its share of the tokens for all CTAs of the cluster. If the tokens are not there yet, the
    /// weights of the first stages are on their way before they are waited for. Says when the next task is wanted.
    #[inline(always)]
    fn load(
        &mut self,
        task: &Task,
        [weights, tokens]: [*const TensorMap; 2],
        missing: impl Fn() -> Timeout,
        tokens_ready: impl Fn() -> bool,
    ) {
        let Self { launch, cta, .. } = *self;
        let shape = &launch.params().shape;
        let (width, cluster) = (FORMAT.tiles.width(task.width), cluster_ctas());
        let rows = loaded_rows(width, cluster);
        let shared = rows < width;
        let first_row = if shared { cluster_cta() * rows } else { 0 };
        let everyone = (1 << cluster) - 1;
        let pipeline = cta.pipeline(task);
        let scales = Loop::scales(launch, task);
        let k_blocks = FORMAT.k_blocks(task.columns(shape));
        let blocks = task.weight_tiles(&FORMAT, shape) * k_blocks;
        // As late as the way there and back lets it, so that tickets are taken up in their order, by CTAs that have the time.
        let claim_block = blocks.saturating_sub(FORMAT.claim_stages * stages(task.widest));
        if task.old_stages > 0 {
            self.retire(task.old_stages);
        }
        let mut early = 0;
        mark!(launch, LoadWeights, task);
        if !tokens_ready() {
            let (mut ring, mut at) = (self.ring, Block::FIRST);
            early = blocks.min(pipeline.stages);
            for _ in 0..early {
                load_weights(cta, pipeline, weights, task, &scales, ring, at);
                ring.advance(pipeline.stages);
                at.advance(&FORMAT, k_blocks);
            }
            mark!(launch, WaitForTokens);
            launch.wait_until(missing, tokens_ready);
        }
        mark!(launch, Load);
        // The rows were acquired by ordinary loads, and will be read by bulk copies.
        fence_proxy_async_global();
        let mut at = Block::FIRST;
        for block in 0..blocks {
            if block == claim_block {
                cta.task_wanted().of(0).arrive();
            }
            let ring = self.ring;
            if block >= early {
                load_weights(cta, pipeline, weights, task, &scales, ring, at);
            }
            let (destination, full) =
                (pipeline.tokens(ring.slot).offset(first_row * K_BLOCK_BYTES), cta.stage_full(ring.slot));
            let coordinates = [at.k_block * FORMAT.k_block(), task.pool_row + first_row];
            // SAFETY: the stage is free in all CTAs of the cluster; their barriers expect these bytes.
            unsafe {
                if shared {
                    tensor_load_2d_multicast(destination, tokens, coordinates, full, everyone);
                } else {
                    tensor_load_2d(destination, tokens, coordinates, full);
                }
            };
            Loop::load_token_scales(&scales, cta, task, ring.slot, at);
            self.ring.advance(pipeline.stages);
            at.advance(&FORMAT, k_blocks);
        }
    }
}

/// The map of a pool for a task's token tile.
#[inline(always)]
fn map_of(maps: &[TensorMap; MAX_TILES], task: &Task) -> *const TensorMap {
    (&raw const *maps).cast::<TensorMap>().wrapping_add(task.width as usize)
}

/// Waits until a stage is free, announces both tiles, and loads the weight tile.
#[inline(always)]
fn load_weights(
    cta: Cta,
    pipeline: Pipeline,
    weights: *const TensorMap,
    task: &Task,
    scales: &<Loop as MainLoop>::Scales,
    ring: Ring,
    at: Block,
) {
    cta.stage_empty(ring.slot).wait(ring.parity ^ 1);
    let full = cta.stage_full(ring.slot);
    let width = FORMAT.tiles.width(task.width);
    full.arrive_expect_tx(WEIGHT_STAGE_BYTES + width * K_BLOCK_BYTES + Loop::scale_bytes(width));
    let coordinates = [at.k_block * FORMAT.k_block(), task.weight_row + at.tile * WEIGHT_TILE, task.expert];
    let destination = pipeline.weights(ring.slot);
    // SAFETY: the stage is free; its barrier expects these bytes.
    unsafe {
        if task.widest == 0 {
            // Few tokens: weights come once, and what the next launch begins with had better stay in the cache.
            tensor_load_3d_evict_first(destination, weights, coordinates, full);
        } else {
            tensor_load_3d(destination, weights, coordinates, full);
        }
    };
    Loop::load_weight_scales(scales, cta, ring.slot, at);
}
