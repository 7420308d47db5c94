//! The dense e4m3 product of cuBLASLt.

use super::{PRODUCT_SIZE, reason, status};
use crate::cuda::error::CudaError;
use cust::stream::Stream;
use libloading::Library;
use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};

/// Bytes of device memory that a product may use for itself: what NVIDIA's documentation of cuBLAS advises on Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// Handles, descriptions, layouts and preferences are pointers to what cuBLASLt keeps for itself.
type Opaque = *mut c_void;
type Create = unsafe extern "C" fn(*mut Opaque) -> c_int;
type Destroy = unsafe extern "C" fn(Opaque) -> c_int;
type SetAttribute = unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> c_int;
/// Type of elements, rows, columns, leading dimension.
type LayoutCreate = unsafe extern "C" fn(*mut Opaque, c_int, u64, u64, i64) -> c_int;
/// Type of the sums, type of the scales.
type DescriptionCreate = unsafe extern "C" fn(*mut Opaque, c_int, c_int) -> c_int;
/// Handle, description, layouts of A, B, C and D, preference, how many are asked for, the results, how many there are.
type Heuristic = unsafe extern "C" fn(
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    c_int,
    *mut HeuristicResult,
    *mut c_int,
) -> c_int;
/// Handle, description, alpha, A and its layout, B, beta, C, D, algorithm, workspace and its bytes, stream.
type Matmul = unsafe extern "C" fn(
    Opaque,
    Opaque,
    *const c_void,
    *const c_void,
    Opaque,
    *const c_void,
    Opaque,
    *const c_void,
    *const c_void,
    Opaque,
    *mut c_void,
    Opaque,
    *const [u64; 8],
    *mut c_void,
    usize,
    *mut c_void,
) -> c_int;

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct HeuristicResult {
    /// `cublasLtMatmulAlgo_t`
    algorithm: [u64; 8],
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

// Constants of `library_types.h`, `cublas_api.h` and `cublasLt.h`.
const CUDA_R_32F: c_int = 0;
const CUDA_R_16BF: c_int = 14;
const CUDA_R_8F_E4M3: c_int = 28;
const CUBLAS_COMPUTE_32F: c_int = 68;
const CUBLAS_OP_T: c_int = 1;
const CUBLAS_STATUS_NOT_SUPPORTED: c_int = 15;
const DESCRIPTION_TRANSPOSE_A: c_int = 3;
const DESCRIPTION_A_SCALE_POINTER: c_int = 17;
const DESCRIPTION_B_SCALE_POINTER: c_int = 18;
const DESCRIPTION_FAST_ACCUMULATION: c_int = 25;
const PREFERENCE_MAX_WORKSPACE_BYTES: c_int = 1;

/// The functions of cuBLASLt that are needed (cuBLAS 12 and 13, `cublasLt.h`); each returns 0 or what went wrong.
pub struct CublasLt {
    create: Create,
    destroy: Destroy,
    description_create: DescriptionCreate,
    description_destroy: Destroy,
    description_set: SetAttribute,
    layout_create: LayoutCreate,
    layout_destroy: Destroy,
    preference_create: Create,
    preference_destroy: Destroy,
    preference_set: SetAttribute,
    heuristic: Heuristic,
    matmul: Matmul,
    _library: Library,
}

impl CublasLt {
    /// Loads the library that belongs to a cuBLAS of this name, from the same folder.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub fn load(cublas: &Path) -> Result<Self, String> {
        let name = beside(cublas).ok_or_else(|| {
            format!("no cuBLASLt for FP8: {} is not called libcublas.so, with or without a version", cublas.display())
        })?;
        // SAFETY: loading runs the library's initialisers; it is cuBLASLt, or what the user has put in its place.
        unsafe { Library::new(&name) }
            .and_then(Self::resolve)
            .map_err(|error| format!("no cuBLASLt for FP8 beside cuBLAS ({})", reason(&error)))
    }

    fn resolve(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the signatures are those of `cublasLt.h` for these exported names.
        unsafe {
            Ok(Self {
                create: *library.get("cublasLtCreate")?,
                destroy: *library.get("cublasLtDestroy")?,
                description_create: *library.get("cublasLtMatmulDescCreate")?,
                description_destroy: *library.get("cublasLtMatmulDescDestroy")?,
                description_set: *library.get("cublasLtMatmulDescSetAttribute")?,
                layout_create: *library.get("cublasLtMatrixLayoutCreate")?,
                layout_destroy: *library.get("cublasLtMatrixLayoutDestroy")?,
                preference_create: *library.get("cublasLtMatmulPreferenceCreate")?,
                preference_destroy: *library.get("cublasLtMatmulPreferenceDestroy")?,
                preference_set: *library.get("cublasLtMatmulPreferenceSetAttribute")?,
                heuristic: *library.get("cublasLtMatmulAlgoGetHeuristic")?,
                matmul: *library.get("cublasLtMatmul")?,
                _library: library,
            })
        }
    }

    /// Chooses an algorithm for a product in the current context; none where cuBLASLt has none for this GPU.
    pub fn plan(&self, product: Product) -> Result<Option<Planned<'_>>, CudaError> {
        let size = PRODUCT_SIZE as u64;
        let create = |call, create: Create, destroy| {
            // SAFETY: the place is one for such a pointer.
            Owned::new(call, destroy, |place| unsafe { create(place) })
        };
        let layout = |elements| {
            // SAFETY: as above.
            Owned::new("cublasLtMatrixLayoutCreate", self.layout_destroy, |place| unsafe {
                (self.layout_create)(place, elements, size, size, size as i64)
            })
        };
        let handle = create("cublasLtCreate", self.create, self.destroy)?;
        let (operand, result) = (layout(CUDA_R_8F_E4M3)?, layout(CUDA_R_16BF)?);
        // SAFETY: as above.
        let description = Owned::new("cublasLtMatmulDescCreate", self.description_destroy, |place| unsafe {
            (self.description_create)(place, CUBLAS_COMPUTE_32F, CUDA_R_32F)
        })?;
        let describe = |attribute, value: &[u8]| {
            // SAFETY: the description is alive, and the value is read before the call returns.
            let answer = unsafe {
                (self.description_set)(description.raw, attribute, value.as_ptr().cast(), size_of_val(value))
            };
            status("cublasLtMatmulDescSetAttribute", answer)
        };
        // With A transposed both operands are contiguous along K: the only way that FP8 has.
        describe(DESCRIPTION_TRANSPOSE_A, &CUBLAS_OP_T.to_ne_bytes())?;
        describe(DESCRIPTION_A_SCALE_POINTER, &product.scale.to_ne_bytes())?;
        describe(DESCRIPTION_B_SCALE_POINTER, &product.scale.to_ne_bytes())?;
        describe(DESCRIPTION_FAST_ACCUMULATION, &[1])?;
        let preference = create("cublasLtMatmulPreferenceCreate", self.preference_create, self.preference_destroy)?;
        let bytes = (WORKSPACE_BYTES as u64).to_ne_bytes();
        // SAFETY: as for the description.
        status("cublasLtMatmulPreferenceSetAttribute", unsafe {
            (self.preference_set)(preference.raw, PREFERENCE_MAX_WORKSPACE_BYTES, bytes.as_ptr().cast(), bytes.len())
        })?;
        let (mut best, mut found) = (HeuristicResult::default(), 0);
        // SAFETY: all are alive, and there is room for the one result that is asked for.
        let answer = unsafe {
            (self.heuristic)(
                handle.raw,
                description.raw,
                operand.raw,
                operand.raw,
                result.raw,
                result.raw,
                preference.raw,
                1,
                &mut best,
                &mut found,
            )
        };
        if answer == CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(None);
        }
        status("cublasLtMatmulAlgoGetHeuristic", answer)?;
        if found == 0 || best.state != 0 {
            return Ok(None);
        }
        let layouts = [operand, result];
        Ok(Some(Planned { matmul: self.matmul, algorithm: best.algorithm, description, layouts, handle, product }))
    }
}

