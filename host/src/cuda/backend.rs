//! [`Backend`] on GPUs: one GPU a rank, all ranks in this process or each in its own.

use super::driver::{Address, Handle, IpcMemHandle, LaunchAttribute, LaunchConfig, TensorMap, call, failure};
use super::error::CudaError;
use super::gpu::{Current, Gpu, Origin, RankGpu};
use crate::backend::{Backend, RankLaunch, RankReport};
use crate::error::Error;
use crate::rendezvous::{Member, Rendezvous};
use cust::event::Event;
use ptx_sim::{TensorMap as CheckedMap, TensorMapSpec};
use std::collections::HashMap;
use std::ffi::{c_uint, c_void};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most arguments of an entry: a launch keeps their addresses on the stack, because it may not allocate.
const MAX_ARGS: usize = 16;

/// GPUs as ranks.
pub(crate) struct CudaBackend {
    /// Of this process.
    ranks: Vec<RankGpu>,
    /// The first of them.
    first: usize,
    /// Number of ranks, those of other processes included.
    total: usize,
    /// The meeting point with the ranks of other processes.
    others: Option<Mutex<Rendezvous>>,
    /// Held by [`Backend::launch`]: ranks that got two launches in different orders would wait for each other.
    launching: Mutex<()>,
    /// What is allocated or imported and not freed yet, by rank and address.
    buffers: Mutex<HashMap<(usize, Address), Buffer>>,
}

#[derive(Clone, Copy)]
struct Buffer {
    name: &'static str,
    origin: Origin,
}

impl CudaBackend {
    /// Opens one rank on every GPU given, and lets every rank access every other's memory.
    pub(crate) fn open(gpus: Vec<Gpu>) -> Result<Self, CudaError> {
        let _current = Current::save()?;
        let ranks: Vec<RankGpu> = gpus.into_iter().map(RankGpu::open).collect::<Result<_, _>>()?;
        for from in &ranks {
            ranks.iter().try_for_each(|to| from.enable_peer(to))?;
        }
        let total = ranks.len();
        Ok(Self::new(ranks, 0, total, None))
    }

    /// Opens this process's one rank of a group whose other ranks are other processes, met at `others`.
    pub(crate) fn open_process(gpu: Gpu, others: Rendezvous) -> Result<Self, CudaError> {
        let _current = Current::save()?;
        let Member { rank, ranks, .. } = others.member();
        Ok(Self::new(vec![RankGpu::open(gpu)?], rank, ranks, Some(Mutex::new(others))))
    }

    fn new(ranks: Vec<RankGpu>, first: usize, total: usize, others: Option<Mutex<Rendezvous>>) -> Self {
        Self { ranks, first, total, others, launching: Mutex::default(), buffers: Mutex::default() }
    }

    fn rank(&self, rank: usize) -> Result<&RankGpu, CudaError> {
        let here = rank.checked_sub(self.first).and_then(|index| self.ranks.get(index));
        here.ok_or_else(|| {
            let local = self.local_ranks();
            CudaError::Invalid(format!("rank {rank} is not of this process, which has ranks {local:?}"))
        })
    }

