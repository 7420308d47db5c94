//! Launches in a row on the same buffers, with changing counts: none wrong, none stuck.
//!
//! `FERROMOE_TEST_LAUNCHES` says how many; on GPUs ten thousand take seconds.

use ferromoe::{MoeConfig, RankOutput};
use ferromoe_tests::{Case, Choices, Tokens};
use half::bf16;

fn launches() -> usize {
    std::env::var("FERROMOE_TEST_LAUNCHES").ok().and_then(|count| count.parse().ok()).unwrap_or(20)
}

fn bits(outputs: &[RankOutput]) -> Vec<u16> {
    outputs.iter().flat_map(|rank| rank.output.iter().copied().map(bf16::to_bits)).collect()
}

/// Every batch is held against the reference once, and against itself bit for bit whenever it comes again.
fn launch_in_a_row(ranks: usize, most: usize) {
    let config = MoeConfig {
        experts: 24,
        top_k: 4,
        shared_experts: 1,
        intermediate: 192,
        hidden: 192,
        max_tokens_per_rank: most,
        ..Case::default().config
    };
    let mut layer = Case { config: config.clone(), tokens: vec![1; ranks], ..Case::default() }.layer();
    let batches: Vec<_> = (0..12u64)
        .map(|batch| {
            let count = |rank: usize| (batch as usize * 37 + rank * 53) % (most + 1);
            let tokens: Vec<_> = (0..ranks).map(count).collect();
            let choices = if batch % 3 == 1 { Choices::Sparse } else { Choices::Random };
            Tokens::random(&config, &tokens, choices, batch)
        })
        .collect();
    let mut first: Vec<Option<Vec<u16>>> = vec![None; batches.len()];
    for launch in 0..launches() {
        let number = launch * 7 % batches.len();
        let tokens = &batches[number];
        let what = format!("launch {launch} on {ranks} ranks, batch {number}");
        match &first[number] {
            None => first[number] = Some(bits(&layer.check(tokens, &what))),
            Some(first) => {
                let outputs = layer.moe.forward(&tokens.batch()).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(bits(&outputs) == *first, "{what}: another output than before");
            }
        }
    }
}

#[test]
fn on_one_rank() {
    launch_in_a_row(1, 300);
}

#[test]
fn on_four_ranks() {
    launch_in_a_row(4, 90);
}
