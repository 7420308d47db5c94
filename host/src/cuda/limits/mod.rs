//! What this machine's GPUs can do, measured: what a benchmark's figures are held against.

mod cublas;
mod cublas_lt;

use super::driver;
use super::error::CudaError;
use super::gpu::{Current, Gpu};
use super::timeline::{between, enter};
use crate::bench::draw;
use crate::config::ExpertFormat;
use crate::float8::to_e4m3;
use cublas::Cublas;
use cublas_lt::{CublasLt, Product};
use cust::event::{Event, EventFlags};
use cust::memory::{AsyncCopyDestination, DeviceBuffer};
use cust::stream::Stream;
use ferromoe_kernel::quantise::E4M3_MAX;
use half::bf16;
use rayon::prelude::*;
use serde::Serialize;
use std::ffi::c_int;

/// Names a cuBLAS library to load instead of `libcublas.so.13` or `.12` from the usual places. cuBLASLt, for FP8, is loaded from beside it.
pub const CUBLAS_VARIABLE: &str = "FERROMOE_CUBLAS";

/// Bytes of one copy: far beyond the L2.
const COPY_BYTES: usize = 2 << 30;
/// M, N and K of the matrix products.
const PRODUCT_SIZE: usize = 8192;
/// Variance of their elements.
const VARIANCE: f32 = 1.0;

/// How often something is run.
#[derive(Clone, Copy)]
struct Runs {
    /// Before those that count.
    warm_up: usize,
    /// Those that count.
    counted: usize,
}

/// Most of a second of copies, or of bf16 products: as long as a layer is measured. A GPU that was idle runs its first tens of milliseconds at clocks that its
/// power limit does not let it keep.
const RUNS: Runs = Runs { warm_up: 150, counted: 350 };
/// As long, of products in half of the time.
const FP8_RUNS: Runs = Runs { warm_up: 300, counted: 700 };

/// The measured limits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// A large copy within the first GPU: bytes read and bytes written, 1e9 a second.
    pub copy_gbs: f64,
    /// A large copy from the first GPU to the second, 1e9 bytes a second; none with one GPU.
    pub peer_copy_gbs: Option<f64>,
    /// A dense bf16 product of random 8192 x 8192 matrices through cuBLAS, again and again, 1e12 operations a second; none without cuBLAS.
    pub bf16_tflops: Option<f64>,
    /// A dense e4m3 product of such matrices, with a scale for each of them and a bf16 result, through cuBLASLt (fast accumulation: nothing is promoted); none
    /// without cuBLASLt.
    pub fp8_tflops: Option<f64>,
    /// Why there is no cuBLAS.
    #[serde(skip)]
    pub without_cublas: Option<String>,
    /// Why there is no cuBLASLt, or no FP8 product of it.
    #[serde(skip)]
    pub without_fp8: Option<String>,
}

impl Limits {
    /// Measures the limits of the first GPU, and of the way to the second.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails, for example because 4 GiB are not free; [`CudaError::Invalid`] when
    /// there is no GPU, or cuBLAS or cuBLASLt fails.
    pub fn measure(gpus: &[Gpu]) -> Result<Self, CudaError> {
        let [first, others @ ..] = gpus else { return Err(CudaError::Invalid("no GPU to measure".into())) };
        let _current = Current::save()?;
        let (_context, stream) = enter(first.ordinal)?;
        // Bytes read and bytes written.
        let copy_gbs = 2.0 * copy_rate(&stream, &uninitialized(COPY_BYTES)?)?;
        let peer = others.iter().find(|gpu| gpu.ordinal != first.ordinal);
        let peer_copy_gbs = peer.map(|peer| peer_copy_rate(first, peer)).transpose()?;
        let (mut bf16_tflops, mut fp8_tflops, mut without_cublas, mut without_fp8) = (None, None, None, None);
        match Cublas::load() {
            Ok(cublas) => {
                bf16_tflops = Some(bf16_rate(&cublas, &stream)?);
                match CublasLt::load(&cublas.name) {
                    Ok(cublas_lt) => match fp8_rate(&cublas_lt, &stream)? {
                        Some(rate) => fp8_tflops = Some(rate),
                        None => without_fp8 = Some("cuBLASLt has no FP8 product for this GPU".into()),
                    },
                    Err(reason) => without_fp8 = Some(reason),
                }
            }
            Err(reason) => without_cublas = Some(reason),
        }
        Ok(Self { copy_gbs, peer_copy_gbs, bf16_tflops, fp8_tflops, without_cublas, without_fp8 })
    }

