//! Simulated ranks: the PTX runs on the CPU, in `ptx-sim`. The ranks of a group are driven by one [`SimBackend`], or each
//! by its own in a thread of its own, as processes drive GPUs; then they share a [`Node`].

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use ptx_sim::{Arg, Cost, Launch, Machine, Module, RunOptions, SimError, TensorMap, TensorMapSpec, Traffic};

use crate::backend::{Backend, RankLaunch, RankReport};
use crate::error::{Error, Result};
use crate::group::SimOptions;
use crate::rendezvous::{Rendezvous, RendezvousError};

/// Ranks of a node of simulated GPUs.
pub(crate) struct SimBackend {
    node: Arc<Node>,
    local: Range<usize>,
    /// The meeting point with the ranks of other threads.
    others: Option<Mutex<Rendezvous>>,
    /// How long ranks whose launches are waited for wait for those of others.
    patience: Duration,
}

/// Simulated GPUs with one address space.
struct Node {
    options: SimOptions,
    /// How every launch runs, but for its seed and residency.
    run: RunOptions,
    /// The module that all entries are of, if it was given.
    given: Option<Arc<Module>>,
    /// The modules of the entries that were prepared.
    modules: Mutex<BTreeMap<&'static str, Arc<Module>>>,
    state: Mutex<State>,
    /// Told after every run.
    ran: Condvar,
}

struct State {
    machine: Machine,
    /// Runs so far: each gets another seed, as no two launches on a GPU run alike.
    runs: u64,
    /// Each rank's launches that have not run: they run when every rank has one.
    queues: Vec<VecDeque<Queued>>,
    /// Names launches.
    last_ticket: u64,
    /// What became of the launches that are waited for.
    reports: BTreeMap<u64, std::result::Result<Cost, Failure>>,
    /// What other launches of a rank ran into, until somebody asks.
    failures: Vec<Option<Failure>>,
    /// The rank of each buffer that other ranks know of.
    shared: BTreeMap<u64, usize>,
    /// Ranks that have freed such a buffer: launches that run without them may find it gone.
    released: Vec<bool>,
}

/// Why a launch has no result.
#[derive(Clone)]
enum Failure {
    Simulator(SimError),
    /// It ran without this rank, which had released what the launch needs of it.
    Without(usize),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Simulator(error) => error.into(),
            Failure::Without(rank) => {
                let source = std::io::Error::other(
                    "it has released its memory and takes part in no launch any more; all ranks must launch within their deadline",
                );
                RendezvousError::Left { rank, source }.into()
            }
        }
    }
}

struct Queued {
    ticket: u64,
    /// Whether a thread takes the report.
    reported: bool,
    entry: &'static str,
    module: Arc<Module>,
    grid: [u32; 3],
    cluster: u32,
    block: [u32; 3],
    shared_bytes: u32,
    args: Vec<Arg>,
}

/// Nodes that rank 0 has opened and other ranks are about to join, by number.
static OPENED: Mutex<BTreeMap<u64, Weak<Node>>> = Mutex::new(BTreeMap::new());
static NEXT_NODE: AtomicU64 = AtomicU64::new(0);

/// How layers run unless a test of the kernel asks for more: a launch that drains after its deadline has passed reads what nothing
/// orders, and must end with the error that names the lost rank.
fn unchecked() -> RunOptions {
    RunOptions { checks: false, ..RunOptions::default() }
}

impl SimBackend {
    /// Opens all ranks of a node.
    pub(crate) fn new(ranks: usize, options: SimOptions) -> Result<Self> {
        let node = Arc::new(Node::new(ranks, options, None, unchecked())?);
        Ok(Self { node, local: 0..ranks, others: None, patience: Duration::ZERO })
    }

