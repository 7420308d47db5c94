//! `wgmma.mma_async` for sm_90a: D (64 x n) = A (64 x k) * B (k x n) + D (PTX ISA 8.6, "Asynchronous Warpgroup Level
//! Matrix Instructions").
//!
//! # Numbers
//! Operands convert to f32 exactly and their products are exact (tf32, f16, bf16, e4m3 and e5m2 have at most 11
//! significant bits each), short of overflow and underflow of f32. Each element of D starts from its old value, or from
//! +0 without scale-d, and adds the products in the order of k, each sum rounded to nearest even. An f16 D is rounded
//! once, at the end. NaN results are the canonical NaN. The device sums in an order of its own, with a little less precision.
//!
//! Operands of 8 bits are another matter ([`Fp8Sums`]): Hopper keeps [`FP8_FRACTION_BITS`] bits of their sums behind the
//! point, and a kernel that does not promote its sums to f32 often enough gives wrong results.

pub mod descriptor;
mod product;

use crate::convert::{NumericType, arithmetic::HalfType};
use descriptor::{Chunk, MatrixDescriptor};
use product::{Decoder, Operands};
use std::ops::Range;
use thiserror::Error;

/// Threads of a warpgroup.
pub const THREADS: usize = 128;

/// How many bits behind the point Hopper's tensor cores keep of each product of two 8-bit numbers, and of the sum's old value,
/// once they are aligned to the largest exponent among them; and how many bits of the sum, behind its leading one.
pub const FP8_FRACTION_BITS: i32 = 13;

/// How a `wgmma` of 8-bit operands (e4m3, e5m2) adds its products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fp8Sums {
    /// As Hopper does. The 32 products of an element and its old value are aligned to the largest exponent among them: of a
    /// product that is the sum of its operands' exponents, and its significand is less than 4. Of each, what is below
    /// [`FP8_FRACTION_BITS`] bits behind the point is cut off, towards zero. The rest is added exactly. Of the sum, an f32
    /// accumulator gets [`FP8_FRACTION_BITS`] bits behind the leading one, again cut off towards zero, and an f16 one the
    /// nearest value. A sum of 0 is +0.
    #[default]
    Hopper,
    /// As products of other types are added: each sum is rounded to f32.
    Exact,
}

/// Element type of A or B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum OperandType {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
}

impl OperandType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            OperandType::E4m3 | OperandType::E5m2 => 1,
            OperandType::F16 | OperandType::Bf16 => 2,
            OperandType::Tf32 => 4,
        }
    }

    pub(crate) const fn numeric(self) -> NumericType {
        match self {
            OperandType::F16 => NumericType::F16,
            OperandType::Bf16 => NumericType::Bf16,
            OperandType::Tf32 => NumericType::Tf32,
            OperandType::E4m3 => NumericType::E4m3,
            OperandType::E5m2 => NumericType::E5m2,
        }
    }
}

/// Which index of an operand is contiguous in shared memory: the `imm-trans` modifiers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Major {
    /// k is contiguous (`imm-trans` 0).
    #[default]
    K,
    /// m or n is contiguous (`imm-trans` 1); only for 16-bit types.
    MN,
}

/// The immediate part of an instruction. The accumulator's type is chosen by calling [`execute`] or [`execute_f16`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WgmmaShape {
    /// Columns of D: 8 to 256 in steps of 8.
    pub n: usize,
    /// Element type of A.
    pub a_type: OperandType,
    /// Element type of B: that of A, or any other 8-bit one.
    pub b_type: OperandType,
    /// Layout of A, if it is in shared memory.
    pub a_major: Major,
    /// Layout of B.
    pub b_major: Major,
    /// `imm-scale-a` is -1.
    pub negate_a: bool,
    /// `imm-scale-b` is -1.
    pub negate_b: bool,
}

impl WgmmaShape {
    /// A shape of one operand type, K-major, without negation.
    pub const fn new(n: usize, operands: OperandType) -> Self {
        WgmmaShape {
            n,
            a_type: operands,
            b_type: operands,
            a_major: Major::K,
            b_major: Major::K,
            negate_a: false,
            negate_b: false,
        }
    }

    /// Depth of the product: 32 bytes of operand.
    pub const fn k(&self) -> usize {
        32 / self.a_type.bytes()
    }

