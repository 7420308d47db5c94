//! Random routings, hidden states and weights, made quickly at gigabyte scale.
//!
//! A routing depends on its seed alone, by arithmetic that `bench/torch_baseline.py` repeats, so that both run the same work.

use std::fmt;

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use serde::Serialize;

use crate::config::MoeConfig;
use crate::error::Result;
use crate::matrix::Matrix;
use crate::router::Routing;
use crate::weights::{Expert, ExpertWeights};

/// How tokens choose experts. A token's experts are distinct.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// Every expert alike.
    Balanced,
    /// The n-th most popular expert with a weight of 1/n (Zipf); popularity is unrelated to the expert's number.
    Skewed,
    /// Every token's first choice is expert 0, its others are of the rest alike.
    OneExpert,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Balanced => "balanced",
            Self::Skewed => "skewed",
            Self::OneExpert => "one-expert",
        })
    }
}

/// Rows by which an expert's matrices are shifted against the expert's before, in the matrices that all share.
const SHIFT: usize = 8;

/// The routing of `tokens` tokens.
pub fn routing(config: &MoeConfig, tokens: usize, choice: Choice, seed: u64) -> Result<Routing> {
    let popularity = popularity(config.experts, choice);
    let top_k = config.top_k;
    let chosen: Vec<(Vec<i32>, Vec<f32>)> = (0..tokens as u64)
        .into_par_iter()
        .map(|token| {
            let random = |index: usize| unit(splitmix(seed ^ splitmix(token << 16 | index as u64)));
            // The smallest of exponential variables with these rates: a weighted draw without replacement.
            let mut keys: Vec<(f64, i32)> = popularity
                .iter()
                .enumerate()
                .map(|(expert, weight)| (-random(expert).ln() / weight, expert as i32))
                .collect();
            keys.select_nth_unstable_by(top_k - 1, |a, b| a.0.total_cmp(&b.0));
            keys.truncate(top_k);
            keys.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            let ids = keys.into_iter().map(|(_, expert)| expert).collect();
            let weights: Vec<f64> = (0..top_k).map(|k| 0.1 + random(config.experts + k)).collect();
            let sum: f64 = weights.iter().sum();
            (ids, weights.into_iter().map(|weight| (weight / sum) as f32).collect())
        })
        .collect();
    let (ids, weights): (Vec<_>, Vec<_>) = chosen.into_iter().unzip();
    Routing::new(top_k, ids.concat(), weights.concat())
}

/// Each expert's weight in the draw.
fn popularity(experts: usize, choice: Choice) -> Vec<f64> {
    let mut weights = vec![1.0; experts];
    match choice {
        Choice::Balanced => {}
        Choice::Skewed => {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by_key(|&expert| splitmix(expert as u64));
            for (place, expert) in order.into_iter().enumerate() {
                weights[expert] = 1.0 / (place + 1) as f64;
            }
        }
        // Its key in the draw is 0, and the smallest.
        Choice::OneExpert => weights[0] = f64::INFINITY,
    }
    weights
}

/// SplitMix64 (Steele, Lea, Flood 2014): one step from this state.
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Within (0, 1).
fn unit(bits: u64) -> f64 {
    ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Random values of the given variance in rows of `cols`, uniform.
pub fn values(rows: usize, cols: usize, variance: f32, seed: u64) -> Vec<bf16> {
    let bound = (3.0 * variance).sqrt();
    let mut values = vec![bf16::ZERO; rows * cols];
    values.par_chunks_mut(cols.max(1)).enumerate().for_each(|(row, values)| {
        let mut random = StdRng::seed_from_u64(splitmix(seed ^ splitmix(row as u64)));
        values.fill_with(|| bf16::from_f32(random.random_range(-bound..=bound)));
    });
    values
}

/// Weights that differ between experts: each expert's matrices are views, a few rows further, of the same two random ones.
pub fn weights(config: &MoeConfig, seed: u64) -> ExpertWeights {
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let all = config.experts + config.shared_experts;
    let random = |rows: usize, cols: usize, seed| {
        let rows = rows + SHIFT * all;
        Matrix::from_rows(values(rows, cols, 1.0 / cols as f32, seed), rows, cols)
    };
    let (gate_up, down) = (random(2 * intermediate, hidden, seed), random(hidden, intermediate, seed + 1));
    let mut experts: Vec<Expert> = (0..all)
        .map(|expert| SHIFT * expert)
        .map(|first| Expert {
            gate: gate_up.rows_view(first..first + intermediate).into(),
            up: gate_up.rows_view(first + intermediate..first + 2 * intermediate).into(),
            down: down.rows_view(first..first + hidden).into(),
        })
        .collect();
    let shared = experts.split_off(config.experts);
    ExpertWeights { experts, shared }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::BenchShape;

    fn loads(choice: Choice) -> Vec<usize> {
        let config = BenchShape::find("flash").unwrap().config(32, 2048);
        let routing = routing(&config, 2048, choice, 5).unwrap();
        let mut loads = vec![0; 32];
        for token in routing.topk_idx().chunks(6) {
            let mut distinct = token.to_vec();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), 6);
            token.iter().for_each(|&expert| loads[expert as usize] += 1);
        }
        loads.sort_unstable();
        loads
    }

    #[test]
    fn balanced_experts_get_like_loads_and_skewed_ones_do_not() {
        let balanced = loads(Choice::Balanced);
        assert!(balanced[0] > 300 && balanced[31] < 470, "{balanced:?}");
        let skewed = loads(Choice::Skewed);
        assert!(skewed[0] < 130 && skewed[31] > 1500, "{skewed:?}");
        let one = loads(Choice::OneExpert);
        assert!(one[0] > 260 && one[30] < 410 && one[31] == 2048, "{one:?}");
    }

    #[test]
    fn a_routing_is_what_its_seed_says() {
        let config = BenchShape::find("qwen3-30b").unwrap().config(128, 2);
        let routing = routing(&config, 2, Choice::Balanced, 3).unwrap();
        // As `bench/torch_baseline.py --show-routing` prints them.
        let expected = [100, 42, 71, 56, 92, 67, 19, 53, 34, 79, 71, 8, 52, 86, 80, 35];
        assert_eq!(routing.topk_idx(), expected);
        assert!((routing.topk_weights()[..8].iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let of = |choice| super::routing(&config, 1, choice, 3).unwrap();
        assert_eq!(of(Choice::Skewed).topk_idx(), [48, 100, 103, 10, 82, 56, 21, 102]);
        assert_eq!(of(Choice::OneExpert).topk_idx(), [0, 100, 42, 71, 56, 92, 67, 19]);
    }

    #[test]
    fn experts_differ() {
        let config = BenchShape::find("flash").unwrap().scaled_down(1).config(8, 1);
        let weights = weights(&config, 1);
        weights.check(&config).unwrap();
        assert_ne!(weights.experts[0].gate.row(0), weights.experts[1].gate.row(0));
        assert_eq!(weights.experts[0].gate.row(SHIFT), weights.experts[1].gate.row(0));
        assert_ne!(weights.shared[0].down.row(0), weights.experts[7].down.row(0));
    }
}
