//! Whatever the text, `Module::parse` returns; and what it takes for a kernel without parameters runs to an end or an error.
//!
//! The README of the folder above says how to run it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ptx_sim::{Launch, Machine, Module, RunOptions};

fuzz_target!(|ptx: &str| {
    let Ok(module) = Module::parse(ptx) else {
        return;
    };
    for entry in module.entries() {
        let (grid, block) = ([1, 1, 1], [32, 1, 1]);
        let launch = Launch { device: 0, module: &module, entry, grid, cluster: [1, 1, 1], block, shared_bytes: 0, args: Vec::new() };
        let options = RunOptions { step_limit: Some(1000), ..RunOptions::default() };
        let _ = Machine::new(1).run(&[launch], &options);
    }
});
