//! The sizes of a workspace, and what it takes.

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::{BF16_BYTES, MAX_COMBINE_ROWS, Shape, SymmetricLayout, WorkspaceLayout};
use ferromoe_kernel::quantise::{ScaleKind, groups};

use crate::config::{ExpertFormat, MoeConfig};
use crate::error::{Error, Excess, Result};

/// The sizes that a workspace is made for: of each, the largest that one of its layers has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// The number formats that experts run in.
    pub formats: Vec<ExpertFormat>,
}

impl WorkspaceSizes {
    /// The least sizes in which all these layers fit.
    pub fn of<'a>(layers: impl IntoIterator<Item = &'a MoeConfig>) -> Self {
        layers.into_iter().map(Self::of_layer).fold(Self::default(), |mut all, one| {
            for format in one.formats {
                if !all.formats.contains(&format) {
                    all.formats.push(format);
                }
            }
            Self {
                hidden: all.hidden.max(one.hidden),
                intermediate: all.intermediate.max(one.intermediate),
                experts: all.experts.max(one.experts),
                top_k: all.top_k.max(one.top_k),
                shared_experts: all.shared_experts.max(one.shared_experts),
                tokens: all.tokens.max(one.tokens),
                formats: all.formats,
            }
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
            formats: vec![config.experts_format],
        }
    }

    /// Bytes of device memory that a workspace of these sizes takes on each of `ranks` ranks. Nothing is allocated to know it.
    ///
    /// # Errors
    /// Sizes that the kernel cannot run on so many ranks.
    pub fn bytes(&self, ranks: usize) -> Result<u64> {
        let (shape, formats) = (self.shape(ranks)?, self.kernel_formats());
        let inputs = 2 * choices_bytes(&shape) + COUNT_BYTES + states_bytes(&shape) + scales_bytes(&shape, &formats);
        Ok(symmetric_bytes(&shape, &formats) + WorkspaceLayout::new(&shape, &formats).bytes + inputs)
    }

    /// The sizes as the kernel's layouts take them, checked.
    pub(crate) fn shape(&self, ranks: usize) -> Result<Shape> {
        let largest = |format: ExpertFormat| MoeConfig {
            hidden: self.hidden,
            intermediate: self.intermediate,
            experts: self.experts,
            top_k: self.top_k,
            max_tokens_per_rank: self.tokens,
            swiglu_limit: None,
            shared_experts: self.shared_experts,
            experts_format: format,
            scales: ScaleKind::F32,
        };
        // The layout is that of the sizes whatever the formats, but each has limits of its own.
        let shape = layer_shape(&largest(ExpertFormat::default()), ranks)?;
        for &format in &self.formats {
            layer_shape(&largest(format), ranks)?;
        }
        Ok(shape)
    }

    /// The formats as the kernel's layouts take them.
    pub(crate) fn kernel_formats(&self) -> Vec<Format> {
        self.formats.iter().map(|format| *format.kernel()).collect()
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
        if !excesses.is_empty() {
            return Err(Error::NotInWorkspace { excesses });
        }
        if !self.formats.contains(&config.experts_format) {
            return Err(Error::NotThatFormat { format: config.experts_format.name(), formats: self.format_names() });
        }
        Ok(())
    }

    /// The names of the formats.
    pub(crate) fn format_names(&self) -> String {
        self.formats.iter().map(|format| format.name()).collect::<Vec<_>>().join(" and ")
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

/// Bytes of the scales of the most FP8 tokens that a rank can have; 0 if no layer can take them.
pub(super) fn scales_bytes(sizes: &Shape, formats: &[Format]) -> u64 {
    let takes_fp8 = formats.iter().any(|format| format.scaled);
    if takes_fp8 { u64::from(sizes.max_tokens) * u64::from(groups(sizes.hidden)) * 4 } else { 0 }
}

/// Bytes of the most expert ids or routing weights.
pub(super) fn choices_bytes(sizes: &Shape) -> u64 {
    u64::from(sizes.max_tokens) * u64::from(sizes.top_k) * 4
}

/// Bytes of a symmetric buffer with the hidden states behind what the kernel lays out.
pub(super) fn symmetric_bytes(sizes: &Shape, formats: &[Format]) -> u64 {
    SymmetricLayout::new(sizes, formats).bytes(sizes, formats) + states_bytes(sizes)
}
