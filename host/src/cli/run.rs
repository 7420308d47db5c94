//! `ferromoe run`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ferromoe::{Device, DeviceGroup, Error, FusedMoe, RankOutput, SimOptions, Workspace};
use half::bf16;
use indicatif::ProgressBar;
use serde_json::Value;

use super::args::{DeviceArg, RouteArg, RunArgs};
use super::job::Job;
use super::output::{self, Target};
use super::report::{Execution, Report};
use super::verdict::Distance;

/// Runs the layer, compares the result, and writes it where it is asked for.
pub fn run(args: &RunArgs) -> Result<Report> {
    if args.device == DeviceArg::Cuda {
        refuse_options_of_the_simulator(args)?;
    }
    let target = args.output.as_deref().map(Target::find).transpose()?;
    if let Some(target) = &target {
        target.refuse_any_of(&files_read(args))?;
    }
    let job = Job::prepare(args)?;
    let group = DeviceGroup::open(device(args), args.ranks)?;
    if !group.is_simulated() {
        refuse_options_of_the_simulator(args)?;
    }
    let (outputs, elapsed) = forward(&job, &group).map_err(|error| name_row(&job, error))?;
    let output: Vec<bf16> = outputs.iter().flat_map(|rank| &rank.output).copied().collect();
    let (expected, compared_with) = job.expected()?;
    let mut verdict = job.finite.compare(&output, &expected, compared_with);
    for (other, compared_with) in job.beside()? {
        verdict.beside.push(Distance::of(&job.finite.compare(&output, &other, compared_with)));
    }
    if let Some(target) = &target {
        output::write_tensor(target, &output, job.input.tokens, job.config.hidden)?;
    }
    let execution = Execution {
        device: group.description().to_owned(),
        workspace_bytes: job.workspace_sizes().bytes(args.ranks)?,
        cost: outputs.iter().filter_map(|rank| rank.cost).collect(),
        rank_elapsed: outputs.iter().map(|rank| rank.elapsed).collect(),
        elapsed,
    };
    Ok(Report::new(&job, args.seed.unwrap_or_default(), execution, verdict))
}

/// Options that say nothing to GPUs.
fn refuse_options_of_the_simulator(args: &RunArgs) -> Result<()> {
    if args.sms.is_some() {
        bail!("--sms is the size of a simulated rank, and the ranks are GPUs; add --device sim, or leave it out");
    }
    if args.seed.is_some() && (args.input.is_some() || args.checkpoint.is_none()) {
        bail!(
            "--seed makes random tokens and the simulator's order of events, and the tokens are given and the ranks are GPUs; \
             add --device sim, or leave it out"
        );
    }
    Ok(())
}

/// Every file that the run reads, or would read if it were there.
fn files_read(args: &RunArgs) -> Vec<PathBuf> {
    const INDEX: &str = "model.safetensors.index.json";
    let shards = |folder: &Path| -> Vec<PathBuf> {
        // An index that is not there or not one is told of when it is read.
        let index = std::fs::read(folder.join(INDEX)).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        let names = index.as_ref().and_then(|index| index["weight_map"].as_object());
        names.into_iter().flatten().filter_map(|(_, name)| name.as_str()).map(|name| folder.join(name)).collect()
    };
    let mut files: Vec<PathBuf> = args.input.iter().cloned().collect();
    if let Some(folder) = &args.checkpoint {
        files.extend(["config.json", "model.safetensors", INDEX].map(|name| folder.join(name)));
        files.extend(shards(folder));
    }
    files.sort_unstable();
    files.dedup();
    files
}

/// Where the routing is the file's, a bad choice is named by the file's row as well.
fn name_row(job: &Job, error: Error) -> Error {
    match error {
        Error::ExpertId { rank, token, .. } | Error::RepeatedExpert { rank, token, .. }
            if job.route == RouteArg::File && rank < job.shares.len() =>
        {
            let row = job.shares[rank].start + token;
            Error::TensorValue {
                path: job.input_name.clone(),
                name: "topk_idx".into(),
                problem: format!("row {row}, here {error}"),
            }
        }
        other => other,
    }
}

fn device(args: &RunArgs) -> Device {
    let default = SimOptions::default();
    let options = SimOptions { sms: args.sms.unwrap_or(default.sms), seed: args.seed.unwrap_or_default(), ..default };
    match args.device {
        DeviceArg::Auto => Device::Auto(options),
        DeviceArg::Sim => Device::Sim(options),
        DeviceArg::Cuda => Device::Cuda,
    }
}

/// One forward pass, and its wall time without the preparation of weights.
fn forward(job: &Job, group: &DeviceGroup) -> ferromoe::Result<(Vec<RankOutput>, Duration)> {
    let spinner = ProgressBar::new_spinner().with_message(format!("running on {}", group.description()));
    spinner.enable_steady_tick(Duration::from_millis(100));
    let workspace = Workspace::new(group, &job.workspace_sizes())?;
    let mut layer = FusedMoe::new(&workspace, &job.config, &job.layer.weights)?;
    let batch: Vec<_> = (0..group.ranks()).map(|rank| job.share(rank)).collect();
    let started = Instant::now();
    let outputs = layer.forward(&batch)?;
    let elapsed = started.elapsed();
    spinner.finish_and_clear();
    Ok((outputs, elapsed))
}