    /// As [`Self::new`], with launches as `run` says, and kernels that were parsed before.
    pub(crate) fn with_module(
        ranks: usize,
        options: SimOptions,
        module: Option<Arc<Module>>,
        run: RunOptions,
    ) -> Result<Self> {
        let node = Arc::new(Node::new(ranks, options, module, run)?);
        Ok(Self { node, local: 0..ranks, others: None, patience: Duration::ZERO })
    }

    /// Opens one rank of a node whose other ranks are other threads of this process, met at `others`. Rank 0's options count.
    pub(crate) fn join(mut others: Rendezvous, options: SimOptions) -> Result<Self> {
        let member = others.member();
        let opened = match member.rank {
            0 => Some(Arc::new(Node::new(member.ranks, options, None, unchecked())?)),
            _ => None,
        };
        let number = NEXT_NODE.fetch_add(1, Ordering::Relaxed);
        if let Some(node) = &opened {
            lock(&OPENED).insert(number, Arc::downgrade(node));
        }
        let joined = find_node(&mut others, number);
        lock(&OPENED).remove(&number);
        // Ranks that meet after a launch without all ranks wait for each other for the whole time.
        let patience = others.timeout() / 2;
        let local = member.rank..member.rank + 1;
        Ok(Self { node: joined?, local, others: Some(Mutex::new(others)), patience })
    }

    /// Waits until `done`. Whenever the other ranks' launches have not come in time, those that are there run without them.
    fn wait_until(&self, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = lock(&self.node.state);
        while !done(&state) {
            let waited = self.node.ran.wait_timeout_while(state, self.patience, |state| !done(state));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if !done(&state) {
                self.node.run_first_of_each(&mut state);
            }
        }
        state
    }
}

/// Rank 0's node: all ranks tell each other their process and their number, and rank 0's names the node.
fn find_node(others: &mut Rendezvous, number: u64) -> Result<Arc<Node>> {
    let process = u64::from(std::process::id());
    let blobs = others.exchange(bytemuck::cast_slice(&[process, number]))?;
    let words = |blob: &[u8]| bytemuck::pod_collect_to_vec::<u8, u64>(blob);
    let named = words(&blobs[0]);
    if let Some(rank) = blobs.iter().position(|blob| words(blob)[0] != named[0]) {
        return Err(RendezvousError::Mismatch {
            rank,
            what: "simulated memory in process",
            theirs: words(&blobs[rank])[0].to_string(),
            ours: format!("{} (only threads can share simulated ranks)", named[0]),
        }
        .into());
    }
    let node = lock(&OPENED).get(&named[1]).and_then(Weak::upgrade);
    // Rank 0 keeps the node until all have it.
    others.exchange(&[])?;
    node.ok_or_else(|| {
        let source = std::io::Error::other("its node is gone");
        RendezvousError::Left { rank: 0, source }.into()
    })
}

impl Node {
    fn new(ranks: usize, options: SimOptions, given: Option<Arc<Module>>, run: RunOptions) -> Result<Self> {
        for (what, value) in [("SM count", Some(options.sms)), ("residency", options.residency)] {
            if value == Some(0) {
                return Err(Error::Size {
                    what: format!("the {what}"),
                    found: "0".into(),
                    expected: "at least 1".into(),
                });
            }
        }
        let state = State {
            machine: Machine::new(ranks),
            runs: 0,
            queues: (0..ranks).map(|_| VecDeque::new()).collect(),
            last_ticket: 0,
            reports: BTreeMap::new(),
            failures: vec![None; ranks],
            shared: BTreeMap::new(),
            released: vec![false; ranks],
        };
        Ok(Self { options, run, given, modules: Mutex::default(), state: Mutex::new(state), ran: Condvar::new() })
    }

