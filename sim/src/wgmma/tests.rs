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
                    execute(&shape, WgmmaA::Descriptor(a_bits), b_bits, &shared, &mut d, true).unwrap();
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
        execute(&shape, WgmmaA::Descriptor(a_bits), a_bits + 2048, &shared, &mut d, true).unwrap();
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
                execute(&shape, WgmmaA::Registers(&registers(&a)), layout.descriptor(), &shared, &mut d, scale_d)
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
    execute_f16(&shape, WgmmaA::Registers(&registers(&a)), layout.descriptor(), &shared, &mut d, true).unwrap();
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
    execute(&shape, WgmmaA::Registers(&registers(&a)), bits, &shared, &mut d, true).unwrap();
    check(&d, &a, &b, 1.0, &[[0.0; THREADS]; 4]);
}

#[test]
fn impossible_instructions_are_errors() {
    let mut d = vec![[1.0; THREADS]; 128];
    let shared = vec![0; 4096];
    let mut run =
        |shape: WgmmaShape, b: u64| execute(&shape, WgmmaA::Descriptor(0), b, &shared, &mut d, true).unwrap_err();
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
    let short = execute(&WgmmaShape::new(16, OperandType::Bf16), WgmmaA::Descriptor(0), 0, &shared, &mut d[..7], true);
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
        execute(&WgmmaShape::new(n, OperandType::Bf16), WgmmaA::Registers(&a), descriptor, &shared, &mut d, true).unwrap();
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
