//! A token's output has the same bits whatever else is in the batch, wherever the token is, and however many ranks there are.

use ferromoe::{ExpertFormat, MoeConfig, Routing, SimOptions};
use ferromoe_tests::{Case, Choices, Layer, Tokens, group};
use half::bf16;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// Tokens whose outputs are followed through all batches.
const TOKENS: usize = 64;
/// Tokens that stand around one of them, all at its expert: more than a tile of tokens.
const CROWD: usize = 272;

/// The layers. One for each number format that the kernel runs, and for what else changes how a token's output is summed.
fn layers() -> Vec<(&'static str, MoeConfig)> {
    let bf16 = MoeConfig {
        hidden: 192,
        intermediate: 320,
        experts: 16,
        top_k: 4,
        shared_experts: 1,
        ..Case::default().config
    };
    let limited = MoeConfig { swiglu_limit: Some(0.5), shared_experts: 0, top_k: 6, intermediate: 64, ..bf16.clone() };
    let fp8 = MoeConfig { experts_format: ExpertFormat::Fp8, ..bf16.clone() };
    vec![("bf16", bf16), ("bf16, with a limit", limited), ("fp8", fp8)]
}

/// The tokens that are followed, on one rank.
struct Pool {
    config: MoeConfig,
    tokens: Tokens,
    /// Each token's output.
    expected: Vec<Vec<u16>>,
}

/// Who is where: for each rank its tokens, by their number in the pool.
type Places = Vec<Vec<usize>>;

impl Pool {
    /// The outputs are those of the whole pool on one rank, which are right.
    fn new(what: &str, config: &MoeConfig) -> Self {
        let tokens = Tokens::random(config, &[TOKENS], Choices::Random, 11);
        let mut layer = layer(config, 1, SimOptions::default());
        let output = layer.check(&tokens, what).remove(0).output;
        let expected = output.chunks_exact(config.hidden).map(bits).collect();
        Self { config: config.clone(), tokens, expected }
    }

    fn state(&self, token: usize) -> &[bf16] {
        &self.tokens.hidden_states[0][token * self.config.hidden..][..self.config.hidden]
    }

    fn choices(&self, token: usize) -> (&[i32], &[f32]) {
        let (routing, top_k) = (&self.tokens.routing[0], self.config.top_k);
        (&routing.topk_idx()[token * top_k..][..top_k], &routing.topk_weights()[token * top_k..][..top_k])
    }

    /// The batch of these tokens, each followed by `others`' tokens of its rank.
    fn batch(&self, places: &Places, others: &Tokens) -> Tokens {
        let rank = |(own, rank): (&Vec<usize>, usize)| {
            let (mut states, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
            for &token in own {
                let choices = self.choices(token);
                states.extend_from_slice(self.state(token));
                ids.extend_from_slice(choices.0);
                weights.extend_from_slice(choices.1);
            }
            let routing = &others.routing[rank];
            states.extend_from_slice(&others.hidden_states[rank]);
            ids.extend_from_slice(routing.topk_idx());
            weights.extend_from_slice(routing.topk_weights());
            (states, Routing::new(self.config.top_k, ids, weights).expect("same length"))
        };
        let (hidden_states, routing) = places.iter().zip(0..).map(rank).unzip();
        Tokens { hidden_states, routing }
    }

    /// Runs the batch and compares the outputs of the pool's tokens, bit for bit.
    fn check(&self, layer: &mut Layer, places: &Places, others: &Tokens, what: &str) {
        let outputs = layer.moe.forward(&self.batch(places, others).batch());
        let outputs = outputs.unwrap_or_else(|error| panic!("{what}: {error}"));
        for (rank, own) in places.iter().enumerate() {
            for (row, &token) in outputs[rank].output.chunks_exact(self.config.hidden).zip(own) {
                assert!(bits(row) == self.expected[token], "{what}: token {token} on rank {rank} has another output");
            }
        }
    }
}

fn bits(row: &[bf16]) -> Vec<u16> {
    row.iter().map(|value| value.to_bits()).collect()
}

fn layer(config: &MoeConfig, ranks: usize, sim: SimOptions) -> Layer {
    let config = MoeConfig { max_tokens_per_rank: TOKENS + CROWD, ..config.clone() };
    Case { config, tokens: vec![0; ranks], ..Case::default() }.layer_on(&group(ranks, sim))
}

/// Deals tokens out to ranks at random: some get many, some none.
fn deal(random: &mut StdRng, tokens: &[usize], ranks: usize) -> Places {
    let mut places = vec![Vec::new(); ranks];
    let (mut tokens, some) = (tokens.to_vec(), random.random_range(1..=ranks));
    tokens.shuffle(random);
    tokens.into_iter().for_each(|token| places[random.random_range(0..some)].push(token));
    places.shuffle(random);
    places
}

fn on_ranks(ranks: usize) {
    for (name, config) in layers() {
        let pool = Pool::new(name, &config);
        let mut random = StdRng::seed_from_u64(ranks as u64);
        let sim = SimOptions { sms: random.random_range(1..=5), seed: ranks as u64, residency: None };
        let mut layer = layer(&config, ranks, sim);
        let nobody = Tokens::random(&config, &vec![0; ranks], Choices::Random, 0);
        for token in [0, 41, TOKENS - 1] {
            let places = deal(&mut random, &[token], ranks);
            pool.check(&mut layer, &places, &nobody, &format!("{name}, {ranks} ranks, alone"));
        }
        let mut all: Vec<usize> = (0..TOKENS).collect();
        for count in [2, 17, TOKENS] {
            all.shuffle(&mut random);
            let places = deal(&mut random, &all[..count], ranks);
            pool.check(&mut layer, &places, &nobody, &format!("{name}, {ranks} ranks, {count} of the pool"));
        }
        // In a crowd on one rank, and in one from all ranks.
        for (token, crowded) in [(5, 1), (29, ranks)] {
            let counts: Vec<_> = (0..ranks).map(|rank| if rank < crowded { CROWD / crowded } else { 0 }).collect();
            let expert = pool.choices(token).0[0] as usize;
            let crowd = Tokens::random(&config, &counts, Choices::AllTo(expert), 3);
            let places = deal(&mut random, &[token, 60, 2], ranks);
            pool.check(&mut layer, &places, &crowd, &format!("{name}, {ranks} ranks, in a crowd of {counts:?}"));
        }
    }
}

#[test]
fn on_one_rank() {
    on_ranks(1);
}

#[test]
fn on_two_ranks() {
    on_ranks(2);
}

#[test]
fn on_four_ranks() {
    on_ranks(4);
}

#[test]
fn on_eight_ranks() {
    on_ranks(8);
}
