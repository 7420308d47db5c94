//! The phases of a launch in the simulator: what each moved and computed by the simulator's counters, beside the least that routing and shape allow.

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::BF16_BYTES;
use ferromoe_kernel::quantise::GROUP;
use ferromoe_kernel::warps::{CONSUMER_WARP, WARP, WARPGROUP};
use ptx_sim::{Cost, Traffic, WarpWaits};
use serde::Serialize;

use crate::bench::model::{MACHINES, START_US};
use crate::bench::work;
use crate::config::MoeConfig;
use crate::fused::{PARTS, Part};
use crate::router::Routing;
use crate::trace::ROLE_NAMES;

/// The most bytes of device memory over the least, where experts have many rows (prefill) and where they have few (decode), and of NVLink.
const PREFILL_MEMORY_LIMIT: f64 = 1.05;
const DECODE_MEMORY_LIMIT: f64 = 1.02;
const NVLINK_LIMIT: f64 = 1.02;

/// Bytes of a scale.
const SCALE_BYTES: u64 = 4;

/// Ratios of counted bytes to the least that are not to be exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RatioLimits {
    /// Of device memory.
    pub memory: f64,
    /// Of NVLink.
    pub nvlink: f64,
}

impl RatioLimits {
    /// Those of prefill, or of decode.
    pub(super) fn new(prefill: bool) -> Self {
        Self { memory: if prefill { PREFILL_MEMORY_LIMIT } else { DECODE_MEMORY_LIMIT }, nvlink: NVLINK_LIMIT }
    }
}

/// What one phase moved and computed, the sums over all ranks, beside the least.
///
/// Device memory is counted as behind an ideal L2 cache: a line of 128 bytes is read once and written once, however often it is used. The least is counted by the
/// same rule: the weights of hit experts and the inputs read once, the output written once, and what a phase hands to the next (rows in expert order,
/// intermediate rows, results for tokens) written once and read once. In FP8 weights and rows come with their scales, and dispatch makes a record of every token first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PhaseCount {
    /// "dispatch", "linear 1", "linear 2", "combine", "control": what no phase needs for itself; "all".
    pub phase: &'static str,
    /// Bytes of device memory read and written.
    pub memory_bytes: u64,
    /// The least.
    pub least_memory_bytes: u64,
    /// Bytes between ranks.
    pub nvlink_bytes: u64,
    /// A token's hidden state (in FP8, its record) for every rank that has experts of it, a result for every choice on another rank.
    pub least_nvlink_bytes: u64,
    /// Operations of the tensor cores.
    pub tensor_ops: u64,
    /// Those for tokens: the rest is the padding of tiles.
    pub least_ops: u64,
}

impl PhaseCount {
    /// Memory traffic over the least; `None` where nothing need be moved.
    pub fn memory_ratio(&self) -> Option<f64> {
        ratio(self.memory_bytes, self.least_memory_bytes)
    }

    /// NVLink traffic over the least; `None` where nothing need be moved.
    pub fn nvlink_ratio(&self) -> Option<f64> {
        ratio(self.nvlink_bytes, self.least_nvlink_bytes)
    }

    /// The part of the operations that is for tokens; `None` where there are none.
    pub fn useful(&self) -> Option<f64> {
        ratio(self.least_ops, self.tensor_ops)
    }

    /// The sum of the phases.
    pub(super) fn all(phases: &[Self]) -> Self {
        let sum = |part: fn(&Self) -> u64| phases.iter().map(part).sum();
        Self {
            phase: "all",
            memory_bytes: sum(|phase| phase.memory_bytes),
            least_memory_bytes: sum(|phase| phase.least_memory_bytes),
            nvlink_bytes: sum(|phase| phase.nvlink_bytes),
            least_nvlink_bytes: sum(|phase| phase.least_nvlink_bytes),
            tensor_ops: sum(|phase| phase.tensor_ops),
            least_ops: sum(|phase| phase.least_ops),
        }
    }
}

fn ratio(part: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

/// The waits of one role for mbarriers, over all CTAs and ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RoleWaits {
    /// Its name.
    pub role: &'static str,
    /// Waits.
    pub waits: u64,
    /// Those that found their phase complete at first look.
    pub met: u64,
}

