//! Warp-level matrix instructions: `ldmatrix`, `stmatrix` and `mma.sync` (PTX ISA 8.6, "Warp-level matrix load/store
//! instructions" and "Matrix multiply-accumulate operation using mma instruction").

use crate::convert::arithmetic::HalfType;
use crate::wgmma::OperandType;
use thiserror::Error;

/// Threads of a warp.
pub const LANES: usize = 32;

/// How many 8 x 8 matrices of 16-bit elements one instruction moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixCount {
    /// `.x1`: lanes 0-7 give the addresses of the rows.
    One = 1,
    /// `.x2`: lanes 0-15.
    Two = 2,
    /// `.x4`: all lanes.
    Four = 4,
}

/// `ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{.trans}.shared.b16`.
///
/// Row `i` of matrix `m` is the 16 bytes that `read` returns for `addresses[8 * m + i]`; addresses of lanes beyond the
/// matrices are ignored. Register `m` of lane `l` gets elements (l / 4, 2 * (l % 4)) and the one to its right, or
/// with `transposed` the one at (2 * (l % 4), l / 4) and the one below it. Registers beyond `count` are 0.
///
/// # Errors
/// The first one of `read`.
pub fn ldmatrix<E>(
    count: MatrixCount,
    transposed: bool,
    addresses: &[u32; LANES],
    mut read: impl FnMut(u32) -> Result<[u8; 16], E>,
) -> Result<[[u32; LANES]; 4], E> {
    let mut registers = [[0; LANES]; 4];
    for (register, addresses) in registers.iter_mut().zip(addresses.as_chunks::<8>().0).take(count as usize) {
        let mut rows = [[0u16; 8]; 8];
        for (row, &address) in rows.iter_mut().zip(addresses) {
            let bytes = read(address)?;
            *row = std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
        }
        for (lane, packed) in register.iter_mut().enumerate() {
            let [low, high] = fragment(lane, transposed).map(|(row, column)| rows[row][column] as u32);
            *packed = high << 16 | low;
        }
    }
    Ok(registers)
}

/// `stmatrix.sync.aligned.m8n8.{x1,x2,x4}{.trans}.shared.b16`: the reverse of [`ldmatrix`]. Calls `write` once for each
/// row.
///
/// # Errors
/// The first one of `write`.
pub fn stmatrix<E>(
    count: MatrixCount,
    transposed: bool,
    addresses: &[u32; LANES],
    registers: &[[u32; LANES]; 4],
    mut write: impl FnMut(u32, [u8; 16]) -> Result<(), E>,
) -> Result<(), E> {
    for (register, addresses) in registers.iter().zip(addresses.as_chunks::<8>().0).take(count as usize) {
        let mut rows = [[0u8; 16]; 8];
        for (lane, packed) in register.iter().enumerate() {
            let halves = packed.to_le_bytes();
            for (i, (row, column)) in fragment(lane, transposed).into_iter().enumerate() {
                rows[row][2 * column..2 * column + 2].copy_from_slice(&halves[2 * i..2 * i + 2]);
            }
        }
        for (&address, row) in addresses.iter().zip(rows) {
            write(address, row)?;
        }
    }
    Ok(())
}

/// Row and column of the lower and the upper half of a lane's register.
fn fragment(lane: usize, transposed: bool) -> [(usize, usize); 2] {
    let (line, first) = (lane / 4, 2 * (lane % 4));
    if transposed { [(first, line), (first + 1, line)] } else { [(line, first), (line, first + 1)] }
}

/// An `mma.sync` of shape m16n8k`depth`, row-major A and column-major B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmaShape {
    /// k: 16 or 32 bytes of operand (k8 and k16 for 16-bit types, k4 and k8 for tf32, k16 and k32 for 8-bit types).
    pub depth: usize,
    /// Element type of A.
    pub a_type: OperandType,
    /// Element type of B.
    pub b_type: OperandType,
}

/// Why an `mma.sync` cannot be executed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MmaError {
    /// No such shape.
    #[error("mma.sync m16n8k{depth} of {a:?} and {b:?}; one k is 16 or 32 bytes, of types of one width")]
    Shape {
        /// k.
        depth: usize,
        /// Type of A.
        a: OperandType,
        /// Type of B.
        b: OperandType,
    },
}

