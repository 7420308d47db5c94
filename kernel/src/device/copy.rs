//! Copies of single threads from global to shared memory (PTX ISA 8.6, "cp.async").

use core::arch::asm;

use super::address::SharedAddress;

/// `cp.async.ca.shared.global` of `BYTES` bytes (4 or 8): `bytes` of them (all or none) from the source, zeros behind.
///
/// # Safety
/// Both addresses are aligned to their size and in bounds, and no other thread touches the destination until this one has waited, and synchronised with it.
#[inline(always)]
pub unsafe fn cp_async<const BYTES: u32>(destination: SharedAddress, source: *const u8, bytes: u32) {
    // SAFETY: the caller's.
    unsafe {
        asm!("cp.async.ca.shared.global [{0}], [{1}], {3}, {2};",
            in(reg32) destination.0, in(reg64) source, in(reg32) bytes, const BYTES)
    };
}

/// `cp.async.wait_all`: all copies of this thread are complete.
#[inline(always)]
pub fn cp_async_wait_all() {
    // SAFETY: waits.
    unsafe { asm!("cp.async.wait_all;") };
}
