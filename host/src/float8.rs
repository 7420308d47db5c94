//! The 8-bit numbers of quantised weights and tokens: e4m3 values, and e8m0 scales.

use std::sync::LazyLock;

use float8::F8E4M3;

/// What each e4m3 code stands for.
static E4M3: LazyLock<[f32; 256]> =
    LazyLock::new(|| std::array::from_fn(|code| F8E4M3::from_bits(code as u8).to_f32()));

/// What the e4m3 number `code` stands for. The all-ones codes 0x7f and 0xff are NaN; there is no infinity.
pub(crate) fn from_e4m3(code: u8) -> f32 {
    E4M3[usize::from(code)]
}

/// The nearest e4m3 number, ties to even, at most 448 in magnitude; NaN stays NaN. As `cvt.rn.satfinite.e4m3x2.f32` of PTX.
pub(crate) fn to_e4m3(value: f32) -> u8 {
    F8E4M3::from_f32(value).to_bits()
}

/// The power of two that the e8m0 number `code` stands for, 2^(code - 127); 0xff is NaN.
pub(crate) fn from_e8m0(code: u8) -> f32 {
    match code {
        // Below the normal numbers of f32.
        0 => f32::from_bits(1 << 22),
        0xff => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What IEEE 754's reading of four exponent bits with bias 7 and three mantissa bits gives.
    fn by_definition(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match exponent {
            15 if code & 7 == 7 => f64::NAN,
            0 => mantissa / 8.0 * 2f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_code_is_what_the_format_says_and_comes_back() {
        for code in 0..=255u8 {
            let (found, expected) = (from_e4m3(code), by_definition(code));
            if expected.is_nan() {
                assert!(found.is_nan() && to_e4m3(found) & 0x7f == 0x7f, "{code:#x}");
            } else {
                assert_eq!(f64::from(found).to_bits(), expected.to_bits(), "{code:#x}");
                assert_eq!(to_e4m3(found), code);
            }
        }
    }

    #[test]
    fn values_between_two_numbers_go_to_the_nearest_and_ties_to_the_even() {
        for low in 0..0x7e_u8 {
            let (below, above) = (from_e4m3(low), from_e4m3(low + 1));
            let middle = f32::midpoint(below, above);
            let even = low + low % 2;
            for sign in [1.0f32, -1.0] {
                let bit = if sign < 0.0 { 0x80 } else { 0 };
                assert_eq!(to_e4m3(sign * middle), even | bit, "{middle}");
                assert_eq!(to_e4m3(sign * middle.next_down()), low | bit);
                assert_eq!(to_e4m3(sign * middle.next_up()), (low + 1) | bit);
            }
        }
    }

    #[test]
    fn what_is_too_large_becomes_the_largest() {
        for large in [448.1, 463.9, 464.0, 465.0, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!((to_e4m3(large), to_e4m3(-large)), (0x7e, 0xfe), "{large}");
        }
    }

    #[test]
    fn e8m0_is_the_exponent() {
        for code in 0..255u8 {
            assert_eq!(f64::from(from_e8m0(code)), 2f64.powi(i32::from(code) - 127), "{code}");
        }
        assert!(from_e8m0(255).is_nan());
    }
}
