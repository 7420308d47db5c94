//! The dense bf16 product of cuBLAS.

use super::{CUBLAS_VARIABLE, PRODUCT_SIZE, reason, status};
use crate::cuda::error::CudaError;
use cust::stream::Stream;
use libloading::Library;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;

/// `cublasHandle_t`.
type RawHandle = *mut c_void;

/// The functions of cuBLAS that are needed (cuBLAS 12 and 13, `cublas_v2.h`); each returns 0 or what went wrong.
pub struct Cublas {
    /// What was loaded.
    pub name: PathBuf,
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
    /// Loads the one that is named in [`CUBLAS_VARIABLE`], or the newest that is known from where libraries are.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub fn load() -> Result<Self, String> {
        let named = std::env::var_os(CUBLAS_VARIABLE).map(PathBuf::from);
        let names =
            named.map_or_else(|| ["libcublas.so.13", "libcublas.so.12"].map(PathBuf::from).to_vec(), |path| vec![path]);
        let mut reasons = Vec::new();
        for name in names {
            // SAFETY: loading runs the library's initialisers; it is cuBLAS, or what the user named in its place.
            match unsafe { Library::new(&name) }.and_then(|library| Self::resolve(library, name.clone())) {
                Ok(cublas) => return Ok(cublas),
                Err(error) => reasons.push(reason(&error)),
            }
        }
        Err(format!("no cuBLAS found ({}); name one in {CUBLAS_VARIABLE}", reasons.join("; ")))
    }

    fn resolve(library: Library, name: PathBuf) -> Result<Self, libloading::Error> {
        // SAFETY: the signatures are those of `cublas_v2.h` for these exported names.
        unsafe {
            Ok(Self {
                name,
                create: *library.get("cublasCreate_v2")?,
                destroy: *library.get("cublasDestroy_v2")?,
                set_stream: *library.get("cublasSetStream_v2")?,
                gemm: *library.get("cublasGemmEx")?,
                _library: library,
            })
        }
    }

    /// A handle for the current context, working on `stream`.
    pub fn handle(&self, stream: &Stream) -> Result<Handle<'_>, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` is a place for a handle.
        status("cublasCreate_v2", unsafe { (self.create)(&mut raw) })?;
        let handle = Handle { cublas: self, raw };
        // SAFETY: the handle and the stream are alive; the caller keeps the stream as long as the handle.
        status("cublasSetStream_v2", unsafe { (self.set_stream)(raw, stream.as_inner().cast()) })?;
        Ok(handle)
    }
}

/// A handle of cuBLAS.
pub struct Handle<'a> {
    cublas: &'a Cublas,
    raw: RawHandle,
}

impl Handle<'_> {
    /// Queues C = A^T B for bf16 matrices of [`PRODUCT_SIZE`] at these addresses, accumulated in f32: with A transposed both
    /// operands are contiguous along K, as in a linear layer.
    pub fn product(&self, [a, b, c]: [u64; 3]) -> Result<(), CudaError> {
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
