//! Bulk copies: `cp.async.bulk` and its tensor form (PTX ISA 8.6, "cp.async.bulk").

use core::arch::asm;

use super::address::SharedAddress;
use super::mbarrier::Mbarrier;
use crate::params::TensorMap;

/// `cp.async.bulk` from global (or a peer's) to shared memory; completes `bytes` on `full`.
///
/// # Safety
/// Both ranges are in bounds and 16-byte aligned, `bytes` is a multiple of 16, and nobody touches the destination until the barrier's phase is complete.
#[inline(always)]
pub unsafe fn bulk_load(destination: SharedAddress, source: *const u8, bytes: u32, full: Mbarrier) {
    // SAFETY: the caller's.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}], {2}, [{3}];",
            in(reg32) destination.0, in(reg64) source, in(reg32) bytes, in(reg32) full.0.0)
    };
}

/// `cp.async.bulk` from shared to global memory, in the current bulk group.
///
/// # Safety
/// Both ranges are in bounds and 16-byte aligned, `bytes` is a multiple of 16, and nobody writes the source until the group was read.
#[inline(always)]
pub unsafe fn bulk_store(destination: *mut u8, source: SharedAddress, bytes: u32) {
    // SAFETY: the caller's.
    unsafe {
        asm!("cp.async.bulk.global.shared::cta.bulk_group [{0}], [{1}], {2};",
            in(reg64) destination, in(reg32) source.0, in(reg32) bytes)
    };
}

/// `cp.async.bulk.tensor.2d` from global to shared memory; completes the box's bytes on `full`.
///
/// # Safety
/// `map` is a valid 2-d tensor map, the destination holds its box, and nobody touches it until the barrier's phase is complete.
#[inline(always)]
pub unsafe fn tensor_load_2d(destination: SharedAddress, map: *const TensorMap, [x, y]: [u32; 2], full: Mbarrier) {
    // SAFETY: the caller's.
    unsafe {
        asm!("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{0}], [{1}, {{{2}, {3}}}], [{4}];",
            in(reg32) destination.0, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) full.0.0)
    };
}

/// `cp.async.bulk.tensor.2d.multicast::cluster` from global to the shared memory of every CTA of the cluster in `ctas` (a bit each), at the
/// same place in all; completes the box's bytes on each one's `full`.
///
/// # Safety
/// As for [`tensor_load_2d`], in each of these CTAs.
#[inline(always)]
pub unsafe fn tensor_load_2d_multicast(
    destination: SharedAddress,
    map: *const TensorMap,
    [x, y]: [u32; 2],
    full: Mbarrier,
    ctas: u16,
) {
    // SAFETY: the caller's.
    unsafe {
        asm!("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [{0}], [{1}, {{{2}, {3}}}], [{4}], {5};",
            in(reg32) destination.0, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) full.0.0, in(reg16) ctas)
    };
}

/// `cp.async.bulk.tensor.3d` from global to shared memory; completes the box's bytes on `full`.
///
/// # Safety
/// As for [`tensor_load_2d`], with a 3-d map.
#[inline(always)]
pub unsafe fn tensor_load_3d(destination: SharedAddress, map: *const TensorMap, [x, y, z]: [u32; 3], full: Mbarrier) {
    // SAFETY: the caller's.
    unsafe {
        asm!("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{0}], [{1}, {{{2}, {3}, {4}}}], [{5}];",
            in(reg32) destination.0, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) z, in(reg32) full.0.0)
    };
}

/// [`tensor_load_3d`] of what leaves the L2 cache first.
///
/// # Safety
/// As for [`tensor_load_3d`].
#[inline(always)]
pub unsafe fn tensor_load_3d_evict_first(
    destination: SharedAddress,
    map: *const TensorMap,
    [x, y, z]: [u32; 3],
    full: Mbarrier,
) {
    // SAFETY: the caller's.
    unsafe {
        asm!("{{",
            ".reg .b64 policy;",
            "createpolicy.fractional.L2::evict_first.b64 policy;",
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [{0}], [{1}, {{{2}, {3}, {4}}}], [{5}], policy;",
            "}}",
            in(reg32) destination.0, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) z, in(reg32) full.0.0)
    };
}

/// `cp.async.bulk.commit_group`.
#[inline(always)]
pub fn bulk_commit_group() {
    // SAFETY: closes this thread's bulk group.
    unsafe { asm!("cp.async.bulk.commit_group;") };
}

/// `cp.async.bulk.wait_group N`: all but the last `N` groups of this thread are complete and visible to it.
#[inline(always)]
pub fn bulk_wait_group<const N: u32>() {
    // SAFETY: waits.
    unsafe { asm!("cp.async.bulk.wait_group {0};", const N) };
}

/// `cp.async.bulk.wait_group.read N`: all but the last `N` groups of this thread have read their sources.
#[inline(always)]
pub fn bulk_wait_group_read<const N: u32>() {
    // SAFETY: waits.
    unsafe { asm!("cp.async.bulk.wait_group.read {0};", const N) };
}

/// `prefetch.tensormap`.
///
/// # Safety
/// `map` is a tensor map in global memory.
#[inline(always)]
pub unsafe fn prefetch_tensormap(map: *const TensorMap) {
    // SAFETY: the caller's.
    unsafe { asm!("prefetch.tensormap [{0}];", in(reg64) map) };
}
