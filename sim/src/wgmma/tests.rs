use super::*;
use crate::tensor_map::Swizzle;
use proptest::prelude::*;

const SWIZZLES: [(Swizzle, usize); 4] =
    [(Swizzle::None, 16), (Swizzle::B32, 32), (Swizzle::B64, 64), (Swizzle::B128, 128)];

/// Where an operand is put in shared memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    major: Major,
    swizzle: Swizzle,
    span: usize,
    start: usize,
    leading: usize,
    stride: usize,
}

impl Layout {
    /// A dense layout, or one with gaps of `gap` bytes (a multiple of 1024) at each step.
    fn new(major: Major, (swizzle, span): (Swizzle, usize), start: usize, gap: usize) -> Self {
        let (leading, stride) = match (major, swizzle) {
            (Major::K, Swizzle::None) => (128 + gap, 256 + 2 * gap),
            (Major::K, _) => (16, 8 * span + gap),
            // k in two groups of 8 values, m or n in groups of a span.
            (Major::MN, Swizzle::None) => (32768 + gap, 128 + gap),
            (Major::MN, _) => (16 * span + 2 * gap, 8 * span + gap),
        };
        Layout { major, swizzle, span, start, leading, stride }
    }

    fn descriptor(&self) -> u64 {
        let mode = match self.span {
            128 => 1,
            64 => 2,
            32 => 3,
            _ => 0,
        };
        (self.start / 16) as u64 | ((self.leading / 16) << 16) as u64 | ((self.stride / 16) as u64) << 32 | mode << 62
    }

    /// Address of a byte of the element at (row, k): the canonical layouts of the PTX ISA, in bytes, with `row` along m
    /// or n.
    fn address(&self, row: usize, k: usize, size: usize, byte: usize) -> usize {
        let plain = match (self.major, self.swizzle) {
            (Major::K, Swizzle::None) => {
                row / 8 * self.stride + row % 8 * 16 + k * size / 16 * self.leading + k * size % 16
            }
            (Major::K, _) => row / 8 * self.stride + row % 8 * self.span + k * size,
            (Major::MN, Swizzle::None) => row / 8 * self.stride + row % 8 * 2 + k / 8 * self.leading + k % 8 * 16,
            (Major::MN, _) => {
                let per_span = self.span / 2;
                row / per_span * self.leading + row % per_span * 2 + k / 8 * self.stride + k % 8 * self.span
            }
        };
        let address = self.start + plain + byte;
        let lines: [usize; 8] = match self.span {
            128 => [0, 1, 2, 3, 4, 5, 6, 7],
            64 => [0, 1, 2, 3, 0, 1, 2, 3],
            32 => [0, 1, 0, 1, 0, 1, 0, 1],
            _ => [0; 8],
        };
        address ^ (lines[address / 128 % 8] * 16)
    }

    fn write(&self, shared: &mut [u8], matrix: &Matrix) {
        let size = matrix.operand.bytes();
        for (row, ks) in matrix.bits.iter().enumerate() {
            for (k, bits) in ks.iter().enumerate() {
                for byte in 0..size {
                    shared[self.address(row, k, size, byte)] = bits.to_le_bytes()[byte];
                }
            }
        }
    }
}

/// An operand of small integers, which every type and every sum of products holds exactly.
struct Matrix {
    operand: OperandType,
    values: Vec<Vec<f64>>,
    bits: Vec<Vec<u32>>,
}

impl Matrix {
    fn new(operand: OperandType, rows: usize, seed: usize) -> Self {
        let k = 32 / operand.bytes();
        let value = |row: usize, k: usize| ((row * 7919 + k * 104729 + seed * 31 + row * k * 13) % 13) as f64 - 6.0;
        let values: Vec<Vec<f64>> = (0..rows).map(|row| (0..k).map(|k| value(row, k)).collect()).collect();
        let bits = values.iter().map(|ks| ks.iter().map(|&x| encode(operand, x)).collect()).collect();
        Matrix { operand, values, bits }
    }