    /// The rate of dense products of this format, 1e12 operations a second.
    pub fn tflops(&self, format: ExpertFormat) -> Option<f64> {
        match format {
            ExpertFormat::Bf16 => self.bf16_tflops,
            ExpertFormat::Fp8 => self.fp8_tflops,
        }
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
    let seconds = median_seconds(stream, RUNS, || {
        // SAFETY: `median_seconds` waits for the copies, and both buffers live longer.
        unsafe { target.async_copy_from(source, stream) }.map_err(driver::failure)
    })?;
    Ok(source.len() as f64 / seconds / 1e9)
}

/// Values of a matrix of [`PRODUCT_SIZE`] rows and columns. Random: zeros need less power, and so run faster.
fn random_matrix() -> Vec<bf16> {
    draw::values(PRODUCT_SIZE, PRODUCT_SIZE, VARIANCE, 1)
}

/// The bf16 product; 1e12 operations a second.
fn bf16_rate(cublas: &Cublas, stream: &Stream) -> Result<f64, CudaError> {
    let values = random_matrix();
    let upload = || DeviceBuffer::from_slice(bytemuck::cast_slice::<bf16, u16>(&values)).map_err(driver::failure);
    let (a, b, c) = (upload()?, upload()?, upload()?);
    let handle = cublas.handle(stream)?;
    let addresses = [&a, &b, &c].map(|matrix| matrix.as_device_ptr().as_raw());
    Ok(product_rate(median_seconds(stream, RUNS, || handle.product(addresses))?))
}

/// The e4m3 product; none where cuBLASLt has no such product for this GPU.
fn fp8_rate(cublas_lt: &CublasLt, stream: &Stream) -> Result<Option<f64>, CudaError> {
    // The largest value of a matrix is the largest that e4m3 has, as in a quantised layer.
    let factor = E4M3_MAX / (3.0 * VARIANCE).sqrt();
    let values: Vec<u8> = random_matrix().into_par_iter().map(|value| to_e4m3(value.to_f32() * factor)).collect();
    let upload = || DeviceBuffer::from_slice(&values).map_err(driver::failure);
    let (a, b, scale) = (upload()?, upload()?, DeviceBuffer::from_slice(&[1.0 / factor]).map_err(driver::failure)?);
    let result = uninitialized(size_of_val(&values[..]) * size_of::<bf16>())?;
    let workspace = uninitialized(cublas_lt::WORKSPACE_BYTES)?;
    let product = Product {
        a: a.as_device_ptr().as_raw(),
        b: b.as_device_ptr().as_raw(),
        scale: scale.as_device_ptr().as_raw(),
        result: result.as_device_ptr().as_raw(),
        workspace: workspace.as_device_ptr().as_raw(),
    };
    let Some(planned) = cublas_lt.plan(product)? else { return Ok(None) };
    Ok(Some(product_rate(median_seconds(stream, FP8_RUNS, || planned.enqueue(stream))?)))
}

/// 1e12 operations a second, where a product takes so long.
fn product_rate(seconds: f64) -> f64 {
    2.0 * (PRODUCT_SIZE as f64).powi(3) / seconds / 1e12
}

/// The median time on the GPU of what `work` queues; done when this returns, also after an error.
fn median_seconds(stream: &Stream, runs: Runs, work: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let times = timed(stream, runs, work);
    let finished = stream.synchronize().map_err(driver::failure);
    let events = times?;
    finished?;
    let mut seconds = events
        .windows(2)
        .skip(runs.warm_up)
        .map(|pair| Ok(between(&pair[0], &pair[1])?.as_secs_f64()))
        .collect::<Result<Vec<_>, CudaError>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

fn timed(
    stream: &Stream,
    runs: Runs,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<Vec<Event>, CudaError> {
    let event = || -> Result<Event, CudaError> {
        let event = Event::new(EventFlags::DEFAULT).map_err(driver::failure)?;
        event.record(stream).map_err(driver::failure)?;
        Ok(event)
    };
    let mut events = vec![event()?];
    for _ in 0..runs.warm_up + runs.counted {
        work()?;
        events.push(event()?);
    }
    Ok(events)
}

/// cuBLAS and cuBLASLt return 0, or what went wrong.
fn status(call: &str, status: c_int) -> Result<(), CudaError> {
    if status == 0 { Ok(()) } else { Err(CudaError::Invalid(format!("{call} failed with cublasStatus_t {status}"))) }
}

/// Why a library could not be loaded, without the loader's own words around it.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or(error.to_string(), |source| source.to_string())
}
