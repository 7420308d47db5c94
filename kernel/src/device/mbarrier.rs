//! mbarrier objects in shared memory (PTX ISA 8.6, "mbarrier").

use core::arch::asm;

use super::address::SharedAddress;
use super::cluster::{ClusterAddress, mapa};
use crate::shared::MBARRIER_BYTES;

/// An mbarrier object.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mbarrier(pub SharedAddress);

impl Mbarrier {
    /// `mbarrier.init`: a phase completes after `arrivals` arrivals and all bytes expected.
    ///
    /// # Safety
    /// Eight bytes of shared memory at the address are this barrier's, and nobody uses it yet.
    #[inline(always)]
    pub unsafe fn init(self, arrivals: u32) {
        // SAFETY: the caller's.
        unsafe { asm!("mbarrier.init.shared::cta.b64 [{0}], {1};", in(reg32) self.0.0, in(reg32) arrivals) };
    }

    /// The barrier `count` barriers further on.
    #[inline(always)]
    pub const fn offset(self, count: u32) -> Self {
        Self(self.0.offset(count * MBARRIER_BYTES))
    }

    /// `mbarrier.arrive`, release at CTA scope.
    #[inline(always)]
    pub fn arrive(self) {
        // SAFETY: an `Mbarrier` names an initialised object.
        unsafe { asm!("mbarrier.arrive.shared::cta.b64 _, [{0}];", in(reg32) self.0.0) };
    }

    /// The same barrier of CTA `cta` of the cluster.
    #[inline(always)]
    pub fn of(self, cta: u32) -> ClusterMbarrier {
        ClusterMbarrier(mapa(self.0, cta))
    }

    /// `mbarrier.arrive.expect_tx`: arrives, and the phase also waits for `bytes` bytes of bulk copies.
    #[inline(always)]
    pub fn arrive_expect_tx(self, bytes: u32) {
        // SAFETY: an `Mbarrier` names an initialised object.
        unsafe {
            asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};", in(reg32) self.0.0, in(reg32) bytes)
        };
    }

    /// `mbarrier.try_wait.parity`, acquire at cluster scope: whether the phase of this parity is complete.
    #[inline(always)]
    pub fn try_wait_cluster(self, parity: u32) -> bool {
        let complete: u32;
        // SAFETY: an `Mbarrier` names an initialised object.
        unsafe {
            asm!("{{",
                ".reg .pred complete;",
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [{1}], {2};",
                "selp.u32 {0}, 1, 0, complete;",
                "}}",
                out(reg32) complete, in(reg32) self.0.0, in(reg32) parity)
        };
        complete != 0
    }

    /// `mbarrier.try_wait.parity`, acquire at CTA scope: whether the phase of this parity is complete.
    #[inline(always)]
    pub fn try_wait(self, parity: u32) -> bool {
        let complete: u32;
        // SAFETY: an `Mbarrier` names an initialised object.
        unsafe {
            asm!("{{",
                ".reg .pred complete;",
                "mbarrier.try_wait.parity.shared::cta.b64 complete, [{1}], {2};",
                "selp.u32 {0}, 1, 0, complete;",
                "}}",
                out(reg32) complete, in(reg32) self.0.0, in(reg32) parity)
        };
        complete != 0
    }

    /// Waits for the phase of this parity. Only for what this cluster itself brings about: there is no deadline.
    #[inline(always)]
    pub fn wait(self, parity: u32) {
        while !self.try_wait(parity) {}
    }
}

/// An mbarrier object of a CTA of the cluster.
#[derive(Clone, Copy)]
pub struct ClusterMbarrier(pub ClusterAddress);

impl ClusterMbarrier {
    /// The barrier `count` barriers further on, in the same CTA.
    #[inline(always)]
    pub const fn offset(self, count: u32) -> Self {
        Self(self.0.offset(count * MBARRIER_BYTES))
    }

    /// `mbarrier.arrive`: says that this thread is done with reading. What it has written is not published: that would take a fence.
    #[inline(always)]
    pub fn arrive(self) {
        // SAFETY: a `ClusterMbarrier` names an initialised object.
        unsafe { asm!("mbarrier.arrive.shared::cluster.b64 _, [{0}];", in(reg32) self.0.0) };
    }

    /// `mbarrier.arrive`, release at cluster scope.
    #[inline(always)]
    pub fn arrive_release(self) {
        // SAFETY: a `ClusterMbarrier` names an initialised object.
        unsafe { asm!("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [{0}];", in(reg32) self.0.0) };
    }
}