    fn product(&self, b: &Matrix, row: usize, column: usize) -> f64 {
        self.values[row].iter().zip(&b.values[column]).map(|(x, y)| x * y).sum()
    }
}

/// Bits of an integer from -6 to 6.
fn encode(operand: OperandType, x: f64) -> u32 {
    let magnitudes_e4m3 = [0x00, 0x38, 0x40, 0x44, 0x48, 0x4A, 0x4C];
    let magnitudes_e5m2 = [0x00, 0x3C, 0x40, 0x42, 0x44, 0x45, 0x46];
    let index = x.abs() as usize;
    let sign = (x < 0.0) as u32;
    match operand {
        OperandType::F16 => half::f16::from_f64(x).to_bits() as u32,
        OperandType::Bf16 => half::bf16::from_f64(x).to_bits() as u32,
        // The low 13 bits of a tf32 operand are ignored.
        OperandType::Tf32 => (x as f32).to_bits() | 0x1ABC,
        OperandType::E4m3 => magnitudes_e4m3[index] | sign << 7,
        OperandType::E5m2 => magnitudes_e5m2[index] | sign << 7,
    }
}

/// Row and column of register `r` of thread `t` (PTX ISA, "Matrix fragments for D").
fn accumulator(r: usize, t: usize) -> (usize, usize) {
    let (warp, lane) = (t / 32, t % 32);
    let row = 16 * warp + lane / 4 + if r % 4 >= 2 { 8 } else { 0 };
    (row, 8 * (r / 4) + lane % 4 * 2 + (r & 1))
}

/// A in registers (PTX ISA, "Matrix fragments for A"): element `i` of register `r` of thread `t` is (row, k).
fn fragment(r: usize, t: usize, i: usize, size: usize) -> (usize, usize) {
    let row = 16 * (t / 32) + t % 32 / 4 + if r % 2 == 1 { 8 } else { 0 };
    let (per_register, half) = (4 / size, 16 / size);
    (row, t % 4 * per_register + i + if r >= 2 { half } else { 0 })
}

fn registers(a: &Matrix) -> [[u32; THREADS]; 4] {
    let size = a.operand.bytes();
    std::array::from_fn(|r| {
        std::array::from_fn(|t| {
            (0..4 / size).fold(0, |word, i| {
                let (row, k) = fragment(r, t, i, size);
                word | a.bits[row][k] << (8 * size * i)
            })
        })
    })
}

fn initial(n: usize) -> Vec<[f32; THREADS]> {
    (0..n / 2).map(|r| std::array::from_fn(|t| (r * 3 + t) as f32)).collect()
}

fn check(d: &[[f32; THREADS]], a: &Matrix, b: &Matrix, sign: f64, old: &[[f32; THREADS]]) {
    for (r, threads) in d.iter().enumerate() {
        for (t, &x) in threads.iter().enumerate() {
            let (row, column) = accumulator(r, t);
            let expected = old[r][t] as f64 + sign * a.product(b, row, column);
            assert_eq!(x as f64, expected, "register {r} of thread {t}");
        }
    }
}

