//! The experts' weights, and how they are laid out for one rank's kernel.

mod fp8;

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::config::{ExpertFormat, MoeConfig};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::weight_matrix::WeightMatrix;

pub use fp8::Fp8RankWeights;

/// Gate rows, then up rows, that alternate in the linear-1 matrix, so that one thread of a warpgroup holds a gate value
/// and its up value: rows r and r + 8 of wgmma's D belong to the same thread (PTX ISA 8.6, wgmma.mma_async).
const GROUP: usize = ferromoe_kernel::tile::GATE_UP_GROUP as usize;

/// One expert's three matrices: down(silu(gate x) * up x).
#[derive(Clone, Debug)]
pub struct Expert {
    /// [I, H]
    pub gate: WeightMatrix,
    /// [I, H]
    pub up: WeightMatrix,
    /// [H, I]
    pub down: WeightMatrix,
}

/// The weights of all experts of one layer.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// The routed experts, by id.
    pub experts: Vec<Expert>,
    /// The experts every token goes to with weight 1. A checkpoint's one wide shared expert is several of these.
    pub shared: Vec<Expert>,
}

/// The weights of one rank in bf16, as the kernel reads them: the shared experts, then its own in order.
#[derive(Debug, PartialEq)]
pub struct RankWeights {
    /// [shared + own, 2I, H]: rows 16j to 16j+8 are gate rows 8j to 8j+8, rows 16j+8 to 16j+16 the same up rows.
    pub linear1: Vec<bf16>,
    /// [shared + own, H, I]: the down matrices.
    pub linear2: Vec<bf16>,
}

/// The weights of one rank in the format that a layer runs in.
pub(crate) enum LaidOutWeights {
    Bf16(RankWeights),
    Fp8(Fp8RankWeights),
}

impl LaidOutWeights {
    pub(crate) fn new(weights: &ExpertWeights, config: &MoeConfig, rank: usize, ranks: usize) -> Result<Self> {
        Ok(match config.experts_format {
            ExpertFormat::Bf16 => Self::Bf16(weights.prepare(config, rank, ranks)?),
            ExpertFormat::Fp8 => Self::Fp8(weights.prepare_fp8(config, rank, ranks)?),
        })
    }

    /// The matrices of linear 1 and of linear 2.
    pub(crate) fn matrices(&self) -> [&[u8]; 2] {
        match self {
            Self::Bf16(weights) => [&weights.linear1, &weights.linear2].map(|matrix| bytemuck::cast_slice(matrix)),
            Self::Fp8(weights) => [&weights.linear1, &weights.linear2],
        }
    }

    /// Their scales.
    pub(crate) fn scales(&self) -> Option<[&[f32]; 2]> {
        match self {
            Self::Bf16(_) => None,
            Self::Fp8(weights) => Some([&weights.linear1_scales, &weights.linear2_scales]),
        }
    }
}

impl Expert {
    /// Cuts an expert of intermediate size `parts * intermediate` into experts whose outputs add up to its output.
    ///
    /// # Errors
    /// A cut within a block that shares a scale.
    pub(crate) fn cut(&self, parts: usize, intermediate: usize) -> Result<Vec<Expert>> {
        let part = |part: usize| {
            let range = part * intermediate..(part + 1) * intermediate;
            Ok(Expert {
                gate: self.gate.rows_view(range.clone())?,
                up: self.up.rows_view(range.clone())?,
                down: self.down.cols_view(range)?,
            })
        };
        (0..parts).map(part).collect()
    }

    fn matrices(&self) -> [&WeightMatrix; 3] {
        [&self.gate, &self.up, &self.down]
    }

    fn check(&self, name: &str, hidden: usize, intermediate: usize) -> Result<()> {
        let expected = [
            ("gate", &self.gate, [intermediate, hidden]),
            ("up", &self.up, [intermediate, hidden]),
            ("down", &self.down, [hidden, intermediate]),
        ];
        for (part, matrix, shape) in expected {
            let found = [matrix.rows(), matrix.cols()];
            if found != shape {
                return Err(Error::Size {
                    what: format!("the {part} matrix of {name}"),
                    found: format!("shape {found:?}"),
                    expected: format!("shape {shape:?}"),
                });
            }
        }
        Ok(())
    }

    /// Writes the interleaved linear-1 matrix [2I, H].
    fn write_linear1(&self, target: &mut [bf16]) {
        let rows = target.chunks_exact_mut(self.gate.cols());
        for (row, target) in rows.enumerate() {
            let (is_gate, source) = source_row(row);
            let matrix = if is_gate { &self.gate } else { &self.up };
            target.copy_from_slice(&matrix.row(source));
        }
    }

    /// Writes the linear-2 matrix [H, I].
    fn write_linear2(&self, target: &mut [bf16]) {
        for (row, target) in target.chunks_exact_mut(self.down.cols()).enumerate() {
            target.copy_from_slice(&self.down.row(row));
        }
    }
}

/// Whether a row of the interleaved linear-1 matrix is a gate row, and which row of gate or up it is.
fn source_row(row: usize) -> (bool, usize) {
    let (group, within) = (row / (2 * GROUP), row % (2 * GROUP));
    (within < GROUP, group * GROUP + within % GROUP)
}

