//! Whether a result is right: held to what it should be, for every token whose input is finite.

use ferromoe::{Routing, reference};
use half::bf16;
use serde::Serialize;

use super::job::Compared;

/// A value that is not finite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The token, counted from 0 over all ranks: the row of the input.
    pub token: usize,
    pub column: usize,
    /// "NaN", "inf" or "-inf".
    pub value: String,
}

impl Place {
    /// The first value of `rows` rows that is not finite.
    fn first(values: impl IntoIterator<Item = f64>, width: usize) -> Option<Self> {
        let (index, value) = values.into_iter().enumerate().find(|(_, value)| !value.is_finite())?;
        Some(Self { token: index / width, column: index % width, value: value.to_string() })
    }
}

/// Tokens whose input is not finite: what comes out for them says nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotFinite {
    /// How many there are.
    pub tokens: usize,
    /// The tensor of the first: "hidden_states" or "topk_weights".
    pub tensor: &'static str,
    #[serde(flatten)]
    pub first: Place,
}

/// Which tokens have a finite input.
#[derive(Clone, Debug)]
pub struct FiniteTokens {
    width: usize,
    is_finite: Vec<bool>,
    /// The others.
    pub others: Option<NotFinite>,
}

impl FiniteTokens {
    /// Looks at hidden states [T, width] and the weights of the experts that are chosen.
    pub fn find(hidden_states: &[bf16], width: usize, routing: &Routing) -> Self {
        let weights = || {
            let chosen = routing.topk_idx().iter().zip(routing.topk_weights());
            chosen.map(|(&expert, &weight)| if expert == -1 { 0.0 } else { f64::from(weight) })
        };
        let states = || hidden_states.iter().map(|value| value.to_f64());
        let mut is_finite = vec![true; hidden_states.len() / width];
        for (values, width) in [(states().collect::<Vec<_>>(), width), (weights().collect::<Vec<_>>(), routing.top_k())]
        {
            for (finite, row) in is_finite.iter_mut().zip(values.chunks_exact(width)) {
                *finite &= row.iter().all(|value| value.is_finite());
            }
        }
        let first = [
            ("hidden_states", Place::first(states(), width)),
            ("topk_weights", Place::first(weights(), routing.top_k())),
        ];
        let first = first.into_iter().filter_map(|(tensor, place)| Some((tensor, place?)));
        let others = first.min_by_key(|(_, place)| place.token).map(|(tensor, first)| NotFinite {
            tokens: is_finite.iter().filter(|&&finite| !finite).count(),
            tensor,
            first,
        });
        Self { width, is_finite, others }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.is_finite.iter().filter(|&&finite| finite).count()
    }

    /// A token that is not there is not one of the others.
    fn has(&self, token: usize) -> bool {
        self.is_finite.get(token).copied().unwrap_or(true)
    }

    /// The values [T, width] of these tokens; the others' are 0.
    fn only(&self, values: impl Iterator<Item = f64>) -> Vec<f64> {
        values.enumerate().map(|(index, value)| if self.has(index / self.width) { value } else { 0.0 }).collect()
    }

    /// The first value [T, width] of these tokens that is not finite.
    pub fn first_not_finite(&self, values: impl Iterator<Item = f64>) -> Option<Place> {
        Place::first(self.only(values), self.width)
    }

    /// Holds an output [T, width] to what it should be.
    pub fn compare(&self, output: &[bf16], expected: &[f64], compared_with: Compared) -> Verdict {
        let only = |(index, &value)| if self.has(index / self.width) { value } else { bf16::ZERO };
        let ours: Vec<bf16> = output.iter().enumerate().map(only).collect();
        Verdict {
            compared_with,
            compared_tokens: self.count(),
            input_not_finite: self.others.clone(),
            output_not_finite: self.first_not_finite(output.iter().map(|value| value.to_f64())),
            expected_not_finite: self.first_not_finite(expected.iter().copied()),
            error: reference::relative_l2(&ours, &self.only(expected.iter().copied())),
            beside: Vec::new(),
        }
    }
}

/// How an output compares with what it should be.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub compared_with: Compared,
    /// Tokens that were compared: those with a finite input.
    pub compared_tokens: usize,
    pub input_not_finite: Option<NotFinite>,
    /// The first value among the compared tokens.
    pub output_not_finite: Option<Place>,
    /// As well, of what it is compared with.
    pub expected_not_finite: Option<Place>,
    /// Relative L2 error over the compared tokens.
    pub error: f64,
    /// The same against what the output need not be near to.
    pub beside: Vec<Distance>,
}

/// How far an output is from what it need not be near to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distance {
    pub compared_with: Compared,
    /// Null where it is not finite.
    pub relative_l2_error: Option<f64>,
}

impl Distance {
    /// The distance that a comparison found.
    pub fn of(verdict: &Verdict) -> Self {
        let error = Some(verdict.error).filter(|error| error.is_finite());
        Self { compared_with: verdict.compared_with, relative_l2_error: error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(values: [f32; 6]) -> Vec<bf16> {
        values.map(bf16::from_f32).to_vec()
    }

    fn find(states: [f32; 6], ids: [i32; 3], weights: [f32; 3]) -> FiniteTokens {
        FiniteTokens::find(&values(states), 2, &Routing::new(1, ids.to_vec(), weights.to_vec()).unwrap())
    }

    #[test]
    fn tokens_that_are_not_finite_are_named_and_the_others_compared() {
        let tokens = find([1.0, 1.0, 1.0, f32::NAN, f32::INFINITY, 1.0], [0; 3], [1.0; 3]);
        let first = Place { token: 1, column: 1, value: "NaN".into() };
        assert_eq!(tokens.others, Some(NotFinite { tokens: 2, tensor: "hidden_states", first }));
        let nan = f32::NAN;
        let output = values([3.0, 5.0, nan, nan, nan, nan]);
        let verdict = tokens.compare(&output, &[3.0, 4.0, f64::NAN, 1.0, 1.0, 1.0], Compared::Reference);
        assert_eq!((verdict.compared_tokens, verdict.output_not_finite), (1, None));
        assert!((verdict.error - 0.2).abs() < 1e-12 && verdict.expected_not_finite.is_none());
    }

    #[test]
    fn weights_count_where_there_is_an_expert() {
        let tokens = find([1.0; 6], [0, -1, 2], [1.0, f32::NAN, f32::NEG_INFINITY]);
        let first = Place { token: 2, column: 0, value: "-inf".into() };
        assert_eq!(tokens.others, Some(NotFinite { tokens: 1, tensor: "topk_weights", first }));
        assert_eq!(tokens.count(), 2);
    }

    #[test]
    fn an_output_that_is_not_finite_for_a_finite_token_is_named() {
        let tokens = find([1.0; 6], [0; 3], [1.0; 3]);
        let output = values([1.0, 1.0, 1.0, 1.0, f32::INFINITY, 1.0]);
        let verdict = tokens.compare(&output, &[1.0; 6], Compared::Reference);
        assert_eq!(verdict.output_not_finite, Some(Place { token: 2, column: 0, value: "inf".into() }));
        assert!(!verdict.error.is_finite());
        let verdict = tokens.compare(&output[..4], &[1.0; 6], Compared::Reference);
        assert_eq!(verdict.error, f64::INFINITY);
    }
}
