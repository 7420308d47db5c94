//! The inner loops: operands as f32 in the order in which the accumulator's registers need them.
//!
//! The accumulator stays as the instruction lays it out, `d[register][thread]`. Four threads that follow each other
//! hold one row and the columns 0, 2, 4 and 6 (or 1, 3, 5, 7) of a block of 8, so both operands are stored per group of
//! four: A's element once for each thread, B's columns in that order. Operands of 8 bits come with their exponents in the
//! same order, for [`accumulate_aligned`].

use super::descriptor::Chunk;
use super::{FP8_FRACTION_BITS, Major, OperandType, THREADS};
use crate::convert::arithmetic::CANONICAL_NAN_F32;
use std::cell::RefCell;

/// Largest k: 32 bytes of 8-bit elements.
const MAX_K: usize = 32;
const MAX_N: usize = 256;

/// Both operands of one instruction, as f32.
pub struct Operands {
    pub left: LeftOperand,
    pub right: RightOperand,
}

/// Runs `body` with buffers that hold the operands of some earlier instruction: storing an operand overwrites all that
/// its own product reads.
pub fn with_operands<T>(body: impl FnOnce(&mut Operands) -> T) -> T {
    thread_local! {
        static BUFFERS: RefCell<Operands> = RefCell::new(Operands {
            left: LeftOperand {
                rows: Box::new([[[0.0; THREADS]; 2]; MAX_K]),
                exponents: Box::new([[[0; THREADS]; 2]; MAX_K]),
            },
            right: RightOperand {
                columns: Box::new([[[[0.0; 4]; 2]; MAX_N / 8]; MAX_K]),
                exponents: Box::new([[[[0; 4]; 2]; MAX_N / 8]; MAX_K]),
            },
        });
    }
    BUFFERS.with_borrow_mut(body)
}

/// A as `rows[k][half][thread]`: the element at k of the row that `thread` holds in the upper or lower 8 rows of its
/// warp's 16.
pub struct LeftOperand {
    rows: Box<[[[f32; THREADS]; 2]; MAX_K]>,
    /// What [`exponent`] gives for each of them, where they have 8 bits.
    exponents: Box<[[[u8; THREADS]; 2]; MAX_K]>,
}

/// B as `columns[k][block][odd][i]`: the element at k of column `8 * block + 2 * i + odd`.
pub struct RightOperand {
    columns: Box<[[Block<f32>; MAX_N / 8]; MAX_K]>,
    /// What [`exponent`] gives for each of them, where they have 8 bits.
    exponents: Box<[[Block<u8>; MAX_N / 8]; MAX_K]>,
}

type Block<T> = [[T; 4]; 2];

/// Converts chunks to f32.
#[derive(Clone, Copy)]
pub struct Decoder {
    pub operand: OperandType,
    pub negate: bool,
}

impl Decoder {
    /// The elements of 16 bytes, in order; 4, 8 or 16 of them.
    #[inline(always)]
    fn decode(self, bytes: &[u8; 16]) -> ([f32; 16], usize) {
        let mut values = [0f32; 16];
        let numeric = self.operand.numeric();
        match self.operand {
            OperandType::Bf16 => {
                for (value, pair) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_bits((u16::from_le_bytes(*pair) as u32) << 16);
                }
            }
            OperandType::F16 => {
                for (value, pair) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = numeric.to_f32(u16::from_le_bytes(*pair) as u32);
                }
            }
            OperandType::Tf32 => {
                for (value, word) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = numeric.to_f32(u32::from_le_bytes(*word));
                }
            }
            OperandType::E4m3 | OperandType::E5m2 => {
                let table = byte_table(self.operand);
                for (value, &byte) in values.iter_mut().zip(bytes) {
                    *value = table.values[byte as usize];
                }
            }
        }
        if self.negate {
            values = values.map(|x| -x);
        }
        (values, 16 / self.operand.bytes())
    }

    /// The exponents of 16 elements of 8 bits; `None` of wider ones.
    #[inline(always)]
    fn exponents(self, bytes: &[u8; 16]) -> Option<[u8; 16]> {
        let table = match self.operand {
            OperandType::E4m3 | OperandType::E5m2 => byte_table(self.operand),
            _ => return None,
        };
        Some(bytes.map(|byte| table.exponents[byte as usize]))
    }
}

