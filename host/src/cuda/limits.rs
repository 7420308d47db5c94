//! What this machine's GPUs can do, measured: what a benchmark's figures are held against.

use super::driver;
use super::error::CudaError;
use super::gpu::{Current, Gpu};
use super::timeline::{between, enter};
use cust::event::{Event, EventFlags};
use cust::memory::{AsyncCopyDestination, DeviceBuffer};
use cust::stream::Stream;
use half::bf16;
use libloading::Library;
use serde::Serialize;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;

/// Names a cuBLAS library to load instead of `libcublas.so.13` or `.12` from the usual places.
pub const CUBLAS_VARIABLE: &str = "FERROMOE_CUBLAS";

/// Bytes of one copy: far beyond the L2.
const COPY_BYTES: usize = 2 << 30;
/// M, N and K of the matrix product.
const PRODUCT_SIZE: usize = 8192;
/// Runs before those that count, and those that count: together most of a second, as long as a layer is measured. A GPU that was idle runs its first
/// tens of milliseconds at clocks that its power limit does not let it keep.
const WARM_UP: usize = 150;
const RUNS: usize = 350;

/// The measured limits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// A large copy within the first GPU: bytes read and bytes written, 1e9 a second.
    pub copy_gbs: f64,
    /// A large copy from the first GPU to the second, 1e9 bytes a second; none with one GPU.
    pub peer_copy_gbs: Option<f64>,
    /// A dense bf16 product of random 8192 x 8192 matrices through cuBLAS, again and again, 1e12 operations a second; none without cuBLAS.
    pub bf16_tflops: Option<f64>,
    /// Why there is no cuBLAS.
    #[serde(skip)]
    pub without_cublas: Option<String>,
}

impl Limits {
    /// Measures the limits of the first GPU, and of the way to the second.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails, for example because 4 GiB are not free; [`CudaError::Invalid`] when
    /// there is no GPU or cuBLAS fails.
    pub fn measure(gpus: &[Gpu]) -> Result<Self, CudaError> {
        let [first, others @ ..] = gpus else { return Err(CudaError::Invalid("no GPU to measure".into())) };
        let _current = Current::save()?;
        let (_context, stream) = enter(first.ordinal)?;
        // Bytes read and bytes written.
        let copy_gbs = 2.0 * copy_rate(&stream, &uninitialized(COPY_BYTES)?)?;
        let peer = others.iter().find(|gpu| gpu.ordinal != first.ordinal);
        let peer_copy_gbs = peer.map(|peer| peer_copy_rate(first, peer)).transpose()?;
        let (bf16_tflops, without_cublas) = match Cublas::load() {
            Ok(cublas) => (Some(product_rate(&cublas, &stream)?), None),
            Err(reason) => (None, Some(reason)),
        };
        Ok(Self { copy_gbs, peer_copy_gbs, bf16_tflops, without_cublas })
    }
}

fn uninitialized(bytes: usize) -> Result<DeviceBuffer<u8>, CudaError> {
    // SAFETY: every bit pattern is a u8.
    unsafe { DeviceBuffer::uninitialized(bytes) }.map_err(driver::failure)
}

/// From one GPU to the other, read by the other; 1e9 bytes a second.
fn peer_copy_rate(from: &Gpu, to: &Gpu) -> Result<f64, CudaError> {
    let (_from, _) = enter(from.ordinal)?;
    let source = uninitialized(COPY_BYTES)?;
    let (_to, stream) = enter(to.ordinal)?;
    let rate = copy_rate(&stream, &source);
    // The stream was the other GPU's; the caller goes on with the first.
    enter(from.ordinal)?;
    rate
}

/// Copies to the current GPU; 1e9 bytes a second.
fn copy_rate(stream: &Stream, source: &DeviceBuffer<u8>) -> Result<f64, CudaError> {
    let mut target = uninitialized(source.len())?;
    let seconds = median_seconds(stream, || {
        // SAFETY: `median_seconds` waits for the copies, and both buffers live longer.
        unsafe { target.async_copy_from(source, stream) }.map_err(driver::failure)
    })?;
    Ok(source.len() as f64 / seconds / 1e9)
}

/// 1e12 operations a second.
fn product_rate(cublas: &Cublas, stream: &Stream) -> Result<f64, CudaError> {
    // Random data: zeros need less power, and so run faster.
    let values = crate::bench::draw::values(PRODUCT_SIZE, PRODUCT_SIZE, 1.0, 1);
    let upload = || DeviceBuffer::from_slice(bytemuck::cast_slice::<bf16, u16>(&values)).map_err(driver::failure);
    let (a, b, c) = (upload()?, upload()?, upload()?);
    let handle = cublas.handle(stream)?;
    let addresses = [&a, &b, &c].map(|matrix| matrix.as_device_ptr().as_raw());
    let seconds = median_seconds(stream, || handle.product(addresses))?;
    Ok(2.0 * (PRODUCT_SIZE as f64).powi(3) / seconds / 1e12)
}

