//! The CUDA driver without a CUDA toolkit: `libcuda.so.1` is loaded when `cuInit` is first called, not when the
//! program starts, so one binary runs on machines with and without it.
//!
//! `cust` expects the driver's functions at link time. Here they are defined: those that this crate calls, itself or
//! through `cust`, as typed functions that look the driver up and remember which call failed; the rest of what `cust`
//! refers to as jumps through a table. An empty linker script (`host/cuda/lib64/libcuda.so`) satisfies `-lcuda`.
//!
//! Signatures and codes: CUDA Driver API 12.x, `cuda.h`.

use super::error::CudaError;
use libloading::Library;
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Names the driver library to load instead of `libcuda.so.1`.
pub(crate) const DRIVER_VARIABLE: &str = "FERROMOE_CUDA_DRIVER";

/// `CUresult` values that the table itself gives or needs to know.
pub(crate) mod code {
    pub(crate) const SUCCESS: u32 = 0;
    pub(crate) const NOT_INITIALIZED: u32 = 3;
    pub(crate) const NO_DEVICE: u32 = 100;
    pub(crate) const NOT_FOUND: u32 = 500;
    pub(crate) const PEER_ACCESS_ALREADY_ENABLED: u32 = 704;
    pub(crate) const UNKNOWN: u32 = 999;
}

/// The loaded driver. Never unloaded: handles and functions of it may outlive everything of ours.
struct Driver {
    calls: Calls,
    _library: Library,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// Loads the driver, from `path` if given, else from where [`DRIVER_VARIABLE`] says, else by its usual name.
/// Once it is loaded, later calls change nothing.
pub(crate) fn load(path: Option<&Path>) -> Result<(), CudaError> {
    if DRIVER.get().is_some() {
        return Ok(());
    }
    let library = open(path)?;
    fill_forwarded(&library);
    let calls = Calls::resolve(&library);
    // A second thread may have been faster; both loaded the same library.
    let _ = DRIVER.set(Driver { calls, _library: library });
    Ok(())
}

fn open(path: Option<&Path>) -> Result<Library, CudaError> {
    let path = path.map(Path::to_path_buf).or_else(|| std::env::var_os(DRIVER_VARIABLE).map(PathBuf::from));
    let path = path.unwrap_or_else(|| PathBuf::from("libcuda.so.1"));
    // SAFETY: loading runs the library's initialisers; it is the NVIDIA driver, or what the user named in its place.
    unsafe { Library::new(&path) }.map_err(|error| CudaError::NoDriver { reason: error_chain(&error, &path) })
}

fn error_chain(error: &libloading::Error, path: &Path) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => format!("{}: {error}", path.display()),
    }
}

