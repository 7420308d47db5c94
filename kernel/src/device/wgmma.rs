//! The tensor-core product of a warpgroup (PTX ISA 8.6, "wgmma").

use core::arch::asm;

use super::address::SharedAddress;
use super::warp::shfl_idx;

/// The lower half of a shared-memory matrix descriptor: K-major rows of 128 bytes with the 128-byte swizzle, groups of eight rows 1024 bytes
/// apart (PTX ISA 8.6, "wgmma matrix descriptor"). The upper half is the same for all.
#[derive(Clone, Copy)]
pub struct MatrixDescriptor(u32);

impl MatrixDescriptor {
    /// The upper half: 128-byte swizzle, and the stride of 1024 bytes.
    const UPPER: u32 = 1 << 30 | 1024 >> 4;
    // The leading dimension's offset is not used for swizzled K-major operands; 1 is its documented value.
    const LEADING: u32 = 1 << 16;

    /// The matrix at `address`, which is 1024-byte aligned.
    #[inline(always)]
    pub fn new(address: SharedAddress) -> Self {
        Self(Self::LEADING | (address.0 & 0x3_ffff) >> 4)
    }

    /// The same, known to be so in all lanes: ptxas keeps it in a uniform register, which wgmma takes it from.
    #[inline(always)]
    pub fn uniform(self) -> Self {
        Self(shfl_idx(self.0, 0))
    }

    /// The matrix `bytes` further on: another one, or within a swizzle row.
    #[inline(always)]
    pub const fn offset(self, bytes: u32) -> Self {
        Self(self.0 + (bytes >> 4))
    }
}

/// `wgmma.fence.sync.aligned`.
#[inline(always)]
pub fn wgmma_fence() {
    // SAFETY: orders accesses to registers.
    unsafe { asm!("wgmma.fence.sync.aligned;") };
}

/// `wgmma.commit_group.sync.aligned`.
#[inline(always)]
pub fn wgmma_commit_group() {
    // SAFETY: closes the group.
    unsafe { asm!("wgmma.commit_group.sync.aligned;") };
}

/// `wgmma.wait_group.sync.aligned N`: all but the last `N` groups are complete.
#[inline(always)]
pub fn wgmma_wait_group<const N: u32>() {
    // SAFETY: waits.
    unsafe { asm!("wgmma.wait_group.sync.aligned {0};", const N) };
}

/// The f32 accumulators of one thread: a quad for every eight tokens. Rows `lane / 4` (first two values) and `lane / 4 + 8`
/// (last two) of the warp's sixteen, columns `2 * (lane % 4)` and the next (PTX ISA 8.6, "wgmma register fragments").
pub type Accumulators<const QUADS: usize> = [[f32; 4]; QUADS];

/// A width of the product.
pub trait MmaAsync {
    /// `wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16`: adds the product of two K-major matrices.
    ///
    /// # Safety
    /// The matrices lie in shared memory, visible to the asynchronous proxy, and stay until the group was waited for; until then nobody touches the accumulators.
    unsafe fn mma_async(&mut self, a: MatrixDescriptor, b: MatrixDescriptor);
}

macro_rules! mma_async {
    ($quads:literal, $shape:literal, [$($quad:literal)*]) => {
        impl MmaAsync for Accumulators<$quads> {
            #[inline(always)]
            unsafe fn mma_async(&mut self, a: MatrixDescriptor, b: MatrixDescriptor) {
                // SAFETY: the caller's.
                unsafe {
                    asm!(
                        "{{",
                        ".reg .b64 a, b;",
                        "mov.b64 a, {{{}, {upper}}};",
                        "mov.b64 b, {{{}, {upper}}};",
                        concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.bf16.bf16 {{", mma_async!(@list $($quad)*), "}}, a, b, 1, 1, 1, 0, 0;"),
                        "}}",
                        in(reg32) a.0,
                        in(reg32) b.0,
                        $(
                            inout(reg32) self[$quad][0],
                            inout(reg32) self[$quad][1],
                            inout(reg32) self[$quad][2],
                            inout(reg32) self[$quad][3],
                        )*
                        upper = in(reg32) MatrixDescriptor::UPPER,
                    )
                };
            }
        }
    };
    (@list $first:literal $($quad:literal)*) => { concat!("{}, {}, {}, {}" $(, mma_async!(@further $quad))*) };
    (@further $quad:literal) => { ", {}, {}, {}, {}" };
}

mma_async!(1, "m64n8k16", [0]);
mma_async!(2, "m64n16k16", [0 1]);
mma_async!(4, "m64n32k16", [0 1 2 3]);
mma_async!(8, "m64n64k16", [0 1 2 3 4 5 6 7]);
mma_async!(12, "m64n96k16", [0 1 2 3 4 5 6 7 8 9 10 11]);
mma_async!(16, "m64n128k16", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
mma_async!(20, "m64n160k16", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19]);
mma_async!(24, "m64n192k16", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23]);
mma_async!(28, "m64n224k16", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27]);
mma_async!(32, "m64n256k16", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31]);