    /// Queues a launch and returns its ticket. Launches run while every rank has one.
    ///
    /// # Errors
    /// An entry that was not prepared.
    fn queue(&self, state: &mut State, launch: &RankLaunch<'_>, reported: bool) -> Result<u64> {
        let module =
            lock(&self.modules).get(launch.entry).cloned().ok_or(Error::NotPrepared { entry: launch.entry })?;
        state.last_ticket += 1;
        state.queues[launch.rank].push_back(Queued {
            ticket: state.last_ticket,
            reported,
            entry: launch.entry,
            module,
            grid: launch.grid,
            cluster: launch.cluster,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            args: (!launch.params.is_empty())
                .then(|| Arg::Bytes(launch.params.to_vec()))
                .into_iter()
                .chain(launch.args.iter().map(|&arg| Arg::U64(arg)))
                .collect(),
        });
        let ticket = state.last_ticket;
        while state.queues.iter().all(|queue| !queue.is_empty()) {
            self.run_first_of_each(state);
        }
        Ok(ticket)
    }

    /// Runs the first launch of every rank that has one, together.
    fn run_first_of_each(&self, state: &mut State) {
        state.runs += 1;
        let options = RunOptions {
            seed: self.options.seed.wrapping_add(state.runs.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            residency: self.options.residency,
            ..self.run.clone()
        };
        let first = state.queues.iter_mut().enumerate().filter_map(|(rank, queue)| Some((rank, queue.pop_front()?)));
        let first: Vec<_> = first.collect();
        let launches: Vec<_> = first
            .iter()
            .map(|(rank, queued)| Launch {
                device: *rank,
                module: &queued.module,
                entry: queued.entry,
                grid: queued.grid,
                cluster: [queued.cluster, 1, 1],
                block: queued.block,
                shared_bytes: queued.shared_bytes,
                args: queued.args.clone(),
            })
            .collect();
        let gone =
            (0..state.released.len()).find(|rank| state.released[*rank] && first.iter().all(|(at, _)| at != rank));
        let result = state.machine.run(&launches, &options).map_err(|error| match gone {
            Some(rank) => Failure::Without(rank),
            None => Failure::Simulator(error),
        });
        for (at, (rank, queued)) in first.iter().enumerate() {
            let outcome = result.as_ref().map(|costs| costs[at]).map_err(Clone::clone);
            if queued.reported {
                state.reports.insert(queued.ticket, outcome);
            } else if let Err(error) = outcome {
                state.failures[*rank] = Some(error);
            }
        }
        self.ran.notify_all();
    }
}

/// What is behind the locks is whole after every statement, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimBackend {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.node.state)
    }

    fn ranks_of_node(&self) -> usize {
        self.others.as_ref().map_or(self.local.end, |others| lock(others).member().ranks)
    }
}

impl Backend for SimBackend {
    fn description(&self) -> String {
        let (ranks, sms) = (self.ranks(), self.node.options.sms);
        let which = if self.others.is_some() { format!("rank {} of ", self.local.start) } else { String::new() };
        format!("{which}{ranks} simulated rank{} of {sms} SMs", if ranks == 1 { "" } else { "s" })
    }

    fn ranks(&self) -> usize {
        self.ranks_of_node()
    }

    fn local_ranks(&self) -> Range<usize> {
        self.local.clone()
    }

    fn exchange(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        match &self.others {
            Some(others) => Ok(lock(others).exchange(blob)?),
            None => Ok(vec![blob.to_vec()]),
        }
    }

    fn share(&self, addresses: &[u64], _name: &'static str) -> Result<Vec<u64>> {
        if self.others.is_none() {
            return Ok(addresses.to_vec());
        }
        self.state().shared.extend(addresses.iter().map(|&address| (address, self.local.start)));
        Ok(self.exchange(bytemuck::cast_slice(addresses))?.concat().chunks_exact(8).map(word).collect())
    }

    fn sms(&self, _rank: usize) -> u32 {
        self.node.options.sms
    }

    fn resident_ctas(&self, _rank: usize) -> u32 {
        let SimOptions { sms, residency, .. } = self.node.options;
        residency.map_or(sms, |residency| residency.min(sms))
    }

    fn alloc(&self, rank: usize, bytes: u64, name: &'static str) -> Result<u64> {
        Ok(self.state().machine.alloc(rank, bytes, name)?)
    }

