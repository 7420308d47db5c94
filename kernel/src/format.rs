//! What of a number format host and device share: how many bytes an element has, how tokens are cut into tiles, and what a CTA is made of.
//!
//! What a format computes is its main loop, in `main_loop`.

use crate::quantise::groups;
use crate::task::TASK_BYTES;
use crate::tile::{K_BLOCK_BYTES, MAX_CLUSTER, Tiles, WEIGHT_TILE};
use crate::warps::{CONSUMER_WARP, WARP, WARPGROUP};

/// The sizes of a number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// What it is called.
    pub name: &'static str,
    /// Name of the kernel's entry in the format's PTX module.
    pub entry: &'static str,
    /// Bytes of an element of the experts' weights, of the tokens in the pool and of the intermediate.
    pub element_bytes: u32,
    /// Whether weights have a scale for each [`crate::quantise::GROUP`] rows and columns, tokens and intermediate one for each row and so many columns.
    pub scaled: bool,
    /// The widths of token tiles.
    pub tiles: Tiles,
    /// Index of the first width from which on tokens are the A operand, and the pipeline is always cut for the widest tile: then where a stage lies is known to the compiler.
    pub wide_from: u32,
    /// Warpgroups that multiply, store and combine.
    pub consumer_warpgroups: u32,
    /// The most tokens of a tile whose results one warpgroup has.
    pub warpgroup_tokens: u32,
    /// The most CTAs of a cluster.
    pub max_cluster: u32,
    /// Weight tiles of a linear 1 task, one after the other; several only without clusters, whose CTAs have stages in step.
    pub linear1_tiles: u32,
    /// The most stages of the pipeline. More would only queue at the memory, and flags and fences behind them.
    pub max_stages: u32,
    /// Rounds of stages before a task's last at which the next one is claimed.
    pub claim_stages: u32,
    /// Bytes in which one consumer warpgroup transposes its results.
    pub staging_bytes: u32,
    /// Bytes of one buffer for pulling rows, piece by piece: an equal share of it for each row that is on its way.
    pub pull_bytes: u32,
    /// Registers of a thread of the warps that are not consumers, after `setmaxnreg`.
    pub helper_registers: u32,
    /// Registers of a consumer thread, after `setmaxnreg`.
    pub consumer_registers: u32,
}

/// Bytes of one stage's weight tile.
pub const WEIGHT_STAGE_BYTES: u32 = WEIGHT_TILE * K_BLOCK_BYTES;

/// Bytes of a weight tile's scales for one k-block: f32 of the gate rows, of the up rows (in linear 2 the same again), and two that are 0, for a bulk copy has 16 bytes.
pub const WEIGHT_SCALES_BYTES: u32 = 16;

/// Stages that hold the widest token tile.
const WIDEST_STAGES: u32 = 4;

/// Registers of an SM.
const REGISTERS: u32 = 65536;

impl Format {
    /// Weights, tokens and intermediate in bf16.
    pub const BF16: Self = Self {
        name: "bf16",
        entry: "ferromoe_bf16",
        element_bytes: 2,
        scaled: false,
        tiles: Tiles { step: 32, count: 10 },
        wide_from: 10,
        consumer_warpgroups: 2,
        warpgroup_tokens: 256,
        max_cluster: 2,
        linear1_tiles: 1,
        max_stages: 6,
        claim_stages: 2,
        staging_bytes: 8192,
        pull_bytes: 6144,
        helper_registers: 88,
        consumer_registers: 208,
    };

    /// Weights, tokens and intermediate in e4m3, with scales.
    pub const FP8: Self = Self {
        name: "fp8",
        entry: "ferromoe_fp8",
        element_bytes: 1,
        scaled: true,
        tiles: Tiles { step: 64, count: 6 },
        wide_from: 4,
        consumer_warpgroups: 3,
        warpgroup_tokens: 64,
        max_cluster: 1,
        linear1_tiles: 2,
        max_stages: 6,
        claim_stages: 3,
        staging_bytes: 16384,
        pull_bytes: 4096,
        helper_registers: 80,
        consumer_registers: 144,
    };

    /// All formats.
    pub const ALL: [Self; 2] = [Self::BF16, Self::FP8];

    /// Elements of the contraction dimension in one pipeline stage: they fill one 128-byte swizzle row.
    pub const fn k_block(&self) -> u32 {
        K_BLOCK_BYTES / self.element_bytes
    }

