//! A matrix that is read by rows: owned, or still where the checkpoint file is mapped.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use half::bf16;

use crate::error::{Error, Result};

const _: () = assert!(cfg!(target_endian = "little"), "safetensors files are little-endian and are read in place");

/// Bytes that outlive whoever opened them: a mapped file, an embedded one.
pub(crate) type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

#[derive(Clone)]
enum Elements<T> {
    Owned(Arc<[T]>),
    /// The byte range starts at an address that suits the elements.
    InPlace(Bytes, Range<usize>),
}

/// A row-major matrix, of bf16 unless said otherwise, or a view of some of the rows and columns of one. Cloning and cutting copy nothing.
#[derive(Clone)]
pub struct Matrix<T = bf16> {
    elements: Elements<T>,
    offset: usize,
    stride: usize,
    rows: usize,
    cols: usize,
}

impl<T: Pod> Matrix<T> {
    /// A matrix [rows, cols] of row-major values.
    pub fn new(values: Vec<T>, rows: usize, cols: usize) -> Result<Self> {
        if rows.checked_mul(cols) != Some(values.len()) {
            return Err(Error::Size {
                what: format!("a matrix of shape [{rows}, {cols}]"),
                found: format!("{} values", values.len()),
                expected: "rows x columns values".into(),
            });
        }
        Ok(Self::from_rows(values, rows, cols))
    }

    /// As `new`, for a caller that has made exactly rows x cols values.
    pub(crate) fn from_rows(values: Vec<T>, rows: usize, cols: usize) -> Self {
        debug_assert_eq!(values.len(), rows * cols);
        Self { elements: Elements::Owned(values.into()), offset: 0, stride: cols, rows, cols }
    }

    /// A matrix [rows, cols] over the little-endian elements in `range` of `bytes`, in place where they are aligned.
    ///
    /// `range` holds exactly rows x cols elements: its caller has it from a checked safetensors header.
    pub(crate) fn in_place(bytes: &Bytes, range: Range<usize>, rows: usize, cols: usize) -> Self {
        let data = &(**bytes).as_ref()[range.clone()];
        debug_assert_eq!(data.len(), size_of::<T>() * rows * cols);
        let elements = if bytemuck::try_cast_slice::<u8, T>(data).is_ok() {
            Elements::InPlace(bytes.clone(), range)
        } else {
            Elements::Owned(bytemuck::pod_collect_to_vec(data).into())
        };
        Self { elements, offset: 0, stride: cols, rows, cols }
    }

    #[cfg(test)]
    pub(crate) fn is_in_place(&self) -> bool {
        matches!(self.elements, Elements::InPlace(..))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row, `cols` long.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let elements = match &self.elements {
            Elements::Owned(values) => values,
            Elements::InPlace(bytes, range) => bytemuck::cast_slice(&(**bytes).as_ref()[range.clone()]),
        };
        let start = self.offset + row * self.stride;
        &elements[start..start + self.cols]
    }

    /// A view of some rows.
    ///
    /// # Panics
    /// If the range is not within the matrix.
    pub fn rows_view(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        Self { offset: self.offset + rows.start * self.stride, rows: rows.len(), ..self.clone() }
    }

    /// A view of some columns.
    ///
    /// # Panics
    /// If the range is not within the matrix.
    pub fn cols_view(&self, cols: Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        Self { offset: self.offset + cols.start, cols: cols.len(), ..self.clone() }
    }
}

impl<T> fmt::Debug for Matrix<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix[{}, {}]", self.rows, self.cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(matrix: &Matrix) -> Vec<Vec<f32>> {
        (0..matrix.rows()).map(|row| matrix.row(row).iter().map(|value| value.to_f32()).collect()).collect()
    }

    #[test]
    fn views_show_their_part() {
        let matrix = Matrix::new((0..12).map(|i| bf16::from_f32(i as f32)).collect(), 3, 4).unwrap();
        assert_eq!(values(&matrix)[2], [8.0, 9.0, 10.0, 11.0]);
        let view = matrix.rows_view(1..3).cols_view(1..3);
        assert_eq!(values(&view), [[5.0, 6.0], [9.0, 10.0]]);
        assert_eq!(values(&view.rows_view(1..2).cols_view(1..2)), [[10.0]]);
    }

    #[test]
    fn bytes_are_read_whatever_their_alignment() {
        let mut file = vec![0u8; 3];
        file.extend([1.5f32, -2.0, 0.25].iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
        for shift in [0, 1] {
            let bytes: Bytes = Arc::new(file[shift..].to_vec());
            assert_eq!(values(&Matrix::in_place(&bytes, 3 - shift..9 - shift, 1, 3)), [[1.5, -2.0, 0.25]]);
        }
    }

    #[test]
    fn a_wrong_length_is_refused() {
        let error = Matrix::new(vec![bf16::ZERO; 5], 2, 3).unwrap_err().to_string();
        assert!(error.contains("[2, 3]") && error.contains("5 values"), "{error}");
    }
}
