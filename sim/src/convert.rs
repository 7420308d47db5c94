//! Conversions between PTX's number formats, on bits (PTX ISA 8.6, `cvt` and `cvt.pack`).
//!
//! Every value is unpacked exactly, and rounded once into the destination format. [`arithmetic`] holds the
//! floating-point operations that need more than the host's own arithmetic.

pub mod arithmetic;

use NumericType as T;

/// A scalar type that `cvt` reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum NumericType {
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    Bf16,
    Tf32,
    F32,
    F64,
    E4m3,
    E5m2,
}

impl NumericType {
    /// Width in bits of one element; tf32 occupies 32.
    pub const fn bits(self) -> u32 {
        match self {
            T::U8 | T::S8 | T::E4m3 | T::E5m2 => 8,
            T::U16 | T::S16 | T::F16 | T::Bf16 => 16,
            T::U32 | T::S32 | T::F32 | T::Tf32 => 32,
            T::U64 | T::S64 | T::F64 => 64,
        }
    }

    const fn signed(self) -> bool {
        matches!(self, T::S8 | T::S16 | T::S32 | T::S64)
    }

    const fn format(self) -> Option<&'static Format> {
        match self {
            T::F16 => Some(&F16),
            T::Bf16 => Some(&BF16),
            T::Tf32 => Some(&TF32),
            T::F32 => Some(&F32),
            T::F64 => Some(&F64),
            T::E4m3 => Some(&E4M3),
            T::E5m2 => Some(&E5M2),
            _ => None,
        }
    }

    /// The value of the low bits of `bits`, which is exact for every type but 64-bit integers and f64.
    pub fn to_f32(self, bits: u32) -> f32 {
        match self {
            T::Bf16 => f32::from_bits(bits << 16),
            T::F16 => half::f16::from_bits(bits as u16).to_f32(),
            T::F32 => f32::from_bits(bits),
            T::Tf32 => f32::from_bits(bits & 0xFFFF_E000),
            _ => {
                let conversion = Conversion::new(T::F32, self);
                f32::from_bits(conversion.apply(bits as u64) as u32)
            }
        }
    }
}

/// The PTX rounding modifiers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// `.rn`, `.rni`: to nearest, ties to even.
    #[default]
    Nearest,
    /// `.rna`: to nearest, ties away from zero.
    NearestAway,
    /// `.rz`, `.rzi`: towards zero.
    Zero,
    /// `.rm`, `.rmi`: towards negative infinity.
    Down,
    /// `.rp`, `.rpi`: towards positive infinity.
    Up,
}

impl Rounding {
    /// Whether a magnitude moves up to the next one, given what was cut off: its order relative to one half, and
    /// whether it was non-zero.
    fn increments(self, negative: bool, odd: bool, half: std::cmp::Ordering, inexact: bool) -> bool {
        match self {
            Rounding::Nearest => half.is_gt() || (half.is_eq() && odd),
            Rounding::NearestAway => half.is_ge(),
            Rounding::Zero => false,
            Rounding::Down => negative && inexact,
            Rounding::Up => !negative && inexact,
        }
    }
}

/// One `cvt` instruction, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// Destination type.
    pub to: NumericType,
    /// Source type.
    pub from: NumericType,
    /// Rounding mode, of both the `.rn` and the `.rni` families.
    pub rounding: Rounding,
    /// The modifier was one of `.rni .rzi .rmi .rpi`: a floating-point result is rounded to an integral value.
    pub to_integral: bool,
    /// `.sat`: integers clamp to the destination's range, floats to [0, 1] (NaN gives +0).
    pub saturate: bool,
    /// `.ftz`: subnormal f32 inputs and results become zero, sign kept.
    pub flush_subnormals: bool,
    /// `.relu`: negative results become +0, NaN the canonical NaN.
    pub relu: bool,
    /// `.satfinite`: overflow and infinity give the largest finite value.
    pub saturate_finite: bool,
}

impl Conversion {
    /// A conversion without modifiers: rounds to nearest even.
    pub const fn new(to: NumericType, from: NumericType) -> Self {
        Conversion {
            to,
            from,
            rounding: Rounding::Nearest,
            to_integral: false,
            saturate: false,
            flush_subnormals: false,
            relu: false,
            saturate_finite: false,
        }
    }

