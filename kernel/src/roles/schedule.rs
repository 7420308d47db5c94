//! The scheduler warp: waits for all ranks' counts, and that of a cluster's first CTA claims tickets and hands tasks to the other roles. Before it waits, it hands
//! out the first, if that does not depend on the counts.

use crate::cta::{CountedRows, Cta, FORMAT, TaskWriter, stages};
use crate::device::atomic::atom_inc_relaxed_gpu;
use crate::device::barrier::bar_warp_sync;
use crate::device::cluster::{cluster_cta, cluster_ctas};
use crate::device::global::{ld_relaxed_sys_u64, st_weak_u32, st_weak_u64};
use crate::device::special::{cta as cta_index, ctas};
use crate::device::warp::{ballot, redux_max};
use crate::launch::Launch;
use crate::schedule::{ScheduleShape, TaskCursor, combine_chunks};
use crate::status::{Stage, Timeout};
use crate::task::{Phase, Task};
use crate::warps::WARP;

/// Counts that a lane loads at once.
const COUNTS_AT_ONCE: usize = 8;

/// Schedules until no task is left.
#[inline(always)]
pub fn schedule(launch: &Launch, cta: Cta, lane: u32) {
    check_tokens(launch, lane);
    let hands_out = lane == 0 && cluster_cta() == 0;
    let mut writer = TaskWriter::new(cta);
    let (mut ticket, mut early) = (0, None);
    if hands_out {
        // Claimed before the counts are there: the wait for them hides the way there and back.
        ticket = claim_task(launch);
        early = shape_of(launch, 0).early_task(launch.params().shape.shared_experts, launch.tokens(), ticket);
        if let Some(task) = early {
            mark!(launch, HandOut, &task);
            writer.put(task);
        }
    }
    mark!(launch, GatherCounts);
    gather_counts(launch, cta, lane);
    let most_rows = look_at_rows(launch, cta, lane);
    bar_warp_sync();
    if lane == 0 {
        cta.counted().arrive();
    }
    if hands_out {
        hand_out_tasks(launch, cta, writer, shape_of(launch, most_rows), ticket, early);
    }
}

/// What the order of tasks depends on; `most_rows` are those of the expert that has the most.
#[inline(always)]
fn shape_of(launch: &Launch, most_rows: u32) -> ScheduleShape {
    let params = launch.params();
    ScheduleShape {
        format: FORMAT,
        wave_tiles: params.wave_tiles,
        part_tiles: params.part_tiles,
        ring: launch.tile_ring(),
        linear1_rows: 2 * params.shape.intermediate,
        linear2_rows: params.shape.hidden,
        combine_chunks: combine_chunks(launch.tokens(), ctas()),
        cluster: cluster_ctas(),
        most_rows,
    }
}

/// Reports a count of tokens beyond the maximum; such a rank runs as one without tokens.
#[inline(always)]
fn check_tokens(launch: &Launch, lane: u32) {
    let claimed = launch.claimed_tokens();
    let excess = (launch.params().layer as u64) << 32 | claimed as u64;
    if lane == 0 && cta_index() == 0 && claimed > launch.params().shape.max_tokens {
        // SAFETY: the status words lie in the workspace, and only this thread writes this one.
        unsafe { st_weak_u64(&raw mut (*launch.status()).excess_tokens, excess) };
    }
}

/// Zeroes this CTA's share of the counters that the next launch uses.
#[inline(always)]
pub fn zero_next_counters(launch: &Launch, lane: u32) {
    let words = (launch.params().workspace.counter.bytes / 4) as u32;
    let mut word = cta_index() * WARP + lane;
    while word < words {
        // SAFETY: a word of the other set of counters, which no CTA uses in this launch.
        unsafe { st_weak_u32(launch.next_counter(word), 0) };
        word += ctas() * WARP;
    }
}

