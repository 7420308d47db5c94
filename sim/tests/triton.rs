//! Kernels that Triton compiled for sm_90 (`data/triton_kernels.py`): a matrix product on wgmma, and a softmax.

use half::f16;
use ptx_sim::{Arg, Launch, Machine, Module, RunOptions, SimError};

/// Bytes of dynamic shared memory, as Triton's metadata has them.
const PRODUCT_SHARED: u32 = 24576;
const SOFTMAX_SHARED: u32 = 16;

fn upload<T: bytemuck::Pod>(machine: &mut Machine, name: &str, values: &[T]) -> u64 {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let address = machine.alloc(0, bytes.len() as u64, name).unwrap();
    machine.write(address, bytes).unwrap();
    address
}

fn download(machine: &mut Machine, address: u64, length: usize) -> Vec<f32> {
    let mut values = vec![0f32; length];
    machine.read(address, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

/// Runs a kernel; Triton adds two scratch pointers, which these do not use, behind its parameters.
fn run(
    machine: &mut Machine,
    ptx: &str,
    entry: &str,
    grid: [u32; 3],
    shared_bytes: u32,
    mut args: Vec<Arg>,
    seed: u64,
) -> Result<(), SimError> {
    let module = Module::parse(ptx).unwrap();
    args.extend([Arg::U64(0), Arg::U64(0)]);
    let launch =
        Launch { device: 0, module: &module, entry, grid, cluster: [1, 1, 1], block: [128, 1, 1], shared_bytes, args };
    machine.run(&[launch], &RunOptions { seed, ..RunOptions::default() }).map(|_| ())
}

/// A product of m x k by k x n, whole numbers so that the sums are exact; returns what the kernel gave, and what is right.
fn product(ptx: &str, [m, n, k]: [usize; 3], seed: u64) -> Result<(Vec<f32>, Vec<f32>), SimError> {
    let mut machine = Machine::new(1);
    let value = |i: usize, salt: usize| f16::from_f32(((i * 7 + i / 13 + salt) % 11) as f32 - 5.0);
    let a: Vec<f16> = (0..m * k).map(|i| value(i, 0)).collect();
    let b: Vec<f16> = (0..k * n).map(|i| value(i, 4)).collect();
    let (da, db) = (upload(&mut machine, "a", &a), upload(&mut machine, "b", &b));
    let c = machine.alloc(0, 4 * (m * n) as u64, "c").unwrap();
    let sizes = [m, n, k].map(|size| Arg::U32(size as u32));
    let args = [Arg::U64(da), Arg::U64(db), Arg::U64(c)].into_iter().chain(sizes).collect();
    let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1];
    run(&mut machine, ptx, "product", grid, PRODUCT_SHARED, args, seed)?;
    let expected = |i: usize| (0..k).map(|at| a[i / n * k + at].to_f32() * b[at * n + i % n].to_f32()).sum();
    Ok((download(&mut machine, c, m * n), (0..m * n).map(expected).collect()))
}

const PRODUCT: &str = include_str!("data/triton_product.ptx");

#[test]
fn matrix_product_on_wgmma() {
    for (seed, sizes) in [[64, 64, 32], [100, 80, 208], [1, 16, 16], [130, 192, 96]].into_iter().enumerate() {
        let (found, expected) =
            product(PRODUCT, sizes, seed as u64).unwrap_or_else(|error| panic!("{sizes:?}: {error}"));
        assert!(found == expected, "{sizes:?}");
    }
}

#[test]
fn a_product_that_does_not_wait_for_its_copies_is_found_out() {
    let spoiled = PRODUCT.replace("cp.async.wait_group", "// cp.async.wait_group");
    assert_ne!(spoiled, PRODUCT);
    let wrong = |seed| !matches!(product(&spoiled, [100, 80, 208], seed), Ok((found, expected)) if found == expected);
    assert!((0..20).any(wrong));
}

#[test]
fn softmax() {
    for columns in [1, 33, 512, 1000, 1024] {
        let mut machine = Machine::new(1);
        let rows = 3;
        let x: Vec<f32> = (0..rows * columns).map(|i| ((i * 37) % 101) as f32 * 0.13 - 6.0).collect();
        let input = upload(&mut machine, "x", &x);
        let out = machine.alloc(0, 4 * x.len() as u64, "out").unwrap();
        let args = vec![Arg::U64(out), Arg::U64(input), Arg::U32(columns as u32)];
        let ptx = include_str!("data/triton_softmax.ptx");
        run(&mut machine, ptx, "softmax", [rows as u32, 1, 1], SOFTMAX_SHARED, args, columns as u64).unwrap();
        let found = download(&mut machine, out, x.len());
        for (row, (found, x)) in found.chunks(columns).zip(x.chunks(columns)).enumerate() {
            let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
            for (column, (found, x)) in found.iter().zip(x).enumerate() {
                let expected = f64::from(*x).exp() / sum;
                let error = (f64::from(*found) - expected).abs();
                assert!(error <= 1e-6 * expected.max(1e-3), "row {row}, column {column}: {found} {expected}");
            }
        }
    }
}