    fn buffers(&self) -> MutexGuard<'_, HashMap<(usize, Address), Buffer>> {
        lock(&self.buffers)
    }

    fn try_alloc(&self, rank: usize, bytes: u64, name: &'static str) -> Result<Address, CudaError> {
        let _current = self.rank(rank)?.enter()?;
        let mut address = 0;
        // SAFETY: `address` is a place for an address.
        unsafe { call::cuMemAlloc_v2(&mut address, bytes as usize) }
            .map_err(|error| error.doing(|| format!("for the {bytes} bytes of {name} on rank {rank}")))?;
        self.buffers().insert((rank, address), Buffer { name, origin: Origin::Allocated });
        Ok(address)
    }

    /// A handle by which another process can import an allocation.
    fn export(&self, rank: usize, address: Address) -> Result<[u8; 64], CudaError> {
        let _current = self.rank(rank)?.enter()?;
        let mut handle = IpcMemHandle([0; 64]);
        // SAFETY: `handle` is a place for one; the driver checks the address.
        unsafe { call::cuIpcGetMemHandle(&mut handle, address) }
            .map_err(|error| error.doing(|| format!("for {address:#x} on rank {rank}")))?;
        Ok(handle.0)
    }

    /// Maps another process's counterpart of `own` for a rank of this one.
    fn import(&self, rank: usize, handle: [u8; 64], name: &'static str, own: Address) -> Result<Address, CudaError> {
        const LAZY_ENABLE_PEER_ACCESS: c_uint = 1;
        let _current = self.rank(rank)?.enter()?;
        let mut address = 0;
        // SAFETY: `address` is a place for an address; the driver checks the handle.
        unsafe { call::cuIpcOpenMemHandle_v2(&mut address, IpcMemHandle(handle), LAZY_ENABLE_PEER_ACCESS) }
            .map_err(|error| error.doing(|| format!("for another process's {name}, on rank {rank}")))?;
        self.buffers().insert((rank, address), Buffer { name, origin: Origin::Imported { own } });
        Ok(address)
    }

    /// The addresses of all ranks' buffers whose handles these are.
    fn import_all(&self, handles: &[Vec<u8>], own: Address, name: &'static str) -> Result<Vec<Address>, CudaError> {
        let import = |(rank, handle): (usize, &Vec<u8>)| match <[u8; 64]>::try_from(handle.as_slice()) {
            Ok(_) if rank == self.first => Ok(own),
            Ok(handle) => self.import(self.first, handle, name, own),
            Err(_) => Err(CudaError::Invalid(format!("rank {rank} sent no handle of 64 bytes"))),
        };
        handles.iter().enumerate().map(import).collect()
    }

    fn try_free(&self, rank: usize, address: Address) -> Result<(), CudaError> {
        self.rank(rank)?;
        if !self.buffers().contains_key(&(rank, address)) {
            return Err(CudaError::Invalid(format!("{address:#x} on rank {rank} is no buffer to free")));
        }
        // Freeing what another process has mapped is undefined (CUDA Driver API, cuIpcOpenMemHandle).
        if self.unmap_counterparts(address)
            && let Some(others) = &self.others
            && let Err(error) = lock(others).exchange(&[])
        {
            tracing::warn!(%error, "a shared buffer is freed without knowing that all other ranks have unmapped it");
        }
        self.release(rank, address)
    }

    fn release(&self, rank: usize, address: Address) -> Result<(), CudaError> {
        let Some(Buffer { name, origin }) = self.buffers().remove(&(rank, address)) else { return Ok(()) };
        let freed = self.rank(rank)?.free(address, origin);
        freed.map_err(|error| error.doing(|| format!("for {name} on rank {rank}")))
    }

    /// Unmaps the other processes' counterparts of a shared buffer, and says whether there were any.
    fn unmap_counterparts(&self, own: Address) -> bool {
        let is_counterpart = |buffer: &Buffer| matches!(buffer.origin, Origin::Imported { own: of } if of == own);
        let counterparts: Vec<(usize, Address)> =
            self.buffers().iter().filter(|(_, buffer)| is_counterpart(buffer)).map(|(&key, _)| key).collect();
        for &(rank, address) in &counterparts {
            if let Err(error) = self.release(rank, address) {
                tracing::warn!(%error, "another process's buffer could not be unmapped");
            }
        }
        !counterparts.is_empty()
    }

    /// Runs a memory operation with the rank's context current, and returns when it is done on the GPU: `cuMemset` and
    /// short copies return before, and another rank's kernel is not ordered after them.
    fn memory(
        &self,
        rank: usize,
        address: Address,
        operation: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let _current = self.rank(rank)?.enter()?;
        operation()
            // SAFETY: a null handle is the default stream, where memory operations run.
            .and_then(|()| unsafe { call::cuStreamSynchronize(std::ptr::null_mut()) })
            .map_err(|error| error.doing(|| format!("at {address:#x} on rank {rank}")))
    }

    /// Launches one rank on `stream`: no host synchronisation, no allocation, legal while the stream is captured.
    ///
    /// # Safety
    /// `stream` belongs to the rank's GPU, and the arguments are what the entry takes.
    unsafe fn try_enqueue(&self, launch: &RankLaunch<'_>, stream: Handle) -> Result<(), CudaError> {
        let gpu = self.rank(launch.rank)?;
        let function = gpu.function(launch.entry, launch.shared_bytes)?;
        let mut args = [std::ptr::null_mut::<c_void>(); MAX_ARGS];
        let count = launch.args.len() + usize::from(!launch.params.is_empty());
        if count > MAX_ARGS {
            return Err(CudaError::Invalid(format!("{} has {count} arguments, at most {MAX_ARGS}", launch.entry)));
        }
        let params = (!launch.params.is_empty()).then(|| launch.params.as_ptr().cast_mut().cast());
        let others = launch.args.iter().map(|arg| std::ptr::from_ref(arg).cast_mut().cast());
        args.iter_mut().zip(params.into_iter().chain(others)).for_each(|(place, arg)| *place = arg);
        let attribute = cluster_attribute(launch.cluster);
        let config = LaunchConfig {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            stream,
            attributes: &attribute,
            attribute_count: (launch.cluster > 1).into(),
        };
        let _current = gpu.enter()?;
        // SAFETY: the configuration, the arguments and their addresses live to the end of the call, which copies them.
        unsafe { call::cuLaunchKernelEx(&config, function, args.as_mut_ptr(), std::ptr::null_mut()) }
            .map_err(|error| error.doing(|| of(launch)))
    }

    fn start(&self, launch: &RankLaunch<'_>) -> Result<(), CudaError> {
        let gpu = self.rank(launch.rank)?;
        let _current = gpu.enter()?;
        let record =
            |event: &Event| event.record(&gpu.stream).map_err(failure).map_err(|error| error.doing(|| of(launch)));
        record(&gpu.start)?;
        // SAFETY: the stream is the rank's own; the caller of `launch` answers for the arguments.
        unsafe { self.try_enqueue(launch, gpu.stream.as_inner().cast()) }?;
        record(&gpu.stop)
    }

    fn wait(&self, launch: &RankLaunch<'_>) -> Result<(), CudaError> {
        let gpu = self.rank(launch.rank)?;
        let _current = gpu.enter()?;
        gpu.stream.synchronize().map_err(failure).map_err(|error| error.doing(|| of(launch)))
    }

    /// Only of a launch that was started: else the events are those of another.
    fn report(&self, launch: &RankLaunch<'_>) -> Result<RankReport, CudaError> {
        let gpu = self.rank(launch.rank)?;
        let milliseconds = gpu.stop.elapsed_time_f32(&gpu.start).map_err(failure);
        let milliseconds = milliseconds.map_err(|error| error.doing(|| of(launch)))?;
        Ok(RankReport { elapsed: Duration::from_secs_f32(milliseconds.max(0.0) / 1e3), cost: None })
    }
}