#[test]
fn every_layout_of_both_operands() {
    for operand in [OperandType::Bf16, OperandType::F16, OperandType::Tf32, OperandType::E4m3, OperandType::E5m2] {
        for major in [Major::K, Major::MN] {
            if major == Major::MN && operand.bytes() != 2 {
                continue;
            }
            for swizzle in SWIZZLES {
                for (n, gap) in [(8, 0), (72, 1024), (128, 0)] {
                    let shape = WgmmaShape { a_major: major, b_major: major, ..WgmmaShape::new(n, operand) };
                    let (a, b) = (Matrix::new(operand, 64, 1), Matrix::new(operand, n, 2));
                    let layouts = [Layout::new(major, swizzle, 1024, gap), Layout::new(major, swizzle, 98304, gap)];
                    let mut shared = vec![0xA5; 229_376];
                    layouts[0].write(&mut shared, &a);
                    layouts[1].write(&mut shared, &b);
                    let (a_bits, b_bits) = (layouts[0].descriptor(), layouts[1].descriptor());
                    let mut d = initial(n);
                    execute(&shape, WgmmaA::Descriptor(a_bits), b_bits, &shared, &mut d, true, Fp8Sums::Hopper)
                        .unwrap();
                    check(&d, &a, &b, 1.0, &initial(n));

                    let mut read = std::collections::BTreeSet::new();
                    operand_ranges(&shape, Some(a_bits), b_bits, |range| read.extend(range)).unwrap();
                    let written = |layout: &Layout, matrix: &Matrix| -> Vec<u32> {
                        let (layout, size) = (*layout, operand.bytes());
                        let places = (0..matrix.values.len()).flat_map(|row| (0..shape.k()).map(move |k| (row, k)));
                        places
                            .flat_map(|(row, k)| (0..size).map(move |i| layout.address(row, k, size, i) as u32))
                            .collect()
                    };
                    let expected = [written(&layouts[0], &a), written(&layouts[1], &b)].concat();
                    assert_eq!(read, expected.into_iter().collect(), "{operand:?} {major:?} {swizzle:?}");
                }
            }
        }
    }
}

#[test]
fn k_steps_inside_a_swizzled_row() {
    // Four steps of k = 16 through rows of 64 bf16: the descriptor's start advances by 32 bytes.
    let (swizzle, span) = SWIZZLES[3];
    let layout = Layout::new(Major::K, (swizzle, span), 2048, 0);
    for step in 0..4 {
        let (a, b) = (Matrix::new(OperandType::Bf16, 64, step), Matrix::new(OperandType::Bf16, 16, step + 9));
        let mut shared = vec![0; 65536];
        for (matrix, base) in [(&a, 0), (&b, 32768)] {
            for (row, ks) in matrix.bits.iter().enumerate() {
                for (k, bits) in ks.iter().enumerate() {
                    for byte in 0..2 {
                        shared[base + layout.address(row, 16 * step + k, 2, byte)] = bits.to_le_bytes()[byte];
                    }
                }
            }
        }
        let a_bits = layout.descriptor() + 2 * step as u64;
        let mut d = initial(16);
        let shape = WgmmaShape::new(16, OperandType::Bf16);
        execute(&shape, WgmmaA::Descriptor(a_bits), a_bits + 2048, &shared, &mut d, true, Fp8Sums::Hopper).unwrap();
        check(&d, &a, &b, 1.0, &initial(16));
    }
}

#[test]
fn a_in_registers_scale_d_and_negation() {
    use OperandType::*;
    for (a_type, b_type) in [(Bf16, Bf16), (F16, F16), (Tf32, Tf32), (E4m3, E5m2), (E5m2, E4m3)] {
        for n in [16, 256] {
            let (a, b) = (Matrix::new(a_type, 64, 3), Matrix::new(b_type, n, 4));
            let layout = Layout::new(Major::K, SWIZZLES[3], 0, 0);
            let mut shared = vec![0; 65536];
            layout.write(&mut shared, &b);
            for (negate_a, negate_b, scale_d) in
                [(false, false, true), (true, false, true), (false, true, false), (true, true, true)]
            {
                let shape = WgmmaShape { b_type, negate_a, negate_b, ..WgmmaShape::new(n, a_type) };
                let old = initial(n);
                let mut d = old.clone();
                execute(
                    &shape,
                    WgmmaA::Registers(&registers(&a)),
                    layout.descriptor(),
                    &shared,
                    &mut d,
                    scale_d,
                    Fp8Sums::Hopper,
                )
                .unwrap();
                let sign = if negate_a == negate_b { 1.0 } else { -1.0 };
                check(&d, &a, &b, sign, &if scale_d { old } else { vec![[0.0; THREADS]; n / 2] });
            }
        }
    }
}