thread_local! {
    static LAST_FAILURE: Cell<Option<(&'static str, u32)>> = const { Cell::new(None) };
}

/// The failed call behind an error that `cust` returned on this thread: `cust` drops the call's name and knows no
/// code younger than CUDA 11.
pub(crate) fn failure(error: cust::error::CudaError) -> CudaError {
    let (call, code) = LAST_FAILURE.take().unwrap_or(("cust", error as u32));
    call_error(call, code)
}

fn call_error(call: &'static str, code: u32) -> CudaError {
    let text = |lookup: fn(&Calls) -> Option<unsafe extern "C" fn(c_uint, *mut *const c_char) -> u32>| {
        let lookup = lookup(&DRIVER.get()?.calls)?;
        let mut text = std::ptr::null();
        // SAFETY: `text` is a valid place for a pointer.
        if unsafe { lookup(code, &mut text) } != code::SUCCESS || text.is_null() {
            return None;
        }
        // SAFETY: on success it points to a static, NUL-terminated string.
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    let fallback = match code {
        code::NOT_INITIALIZED => ("CUDA_ERROR_NOT_INITIALIZED", "the driver is not initialised"),
        code::NO_DEVICE => ("CUDA_ERROR_NO_DEVICE", "no driver, or no GPU"),
        code::NOT_FOUND => ("CUDA_ERROR_NOT_FOUND", "this driver is too old to have the function"),
        _ => ("unknown CUresult", "the driver has no name for it"),
    };
    CudaError::Call {
        call,
        code,
        name: text(|calls| calls.cuGetErrorName).unwrap_or_else(|| fallback.0.into()),
        description: text(|calls| calls.cuGetErrorString).unwrap_or_else(|| fallback.1.into()),
        doing: String::new(),
    }
}

/// `cust` reads a `CUresult` as a Rust enum, for which a code that it does not list is undefined behaviour.
fn listed_by_cust(code: u32) -> u32 {
    match code {
        0..=8 | 34 | 100..=102 | 200..=202 | 205..=224 | 300..=304 | 400 | 401 | 500 | 600 | 700..=705 => code,
        708..=720 | 800..=809 | 900..=911 => code,
        _ => code::UNKNOWN,
    }
}

/// For each driver function: its place in the table, the symbol that `cust` links against, and in [`call`] a function
/// that returns our error.
macro_rules! calls {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {
        #[allow(non_snake_case)]
        struct Calls {
            $($name: Option<unsafe extern "C" fn($($type),*) -> u32>,)*
        }

        impl Calls {
            fn resolve(library: &Library) -> Self {
                Self {
                    $(
                        // SAFETY: the signature is `cuda.h`'s for this exported name.
                        $name: unsafe { library.get(stringify!($name)) }.ok().map(|symbol| *symbol),
                    )*
                }
            }
        }

        mod symbols {
            use super::*;
            $(
                #[unsafe(no_mangle)]
                #[allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]
                pub(super) unsafe extern "C" fn $name($($arg: $type),*) -> u32 {
                    initialise(stringify!($name));
                    let code = match DRIVER.get().map(|driver| driver.calls.$name) {
                        // SAFETY: the caller keeps the driver function's contract.
                        Some(Some(function)) => unsafe { function($($arg),*) },
                        Some(None) => code::NOT_FOUND,
                        None => without_driver(stringify!($name)),
                    };
                    if code != code::SUCCESS {
                        LAST_FAILURE.set(Some((stringify!($name), code)));
                    }
                    listed_by_cust(code)
                }
            )*
        }

        /// The driver's functions with our error. Safety: each has the contract of the driver function of its name.
        pub(crate) mod call {
            use super::*;
            $(
                #[allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments, dead_code)]
                pub(crate) unsafe fn $name($($arg: $type),*) -> Result<(), CudaError> {
                    // SAFETY: the caller keeps the driver function's contract.
                    match unsafe { symbols::$name($($arg),*) } {
                        code::SUCCESS => Ok(()),
                        code => {
                            let exact = LAST_FAILURE.take().map_or(code, |(_, code)| code);
                            Err(call_error(stringify!($name), exact))
                        }
                    }
                }
            )*
        }
    };
}

/// `cuInit` must come first by CUDA's rules, so it is what loads the driver.
fn initialise(name: &str) {
    if name == "cuInit" && DRIVER.get().is_none() {
        // Without a driver `cuInit` answers NO_DEVICE; who wants the loader's reason calls `load` before.
        let _ = load(None);
    }
}

fn without_driver(name: &str) -> u32 {
    if name == "cuInit" { code::NO_DEVICE } else { code::NOT_INITIALIZED }
}

/// `CUdeviceptr`.
pub(crate) type Address = u64;
/// An opaque driver handle (`CUcontext`, `CUstream`, ...).
pub(crate) type Handle = *mut c_void;

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IpcMemHandle(pub(crate) [u8; 64]);

/// `CUlaunchAttribute` with an integer value; the union of values takes 64 bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct LaunchAttribute {
    pub(crate) id: c_uint,
    pub(crate) padding: c_uint,
    pub(crate) value: [c_uint; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared_bytes: c_uint,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) attribute_count: c_uint,
}

/// `CUtensorMap`: opaque, and the driver wants it aligned to 64 bytes.
#[repr(C, align(64))]
pub(crate) struct TensorMap(pub(crate) [u8; 128]);

calls! {
    fn cuInit(flags: c_uint);
    fn cuDriverGetVersion(version: *mut c_int);
    fn cuGetErrorName(code: c_uint, text: *mut *const c_char);
    fn cuGetErrorString(code: c_uint, text: *mut *const c_char);
    fn cuDeviceGetCount(count: *mut c_int);
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int);
    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int);
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int);
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int);
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int);
    fn cuDevicePrimaryCtxRelease_v2(device: c_int);
    fn cuCtxGetCurrent(context: *mut Handle);
    fn cuCtxSetCurrent(context: Handle);
    fn cuCtxEnablePeerAccess(peer: Handle, flags: c_uint);
    fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        options: c_uint,
        names: *const c_uint,
        values: *const *mut c_void,
    );
    fn cuModuleUnload(module: Handle);
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char);
    fn cuFuncSetAttribute(function: Handle, attribute: c_uint, value: c_int);
    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, priority: c_int);
    fn cuStreamGetCtx(stream: Handle, context: *mut Handle);
    fn cuStreamSynchronize(stream: Handle);
    fn cuStreamDestroy_v2(stream: Handle);
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint);
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle);
    fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64);
    fn cuGraphLaunch(exec: Handle, stream: Handle);
    fn cuGraphExecDestroy(exec: Handle);
    fn cuGraphDestroy(graph: Handle);
    fn cuEventCreate(event: *mut Handle, flags: c_uint);
    fn cuEventRecord(event: Handle, stream: Handle);
    fn cuEventSynchronize(event: Handle);
    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, stop: Handle);
    fn cuEventDestroy_v2(event: Handle);
    fn cuMemAlloc_v2(address: *mut Address, bytes: usize);
    fn cuMemFree_v2(address: Address);
    fn cuMemcpyHtoD_v2(to: Address, from: *const c_void, bytes: usize);
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: Address, bytes: usize);
    fn cuMemsetD8_v2(address: Address, value: u8, bytes: usize);
    fn cuIpcGetMemHandle(handle: *mut IpcMemHandle, address: Address);
    fn cuIpcOpenMemHandle_v2(address: *mut Address, handle: IpcMemHandle, flags: c_uint);
    fn cuIpcCloseMemHandle(address: Address);
    fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
    fn cuTensorMapEncodeTiled(
        map: *mut TensorMap,
        data_type: c_uint,
        rank: c_uint,
        address: Address,
        dims: *const u64,
        strides: *const u64,
        tile: *const c_uint,
        element_strides: *const c_uint,
        interleave: c_uint,
        swizzle: c_uint,
        promotion: c_uint,
        fill: c_uint,
    );
}

