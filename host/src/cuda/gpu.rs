//! Which GPUs there are, and what one rank holds of its GPU: context, stream, events and module.

use super::driver::{self, Address, Handle, call};
use super::error::CudaError;
use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::event::{Event, EventFlags};
use cust::stream::{Stream, StreamFlags};
use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::sync::Mutex;

/// A GPU as the driver lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// CUDA ordinal (after `CUDA_VISIBLE_DEVICES`).
    pub ordinal: u32,
    /// Name, e.g. `NVIDIA H200`.
    pub name: String,
    /// Compute capability, e.g. (9, 0).
    pub capability: (i32, i32),
    /// Streaming multiprocessors for one rank.
    pub sms: u32,
}

/// A GPU for each of `ranks` ranks, all with compute capability 9.0, the only one whose tensor-core instructions (wgmma)
/// the kernel has.
///
/// # Errors
/// [`CudaError::NoDriver`] without a driver, [`CudaError::TooFewGpus`] when there are not enough of them, and
/// [`CudaError::Call`] when the driver fails.
pub fn find_gpus(ranks: usize) -> Result<Vec<Gpu>, CudaError> {
    choose(list_gpus()?, ranks, false)
}

/// As [`find_gpus`], but ranks share GPUs when there are fewer: for trying several ranks on a machine with one GPU. Each
/// rank gets its part of the multiprocessors, so that the kernels of all are resident together.
///
/// # Errors
/// As [`find_gpus`]; one GPU is enough.
pub fn share_gpu(ranks: usize) -> Result<Vec<Gpu>, CudaError> {
    choose(list_gpus()?, ranks, true)
}

/// The GPU of rank `rank`, one of `ranks` processes: of its number, or the only one where `CUDA_VISIBLE_DEVICES` gives each
/// process its own.
pub(crate) fn gpu_of(rank: usize, ranks: usize, share: bool) -> Result<Gpu, CudaError> {
    let all = list_gpus()?;
    if all.len() == 1 && std::env::var_os("CUDA_VISIBLE_DEVICES").is_some() && !share {
        return Ok(choose(all, 1, false)?.swap_remove(0));
    }
    Ok(choose(all, ranks, share)?.swap_remove(rank))
}

fn choose(all: Vec<Gpu>, ranks: usize, share: bool) -> Result<Vec<Gpu>, CudaError> {
    let found = all.iter().map(|gpu| format!("{} ({}.{})", gpu.name, gpu.capability.0, gpu.capability.1)).collect();
    let mut hopper: Vec<Gpu> = all.into_iter().filter(|gpu| gpu.capability == (9, 0)).take(ranks).collect();
    let enough = if share { 1 } else { ranks };
    if hopper.len() < enough {
        return Err(CudaError::TooFewGpus { ranks, found });
    }
    let ranks_per_gpu = ranks.div_ceil(hopper.len().max(1)).max(1);
    hopper.iter_mut().for_each(|gpu| gpu.sms = (gpu.sms / ranks_per_gpu as u32).max(1));
    Ok(hopper.into_iter().cycle().take(ranks).collect())
}

fn list_gpus() -> Result<Vec<Gpu>, CudaError> {
    driver::load(None)?;
    match cust::init(cust::CudaFlags::empty()).map_err(driver::failure) {
        // A driver without a GPU.
        Err(CudaError::Call { code: driver::code::NO_DEVICE, .. }) => return Ok(Vec::new()),
        other => other?,
    }
    let count = Device::num_devices().map_err(driver::failure)?;
    (0..count).map(|ordinal| describe(ordinal).map_err(driver::failure)).collect()
}

fn describe(ordinal: u32) -> cust::error::CudaResult<Gpu> {
    let device = Device::get_device(ordinal)?;
    let attribute = |attribute| device.get_attribute(attribute);
    Ok(Gpu {
        ordinal,
        name: device.name()?,
        capability: (
            attribute(DeviceAttribute::ComputeCapabilityMajor)?,
            attribute(DeviceAttribute::ComputeCapabilityMinor)?,
        ),
        sms: attribute(DeviceAttribute::MultiprocessorCount)? as u32,
    })
}

/// Where a buffer came from, and so how it is freed.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    /// From this process.
    Allocated,
    /// From another process, as the counterpart of this process's `own`.
    Imported {
        /// An allocation of this process.
        own: Address,
    },
}

