//! Matrices of e4m3 numbers with a scale for each block.

use std::ops::Range;

use ferromoe_kernel::quantise::{self, GroupScale, ScaleKind};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::float8::{from_e4m3, to_e4m3};
use crate::matrix::Matrix;

/// Rows and columns of the blocks that the kernel has a scale for.
pub(crate) const KERNEL_BLOCK: usize = quantise::GROUP as usize;

/// Rows and columns of the blocks that a checkpoint may have a scale for.
pub(crate) const BLOCKS: [usize; 2] = [KERNEL_BLOCK, 32];

/// A row-major matrix of e4m3 numbers, with an f32 scale for each square block: an element stands for number x scale. Or a view of some of the
/// rows and columns of one, cut at blocks. Cloning and cutting copy nothing.
#[derive(Clone, Debug)]
pub struct Fp8Matrix {
    values: Matrix<u8>,
    scales: Matrix<f32>,
    block: usize,
}

impl Fp8Matrix {
    /// `values` are e4m3 [rows, cols], `scales` f32 [ceil(rows / block), ceil(cols / block)]; `block` is 128 or 32.
    ///
    /// # Errors
    /// Another block, scales of another shape, or one that is not finite and positive.
    pub fn new(values: Matrix<u8>, scales: Matrix<f32>, block: usize) -> Result<Self> {
        if !BLOCKS.contains(&block) {
            return Err(Error::Size {
                what: "a matrix of e4m3 numbers".into(),
                found: format!("a scale for each block of {block} x {block}"),
                expected: "one for each block of 128 x 128, or of 32 x 32".into(),
            });
        }
        let (found, expected) = ([scales.rows(), scales.cols()], scale_shape([values.rows(), values.cols()], block));
        if found != expected {
            return Err(Error::Size {
                what: format!("a matrix of e4m3 numbers of shape [{}, {}]", values.rows(), values.cols()),
                found: format!("block scales of shape {found:?}"),
                expected: format!("block scales of shape {expected:?}"),
            });
        }
        match bad_scale(&scales) {
            Some(problem) => Err(Error::BlockScale { problem }),
            None => Ok(Self { values, scales, block }),
        }
    }

    /// The matrix [rows, cols] whose rows `write_row` gives, quantised by the kernel's rule in blocks of 128 x 128: each block's largest
    /// magnitude becomes the largest e4m3 number.
    pub(crate) fn quantise(
        [rows, cols]: [usize; 2],
        kind: ScaleKind,
        write_row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let [block_rows, block_cols] = scale_shape([rows, cols], KERNEL_BLOCK);
        let mut values = vec![0u8; rows * cols];
        let mut scales = vec![0f32; block_rows * block_cols];
        let bands = values.par_chunks_mut(KERNEL_BLOCK * cols).zip(scales.par_chunks_mut(block_cols));
        bands.enumerate().for_each(|(band, (values, scales))| {
            let mut numbers = vec![0f32; values.len()];
            for (row, numbers) in numbers.chunks_exact_mut(cols).enumerate() {
                write_row(band * KERNEL_BLOCK + row, numbers);
            }
            for (block, scale) in scales.iter_mut().enumerate() {
                let columns = block * KERNEL_BLOCK..cols.min((block + 1) * KERNEL_BLOCK);
                let parts = || numbers.chunks_exact(cols).map(|row| &row[columns.clone()]);
                let found = GroupScale::new(largest(parts().flatten().copied()), kind, |scale| 1.0 / scale);
                *scale = found.scale;
                for (codes, numbers) in values.chunks_exact_mut(cols).zip(parts()) {
                    for (code, number) in codes[columns.clone()].iter_mut().zip(numbers) {
                        *code = to_e4m3(number * found.inverse);
                    }
                }
            }
        });
        let values = Matrix::from_rows(values, rows, cols);
        Self { values, scales: Matrix::from_rows(scales, block_rows, block_cols), block: KERNEL_BLOCK }
    }

    /// The same numbers in blocks of 128 x 128, and how many of them had to be rounded: none where the scales are powers of two and the
    /// exponents of a block's parts are not too far apart.
    pub(crate) fn in_kernel_blocks(&self) -> (Self, usize) {
        if self.block == KERNEL_BLOCK {
            return (self.clone(), 0);
        }
        let power = |scale: &f32| scale.to_bits() & 0x7f_ffff == 0 || *scale == f32::from_bits(1 << 22);
        let powers = (0..self.scales.rows()).all(|row| self.scales.row(row).iter().all(power));
        let kind = if powers { ScaleKind::PowerOfTwo } else { ScaleKind::F32 };
        let coarse = Self::quantise([self.rows(), self.cols()], kind, |row, numbers| self.write_row(row, numbers));
        let rounded = (0..self.rows()).into_par_iter().map(|row| {
            let (mut before, mut after) = (vec![0f32; self.cols()], vec![0f32; self.cols()]);
            self.write_row(row, &mut before);
            coarse.write_row(row, &mut after);
            before.iter().zip(&after).filter(|(before, after)| before != after).count()
        });
        let rounded = rounded.sum();
        (coarse, rounded)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.rows()
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.values.cols()
    }