/// The name of the cuBLASLt that is shipped with a cuBLAS of this name: of the same version, in the same folder.
fn beside(cublas: &Path) -> Option<PathBuf> {
    let version = cublas.file_name()?.to_str()?.strip_prefix("libcublas.so")?;
    Some(cublas.with_file_name(format!("libcublasLt.so{version}")))
}

/// Device memory of a product of two matrices of [`PRODUCT_SIZE`].
#[derive(Clone, Copy)]
pub struct Product {
    /// e4m3
    pub a: u64,
    /// e4m3
    pub b: u64,
    /// The f32 with which both are multiplied.
    pub scale: u64,
    /// bf16
    pub result: u64,
    /// [`WORKSPACE_BYTES`]
    pub workspace: u64,
}

/// A product with its algorithm.
pub struct Planned<'a> {
    matmul: Matmul,
    algorithm: [u64; 8],
    product: Product,
    description: Owned<'a>,
    /// Of the operands, and of the result.
    layouts: [Owned<'a>; 2],
    handle: Owned<'a>,
}

impl Planned<'_> {
    /// Queues D = A^T B, accumulated in f32.
    pub fn enqueue(&self, stream: &Stream) -> Result<(), CudaError> {
        let Self { matmul, algorithm, product, description, layouts: [operand, result], handle } = self;
        let (one, zero) = (1f32, 0f32);
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the matrices are as large as their layouts say, and the scalars are read before the call returns.
        let answer = unsafe {
            matmul(
                handle.raw,
                description.raw,
                scalar(&one),
                product.a as *const c_void,
                operand.raw,
                product.b as *const c_void,
                operand.raw,
                scalar(&zero),
                product.result as *const c_void,
                result.raw,
                product.result as *mut c_void,
                result.raw,
                algorithm,
                product.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.as_inner().cast(),
            )
        };
        status("cublasLtMatmul", answer)
    }
}

