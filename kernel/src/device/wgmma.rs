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

/// Products of bf16.
pub trait Bf16Product {
    /// `wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16`: adds the product of two K-major matrices.
    ///
    /// # Safety
    /// The matrices lie in shared memory, visible to the asynchronous proxy, and stay until the group was waited for; until then nobody touches the accumulators.
    unsafe fn mma_async(&mut self, a: MatrixDescriptor, b: MatrixDescriptor);
}

/// Products of e4m3. The tensor cores keep about 14 bits of a sum, so that sums over many columns must be made elsewhere.
pub trait E4m3Product: Sized {
    /// `wgmma.mma_async.sync.aligned.m64nNk32.f32.e4m3.e4m3`: adds the product of two K-major matrices.
    ///
    /// # Safety
    /// As for [`Bf16Product::mma_async`].
    unsafe fn mma_async(&mut self, a: MatrixDescriptor, b: MatrixDescriptor);

    /// The same, with nothing to add to: scale-d is 0.
    ///
    /// # Safety
    /// As for [`Bf16Product::mma_async`].
    unsafe fn start_mma_async(a: MatrixDescriptor, b: MatrixDescriptor) -> Self;

    /// `wgmma.wait_group.sync.aligned 0`: all groups are complete. These accumulators are not looked at before.
    fn wait(&mut self);
}

macro_rules! mma_async {
    ($quads:literal, $columns:literal, [$($quad:literal)*]) => {
        impl Bf16Product for Accumulators<$quads> {
            #[inline(always)]
            unsafe fn mma_async(&mut self, a: MatrixDescriptor, b: MatrixDescriptor) {
                mma_async!(@product inout, self, a, b, [$($quad)*], concat!("m64n", $columns, "k16.f32.bf16.bf16"), "1, 1, 1, 0, 0");
            }
        }

        impl E4m3Product for Accumulators<$quads> {
            #[inline(always)]
            unsafe fn mma_async(&mut self, a: MatrixDescriptor, b: MatrixDescriptor) {
                mma_async!(@product inout, self, a, b, [$($quad)*], concat!("m64n", $columns, "k32.f32.e4m3.e4m3"), "1, 1, 1");
            }

            #[inline(always)]
            unsafe fn start_mma_async(a: MatrixDescriptor, b: MatrixDescriptor) -> Self {
                // SAFETY: zeros are valid f32.
                let mut d: Self = unsafe { core::mem::zeroed() };
                mma_async!(@product out, d, a, b, [$($quad)*], concat!("m64n", $columns, "k32.f32.e4m3.e4m3"), "0, 1, 1");
                d
            }

            #[inline(always)]
            fn wait(&mut self) {
                // SAFETY: waits. The comment names the accumulators, so that no use of them comes before.
                unsafe {
                    asm!(
                        "wgmma.wait_group.sync.aligned 0;",
                        concat!("// ", mma_async!(@list $($quad)*)),
                        $(
                            inout(reg32) self[$quad][0],
                            inout(reg32) self[$quad][1],
                            inout(reg32) self[$quad][2],
                            inout(reg32) self[$quad][3],
                        )*
                    )
                };
            }
        }
    };
    (@product $direction:ident, $d:ident, $a:ident, $b:ident, [$($quad:literal)*], $shape:expr, $scales:literal) => {
        // SAFETY: the caller's.
        unsafe {
            asm!(
                "{{",
                ".reg .b64 a, b;",
                "mov.b64 a, {{{a}, {upper}}};",
                "mov.b64 b, {{{b}, {upper}}};",
                concat!("wgmma.mma_async.sync.aligned.", $shape, " {{", mma_async!(@list $($quad)*), "}}, a, b, ", $scales, ";"),
                "}}",
                $(
                    $direction(reg32) $d[$quad][0],
                    $direction(reg32) $d[$quad][1],
                    $direction(reg32) $d[$quad][2],
                    $direction(reg32) $d[$quad][3],
                )*
                a = in(reg32) $a.0,
                b = in(reg32) $b.0,
                upper = in(reg32) MatrixDescriptor::UPPER,
            )
        };
    };
    (@list $first:literal $($quad:literal)*) => { concat!("{}, {}, {}, {}" $(, mma_async!(@further $quad))*) };
    (@further $quad:literal) => { ", {}, {}, {}, {}" };
}

mma_async!(1, "8", [0]);
mma_async!(2, "16", [0 1]);
mma_async!(4, "32", [0 1 2 3]);
mma_async!(8, "64", [0 1 2 3 4 5 6 7]);
mma_async!(12, "96", [0 1 2 3 4 5 6 7 8 9 10 11]);
mma_async!(16, "128", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
mma_async!(20, "160", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19]);
mma_async!(24, "192", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23]);
mma_async!(28, "224", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27]);
mma_async!(32, "256", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31]);
