//! Addresses in shared memory, and the loads and stores that take them.

use core::arch::{asm, global_asm};

global_asm!(".extern .shared .align 1024 .b8 ferromoe_shared[];");

macro_rules! load {
    ($name:ident, $type:ty, $register:ident, $ptx:literal) => {
        #[doc = concat!("`", $ptx, "`.")]
        ///
        /// # Safety
        /// The address is aligned, in bounds, and no other thread writes it at the same time.
        #[inline(always)]
        pub unsafe fn $name(self) -> $type {
            let value: $type;
            // SAFETY: the caller's.
            unsafe { asm!(concat!($ptx, " {0}, [{1}];"), out($register) value, in(reg32) self.0) };
            value
        }
    };
}

macro_rules! store {
    ($name:ident, $type:ty, $register:ident, $ptx:literal, $others:literal) => {
        #[doc = concat!("`", $ptx, "`.")]
        ///
        /// # Safety
        #[doc = concat!("The address is aligned, in bounds, and ", $others, ".")]
        #[inline(always)]
        pub unsafe fn $name(self, value: $type) {
            // SAFETY: the caller's.
            unsafe { asm!(concat!($ptx, " [{0}], {1};"), in(reg32) self.0, in($register) value) };
        }
    };
}

/// A byte address in this CTA's shared memory (not a generic address).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SharedAddress(pub u32);

impl SharedAddress {
    /// The start of the CTA's dynamic shared memory: a constant to ptxas. What depends on it is computed anew behind each call, and so has no register in between.
    #[inline(always)]
    pub fn dynamic() -> Self {
        let address: u32;
        // SAFETY: reads the address of a symbol.
        unsafe { asm!("mov.u32 {0}, ferromoe_shared;", out(reg32) address) };
        Self(address)
    }

    /// The address `bytes` further on.
    #[inline(always)]
    pub const fn offset(self, bytes: u32) -> Self {
        Self(self.0 + bytes)
    }

    load!(load_u32, u32, reg32, "ld.shared.u32");
    load!(load_u64, u64, reg64, "ld.shared.u64");
    store!(store_u32, u32, reg32, "st.shared.u32", "no other thread touches it at the same time");
    store!(store_u64, u64, reg64, "st.shared.u64", "no other thread touches it at the same time");
    store!(red_add_relaxed_cta, u32, reg32, "red.relaxed.cta.shared.add.u32", "other threads only add to it");

    /// `ld.shared.v2.u32`.
    ///
    /// # Safety
    /// As for [`Self::load_u32`], 8-byte aligned.
    #[inline(always)]
    pub unsafe fn load_v2(self) -> [u32; 2] {
        let (a, b): (u32, u32);
        // SAFETY: the caller's.
        unsafe { asm!("ld.shared.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg32) self.0) };
        [a, b]
    }

    /// `ld.shared.v4.u32`.
    ///
    /// # Safety
    /// As for [`Self::load_u32`], 16-byte aligned.
    #[inline(always)]
    pub unsafe fn load_v4(self) -> [u32; 4] {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's.
        unsafe {
            asm!("ld.shared.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.0)
        };
        [a, b, c, d]
    }

    /// `st.shared.v4.u32`.
    ///
    /// # Safety
    /// As for [`Self::store_u32`], 16-byte aligned.
    #[inline(always)]
    pub unsafe fn store_v4(self, [a, b, c, d]: [u32; 4]) {
        // SAFETY: the caller's.
        unsafe {
            asm!("st.shared.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};",
                in(reg32) self.0, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d)
        };
    }
}