/// The values of all bytes of an 8-bit type, and their exponents.
struct ByteTable {
    values: [f32; 256],
    exponents: [u8; 256],
}

/// The table of an 8-bit type.
fn byte_table(operand: OperandType) -> &'static ByteTable {
    use std::sync::LazyLock;
    static E4M3: LazyLock<ByteTable> = LazyLock::new(|| all_bytes(OperandType::E4m3));
    static E5M2: LazyLock<ByteTable> = LazyLock::new(|| all_bytes(OperandType::E5m2));
    if operand == OperandType::E4m3 { &E4M3 } else { &E5M2 }
}

fn all_bytes(operand: OperandType) -> ByteTable {
    ByteTable {
        values: std::array::from_fn(|byte| operand.numeric().to_f32(byte as u32)),
        exponents: std::array::from_fn(|byte| exponent(operand, byte as u8)),
    }
}

/// What [`exponent`] adds to the exponent of a number that is not 0: more than any of them, so that only a sum for two such
/// numbers has [`NOT_ZERO`] in it.
const EXPONENT_BIAS: i32 = 96;
/// The bit of a sum of two biased exponents, of numbers that are not 0.
const NOT_ZERO: u8 = 0x80;

/// The biased exponent of an 8-bit number: of a subnormal one the least that there is, as its significand is not
/// normalised; 0 of zero.
fn exponent(operand: OperandType, byte: u8) -> u8 {
    let (mantissa_bits, bias) = if operand == OperandType::E4m3 { (3, 7) } else { (2, 15) };
    match byte & 0x7F {
        0 => 0,
        bits => (i32::from(bits >> mantissa_bits).max(1) - bias + EXPONENT_BIAS) as u8,
    }
}

impl LeftOperand {
    #[inline(always)]
    pub fn store(&mut self, decoder: Decoder, chunk: Chunk, bytes: &[u8; 16]) {
        let place = |row: usize| (row / 8 % 2, row / 16 * 32 + row % 8 * 4);
        let (values, count) = decoder.decode(bytes);
        match chunk.major {
            Major::K => {
                let (half, thread) = place(chunk.row);
                for (rows, x) in self.rows[chunk.k..][..count].iter_mut().zip(values) {
                    rows[half][thread..thread + 4].fill(x);
                }
                if let Some(exponents) = decoder.exponents(bytes) {
                    for (rows, x) in self.exponents[chunk.k..][..count].iter_mut().zip(exponents) {
                        rows[half][thread..thread + 4].fill(x);
                    }
                }
            }
            Major::MN => {
                for (i, &x) in values[..count].iter().enumerate() {
                    let (half, thread) = place(chunk.row + i);
                    self.rows[chunk.k][half][thread..thread + 4].fill(x);
                }
            }
        }
    }

    /// A in registers: register `r` of thread `t` holds row `16 * (t / 32) + t % 32 / 4 + 8 * (r % 2)` and the 4 bytes of
    /// k from byte `16 * (r / 2) + 4 * (t % 4)` on.
    pub fn store_registers(&mut self, decoder: Decoder, registers: &[[u32; THREADS]; 4]) {
        for (r, threads) in registers.iter().enumerate() {
            for (quad, words) in threads.as_chunks::<4>().0.iter().enumerate() {
                let row = quad / 8 * 16 + quad % 8 + r % 2 * 8;
                let k = r / 2 * 16 / decoder.operand.bytes();
                let bytes = bytemuck::cast(words.map(u32::to_le));
                self.store(decoder, Chunk { row, k, major: Major::K, address: 0 }, &bytes);
            }
        }
    }
}

