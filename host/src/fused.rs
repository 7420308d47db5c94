//! The layer on its ranks: buffers, parameter blocks, launches, and what a launch reports.

mod rank;
mod record;
#[cfg(test)]
mod tests;
mod traffic;

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::{MAX_COMBINE_ROWS, MAX_RANKS, Shape, WorkspaceLayout};
use ferromoe_kernel::params::Arguments;
use ferromoe_kernel::shared::{SHARED_LIMIT, SharedLayout};
use ferromoe_kernel::status::{BadChoice, Fault, Status, Timeout};
use half::bf16;

use crate::backend::{Backend, RankLaunch, RankReport};
use crate::config::MoeConfig;
use crate::error::{Error, Result};
use crate::group::DeviceGroup;
use crate::memory::DeviceBuffer;
use crate::rendezvous::RendezvousError;
use crate::weights::{ExpertWeights, LaidOutWeights};

use rank::{Rank, symmetric_buffer};
pub(crate) use rank::{clusters_pay, wave_tiles};
pub(crate) use traffic::{PARTS, Part};

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
/// The memory is the rank's own, and every rank of the group can read the hidden states: with one process they may be anywhere on
/// the rank's GPU, with several they are in [`FusedMoe::hidden_states`], which is mapped into all processes.
#[derive(Clone, Copy, Debug)]
pub struct RankInputs {
    /// bf16 [T, H], 16-byte aligned; e4m3 if there are scales of them.
    pub hidden_states: u64,
    /// 0, or f32 [T, ceil(H / 128)]: the hidden states are e4m3, and what they are is multiplied with these. Only for a layer whose experts run in FP8.
    pub hidden_scales: u64,
    /// i32 [T, K]; -1 is "no expert".
    pub topk_idx: u64,
    /// f32 [T, K].
    pub topk_weights: u64,
    /// u32: T, read when the launch runs.
    pub tokens: u64,
    /// bf16 [T, H], 16-byte aligned; written.
    pub output: u64,
    /// The most tokens that any rank may have in this launch, as far as the caller knows: at the latest the layer's maximum. Nothing but speed depends on
    /// it: with many, CTAs work in clusters.
    pub most_tokens: u32,
}

/// One MoE layer, ready to run on the ranks of a group: on those of this process, which is all unless every rank is a process.
pub struct FusedMoe {
    group: DeviceGroup,
    config: MoeConfig,
    shape: Shape,
    workspace: WorkspaceLayout,
    /// Those of this process.
    ranks: Vec<Rank>,
    /// The ranks of a group of several processes are out of step.
    broken: AtomicBool,
    /// Where a traced kernel records, one buffer a rank of this process.
    records: Vec<DeviceBuffer>,
    /// Reached through the parameter blocks of all ranks.
    _symmetric: Vec<DeviceBuffer>,
}

impl FusedMoe {
    /// Prepares and uploads the weights of this process's ranks, and allocates all buffers. The processes of a group call this
    /// together.
    ///
    /// # Errors
    /// A configuration that the kernel cannot run or that is not that of every process, weights that do not fit it, memory
    /// that runs out, or another process that did not come.
    pub fn new(group: &DeviceGroup, config: &MoeConfig, weights: &ExpertWeights) -> Result<Self> {
        let shape = layer_shape(config, group.ranks())?;
        let backend = &group.backend;
        agree(&**backend, config)?;
        let format = config.experts_format.kernel();
        backend.prepare(format.entry, group.ptx(config.experts_format), shared_bytes(group, format))?;
        let local = backend.local_ranks();
        let symmetric: Vec<_> =
            local.clone().map(|rank| symmetric_buffer(backend, rank, &shape, format)).collect::<Result<_>>()?;
        let addresses: Vec<_> = symmetric.iter().map(DeviceBuffer::address).collect();
        let mut bases = [0; MAX_RANKS as usize];
        let shared = backend.share(&addresses, "symmetric buffer")?;
        bases[..shared.len()].copy_from_slice(&shared);
        let make = |(rank, symmetric)| {
            let weights = LaidOutWeights::new(weights, config, rank, group.ranks())?;
            Rank::new(backend, config, shape, rank, bases, symmetric, &weights)
        };
        let ranks: Result<Vec<_>> = local.zip(&symmetric).map(make).collect();
        // The symmetric buffers of a layer that cannot be are released by all processes together.
        let made = backend.exchange(&[ranks.is_ok().into()]);
        let ranks = ranks?;
        if let Some(rank) = made?.iter().position(|made| made != &[1]) {
            return Err(RendezvousError::NotReady { rank }.into());
        }
        Ok(Self {
            group: group.clone(),
            config: config.clone(),
            shape,
            workspace: WorkspaceLayout::new(&shape, format),
            ranks,
            broken: AtomicBool::new(false),
            records: Vec::new(),
            _symmetric: symmetric,
        })
    }

