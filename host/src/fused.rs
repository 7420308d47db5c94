//! The layer on its ranks: weights, parameter blocks, and launches.

mod batch;
mod inputs;
mod rank;
mod record;
#[cfg(test)]
mod tests;
mod traffic;

use std::ffi::c_void;
use std::ops::Range;
use std::time::Duration;

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::Shape;
use ferromoe_kernel::params::{Arguments, Params};
use ferromoe_kernel::schedule::Cut;
use ferromoe_kernel::shared::{SHARED_LIMIT, SharedLayout};
use half::bf16;

use crate::backend::{RankLaunch, RankReport};
use crate::config::MoeConfig;
use crate::error::{Error, Result};
use crate::group::DeviceGroup;
use crate::memory::DeviceBuffer;
use crate::weights::{ExpertWeights, LaidOutWeights};
use crate::workspace::Workspace;

pub use batch::{HiddenStates, RankBatch, RankOutput};
pub use inputs::RankInputs;
use rank::Rank;
pub(crate) use rank::clusters_pay;
pub(crate) use traffic::{PARTS, Part};

/// How long one wait of the kernel may last, unless [`FusedMoe::set_deadline`] says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// One MoE layer, ready to run on the ranks of a group: on those of this process, which is all unless every rank is a process.
pub struct FusedMoe {
    workspace: Workspace,
    config: MoeConfig,
    /// Among the layers of the workspace.
    number: u32,
    shape: Shape,
    /// Those of this process.
    ranks: Vec<Rank>,
    /// Where a traced kernel records, one buffer a rank of this process.
    records: Vec<DeviceBuffer>,
}

impl FusedMoe {
    /// Prepares and uploads the weights of this process's ranks. All other memory is the workspace's, and shared with its other layers. The processes
    /// of a group call this together.
    ///
    /// # Errors
    /// A configuration that the kernel cannot run, that does not fit the workspace or that is not that of every process, weights that do not fit it,
    /// memory that runs out, or another process that did not come.
    pub fn new(workspace: &Workspace, config: &MoeConfig, weights: &ExpertWeights) -> Result<Self> {
        let group = workspace.group();
        let make = |number, shape| -> Result<_> {
            let format = config.experts_format.kernel();
            group.backend.prepare(format.entry, group.ptx(config.experts_format), shared_bytes(group, format))?;
            let rank = |rank| {
                let weights = LaidOutWeights::new(weights, config, rank, group.ranks())?;
                Rank::new(workspace, config, number, shape, rank, &weights)
            };
            Ok((shape, workspace.local_ranks().map(rank).collect::<Result<_>>()?))
        };
        let (number, (shape, ranks)) = workspace.add_layer(config, make)?;
        Ok(Self { workspace: workspace.clone(), config: config.clone(), number, shape, ranks, records: Vec::new() })
    }

    /// The workspace that it shares with other layers.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// Its number among the layers of its workspace, which errors name it by.
    pub fn number(&self) -> usize {
        self.number as usize
    }

    /// The layer's configuration.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Sets how long one wait of this process's kernels may last before the launch ends with an error, from the next launch on. A CUDA
    /// graph keeps what it was captured with.
    pub fn set_deadline(&mut self, deadline: Duration) {
        for params in self.ranks.iter_mut().flat_map(|rank| &mut rank.params) {
            params.deadline_ns = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        }
    }

    /// Cuts the work otherwise, from the next launch on, with no more tiles of the ring than the workspace has: for tests of the ring. The output does not depend on it.
    ///
    /// # Panics
    /// If the ring is larger than the workspace's, or smaller than [`Cut::least_ring`] without being so large that every tile has a place.
    #[doc(hidden)]
    pub fn set_cut(&mut self, cut: Cut) {
        let format = self.config.experts_format.kernel();
        let least = Cut::least_ring(cut.wave_tiles, cut.part_tiles).min(self.shape.routed_tiles(format));
        for params in self.ranks.iter_mut().flat_map(|rank| &mut rank.params) {
            assert!((least..=params.ring_tiles).contains(&cut.ring_tiles), "{cut:?} with {params:?}");
            let Cut { wave_tiles, part_tiles, ring_tiles } = cut;
            *params = Params { wave_tiles, part_tiles, ring_tiles, ..*params };
        }
    }

