//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ferromoe::bench::{BenchShape, Choice, MACHINES, Machine, Plan, SHAPES};
use ferromoe::cuda::{Gpu, find_gpus};
use ferromoe::{ExpertFormat, Result};

/// Fused Mixture-of-Experts layers on NVIDIA Hopper GPUs, or on a simulator of them.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Run(RunArgs),
    Bench(BenchArgs),
    Trace(TraceArgs),
}

/// Run one MoE layer of a checkpoint over several ranks, and check the result.
#[derive(Debug, Args)]
#[command(
    long_about = "\
Run one Mixture-of-Experts layer of a Hugging Face checkpoint, spread over several ranks, and check the result.

Every rank holds a share of the experts and a share of the tokens. One kernel launch per rank fetches tokens from the \
other ranks, runs its experts, and returns the results. The ranks are GPUs, or simulated ones that run the very same \
PTX on the CPU.

Without --checkpoint and --input it runs a tiny DeepSeek-V3 layer with a recorded forward pass that comes with the program.",
    after_long_help = "\
Examples:
  ferromoe run
      the bundled example on two ranks
  ferromoe run --checkpoint ~/models/Qwen3-30B-A3B --layer 4 --ranks 8
      random tokens through layer 4 of a real model
  ferromoe run --checkpoint tests/fixtures/mixtral --input tests/fixtures/mixtral/moe_io.safetensors --json
      a recorded input, the report as JSON

Exit codes:
  0  the result is right: relative L2 error at most 1e-2 over all tokens that are finite
  1  it is not, or the run failed, or its result or report could not be written
  2  bad input; nothing was written
  3  --device cuda, and there is no CUDA driver"
)]
pub struct RunArgs {
    /// Checkpoint folder: config.json with model.safetensors, or several files and their index [default: the bundled example]
    ///
    /// Families: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2 to V4, Kimi-K2, GLM-4.5 to 5, dots1, MiniMax-M2, ERNIE-4.5, Hunyuan,
    /// Phi-3.5-MoE, Granite; in bf16, or in FP8 with block scales.
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,

    /// Number format that the experts run in [default: the checkpoint's]
    ///
    /// Weights in bf16 are quantised for `fp8`, and FP8 ones multiplied out for `bf16`.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub experts: Option<ExpertsArg>,

    /// Layer number [default: the one the input was recorded at, or the first layer with experts]
    #[arg(long, value_name = "N")]
    pub layer: Option<usize>,

    /// Safetensors file, or pipe, with the tokens [default: 64 random tokens, made from the seed]
    ///
    /// It holds `hidden_states` BF16 [T, H], or F8_E4M3 with `hidden_scales` F32 [T, H / 128 rounded up], and, each if you have it, `topk_idx` I64 [T, K] with `topk_weights` F32 [T, K] (the
    /// routing; -1 is no expert), `input_ids` I64 [T] (for hash-routed layers) and `output_f32` F32 [T, H] (what to compare with).
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,

    /// Number of ranks, 1 to 8; they share experts and tokens evenly
    #[arg(long, value_name = "R", default_value_t = 2)]
    pub ranks: usize,

    /// What to run on; `auto` takes GPUs if there are enough, else the simulator
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,

    /// SMs of a simulated rank; the result does not depend on it
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub sms: Option<u32>,

    /// Seed of random tokens, and of the simulator's order of events; the result for given tokens does not depend on it [default: 0]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,

    /// Where the routing comes from [default: the input file if it has one, else the checkpoint's router]
    #[arg(long, value_enum)]
    pub route: Option<RouteArg>,

    /// Write the result here: a safetensors file with `output` BF16 [T, H]
    ///
    /// A file that is there is replaced as a whole and keeps its mode; links are followed, devices and pipes written to. What the
    /// run reads is refused.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Print the report as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    Auto,
    Sim,
    Cuda,
}

/// Where a layer is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MeasureOn {
    Auto,
    Sim,
    Cuda,
    Model,
}