    /// Rows and columns that share a scale: 128 or 32.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The e4m3 numbers [rows, cols].
    pub fn values(&self) -> &Matrix<u8> {
        &self.values
    }

    /// The scales [ceil(rows / block), ceil(cols / block)].
    pub fn scales(&self) -> &Matrix<f32> {
        &self.scales
    }

    /// What the numbers of a row stand for, in order.
    ///
    /// # Panics
    /// If there is no such row.
    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = (f32, f32)> {
        let blocks = self.values.row(row).chunks(self.block).zip(self.scales.row(row / self.block));
        blocks.flat_map(|(codes, &scale)| codes.iter().map(move |&code| (from_e4m3(code), scale)))
    }

    fn write_row(&self, row: usize, numbers: &mut [f32]) {
        for (number, (value, scale)) in numbers.iter_mut().zip(self.row(row)) {
            *number = value * scale;
        }
    }

    /// A view of some rows.
    ///
    /// # Errors
    /// A cut within a block.
    ///
    /// # Panics
    /// If the range is not within the matrix.
    pub fn rows_view(&self, rows: Range<usize>) -> Result<Self> {
        let blocks = self.blocks_of(&rows, self.rows(), "row")?;
        Ok(Self { scales: self.scales.rows_view(blocks), values: self.values.rows_view(rows), block: self.block })
    }

    /// A view of some columns.
    ///
    /// # Errors
    /// A cut within a block.
    ///
    /// # Panics
    /// If the range is not within the matrix.
    pub fn cols_view(&self, cols: Range<usize>) -> Result<Self> {
        let blocks = self.blocks_of(&cols, self.cols(), "column")?;
        Ok(Self { scales: self.scales.cols_view(blocks), values: self.values.cols_view(cols), block: self.block })
    }

    fn blocks_of(&self, range: &Range<usize>, end: usize, what: &'static str) -> Result<Range<usize>> {
        let block = self.block;
        for cut in [range.start, range.end] {
            if cut != end && !cut.is_multiple_of(block) {
                return Err(Error::BlockCut { what, cut, block });
            }
        }
        Ok(range.start.div_ceil(block)..range.end.div_ceil(block))
    }
}

/// Shape of the scales of a matrix [rows, cols].
pub(crate) fn scale_shape(shape: [usize; 2], block: usize) -> [usize; 2] {
    shape.map(|size| size.div_ceil(block))
}

/// What is wrong with the first scale that is not finite and positive.
pub(crate) fn bad_scale(scales: &Matrix<f32>) -> Option<String> {
    let bad = |&scale: &f32| !(scale.is_finite() && scale > 0.0);
    (0..scales.rows()).find_map(|row| {
        let values = scales.row(row);
        let column = values.iter().position(bad)?;
        Some(format!("the scale [{row}, {column}] is {}; it must be finite and above 0", values[column]))
    })
}