    /// Converts the low bits of `bits`. The result of a signed destination type is sign-extended to 64 bits, every
    /// other one zero-extended, as a destination register wider than the type requires.
    pub fn apply(&self, bits: u64) -> u64 {
        if let Some(result) = self.apply_quickly(bits) {
            return result;
        }
        match (self.from.format(), self.to.format()) {
            (None, None) => self.to_integer(integer(bits, self.from)),
            (None, Some(to)) => {
                let value = integer(bits, self.from);
                let magnitude = value.unsigned_abs() as u64;
                self.to_float(Value::Finite { negative: value < 0, magnitude, exponent: 0 }, to)
            }
            (Some(from), None) => match self.flushed(from.unpack(bits)) {
                Value::NaN { .. } if self.from == T::F64 || self.to.bits() == 64 => {
                    extend(1 << (self.to.bits() - 1), self.to)
                }
                Value::NaN { .. } => 0,
                value => self.to_integer(value.to_integer(self.rounding)),
            },
            (Some(from), Some(to)) => {
                let value = self.flushed(from.unpack(bits));
                if self.to_integral {
                    self.to_float(value.to_integral(self.rounding), to)
                } else {
                    self.to_float(value, to)
                }
            }
        }
    }

    /// The packed forms with two sources, such as `cvt.rn.bf16x2.f32 d, a, b`: the result of `a` is the upper half.
    pub fn apply_pair(&self, a: u64, b: u64) -> u64 {
        self.apply(a) << self.to.bits() | self.apply(b)
    }

    /// The packed forms with one packed source, such as `cvt.rn.f16x2.e4m3x2 d, a`.
    pub fn apply_packed(&self, bits: u64) -> u64 {
        let mask = (1 << self.from.bits()) - 1;
        self.apply_pair(bits >> self.from.bits() & mask, bits & mask)
    }

    /// The conversions that a kernel spends its time in.
    #[inline]
    fn apply_quickly(&self, bits: u64) -> Option<u64> {
        match (self.to, self.from) {
            (T::F32, T::Bf16) if *self == Conversion::new(T::F32, T::Bf16) => Some(low(bits, 16) << 16),
            (T::Bf16, T::F32) => {
                let plain = *self == Conversion::new(T::Bf16, T::F32);
                let x = bits as u32;
                (plain && x & 0x7F80_0000 != 0x7F80_0000).then(|| (x.wrapping_add(0x7FFF + (x >> 16 & 1)) >> 16) as u64)
            }
            (to, from) if !self.saturate && to.format().is_none() && from.format().is_none() => {
                let value = if from.signed() { sign_extend(bits, from.bits()) } else { low(bits, from.bits()) };
                Some(extend(value, to))
            }
            _ => None,
        }
    }

    fn flushed(&self, value: Value) -> Value {
        match value {
            Value::Finite { negative, magnitude, .. }
                if self.flush_subnormals && self.from == T::F32 && magnitude < 1 << F32.mantissa_bits =>
            {
                Value::Finite { negative, magnitude: 0, exponent: 0 }
            }
            value => value,
        }
    }

    /// A NaN as an H200 converts it: sign and payload survive to and from f64 (made quiet) and to tf32 with `.rna`;
    /// other destinations get the canonical NaN.
    fn nan(self, negative: bool, payload: u64, to: &Format) -> u64 {
        let fraction = payload >> (64 - to.mantissa_bits);
        let magnitude = match (self.to, self.from) {
            (T::F64, _) | (_, T::F64) => to.infinity() | 1 << (to.mantissa_bits - 1) | fraction,
            (T::Tf32, _) if self.rounding == Rounding::NearestAway => to.infinity() | fraction,
            _ => return to.canonical_nan,
        };
        ((negative as u64) << (to.exponent_bits + to.mantissa_bits) | magnitude) << to.padding
    }

    fn to_integer(self, value: i128) -> u64 {
        let (low, high) = if self.to.signed() {
            (-(1i128 << (self.to.bits() - 1)), (1i128 << (self.to.bits() - 1)) - 1)
        } else {
            (0, (1i128 << self.to.bits()) - 1)
        };
        let clamps = self.saturate || self.from.format().is_some();
        let value = if clamps { value.clamp(low, high) } else { value };
        extend(value as u64, self.to)
    }