/// The median time on the GPU of what `work` queues; done when this returns, also after an error.
fn median_seconds(stream: &Stream, work: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let times = timed(stream, work);
    let finished = stream.synchronize().map_err(driver::failure);
    let events = times?;
    finished?;
    let mut seconds = events
        .windows(2)
        .skip(WARM_UP)
        .map(|pair| Ok(between(&pair[0], &pair[1])?.as_secs_f64()))
        .collect::<Result<Vec<_>, CudaError>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

fn timed(stream: &Stream, mut work: impl FnMut() -> Result<(), CudaError>) -> Result<Vec<Event>, CudaError> {
    let event = || -> Result<Event, CudaError> {
        let event = Event::new(EventFlags::DEFAULT).map_err(driver::failure)?;
        event.record(stream).map_err(driver::failure)?;
        Ok(event)
    };
    let mut events = vec![event()?];
    for _ in 0..WARM_UP + RUNS {
        work()?;
        events.push(event()?);
    }
    Ok(events)
}

/// `cublasHandle_t`.
type RawHandle = *mut c_void;

/// The functions of cuBLAS that are needed (cuBLAS 12 and 13, `cublas_v2.h`); each returns 0 or what went wrong.
struct Cublas {
    create: unsafe extern "C" fn(*mut RawHandle) -> c_int,
    destroy: unsafe extern "C" fn(RawHandle) -> c_int,
    set_stream: unsafe extern "C" fn(RawHandle, *mut c_void) -> c_int,
    gemm: GemmEx,
    _library: Library,
}

type GemmEx = unsafe extern "C" fn(
    RawHandle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

impl Cublas {
    fn load() -> Result<Self, String> {
        let named = std::env::var_os(CUBLAS_VARIABLE).map(PathBuf::from);
        let names = named.map_or_else(|| vec!["libcublas.so.13".into(), "libcublas.so.12".into()], |path| vec![path]);
        let mut reasons = Vec::new();
        for name in names {
            // SAFETY: loading runs the library's initialisers; it is cuBLAS, or what the user named in its place.
            match unsafe { Library::new(&name) }.and_then(Self::resolve) {
                Ok(cublas) => return Ok(cublas),
                Err(error) => {
                    reasons.push(std::error::Error::source(&error).map_or(error.to_string(), |e| e.to_string()))
                }
            }
        }
        Err(format!("no cuBLAS found ({}); name one in {CUBLAS_VARIABLE}", reasons.join("; ")))
    }

    fn resolve(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the signatures are those of `cublas_v2.h` for these exported names.
        unsafe {
            Ok(Self {
                create: *library.get("cublasCreate_v2")?,
                destroy: *library.get("cublasDestroy_v2")?,
                set_stream: *library.get("cublasSetStream_v2")?,
                gemm: *library.get("cublasGemmEx")?,
                _library: library,
            })
        }
    }

    /// A handle for the current context, working on `stream`.
    fn handle(&self, stream: &Stream) -> Result<Handle<'_>, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` is a place for a handle.
        status("cublasCreate_v2", unsafe { (self.create)(&mut raw) })?;
        let handle = Handle { cublas: self, raw };
        // SAFETY: the handle and the stream are alive; the caller keeps the stream as long as the handle.
        status("cublasSetStream_v2", unsafe { (self.set_stream)(raw, stream.as_inner().cast()) })?;
        Ok(handle)
    }
}

struct Handle<'a> {
    cublas: &'a Cublas,
    raw: RawHandle,
}

impl Handle<'_> {
    /// Queues C = A^T B for bf16 matrices of [`PRODUCT_SIZE`] at these addresses, accumulated in f32: with A transposed both
    /// operands are contiguous along K, as in a linear layer.
    fn product(&self, [a, b, c]: [u64; 3]) -> Result<(), CudaError> {
        const TRANSPOSED: c_int = 1;
        const NOT_TRANSPOSED: c_int = 0;
        const CUDA_R_16BF: c_int = 14;
        const COMPUTE_32F: c_int = 68;
        const DEFAULT_ALGORITHM: c_int = -1;
        let (one, zero) = (1f32, 0f32);
        let size = PRODUCT_SIZE as c_int;
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the matrices are as large as said, and the scalars are read before the call returns.
        let result = unsafe {
            (self.cublas.gemm)(
                self.raw,
                TRANSPOSED,
                NOT_TRANSPOSED,
                size,
                size,
                size,
                scalar(&one),
                a as *const c_void,
                CUDA_R_16BF,
                size,
                b as *const c_void,
                CUDA_R_16BF,
                size,
                scalar(&zero),
                c as *mut c_void,
                CUDA_R_16BF,
                size,
                COMPUTE_32F,
                DEFAULT_ALGORITHM,
            )
        };
        status("cublasGemmEx", result)
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        if let Err(error) = status("cublasDestroy_v2", unsafe { (self.cublas.destroy)(self.raw) }) {
            tracing::warn!(%error, "a cuBLAS handle could not be destroyed");
        }
    }
}

fn status(call: &str, status: c_int) -> Result<(), CudaError> {
    if status == 0 { Ok(()) } else { Err(CudaError::Invalid(format!("{call} failed with cublasStatus_t {status}"))) }
}
