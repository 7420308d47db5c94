//! What the fake driver knows: its GPUs, its calls so far, and everything that is alive.

use ptx_sim::{Arg, Launch, Machine, Module, RunOptions, SimError};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::ThreadId;

/// `CUresult` values that the fake gives.
pub(crate) mod code {
    pub(crate) const INVALID_VALUE: u32 = 1;
    pub(crate) const OUT_OF_MEMORY: u32 = 2;
    pub(crate) const NOT_INITIALIZED: u32 = 3;
    pub(crate) const INVALID_DEVICE: u32 = 101;
    pub(crate) const INVALID_CONTEXT: u32 = 201;
    pub(crate) const PEER_ACCESS_UNSUPPORTED: u32 = 217;
    pub(crate) const INVALID_PTX: u32 = 218;
    pub(crate) const INVALID_HANDLE: u32 = 400;
    pub(crate) const NOT_FOUND: u32 = 500;
    pub(crate) const PEER_ACCESS_ALREADY_ENABLED: u32 = 704;
    pub(crate) const NO_DEVICE: u32 = 100;
    pub(crate) const LAUNCH_FAILED: u32 = 719;
    pub(crate) const CAPTURE_UNSUPPORTED: u32 = 900;
}

/// Multiprocessors of one fake GPU: few, because kernels run on the CPU.
pub(crate) const SMS: i32 = 6;
/// Memory of one fake GPU.
const GPU_BYTES: usize = 1 << 30;

/// Something that a handle names.
pub(crate) enum Object {
    Module { gpu: i32, module: Arc<Module>, entries: BTreeMap<String, Vec<usize>> },
    Function { gpu: i32, module: Arc<Module>, entry: String, args: Vec<usize>, shared_bytes: u32 },
    Stream { gpu: i32, capture: Option<Capture> },
    Event { gpu: i32, recorded: bool },
    Graph { launches: Vec<Queued> },
    GraphExec { launches: Vec<Queued> },
    Memory { gpu: i32, bytes: usize },
    IpcMapping,
}

/// What a stream captures instead of running it.
pub(crate) struct Capture {
    /// The one thread that may not make unsafe calls meanwhile; none forbids all threads.
    pub(crate) thread: Option<ThreadId>,
    pub(crate) launches: Vec<Queued>,
}

/// A launch that has not run yet.
#[derive(Clone)]
pub(crate) struct Queued {
    pub(crate) stream: u64,
    pub(crate) gpu: i32,
    pub(crate) module: Arc<Module>,
    pub(crate) entry: String,
    pub(crate) grid: [u32; 3],
    /// CTAs of a cluster.
    pub(crate) cluster: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
    /// The bytes of each argument.
    pub(crate) args: Vec<Vec<u8>>,
}

impl Queued {
    pub(crate) fn describe(&self) -> String {
        let Self { gpu, entry, grid, block, shared_bytes, .. } = self;
        let args: Vec<_> =
            self.args.iter().filter_map(|arg| Some(u64::from_le_bytes(arg[..].try_into().ok()?))).collect();
        format!("gpu={gpu} {entry} grid={grid:?} block={block:?} shared={shared_bytes} args={args:?}")
    }
}

impl Object {
    fn kind(&self) -> Option<&'static str> {
        match self {
            // Belongs to its module and is never released.
            Object::Function { .. } => None,
            Object::Module { .. } => Some("module"),
            Object::Stream { .. } => Some("stream"),
            Object::Event { .. } => Some("event"),
            Object::Graph { .. } => Some("graph"),
            Object::GraphExec { .. } => Some("executable graph"),
            Object::Memory { .. } => Some("allocation"),
            Object::IpcMapping => Some("IPC mapping"),
        }
    }
}

pub(crate) struct Fake {
    pub(crate) gpus: i32,
    pub(crate) capability: (i32, i32),
    pub(crate) initialised: bool,
    /// Names of all calls, each with what its function noted.
    pub(crate) calls: Vec<String>,
    pub(crate) fail: Option<(usize, u32)>,
    /// Name of the last call that failed because it was told to.
    pub(crate) failed: Option<&'static str>,
    pub(crate) objects: BTreeMap<u64, Object>,
    /// How often each GPU's primary context is retained.
    pub(crate) retained: BTreeMap<i32, u32>,
    pub(crate) no_peer: BTreeSet<(i32, i32)>,
    pub(crate) peers: BTreeSet<(i32, i32)>,
    queue: VecDeque<Queued>,
    machine: Machine,
    next: u64,
}

static FAKE: Mutex<Option<Fake>> = Mutex::new(None);

thread_local! {
    /// The GPU whose primary context is current.
    pub(crate) static CURRENT: Cell<Option<i32>> = const { Cell::new(None) };
    /// How many more calls of this thread come before the one that fails, and with what.
    pub(crate) static FAIL_OWN: Cell<Option<(u64, u32)>> = const { Cell::new(None) };
}

