//! How values become e4m3: one rule for tokens, for the intermediate and for weights, on the device and in the reference.
//!
//! A group of values shares a scale, such that the largest of them becomes the largest e4m3 number; what is stored of a value is `e4m3(value * 1 / scale)`, rounded to
//! the nearest, ties to even, and saturated (PTX ISA 8.6, `cvt.rn.satfinite.e4m3x2.f32`).

/// Columns of a token, or of its intermediate, that share a scale; and rows and columns of a block of weights.
pub const GROUP: u32 = 128;

/// The largest e4m3 number.
pub const E4M3_MAX: f32 = 448.0;

/// Groups whose values are all smaller are scaled as if one were this large: one over their scale stays finite.
const LEAST_LARGEST: f32 = 1e-30;

/// What a scale may be.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleKind {
    /// Any f32.
    F32 = 0,
    /// A power of two: rounded up to one (`scale_fmt` "ue8m0" of a checkpoint's `quantization_config`).
    PowerOfTwo = 1,
}

/// The scale of a group, and one over it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupScale {
    /// What an e4m3 number of the group is multiplied with.
    pub scale: f32,
    /// What a value is multiplied with before it is rounded.
    pub inverse: f32,
}

impl GroupScale {
    /// For a group whose largest magnitude is `largest`; `reciprocal` is one over its argument. NaN and infinity stay what they are, so that they show in the group's products.
    #[inline(always)]
    pub fn new(largest: f32, kind: ScaleKind, reciprocal: impl FnOnce(f32) -> f32) -> Self {
        // NaN is not smaller.
        let largest = if largest < LEAST_LARGEST { LEAST_LARGEST } else { largest };
        // A division of the device would be a call.
        let scale = largest * (1.0 / E4M3_MAX);
        if kind as u32 == ScaleKind::PowerOfTwo as u32 && scale < f32::INFINITY {
            let bits = (scale.to_bits() + 0x7f_ffff) & 0xff80_0000;
            // 2^-e for 2^e: exponents of both add up to twice the bias.
            return Self { scale: f32::from_bits(bits), inverse: f32::from_bits((254 << 23) - bits) };
        }
        Self { scale, inverse: reciprocal(scale) }
    }
}

/// Groups of `columns` columns, the last of which may be partial.
pub const fn groups(columns: u32) -> u32 {
    columns.div_ceil(GROUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(largest: f32, kind: ScaleKind) -> GroupScale {
        GroupScale::new(largest, kind, |scale| 1.0 / scale)
    }

    #[test]
    fn the_largest_value_becomes_the_largest_number() {
        for largest in [448.0, 1.0, 3.0e-5, 7.7e20] {
            let found = scale(largest, ScaleKind::F32);
            assert!((largest * found.inverse / E4M3_MAX - 1.0).abs() < 1e-6, "{largest}: {found:?}");
        }
    }

    #[test]
    fn powers_of_two_are_rounded_up() {
        for (largest, expected) in [(448.0, 1.0), (448.1, 2.0), (447.9, 1.0), (1.0, 1.0 / 256.0), (896.0, 2.0)] {
            let found = scale(largest, ScaleKind::PowerOfTwo);
            assert_eq!((found.scale, found.inverse), (expected, 1.0 / expected), "{largest}");
        }
    }

    #[test]
    fn zeros_have_a_finite_scale_and_what_is_not_finite_stays_so() {
        for kind in [ScaleKind::F32, ScaleKind::PowerOfTwo] {
            let zero = scale(0.0, kind);
            assert!(zero.scale > 0.0 && zero.inverse.is_finite(), "{zero:?}");
            assert!(scale(f32::NAN, kind).scale.is_nan());
            assert_eq!(scale(f32::INFINITY, kind).scale, f32::INFINITY);
        }
    }
}
