//! The consumer warpgroups: the tensor-core products, then linear 1's or linear 2's results, then combine. They meet only through the stages.

use crate::consumer::{CONSUMERS_BARRIER, Consumer};
use crate::cta::{CONSUMER_WARPS, Cta, Ring, SHARED, TaskReader};
use crate::device::barrier::bar_sync;
use crate::device::fence::fence_proxy_async_shared;
use crate::launch::Launch;
use crate::main_loop::{Loop, MainLoop};
use crate::roles::combine::Combiner;
use crate::shared::{COMBINE_BUFFERS, COMBINE_BYTES};
use crate::task::{Phase, Task};
use crate::warps::WARP;

/// End of the combine buffers.
const COMBINE_END: u32 = CONSUMER_WARPS * COMBINE_BUFFERS * COMBINE_BYTES;

/// Works on tasks until none is left: products, then combine. `warp` counts all consumer warps of the CTA.
#[inline(always)]
pub fn consume(launch: &Launch, cta: Cta, warp: u32, lane: u32) {
    let mut tasks = TaskReader::new(cta);
    let mut task = multiply_tasks(launch, cta, &mut tasks);
    mark!(launch, WaitForWarpgroup);
    // The combine buffers are the memory of stages and staging buffers: every warp must be done with its last product. Bulk copies will write what was staged by ordinary stores.
    if COMBINE_END > SHARED.staging {
        fence_proxy_async_shared();
    }
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
fn multiply_tasks(launch: &Launch, cta: Cta, tasks: &mut TaskReader) -> Task {
    let mut ring = Ring::new();
    loop {
        mark!(launch, WaitForTask);
        let task = tasks.look_warp();
        if !task.is_product() {
            return task;
        }
        let number = tasks.number;
        let consumer = Consumer::read(launch);
        tasks.release_warp(consumer.lane);
        mark!(launch, WaitForStage, &task);
        if task.old_stages > 0 {
            // What is left of a round of the last task's stages, as the producer does.
            ring.finish_round(task.old_stages, |ring| consumer.pass_stage(ring));
        }
        Loop::run(consumer, &task, &mut ring);
        consumer.hand_over(number);
    }
}
