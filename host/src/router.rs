//! The routers of the supported model families, on the CPU.
//!
//! Written after the definitions in `transformers` 5.24. Which family has which router is in `family.rs`. Logits and scores are f32 here; those models round some of them to bf16 on the way, so
//! a choice between two experts whose scores are closer than that may differ from theirs.

use half::bf16;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// What a logit becomes before experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scoring {
    /// Softmax over all experts (Mixtral, Qwen3-MoE).
    Softmax,
    /// Sigmoid (DeepSeek-V3).
    Sigmoid,
    /// sqrt(softplus) (DeepSeek-V4).
    SqrtSoftplus,
    /// The logits choose. An expert's weight is its share of a softmax over those not yet chosen, without the ones that are further below
    /// the best of them than 2 x jitter, relative to the larger of their magnitude and the best (Phi-3.5-MoE).
    SparseMixer {
        /// `router_jitter_noise`.
        jitter: f32,
    },
}

/// What a group of experts is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The sum of its best two experts' scores (DeepSeek-V3).
    BestTwo,
    /// Its best expert's score (DeepSeek-V2).
    Best,
}

/// Group-limited choice: only the experts of the best groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Number of groups; consecutive experts form a group.
    pub count: usize,
    /// Number of groups kept for each token.
    pub kept: usize,
    /// What makes a group one of the best.
    pub score: GroupScore,
}

/// Which experts each token goes to, and with what weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    top_k: usize,
    topk_idx: Vec<i32>,
    topk_weights: Vec<f32>,
}

impl Routing {
    /// Routing of T tokens to K experts each: ids [T, K] (-1 is no expert) and weights [T, K], scaling included.
    /// The ids are not checked here; whoever uses them does.
    pub fn new(top_k: usize, topk_idx: Vec<i32>, topk_weights: Vec<f32>) -> Result<Self> {
        if top_k == 0 || !topk_idx.len().is_multiple_of(top_k) || topk_idx.len() != topk_weights.len() {
            return Err(Error::Size {
                what: format!("a top-{top_k} routing"),
                found: format!("{} ids and {} weights", topk_idx.len(), topk_weights.len()),
                expected: "top-k of each for every token, and a top-k of at least 1".into(),
            });
        }
        Ok(Self { top_k, topk_idx, topk_weights })
    }

    /// Experts per token, K.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// [T, K] expert ids; -1 is no expert.
    pub fn topk_idx(&self) -> &[i32] {
        &self.topk_idx
    }

    /// [T, K] weights, scaling included.
    pub fn topk_weights(&self) -> &[f32] {
        &self.topk_weights
    }

    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.topk_idx.len() / self.top_k
    }

    /// For how many tokens the other routing has the same set of experts.
    pub fn same_experts(&self, other: &Routing) -> usize {
        let sorted = |ids: &[i32]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        let pairs = self.topk_idx.chunks_exact(self.top_k).zip(other.topk_idx.chunks_exact(other.top_k));
        pairs.filter(|(ours, theirs)| sorted(ours) == sorted(theirs)).count()
    }
}

/// The router of one layer.
#[derive(Clone, Debug)]
pub struct Router {
    /// Width of a token's hidden state, H.
    pub(crate) hidden: usize,
    /// [E, H] gate weights.
    pub(crate) weight: Vec<f32>,
    /// Experts per token, K.
    pub(crate) top_k: usize,
    /// How logits become scores.
    pub(crate) scoring: Scoring,
    /// [E] added to the scores for the choice only, not for the weights.
    pub(crate) correction_bias: Option<Vec<f32>>,
    /// Group-limited choice.
    pub(crate) groups: Option<ExpertGroups>,
    /// Whether a token's weights are divided by their sum.
    pub(crate) normalize: bool,
    /// What their sum is at least taken for.
    pub(crate) least_sum: f32,
    /// What the weights are multiplied by at the end.
    pub(crate) scaling: f32,
    /// [H] the gate of the shared expert, whose weight for a token is the sigmoid of their product.
    pub(crate) shared_gate: Option<Vec<f32>>,
    /// [vocabulary, K] experts by token id, in place of a choice (DeepSeek-V4's hash layers).
    pub(crate) expert_of_id: Option<Vec<i32>>,
}