impl RightOperand {
    #[inline(always)]
    pub fn store(&mut self, decoder: Decoder, chunk: Chunk, bytes: &[u8; 16]) {
        let (values, count) = decoder.decode(bytes);
        let (block, column) = (chunk.row / 8, chunk.row % 8);
        match chunk.major {
            Major::K => {
                for (blocks, x) in self.columns[chunk.k..][..count].iter_mut().zip(values) {
                    blocks[block][column % 2][column / 2] = x;
                }
                if let Some(exponents) = decoder.exponents(bytes) {
                    for (blocks, x) in self.exponents[chunk.k..][..count].iter_mut().zip(exponents) {
                        blocks[block][column % 2][column / 2] = x;
                    }
                }
            }
            // A chunk of a 16-bit type is a whole block.
            Major::MN => {
                for (i, &x) in values[..count].iter().enumerate() {
                    self.columns[chunk.k][block][i % 2][i / 2] = x;
                }
            }
        }
    }
}

/// `d += left * right` over `depth` values of k in order, each product and each sum rounded on its own.
///
/// Neither the width of the vectors nor the instruction set changes a result.
pub fn accumulate(left: &LeftOperand, right: &RightOperand, depth: usize, d: &mut [[f32; THREADS]]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has AVX-512F.
            return unsafe { x86::accumulate_avx512(left, right, depth, d) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            return unsafe { x86::accumulate_avx2(left, right, depth, d) };
        }
    }
    // SAFETY: an array needs no CPU feature.
    unsafe { accumulate_blocks::<[f32; 4]>(left, right, depth, d) }
}

/// `d += left * right` for operands of 8 bits as Hopper's tensor cores have it: of the `depth` products of each element, and of
/// its old value, what is below `FP8_FRACTION_BITS` bits behind the point is cut off, once all are aligned to the largest
/// exponent among them. What is left is added without any rounding. With `cut`, the sum too keeps that many bits behind its
/// leading one, and no more.
///
/// Neither the width of the vectors nor the instruction set changes a result: all sums are of whole numbers below 2^24.
pub fn accumulate_aligned(left: &LeftOperand, right: &RightOperand, depth: usize, cut: bool, d: &mut [[f32; THREADS]]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the CPU has AVX-512F and AVX-512BW.
            return unsafe { x86::accumulate_aligned_avx512(left, right, depth, cut, d) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            return unsafe { x86::accumulate_aligned_avx2(left, right, depth, cut, d) };
        }
    }
    // SAFETY: an array needs no CPU feature.
    unsafe { aligned_blocks::<[f32; 4]>(left, right, depth, cut, d) }
}

/// A vector of f32, one per thread.
///
/// # Safety
/// The functions may be called only on a CPU with the instruction set that the implementation names.
unsafe trait Lanes: Copy {
    const COUNT: usize;

    /// The first `COUNT` elements; panics if there are fewer.
    unsafe fn load(from: &[f32]) -> Self;
    /// Writes the first `COUNT` elements; panics if there are fewer.
    unsafe fn store(self, to: &mut [f32]);
    /// The four values again and again.
    unsafe fn repeat(four: &[f32; 4]) -> Self;
    /// `self + a * b`, both rounded.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// `self` and the whole part of `a * b * scale`, whose first product must be exact.
    unsafe fn add_whole_product(self, a: Self, b: Self, scale: Self) -> Self;
    /// With the canonical NaN in place of any other, which hosts choose differently.
    unsafe fn canonical(self) -> Self;
}

// SAFETY: needs no instruction set.
unsafe impl Lanes for [f32; 4] {
    const COUNT: usize = 4;

    #[inline(always)]
    unsafe fn load(from: &[f32]) -> Self {
        [from[0], from[1], from[2], from[3]]
    }

    #[inline(always)]
    unsafe fn store(self, to: &mut [f32]) {
        to[..4].copy_from_slice(&self);
    }