/// The largest magnitude; NaN where there is one.
pub(crate) fn largest(values: impl Iterator<Item = f32>) -> f32 {
    // As whole numbers, magnitudes keep their order, and NaN is above them all.
    f32::from_bits(values.map(|value| value.abs().to_bits()).max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn numbers(matrix: &Fp8Matrix) -> Vec<Vec<f32>> {
        (0..matrix.rows()).map(|row| matrix.row(row).map(|(value, scale)| value * scale).collect()).collect()
    }

    /// Random codes without NaN, and the scales that `scale` gives by row and column of a block.
    fn random(shape: [usize; 2], block: usize, scale: impl Fn(usize, usize) -> f32) -> Fp8Matrix {
        let [rows, cols] = shape;
        let mut random = StdRng::seed_from_u64(5);
        let codes = (0..rows * cols).map(|_| random.random_range(0x20..0x7fu8) | random.random_range(0..2u8) << 7);
        let values = Matrix::new(codes.collect(), rows, cols).unwrap();
        let [rows, cols] = scale_shape(shape, block);
        let scales = (0..rows * cols).map(|at| scale(at / cols, at % cols)).collect();
        Fp8Matrix::new(values, Matrix::new(scales, rows, cols).unwrap(), block).unwrap()
    }

    #[test]
    fn each_block_has_its_scale_and_the_last_may_be_partial() {
        let matrix = random([160, 300], 128, |row, col| 1.0 + (10 * row + col) as f32);
        let found = numbers(&matrix);
        for (row, col, scale) in
            [(0, 0, 1.0), (127, 127, 1.0), (0, 128, 2.0), (127, 299, 3.0), (128, 0, 11.0), (159, 299, 13.0)]
        {
            assert_eq!(found[row][col], from_e4m3(matrix.values().row(row)[col]) * scale, "[{row}, {col}]");
        }
    }

    #[test]
    fn views_are_cut_at_blocks() {
        for block in BLOCKS {
            let matrix = random([2 * block + 8, 3 * block], block, |row, col| 1.0 + (10 * row + col) as f32);
            let all = numbers(&matrix);
            let rows = matrix.rows_view(block..2 * block + 8).unwrap();
            assert_eq!(numbers(&rows), all[block..]);
            let cols = rows.cols_view(block..2 * block).unwrap();
            assert!(numbers(&cols).iter().zip(&all[block..]).all(|(found, all)| found == &all[block..2 * block]));
            let text = matrix.rows_view(0..8).unwrap_err().to_string();
            assert!(text.contains(&format!("cannot be cut at row 8; cuts must be at multiples of {block}")), "{text}");
            assert!(matrix.cols_view(block / 2..block).is_err());
        }
    }

    #[test]
    fn small_blocks_become_large_ones_without_loss_where_exponents_are_near() {
        let near = random([130, 200], 32, |row, col| 2f32.powi(-(((row + 3 * col) % 3) as i32)));
        let (coarse, rounded) = near.in_kernel_blocks();
        assert_eq!((coarse.block(), rounded), (128, 0));
        assert_eq!(numbers(&coarse), numbers(&near));
        assert!(coarse.scales().row(1).iter().all(|scale| scale.log2().fract() == 0.0));

        // A part whose largest number is 2^14 times smaller falls into the steps of 2^-9.
        let far = random([32, 64], 32, |_, col| if col == 0 { 1.0 } else { 2f32.powi(-14) });
        let (coarse, rounded) = far.in_kernel_blocks();
        assert!(rounded > 512 && rounded <= 1024, "{rounded}");
        for (found, expected) in numbers(&coarse).iter().flatten().zip(numbers(&far).iter().flatten()) {
            assert!((found - expected).abs() <= 1.0 / 1024.0, "{found} for {expected}");
        }
    }

    #[test]
    fn scales_that_are_no_powers_of_two_are_rounded_to_one_of_f32() {
        let matrix = random([64, 64], 32, |row, col| 0.3 + 0.1 * (row + col) as f32);
        let (coarse, rounded) = matrix.in_kernel_blocks();
        assert!(rounded > 1000);
        for (found, expected) in numbers(&coarse).iter().flatten().zip(numbers(&matrix).iter().flatten()) {
            assert!(
                (found - expected).abs() <= (expected.abs() / 16.0).max(coarse.scales().row(0)[0] / 1024.0) * 1.0001
            );
        }
    }

    #[test]
    fn quantising_takes_each_blocks_own_largest_value() {
        let value = |row: usize, col: usize| if (row, col) == (3, 200) { -896.0 } else { 7.0 };
        let matrix = Fp8Matrix::quantise([64, 256], ScaleKind::F32, |row, numbers| {
            numbers.iter_mut().enumerate().for_each(|(col, number)| *number = value(row, col));
        });
        let scales = matrix.scales().row(0);
        assert!((scales[0] * 448.0 / 7.0 - 1.0).abs() < 1e-6 && (scales[1] - 2.0).abs() < 1e-6, "{scales:?}");
        assert_eq!(matrix.values().row(3)[200], 0xfe);
        assert_eq!(matrix.values().row(0)[0], 0x7e);
        let nan = Fp8Matrix::quantise([1, 256], ScaleKind::F32, |_, numbers| numbers.fill(f32::NAN));
        assert!(nan.row(0).all(|(value, scale)| (value * scale).is_nan()));
    }

    #[test]
    fn what_is_no_matrix_is_refused() {
        let values = || Matrix::new(vec![0u8; 130 * 64], 130, 64).unwrap();
        let scales = |values: &[f32]| Matrix::new(values.to_vec(), values.len(), 1).unwrap();
        let message = |scales, block| Fp8Matrix::new(values(), scales, block).unwrap_err().to_string();
        assert!(
            message(scales(&[1.0, 1.0]), 64).contains("each block of 64 x 64; it must have one for each block of 128")
        );
        let text = message(scales(&[1.0]), 128);
        assert!(
            text.contains("[130, 64] has block scales of shape [1, 1]; it must have block scales of shape [2, 1]"),
            "{text}"
        );
        for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (0.0, "0"), (-1.5, "-1.5")] {
            let text = message(scales(&[1.0, bad]), 128);
            assert_eq!(text, format!("the scale [1, 0] is {name}; it must be finite and above 0"));
        }
    }
}
