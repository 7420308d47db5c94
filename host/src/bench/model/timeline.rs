//! Tasks on SMs: a server for each cluster of CTAs, one for device memory, one for NVLink. Times are nanoseconds.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use ferromoe_kernel::layout::BF16_BYTES;
use ferromoe_kernel::schedule::{combine_chunks, pull_rows};
use ferromoe_kernel::task::{Phase, Task};
use ferromoe_kernel::tile::WEIGHT_TILE;
use ferromoe_kernel::trace::Activity;

use super::{Load, Machine};
use crate::trace::{CONSUMERS, CtaTrace, DISPATCH, ROLE_NAMES, Span};

/// Until linear 1 of a shared expert may begin, until all tasks are known, and from either until the first rows are there: flash, 8 tokens, by a trace on an H200.
const EARLY_NS: f64 = 2_000.0;
pub(super) const COUNTS_NS: f64 = 11_000.0;
pub(super) const FIRST_ROWS_NS: f64 = 5_000.0;
/// From a row's first byte asked for to its last stored (docs/history.md, several rows a pull ticket).
const ROW_NS: f64 = 5_700.0;
/// The epilogues of linear 1 and linear 2, a row: 2.5 and 2.3 us for 256 rows (docs/history.md).
const EPILOGUE_NS: [f64; 2] = [10.0, 9.0];
/// From a result stored to another CTA's load of it: a release, a poll and a load through L2.
const HAND_OVER_NS: f64 = 2_000.0;
/// From a load of device memory to its arrival.
const MEMORY_NS: f64 = 1_000.0;

/// One rank on the time line.
pub(super) struct RankModel {
    /// What its CTAs do.
    pub(super) ctas: Vec<CtaTrace>,
    /// When its last product is stored.
    pub(super) products_end: f64,
    /// When it ends.
    pub(super) end: f64,
    /// When each CTA has no more products.
    free: Vec<f64>,
}

/// Something that bytes go through one after the other.
struct Pipe {
    free: f64,
    bytes_per_ns: f64,
}

impl Pipe {
    /// When `bytes` that are asked for at `from` are through.
    fn pass(&mut self, from: f64, bytes: f64) -> f64 {
        self.free = self.free.max(from) + bytes / self.bytes_per_ns;
        self.free
    }
}

impl RankModel {
    /// Dispatch and both products.
    pub(super) fn new(load: &Load, machine: &Machine) -> Self {
        let mut ctas: Vec<CtaTrace> =
            (0..load.ctas).map(|cta| CtaTrace { sm: cta, roles: vec![Vec::new(); ROLE_NAMES.len()] }).collect();
        let rows_there = pull(load, machine, &mut ctas);
        let mut memory = Pipe { free: 0.0, bytes_per_ns: machine.memory_gbs };
        let mut nvlink = Pipe { free: 0.0, bytes_per_ns: machine.nvlink_gbs };
        // When each cluster, whose CTAs work on neighbouring weight tiles of the same token tile, has stored its last product.
        let mut free = vec![EARLY_NS; (load.ctas / load.cluster) as usize];
        // Times as whole nanoseconds: they are ordered.
        let mut claims: BinaryHeap<Reverse<(u64, usize)>> =
            (0..free.len()).map(|cluster| Reverse((EARLY_NS as u64, cluster))).collect();
        let ops_per_ns = machine.tflops(&load.format) * 1e3 / f64::from(machine.sms);
        let first_tiles = load.first_tiles();
        let mut columns_there: HashMap<u32, f64> = HashMap::new();
        let mut products_end: f64 = COUNTS_NS;
        for task in load.tasks() {
            let Some(Reverse((claimed, index))) = claims.pop() else { break };
            let linear1 = task.phase == Phase::Linear1 as u32;
            let claimed = (claimed as f64).max(known_at(load, task.expert));
            let operands = match linear1 {
                true => rows_there.get(task.tile as usize).copied().unwrap_or(0.0),
                false => columns_there.get(&task.tile).copied().unwrap_or(0.0) + HAND_OVER_NS,
            };
            let begins = free[index].max(claimed);
            // The first stages of weights are on their way while the task before is stored.
            let loaded = memory.pass(claimed, load.weight_bytes(&task, &first_tiles)) + MEMORY_NS;
            let starts = begins.max(operands);
            let multiplied = (starts + load.operations(&task) / ops_per_ns).max(loaded);
            let stored = multiplied + EPILOGUE_NS[task.phase as usize] * f64::from(task.rows);
            let remote = load.remote[task.expert as usize] * f64::from(task.rows * WEIGHT_TILE * load.cluster);
            let sent = if linear1 { stored } else { nvlink.pass(stored, remote * BF16_BYTES as f64).max(stored) };
            if linear1 {
                let there = columns_there.entry(task.tile).or_default();
                *there = there.max(stored);
            }
            products_end = products_end.max(sent);
            for cta in 0..load.cluster {
                let roles = &mut ctas[index * load.cluster as usize + cta as usize].roles;
                let parts = [
                    (Activity::WaitForTask, free[index], begins, None),
                    (Activity::WaitForStage, begins, starts, Some(task.of(cta, &load.format))),
                    (Activity::Multiply, starts, multiplied, Some(task.of(cta, &load.format))),
                    (Activity::Epilogue, multiplied, stored, Some(task.of(cta, &load.format))),
                ];
                consumers(load).for_each(|role| parts.into_iter().for_each(|part| push(&mut roles[role], part)));
            }
            free[index] = stored;
            // The next task is claimed with one of this one's last k-blocks, and no sooner than its tokens are there.
            let loads = load.claimed_after(&task);
            let next = starts + (multiplied - starts) * loads;
            claims.push(Reverse((next as u64, index)));
        }
        let free = free.into_iter().flat_map(|free| vec![free; load.cluster as usize]).collect();
        Self { ctas, products_end, end: products_end, free }
    }

