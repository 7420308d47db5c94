//! Many layers of one workspace, one after the other, as a model has them: on GPUs in a CUDA graph.

use std::sync::{Mutex, PoisonError};

use ptx_sim::Cost;
use serde::Serialize;

use crate::bench::gpu::{INPUT_SETS, percentile, time};
use crate::bench::inputs::{InputSet, States};
use crate::bench::verify::verify;
use crate::bench::{Plan, Setting, count, draw, input_sets};
use crate::config::MoeConfig;
use crate::cuda::{CapturedGraph, Gpu};
use crate::error::{Error, Result};
use crate::fused::FusedMoe;
use crate::group::DeviceGroup;
use crate::weights::ExpertWeights;
use crate::workspace::{Workspace, WorkspaceSizes};

/// What the layers of a model took, or in the simulator counted, the mean of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayersMeasurement {
    /// What was measured; the relative error is the largest of any layer.
    #[serde(flatten)]
    pub setting: Setting,
    /// Number of layers, each with weights of its own.
    pub layers: usize,
    /// Bytes of the workspace that they share, on each rank.
    pub workspace_bytes: u64,
    /// Times, on GPUs.
    #[serde(flatten)]
    pub times: Option<LayerTimes>,
    /// Counts, in the simulator.
    #[serde(flatten)]
    pub counts: Option<LayerCounts>,
}

/// Times of a layer on the slowest rank: those of graphs that follow each other without a pause, divided by their layers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerTimes {
    /// Number of timed graphs.
    pub graphs: usize,
    /// The median, in microseconds.
    pub us: f64,
    /// The fastest tenth is below this.
    pub us_p10: f64,
    /// The slowest tenth is above this.
    pub us_p90: f64,
}

/// What a layer counted, the sums over all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerCounts {
    /// Warp instructions.
    pub instructions: f64,
    /// Bytes read from and written to device memory.
    pub memory_bytes: f64,
    /// Bytes read and written over NVLink.
    pub nvlink_bytes: f64,
    /// Operations of tensor cores.
    pub tensor_ops: f64,
    /// Simulated time of the slowest rank, in microseconds.
    pub simulated_us: f64,
}

/// Measures `layers` layers of a plan, on the GPUs of a group as [`crate::bench::on_gpus`] takes them, or, if there are none, on simulated ranks. Each
/// number of tokens is a measurement, handed to `report` when it is there.
///
/// # Errors
/// What the layers return, and [`Error::WrongResult`] when an output is not right: nothing is reported for it.
pub fn layers(
    plan: &Plan,
    layers: usize,
    group: &DeviceGroup,
    gpus: &[Gpu],
    mut report: impl FnMut(LayersMeasurement),
) -> Result<()> {
    let model = Model::new(plan, layers, group)?;
    let states = States::new(model.config.max_tokens_per_rank, model.config.hidden, INPUT_SETS * group.ranks());
    for &tokens in &plan.tokens {
        let sets = input_sets(group, &model.config, &states, tokens, plan.choice, INPUT_SETS)?;
        let (relative_error, costs) = model.run_each(&states, &sets[0])?;
        let times = if gpus.is_empty() { None } else { Some(model.time(gpus, &sets)?) };
        let (works, imbalance) = count(&model.config, &sets);
        let device = gpus.first().map_or_else(|| group.description().to_owned(), |gpu| gpu.name.clone());
        let setting = Setting::new(plan, device, tokens, group.ranks(), &works, imbalance, relative_error);
        let workspace_bytes = model.workspace.sizes().bytes(group.ranks())?;
        let counts = LayerCounts::mean(&costs);
        report(LayersMeasurement { setting, layers, workspace_bytes, times, counts });
    }
    Ok(())
}

/// Layers of one configuration with their weights.
struct Model {
    config: MoeConfig,
    workspace: Workspace,
    layers: Vec<(FusedMoe, ExpertWeights)>,
}

