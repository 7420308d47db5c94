//! The layers that the benchmark runs.

use ferromoe_kernel::quantise::ScaleKind;

use crate::config::{ExpertFormat, MoeConfig};

/// Ranks that the large models are made to be spread over.
const FULL_GROUP: usize = 8;

/// The sizes of one model's MoE layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BenchShape {
    /// What it is called on the command line.
    pub name: &'static str,
    /// H
    pub hidden: usize,
    /// I
    pub intermediate: usize,
    /// Routed experts of the model's layer.
    pub experts: usize,
    /// K
    pub top_k: usize,
    /// Experts that every token goes to.
    pub shared_experts: usize,
    /// Whether a smaller group holds only the experts that as many ranks of eight would: one GPU then works as it does in
    /// the full group, and the weights fit.
    pub cut: bool,
}

/// All shapes: DeepSeek-V4-Flash and -Pro, DeepSeek-V3, GLM-5 and GLM-5.3-Flash, Qwen3-30B-A3B, gpt-oss-120b and Mixtral-8x7B, by their published configurations.
/// They are sizes: what is measured multiplies, activates and sums alike for all.
pub const SHAPES: [BenchShape; 8] = [
    shape("flash", [4096, 2048], 256, 6, 1, true),
    shape("pro", [7168, 3072], 384, 6, 1, true),
    shape("v3", [7168, 2048], 256, 8, 1, true),
    shape("glm-5", [6144, 2048], 256, 8, 1, true),
    shape("glm-flash", [4096, 2048], 288, 8, 1, true),
    shape("qwen3-30b", [2048, 768], 128, 8, 0, false),
    shape("gpt-oss-120b", [2880, 2880], 128, 4, 0, false),
    shape("mixtral-8x7b", [4096, 14336], 8, 2, 0, false),
];

const fn shape(
    name: &'static str,
    [hidden, intermediate]: [usize; 2],
    experts: usize,
    top_k: usize,
    shared_experts: usize,
    cut: bool,
) -> BenchShape {
    BenchShape { name, hidden, intermediate, experts, top_k, shared_experts, cut }
}

impl BenchShape {
    /// The shape of this name.
    pub fn find(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// Routed experts of a group of `ranks` ranks.
    pub fn experts_on(&self, ranks: usize) -> usize {
        if self.cut && ranks < FULL_GROUP { self.experts / FULL_GROUP * ranks } else { self.experts }
    }

    /// A layer of the same proportions that the simulator runs in seconds: sizes a sixteenth, at most eight experts a
    /// rank, the same top-k where there are enough of them.
    pub fn scaled_down(&self, ranks: usize) -> Self {
        let sixteenth = |size: usize| (size / 16).next_multiple_of(64);
        let experts = self.experts_on(ranks).min(8 * ranks);
        let (hidden, intermediate) = (sixteenth(self.hidden), sixteenth(self.intermediate));
        Self { hidden, intermediate, experts, top_k: self.top_k.min(experts), cut: false, ..*self }
    }

    /// The layer's configuration for `experts` routed experts and up to `max_tokens` tokens a rank.
    pub fn config(&self, experts: usize, max_tokens: usize) -> MoeConfig {
        MoeConfig {
            hidden: self.hidden,
            intermediate: self.intermediate,
            experts,
            top_k: self.top_k,
            max_tokens_per_rank: max_tokens,
            swiglu_limit: None,
            shared_experts: self.shared_experts,
            experts_format: ExpertFormat::Bf16,
            scales: ScaleKind::F32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::gpu::INPUT_SETS;

    #[test]
    fn a_small_group_holds_the_experts_of_as_many_ranks_of_eight() {
        let experts = |name: &str| [1, 2, 8].map(|ranks| BenchShape::find(name).unwrap().experts_on(ranks));
        assert_eq!(experts("flash"), [32, 64, 256]);
        assert_eq!(experts("pro"), [48, 96, 384]);
        assert_eq!(experts("glm-flash"), [36, 72, 288]);
        assert_eq!(experts("qwen3-30b"), [128; 3]);
        assert_eq!(experts("gpt-oss-120b"), [128; 3]);
        assert_eq!(BenchShape::find("gpt"), None);
    }

    /// So that no launch finds the weights of the one before in the cache: an H200's L2 has 60 MB. In FP8, those of the sets that take turns.
    #[test]
    fn the_weights_of_a_single_token_exceed_the_l2() {
        for BenchShape { name, hidden, intermediate, top_k, .. } in SHAPES {
            let weights = top_k * 3 * hidden * intermediate;
            for (bytes, sets) in [(2, 1), (1, INPUT_SETS)] {
                assert!(weights * bytes * sets > 60 << 20, "{name}: {weights} weights of {bytes} bytes");
            }
        }
    }

    #[test]
    fn some_scaled_shapes_have_partial_blocks_of_scales() {
        let sizes = |name: &str| {
            let BenchShape { hidden, intermediate, .. } = BenchShape::find(name).unwrap().scaled_down(1);
            [hidden, intermediate]
        };
        assert_eq!(sizes("gpt-oss-120b"), [192, 192]);
        assert_eq!(sizes("pro"), [448, 192]);
        assert_eq!(sizes("qwen3-30b"), [128, 64]);
    }

    #[test]
    fn every_shape_is_one_that_the_kernel_runs() {
        for shape in SHAPES {
            for ranks in [1, 2, 4, 8] {
                let small = shape.scaled_down(ranks);
                for (shape, tokens) in [(shape, 8192), (small, 64)] {
                    for experts_format in [ExpertFormat::Bf16, ExpertFormat::Fp8] {
                        let config = shape.config(shape.experts_on(ranks), tokens);
                        MoeConfig { experts_format, ..config }.validate(ranks).unwrap();
                    }
                }
            }
        }
    }
}
