//! The layer on its ranks: buffers, parameter blocks, launches, and what a launch reports.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use ferromoe_kernel::layout::{MAX_COMBINE_ROWS, MAX_RANKS, Shape, SymmetricLayout, WorkspaceLayout};
use ferromoe_kernel::params::{Arguments, ENTRY, Params};
use ferromoe_kernel::shared::{SHARED_BYTES, THREADS};
use ferromoe_kernel::status::{BadChoice, Fault, Status, Timeout};
use ferromoe_kernel::tile::K_BLOCK;
use half::bf16;

use crate::backend::{Backend, DeviceBuffer, RankLaunch, RankReport};
use crate::config::MoeConfig;
use crate::error::{Error, Result};
use crate::group::DeviceGroup;
use crate::maps::tensor_maps;
use crate::weights::{ExpertWeights, RankWeights};

/// How long one wait of the kernel may last, unless [`FusedMoe::set_deadline`] says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// One rank's tokens of a forward pass, in host memory.
#[derive(Clone, Copy, Debug)]
pub struct RankBatch<'a> {
    /// [T, H]
    pub hidden_states: &'a [bf16],
    /// [T, K] expert ids; -1 is "no expert".
    pub topk_idx: &'a [i32],
    /// [T, K]
    pub topk_weights: &'a [f32],
}

/// What a forward pass gave one rank.
#[derive(Clone, Debug)]
pub struct RankOutput {
    /// [T, H]
    pub output: Vec<bf16>,
    /// Time of the launch: measured on a GPU, simulated time in the simulator.
    pub elapsed: Duration,
    /// What the simulator counted; `None` on a GPU.
    pub cost: Option<ptx_sim::Cost>,
}

/// One rank's arguments of a queued launch: device addresses in memory of any owner.
///
/// The memory is the rank's own, and every rank of the group can read the hidden states.
#[derive(Clone, Copy, Debug)]
pub struct RankInputs {
    /// bf16 [T, H], 16-byte aligned.
    pub hidden_states: u64,
    /// i32 [T, K]; -1 is "no expert".
    pub topk_idx: u64,
    /// f32 [T, K].
    pub topk_weights: u64,
    /// u32: T, read when the launch runs.
    pub tokens: u64,
    /// bf16 [T, H], 16-byte aligned; written.
    pub output: u64,
}

/// One MoE layer, ready to run on the ranks of a group.
pub struct FusedMoe {
    group: DeviceGroup,
    config: MoeConfig,
    shape: Shape,
    workspace: WorkspaceLayout,
    ranks: Vec<Rank>,
}

/// One rank's memory.
struct Rank {
    params: Params,
    params_buffer: DeviceBuffer,
    workspace: DeviceBuffer,
    /// Reached through the parameter blocks of all ranks.
    _symmetric: DeviceBuffer,
    _linear1: DeviceBuffer,
    _linear2: DeviceBuffer,
    /// Where [`FusedMoe::forward`] puts its batch.
    inputs: InputBuffers,
}

/// Device copies of a rank's batch and output, for the most tokens there can be.
struct InputBuffers {
    hidden_states: DeviceBuffer,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    output: DeviceBuffer,
}

