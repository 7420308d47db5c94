//! The sizes of a workspace, and what it takes.

use ferromoe_kernel::layout::{BF16_BYTES, MAX_COMBINE_ROWS, Shape, SymmetricLayout, WorkspaceLayout};

use crate::config::MoeConfig;
use crate::error::{Error, Excess, Result};

/// The sizes that a workspace is made for: of each, the largest that one of its layers has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkspaceSizes {
    /// Width of a token's hidden state, H.
    pub hidden: usize,
    /// Width of an expert's intermediate, I.
    pub intermediate: usize,
    /// Routed experts over all ranks, E.
    pub experts: usize,
    /// Experts per token, K.
    pub top_k: usize,
    /// Experts that every token goes to.
    pub shared_experts: usize,
    /// Tokens of one rank in one forward pass.
    pub tokens: usize,
}

impl WorkspaceSizes {
    /// The least sizes in which all these layers fit.
    pub fn of<'a>(layers: impl IntoIterator<Item = &'a MoeConfig>) -> Self {
        layers.into_iter().map(Self::of_layer).fold(Self::default(), |all, one| Self {
            hidden: all.hidden.max(one.hidden),
            intermediate: all.intermediate.max(one.intermediate),
            experts: all.experts.max(one.experts),
            top_k: all.top_k.max(one.top_k),
            shared_experts: all.shared_experts.max(one.shared_experts),
            tokens: all.tokens.max(one.tokens),
        })
    }

    fn of_layer(config: &MoeConfig) -> Self {
        Self {
            hidden: config.hidden,
            intermediate: config.intermediate,
            experts: config.experts,
            top_k: config.top_k,
            shared_experts: config.shared_experts,
            tokens: config.max_tokens_per_rank,
        }
    }

    /// Bytes of device memory that a workspace of these sizes takes on each of `ranks` ranks. Nothing is allocated to know it.
    ///
    /// # Errors
    /// Sizes that the kernel cannot run on so many ranks.
    pub fn bytes(&self, ranks: usize) -> Result<u64> {
        let shape = self.shape(ranks)?;
        let inputs = 2 * choices_bytes(&shape) + COUNT_BYTES + states_bytes(&shape);
        Ok(symmetric_bytes(&shape) + WorkspaceLayout::new(&shape).bytes + inputs)
    }

    /// The sizes as the kernel's layouts take them, checked.
    pub(crate) fn shape(&self, ranks: usize) -> Result<Shape> {
        let Self { hidden, intermediate, experts, top_k, shared_experts, tokens } = *self;
        let max_tokens_per_rank = tokens;
        let largest =
            MoeConfig { hidden, intermediate, experts, top_k, max_tokens_per_rank, swiglu_limit: None, shared_experts };
        layer_shape(&largest, ranks)
    }

    /// Checks that a layer fits.
    pub(crate) fn check(&self, config: &MoeConfig) -> Result<()> {
        let layer = Self::of_layer(config);
        let excesses: Vec<_> = layer
            .named()
            .into_iter()
            .zip(self.named())
            .map(|((what, layer), (_, workspace))| Excess { what, layer, workspace })
            .filter(|excess| excess.layer > excess.workspace)
            .collect();
        if excesses.is_empty() { Ok(()) } else { Err(Error::NotInWorkspace { excesses }) }
    }

    /// Each size with what it is.
    pub(crate) fn named(&self) -> [(&'static str, usize); 6] {
        [
            ("a hidden size of", self.hidden),
            ("an intermediate size of", self.intermediate),
            ("a number of experts of", self.experts),
            ("a top-k of", self.top_k),
            ("a number of shared experts of", self.shared_experts),
            ("a maximum of tokens per rank of", self.tokens),
        ]
    }
}

/// A layer's sizes as the kernel takes them, checked.
pub(crate) fn layer_shape(config: &MoeConfig, ranks: usize) -> Result<Shape> {
    config.validate(ranks)?;
    let shape = Shape {
        hidden: config.hidden as u32,
        intermediate: config.intermediate as u32,
        experts: config.experts as u32,
        shared_experts: config.shared_experts as u32,
        top_k: config.top_k as u32,
        max_tokens: config.max_tokens_per_rank as u32,
        ranks: ranks as u32,
    };
    let most = MAX_COMBINE_ROWS / u64::from(shape.slots());
    if config.max_tokens_per_rank as u64 > most {
        return Err(Error::Size {
            what: "the configuration".into(),
            found: format!("a maximum of {} tokens per rank", config.max_tokens_per_rank),
            expected: format!("at most {most} with {} results per token", shape.slots()),
        });
    }
    Ok(shape)
}

/// Bytes of a count of tokens in device memory.
pub(super) const COUNT_BYTES: u64 = 4;

/// Bytes of the most hidden states that a rank can have.
pub(super) fn states_bytes(sizes: &Shape) -> u64 {
    u64::from(sizes.max_tokens) * u64::from(sizes.hidden) * BF16_BYTES
}

/// Bytes of the most expert ids or routing weights.
pub(super) fn choices_bytes(sizes: &Shape) -> u64 {
    u64::from(sizes.max_tokens) * u64::from(sizes.top_k) * 4
}

/// Bytes of a symmetric buffer with the hidden states behind what the kernel lays out.
pub(super) fn symmetric_bytes(sizes: &Shape) -> u64 {
    SymmetricLayout::new(sizes).bytes(sizes) + states_bytes(sizes)
}
