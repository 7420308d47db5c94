//! Fences.

use core::arch::asm;

/// `fence.acq_rel.gpu`.
#[inline(always)]
pub fn fence_acq_rel_gpu() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.acq_rel.gpu;") };
}

/// `fence.acq_rel.sys`.
#[inline(always)]
pub fn fence_acq_rel_sys() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.acq_rel.sys;") };
}

/// `fence.proxy.async`: orders this thread's ordinary accesses and those of the asynchronous proxy (bulk copies, wgmma).
#[inline(always)]
pub fn fence_proxy_async() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.proxy.async;") };
}

/// `fence.proxy.async.global`: as [`fence_proxy_async`], for global memory alone.
#[inline(always)]
pub fn fence_proxy_async_global() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.proxy.async.global;") };
}

/// `fence.proxy.async.shared::cta`: as [`fence_proxy_async`], for this CTA's shared memory alone.
#[inline(always)]
pub fn fence_proxy_async_shared() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.proxy.async.shared::cta;") };
}

/// `fence.mbarrier_init`: makes initialised mbarriers visible to the asynchronous proxy.
#[inline(always)]
pub fn fence_mbarrier_init() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.mbarrier_init.release.cluster;") };
}
