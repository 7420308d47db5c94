//! The producer warp: keeps the stages full of weight and token tiles.

use crate::cta::{Cta, Pipeline, Ring, TaskReader};
use crate::device::bulk::{prefetch_tensormap, tensor_load_2d, tensor_load_2d_multicast, tensor_load_3d};
use crate::device::cluster::{cluster_cta, cluster_ctas};
use crate::device::fence::fence_proxy_async_global;
use crate::device::global::ld_acquire_gpu_u32;
use crate::launch::Launch;
use crate::params::TensorMap;
use crate::schedule::{Phase, Task, weight_tasks};
use crate::shared::{CONSUMER_WARPGROUPS, WEIGHT_STAGE_BYTES};
use crate::status::{Stage, Timeout};
use crate::tile::{K_BLOCK, loaded_rows, token_tile};

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
    let mut tasks = TaskReader::new(cta);
    let mut ring = Ring::new();
    loop {
        mark!(launch, WaitForTask);
        let task = tasks.take();
        if task.phase == Phase::Linear1 as u32 {
            load_linear1(launch, cta, &task, &mut ring);
        } else if task.phase == Phase::Linear2 as u32 {
            load_linear2(launch, cta, &task, &mut ring);
        } else if task.phase == Phase::End as u32 {
            return;
        }
    }
}

/// Linear 1 multiplies pulled rows: waits until all of the tile's rows are in the pool.
#[inline(always)]
fn load_linear1(launch: &Launch, cta: Cta, task: &Task, ring: &mut Ring) {
    let params = launch.params();
    let pulled = launch.counter(params.workspace.counter.rows_ready, task.tile);
    let operands = Operands {
        weights: &params.maps.linear1,
        tokens: (&raw const params.maps.tokens).cast::<TensorMap>().wrapping_add(task.width as usize),
        k_blocks: params.shape.hidden / K_BLOCK,
    };
    let missing = || Timeout { stage: Stage::Rows, rank: params.rank, subject: task.tile };
    // SAFETY: a counter of this launch.
    operands.load(launch, cta, task, ring, missing, || unsafe { ld_acquire_gpu_u32(pulled) } >= task.rows);
}

/// Linear 2 multiplies intermediate rows: waits until all of the tile's columns are in the pool.
#[inline(always)]
fn load_linear2(launch: &Launch, cta: Cta, task: &Task, ring: &mut Ring) {
    let params = launch.params();
    let stored = launch.counter(params.workspace.counter.columns_ready, task.tile);
    let k_blocks = params.shape.intermediate / K_BLOCK;
    let operands = Operands {
        weights: &params.maps.linear2,
        tokens: (&raw const params.maps.intermediate).cast::<TensorMap>().wrapping_add(task.width as usize),
        k_blocks,
    };
    let missing = || Timeout { stage: Stage::Columns, rank: params.rank, subject: task.tile };
    let halves = weight_tasks(2 * params.shape.intermediate, cluster_ctas()) * CONSUMER_WARPGROUPS;
    // SAFETY: a counter of this launch.
    operands.load(launch, cta, task, ring, missing, || unsafe { ld_acquire_gpu_u32(stored) } >= halves);
}

/// The two operands of a task.
struct Operands {
    weights: *const TensorMap,
    tokens: *const TensorMap,
    k_blocks: u32,
}

impl Operands {
    /// Loads all k-blocks: this CTA's weights, and its share of the tokens for all CTAs of the cluster. If the tokens are not there yet, the
    /// weights of the first stages are on their way before they are waited for.
    #[inline(always)]
    fn load(
        &self,
        launch: &Launch,
        cta: Cta,
        task: &Task,
        ring: &mut Ring,
        missing: impl Fn() -> Timeout,
        tokens_ready: impl Fn() -> bool,
    ) {
        let (width, cluster) = (token_tile(task.width), cluster_ctas());
        let rows = loaded_rows(width, cluster);
        let shared = rows < width;
        let first_row = if shared { cluster_cta() * rows } else { 0 };
        let everyone = (1 << cluster) - 1;
        let pipeline = cta.pipeline(task);
        let mut early = 0;
        mark!(launch, LoadWeights, task);
        if !tokens_ready() {
            let mut weights_ring = *ring;
            early = self.k_blocks.min(pipeline.stages);
            for k_block in 0..early {
                self.load_weights(cta, pipeline, task, weights_ring, k_block);
                weights_ring.advance(pipeline.stages);
            }
            mark!(launch, WaitForTokens);
            launch.wait_until(missing, tokens_ready);
        }
        mark!(launch, Load);
        // The rows were acquired by ordinary loads, and will be read by bulk copies.
        fence_proxy_async_global();
        for k_block in 0..self.k_blocks {
            if k_block >= early {
                self.load_weights(cta, pipeline, task, *ring, k_block);
            }
            let (destination, full) =
                (pipeline.tokens(ring.slot).offset(first_row * K_BLOCK * 2), cta.stage_full(ring.slot));
            let coordinates = [k_block * K_BLOCK, task.pool_row + first_row];
            // SAFETY: the stage is free in all CTAs of the cluster; their barriers expect these bytes.
            unsafe {
                if shared {
                    tensor_load_2d_multicast(destination, self.tokens, coordinates, full, everyone);
                } else {
                    tensor_load_2d(destination, self.tokens, coordinates, full);
                }
            };
            ring.advance(pipeline.stages);
        }
    }

    /// Waits until a stage is free, announces both tiles, and loads the weight tile.
    #[inline(always)]
    fn load_weights(&self, cta: Cta, pipeline: Pipeline, task: &Task, ring: Ring, k_block: u32) {
        cta.stage_empty(ring.slot).wait(ring.parity ^ 1);
        let full = cta.stage_full(ring.slot);
        full.arrive_expect_tx(WEIGHT_STAGE_BYTES + token_tile(task.width) * K_BLOCK * 2);
        let coordinates = [k_block * K_BLOCK, task.weight_row, task.expert];
        // SAFETY: the stage is free; its barrier expects these bytes.
        unsafe { tensor_load_3d(pipeline.weights(ring.slot), self.weights, coordinates, full) };
    }
}