impl MeasureOn {
    /// The GPUs to measure on; none for the simulator.
    ///
    /// # Errors
    /// Too few GPUs, or none, where they were asked for.
    pub fn gpus(self, ranks: usize) -> Result<Option<Vec<Gpu>>> {
        match self {
            Self::Sim | Self::Model => Ok(None),
            Self::Cuda => Ok(Some(find_gpus(ranks)?)),
            Self::Auto => Ok(find_gpus(ranks).ok()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExpertsArg {
    /// Weights, tokens and intermediate in bf16
    Bf16,
    /// In e4m3, with scales; the result is held to a reference that quantises as the kernel does
    Fp8,
}

impl From<ExpertsArg> for ExpertFormat {
    fn from(experts: ExpertsArg) -> Self {
        match experts {
            ExpertsArg::Bf16 => Self::Bf16,
            ExpertsArg::Fp8 => Self::Fp8,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RouteArg {
    /// As recorded in the input file
    File,
    /// By the checkpoint's router
    Compute,
}

/// Measure how long a layer of a model takes, against what it must take.
#[derive(Debug, Args)]
#[command(
    long_about = "\
Measure how long one Mixture-of-Experts layer takes with random weights and tokens, against what it must take.

On GPUs, launches follow each other without a wait of the host, and take turns with several sets of inputs; times are taken \
by events on the GPUs. TFLOP/s counts 2 x 3 x hidden x intermediate operations for every (token, expert), shared experts \
included; memory GB/s the weights of every hit expert once and the tokens in and out; NVLink GB/s the least that comes into a GPU. The limit \
is the larger of that memory traffic at the rate of a large copy and those operations at the rate of a dense product of the same number format by \
cuBLAS, both measured in the same run. Some tokens of every measurement are compared with a reference in f64.

In the simulator, the shapes are scaled down, and bytes and operations of every phase are counted against the least that there can be, with the \
waits of every role, and an estimate for an H200 and an H20.

The model runs nothing: from the routing and the kernel's schedule it says what each phase moves and computes, and what that should take on \
a GPU of given rates (docs/performance.md).",
    after_long_help = "\
Examples:
  ferromoe bench --shape flash
      one GPU with the experts of one rank of eight
  ferromoe bench --shape v3 --ranks 8 --tokens 128 --routing skewed --json
      the whole layer on eight GPUs
  ferromoe bench --shape glm-5 --experts fp8
      in FP8
  ferromoe bench --shape flash --device sim --ranks 2
      counted bytes and operations
  ferromoe bench --shape flash --tokens 64 --layers 8
      eight layers that share one workspace, in a CUDA graph
  ferromoe bench --shape v3 --device model
      what it should take on an H200 and on an H20

Environment:
  FERROMOE_CUBLAS  the cuBLAS library to measure with, if it is not where libraries are [libcublas.so.13, libcublas.so.12]; \
FP8 is measured with the libcublasLt.so beside it"
)]
pub struct BenchArgs {
    /// Shapes, separated by commas; with fewer than 8 ranks, flash, pro, v3, glm-5 and glm-flash have the experts of as many ranks of eight
    #[arg(long = "shape", value_name = "SHAPE", required = true, value_delimiter = ',', value_parser = shape_parser())]
    pub shapes: Vec<BenchShape>,

    /// Tokens of every rank, separated by commas [default: 1,8,64,512,2048,8192; in the simulator 1,8,64,512]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub tokens: Vec<usize>,

    /// Run so many layers with weights of their own, one after the other in a CUDA graph, and print what one takes
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub layers: Option<usize>,

    #[command(flatten)]
    pub run: MeasureArgs,

    /// Print each measurement as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// Record what every role of every CTA does when, in one launch of a layer.
#[derive(Debug, Args)]
#[command(
    long_about = "\
Record what every role of every CTA does when, in one launch of a Mixture-of-Experts layer with random weights and tokens.

A build of the kernel that records runs, and takes a little longer than the one that does not. On GPUs, launches follow each other for a \
while, so that caches and clocks are as under load, and the last is what is shown. The file opens in Perfetto (ui.perfetto.dev) or \
chrome://tracing: a process is a rank, a thread a role of a CTA. The tables say where the time went: what each role did, the sums over a \
launch, for the median CTA and for the one with the most.

In the simulator the shapes are scaled down, and times are its steps: they show the order of events, not what they take. \
The model's times are those of a GPU of given rates (docs/performance.md).",
    after_long_help = "\
Examples:
  ferromoe trace --shape v3 --tokens 8192 --output trace.json --svg trace.svg
      one GPU with the experts of one rank of eight
  ferromoe trace --shape flash --tokens 64 --ranks 2 --device sim --output trace.json
      on simulated ranks"
)]
pub struct TraceArgs {
    /// Write the trace here, as JSON for Perfetto
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,

    /// Write a picture here, as SVG: a row for every CTA, a lane for each of its roles that moves or multiplies
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,

    /// The layer; with fewer than 8 ranks, flash, pro, v3, glm-5 and glm-flash have the experts of as many ranks of eight
    #[arg(long, value_name = "SHAPE", value_parser = shape_parser())]
    pub shape: BenchShape,

    /// Tokens of every rank
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub tokens: usize,

    #[command(flatten)]
    pub run: MeasureArgs,

    /// SMs of a simulated rank
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub sms: Option<u32>,
}

/// What a layer is measured on, and how its tokens are spread.
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// Number of ranks, 1 to 8
    #[arg(long, value_name = "R", default_value_t = 1)]
    pub ranks: usize,

    /// Routed experts of a rank [default: what the shape says]
    #[arg(long, value_name = "N")]
    pub experts_per_rank: Option<usize>,

    /// Number format that the experts run in [default: bf16]
    #[arg(long, value_enum)]
    pub experts: Option<ExpertsArg>,

    /// How tokens choose experts
    #[arg(long, value_enum, default_value_t = RoutingArg::Balanced)]
    pub routing: RoutingArg,

    /// What to run on; `auto` takes GPUs if there are enough, else the simulator; `model` runs nothing
    #[arg(long, value_enum, default_value_t = MeasureOn::Auto)]
    pub device: MeasureOn,

    /// The GPU that is modelled [default: all that are known; to trace, H200]
    #[arg(long, value_name = "NAME", value_parser = machine_parser())]
    pub machine: Option<Machine>,
}

impl MeasureArgs {
    /// Refuses a machine where none is modelled.
    pub fn check_machine(&self) -> anyhow::Result<()> {
        match self.machine {
            Some(machine) if self.device != MeasureOn::Model => anyhow::bail!(
                "--machine {} is the GPU to model, and nothing is modelled; add --device model, or leave it out",
                machine.name
            ),
            _ => Ok(()),
        }
    }

    /// What to measure of one shape.
    pub fn plan(&self, shape: BenchShape, tokens: &[usize]) -> Plan {
        let experts = self
            .experts_per_rank
            .map_or_else(|| shape.experts_on(self.ranks), |experts| experts.saturating_mul(self.ranks));
        let format = self.experts.map_or(ExpertFormat::Bf16, ExpertFormat::from);
        Plan { shape, experts, format, choice: self.routing.into(), tokens: tokens.to_vec() }
    }
}

fn shape_parser() -> impl TypedValueParser<Value = BenchShape> {
    PossibleValuesParser::new(SHAPES.map(|shape| shape.name))
        .try_map(|name| BenchShape::find(&name).ok_or("no such shape"))
}

fn machine_parser() -> impl TypedValueParser<Value = Machine> {
    PossibleValuesParser::new(MACHINES.map(|machine| machine.name))
        .try_map(|name| MACHINES.into_iter().find(|machine| machine.name == name).ok_or("no such machine"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RoutingArg {
    /// Every expert alike
    Balanced,
    /// Some experts are far more popular than others (Zipf)
    Skewed,
    /// The first choice of every token is the same expert, the others are balanced
    OneExpert,
}

impl From<RoutingArg> for Choice {
    fn from(routing: RoutingArg) -> Self {
        match routing {
            RoutingArg::Balanced => Self::Balanced,
            RoutingArg::Skewed => Self::Skewed,
            RoutingArg::OneExpert => Self::OneExpert,
        }
    }
}
