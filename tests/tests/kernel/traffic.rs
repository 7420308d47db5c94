//! What crosses NVLink, counted by the simulator, against the least that the routing allows: a token's hidden state once for every other rank that
//! has experts of it, and a result for every choice there.

use std::collections::BTreeSet;

use ferromoe::{MoeConfig, Routing, SimOptions};
use ferromoe_tests::{Case, Choices, Tokens};

/// What the lists, the counts and the flags may add to hidden states and results.
const SMALL_WORDS: f64 = 0.02;

fn case(ranks: usize, experts: usize, top_k: usize, tokens: usize) -> Case {
    let config = MoeConfig { hidden: 512, experts, top_k, ..Case::default().config };
    Case { config, tokens: vec![tokens; ranks], ..Case::default() }
}

/// The case's tokens with other expert ids, of (rank, token, k).
fn with_ids(case: &Case, id: impl Fn(usize, usize, usize) -> usize) -> Tokens {
    let mut tokens = case.tokens();
    let top_k = case.config.top_k;
    for (rank, routing) in tokens.routing.iter_mut().enumerate() {
        let ids = (0..case.tokens[rank] * top_k).map(|index| id(rank, index / top_k, index % top_k) as i32).collect();
        *routing = Routing::new(top_k, ids, routing.topk_weights().to_vec()).expect("as many ids as weights");
    }
    tokens
}

/// Runs the tokens, holds them against the reference, and counts. Returns the rows that each rank read from others, and the least.
fn check(case: &Case, tokens: &Tokens) -> Vec<(u64, u64)> {
    let ranks = case.ranks();
    let per_rank = case.config.experts / ranks;
    let row = 2 * case.config.hidden as u64;
    let mut least = vec![(0, 0); ranks];
    for (from, routing) in tokens.routing.iter().enumerate() {
        for ids in routing.topk_idx().chunks(routing.top_k()) {
            let owners = ids.iter().filter_map(|&id| usize::try_from(id).ok()).map(|id| id / per_rank);
            let remote: Vec<_> = owners.filter(|&to| to != from).collect();
            remote.iter().for_each(|&to| least[to].1 += 1);
            remote.iter().collect::<BTreeSet<_>>().into_iter().for_each(|&to| least[to].0 += 1);
        }
    }
    let costs = case.layer().check(tokens, &format!("{case:?}")).into_iter().filter_map(|rank| rank.cost);
    let (mut moved, mut needed) = (0, 0);
    let mut read = Vec::new();
    for (cost, (rows, results)) in costs.zip(least) {
        read.push((cost.nvlink_read / row, rows));
        moved += cost.nvlink_read + cost.nvlink_write;
        needed += (rows + results) * row;
    }
    let most = needed as f64 * (1.0 + SMALL_WORDS);
    assert!(moved >= needed && moved as f64 <= most, "{moved} bytes where {needed} are the least: {case:?}");
    read
}

#[track_caller]
fn each_row_crosses_once(case: &Case, tokens: &Tokens) {
    for (rank, (found, least)) in check(case, tokens).into_iter().enumerate() {
        assert_eq!(found, least, "rows that rank {rank} reads: {case:?}");
    }
}

#[test]
fn a_token_crosses_once_for_each_rank() {
    for (ranks, experts, top_k, tokens) in
        [(4, 32, 8, 40), (4, 24, 5, 33), (8, 64, 8, 24), (8, 64, 6, 9), (8, 64, 1, 64)]
    {
        let case = case(ranks, experts, top_k, tokens);
        each_row_crosses_once(&case, &case.tokens());
    }
    let sparse = Case { choices: Choices::Sparse, ..case(4, 32, 7, 40) };
    each_row_crosses_once(&sparse, &sparse.tokens());
}

#[test]
fn all_choices_on_one_rank_cross_once() {
    // 8 experts a rank, of each token all those of one, in an order of its own.
    let case = case(4, 32, 8, 40);
    let tokens = with_ids(&case, |rank, token, k| (rank + 1 + token) % 4 * 8 + (token + 3 * k) % 8);
    each_row_crosses_once(&case, &tokens);
}

#[test]
fn choices_on_different_ranks_cross_once_each() {
    let case = case(8, 32, 8, 30);
    let tokens = with_ids(&case, |rank, token, k| (rank + k) % 8 * 4 + (token + k) % 4);
    each_row_crosses_once(&case, &tokens);
}

/// As many rows of one token as a warp has lanes, also where a ticket stands for several rows.
#[test]
fn the_most_followers() {
    for sms in [1, 4] {
        let case = Case { sim: SimOptions { sms, ..SimOptions::default() }, ..case(2, 64, 32, 20) };
        let tokens = with_ids(&case, |rank, token, k| (rank + token % 3) % 2 * 32 + (token + 5 * k) % 32);
        each_row_crosses_once(&case, &tokens);
    }
}

/// Rows that follow lie in tiles behind the first of their expert.
#[test]
fn followers_in_several_tiles() {
    let case = Case { tokens: vec![300, 20, 7], ..case(3, 9, 3, 0) };
    let tokens = with_ids(&case, |_, token, k| 3 * (1 + token % 7 / 6) + (token + 2 * k) % 3);
    each_row_crosses_once(&case, &tokens);
}