    fn to_float(self, value: Value, to: &Format) -> u64 {
        let zero = Value::Finite { negative: false, magnitude: 0, exponent: 0 };
        let value = match value {
            Value::NaN { .. } if self.saturate => zero,
            Value::NaN { negative, payload } => return self.nan(negative, payload, to),
            value if (self.saturate || self.relu) && value.negative() => zero,
            value => value,
        };
        let mut bits = to.pack(value, self.rounding, self.saturate_finite);
        if self.flush_subnormals && self.to == T::F32 && bits & 0x7F80_0000 == 0 {
            bits &= 0x8000_0000;
        }
        if self.saturate {
            // Positive bit patterns order as their values do.
            bits = bits.min(to.one());
        }
        bits
    }
}

/// `cvt.pack.sat`: `a` and `b` (s32) saturated to `to`, an integer of `width` bits (2, 4, 8 or 16), `a` above `b`; below
/// 16 bits the pair is appended below the low bits of `c`.
pub fn pack_saturated(width: u32, signed: bool, a: u32, b: u32, c: u32) -> u32 {
    let (low, high) = if signed { (-(1 << (width - 1)), (1 << (width - 1)) - 1) } else { (0, (1i32 << width) - 1) };
    let saturated = |x: u32| (x as i32).clamp(low, high) as u32 & ((1 << width) - 1);
    let pair = saturated(a) << width | saturated(b);
    if width < 16 { c << (2 * width) | pair } else { pair }
}

fn low(bits: u64, width: u32) -> u64 {
    bits & (u64::MAX >> (64 - width))
}

fn sign_extend(bits: u64, width: u32) -> u64 {
    ((bits << (64 - width)) as i64 >> (64 - width)) as u64
}

fn extend(bits: u64, to: NumericType) -> u64 {
    if to.signed() { sign_extend(bits, to.bits()) } else { low(bits, to.bits()) }
}

fn integer(bits: u64, from: NumericType) -> i128 {
    if from.signed() { sign_extend(bits, from.bits()) as i64 as i128 } else { low(bits, from.bits()) as i128 }
}

/// An exact number: `magnitude * 2^exponent`.
#[derive(Clone, Copy, Debug)]
enum Value {
    /// `payload`: the fraction field as the top bits of a word.
    NaN {
        negative: bool,
        payload: u64,
    },
    Infinite {
        negative: bool,
    },
    Finite {
        negative: bool,
        magnitude: u64,
        exponent: i32,
    },
}

impl Value {
    fn negative(self) -> bool {
        match self {
            Value::NaN { .. } => false,
            Value::Infinite { negative } | Value::Finite { negative, .. } => negative,
        }
    }

    /// Rounded to an integer; beyond 64 bits of magnitude, a value that every integer type clamps.
    fn to_integer(self, rounding: Rounding) -> i128 {
        let magnitude = match self {
            Value::NaN { .. } => 0,
            Value::Infinite { .. } => 1 << 64,
            Value::Finite { magnitude: 0, .. } => 0,
            Value::Finite { magnitude, exponent, .. } if exponent >= 0 => {
                if (exponent as u32) <= magnitude.leading_zeros() { (magnitude << exponent) as i128 } else { 1 << 64 }
            }
            Value::Finite { negative, magnitude, exponent } => {
                shift_right(magnitude, -exponent as u32, rounding, negative) as i128
            }
        };
        if self.negative() { -magnitude } else { magnitude }
    }

    fn to_integral(self, rounding: Rounding) -> Value {
        match self {
            Value::Finite { negative, magnitude, exponent } if exponent < 0 => {
                let magnitude = shift_right(magnitude, -exponent as u32, rounding, negative);
                Value::Finite { negative, magnitude, exponent: 0 }
            }
            value => value,
        }
    }
}

/// `magnitude / 2^shift`, rounded.
fn shift_right(magnitude: u64, shift: u32, rounding: Rounding, negative: bool) -> u64 {
    if shift == 0 {
        return magnitude;
    }
    let wide = magnitude as u128;
    let (kept, cut, half) = match shift {
        1..=64 => (wide >> shift, wide & ((1 << shift) - 1), 1u128 << (shift - 1)),
        _ => (0, wide, u128::MAX),
    };
    let up = rounding.increments(negative, kept & 1 == 1, cut.cmp(&half), cut != 0);
    kept as u64 + up as u64
}

/// An IEEE-like binary format.
struct Format {
    exponent_bits: u32,
    mantissa_bits: u32,
    /// Unused low bits of the container (tf32 has 13).
    padding: u32,
    /// What an operation that makes a NaN returns.
    canonical_nan: u64,
    /// Largest finite value, without padding. In e4m3 the all-ones exponent holds numbers too.
    max_finite: u64,
}

