//! Counts in the simulator: no times, but what a launch moves and computes against what it must.

use ptx_sim::Cost;
use serde::Serialize;

use crate::bench::inputs::States;
use crate::bench::model::{PhaseWork, phases_of_ranks};
use crate::bench::verify::verify;
use crate::bench::work::RankWork;
use crate::bench::{Plan, Setting, count, draw, input_sets};
use crate::error::Result;
use crate::fused::FusedMoe;
use crate::group::DeviceGroup;

/// What one launch counted, the sums over all ranks, beside the least that its routing allows.
#[derive(Clone, Debug, Serialize)]
pub struct SimMeasurement {
    /// What was measured.
    #[serde(flatten)]
    pub setting: Setting,
    /// Operations of the tensor cores.
    pub tensor_ops: u64,
    /// 2 x 3 x H x I for every (token, expert), shared experts included.
    pub least_ops: f64,
    /// `least_ops / tensor_ops`: the rest is the padding of tiles.
    pub tile_efficiency: f64,
    /// Bytes of device memory read and written.
    pub memory_bytes: u64,
    /// The weights of hit experts once, and the tokens, in and out.
    pub least_memory_bytes: f64,
    /// `least_memory_bytes / memory_bytes`
    pub memory_efficiency: f64,
    /// Bytes between ranks.
    pub nvlink_bytes: u64,
    /// A hidden state for every (token, other rank with experts of it), and a result for every choice there.
    pub least_nvlink_bytes: f64,
    /// Bytes between SMs and L2.
    pub l2_bytes: u64,
    /// Warp instructions.
    pub instructions: u64,
    /// Waits for an mbarrier.
    pub mbarrier_waits: u64,
    /// The part of them that found their phase complete at first look.
    pub waits_met: f64,
    /// What the schedule says of dispatch, linear 1, linear 2 and combine, the sums over all ranks: its operations are those that were counted.
    pub phases: [PhaseWork; 4],
    /// Simulated time of the slowest rank, in microseconds.
    pub simulated_us: f64,
}

/// Runs every number of tokens of a plan once on a group of simulated ranks, and hands each measurement to `report`.
///
/// # Errors
/// What the layer returns, and [`crate::Error::WrongResult`] when an output is not right.
pub fn simulated(plan: &Plan, group: &DeviceGroup, mut report: impl FnMut(SimMeasurement)) -> Result<()> {
    let config = plan.config();
    config.validate(group.ranks())?;
    let weights = draw::weights(&config, 1);
    let mut layer = FusedMoe::new(group, &config, &weights)?;
    let states = States::new(config.max_tokens_per_rank, config.hidden, group.ranks());
    for &tokens in &plan.tokens {
        let sets = input_sets(group, &config, &states, tokens, plan.choice, 1)?;
        let inputs: Vec<_> = (0..group.ranks()).map(|rank| sets[0].inputs(rank)).collect();
        // SAFETY: the set's buffers are as large as its tokens need, and live longer than the launch.
        let reports = unsafe { layer.run(&inputs) }?;
        let outputs = sets[0].outputs(group)?;
        let error = verify(&config, &weights, &states, &sets[0].routings, &outputs)?;
        let (works, imbalance) = count(&config, &sets);
        let device = group.description().to_owned();
        let setting = Setting::new(plan, device, tokens, group.ranks(), &works, imbalance, error);
        let costs: Vec<Cost> = reports.into_iter().filter_map(|report| report.cost).collect();
        let phases = phases_of_ranks(layer.shape(), group, &sets[0].routings);
        report(measurement(setting, &works, &costs, phases));
    }
    Ok(())
}

fn measurement(setting: Setting, works: &[RankWork], costs: &[Cost], phases: [PhaseWork; 4]) -> SimMeasurement {
    let least = |part: fn(&RankWork) -> f64| works.iter().map(part).sum::<f64>();
    let sum = |part: fn(&Cost) -> u64| costs.iter().map(part).sum::<u64>();
    let (tensor_ops, least_ops) = (sum(|cost| cost.tensor_ops), least(|work| work.operations));
    let memory_bytes = sum(|cost| cost.hbm_read + cost.hbm_write);
    let (waits, suspensions) = (sum(|cost| cost.mbarrier_waits), sum(|cost| cost.mbarrier_suspensions));
    let least_memory_bytes = least(|work| work.memory_bytes);
    SimMeasurement {
        setting,
        tensor_ops,
        least_ops,
        tile_efficiency: least_ops / tensor_ops as f64,
        memory_bytes,
        least_memory_bytes,
        memory_efficiency: least_memory_bytes / memory_bytes as f64,
        nvlink_bytes: sum(|cost| cost.nvlink_read + cost.nvlink_write),
        least_nvlink_bytes: least(|work| work.nvlink_bytes),
        l2_bytes: sum(|cost| cost.l2_bytes),
        mbarrier_waits: waits,
        waits_met: waits.saturating_sub(suspensions) as f64 / waits.max(1) as f64,
        phases,
        instructions: sum(|cost| cost.instructions),
        simulated_us: costs.iter().map(|cost| cost.simulated_ns).max().unwrap_or(0) as f64 / 1e3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{BenchShape, Choice};

    #[test]
    fn what_was_counted_is_held_against_the_least() {
        let shape = BenchShape::find("flash").unwrap();
        let plan = Plan { shape, experts: 8, choice: Choice::Balanced, tokens: vec![1] };
        let works = [RankWork { operations: 100.0, memory_bytes: 30.0, nvlink_bytes: 5.0, hit_experts: 3.0 }; 2];
        let setting = Setting::new(&plan, "2 ranks".into(), 1, 2, &works, 1.0, 0.0);
        let cost = |simulated_ns| Cost {
            tensor_ops: 400,
            hbm_read: 50,
            hbm_write: 10,
            nvlink_write: 7,
            mbarrier_waits: 8,
            mbarrier_suspensions: 2,
            simulated_ns,
            ..Cost::default()
        };
        let found = measurement(setting, &works, &[cost(2000), cost(3000)], Default::default());
        assert_eq!((found.tile_efficiency, found.memory_efficiency), (0.25, 0.5));
        assert_eq!((found.nvlink_bytes, found.least_nvlink_bytes, found.simulated_us), (14, 10.0, 3.0));
        assert_eq!((found.mbarrier_waits, found.waits_met, found.setting.hit_experts), (16, 0.75, 3.0));
    }
}
