//! Stores of accumulator fragments as 8x8 matrices (PTX ISA 8.6, "stmatrix").

use core::arch::asm;

use super::address::SharedAddress;

/// `stmatrix.x1.trans`: an 8x8 matrix of 16-bit elements, transposed; lanes 0 to 7 hold the row addresses.
///
/// # Safety
/// The rows are 16-byte aligned and in bounds, and no other thread touches them.
#[inline(always)]
pub unsafe fn stmatrix_x1_trans(row: SharedAddress, a: u32) {
    // SAFETY: the caller's.
    unsafe { asm!("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [{0}], {{{1}}};", in(reg32) row.0, in(reg32) a) };
}

/// `stmatrix.x2.trans`: two 8x8 matrices of 16-bit elements, transposed; lanes 0 to 15 hold the row addresses.
///
/// # Safety
/// As for [`stmatrix_x1_trans`].
#[inline(always)]
pub unsafe fn stmatrix_x2_trans(row: SharedAddress, [a, b]: [u32; 2]) {
    // SAFETY: the caller's.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{0}], {{{1}, {2}}};",
            in(reg32) row.0, in(reg32) a, in(reg32) b)
    };
}

/// `stmatrix.x4.trans`: four 8x8 matrices of 16-bit elements, transposed; every lane holds a row address.
///
/// # Safety
/// As for [`stmatrix_x1_trans`].
#[inline(always)]
pub unsafe fn stmatrix_x4_trans(row: SharedAddress, [a, b, c, d]: [u32; 4]) {
    // SAFETY: the caller's.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{0}], {{{1}, {2}, {3}, {4}}};",
            in(reg32) row.0, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d)
    };
}

/// `stmatrix.x4`: four 8x8 matrices of 16-bit elements; every lane holds a row address.
///
/// # Safety
/// As for [`stmatrix_x1_trans`].
#[inline(always)]
pub unsafe fn stmatrix_x4(row: SharedAddress, [a, b, c, d]: [u32; 4]) {
    // SAFETY: the caller's.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x4.shared.b16 [{0}], {{{1}, {2}, {3}, {4}}};",
            in(reg32) row.0, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d)
    };
}
