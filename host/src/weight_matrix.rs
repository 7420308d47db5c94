//! A weight matrix in whatever number format it is kept.

use std::borrow::Cow;
use std::ops::Range;

use ferromoe_kernel::quantise::ScaleKind;
use half::bf16;

use crate::config::ExpertFormat;
use crate::error::Result;
use crate::fp8::Fp8Matrix;
use crate::matrix::Matrix;

/// A row-major matrix [rows, cols] of an expert.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum WeightMatrix {
    /// bf16 numbers.
    Bf16(Matrix),
    /// e4m3 numbers with block scales.
    Fp8(Fp8Matrix),
}

impl WeightMatrix {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Self::Bf16(matrix) => matrix.rows(),
            Self::Fp8(matrix) => matrix.rows(),
        }
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        match self {
            Self::Bf16(matrix) => matrix.cols(),
            Self::Fp8(matrix) => matrix.cols(),
        }
    }

    /// The format that it is kept in.
    pub fn format(&self) -> ExpertFormat {
        match self {
            Self::Bf16(_) => ExpertFormat::Bf16,
            Self::Fp8(_) => ExpertFormat::Fp8,
        }
    }

    /// One row in bf16, `cols` long: as it is, or number x scale rounded.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> Cow<'_, [bf16]> {
        match self {
            Self::Bf16(matrix) => Cow::Borrowed(matrix.row(row)),
            Self::Fp8(matrix) => matrix.row(row).map(|(value, scale)| bf16::from_f32(value * scale)).collect(),
        }
    }

    /// One row in f64, without any rounding.
    pub(crate) fn row_f64(&self, row: usize) -> Vec<f64> {
        match self {
            Self::Bf16(matrix) => matrix.row(row).iter().map(|value| value.to_f64()).collect(),
            Self::Fp8(matrix) => matrix.row(row).map(|(value, scale)| f64::from(value) * f64::from(scale)).collect(),
        }
    }

    /// The matrix as e4m3 numbers in blocks of 128 x 128, quantised where it is bf16 (`kind` says what its scales may be), and how many numbers of a
    /// matrix with smaller blocks had to be rounded.
    pub(crate) fn to_fp8(&self, kind: ScaleKind) -> (Fp8Matrix, usize) {
        match self {
            Self::Fp8(matrix) => matrix.in_kernel_blocks(),
            Self::Bf16(matrix) => {
                let write_row = |row: usize, numbers: &mut [f32]| {
                    for (number, value) in numbers.iter_mut().zip(matrix.row(row)) {
                        *number = value.to_f32();
                    }
                };
                (Fp8Matrix::quantise([matrix.rows(), matrix.cols()], kind, write_row), 0)
            }
        }
    }

    /// A view of some rows.
    ///
    /// # Errors
    /// A cut within a block that shares a scale.
    ///
    /// # Panics
    /// If the range is not within the matrix.
    pub fn rows_view(&self, rows: Range<usize>) -> Result<Self> {
        Ok(match self {
            Self::Bf16(matrix) => Self::Bf16(matrix.rows_view(rows)),
            Self::Fp8(matrix) => Self::Fp8(matrix.rows_view(rows)?),
        })
    }

    /// A view of some columns.
    ///
    /// # Errors
    /// A cut within a block that shares a scale.
    ///
    /// # Panics
    /// If the range is not within the matrix.
    pub fn cols_view(&self, cols: Range<usize>) -> Result<Self> {
        Ok(match self {
            Self::Bf16(matrix) => Self::Bf16(matrix.cols_view(cols)),
            Self::Fp8(matrix) => Self::Fp8(matrix.cols_view(cols)?),
        })
    }
}

impl From<Matrix> for WeightMatrix {
    fn from(matrix: Matrix) -> Self {
        Self::Bf16(matrix)
    }
}

impl From<Fp8Matrix> for WeightMatrix {
    fn from(matrix: Fp8Matrix) -> Self {
        Self::Fp8(matrix)
    }
}