#[test]
fn f16_accumulators_are_packed_pairs() {
    let n = 24;
    let (a, b) = (Matrix::new(OperandType::F16, 64, 5), Matrix::new(OperandType::F16, n, 6));
    let layout = Layout::new(Major::K, SWIZZLES[2], 0, 0);
    let mut shared = vec![0; 65536];
    layout.write(&mut shared, &b);
    let mut d = vec![[0x3C00_4000; THREADS]; n / 4];
    let shape = WgmmaShape::new(n, OperandType::F16);
    execute_f16(&shape, WgmmaA::Registers(&registers(&a)), layout.descriptor(), &shared, &mut d, true, Fp8Sums::Hopper)
        .unwrap();
    for (r, threads) in d.iter().enumerate() {
        for (t, &packed) in threads.iter().enumerate() {
            let half = |bits: u32| half::f16::from_bits(bits as u16).to_f64();
            let expected = |i: usize| {
                let (row, column) = accumulator(2 * r + i, t);
                a.product(&b, row, column)
            };
            assert_eq!([half(packed), half(packed >> 16)], [2.0 + expected(0), 1.0 + expected(1)]);
        }
    }
}

#[test]
fn base_offset_shifts_the_pattern() {
    // A pattern that starts at 128 * 3: on an H200, line i of it is permuted as line i of an aligned one.
    let (a, b) = (Matrix::new(OperandType::Bf16, 64, 7), Matrix::new(OperandType::Bf16, 8, 8));
    let layout = Layout::new(Major::K, SWIZZLES[3], 0, 0);
    let mut aligned = vec![0; 32768];
    layout.write(&mut aligned, &b);
    let mut shared = vec![0; 384];
    shared.extend(aligned);
    let bits = Layout { start: 384, ..layout }.descriptor() | 3 << 49;
    let mut d = vec![[0.0; THREADS]; 4];
    let shape = WgmmaShape::new(8, OperandType::Bf16);
    execute(&shape, WgmmaA::Registers(&registers(&a)), bits, &shared, &mut d, true, Fp8Sums::Hopper).unwrap();
    check(&d, &a, &b, 1.0, &[[0.0; THREADS]; 4]);
}

