use super::*;
use NumericType as T;
use proptest::prelude::*;

const ROUNDINGS: [Rounding; 5] =
    [Rounding::Nearest, Rounding::NearestAway, Rounding::Zero, Rounding::Down, Rounding::Up];

fn convert(to: T, from: T, bits: u64) -> u64 {
    Conversion::new(to, from).apply(bits)
}

fn rounded(to: T, from: T, rounding: Rounding, bits: u64) -> u64 {
    Conversion { rounding, ..Conversion::new(to, from) }.apply(bits)
}

/// The value of an IEEE pattern by its definition; `None` for infinities and NaNs.
fn value(bits: u64, exponent_bits: u32, mantissa_bits: u32) -> Option<f64> {
    let biased = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    let fraction = (bits & ((1 << mantissa_bits) - 1)) as f64 / (1u64 << mantissa_bits) as f64;
    let bias = (1 << (exponent_bits - 1)) - 1;
    let magnitude = match biased {
        0 => fraction * 2f64.powi(1 - bias),
        b if b == (1 << exponent_bits) - 1 => return None,
        b => (1.0 + fraction) * 2f64.powi(b as i32 - bias),
    };
    Some(if bits >> (exponent_bits + mantissa_bits) & 1 == 1 { -magnitude } else { magnitude })
}

#[test]
fn every_narrow_value_widens_exactly() {
    for bits in 0..=u16::MAX as u64 {
        for (from, exponent, mantissa) in [(T::F16, 5, 10), (T::Bf16, 8, 7)] {
            let f32_bits = convert(T::F32, from, bits) as u32;
            let f64_bits = convert(T::F64, from, bits);
            match value(bits, exponent, mantissa) {
                Some(expected) => {
                    assert_eq!(f64::from(f32::from_bits(f32_bits)).to_bits(), expected.to_bits(), "{from:?} {bits:#x}");
                    assert_eq!(f64_bits, expected.to_bits(), "{from:?} {bits:#x}");
                    assert_eq!(from.to_f32(bits as u32).to_bits(), f32_bits);
                }
                None if bits & ((1 << mantissa) - 1) == 0 => {
                    let infinity = if bits >> 15 == 1 { f32::NEG_INFINITY } else { f32::INFINITY };
                    assert_eq!(f32_bits, infinity.to_bits());
                }
                None => assert!(f32::from_bits(f32_bits).is_nan() && f64::from_bits(f64_bits).is_nan()),
            }
        }
    }
    for bits in 0..=u8::MAX as u64 {
        // e4m3: the all-ones exponent holds numbers up to 448, and one NaN.
        let e4m3 = T::E4m3.to_f32(bits as u32);
        let sign = if bits >= 0x80 { -1.0 } else { 1.0 };
        match bits & 0x7F {
            0x7F => assert!(e4m3.is_nan()),
            low if low < 8 => assert_eq!(e4m3.to_bits(), (sign * low as f32 / 512.0).to_bits()),
            low => assert_eq!(e4m3, sign * (1.0 + (low % 8) as f32 / 8.0) * 2f32.powi((low / 8) as i32 - 7)),
        }
        let e5m2 = f64::from(T::E5m2.to_f32(bits as u32));
        match value(bits, 5, 2) {
            Some(expected) => assert_eq!(e5m2.to_bits(), expected.to_bits()),
            None => assert_eq!(e5m2.is_nan(), bits & 3 != 0),
        }
        let pair = Conversion::new(T::F16, T::E4m3).apply_packed(bits << 8 | 0x38);
        assert_eq!(pair & 0xFFFF, 0x3C00);
        assert_eq!(T::F16.to_f32((pair >> 16) as u32).to_bits() & 0x7F80_0000 == 0x7F80_0000, bits & 0x7F == 0x7F);
    }
}

/// What rounding `x` between the neighbours `below` and `above` (bits of positive values) gives.
fn expect_between(x: f64, below: (u64, f64), above: (u64, f64), negative: bool, rounding: Rounding) -> u64 {
    let middle = (below.1 + above.1) / 2.0;
    match rounding {
        _ if x == below.1 => below.0,
        Rounding::Zero => below.0,
        Rounding::Down => {
            if negative {
                above.0
            } else {
                below.0
            }
        }
        Rounding::Up => {
            if negative {
                below.0
            } else {
                above.0
            }
        }
        _ if x < middle => below.0,
        _ if x > middle => above.0,
        Rounding::Nearest => {
            if below.0 & 1 == 0 {
                below.0
            } else {
                above.0
            }
        }
        Rounding::NearestAway => above.0,
    }
}

