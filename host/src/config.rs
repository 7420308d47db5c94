//! The shape of one MoE layer, and the limits of what the kernel runs.

use std::ops::Range;

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout;
use ferromoe_kernel::quantise::ScaleKind;

use crate::error::{Error, Result};

/// The most ranks (GPUs of one NVLink domain) a layer is spread over.
pub const MAX_RANKS: usize = layout::MAX_RANKS as usize;
/// The most experts a token is sent to.
pub const MAX_TOP_K: usize = layout::MAX_TOP_K as usize;
/// The most experts whose weights one rank holds, shared ones included.
pub const MAX_LOCAL_EXPERTS: usize = layout::MAX_LOCAL_EXPERTS as usize;
/// Hidden and intermediate sizes are multiples of this: a tile's width in weight rows.
pub const SIZE_STEP: usize = 64;

/// The number format that experts run in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpertFormat {
    /// Weights, tokens and intermediate in bf16.
    #[default]
    Bf16,
    /// Weights in e4m3 with a scale for each block of 128 x 128; tokens and intermediate in e4m3 with a scale for each token and 128 columns.
    Fp8,
}

impl ExpertFormat {
    /// What of it the kernel knows.
    pub fn kernel(self) -> &'static Format {
        match self {
            Self::Bf16 => &Format::BF16,
            Self::Fp8 => &Format::FP8,
        }
    }

    /// "bf16" or "fp8".
    pub fn name(self) -> &'static str {
        self.kernel().name
    }
}

/// The shape of one MoE layer, the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Width of a token's hidden state, H.
    pub hidden: usize,
    /// Width of an expert's intermediate, I.
    pub intermediate: usize,
    /// Number of routed experts over all ranks, E.
    pub experts: usize,
    /// Experts per token, K.
    pub top_k: usize,
    /// The most tokens one rank may hold in one forward pass; buffers are made for it.
    pub max_tokens_per_rank: usize,
    /// Clamp before the activation: gate to at most this, up to at most this in magnitude.
    pub swiglu_limit: Option<f32>,
    /// Experts that every token goes to with weight 1, each of width `intermediate`.
    pub shared_experts: usize,
    /// The number format that the experts run in.
    pub experts_format: ExpertFormat,
    /// What a scale may be that FP8 experts quantise tokens, intermediate or bf16 weights with.
    pub scales: ScaleKind,
}

impl MoeConfig {
    /// Checks that the kernel can run this layer on `ranks` ranks.
    pub fn validate(&self, ranks: usize) -> Result<()> {
        if !(1..=MAX_RANKS).contains(&ranks) {
            return Err(Error::Ranks { ranks });
        }
        for (what, value) in [("hidden", self.hidden), ("intermediate", self.intermediate)] {
            if value == 0 || value % SIZE_STEP != 0 {
                return Err(Error::SizeStep { what, value });
            }
        }
        let experts = self.experts;
        if experts == 0 || !experts.is_multiple_of(ranks) {
            return Err(Error::ExpertsNotDivisible { experts, ranks });
        }
        if !(1..=experts.min(MAX_TOP_K)).contains(&self.top_k) {
            return Err(Error::TopK { top_k: self.top_k, experts });
        }
        let local = (experts / ranks).saturating_add(self.shared_experts);
        if local > MAX_LOCAL_EXPERTS {
            return Err(Error::LocalExperts { ranks, local });
        }
        let most = self.most_tokens_per_rank(ranks, local);
        if !(1..=most).contains(&self.max_tokens_per_rank) {
            return Err(Error::MaxTokens { max: self.max_tokens_per_rank, most });
        }
        self.check_limit()
    }

    /// The largest `max_tokens_per_rank` whose tokens, combine rows and pool rows the kernel can number.
    fn most_tokens_per_rank(&self, ranks: usize, local_experts: usize) -> usize {
        let combine_rows = layout::MAX_COMBINE_ROWS as usize / (self.top_k + self.shared_experts);
        let pool_rows_per_token = ranks * self.top_k.min(self.experts / ranks) + self.shared_experts;
        let padding = local_experts * self.experts_format.kernel().tiles.max_padding() as usize;
        combine_rows.min(layout::MAX_TOKENS as usize).min((u32::MAX as usize - padding) / pool_rows_per_token)
    }

    /// Checks the number of tokens that a rank brings to one forward pass.
    pub fn check_tokens(&self, rank: usize, tokens: usize) -> Result<()> {
        let max = self.max_tokens_per_rank;
        if tokens <= max { Ok(()) } else { Err(Error::TooManyTokens { rank, tokens, max }) }
    }

