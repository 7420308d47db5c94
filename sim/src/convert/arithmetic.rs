//! Floating-point instructions whose results differ from plain host arithmetic (PTX ISA 8.6, "Floating Point
//! Instructions" and "Half Precision Floating Point Instructions"): directed rounding, flushing of subnormals,
//! saturation, NaN rules, approximations and 16-bit formats.
//!
//! An f32 or 16-bit operation that makes a NaN makes the canonical one. Approximations (`ex2.approx` and so on) are
//! computed in f64 and rounded to the result's format, within the error that the specification allows; their special
//! values are exact.

use super::{BF16, Conversion, F16, F32, F64, Format, NumericType, Rounding};

/// The NaN that f32 operations return.
pub const CANONICAL_NAN_F32: f32 = f32::from_bits(0x7FFF_FFFF);

/// Modifiers of an f32 arithmetic instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FloatMode {
    /// `.rn`, `.rz`, `.rm` or `.rp`.
    pub rounding: Rounding,
    /// `.ftz`: subnormal inputs and results become zero, sign kept.
    pub flush_subnormals: bool,
    /// `.sat`: the result is clamped to [0, 1], NaN gives +0.
    pub saturate: bool,
}

impl FloatMode {
    fn input(self, x: f32) -> f32 {
        if self.flush_subnormals { flush(x) } else { x }
    }

    fn output(self, x: f32) -> f32 {
        let x = self.input(x);
        if self.saturate {
            // Also turns NaN and -0 into +0.
            if x > 0.0 { x.min(1.0) } else { 0.0 }
        } else if x.is_nan() {
            CANONICAL_NAN_F32
        } else {
            x
        }
    }

    /// Finishes an operation whose f64 result was rounded to odd (see [`to_odd`]).
    fn round(self, odd: f64) -> f32 {
        self.output(f32::from_bits(round_f64(odd, NumericType::F32, &F32, self.rounding) as u32))
    }
}

/// A subnormal becomes zero of its sign.
pub fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn round_f64(value: f64, to: NumericType, format: &Format, rounding: Rounding) -> u64 {
    if value.is_nan() {
        return format.canonical_nan;
    }
    Conversion { rounding, ..Conversion::new(to, NumericType::F64) }.apply(value.to_bits())
}

/// `add{.rnd}{.ftz}{.sat}.f32`; for `sub`, negate `b`.
pub fn add_f32(a: f32, b: f32, mode: FloatMode) -> f32 {
    let (a, b) = (mode.input(a), mode.input(b));
    if mode.rounding == Rounding::Nearest {
        mode.output(a + b)
    } else {
        mode.round(add_to_odd(a as f64, b as f64, mode.rounding))
    }
}

/// `mul{.rnd}{.ftz}{.sat}.f32`.
pub fn mul_f32(a: f32, b: f32, mode: FloatMode) -> f32 {
    let (a, b) = (mode.input(a), mode.input(b));
    // A product of two f32 is exact in f64.
    if mode.rounding == Rounding::Nearest { mode.output(a * b) } else { mode.round(a as f64 * b as f64) }
}

/// `fma.rnd{.ftz}{.sat}.f32` (and `mad.rnd.f32`): `a * b + c`, rounded once.
pub fn fma_f32(a: f32, b: f32, c: f32, mode: FloatMode) -> f32 {
    let (a, b, c) = (mode.input(a), mode.input(b), mode.input(c));
    if mode.rounding == Rounding::Nearest {
        mode.output(a.mul_add(b, c))
    } else {
        mode.round(add_to_odd(a as f64 * b as f64, c as f64, mode.rounding))
    }
}

/// `div.rnd{.ftz}.f32`, also right for `.approx` and `.full`; `rcp.rnd.f32` with `a` = 1.
pub fn div_f32(a: f32, b: f32, mode: FloatMode) -> f32 {
    let (a, b) = (mode.input(a), mode.input(b));
    if mode.rounding == Rounding::Nearest {
        return mode.output(a / b);
    }
    let (a, b) = (a as f64, b as f64);
    let quotient = a / b;
    // The remainder is exact; its sign relative to b is the direction of the quotient's error.
    let error = (-quotient).mul_add(b, a) * b.signum();
    mode.round(to_odd(quotient, error))
}

