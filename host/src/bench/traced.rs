//! One launch of a plan as a traced kernel recorded it.

use ferromoe_kernel::layout::Shape;
use ferromoe_kernel::schedule::{pull_rows, weight_tasks};
use ferromoe_kernel::shared::COMBINE_BYTES;
use ferromoe_kernel::tile::WEIGHT_TILE;

use crate::bench::gpu::{INPUT_SETS, LAUNCHES, WARM_UP};
use crate::bench::inputs::{InputSet, States};
use crate::bench::verify::verify;
use crate::bench::{Plan, Setting, count, draw, input_sets};
use crate::config::MoeConfig;
use crate::cuda::{Gpu, time_rounds};
use crate::error::Result;
use crate::fused::FusedMoe;
use crate::group::DeviceGroup;
use crate::router::Routing;
use crate::trace::Trace;
use crate::workspace::{Workspace, WorkspaceSizes};

/// Records of a role for a matrix product: more than any role makes.
const RECORDS_PER_TASK: u64 = 12;
/// Records of a role for a ticket of rows, or for a piece of a token to combine.
const RECORDS_PER_PIECE: u64 = 3;
/// How much more than the mean a CTA may have to do.
const UNEVEN: u64 = 4;
/// Records of a role beside those.
const OTHER_RECORDS: u64 = 512;

/// A traced launch.
#[derive(Clone, Debug)]
pub struct Traced {
    /// What ran; the relative error is that of the traced launch's outputs.
    pub setting: Setting,
    /// The launch.
    pub trace: Trace,
    /// Launches that ran before it without a pause.
    pub launches: usize,
    /// On GPUs, the median time from one launch's end to the next on the slowest rank, in microseconds.
    pub us: Option<f64>,
}

/// Runs the first number of tokens of a plan on a traced group, on GPUs until caches and clocks are as in a steady state, and reads what the last launch
/// recorded. `gpus` are those of the group in rank order, none for simulated ranks.
///
/// # Errors
/// What the layer returns, and [`crate::Error::WrongResult`] when an output is not right.
pub fn traced(plan: &Plan, group: &DeviceGroup, gpus: &[Gpu]) -> Result<Traced> {
    let config = plan.config();
    config.validate(group.ranks())?;
    let tokens = plan.tokens.first().copied().unwrap_or(1);
    let weights = draw::weights(&config, 1);
    let workspace = Workspace::new(group, &WorkspaceSizes::of([&config]))?;
    let mut layer = FusedMoe::new(&workspace, &config, &weights)?;
    let states = States::new(config.max_tokens_per_rank, config.hidden, INPUT_SETS * group.ranks());
    let sets = input_sets(group, &config, &states, tokens, plan.choice, INPUT_SETS)?;
    let capacity = sets.iter().map(|set| capacity(layer.shape(), &config, &set.routings, group)).max();
    layer.record_trace(capacity.unwrap_or(1))?;
    let run_first = |layer: &FusedMoe| {
        let inputs: Vec<_> = (0..group.ranks()).map(|rank| sets[0].inputs(rank)).collect();
        // SAFETY: the set's buffers are as large as its tokens need, and live longer than the launch.
        unsafe { layer.run(&inputs) }
    };
    run_first(&layer)?;
    sets[0].poison(group)?;
    let (launches, us) = if group.is_simulated() {
        run_first(&layer)?;
        (1, None)
    } else {
        let (launches, us) = run_in_a_row(&layer, gpus, &sets)?;
        (launches, Some(us))
    };
    let error = verify(&config, &weights, &states, &sets[0].routings, &sets[0].outputs(group)?)?;
    let (works, imbalance) = count(&config, &sets[..1]);
    let device = gpus.first().map_or_else(|| group.description().to_owned(), |gpu| gpu.name.clone());
    let setting = Setting::new(plan, device, tokens, group.ranks(), &works, imbalance, error);
    Ok(Traced { setting, trace: layer.trace()?, launches: launches - 1, us })
}

/// Launches for [`WARM_UP`] and more, the last with the first set; their number, and the median time of one in microseconds.
fn run_in_a_row(layer: &FusedMoe, gpus: &[Gpu], sets: &[InputSet]) -> Result<(usize, f64)> {
    let rounds = |count: usize| -> Result<f64> {
        let times = time_rounds(gpus, count, |rank, round, stream| {
            // SAFETY: the stream is the rank's, and the sets outlive the rounds.
            unsafe { layer.enqueue(rank, stream, sets[round % sets.len()].inputs(rank)) }
        })?;
        layer.workspace().check()?;
        let slowest = |round: usize| times.iter().map(|rank| rank[round]).max().unwrap_or_default();
        let mut all: Vec<_> = (1..count).map(slowest).collect();
        all.sort_unstable();
        Ok(all.get(all.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e6))
    };
    let probe = rounds(sets.len() + 1)?;
    let fitting = (WARM_UP.as_secs_f64() * 1e6 / probe.max(1.0)) as usize;
    let launches = fitting.clamp(LAUNCHES.0, LAUNCHES.1) / sets.len() * sets.len() + 1;
    Ok((launches, rounds(launches)?))
}

/// Records for each role of a CTA that suffice for a launch with these tokens on every rank.
fn capacity(shape: &Shape, config: &MoeConfig, routings: &[Routing], group: &DeviceGroup) -> u32 {
    let mut rows = vec![0u32; config.experts];
    for expert in routings.iter().flat_map(Routing::topk_idx).filter_map(|&id| usize::try_from(id).ok()) {
        rows[expert] += 1;
    }
    let tokens = routings.iter().map(|routing| routing.tokens() as u32).max().unwrap_or(0);
    let format = config.experts_format.kernel();
    let blocks = weight_tasks(2 * shape.intermediate, WEIGHT_TILE, format.max_cluster)
        + weight_tasks(shape.hidden, WEIGHT_TILE, format.max_cluster);
    let per_rank = |(rank, rows): (usize, &[u32])| {
        let shared = (0..shape.shared_experts).map(|_| tokens);
        let rows: Vec<u32> = rows.iter().copied().chain(shared).collect();
        let tasks: u64 = rows.iter().map(|&rows| u64::from(format.tiles.tiles(rows) * blocks)).sum();
        let all: u32 = rows.iter().sum();
        let sms = group.backend.sms(rank);
        let pulls = u64::from(all.div_ceil(pull_rows(all, sms)));
        // A consumer warp has its share of the pieces, and at least one of every chunk.
        let pieces = tokens * shape.hidden.div_ceil(COMBINE_BYTES / 2);
        let combined = u64::from(pieces / format.consumer_warps() + tokens);
        let records = RECORDS_PER_TASK * tasks + RECORDS_PER_PIECE * (combined + pulls);
        let fair = records / u64::from(sms);
        records.min(UNEVEN * fair) + OTHER_RECORDS
    };
    let most = rows.chunks(shape.routed_experts() as usize).enumerate().map(per_rank).max().unwrap_or(0);
    u32::try_from(most).unwrap_or(u32::MAX)
}
