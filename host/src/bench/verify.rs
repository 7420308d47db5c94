//! Is what a launch wrote right? A fast wrong kernel must not be reported.

use half::bf16;

use crate::bench::inputs::States;
use crate::config::MoeConfig;
use crate::error::{Error, Result};
use crate::reference;
use crate::router::Routing;
use crate::weights::ExpertWeights;

/// The largest relative L2 error of a right output against the reference of its format: combine rows are bf16, and in bf16 operands and intermediate too.
pub const ERROR_LIMIT: f64 = 1e-2;

/// Checks that all of the outputs were written, and compares some tokens of the first and of the last rank with the
/// reference. Gives the relative L2 error over these tokens.
///
/// # Errors
/// [`Error::WrongResult`].
pub fn verify(
    config: &MoeConfig,
    weights: &ExpertWeights,
    states: &States,
    routings: &[Routing],
    outputs: &[Vec<bf16>],
) -> Result<f64> {
    let hidden = config.hidden;
    for (rank, output) in outputs.iter().enumerate() {
        if let Some(at) = output.iter().position(|value| !value.is_finite()) {
            let (token, column) = (at / hidden, at % hidden);
            return Err(Error::WrongResult(format!("column {column} of token {token} of rank {rank} is no number")));
        }
    }
    let mut ranks = vec![0, outputs.len() - 1];
    ranks.dedup();
    let (mut sampled, mut sampled_states, mut ids, mut factors) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for rank in ranks {
        let routing = &routings[rank];
        let rank_states = states.of(rank, routing.tokens());
        for token in sample(routing.tokens()) {
            let choices = token * routing.top_k()..(token + 1) * routing.top_k();
            sampled.extend_from_slice(&outputs[rank][token * hidden..(token + 1) * hidden]);
            sampled_states.extend_from_slice(&rank_states[token * hidden..(token + 1) * hidden]);
            ids.extend_from_slice(&routing.topk_idx()[choices.clone()]);
            factors.extend_from_slice(&routing.topk_weights()[choices]);
        }
    }
    let expected = of_hit_experts(config, weights, &sampled_states, ids, factors)?;
    let error = reference::relative_l2(&sampled, &expected);
    if error <= ERROR_LIMIT {
        Ok(error)
    } else {
        Err(Error::WrongResult(format!(
            "the relative L2 error of some tokens is {error:.2e}, the limit {ERROR_LIMIT:e}"
        )))
    }
}

/// The first, a middle and the last token.
fn sample(tokens: usize) -> Vec<usize> {
    let Some(last) = tokens.checked_sub(1) else { return Vec::new() };
    let mut sample = vec![0, last / 2, last];
    sample.dedup();
    sample
}

/// The reference with only the experts that are hit: it converts every expert's weights.
fn of_hit_experts(
    config: &MoeConfig,
    weights: &ExpertWeights,
    states: &[bf16],
    mut ids: Vec<i32>,
    factors: Vec<f32>,
) -> Result<Vec<f64>> {
    let mut hit: Vec<i32> = ids.iter().copied().filter(|&id| id >= 0).collect();
    hit.sort_unstable();
    hit.dedup();
    for id in ids.iter_mut().filter(|id| **id >= 0) {
        *id = hit.partition_point(|&other| other < *id) as i32;
    }
    let experts = hit.iter().map(|&id| weights.experts[id as usize].clone()).collect();
    let weights = ExpertWeights { experts, shared: weights.shared.clone() };
    let config = MoeConfig { experts: hit.len(), ..config.clone() };
    reference::of_format(&config, &weights, states, &Routing::new(config.top_k, ids, factors)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::BenchShape;
    use crate::bench::draw::{self, Choice};

    fn outputs_and_check(change: impl Fn(&mut [bf16])) -> Result<f64> {
        let shape = BenchShape::find("flash").unwrap().scaled_down(1);
        let config = shape.config(8, 5);
        let (weights, states) = (draw::weights(&config, 1), States::new(5, config.hidden, 1));
        let routing = draw::routing(&config, 5, Choice::Balanced, 0).unwrap();
        let expected = reference::forward(&config, &weights, states.of(0, 5), &routing).unwrap();
        let mut output: Vec<bf16> = expected.into_iter().map(bf16::from_f64).collect();
        change(&mut output);
        verify(&config, &weights, &states, &[routing], &[output])
    }

    #[test]
    fn right_outputs_pass() {
        let error = outputs_and_check(|_| {}).unwrap();
        assert!(error > 1e-4 && error < 3e-3, "{error}");
    }

    #[test]
    fn wrong_and_unwritten_outputs_do_not() {
        let error = outputs_and_check(|output| output[..64].fill(bf16::ONE)).unwrap_err().to_string();
        assert!(error.contains("relative L2 error"), "{error}");
        let error = outputs_and_check(|output| output[3 * 256 + 9] = bf16::NAN).unwrap_err().to_string();
        assert!(error.contains("column 9 of token 3 of rank 0"), "{error}");
    }

    #[test]
    fn the_first_the_last_and_one_between_are_checked() {
        assert_eq!([0, 1, 2, 3, 8192].map(sample), [vec![], vec![0], vec![0, 1], vec![0, 1, 2], vec![0, 4095, 8191]]);
    }
}