/// What a rank holds of its GPU. Released in the order of the fields, the context last.
pub(super) struct RankGpu {
    pub(super) gpu: Gpu,
    functions: Mutex<HashMap<&'static str, Function>>,
    pub(super) start: Event,
    pub(super) stop: Event,
    pub(super) stream: Stream,
    modules: Mutex<Vec<Module>>,
    context: Context,
}

#[derive(Clone, Copy)]
struct Function {
    handle: Handle,
    shared_bytes: u32,
}

// SAFETY: a CUfunction belongs to its module, not to a thread.
unsafe impl Send for Function {}

impl RankGpu {
    /// Retains the GPU's primary context, and leaves it current.
    pub(super) fn open(gpu: Gpu) -> Result<Self, CudaError> {
        let device = Device::get_device(gpu.ordinal).map_err(driver::failure)?;
        let context = Context::new(device).map_err(driver::failure)?;
        // `Context::new` makes it current too, but drops the error.
        CurrentContext::set_current(&context).map_err(driver::failure)?;
        let stream = Stream::new(StreamFlags::DEFAULT, None).map_err(driver::failure)?;
        let start = Event::new(EventFlags::DEFAULT).map_err(driver::failure)?;
        let stop = Event::new(EventFlags::DEFAULT).map_err(driver::failure)?;
        Ok(Self { gpu, functions: Mutex::default(), start, stop, stream, modules: Mutex::default(), context })
    }

    /// Makes the context current until the guard is dropped.
    pub(super) fn enter(&self) -> Result<Current, CudaError> {
        Current::enter(&self.context)
    }

    /// Frees memory of this GPU. When its context cannot be made current, the driver is asked all the same.
    pub(super) fn free(&self, address: Address, origin: Origin) -> Result<(), CudaError> {
        let current = self.enter();
        let freed = match origin {
            // SAFETY: the caller frees what it allocated here, once.
            Origin::Allocated => unsafe { call::cuMemFree_v2(address) },
            // SAFETY: the caller frees what it imported here, once.
            Origin::Imported { .. } => unsafe { call::cuIpcCloseMemHandle(address) },
        };
        current.and(freed)
    }

    /// Lets this GPU's kernels access `peer`'s memory.
    pub(super) fn enable_peer(&self, peer: &RankGpu) -> Result<(), CudaError> {
        if self.gpu.ordinal == peer.gpu.ordinal {
            return Ok(());
        }
        let mut can = 0;
        // SAFETY: `can` is a place for an int; the ordinals are the driver's.
        unsafe { call::cuDeviceCanAccessPeer(&mut can, self.gpu.ordinal as i32, peer.gpu.ordinal as i32) }?;
        if can == 0 {
            return Err(CudaError::NoPeerAccess {
                from: self.gpu.ordinal,
                from_name: self.gpu.name.clone(),
                to: peer.gpu.ordinal,
                to_name: peer.gpu.name.clone(),
            });
        }
        let _current = self.enter()?;
        // SAFETY: the peer's context is retained by `peer`.
        match unsafe { call::cuCtxEnablePeerAccess(peer.context.as_raw().cast(), 0) } {
            // The context is shared: other ranks on this GPU, or the rest of the process, may have done it.
            Err(CudaError::Call { code: driver::code::PEER_ACCESS_ALREADY_ENABLED, .. }) => Ok(()),
            other => other,
        }
    }

    /// Looks `entry` up in `ptx`, which is loaded for its first one, and allows it `shared_bytes` of dynamic shared memory.
    pub(super) fn prepare(&self, entry: &'static str, ptx: &str, shared_bytes: u32) -> Result<(), CudaError> {
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_uint = 8;
        let mut functions = self.functions.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let known = functions.get(entry).copied();
        if known.is_some_and(|function| function.shared_bytes >= shared_bytes) {
            return Ok(());
        }
        let _current = self.enter()?;
        let handle = match known {
            Some(function) => function.handle,
            None => {
                let module = Module::load(ptx, &self.gpu)?;
                let handle = module.function(entry)?;
                self.modules.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(module);
                handle
            }
        };
        // SAFETY: the function belongs to one of this rank's modules.
        unsafe { call::cuFuncSetAttribute(handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes as i32) }
            .map_err(|error| error.doing(|| format!("allowing {entry} {shared_bytes} bytes of shared memory")))?;
        functions.insert(entry, Function { handle, shared_bytes });
        Ok(())
    }

