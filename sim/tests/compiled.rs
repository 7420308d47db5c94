//! Whole kernels as LLVM compiles them from Rust, against the same Rust on the host; and the same PTX spoiled.

#[path = "data/compute.rs"]
mod compute;

use proptest::prelude::*;
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
        block: [32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::U64(out), Arg::U64(32)],
    };
    let error = machine.run(&[launch], &RunOptions::default()).unwrap_err().to_string();
    assert!(error.contains("`out`+80"), "{error}");
    assert!(error.contains("src/compiled.rs:"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn truncated_ptx_never_panics(which in 0..2usize, end in 0..60_000usize) {
        let ptx = PTX[which];
        let _ = Module::parse(&ptx[..end.min(ptx.len())]);
    }

    #[test]
    fn spoiled_ptx_never_panics_nor_hangs(which in 0..2usize, edits in prop::collection::vec((any::<prop::sample::Index>(), 0..6u8, any::<prop::sample::Index>()), 1..8)) {
        let mut tokens: Vec<String> = PTX[which].split_inclusive([' ', '\t', ',', ';', '\n', '.']).map(str::to_owned).collect();
        for (at, kind, other) in edits {
            let (at, other) = (at.index(tokens.len()), other.index(tokens.len()));
            match kind {
                0 => { tokens.remove(at); }
                1 => tokens[at] = tokens[other].clone(),
                2 => tokens.swap(at, other),
                3 => tokens[at] = "-99999999999999999999 ".to_owned(),
                4 => tokens.insert(at, "{ ".to_owned()),
                _ => tokens[at] = "4294967295".to_owned(),
            }
        }
        let Ok(module) = Module::parse(&tokens.concat()) else {
            return Ok(());
        };
        let mut machine = Machine::new(1);
        let out = machine.alloc(0, 8 * 40, "out").unwrap();
        let launch = Launch {
            device: 0,
            module: &module,
            entry: "k",
            grid: [1, 1, 1],
            block: [40, 1, 1],
            shared_bytes: 0,
            args: vec![Arg::U64(out), Arg::U64(40)],
        };
        let _ = machine.run(&[launch], &RunOptions { step_limit: Some(20_000), ..RunOptions::default() });
    }
}
