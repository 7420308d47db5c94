//! Whole kernels as LLVM compiles them from Rust, against the same Rust on the host.

#[path = "data/compute.rs"]
mod compute;

use ptx_sim::{Arg, Launch, Machine, Module, RunOptions};

const PTX: [&str; 2] = [include_str!("data/compiled_o1.ptx"), include_str!("data/compiled_o3.ptx")];

#[test]
fn compiled_rust_computes_what_the_host_does() {
    for (level, ptx) in PTX.into_iter().enumerate() {
        let module = Module::parse(ptx).unwrap();
        assert_eq!(module.entries().collect::<Vec<_>>(), ["k"]);
        let mut machine = Machine::new(2);
        let length = 1000u64;
        let out = machine.alloc(1, 8 * length, "out").unwrap();
        let launch = Launch {
            device: 1,
            module: &module,
            entry: "k",
            grid: [9, 1, 1],
            cluster: [1, 1, 1],
            block: [112, 1, 1],
            shared_bytes: 0,
            args: vec![Arg::U64(out), Arg::U64(length)],
        };
        machine.run(&[launch], &RunOptions { residency: Some(4), ..RunOptions::default() }).unwrap();
        let mut bytes = vec![0; 8 * length as usize];
        machine.read(out, &mut bytes).unwrap();
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let value = u64::from_le_bytes(word.try_into().unwrap());
            assert_eq!(value, compute::compute(index as u64), "file {level}, thread {index}");
        }
    }
}

#[test]
fn errors_name_the_rust_line() {
    let module = Module::parse(PTX[1]).unwrap();
    let mut machine = Machine::new(1);
    let out = machine.alloc(0, 80, "out").unwrap();
    let launch = Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::U64(out), Arg::U64(32)],
    };
    let error = machine.run(&[launch], &RunOptions::default()).unwrap_err().to_string();
    assert!(error.contains("`out`+80"), "{error}");
    assert!(error.contains("src/compiled.rs:"), "{error}");
}
