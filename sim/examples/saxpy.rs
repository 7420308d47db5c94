//! Runs `saxpy.ptx` on two simulated devices at once, with many interleavings, and looks at what it gives, prints and costs.
//!
//!     cargo run -p ptx-sim --example saxpy

use ptx_sim::{Arg, Launch, Machine, Module, RunOptions};

const COUNT: usize = 1000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let module = Module::parse(include_str!("saxpy.ptx"))?;
    for seed in 0..10 {
        let mut machine = Machine::new(2);
        let mut launches = Vec::new();
        let mut results = Vec::new();
        for device in 0..machine.devices() {
            let x: Vec<u8> = (0..COUNT).flat_map(|i| (i as f32).to_le_bytes()).collect();
            let buffers = ["x", "y"].map(|name| machine.alloc(device, 4 * COUNT as u64, name));
            let [x_at, y_at] = buffers;
            let (x_at, y_at) = (x_at?, y_at?);
            machine.write(x_at, &x)?;
            machine.fill(y_at, 4 * COUNT as u64, 0)?;
            results.push(y_at);
            launches.push(Launch {
                device,
                module: &module,
                entry: "saxpy",
                grid: [COUNT.div_ceil(128) as u32, 1, 1],
                cluster: [1, 1, 1],
                block: [128, 1, 1],
                shared_bytes: 0,
                args: vec![Arg::U64(x_at), Arg::U64(y_at), Arg::F32(2.0), Arg::U32(COUNT as u32)],
            });
        }
        let costs = machine.run(&launches, &RunOptions { seed, checks: true, ..RunOptions::default() })?;
        for y_at in results {
            let mut y = vec![0; 4 * COUNT];
            machine.read(y_at, &mut y)?;
            let value = |i: usize| f32::from_le_bytes([y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]]);
            assert!((0..COUNT).all(|i| value(i) == 2.0 * i as f32));
        }
        println!("seed {seed}: {} and {} warp instructions", costs[0].instructions, costs[1].instructions);
    }
    Ok(())
}
