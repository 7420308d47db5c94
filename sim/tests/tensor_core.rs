//! A matrix product as Hopper kernels make it: tensor-map loads, mbarrier, wgmma, tensor-map store.

use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType};
use ptx_sim::wgmma::Fp8Sums;
use ptx_sim::{Arg, Launch, Machine, Module, RunOptions, SimError, TensorMap, TensorMapSpec};

const M: usize = 64;
const N: usize = 16;
const K: usize = 64;

/// D[m][n] = sum of A[m][k] * B[n][k] for 64 x 16 x 64, bf16 in, f32 out, one CTA of one warpgroup.
fn kernel() -> String {
    let list = |register: &str| (0..8).map(|i| format!("%{register}{i}")).collect::<Vec<_>>().join(", ");
    let accumulators = list("acc");
    let products: String = (0..4)
        .map(|step| {
            format!(
                "add.s64 %rd20, %rd10, {0}; add.s64 %rd21, %rd11, {0};
                 {{ .reg .pred p; setp.ne.u32 p, {1}, 0;
                 wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{accumulators}}}, %rd20, %rd21, p, 1, 1, 0, 0; }}\n",
                2 * step,
                step
            )
        })
        .collect();
    // Thread t has rows 16 * warp + lane / 4 (+ 8) and columns 2 * (lane % 4) (+ 8).
    let stores: String = (0..8)
        .map(|r| {
            let (row, column) = (8 * (r / 2 % 2), 8 * (r / 4) + r % 2);
            format!("st.shared.f32 [%r20+{}], %acc{r};\n", 4 * (row * N + column))
        })
        .collect();
    format!(
        ".version 8.6\n.target sm_90a\n.address_size 64\n
         .extern .shared .align 1024 .b8 pool[]; .shared .align 8 .b64 full;
         .visible .entry k(.param .u64 maps) .maxntid 128 {{
         .reg .pred %p<4>; .reg .b32 %r<32>; .reg .b64 %rd<32>; .reg .b32 %acc<8>;
         ld.param.u64 %rd1, [maps]; mov.u32 %r1, %tid.x; mov.u32 %r2, pool; mov.u32 %r3, full; mov.u32 %r10, 0;
         add.u32 %r4, %r2, 8192; setp.ne.u32 %p1, %r1, 0; @%p1 bra LOADED;
         mbarrier.init.shared::cta.b64 [%r3], 1; fence.mbarrier_init.release.cluster;
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {bytes};
         prefetch.tensormap [%rd1];
         cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd1, {{%r10, %r10}}], [%r3];
         add.s64 %rd2, %rd1, 128;
         cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r4], [%rd2, {{%r10, %r10}}], [%r3];
         LOADED: bar.sync 0;
         SPIN: {{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%r3], 0; @!done bra SPIN; }}
         // Descriptors: address / 16, stride 1024 / 16, 128-byte swizzle.
         cvt.u64.u32 %rd10, %r2; shr.u64 %rd10, %rd10, 4; or.b64 %rd10, %rd10, 0x4000004000010000;
         cvt.u64.u32 %rd11, %r4; shr.u64 %rd11, %rd11, 4; or.b64 %rd11, %rd11, 0x4000004000010000;
         wgmma.fence.sync.aligned;
         {products}
         wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
         // Row-major into shared memory, then out by a tensor store.
         shr.u32 %r5, %r1, 5; and.b32 %r6, %r1, 31; shr.u32 %r7, %r6, 2; and.b32 %r8, %r6, 3;
         shl.b32 %r5, %r5, 4; add.u32 %r5, %r5, %r7; mul.lo.u32 %r5, %r5, {row}; shl.b32 %r8, %r8, 3;
         add.u32 %r20, %r5, %r8; add.u32 %r20, %r20, %r2; bar.sync 0;
         {stores}
         fence.proxy.async.shared::cta; bar.sync 0; @%p1 bra END;
         add.s64 %rd3, %rd1, 256;
         cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd3, {{%r10, %r10}}], [%r2];
         cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
         END: ret; }}",
        bytes = 2 * K * (M + N),
        row = 4 * N,
    )
}

