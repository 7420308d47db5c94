//! How the weights of one rank lie in memory for the FP8 kernel.

use ferromoe_kernel::quantise::{GROUP as BLOCK, ScaleKind};
use ferromoe_kernel::tile::WEIGHT_TILE;
use rayon::prelude::*;

use super::{Expert, ExpertWeights, source_row};
use crate::config::MoeConfig;
use crate::error::Result;
use crate::fp8::Fp8Matrix;
use crate::matrix::Matrix;

/// The scales of one weight tile and k-block, 16 bytes: two of them, and zeros.
const SCALES: usize = 4;

/// The weights of one rank in e4m3, as the kernel reads them: the shared experts, then its own in order.
#[derive(Debug, PartialEq)]
pub struct Fp8RankWeights {
    /// e4m3 [shared + own, 2I, H]: rows 16j to 16j+8 are gate rows 8j to 8j+8, rows 16j+8 to 16j+16 the same up rows.
    pub linear1: Vec<u8>,
    /// f32 [shared + own, 2I / 128, ceil(H / 128), 4]: for each 128 of those rows and 128 columns the scale of the gate rows, that of the
    /// up rows, 0, 0.
    pub linear1_scales: Vec<f32>,
    /// e4m3 [shared + own, H, I]: the down matrices.
    pub linear2: Vec<u8>,
    /// f32 [shared + own, ceil(H / 128), ceil(I / 128), 4]: for each 128 rows and 128 columns the scale twice, 0, 0.
    pub linear2_scales: Vec<f32>,
}

impl ExpertWeights {
    /// Lays out the weights for `rank` of `ranks` in e4m3 with a scale for each block of 128 x 128. Matrices in bf16 are quantised, with scales
    /// as `config.scales` says; those with smaller blocks are coded anew, exactly where their exponents allow it. The configuration must
    /// be valid for that many ranks.
    ///
    /// # Errors
    /// As [`ExpertWeights::prepare`].
    pub fn prepare_fp8(&self, config: &MoeConfig, rank: usize, ranks: usize) -> Result<Fp8RankWeights> {
        config.validate(ranks)?;
        self.check(config)?;
        let experts: Vec<&Expert> = self.of_rank(config, rank, ranks).collect();
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let blocks = |size: usize| size.div_ceil(BLOCK as usize);
        let matrix = hidden * intermediate;
        let tile_scales = SCALES * (2 * intermediate).div_ceil(WEIGHT_TILE as usize) * blocks(hidden);
        let down_scales = SCALES * blocks(hidden) * blocks(intermediate);
        let mut weights = Fp8RankWeights {
            linear1: vec![0; experts.len() * 2 * matrix],
            linear1_scales: vec![0.0; experts.len() * tile_scales],
            linear2: vec![0; experts.len() * matrix],
            linear2_scales: vec![0.0; experts.len() * down_scales],
        };
        let targets = (
            weights.linear1.par_chunks_exact_mut(2 * matrix),
            weights.linear1_scales.par_chunks_exact_mut(tile_scales),
            weights.linear2.par_chunks_exact_mut(matrix),
            weights.linear2_scales.par_chunks_exact_mut(down_scales),
            &experts,
        );
        let rounded = targets
            .into_par_iter()
            .map(|(linear1, linear1_scales, linear2, linear2_scales, expert)| {
                write_linear1(expert, config.scales, linear1, linear1_scales)
                    + write_linear2(expert, config.scales, linear2, linear2_scales)
            })
            .sum::<usize>();
        if rounded > 0 {
            let all = 3 * matrix * experts.len();
            tracing::warn!(
                "{rounded} of {all} weights of rank {rank} had to be rounded: blocks of 32 x 32 became blocks of 128 x 128, and their exponents \
                 are too far apart"
            );
        }
        Ok(weights)
    }
}

/// Writes the interleaved linear-1 matrix and its scales; gives how many numbers were rounded.
fn write_linear1(expert: &Expert, kind: ScaleKind, target: &mut [u8], scales: &mut [f32]) -> usize {
    let ((gate, gate_rounded), (up, up_rounded)) = (expert.gate.to_fp8(kind), expert.up.to_fp8(kind));
    for (row, target) in target.chunks_exact_mut(gate.cols()).enumerate() {
        let (is_gate, source) = source_row(row);
        let matrix = if is_gate { &gate } else { &up };
        target.copy_from_slice(matrix.values().row(source));
    }
    for (tile, scales) in scales.chunks_exact_mut(SCALES * gate.scales().cols()).enumerate() {
        // Half of a tile's rows are gate rows.
        let block = tile * WEIGHT_TILE as usize / 2 / gate.block();
        write_scales(scales, gate.scales().row(block), up.scales().row(block));
    }
    gate_rounded + up_rounded
}

