//! The ranks a layer runs on: GPUs, or simulated ones.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ptx_sim::{Module, RunOptions};

use crate::backend::Backend;
use crate::config::{ExpertFormat, MAX_RANKS};
use crate::cuda::{CudaBackend, Gpu, find_gpus, gpu_of, share_gpu};
use crate::error::{Error, Result};
use crate::memory::{DeviceBuffer, Stream};
use crate::ptx::{kernel_ptx, source_digest};
use crate::rendezvous::{Member, Rendezvous, RendezvousAddress};
use crate::simulated::SimBackend;

/// What to run on.
#[derive(Clone, Debug)]
pub enum Device {
    /// GPUs if there are enough, else the simulator.
    Auto(SimOptions),
    /// The simulator.
    Sim(SimOptions),
    /// GPUs, one a rank.
    Cuda,
    /// One GPU for all ranks, each with its share of the SMs: the protocol between ranks, on a machine with a single GPU.
    SharedGpu,
}

/// How simulated ranks run. The results do not depend on any of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimOptions {
    /// CTAs of a launch, one for each simulated SM; at least 1.
    pub sms: u32,
    /// Chooses the order in which warps run and asynchronous operations take effect.
    pub seed: u64,
    /// CTAs of a rank that are resident at once, at least 1; `None` for all.
    pub residency: Option<u32>,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self { sms: 4, seed: 0, residency: None }
    }
}

/// One to eight ranks whose memories are mapped into one address space. Cloning shares them.
///
/// One process drives them all ([`Self::open`]), or each is driven by a process of its own ([`Self::join`]).
#[derive(Clone)]
pub struct DeviceGroup {
    pub(crate) backend: Arc<dyn Backend>,
    choice: String,
    simulated: bool,
    traced: bool,
    /// Another module than [`kernel_ptx`], for tests.
    ptx: Option<&'static str>,
}

impl DeviceGroup {
    /// Opens `ranks` ranks (1 to [`MAX_RANKS`]), all driven by this process.
    pub fn open(device: Device, ranks: usize) -> Result<Self> {
        Self::open_with(device, ranks)
    }

    /// As [`Self::open`], with a kernel that records what its roles do when, and takes a little longer for it: see
    /// [`crate::FusedMoe::record_trace`].
    pub fn open_traced(device: Device, ranks: usize) -> Result<Self> {
        Ok(Self::open_with(device, ranks)?.traced())
    }

    fn open_with(device: Device, ranks: usize) -> Result<Self> {
        check_ranks(ranks)?;
        let simulated = |options, why: &str| Ok(Self::new(SimBackend::new(ranks, options)?, true, why));
        let on_gpus = |gpus: Vec<Gpu>, why| Ok(Self::new(CudaBackend::open(gpus)?, false, why));
        match device {
            Device::Sim(options) => simulated(options, AS_ASKED),
            Device::Cuda => on_gpus(find_gpus(ranks)?, AS_ASKED),
            Device::SharedGpu => on_gpus(share_gpu(ranks)?, AS_ASKED),
            Device::Auto(options) => match find_gpus(ranks) {
                Ok(gpus) => on_gpus(gpus, AS_THERE),
                Err(missing) => simulated(options, &missing.brief()),
            },
        }
    }

    /// Opens `ranks` simulated ranks with launches as `run` says but for their seed and residency, and, if there is one, another `module` than that of [`crate::kernel_ptx`]:
    /// for tests of the kernel and of the simulator's checks.
    ///
    /// # Errors
    /// As [`Self::open`]; a `module` without the kernel's entry is an error of the first launch.
    pub fn simulated(module: Option<Arc<Module>>, ranks: usize, options: SimOptions, run: RunOptions) -> Result<Self> {
        check_ranks(ranks)?;
        Ok(Self::new(SimBackend::with_module(ranks, options, module, run)?, true, AS_ASKED))
    }

