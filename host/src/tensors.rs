//! Safetensors files, mapped and checked: a tensor is asked for with the shape its place needs.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::float8::from_e8m0;
use crate::fp8;
use crate::matrix::{Bytes, Matrix};

/// What a file begins with that Git LFS has not fetched.
pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs";

const FLOATS: &str = "BF16, F16 or F32";
const SCALES: &str = "F32, BF16 or F8_E8M0";

/// One safetensors file.
pub(crate) struct TensorFile {
    path: PathBuf,
    bytes: Bytes,
    header: Metadata,
    /// In the order in which they lie in the file.
    names: Vec<String>,
    data_start: usize,
}

impl TensorFile {
    /// Maps a file, which must not be changed while it is in use; a pipe, which cannot be mapped, is read to its end.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
        let mut file = File::open(path).map_err(io)?;
        let kind = file.metadata().map_err(io)?.file_type();
        if kind.is_dir() {
            return Err(io(std::io::Error::other("it is a folder; it must be a safetensors file")));
        }
        if kind.is_char_device() || kind.is_block_device() {
            return Err(io(std::io::Error::other("it is a device; it must be a safetensors file, or a pipe with one")));
        }
        if !kind.is_file() {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(io)?;
            return Self::new(path, Arc::new(bytes));
        }
        // SAFETY: the map is private and read-only; that nobody changes the file meanwhile is asked of the caller,
        // as every reader of memory-mapped checkpoints does.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::new(path, Arc::new(map))
    }

    /// A file that is in memory already; `path` names it in errors.
    pub fn new(path: &Path, bytes: Bytes) -> Result<Self> {
        if (*bytes).as_ref().starts_with(LFS_POINTER) {
            return Err(Error::LfsPointer { path: path.to_owned() });
        }
        let (header_bytes, header) = SafeTensors::read_metadata((*bytes).as_ref())
            .map_err(|source| Error::NotSafetensors { path: path.to_owned(), source })?;
        let names = header.offset_keys();
        Ok(Self { path: path.to_owned(), bytes, header, names, data_start: size_of::<u64>() + header_bytes })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value of the file's own metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// A tensor, if the file has it.
    pub fn find(&self, name: &str) -> Option<Tensor<'_>> {
        let info = self.header.info(name)?;
        let range = self.data_start + info.data_offsets.0..self.data_start + info.data_offsets.1;
        Some(Tensor { file: self, name: name.to_owned(), dtype: info.dtype, shape: &info.shape, range })
    }

    /// A tensor that has to be there.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.find(name).ok_or_else(|| Error::TensorMissing { path: self.path.clone(), name: name.to_owned() })
    }
}

/// One tensor of a file.
pub(crate) struct Tensor<'a> {
    file: &'a TensorFile,
    name: String,
    dtype: Dtype,
    shape: &'a [usize],
    range: Range<usize>,
}