impl Router {
    /// Number of experts, E.
    pub fn experts(&self) -> usize {
        self.weight.len() / self.hidden
    }

    /// Number of token ids the table of a hash-routed layer knows; none for other layers.
    pub fn vocabulary(&self) -> Option<usize> {
        self.expert_of_id.as_ref().map(|table| table.len() / self.top_k)
    }

    /// Routes tokens: hidden states `[T, H]`, and their token ids `[T]`, which only hash-routed layers need.
    pub fn route(&self, hidden_states: &[bf16], input_ids: Option<&[i64]>) -> Result<Routing> {
        let tokens = hidden_states.len() / self.hidden;
        if !hidden_states.len().is_multiple_of(self.hidden) {
            return Err(Error::Size {
                what: "the router's input".into(),
                found: format!("{} values", hidden_states.len()),
                expected: format!("a multiple of the hidden size {}", self.hidden),
            });
        }
        let fixed = self.experts_by_id(tokens, input_ids)?;
        let mut topk_idx = vec![-1; tokens * self.top_k];
        let mut topk_weights = vec![0.0; tokens * self.top_k];
        let targets = topk_idx.par_chunks_exact_mut(self.top_k).zip(topk_weights.par_chunks_exact_mut(self.top_k));
        targets.zip(hidden_states.par_chunks_exact(self.hidden)).enumerate().for_each(
            |(token, ((idx, weights), hidden))| {
                let scores = self.scores(&self.logits(hidden));
                match &fixed {
                    Some(fixed) => idx.copy_from_slice(fixed[token]),
                    None => self.choose(self.choice_scores(&scores), idx),
                }
                self.weigh(&scores, idx, weights);
            },
        );
        Ok(Routing { top_k: self.top_k, topk_idx, topk_weights })
    }

    /// The table's rows for the tokens, where the layer routes by token id.
    fn experts_by_id(&self, tokens: usize, input_ids: Option<&[i64]>) -> Result<Option<Vec<&[i32]>>> {
        let Some(table) = &self.expert_of_id else { return Ok(None) };
        let problem = |problem: String| Error::InputIds { problem };
        let ids = input_ids.ok_or_else(|| problem("`input_ids` are not given".into()))?;
        if ids.len() != tokens {
            return Err(problem(format!("{} `input_ids` are given for {tokens} tokens", ids.len())));
        }
        let rows: Vec<&[i32]> = table.chunks_exact(self.top_k).collect();
        let row = |(token, &id): (usize, &i64)| {
            let known = usize::try_from(id).ok().and_then(|id| rows.get(id).copied());
            known.ok_or_else(|| {
                problem(format!("token {token} has id {id}; ids are 0 to {}", rows.len().saturating_sub(1)))
            })
        };
        ids.iter().enumerate().map(row).collect::<Result<_>>().map(Some)
    }

    /// The weights [T] of the shared expert for hidden states [T, H], where it has a gate (Qwen).
    #[cfg_attr(not(test), expect(dead_code, reason = "the kernel has no such weights yet"))]
    pub(crate) fn shared_weights(&self, hidden_states: &[bf16]) -> Option<Vec<f32>> {
        let gate = self.shared_gate.as_ref()?;
        Some(hidden_states.chunks_exact(self.hidden).map(|hidden| sigmoid(dot(gate, hidden))).collect())
    }

    /// The logits [E] of one token.
    pub(crate) fn logits(&self, hidden: &[bf16]) -> Vec<f32> {
        self.weight.chunks_exact(self.hidden).map(|row| dot(row, hidden)).collect()
    }

