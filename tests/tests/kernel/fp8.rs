//! The layer in FP8 against the reference that quantises as the kernel does.

use ferromoe::{ExpertFormat, MoeConfig, ScaleKind, SimOptions};
use ferromoe_tests::{Case, Choices};

fn config(hidden: usize, intermediate: usize, experts: usize, top_k: usize) -> MoeConfig {
    MoeConfig { hidden, intermediate, experts, top_k, experts_format: ExpertFormat::Fp8, ..Case::default().config }
}

fn case(config: MoeConfig, tokens: &[usize]) -> Case {
    Case { config, tokens: tokens.to_vec(), ..Case::default() }
}

#[test]
fn one_rank() {
    case(config(128, 128, 4, 2), &[7]).check();
}

#[test]
fn every_token_tile_and_the_borders_between_them() {
    for tokens in [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 192, 193, 273] {
        let choices = Choices::AllTo(1);
        Case { choices, ..case(config(128, 128, 4, 1), &[tokens]) }.check();
    }
}

#[test]
fn sizes_that_are_not_multiples_of_a_group() {
    for (hidden, intermediate) in [(64, 192), (192, 64), (192, 320), (512, 192), (576, 320)] {
        for tokens in [[33, 18], [190, 70]] {
            case(config(hidden, intermediate, 8, 2), &tokens).check();
        }
    }
}

#[test]
fn every_number_of_ranks() {
    for ranks in [1, 2, 3, 4, 8] {
        let config = MoeConfig { shared_experts: ranks % 2, ..config(192, 192, 24, 6) };
        Case { data: ranks as u64, ..case(config, &vec![7; ranks]) }.check();
    }
}

#[test]
fn tiles_wider_than_those_of_the_first_products() {
    for (hidden, sms) in [(192, 1), (384, 2), (1152, 4)] {
        let config = MoeConfig { shared_experts: 1, ..config(hidden, 192, 4, 2) };
        let sim = SimOptions { sms, ..SimOptions::default() };
        Case { choices: Choices::AllTo(0), sim, ..case(config, &[9, 150]) }.check();
    }
}

/// Scales that are powers of two; two shared experts; some tokens without an expert.
#[test]
fn scales_that_are_powers_of_two() {
    let config = MoeConfig { scales: ScaleKind::PowerOfTwo, shared_experts: 2, ..config(320, 192, 8, 3) };
    for tokens in [[40, 3], [150, 0]] {
        Case { choices: Choices::Sparse, ..case(config.clone(), &tokens) }.check();
    }
}
