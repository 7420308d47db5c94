//! What `compiled.rs` computes on the device, and `tests/compiled.rs` on the host.

#[derive(Clone, Copy)]
struct Step {
    multiplier: u64,
    increment: u32,
    rotate: u8,
}

static STEPS: [Step; 3] = [
    Step { multiplier: 6364136223846793005, increment: 1442695041, rotate: 13 },
    Step { multiplier: 2862933555777941757, increment: 3037000493, rotate: 7 },
    Step { multiplier: 3202034522624059733, increment: 1, rotate: 51 },
];

/// Structures by value, a table of structures, 64-bit arithmetic.
#[inline(never)]
fn mix(step: Step, value: u64) -> u64 {
    (value.wrapping_mul(step.multiplier) ^ step.increment as u64).rotate_left(step.rotate as u32)
}

/// A local array indexed at run time, loops of data-dependent length.
#[inline(never)]
fn sort_and_pick(seed: u64) -> u64 {
    let mut values = [0u16; 24];
    let mut state = seed;
    for value in &mut values {
        state = mix(STEPS[(state % 3) as usize], state);
        *value = (state >> 40) as u16;
    }
    for end in (1..values.len()).rev() {
        for at in 0..end {
            if values[at] > values[at + 1] {
                values.swap(at, at + 1);
            }
        }
    }
    values[(seed % 24) as usize] as u64
}

/// A dense match, which becomes a branch table.
#[inline(never)]
fn dispatch(kind: u32, x: u64) -> u64 {
    match kind {
        0 => x / 7,
        1 => x % 1_000_003,
        2 => (x as u32).leading_zeros() as u64 | (x.count_ones() as u64) << 8 | (x.trailing_zeros() as u64) << 16,
        3 => x.reverse_bits(),
        4 => ((x as u128 * 0x1234_5678_9abc_def1) >> 64) as u64,
        5 => (x as i64 >> 5) as u64 ^ x.swap_bytes(),
        6 => sort_and_pick(x),
        7 => (x as i32).saturating_add(i32::MAX / 2) as u32 as u64,
        8 => (x as i8 as i64).wrapping_abs() as u64,
        9 => x.checked_mul(3).unwrap_or(99),
        _ => x ^ 0xdead,
    }
}

/// Floating point: conversions, square root, divisions, comparisons.
#[inline(never)]
fn float(x: u64) -> u64 {
    let a = (x as u32 as f32) / 1000.0 - 3.5;
    let b = ((x >> 32) as i32 as f64) / 1e5;
    let c = if a > 2.0e5 { a - 1.0 } else { a * a + 0.25 };
    let d = (b * b + 1.0) / (a.abs() as f64 + 0.5);
    let e = c.clamp(-1.0, 1e9) as i32 as i64;
    (e as u64) ^ ((d as f32).to_bits() as u64) << 32 ^ (b as i64 as u64).rotate_left(9)
}

/// What thread `index` computes; the test runs this on the host too.
pub fn compute(index: u64) -> u64 {
    let mut x = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xabcd_ef01;
    let rounds = index % 5 + 1;
    for round in 0..rounds {
        x = dispatch(((x >> 7) % 12) as u32, x).wrapping_add(mix(STEPS[(round % 3) as usize], x));
        x ^= float(x);
    }
    x
}
