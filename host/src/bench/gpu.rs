//! Times on GPUs.

use std::collections::hash_map::DefaultHasher;
use std::ffi::c_void;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use half::bf16;
use serde::Serialize;

use crate::bench::inputs::{InputSet, States};
use crate::bench::verify::verify;
use crate::bench::work::RankWork;
use crate::bench::{Plan, Setting, count, draw, input_sets};
use crate::config::ExpertFormat;
use crate::cuda::{Gpu, Limits, time_rounds};
use crate::error::{Error, Result};
use crate::fused::FusedMoe;
use crate::group::DeviceGroup;
use crate::weights::ExpertWeights;
use crate::workspace::{Workspace, WorkspaceSizes};

/// Input sets that launches take turns with, each with hidden states, routing and outputs of its own.
pub(super) const INPUT_SETS: usize = 4;
/// Launches that tell about how long one takes.
const PROBES: usize = 4;
/// Time for which launches run before those that count: the clocks of an idle GPU are low.
pub(super) const WARM_UP: Duration = Duration::from_millis(200);
/// Time that the launches that count take.
const MEASURED: Duration = Duration::from_millis(500);
/// Bounds of their number.
pub(super) const LAUNCHES: (usize, usize) = (20, 1000);

/// What one shape took with one number of tokens.
#[derive(Clone, Debug, Serialize)]
pub struct GpuMeasurement {
    /// What was measured.
    #[serde(flatten)]
    pub setting: Setting,
    /// Number of timed launches.
    pub launches: usize,
    /// Median time from the end of one launch to the end of the next on the slowest rank, in microseconds: launches are
    /// queued without a wait in between, so this holds all that a layer costs a busy GPU.
    pub us: f64,
    /// The fastest tenth is below this.
    pub us_p10: f64,
    /// The slowest tenth is above this.
    pub us_p90: f64,
    /// 2 x 3 x H x I operations for every (token, expert), shared experts included; the mean over GPUs, 1e12 a second.
    pub tflops: f64,
    /// Device-memory traffic if every hit expert's weights and every token are moved once; the mean over GPUs, 1e9 bytes a
    /// second.
    pub memory_gbs: f64,
    /// Bytes that come into a GPU from others: hidden states and results; the mean over GPUs, 1e9 bytes a second.
    pub nvlink_gbs: f64,
    /// The time that the busiest rank needs at least, at the measured limits, in microseconds; none without the format's product.
    pub limit_us: Option<f64>,
    /// `limit_us / us`
    pub fraction_of_limit: Option<f64>,
    /// The limits, measured in the same run.
    #[serde(flatten)]
    pub limits: Limits,
}

/// Measures a plan on the GPUs of a group, given in rank order as [`crate::cuda::find_gpus`] lists them. Each number of
/// tokens is a measurement, handed to `report` when it is there.
///
/// # Errors
/// What the layer returns, and [`Error::WrongResult`] when an output is not right: no time is reported for it.
pub fn on_gpus(
    plan: &Plan,
    group: &DeviceGroup,
    gpus: &[Gpu],
    limits: &Limits,
    mut report: impl FnMut(GpuMeasurement),
) -> Result<()> {
    if gpus.len() != group.ranks() {
        return Err(Error::Size {
            what: "the list of GPUs".into(),
            found: format!("{} GPUs", gpus.len()),
            expected: format!("one for each of the {} ranks", group.ranks()),
        });
    }
    let config = plan.config();
    config.validate(group.ranks())?;
    let weights = draw::weights(&config, 1);
    let workspace = Workspace::new(group, &WorkspaceSizes::of([&config]))?;
    let layer = FusedMoe::new(&workspace, &config, &weights)?;
    let states = States::new(config.max_tokens_per_rank, config.hidden, INPUT_SETS * group.ranks());
    for &tokens in &plan.tokens {
        let sets = input_sets(group, &config, &states, tokens, plan.choice, INPUT_SETS)?;
        let (relative_error, first) = check_once(&layer, group, &weights, &states, &sets[0])?;
        // A later launch that writes nothing must not pass for one that writes the same.
        sets[0].poison(group)?;
        let times = time(&workspace, gpus, |rank, round, stream| {
            // SAFETY: the stream is the rank's, and the sets outlive the rounds.
            unsafe { layer.enqueue(rank, stream, sets[round % sets.len()].inputs(rank)) }
        })?;
        if fingerprint(&sets[0].outputs(group)?) != first {
            return Err(Error::WrongResult("the same inputs gave another output in a later launch".into()));
        }
        let (works, imbalance) = count(&config, &sets);
        let setting =
            Setting::new(plan, gpus[0].name.clone(), tokens, group.ranks(), &works, imbalance, relative_error);
        report(measurement(setting, plan.format, &works, limits, &times));
    }
    Ok(())
}

