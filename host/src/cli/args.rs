//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
  0  the result is right: relative L2 error at most 1e-2
  1  it is not, or the run failed
  2  bad input; nothing was written
  3  --device cuda, and there is no CUDA driver"
)]
pub struct RunArgs {
    /// Checkpoint folder: config.json with model.safetensors, or several files and their index [default: the bundled example]
    ///
    /// Families: Mixtral, Qwen3-MoE, DeepSeek-V3, DeepSeek-V4.
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,

    /// Layer number [default: the one the input was recorded at, or the first layer with experts]
    #[arg(long, value_name = "N")]
    pub layer: Option<usize>,

    /// Safetensors file with the tokens [default: 64 random tokens, made from the seed]
    ///
    /// It holds `hidden_states` BF16 [T, H] and, each if you have it, `topk_idx` I64 [T, K] with `topk_weights` F32 [T, K] (the
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

    /// Seed of random tokens, and of the simulator's order of events; the result for given tokens does not depend on it
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,

    /// Where the routing comes from [default: the input file if it has one, else the checkpoint's router]
    #[arg(long, value_enum)]
    pub route: Option<RouteArg>,

    /// Write the result here: a safetensors file with `output` BF16 [T, H]
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RouteArg {
    /// As recorded in the input file
    File,
    /// By the checkpoint's router
    Compute,
}