/// Around every pair of neighbouring values of a format: the values, their middle, and the next f64 on both sides of it.
fn check_narrowing(to: T, exponent_bits: u32, mantissa_bits: u32, largest: u64) {
    let padding = if to == T::Tf32 { 13 } else { 0 };
    let sign_at = exponent_bits + mantissa_bits;
    for bits in 0..largest {
        let below = (bits, value(bits, exponent_bits, mantissa_bits).unwrap());
        let above = (bits + 1, value(bits + 1, exponent_bits, mantissa_bits).unwrap());
        let middle = (below.1 + above.1) / 2.0;
        for x in [below.1, below.1.next_up(), middle.next_down(), middle, middle.next_up(), above.1.next_down()] {
            for rounding in ROUNDINGS {
                for negative in [false, true] {
                    let signed = if negative { -x } else { x };
                    let expected = expect_between(x, below, above, negative, rounding) | (negative as u64) << sign_at;
                    let expected = expected << padding;
                    assert_eq!(
                        rounded(to, T::F64, rounding, signed.to_bits()),
                        expected,
                        "{to:?} {signed:e} {rounding:?}"
                    );
                    let single = signed as f32;
                    if f64::from(single) == signed {
                        assert_eq!(rounded(to, T::F32, rounding, single.to_bits() as u64), expected, "{single:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn narrowing_rounds_as_defined_between_all_neighbours() {
    check_narrowing(T::F16, 5, 10, 0x7BFF);
    check_narrowing(T::Bf16, 8, 7, 0x7F7F);
    check_narrowing(T::E5m2, 5, 2, 0x7B);
    // e4m3 up to 240 is the IEEE format; the rest of its range is in `overflow_and_satfinite`.
    check_narrowing(T::E4m3, 4, 3, 0x77);
    check_narrowing(T::Tf32, 8, 10, 0x1FFF);
}

#[test]
fn overflow_and_satfinite() {
    let f32_bits = |x: f32| x.to_bits() as u64;
    let over = f32_bits(65520.0);
    for (rounding, positive, negative) in [
        (Rounding::Nearest, 0x7C00, 0xFC00),
        (Rounding::Zero, 0x7BFF, 0xFBFF),
        (Rounding::Down, 0x7BFF, 0xFC00),
        (Rounding::Up, 0x7C00, 0xFBFF),
    ] {
        assert_eq!(rounded(T::F16, T::F32, rounding, over), positive);
        assert_eq!(rounded(T::F16, T::F32, rounding, over | 0x8000_0000), negative);
    }
    assert_eq!(convert(T::F16, T::F32, f32_bits(65519.996)), 0x7BFF);
    let fp8 = |to, x: f32| Conversion { saturate_finite: true, ..Conversion::new(to, T::F32) }.apply(f32_bits(x));
    let e4m3 =
        [(448.0, 0x7E), (464.0, 0x7E), (1e9, 0x7E), (f32::INFINITY, 0x7E), (f32::NEG_INFINITY, 0xFE), (f32::NAN, 0x7F)];
    for (x, expected) in e4m3 {
        assert_eq!(fp8(T::E4m3, x), expected, "{x}");
    }
    for (x, expected) in [(432.0, 0x7E), (431.9, 0x7D), (2f32.powi(-10), 0), (1.001 * 2f32.powi(-10), 1), (-0.0, 0x80)]
    {
        assert_eq!(fp8(T::E4m3, x), expected, "{x}");
    }
    for (x, expected) in [(57344.0, 0x7B), (1e9, 0x7B), (f32::NEG_INFINITY, 0xFB), (f32::NAN, 0x7F)] {
        assert_eq!(fp8(T::E5m2, x), expected, "{x}");
    }
    let pair = Conversion::new(T::Bf16, T::F32).apply_pair(f32_bits(1.0), f32_bits(-2.0));
    assert_eq!(pair, 0x3F80_C000);
}

/// Results that an H200 gave.
#[test]
fn special_values_convert_as_on_the_device() {
    let nearest = Conversion::new;
    let relu = |to| Conversion { relu: true, ..nearest(to, T::F32) };
    let saturating = |to, from| Conversion { saturate: true, ..nearest(to, from) };
    let rounding = |to, from, rounding| Conversion { rounding, ..nearest(to, from) };
    let cases = [
        (nearest(T::F16, T::F32), 0xFFA1_2345, 0x7FFF),
        (nearest(T::Bf16, T::F32), 0x7F80_0001, 0x7FFF),
        (nearest(T::Bf16, T::F32), 0x7F7F_8000, 0x7F80),
        (relu(T::Bf16), 0xFF80_0000, 0),
        (relu(T::Bf16), 0x8000_0000, 0),
        (relu(T::Bf16), 0xFFC0_0000, 0x7FFF),
        (nearest(T::F32, T::Bf16), 0x7F88, 0x7F88_0000),
        (nearest(T::F32, T::F16), 0x7E01, 0x7FFF_FFFF),
        (nearest(T::F32, T::F64), 0x7FF1_2345_6789_ABCD, 0x7FC9_1A2B),
        (nearest(T::F32, T::F64), 0xFFF8_0000_0000_0001, 0xFFC0_0000),
        (nearest(T::Bf16, T::F64), 0xFFFA_BCDE_F012_3456, 0xFFD5),
        (nearest(T::Tf32, T::F32), 0x7FC0_0000, 0x7FFF_E000),
        (rounding(T::Tf32, T::F32, Rounding::NearestAway), 0xFFA1_2345, 0xFFA1_2000),
        (rounding(T::S32, T::F32, Rounding::Zero), 0x7FC0_0000, 0),
        (rounding(T::S64, T::F32, Rounding::Zero), 0x7FC0_0000, 1 << 63),
        (rounding(T::S32, T::F64, Rounding::Zero), 0x7FF8_0000_0000_0000, 0xFFFF_FFFF_8000_0000),
        (rounding(T::U32, T::F64, Rounding::Zero), 0x7FF8_0000_0000_0000, 0x8000_0000),
        (rounding(T::U32, T::F32, Rounding::Zero), 0xBF80_0000, 0),
        (rounding(T::S16, T::F32, Rounding::Zero), 0x7F80_0000, 0x7FFF),
        (saturating(T::F32, T::F32), 0x7FC0_0000, 0),
        (saturating(T::F32, T::F32), 0x8000_0000, 0),
        (saturating(T::F32, T::F32), 0x7F80_0000, 0x3F80_0000),
        (saturating(T::U8, T::S32), 0xFFFF_FFFF, 0),
        (saturating(T::S8, T::S32), 0x80, 0x7F),
        (saturating(T::S32, T::U32), 0xFFFF_FFFF, 0x7FFF_FFFF),
        (nearest(T::S64, T::S8), 0x80, 0xFFFF_FFFF_FFFF_FF80),
        (nearest(T::U64, T::S32), 0x8000_0000, 0xFFFF_FFFF_8000_0000),
        (nearest(T::U8, T::U32), 0x1FF, 0xFF),
    ];
    for (conversion, bits, expected) in cases {
        assert_eq!(conversion.apply(bits), expected, "{conversion:?} of {bits:#x}");
    }
    let ftz = Conversion { flush_subnormals: true, ..nearest(T::F32, T::F64) };
    assert_eq!(ftz.apply((-2f64.powi(-130)).to_bits()), 0x8000_0000);
    let up =
        Conversion { rounding: Rounding::Up, to_integral: true, flush_subnormals: true, ..nearest(T::F32, T::F32) };
    assert_eq!(up.apply(1), 0);
    assert_eq!(Conversion { flush_subnormals: false, ..up }.apply(1), 0x3F80_0000);
}

#[test]
fn packs_integers_with_saturation() {
    assert_eq!(pack_saturated(16, true, 40000, -5i32 as u32, 99), 0x7FFF_FFFB);
    assert_eq!(pack_saturated(16, false, -1i32 as u32, 70000, 99), 0x0000_FFFF);
    assert_eq!(pack_saturated(8, false, 300, 7, 0xAABB_CCDD), 0xCCDD_FF07);
    assert_eq!(pack_saturated(4, true, 9, -9i32 as u32, 0x0123_4567), 0x2345_6778);
}

proptest! {
    /// Rust's own conversions are the reference: `as` truncates, saturates, and rounds to nearest even.
    #[test]
    fn agrees_with_the_host(bits in any::<u64>(), shift in 0u32..64) {
        let (x, y) = (f32::from_bits(bits as u32), f64::from_bits(bits));
        let integer = bits >> shift;
        let truncate = |to, from, bits: u64| rounded(to, from, Rounding::Zero, bits);
        prop_assert_eq!(truncate(T::S32, T::F32, x.to_bits() as u64) as i32, x as i32);
        prop_assert_eq!(truncate(T::U8, T::F32, x.to_bits() as u64), (x as u8) as u64);
        if !y.is_nan() {
            prop_assert_eq!(truncate(T::S64, T::F64, bits) as i64, y as i64);
            prop_assert_eq!(truncate(T::U64, T::F64, bits), y as u64);
            prop_assert_eq!(convert(T::F32, T::F64, bits) as u32, (y as f32).to_bits());
        }
        prop_assert_eq!(convert(T::F32, T::U64, integer) as u32, (integer as f32).to_bits());
        prop_assert_eq!(convert(T::F64, T::S64, integer), (integer as i64 as f64).to_bits());
        prop_assert_eq!(convert(T::F32, T::S32, integer) as u32, (integer as i32 as f32).to_bits());
        if !x.is_nan() {
            prop_assert_eq!(convert(T::Bf16, T::F32, bits & 0xFFFF_FFFF) as u16, half::bf16::from_f32(x).to_bits());
            prop_assert_eq!(convert(T::F16, T::F32, bits & 0xFFFF_FFFF) as u16, half::f16::from_f32(x).to_bits());
        }
    }

    #[test]
    fn integral_rounding_agrees_with_the_host(bits in any::<u32>(), exponent in 100u32..160) {
        let x = f32::from_bits(bits & 0x807F_FFFF | exponent << 23);
        for (rounding, expected) in [
            (Rounding::Nearest, x.round_ties_even()),
            (Rounding::Zero, x.trunc()),
            (Rounding::Down, x.floor()),
            (Rounding::Up, x.ceil()),
        ] {
            let integral = Conversion { rounding, to_integral: true, ..Conversion::new(T::F32, T::F32) };
            prop_assert_eq!(integral.apply(x.to_bits() as u64) as u32, expected.to_bits());
            prop_assert_eq!(rounded(T::S32, T::F32, rounding, x.to_bits() as u64) as i32, expected as i32);
        }
    }
}
