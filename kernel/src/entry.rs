//! The kernel's entry: sets the CTA up, starts its roles, and ends the launch.

use crate::cta::{CONSUMER_WARPS, Cta, FORMAT};
use crate::device::atomic::atom_add_acq_rel_gpu;
use crate::device::barrier::bar_warp_sync;
use crate::device::cluster::{barrier_cluster, cluster_ctas};
use crate::device::fence::{fence_mbarrier_init, fence_proxy_async};
use crate::device::global::st_weak_u32;
use crate::device::special::{ctas, setmaxnreg_dec, setmaxnreg_inc, thread};
use crate::device::warp::shfl_idx;
use crate::format::TASK_SLOTS;
use crate::launch::Launch;
use crate::main_loop::{Loop, MainLoop};
use crate::params::{Arguments, Params};
use crate::roles::{consume, produce, publish, pull, route, schedule};
use crate::shared::{COMBINE_BUFFERS, PULL_BUFFERS, UNANNOUNCED_TASKS};
use crate::warps::{CONSUMER_WARP, DISPATCH_WARPS, PRODUCER_WARP, SCHEDULER_WARP, WARP};

macro_rules! entry {
    ($format:literal, $name:ident) => {
        /// One rank's whole layer: dispatch, linear 1, SwiGLU, linear 2, combine and top-k reduction.
        ///
        /// Launch with [`Format::threads`](crate::format::Format::threads) threads a CTA, any number of CTAs in clusters of up to [`MAX_CLUSTER`](crate::tile::MAX_CLUSTER),
        /// for which the maps of the pools are made, and [`SharedLayout::bytes`](crate::shared::SharedLayout::bytes) of dynamic shared memory.
        ///
        /// # Safety
        /// The arguments are as [`Arguments`] says, and every rank of the group launches the kernel.
        #[cfg(feature = $format)]
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $name(
            params: &'static Params,
            hidden_states: u64,
            hidden_scales: u64,
            topk_ids: u64,
            topk_weights: u64,
            tokens: u64,
            output: u64,
        ) {
            let arguments = Arguments { hidden_states, hidden_scales, topk_ids, topk_weights, tokens, output };
            // SAFETY: the caller's.
            forward(unsafe { Launch::new(params, arguments) });
        }
    };
}

entry!("bf16", ferromoe_bf16);
entry!("fp8", ferromoe_fp8);

/// Sets the CTA up, and gives each warp its role.
#[inline(always)]
fn forward(launch: Launch) {
    let thread = thread();
    // The same value in all lanes, and known to be: roles are branches of whole warps.
    let warp = shfl_idx(thread / WARP, 0);
    let lane = thread % WARP;
    let cta = Cta::new();
    if thread == 0 {
        // SAFETY: the barriers' memory is the CTA's, and no other thread of the cluster has passed the barrier below.
        unsafe { init_mbarriers(cta) };
    }
    bar_warp_sync();
    barrier_cluster();
    mark!(&launch, Start);

    if warp < CONSUMER_WARP {
        setmaxnreg_dec::<{ FORMAT.helper_registers }>();
        let launch = launch.keep();
        if warp < DISPATCH_WARPS {
            route::route(&launch, lane);
            pull::pull(&launch, cta, warp, lane);
        } else if warp == PRODUCER_WARP {
            produce::produce(&launch, cta, lane);
        } else if warp == SCHEDULER_WARP {
            schedule::schedule(&launch, cta, lane);
        } else {
            // No task is there yet: this warp has the time.
            schedule::zero_next_counters(&launch, lane);
            publish::publish(&launch, cta, lane);
        }
    } else {
        setmaxnreg_inc::<{ FORMAT.consumer_registers }>();
        Loop::quantise(&launch, lane);
        consume::consume(&launch, cta, warp - CONSUMER_WARP, lane);
    }

    mark!(&launch, Done);
    // No CTA ends while another may still reach into its shared memory.
    bar_warp_sync();
    barrier_cluster();
    if thread == 0 {
        end_launch(&launch);
    }
}

/// # Safety
/// One thread of the CTA calls this, before any other use of the barriers.
#[inline(always)]
unsafe fn init_mbarriers(cta: Cta) {
    // SAFETY: the caller's, and the offsets are those of barriers.
    unsafe {
        for stage in 0..FORMAT.max_stages {
            cta.stage_full(stage).init(1);
            cta.stage_empty(stage).init(CONSUMER_WARPS * cluster_ctas());
        }
        for slot in 0..TASK_SLOTS {
            cta.task_full(slot).init(1);
            // The producer, the publisher and every consumer warp, of every CTA.
            cta.task_empty(slot).init((2 + CONSUMER_WARPS) * cluster_ctas());
        }
        cta.task_wanted().init(cluster_ctas());
        cta.counted().init(1);
        for slot in 0..UNANNOUNCED_TASKS {
            cta.task_finished(slot).init(CONSUMER_WARPS);
        }
        for buffer in 0..DISPATCH_WARPS * PULL_BUFFERS {
            cta.pull_full(buffer).init(1);
        }
        for buffer in 0..CONSUMER_WARPS * COMBINE_BUFFERS {
            cta.combine_full(buffer).init(1);
        }
    }
    fence_mbarrier_init();
    fence_proxy_async();
}

/// The last CTA to end moves the epoch on.
#[inline(always)]
fn end_launch(launch: &Launch) {
    let epoch = launch.epoch_address();
    // SAFETY: the workspace holds the epoch and, behind it, the count of ended CTAs.
    unsafe {
        let ended = epoch.add(1);
        if atom_add_acq_rel_gpu(ended, 1) + 1 == ctas() {
            st_weak_u32(ended, 0);
            st_weak_u32(epoch, launch.epoch());
        }
    }
}