    #[inline(always)]
    unsafe fn repeat(four: &[f32; 4]) -> Self {
        *four
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn add_whole_product(self, a: Self, b: Self, scale: Self) -> Self {
        std::array::from_fn(|i| self[i] + (a[i] * b[i] * scale[i]).trunc())
    }

    #[inline(always)]
    unsafe fn canonical(self) -> Self {
        self.map(|x| if x.is_nan() { CANONICAL_NAN_F32 } else { x })
    }
}

/// [`accumulate`] with vectors `V`.
///
/// # Safety
/// The CPU has the instruction set of `V`.
#[inline(always)]
unsafe fn accumulate_blocks<V: Lanes>(
    left: &LeftOperand,
    right: &RightOperand,
    depth: usize,
    d: &mut [[f32; THREADS]],
) {
    let mut block = 0;
    // Two blocks at a time are enough independent sums to hide the latency of an addition.
    let mut pairs = d.chunks_exact_mut(8);
    for registers in &mut pairs {
        // SAFETY: as the caller promises.
        unsafe { accumulate_registers::<V, 2>(left, right, depth, block, registers) };
        block += 2;
    }
    for registers in pairs.into_remainder().chunks_exact_mut(4) {
        // SAFETY: as the caller promises.
        unsafe { accumulate_registers::<V, 1>(left, right, depth, block, registers) };
        block += 1;
    }
}

/// The registers of `BLOCKS` blocks of 8 columns, the first being `block`.
///
/// # Safety
/// The CPU has the instruction set of `V`.
#[inline(always)]
unsafe fn accumulate_registers<V: Lanes, const BLOCKS: usize>(
    left: &LeftOperand,
    right: &RightOperand,
    depth: usize,
    block: usize,
    registers: &mut [[f32; THREADS]],
) {
    for thread in (0..THREADS).step_by(V::COUNT) {
        // SAFETY: as the caller promises.
        unsafe {
            // Of four registers, 0 and 1 are columns of the upper rows, 2 and 3 of the lower ones.
            let mut sums: [[V; 4]; BLOCKS] =
                std::array::from_fn(|b| std::array::from_fn(|r| V::load(&registers[4 * b + r][thread..])));
            for (rows, columns) in left.rows[..depth].iter().zip(&right.columns[..depth]) {
                let upper = V::load(&rows[0][thread..]);
                let lower = V::load(&rows[1][thread..]);
                for (sum, [even, odd]) in sums.iter_mut().zip(&columns[block..block + BLOCKS]) {
                    let (even, odd) = (V::repeat(even), V::repeat(odd));
                    sum[0] = sum[0].add_product(upper, even);
                    sum[1] = sum[1].add_product(upper, odd);
                    sum[2] = sum[2].add_product(lower, even);
                    sum[3] = sum[3].add_product(lower, odd);
                }
            }
            for (b, sum) in sums.iter().enumerate() {
                for (r, sum) in sum.iter().enumerate() {
                    sum.canonical().store(&mut registers[4 * b + r][thread..]);
                }
            }
        }
    }
}

/// [`accumulate_aligned`] with vectors `V`.
///
/// # Safety
/// The CPU has the instruction set of `V`.
#[inline(always)]
unsafe fn aligned_blocks<V: Lanes>(
    left: &LeftOperand,
    right: &RightOperand,
    depth: usize,
    cut: bool,
    d: &mut [[f32; THREADS]],
) {
    for (block, registers) in d.chunks_exact_mut(4).enumerate() {
        let mut units = [const { Units { scale: [1.0; THREADS], old: [0.0; THREADS] } }; 4];
        // Loops and not closures, which would not have the caller's instruction set.
        for (r, units) in units.iter_mut().enumerate() {
            units.set(&largest_exponents(left, right, depth, block, r), &registers[r]);
        }
        for thread in (0..THREADS).step_by(V::COUNT) {
            // SAFETY: as the caller promises.
            unsafe {
                let scales: [V; 4] = std::array::from_fn(|r| V::load(&units[r].scale[thread..]));
                // The old value is an addend like all others.
                let mut sums: [V; 4] = std::array::from_fn(|r| V::load(&units[r].old[thread..]));
                for (rows, columns) in left.rows[..depth].iter().zip(&right.columns[..depth]) {
                    let upper = V::load(&rows[0][thread..]);
                    let lower = V::load(&rows[1][thread..]);
                    let [even, odd] = &columns[block];
                    let (even, odd) = (V::repeat(even), V::repeat(odd));
                    sums[0] = sums[0].add_whole_product(upper, even, scales[0]);
                    sums[1] = sums[1].add_whole_product(upper, odd, scales[1]);
                    sums[2] = sums[2].add_whole_product(lower, even, scales[2]);
                    sums[3] = sums[3].add_whole_product(lower, odd, scales[3]);
                }
                for (sum, register) in sums.iter().zip(&mut *registers) {
                    sum.store(&mut register[thread..]);
                }
            }
        }
        for (units, register) in units.iter().zip(registers) {
            units.finish(cut, register);
        }
    }
}

/// For each thread the largest of the biased exponents (EXPONENT_BIAS twice) of the products of register `4 * block + r`, with
/// the bit [`NOT_ZERO`]; without it if all products are 0.
#[inline(always)]
fn largest_exponents(left: &LeftOperand, right: &RightOperand, depth: usize, block: usize, r: usize) -> [u8; THREADS] {
    let mut largest = [0u8; THREADS];
    for (rows, columns) in left.exponents[..depth].iter().zip(&right.exponents[..depth]) {
        let columns: [u8; 64] = bytemuck::cast([u32::from_ne_bytes(columns[block][r % 2]); 16]);
        for (half, rows) in largest.as_chunks_mut::<64>().0.iter_mut().zip(rows[r / 2].as_chunks::<64>().0) {
            for ((largest, x), y) in half.iter_mut().zip(rows).zip(&columns) {
                *largest = (*largest).max(x.wrapping_add(*y));
            }
        }
    }
    largest
}

/// What the addends of a register's elements are counted in.
struct Units {
    /// Units in 1: a power of two.
    scale: [f32; THREADS],
    /// The old values, in whole units.
    old: [f32; THREADS],
}

impl Units {
    /// The least bit that is kept, by the largest exponents of the products (see [`largest_exponents`]) and the old values.
    #[inline(always)]
    fn set(&mut self, products: &[u8; THREADS], old: &[f32; THREADS]) {
        for thread in 0..THREADS {
            let (largest, old) = (products[thread], old[thread]);
            let of_old = (old.to_bits() >> 23 & 0xFF) as i32 - 127;
            // Infinity and NaN, whose unit does not matter, have exponent 128.
            let exponent = (i32::from(largest) - 2 * EXPONENT_BIAS).max(of_old).min(127);
            let scale = f32::from_bits(((FP8_FRACTION_BITS - exponent + 127) as u32) << 23);
            // Where all products are 0 the old value is alone; what it keeps is decided at the end.
            let alone = largest & NOT_ZERO == 0;
            self.scale[thread] = if alone { 1.0 } else { scale };
            self.old[thread] = if alone { old } else { (old * scale).trunc() };
        }
    }