/// Waits for every rank's counts, and adds up the rows of every local expert in shared memory: none for routed experts if a rank has launched another
/// layer, or has not launched before the deadline.
#[inline(always)]
fn gather_counts(launch: &Launch, cta: Cta, lane: u32) {
    let params = launch.params();
    let shape = &params.shape;
    let (shared, routed, epoch) = (shape.shared_experts, shape.routed_experts(), launch.epoch());
    let mut expert = lane;
    while expert < shape.local_experts() {
        // SAFETY: the array holds all local experts, and each has one writer.
        unsafe { cta.expert_rows(expert).store_u32(if expert < shared { launch.tokens() } else { 0 }) };
        expert += WARP;
    }
    bar_warp_sync();
    let counts: *const u64 = launch.symmetric(params.rank, params.symmetric.counts, launch.count_index(0, 0));
    // SAFETY: a place in the counts, which lie as `[ranks][routed_experts]`.
    let load = |index: u32| unsafe { ld_relaxed_sys_u64(counts.wrapping_add(index as usize)) };
    let is_new = |word: u64| (word >> 32) as u32 == epoch;
    // Every lane looks at a rank's layer too: one for each rank gets here, as there are at least as many experts.
    let source = lane.min(shape.ranks - 1);
    let layer_place = launch.layer_place(params.rank, source);
    // SAFETY: a place in the layers.
    let load_layer = || unsafe { ld_relaxed_sys_u64(layer_place) };
    let expected = launch.launched_layer();
    let mut launched = expected;
    let last = shape.experts - 1;
    let mut first = lane;
    // Divisions take their time: a lane steps from expert to expert.
    let (mut expert, step) = (lane % routed, WARP % routed);
    while first <= last {
        let at = |count: usize| first + count as u32 * WARP;
        // Behind the last, a lane looks at its first once more.
        let within = |index: u32| if index <= last { index } else { first };
        // SAFETY: zeros are valid u64.
        let mut words: [u64; COUNTS_AT_ONCE] = unsafe { core::mem::zeroed() };
        let missing = || {
            if !is_new(load_layer()) {
                return Timeout { stage: Stage::Counts, rank: source, subject: params.rank * routed };
            }
            let mut index = first;
            while index + WARP <= last && is_new(load(index)) {
                index += WARP;
            }
            Timeout { stage: Stage::Counts, rank: index / routed, subject: params.rank * routed + index % routed }
        };
        launch.wait_until(missing, || {
            unroll!(COUNT < COUNTS_AT_ONCE, { words[COUNT] = load(within(at(COUNT))) });
            launched = load_layer();
            let mut all = is_new(launched);
            unroll!(COUNT < COUNTS_AT_ONCE, { all &= is_new(words[COUNT]) });
            // Who has launched another layer may have counts elsewhere.
            all || is_new(launched) && launched != expected
        });
        unroll!(COUNT < COUNTS_AT_ONCE, {
            if at(COUNT) <= last && is_new(words[COUNT]) {
                // SAFETY: as above; the array is zeroed, and lanes only add to it.
                unsafe { cta.expert_rows(shared + expert).red_add_relaxed_cta(words[COUNT] as u32) };
            }
            expert += step;
            expert -= if expert < routed { 0 } else { routed };
        });
        first = at(COUNTS_AT_ONCE);
    }
    // Lanes wait apart from each other. Their loads are relaxed, so as to be under way together: the fence makes them acquire what the sources
    // wrote before their counts, for this warp and those that it tells.
    bar_warp_sync();
    launch.fence();
    if ballot(launched != expected) != 0 {
        if is_new(launched) && launched != expected {
            launch.give_up(Timeout { stage: Stage::Layer, rank: source, subject: launched as u32 });
        }
        bar_warp_sync();
        let mut expert = shared + lane;
        while expert < shape.local_experts() {
            // SAFETY: as above; all lanes have added what they had.
            unsafe { cta.expert_rows(expert).store_u32(0) };
            expert += WARP;
        }
    }
}

/// Marks the local experts that have rows; returns the rows of the one that has the most.
#[inline(always)]
fn look_at_rows(launch: &Launch, cta: Cta, lane: u32) -> u32 {
    let experts = launch.params().shape.local_experts();
    let mut most = 0;
    for word in 0..experts.div_ceil(WARP) {
        let expert = word * WARP + lane;
        // SAFETY: this warp wrote the counts.
        let rows = if expert < experts { unsafe { cta.expert_rows(expert).load_u32() } } else { 0 };
        most = most.max(rows);
        let hit = ballot(rows > 0);
        if lane == 0 {
            // SAFETY: there is a word for all local experts, and this thread alone writes them.
            unsafe { cta.hit_experts(word).store_u32(hit) };
        }
    }
    redux_max(most)
}

/// The next ticket of the tasks.
#[inline(always)]
fn claim_task(launch: &Launch) -> u32 {
    // SAFETY: a counter of this launch.
    unsafe { atom_inc_relaxed_gpu(launch.counter(launch.params().workspace.counter.task_ticket, 0)) }
}

/// Puts the tasks behind `last`, the one that was handed out before the counts were there, into the slots of the cluster's CTAs, one after the other, until they end. If there
/// was none, `ticket` is still to be handed out.
#[inline(always)]
fn hand_out_tasks(
    launch: &Launch,
    cta: Cta,
    mut writer: TaskWriter,
    shape: ScheduleShape,
    mut ticket: u32,
    mut last: Option<Task>,
) {
    // SAFETY: this warp wrote them.
    let rows = unsafe { CountedRows::new(cta, launch.params().shape.local_experts()) };
    let mut cursor = TaskCursor::new(shape, &rows);
    let widest = FORMAT.tiles.index(shape.most_rows);
    let is_cut_alike = |early: Task| FORMAT.pipeline_width(early.widest) == FORMAT.pipeline_width(widest);
    let mut old_stages = last.map_or(0, |early| if is_cut_alike(early) { 0 } else { stages(early.widest) });
    loop {
        if let Some(last) = last {
            mark!(launch, ClaimTask);
            writer.wait(&last);
            ticket = claim_task(launch);
        }
        let task = Task { old_stages, ..cursor.seek(ticket, &rows) };
        old_stages = 0;
        mark!(launch, HandOut, &task);
        writer.put(task);
        if task.phase == Phase::End as u32 {
            return;
        }
        last = Some(task);
    }
}