/// `sqrt.rnd{.ftz}.f32`, also right for `.approx`.
pub fn sqrt_f32(a: f32, mode: FloatMode) -> f32 {
    let a = mode.input(a);
    if mode.rounding == Rounding::Nearest {
        return mode.output(a.sqrt());
    }
    let root = (a as f64).sqrt();
    mode.round(to_odd(root, (-root).mul_add(root, a as f64)))
}

/// `value` with its last bit set if it was rounded (`error` is what rounding lost), moved towards the true value: a
/// second rounding to 24 bits or fewer is then the same as rounding the true value once.
fn to_odd(value: f64, error: f64) -> f64 {
    let bits = value.to_bits();
    if error == 0.0 || !error.is_finite() || !value.is_finite() || bits & 1 == 1 {
        return value;
    }
    f64::from_bits(if (error > 0.0) == (value > 0.0) { bits + 1 } else { bits - 1 })
}

fn add_to_odd(a: f64, b: f64, rounding: Rounding) -> f64 {
    let sum = a + b;
    if sum == 0.0 && rounding == Rounding::Down && a.is_sign_negative() != b.is_sign_negative() {
        return -0.0;
    }
    let b_part = sum - a;
    to_odd(sum, (a - (sum - b_part)) + (b - b_part))
}

/// `min` or `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extremum {
    /// The smaller operand; -0 is below +0.
    Min,
    /// The larger operand.
    Max,
}

/// Modifiers of `min` and `max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtremumMode {
    /// `.NaN`: the result is the canonical NaN if any operand is NaN (otherwise the operand that is a number).
    pub propagate_nan: bool,
    /// `.ftz`.
    pub flush_subnormals: bool,
    /// `.xorsign.abs`: compares magnitudes; the result's sign is the exclusive or of the operands' signs.
    pub xor_sign_abs: bool,
}

/// `{min,max}{.ftz}{.NaN}{.xorsign.abs}.f32`.
pub fn extremum_f32(which: Extremum, a: f32, b: f32, mode: ExtremumMode) -> f32 {
    let flushed = |x| if mode.flush_subnormals { flush(x) } else { x };
    let (a, b) = (flushed(a), flushed(b));
    let result = extremum(which, a as f64, b as f64, mode);
    if result.is_nan() { CANONICAL_NAN_F32 } else { result as f32 }
}

/// `{min,max}.f64`.
pub fn extremum_f64(which: Extremum, a: f64, b: f64) -> f64 {
    let result = extremum(which, a, b, ExtremumMode::default());
    if result.is_nan() { f64::from_bits(F64.canonical_nan) } else { result }
}

fn extremum(which: Extremum, a: f64, b: f64, mode: ExtremumMode) -> f64 {
    let negative = a.is_sign_negative() != b.is_sign_negative();
    let (a, b) = if mode.xor_sign_abs { (a.abs(), b.abs()) } else { (a, b) };
    let result = match (a.is_nan(), b.is_nan()) {
        (false, false) if (which == Extremum::Min) == a.total_cmp(&b).is_le() => a,
        (false, false) => b,
        (true, true) => return f64::NAN,
        _ if mode.propagate_nan => return f64::NAN,
        (true, false) => b,
        (false, true) => a,
    };
    if mode.xor_sign_abs { result.abs().copysign(if negative { -1.0 } else { 1.0 }) } else { result }
}

/// The two 16-bit floating-point formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalfType {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

/// Modifiers of a 16-bit arithmetic instruction, which always rounds to nearest even.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HalfMode {
    /// `.ftz` (f16 only): subnormal f16 inputs and results become zero.
    pub flush_subnormals: bool,
    /// `.sat`: clamps to [0, 1], NaN gives +0.
    pub saturate: bool,
    /// `.relu`: negative results become +0, NaN the canonical NaN.
    pub relu: bool,
}

impl HalfType {
    fn numeric(self) -> NumericType {
        match self {
            HalfType::F16 => NumericType::F16,
            HalfType::Bf16 => NumericType::Bf16,
        }
    }

