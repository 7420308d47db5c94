//! Simulated ranks: the PTX runs on the CPU, in `ptx-sim`.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ptx_sim::{Arg, Cost, Launch, Machine, Module, RunOptions, TensorMap, TensorMapSpec};

use crate::backend::{Backend, RankLaunch, RankReport};
use crate::error::{Error, Result};
use crate::group::SimOptions;
use crate::ptx::PTX;

/// A node of simulated GPUs.
pub(crate) struct SimBackend {
    ranks: usize,
    options: SimOptions,
    module: Module,
    state: Mutex<State>,
}

struct State {
    machine: Machine,
    /// Launches so far: each gets another seed, as no two launches on a GPU run alike.
    runs: u64,
    /// Queued launches: they run when every rank has one.
    queue: Vec<RankLaunch>,
}

impl SimBackend {
    pub(crate) fn new(ranks: usize, options: SimOptions) -> Result<Self> {
        for (what, value) in [("SM count", Some(options.sms)), ("residency", options.residency)] {
            if value == Some(0) {
                return Err(Error::Size {
                    what: format!("the {what}"),
                    found: "0".into(),
                    expected: "at least 1".into(),
                });
            }
        }
        let state = State { machine: Machine::new(ranks), runs: 0, queue: Vec::new() };
        Ok(Self { ranks, options, module: Module::parse(PTX)?, state: Mutex::new(state) })
    }

    /// The machine stays usable after a panic elsewhere: every access is checked by itself.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, state: &mut State, launches: &[RankLaunch]) -> Result<Vec<Cost>> {
        state.runs += 1;
        let options = RunOptions {
            seed: self.options.seed.wrapping_add(state.runs.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            residency: self.options.residency,
            ..RunOptions::default()
        };
        let launches: Vec<_> = launches
            .iter()
            .map(|launch| Launch {
                device: launch.rank,
                module: &self.module,
                entry: launch.entry,
                grid: launch.grid,
                block: launch.block,
                shared_bytes: launch.shared_bytes,
                args: launch.args.iter().map(|&arg| Arg::U64(arg)).collect(),
            })
            .collect();
        Ok(state.machine.run(&launches, &options)?)
    }
}

impl Backend for SimBackend {
    fn description(&self) -> String {
        format!("{} simulated rank{} of {} SMs", self.ranks, if self.ranks == 1 { "" } else { "s" }, self.options.sms)
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn sms(&self, _rank: usize) -> u32 {
        self.options.sms
    }

    fn alloc(&self, rank: usize, bytes: u64, name: &'static str) -> Result<u64> {
        Ok(self.state().machine.alloc(rank, bytes, name)?)
    }

    fn free(&self, _rank: usize, address: u64) -> Result<()> {
        Ok(self.state().machine.free(address)?)
    }

    fn write(&self, _rank: usize, address: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.state().machine.write(address, bytes)?)
    }

    fn read(&self, _rank: usize, address: u64, bytes: &mut [u8]) -> Result<()> {
        Ok(self.state().machine.read(address, bytes)?)
    }

    fn fill(&self, _rank: usize, address: u64, bytes: u64, value: u8) -> Result<()> {
        Ok(self.state().machine.fill(address, bytes, value)?)
    }

    fn encode_tensor_map(&self, spec: &TensorMapSpec) -> Result<[u8; 128]> {
        Ok(TensorMap::encode(spec)?)
    }

    fn prepare(&self, _entry: &'static str, _shared_bytes: u32) -> Result<()> {
        Ok(())
    }

    fn launch(&self, launches: &[RankLaunch]) -> Result<Vec<RankReport>> {
        let costs = self.run(&mut self.state(), launches)?;
        let report = |cost: Cost| RankReport { elapsed: Duration::from_nanos(cost.simulated_ns), cost: Some(cost) };
        Ok(costs.into_iter().map(report).collect())
    }

    unsafe fn enqueue(&self, launch: &RankLaunch, _stream: *mut c_void) -> Result<()> {
        let mut state = self.state();
        state.queue.push(launch.clone());
        if state.queue.len() == self.ranks {
            let queue = std::mem::take(&mut state.queue);
            self.run(&mut state, &queue)?;
        }
        Ok(())
    }
}