/// Something of cuBLASLt, destroyed when it is dropped.
struct Owned<'a> {
    raw: Opaque,
    destroy: Destroy,
    /// The function is the library's.
    _library: std::marker::PhantomData<&'a CublasLt>,
}

impl Owned<'_> {
    fn new(call: &'static str, destroy: Destroy, create: impl FnOnce(*mut Opaque) -> c_int) -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        status(call, create(&mut raw))?;
        Ok(Self { raw, destroy, _library: std::marker::PhantomData })
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once, by the library that lives longer.
        if let Err(error) = status("destroying", unsafe { (self.destroy)(self.raw) }) {
            tracing::warn!(%error, "something of cuBLASLt could not be destroyed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cublas_lt_lies_beside_cublas() {
        for (cublas, expected) in [
            ("libcublas.so.13", Some("libcublasLt.so.13")),
            ("/opt/lib/libcublas.so.12", Some("/opt/lib/libcublasLt.so.12")),
            ("lib/libcublas.so", Some("lib/libcublasLt.so")),
            ("/opt/lib/mine.so", None),
        ] {
            assert_eq!(beside(Path::new(cublas)), expected.map(PathBuf::from), "{cublas}");
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = CublasLt::load(Path::new("/nonexistent/libcublas.so.13")).err().unwrap();
        assert!(error.contains("/nonexistent/libcublasLt.so.13"), "{error}");
        let error = CublasLt::load(Path::new("mine.so")).err().unwrap();
        assert!(error.contains("mine.so is not called libcublas.so"), "{error}");
    }

    #[test]
    fn a_heuristic_s_result_is_as_large_as_in_c() {
        assert_eq!(size_of::<HeuristicResult>(), 96);
    }
}