    fn format(self) -> &'static Format {
        match self {
            HalfType::F16 => &F16,
            HalfType::Bf16 => &BF16,
        }
    }

    /// The value of a bit pattern, exact.
    pub fn to_f32(self, bits: u16) -> f32 {
        self.numeric().to_f32(bits as u32)
    }

    /// The nearest value's bits, ties to even.
    pub fn from_f32(self, x: f32) -> u16 {
        Conversion::new(self.numeric(), NumericType::F32).apply(x.to_bits() as u64) as u16
    }

    fn flushed(self, bits: u16, mode: HalfMode) -> u16 {
        let subnormal = bits & self.format().infinity() as u16 == 0;
        if mode.flush_subnormals && subnormal { bits & 0x8000 } else { bits }
    }

    fn finish(self, odd: f64, mode: HalfMode) -> u16 {
        let bits = self.flushed(round_f64(odd, self.numeric(), self.format(), Rounding::Nearest) as u16, mode);
        let (nan, negative) = (odd.is_nan(), bits & 0x8000 != 0);
        if (mode.saturate && (nan || negative)) || (mode.relu && !nan && negative) {
            0
        } else if mode.saturate {
            bits.min(self.format().one() as u16)
        } else {
            bits
        }
    }

    /// `fma.rn{.ftz}{.sat}{.relu}`: `a * b + c`, rounded once.
    pub fn fma(self, a: u16, b: u16, c: u16, mode: HalfMode) -> u16 {
        let value = |x| self.to_f32(self.flushed(x, mode)) as f64;
        self.finish(add_to_odd(value(a) * value(b), value(c), Rounding::Nearest), mode)
    }

    /// `add{.rn}{.ftz}{.sat}`; for `sub`, flip the sign bit of `b`.
    pub fn add(self, a: u16, b: u16, mode: HalfMode) -> u16 {
        self.fma(a, self.format().one() as u16, b, mode)
    }

    /// `mul{.rn}{.ftz}{.sat}`.
    pub fn mul(self, a: u16, b: u16, mode: HalfMode) -> u16 {
        // Adding -0 changes no product, not even its zero's sign.
        self.fma(a, b, 0x8000, mode)
    }

    /// `{min,max}{.ftz}{.NaN}{.xorsign.abs}`; `.ftz` flushes subnormals of the 16-bit format.
    pub fn extremum(self, which: Extremum, a: u16, b: u16, mode: ExtremumMode) -> u16 {
        let flushing = HalfMode { flush_subnormals: mode.flush_subnormals, ..HalfMode::default() };
        let value = |x| self.to_f32(self.flushed(x, flushing));
        let mode = ExtremumMode { flush_subnormals: false, ..mode };
        self.from_f32(extremum_f32(which, value(a), value(b), mode))
    }
}

/// Applies a 16-bit operation to both halves of packed operands (`.f16x2`, `.bf16x2`).
pub fn packed(operands: [u32; 3], operation: impl Fn(u16, u16, u16) -> u16) -> u32 {
    let [a, b, c] = operands;
    let high = operation((a >> 16) as u16, (b >> 16) as u16, (c >> 16) as u16);
    (high as u32) << 16 | operation(a as u16, b as u16, c as u16) as u32
}

/// The instructions with an `.approx` form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Approximation {
    /// `ex2.approx`: 2 to the power.
    Ex2,
    /// `lg2.approx`: logarithm to base 2.
    Lg2,
    /// `rcp.approx`.
    Rcp,
    /// `sqrt.approx`.
    Sqrt,
    /// `rsqrt.approx`: one over the square root.
    Rsqrt,
    /// `sin.approx`, of radians.
    Sin,
    /// `cos.approx`, of radians.
    Cos,
    /// `tanh.approx`.
    Tanh,
}

impl Approximation {
    fn exact(self, x: f64) -> f64 {
        match self {
            Approximation::Ex2 => x.exp2(),
            Approximation::Lg2 => x.log2(),
            Approximation::Rcp => 1.0 / x,
            Approximation::Sqrt => x.sqrt(),
            Approximation::Rsqrt => 1.0 / x.sqrt(),
            Approximation::Sin => x.sin(),
            Approximation::Cos => x.cos(),
            Approximation::Tanh => x.tanh(),
        }
    }

    /// `op.approx{.ftz}.f32`.
    pub fn f32(self, x: f32, flush_subnormals: bool) -> f32 {
        let mode = FloatMode { flush_subnormals, ..FloatMode::default() };
        mode.output(self.exact(mode.input(x) as f64) as f32)
    }

    /// The 16-bit forms: `ex2.approx{.ftz}.{f16,bf16}`, `tanh.approx.{f16,bf16}`. Subnormals are not flushed; for
    /// `ex2.approx.ftz.bf16` flush the operand and the result.
    pub fn half(self, format: HalfType, x: u16, flush_subnormals: bool) -> u16 {
        let mode = HalfMode { flush_subnormals, ..HalfMode::default() };
        let x = format.to_f32(format.flushed(x, mode)) as f64;
        format.finish(self.exact(x), mode)
    }