impl Tensor<'_> {
    pub fn shape(&self) -> &[usize] {
        self.shape
    }

    /// Checks the shape.
    pub fn shaped(self, expected: &[usize]) -> Result<Self> {
        match self.shape == expected {
            true => Ok(self),
            false => Err(self.shape_error(format!("{expected:?}"))),
        }
    }

    /// Rows and columns of a two-dimensional tensor.
    pub fn matrix_shape(&self) -> Result<(usize, usize)> {
        match *self.shape {
            [rows, cols] => Ok((rows, cols)),
            _ => Err(self.shape_error("two-dimensional".into())),
        }
    }

    pub fn shape_error(&self, expected: String) -> Error {
        Error::TensorShape {
            path: self.file.path.clone(),
            name: self.name.clone(),
            found: self.shape.to_vec(),
            expected,
        }
    }

    pub fn value_error(&self, problem: String) -> Error {
        Error::TensorValue { path: self.file.path.clone(), name: self.name.clone(), problem }
    }

    /// The tensor as a matrix [rows, cols]: BF16 in place, F16 and F32 rounded to bf16.
    pub fn matrix(self, rows: usize, cols: usize) -> Result<Matrix> {
        let tensor = self.shaped(&[rows, cols])?;
        if tensor.dtype == Dtype::BF16 {
            return Ok(Matrix::in_place(&tensor.file.bytes, tensor.range, rows, cols));
        }
        let values = tensor.floats(bf16::from_f32, |value| value)?;
        Matrix::new(values, rows, cols)
    }

    /// The tensor [count, rows, cols] as so many matrices, each as [`Tensor::matrix`] gives it.
    pub fn stack(self, count: usize, rows: usize, cols: usize) -> Result<Vec<Matrix>> {
        let tensor = self.shaped(&[count, rows, cols])?;
        let bytes = tensor.range.len().checked_div(count).unwrap_or(0);
        let part = |index: usize| Tensor {
            name: tensor.name.clone(),
            range: tensor.range.start + index * bytes..tensor.range.start + (index + 1) * bytes,
            shape: &tensor.shape[1..],
            ..tensor
        };
        (0..count).into_par_iter().map(|index| part(index).matrix(rows, cols)).collect()
    }

    /// Whether its elements are BF16, F16 or F32.
    pub fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
    }

    /// Whether its elements are e4m3 numbers, which mean nothing without their scales.
    pub fn is_e4m3(&self) -> bool {
        self.dtype == Dtype::F8_E4M3
    }

    /// The codes of an e4m3 tensor [rows, cols], in place.
    pub fn e4m3(self, rows: usize, cols: usize) -> Result<Matrix<u8>> {
        let tensor = self.shaped(&[rows, cols])?;
        match tensor.dtype {
            Dtype::F8_E4M3 => Ok(Matrix::in_place(&tensor.file.bytes, tensor.range, rows, cols)),
            _ => Err(tensor.dtype_error("F8_E4M3")),
        }
    }

    /// A tensor [rows, cols] of scales in F32, BF16 or F8_E8M0, all of them finite and positive.
    pub fn scales(self, rows: usize, cols: usize) -> Result<Matrix<f32>> {
        let tensor = self.shaped(&[rows, cols])?;
        let scales = match tensor.dtype {
            Dtype::F32 | Dtype::BF16 => tensor.f32()?,
            Dtype::F8_E8M0 => tensor.elements(|[code]| from_e8m0(code)),
            _ => return Err(tensor.dtype_error(SCALES)),
        };
        let scales = Matrix::new(scales, rows, cols)?;
        match fp8::bad_scale(&scales) {
            Some(problem) => Err(tensor.value_error(problem)),
            None => Ok(scales),
        }
    }

    /// All values, BF16 only.
    pub fn bf16(&self) -> Result<Vec<bf16>> {
        match self.dtype {
            Dtype::BF16 => self.floats(bf16::from_f32, |value| value),
            _ => Err(self.dtype_error("BF16")),
        }
    }

    /// All values of a BF16, F16 or F32 tensor.
    pub fn f32(&self) -> Result<Vec<f32>> {
        self.floats(|value| value, bf16::to_f32)
    }

    /// Checks that it is F32.
    pub fn is_f32(&self) -> Result<()> {
        match self.dtype {
            Dtype::F32 => Ok(()),
            _ => Err(self.dtype_error("F32")),
        }
    }

    /// All values, F32 only.
    pub fn f32_exactly(&self) -> Result<Vec<f32>> {
        self.is_f32()?;
        self.f32()
    }

    /// All values of an I64 tensor.
    pub fn i64(&self) -> Result<Vec<i64>> {
        match self.dtype {
            Dtype::I64 => Ok(self.elements(i64::from_le_bytes)),
            _ => Err(self.dtype_error("I64")),
        }
    }

    /// All values of an I32 or I64 tensor.
    pub fn integers(&self) -> Result<Vec<i64>> {
        match self.dtype {
            Dtype::I64 => self.i64(),
            Dtype::I32 => Ok(self.elements(|bytes| i64::from(i32::from_le_bytes(bytes)))),
            _ => Err(self.dtype_error("I32 or I64")),
        }
    }

    fn floats<T>(&self, from_f32: impl Fn(f32) -> T, from_bf16: impl Fn(bf16) -> T) -> Result<Vec<T>> {
        match self.dtype {
            Dtype::BF16 => Ok(self.elements(|bytes| from_bf16(bf16::from_le_bytes(bytes)))),
            Dtype::F16 => Ok(self.elements(|bytes| from_f32(f16::from_le_bytes(bytes).to_f32()))),
            Dtype::F32 => Ok(self.elements(|bytes| from_f32(f32::from_le_bytes(bytes)))),
            _ => Err(self.dtype_error(FLOATS)),
        }
    }

    fn elements<const SIZE: usize, T>(&self, convert: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
        let data = &(*self.file.bytes).as_ref()[self.range.clone()];
        data.as_chunks::<SIZE>().0.iter().map(|&bytes| convert(bytes)).collect()
    }

    pub fn dtype_error(&self, expected: &'static str) -> Error {
        Error::TensorDtype {
            path: self.file.path.clone(),
            name: self.name.clone(),
            found: self.dtype.to_string(),
            expected,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::tensor::TensorView;

    use super::*;

    fn file(dtype: Dtype, shape: &[usize], data: &[u8]) -> TensorFile {
        let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        let bytes = safetensors::serialize([("w", view)], None).unwrap();
        TensorFile::new(Path::new("t.safetensors"), Arc::new(bytes)).unwrap()
    }

    #[test]
    fn floats_of_every_kind_become_bf16() {
        let values = [1.0f32, -0.5, 3.0, 1.0 + 1.0 / 256.0];
        let f16_bytes: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let f32_bytes: Vec<u8> = values.iter().flat_map(|&v| v.to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        for (dtype, bytes) in [(Dtype::F16, f16_bytes), (Dtype::F32, f32_bytes), (Dtype::BF16, bf16_bytes)] {
            let file = file(dtype, &[2, 2], &bytes);
            let matrix = file.tensor("w").unwrap().matrix(2, 2).unwrap();
            assert_eq!(matrix.row(0), [bf16::from_f32(1.0), bf16::from_f32(-0.5)]);
            // 1 + 2^-8 lies halfway between two bf16 values; the even one is 1.
            assert_eq!(matrix.row(1), [bf16::from_f32(3.0), bf16::from_f32(1.0)]);
        }
    }

    #[test]
    fn a_stack_is_cut_into_its_matrices() {
        let values: Vec<f32> = (0..12).map(|value| value as f32).collect();
        let f32_bytes: Vec<u8> = values.iter().flat_map(|&v| v.to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        for (dtype, bytes) in [(Dtype::F32, f32_bytes), (Dtype::BF16, bf16_bytes)] {
            let file = file(dtype, &[2, 3, 2], &bytes);
            let matrices = file.tensor("w").unwrap().stack(2, 3, 2).unwrap();
            assert_eq!(matrices.len(), 2);
            assert_eq!(matrices[1].row(2), [bf16::from_f32(10.0), bf16::from_f32(11.0)]);
            let error = file.tensor("w").unwrap().stack(3, 2, 2).unwrap_err().to_string();
            assert!(error.contains("[2, 3, 2]; it must be [3, 2, 2]"), "{error}");
        }
    }

    #[test]
    fn whole_numbers_of_both_widths_are_read() {
        let bytes: Vec<u8> = [7i32, -1].iter().flat_map(|value| value.to_le_bytes()).collect();
        let file = file(Dtype::I32, &[2], &bytes);
        assert_eq!(file.tensor("w").unwrap().integers().unwrap(), [7, -1]);
        file.tensor("w").unwrap().i64().unwrap_err();
    }

    #[test]
    fn a_file_that_git_lfs_has_not_fetched_is_called_that() {
        let bytes = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n".to_vec();
        let error = TensorFile::new(Path::new("model.safetensors"), Arc::new(bytes)).err().unwrap().to_string();
        assert!(error.contains("model.safetensors") && error.contains("git lfs pull"), "{error}");
    }

    #[test]
    fn wrong_dtype_and_shape_are_named() {
        let file = file(Dtype::I64, &[2], &[0; 16]);
        assert_eq!(file.tensor("w").unwrap().i64().unwrap(), [0, 0]);
        assert_eq!(file.names().collect::<Vec<_>>(), ["w"]);
        let message = |error: Error| error.to_string();
        let wrong = message(file.tensor("w").unwrap().f32().unwrap_err());
        assert_eq!(wrong, "tensor `w` of t.safetensors is I64; it must be BF16, F16 or F32");
        let wrong = message(file.tensor("w").unwrap().matrix(2, 3).unwrap_err());
        assert_eq!(wrong, "tensor `w` of t.safetensors has shape [2]; it must be [2, 3]");
        let wrong = message(file.tensor("w").unwrap().matrix_shape().unwrap_err());
        assert_eq!(wrong, "tensor `w` of t.safetensors has shape [2]; it must be two-dimensional");
        let wrong = message(file.tensor("v").err().unwrap());
        assert_eq!(wrong, "t.safetensors has no tensor `v`");
    }

    proptest! {
        #[test]
        fn damaged_files_do_not_panic(at in 0usize..120, byte: u8, length in 0usize..200) {
            let view = TensorView::new(Dtype::BF16, vec![2, 3], &[0; 12]).unwrap();
            let mut bytes = safetensors::serialize([("w", view)], None).unwrap();
            let last = bytes.len() - 1;
            bytes[at.min(last)] = byte;
            bytes.truncate(length.max(60));
            if let Ok(file) = TensorFile::new(Path::new("t.safetensors"), Arc::new(bytes))
                && let Ok(matrix) = file.tensor("w").and_then(|tensor| tensor.matrix(2, 3))
            {
                prop_assert_eq!(matrix.row(1).len(), 3);
            }
        }
    }

    #[test]
    fn broken_files_are_refused() {
        let whole = {
            let view = TensorView::new(Dtype::I64, vec![2], &[0; 16]).unwrap();
            safetensors::serialize([("w", view)], None).unwrap()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.safetensors");
        for broken in [&whole[..whole.len() - 1], &whole[..20], &whole[..4], b"", b"PK\x03\x04 not a safetensors file"]
        {
            std::fs::write(&path, broken).unwrap();
            let error = TensorFile::open(&path).err().unwrap();
            assert!(matches!(error, Error::NotSafetensors { .. }), "{error}");
            assert!(error.to_string().contains("broken.safetensors"), "{error}");
        }
        let error = TensorFile::open(&folder.path().join("absent.safetensors")).err().unwrap().to_string();
        assert!(error.starts_with("cannot read") && error.contains("absent.safetensors"), "{error}");
    }
}