    /// The scores [E] of one token's logits.
    pub(crate) fn scores(&self, logits: &[f32]) -> Vec<f32> {
        let mut scores = logits.to_vec();
        match self.scoring {
            Scoring::SparseMixer { .. } => {}
            Scoring::Softmax => {
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().for_each(|score| *score = (*score - max).exp());
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|score| *score /= sum);
            }
            Scoring::Sigmoid => scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
            // Beyond 20 softplus(x) is x in f32, and exp would overflow further up.
            Scoring::SqrtSoftplus => scores
                .iter_mut()
                .for_each(|score| *score = if *score > 20.0 { *score } else { score.exp().ln_1p() }.sqrt()),
        }
        scores
    }

    /// What the top-k is taken of: scores with the correction bias, without the experts of groups not kept.
    pub(crate) fn choice_scores(&self, scores: &[f32]) -> Vec<f32> {
        let mut scores = self.biased(scores);
        if let Some(groups) = self.groups {
            let size = scores.len() / groups.count;
            for group in best(&groups.scores(&scores)).skip(groups.kept) {
                scores[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
            }
        }
        scores
    }

    /// Scores with the correction bias.
    pub(crate) fn biased(&self, scores: &[f32]) -> Vec<f32> {
        let mut scores = scores.to_vec();
        if let Some(bias) = &self.correction_bias {
            scores.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
        }
        scores
    }

    /// The experts with the highest scores, the best first.
    fn choose(&self, scores: Vec<f32>, idx: &mut [i32]) {
        for (idx, expert) in idx.iter_mut().zip(best(&scores)) {
            *idx = expert as i32;
        }
    }

    /// The weights of the experts chosen.
    fn weigh(&self, scores: &[f32], idx: &[i32], weights: &mut [f32]) {
        for (k, (weight, &expert)) in weights.iter_mut().zip(idx).enumerate() {
            *weight = match self.scoring {
                Scoring::SparseMixer { jitter } => sparse_mixer(scores, &idx[..k], jitter),
                _ => scores[expert as usize],
            };
        }
        let sum: f32 = weights.iter().sum();
        // The families add 1e-20 against a sum of zero, or can have none.
        let factor = if self.normalize { self.scaling / (sum + 1e-20).max(self.least_sum) } else { self.scaling };
        weights.iter_mut().for_each(|weight| *weight *= factor);
    }
}

impl ExpertGroups {
    /// The score of each group.
    pub(crate) fn scores(&self, scores: &[f32]) -> Vec<f32> {
        let of_best = match self.score {
            GroupScore::BestTwo => 2,
            GroupScore::Best => 1,
        };
        let score = |group: &[f32]| best(group).take(of_best).map(|expert| group[expert]).sum();
        scores.chunks_exact(scores.len() / self.count).map(score).collect()
    }
}

/// The weight of the best expert that is not yet chosen: its share among those of the others that are not too far below it.
fn sparse_mixer(logits: &[f32], chosen: &[i32], jitter: f32) -> f32 {
    let left = || logits.iter().enumerate().filter(|(expert, _)| !chosen.contains(&(*expert as i32))).map(|(_, &l)| l);
    let max = left().fold(f32::NEG_INFINITY, f32::max);
    let near = |logit: &f32| (max - logit) / logit.abs().max(max) <= 2.0 * jitter || *logit == max;
    1.0 / left().filter(near).map(|logit| (logit - max).exp()).sum::<f32>()
}

/// Products of two f32 that came from bf16 or f32 are summed in f64: the f32 logit that any order of sums is near.
fn dot(row: &[f32], hidden: &[bf16]) -> f32 {
    row.iter().zip(hidden).map(|(&w, h)| f64::from(w) * h.to_f64()).sum::<f64>() as f32
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Indices by falling score; the lower index first among equals.
pub(crate) fn best(scores: &[f32]) -> impl Iterator<Item = usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.into_iter()
}

#[cfg(test)]
pub(crate) mod tests {
    use approx::assert_relative_eq;

    use super::*;
    use crate::checkpoint::HfLayer;
    use crate::input::MoeInput;
    use crate::testing::{FIXTURES, fixture};

    /// A router over two-dimensional hidden states; expert e's logit is `weight[e]` . (x, y).
    pub(crate) fn router(weight: &[[f32; 2]], scoring: Scoring, top_k: usize) -> Router {
        Router {
            hidden: 2,
            weight: weight.concat(),
            top_k,
            scoring,
            correction_bias: None,
            groups: None,
            normalize: true,
            least_sum: 0.0,
            scaling: 1.0,
            shared_gate: None,
            expert_of_id: None,
        }
    }

