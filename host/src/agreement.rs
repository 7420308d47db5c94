//! How far a computed routing agrees with a recorded one.

use half::bf16;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::router::{Router, Routing, Scoring, best};

/// How far apart two logits that a model computed in bf16 may be of what they are here, relative to their magnitude.
const LOGIT_ERROR: f32 = 1.0 / 128.0;
/// The same of scores.
const SCORE_ERROR: f32 = 1.0 / 256.0;
/// Relative difference of two weights that counts as none, the errors of logits aside.
const WEIGHT_ERROR: f32 = 1.0 / 64.0;

/// What a token's computed experts are beside its recorded ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreement {
    /// The same, with the same weights as near as bf16 says.
    Same,
    /// Others, whose scores are so close to those of the recorded ones that a rounding to bf16 decides.
    NearTie,
    /// The same experts with other weights.
    OtherWeights,
    /// Others.
    Different,
    /// The token's hidden state is not finite: no experts are right.
    NotFinite,
}

impl Agreement {
    /// Whether one of the two must be wrong.
    pub fn is_contradiction(self) -> bool {
        matches!(self, Self::OtherWeights | Self::Different)
    }
}

impl Router {
    /// What this router's routing of the hidden states `[T, H]` is beside a recorded one, token by token.
    ///
    /// # Errors
    /// Routings of other numbers of tokens or experts than each other's.
    pub fn agreement(&self, hidden_states: &[bf16], computed: &Routing, recorded: &Routing) -> Result<Vec<Agreement>> {
        let top_k = computed.top_k();
        let sizes = |routing: &Routing| (routing.tokens(), routing.top_k());
        if sizes(computed) != sizes(recorded) || hidden_states.len() != computed.tokens() * self.hidden {
            return Err(Error::Size {
                what: "the recorded routing".into(),
                found: format!("{} tokens and top-{}", recorded.tokens(), recorded.top_k()),
                expected: format!("{} tokens and top-{top_k}", computed.tokens()),
            });
        }
        let row = |routing: &Routing, token: usize| -> Vec<(i32, f32)> {
            let row = token * top_k..(token + 1) * top_k;
            let pairs = routing.topk_idx()[row.clone()].iter().zip(&routing.topk_weights()[row]);
            pairs.map(|(&expert, &weight)| (expert, weight)).collect()
        };
        let states = hidden_states.par_chunks_exact(self.hidden).enumerate();
        Ok(states.map(|(token, state)| self.compare(state, &row(computed, token), &row(recorded, token))).collect())
    }

    fn compare(&self, state: &[bf16], computed: &[(i32, f32)], recorded: &[(i32, f32)]) -> Agreement {
        if !state.iter().all(|value| value.is_finite()) {
            return Agreement::NotFinite;
        }
        let logits = self.logits(state);
        let scores = self.scores(&logits);
        let has = |list: &[(i32, f32)], expert: i32| list.iter().any(|&(other, _)| other == expert);
        if computed.iter().all(|&(expert, _)| has(recorded, expert)) {
            let relative = |expert: i32| self.relative_error(logits[expert as usize], scores[expert as usize]);
            let error = computed.iter().map(|&(expert, _)| relative(expert)).fold(0.0, f32::max);
            let near = |&(expert, weight): &(i32, f32)| {
                let theirs =
                    recorded.iter().find(|&&(other, _)| other == expert).map_or(f32::NAN, |&(_, weight)| weight);
                (weight - theirs).abs() <= weight.abs().max(theirs.abs()) * (WEIGHT_ERROR + 2.0 * error)
            };
            return if computed.iter().all(near) { Agreement::Same } else { Agreement::OtherWeights };
        }
        if self.expert_of_id.is_some() {
            return Agreement::Different;
        }
        let errors: Vec<f32> = logits.iter().zip(&scores).map(|(&logit, &score)| self.error(logit, score)).collect();
        let (biased, choice) = (self.biased(&scores), self.choice_scores(&scores));
        let worst =
            computed.iter().map(|&(expert, _)| expert as usize).min_by(|&a, &b| biased[a].total_cmp(&biased[b]));
        let Some(worst) = worst else { return Agreement::Different };
        let near = |&(expert, _): &(i32, f32)| match usize::try_from(expert).ok().filter(|&id| id < biased.len()) {
            // An expert of a group that is not kept is infinitely far below.
            Some(expert) => choice[worst] - choice[expert] <= errors[worst] + errors[expert],
            None => false,
        };
        let others = || recorded.iter().filter(|&&(expert, _)| !has(computed, expert));
        let known = others().all(|&(expert, _)| (0..biased.len() as i32).contains(&expert));
        if known && (others().all(near) || self.groups_are_near(&biased, &errors)) {
            Agreement::NearTie
        } else {
            Agreement::Different
        }
    }

    /// Whether a rounding decides which is the last group that is kept.
    fn groups_are_near(&self, biased: &[f32], errors: &[f32]) -> bool {
        let Some(groups) = self.groups.filter(|groups| groups.kept < groups.count && groups.kept > 0) else {
            return false;
        };
        let scores = groups.scores(biased);
        let order: Vec<usize> = best(&scores).collect();
        let error = |group: usize| {
            let size = biased.len() / groups.count;
            2.0 * errors[group * size..(group + 1) * size].iter().copied().fold(0.0, f32::max)
        };
        let (last, next) = (order[groups.kept - 1], order[groups.kept]);
        scores[last] - scores[next] <= error(last) + error(next)
    }