/// What is behind the locks is whole after every statement, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn of(launch: &RankLaunch<'_>) -> String {
    format!("for {} on rank {}", launch.entry, launch.rank)
}

impl Backend for CudaBackend {
    fn description(&self) -> String {
        let names: Vec<&str> = self.ranks.iter().map(|rank| rank.gpu.name.as_str()).collect();
        match names.as_slice() {
            [name] if self.total > 1 => format!("rank {} of {}, {name}", self.first, self.total),
            [first, ..] if names.iter().all(|name| name == first) => format!("{} x {first}", names.len()),
            _ => names.join(", "),
        }
    }

    fn ranks(&self) -> usize {
        self.total
    }

    fn local_ranks(&self) -> Range<usize> {
        self.first..self.first + self.ranks.len()
    }

    fn exchange(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        match &self.others {
            Some(others) => Ok(lock(others).exchange(blob)?),
            None => Ok(vec![blob.to_vec()]),
        }
    }

    fn share(&self, addresses: &[u64], name: &'static str) -> Result<Vec<u64>, Error> {
        let (Some(others), &[own]) = (&self.others, addresses) else { return Ok(addresses.to_vec()) };
        let mut others = lock(others);
        let handles = others.exchange(&self.export(self.first, own)?)?;
        let imported = self.import_all(&handles, own, name);
        // Nobody goes on, or frees, before all have mapped, and unmapped if one could not.
        let mapped = others.exchange(&[imported.is_ok().into()])?;
        let Some(failed) = mapped.iter().position(|mapped| mapped != &[1]) else { return Ok(imported?) };
        self.unmap_counterparts(own);
        others.exchange(&[])?;
        imported?;
        Err(CudaError::Invalid(format!("rank {failed} could not map the other ranks' {name}")).into())
    }

    fn sms(&self, rank: usize) -> u32 {
        self.rank(rank).map_or(0, |gpu| gpu.gpu.sms)
    }

    fn alloc(&self, rank: usize, bytes: u64, name: &'static str) -> Result<u64, Error> {
        Ok(self.try_alloc(rank, bytes, name)?)
    }

    fn free(&self, rank: usize, address: u64) -> Result<(), Error> {
        Ok(self.try_free(rank, address)?)
    }

    fn write(&self, rank: usize, address: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: `bytes` is readable for its length; the driver checks the device side.
        let copy = || unsafe { call::cuMemcpyHtoD_v2(address, bytes.as_ptr().cast(), bytes.len()) };
        Ok(self.memory(rank, address, copy)?)
    }

