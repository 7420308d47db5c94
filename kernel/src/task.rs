//! A unit of work, as it goes from the scheduler warp to the other roles.

use crate::format::Format;
use crate::layout::Shape;
use crate::tile::WEIGHT_TILE;

/// What a task does.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Token rows times linear 1 weights, SwiGLU, routing weight, into the intermediate pool.
    Linear1 = 0,
    /// Intermediate rows times linear 2 weights, into the combine buffers.
    Linear2 = 1,
    /// A chunk of tokens: sum of their results.
    Combine = 2,
    /// No work is left.
    End = 3,
}

/// Bytes of a task as it lies in a task slot.
pub const TASK_BYTES: u32 = 32;

/// One unit of work of a CTA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// What to do. As a word, for it goes through shared memory.
    pub phase: u32,
    /// Local expert; for [`Phase::Combine`] the chunk.
    pub expert: u32,
    /// First weight row.
    pub weight_row: u32,
    /// First row in the pools.
    pub pool_row: u32,
    /// Rows of the tile that hold tokens, 1 to the tile's width.
    pub rows: u32,
    /// Number of the tile in the pools.
    pub tile: u32,
    /// Index of its width among the format's [`crate::tile::Tiles`].
    pub width: u32,
    /// GEMM tasks of this expert in this phase, those behind its last weight row included.
    pub expert_tasks: u32,
    /// Index of the widest tile of the launch, for which the pipeline's stages are cut.
    pub widest: u32,
    /// Of a product: stages of the pipeline that the CTA's product before had, if they were cut otherwise; else 0.
    pub old_stages: u32,
}

impl Task {
    /// A task that is not a matrix product.
    pub const fn plain(phase: Phase, chunk: u32) -> Self {
        Self {
            phase: phase as u32,
            expert: chunk,
            weight_row: 0,
            pool_row: 0,
            rows: 0,
            tile: 0,
            width: 0,
            expert_tasks: 0,
            widest: 0,
            old_stages: 0,
        }
    }

    /// As it lies in a task slot.
    #[inline(always)]
    pub const fn words(self) -> [[u32; 4]; 2] {
        let Self { phase, expert, weight_row, pool_row, rows, tile, width, expert_tasks, widest, old_stages } = self;
        [[phase, expert, weight_row, pool_row], [rows, tile, width | widest << 8 | old_stages << 16, expert_tasks]]
    }

    /// Reads what [`Self::words`] gave.
    #[inline(always)]
    pub const fn from_words(words: [[u32; 4]; 2]) -> Self {
        let [[phase, expert, weight_row, pool_row], [rows, tile, widths, expert_tasks]] = words;
        let (width, widest, old_stages) = (widths & 0xff, widths >> 8 & 0xff, widths >> 16);
        Self { phase, expert, weight_row, pool_row, rows, tile, width, expert_tasks, widest, old_stages }
    }

    /// Whether it is a matrix product.
    #[inline(always)]
    pub const fn is_product(&self) -> bool {
        self.phase <= Phase::Linear2 as u32
    }

    /// Whether it is one of linear 1.
    #[inline(always)]
    pub const fn is_linear1(&self) -> bool {
        self.phase == Phase::Linear1 as u32
    }

    /// Weight rows of the task of one CTA.
    #[inline(always)]
    pub const fn weight_rows(&self, format: &Format) -> u32 {
        if self.is_linear1() { format.linear1_rows() } else { WEIGHT_TILE }
    }

    /// Columns that a product sums over.
    #[inline(always)]
    pub const fn columns(&self, shape: &Shape) -> u32 {
        if self.is_linear1() { shape.hidden } else { shape.intermediate }
    }

    /// Weight tiles of a product, one after the other: fewer than the format has for a task where the weights end.
    #[inline(always)]
    pub const fn weight_tiles(&self, format: &Format, shape: &Shape) -> u32 {
        if !self.is_linear1() {
            return 1;
        }
        let left = (2 * shape.intermediate).saturating_sub(self.weight_row).div_ceil(WEIGHT_TILE);
        // One behind the last weight row has nothing to store, but shares its tokens with the others of its cluster.
        if left == 0 {
            1
        } else if left < format.linear1_tiles {
            left
        } else {
            format.linear1_tiles
        }
    }

    /// The task of CTA `cta` of the cluster, if this is the first one's. The last may lie behind the last weight row or token: then there
    /// is nothing to store.
    #[inline(always)]
    pub const fn of(self, cta: u32, format: &Format) -> Self {
        if self.phase == Phase::Combine as u32 {
            Self { expert: self.expert + cta, ..self }
        } else {
            Self { weight_row: self.weight_row + cta * self.weight_rows(format), ..self }
        }
    }
}

/// A k-block of one of a task's weight tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// The weight tile, from the task's first on.
    pub tile: u32,
    /// The k-block.
    pub k_block: u32,
}

impl Block {
    /// The first of a task.
    pub const FIRST: Self = Self { tile: 0, k_block: 0 };

    /// To the next of `k_blocks` k-blocks, then to the next tile.
    #[inline(always)]
    pub const fn advance(&mut self, format: &Format, k_blocks: u32) {
        self.k_block += 1;
        if format.linear1_tiles > 1 && self.k_block == k_blocks {
            *self = Self { tile: self.tile + 1, k_block: 0 };
        }
    }
}