    /// How far off a score may be where logit and score were rounded.
    fn error(&self, logit: f32, score: f32) -> f32 {
        let slope = match self.scoring {
            Scoring::Softmax => score,
            Scoring::Sigmoid => score * (1.0 - score),
            Scoring::SqrtSoftplus => 0.5 / ((1.0 + (-logit).exp()) * score.max(f32::MIN_POSITIVE)),
            Scoring::SparseMixer { .. } => return logit.abs() * LOGIT_ERROR,
        };
        slope * logit.abs() * LOGIT_ERROR + score.abs() * SCORE_ERROR
    }

    /// How far off a weight may be for that, relative to it.
    fn relative_error(&self, logit: f32, score: f32) -> f32 {
        match self.scoring {
            Scoring::SparseMixer { .. } => logit.abs() * LOGIT_ERROR,
            _ => self.error(logit, score) / score.abs().max(f32::MIN_POSITIVE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::tests::router;
    use crate::router::{ExpertGroups, GroupScore};

    /// Experts' logits are given; the token is (1, 0).
    fn agreement(logits: &[f32], scoring: Scoring, recorded: [(i32, f32); 2]) -> Agreement {
        let rows: Vec<[f32; 2]> = logits.iter().map(|&logit| [logit, 0.0]).collect();
        let router = router(&rows, scoring, 2);
        let state = [bf16::ONE, bf16::ZERO];
        let computed = router.route(&state, None).unwrap();
        let [(a, x), (b, y)] = recorded;
        let recorded = Routing::new(2, vec![a, b], vec![x, y]).unwrap();
        router.agreement(&state, &computed, &recorded).unwrap()[0]
    }

    #[test]
    fn the_same_experts_in_any_order_are_the_same_if_their_weights_are() {
        let share = 1.0 / (1.0 + 1f32.exp());
        for scoring in [Scoring::Softmax, Scoring::SparseMixer { jitter: 0.01 }] {
            let computed = match scoring {
                Scoring::Softmax => [(1, share), (0, 1.0 - share)],
                _ => [(1, 1.0), (0, 1.0)].map(|(expert, weight)| (expert, weight / 2.0)),
            };
            assert_eq!(agreement(&[2.0, 1.0, -3.0], scoring, computed), Agreement::Same, "{scoring:?}");
            let doubled = computed.map(|(expert, weight)| (expert, 2.0 * weight));
            assert_eq!(agreement(&[2.0, 1.0, -3.0], scoring, doubled), Agreement::OtherWeights, "{scoring:?}");
        }
        assert_eq!(agreement(&[2.0, 1.0, 0.0], Scoring::Softmax, [(0, f32::NAN), (1, 0.5)]), Agreement::OtherWeights);
    }

    #[test]
    fn a_rounding_apart_is_a_near_tie_and_more_is_not() {
        for scoring in [Scoring::Softmax, Scoring::Sigmoid, Scoring::SqrtSoftplus] {
            assert_eq!(agreement(&[2.0, 1.0, 0.995], scoring, [(0, 0.7), (2, 0.3)]), Agreement::NearTie, "{scoring:?}");
            assert_eq!(agreement(&[2.0, 1.0, 0.9], scoring, [(0, 0.7), (2, 0.3)]), Agreement::Different, "{scoring:?}");
            assert_eq!(
                agreement(&[2.0, 1.0, 0.0], scoring, [(0, 0.7), (-1, 0.3)]),
                Agreement::Different,
                "{scoring:?}"
            );
            assert_eq!(agreement(&[2.0, 1.0, 0.0], scoring, [(0, 0.7), (9, 0.3)]), Agreement::Different, "{scoring:?}");
        }
    }

    #[test]
    fn a_rounding_may_decide_between_groups() {
        // Groups {0, 1} and {2, 3}; the first is the better one by a rounding, or by more.
        for (logit, expected) in [(0.995, Agreement::NearTie), (0.9, Agreement::Different)] {
            let groups = ExpertGroups { count: 2, kept: 1, score: GroupScore::BestTwo };
            let rows = [[1.0, 0.0], [-4.0, 0.0], [logit, 0.0], [-4.0, 0.0]];
            let router = Router { groups: Some(groups), ..router(&rows, Scoring::Sigmoid, 2) };
            let state = [bf16::ONE, bf16::ZERO];
            let computed = router.route(&state, None).unwrap();
            assert_eq!(computed.topk_idx(), [0, 1]);
            let recorded = Routing::new(2, vec![2, 3], vec![0.9, 0.1]).unwrap();
            assert_eq!(router.agreement(&state, &computed, &recorded).unwrap(), [expected]);
        }
    }

    #[test]
    fn tokens_that_are_not_finite_say_nothing() {
        let router = router(&[[1.0, 0.0]; 3], Scoring::Softmax, 2);
        let state = [bf16::NAN, bf16::ONE];
        let routing = router.route(&state, None).unwrap();
        let agreement = router.agreement(&state, &routing, &routing).unwrap();
        assert_eq!(agreement, [Agreement::NotFinite]);
        assert!(!agreement[0].is_contradiction());
    }

    #[test]
    fn routings_of_other_sizes_are_refused() {
        let router = router(&[[1.0, 0.0]; 3], Scoring::Softmax, 2);
        let state = [bf16::ONE; 2];
        let computed = router.route(&state, None).unwrap();
        let recorded = Routing::new(1, vec![0], vec![1.0]).unwrap();
        assert!(router.agreement(&state, &computed, &recorded).unwrap_err().to_string().contains("top-1"));
    }
}