#[rustfmt::skip]
mod formats {
    use super::Format;
    pub const F16: Format = Format { exponent_bits: 5, mantissa_bits: 10, padding: 0, canonical_nan: 0x7FFF, max_finite: 0x7BFF };
    pub const BF16: Format = Format { exponent_bits: 8, mantissa_bits: 7, padding: 0, canonical_nan: 0x7FFF, max_finite: 0x7F7F };
    pub const TF32: Format = Format { exponent_bits: 8, mantissa_bits: 10, padding: 13, canonical_nan: 0x7FFF_E000, max_finite: 0x3_FBFF };
    pub const F32: Format = Format { exponent_bits: 8, mantissa_bits: 23, padding: 0, canonical_nan: 0x7FFF_FFFF, max_finite: 0x7F7F_FFFF };
    pub const F64: Format = Format { exponent_bits: 11, mantissa_bits: 52, padding: 0, canonical_nan: 0x7FFF_FFFF_FFFF_FFFF, max_finite: 0x7FEF_FFFF_FFFF_FFFF };
    pub const E4M3: Format = Format { exponent_bits: 4, mantissa_bits: 3, padding: 0, canonical_nan: 0x7F, max_finite: 0x7E };
    pub const E5M2: Format = Format { exponent_bits: 5, mantissa_bits: 2, padding: 0, canonical_nan: 0x7F, max_finite: 0x7B };
}
use formats::*;

impl Format {
    const fn bias(&self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }

    const fn one(&self) -> u64 {
        (self.bias() as u64) << (self.mantissa_bits + self.padding)
    }

    fn unpack(&self, bits: u64) -> Value {
        let bits = bits >> self.padding;
        let negative = bits >> (self.exponent_bits + self.mantissa_bits) & 1 == 1;
        let magnitude = bits & ((1 << (self.exponent_bits + self.mantissa_bits)) - 1);
        let fraction = magnitude & ((1 << self.mantissa_bits) - 1);
        let biased = (magnitude >> self.mantissa_bits) as i32;
        if magnitude > self.max_finite {
            // e4m3 has no infinity: its one pattern above the largest number is NaN.
            return if fraction == 0 {
                Value::Infinite { negative }
            } else {
                Value::NaN { negative, payload: fraction << (64 - self.mantissa_bits) }
            };
        }
        let hidden = (biased != 0) as u64;
        Value::Finite {
            negative,
            magnitude: hidden << self.mantissa_bits | fraction,
            exponent: biased.max(1) - self.bias() - self.mantissa_bits as i32,
        }
    }

    fn pack(&self, value: Value, rounding: Rounding, saturate_finite: bool) -> u64 {
        let (negative, magnitude) = match value {
            Value::NaN { .. } => return self.canonical_nan,
            Value::Infinite { negative } if saturate_finite => (negative, self.max_finite),
            Value::Infinite { negative } => (negative, self.infinity()),
            Value::Finite { negative, magnitude: 0, .. } => (negative, 0),
            Value::Finite { negative, magnitude, exponent } => {
                let rounded = self.round(negative, magnitude, exponent, rounding);
                let overflow = match rounding {
                    _ if saturate_finite => self.max_finite,
                    Rounding::Zero => self.max_finite,
                    Rounding::Down if !negative => self.max_finite,
                    Rounding::Up if negative => self.max_finite,
                    _ => self.infinity(),
                };
                (negative, if rounded > self.max_finite { overflow } else { rounded })
            }
        };
        ((negative as u64) << (self.exponent_bits + self.mantissa_bits) | magnitude) << self.padding
    }

    /// The exponent and mantissa fields of a non-zero magnitude; beyond `max_finite` on overflow.
    fn round(&self, negative: bool, magnitude: u64, exponent: i32, rounding: Rounding) -> u64 {
        let leading = exponent + 63 - magnitude.leading_zeros() as i32;
        let smallest = 1 - self.bias();
        let unit = leading.max(smallest) - self.mantissa_bits as i32;
        let scaled = if unit <= exponent {
            magnitude << (exponent - unit)
        } else {
            shift_right(magnitude, (unit - exponent) as u32, rounding, negative)
        };
        // Adding, not or-ing: a carry out of the mantissa is the next exponent.
        let biased = (leading.max(smallest) - smallest) as u64;
        (biased << self.mantissa_bits) + scaled
    }

    fn infinity(&self) -> u64 {
        self.max_finite + 1
    }
}

#[cfg(test)]
mod tests;
