//! Read-modify-writes of global memory, with the ordering and scope in their names.

use core::arch::asm;

macro_rules! atomic {
    ($name:ident, $type:ty, $register:ident, $ptx:literal) => {
        #[doc = concat!("`", $ptx, "`: returns the old value.")]
        ///
        /// # Safety
        /// The address is global, aligned, in bounds and initialised.
        #[inline(always)]
        pub unsafe fn $name(address: *mut $type, value: $type) -> $type {
            let old: $type;
            // SAFETY: the caller's.
            unsafe {
                asm!(concat!($ptx, " {0}, [{1}], {2};"), out($register) old, in(reg64) address, in($register) value)
            };
            old
        }
    };
}

macro_rules! reduction {
    ($name:ident, $type:ty, $register:ident, $ptx:literal) => {
        #[doc = concat!("`", $ptx, "`.")]
        ///
        /// # Safety
        /// The address is global, aligned, in bounds and initialised.
        #[inline(always)]
        pub unsafe fn $name(address: *mut $type, value: $type) {
            // SAFETY: the caller's.
            unsafe { asm!(concat!($ptx, " [{0}], {1};"), in(reg64) address, in($register) value) };
        }
    };
}

atomic!(atom_add_relaxed_gpu, u32, reg32, "atom.relaxed.gpu.global.add.u32");
atomic!(atom_add_acq_rel_gpu, u32, reg32, "atom.acq_rel.gpu.global.add.u32");

reduction!(red_add_release_gpu, u32, reg32, "red.release.gpu.global.add.u32");
reduction!(red_min_relaxed_gpu_u64, u64, reg64, "red.relaxed.gpu.global.min.u64");

/// `atom.relaxed.gpu.global.inc.u32`: adds 1, from the bound to 0, and returns the old value. An addition of 1 ptxas makes once for all lanes, with a
/// shuffle behind it that waits for the result at once; this one is waited for where it is used. (With the greatest bound it takes it for an addition.)
///
/// # Safety
/// As for [`atom_add_relaxed_gpu`].
#[inline(always)]
pub unsafe fn atom_inc_relaxed_gpu(address: *mut u32) -> u32 {
    let old: u32;
    // SAFETY: the caller's.
    unsafe {
        asm!("atom.relaxed.gpu.global.inc.u32 {0}, [{1}], {2};", out(reg32) old, in(reg64) address, in(reg32) u32::MAX - 1)
    };
    old
}

/// `atom.relaxed.gpu.global.cas.b64`: returns the old value.
///
/// # Safety
/// As for [`atom_add_relaxed_gpu`].
#[inline(always)]
pub unsafe fn atom_cas_relaxed_gpu_u64(address: *mut u64, expected: u64, value: u64) -> u64 {
    let old: u64;
    // SAFETY: the caller's.
    unsafe {
        asm!("atom.relaxed.gpu.global.cas.b64 {0}, [{1}], {2}, {3};",
            out(reg64) old, in(reg64) address, in(reg64) expected, in(reg64) value)
    };
    old
}
