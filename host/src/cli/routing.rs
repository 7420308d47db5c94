//! How a computed routing compares with the one that the input records.

use ferromoe::{Agreement, HfLayer, MoeInput, Result, Routing};
use serde::Serialize;

/// Tokens by how their computed experts compare with the recorded ones.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutingCheck {
    /// The same experts and weights.
    pub same: usize,
    /// Other experts, a rounding to bf16 apart.
    pub near_ties: usize,
    /// Other experts or weights than a rounding explains.
    pub contradictions: usize,
    /// The first of them.
    pub first: Option<Contradiction>,
}

/// A token whose recorded routing its router contradicts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contradiction {
    pub token: usize,
    pub recorded: Choices,
    pub computed: Choices,
}

/// What one token was given.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choices {
    pub experts: Vec<i32>,
    pub weights: Vec<f32>,
}

impl RoutingCheck {
    /// Compares, if the input has a routing and was recorded at this layer, as far as it says.
    pub fn new(layer: &HfLayer, input: &MoeInput, computed: &Routing) -> Result<Option<Self>> {
        let Some(recorded) = input.routing.as_ref().filter(|_| input.layer.is_none_or(|at| at == layer.layer)) else {
            return Ok(None);
        };
        let tokens = layer.router.agreement(&input.hidden_states, computed, recorded)?;
        let count = |kind: Agreement| tokens.iter().filter(|&&token| token == kind).count();
        let first = tokens.iter().position(|token| token.is_contradiction());
        Ok(Some(Self {
            same: count(Agreement::Same),
            near_ties: count(Agreement::NearTie),
            contradictions: tokens.iter().filter(|token| token.is_contradiction()).count(),
            first: first.map(|token| Contradiction {
                token,
                recorded: Choices::of(recorded, token),
                computed: Choices::of(computed, token),
            }),
        }))
    }

    /// In words, after "the checkpoint's router".
    pub fn text(&self, tokens: usize) -> String {
        let mut text = format!("{} of {tokens} tokens get the experts that the input file records", self.same);
        if self.near_ties > 0 {
            text += &format!(", {} others a rounding to bf16 apart", self.near_ties);
        }
        text
    }

    /// What is wrong, if something is.
    pub fn wrong(&self, tokens: usize) -> Option<String> {
        let Contradiction { token, recorded, computed } = self.first.as_ref()?;
        Some(format!(
            "the checkpoint's router contradicts the recorded routing at {} of {tokens} tokens, first at token {token}: recorded {recorded}, \
             computed {computed}",
            self.contradictions
        ))
    }
}

impl Choices {
    fn of(routing: &Routing, token: usize) -> Self {
        let row = token * routing.top_k()..(token + 1) * routing.top_k();
        Self { experts: routing.topk_idx()[row.clone()].to_vec(), weights: routing.topk_weights()[row].to_vec() }
    }
}

impl std::fmt::Display for Choices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "experts {:?} with {:.4?}", self.experts, self.weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_with_the_first_token() {
        let choices = |experts: [i32; 2]| Choices { experts: experts.to_vec(), weights: vec![0.75, 0.25] };
        let contradiction = Contradiction { token: 3, recorded: choices([1, 2]), computed: choices([4, 0]) };
        let check = RoutingCheck { same: 9, near_ties: 1, contradictions: 2, first: Some(contradiction) };
        assert_eq!(
            check.text(12),
            "9 of 12 tokens get the experts that the input file records, 1 others a rounding to bf16 apart"
        );
        assert_eq!(
            check.wrong(12).unwrap(),
            "the checkpoint's router contradicts the recorded routing at 2 of 12 tokens, first at token 3: recorded experts [1, 2] with \
             [0.7500, 0.2500], computed experts [4, 0] with [0.7500, 0.2500]"
        );
        assert_eq!(RoutingCheck { contradictions: 0, first: None, ..check }.wrong(12), None);
    }
}