    /// Combine, when all ranks' results are there at `results`.
    pub(super) fn combine(&mut self, load: &Load, machine: &Machine, results: f64) {
        let chunks = combine_chunks(load.tokens, load.ctas);
        let there = results + HAND_OVER_NS;
        let takes = 2.0 * MEMORY_NS + load.combine_bytes() / machine.memory_gbs;
        for (index, (cta, &free)) in self.ctas.iter_mut().zip(&self.free).enumerate() {
            if (index as u32) < chunks {
                for role in consumers(load) {
                    push(&mut cta.roles[role], (Activity::WaitForResults, free, there, None));
                    push(&mut cta.roles[role], (Activity::Combine, there, there + takes, None));
                }
            }
        }
        self.end = there + takes;
    }
}

/// The numbers of the format's consumer warpgroups.
fn consumers(load: &Load) -> impl Iterator<Item = usize> {
    CONSUMERS.into_iter().take(load.format.consumer_warpgroups as usize)
}

/// When it is known which rows an expert has.
fn known_at(load: &Load, expert: u32) -> f64 {
    if expert < load.shape.shared_experts { EARLY_NS } else { COUNTS_NS }
}

/// When the rows of each tile are in the pool.
fn pull(load: &Load, machine: &Machine, ctas: &mut [CtaTrace]) -> Vec<f64> {
    let all: u32 = load.rows.iter().sum();
    let in_flight = f64::from(load.ctas * pull_rows(all, load.ctas));
    let mut nvlink = Pipe { free: COUNTS_NS, bytes_per_ns: machine.nvlink_gbs };
    let (mut pulled, mut tiles) = (0.0, Vec::new());
    for (expert, (&rows, &crossing)) in load.rows.iter().zip(&load.crossing).enumerate() {
        let first = known_at(load, expert as u32) + FIRST_ROWS_NS;
        for tile in 0..load.format.tiles.tiles(rows) {
            let (first_row, end) = load.format.tiles.rows_of_tile(tile, rows);
            let rows = f64::from(end - first_row);
            pulled += rows;
            let in_time = first + ROW_NS * (pulled / in_flight - 1.0).max(0.0);
            tiles.push(in_time.max(nvlink.pass(COUNTS_NS, rows * crossing * load.record_bytes())));
        }
    }
    let last = tiles.last().copied().unwrap_or(COUNTS_NS);
    for cta in ctas {
        push(&mut cta.roles[DISPATCH], (Activity::Route, 0.0, COUNTS_NS, None));
        push(&mut cta.roles[DISPATCH], (Activity::Pull, COUNTS_NS, last, None));
        consumers(load).for_each(|role| push(&mut cta.roles[role], (Activity::WaitForTask, 0.0, EARLY_NS, None)));
    }
    tiles
}

/// Adds a span that is not empty.
fn push(spans: &mut Vec<Span>, (activity, start, end, task): (Activity, f64, f64, Option<Task>)) {
    let [start, end] = [start, end].map(|ns| ns.round() as u64);
    if end > start {
        spans.push(Span { activity, start, end, task, argument: 0 });
    }
}