/// Writes the linear-2 matrix and its scales; gives how many numbers were rounded.
fn write_linear2(expert: &Expert, kind: ScaleKind, target: &mut [u8], scales: &mut [f32]) -> usize {
    let (down, rounded): (Fp8Matrix, usize) = expert.down.to_fp8(kind);
    for (row, target) in target.chunks_exact_mut(down.cols()).enumerate() {
        target.copy_from_slice(down.values().row(row));
    }
    let of_blocks: &Matrix<f32> = down.scales();
    for (block, scales) in scales.chunks_exact_mut(SCALES * of_blocks.cols()).enumerate() {
        write_scales(scales, of_blocks.row(block), of_blocks.row(block));
    }
    rounded
}

fn write_scales(target: &mut [f32], first: &[f32], second: &[f32]) {
    for ((target, &first), &second) in target.as_chunks_mut::<SCALES>().0.iter_mut().zip(first).zip(second) {
        *target = [first, second, 0.0, 0.0];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::float8::from_e4m3;
    use crate::testing::small_config;

    /// H and I with whole and with partial blocks.
    const SIZES: [[usize; 2]; 4] = [[128, 128], [192, 64], [64, 320], [320, 192]];

    #[test]
    fn quantised_weights_and_scales_land_in_their_places() {
        for [hidden, intermediate] in SIZES {
            let config = MoeConfig { hidden, intermediate, experts: 4, top_k: 1, shared_experts: 1, ..small_config() };
            let weights = ExpertWeights::random(&config, 7);
            for rank in 0..2 {
                let prepared = weights.prepare_fp8(&config, rank, 2).unwrap();
                let experts: Vec<_> = weights.of_rank(&config, rank, 2).collect();
                let (tiles, h_blocks, i_blocks) = (intermediate / 64, hidden.div_ceil(128), intermediate.div_ceil(128));
                assert_eq!(prepared.linear1_scales.len(), experts.len() * tiles * h_blocks * 4);
                assert_eq!(prepared.linear2_scales.len(), experts.len() * h_blocks * i_blocks * 4);
                for (local, expert) in experts.into_iter().enumerate() {
                    for i in 0..intermediate {
                        for (up, matrix) in [&expert.gate, &expert.up].into_iter().enumerate() {
                            let row = i / 8 * 16 + i % 8 + 8 * up;
                            let codes = &prepared.linear1[(local * 2 * intermediate + row) * hidden..][..hidden];
                            let scales = &prepared.linear1_scales[(local * tiles + row / 128) * h_blocks * 4..];
                            assert_close(codes, |h| scales[h / 128 * 4 + up], &matrix.row_f64(i));
                        }
                    }
                    for h in 0..hidden {
                        let codes = &prepared.linear2[(local * hidden + h) * intermediate..][..intermediate];
                        let scales = &prepared.linear2_scales[(local * h_blocks + h / 128) * i_blocks * 4..];
                        assert_close(codes, |i| scales[i / 128 * 4], &expert.down.row_f64(h));
                        assert_eq!(scales[0..4], [scales[0], scales[0], 0.0, 0.0]);
                    }
                }
            }
        }
    }

    /// An e4m3 number has four significant bits; the smallest ones have steps of 2^-9.
    fn assert_close(codes: &[u8], scale: impl Fn(usize) -> f32, expected: &[f64]) {
        for (column, (&code, &expected)) in codes.iter().zip(expected).enumerate() {
            let scale = f64::from(scale(column));
            let found = f64::from(from_e4m3(code)) * scale;
            let allowed = (expected.abs() / 16.0).max(scale / 1024.0) * (1.0 + 1e-5);
            assert!((found - expected).abs() <= allowed, "column {column}: {found}, expected {expected}");
        }
    }

    #[test]
    fn fp8_weights_keep_their_codes_and_scales() {
        let config = MoeConfig { hidden: 192, intermediate: 320, ..small_config() };
        let mut weights = ExpertWeights::random(&config, 3);
        let quantised = weights.prepare_fp8(&config, 0, 1).unwrap();
        for expert in weights.experts.iter_mut().chain(&mut weights.shared) {
            for matrix in [&mut expert.gate, &mut expert.up, &mut expert.down] {
                *matrix = matrix.to_fp8(ScaleKind::F32).0.into();
            }
        }
        // A scale of another kind is nothing to matrices that have theirs.
        let config = MoeConfig { scales: ScaleKind::PowerOfTwo, ..config };
        assert_eq!(weights.prepare_fp8(&config, 0, 1).unwrap(), quantised);
    }
}
