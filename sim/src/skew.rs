//! Unfair scheduling: what a run of fair choices would not show in any number of seeds.
//!
//! In a run with an odd seed something is held back for a while, then something else: a warp, the warps of one role (one place in all
//! CTAs), a CTA, or a device as a whole, whose SMs are then so many times slower than others'. As in probabilistic concurrency testing, few
//! changes at random moments reach what takes one long delay at the right moment. What is held back still goes on where nothing else
//! can.

use crate::random::Random;

/// How often a choice is made again when it falls on what is held back.
const DRAWS: u32 = 8;
/// A change comes after 2^6 to 2^14 instructions of a device's warps.
const SHORTEST: u64 = 6;
const LENGTHS: u64 = 9;
/// How many times slower a device is that is held back.
const SLOWNESS: u64 = 16;

/// What is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Nothing,
    /// A warp of a CTA, by its slot.
    Warp(usize, usize),
    /// The same warp of all CTAs.
    Role(usize),
    /// A CTA, by its slot.
    Cta(usize),
    Device,
}

/// Who is held back on a device, and until when.
#[derive(Debug)]
pub(crate) struct Skew {
    on: bool,
    held: Held,
    /// The step of the next change.
    until: u64,
}

impl Skew {
    pub fn new(seed: u64) -> Self {
        Self { on: seed & 1 == 1, held: Held::Nothing, until: 0 }
    }

    /// One of the warps that can go on, by its place.
    pub fn choose(&mut self, ready: &[(usize, usize)], step: u64, random: &mut Random) -> usize {
        let mut draw = || random.below(ready.len() as u64) as usize;
        let mut chosen = draw();
        if !self.on {
            return chosen;
        }
        for _ in 1..DRAWS {
            if !self.holds(ready[chosen]) {
                break;
            }
            chosen = draw();
        }
        if step >= self.until {
            let (slot, warp) = ready[draw()];
            self.held = match random.below(6) {
                0 => Held::Warp(slot, warp),
                1 => Held::Role(warp),
                2 => Held::Cta(slot),
                3 => Held::Device,
                _ => Held::Nothing,
            };
            let length = SHORTEST + random.below(LENGTHS);
            self.until = step + random.below(1 << length);
        }
        chosen
    }

    fn holds(&self, (slot, warp): (usize, usize)) -> bool {
        match self.held {
            Held::Warp(held_slot, held_warp) => (held_slot, held_warp) == (slot, warp),
            Held::Role(held) => held == warp,
            Held::Cta(held) => held == slot,
            Held::Nothing | Held::Device => false,
        }
    }

    /// How many times slower than others the device is.
    pub fn slowness(&self) -> u64 {
        if self.held == Held::Device { SLOWNESS } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each of eight warps of four CTAs was chosen, in 200 runs of 1,000 choices: the least often of a run.
    fn least(seeds: impl Iterator<Item = u64>) -> Vec<u32> {
        let ready: Vec<(usize, usize)> = (0..32).map(|index| (index / 8, index % 8)).collect();
        let run = |seed| {
            let (mut skew, mut random) = (Skew::new(seed), Random::new(seed));
            let mut counts = [0; 32];
            for step in 0..1000 {
                counts[skew.choose(&ready, 10 * step, &mut random)] += 1;
            }
            counts.into_iter().min().unwrap_or(0)
        };
        seeds.map(run).collect()
    }

    #[test]
    fn odd_seeds_starve_someone_and_even_ones_nobody() {
        let fair = least((0..200).step_by(2));
        let skewed = least((1..200).step_by(2));
        assert!(fair.iter().all(|count| *count >= 8), "{fair:?}");
        assert!(skewed.iter().filter(|count| **count < 8).count() > 10, "{skewed:?}");
    }

    #[test]
    fn what_is_held_back_goes_on_where_nothing_else_can() {
        let (mut skew, mut random) = (Skew::new(1), Random::new(1));
        for step in 0..1000 {
            assert_eq!(skew.choose(&[(3, 2)], 100 * step, &mut random), 0);
        }
    }
}