impl FusedMoe {
    /// Prepares and uploads the weights, and allocates all buffers.
    ///
    /// # Errors
    /// A configuration that the kernel cannot run, weights that do not fit it, or memory that runs out.
    pub fn new(group: &DeviceGroup, config: &MoeConfig, weights: &ExpertWeights) -> Result<Self> {
        let shape = layer_shape(config, group.ranks())?;
        let workspace = WorkspaceLayout::new(&shape);
        let backend = &group.backend;
        backend.prepare(ENTRY, SHARED_BYTES)?;
        let symmetric = SymmetricLayout::new(&shape);
        let buffers = (0..group.ranks())
            .map(|rank| zeroed(backend, rank, symmetric.bytes, "symmetric buffer"))
            .collect::<Result<Vec<_>>>()?;
        let mut bases = [0; MAX_RANKS as usize];
        for (base, buffer) in bases.iter_mut().zip(&buffers) {
            *base = buffer.address();
        }
        let ranks = buffers
            .into_iter()
            .enumerate()
            .map(|(rank, buffer)| {
                let weights = weights.prepare(config, rank, group.ranks())?;
                Rank::new(backend, config, shape, rank, bases, buffer, &weights)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { group: group.clone(), config: config.clone(), shape, workspace, ranks })
    }

    /// The layer's configuration.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Sets how long one wait of the kernel may last before the launch ends with an error. No launch may be running.
    pub fn set_deadline(&mut self, deadline: Duration) -> Result<()> {
        for rank in &mut self.ranks {
            rank.params.deadline_ns = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
            rank.upload_params(&*self.group.backend)?;
        }
        Ok(())
    }

    /// One forward pass over all ranks: copies the batch to the ranks, launches, waits, and copies the outputs back.
    ///
    /// # Errors
    /// A batch that does not fit the configuration, expert ids that do not exist or are repeated, a wait that ran past the
    /// deadline. The layer can be used again after any of them.
    pub fn forward(&mut self, batch: &[RankBatch<'_>]) -> Result<Vec<RankOutput>> {
        let everyone: Vec<_> = (0..self.ranks.len()).collect();
        self.forward_on(&everyone, batch)
    }

    /// As [`Self::forward`], but launches only some ranks: what those do that lose a rank.
    pub fn forward_on(&mut self, launched: &[usize], batch: &[RankBatch<'_>]) -> Result<Vec<RankOutput>> {
        self.check_batch(batch)?;
        let backend = &*self.group.backend;
        for (rank, tokens) in self.ranks.iter().zip(batch) {
            rank.upload_batch(backend, tokens)?;
        }
        let launches: Vec<_> =
            launched.iter().map(|&rank| self.rank_launch(rank, self.ranks[rank].inputs.arguments())).collect();
        let reports = backend.launch(&launches)?;
        self.check_status(Some(batch))?;
        let output = |(&rank, report): (&usize, RankReport)| {
            let mut output = vec![bf16::ZERO; batch[rank].hidden_states.len()];
            backend.read(rank, self.ranks[rank].inputs.output.address(), bytemuck::cast_slice_mut(&mut output))?;
            Ok(RankOutput { output, elapsed: report.elapsed, cost: report.cost })
        };
        launched.iter().zip(reports).map(output).collect()
    }

    /// Queues one rank's launch on a `CUstream` and returns at once: no host synchronisation, no allocation, and legal while
    /// the stream is captured. The launch ends when every rank of the group has been queued and has run. [`Self::check`] tells how it went.
    ///
    /// The simulator has no streams: `stream` is ignored, and the launches run when the last rank is queued.
    ///
    /// # Safety
    /// `stream` is a stream of the rank's GPU, and the memory that `inputs` names is as it says until the launch has ended.
    pub unsafe fn enqueue(&self, rank: usize, stream: *mut c_void, inputs: RankInputs) -> Result<()> {
        let launch = self.rank_launch(rank, inputs);
        // SAFETY: the caller's; the layer's own memory outlives its launches as the caller's does.
        unsafe { self.group.backend.enqueue(&launch, stream) }
    }

    /// What the launches since the last call reported. No launch may be running.
    ///
    /// # Errors
    /// As [`Self::forward`]; the layer can be used again.
    pub fn check(&self) -> Result<()> {
        self.check_status(None)
    }

    fn check_batch(&self, batch: &[RankBatch<'_>]) -> Result<()> {
        let (hidden, top_k) = (self.config.hidden, self.config.top_k);
        if batch.len() != self.ranks.len() {
            return Err(Error::Size {
                what: "the batch".into(),
                found: format!("the tokens of {} ranks", batch.len()),
                expected: format!("those of {}", self.ranks.len()),
            });
        }
        let tokens: Vec<_> = batch.iter().map(|rank| rank.hidden_states.len() / hidden).collect();
        self.config.check_tokens(&tokens)?;
        for (rank, (tokens, batch)) in tokens.iter().zip(batch).enumerate() {
            for (what, found, expected) in [
                ("hidden states", batch.hidden_states.len(), tokens * hidden),
                ("expert ids", batch.topk_idx.len(), tokens * top_k),
                ("routing weights", batch.topk_weights.len(), tokens * top_k),
            ] {
                if found != expected {
                    return Err(Error::Size {
                        what: format!("the batch of rank {rank}"),
                        found: format!("{found} {what}"),
                        expected: format!("{expected} for {tokens} tokens"),
                    });
                }
            }
        }
        Ok(())
    }

    fn rank_launch(&self, rank: usize, inputs: RankInputs) -> RankLaunch {
        let arguments = Arguments {
            params: self.ranks[rank].params_buffer.address(),
            hidden_states: inputs.hidden_states,
            topk_ids: inputs.topk_idx,
            topk_weights: inputs.topk_weights,
            tokens: inputs.tokens,
            output: inputs.output,
        };
        RankLaunch {
            rank,
            entry: ENTRY,
            grid: [self.group.backend.sms(rank), 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: SHARED_BYTES,
            args: bytemuck::cast_slice(&[arguments]).to_vec(),
            cooperative: false,
        }
    }

    /// Reads and clears the status words of all ranks; the batch, if it is known, gives the ids that were wrong.
    fn check_status(&self, batch: Option<&[RankBatch<'_>]>) -> Result<()> {
        let backend = &*self.group.backend;
        let mut statuses = Vec::new();
        for (rank, state) in self.ranks.iter().enumerate() {
            let address = state.workspace.address() + self.workspace.status;
            let mut status = Status::CLEAR;
            backend.read(rank, address, bytemuck::bytes_of_mut(&mut status))?;
            if status != Status::CLEAR {
                backend.write(rank, address, bytemuck::bytes_of(&Status::CLEAR))?;
            }
            statuses.push(status);
        }
        // A wait that ran out leaves counters and epochs as they were at that moment.
        let timeouts =
            statuses.iter().enumerate().filter_map(|(rank, status)| Some((rank, Timeout::unpack(status.timeout)?)));
        // A rank that drains makes others wait in vain, in later stages: the first stage is nearest to the cause.
        let timeout = timeouts.min_by_key(|(_, timeout)| timeout.stage as u8);
        if timeout.is_some() {
            self.reset()?;
        }
        for (rank, status) in statuses.iter().enumerate() {
            if let Some(choice) = BadChoice::unpack(status.bad_choice) {
                return Err(self.bad_choice(rank, choice, batch));
            }
            if status.excess_tokens != 0 {
                let max = self.config.max_tokens_per_rank;
                return Err(Error::TooManyTokens { rank, tokens: status.excess_tokens as usize, max });
            }
        }
        match timeout {
            Some((rank, Timeout { stage, rank: missing, subject })) => {
                Err(Error::Deadline { rank, stage, missing: missing as usize, subject })
            }
            None => Ok(()),
        }
    }

    fn bad_choice(&self, rank: usize, choice: BadChoice, batch: Option<&[RankBatch<'_>]>) -> Error {
        let (token, k) = (choice.token as usize, choice.k as usize);
        let expert = batch.and_then(|batch| batch[rank].topk_idx.get(token * self.config.top_k + k).copied());
        match choice.fault {
            Fault::OutOfRange => Error::ExpertId { rank, token, k, expert, experts: self.config.experts },
            Fault::Repeated => Error::RepeatedExpert { rank, token, k, expert },
        }
    }

    /// Makes the ranks agree again after a launch that did not end as it should: no counts, no tickets, one epoch.
    fn reset(&self) -> Result<()> {
        let backend = &*self.group.backend;
        let mut last = 0u32;
        for (rank, state) in self.ranks.iter().enumerate() {
            let mut epoch = 0u32;
            backend.read(rank, state.workspace.address() + self.workspace.epoch, bytemuck::bytes_of_mut(&mut epoch))?;
            last = last.max(epoch);
        }
        for (rank, state) in self.ranks.iter().enumerate() {
            let base = state.workspace.address();
            backend.write(rank, base + self.workspace.epoch, bytemuck::bytes_of(&[last, 0]))?;
            backend.fill(rank, base + self.workspace.counters, 2 * self.workspace.counter.bytes, 0)?;
        }
        Ok(())
    }

    /// The layer's sizes as the kernel sees them.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }
}

impl Rank {
    fn new(
        backend: &Arc<dyn Backend>,
        config: &MoeConfig,
        shape: Shape,
        rank: usize,
        symmetric_bases: [u64; MAX_RANKS as usize],
        symmetric: DeviceBuffer,
        weights: &RankWeights,
    ) -> Result<Self> {
        let layout = WorkspaceLayout::new(&shape);
        // Zeroed: counters start at 0, and the padding rows of the pools hold numbers from the first launch on.
        let workspace = zeroed(backend, rank, layout.bytes, "workspace")?;
        backend.write(rank, workspace.address() + layout.status, bytemuck::bytes_of(&Status::CLEAR))?;
        let linear1 = DeviceBuffer::with(backend, rank, bytemuck::cast_slice(&weights.linear1), "linear 1 weights")?;
        let linear2 = DeviceBuffer::with(backend, rank, bytemuck::cast_slice(&weights.linear2), "linear 2 weights")?;
        let params = Params {
            maps: tensor_maps(&**backend, &shape, &layout, workspace.address(), linear1.address(), linear2.address())?,
            symmetric_bases,
            workspace_base: workspace.address(),
            deadline_ns: DEFAULT_DEADLINE.as_nanos() as u64,
            symmetric: SymmetricLayout::new(&shape),
            workspace: layout,
            shape,
            rank: rank as u32,
            swiglu_limit: config.swiglu_limit.unwrap_or(f32::INFINITY),
            wave_experts: wave_experts(&shape, backend.sms(rank)),
            reserved: [0; 6],
        };
        Ok(Self {
            params,
            params_buffer: DeviceBuffer::with(backend, rank, bytemuck::bytes_of(&params), "parameter block")?,
            workspace,
            _symmetric: symmetric,
            _linear1: linear1,
            _linear2: linear2,
            inputs: InputBuffers::new(backend, rank, &shape)?,
        })
    }

    fn upload_params(&self, backend: &dyn Backend) -> Result<()> {
        backend.write(self.params.rank as usize, self.params_buffer.address(), bytemuck::bytes_of(&self.params))
    }

    fn upload_batch(&self, backend: &dyn Backend, batch: &RankBatch<'_>) -> Result<()> {
        let rank = self.params.rank as usize;
        let tokens = (batch.hidden_states.len() / self.params.shape.hidden as usize) as u32;
        let inputs = &self.inputs;
        backend.write(rank, inputs.hidden_states.address(), bytemuck::cast_slice(batch.hidden_states))?;
        backend.write(rank, inputs.topk_idx.address(), bytemuck::cast_slice(batch.topk_idx))?;
        backend.write(rank, inputs.topk_weights.address(), bytemuck::cast_slice(batch.topk_weights))?;
        backend.write(rank, inputs.tokens.address(), bytemuck::bytes_of(&tokens))?;
        // NaN everywhere: a value that the kernel does not write is never one of an earlier launch.
        backend.fill(rank, inputs.output.address(), inputs.output.bytes(), 0xff)
    }
}

impl InputBuffers {
    fn new(backend: &Arc<dyn Backend>, rank: usize, shape: &Shape) -> Result<Self> {
        let tokens = u64::from(shape.max_tokens).max(1);
        let states = tokens * u64::from(shape.hidden) * 2;
        let choices = tokens * u64::from(shape.top_k) * 4;
        Ok(Self {
            hidden_states: DeviceBuffer::new(backend, rank, states, "hidden states")?,
            topk_idx: DeviceBuffer::new(backend, rank, choices, "expert ids")?,
            topk_weights: DeviceBuffer::new(backend, rank, choices, "routing weights")?,
            tokens: DeviceBuffer::new(backend, rank, 4, "token count")?,
            output: DeviceBuffer::new(backend, rank, states, "output")?,
        })
    }

    fn arguments(&self) -> RankInputs {
        RankInputs {
            hidden_states: self.hidden_states.address(),
            topk_idx: self.topk_idx.address(),
            topk_weights: self.topk_weights.address(),
            tokens: self.tokens.address(),
            output: self.output.address(),
        }
    }
}

/// The sizes as the kernel takes them, checked.
fn layer_shape(config: &MoeConfig, ranks: usize) -> Result<Shape> {
    config.validate(ranks)?;
    let shape = Shape {
        hidden: config.hidden as u32,
        intermediate: config.intermediate as u32,
        experts: config.experts as u32,
        shared_experts: config.shared_experts as u32,
        top_k: config.top_k as u32,
        max_tokens: config.max_tokens_per_rank as u32,
        ranks: ranks as u32,
    };
    let most = MAX_COMBINE_ROWS / u64::from(shape.slots());
    if config.max_tokens_per_rank as u64 > most {
        return Err(Error::Size {
            what: "the configuration".into(),
            found: format!("a maximum of {} tokens per rank", config.max_tokens_per_rank),
            expected: format!("at most {most} with {} results per token", shape.slots()),
        });
    }
    Ok(shape)
}

fn zeroed(backend: &Arc<dyn Backend>, rank: usize, bytes: u64, name: &'static str) -> Result<DeviceBuffer> {
    let buffer = DeviceBuffer::new(backend, rank, bytes, name)?;
    backend.fill(rank, buffer.address(), bytes, 0)?;
    Ok(buffer)
}

/// Experts of one wave: enough that their linear 1, at a single token tile each, gives every SM two tasks.
fn wave_experts(shape: &Shape, sms: u32) -> u32 {
    (2 * sms).div_ceil(shape.intermediate / K_BLOCK).max(1)
}