    /// The layer's configuration.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Memory for a rank's hidden states, bf16 [max_tokens_per_rank, H], that the ranks of all processes can read.
    /// [`Self::forward`] puts them there; an engine whose layer before writes there needs no copy.
    ///
    /// # Errors
    /// A rank of another process.
    pub fn hidden_states(&self, rank: usize) -> Result<&DeviceBuffer> {
        Ok(&self.rank(rank)?.inputs.hidden_states)
    }

    /// Sets how long one wait of this process's kernels may last before the launch ends with an error, from the next launch on. A CUDA
    /// graph keeps what it was captured with.
    pub fn set_deadline(&mut self, deadline: Duration) {
        for params in self.ranks.iter_mut().flat_map(|rank| &mut rank.params) {
            params.deadline_ns = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        }
    }

    /// One forward pass over all ranks: copies the batch, which has an entry for every rank of this process, to the
    /// ranks, launches, waits, and copies the outputs back. The processes of a group call this together.
    ///
    /// # Errors
    /// A batch that does not fit the configuration, expert ids that do not exist or are repeated, a wait that ran past the
    /// deadline. The layer can be used again after any of them; in a group of several processes after [`Self::recover`]
    /// where it was the deadline. A process that fails before its launch lets the others run into theirs.
    pub fn forward(&mut self, batch: &[RankBatch<'_>]) -> Result<Vec<RankOutput>> {
        let everyone: Vec<_> = self.local_ranks().collect();
        self.forward_on(&everyone, batch)
    }

    /// As [`Self::forward`], but launches only some ranks: what those do that lose a rank.
    pub fn forward_on(&mut self, launched: &[usize], batch: &[RankBatch<'_>]) -> Result<Vec<RankOutput>> {
        self.check_batch(batch)?;
        let backend = &*self.group.backend;
        for (rank, tokens) in self.ranks.iter().zip(batch) {
            rank.upload_batch(backend, tokens)?;
        }
        let most_tokens =
            batch.iter().map(|tokens| tokens.hidden_states.len() / self.config.hidden).max().unwrap_or(0) as u32;
        let inputs = launched.iter().map(|&rank| Ok((rank, self.rank(rank)?.inputs.arguments(most_tokens))));
        let reports = self.launch(&inputs.collect::<Result<Vec<_>>>()?)?;
        self.check_status(Some(batch))?;
        let output = |(&rank, report): (&usize, RankReport)| {
            let mut output = vec![bf16::ZERO; batch[rank - self.local_ranks().start].hidden_states.len()];
            self.rank(rank)?.inputs.output.read(bytemuck::cast_slice_mut(&mut output))?;
            Ok(RankOutput { output, elapsed: report.elapsed, cost: report.cost })
        };
        launched.iter().zip(reports).map(output).collect()
    }

    /// One launch on every rank with inputs that are in device memory already, in rank order; waits for its end.
    ///
    /// # Errors
    /// As [`Self::forward`].
    ///
    /// # Safety
    /// The memory that `inputs` names is as it says.
    pub(crate) unsafe fn run(&mut self, inputs: &[RankInputs]) -> Result<Vec<RankReport>> {
        let inputs: Vec<_> = self.local_ranks().zip(inputs.iter().copied()).collect();
        let reports = self.launch(&inputs)?;
        self.check_status(None)?;
        Ok(reports)
    }

    fn launch(&self, inputs: &[(usize, RankInputs)]) -> Result<Vec<RankReport>> {
        let arguments: Vec<_> =
            inputs.iter().map(|&(rank, inputs)| self.arguments(rank, inputs)).collect::<Result<_>>()?;
        let launches: Vec<_> = inputs
            .iter()
            .zip(&arguments)
            .map(|((rank, inputs), arguments)| self.rank_launch(*rank, inputs.most_tokens, arguments))
            .collect::<Result<_>>()?;
        self.group.backend.launch(&launches)
    }

    /// Queues one rank's launch on a `CUstream` and returns at once: no host synchronisation, no allocation, and legal while
    /// the stream is captured. The launch ends when every rank of the group has been queued and has run. [`Self::check`] tells how it went.
    ///
    /// The simulator has no streams: `stream` is ignored, and the launches run when the last rank is queued, or when somebody waits
    /// for them ([`crate::Stream::synchronize`]).
    ///
    /// # Errors
    /// A rank of another process, hidden states that the other ranks cannot read, or a driver that refuses the launch.
    ///
    /// # Safety
    /// `stream` is a stream of the rank's GPU, and the memory that `inputs` names is as it says until the launch has ended.
    pub unsafe fn enqueue(&self, rank: usize, stream: *mut c_void, inputs: RankInputs) -> Result<()> {
        let arguments = self.arguments(rank, inputs)?;
        // SAFETY: the caller's; the layer's own memory outlives its launches as the caller's does.
        unsafe { self.group.backend.enqueue(&self.rank_launch(rank, inputs.most_tokens, &arguments)?, stream) }
    }

    /// What the launches of this process's ranks since the last call reported. No launch may be running.
    ///
    /// # Errors
    /// As [`Self::forward`]; the layer can be used again, in a group of several processes after [`Self::recover`] where it
    /// was the deadline.
    pub fn check(&self) -> Result<()> {
        self.check_status(None)
    }

    /// Makes the ranks agree again after a launch that ran past its deadline. A group of one process does this by itself. The
    /// processes of a larger group call it together, once the launches of each have ended; a rank that was not
    /// waiting itself meets the deadline at its next launch, and then calls this too.
    ///
    /// # Errors
    /// Another process that does not come, or a driver that fails.
    pub fn recover(&self) -> Result<()> {
        let backend = &*self.group.backend;
        let mut last = 0u32;
        for (rank, state) in self.numbered() {
            let mut epoch = 0u32;
            backend.read(rank, state.workspace.address() + self.workspace.epoch, bytemuck::bytes_of_mut(&mut epoch))?;
            last = last.max(epoch);
        }
        for epoch in backend.exchange(bytemuck::bytes_of(&last))? {
            last = last.max(bytemuck::pod_read_unaligned(&epoch));
        }
        for (rank, state) in self.numbered() {
            let base = state.workspace.address();
            backend.write(rank, base + self.workspace.epoch, bytemuck::bytes_of(&[last, 0]))?;
            backend.fill(rank, base + self.workspace.counters, 2 * self.workspace.counter.bytes, 0)?;
            backend.write(rank, base + self.workspace.status, bytemuck::bytes_of(&Status::CLEAR))?;
        }
        self.broken.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The ranks of this process.
    fn local_ranks(&self) -> Range<usize> {
        self.group.backend.local_ranks()
    }

    fn rank(&self, rank: usize) -> Result<&Rank> {
        let local = self.local_ranks();
        let found = rank.checked_sub(local.start).and_then(|index| self.ranks.get(index));
        found.ok_or(Error::NotLocal { rank, local })
    }

    fn numbered(&self) -> impl Iterator<Item = (usize, &Rank)> {
        self.local_ranks().zip(&self.ranks)
    }

    fn spans_processes(&self) -> bool {
        self.ranks.len() < self.shape.ranks as usize
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
        for (rank, batch) in self.local_ranks().zip(batch) {
            let tokens = batch.hidden_states.len() / hidden;
            self.config.check_tokens(rank, tokens)?;
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

    /// What the kernel gets, checked as far as the host can.
    fn arguments(&self, rank: usize, inputs: RankInputs) -> Result<Arguments> {
        let state = self.rank(rank)?;
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::NotRecovered);
        }
        let own = state.inputs.hidden_states.address();
        // Records are made where all ranks read them.
        let read_by_others = !self.config.experts_format.kernel().scaled;
        if read_by_others && self.spans_processes() && inputs.hidden_states != own {
            return Err(Error::Address {
                what: "hidden states",
                rank,
                address: inputs.hidden_states,
                expected: format!(
                    "other processes read them, so they must be at {own:#x}, as FusedMoe::hidden_states({rank}) says"
                ),
            });
        }
        for (what, address) in [("hidden states", inputs.hidden_states), ("output", inputs.output)] {
            if !address.is_multiple_of(16) {
                let expected = "the address must be a multiple of 16".into();
                return Err(Error::Address { what, rank, address, expected });
            }
        }
        Ok(Arguments {
            hidden_states: inputs.hidden_states,
            hidden_scales: inputs.hidden_scales,
            topk_ids: inputs.topk_idx,
            topk_weights: inputs.topk_weights,
            tokens: inputs.tokens,
            output: inputs.output,
        })
    }

    fn rank_launch<'a>(&'a self, rank: usize, most_tokens: u32, arguments: &'a Arguments) -> Result<RankLaunch<'a>> {
        let params = self.rank(rank)?.params(most_tokens);
        let sms = self.group.backend.sms(rank);
        let format = self.config.experts_format.kernel();
        Ok(RankLaunch {
            rank,
            entry: format.entry,
            // Whole clusters.
            grid: [sms / params.cluster * params.cluster, 1, 1],
            cluster: params.cluster,
            block: [format.threads(), 1, 1],
            shared_bytes: shared_bytes(&self.group, format),
            params: bytemuck::bytes_of(params),
            args: bytemuck::cast_slice(std::slice::from_ref(arguments)),
        })
    }

    /// Reads and clears the status words of all ranks; the batch, if it is known, gives the ids that were wrong.
    fn check_status(&self, batch: Option<&[RankBatch<'_>]>) -> Result<()> {
        let backend = &*self.group.backend;
        let mut statuses = Vec::new();
        for (rank, state) in self.numbered() {
            let address = state.workspace.address() + self.workspace.status;
            let mut status = Status::CLEAR;
            backend.read(rank, address, bytemuck::bytes_of_mut(&mut status))?;
            if status != Status::CLEAR {
                backend.write(rank, address, bytemuck::bytes_of(&Status::CLEAR))?;
            }
            statuses.push((rank, status));
        }
        // A wait that ran out leaves counters and epochs as they were at that moment.
        let timeouts = statuses.iter().filter_map(|&(rank, status)| Some((rank, Timeout::unpack(status.timeout)?)));
        // A rank that drains makes others wait in vain, in later stages: the first stage is nearest to the cause.
        let timeout = timeouts.min_by_key(|(_, timeout)| timeout.stage as u8);
        match timeout {
            Some(_) if self.spans_processes() => self.broken.store(true, Ordering::Relaxed),
            Some(_) => self.recover()?,
            None => {}
        }
        for &(rank, status) in &statuses {
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
        let tokens = batch.map(|batch| &batch[rank - self.local_ranks().start]);
        let expert = tokens.and_then(|tokens| tokens.topk_idx.get(token * self.config.top_k + k).copied());
        match choice.fault {
            Fault::OutOfRange => Error::ExpertId { rank, token, k, expert, experts: self.config.experts },
            Fault::Repeated => Error::RepeatedExpert { rank, token, k, expert },
        }
    }

    /// The layer's sizes as the kernel sees them.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }
}

/// Dynamic shared memory of a CTA.
fn shared_bytes(group: &DeviceGroup, format: &Format) -> u32 {
    if group.is_traced() { SHARED_LIMIT } else { SharedLayout::new(format).bytes }
}

/// The sizes as the kernel takes them, checked.
pub(crate) fn layer_shape(config: &MoeConfig, ranks: usize) -> Result<Shape> {
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

/// Checks that all processes make the same layer.
fn agree(backend: &dyn Backend, config: &MoeConfig) -> Result<()> {
    let limit = config.swiglu_limit.map_or_else(|| "none".into(), |limit| limit.to_string());
    let parts = [
        ("a hidden size of", config.hidden.to_string()),
        ("an intermediate size of", config.intermediate.to_string()),
        ("a number of experts of", config.experts.to_string()),
        ("a number of shared experts of", config.shared_experts.to_string()),
        ("a top-k of", config.top_k.to_string()),
        ("experts in", config.experts_format.name().into()),
        ("scales of", format!("{:?}", config.scales)),
        ("a maximum of tokens per rank of", config.max_tokens_per_rank.to_string()),
        ("a SwiGLU limit of", limit),
    ];
    // Blobs have one size: every part is padded to more than any number takes.
    let blob: String = parts.iter().map(|(_, value)| format!("{value:<64}")).collect();
    let blobs = backend.exchange(blob.as_bytes())?;
    for (rank, theirs) in blobs.iter().enumerate() {
        for ((what, _), (theirs, ours)) in parts.iter().zip(theirs.chunks(64).zip(blobs[0].chunks(64))) {
            if theirs != ours {
                let text = |part| String::from_utf8_lossy(part).trim_end().to_owned();
                return Err(RendezvousError::Mismatch { rank, what, theirs: text(theirs), ours: text(ours) }.into());
            }
        }
    }
    Ok(())
}