extern "C" fn not_initialized() -> u32 {
    code::NOT_INITIALIZED
}

extern "C" fn not_found() -> u32 {
    code::NOT_FOUND
}

/// Defines what `cust` refers to and this crate never calls: symbols that jump to wherever the driver has them.
macro_rules! forwarded {
    ($($name:ident)*) => {
        #[allow(non_upper_case_globals)]
        mod slots {
            use super::*;
            $(pub(super) static $name: AtomicPtr<c_void> = AtomicPtr::new(not_initialized as *mut c_void);)*
        }

        mod jumps {
            use super::*;
            $(
                #[unsafe(naked)]
                #[unsafe(no_mangle)]
                #[allow(non_snake_case)]
                unsafe extern "C" fn $name() -> u32 {
                    #[cfg(target_arch = "x86_64")]
                    core::arch::naked_asm!("jmp qword ptr [rip + {slot}]", slot = sym slots::$name);
                    #[cfg(target_arch = "aarch64")]
                    core::arch::naked_asm!(
                        "adrp x16, {slot}",
                        "ldr x16, [x16, :lo12:{slot}]",
                        "br x16",
                        slot = sym slots::$name,
                    );
                }
            )*
        }

        fn fill_forwarded(library: &Library) {
            $(
                // SAFETY: only the address is taken; who calls the symbol knows its signature.
                let symbol = unsafe { library.get::<*mut c_void>(stringify!($name)) };
                // SAFETY: the address is that of a function of a library that is never unloaded.
                let address = symbol.ok().and_then(|symbol| unsafe { symbol.try_as_raw_ptr() });
                slots::$name.store(address.unwrap_or(not_found as *mut c_void), Ordering::Release);
            )*
        }
    };
}

forwarded! {
    cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuArrayDestroy cuCtxCreate_v2 cuCtxDestroy_v2 cuCtxGetApiVersion
    cuCtxGetCacheConfig cuCtxGetDevice cuCtxGetFlags cuCtxGetLimit cuCtxGetSharedMemConfig
    cuCtxGetStreamPriorityRange cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCacheConfig cuCtxSetLimit
    cuCtxSetSharedMemConfig cuCtxSynchronize cuDestroyExternalMemory cuDevicePrimaryCtxReset_v2
    cuDevicePrimaryCtxSetFlags_v2 cuDeviceTotalMem_v2 cuEventQuery cuExternalMemoryGetMappedBuffer
    cuFuncGetAttribute cuFuncSetCacheConfig cuFuncSetSharedMemConfig cuGraphAddKernelNode cuGraphCreate
    cuGraphDebugDotPrint cuGraphGetEdges cuGraphGetNodes cuGraphKernelNodeGetParams
    cuGraphNodeGetType cuImportExternalMemory cuLaunchHostFunc cuLaunchKernel cuLinkAddData_v2 cuLinkComplete
    cuLinkCreate_v2 cuLinkDestroy cuMemAdvise cuMemAllocAsync cuMemAllocHost_v2 cuMemAllocManaged cuMemFreeAsync
    cuMemFreeHost cuMemGetInfo_v2 cuMemPrefetchAsync cuMemcpy2D_v2 cuMemcpyAtoH_v2 cuMemcpyDtoDAsync_v2
    cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2 cuMemcpyHtoA_v2 cuMemcpyHtoDAsync_v2 cuMemsetD16Async cuMemsetD16_v2
    cuMemsetD32Async cuMemsetD32_v2 cuMemsetD8Async cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxPotentialBlockSize cuStreamGetFlags cuStreamGetPriority cuStreamWaitEvent cuSurfObjectCreate
    cuSurfObjectDestroy cuSurfObjectGetResourceDesc cuTexObjectCreate cuTexObjectDestroy cuTexObjectGetResourceDesc
    cuTexObjectGetResourceViewDesc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_not_there_is_an_error_that_says_what_would_help() {
        let error = open(Some(Path::new("/nonexistent/libcuda.so.1"))).expect_err("nothing is there");
        let text = error.to_string();
        assert!(text.starts_with("no CUDA driver found (/nonexistent/libcuda.so.1"), "{text}");
        assert!(text.contains("--device sim"), "{text}");
    }

    #[test]
    fn cust_never_sees_a_code_that_it_does_not_list() {
        assert_eq!(listed_by_cust(2), 2);
        assert_eq!(listed_by_cust(600), 600);
        assert_eq!(listed_by_cust(226), code::UNKNOWN);
        assert_eq!(listed_by_cust(912), code::UNKNOWN);
    }
}