    /// Makes values of `sums` in units; with `cut`, of [`FP8_FRACTION_BITS`] bits.
    #[inline(always)]
    fn finish(&self, cut: bool, sums: &mut [f32; THREADS]) {
        let kept = if cut { u32::MAX << (23 - FP8_FRACTION_BITS) } else { u32::MAX };
        for (sum, scale) in sums.iter_mut().zip(&self.scale) {
            let value = *sum / scale + 0.0;
            *sum = if value.is_nan() { CANONICAL_NAN_F32 } else { f32::from_bits(value.to_bits() & kept) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CANONICAL_NAN_F32, Lanes, LeftOperand, RightOperand, THREADS, accumulate_blocks, aligned_blocks};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub fn accumulate_avx512(left: &LeftOperand, right: &RightOperand, depth: usize, d: &mut [[f32; THREADS]]) {
        // SAFETY: this function's target feature.
        unsafe { accumulate_blocks::<__m512>(left, right, depth, d) }
    }

    #[target_feature(enable = "avx2")]
    pub fn accumulate_avx2(left: &LeftOperand, right: &RightOperand, depth: usize, d: &mut [[f32; THREADS]]) {
        // SAFETY: this function's target feature.
        unsafe { accumulate_blocks::<__m256>(left, right, depth, d) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn accumulate_aligned_avx512(
        left: &LeftOperand,
        right: &RightOperand,
        depth: usize,
        cut: bool,
        d: &mut [[f32; THREADS]],
    ) {
        // SAFETY: this function's target feature.
        unsafe { aligned_blocks::<__m512>(left, right, depth, cut, d) }
    }

    #[target_feature(enable = "avx2")]
    pub fn accumulate_aligned_avx2(
        left: &LeftOperand,
        right: &RightOperand,
        depth: usize,
        cut: bool,
        d: &mut [[f32; THREADS]],
    ) {
        // SAFETY: this function's target feature.
        unsafe { aligned_blocks::<__m256>(left, right, depth, cut, d) }
    }

    // SAFETY: needs AVX-512F.
    unsafe impl Lanes for __m512 {
        const COUNT: usize = 16;

        #[inline(always)]
        unsafe fn load(from: &[f32]) -> Self {
            // SAFETY: the slice holds 16 elements; the caller promises the CPU feature.
            unsafe { _mm512_loadu_ps(from[..16].as_ptr()) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut [f32]) {
            // SAFETY: the slice holds 16 elements; the caller promises the CPU feature.
            unsafe { _mm512_storeu_ps(to[..16].as_mut_ptr(), self) }
        }

        #[inline(always)]
        unsafe fn repeat(four: &[f32; 4]) -> Self {
            // SAFETY: four elements are read; the caller promises the CPU feature.
            unsafe { _mm512_broadcast_f32x4(_mm_loadu_ps(four.as_ptr())) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller promises the CPU feature.
            unsafe { _mm512_add_ps(self, _mm512_mul_ps(a, b)) }
        }

        #[inline(always)]
        unsafe fn add_whole_product(self, a: Self, b: Self, scale: Self) -> Self {
            // SAFETY: the caller promises the CPU feature.
            unsafe {
                let scaled = _mm512_mul_ps(_mm512_mul_ps(a, b), scale);
                _mm512_add_ps(self, _mm512_roundscale_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(scaled))
            }
        }

        #[inline(always)]
        unsafe fn canonical(self) -> Self {
            // SAFETY: the caller promises the CPU feature.
            unsafe {
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self, self);
                _mm512_mask_mov_ps(self, nan, _mm512_set1_ps(CANONICAL_NAN_F32))
            }
        }
    }

    // SAFETY: needs AVX2.
    unsafe impl Lanes for __m256 {
        const COUNT: usize = 8;

        #[inline(always)]
        unsafe fn load(from: &[f32]) -> Self {
            // SAFETY: the slice holds 8 elements; the caller promises the CPU feature.
            unsafe { _mm256_loadu_ps(from[..8].as_ptr()) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut [f32]) {
            // SAFETY: the slice holds 8 elements; the caller promises the CPU feature.
            unsafe { _mm256_storeu_ps(to[..8].as_mut_ptr(), self) }
        }

        #[inline(always)]
        unsafe fn repeat(four: &[f32; 4]) -> Self {
            // SAFETY: four elements are read; the caller promises the CPU feature.
            unsafe {
                let four = _mm_loadu_ps(four.as_ptr());
                _mm256_set_m128(four, four)
            }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller promises the CPU feature.
            unsafe { _mm256_add_ps(self, _mm256_mul_ps(a, b)) }
        }

        #[inline(always)]
        unsafe fn add_whole_product(self, a: Self, b: Self, scale: Self) -> Self {
            // SAFETY: the caller promises the CPU feature.
            unsafe {
                let scaled = _mm256_mul_ps(_mm256_mul_ps(a, b), scale);
                _mm256_add_ps(self, _mm256_round_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(scaled))
            }
        }

        #[inline(always)]
        unsafe fn canonical(self) -> Self {
            // SAFETY: the caller promises the CPU feature.
            unsafe {
                let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(self, self);
                _mm256_blendv_ps(self, _mm256_set1_ps(CANONICAL_NAN_F32), nan)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_of_all_widths_agree_bit_for_bit() {
        let value = |i: usize| f32::from_bits((i as u32).wrapping_mul(2_654_435_761) & 0x83FF_FFFF | 0x3C00_0000);
        with_operands(|Operands { left, right }| {
            for (k, rows) in left.rows.iter_mut().enumerate() {
                *rows = std::array::from_fn(|half| std::array::from_fn(|t| value(k * 999 + half * 77 + t)));
            }
            for (k, columns) in right.columns.iter_mut().enumerate() {
                *columns = std::array::from_fn(|block| {
                    std::array::from_fn(|odd| std::array::from_fn(|i| value(k * 555 + block * 33 + odd * 7 + i)))
                });
            }
            // An infinity and a NaN, whose sums must agree too.
            right.columns[3][0][0][0] = f32::INFINITY;
            right.columns[9][0][0][0] = f32::NEG_INFINITY;
            right.columns[4][1][1][2] = f32::MAX;
            for blocks in [1, 2, 7, 32] {
                let start = vec![[0.25; THREADS]; 4 * blocks];
                let mut expected = start.clone();
                // SAFETY: an array needs no CPU feature.
                unsafe { accumulate_blocks::<[f32; 4]>(left, right, MAX_K, &mut expected) };
                let bits = |d: &[[f32; THREADS]]| d.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
                let mut nan = expected.iter().flatten().filter(|x| x.is_nan()).peekable();
                assert!(nan.peek().is_some() && nan.all(|x| x.to_bits() == 0x7FFF_FFFF));
                let check = |accumulate: &dyn Fn(&mut [[f32; THREADS]])| {
                    let mut d = start.clone();
                    accumulate(&mut d);
                    assert_eq!(bits(&d), bits(&expected));
                };
                check(&|d| accumulate(left, right, MAX_K, d));
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has AVX2.
                    check(&|d| unsafe { x86::accumulate_avx2(left, right, MAX_K, d) });
                }
            }
        });
    }

    #[test]
    fn aligned_sums_of_all_widths_agree_bit_for_bit() {
        let byte = |i: usize| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3];
        let decoder = Decoder { operand: OperandType::E5m2, negate: false };
        with_operands(|Operands { left, right }| {
            for row in 0..MAX_N {
                for k in [0, 16] {
                    let chunk = Chunk { row, k, major: Major::K, address: 0 };
                    // Infinities and NaNs are among them.
                    let bytes = std::array::from_fn(|i| byte(row * 32 + k + i));
                    if row < 64 {
                        left.store(decoder, chunk, &bytes);
                    }
                    right.store(decoder, chunk, &bytes.map(|byte| if row % 3 == 0 { byte } else { byte & 0xBF }));
                }
            }
            for (blocks, cut) in [(1, true), (2, false), (7, true), (32, true)] {
                let start = vec![[-0.3; THREADS]; 4 * blocks];
                let mut expected = start.clone();
                // SAFETY: an array needs no CPU feature.
                unsafe { aligned_blocks::<[f32; 4]>(left, right, MAX_K, cut, &mut expected) };
                assert!(expected.iter().flatten().any(|x| x.is_finite()));
                let check = |accumulate: &dyn Fn(&mut [[f32; THREADS]])| {
                    let mut d = start.clone();
                    accumulate(&mut d);
                    assert!(d.iter().flatten().zip(expected.iter().flatten()).all(|(x, y)| x.to_bits() == y.to_bits()));
                };
                check(&|d| accumulate_aligned(left, right, MAX_K, cut, d));
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has AVX2.
                    check(&|d| unsafe { x86::accumulate_aligned_avx2(left, right, MAX_K, cut, d) });
                }
            }
        });
    }
}