impl ExpertWeights {
    /// Random weights that keep the scale of what passes through: uniform, of variance 1 / (row length).
    pub fn random(config: &MoeConfig, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut matrix = |rows: usize, cols: usize| {
            let bound = (3.0 / cols as f32).sqrt();
            let values = (0..rows * cols).map(|_| bf16::from_f32(random.random_range(-bound..=bound)));
            WeightMatrix::from(Matrix::from_rows(values.collect(), rows, cols))
        };
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let mut expert = || Expert {
            gate: matrix(intermediate, hidden),
            up: matrix(intermediate, hidden),
            down: matrix(hidden, intermediate),
        };
        Self {
            experts: (0..config.experts).map(|_| expert()).collect(),
            shared: (0..config.shared_experts).map(|_| expert()).collect(),
        }
    }

    /// Checks every matrix against the configuration.
    pub fn check(&self, config: &MoeConfig) -> Result<()> {
        let counts =
            [("experts", &self.experts, config.experts), ("shared experts", &self.shared, config.shared_experts)];
        for (what, experts, expected) in counts {
            if experts.len() != expected {
                return Err(Error::Size {
                    what: "the set of weights".into(),
                    found: format!("{} {what}", experts.len()),
                    expected: format!("{expected}, as configured"),
                });
            }
            for (id, expert) in experts.iter().enumerate() {
                let name = format!("{} {id}", &what[..what.len() - 1]);
                expert.check(&name, config.hidden, config.intermediate)?;
            }
        }
        Ok(())
    }

    /// The experts whose weights `rank` of `ranks` holds, in the order of its matrices.
    pub fn of_rank(&self, config: &MoeConfig, rank: usize, ranks: usize) -> impl Iterator<Item = &Expert> {
        self.shared.iter().chain(&self.experts[config.experts_of(rank, ranks)])
    }

    /// The format that they are kept in: FP8 where any matrix is.
    pub fn format(&self) -> ExpertFormat {
        let fp8 = |expert: &Expert| expert.matrices().iter().any(|matrix| matrix.format() == ExpertFormat::Fp8);
        if self.experts.iter().chain(&self.shared).any(fp8) { ExpertFormat::Fp8 } else { ExpertFormat::Bf16 }
    }

    /// Lays out the weights for `rank` of `ranks` in bf16; those that are e4m3 are multiplied out and rounded. The configuration must be valid for that many ranks.
    pub fn prepare(&self, config: &MoeConfig, rank: usize, ranks: usize) -> Result<RankWeights> {
        config.validate(ranks)?;
        self.check(config)?;
        let experts: Vec<&Expert> = self.of_rank(config, rank, ranks).collect();
        let matrix = config.hidden * config.intermediate;
        let mut linear1 = vec![bf16::ZERO; experts.len() * 2 * matrix];
        let mut linear2 = vec![bf16::ZERO; experts.len() * matrix];
        (linear1.par_chunks_exact_mut(2 * matrix), linear2.par_chunks_exact_mut(matrix), &experts)
            .into_par_iter()
            .for_each(|(linear1, linear2, expert)| {
                expert.write_linear1(linear1);
                expert.write_linear2(linear2);
            });
        Ok(RankWeights { linear1, linear2 })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::small_config;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn every_weight_lands_in_its_place(
            hidden in 1usize..3, intermediate in 1usize..4, share in 1usize..4, ranks in 1usize..5, shared in 0usize..3,
        ) {
            let (hidden, intermediate) = (64 * hidden, 64 * intermediate);
            let config = MoeConfig { hidden, intermediate, experts: share * ranks, top_k: 1, shared_experts: shared, ..small_config() };
            let weights = ExpertWeights::random(&config, 7);
            for rank in 0..ranks {
                let prepared = weights.prepare(&config, rank, ranks).unwrap();
                let locals = share + shared;
                prop_assert_eq!(prepared.linear1.len(), locals * 2 * intermediate * hidden);
                prop_assert_eq!(prepared.linear2.len(), locals * hidden * intermediate);
                for local in 0..locals {
                    let expert = match local.checked_sub(shared) {
                        Some(routed) => &weights.experts[rank * share + routed],
                        None => &weights.shared[local],
                    };
                    for i in 0..intermediate {
                        let row = |r: usize| &prepared.linear1[(local * 2 * intermediate + r) * hidden..][..hidden];
                        let gate_row = i / 8 * 16 + i % 8;
                        prop_assert_eq!(expert.gate.row(i), row(gate_row));
                        prop_assert_eq!(expert.up.row(i), row(gate_row + 8));
                    }
                    for h in 0..hidden {
                        let row = &prepared.linear2[(local * hidden + h) * intermediate..][..intermediate];
                        prop_assert_eq!(expert.down.row(h), row);
                    }
                }
            }
        }
    }

    #[test]
    fn weights_that_do_not_fit_the_configuration_are_named() {
        let config = small_config();
        let weights = ExpertWeights::random(&config, 1);
        let message = |config: &MoeConfig| weights.check(config).unwrap_err().to_string();
        let text = message(&MoeConfig { experts: 3, ..config.clone() });
        assert!(text.contains("4 experts") && text.contains('3'), "{text}");
        let text = message(&MoeConfig { hidden: 128, ..config.clone() });
        assert_eq!(text, "the gate matrix of expert 0 has shape [64, 64]; it must have shape [64, 128]");
        assert!(weights.prepare(&config, 0, 3).is_err());
    }
}