fn value(index: usize, salt: usize) -> f32 {
    ((index * 37 + salt) % 17) as f32 / 4.0 - 2.0
}

fn spec(kind: TensorMapDataType, address: u64, columns: usize, rows: usize, swizzle: Swizzle) -> TensorMapSpec {
    TensorMapSpec {
        data_type: kind,
        global_address: address,
        dims: vec![columns as u64, rows as u64],
        strides: vec![(columns * kind.bytes() as usize) as u64],
        box_dims: vec![columns as u32, rows as u32],
        element_strides: vec![1, 1],
        swizzle,
        fill: OutOfBoundsFill::Zero,
    }
}

/// Runs the product with rows of B beyond `rows_of_b` outside the tensor.
fn product(seed: u64, rows_of_b: usize, written_rows: usize, check: bool) -> Result<Vec<f32>, SimError> {
    let module = Module::parse(&kernel()).unwrap();
    let mut machine = Machine::new(1);
    let bf16 = |count: usize, salt: usize| -> Vec<u8> {
        (0..count).flat_map(|index| ((value(index, salt).to_bits() >> 16) as u16).to_le_bytes()).collect()
    };
    let a = machine.alloc(0, (2 * M * K) as u64, "a")?;
    machine.write(a, &bf16(M * K, 1))?;
    let b = machine.alloc(0, (2 * N * K) as u64, "b")?;
    machine.write(b, &bf16(written_rows * K, 5))?;
    let d = machine.alloc(0, (4 * M * N) as u64, "d")?;
    let maps = machine.alloc(0, 384, "maps")?;
    let bf = TensorMapDataType::Bf16;
    let mut of_b = spec(bf, b, K, rows_of_b, Swizzle::B128);
    of_b.box_dims[1] = N as u32;
    for (index, spec) in [spec(bf, a, K, M, Swizzle::B128), of_b, spec(TensorMapDataType::F32, d, N, M, Swizzle::None)]
        .iter()
        .enumerate()
    {
        machine.write(maps + 128 * index as u64, &TensorMap::encode(spec).unwrap())?;
    }
    let launch = Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [128, 1, 1],
        shared_bytes: 16384,
        args: vec![Arg::U64(maps)],
    };
    let options =
        RunOptions { seed, step_limit: Some(1_000_000), check_matrix_operands: check, ..RunOptions::default() };
    let cost = machine.run(&[launch], &options)?[0];
    assert_eq!(cost.tensor_ops, (2 * M * N * K) as u64);
    // A's products are those of its own buffer.
    assert_eq!(machine.traffic(a..a + (2 * M * K) as u64)?.tensor_ops, cost.tensor_ops);
    assert_eq!(machine.traffic(b..b + (2 * N * K) as u64)?.tensor_ops, 0);
    let mut bytes = vec![0; 4 * M * N];
    machine.read(d, &mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect())
}

fn expected(row: usize, column: usize) -> f32 {
    (0..K).map(|k| value(row * K + k, 1) * value(column * K + k, 5)).sum()
}

#[test]
fn the_product_is_right_at_every_seed() {
    // Multiples of 1/4 up to 2: bf16 and the f32 sums are exact.
    for seed in 0..16 {
        let d = product(seed, N, N, true).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for row in 0..M {
            for column in 0..N {
                assert_eq!(d[row * N + column], expected(row, column), "seed {seed}, row {row}, column {column}");
            }
        }
    }
}

#[test]
fn rows_outside_the_tensor_are_zero() {
    let d = product(3, 11, N, true).unwrap();
    for row in 0..M {
        for column in 0..N {
            let wanted = if column < 11 { expected(row, column) } else { 0.0 };
            assert_eq!(d[row * N + column], wanted);
        }
    }
}