    /// Opens rank `rank` of `ranks`, whose other ranks are other processes. All meet at `address`: rank 0 listens there, and all
    /// wait for each other for at most `timeout`, now and whenever they do something together: [`crate::Workspace::new`],
    /// [`crate::FusedMoe::new`], [`crate::Workspace::recover`], and the release of a workspace. So it is longer than weights take to load, and than the deadline
    /// of a launch.
    ///
    /// A rank takes the GPU of its number, or the only one that `CUDA_VISIBLE_DEVICES` leaves it; with [`Device::SharedGpu`] ranks
    /// share GPUs. [`Device::Auto`] takes GPUs if every rank has one. Simulated ranks are threads of one process: what
    /// several processes would do can be tried and tested so. Rank 0's [`SimOptions`] count.
    ///
    /// # Errors
    /// [`crate::RendezvousError`], naming a rank that did not come, or that has another version or kernel; and as [`Self::open`].
    pub fn join(
        device: Device,
        rank: usize,
        ranks: usize,
        address: &RendezvousAddress,
        timeout: Duration,
    ) -> Result<Self> {
        check_ranks(ranks)?;
        let mut others = Rendezvous::join(address, Member { rank, ranks, digest: source_digest() }, timeout)?;
        let simulated = |others, options, why: &str| Ok(Self::new(SimBackend::join(others, options)?, true, why));
        let on_gpu = |others, gpu, why| Ok(Self::new(CudaBackend::open_process(gpu, others)?, false, why));
        match device {
            Device::Sim(options) => simulated(others, options, AS_ASKED),
            Device::Cuda => on_gpu(others, gpu_of(rank, ranks, false)?, AS_ASKED),
            Device::SharedGpu => on_gpu(others, gpu_of(rank, ranks, true)?, AS_ASKED),
            Device::Auto(options) => {
                let found = gpu_of(rank, ranks, false);
                let without = others.exchange(&[found.is_err().into()])?.iter().position(|blob| blob == &[1]);
                match (found, without) {
                    (Ok(gpu), None) => on_gpu(others, gpu, AS_THERE),
                    (Ok(_), Some(rank)) => simulated(others, options, &format!("rank {rank} has no GPU")),
                    (Err(missing), _) => simulated(others, options, &missing.brief()),
                }
            }
        }
    }

    pub(crate) fn new(backend: impl Backend + 'static, simulated: bool, why: &str) -> Self {
        let choice = format!("{} ({why})", backend.description());
        Self { backend: Arc::new(backend), choice, simulated, traced: false, ptx: None }
    }

    /// Says that the group's kernels are those that record.
    pub fn traced(self) -> Self {
        Self { traced: true, ..self }
    }

    /// The PTX of a format's kernel.
    pub(crate) fn ptx(&self, format: ExpertFormat) -> &'static str {
        self.ptx.unwrap_or_else(|| kernel_ptx(format, self.traced))
    }

    /// As it is, with kernels from another module.
    #[cfg(test)]
    pub(crate) fn with_ptx(self, ptx: &'static str) -> Self {
        Self { ptx: Some(ptx), ..self }
    }

    /// Whether the kernel records what its roles do.
    pub fn is_traced(&self) -> bool {
        self.traced
    }

    /// Number of ranks, those of other processes included.
    pub fn ranks(&self) -> usize {
        self.backend.ranks()
    }

    /// The ranks that this process drives.
    pub fn local_ranks(&self) -> Range<usize> {
        self.backend.local_ranks()
    }

    /// Whether the ranks are simulated.
    pub fn is_simulated(&self) -> bool {
        self.simulated
    }

    /// What the group runs on, and why.
    pub fn description(&self) -> &str {
        &self.choice
    }

    /// Allocates `bytes` (at least 1) on a rank of this process, contents undefined; `name` appears in errors.
    ///
    /// # Errors
    /// A rank of another process, or memory that runs out.
    pub fn alloc(&self, rank: usize, bytes: u64, name: &'static str) -> Result<DeviceBuffer> {
        self.check_local(rank)?;
        DeviceBuffer::new(&self.backend, rank, bytes, name)
    }

    /// A new stream of a rank of this process.
    ///
    /// # Errors
    /// A rank of another process, or a driver that fails.
    pub fn stream(&self, rank: usize) -> Result<Stream> {
        self.check_local(rank)?;
        Stream::new(&self.backend, rank)
    }

    fn check_local(&self, rank: usize) -> Result<()> {
        let local = self.local_ranks();
        if local.contains(&rank) { Ok(()) } else { Err(Error::NotLocal { rank, local }) }
    }
}

const AS_ASKED: &str = "as asked for";
const AS_THERE: &str = "found on this machine";

fn check_ranks(ranks: usize) -> Result<()> {
    if (1..=MAX_RANKS).contains(&ranks) { Ok(()) } else { Err(Error::Ranks { ranks }) }
}

impl fmt::Debug for DeviceGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceGroup({})", self.choice)
    }
}