/// `mma.sync.aligned.m16n8k*.row.col.f32` with operands `a` (2 or 4 registers, the rest ignored) and `b` (1 or 2): adds
/// A * B to the accumulators, products in the order of k, each sum rounded to nearest even.
///
/// With `g` = lane / 4 and `t` = lane % 4: register `r` of A holds row `g + 8 * (r % 2)` and 4 bytes of k from
/// `16 * (r / 2) + 4 * t` on; register `r` of B column `g` and the same bytes of k; accumulator `r` is row
/// `g + 8 * (r / 2)`, column `2 * t + r % 2`.
///
/// # Errors
/// [`MmaError::Shape`].
pub fn mma(
    shape: MmaShape,
    a: &[[u32; LANES]; 4],
    b: &[[u32; LANES]; 2],
    d: &mut [[f32; LANES]; 4],
) -> Result<(), MmaError> {
    let MmaShape { depth, a_type, b_type } = shape;
    let bytes = depth * a_type.bytes();
    let types_match = a_type == b_type || (a_type.bytes() == 1 && b_type.bytes() == 1);
    if !types_match || !(bytes == 16 || bytes == 32) {
        return Err(MmaError::Shape { depth, a: a_type, b: b_type });
    }
    let element = |word: u32, k: usize, operand: OperandType| {
        operand.numeric().to_f32(word >> (k % (4 / operand.bytes()) * operand.bytes() * 8))
    };
    for (r, sums) in d.iter_mut().enumerate() {
        for (lane, sum) in sums.iter_mut().enumerate() {
            let (row, column) = (lane / 4, 2 * (lane % 4) + r % 2);
            for k in 0..depth {
                let word = k * a_type.bytes() / 4;
                let (group, thread) = (word / 4, word % 4);
                let x = element(a[2 * group + r / 2][4 * row + thread], k, a_type);
                let y = element(b[group][4 * column + thread], k, b_type);
                *sum += x * y;
            }
        }
    }
    Ok(())
}