    /// `rcp.approx.ftz.f64` and `rsqrt.approx{.ftz}.f64`: only the upper words of operand and result count.
    pub fn f64(self, x: f64, flush_subnormals: bool) -> f64 {
        let flushed = |x: f64| if flush_subnormals && x.is_subnormal() { 0f64.copysign(x) } else { x };
        let upper = |x: f64| f64::from_bits(x.to_bits() & 0xFFFF_FFFF_0000_0000);
        let result = flushed(upper(self.exact(flushed(upper(x)))));
        if result.is_nan() { f64::from_bits(0x7FFF_FFFF_0000_0000) } else { result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAN: f32 = CANONICAL_NAN_F32;

    fn directed(exact: f64, rounding: Rounding) -> f32 {
        let nearest = exact as f32;
        let (below, above) = match f64::from(nearest) {
            x if x > exact => (nearest.next_down(), nearest),
            x if x < exact => (nearest, nearest.next_up()),
            _ => (nearest, nearest),
        };
        match rounding {
            Rounding::Down => below,
            Rounding::Up => above,
            Rounding::Zero => {
                if exact > 0.0 {
                    below
                } else {
                    above
                }
            }
            _ => nearest,
        }
    }

    fn mode(rounding: Rounding) -> FloatMode {
        FloatMode { rounding, ..FloatMode::default() }
    }

    const MODES: [Rounding; 4] = [Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up];

    /// The bits, among `guess` and its neighbours, of the value nearest to `exact`, ties to even.
    fn nearest(exact: f64, guess: u16, value: impl Fn(u16) -> f64) -> u16 {
        let candidates = [guess.saturating_sub(1), guess, guess.saturating_add(1)];
        let distance = |&x: &u16| ((value(x) - exact).abs(), x & 1);
        candidates.into_iter().min_by(|x, y| distance(x).partial_cmp(&distance(y)).unwrap()).unwrap()
    }

    /// Values whose sums and products are exact in f64.
    fn moderate() -> impl Strategy<Value = f32> {
        (any::<u32>(), 115u32..140).prop_map(|(bits, exponent)| f32::from_bits(bits & 0x807F_FFFF | exponent << 23))
    }

    proptest! {
        #[test]
        fn directed_rounding(a in moderate(), b in moderate(), c in moderate()) {
            // Twelve significant bits, for an exact fma.
            let short = |x: f32| f32::from_bits(x.to_bits() & 0xFFFF_F000);
            let (x, y) = (f64::from(a), f64::from(b));
            for rounding in MODES {
                let mode = mode(rounding);
                if x + y != 0.0 {
                    prop_assert_eq!(add_f32(a, b, mode), directed(x + y, rounding));
                }
                prop_assert_eq!(mul_f32(a, b, mode), directed(x * y, rounding));
                let exact = f64::from(short(a)) * f64::from(short(b)) + f64::from(short(c));
                if exact != 0.0 {
                    prop_assert_eq!(fma_f32(short(a), short(b), short(c), mode), directed(exact, rounding));
                }
            }
            // Quotient and root are bracketed by exact products.
            let (down, up) = (div_f32(a, b.abs(), mode(Rounding::Down)), div_f32(a, b.abs(), mode(Rounding::Up)));
            prop_assert!(f64::from(down) * y.abs() <= x && x <= f64::from(up) * y.abs());
            prop_assert!(down == up || down.next_up() == up);
            let (down, up) = (sqrt_f32(a.abs(), mode(Rounding::Down)), sqrt_f32(a.abs(), mode(Rounding::Up)));
            prop_assert!(f64::from(down).powi(2) <= x.abs() && x.abs() <= f64::from(up).powi(2));
            prop_assert!(down == up || down.next_up() == up);
        }

        #[test]
        fn half_arithmetic_rounds_once(a in 0x2800u16..0x5000, b in 0x2800u16..0x5000, c in 0x2800u16..0x5000, s in 0u16..8) {
            let (a, b, c) = (a | s << 15, b | s >> 1 << 15, c | s >> 2 << 15);
            let mode = HalfMode::default();
            let exact = |x: u16| half::f16::from_bits(x).to_f64();
            let nearest = |x: f64| nearest(x, half::f16::from_f64(x).to_bits(), exact);
            prop_assert_eq!(HalfType::F16.fma(a, b, c, mode), nearest(exact(a) * exact(b) + exact(c)));
            prop_assert_eq!(HalfType::F16.add(a, c, mode), nearest(exact(a) + exact(c)));
            prop_assert_eq!(HalfType::F16.mul(a, b, mode), nearest(exact(a) * exact(b)));
            // The same patterns as bf16, with a third operand near the product, so that the sum is exact in f64.
            let exact = |x: u16| half::bf16::from_bits(x).to_f64();
            let nearest = |x: f64| super::tests::nearest(x, half::bf16::from_f64(x).to_bits(), exact);
            prop_assert_eq!(HalfType::Bf16.mul(a, b, mode), nearest(exact(a) * exact(b)));
            let near = half::bf16::from_f64(exact(a) * exact(b) * exact(c).signum() * 0.75).to_bits();
            prop_assert_eq!(HalfType::Bf16.fma(a, b, near, mode), nearest(exact(a) * exact(b) + exact(near)));
        }
    }

    #[test]
    fn tiny_addends_still_steer_directed_rounding() {
        assert_eq!(add_f32(1.0, 1e-40, mode(Rounding::Up)), 1f32.next_up());
        assert_eq!(add_f32(1.0, -1e-40, mode(Rounding::Zero)), 1f32.next_down());
        assert_eq!(fma_f32(1e-30, 1e-30, 1.0, mode(Rounding::Up)), 1f32.next_up());
        assert_eq!(add_f32(1.0, -1.0, mode(Rounding::Down)).to_bits(), 0x8000_0000);
        assert_eq!(add_f32(1.0, -1.0, mode(Rounding::Up)).to_bits(), 0);
        assert_eq!(mul_f32(f32::MAX, 2.0, mode(Rounding::Zero)), f32::MAX);
        // In bf16, 1 + 2^-8 is half-way; what is far below it decides.
        let bf16 = |x: f32| HalfType::Bf16.from_f32(x);
        let tiny = HalfType::Bf16.fma(bf16(2f32.powi(-60)), bf16(1.0), bf16(1.0), HalfMode::default());
        assert_eq!(tiny, 0x3F80);
        let (a, b) = (bf16(1.0 + 2f32.powi(-7)), bf16(1.0 - 2f32.powi(-8)));
        // The product is 1 + 2^-8 - 2^-15.
        assert_eq!(HalfType::Bf16.fma(a, b, bf16(2f32.powi(-60)), HalfMode::default()), 0x3F80);
        assert_eq!(HalfType::Bf16.fma(a, b, bf16(2f32.powi(-15)), HalfMode::default()), 0x3F80);
        assert_eq!(HalfType::Bf16.fma(a, b, bf16(2f32.powi(-14)), HalfMode::default()), 0x3F81);
    }

    #[test]
    fn flushing_saturation_and_nan() {
        let ftz = FloatMode { flush_subnormals: true, ..FloatMode::default() };
        let sat = FloatMode { saturate: true, ..FloatMode::default() };
        let tiny = f32::from_bits(0x007F_FFFF);
        assert_eq!(mul_f32(tiny, 1e30, ftz).to_bits(), 0);
        assert_eq!(mul_f32(-1e-30, 1e-10, ftz).to_bits(), 0x8000_0000);
        assert_eq!(mul_f32(1e-30, 1e-10, FloatMode::default()), 1e-40);
        assert_eq!(add_f32(f32::NAN, 1.0, sat).to_bits(), 0);
        assert_eq!(add_f32(f32::INFINITY, 1.0, sat), 1.0);
        assert_eq!(mul_f32(-0.0, 1.0, sat).to_bits(), 0);
        assert_eq!(add_f32(f32::INFINITY, f32::NEG_INFINITY, ftz).to_bits(), NAN.to_bits());
        assert_eq!(add_f32(f32::from_bits(0xFFA1_2345), 1.0, mode(Rounding::Zero)).to_bits(), NAN.to_bits());
        let f16 = HalfType::F16;
        let with = |flush_subnormals, saturate, relu| HalfMode { flush_subnormals, saturate, relu };
        assert_eq!(f16.mul(0x0001, 0x3C00, with(false, false, false)), 0x0001);
        assert_eq!(f16.mul(0x8001, 0x3C00, with(true, false, false)), 0x8000);
        assert_eq!(f16.add(0x7BFF, 0x7BFF, with(false, true, false)), 0x3C00);
        assert_eq!(f16.add(0x7E00, 0, with(false, true, false)), 0);
        assert_eq!(f16.fma(0xBC00, 0x3C00, 0, with(false, false, true)), 0);
        assert_eq!(f16.fma(0x7E01, 0x3C00, 0, with(false, false, true)), 0x7FFF);
        assert_eq!(packed([0x3C00_4000, 0x3C00_3C00, 0], |a, b, c| f16.fma(a, b, c, HalfMode::default())), 0x3C00_4000);
    }

    #[test]
    fn minimum_and_maximum() {
        let plain = ExtremumMode::default();
        let nan = ExtremumMode { propagate_nan: true, ..plain };
        let xor = ExtremumMode { xor_sign_abs: true, ..plain };
        let (min, max) = (Extremum::Min, Extremum::Max);
        let signalling = f32::from_bits(0xFF80_0001);
        let cases = [
            (min, -0.0, 0.0, plain, -0.0),
            (max, -0.0, 0.0, plain, 0.0),
            (min, f32::NAN, 3.0, plain, 3.0),
            (max, 3.0, signalling, plain, 3.0),
            (max, f32::NAN, signalling, plain, NAN),
            (min, f32::NAN, 3.0, nan, NAN),
            (min, -3.0, 2.0, xor, -2.0),
            (max, -3.0, -2.0, xor, 3.0),
            (max, 1e-40, -1.0, ExtremumMode { flush_subnormals: true, ..plain }, 0.0),
            (max, 1e-40, -1.0, plain, 1e-40),
        ];
        for (which, a, b, mode, expected) in cases {
            assert_eq!(extremum_f32(which, a, b, mode).to_bits(), expected.to_bits(), "{which:?} {a} {b} {mode:?}");
        }
        assert_eq!(HalfType::Bf16.extremum(min, 0x8000, 0x0000, plain), 0x8000);
        assert_eq!(HalfType::Bf16.extremum(max, 0x7FC0, 0xC000, plain), 0xC000);
        assert_eq!(HalfType::F16.extremum(max, 0x7E00, 0x4000, nan), 0x7FFF);
        assert_eq!(extremum_f64(max, f64::NAN, -1.0), -1.0);
    }

    /// The tables of special values in the PTX ISA.
    #[test]
    fn approximations_of_special_values() {
        use Approximation::*;
        const INF: f32 = f32::INFINITY;
        let subnormal = f32::from_bits(1);
        let cases = [
            (Ex2, -INF, false, 0.0),
            (Ex2, -0.0, false, 1.0),
            (Ex2, INF, false, INF),
            (Ex2, -127.0, true, 0.0),
            (Ex2, -127.0, false, 2f32.powi(-127)),
            (Lg2, -INF, false, NAN),
            (Lg2, -0.0, false, -INF),
            (Lg2, subnormal, true, -INF),
            (Lg2, subnormal, false, -149.0),
            (Lg2, INF, false, INF),
            (Rcp, -INF, false, -0.0),
            (Rcp, -0.0, false, -INF),
            (Rcp, -subnormal, true, -INF),
            (Rcp, 2f32.powi(127), true, 0.0),
            (Sqrt, -0.0, false, -0.0),
            (Sqrt, -subnormal, false, NAN),
            (Sqrt, -subnormal, true, -0.0),
            (Sqrt, INF, false, INF),
            (Rsqrt, -0.0, false, -INF),
            (Rsqrt, -1.0, false, NAN),
            (Rsqrt, INF, false, 0.0),
            (Sin, -0.0, false, -0.0),
            (Sin, INF, false, NAN),
            (Cos, -0.0, false, 1.0),
            (Cos, -INF, false, NAN),
            (Tanh, -INF, false, -1.0),
            (Tanh, -0.0, false, -0.0),
            (Tanh, f32::NAN, false, NAN),
            (Ex2, 3.0, false, 8.0),
            (Rsqrt, 4.0, false, 0.5),
        ];
        for (operation, x, ftz, expected) in cases {
            assert_eq!(operation.f32(x, ftz).to_bits(), expected.to_bits(), "{operation:?} of {x} ({ftz})");
        }
        assert_eq!(Ex2.half(HalfType::Bf16, 0x4040, true), 0x4100);
        assert_eq!(Tanh.half(HalfType::F16, 0xFC00, false), 0xBC00);
        assert_eq!(Rcp.f64(4.0, true), 0.25);
    }
}