    /// One forward pass over all ranks: copies the batch, which has an entry for every rank of this process, to the
    /// ranks, launches, waits, and copies the outputs back. The processes of a group call this together.
    ///
    /// # Errors
    /// A batch that does not fit the configuration, FP8 tokens for a layer whose experts run in bf16, expert ids that do not exist or are repeated, a wait that ran past the
    /// deadline, or a rank that launched another layer. The layer can be used again after any of them; in a group of several processes after
    /// [`Workspace::recover`] where it was one of the last two. A process that fails before its launch lets the others run into theirs.
    pub fn forward(&mut self, batch: &[RankBatch<'_>]) -> Result<Vec<RankOutput>> {
        let everyone: Vec<_> = self.local_ranks().collect();
        self.forward_on(&everyone, batch)
    }

    /// As [`Self::forward`], but launches only some ranks: what those do that lose a rank.
    pub fn forward_on(&mut self, launched: &[usize], batch: &[RankBatch<'_>]) -> Result<Vec<RankOutput>> {
        self.check_batch(batch)?;
        let backend = &*self.workspace.group().backend;
        let _alone = self.workspace.run_alone();
        for (rank, tokens) in self.local_ranks().zip(batch) {
            self.workspace.rank(rank)?.inputs.upload(backend, rank, self.config.hidden, tokens)?;
        }
        let most_tokens = batch.iter().map(|tokens| tokens.tokens(self.config.hidden)).max().unwrap_or(0) as u32;
        let of = |rank: usize| &batch[rank - self.local_ranks().start];
        let inputs = launched.iter().map(|&rank| {
            let buffers = &self.workspace.rank(rank)?.inputs;
            Ok((rank, buffers.arguments(&of(rank).hidden_states, most_tokens)))
        });
        let reports = self.launch(&inputs.collect::<Result<Vec<_>>>()?)?;
        self.workspace.check_status(Some((self.number, batch)))?;
        let output = |(&rank, report): (&usize, RankReport)| {
            let mut output = vec![bf16::ZERO; of(rank).hidden_states.elements()];
            self.workspace.rank(rank)?.inputs.output.read(bytemuck::cast_slice_mut(&mut output))?;
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
    pub(crate) unsafe fn run(&self, inputs: &[RankInputs]) -> Result<Vec<RankReport>> {
        let _alone = self.workspace.run_alone();
        let inputs: Vec<_> = self.local_ranks().zip(inputs.iter().copied()).collect();
        let reports = self.launch(&inputs)?;
        self.workspace.check()?;
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
        self.workspace.group().backend.launch(&launches)
    }

    /// Queues one rank's launch on a `CUstream` and returns at once: no host synchronisation, no allocation, and legal while
    /// the stream is captured. The launch ends when every rank of the group has been queued and has run. [`Workspace::check`] tells how it went.
    ///
    /// The simulator has no streams: `stream` is ignored, and the launches run when the last rank is queued, or when somebody waits
    /// for them ([`crate::Stream::synchronize`]).
    ///
    /// # Errors
    /// A rank of another process, an address that is null or not aligned, hidden states that the other ranks cannot read, FP8 tokens for a layer whose
    /// experts run in bf16, or a driver that refuses the launch. Nothing is launched then.
    ///
    /// # Safety
    /// `stream` is a stream of the rank's GPU, and the memory that `inputs` names is as it says until the launch has ended. No other launch of a layer of
    /// this workspace runs on the rank meanwhile: all are queued on one stream, or wait for each other otherwise.
    pub unsafe fn enqueue(&self, rank: usize, stream: *mut c_void, inputs: RankInputs) -> Result<()> {
        let arguments = self.arguments(rank, inputs)?;
        let launch = self.rank_launch(rank, inputs.most_tokens, &arguments)?;
        // SAFETY: the caller's; the layer's own memory outlives its launches as the caller's does.
        unsafe { self.workspace.group().backend.enqueue(&launch, stream) }
    }

    /// The ranks of this process.
    fn local_ranks(&self) -> Range<usize> {
        self.workspace.local_ranks()
    }

    fn rank(&self, rank: usize) -> Result<&Rank> {
        let local = self.local_ranks();
        let found = rank.checked_sub(local.start).and_then(|index| self.ranks.get(index));
        found.ok_or(Error::NotLocal { rank, local })
    }

    fn numbered(&self) -> impl Iterator<Item = (usize, &Rank)> {
        self.local_ranks().zip(&self.ranks)
    }

    fn check_batch(&self, batch: &[RankBatch<'_>]) -> Result<()> {
        if batch.len() != self.ranks.len() {
            return Err(Error::Size {
                what: "the batch".into(),
                found: format!("the tokens of {} ranks", batch.len()),
                expected: format!("those of {}", self.ranks.len()),
            });
        }
        self.local_ranks().zip(batch).try_for_each(|(rank, batch)| batch.check(&self.config, rank))
    }

    /// What the kernel gets, checked as far as the host can.
    fn arguments(&self, rank: usize, inputs: RankInputs) -> Result<Arguments> {
        let own = self.workspace.hidden_states(rank)?.address();
        self.workspace.check_usable()?;
        inputs.check(&self.config, rank)?;
        // Records are made where all ranks read them.
        let read_by_others = !self.config.experts_format.kernel().scaled;
        if read_by_others && self.workspace.spans_processes() && inputs.hidden_states != own {
            return Err(Error::Address {
                what: "hidden states",
                rank,
                address: inputs.hidden_states,
                expected: format!(
                    "other processes read them, so they must be at {own:#x}, as Workspace::hidden_states({rank}) says"
                ),
            });
        }
        Ok(inputs.kernel_arguments())
    }

    fn rank_launch<'a>(&'a self, rank: usize, most_tokens: u32, arguments: &'a Arguments) -> Result<RankLaunch<'a>> {
        let params = self.rank(rank)?.params(most_tokens);
        let sms = self.workspace.group().backend.sms(rank);
        let format = self.config.experts_format.kernel();
        Ok(RankLaunch {
            rank,
            entry: format.entry,
            // Whole clusters.
            grid: [sms / params.cluster * params.cluster, 1, 1],
            cluster: params.cluster,
            block: [format.threads(), 1, 1],
            shared_bytes: shared_bytes(self.workspace.group(), format),
            params: bytemuck::bytes_of(params),
            args: bytemuck::cast_slice(std::slice::from_ref(arguments)),
        })
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
