//! Tokens in e4m3, with a scale for each token and 128 columns.

use ferromoe_kernel::quantise::{self, GroupScale, ScaleKind};
use half::bf16;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::float8::{from_e4m3, to_e4m3};
use crate::fp8::largest;

/// Columns that share a scale.
const GROUP: usize = quantise::GROUP as usize;

/// Hidden states in e4m3, with an f32 scale for each token and 128 columns; the last group of a token may be partial.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Tokens {
    values: Vec<u8>,
    scales: Vec<f32>,
    hidden: usize,
}

impl Fp8Tokens {
    /// `values` are e4m3 [T, hidden], `scales` f32 [T, ceil(hidden / 128)].
    ///
    /// # Errors
    /// Sizes that do not fit each other.
    pub fn new(values: Vec<u8>, scales: Vec<f32>, hidden: usize) -> Result<Self> {
        let tokens = values.len() / hidden.max(1);
        let groups = hidden.div_ceil(GROUP);
        if values.len() != tokens * hidden || scales.len() != tokens * groups {
            return Err(Error::Size {
                what: "a batch of FP8 tokens".into(),
                found: format!("{} values and {} scales", values.len(), scales.len()),
                expected: format!("{hidden} values and {groups} scales for each token"),
            });
        }
        Ok(Self { values, scales, hidden })
    }

    /// Quantises `states` bf16 [T, hidden] by the kernel's rule: each group's largest magnitude becomes the largest e4m3 number.
    ///
    /// # Errors
    /// A number of values that is no multiple of `hidden`.
    pub fn quantise(states: &[bf16], hidden: usize, kind: ScaleKind) -> Result<Self> {
        let groups = hidden.div_ceil(GROUP);
        let mut values = vec![0u8; states.len()];
        let mut scales = vec![0f32; states.len() / hidden.max(1) * groups];
        let rows = values.par_chunks_mut(hidden.max(1)).zip(scales.par_chunks_mut(groups.max(1)));
        rows.zip(states.par_chunks(hidden.max(1))).for_each(|((values, scales), states)| {
            let parts = values.chunks_mut(GROUP).zip(states.chunks(GROUP));
            for ((values, states), scale) in parts.zip(scales) {
                *scale = quantise_group(states, kind, |at, code| values[at] = code);
            }
        });
        Self::new(values, scales, hidden)
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.values.len() / self.hidden.max(1)
    }

    /// Width of a token.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// The e4m3 numbers [T, hidden].
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The scales [T, ceil(hidden / 128)].
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// What they stand for, [T, hidden].
    pub(crate) fn to_f64(&self) -> Vec<f64> {
        self.numbers(|value, scale| f64::from(value) * f64::from(scale))
    }

    /// What they stand for, rounded to bf16 [T, hidden].
    pub fn to_bf16(&self) -> Vec<bf16> {
        self.numbers(|value, scale| bf16::from_f32(value * scale))
    }

    fn numbers<T>(&self, number: impl Fn(f32, f32) -> T) -> Vec<T> {
        let rows = self.values.chunks(self.hidden.max(1)).zip(self.scales.chunks(self.hidden.div_ceil(GROUP).max(1)));
        let groups = rows.flat_map(|(values, scales)| values.chunks(GROUP).zip(scales));
        groups
            .flat_map(|(values, &scale)| values.iter().map(move |&code| (from_e4m3(code), scale)))
            .map(|(value, scale)| number(value, scale))
            .collect()
    }
}

/// Quantises up to 128 bf16 values that share a scale: hands out each code with its place, and gives the scale.
pub(crate) fn quantise_group(values: &[bf16], kind: ScaleKind, mut put: impl FnMut(usize, u8)) -> f32 {
    let found = GroupScale::new(largest(values.iter().map(|value| value.to_f32())), kind, |scale| 1.0 / scale);
    for (at, value) in values.iter().enumerate() {
        put(at, to_e4m3(value.to_f32() * found.inverse));
    }
    found.scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_and_group_has_its_own_scale() {
        // A token of 192 columns has a group of 128 and one of 64.
        let value = |token: usize, col: usize| [[1.0f32, 896.0], [-7.0, 0.0]][token][col / 128];
        let states: Vec<bf16> = (0..384).map(|at| bf16::from_f32(value(at / 192, at % 192))).collect();
        let found = Fp8Tokens::quantise(&states, 192, ScaleKind::F32).unwrap();
        assert_eq!((found.tokens(), found.hidden(), found.scales().len()), (2, 192, 4));
        let relative = |scale: f32, expected: f32| (scale / expected - 1.0).abs() < 1e-6;
        let scales = found.scales();
        assert!(
            relative(scales[0], 1.0 / 448.0) && relative(scales[1], 2.0) && relative(scales[2], 7.0 / 448.0),
            "{scales:?}"
        );
        assert_eq!(
            (found.values()[0], found.values()[191], found.values()[192], found.values()[383]),
            (0x7e, 0x7e, 0xfe, 0)
        );
        assert_eq!(found.to_bf16(), states);
        let powers = Fp8Tokens::quantise(&states, 192, ScaleKind::PowerOfTwo).unwrap();
        assert_eq!(powers.scales()[..3], [1.0 / 256.0, 2.0, 1.0 / 64.0]);
        assert_eq!(powers.to_bf16(), states);
    }

    #[test]
    fn what_is_not_finite_stays_in_its_group() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut states = vec![bf16::ONE; 512];
            states[300] = bf16::from_f32(bad);
            let found = Fp8Tokens::quantise(&states, 256, ScaleKind::F32).unwrap().to_bf16();
            assert!(found[300].is_nan());
            assert!(found[..256].iter().chain(&found[384..]).all(|&value| value == bf16::ONE));
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let text = Fp8Tokens::new(vec![0; 384], vec![1.0; 3], 192).unwrap_err().to_string();
        assert_eq!(
            text,
            "a batch of FP8 tokens has 384 values and 3 scales; it must have 192 values and 2 scales for each token"
        );
        assert!(Fp8Tokens::quantise(&[bf16::ONE; 5], 4, ScaleKind::F32).is_err());
        assert!(Fp8Tokens::new(vec![0; 1], vec![], 0).is_err());
    }
}