/// The state behind its lock.
pub(crate) struct Locked(MutexGuard<'static, Option<Fake>>);

impl std::ops::Deref for Locked {
    type Target = Fake;
    fn deref(&self) -> &Fake {
        self.0.as_ref().expect("filled by lock()")
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut Fake {
        self.0.as_mut().expect("filled by lock()")
    }
}

pub(crate) fn lock() -> Locked {
    let mut guard = FAKE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    guard.get_or_insert_with(|| Fake::new(2, 9));
    Locked(guard)
}

/// Runs one driver call: writes it down, fails it if told to, else does `body`. A call that releases something releases
/// it even when it is failed, as a driver does that reports an earlier error.
pub(crate) fn run(name: &'static str, body: impl FnOnce(&mut Fake) -> Result<(), u32>) -> u32 {
    let releases = ["Destroy", "Free", "Release", "Unload", "Close"].iter().any(|word| name.contains(word));
    let mut fake = lock();
    let index = fake.calls.len();
    fake.calls.push(name.to_owned());
    let own = match FAIL_OWN.take() {
        Some((0, code)) => Some(code),
        other => {
            FAIL_OWN.set(other.map(|(before, code)| (before - 1, code)));
            None
        }
    };
    let failed = own.or(fake.fail.filter(|&(at, _)| at == index).map(|(_, code)| code));
    if failed.is_some() {
        fake.failed = Some(name);
    }
    if let (Some(code), false) = (failed, releases) {
        return code;
    }
    let result = match fake.initialised || name == "cuInit" || name == "cuDriverGetVersion" {
        true => body(&mut fake),
        false => Err(code::NOT_INITIALIZED),
    };
    failed.unwrap_or(result.err().unwrap_or(0))
}

/// Shows what the simulator found, which a `CUresult` cannot.
fn report(error: SimError) -> u32 {
    eprintln!("fake CUDA driver: {error}");
    code::LAUNCH_FAILED
}

impl Fake {
    /// A machine with `gpus` GPUs of compute capability `major`.0, on which nothing was called yet.
    pub(crate) fn new(gpus: i32, major: i32) -> Self {
        Self {
            gpus,
            capability: (major, 0),
            initialised: false,
            calls: Vec::new(),
            fail: None,
            failed: None,
            objects: BTreeMap::new(),
            retained: BTreeMap::new(),
            no_peer: BTreeSet::new(),
            peers: BTreeSet::new(),
            queue: VecDeque::new(),
            machine: Machine::new(gpus.max(1) as usize),
            next: 0,
        }
    }

    /// Adds details to the call being written down.
    pub(crate) fn note(&mut self, details: &str) {
        if let Some(call) = self.calls.last_mut() {
            call.push(' ');
            call.push_str(details);
        }
    }

    pub(crate) fn device(&self, device: i32) -> Result<i32, u32> {
        if (0..self.gpus).contains(&device) { Ok(device) } else { Err(code::INVALID_DEVICE) }
    }

    /// The GPU of the current context.
    pub(crate) fn current(&self) -> Result<i32, u32> {
        let gpu = CURRENT.get().ok_or(code::INVALID_CONTEXT)?;
        if self.retained.get(&gpu).is_some_and(|&count| count > 0) { Ok(gpu) } else { Err(code::INVALID_CONTEXT) }
    }

    /// A new handle; small numbers, so that a handle dereferenced by mistake faults.
    pub(crate) fn add(&mut self, object: Object) -> u64 {
        self.next += 16;
        self.objects.insert(self.next, object);
        self.next
    }

    pub(crate) fn alloc(&mut self, gpu: i32, bytes: usize) -> Result<u64, u32> {
        let on_gpu = |object: &Object| match object {
            Object::Memory { gpu: on, bytes } if *on == gpu => *bytes,
            _ => 0,
        };
        let used: usize = self.objects.values().map(on_gpu).sum();
        match bytes {
            0 => return Err(code::INVALID_VALUE),
            _ if used + bytes > GPU_BYTES => return Err(code::OUT_OF_MEMORY),
            _ => {}
        }
        let address = self.machine.alloc(gpu as usize, bytes as u64, "cuMemAlloc").map_err(report)?;
        self.objects.insert(address, Object::Memory { gpu, bytes });
        Ok(address)
    }

    pub(crate) fn free(&mut self, address: u64) -> Result<(), u32> {
        let drained = self.drain();
        match self.objects.get(&address) {
            Some(Object::Memory { .. }) => self.objects.remove(&address),
            _ => return Err(code::INVALID_VALUE),
        };
        self.machine.free(address).map_err(report)?;
        drained
    }

    /// A memory operation, after everything queued.
    pub(crate) fn memory(&mut self, operation: impl FnOnce(&mut Machine) -> Result<(), SimError>) -> Result<(), u32> {
        self.drain()?;
        operation(&mut self.machine).map_err(report)
    }

    /// Queues a launch, or adds it to what its stream captures.
    pub(crate) fn queue(&mut self, launch: Queued) {
        match self.objects.get_mut(&launch.stream) {
            Some(Object::Stream { capture: Some(capture), .. }) => capture.launches.push(launch),
            _ => self.queue.push_back(launch),
        }
    }

    /// Runs what is queued: streams side by side, the launches of one stream one after the other.
    pub(crate) fn drain(&mut self) -> Result<(), u32> {
        while !self.queue.is_empty() {
            let mut streams = BTreeSet::new();
            let (together, later): (VecDeque<_>, _) =
                self.queue.drain(..).partition(|launch| streams.insert(launch.stream));
            self.queue = later;
            let launches: Vec<Launch> = together
                .iter()
                .map(|launch| Launch {
                    device: launch.gpu as usize,
                    module: &launch.module,
                    entry: &launch.entry,
                    grid: launch.grid,
                    cluster: launch.cluster,
                    block: launch.block,
                    shared_bytes: launch.shared_bytes,
                    args: launch.args.iter().cloned().map(Arg::Bytes).collect(),
                })
                .collect();
            self.machine.run(&launches, &RunOptions::default()).map_err(report)?;
        }
        Ok(())
    }

    /// What is alive, one item a line.
    pub(crate) fn live(&self) -> String {
        let contexts = self.retained.iter().filter(|&(_, &count)| count > 0);
        let contexts = contexts.map(|(gpu, count)| format!("context of GPU {gpu}, retained {count} times\n"));
        let objects = self
            .objects
            .iter()
            .filter_map(|(handle, object)| object.kind().map(|kind| format!("{kind} {handle:#x}\n")));
        contexts.chain(objects).collect()
    }
}