/// What a launch with this traffic should take on a GPU, in microseconds: the latency of its start, and the largest of all traffic of device memory, all of
/// NVLink in one direction, and all operations, on the rank that has most of each, at the machine's rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The machine.
    pub machine: &'static str,
    /// All of it.
    pub us: f64,
    /// From the launch to the first rows.
    pub start_us: f64,
    /// Device memory.
    pub memory_us: f64,
    /// NVLink.
    pub nvlink_us: f64,
    /// Tensor cores.
    pub tensor_us: f64,
    /// The largest of the four.
    pub bottleneck: &'static str,
}

/// What each part of a launch did: `costs` of each rank's launch, and the traffic of each rank's memory.
pub(super) fn counted(
    costs: &[Cost],
    traffic: &[[Traffic; PARTS.len()]],
    least: &[PhaseCount; PARTS.len()],
) -> [PhaseCount; PARTS.len()] {
    let mut counts = *least;
    for (part, count) in counts.iter_mut().enumerate() {
        count.phase = PARTS[part];
        for Traffic { hbm_read, hbm_write, nvlink_read, nvlink_write, tensor_ops } in
            traffic.iter().map(|rank| rank[part])
        {
            count.memory_bytes += hbm_read + hbm_write;
            count.nvlink_bytes += nvlink_read + nvlink_write;
            count.tensor_ops += tensor_ops;
        }
    }
    // What is in no phase's memory.
    let sums = PhaseCount::all(&counts);
    let rest = |of: fn(&Cost) -> u64, counted: u64| costs.iter().map(of).sum::<u64>().saturating_sub(counted);
    let control = &mut counts[Part::Control as usize];
    control.memory_bytes += rest(|cost| cost.hbm_read + cost.hbm_write, sums.memory_bytes);
    control.nvlink_bytes += rest(|cost| cost.nvlink_read + cost.nvlink_write, sums.nvlink_bytes);
    control.tensor_ops += rest(|cost| cost.tensor_ops, sums.tensor_ops);
    counts
}

/// The least, the sums over all ranks, when rank r brings the tokens of `routings[r]`: by routing and shape alone.
pub(super) fn least(config: &MoeConfig, routings: &[Routing]) -> [PhaseCount; PARTS.len()] {
    let format = config.experts_format.kernel();
    let per_rank = config.experts / routings.len();
    let (hidden, intermediate, shared) =
        (config.hidden as u64, config.intermediate as u64, config.shared_experts as u64);
    let row = BF16_BYTES * hidden;
    let mut hit = vec![false; config.experts];
    // Tokens; (token, expert)s, those on the token's own rank, and (token, rank)s and (token, expert)s on others.
    let (mut tokens, mut rows, mut own_rows, mut own_tokens, mut sent, mut returned) = (0, 0, 0, 0, 0, 0);
    let mut hit_shared = 0;
    for (from, routing) in routings.iter().enumerate() {
        let count = routing.tokens() as u64;
        tokens += count;
        hit_shared += if count > 0 { shared } else { 0 };
        rows += shared * count;
        own_rows += shared * count;
        for choices in routing.topk_idx().chunks(config.top_k) {
            let mut reached = vec![false; routings.len()];
            // In a format with scales, who quantises a token writes the shared experts' rows: no record is read for them.
            reached[from] = shared > 0 && !format.scaled;
            for expert in choices.iter().filter_map(|&id| usize::try_from(id).ok()) {
                let to = expert / per_rank;
                hit[expert] = true;
                reached[to] = true;
                rows += 1;
                *(if to == from { &mut own_rows } else { &mut returned }) += 1;
            }
            own_tokens += u64::from(reached[from]);
            sent += reached.iter().enumerate().filter(|&(to, &reached)| reached && to != from).count() as u64;
        }
    }
    let matrix = hidden * intermediate;
    let experts = hit.iter().filter(|&&hit| hit).count() as u64 + hit_shared;
    let choices = tokens * config.top_k as u64 * 8;
    let least = |least_memory_bytes, least_nvlink_bytes, least_ops| PhaseCount {
        least_memory_bytes,
        least_nvlink_bytes,
        least_ops,
        ..PhaseCount::default()
    };
    // Rows in expert order, a token as it crosses NVLink, and what it takes to make that.
    let [token_row, intermediate_row] = [hidden, intermediate].map(|columns| row_bytes(format, columns));
    let record = u64::from(format.record_bytes(config.hidden as u32));
    let quantised = if format.scaled { tokens * (row + record) } else { 0 };
    let [linear1, linear2] = [2, 1].map(|matrices| matrices * experts * matrix_bytes(format, hidden, intermediate));
    [
        least(choices + quantised + own_tokens * record + rows * token_row, sent * record, 0),
        least(linear1 + rows * (token_row + intermediate_row), 0, 4 * matrix * rows),
        least(linear2 + rows * intermediate_row + own_rows * row, returned * row, 2 * matrix * rows),
        least((rows + tokens) * row, 0, 0),
        PhaseCount::default(),
    ]
}