    fn route(router: &Router, hidden: [f32; 2]) -> (Vec<i32>, Vec<f32>) {
        let routing = router.route(&hidden.map(bf16::from_f32), None).unwrap();
        (routing.topk_idx, routing.topk_weights)
    }

    fn recorded(name: &str) -> (Router, MoeInput, Routing) {
        let mut input = MoeInput::open(&fixture(name).join("moe_io.safetensors")).unwrap();
        let router = HfLayer::open(&fixture(name), input.layer.unwrap()).unwrap().router;
        let routing = input.routing.take().unwrap();
        (router, input, routing)
    }

    /// What the model's own router recorded: the same experts for 97% of tokens, where they differ scores closer than
    /// two bf16 roundings, and weights as near as the dtype that the model computes them in allows.
    #[test]
    fn the_recorded_routing_comes_out() {
        for (name, weight_tolerance) in FIXTURES.into_iter().zip([1e-2, 1.5e-2, 1e-6, 1.5e-2]) {
            let (router, input, theirs) = recorded(name);
            let ours = router.route(&input.hidden_states, input.input_ids.as_deref()).unwrap();
            let same = ours.same_experts(&theirs);
            assert!(100 * same >= 97 * input.tokens, "{name}: {same} of {} tokens", input.tokens);
            for token in 0..input.tokens {
                let row = token * router.top_k..(token + 1) * router.top_k;
                let hidden = &input.hidden_states[token * router.hidden..(token + 1) * router.hidden];
                let scores = router.choice_scores(&router.scores(&router.logits(hidden)));
                let (ours_idx, ours_weights) = (&ours.topk_idx[row.clone()], &ours.topk_weights[row.clone()]);
                let lowest = ours_idx.iter().map(|&expert| scores[expert as usize]).fold(f32::INFINITY, f32::min);
                for (expert, &weight) in theirs.topk_idx[row.clone()].iter().zip(&theirs.topk_weights[row]) {
                    match ours_idx.iter().position(|ours| ours == expert) {
                        Some(k) => assert_relative_eq!(ours_weights[k], weight, max_relative = weight_tolerance),
                        None => {
                            let gap = lowest - scores[*expert as usize];
                            assert!(gap <= lowest.abs() / 128.0, "{name}: token {token}, expert {expert}: gap {gap}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn bias_and_groups_decide_the_recorded_choices() {
        for name in ["deepseek-v3", "deepseek-v4"] {
            let (router, input, theirs) = recorded(name);
            let same = |router: Router| router.route(&input.hidden_states, None).unwrap().same_experts(&theirs);
            let without_bias = Router { correction_bias: None, ..router.clone() };
            assert!(100 * same(without_bias) < 97 * input.tokens, "{name}");
            if router.groups.is_some() {
                assert!(100 * same(Router { groups: None, ..router }) < 97 * input.tokens, "{name}");
            }
        }
    }

    #[test]
    fn softmax_with_and_without_normalisation() {
        // Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. The state's 1.0 is exact in bf16.
        let mut router = router(&[[0.0, 0.0], [2f32.ln(), 0.0], [5f32.ln(), 0.0]], Scoring::Softmax, 2);
        let (idx, weights) = route(&router, [1.0, 0.0]);
        assert_eq!(idx, [2, 1]);
        assert_relative_eq!(weights[..], [5.0 / 7.0, 2.0 / 7.0][..], max_relative = 1e-6);
        router.normalize = false;
        assert_relative_eq!(route(&router, [1.0, 0.0]).1[..], [5.0 / 8.0, 2.0 / 8.0][..], max_relative = 1e-6);
    }

    #[test]
    fn sigmoid_chooses_with_bias_within_groups_and_weighs_without() {
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        // Groups {0, 1}, {2, 3}: the best single expert is 0, but group 1 has the better two.
        let router = Router {
            groups: Some(ExpertGroups { count: 2, kept: 1, score: GroupScore::BestTwo }),
            correction_bias: Some(vec![0.0, 0.0, 0.0, 0.5]),
            scaling: 2.5,
            ..router(&[[3.0, 0.0], [-9.0, 0.0], [1.0, 0.0], [0.0, 0.0]], Scoring::Sigmoid, 2)
        };
        let (idx, weights) = route(&router, [1.0, 0.0]);
        assert_eq!(idx, [3, 2]);
        let sum = sigmoid(0.0) + sigmoid(1.0);
        let expected = [2.5 * sigmoid(0.0) / sum, 2.5 * sigmoid(1.0) / sum];
        assert_relative_eq!(weights[..], expected[..], max_relative = 1e-6);
    }

    #[test]
    fn square_root_of_softplus() {
        let router =
            Router { normalize: false, ..router(&[[0.0, 0.0], [100.0, 0.0], [-100.0, 0.0]], Scoring::SqrtSoftplus, 3) };
        let (idx, weights) = route(&router, [1.0, 0.0]);
        assert_eq!(idx, [1, 0, 2]);
        assert_relative_eq!(weights[..2], [10.0, 2f32.ln().sqrt()][..], max_relative = 1e-6);
        assert!(weights[2] >= 0.0 && weights[2] < 1e-9);
    }

    #[test]
    fn equal_scores_go_to_the_lower_expert() {
        assert_eq!(route(&router(&[[0.0, 0.0]; 4], Scoring::Softmax, 2), [1.0, 1.0]), (vec![0, 1], vec![0.5, 0.5]));
    }

    #[test]
    fn hash_layers_take_experts_from_the_table_and_weights_from_the_scores() {
        let router = Router {
            expert_of_id: Some(vec![2, 0, 1, 2]),
            ..router(&[[0.0, 0.0], [2f32.ln(), 0.0], [5f32.ln(), 0.0]], Scoring::Softmax, 2)
        };
        assert_eq!(router.vocabulary(), Some(2));
        let states = [1.0, 0.0, 1.0, 0.0].map(bf16::from_f32);
        let routing = router.route(&states, Some(&[1, 0])).unwrap();
        assert_eq!(routing.topk_idx, [1, 2, 2, 0]);
        let expected = [2.0 / 7.0, 5.0 / 7.0, 5.0 / 6.0, 1.0 / 6.0];
        assert_relative_eq!(routing.topk_weights[..], expected[..], max_relative = 1e-6);

        let error = |ids| router.route(&states, ids).unwrap_err().to_string();
        assert!(error(None).contains("`input_ids` are not given"));
        assert!(error(Some(&[0][..])).contains("1 `input_ids` are given for 2 tokens"));
        assert!(error(Some(&[0, 2])).contains("token 1 has id 2; ids are 0 to 1"));
        assert!(error(Some(&[-1, 0])).contains("token 0 has id -1"));
    }

    #[test]
    fn the_hash_layer_of_the_checkpoint_routes() {
        let (_, input, _) = recorded("deepseek-v4");
        let router = HfLayer::open(&fixture("deepseek-v4"), 0).unwrap().router;
        let ids = input.input_ids.unwrap();
        let routing = router.route(&input.hidden_states, Some(&ids)).unwrap();
        let table = router.expert_of_id.as_ref().unwrap();
        for (token, &id) in ids.iter().enumerate() {
            assert_eq!(routing.topk_idx[6 * token..6 * token + 6], table[6 * id as usize..6 * id as usize + 6]);
            assert_relative_eq!(
                routing.topk_weights[6 * token..6 * token + 6].iter().sum::<f32>(),
                1.5,
                epsilon = 1e-5
            );
        }
    }

    #[test]
    fn what_cannot_be_a_routing_is_refused() {
        for (top_k, ids, weights) in [(0, 0, 0), (2, 3, 3), (2, 4, 2)] {
            Routing::new(top_k, vec![0; ids], vec![0.0; weights]).unwrap_err();
        }
        let router = router(&[[0.0, 0.0]; 2], Scoring::Softmax, 1);
        let error = router.route(&[bf16::ONE; 3], None).unwrap_err().to_string();
        assert!(error.contains("3 values") && error.contains("hidden size 2"), "{error}");
        assert_eq!(router.route(&[], None).unwrap().tokens(), 0);
    }
}
