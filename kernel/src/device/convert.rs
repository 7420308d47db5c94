//! Arithmetic that the language does not offer without a standard library.

use core::arch::asm;

/// `ex2.approx.ftz.f32`: two to the power of `x`.
#[inline(always)]
pub fn ex2(x: f32) -> f32 {
    let y: f32;
    // SAFETY: arithmetic.
    unsafe { asm!("ex2.approx.ftz.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem)) };
    y
}

/// `rcp.approx.ftz.f32`: one over `x`.
#[inline(always)]
pub fn rcp(x: f32) -> f32 {
    let y: f32;
    // SAFETY: arithmetic.
    unsafe { asm!("rcp.approx.ftz.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem)) };
    y
}

/// `cvt.rn.bf16x2.f32`: two values rounded to bf16, `low` in the lower half.
#[inline(always)]
pub fn bf16x2(low: f32, high: f32) -> u32 {
    let packed: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("cvt.rn.bf16x2.f32 {0}, {1}, {2};", out(reg32) packed, in(reg32) high, in(reg32) low, options(pure, nomem))
    };
    packed
}

/// `min.NaN.f32`: NaN if either is.
#[inline(always)]
pub fn min_nan(a: f32, b: f32) -> f32 {
    let least: f32;
    // SAFETY: arithmetic.
    unsafe { asm!("min.NaN.f32 {0}, {1}, {2};", out(reg32) least, in(reg32) a, in(reg32) b, options(pure, nomem)) };
    least
}

/// `max.NaN.f32`: NaN if either is.
#[inline(always)]
pub fn max_nan(a: f32, b: f32) -> f32 {
    let greatest: f32;
    // SAFETY: arithmetic.
    unsafe { asm!("max.NaN.f32 {0}, {1}, {2};", out(reg32) greatest, in(reg32) a, in(reg32) b, options(pure, nomem)) };
    greatest
}

/// `fma.rn.f32`: `a * b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let sum: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("fma.rn.f32 {0}, {1}, {2}, {3};", out(reg32) sum, in(reg32) a, in(reg32) b, in(reg32) c, options(pure, nomem))
    };
    sum
}

/// `max.NaN.bf16x2`: NaN where either is.
#[inline(always)]
pub fn max_nan_bf16x2(a: u32, b: u32) -> u32 {
    let greatest: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("max.NaN.bf16x2 {0}, {1}, {2};", out(reg32) greatest, in(reg32) a, in(reg32) b, options(pure, nomem))
    };
    greatest
}

/// The magnitudes of two bf16.
#[inline(always)]
pub const fn abs_bf16x2(values: u32) -> u32 {
    values & 0x7fff_7fff
}

/// Two bf16 as f32, the lower half first.
#[inline(always)]
pub const fn unpack_bf16x2(values: u32) -> [f32; 2] {
    [f32::from_bits(values << 16), f32::from_bits(values & 0xffff_0000)]
}

/// `cvt.rn.satfinite.e4m3x2.f32`, twice: four values rounded to e4m3, the first in the lowest byte.
#[inline(always)]
pub fn e4m3x4([a, b, c, d]: [f32; 4]) -> u32 {
    let packed: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("{{",
            ".reg .b16 low, high;",
            "cvt.rn.satfinite.e4m3x2.f32 low, {2}, {1};",
            "cvt.rn.satfinite.e4m3x2.f32 high, {4}, {3};",
            "mov.b32 {0}, {{low, high}};",
            "}}",
            out(reg32) packed, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(pure, nomem))
    };
    packed
}