    /// Floating-point operations of one instruction.
    pub const fn operations(&self) -> u64 {
        2 * 64 * (self.n * self.k()) as u64
    }

    /// f32 accumulator registers of one thread.
    pub const fn accumulators(&self) -> usize {
        self.n / 2
    }

    fn check(&self, a_in_shared: bool) -> Result<(), WgmmaError> {
        if self.n == 0 || self.n > 256 || !self.n.is_multiple_of(8) {
            return Err(WgmmaError::Columns { n: self.n });
        }
        let (a, b) = (self.a_type, self.b_type);
        if a != b && !(a.bytes() == 1 && b.bytes() == 1) {
            return Err(WgmmaError::OperandTypes { a, b });
        }
        let transposed = self.b_major == Major::MN || (a_in_shared && self.a_major == Major::MN);
        if transposed && a.bytes() != 2 {
            return Err(WgmmaError::Transposed { operand: a });
        }
        Ok(())
    }
}

/// The A operand.
#[derive(Clone, Copy, Debug)]
pub enum WgmmaA<'a> {
    /// A matrix descriptor.
    Descriptor(u64),
    /// Four registers of each of the 128 threads.
    Registers(&'a [[u32; THREADS]; 4]),
}

/// Why an instruction cannot be executed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum WgmmaError {
    /// A bad n.
    #[error("wgmma with n = {n}; it must be a multiple of 8 from 8 to 256")]
    Columns {
        /// The value.
        n: usize,
    },
    /// Types that do not go together.
    #[error("wgmma with A of {a:?} and B of {b:?}; they must be the same type, or both 8-bit")]
    OperandTypes {
        /// Type of A.
        a: OperandType,
        /// Type of B.
        b: OperandType,
    },
    /// A transposed operand that is not 16 bits wide.
    #[error("wgmma with a transposed operand of {operand:?}; only f16 and bf16 can be transposed")]
    Transposed {
        /// The type.
        operand: OperandType,
    },
    /// An operand outside shared memory.
    #[error("wgmma reads shared memory at {address:#x}, beyond the {length:#x} bytes that the CTA has")]
    OutOfBounds {
        /// First address of the 16 bytes read.
        address: u32,
        /// Bytes of shared memory.
        length: usize,
    },
    /// Too few accumulator registers.
    #[error("wgmma with {given} accumulator registers; this shape needs {needed}")]
    Accumulators {
        /// Registers passed.
        given: usize,
        /// Registers of the shape.
        needed: usize,
    },
}

/// Executes one instruction with f32 accumulators.
///
/// `shared` is the CTA's shared memory from address 0 on. `d[r][t]` is register `r` of thread `t` of the warpgroup: row
/// `16 * (t / 32) + t % 32 / 4 + 8 * (r / 2 % 2)`, column `8 * (r / 4) + 2 * (t % 4) + r % 2`. Without `scale_d`, the old D
/// is not read.
///
/// # Errors
/// A shape that does not exist, operands out of bounds; D is then unchanged.
pub fn execute(
    shape: &WgmmaShape,
    a: WgmmaA<'_>,
    b_descriptor: u64,
    shared: &[u8],
    d: &mut [[f32; THREADS]],
    scale_d: bool,
    fp8_sums: Fp8Sums,
) -> Result<(), WgmmaError> {
    execute_cut(shape, a, b_descriptor, shared, d, scale_d, (fp8_sums, true))
}

