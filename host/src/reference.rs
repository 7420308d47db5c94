//! What the layer's results are held against: its plain definition in f64, without any intermediate rounding, and one that quantises tokens
//! and intermediate as the FP8 kernel does.

mod a8;

use half::bf16;
use rayon::prelude::*;

use crate::config::{ExpertFormat, MoeConfig};
use crate::error::{Error, Result};
use crate::router::Routing;
use crate::tokens::Fp8Tokens;
use crate::weights::{Expert, ExpertWeights};

pub use a8::forward_a8;

/// Output [T, H] of the layer for hidden states [T, H]:
/// the sum over a token's experts of weight x down(silu(gate x) * up x), plus the same of the shared experts with
/// weight 1. With a limit L, gate is at most L and up is within -L and L before the activation.
///
/// # Errors
/// Sizes that do not fit each other, and an expert id that does not exist (reported as of rank 0).
pub fn forward(
    config: &MoeConfig,
    weights: &ExpertWeights,
    hidden_states: &[bf16],
    routing: &Routing,
) -> Result<Vec<f64>> {
    let hidden: Vec<f64> = hidden_states.iter().map(|value| value.to_f64()).collect();
    sum_of_experts(config, weights, &hidden, routing, |expert, tokens, output| {
        add_expert(config, expert, &hidden, tokens, |_, weight| weight, output);
    })
}

/// Checks that everything fits, and adds up what `add` adds to the output [T, H] for each expert and its tokens with their weights.
fn sum_of_experts(
    config: &MoeConfig,
    weights: &ExpertWeights,
    hidden: &[f64],
    routing: &Routing,
    add: impl Fn(&Expert, &[(usize, f64)], &mut [f64]),
) -> Result<Vec<f64>> {
    weights.check(config)?;
    config.check_limit()?;
    if hidden.len() != routing.tokens() * config.hidden {
        return Err(Error::Size {
            what: "the batch".into(),
            found: format!("{} hidden-state values for {} routed tokens", hidden.len(), routing.tokens()),
            expected: format!("{} for each token", config.hidden),
        });
    }
    let mut output = vec![0.0; hidden.len()];
    let everyone: Vec<(usize, f64)> = (0..routing.tokens()).map(|token| (token, 1.0)).collect();
    let routed = tokens_of_experts(config, routing)?;
    for (expert, tokens) in weights.experts.iter().zip(&routed).chain(weights.shared.iter().map(|e| (e, &everyone))) {
        if !tokens.is_empty() {
            add(expert, tokens, &mut output);
        }
    }
    Ok(output)
}

/// What a layer is held against: [`forward`], or for experts in FP8 [`forward_a8`].
///
/// # Errors
/// As [`forward`].
pub fn of_format(
    config: &MoeConfig,
    weights: &ExpertWeights,
    hidden_states: &[bf16],
    routing: &Routing,
) -> Result<Vec<f64>> {
    match config.experts_format {
        ExpertFormat::Bf16 => forward(config, weights, hidden_states, routing),
        ExpertFormat::Fp8 => {
            let tokens = Fp8Tokens::quantise(hidden_states, config.hidden, config.scales)?;
            forward_a8(config, weights, &tokens, routing)
        }
    }
}

/// |actual - expected| / |expected| over all values, in the Euclidean norm; the plain norm of `actual` where
/// everything expected is 0. Values that cannot be paired make it infinite.
pub fn relative_l2(actual: &[bf16], expected: &[f64]) -> f64 {
    let actual: Vec<f64> = actual.iter().map(|value| value.to_f64()).collect();
    relative_l2_f64(&actual, expected)
}

