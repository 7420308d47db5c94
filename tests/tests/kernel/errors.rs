//! What the kernel reports through its status words, and that the layer works again afterwards.

use std::time::Duration;

use ferromoe::{Error, MoeConfig, Routing};
use ferromoe_kernel::status::Stage;
use ferromoe_tests::{Case, Tokens, group_that_times_out};

fn case() -> Case {
    let config = MoeConfig { top_k: 3, shared_experts: 1, ..Case::default().config };
    Case { config, tokens: vec![20, 33], ..Case::default() }
}

/// The tokens of the case, but with other expert ids at some (rank, token, k).
fn with_ids(case: &Case, changes: &[(usize, usize, usize, i32)]) -> Tokens {
    let mut tokens = case.tokens();
    for &(rank, token, k, id) in changes {
        let routing = &tokens.routing[rank];
        let mut ids = routing.topk_idx().to_vec();
        ids[token * routing.top_k() + k] = id;
        tokens.routing[rank] =
            Routing::new(routing.top_k(), ids, routing.topk_weights().to_vec()).expect("same length");
    }
    tokens
}

#[test]
fn an_expert_id_out_of_range_is_named_and_the_next_launch_works() {
    let case = case();
    let mut layer = case.layer();
    for id in [8, -2, i32::MAX, i32::MIN] {
        let tokens = with_ids(&case, &[(1, 17, 2, id), (1, 9, 1, id), (1, 30, 0, id)]);
        let error = layer.moe.forward(&tokens.batch()).expect_err("a bad id");
        match error {
            Error::ExpertId { rank: 1, token: 9, k: 1, expert: Some(expert), experts: 8 } => assert_eq!(expert, id),
            other => panic!("id {id}: {other}"),
        }
        layer.check(&case.tokens(), "after a bad id");
    }
}

#[test]
fn a_repeated_expert_is_named_and_the_next_launch_works() {
    let case = case();
    let mut layer = case.layer();
    let first = case.tokens().routing[0].topk_idx()[5 * 3];
    let error = layer.moe.forward(&with_ids(&case, &[(0, 5, 2, first)]).batch()).expect_err("a repeated id");
    assert!(
        matches!(error, Error::RepeatedExpert { rank: 0, token: 5, k: 2, expert: Some(expert) } if expert == first),
        "{error}"
    );
    layer.check(&case.tokens(), "after a repeated id");
}

#[test]
fn a_rank_that_never_launches_is_named_and_the_next_launch_works() {
    let case = Case { tokens: vec![5, 3, 9, 4], ..case() };
    let mut layer = case.layer_on(&group_that_times_out(case.ranks(), case.sim));
    layer.moe.set_deadline(Duration::from_millis(2));
    let tokens = case.tokens();
    let error = layer.moe.forward_on(&[0, 1, 3], &tokens.batch()).expect_err("rank 2 is missing");
    match error {
        Error::Deadline { rank, stage: Stage::Counts, missing: 2, .. } => assert_ne!(rank, 2),
        other => panic!("{other}"),
    }
    layer.moe.set_deadline(Duration::from_secs(10));
    for launch in 0..2 {
        layer.check(&tokens, &format!("launch {launch} after a lost rank"));
    }
}

#[test]
fn too_many_tokens_are_refused_before_anything_is_launched() {
    let case = case();
    let mut layer = case.layer();
    let more = Tokens::random(&case.config, &[34, 1], case.choices, 3);
    let error = layer.moe.forward(&more.batch()).expect_err("34 tokens where 33 fit");
    assert!(matches!(error, Error::TooManyTokens { rank: 0, tokens: 34, max: 33 }), "{error}");
    layer.check(&case.tokens(), "after too many tokens");
}
