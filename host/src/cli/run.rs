//! `ferromoe run`.

use std::time::{Duration, Instant};

use ferromoe::{Device, DeviceGroup, FusedMoe, RankBatch, RankOutput, Result, SimOptions, Workspace, reference};
use half::bf16;
use indicatif::ProgressBar;

use super::args::{DeviceArg, RunArgs};
use super::job::Job;
use super::output;
use super::report::{Execution, Report};

/// Runs the layer, compares the result, and writes it where it is asked for.
pub fn run(args: &RunArgs) -> Result<Report> {
    if let Some(path) = &args.output {
        output::check(path)?;
    }
    let job = Job::prepare(args)?;
    let group = DeviceGroup::open(device(args), args.ranks)?;
    let (outputs, elapsed) = forward(&job, &group)?;
    let output: Vec<bf16> = outputs.iter().flat_map(|rank| &rank.output).copied().collect();
    let (expected, compared_with) = job.expected()?;
    let error = reference::relative_l2(&output, &expected);
    if let Some(path) = &args.output {
        output::write(path, &output, job.input.tokens, job.config.hidden)?;
    }
    let execution = Execution {
        device: group.description().to_owned(),
        workspace_bytes: job.workspace_sizes().bytes(args.ranks)?,
        cost: outputs.iter().filter_map(|rank| rank.cost).collect(),
        rank_elapsed: outputs.iter().map(|rank| rank.elapsed).collect(),
        elapsed,
    };
    Ok(Report::new(&job, args.seed, execution, compared_with, error))
}

fn device(args: &RunArgs) -> Device {
    let default = SimOptions::default();
    let options = SimOptions { sms: args.sms.unwrap_or(default.sms), seed: args.seed, ..default };
    match args.device {
        DeviceArg::Auto => Device::Auto(options),
        DeviceArg::Sim => Device::Sim(options),
        DeviceArg::Cuda => Device::Cuda,
    }
}

/// One forward pass, and its wall time without the preparation of weights.
fn forward(job: &Job, group: &DeviceGroup) -> Result<(Vec<RankOutput>, Duration)> {
    let spinner = ProgressBar::new_spinner().with_message(format!("running on {}", group.description()));
    spinner.enable_steady_tick(Duration::from_millis(100));
    let workspace = Workspace::new(group, &job.workspace_sizes())?;
    let mut layer = FusedMoe::new(&workspace, &job.config, &job.layer.weights)?;
    let shares = (0..group.ranks()).map(|rank| job.share(rank));
    let batch: Vec<RankBatch> = shares
        .map(|(hidden_states, topk_idx, topk_weights)| RankBatch { hidden_states, topk_idx, topk_weights })
        .collect();
    let started = Instant::now();
    let outputs = layer.forward(&batch)?;
    let elapsed = started.elapsed();
    spinner.finish_and_clear();
    Ok((outputs, elapsed))
}
