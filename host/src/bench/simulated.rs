//! Counts in the simulator: no times, but what a launch moves and computes against what it must.

use ptx_sim::Cost;
use serde::Serialize;

use crate::bench::inputs::States;
use crate::bench::phases::{self, Estimate, PhaseCount, RatioLimits, RoleWaits};
use crate::bench::verify::verify;
use crate::bench::{Plan, Setting, count, draw, input_sets};
use crate::error::Result;
use crate::fused::{FusedMoe, PARTS, clusters_pay};
use crate::group::DeviceGroup;
use crate::workspace::{Workspace, WorkspaceSizes};

/// What one launch counted, the sums over all ranks, beside the least that its routing allows.
#[derive(Clone, Debug, Serialize)]
pub struct SimMeasurement {
    /// What was measured.
    #[serde(flatten)]
    pub setting: Setting,
    /// All of the launch.
    #[serde(flatten)]
    pub all: PhaseCount,
    /// Its phases.
    pub phases: [PhaseCount; PARTS.len()],
    /// What `all` is to be held against.
    pub limits: RatioLimits,
    /// The bytes of device memory that must be moved whatever lies between: the weights of hit experts, the tokens, in and out.
    pub compulsory_bytes: f64,
    /// Bytes between SMs and L2.
    pub l2_bytes: u64,
    /// Warp instructions.
    pub instructions: u64,
    /// Waits for mbarriers, by role.
    pub waits: Vec<RoleWaits>,
    /// Fewest, quartiles and most of the tokens that routed experts get.
    pub tokens_per_expert: [usize; 5],
    /// What the launch should take on GPUs.
    pub estimates: Vec<Estimate>,
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
    let workspace = Workspace::new(group, &WorkspaceSizes::of([&config]))?;
    let layer = FusedMoe::new(&workspace, &config, &weights)?;
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
        let traffic = inputs.iter().enumerate().map(|(rank, inputs)| layer.traffic(rank, inputs, tokens));
        let traffic: Vec<_> = traffic.filter_map(Result::transpose).collect::<Result<_>>()?;
        let routings = &sets[0].routings;
        let phases = phases::counted(&costs, &traffic, &phases::least(&config, routings));
        report(SimMeasurement {
            setting,
            all: PhaseCount::all(&phases),
            phases,
            limits: RatioLimits::new(clusters_pay(layer.shape(), tokens as u32)),
            compulsory_bytes: works.iter().map(|work| work.memory_bytes).sum(),
            l2_bytes: costs.iter().map(|cost| cost.l2_bytes).sum(),
            instructions: costs.iter().map(|cost| cost.instructions).sum(),
            waits: phases::waits(plan.format.kernel(), &costs),
            tokens_per_expert: phases::tokens_per_expert(&config, routings),
            estimates: phases::estimates(plan.format.kernel(), &costs, &traffic),
            simulated_us: costs.iter().map(|cost| cost.simulated_ns).max().unwrap_or(0) as f64 / 1e3,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{BenchShape, Choice};
    use crate::config::ExpertFormat;
    use crate::fused::Part;
    use crate::group::{Device, SimOptions};

    /// A layer of eight routed experts and a shared one on two ranks, one choice a token.
    fn measure(format: ExpertFormat, [hidden, intermediate]: [usize; 2], tokens: usize) -> SimMeasurement {
        let shape =
            BenchShape { name: "small", hidden, intermediate, experts: 8, top_k: 1, shared_experts: 1, cut: false };
        let plan = Plan { shape, experts: 8, format, choice: Choice::Balanced, tokens: vec![tokens] };
        let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 2).unwrap();
        let mut found = None;
        simulated(&plan, &group, |measurement| found = Some(measurement)).unwrap();
        found.unwrap()
    }

    /// With one choice a token, it crosses NVLink at most once.
    fn measured(format: ExpertFormat, sizes: [usize; 2], tokens: usize) -> SimMeasurement {
        let found = measure(format, sizes, tokens);
        for phase in found.phases.iter().chain([&found.all]) {
            assert!(phase.nvlink_ratio().is_none_or(|ratio| (1.0..=found.limits.nvlink).contains(&ratio)), "{phase:?}");
            assert!(phase.useful().is_none_or(|part| (0.1..1.0).contains(&part)), "{phase:?}");
            assert!(phase.memory_ratio().is_none_or(|ratio| ratio >= 1.0), "{phase:?}");
        }
        assert!(found.all.memory_ratio() <= Some(found.limits.memory), "{:?}", found.all);
        let control = &found.phases[Part::Control as usize];
        assert_eq!((control.nvlink_bytes, control.tensor_ops), (0, 0), "what no phase accounts for");
        found
    }

    #[test]
    fn prefill_moves_little_more_than_it_must() {
        for format in [ExpertFormat::Bf16, ExpertFormat::Fp8] {
            let found = measured(format, [512, 256], 512);
            assert_eq!(found.limits, RatioLimits::new(true));
            for phase in &found.phases[..=Part::Combine as usize] {
                assert!(phase.memory_ratio() <= Some(found.limits.memory), "{phase:?}");
            }
        }
    }

    /// Dispatch moves next to nothing in decode, and the lines of lists and counts are more than 2% of that: its excess is held against the whole.
    #[test]
    fn decode_moves_little_more_than_it_must() {
        for format in [ExpertFormat::Bf16, ExpertFormat::Fp8] {
            let found = measured(format, [1024, 512], 8);
            assert_eq!(found.limits, RatioLimits::new(false));
            let [dispatch, phases @ .., _control] = &found.phases;
            for phase in phases {
                assert!(phase.memory_ratio() <= Some(found.limits.memory), "{phase:?}");
            }
            let excess = dispatch.memory_bytes - dispatch.least_memory_bytes;
            assert!(excess * 1000 < found.all.least_memory_bytes, "{dispatch:?}");
        }
    }
}