    fn free(&self, _rank: usize, address: u64) -> Result<()> {
        let mut state = self.state();
        if let Some(rank) = state.shared.remove(&address) {
            state.released[rank] = true;
        }
        Ok(state.machine.free(address)?)
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

    fn prepare(&self, entry: &'static str, ptx: &str, _shared_bytes: u32) -> Result<()> {
        let mut modules = lock(&self.node.modules);
        if !modules.contains_key(entry) {
            let module = match &self.node.given {
                Some(module) => module.clone(),
                None => Arc::new(Module::parse(ptx)?),
            };
            modules.insert(entry, module);
        }
        Ok(())
    }

    fn launch(&self, launches: &[RankLaunch<'_>]) -> Result<Vec<RankReport>> {
        let tickets: Vec<u64> = {
            let mut state = self.state();
            launches.iter().map(|launch| self.node.queue(&mut state, launch, true)).collect::<Result<_>>()?
        };
        let mut state = self.wait_until(|state| tickets.iter().all(|ticket| state.reports.contains_key(ticket)));
        let outcomes: Vec<_> = tickets.iter().filter_map(|ticket| state.reports.remove(ticket)).collect();
        let report = |cost: Cost| RankReport { elapsed: Duration::from_nanos(cost.simulated_ns), cost: Some(cost) };
        outcomes.into_iter().map(|outcome| Ok(report(outcome?))).collect()
    }

    fn traffic(&self, range: Range<u64>) -> Result<Option<Traffic>> {
        Ok(Some(self.state().machine.traffic(range)?))
    }

    unsafe fn enqueue(&self, launch: &RankLaunch<'_>, _stream: *mut c_void) -> Result<()> {
        let mut state = self.state();
        self.node.queue(&mut state, launch, false)?;
        state.failures[launch.rank].take().map_or(Ok(()), |error| Err(error.into()))
    }

    fn create_stream(&self, _rank: usize) -> Result<*mut c_void> {
        Ok(std::ptr::null_mut())
    }

    unsafe fn synchronize(&self, rank: usize, _stream: *mut c_void) -> Result<()> {
        let mut state = self.wait_until(|state| state.queues[rank].is_empty());
        state.failures[rank].take().map_or(Ok(()), |error| Err(error.into()))
    }

    unsafe fn destroy_stream(&self, _rank: usize, _stream: *mut c_void) -> Result<()> {
        Ok(())
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytemuck::pod_read_unaligned(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::group::{Device, DeviceGroup};
    use crate::rendezvous::RendezvousAddress;
    use crate::testing::{Tokens, small_config};
    use crate::weights::ExpertWeights;

    /// Rank 0 launches, waits in vain, and goes; then rank 1 launches.
    #[test]
    fn a_rank_that_launches_late_is_told_that_its_peer_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let address = RendezvousAddress::Unix(folder.path().join("group"));
        let config = small_config();
        let weights = ExpertWeights::random(&config, 5);
        let tokens = Tokens::random(&config, 4, 1);
        let layer = |rank| {
            let group =
                DeviceGroup::join(Device::Sim(SimOptions::default()), rank, 2, &address, Duration::from_secs(3))?;
            let mut moe = crate::testing::layer(&group, &config, &weights)?;
            moe.set_deadline(Duration::from_millis(1));
            Ok::<_, Error>(moe)
        };
        let (gone, wait) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let error = layer(0).unwrap().forward(&[tokens.batch()]).unwrap_err();
                assert!(matches!(error, Error::Deadline { rank: 0, missing: 1, .. }), "{error}");
                gone.send(()).unwrap();
            });
            let mut late = layer(1).unwrap();
            wait.recv().unwrap();
            let error = late.forward(&[tokens.batch()]).unwrap_err().to_string();
            assert!(error.starts_with("rank 0 left the group: it has released its memory"), "{error}");
        });
    }
}
