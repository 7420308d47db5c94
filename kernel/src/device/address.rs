//! Addresses in shared memory, and the loads and stores that take them.

use core::arch::{asm, global_asm};

global_asm!(".extern .shared .align 1024 .b8 ferromoe_shared[];");

/// A byte address in this CTA's shared memory (not a generic address).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SharedAddress(pub u32);

impl SharedAddress {
    /// The start of the CTA's dynamic shared memory.
    #[inline(always)]
    pub fn dynamic() -> Self {
        let address: u32;
        // SAFETY: reads the address of a symbol.
        unsafe { asm!("mov.u32 {0}, ferromoe_shared;", out(reg32) address, options(pure, nomem)) };
        Self(address)
    }

    /// The address `bytes` further on.
    #[inline(always)]
    pub const fn offset(self, bytes: u32) -> Self {
        Self(self.0 + bytes)
    }

    /// `ld.shared.u32`.
    ///
    /// # Safety
    /// The address is 4-byte aligned, in bounds, and no other thread writes it at the same time.
    #[inline(always)]
    pub unsafe fn load_u32(self) -> u32 {
        let value: u32;
        // SAFETY: the caller's.
        unsafe { asm!("ld.shared.u32 {0}, [{1}];", out(reg32) value, in(reg32) self.0) };
        value
    }

    /// `ld.shared.u64`.
    ///
    /// # Safety
    /// As for [`Self::load_u32`], 8-byte aligned.
    #[inline(always)]
    pub unsafe fn load_u64(self) -> u64 {
        let value: u64;
        // SAFETY: the caller's.
        unsafe { asm!("ld.shared.u64 {0}, [{1}];", out(reg64) value, in(reg32) self.0) };
        value
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

    /// `st.shared.u32`.
    ///
    /// # Safety
    /// As for [`Self::load_u32`], and no other thread reads it at the same time.
    #[inline(always)]
    pub unsafe fn store_u32(self, value: u32) {
        // SAFETY: the caller's.
        unsafe { asm!("st.shared.u32 [{0}], {1};", in(reg32) self.0, in(reg32) value) };
    }

    /// `red.relaxed.cta.shared.add.u32`.
    ///
    /// # Safety
    /// As for [`Self::load_u32`], but others may add at the same time.
    #[inline(always)]
    pub unsafe fn red_add_relaxed_cta(self, value: u32) {
        // SAFETY: the caller's.
        unsafe { asm!("red.relaxed.cta.shared.add.u32 [{0}], {1};", in(reg32) self.0, in(reg32) value) };
    }

    /// `st.shared.u64`.
    ///
    /// # Safety
    /// As for [`Self::store_u32`], 8-byte aligned.
    #[inline(always)]
    pub unsafe fn store_u64(self, value: u64) {
        // SAFETY: the caller's.
        unsafe { asm!("st.shared.u64 [{0}], {1};", in(reg32) self.0, in(reg64) value) };
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