    /// The experts that `rank` of `ranks` owns.
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn experts_of(&self, rank: usize, ranks: usize) -> Range<usize> {
        let share = self.experts / ranks;
        rank * share..(rank + 1) * share
    }

    pub(crate) fn check_limit(&self) -> Result<()> {
        match self.swiglu_limit {
            Some(limit) if !(limit.is_finite() && limit > 0.0) => Err(Error::SwigluLimit { limit }),
            _ => Ok(()),
        }
    }
}

/// Cuts `tokens` tokens over `ranks` ranks, in order and as evenly as possible: the first ranks get one more.
pub fn split_tokens(tokens: usize, ranks: usize) -> Vec<Range<usize>> {
    (0..ranks)
        .map(|rank| {
            let start = |rank: usize| rank * (tokens / ranks) + rank.min(tokens % ranks);
            start(rank)..start(rank + 1)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config() -> MoeConfig {
        MoeConfig {
            hidden: 128,
            intermediate: 64,
            experts: 12,
            top_k: 4,
            max_tokens_per_rank: 16,
            swiglu_limit: None,
            shared_experts: 1,
            experts_format: ExpertFormat::Bf16,
            scales: ScaleKind::F32,
        }
    }

    fn message(config: MoeConfig, ranks: usize) -> String {
        config.validate(ranks).unwrap_err().to_string()
    }

    #[test]
    fn what_the_kernel_runs_is_accepted() {
        for ranks in [1, 2, 3, 4, 6] {
            config().validate(ranks).unwrap();
        }
        MoeConfig { top_k: 32, experts: 64, swiglu_limit: Some(7.0), ..config() }.validate(8).unwrap();
    }

    #[test]
    fn errors_name_the_value_and_what_would_be_right() {
        let of = |text: String, parts: &[&str]| {
            for part in parts {
                assert!(text.contains(part), "{text:?} lacks {part:?}");
            }
        };
        of(message(config(), 0), &["0 ranks", "1 to 8"]);
        of(message(config(), 9), &["9 ranks", "1 to 8"]);
        of(message(config(), 5), &["12 experts", "5 ranks", "divide"]);
        of(message(MoeConfig { hidden: 100, ..config() }, 1), &["hidden", "100", "multiple of 64"]);
        of(message(MoeConfig { intermediate: 0, ..config() }, 1), &["intermediate", "0", "multiple of 64"]);
        of(message(MoeConfig { top_k: 13, ..config() }, 1), &["top-k is 13", "1 to 12"]);
        of(message(MoeConfig { top_k: 33, experts: 64, ..config() }, 1), &["top-k is 33", "1 to 32"]);
        of(message(MoeConfig { top_k: 0, ..config() }, 1), &["top-k is 0", "1 to 12"]);
        of(message(MoeConfig { experts: 0, ..config() }, 1), &["0 experts"]);
        of(message(MoeConfig { experts: 513, shared_experts: 0, ..config() }, 1), &["513 experts", "at most 512"]);
        of(message(MoeConfig { max_tokens_per_rank: 0, ..config() }, 1), &["maximum of 0 tokens", "from 1 to 8388608"]);
        of(message(MoeConfig { max_tokens_per_rank: 1 << 28, ..config() }, 1), &["268435456 tokens"]);
        of(message(MoeConfig { swiglu_limit: Some(f32::NAN), ..config() }, 1), &["limit is NaN", "above 0"]);
        let tokens = config().check_tokens(1, 17).unwrap_err().to_string();
        of(tokens, &["rank 1", "17 tokens", "16"]);
        config().check_tokens(1, 16).unwrap();
    }

    proptest! {
        #[test]
        fn tokens_are_split_in_order_and_evenly(tokens in 0usize..300, ranks in 1usize..=8) {
            let parts = split_tokens(tokens, ranks);
            prop_assert_eq!(parts.len(), ranks);
            prop_assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), (0..tokens).collect::<Vec<_>>());
            let lengths: Vec<_> = parts.iter().map(ExactSizeIterator::len).collect();
            prop_assert!(lengths[0] - lengths[ranks - 1] <= 1);
            prop_assert!(lengths.is_sorted_by(|a, b| a >= b));
        }

        #[test]
        fn experts_are_cut_contiguously(share in 1usize..9, ranks in 1usize..=8) {
            let config = MoeConfig { experts: share * ranks, ..config() };
            let owned: Vec<_> = (0..ranks).flat_map(|rank| config.experts_of(rank, ranks)).collect();
            prop_assert_eq!(owned, (0..config.experts).collect::<Vec<_>>());
        }
    }
}