/// [`mma`] with f16 accumulators: register `r` holds the columns of f32 accumulators `2 * r` (lower half) and `2 * r + 1`.
/// They are rounded once, at the end.
///
/// # Errors
/// [`MmaError::Shape`].
pub fn mma_f16(
    shape: MmaShape,
    a: &[[u32; LANES]; 4],
    b: &[[u32; LANES]; 2],
    d: &mut [[u32; LANES]; 2],
) -> Result<(), MmaError> {
    let mut wide = std::array::from_fn(|r| d[r / 2].map(|x| HalfType::F16.to_f32((x >> (r % 2 * 16)) as u16)));
    mma(shape, a, b, &mut wide)?;
    let half = |x: f32| HalfType::F16.from_f32(x) as u32;
    *d = std::array::from_fn(|r| std::array::from_fn(|i| half(wide[2 * r + 1][i]) << 16 | half(wide[2 * r][i])));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    const COUNTS: [MatrixCount; 3] = [MatrixCount::One, MatrixCount::Two, MatrixCount::Four];

    /// Rows of 16 bytes at scattered addresses; lanes without a row point nowhere.
    fn addresses(count: MatrixCount) -> [u32; LANES] {
        std::array::from_fn(|lane| if lane < 8 * count as usize { (lane as u32 * 7 % 32) * 48 } else { 1 << 30 })
    }

    /// A 16-bit element by matrix, row and column.
    fn element(matrix: usize, row: usize, column: usize) -> u32 {
        (matrix * 4096 + row * 256 + column * 3 + 1) as u32
    }

    fn memory(count: MatrixCount) -> Vec<u8> {
        let mut memory = vec![0; 2048];
        for (lane, &address) in addresses(count).iter().enumerate().take(8 * count as usize) {
            for column in 0..8 {
                let bytes = (element(lane / 8, lane % 8, column) as u16).to_le_bytes();
                memory[address as usize + 2 * column..][..2].copy_from_slice(&bytes);
            }
        }
        memory
    }

    /// PTX ISA, ldmatrix: thread 4 * r + c holds columns 2c and 2c + 1 of row r; of the transpose with `.trans`.
    fn expected(count: MatrixCount, transposed: bool) -> [[u32; LANES]; 4] {
        let mut registers = [[0; LANES]; 4];
        for (matrix, register) in registers.iter_mut().enumerate().take(count as usize) {
            for row in 0..8 {
                for pair in 0..4 {
                    let at =
                        |column| if transposed { element(matrix, column, row) } else { element(matrix, row, column) };
                    register[4 * row + pair] = at(2 * pair + 1) << 16 | at(2 * pair);
                }
            }
        }
        registers
    }

    #[test]
    fn ldmatrix_and_stmatrix_follow_the_fragment_table() {
        for count in COUNTS {
            for transposed in [false, true] {
                let (memory, addresses) = (memory(count), addresses(count));
                let read = |address: u32| Ok::<_, Infallible>(memory[address as usize..][..16].try_into().unwrap());
                let registers = ldmatrix(count, transposed, &addresses, read).unwrap();
                assert_eq!(registers, expected(count, transposed));

                let mut stored = vec![0; 2048];
                let mut writes = 0;
                stmatrix(count, transposed, &addresses, &expected(count, transposed), |address, row| {
                    stored[address as usize..][..16].copy_from_slice(&row);
                    writes += 1;
                    Ok::<_, Infallible>(())
                })
                .unwrap();
                assert_eq!((stored, writes), (memory, 8 * count as usize));
            }
        }
    }

    #[test]
    fn memory_errors_are_passed_on() {
        let addresses = std::array::from_fn(|lane| lane as u32 * 16);
        let refuse = |address| if address == 48 { Err(address) } else { Ok([0; 16]) };
        assert_eq!(ldmatrix(MatrixCount::One, false, &addresses, refuse), Err(48));
        let refuse = |address, _| if address == 128 { Err(address) } else { Ok(()) };
        assert_eq!(stmatrix(MatrixCount::One, false, &addresses, &[[0; LANES]; 4], refuse), Ok(()));
        assert_eq!(stmatrix(MatrixCount::Two, false, &addresses, &[[0; LANES]; 4], refuse), Err(128));
    }

    fn bits(operand: OperandType, x: f64) -> u32 {
        match operand {
            OperandType::F16 => half::f16::from_f64(x).to_bits() as u32,
            OperandType::Bf16 => half::bf16::from_f64(x).to_bits() as u32,
            OperandType::Tf32 => (x as f32).to_bits(),
            OperandType::E4m3 => [0xC0, 0xB8, 0x00, 0x38, 0x40][(x + 2.0) as usize],
            OperandType::E5m2 => [0xC0, 0xBC, 0x00, 0x3C, 0x40][(x + 2.0) as usize],
        }
    }

    fn small(i: usize, j: usize) -> f64 {
        ((i * 11 + j * 7 + i * j) % 5) as f64 - 2.0
    }

    /// The fragments of the PTX ISA's tables ("Matrix Fragments for mma.m16n8k*"), filled element by element: each
    /// register packs consecutive k, from the lowest bits.
    fn operands(a_type: OperandType, b_type: OperandType, depth: usize) -> ([[u32; LANES]; 4], [[u32; LANES]; 2]) {
        let (mut a, mut b) = ([[0; LANES]; 4], [[0; LANES]; 2]);
        let per_register = 4 / a_type.bytes();
        for lane in 0..LANES {
            let (group, thread) = (lane >> 2, lane & 3);
            for i in 0..per_register {
                let k = thread * per_register + i;
                let upper = k + 4 * per_register;
                let shift = i * a_type.bytes() * 8;
                a[0][lane] |= bits(a_type, small(group, k)) << shift;
                a[1][lane] |= bits(a_type, small(group + 8, k)) << shift;
                b[0][lane] |= bits(b_type, small(k, group + 31)) << shift;
                if upper < depth {
                    a[2][lane] |= bits(a_type, small(group, upper)) << shift;
                    a[3][lane] |= bits(a_type, small(group + 8, upper)) << shift;
                    b[1][lane] |= bits(b_type, small(upper, group + 31)) << shift;
                }
            }
        }
        (a, b)
    }

    #[test]
    fn mma_is_the_matrix_product() {
        use OperandType::*;
        let shapes = [
            (Bf16, Bf16, 16),
            (Bf16, Bf16, 8),
            (F16, F16, 16),
            (F16, F16, 8),
            (Tf32, Tf32, 8),
            (Tf32, Tf32, 4),
            (E4m3, E4m3, 32),
            (E5m2, E4m3, 32),
            (E4m3, E5m2, 16),
        ];
        for (a_type, b_type, depth) in shapes {
            let (a, b) = operands(a_type, b_type, depth);
            let shape = MmaShape { depth, a_type, b_type };
            let product =
                |row: usize, column: usize| (0..depth).map(|k| small(row, k) * small(k, column + 31)).sum::<f64>();
            // Accumulators 0 and 1 are of the upper 8 rows, 2 and 3 of the lower.
            let at = |r: usize, lane: usize| (lane / 4 + if r < 2 { 0 } else { 8 }, lane % 4 * 2 + (r & 1));
            let mut d = [[1.5; LANES]; 4];
            mma(shape, &a, &b, &mut d).unwrap();
            let mut packed = [[0x3C00_3C00; LANES]; 2];
            mma_f16(shape, &a, &b, &mut packed).unwrap();
            for r in 0..4 {
                for lane in 0..LANES {
                    let (row, column) = at(r, lane);
                    assert_eq!(d[r][lane] as f64, 1.5 + product(row, column), "{shape:?} {r} {lane}");
                    let half = half::f16::from_bits((packed[r / 2][lane] >> (r % 2 * 16)) as u16);
                    assert_eq!(half.to_f64(), 1.0 + product(row, column));
                }
            }
        }
    }

    #[test]
    fn impossible_shapes_are_errors() {
        use OperandType::*;
        for (depth, a_type, b_type) in
            [(32, Bf16, Bf16), (0, F16, F16), (16, Bf16, F16), (16, Tf32, Tf32), (8, E4m3, E4m3)]
        {
            let error =
                mma(MmaShape { depth, a_type, b_type }, &[[0; LANES]; 4], &[[0; LANES]; 2], &mut [[0.0; LANES]; 4]);
            assert_eq!(error, Err(MmaError::Shape { depth, a: a_type, b: b_type }));
        }
    }
}
