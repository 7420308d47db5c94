//! The ring of rows: many laps with the least ring there may be, one resident CTA, and all rows at one expert or one rank.

use ferromoe::{ExpertFormat, MoeConfig, SimOptions};
use ferromoe_kernel::schedule::Cut;
use ferromoe_tests::{Case, Choices, Tokens};

/// The least ring that there can be, for parts and waves of one tile.
const LEAST: Cut = Cut { wave_tiles: 1, part_tiles: 1, ring_tiles: Cut::least_ring(1, 1) };

const FORMATS: [ExpertFormat; 2] = [ExpertFormat::Bf16, ExpertFormat::Fp8];

/// Experts of few rows each, on two ranks: a tile each.
fn many_experts(format: ExpertFormat, shared_experts: usize) -> MoeConfig {
    MoeConfig { experts: 96, top_k: 6, shared_experts, experts_format: format, ..Case::default().config }
}

/// Runs the case twice with a ring cut like this.
fn check(case: &Case, cut: Cut) {
    let mut layer = case.layer();
    layer.moe.set_cut(cut);
    let tokens = case.tokens();
    for launch in 0..2 {
        layer.check(&tokens, &format!("{case:?}, {cut:?}, launch {launch}"));
    }
}

#[test]
fn many_laps_of_the_least_ring() {
    for format in FORMATS {
        for (residency, shared_experts) in [(None, 1), (Some(1), 0), (Some(1), 2)] {
            let sim = SimOptions { residency, seed: 3, ..SimOptions::default() };
            let config = many_experts(format, shared_experts);
            check(&Case { config, tokens: vec![24, 31], sim, ..Case::default() }, LEAST);
        }
    }
}

#[test]
fn one_rank_has_all_tokens() {
    for format in FORMATS {
        let sim = SimOptions { residency: Some(1), ..SimOptions::default() };
        check(&Case { config: many_experts(format, 1), tokens: vec![0, 60, 0], sim, ..Case::default() }, LEAST);
    }
}

/// One expert has many tiles: its parts take turns, linear 1 of one with linear 2 of one before.
#[test]
fn all_tokens_go_to_one_expert() {
    for (format, residency) in FORMATS.into_iter().zip([Some(1), None]) {
        let sim = SimOptions { residency, ..SimOptions::default() };
        let config = MoeConfig { experts: 4, top_k: 1, experts_format: format, ..Case::default().config };
        let case = Case { config, tokens: vec![2000, 2100], choices: Choices::AllTo(2), sim, ..Case::default() };
        check(&case, LEAST);
    }
}

/// Launches with a ring in which all rows have a place, and others, take turns: rows follow others in some, and in others none.
#[test]
fn batches_that_fit_the_ring_and_batches_that_do_not_take_turns() {
    for format in FORMATS {
        let config = many_experts(format, 1);
        let case = Case {
            config: MoeConfig { max_tokens_per_rank: 40, ..config.clone() },
            tokens: vec![1; 4],
            ..Case::default()
        };
        let mut layer = case.layer();
        layer.moe.set_cut(LEAST);
        for batch in 0..6u64 {
            let count = [40, 0, 2][batch as usize % 3];
            let tokens: Vec<_> = (0..4).map(|rank| count * (rank + 1) / 4).collect();
            let tokens = Tokens::random(&config, &tokens, Choices::Random, batch);
            layer.check(&tokens, &format!("{format:?}, batch {batch}"));
        }
    }
}
