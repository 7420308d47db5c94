//! A decode loop as a serving engine has it: every step has other tokens on every rank, and one launch a rank does the layer.
//! On GPUs the launches are captured once and replayed as CUDA graphs: the number of tokens is read from device memory, so
//! the graph stays the same. The simulator has no graphs, and each step queues its launches.
//!
//! ```sh
//! cargo run --release --example serving_layer -- --ranks 2 --steps 8
//! ```
//!
//! With `--rank` each rank is a process of its own; start one for every rank:
//!
//! ```sh
//! for rank in 0 1; do serving_layer --device cuda --ranks 2 --rank $rank --meet tcp:127.0.0.1:29500 & done; wait
//! ```

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use ferromoe::cuda::CapturedGraph;
use ferromoe::{
    Device, DeviceBuffer, DeviceGroup, Error, ExpertFormat, ExpertWeights, FusedMoe, MoeConfig, RankInputs,
    RendezvousAddress, ScaleKind, SimOptions, Stream, Workspace, WorkspaceSizes,
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
    /// The rank of this process, if every rank is one
    #[arg(long, requires = "meet")]
    rank: Option<usize>,
    /// Where processes meet: unix:PATH or tcp:127.0.0.1:PORT
    #[arg(long, requires = "rank")]
    meet: Option<RendezvousAddress>,
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

/// What the engine has for one rank.
struct EngineRank {
    rank: usize,
    /// Where the hidden states are: the workspace's memory, for processes can read no other rank's but that.
    hidden_states: u64,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    output: DeviceBuffer,
    /// A graph is launched with any number of tokens.
    most_tokens: u32,
    stream: Stream,
    graph: Option<CapturedGraph>,
    random: StdRng,
}

impl EngineRank {
    fn new(group: &DeviceGroup, moe: &FusedMoe, rank: usize) -> ferromoe::Result<Self> {
        let config = moe.config();
        let states = (config.max_tokens_per_rank * config.hidden * size_of::<bf16>()) as u64;
        let choices = (config.max_tokens_per_rank * config.top_k * size_of::<f32>()) as u64;
        Ok(Self {
            rank,
            hidden_states: moe.workspace().hidden_states(rank)?.address(),
            topk_idx: group.alloc(rank, choices, "expert ids")?,
            topk_weights: group.alloc(rank, choices, "routing weights")?,
            tokens: group.alloc(rank, 4, "token count")?,
            output: group.alloc(rank, states, "output")?,
            most_tokens: config.max_tokens_per_rank as u32,
            stream: group.stream(rank)?,
            graph: None,
            random: StdRng::seed_from_u64(rank as u64),
        })
    }

    /// The same addresses in every step: a graph holds them.
    fn inputs(&self) -> RankInputs {
        RankInputs {
            hidden_states: self.hidden_states,
            hidden_scales: 0,
            topk_idx: self.topk_idx.address(),
            topk_weights: self.topk_weights.address(),
            tokens: self.tokens.address(),
            output: self.output.address(),
            most_tokens: self.most_tokens,
        }
    }

    /// Records the rank's launch instead of running it.
    fn capture(&mut self, moe: &FusedMoe) -> ferromoe::Result<()> {
        let (rank, stream, inputs) = (self.rank, self.stream.raw(), self.inputs());
        // SAFETY: the stream is the rank's, and layer, memory and stream live as long as the graph is launched.
        let graph = unsafe { CapturedGraph::capture::<Error>(stream, || moe.enqueue(rank, stream, inputs)) }?;
        self.graph = Some(graph);
        Ok(())
    }

    /// Stands for the attention block and the router, which leave a step's tokens in device memory. Gives their number.
    fn prepare(&mut self, moe: &FusedMoe) -> ferromoe::Result<usize> {
        let (config, random) = (moe.config(), &mut self.random);
        let tokens = random.random_range(0..=config.max_tokens_per_rank);
        let states: Vec<_> =
            (0..tokens * config.hidden).map(|_| bf16::from_f32(random.random_range(-1.0..1.0))).collect();
        let ids: Vec<i32> = (0..tokens)
            .flat_map(|_| index::sample(random, config.experts, config.top_k).into_iter().map(|id| id as i32))
            .collect();
        let weights = vec![1.0 / config.top_k as f32; ids.len()];
        moe.workspace().hidden_states(self.rank)?.write(bytemuck::cast_slice(&states))?;
        self.topk_idx.write(bytemuck::cast_slice(&ids))?;
        self.topk_weights.write(bytemuck::cast_slice(&weights))?;
        self.tokens.write(&(tokens as u32).to_ne_bytes())?;
        Ok(tokens)
    }

    /// Starts the step's launch and returns at once.
    fn launch(&self, moe: &FusedMoe) -> ferromoe::Result<()> {
        let stream = self.stream.raw();
        match &self.graph {
            // SAFETY: the graph was captured on this stream, and all that it uses is alive.
            Some(graph) => Ok(unsafe { graph.launch(stream) }?),
            // SAFETY: the stream is the rank's, and its memory is alive until the step has ended.
            None => unsafe { moe.enqueue(self.rank, stream, self.inputs()) },
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
    let config = MoeConfig {
        hidden: 256,
        intermediate: 128,
        experts: 16,
        top_k: 4,
        max_tokens_per_rank: 16,
        swiglu_limit: None,
        shared_experts: 1,
        experts_format: ExpertFormat::Bf16,
        scales: ScaleKind::F32,
    };
    let group = open(&arguments)?;
    println!("{}", group.description());
    let workspace = Workspace::new(&group, &WorkspaceSizes::of([&config]))?;
    let moe = FusedMoe::new(&workspace, &config, &ExpertWeights::random(&config, 1))?;
    let mut ranks: Vec<_> =
        group.local_ranks().map(|rank| EngineRank::new(&group, &moe, rank)).collect::<Result<_, _>>()?;
    if !group.is_simulated() {
        ranks.iter_mut().try_for_each(|engine| engine.capture(&moe))?;
    }
    (0..arguments.steps).try_for_each(|step| decode(&moe, &mut ranks).with_context(|| format!("step {step}")))
}

fn open(arguments: &Arguments) -> ferromoe::Result<DeviceGroup> {
    /// How long processes wait for each other.
    const TIMEOUT: Duration = Duration::from_secs(60);
    let device = match arguments.device {
        DeviceArgument::Auto => Device::Auto(SimOptions::default()),
        DeviceArgument::Sim => Device::Sim(SimOptions::default()),
        DeviceArgument::Cuda => Device::Cuda,
        DeviceArgument::SharedGpu => Device::SharedGpu,
    };
    match (arguments.rank, &arguments.meet) {
        (Some(rank), Some(address)) => DeviceGroup::join(device, rank, arguments.ranks, address, TIMEOUT),
        _ => DeviceGroup::open(device, arguments.ranks),
    }
}

/// One step on the ranks of this process.
fn decode(moe: &FusedMoe, ranks: &mut [EngineRank]) -> anyhow::Result<()> {
    let tokens: Vec<_> = ranks.iter_mut().map(|engine| engine.prepare(moe)).collect::<Result<_, _>>()?;
    let started = Instant::now();
    // All ranks are launched before any is waited for: they wait for each other.
    ranks.iter().try_for_each(|engine| engine.launch(moe))?;
    ranks.iter().try_for_each(|engine| engine.stream.synchronize())?;
    let elapsed = started.elapsed();
    moe.workspace().check()?;
    for (engine, tokens) in ranks.iter().zip(tokens) {
        let (rank, output) = (engine.rank, engine.output(moe.config(), tokens)?);
        ensure!(output.iter().all(|value| value.is_finite()), "rank {rank} has a value that is no number");
        let mut hasher = DefaultHasher::new();
        bytemuck::cast_slice::<_, u16>(&output).hash(&mut hasher);
        println!("rank {rank}: {tokens} tokens, output {:016x}, {elapsed:.1?}", hasher.finish());
    }
    Ok(())
}
