//! The ranks a layer runs on: GPUs, or simulated ones.

use std::fmt;
use std::sync::Arc;

use crate::backend::Backend;
use crate::config::MAX_RANKS;
use crate::cuda::{CudaBackend, Gpu, find_gpus, share_gpu};
use crate::error::{Error, Result};
use crate::ptx::PTX;
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
#[derive(Clone)]
pub struct DeviceGroup {
    pub(crate) backend: Arc<dyn Backend>,
    choice: String,
}

impl DeviceGroup {
    /// Opens `ranks` ranks (1 to [`MAX_RANKS`]).
    pub fn open(device: Device, ranks: usize) -> Result<Self> {
        if !(1..=MAX_RANKS).contains(&ranks) {
            return Err(Error::Ranks { ranks });
        }
        match device {
            Device::Sim(options) => Self::simulated(ranks, options, "as asked for"),
            Device::Cuda => Self::on_gpus(find_gpus(ranks)?, "as asked for"),
            Device::SharedGpu => Self::on_gpus(share_gpu(ranks)?, "as asked for"),
            Device::Auto(options) => match find_gpus(ranks) {
                Ok(gpus) => Self::on_gpus(gpus, "for they are there"),
                Err(missing) => Self::simulated(ranks, options, &format!("for {missing}")),
            },
        }
    }

    fn simulated(ranks: usize, options: SimOptions, why: &str) -> Result<Self> {
        Ok(Self::new(SimBackend::new(ranks, options)?, why))
    }

    fn on_gpus(gpus: Vec<Gpu>, why: &str) -> Result<Self> {
        Ok(Self::new(CudaBackend::open(gpus, PTX)?, why))
    }

    fn new(backend: impl Backend + 'static, why: &str) -> Self {
        let choice = format!("{}, {why}", backend.description());
        Self { backend: Arc::new(backend), choice }
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.backend.ranks()
    }

    /// What the group runs on, and why.
    pub fn description(&self) -> &str {
        &self.choice
    }
}

impl fmt::Debug for DeviceGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceGroup({})", self.choice)
    }
}