impl Model {
    fn new(plan: &Plan, layers: usize, group: &DeviceGroup) -> Result<Self> {
        let config = plan.config();
        config.validate(group.ranks())?;
        let workspace = Workspace::new(group, &WorkspaceSizes::of([&config]))?;
        let make = |layer: usize| {
            // Two seeds a layer: one for each matrix.
            let weights = draw::weights(&config, 1 + 2 * layer as u64);
            Ok((FusedMoe::new(&workspace, &config, &weights)?, weights))
        };
        let layers = (0..layers).map(make).collect::<Result<_>>()?;
        Ok(Self { config, workspace, layers })
    }

    /// Launches each layer once with a set, and compares its outputs with the reference. Gives the largest error, and what each counted on each rank.
    fn run_each(&self, states: &States, set: &InputSet) -> Result<(f64, Vec<Vec<Cost>>)> {
        let group = self.workspace.group();
        let inputs: Vec<_> = (0..group.ranks()).map(|rank| set.inputs(rank)).collect();
        let (mut largest, mut costs) = (0.0f64, Vec::new());
        for (layer, weights) in &self.layers {
            // What the layer before wrote must not pass for this one's.
            set.poison(group)?;
            // SAFETY: the set's buffers are as large as its tokens need, and live longer than the launch.
            let reports = unsafe { layer.run(&inputs) }?;
            costs.push(reports.into_iter().filter_map(|report| report.cost).collect());
            largest = largest.max(verify(&self.config, weights, states, &set.routings, &set.outputs(group)?)?);
        }
        Ok((largest, costs))
    }

    /// Captures all layers, one after the other, in a graph a rank, and times that.
    fn time(&self, gpus: &[Gpu], sets: &[InputSet]) -> Result<LayerTimes> {
        let group = self.workspace.group();
        let capture = |rank: usize| {
            let stream = group.stream(rank)?;
            let enqueue = || {
                self.layers.iter().enumerate().try_for_each(|(number, (layer, _))| {
                    // SAFETY: the stream is the rank's, and the sets outlive the graph.
                    unsafe { layer.enqueue(rank, stream.raw(), sets[number % sets.len()].inputs(rank)) }
                })
            };
            // SAFETY: the stream is not being captured, and layers and sets outlive the graph.
            Ok(Mutex::new(unsafe { CapturedGraph::capture::<Error>(stream.raw(), enqueue) }?))
        };
        let graphs: Vec<_> = (0..group.ranks()).map(capture).collect::<Result<_>>()?;
        let times = time(&self.workspace, gpus, |rank, _, stream| {
            let graph = graphs[rank].lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the stream is one of the rank's GPU, and all that the graph uses is alive.
            Ok(unsafe { graph.launch(stream) }?)
        })?;
        let of_layer = |part| percentile(&times, part) / self.layers.len() as f64;
        Ok(LayerTimes { graphs: times.len(), us: of_layer(0.5), us_p10: of_layer(0.1), us_p90: of_layer(0.9) })
    }
}

impl LayerCounts {
    /// The mean over layers of what each counted on each rank; none for GPUs, which count nothing.
    fn mean(costs: &[Vec<Cost>]) -> Option<Self> {
        if costs.iter().all(Vec::is_empty) {
            return None;
        }
        let mean = |part: fn(&Cost) -> u64| costs.iter().flatten().map(part).sum::<u64>() as f64 / costs.len() as f64;
        let slowest = costs.iter().map(|ranks| ranks.iter().map(|cost| cost.simulated_ns).max().unwrap_or(0));
        Some(Self {
            instructions: mean(|cost| cost.instructions),
            memory_bytes: mean(|cost| cost.hbm_read + cost.hbm_write),
            nvlink_bytes: mean(|cost| cost.nvlink_read + cost.nvlink_write),
            tensor_ops: mean(|cost| cost.tensor_ops),
            simulated_us: slowest.sum::<u64>() as f64 / 1e3 / costs.len() as f64,
        })
    }
}
