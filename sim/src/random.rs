//! The generator that every choice of a run comes from.

/// SplitMix64: small, fast, and the same on every platform and in every version.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x5bd1_e995_7b3c_1e2d)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number of the order of `1` to `2^exponents`, every order of magnitude alike.
    pub fn spread(&mut self, exponents: u64) -> u64 {
        let magnitude = self.below(exponents);
        1 + self.below(1 << magnitude)
    }
}