/// Bytes of a row in the pools: its elements, and a scale for each of their groups.
fn row_bytes(format: &Format, columns: u64) -> u64 {
    let scales = if format.scaled { SCALE_BYTES * columns.div_ceil(u64::from(GROUP)) } else { 0 };
    columns * u64::from(format.element_bytes) + scales
}

/// Bytes of a weight matrix: its elements, and a scale for each of their blocks.
fn matrix_bytes(format: &Format, hidden: u64, intermediate: u64) -> u64 {
    let blocks = [hidden, intermediate].map(|size| size.div_ceil(u64::from(GROUP))).iter().product::<u64>();
    let scales = if format.scaled { SCALE_BYTES * blocks } else { 0 };
    hidden * intermediate * u64::from(format.element_bytes) + scales
}

/// The waits of every role that a CTA of the format has.
pub(super) fn waits(format: &Format, costs: &[Cost]) -> Vec<RoleWaits> {
    let count = (CONSUMER_WARP + format.consumer_warpgroups) as usize;
    let mut roles: Vec<_> = ROLE_NAMES[..count].iter().map(|role| RoleWaits { role, waits: 0, met: 0 }).collect();
    for (warp, &WarpWaits { waits, met }) in costs.iter().flat_map(|cost| cost.warps.iter().enumerate()) {
        let helpers = CONSUMER_WARP as usize;
        let role = warp.checked_sub(helpers).map_or(warp, |warp| helpers + warp / (WARPGROUP / WARP) as usize);
        if let Some(role) = roles.get_mut(role) {
            role.waits += waits;
            role.met += met;
        }
    }
    roles
}

/// Fewest, quartiles and most of the tokens that routed experts get.
pub(super) fn tokens_per_expert(config: &MoeConfig, routings: &[Routing]) -> [usize; 5] {
    let mut loads = work::loads(config, routings);
    loads.sort_unstable();
    [0, 1, 2, 3, 4].map(|quarter| loads[(loads.len() - 1) * quarter / 4])
}

