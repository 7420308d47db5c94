//! What a layer needs from the machine it runs on: GPUs or simulated ranks. Addresses are device addresses, which every
//! rank can use: all ranks' memories are mapped into one address space.

use crate::error::Error;
use ptx_sim::TensorMapSpec;
use std::ffi::c_void;
use std::ops::Range;
use std::time::Duration;

/// Where a layer's kernels run.
pub(crate) trait Backend: Send + Sync {
    /// What runs here, for people: `2 x NVIDIA H200`.
    fn description(&self) -> String;

    /// Number of ranks.
    fn ranks(&self) -> usize;

    /// The ranks that run in this process; all, unless every rank is a process. Only these can be given to the other
    /// functions.
    fn local_ranks(&self) -> Range<usize> {
        0..self.ranks()
    }

    /// Gives every process's blob to every process, in rank order. With several processes all call this together, with
    /// blobs of one size, and none returns before all have called.
    fn exchange(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![blob.to_vec()])
    }

    /// Given the addresses of the local ranks' buffers, in rank order: those of all ranks' buffers, as the local ranks
    /// see them. With several processes all call this together, and the buffers stay mapped as long as the backend lives.
    fn share(&self, addresses: &[u64], _name: &'static str) -> Result<Vec<u64>, Error> {
        Ok(addresses.to_vec())
    }

    /// Streaming multiprocessors of a rank.
    fn sms(&self, rank: usize) -> u32;

    /// CTAs of a launch that surely run at once on a rank.
    fn resident_ctas(&self, rank: usize) -> u32 {
        self.sms(rank)
    }

    /// Allocates `bytes` (at least 1) on a rank, aligned to 256 bytes, contents undefined. `name` appears in errors.
    fn alloc(&self, rank: usize, bytes: u64, name: &'static str) -> Result<u64, Error>;

    /// Frees what [`Backend::alloc`] returned.
    fn free(&self, rank: usize, address: u64) -> Result<(), Error>;

    /// Copies `bytes` to a rank's memory and returns when they are there.
    fn write(&self, rank: usize, address: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Copies from a rank's memory.
    fn read(&self, rank: usize, address: u64, bytes: &mut [u8]) -> Result<(), Error>;

    /// Sets `bytes` bytes of a rank's memory to `value`.
    fn fill(&self, rank: usize, address: u64, bytes: u64, value: u8) -> Result<(), Error>;

    /// The 128-byte tensor map that `cp.async.bulk.tensor` takes on this backend.
    fn encode_tensor_map(&self, spec: &TensorMapSpec) -> Result<[u8; 128], Error>;

    /// Readies `entry` of the module `ptx` on every rank for launches with up to `shared_bytes` of dynamic shared memory. Every entry is
    /// prepared before it is launched; a module is loaded when its first entry is.
    fn prepare(&self, entry: &'static str, ptx: &str, shared_bytes: u32) -> Result<(), Error>;

    /// Launches on all ranks named without waiting in between, then waits for all; reports in launch order.
    fn launch(&self, launches: &[RankLaunch<'_>]) -> Result<Vec<RankReport>, Error>;

    /// What the last launches moved to and from a part of one buffer of any rank; `None` on a GPU.
    fn traffic(&self, _range: Range<u64>) -> Result<Option<ptx_sim::Traffic>, Error> {
        Ok(None)
    }

    /// Queues one rank's launch on a `CUstream` and returns: no host synchronisation, no allocation, legal while the
    /// stream is captured. The simulator has no streams: it runs when the last rank is queued.
    ///
    /// # Safety
    /// On a GPU, `stream` is a stream of the rank's device, the arguments are what the entry takes, and the memory they
    /// name stays allocated until the launch is done.
    unsafe fn enqueue(&self, launch: &RankLaunch<'_>, stream: *mut c_void) -> Result<(), Error>;

    /// A new `CUstream` on a rank's GPU; null in the simulator.
    fn create_stream(&self, rank: usize) -> Result<*mut c_void, Error>;

    /// Waits for everything queued on a rank's stream.
    ///
    /// # Safety
    /// On a GPU, `stream` is a stream of the rank's device.
    unsafe fn synchronize(&self, rank: usize, stream: *mut c_void) -> Result<(), Error>;

    /// Destroys what [`Backend::create_stream`] returned.
    ///
    /// # Safety
    /// It is not used again.
    unsafe fn destroy_stream(&self, rank: usize, stream: *mut c_void) -> Result<(), Error>;
}

/// One rank's launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RankLaunch<'a> {
    /// The rank.
    pub(crate) rank: usize,
    /// Name of the kernel in the PTX.
    pub(crate) entry: &'static str,
    /// CTAs.
    pub(crate) grid: [u32; 3],
    /// CTAs of a cluster, by which those along x can be divided.
    pub(crate) cluster: u32,
    /// Threads of a CTA.
    pub(crate) block: [u32; 3],
    /// Dynamic shared memory of a CTA in bytes.
    pub(crate) shared_bytes: u32,
    /// The entry's first argument if that is a structure, passed by value; else empty.
    pub(crate) params: &'a [u8],
    /// The entry's other arguments, each a `.u64`.
    pub(crate) args: &'a [u64],
}

/// What one rank's launch took.
#[derive(Debug, Clone)]
pub(crate) struct RankReport {
    /// Time on the GPU between the events around the launch, or simulated time.
    pub(crate) elapsed: Duration,
    /// The simulator's counters; `None` on a GPU.
    pub(crate) cost: Option<ptx_sim::Cost>,
}
