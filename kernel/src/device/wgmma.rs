//! The tensor-core product of a warpgroup (PTX ISA 8.6, "wgmma").

use core::arch::asm;

use super::address::SharedAddress;

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
    ($quads:literal, $shape:literal, $a:literal, $b:literal, $upper:literal, [$($i:literal)*]) => {
        impl MmaAsync for Accumulators<$quads> {
            #[inline(always)]
            unsafe fn mma_async(&mut self, a: MatrixDescriptor, b: MatrixDescriptor) {
                // SAFETY: the caller's.
                unsafe {
                    asm!(
                        "{{",
                        ".reg .b64 a, b;",
                        concat!("mov.b64 a, {{{", $a, "}, {", $upper, "}}};"),
                        concat!("mov.b64 b, {{{", $b, "}, {", $upper, "}}};"),
                        concat!(
                            "wgmma.mma_async.sync.aligned.", $shape, ".f32.bf16.bf16 {{", mma_async!(@list $($i)*),
                            "}}, a, b, 1, 1, 1, 0, 0;"
                        ),
                        "}}",
                        $(inout(reg32) self[$i / 4][$i % 4],)*
                        in(reg32) a.0,
                        in(reg32) b.0,
                        in(reg32) MatrixDescriptor::UPPER,
                    )
                };
            }
        }
    };
    (@list $first:literal $($i:literal)*) => { concat!("{", $first, "}" $(, ", {", $i, "}")*) };
}

mma_async!(1, "m64n8k16", 4, 5, 6, [
    0 1 2 3
]);
mma_async!(2, "m64n16k16", 8, 9, 10, [
    0 1 2 3 4 5 6 7
]);
mma_async!(4, "m64n32k16", 16, 17, 18, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
]);
mma_async!(8, "m64n64k16", 32, 33, 34, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
]);
mma_async!(12, "m64n96k16", 48, 49, 50, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47
]);
mma_async!(16, "m64n128k16", 64, 65, 66, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
]);
mma_async!(20, "m64n160k16", 80, 81, 82, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
    64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79
]);
mma_async!(24, "m64n192k16", 96, 97, 98, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
    64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95
]);
mma_async!(28, "m64n224k16", 112, 113, 114, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
    64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95
    96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111
]);
mma_async!(32, "m64n256k16", 128, 129, 130, [
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
    64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95
    96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126 127
]);