/// [`execute`]; the sum of products of 8 bits is cut to the bits of an f32 accumulator only where `sums` says so.
fn execute_cut(
    shape: &WgmmaShape,
    a: WgmmaA<'_>,
    b_descriptor: u64,
    shared: &[u8],
    d: &mut [[f32; THREADS]],
    scale_d: bool,
    sums: (Fp8Sums, bool),
) -> Result<(), WgmmaError> {
    shape.check(matches!(a, WgmmaA::Descriptor(_)))?;
    let needed = shape.accumulators();
    let given = d.len();
    let d = d.get_mut(..needed).ok_or(WgmmaError::Accumulators { given, needed })?;
    product::with_operands(|Operands { left, right }| {
        let decoder = Decoder { operand: shape.a_type, negate: shape.negate_a };
        match a {
            WgmmaA::Descriptor(descriptor) => {
                let matrix = MatrixDescriptor::decode(descriptor);
                matrix.for_each_chunk(64, shape.a_type, shape.a_major, |chunk| {
                    left.store(decoder, chunk, read(shared, chunk)?);
                    Ok(())
                })?;
            }
            WgmmaA::Registers(registers) => left.store_registers(decoder, registers),
        }
        let decoder = Decoder { operand: shape.b_type, negate: shape.negate_b };
        let matrix = MatrixDescriptor::decode(b_descriptor);
        matrix.for_each_chunk(shape.n, shape.b_type, shape.b_major, |chunk| {
            right.store(decoder, chunk, read(shared, chunk)?);
            Ok(())
        })?;
        if !scale_d {
            d.fill([0.0; THREADS]);
        }
        match sums {
            (Fp8Sums::Hopper, cut) if shape.a_type.bytes() == 1 => {
                product::accumulate_aligned(left, right, shape.k(), cut, d);
            }
            _ => product::accumulate(left, right, shape.k(), d),
        }
        Ok(())
    })
}

/// Executes one instruction with f16 accumulators: `d[r][t]` holds the columns of f32 registers `2 * r` (lower half) and
/// `2 * r + 1`.
///
/// # Errors
/// See [`execute`].
pub fn execute_f16(
    shape: &WgmmaShape,
    a: WgmmaA<'_>,
    b_descriptor: u64,
    shared: &[u8],
    d: &mut [[u32; THREADS]],
    scale_d: bool,
    fp8_sums: Fp8Sums,
) -> Result<(), WgmmaError> {
    let (given, needed) = (d.len(), shape.accumulators() / 2);
    let d = d.get_mut(..needed).ok_or(WgmmaError::Accumulators { given, needed })?;
    let half = |x: u32| HalfType::F16.to_f32(x as u16);
    let mut wide: Vec<[f32; THREADS]> =
        d.iter().flat_map(|register| [register.map(half), register.map(|x| half(x >> 16))]).collect();
    execute_cut(shape, a, b_descriptor, shared, &mut wide, scale_d, (fp8_sums, false))?;
    for (register, pair) in d.iter_mut().zip(wide.chunks_exact(2)) {
        for (thread, packed) in register.iter_mut().enumerate() {
            let [low, high] = [pair[0][thread], pair[1][thread]].map(|x| HalfType::F16.from_f32(x) as u32);
            *packed = high << 16 | low;
        }
    }
    Ok(())
}

/// Calls `visit` with every range of shared addresses that the operands occupy, adjoining ones merged where they are
/// met one after the other. Bounds are not checked.
///
/// # Errors
/// A shape that does not exist.
pub fn operand_ranges(
    shape: &WgmmaShape,
    a_descriptor: Option<u64>,
    b_descriptor: u64,
    mut visit: impl FnMut(Range<u32>),
) -> Result<(), WgmmaError> {
    shape.check(a_descriptor.is_some())?;
    let operands = [
        a_descriptor.map(|descriptor| (descriptor, 64, shape.a_type, shape.a_major)),
        Some((b_descriptor, shape.n, shape.b_type, shape.b_major)),
    ];
    for (descriptor, rows, operand, major) in operands.into_iter().flatten() {
        let mut pending: Option<Range<u32>> = None;
        MatrixDescriptor::decode(descriptor).for_each_chunk(rows, operand, major, |Chunk { address, .. }| {
            match &mut pending {
                Some(range) if range.end == address => range.end += 16,
                Some(range) if range.start == address + 16 => range.start = address,
                _ => {
                    if let Some(range) = pending.replace(address..address + 16) {
                        visit(range);
                    }
                }
            }
            Ok(())
        })?;
        pending.into_iter().for_each(&mut visit);
    }
    Ok(())
}

fn read(shared: &[u8], chunk: Chunk) -> Result<&[u8; 16], WgmmaError> {
    let out_of_bounds = WgmmaError::OutOfBounds { address: chunk.address, length: shared.len() };
    shared.get(chunk.address as usize..).and_then(|rest| rest.first_chunk()).ok_or(out_of_bounds)
}

#[cfg(test)]
mod tests;