#[test]
fn impossible_instructions_are_errors() {
    let mut d = vec![[1.0; THREADS]; 128];
    let shared = vec![0; 4096];
    let mut run = |shape: WgmmaShape, b: u64| {
        execute(&shape, WgmmaA::Descriptor(0), b, &shared, &mut d, true, Fp8Sums::Hopper).unwrap_err()
    };
    for n in [0, 12, 264] {
        assert_eq!(run(WgmmaShape::new(n, OperandType::Bf16), 0), WgmmaError::Columns { n });
    }
    let mixed = WgmmaShape { b_type: OperandType::F16, ..WgmmaShape::new(8, OperandType::Bf16) };
    assert_eq!(run(mixed, 0), WgmmaError::OperandTypes { a: OperandType::Bf16, b: OperandType::F16 });
    let transposed = WgmmaShape { b_major: Major::MN, ..WgmmaShape::new(8, OperandType::E4m3) };
    assert_eq!(run(transposed, 0), WgmmaError::Transposed { operand: OperandType::E4m3 });
    // B's last 16 bytes would be at 4096.
    let b = Layout { start: 4096 - 240, leading: 128, ..Layout::new(Major::K, SWIZZLES[0], 0, 0) }.descriptor();
    assert_eq!(run(WgmmaShape::new(8, OperandType::Bf16), b), WgmmaError::OutOfBounds { address: 4096, length: 4096 });
    assert_eq!(d, vec![[1.0; THREADS]; 128]);
    let short = execute(
        &WgmmaShape::new(16, OperandType::Bf16),
        WgmmaA::Descriptor(0),
        0,
        &shared,
        &mut d[..7],
        true,
        Fp8Sums::Hopper,
    );
    assert_eq!(short, Err(WgmmaError::Accumulators { given: 7, needed: 8 }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// On arbitrary finite numbers: bit for bit the documented order of sums.
    #[test]
    fn sums_in_the_order_of_k(n in 1usize..=32, seed in any::<u64>()) {
        use rand_bits as bits;
        let n = 8 * n;
        let a: [[u32; THREADS]; 4] = std::array::from_fn(|r| std::array::from_fn(|t| bits(seed, 0, r * THREADS + t)));
        let words: Vec<u32> = (0..n * 8).map(|i| bits(seed, 1, i)).collect();
        let mut d: Vec<[f32; THREADS]> =
            (0..n / 2).map(|r| std::array::from_fn(|t| f32::from_bits(bits(seed, 2, r * THREADS + t)))).collect();
        // B K-major without swizzle, core matrices of 8 columns by 8 values of k.
        let mut shared = vec![0u8; n * 32];
        let b_bits = |column: usize, k: usize| (words[column * 8 + k / 2] >> (k % 2 * 16)) as u16;
        for column in 0..n {
            for k in 0..16 {
                let at = column / 8 * 256 + k / 8 * 128 + column % 8 * 16 + k % 8 * 2;
                shared[at..at + 2].copy_from_slice(&b_bits(column, k).to_le_bytes());
            }
        }
        let old = d.clone();
        let descriptor = 8 << 16 | 16 << 32;
        execute(&WgmmaShape::new(n, OperandType::Bf16), WgmmaA::Registers(&a), descriptor, &shared, &mut d, true, Fp8Sums::Hopper).unwrap();
        let value = |bits: u16| half::bf16::from_bits(bits).to_f32();
        for r in 0..n / 2 {
            for t in 0..THREADS {
                let (row, column) = accumulator(r, t);
                let mut expected = old[r][t];
                for k in 0..16 {
                    let thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
                    let word = a[row / 8 % 2 + k / 8 * 2][thread];
                    expected += value((word >> (k % 2 * 16)) as u16) * value(b_bits(column, k));
                }
                prop_assert_eq!(d[r][t].to_bits(), expected.to_bits());
            }
        }
    }
}

/// Two bf16 (or one f32) with exponents around that of 1.
fn rand_bits(seed: u64, stream: u64, index: usize) -> u32 {
    let mut x = seed ^ stream.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (index as u64).wrapping_mul(0xD1B5_4A32_D192_ED03);
    for _ in 0..3 {
        x = (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    }
    (x as u32 & 0x87FF_87FF) + 0x3C00_3C00
}

/// A and B of random bytes: A in registers, B K-major without swizzle.
struct Bytes {
    a: [[u32; THREADS]; 4],
    b: Vec<u8>,
}

impl Bytes {
    const DESCRIPTOR: u64 = 8 << 16 | 16 << 32;

    /// `a[row][k]` and `b[column][k]` as operands.
    fn new(a: &[[u8; 32]], b: &[[u8; 32]]) -> Self {
        let mut shared = vec![0; 32 * b.len()];
        for (column, ks) in b.iter().enumerate() {
            for (k, byte) in ks.iter().enumerate() {
                shared[column / 8 * 256 + k / 16 * 128 + column % 8 * 16 + k % 16] = *byte;
            }
        }
        let a = std::array::from_fn(|r| {
            std::array::from_fn(|t| {
                let (row, k) = fragment(r, t, 0, 1);
                u32::from_le_bytes(a[row][k..k + 4].try_into().unwrap())
            })
        });
        Bytes { a, b: shared }
    }

    /// D by row and column, from `old`.
    fn multiply(&self, shape: &WgmmaShape, old: impl Fn(usize, usize) -> f32, sums: Fp8Sums) -> Vec<Vec<f32>> {
        let mut d: Vec<[f32; THREADS]> = (0..shape.n / 2)
            .map(|r| {
                std::array::from_fn(|t| {
                    let (row, column) = accumulator(r, t);
                    old(row, column)
                })
            })
            .collect();
        execute(shape, WgmmaA::Registers(&self.a), Self::DESCRIPTOR, &self.b, &mut d, true, sums).unwrap();
        let mut values = vec![vec![0.0; shape.n]; 64];
        for (r, threads) in d.iter().enumerate() {
            for (t, &x) in threads.iter().enumerate() {
                let (row, column) = accumulator(r, t);
                values[row][column] = x;
            }
        }
        values
    }
}

/// Significand and exponent of a finite value whose type has normal exponents from `least` on.
fn split(x: f64, least: i32) -> (f64, i32) {
    let mut exponent = least;
    while x.abs() >= 2f64.powi(exponent + 1) {
        exponent += 1;
    }
    (x / 2f64.powi(exponent), exponent)
}

/// The sum as [`Fp8Sums::Hopper`] defines it, by the definition; `None` keeps all bits of the sum.
fn aligned_sum(types: [OperandType; 2], a: &[u8], b: &[u8], old: f32, kept: Option<i32>) -> f64 {
    let parts = |operand: OperandType, byte: u8| {
        let least = if operand == OperandType::E4m3 { -6 } else { -14 };
        split(f64::from(operand.numeric().to_f32(u32::from(byte))), least)
    };
    let products = a.iter().zip(b).map(|(&x, &y)| {
        let ((x, of_x), (y, of_y)) = (parts(types[0], x), parts(types[1], y));
        (x * y, of_x + of_y)
    });
    let addends: Vec<(f64, i32)> =
        products.chain([split(f64::from(old), -126)]).filter(|(significand, _)| *significand != 0.0).collect();
    let Some(largest) = addends.iter().map(|(_, exponent)| *exponent).max() else {
        return 0.0;
    };
    let unit = 2f64.powi(largest - FP8_FRACTION_BITS);
    let sum: f64 = addends.iter().map(|(x, exponent)| (x * 2f64.powi(*exponent) / unit).trunc()).sum::<f64>() * unit;
    let Some(kept) = kept else { return sum };
    let (significand, exponent) = split(sum, -126);
    (significand * 2f64.powi(kept)).trunc() * 2f64.powi(exponent - kept)
}

/// Random finite bytes; with few exponents where `narrow`.
fn finite_bytes(operand: OperandType, seed: u64, stream: u64, index: usize, narrow: bool) -> [u8; 32] {
    std::array::from_fn(|k| {
        let byte = (rand_bits(seed, stream, index * 32 + k).wrapping_sub(0x3C00_3C00) >> 3) as u8;
        let byte = if narrow { byte & 0x8F | 0x30 } else { byte };
        let finite = operand.numeric().to_f32(u32::from(byte)).is_finite();
        if finite { byte } else { byte & 0xBF }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Bit for bit the definition, for all pairs of types, and for f16 accumulators rounded once.
    #[test]
    fn sums_of_bytes_are_aligned_and_cut(seed in any::<u64>(), blocks in 1usize..=32, narrow in any::<bool>()) {
        let types = [OperandType::E4m3, OperandType::E5m2];
        let (a_type, b_type) = (types[(seed & 1) as usize], types[(seed >> 1 & 1) as usize]);
        let n = 8 * blocks;
        let a: Vec<[u8; 32]> = (0..64).map(|row| finite_bytes(a_type, seed, 0, row, narrow)).collect();
        let b: Vec<[u8; 32]> = (0..n).map(|column| finite_bytes(b_type, seed, 1, column, narrow)).collect();
        // Old values of all sizes, zero among them.
        let old = |row: usize, column: usize| {
            let bits = rand_bits(seed, 2, row * 256 + column);
            let scale = 2f32.powi(bits as i32 % 40);
            if bits >> 16 & 7 == 0 { 0.0 } else { f32::from_bits(bits) * scale }
        };
        let shape = WgmmaShape { b_type, ..WgmmaShape::new(n, a_type) };
        let bytes = Bytes::new(&a, &b);
        let found = bytes.multiply(&shape, old, Fp8Sums::Hopper);
        for (row, found) in found.iter().enumerate() {
            for (column, found) in found.iter().enumerate() {
                let expected = aligned_sum([a_type, b_type], &a[row], &b[column], old(row, column), Some(13)) as f32;
                prop_assert_eq!(found.to_bits(), expected.to_bits(), "row {}, column {}", row, column);
            }
        }
        let mut half = vec![[0u32; THREADS]; n / 4];
        execute_f16(&shape, WgmmaA::Registers(&bytes.a), Bytes::DESCRIPTOR, &bytes.b, &mut half, false, Fp8Sums::Hopper).unwrap();
        for (r, threads) in half.iter().enumerate() {
            for (t, packed) in threads.iter().enumerate() {
                for i in 0..2 {
                    let (row, column) = accumulator(2 * r + i, t);
                    let sum = aligned_sum([a_type, b_type], &a[row], &b[column], 0.0, None);
                    let expected = half::f16::from_f32(sum as f32).to_bits();
                    prop_assert_eq!((packed >> (16 * i)) as u16, expected, "row {}, column {}", row, column);
                }
            }
        }
    }

    /// Operands in each other's places give the same bits, and so does any n.
    #[test]
    fn sums_of_bytes_know_neither_side_nor_width(seed in any::<u64>()) {
        let e4m3 = OperandType::E4m3;
        let a: Vec<[u8; 32]> = (0..64).map(|row| finite_bytes(e4m3, seed, 0, row, false)).collect();
        let b: Vec<[u8; 32]> = (0..64).map(|column| finite_bytes(e4m3, seed, 1, column, false)).collect();
        let old = |row: usize, column: usize| (row * 64 + column) as f32 / 3.0;
        let shape = WgmmaShape::new(64, e4m3);
        let one = Bytes::new(&a, &b).multiply(&shape, old, Fp8Sums::Hopper);
        let other = Bytes::new(&b, &a).multiply(&shape, |row, column| old(column, row), Fp8Sums::Hopper);
        for row in 0..64 {
            for column in 0..64 {
                prop_assert_eq!(one[row][column].to_bits(), other[column][row].to_bits());
            }
        }
        for n in (8..64).step_by(8) {
            let narrow = Bytes::new(&a, &b[..n]).multiply(&WgmmaShape::new(n, e4m3), old, Fp8Sums::Hopper);
            prop_assert!(narrow.iter().zip(&one).all(|(narrow, wide)| narrow[..] == wide[..n]));
        }
    }
}

/// e4m3: 1, 2^-6 and 2^-9, which is subnormal, and 1.5.
const ONE: u8 = 0x38;
const SMALL: u8 = 0x08;
const TINY: u8 = 0x01;
const ONE_AND_A_HALF: u8 = 0x3C;

/// The sum of products of e4m3 numbers and an old value.
fn sum_of(products: &[(u8, u8)], old: f32, sums: Fp8Sums) -> f32 {
    let (mut a, mut b) = ([0; 32], [0; 32]);
    for (k, (x, y)) in products.iter().enumerate() {
        (a[k], b[k]) = (*x, *y);
    }
    let shape = WgmmaShape::new(8, OperandType::E4m3);
    Bytes::new(&[a; 64], &[b; 8]).multiply(&shape, |_, _| old, sums)[63][7]
}

#[test]
fn few_bits_of_sums_of_bytes_survive() {
    let (cut, exact) = (Fp8Sums::Hopper, Fp8Sums::Exact);
    let two = |exponent| 2f32.powi(exponent);
    // 2^-12 beside 1 stays; of 2^-15 nothing does, however often it comes, on either side of zero.
    assert_eq!(sum_of(&[(ONE, ONE), (SMALL, SMALL)], 0.0, cut), 1.0 + two(-12));
    let tiny = [(SMALL, TINY); 31];
    let with_one = |one: u8| [&[(one, ONE)], &tiny[..]].concat();
    assert_eq!(sum_of(&with_one(ONE), 0.0, exact), 1.0 + 31.0 * two(-15));
    assert_eq!(sum_of(&with_one(ONE), 0.0, cut), 1.0);
    assert_eq!(sum_of(&with_one(ONE | 0x80), 0.0, cut), -1.0);
    let minus_tiny = [&[(ONE, ONE)], &[(SMALL | 0x80, TINY); 31][..]].concat();
    assert_eq!(sum_of(&minus_tiny, 0.0, cut), 1.0, "cut towards zero, not down");
    // Alone the same products are exact.
    assert_eq!(sum_of(&tiny, 0.0, cut), 31.0 * two(-15));
    // The old value counts, and is cut, as any other addend.
    assert_eq!(sum_of(&tiny, 1.0, cut), 1.0);
    assert_eq!(sum_of(&[], 1.0 + two(-13) + two(-14), cut), 1.0 + two(-13));
    assert_eq!(sum_of(&[], 1.0 + two(-14), exact), 1.0 + two(-14));
    // 1.5 * 1.5 is 2.25, whose exponent is that of 1: 2^-12 beside it stays where the sum has room.
    assert_eq!(sum_of(&[(ONE_AND_A_HALF, ONE_AND_A_HALF), (SMALL, SMALL)], 0.0, cut), 2.25 + two(-12));
    // A sum that needs another bit in front loses one behind.
    assert_eq!(sum_of(&[(ONE, ONE); 2], two(-13), cut), 2.0);
    assert_eq!(sum_of(&[(ONE, ONE)], two(-13), cut), 1.0 + two(-13));
}

#[test]
fn a_sum_that_is_never_promoted_stops_growing() {
    // 32 products of 1 a step: from 2^14 on each of them is less than the last bit.
    let step = |old: f32, sums| sum_of(&[(ONE, ONE); 32], old, sums);
    let after = |sums| (0..1024).fold(0.0, |sum, _| step(sum, sums));
    assert_eq!(after(Fp8Sums::Exact), 32768.0);
    assert_eq!(after(Fp8Sums::Hopper), 16384.0);
}

#[test]
fn infinities_and_nans_pass_through_aligned_sums() {
    let sum = |a: u8, b: u8, old: f32| {
        let shape = WgmmaShape::new(8, OperandType::E5m2);
        let mut left = [0; 32];
        left[..2].copy_from_slice(&[a, 0x3C]);
        let mut right = [0; 32];
        right[..2].copy_from_slice(&[b, 0x3C]);
        Bytes::new(&[left; 64], &[right; 8]).multiply(&shape, |_, _| old, Fp8Sums::Hopper)[0][0]
    };
    let (one, infinity, nan) = (0x3C, 0x7C, 0x7E);
    assert_eq!(sum(infinity, one, 5.0), f32::INFINITY);
    assert_eq!(sum(infinity | 0x80, one, 5.0), f32::NEG_INFINITY);
    assert_eq!(sum(one, one, f32::NEG_INFINITY), f32::NEG_INFINITY);
    for x in [sum(nan, one, 0.0), sum(infinity, 0, 0.0), sum(infinity, one, f32::NEG_INFINITY), sum(0, 0, f32::NAN)] {
        assert_eq!(x.to_bits(), 0x7FFF_FFFF);
    }
    assert_eq!(sum(0, 0, f32::MAX), f32::from_bits(f32::MAX.to_bits() & !0x3FF));
    assert_eq!(sum_of(&[], 2f32.powi(-130) * 1.0625, Fp8Sums::Hopper), 2f32.powi(-130) * 1.0625);
}
