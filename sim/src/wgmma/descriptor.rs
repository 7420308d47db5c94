//! Matrix descriptors: where an operand's elements lie in shared memory (PTX ISA 8.6, "Asynchronous Warpgroup Level
//! Matrix Shared Memory Layout" and "Matrix descriptor format").

use super::{Major, OperandType};
use crate::tensor_map::Swizzle;

/// A decoded matrix descriptor; addresses and offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixDescriptor {
    /// Where the matrix starts in shared memory (18 bits).
    pub start: u32,
    /// Leading dimension byte offset.
    pub leading_offset: u32,
    /// Stride dimension byte offset.
    pub stride_offset: u32,
    /// Swizzle of the layout.
    pub swizzle: Swizzle,
    /// Base offset, in units of 128 bytes: how far the swizzle's pattern starts after a multiple of its length.
    pub base_offset: u32,
}

/// 16 contiguous bytes of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Row of A or column of B of the first element.
    pub row: usize,
    /// k of the first element.
    pub k: usize,
    /// Direction of the elements.
    pub major: Major,
    /// Shared address, a multiple of 16.
    pub address: u32,
}

impl MatrixDescriptor {
    /// Reads the 64-bit descriptor: start address (bits 0-13), leading (16-29) and stride (32-45) offset, each in units
    /// of 16 bytes; base offset (49-51); swizzle (62-63: none, 128, 64, 32 bytes).
    pub fn decode(bits: u64) -> Self {
        let field = |from: u32| (bits >> from & 0x3FFF) as u32 * 16;
        MatrixDescriptor {
            start: field(0),
            leading_offset: field(16),
            stride_offset: field(32),
            swizzle: [Swizzle::None, Swizzle::B128, Swizzle::B64, Swizzle::B32][(bits >> 62) as usize],
            base_offset: (bits >> 49 & 7) as u32,
        }
    }

    /// The descriptor's 64 bits.
    pub fn encode(&self) -> u64 {
        let field = |bytes: u32, at: u32| ((bytes as u64 / 16) & 0x3FFF) << at;
        let swizzle = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::B128 => 1,
            Swizzle::B64 => 2,
            Swizzle::B32 => 3,
        };
        field(self.start, 0)
            | field(self.leading_offset, 16)
            | field(self.stride_offset, 32)
            | (self.base_offset as u64 & 7) << 49
            | swizzle << 62
    }

    /// Checks that the base offset says where in the swizzle's pattern the matrix starts: `address >> 7 & 7`, 0 where
    /// rows start at a multiple of the pattern's length (PTX ISA 8.6, "Matrix descriptor format").
    ///
    /// # Errors
    /// What the base offset is, and what it must be.
    pub fn check_alignment(&self) -> Result<(), String> {
        let pattern: u32 = match self.swizzle {
            Swizzle::None => return Ok(()),
            Swizzle::B128 => 1024,
            Swizzle::B64 => 512,
            Swizzle::B32 => 256,
        };
        let needed = (self.start >> 7) & (pattern / 128 - 1);
        if self.base_offset & (pattern / 128 - 1) == needed {
            return Ok(());
        }
        Err(format!(
            "misaligned matrix descriptor: address {:#x} starts {needed} times 128 bytes after a multiple of the swizzle's {pattern}, and the base offset is {}",
            self.start, self.base_offset
        ))
    }

    /// Visits the chunks of an operand of `rows` rows (64 for A, n for B) and 32 bytes of k.
    ///
    /// Layouts are built of core matrices, 8 rows of 16 bytes (K-major) or 8 values of k by 16 bytes (MN-major):
    /// - K-major, no swizzle: a core matrix is contiguous; the next along k is the leading offset away, the next 8 rows
    ///   the stride offset.
    /// - K-major, swizzled: rows are the swizzle's span apart, so core matrices lie side by side; the next 8 rows are
    ///   the stride offset away.
    /// - MN-major, no swizzle: a core matrix is contiguous; the next along m or n is the stride offset away, the next
    ///   along k the leading offset.
    /// - MN-major, swizzled: the values of k are the span apart, with a span of m or n in each; the next span is the
    ///   leading offset away, the next 8 values of k the stride offset.
    ///
    /// # Errors
    /// The first one of `visit`.
    #[inline(always)]
    pub fn for_each_chunk<E>(
        self,
        rows: usize,
        operand: OperandType,
        major: Major,
        mut visit: impl FnMut(Chunk) -> Result<(), E>,
    ) -> Result<(), E> {
        let span = self.swizzle.span();
        let elements = 16 / operand.bytes();
        // `outer` counts the lines of a core matrix, `inner` the 16-byte pieces of a line.
        let (outer_count, inner_count) = if major == Major::K { (rows, 2) } else { (2 * elements, rows / elements) };
        let per_span = if self.swizzle == Swizzle::None { 1 } else { span / 16 };
        let (group_offset, span_offset) = match (major, self.swizzle) {
            (Major::MN, Swizzle::None) => (self.leading_offset, self.stride_offset),
            _ => (self.stride_offset, self.leading_offset),
        };
        let pattern = 128 * self.base_offset;
        for outer in 0..outer_count {
            let line = self.start + outer as u32 / 8 * group_offset + outer as u32 % 8 * span;
            for inner in 0..inner_count {
                let offset = match major {
                    Major::K if self.swizzle != Swizzle::None => inner as u32 * 16,
                    _ => inner as u32 / per_span * span_offset + inner as u32 % per_span * 16,
                };
                let address = self.swizzle.apply((line + offset).wrapping_sub(pattern)).wrapping_add(pattern);
                let (row, k) = if major == Major::K { (outer, inner * elements) } else { (inner * elements, outer) };
                visit(Chunk { row, k, major, address })?;
            }
        }
        Ok(())
    }
}
