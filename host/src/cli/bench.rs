//! `ferromoe bench`.

use std::fmt::Write as _;

use anyhow::Result;
use clap::CommandFactory;
use clap::error::ErrorKind;
use ferromoe::bench::{
    self, BenchShape, GpuMeasurement, LayerCounts, LayerTimes, LayersMeasurement, MACHINES, Modelled, PHASES, Plan,
};
use ferromoe::cuda::{Gpu, Limits};
use ferromoe::{Device, DeviceGroup, SimOptions};
use serde::Serialize;

use super::args::{BenchArgs, Cli, MeasureOn};
use super::{counts, print};

/// Tokens of a rank on a GPU, and in the simulator, which is far slower.
const GPU_TOKENS: [usize; 6] = [1, 8, 64, 512, 2048, 8192];
const SIM_TOKENS: [usize; 4] = [1, 8, 64, 512];

/// Runs the benchmark and prints each measurement when it is there.
pub fn bench(args: &BenchArgs) -> Result<()> {
    args.run.check_machine()?;
    if args.run.device == MeasureOn::Model {
        if args.layers.is_some() {
            let conflict = "the model knows a single layer: --layers cannot be used with --device model";
            Cli::command().error(ErrorKind::ArgumentConflict, conflict).exit();
        }
        return modelled(args);
    }
    let gpus = args.run.device.gpus(args.run.ranks)?;
    if let Some(count) = args.layers {
        return layers(args, count, gpus.as_deref().unwrap_or_default());
    }
    match gpus {
        Some(gpus) => on_gpus(args, &gpus),
        None => simulated(args),
    }
}

fn on_gpus(args: &BenchArgs, gpus: &[Gpu]) -> Result<()> {
    let group = DeviceGroup::open(Device::Cuda, args.run.ranks)?;
    let limits = Limits::measure(gpus)?;
    for &shape in &args.shapes {
        let plan = plan(args, shape, &GPU_TOKENS);
        if !args.json {
            print::text(&format!(
                "{}{}{GPU_HEADER}",
                heading(&plan, args.run.ranks, group.description()),
                limits_line(&limits)
            ))?;
        }
        let mut printed = Ok(());
        bench::on_gpus(&plan, &group, gpus, &limits, |found| show(args, &found, gpu_row, &mut printed))?;
        printed?;
    }
    Ok(())
}

fn simulated(args: &BenchArgs) -> Result<()> {
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), args.run.ranks)?;
    for &shape in &args.shapes {
        let plan = plan(args, shape.scaled_down(args.run.ranks), &SIM_TOKENS);
        if !args.json {
            print::text(&format!("{}{}", heading(&plan, args.run.ranks, group.description()), counts::LEGEND))?;
        }
        let mut printed = Ok(());
        bench::simulated(&plan, &group, |found| show(args, &found, counts::table, &mut printed))?;
        printed?;
    }
    Ok(())
}

fn layers(args: &BenchArgs, count: usize, gpus: &[Gpu]) -> Result<()> {
    let simulated = gpus.is_empty();
    let device = if simulated { Device::Sim(SimOptions::default()) } else { Device::Cuda };
    let group = DeviceGroup::open(device, args.run.ranks)?;
    for &shape in &args.shapes {
        let (shape, tokens) =
            if simulated { (shape.scaled_down(args.run.ranks), &SIM_TOKENS[..]) } else { (shape, &GPU_TOKENS[..]) };
        let plan = plan(args, shape, tokens);
        if !args.json {
            let header = if simulated { LAYER_COUNTS_HEADER } else { LAYER_TIMES_HEADER };
            let heading = heading(&plan, args.run.ranks, group.description());
            print::text(&format!("{heading}{count} layers with weights of their own; the mean of a layer:\n{header}"))?;
        }
        let mut printed = Ok(());
        bench::layers(&plan, count, &group, gpus, |found| show(args, &found, layers_row, &mut printed))?;
        printed?;
    }
    Ok(())
}

const LAYER_TIMES_HEADER: &str = "  tokens  us a layer      p10      p90    graphs  workspace MiB    error";
const LAYER_COUNTS_HEADER: &str =
    "  tokens  instructions     memory MB  NVLink MB    operations  simulated us  workspace MiB    error";