#[test]
fn unwritten_operands_are_an_error_unless_allowed() {
    let error = product(1, N, 9, true).unwrap_err().to_string();
    assert!(error.contains("uninitialised") && error.contains("wgmma"), "{error}");
    let d = product(1, N, 9, false).unwrap();
    for row in 0..M {
        for column in 0..9 {
            assert_eq!(d[row * N + column], expected(row, column));
        }
    }
}

/// D[m][n] = scale * sum of A[m][k] * B[n][k] for 64 x `n` x 128 in e4m3; the operands, as a swizzled tensor map leaves them, and
/// the 16 bytes with the scale come by bulk copies. Sums are promoted to f32 after every `promote` steps of 32 columns.
fn e4m3_kernel(n: usize, promote: usize) -> String {
    let registers = n / 2;
    let list = (0..registers).map(|i| format!("%acc{i}")).collect::<Vec<_>>().join(", ");
    let mut products = String::new();
    for step in 0..4 {
        let first = u32::from(step % promote != 0);
        products += &format!(
            "add.s64 %rd20, %rd10, {0}; add.s64 %rd21, %rd11, {0}; setp.ne.u32 %p2, {first}, 0; wgmma.fence.sync.aligned;
             wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{list}}}, %rd20, %rd21, %p2, 1, 1;
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n",
            2 * step,
        );
        if step % promote == promote - 1 {
            products.extend((0..registers).map(|i| format!("fma.rn.f32 %sum{i}, %acc{i}, %f1, %sum{i};\n")));
        }
    }
    let zeros: String = (0..registers).map(|i| format!("mov.b32 %sum{i}, 0;\n")).collect();
    let stores: String = (0..registers)
        .map(|r| {
            let (row, column) = (8 * (r / 2 % 2), 8 * (r / 4) + r % 2);
            format!("st.global.f32 [%rd2+{}], %sum{r};\n", 4 * (row * n + column))
        })
        .collect();
    format!(
        ".version 8.6\n.target sm_90a\n.address_size 64\n
         .extern .shared .align 1024 .b8 pool[]; .shared .align 8 .b64 full;
         .visible .entry k(.param .u64 out, .param .u64 in) .maxntid 128 {{
         .reg .pred %p<4>; .reg .b32 %r<32>; .reg .b64 %rd<32>; .reg .b32 %f<4>; .reg .b32 %acc<{registers}>; .reg .b32 %sum<{registers}>;
         ld.param.u64 %rd2, [out]; ld.param.u64 %rd3, [in]; mov.u32 %r1, %tid.x; mov.u32 %r2, pool; mov.u32 %r3, full;
         add.u32 %r4, %r2, 8192; add.u32 %r6, %r4, {b_bytes}; setp.ne.u32 %p1, %r1, 0; @%p1 bra LOADED;
         mbarrier.init.shared::cta.b64 [%r3], 1; fence.mbarrier_init.release.cluster;
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {all};
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd3], 8192, [%r3];
         add.s64 %rd4, %rd3, 8192;
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd4], {b_bytes}, [%r3];
         add.s64 %rd4, %rd4, {b_bytes}; mov.u32 %r5, 16;
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%rd4], %r5, [%r3];
         LOADED: bar.sync 0;
         SPIN: {{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%r3], 0; @!done bra SPIN; }}
         ld.shared.v2.f32 {{%f1, %f2}}, [%r6+8];
         cvt.u64.u32 %rd10, %r2; shr.u64 %rd10, %rd10, 4; or.b64 %rd10, %rd10, 0x4000004000010000;
         cvt.u64.u32 %rd11, %r4; shr.u64 %rd11, %rd11, 4; or.b64 %rd11, %rd11, 0x4000004000010000;
         {zeros} {products}
         shr.u32 %r5, %r1, 5; and.b32 %r6, %r1, 31; shr.u32 %r7, %r6, 2; and.b32 %r8, %r6, 3;
         shl.b32 %r5, %r5, 4; add.u32 %r5, %r5, %r7; mul.lo.u32 %r5, %r5, {row}; shl.b32 %r8, %r8, 3;
         add.u32 %r5, %r5, %r8; cvt.u64.u32 %rd5, %r5; add.s64 %rd2, %rd2, %rd5;
         {stores} ret; }}",
        b_bytes = 128 * n,
        all = 8192 + 128 * n + 16,
        row = 4 * n,
    )
}