/// What it should take on every machine.
pub(super) fn estimates(format: &Format, costs: &[Cost], traffic: &[[Traffic; PARTS.len()]]) -> Vec<Estimate> {
    let most = |of: &dyn Fn(usize) -> u64| (0..costs.len()).map(of).max().unwrap_or(0) as f64;
    let others = |rank: usize, part: fn(&Traffic) -> u64| traffic[rank].iter().map(part).sum::<u64>();
    let memory = most(&|rank| costs[rank].hbm_read + costs[rank].hbm_write);
    let incoming = most(&|rank| costs[rank].nvlink_read + others(rank, |traffic| traffic.nvlink_write));
    let outgoing = most(&|rank| costs[rank].nvlink_write + others(rank, |traffic| traffic.nvlink_read));
    let operations = most(&|rank| costs[rank].tensor_ops);
    let of_machine = |machine: &crate::bench::Machine| {
        let terms = [
            ("start", START_US),
            ("memory", memory / machine.memory_gbs / 1e3),
            ("NVLink", incoming.max(outgoing) / machine.nvlink_gbs / 1e3),
            ("tensor cores", operations / machine.tflops(format) / 1e6),
        ];
        let [(_, start_us), (_, memory_us), (_, nvlink_us), (_, tensor_us)] = terms;
        let us = start_us + memory_us.max(nvlink_us).max(tensor_us);
        let bottleneck = terms.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("", |term| term.0);
        Estimate { machine: machine.name, us, start_us, memory_us, nvlink_us, tensor_us, bottleneck }
    };
    MACHINES.iter().map(of_machine).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ExpertFormat;
    use crate::testing::small_config;

    /// H = I = 64, four experts on two ranks, top-2, one shared.
    fn routings() -> [Routing; 2] {
        [&[2, 3, 0, -1][..], &[3, 2]].map(|ids| Routing::new(2, ids.to_vec(), vec![0.5; ids.len()]).unwrap())
    }

    #[test]
    fn the_least_is_counted_by_hand() {
        let least = least(&small_config(), &routings());
        // Three tokens; eight rows, three of shared experts; both tokens of rank 0 reach their own rank by the shared expert.
        let (row, matrix) = (128, 4096);
        let memory = [
            3 * 2 * 8 + (3 + 8) * row,
            5 * 4 * matrix + 8 * 2 * row,
            5 * 2 * matrix + 8 * row + 6 * row,
            (8 + 3) * row,
            0,
        ];
        assert_eq!(least.map(|phase| phase.least_memory_bytes), memory);
        assert_eq!(least.map(|phase| phase.least_nvlink_bytes), [row, 0, 2 * row, 0, 0]);
        assert_eq!(least.map(|phase| phase.least_ops), [0, 8 * 4 * matrix, 8 * 2 * matrix, 0, 0]);
        assert_eq!(tokens_per_expert(&small_config(), &routings()), [0, 0, 1, 2, 2]);
    }

    #[test]
    fn in_fp8_scales_and_records_are_counted_too() {
        let config = MoeConfig { experts_format: ExpertFormat::Fp8, ..small_config() };
        let least = least(&config, &routings());
        // As above; a row of 64 elements has one scale, and so has a matrix. A record has whole lines.
        let (bf16, row, record, matrix) = (128, 64 + 4, 128, 4096 + 4);
        let memory = [
            3 * 2 * 8 + 3 * (bf16 + record) + 3 * record + 8 * row,
            5 * 2 * matrix + 8 * 2 * row,
            5 * matrix + 8 * row + 6 * bf16,
            (8 + 3) * bf16,
            0,
        ];
        assert_eq!(least.map(|phase| phase.least_memory_bytes), memory);
        assert_eq!(least.map(|phase| phase.least_nvlink_bytes), [record, 0, 2 * bf16, 0, 0]);
        assert_eq!(least.map(|phase| phase.least_ops), [0, 8 * 4 * 4096, 8 * 2 * 4096, 0, 0]);
    }

    #[test]
    fn what_no_phase_has_moved_is_control_s() {
        let cost = Cost { hbm_read: 1000, nvlink_write: 70, tensor_ops: 9, ..Cost::default() };
        let moved = Traffic { hbm_write: 300, nvlink_read: 50, tensor_ops: 4, ..Traffic::default() };
        let mut traffic = [Traffic::default(); PARTS.len()];
        traffic[Part::Linear2 as usize] = moved;
        let counts = counted(&[cost; 2], &[traffic; 2], &least(&small_config(), &routings()));
        assert_eq!(counts.map(|phase| phase.memory_bytes), [0, 0, 600, 0, 1400]);
        assert_eq!(counts.map(|phase| phase.nvlink_bytes), [0, 0, 100, 0, 40]);
        assert_eq!(counts.map(|phase| phase.tensor_ops), [0, 0, 8, 0, 10]);
    }

    #[test]
    fn the_largest_term_is_the_bottleneck() {
        let cost = Cost { hbm_read: 427_300_000, nvlink_read: 1, tensor_ops: 68_000_000_000, ..Cost::default() };
        let mut traffic = [Traffic::default(); PARTS.len()];
        traffic[Part::Linear2 as usize].nvlink_write = 44_999_999;
        let found = estimates(&Format::BF16, &[cost, Cost::default()], &[traffic, Default::default()]);
        let [h200, h20] = [found[0], found[1]];
        assert!((h200.memory_us - 100.0).abs() < 1e-6 && (h200.us - START_US - 100.0).abs() < 1e-6, "{h200:?}");
        assert!((h200.nvlink_us - 100.0).abs() < 1e-6 && (h200.tensor_us - 100.0).abs() < 1e-6, "{h200:?}");
        assert_eq!(h20.bottleneck, "tensor cores");
    }

    #[test]
    fn warps_are_told_apart_by_role() {
        let mut cost = Cost::default();
        for (warp, waits) in cost.warps.iter_mut().enumerate().take(12) {
            *waits = WarpWaits { waits: 10 + warp as u64, met: warp as u64 };
        }
        let found: Vec<_> =
            waits(&Format::BF16, &[cost]).into_iter().map(|role| (role.role, role.waits, role.met)).collect();
        assert_eq!(found[..2], [("dispatch", 10, 0), ("producer", 11, 1)]);
        assert_eq!(found[4..], [("consumers 0", 62, 22), ("consumers 1", 78, 38)]);
    }
}
