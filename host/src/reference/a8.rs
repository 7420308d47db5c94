//! The layer with tokens and intermediate quantised as the FP8 kernel quantises them; nothing else is rounded.

use half::bf16;

use super::{add_expert, sum_of_experts};
use crate::config::MoeConfig;
use crate::error::{Error, Result};
use crate::float8::from_e4m3;
use crate::router::Routing;
use crate::tokens::{Fp8Tokens, quantise_group};
use crate::weight_matrix::WeightMatrix;
use crate::weights::{Expert, ExpertWeights};

/// Output [T, H] of the layer for FP8 tokens [T, H] ([`Fp8Tokens::quantise`] makes them of bf16 ones). Weights are those of
/// [`ExpertWeights::prepare_fp8`]. An intermediate, behind activation and routing weight, is rounded to bf16, and then to e4m3 with a scale for each token and 128
/// columns, of the kind that `config.scales` says.
///
/// # Errors
/// As [`super::forward`].
pub fn forward_a8(
    config: &MoeConfig,
    weights: &ExpertWeights,
    tokens: &Fp8Tokens,
    routing: &Routing,
) -> Result<Vec<f64>> {
    if tokens.hidden() != config.hidden {
        return Err(Error::Size {
            what: "a batch of FP8 tokens".into(),
            found: format!("tokens of width {}", tokens.hidden()),
            expected: format!("tokens of width {}", config.hidden),
        });
    }
    let hidden = tokens.to_f64();
    let finish = |intermediate: &mut [f64], weight: f64| {
        for group in intermediate.chunks_mut(ferromoe_kernel::quantise::GROUP as usize) {
            let rounded: Vec<bf16> = group.iter().map(|value| bf16::from_f32((value * weight) as f32)).collect();
            let mut codes = vec![0; group.len()];
            let scale = f64::from(quantise_group(&rounded, config.scales, |at, code| codes[at] = code));
            for (value, code) in group.iter_mut().zip(codes) {
                *value = f64::from(from_e4m3(code)) * scale;
            }
        }
        1.0
    };
    sum_of_experts(config, weights, &hidden, routing, |expert, tokens, output| {
        let fp8 = |matrix: &WeightMatrix| matrix.to_fp8(config.scales).0.into();
        let expert = Expert { gate: fp8(&expert.gate), up: fp8(&expert.up), down: fp8(&expert.down) };
        add_expert(config, &expert, &hidden, tokens, finish, output);
    })
}

#[cfg(test)]
mod tests {
    use ferromoe_kernel::quantise::ScaleKind;

    use super::*;
    use crate::checkpoint::HfLayer;
    use crate::float8::to_e4m3;
    use crate::input::MoeInput;
    use crate::reference::{forward, relative_l2_f64};
    use crate::tensors::TensorFile;
    use crate::testing::{Tokens, fixture, small_config};

    /// The recording divides by the scale, where the kernel multiplies with one over it: bf16 values that lie in the middle of two e4m3 numbers
    /// may go the other way. With divisions, the difference is 3e-8.
    const RULE: f64 = 4e-3;

    #[test]
    fn the_recorded_outputs_come_out() {
        let path = fixture("qwen3-moe-fp8").join("moe_io.safetensors");
        let (input, file) = (MoeInput::open(&path).unwrap(), TensorFile::open(&path).unwrap());
        let layer = HfLayer::open(&fixture("qwen3-moe-fp8"), 0).unwrap();
        let config = layer.config(input.tokens);
        let routing = input.routing.as_ref().unwrap();
        let recorded = |name: &str| -> Vec<f64> {
            file.tensor(name).unwrap().f32_exactly().unwrap().into_iter().map(f64::from).collect()
        };
        let plain = forward(&config, &layer.weights, &input.hidden_states, routing).unwrap();
        let error = relative_l2_f64(&plain, &recorded("output_f32"));
        assert!(error < 1e-6, "{error}");
        let tokens = Fp8Tokens::quantise(&input.hidden_states, config.hidden, config.scales).unwrap();
        let a8 = forward_a8(&config, &layer.weights, &tokens, routing).unwrap();
        let error = relative_l2_f64(&a8, &recorded("output_a8_g128_bf16"));
        assert!(error < RULE, "{error}");
        let error = relative_l2_f64(&a8, &plain);
        assert!(error > 2e-2 && error < 6e-2, "{error}");
    }