    /// K-blocks of so many columns; the last may be partial.
    pub const fn k_blocks(&self, columns: u32) -> u32 {
        columns.div_ceil(self.k_block())
    }

    /// Weight rows of a linear 1 task.
    pub const fn linear1_rows(&self) -> u32 {
        self.linear1_tiles * WEIGHT_TILE
    }

    /// Bytes of `columns` elements.
    pub const fn row_bytes(&self, columns: u32) -> u32 {
        columns * self.element_bytes
    }

    /// Bytes of a token as it crosses NVLink: its elements, then its scales; whole lines.
    pub const fn record_bytes(&self, hidden: u32) -> u32 {
        let scales = if self.scaled { groups(hidden) * 4 } else { 0 };
        (self.row_bytes(hidden) + scales).next_multiple_of(128)
    }

    /// Warps of all consumer warpgroups.
    pub const fn consumer_warps(&self) -> u32 {
        self.consumer_warpgroups * WARPGROUP / WARP
    }

    /// Threads of a CTA.
    pub const fn threads(&self) -> u32 {
        (CONSUMER_WARP + self.consumer_warps()) * WARP
    }

    /// Bytes of one stage for token tiles of up to `width` tokens: the weight tile, then the token tile.
    pub const fn stage_bytes(&self, width: u32) -> u32 {
        WEIGHT_STAGE_BYTES + width * K_BLOCK_BYTES
    }

    /// Bytes of one stage's scales: those of the widest token tile, then those of the weight tile.
    pub const fn scale_stage_bytes(&self) -> u32 {
        if self.scaled { self.tiles.widest() * 4 + WEIGHT_SCALES_BYTES } else { 0 }
    }

    /// Bytes of the TMA pipeline.
    pub const fn pipeline_bytes(&self) -> u32 {
        WIDEST_STAGES * self.stage_bytes(self.tiles.widest())
    }

    /// The width for which the pipeline of a launch is cut whose widest token tile has this index: no narrower one than the widest of which
    /// [`Self::max_stages`] stages fit.
    pub const fn pipeline_width(&self, widest: u32) -> u32 {
        let mut least = self.tiles.count - 1;
        while self.max_stages * self.stage_bytes(self.tiles.width(least)) > self.pipeline_bytes() {
            least -= 1;
        }
        if widest >= self.wide_from {
            return self.tiles.widest();
        }
        self.tiles.width(if widest < least { least } else { widest })
    }

    /// Stages of such a launch: as many as the pipeline's bytes hold; in four bits each, by the index of the widest tile. A table would lie in memory, and a division takes its time.
    pub const fn packed_stages(&self) -> u64 {
        let (mut packed, mut index) = (0, 0);
        while index < self.tiles.count {
            let stages = self.pipeline_bytes() / self.stage_bytes(self.pipeline_width(index));
            assert!(stages < 16);
            packed |= (if stages < self.max_stages { stages } else { self.max_stages } as u64) << (4 * index);
            index += 1;
        }
        packed
    }
}

/// The format of this module.
#[cfg(target_arch = "nvptx64")]
pub const FORMAT: Format = if cfg!(feature = "fp8") { Format::FP8 } else { Format::BF16 };

/// Task slots, which take turns: the producer has its next task while other roles have not yet come to the one before.
pub const TASK_SLOTS: u32 = 2;

const _: () = {
    let mut index = 0;
    while index < Format::ALL.len() {
        let format = Format::ALL[index];
        // The register file, and setmaxnreg takes multiples of 8 (PTX ISA 8.6, setmaxnreg).
        let (helpers, consumers) =
            (CONSUMER_WARP * format.helper_registers, format.consumer_warps() * format.consumer_registers);
        assert!(WARP * (helpers + consumers) <= REGISTERS);
        assert!(format.helper_registers.is_multiple_of(8) && format.consumer_registers.is_multiple_of(8));
        assert!(format.stage_bytes(8).is_multiple_of(1024) && WEIGHT_STAGE_BYTES.is_multiple_of(1024));
        assert!(format.scale_stage_bytes().is_multiple_of(16) && TASK_BYTES.is_multiple_of(16));
        assert!(format.tiles.count <= 16 && format.max_cluster <= MAX_CLUSTER);
        assert!(format.linear1_tiles == 1 || format.max_cluster == 1);
        index += 1;
    }
};
