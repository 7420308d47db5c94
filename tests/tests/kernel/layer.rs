//! The whole layer against the f64 reference, over a table of shapes and ways to run it.

use std::num::NonZeroUsize;
use std::sync::Arc;

use ferromoe::{DeviceGroup, MoeConfig, SimOptions};
use ferromoe_tests::{Case, Choices};
use ptx_sim::{Module, RunOptions};

fn config(hidden: usize, intermediate: usize, experts: usize, top_k: usize) -> MoeConfig {
    MoeConfig { hidden, intermediate, experts, top_k, ..Case::default().config }
}

fn case(config: MoeConfig, tokens: &[usize]) -> Case {
    Case { config, tokens: tokens.to_vec(), ..Case::default() }
}

#[test]
fn one_rank_at_every_token_count() {
    for (data, tokens) in [0, 1, 7, 64, 257].into_iter().enumerate() {
        Case { data: data as u64, ..case(config(64, 64, 4, 2), &[tokens]) }.check();
    }
}

#[test]
fn every_token_tile_and_the_borders_between_them() {
    for tokens in [15, 16, 17, 32, 33, 65, 128, 129, 192, 193, 256, 273] {
        let choices = Choices::AllTo(1);
        Case { choices, ..case(config(128, 128, 4, 1), &[tokens]) }.check();
    }
}

#[test]
fn every_number_of_ranks() {
    for ranks in [1, 2, 3, 4, 8] {
        Case { data: ranks as u64, ..case(config(64, 64, 24, 6), &vec![7; ranks]) }.check();
    }
}

#[test]
fn sizes_that_are_not_multiples_of_the_tile() {
    for (hidden, intermediate) in [(64, 192), (192, 64), (192, 320), (512, 192), (512, 320)] {
        case(config(hidden, intermediate, 8, 2), &[33, 18]).check();
    }
}

#[test]
fn uneven_tokens() {
    case(config(64, 64, 8, 2), &[0, 257, 1, 64]).check();
    case(config(192, 64, 12, 8), &[0, 0, 257]).check();
    case(config(64, 64, 8, 1), &[1, 0]).check();
    case(config(64, 64, 8, 2), &[0, 0]).check();
}

/// 257 tokens a rank on 8 ranks: the largest case, with full token tiles and every rank sending to every other.
#[test]
fn many_tokens_on_eight_ranks() {
    case(config(64, 64, 64, 8), &[257; 8]).check();
}

/// Linear 1 of the shared expert begins on rank 0 before it is known that the tiles of another expert need stages of another cut. With 3, 6 and 9 k-blocks it ends within, at the end of, and behind a
/// round of its six stages; on 4 SMs clusters do so too.
#[test]
fn tiles_wider_than_those_of_the_first_products() {
    for (hidden, sms) in [(192, 1), (384, 2), (576, 4)] {
        let config = MoeConfig { shared_experts: 1, ..config(hidden, 192, 4, 2) };
        let sim = SimOptions { sms, ..SimOptions::default() };
        Case { choices: Choices::AllTo(0), sim, ..case(config, &[9, 150]) }.check();
    }
}

#[test]
fn top_k_and_experts() {
    for (experts, top_k) in [(4, 1), (4, 4), (16, 6), (64, 8), (64, 32)] {
        case(config(64, 64, experts, top_k), &[19, 5]).check();
    }
}

#[test]
fn choices_of_nobody_and_of_few() {
    for choices in [Choices::Sparse, Choices::AllTo(5), Choices::Below(2), Choices::Nobody] {
        Case { choices, ..case(config(64, 128, 8, 2), &[64, 21]) }.check();
    }
}

#[test]
fn clamp_and_shared_experts() {
    for swiglu_limit in [None, Some(0.5)] {
        for shared_experts in [0, 1, 2] {
            let config = MoeConfig { swiglu_limit, shared_experts, ..config(192, 64, 8, 2) };
            case(config, &[40, 0]).check();
        }
    }
    // 32 choices and a shared expert: more results than a warp has lanes.
    case(MoeConfig { shared_experts: 1, ..config(64, 64, 32, 32) }, &[5]).check();
}

#[test]
fn any_number_of_sms_and_any_residency() {
    for sms in [1, 2, 3, 8] {
        for residency in [None, Some(1)] {
            let sim = SimOptions { sms, residency, seed: u64::from(sms) };
            let config = MoeConfig { shared_experts: 1, ..config(64, 192, 8, 2) };
            Case { sim, ..case(config, &[30, 70]) }.check();
        }
    }
}

/// In the simulator a seed gives the same output at the same cost, however many threads the ranks run on; without the checks, with which
/// they run on one.
#[test]
fn a_seed_gives_the_same_run_on_any_number_of_threads() {
    let module = Arc::new(
        Module::parse(ferromoe::kernel_ptx(ferromoe::ExpertFormat::Bf16, false))
            .unwrap_or_else(|error| panic!("{error}")),
    );
    let case = case(config(128, 64, 6, 2), &[21, 9, 40]);
    let run = |threads: usize, seed| {
        let options = RunOptions { checks: false, threads: NonZeroUsize::new(threads), ..RunOptions::default() };
        let sim = SimOptions { seed, ..case.sim };
        let group = DeviceGroup::simulated(Some(module.clone()), case.ranks(), sim, options);
        let group = group.unwrap_or_else(|error| panic!("{error}"));
        let outputs = case.layer_on(&group).check(&case.tokens(), &format!("{threads} threads, seed {seed}"));
        let bits = |output: Vec<half::bf16>| output.into_iter().map(half::bf16::to_bits).collect::<Vec<_>>();
        outputs.into_iter().map(|rank| (bits(rank.output), rank.cost)).collect::<Vec<_>>()
    };
    for seed in 0..3 {
        let one = run(1, seed);
        assert!(run(2, seed) == one && run(3, seed) == one, "seed {seed}");
    }
    assert!(run(2, 3) != run(2, 4), "two seeds at the same cost");
}

#[test]
fn the_output_is_the_same_bit_for_bit_however_it_is_run() {
    let config = MoeConfig { shared_experts: 1, ..config(192, 64, 8, 3) };
    let run = |sms, residency, seed| {
        let sim = SimOptions { sms, residency, seed };
        let outputs = Case { sim, ..case(config.clone(), &[50, 83]) }.run();
        outputs.into_iter().flat_map(|rank| rank.output).map(half::bf16::to_bits).collect::<Vec<_>>()
    };
    let first = run(4, None, 0);
    for (sms, residency, seed) in [(4, None, 1), (1, None, 2), (7, None, 3), (8, Some(1), 4), (3, Some(2), 5)] {
        assert!(run(sms, residency, seed) == first, "{sms} SMs, residency {residency:?}, seed {seed}");
    }
}