fn layers_row(found: &LayersMeasurement) -> String {
    let mut row = format!("{:>8}", found.setting.tokens);
    // Writing to a String cannot fail.
    if let Some(LayerTimes { graphs, us, us_p10, us_p90 }) = found.times {
        let _ = write!(row, " {us:>11.1} {us_p10:>8.1} {us_p90:>8.1} {graphs:>9}");
    } else if let Some(LayerCounts { instructions, memory_bytes, nvlink_bytes, tensor_ops, simulated_us }) =
        found.counts
    {
        let (memory, nvlink) = (memory_bytes / 1e6, nvlink_bytes / 1e6);
        let _ =
            write!(row, " {instructions:>13.0} {memory:>13.3} {nvlink:>10.3} {tensor_ops:>13.0} {simulated_us:>13.1}");
    }
    let mebibytes = found.workspace_bytes as f64 / f64::from(1 << 20);
    let _ = write!(row, " {mebibytes:>14.1} {:>8.1e}", found.setting.relative_error);
    row
}

fn modelled(args: &BenchArgs) -> Result<()> {
    let machines = args.run.machine.map_or_else(|| MACHINES.to_vec(), |machine| vec![machine]);
    for (&shape, machine) in args.shapes.iter().flat_map(|shape| machines.iter().map(move |machine| (shape, machine))) {
        let plan = plan(args, shape, &GPU_TOKENS);
        if !args.json {
            let on = format!("{} modelled {}s of {} SMs", args.run.ranks, machine.name, machine.sms);
            print::text(&format!("{}{MODEL_HEADER}", heading(&plan, args.run.ranks, &on)))?;
        }
        let mut printed = Ok(());
        for found in bench::modelled(&plan, machine, args.run.ranks)? {
            show(args, &found, model_rows, &mut printed);
        }
        printed?;
    }
    Ok(())
}

fn plan(args: &BenchArgs, shape: BenchShape, tokens: &[usize]) -> Plan {
    args.run.plan(shape, if args.tokens.is_empty() { tokens } else { &args.tokens })
}

/// Prints a measurement, unless one before it could not be.
fn show<T: Serialize>(args: &BenchArgs, found: &T, text: impl Fn(&T) -> String, printed: &mut Result<()>) {
    if printed.is_ok() {
        *printed = if args.json { print::json(found) } else { print::text(&text(found)) };
    }
}

fn heading(plan: &Plan, ranks: usize, on: &str) -> String {
    let BenchShape { name, hidden, intermediate, top_k, shared_experts, .. } = plan.shape;
    let experts = plan.experts / ranks.max(1);
    format!(
        "{name} in {}: hidden {hidden}, intermediate {intermediate}, top-{top_k}, {shared_experts} shared, {experts} experts a rank, \
         {} routing\non {}\n",
        plan.format.name(),
        plan.choice,
        on
    )
}

fn limits_line(limits: &Limits) -> String {
    let mut line = format!("limits measured: copy {:.0} GB/s", limits.copy_gbs);
    // Writing to a String cannot fail.
    if let Some(peer) = limits.peer_copy_gbs {
        let _ = write!(line, ", copy between GPUs {peer:.0} GB/s");
    }
    let products = [
        ("bf16 8192^3 by cuBLAS", limits.bf16_tflops, &limits.without_cublas),
        ("e4m3 by cuBLASLt", limits.fp8_tflops, &limits.without_fp8),
    ];
    for (what, rate, missing) in products {
        let _ = match (rate, missing) {
            (Some(rate), _) => write!(line, ", {what} {rate:.0} TFLOP/s"),
            (None, Some(reason)) => write!(line, "; {reason}"),
            (None, None) => Ok(()),
        };
    }
    line.push('\n');
    line
}

const GPU_HEADER: &str = "  \
tokens        us      p10      p90  TFLOP/s  memory GB/s  NVLink GB/s  limit us  of limit  launches  experts  busiest    error";