    fn read(&self, rank: usize, address: u64, bytes: &mut [u8]) -> Result<(), Error> {
        // SAFETY: `bytes` is writable for its length; the driver checks the device side.
        let copy = || unsafe { call::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), address, bytes.len()) };
        Ok(self.memory(rank, address, copy)?)
    }

    fn fill(&self, rank: usize, address: u64, bytes: u64, value: u8) -> Result<(), Error> {
        // SAFETY: the driver checks the range.
        Ok(self.memory(rank, address, || unsafe { call::cuMemsetD8_v2(address, value, bytes as usize) })?)
    }

    fn encode_tensor_map(&self, spec: &TensorMapSpec) -> Result<[u8; 128], Error> {
        let _current = self.rank(self.first)?.enter()?;
        Ok(encode(spec)?)
    }

    fn prepare(&self, entry: &'static str, ptx: &str, shared_bytes: u32) -> Result<(), Error> {
        self.ranks.iter().try_for_each(|rank| rank.prepare(entry, ptx, shared_bytes))?;
        Ok(())
    }

    fn launch(&self, launches: &[RankLaunch<'_>]) -> Result<Vec<RankReport>, Error> {
        let _launching = lock(&self.launching);
        let started: Vec<_> = launches.iter().map(|launch| self.start(launch)).collect();
        // Also after a failure: a rank that runs still uses its buffers (until the deadline for the one that does not).
        let waited: Vec<_> = launches.iter().map(|launch| self.wait(launch)).collect();
        started.into_iter().chain(waited).collect::<Result<Vec<()>, _>>()?;
        Ok(launches.iter().map(|launch| self.report(launch)).collect::<Result<_, _>>()?)
    }

    unsafe fn enqueue(&self, launch: &RankLaunch<'_>, stream: *mut c_void) -> Result<(), Error> {
        // SAFETY: the caller keeps the same contract.
        Ok(unsafe { self.try_enqueue(launch, stream) }?)
    }

    fn create_stream(&self, rank: usize) -> Result<*mut c_void, Error> {
        const NON_BLOCKING: c_uint = 1;
        let _current = self.rank(rank)?.enter()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is a place for a stream.
        unsafe { call::cuStreamCreateWithPriority(&mut stream, NON_BLOCKING, 0) }
            .map_err(|error| error.doing(|| format!("on rank {rank}")))?;
        Ok(stream)
    }

    unsafe fn synchronize(&self, rank: usize, stream: *mut c_void) -> Result<(), Error> {
        let _current = self.rank(rank)?.enter()?;
        // SAFETY: the caller's.
        Ok(unsafe { call::cuStreamSynchronize(stream) }.map_err(|error| error.doing(|| format!("on rank {rank}")))?)
    }

    unsafe fn destroy_stream(&self, rank: usize, stream: *mut c_void) -> Result<(), Error> {
        // When the context cannot be made current, the driver is asked all the same.
        let current = self.rank(rank)?.enter();
        // SAFETY: the caller's.
        let destroyed = unsafe { call::cuStreamDestroy_v2(stream) };
        Ok(current.and(destroyed).map_err(|error| error.doing(|| format!("on rank {rank}")))?)
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        let current = Current::save();
        if let Err(error) = &current {
            tracing::warn!(%error, "the thread's CUDA context will not be restored");
        }
        let mut left: Vec<(usize, Address)> = self.buffers().keys().copied().collect();
        left.sort_unstable();
        for (rank, address) in left {
            if let Err(error) = self.release(rank, address) {
                tracing::warn!(%error, "a buffer could not be freed");
            }
        }
        self.ranks.clear();
    }
}

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`: clusters of so many CTAs along x.
fn cluster_attribute(ctas: u32) -> LaunchAttribute {
    const CLUSTER_DIMENSION: c_uint = 4;
    let mut value: [c_uint; 16] = [0; 16];
    value[..3].copy_from_slice(&[ctas, 1, 1]);
    LaunchAttribute { id: CLUSTER_DIMENSION, padding: 0, value }
}

/// `cuTensorMapEncodeTiled`; the specification's enumerations are numbered as `cuda.h`'s.
fn encode(spec: &TensorMapSpec) -> Result<[u8; 128], CudaError> {
    const NO_INTERLEAVE: c_uint = 0;
    const PROMOTE_TO_256_BYTES: c_uint = 3;
    // The driver would say "invalid argument"; this says which.
    CheckedMap::new(spec).map_err(|error| CudaError::Invalid(format!("tensor map: {error}")))?;
    let mut map = TensorMap([0; 128]);
    // SAFETY: every list has the length that the number of dimensions promises, and the map is aligned.
    unsafe {
        call::cuTensorMapEncodeTiled(
            &mut map,
            spec.data_type as c_uint,
            spec.dims.len() as c_uint,
            spec.global_address,
            spec.dims.as_ptr(),
            spec.strides.as_ptr(),
            spec.box_dims.as_ptr(),
            spec.element_strides.as_ptr(),
            NO_INTERLEAVE,
            spec.swizzle as c_uint,
            PROMOTE_TO_256_BYTES,
            spec.fill as c_uint,
        )
    }
    .map_err(|error| error.doing(|| format!("for {spec:?}")))?;
    Ok(map.0)
}