    /// The function of a prepared entry.
    pub(super) fn function(&self, entry: &str, shared_bytes: u32) -> Result<Handle, CudaError> {
        let functions = self.functions.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match functions.get(entry) {
            Some(function) if function.shared_bytes >= shared_bytes => Ok(function.handle),
            Some(function) => Err(CudaError::Invalid(format!(
                "{entry} was prepared for {} bytes of shared memory, not {shared_bytes}",
                function.shared_bytes
            ))),
            None => Err(CudaError::Invalid(format!("{entry} was not prepared before its launch"))),
        }
    }
}

impl Drop for RankGpu {
    fn drop(&mut self) {
        // The fields are released after this, and want their context current.
        if let Err(error) = CurrentContext::set_current(&self.context).map_err(driver::failure) {
            tracing::warn!(%error, gpu = self.gpu.ordinal, "the context could not be made current for its release");
        }
    }
}

/// Restores the thread's current context when dropped: the thread may be another library's.
pub(super) struct Current(Handle);

impl Current {
    /// Only remembers the current context.
    pub(super) fn save() -> Result<Self, CudaError> {
        let mut previous = std::ptr::null_mut();
        // SAFETY: `previous` is a place for a context.
        unsafe { call::cuCtxGetCurrent(&mut previous) }?;
        Ok(Self(previous))
    }

    fn enter(context: &Context) -> Result<Self, CudaError> {
        let saved = Self::save()?;
        CurrentContext::set_current(context).map_err(driver::failure)?;
        Ok(saved)
    }
}

impl Current {
    /// Makes a stream's context current.
    ///
    /// # Safety
    /// `stream` is a stream.
    pub(super) unsafe fn enter_stream(stream: Handle) -> Result<Self, CudaError> {
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is a place for a context, and the stream is the caller's.
        unsafe { call::cuStreamGetCtx(stream, &mut context) }?;
        let saved = Self::save()?;
        // SAFETY: a context that a stream belongs to is alive.
        unsafe { call::cuCtxSetCurrent(context) }?;
        Ok(saved)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // SAFETY: it was current before.
        if let Err(error) = unsafe { call::cuCtxSetCurrent(self.0) } {
            tracing::warn!(%error, "the thread's CUDA context could not be restored");
        }
    }
}

/// A loaded module. `cust`'s own keeps no log of what the driver's PTX compiler says.
struct Module(Handle);

// SAFETY: a CUmodule belongs to its context, not to a thread.
unsafe impl Send for Module {}
// SAFETY: the driver's functions on a module may be called from any thread.
unsafe impl Sync for Module {}

impl Module {
    fn load(ptx: &str, gpu: &Gpu) -> Result<Self, CudaError> {
        const ERROR_LOG_BUFFER: c_uint = 5;
        const ERROR_LOG_BUFFER_SIZE_BYTES: c_uint = 6;
        let ptx = CString::new(ptx)
            .map_err(|error| CudaError::Invalid(format!("the PTX has a NUL byte at {}", error.nul_position())))?;
        let mut log = vec![0u8; 16 << 10];
        let names = [ERROR_LOG_BUFFER, ERROR_LOG_BUFFER_SIZE_BYTES];
        // A JIT option's value is passed in place of a pointer when it fits there.
        let values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
        let mut module = std::ptr::null_mut();
        // SAFETY: the PTX is NUL-terminated, and the log as long as said.
        unsafe { call::cuModuleLoadDataEx(&mut module, ptx.as_ptr().cast(), 2, names.as_ptr(), values.as_ptr()) }
            .map_err(|source| CudaError::Ptx {
                gpu: gpu.ordinal,
                name: gpu.name.clone(),
                log: text_before_nul(&log),
                source: Box::new(source),
            })?;
        Ok(Self(module))
    }

    fn function(&self, entry: &str) -> Result<Handle, CudaError> {
        let name = CString::new(entry).map_err(|_| CudaError::Invalid(format!("{entry:?} is no PTX name")))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded and the name NUL-terminated.
        unsafe { call::cuModuleGetFunction(&mut function, self.0, name.as_ptr()) }
            .map_err(|error| error.doing(|| format!("looking for {entry} in the PTX")))?;
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once.
        if let Err(error) = unsafe { call::cuModuleUnload(self.0) } {
            tracing::warn!(%error, "a module could not be unloaded");
        }
    }
}

fn text_before_nul(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or(&[]);
    String::from_utf8_lossy(text).trim_end().to_owned()
}