fn gpu_row(found: &GpuMeasurement) -> String {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let setting = &found.setting;
    format!(
        "{:>8} {:>9.1} {:>8.1} {:>8.1} {:>8.1} {:>12.0} {:>12.0} {:>9} {:>9} {:>9} {:>8.1} {:>7.1}x {:>8.1e}",
        setting.tokens,
        found.us,
        found.us_p10,
        found.us_p90,
        found.tflops,
        found.memory_gbs,
        found.nvlink_gbs,
        or_dash(found.limit_us.map(|us| format!("{us:.1}"))),
        or_dash(found.fraction_of_limit.map(|part| format!("{:.1}%", 100.0 * part))),
        found.launches,
        setting.hit_experts,
        setting.imbalance,
        setting.relative_error,
    )
}

const MODEL_HEADER: &str = "  \
tokens        us  memory us  tensor us  NVLink us  bottleneck        phase     memory MB  over least  NVLink MB  TFLOP issued  useful";

/// A row for the layer, with that of its first phase, and a row for each other phase.
fn model_rows(found: &Modelled) -> String {
    let ratio = |part: f64, of: f64| if of > 0.0 { format!("{:.2}", part / of) } else { "-".into() };
    let rows = PHASES.iter().zip(&found.phases).enumerate().map(|(index, (name, phase))| {
        let layer = match index {
            0 => format!(
                "{:>8} {:>9.1} {:>10.1} {:>10.1} {:>10.1}  {:<16}",
                found.tokens, found.us, found.memory_us, found.tensor_us, found.nvlink_us, found.bottleneck
            ),
            _ => " ".repeat(69),
        };
        format!(
            "{layer}  {name:<9} {:>9.1} {:>11} {:>10.1} {:>13.3} {:>7}",
            phase.memory_bytes / 1e6,
            ratio(phase.memory_bytes, phase.least_memory_bytes),
            phase.nvlink_bytes / 1e6,
            phase.tensor_ops / 1e12,
            ratio(phase.useful_ops, phase.tensor_ops)
        )
    });
    rows.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::Command;

    fn args(options: &str) -> Result<BenchArgs, clap::Error> {
        let words = ["ferromoe", "bench"].into_iter().chain(options.split_whitespace());
        match Cli::try_parse_from(words)?.command {
            Command::Bench(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_plan_is_what_was_asked_for() {
        let args = args("--shape flash,qwen3-30b --ranks 2 --tokens 1,64").unwrap();
        let plans: Vec<_> = args.shapes.iter().map(|&shape| plan(&args, shape, &GPU_TOKENS)).collect();
        assert_eq!(plans.iter().map(|plan| plan.experts).collect::<Vec<_>>(), [64, 128]);
        assert_eq!(plans[0].tokens, [1, 64]);
        let args = self::args("--shape pro --experts-per-rank 3 --ranks 4 --routing one-expert --experts fp8").unwrap();
        let plan = plan(&args, args.shapes[0], &GPU_TOKENS);
        assert_eq!((plan.experts, plan.choice, plan.format.name()), (12, bench::Choice::OneExpert, "fp8"));
        assert_eq!(plan.tokens, GPU_TOKENS);
    }

    #[test]
    fn limits_that_could_not_be_measured_say_why() {
        let limits = Limits {
            copy_gbs: 4247.2,
            peer_copy_gbs: None,
            bf16_tflops: Some(672.0),
            fp8_tflops: Some(1250.0),
            without_cublas: None,
            without_fp8: None,
        };
        assert_eq!(
            limits_line(&limits),
            "limits measured: copy 4247 GB/s, bf16 8192^3 by cuBLAS 672 TFLOP/s, e4m3 by cuBLASLt 1250 TFLOP/s\n"
        );
        let without_fp8 = Limits { fp8_tflops: None, without_fp8: Some("no cuBLASLt".into()), ..limits.clone() };
        assert!(limits_line(&without_fp8).ends_with("by cuBLAS 672 TFLOP/s; no cuBLASLt\n"));
        let none = Limits { bf16_tflops: None, fp8_tflops: None, without_cublas: Some("no cuBLAS".into()), ..limits };
        assert_eq!(limits_line(&none), "limits measured: copy 4247 GB/s; no cuBLAS\n");
    }

    #[test]
    fn a_shape_that_does_not_exist_is_refused_with_those_that_do() {
        let error = args("--shape flash,llama").unwrap_err().to_string();
        assert!(error.contains("llama") && error.contains("mixtral-8x7b"), "{error}");
    }
}
