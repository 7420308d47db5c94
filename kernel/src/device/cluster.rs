//! Clusters: CTAs that run side by side and reach each other's shared memory (PTX ISA 8.6, "cluster").

use core::arch::asm;

use super::address::SharedAddress;

/// A byte address in the shared memory of a CTA of the cluster (the `shared::cluster` window).
#[derive(Clone, Copy)]
pub struct ClusterAddress(pub u32);

impl ClusterAddress {
    /// The address `bytes` further on, in the same CTA.
    #[inline(always)]
    pub const fn offset(self, bytes: u32) -> Self {
        Self(self.0 + bytes)
    }

    /// `st.shared::cluster.v4.u32`.
    ///
    /// # Safety
    /// The address is 16-byte aligned, in bounds of a CTA that has not ended, and no other thread touches it at the same time.
    #[inline(always)]
    pub unsafe fn store_v4(self, [a, b, c, d]: [u32; 4]) {
        // SAFETY: the caller's.
        unsafe {
            asm!("st.shared::cluster.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};",
                in(reg32) self.0, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d)
        };
    }
}

/// `%cluster_ctarank`.
#[inline(always)]
pub fn cluster_cta() -> u32 {
    let rank: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem)) };
    rank
}

/// `%cluster_nctarank`.
#[inline(always)]
pub fn cluster_ctas() -> u32 {
    let ctas: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %cluster_nctarank;", out(reg32) ctas, options(pure, nomem)) };
    ctas
}

/// `mapa.shared::cluster.u32`: the same place in the shared memory of CTA `cta` of the cluster.
#[inline(always)]
pub fn mapa(address: SharedAddress, cta: u32) -> ClusterAddress {
    let mapped: u32;
    // SAFETY: computes an address.
    unsafe {
        asm!("mapa.shared::cluster.u32 {0}, {1}, {2};",
            out(reg32) mapped, in(reg32) address.0, in(reg32) cta, options(pure, nomem))
    };
    ClusterAddress(mapped)
}

/// `barrier.cluster.arrive` (release) and `barrier.cluster.wait` (acquire): waits for all threads of all CTAs of the cluster.
#[inline(always)]
pub fn barrier_cluster() {
    // SAFETY: synchronises, and touches no memory.
    unsafe {
        asm!("barrier.cluster.arrive.release.aligned;");
        asm!("barrier.cluster.wait.acquire.aligned;");
    }
}