/// As [`relative_l2`], of values in f64.
pub fn relative_l2_f64(actual: &[f64], expected: &[f64]) -> f64 {
    if actual.len() != expected.len() {
        return f64::INFINITY;
    }
    let difference: f64 = actual.iter().zip(expected).map(|(a, e)| (a - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e.powi(2)).sum();
    if norm == 0.0 { difference.sqrt() } else { (difference / norm).sqrt() }
}

/// For each expert, its tokens and their weights.
fn tokens_of_experts(config: &MoeConfig, routing: &Routing) -> Result<Vec<Vec<(usize, f64)>>> {
    let mut tokens_of = vec![Vec::new(); config.experts];
    for (entry, (&expert, &weight)) in routing.topk_idx().iter().zip(routing.topk_weights()).enumerate() {
        let (token, k) = (entry / routing.top_k(), entry % routing.top_k());
        match usize::try_from(expert).ok().and_then(|id| tokens_of.get_mut(id)) {
            Some(tokens) => tokens.push((token, f64::from(weight))),
            None if expert == -1 => {}
            None => return Err(Error::ExpertId { rank: 0, token, k, expert: Some(expert), experts: config.experts }),
        }
    }
    Ok(tokens_of)
}

/// Adds one expert's part to the output. Weight rows are converted once for all tokens, and spread over threads. `finish` may change a token's
/// intermediate [I], and gives what the token's results are multiplied with; it is told the routing weight.
fn add_expert(
    config: &MoeConfig,
    expert: &Expert,
    hidden: &[f64],
    tokens: &[(usize, f64)],
    finish: impl Fn(&mut [f64], f64) -> f64,
    output: &mut [f64],
) {
    let (width, intermediate) = (config.hidden, config.intermediate);
    let column = |i: usize| -> Vec<f64> {
        let (gate, up) = (expert.gate.row_f64(i), expert.up.row_f64(i));
        let state = |token: usize| &hidden[token * width..(token + 1) * width];
        let swiglu =
            |&(token, _): &(usize, f64)| swiglu(dot(&gate, state(token)), dot(&up, state(token)), config.swiglu_limit);
        tokens.iter().map(swiglu).collect()
    };
    let columns: Vec<Vec<f64>> = (0..intermediate).into_par_iter().map(column).collect();
    let finished = |(index, &(_, weight)): (usize, &(usize, f64))| {
        let mut row: Vec<f64> = columns.iter().map(|column| column[index]).collect();
        let factor = finish(&mut row, weight);
        (row, factor)
    };
    let (rows, factors): (Vec<Vec<f64>>, Vec<f64>) = tokens.iter().enumerate().map(finished).unzip();
    let result = |h: usize| -> Vec<f64> {
        let down = expert.down.row_f64(h);
        rows.iter().map(|row| dot(&down, row)).collect()
    };
    let results: Vec<Vec<f64>> = (0..width).into_par_iter().map(result).collect();
    for (h, values) in results.iter().enumerate() {
        for ((&(token, _), factor), value) in tokens.iter().zip(&factors).zip(values) {
            output[token * width + h] += factor * value;
        }
    }
}

fn swiglu(gate: f64, up: f64, limit: Option<f32>) -> f64 {
    let (gate, up) = match limit.map(f64::from) {
        Some(limit) => (gate.clamp(f64::NEG_INFINITY, limit), up.clamp(-limit, limit)),
        None => (gate, up),
    };
    gate / (1.0 + (-gate).exp()) * up
}

/// A dot product in eight interleaved sums, which the compiler can keep in vector registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::HfLayer;
    use crate::input::MoeInput;
    use crate::matrix::Matrix;
    use crate::testing::{FIXTURES, fixture, small_config};
    use crate::weight_matrix::WeightMatrix;

    fn fixture_error(name: &str, limit: impl Fn(Option<f32>) -> Option<f32>) -> f64 {
        let input = MoeInput::open(&fixture(name).join("moe_io.safetensors")).unwrap();
        let layer = HfLayer::open(&fixture(name), input.layer.unwrap()).unwrap();
        let mut config = layer.config(input.tokens);
        config.swiglu_limit = limit(config.swiglu_limit);
        let output = forward(&config, &layer.weights, &input.hidden_states, input.routing.as_ref().unwrap()).unwrap();
        let recorded = input.output_f32.unwrap();
        assert_eq!(output.len(), recorded.len());
        let difference: f64 = output.iter().zip(&recorded).map(|(a, &e)| (a - f64::from(e)).powi(2)).sum();
        (difference / recorded.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>()).sqrt()
    }

    #[test]
    fn the_recorded_outputs_come_out() {
        for name in FIXTURES {
            let error = fixture_error(name, |limit| limit);
            assert!(error < 2e-6, "{name}: {error}");
        }
    }

    #[test]
    fn the_clamp_is_seen_in_the_recording() {
        let error = fixture_error("deepseek-v4", |_| None);
        assert!(error > 1e-3, "{error}");
    }

    /// H = I = 1, padded with nothing: the numbers can be done by hand.
    fn one_by_one(gate: f32, up: f32, down: f32) -> Expert {
        let matrix = |value| WeightMatrix::from(Matrix::new(vec![bf16::from_f32(value)], 1, 1).unwrap());
        Expert { gate: matrix(gate), up: matrix(up), down: matrix(down) }
    }

    #[test]
    fn it_is_the_definition() {
        let config = MoeConfig {
            hidden: 1,
            intermediate: 1,
            experts: 2,
            shared_experts: 1,
            swiglu_limit: Some(2.0),
            ..small_config()
        };
        let weights = ExpertWeights {
            experts: vec![one_by_one(1.0, 1.0, 2.0), one_by_one(4.0, -4.0, 1.0)],
            shared: vec![one_by_one(-4.0, 1.0, 1.0)],
        };
        let routing = Routing::new(2, vec![0, 1, -1, 1], vec![0.5, 0.25, 9.0, 3.0]).unwrap();
        let output = forward(&config, &weights, &[bf16::from_f32(1.0), bf16::from_f32(0.0)], &routing).unwrap();
        let silu = |x: f64| x / (1.0 + (-x).exp());
        // Expert 1: gate 4 is clamped to 2, up -4 to -2. Shared: gate -4 is not clamped.
        let expected = 0.5 * silu(1.0) * 2.0 + 0.25 * silu(2.0) * -2.0 + silu(-4.0);
        assert!((output[0] - expected).abs() < 1e-12, "{} {expected}", output[0]);
        assert_eq!(output[1], 0.0);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let config = small_config();
        let weights = ExpertWeights::random(&config, 3);
        let state = vec![bf16::ONE; config.hidden];
        let routing = |ids: [i32; 2]| Routing::new(2, ids.to_vec(), vec![1.0; 2]).unwrap();
        let error = forward(&config, &weights, &state, &routing([0, 4])).unwrap_err().to_string();
        assert_eq!(error, "rank 0, token 0, k 1: expert 4 does not exist; ids are 0 to 3, or -1 for no expert");
        assert!(forward(&config, &weights, &state, &routing([-2, 0])).is_err());
        let error = forward(&config, &weights, &state[1..], &routing([0, 1])).unwrap_err().to_string();
        assert!(error.contains("63 hidden-state values for 1 routed tokens"), "{error}");
    }

    #[test]
    fn relative_error_of_known_vectors() {
        let actual = [bf16::from_f32(3.0), bf16::from_f32(5.0)];
        assert!((relative_l2(&actual, &[3.0, 4.0]) - 0.2).abs() < 1e-15);
        assert_eq!(relative_l2(&actual[..1], &[0.0]), 3.0);
        assert_eq!(relative_l2(&actual, &[3.0]), f64::INFINITY);
        assert!(relative_l2(&[bf16::NAN], &[1.0]).is_nan());
    }
}
