//! The benchmark: model shapes, random routings, and what a forward pass takes against what it must take.
//!
//! On GPUs it measures times, in the simulator it counts bytes and operations. `bench/torch_baseline.py` runs the same work
//! with PyTorch and prints the same fields.

pub(crate) mod draw;
mod gpu;
mod inputs;
mod layers;
mod model;
mod phases;
mod shape;
mod simulated;
mod traced;
mod verify;
mod work;

use serde::Serialize;

use crate::config::{ExpertFormat, MoeConfig};
use crate::error::Result;
use crate::group::DeviceGroup;
use inputs::{InputSet, States};
use work::RankWork;

pub use draw::Choice;
pub use gpu::{GpuMeasurement, on_gpus};
pub use layers::{LayerCounts, LayerTimes, LayersMeasurement, layers};
pub use model::{MACHINES, Machine, Modelled, PHASES, PhaseWork, modelled};
pub use phases::{Estimate, PhaseCount, RatioLimits, RoleWaits};
pub use shape::{BenchShape, SHAPES};
pub use simulated::{SimMeasurement, simulated};
pub use traced::{Traced, traced};

/// What to measure: one shape on one group.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The layer.
    pub shape: BenchShape,
    /// Routed experts of all ranks.
    pub experts: usize,
    /// The number format that they run in.
    pub format: ExpertFormat,
    /// How tokens choose experts.
    pub choice: Choice,
    /// Tokens of every rank; one measurement each.
    pub tokens: Vec<usize>,
}

impl Plan {
    fn config(&self) -> MoeConfig {
        let most = self.tokens.iter().copied().max().unwrap_or(1).max(1);
        MoeConfig { experts_format: self.format, ..self.shape.config(self.experts, most) }
    }
}

/// What was measured: the fields that all measurements begin with.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// "ferromoe"; the baseline says "torch".
    pub implementation: &'static str,
    /// What it ran on.
    pub device: String,
    /// The shape's name.
    pub shape: &'static str,
    /// The number format of the experts.
    pub format: &'static str,
    /// H
    pub hidden: usize,
    /// I
    pub intermediate: usize,
    /// Routed experts of all ranks.
    pub experts: usize,
    /// K
    pub top_k: usize,
    /// Experts that every token goes to.
    pub shared_experts: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// How tokens choose experts.
    pub routing: Choice,
    /// Tokens of every rank.
    pub tokens: usize,
    /// Experts of a rank that tokens go to, shared ones included: the mean over ranks and input sets.
    pub hit_experts: f64,
    /// Tokens of the busiest routed expert, as a multiple of the mean over experts.
    pub imbalance: f64,
    /// Relative L2 error of some tokens' outputs against the f64 reference, in FP8 the one that quantises as the kernel does.
    pub relative_error: f64,
}

impl Setting {
    fn new(
        plan: &Plan,
        device: String,
        tokens: usize,
        ranks: usize,
        works: &[RankWork],
        imbalance: f64,
        relative_error: f64,
    ) -> Self {
        Self {
            implementation: "ferromoe",
            device,
            shape: plan.shape.name,
            format: plan.format.name(),
            hidden: plan.shape.hidden,
            intermediate: plan.shape.intermediate,
            experts: plan.experts,
            top_k: plan.shape.top_k,
            shared_experts: plan.shape.shared_experts,
            ranks,
            routing: plan.choice,
            tokens,
            hit_experts: works.iter().map(|work| work.hit_experts).sum::<f64>() / works.len() as f64,
            imbalance,
            relative_error,
        }
    }
}

/// Each rank's work and the imbalance, the mean over the sets.
fn count(config: &MoeConfig, sets: &[InputSet]) -> (Vec<RankWork>, f64) {
    let works: Vec<_> = sets.iter().map(|set| work::of_ranks(config, &set.routings)).collect();
    let imbalances = sets.iter().map(|set| work::imbalance(config, &set.routings));
    (work::mean(&works), imbalances.sum::<f64>() / sets.len() as f64)
}

/// The sets of inputs of one measurement.
fn input_sets(
    group: &DeviceGroup,
    config: &MoeConfig,
    states: &States,
    tokens: usize,
    choice: Choice,
    count: usize,
) -> Result<Vec<InputSet>> {
    (0..count).map(|set| InputSet::new(group, config, states, tokens, choice, set)).collect()
}
