//! Loads and stores of global memory with the ordering and scope in their names.
//!
//! `weak` ones are ordinary accesses, ordered by fences, barriers and releases around them.

use core::arch::asm;

macro_rules! load {
    ($name:ident, $type:ty, $register:ident, $ptx:literal, $note:literal) => {
        #[doc = concat!("`", $ptx, "`", $note)]
        ///
        /// # Safety
        /// The address is global, aligned, in bounds and initialised.
        #[inline(always)]
        pub unsafe fn $name(address: *const $type) -> $type {
            let value: $type;
            // SAFETY: the caller's.
            unsafe { asm!(concat!($ptx, " {0}, [{1}];"), out($register) value, in(reg64) address) };
            value
        }
    };
}

macro_rules! store {
    ($name:ident, $type:ty, $register:ident, $ptx:literal, $note:literal) => {
        #[doc = concat!("`", $ptx, "`", $note)]
        ///
        /// # Safety
        /// The address is global, aligned and in bounds.
        #[inline(always)]
        pub unsafe fn $name(address: *mut $type, value: $type) {
            // SAFETY: the caller's.
            unsafe { asm!(concat!($ptx, " [{0}], {1};"), in(reg64) address, in($register) value) };
        }
    };
}

load!(ld_weak_u32, u32, reg32, "ld.global.u32", ".");
load!(ld_weak_u64, u64, reg64, "ld.global.u64", ".");
load!(ld_weak_f32, f32, reg32, "ld.global.f32", ".");
load!(ld_relaxed_gpu_u32, u32, reg32, "ld.relaxed.gpu.global.u32", ".");
load!(ld_relaxed_gpu_u64, u64, reg64, "ld.relaxed.gpu.global.u64", ".");
load!(ld_acquire_gpu_u32, u32, reg32, "ld.acquire.gpu.global.u32", ".");
load!(ld_acquire_sys_u32, u32, reg32, "ld.acquire.sys.global.u32", ".");
load!(ld_relaxed_sys_u64, u64, reg64, "ld.relaxed.sys.global.u64", ".");

store!(st_weak_u32, u32, reg32, "st.global.u32", ".");
store!(st_weak_u64, u64, reg64, "st.global.u64", "; the address may be a peer's.");
store!(st_relaxed_sys_u32, u32, reg32, "st.relaxed.sys.global.u32", "; the address may be a peer's.");
store!(st_relaxed_sys_u64, u64, reg64, "st.relaxed.sys.global.u64", "; the address may be a peer's.");

/// `ld.global.v4.u32`.
///
/// # Safety
/// The address is global, 16-byte aligned, in bounds and initialised.
#[inline(always)]
pub unsafe fn ld_weak_v4(address: *const u8) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's.
    unsafe {
        asm!("ld.global.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address)
    };
    [a, b, c, d]
}

/// `st.global.v4.u32`; the address may be a peer's.
///
/// # Safety
/// The address is global, 16-byte aligned and in bounds.
#[inline(always)]
pub unsafe fn st_weak_v4(address: *mut u8, [a, b, c, d]: [u32; 4]) {
    // SAFETY: the caller's.
    unsafe {
        asm!("st.global.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};",
            in(reg64) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d)
    };
}
