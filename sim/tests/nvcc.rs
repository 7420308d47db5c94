//! Kernels that nvcc made from CUDA C++ (`data/nvcc.cu`, `data/nvcc_mma.cu`).

use ptx_sim::{Arg, Launch, Machine, Module, RunOptions};

fn module() -> Module {
    Module::parse(include_str!("data/nvcc.ptx")).unwrap()
}

fn upload<T: bytemuck::Pod>(machine: &mut Machine, name: &str, values: &[T]) -> u64 {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let address = machine.alloc(0, bytes.len() as u64, name).unwrap();
    machine.write(address, bytes).unwrap();
    address
}

fn download<T: bytemuck::Pod>(machine: &mut Machine, address: u64, length: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); length];
    machine.read(address, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

fn run(machine: &mut Machine, entry: &str, grid: [u32; 3], block: [u32; 3], args: Vec<Arg>, seed: u64) {
    let module = module();
    let launch = Launch { device: 0, module: &module, entry, grid, cluster: [1, 1, 1], block, shared_bytes: 0, args };
    let options = RunOptions { seed, residency: Some(3), ..RunOptions::default() };
    machine.run(&[launch], &options).unwrap_or_else(|error| panic!("{entry}, seed {seed}: {error}"));
}

#[test]
fn reduction_with_shuffles_and_atomics() {
    let mut machine = Machine::new(1);
    let input: Vec<f32> = (0..5000).map(|i| (i % 100) as f32).collect();
    let (a, out) = (upload(&mut machine, "in", &input), upload(&mut machine, "out", &[0f32]));
    for seed in 0..4 {
        machine.write(out, &0f32.to_le_bytes()).unwrap();
        let args = vec![Arg::U64(a), Arg::U64(out), Arg::U32(5000)];
        run(&mut machine, "reduce", [7, 1, 1], [256, 1, 1], args, seed);
        assert_eq!(download::<f32>(&mut machine, out, 1), [247_500.0]);
    }
}

#[test]
fn tiled_product() {
    let n = 37;
    let mut machine = Machine::new(1);
    let value = |i: usize, salt: usize| ((i * 7 + salt) % 11) as f32 - 5.0;
    let a: Vec<f32> = (0..n * n).map(|i| value(i, 0)).collect();
    let b: Vec<f32> = (0..n * n).map(|i| value(i, 4)).collect();
    let (da, db) = (upload(&mut machine, "a", &a), upload(&mut machine, "b", &b));
    let c = machine.alloc(0, 4 * (n * n) as u64, "c").unwrap();
    let args = vec![Arg::U64(da), Arg::U64(db), Arg::U64(c), Arg::U32(n as u32)];
    run(&mut machine, "product", [3, 3, 1], [16, 16, 1], args, 1);
    let c = download::<f32>(&mut machine, c, n * n);
    for row in 0..n {
        for column in 0..n {
            let expected: f32 = (0..n).map(|k| a[row * n + k] * b[k * n + column]).sum();
            assert_eq!(c[row * n + column], expected, "row {row}, column {column}");
        }
    }
}

#[test]
fn mathematical_functions() {
    let n = 100usize;
    let mut machine = Machine::new(1);
    let d: Vec<f64> = (0..n).map(|i| i as f64 * 0.37 - 15.0).collect();
    let f: Vec<f32> = (0..n).map(|i| i as f32 * 0.11 - 5.0).collect();
    let mut u: Vec<u64> = (0..n as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (i % 40)).collect();
    u.extend([0, 0]);
    let h: Vec<u16> = (0..n).map(|i| half::f16::from_f32(i as f32 * 0.25).to_bits()).collect();
    let b: Vec<u16> = (0..n).map(|i| half::bf16::from_f32(i as f32 * 0.5).to_bits()).collect();
    let (dd, du) = (upload(&mut machine, "d", &d), upload(&mut machine, "u", &u));
    let (df, dh) = (upload(&mut machine, "f", &f), upload(&mut machine, "h", &h));
    let db = upload(&mut machine, "b", &b);
    let args = vec![Arg::U64(dd), Arg::U64(du), Arg::U64(df), Arg::U32(n as u32), Arg::U64(dh), Arg::U64(db)];
    run(&mut machine, "functions", [2, 1, 1], [64, 1, 1], args, 2);
    let new_u = download::<u64>(&mut machine, du, n + 2);
    let (new_d, new_f) = (download::<f64>(&mut machine, dd, n), download::<f32>(&mut machine, df, n));
    let (new_h, new_b) = (download::<u16>(&mut machine, dh, n), download::<u16>(&mut machine, db, n));
    for i in 0..n {
        let (x, y, z) = (d[i], f64::from(f[i]), u[i]);
        let expected = x.sin() + x.exp() / (x.abs() + 1.0).sqrt();
        assert!((new_d[i] - expected).abs() <= 1e-12 * expected.abs().max(1.0), "d {i}: {} {expected}", new_d[i]);
        let expected = y.sin() * y.exp() + y.abs().powf(0.3f32.into()) + (1.0 + y.abs()).ln() + y.tanh();
        let error = (f64::from(new_f[i]) - expected).abs();
        assert!(error <= 2e-5 * expected.abs().max(1.0), "f {i}: {} {expected}", new_f[i]);
        let high = ((u128::from(z) * u128::from(z.wrapping_mul(77))) >> 64) as u64;
        let bits = u64::from(z.count_ones() + z.leading_zeros());
        let expected = (z / (i as u64 + 3) % 1_000_003).wrapping_add(bits).wrapping_add(z.reverse_bits() ^ high);
        assert_eq!(new_u[i], expected, "u {i}");
        assert_eq!(new_h[i], half::f16::from_f32((i * i) as f32 * 0.0625 + 0.5).to_bits(), "h {i}");
        assert_eq!(new_b[i], half::bf16::from_f32(i as f32 * 0.5 + 1.25).to_bits(), "b {i}");
    }
    assert_eq!(new_u[n..], [n as u64, 7]);
}

#[test]
fn bulk_copies_with_a_library_barrier() {
    for seed in 0..16 {
        let mut machine = Machine::new(1);
        let input: Vec<i32> = (0..2048).map(|i| i * 5).collect();
        let a = upload(&mut machine, "in", &input);
        let out = machine.alloc(0, 8192, "out").unwrap();
        run(&mut machine, "bulk", [8, 1, 1], [96, 1, 1], vec![Arg::U64(a), Arg::U64(out)], seed);
        let expected: Vec<i32> = (0..2048).map(|i| i * 5 + i % 256).collect();
        assert_eq!(download::<i32>(&mut machine, out, 2048), expected, "seed {seed}");
    }
}

#[test]
fn product_on_tensor_cores_with_ldmatrix_and_asynchronous_copies() {
    let module = Module::parse(include_str!("data/nvcc_mma.ptx")).unwrap();
    for (seed, [m, n, k]) in [[32, 32, 32], [64, 96, 160], [96, 32, 64]].into_iter().enumerate() {
        let mut machine = Machine::new(1);
        // Whole numbers: the sums are exact.
        let value = |i: usize, salt: usize| half::f16::from_f32(((i * 7 + i / 17 + salt) % 11) as f32 - 5.0);
        let a: Vec<_> = (0..m * k).map(|i| value(i, 0)).collect();
        let b: Vec<_> = (0..n * k).map(|i| value(i, 4)).collect();
        let (da, db) = (upload(&mut machine, "a", &a), upload(&mut machine, "b", &b));
        let c = machine.alloc(0, 4 * (m * n) as u64, "c").unwrap();
        let sizes = [m, n, k].map(|size| Arg::U32(size as u32));
        let launch = Launch {
            device: 0,
            module: &module,
            entry: "mma_product",
            grid: [m as u32 / 32, n as u32 / 32, 1],
            cluster: [1, 1, 1],
            block: [128, 1, 1],
            shared_bytes: 0,
            args: [Arg::U64(da), Arg::U64(db), Arg::U64(c)].into_iter().chain(sizes).collect(),
        };
        let options = RunOptions { seed: seed as u64, ..RunOptions::default() };
        machine.run(&[launch], &options).unwrap_or_else(|error| panic!("{m} x {n} x {k}: {error}"));
        let expected =
            |i: usize| -> f32 { (0..k).map(|at| a[i / n * k + at].to_f32() * b[i % n * k + at].to_f32()).sum() };
        let expected: Vec<f32> = (0..m * n).map(expected).collect();
        assert!(download::<f32>(&mut machine, c, m * n) == expected, "{m} x {n} x {k}");
    }
}
