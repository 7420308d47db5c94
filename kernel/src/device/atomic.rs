//! Read-modify-writes of global memory, with the ordering and scope in their names.

use core::arch::asm;

/// `atom.relaxed.gpu.global.add.u32`: returns the old value.
///
/// # Safety
/// The address is global, aligned, in bounds and initialised.
#[inline(always)]
pub unsafe fn atom_add_relaxed_gpu(address: *mut u32, value: u32) -> u32 {
    let old: u32;
    // SAFETY: the caller's.
    unsafe {
        asm!("atom.relaxed.gpu.global.add.u32 {0}, [{1}], {2};", out(reg32) old, in(reg64) address, in(reg32) value)
    };
    old
}

/// `atom.acq_rel.gpu.global.add.u32`: returns the old value.
///
/// # Safety
/// As for [`atom_add_relaxed_gpu`].
#[inline(always)]
pub unsafe fn atom_add_acq_rel_gpu(address: *mut u32, value: u32) -> u32 {
    let old: u32;
    // SAFETY: the caller's.
    unsafe {
        asm!("atom.acq_rel.gpu.global.add.u32 {0}, [{1}], {2};", out(reg32) old, in(reg64) address, in(reg32) value)
    };
    old
}

/// `atom.acq_rel.sys.global.add.u32`: returns the old value.
///
/// # Safety
/// As for [`atom_add_relaxed_gpu`].
#[inline(always)]
pub unsafe fn atom_add_acq_rel_sys(address: *mut u32, value: u32) -> u32 {
    let old: u32;
    // SAFETY: the caller's.
    unsafe {
        asm!("atom.acq_rel.sys.global.add.u32 {0}, [{1}], {2};", out(reg32) old, in(reg64) address, in(reg32) value)
    };
    old
}

/// `red.release.gpu.global.add.u32`.
///
/// # Safety
/// As for [`atom_add_relaxed_gpu`].
#[inline(always)]
pub unsafe fn red_add_release_gpu(address: *mut u32, value: u32) {
    // SAFETY: the caller's.
    unsafe { asm!("red.release.gpu.global.add.u32 [{0}], {1};", in(reg64) address, in(reg32) value) };
}

/// `red.relaxed.gpu.global.min.u64`.
///
/// # Safety
/// As for [`atom_add_relaxed_gpu`].
#[inline(always)]
pub unsafe fn red_min_relaxed_gpu_u64(address: *mut u64, value: u64) {
    // SAFETY: the caller's.
    unsafe { asm!("red.relaxed.gpu.global.min.u64 [{0}], {1};", in(reg64) address, in(reg64) value) };
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