/// Runs it on `a(row, k)` and `b(column, k)`, bytes of e4m3, with scale 0.5.
fn e4m3_product(
    n: usize,
    promote: usize,
    a: impl Fn(usize, usize) -> u8,
    b: impl Fn(usize, usize) -> u8,
    fp8_sums: Fp8Sums,
) -> Vec<f32> {
    let module = Module::parse(&e4m3_kernel(n, promote)).unwrap();
    let mut machine = Machine::new(1);
    let mut input = vec![0u8; 8192 + 128 * n];
    let swizzled = |row: usize, k: usize| row * 128 + (k ^ (row % 8 * 16));
    for k in 0..128 {
        (0..64).for_each(|row| input[swizzled(row, k)] = a(row, k));
        (0..n).for_each(|column| input[8192 + swizzled(column, k)] = b(column, k));
    }
    input.extend([9f32, 9.0, 0.5, 9.0].iter().flat_map(|x| x.to_le_bytes()));
    let buffer = machine.alloc(0, input.len() as u64, "in").unwrap();
    machine.write(buffer, &input).unwrap();
    let out = machine.alloc(0, (4 * 64 * n) as u64, "out").unwrap();
    let launch = Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [128, 1, 1],
        shared_bytes: (8192 + 128 * n + 16) as u32,
        args: vec![Arg::U64(out), Arg::U64(buffer)],
    };
    let options = RunOptions { seed: n as u64, step_limit: Some(1_000_000), fp8_sums, ..RunOptions::default() };
    let cost = machine.run(&[launch], &options).unwrap_or_else(|error| panic!("n = {n}: {error}"))[0];
    assert_eq!(cost.tensor_ops, (2 * 64 * n * 128) as u64);
    let mut bytes = vec![0; 4 * 64 * n];
    machine.read(out, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
}

#[test]
fn e4m3_products_of_all_widths() {
    // Whole numbers from -4 to 4: all sums are exact, with few bits too.
    const BYTES: [u8; 9] = [0xC8, 0xC4, 0xC0, 0xB8, 0x00, 0x38, 0x40, 0x44, 0x48];
    let number = |index: usize, salt: usize| (index * 37 + index / 11 + salt) % 9;
    for n in (8..=256).step_by(8) {
        let (a, b) = (|row, k| number(row * 128 + k, 1), |column, k| number(column * 128 + k, 5));
        let d = e4m3_product(n, 4, |row, k| BYTES[a(row, k)], |column, k| BYTES[b(column, k)], Fp8Sums::Hopper);
        for row in 0..64 {
            for column in 0..n {
                let sum: i32 = (0..128).map(|k| (a(row, k) as i32 - 4) * (b(column, k) as i32 - 4)).sum();
                assert_eq!(d[row * n + column], 0.5 * sum as f32, "n = {n}, row {row}, column {column}");
            }
        }
    }
}

#[test]
fn a_sum_that_is_promoted_too_late_loses_bits() {
    // The first 32 products are 448 * 448 each, all others 8 * 8: beside the sum of the first these are less than its last bit.
    let (large, eight) = (0x7E, 0x50);
    let byte = |_: usize, k: usize| if k < 32 { large } else { eight };
    let exact = 0.5 * (32.0 * 448.0 * 448.0 + 96.0 * 64.0);
    for (promote, sums, expected) in
        [(1, Fp8Sums::Hopper, exact), (4, Fp8Sums::Exact, exact), (4, Fp8Sums::Hopper, 0.5 * 32.0 * 448.0 * 448.0)]
    {
        let d = e4m3_product(8, promote, byte, byte, sums);
        assert!(d.iter().all(|x| *x == expected), "{promote} {sums:?}: {} {expected}", d[0]);
    }
}
