//! Runs a few lines of PTX and gives back what they stored.
#![allow(dead_code)]

use ptx_sim::{Arg, Cost, Launch, Machine, Module, RunOptions, SimError};

/// A kernel `k(.u64 out, .u64 in)` around `body`, with registers of every kind, `%rd1` = `out + 4 * %tid.x`, `%rd2` =
/// `out`, `%rd3` = `in`, `%r1` = `%tid.x`, and the module-level declarations in `globals`.
pub fn kernel(globals: &str, body: &str) -> String {
    format!(
        ".version 8.6\n.target sm_90a\n.address_size 64\n{globals}\n\
         .visible .entry k(.param .u64 out, .param .u64 in)\n{{\n\
         .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %rd<64>; .reg .b32 %f<64>; .reg .b64 %fd<8>;\n\
         ld.param.u64 %rd2, [out]; ld.param.u64 %rd3, [in]; mov.u32 %r1, %tid.x;\n\
         mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %rd2;\n{body}\nret;\n}}\n"
    )
}

/// How a test runs its kernel.
#[derive(Clone)]
pub struct Setup {
    pub threads: u32,
    pub ctas: u32,
    pub cluster: u32,
    pub shared_bytes: u32,
    pub out_words: usize,
    pub input: Vec<u8>,
    pub options: RunOptions,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            threads: 32,
            ctas: 1,
            cluster: 1,
            shared_bytes: 0,
            out_words: 1024,
            input: vec![0; 16],
            options: RunOptions { step_limit: Some(10_000_000), ..RunOptions::default() },
        }
    }
}

/// Runs `ptx`; the output buffer starts as zeros.
pub fn run(ptx: &str, setup: &Setup) -> Result<(Vec<u32>, Cost), SimError> {
    let module = Module::parse(ptx).unwrap_or_else(|error| panic!("{error}"));
    let mut machine = Machine::new(1);
    let out = machine.alloc(0, 4 * setup.out_words as u64, "out")?;
    machine.fill(out, 4 * setup.out_words as u64, 0)?;
    let input = machine.alloc(0, setup.input.len() as u64, "in")?;
    machine.write(input, &setup.input)?;
    let launch = Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [setup.ctas, 1, 1],
        cluster: [setup.cluster, 1, 1],
        block: [setup.threads, 1, 1],
        shared_bytes: setup.shared_bytes,
        args: vec![Arg::U64(out), Arg::U64(input)],
    };
    let cost = machine.run(&[launch], &setup.options)?[0];
    let mut bytes = vec![0; 4 * setup.out_words];
    machine.read(out, &mut bytes)?;
    let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    Ok((words, cost))
}

/// Runs a body in one warp and gives back the word each lane stored at `[%rd1]`.
pub fn lanes(body: &str) -> Vec<u32> {
    let (words, _) = run(&kernel("", body), &Setup::default()).unwrap_or_else(|e| panic!("{e}"));
    words[..32].to_vec()
}

/// The error that a body ends with, as text.
pub fn error(globals: &str, body: &str, setup: &Setup) -> String {
    match run(&kernel(globals, body), setup) {
        Ok(_) => panic!("the kernel ran to its end"),
        Err(error) => error.to_string(),
    }
}