    /// One expert of a group and a half, with all gates alike: the numbers can be followed by hand.
    #[test]
    fn it_is_the_definition() {
        let (hidden, intermediate) = (64, 192);
        let config = MoeConfig { hidden, intermediate, experts: 1, top_k: 1, shared_experts: 0, ..small_config() };
        let one_hot = |rows: usize, cols: usize, value: &dyn Fn(usize, usize) -> f32| {
            let values = (0..rows * cols).map(|at| bf16::from_f32(value(at / cols, at % cols))).collect();
            WeightMatrix::from(crate::matrix::Matrix::new(values, rows, cols).unwrap())
        };
        // up x: the column's own value, where x is 1 in column 0; gate x: 8, so that silu is 8 / (1 + e^-8).
        let up = |row: usize| 1.0 + (row % 64) as f32 / 64.0 + if row < 128 { 0.0 } else { 2.0 };
        let expert = Expert {
            gate: one_hot(intermediate, hidden, &|_, col| if col == 0 { 8.0 } else { 0.0 }),
            up: one_hot(intermediate, hidden, &|row, col| if col == 0 { up(row) } else { 0.0 }),
            down: one_hot(hidden, intermediate, &|row, col| if col == 3 * row { 1.0 } else { 0.0 }),
        };
        let weights = ExpertWeights { experts: vec![expert], shared: Vec::new() };
        let mut state = vec![bf16::ZERO; hidden];
        state[0] = bf16::ONE;
        for kind in [ScaleKind::F32, ScaleKind::PowerOfTwo] {
            let config = MoeConfig { scales: kind, ..config.clone() };
            let tokens = Fp8Tokens::quantise(&state, hidden, kind).unwrap();
            let routing = Routing::new(1, vec![0], vec![0.75]).unwrap();
            let output = forward_a8(&config, &weights, &tokens, &routing).unwrap();
            // Weights are quantised in blocks of 128 rows, and so are not what they were either.
            let quantised = weights.experts[0].up.to_fp8(kind).0;
            let product = |row: usize| {
                let (value, scale) = quantised.row(row).next().unwrap();
                let gate = weights.experts[0].gate.to_fp8(kind).0;
                let (gate_value, gate_scale) = gate.row(row).next().unwrap();
                let x = tokens.to_f64()[0];
                let gate = f64::from(gate_value) * f64::from(gate_scale) * x;
                let up = f64::from(value) * f64::from(scale) * x;
                bf16::from_f32((gate / (1.0 + (-gate).exp()) * up * 0.75) as f32).to_f32()
            };
            for (row, found) in output.iter().enumerate() {
                let group = if 3 * row < 128 { 0..128 } else { 128..192 };
                let most = group.map(product).fold(0f32, f32::max);
                let exact = most / 448.0;
                let scale = if kind == ScaleKind::F32 { exact } else { exact.log2().ceil().exp2() };
                let expected = f64::from(from_e4m3(to_e4m3(product(3 * row) / scale)) * scale);
                // Down is 1, but for its own quantisation.
                assert!((found / expected - 1.0).abs() < 1e-5, "{kind:?}, row {row}: {found}, expected {expected}");
            }
        }
    }

    #[test]
    fn shared_experts_have_weight_one_and_a_bad_token_stays_alone() {
        let config = MoeConfig { hidden: 192, intermediate: 192, ..small_config() };
        let weights = ExpertWeights::random(&config, 3);
        let mut tokens = Tokens::random(&config, 9, 4);
        let quantise = |states: &[bf16]| Fp8Tokens::quantise(states, config.hidden, config.scales).unwrap();
        let output =
            |tokens: &Tokens| forward_a8(&config, &weights, &quantise(&tokens.hidden_states), &tokens.routing).unwrap();
        let whole = output(&tokens);
        let plain = forward(&config, &weights, &tokens.hidden_states, &tokens.routing).unwrap();
        let error = relative_l2_f64(&whole, &plain);
        assert!(error > 1e-2 && error < 8e-2, "{error}");
        tokens.hidden_states[4 * 192 + 100] = bf16::NAN;
        let broken = output(&tokens);
        assert!(broken[4 * 192..5 * 192].iter().all(|value| value.is_nan()));
        assert!(broken[..4 * 192] == whole[..4 * 192] && broken[5 * 192..] == whole[5 * 192..]);
        let narrow = Fp8Tokens::quantise(&tokens.hidden_states, 64, config.scales).unwrap();
        let text = forward_a8(&config, &weights, &narrow, &tokens.routing).unwrap_err().to_string();
        assert_eq!(text, "a batch of FP8 tokens has tokens of width 64; it must have tokens of width 192");
    }
}
