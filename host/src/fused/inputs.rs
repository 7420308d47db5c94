//! The device memory that a queued launch uses.

use ferromoe_kernel::params::Arguments;

use super::batch::check_takes_fp8;
use crate::config::MoeConfig;
use crate::error::{Error, Result};

/// One rank's arguments of a queued launch: device addresses in memory of any owner.
///
/// The memory is the rank's own. Where the experts run in bf16, every rank of the group reads the hidden states: with one process they may be
/// anywhere on the rank's GPU, with several they are in [`crate::Workspace::hidden_states`], which is mapped into all processes. Where they run in FP8
/// only the rank itself reads them, and they may be anywhere on its GPU. No address but that of the scales may be 0, also on a rank without tokens.
#[derive(Clone, Copy, Debug)]
pub struct RankInputs {
    /// bf16 [T, H], or e4m3 if there are scales of them; 16-byte aligned.
    pub hidden_states: u64,
    /// 0, or f32 [T, ceil(H / 128)], 4-byte aligned: the hidden states are e4m3, and each is multiplied with its token's and columns' scale. Only for a layer whose experts
    /// run in FP8.
    pub hidden_scales: u64,
    /// i32 [T, K], 4-byte aligned; -1 is "no expert".
    pub topk_idx: u64,
    /// f32 [T, K], 4-byte aligned.
    pub topk_weights: u64,
    /// u32, 4-byte aligned: T, read when the launch runs.
    pub tokens: u64,
    /// bf16 [T, H], 16-byte aligned; written.
    pub output: u64,
    /// The most tokens that any rank may have in this launch, as far as the caller knows: at the latest the layer's maximum. Nothing but speed depends on
    /// it: with many, CTAs work in clusters.
    pub most_tokens: u32,
}

impl RankInputs {
    /// Checks that these can be what a launch of this layer on rank `rank` gets.
    pub(super) fn check(&self, config: &MoeConfig, rank: usize) -> Result<()> {
        if self.hidden_scales != 0 {
            check_takes_fp8(config, rank)?;
        }
        for (what, address, alignment) in [
            ("hidden states", self.hidden_states, 16),
            ("expert ids", self.topk_idx, 4),
            ("routing weights", self.topk_weights, 4),
            ("token count", self.tokens, 4),
            ("output", self.output, 16),
        ] {
            if address == 0 {
                let expected = "the address must not be null, also where the rank has no tokens".into();
                return Err(Error::Address { what, rank, address, expected });
            }
            check_alignment(what, rank, address, alignment)?;
        }
        check_alignment("hidden scales", rank, self.hidden_scales, 4)
    }

    /// As the kernel takes them.
    pub(super) fn kernel_arguments(self) -> Arguments {
        Arguments {
            hidden_states: self.hidden_states,
            hidden_scales: self.hidden_scales,
            topk_ids: self.topk_idx,
            topk_weights: self.topk_weights,
            tokens: self.tokens,
            output: self.output,
        }
    }
}

fn check_alignment(what: &'static str, rank: usize, address: u64, alignment: u64) -> Result<()> {
    if address.is_multiple_of(alignment) {
        return Ok(());
    }
    Err(Error::Address { what, rank, address, expected: format!("the address must be a multiple of {alignment}") })
}
