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
