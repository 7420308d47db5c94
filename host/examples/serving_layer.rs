//! A decode loop as a serving engine has it: the engine owns memory and streams, every step has other tokens on every rank,
//! and one launch a rank does the layer. On GPUs the launches are captured once and replayed as CUDA graphs: the number of
//! tokens is read from device memory, so the graph stays the same. The simulator has no graphs, and each step queues
//! its launches.
//!
//! ```sh
//! cargo run --release --example serving_layer -- --ranks 2 --steps 8
//! ```

use std::time::Instant;

use anyhow::ensure;
use clap::{Parser, ValueEnum};
use ferromoe::cuda::CapturedGraph;
use ferromoe::{
    Device, DeviceBuffer, DeviceGroup, Error, ExpertWeights, FusedMoe, MoeConfig, RankInputs, SimOptions, Stream,
};
use half::bf16;
use rand::rngs::StdRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};

/// A decode loop over one MoE layer with random weights.
#[derive(Parser)]
struct Arguments {
    /// Number of ranks; they divide 16
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Decode steps
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// What to run on
    #[arg(long, value_enum, default_value_t = DeviceArgument::Auto)]
    device: DeviceArgument,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceArgument {
    /// GPUs if there are enough, else the simulator
    Auto,
    /// The simulator
    Sim,
    /// A GPU for each rank
    Cuda,
    /// One GPU for all ranks
    SharedGpu,
}

/// What the engine owns for one rank.
struct EngineRank {
    hidden_states: DeviceBuffer,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    output: DeviceBuffer,
    stream: Stream,
    graph: Option<CapturedGraph>,
}

impl EngineRank {
    fn new(group: &DeviceGroup, config: &MoeConfig, rank: usize) -> ferromoe::Result<Self> {
        let states = (config.max_tokens_per_rank * config.hidden * size_of::<bf16>()) as u64;
        let choices = (config.max_tokens_per_rank * config.top_k * size_of::<f32>()) as u64;
        Ok(Self {
            hidden_states: group.alloc(rank, states, "hidden states")?,
            topk_idx: group.alloc(rank, choices, "expert ids")?,
            topk_weights: group.alloc(rank, choices, "routing weights")?,
            tokens: group.alloc(rank, 4, "token count")?,
            output: group.alloc(rank, states, "output")?,
            stream: group.stream(rank)?,
            graph: None,
        })
    }

    /// The same addresses in every step: a graph holds them.
    fn inputs(&self) -> RankInputs {
        RankInputs {
            hidden_states: self.hidden_states.address(),
            topk_idx: self.topk_idx.address(),
            topk_weights: self.topk_weights.address(),
            tokens: self.tokens.address(),
            output: self.output.address(),
        }
    }

    /// Records the rank's launch instead of running it.
    fn capture(&mut self, moe: &FusedMoe, rank: usize) -> ferromoe::Result<()> {
        let (stream, inputs) = (self.stream.raw(), self.inputs());
        // SAFETY: the stream is the rank's, and layer, memory and stream live as long as the graph is launched.
        let graph = unsafe { CapturedGraph::capture::<Error>(stream, || moe.enqueue(rank, stream, inputs)) }?;
        self.graph = Some(graph);
        Ok(())
    }

    /// Stands for the attention block and the router, which leave this step's tokens in device memory.
    fn prepare(&self, config: &MoeConfig, tokens: usize, random: &mut StdRng) -> ferromoe::Result<()> {
        let states: Vec<_> =
            (0..tokens * config.hidden).map(|_| bf16::from_f32(random.random_range(-1.0..1.0))).collect();
        let ids: Vec<i32> = (0..tokens)
            .flat_map(|_| index::sample(random, config.experts, config.top_k).into_iter().map(|id| id as i32))
            .collect();
        let weights = vec![1.0 / config.top_k as f32; ids.len()];
        self.hidden_states.write(bytemuck::cast_slice(&states))?;
        self.topk_idx.write(bytemuck::cast_slice(&ids))?;
        self.topk_weights.write(bytemuck::cast_slice(&weights))?;
        self.tokens.write(&(tokens as u32).to_ne_bytes())
    }

    /// Starts the step's launch and returns at once.
    fn launch(&self, moe: &FusedMoe, rank: usize) -> ferromoe::Result<()> {
        let stream = self.stream.raw();
        match &self.graph {
            // SAFETY: the graph was captured on this stream, and all that it uses is alive.
            Some(graph) => Ok(unsafe { graph.launch(stream) }?),
            // SAFETY: the stream is the rank's, and its memory is alive until the step has ended.
            None => unsafe { moe.enqueue(rank, stream, self.inputs()) },
        }
    }

    fn output(&self, config: &MoeConfig, tokens: usize) -> ferromoe::Result<Vec<bf16>> {
        let mut output = vec![bf16::ZERO; tokens * config.hidden];
        self.output.read(bytemuck::cast_slice_mut(&mut output))?;
        Ok(output)
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let device = match arguments.device {
        DeviceArgument::Auto => Device::Auto(SimOptions::default()),
        DeviceArgument::Sim => Device::Sim(SimOptions::default()),
        DeviceArgument::Cuda => Device::Cuda,
        DeviceArgument::SharedGpu => Device::SharedGpu,
    };
    let config = MoeConfig {
        hidden: 256,
        intermediate: 128,
        experts: 16,
        top_k: 4,
        max_tokens_per_rank: 16,
        swiglu_limit: None,
        shared_experts: 1,
    };
    let group = DeviceGroup::open(device, arguments.ranks)?;
    println!("{}", group.description());
    let moe = FusedMoe::new(&group, &config, &ExpertWeights::random(&config, 1))?;
    let mut ranks: Vec<_> =
        (0..group.ranks()).map(|rank| EngineRank::new(&group, &config, rank)).collect::<Result<_, _>>()?;
    if !group.is_simulated() {
        ranks.iter_mut().enumerate().try_for_each(|(rank, engine)| engine.capture(&moe, rank))?;
    }

    let mut random = StdRng::seed_from_u64(1);
    for step in 0..arguments.steps {
        let tokens: Vec<_> = ranks.iter().map(|_| random.random_range(0..=config.max_tokens_per_rank)).collect();
        for (engine, &tokens) in ranks.iter().zip(&tokens) {
            engine.prepare(&config, tokens, &mut random)?;
        }
        let started = Instant::now();
        // All ranks are launched before any is waited for: they wait for each other.
        ranks.iter().enumerate().try_for_each(|(rank, engine)| engine.launch(&moe, rank))?;
        ranks.iter().try_for_each(|engine| engine.stream.synchronize())?;
        let elapsed = started.elapsed();
        moe.check()?;
        for (rank, (engine, &tokens)) in ranks.iter().zip(&tokens).enumerate() {
            let output = engine.output(&config, tokens)?;
            ensure!(
                output.iter().all(|value| value.is_finite()),
                "step {step}: rank {rank} has a value that is no number"
            );
        }
        println!("step {step}: tokens {tokens:?}, {elapsed:.1?}");
    }
    Ok(())
}