/// Launches a set once; gives the error against the reference, and what tells whether later outputs are the same.
fn check_once(
    layer: &FusedMoe,
    group: &DeviceGroup,
    weights: &ExpertWeights,
    states: &States,
    set: &InputSet,
) -> Result<(f64, u64)> {
    let inputs: Vec<_> = (0..group.ranks()).map(|rank| set.inputs(rank)).collect();
    // SAFETY: the set's buffers are as large as its tokens need, and live longer than the launch.
    unsafe { layer.run(&inputs) }?;
    let outputs = set.outputs(group)?;
    let error = verify(layer.config(), weights, states, &set.routings, &outputs)?;
    Ok((error, fingerprint(&outputs)))
}

fn fingerprint(outputs: &[Vec<bf16>]) -> u64 {
    let mut hasher = DefaultHasher::new();
    outputs.iter().for_each(|output| bytemuck::cast_slice::<bf16, u8>(output).hash(&mut hasher));
    hasher.finish()
}

/// The times of the rounds that count, each on its slowest rank, shortest first. `enqueue` queues a rank's part of a round on a stream of it.
pub(super) fn time(
    workspace: &Workspace,
    gpus: &[Gpu],
    enqueue: impl Fn(usize, usize, *mut c_void) -> Result<()> + Sync,
) -> Result<Vec<Duration>> {
    let rounds = |count: usize| -> Result<Vec<Duration>> {
        let times = time_rounds(gpus, count + 1, &enqueue)?;
        workspace.check()?;
        // The first round holds what the ranks wait for one another to begin.
        Ok((1..=count).map(|round| times.iter().map(|rank| rank[round]).max().unwrap_or_default()).collect())
    };
    let fitting = |time: Duration, one: Duration| (time.as_secs_f64() / one.as_secs_f64().max(1e-6)) as usize;
    let probe = median(rounds(PROBES)?);
    let warm = median(rounds(fitting(WARM_UP, probe).clamp(PROBES, LAUNCHES.1))?);
    let mut times = rounds(fitting(MEASURED, warm).clamp(LAUNCHES.0, LAUNCHES.1))?;
    times.sort_unstable();
    Ok(times)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// The time below which this part of the sorted times lies, in microseconds.
pub(super) fn percentile(sorted: &[Duration], part: f64) -> f64 {
    let index = ((sorted.len() - 1) as f64 * part).round() as usize;
    sorted[index].as_secs_f64() * 1e6
}

/// Puts times and counted work together.
fn measurement(
    setting: Setting,
    format: ExpertFormat,
    works: &[RankWork],
    limits: &Limits,
    times: &[Duration],
) -> GpuMeasurement {
    let us = percentile(times, 0.5);
    let mean = |part: fn(&RankWork) -> f64| works.iter().map(part).sum::<f64>() / works.len() as f64;
    let rate = |part| mean(part) / (us / 1e6);
    let limit_us = limit_us(works, format, limits);
    GpuMeasurement {
        setting,
        launches: times.len(),
        us,
        us_p10: percentile(times, 0.1),
        us_p90: percentile(times, 0.9),
        tflops: rate(|work| work.operations) / 1e12,
        memory_gbs: rate(|work| work.memory_bytes) / 1e9,
        nvlink_gbs: rate(|work| work.nvlink_bytes) / 1e9,
        limit_us,
        fraction_of_limit: limit_us.map(|limit| limit / us),
        limits: limits.clone(),
    }
}

/// What the busiest rank takes at least: to move its bytes, or to do its operations in products of this format.
fn limit_us(works: &[RankWork], format: ExpertFormat, limits: &Limits) -> Option<f64> {
    let operations_per_us = limits.tflops(format)? * 1e6;
    let bytes_per_us = limits.copy_gbs * 1e3;
    let limit = |work: &RankWork| (work.memory_bytes / bytes_per_us).max(work.operations / operations_per_us);
    works.iter().map(limit).reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{BenchShape, Choice};

    fn limits() -> Limits {
        Limits {
            copy_gbs: 4000.0,
            peer_copy_gbs: None,
            bf16_tflops: Some(800.0),
            fp8_tflops: Some(1600.0),
            without_cublas: None,
            without_fp8: None,
        }
    }

    #[test]
    fn the_slower_of_memory_and_arithmetic_is_the_limit() {
        let memory = RankWork { memory_bytes: 4e9, operations: 8e9, ..RankWork::default() };
        let arithmetic = RankWork { memory_bytes: 4e6, operations: 1.6e12, ..RankWork::default() };
        let (bf16, fp8) = (ExpertFormat::Bf16, ExpertFormat::Fp8);
        assert_eq!(limit_us(&[memory], bf16, &limits()), Some(1000.0));
        assert_eq!(limit_us(&[memory, arithmetic], bf16, &limits()), Some(2000.0));
        assert_eq!(limit_us(&[arithmetic], fp8, &limits()), Some(1000.0));
        let only_bf16 = Limits { fp8_tflops: None, ..limits() };
        assert_eq!([bf16, fp8].map(|format| limit_us(&[memory], format, &only_bf16)), [Some(1000.0), None]);
    }

    fn found() -> GpuMeasurement {
        let (shape, format) = (BenchShape::find("flash").unwrap(), ExpertFormat::Bf16);
        let plan = Plan { shape, experts: 64, format, choice: Choice::Balanced, tokens: vec![8] };
        let setting = Setting::new(&plan, "GPU".into(), 8, 2, &[RankWork::default(); 2], 1.0, 0.0);
        let works = [1.0, 3.0].map(|share| RankWork {
            operations: share * 1e12,
            memory_bytes: share * 1e9,
            nvlink_bytes: share * 1e8,
            hit_experts: 0.0,
        });
        let times: Vec<_> = (1..=11).map(|i| Duration::from_micros(1000 * i)).collect();
        measurement(setting, format, &works, &limits(), &times)
    }

    #[test]
    fn rates_are_per_gpu_and_second() {
        let found = found();
        assert_eq!((found.us, found.us_p10, found.us_p90, found.launches), (6000.0, 2000.0, 10000.0, 11));
        let rates = [found.tflops, found.memory_gbs, found.nvlink_gbs];
        for (rate, expected) in rates.into_iter().zip([2e12 / 6e-3 / 1e12, 2.0 / 6e-3, 0.2 / 6e-3]) {
            assert!((rate / expected - 1.0).abs() < 1e-12, "{rate} {expected}");
        }
        assert_eq!(found.fraction_of_limit, Some(3000.0 / 800.0 * 1000.0 / 6000.0));
    }

    #[test]
    fn the_baseline_has_the_same_shapes_and_fields() {
        let baseline = include_str!("../../../bench/torch_baseline.py");
        let found = serde_json::to_value(found()).unwrap();
        for field in found.as_object().unwrap().keys() {
            assert!(baseline.contains(&format!("\"{field}\"")), "torch_baseline.py has no {field}");
        }
        for BenchShape { name, hidden, intermediate, experts, top_k, shared_experts, cut } in crate::bench::SHAPES {
            let cut = if cut { "True" } else { "False" };
            let line = format!("\"{name}\": ({hidden}, {intermediate}, {experts}, {top_k}, {shared_experts}, {cut}),");
            assert!(baseline.contains(&line), "torch_baseline.py lacks {line}");
        }
    }
}
