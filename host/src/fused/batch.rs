//! What goes into a forward pass, in host memory, and what comes out.

use std::time::Duration;

use ferromoe_kernel::quantise::groups;
use half::bf16;

use crate::config::{ExpertFormat, MoeConfig};
use crate::error::{Error, Result};
use crate::tokens::Fp8Tokens;

/// Hidden states [T, H] of one rank, in host memory.
#[derive(Clone, Copy, Debug)]
pub enum HiddenStates<'a> {
    /// They are quantised by the kernel if the experts run in FP8.
    Bf16(&'a [bf16]),
    /// Quantised already; only for a layer whose experts run in FP8.
    Fp8 {
        /// e4m3 [T, H]
        values: &'a [u8],
        /// [T, ceil(H / 128)]: what the values are multiplied with.
        scales: &'a [f32],
    },
}

impl HiddenStates<'_> {
    /// Number of elements, T x H.
    pub(crate) fn elements(&self) -> usize {
        match self {
            Self::Bf16(states) => states.len(),
            Self::Fp8 { values, .. } => values.len(),
        }
    }

    /// Their bytes, without scales.
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Bf16(states) => bytemuck::cast_slice(states),
            Self::Fp8 { values, .. } => values,
        }
    }

    /// The scales, if they have any.
    pub(crate) fn scales(&self) -> Option<&[f32]> {
        match self {
            Self::Bf16(_) => None,
            Self::Fp8 { scales, .. } => Some(scales),
        }
    }
}

impl<'a> From<&'a [bf16]> for HiddenStates<'a> {
    fn from(states: &'a [bf16]) -> Self {
        Self::Bf16(states)
    }
}

impl<'a> From<&'a Fp8Tokens> for HiddenStates<'a> {
    fn from(tokens: &'a Fp8Tokens) -> Self {
        Self::Fp8 { values: tokens.values(), scales: tokens.scales() }
    }
}

/// One rank's tokens of a forward pass, in host memory.
#[derive(Clone, Copy, Debug)]
pub struct RankBatch<'a> {
    /// [T, H]
    pub hidden_states: HiddenStates<'a>,
    /// [T, K] expert ids; -1 is "no expert".
    pub topk_idx: &'a [i32],
    /// [T, K]
    pub topk_weights: &'a [f32],
}

impl RankBatch<'_> {
    /// Number of tokens, T, if they are `hidden` wide.
    pub(crate) fn tokens(&self, hidden: usize) -> usize {
        self.hidden_states.elements() / hidden
    }

    /// Checks that it is a batch for rank `rank` of this layer.
    pub(super) fn check(&self, config: &MoeConfig, rank: usize) -> Result<()> {
        let (hidden, top_k) = (config.hidden, config.top_k);
        let tokens = self.tokens(hidden);
        config.check_tokens(rank, tokens)?;
        let scales = self.hidden_states.scales();
        if scales.is_some() {
            check_takes_fp8(config, rank)?;
        }
        let scales = scales.map(|scales| ("hidden scales", scales.len(), tokens * groups(hidden as u32) as usize));
        let sizes = [
            ("hidden states", self.hidden_states.elements(), tokens * hidden),
            ("expert ids", self.topk_idx.len(), tokens * top_k),
            ("routing weights", self.topk_weights.len(), tokens * top_k),
        ];
        for (what, found, expected) in sizes.into_iter().chain(scales) {
            if found != expected {
                return Err(Error::Size {
                    what: format!("the batch of rank {rank}"),
                    found: format!("{found} {what}"),
                    expected: format!("{expected} for {tokens} tokens"),
                });
            }
        }
        Ok(())
    }
}

/// Checks that the layer can take FP8 tokens, which rank `rank` has.
pub(super) fn check_takes_fp8(config: &MoeConfig, rank: usize) -> Result<()> {
    match config.experts_format {
        ExpertFormat::Fp8 => Ok(()),
        format @ ExpertFormat::Bf16 => Err(Error::TokensFormat { rank, experts: format.name() }),
    }
}

/// What a forward pass gave one rank.
#[derive(Clone, Debug)]
pub struct RankOutput {
    /// [T, H]
    pub output: Vec<bf16>,
    /// Time of the launch: measured on a GPU, simulated time in the simulator.
    pub elapsed: Duration,
    /// What the simulator counted; `None` on a GPU.
    pub cost: Option<ptx_sim::Cost>,
}
