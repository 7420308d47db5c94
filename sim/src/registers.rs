//! A warp's registers: 32 lanes each, in one file per width.

/// Lanes of a warp.
pub(crate) const LANES: usize = 32;
/// Every lane active.
pub(crate) const ALL: u32 = u32::MAX;

/// The register file of one warp. Predicates are masks, one bit a lane.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registers {
    pub r16: Vec<[u16; LANES]>,
    pub r32: Vec<[u32; LANES]>,
    pub r64: Vec<[u64; LANES]>,
    pub predicates: Vec<u32>,
}

/// How many registers of each width a program has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RegisterCounts {
    pub r16: u32,
    pub r32: u32,
    pub r64: u32,
    pub predicates: u32,
}

/// A 16-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct R16(pub u32);
/// A 32-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct R32(pub u32);
/// A 64-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct R64(pub u32);
/// A predicate register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Predicate(pub u32);

/// A register of any width but a predicate's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Register {
    R16(R16),
    R32(R32),
    R64(R64),
}

/// A register handle that knows its lane type.
pub(crate) trait Slot: Copy + Send + Sync + 'static {
    /// What one lane holds.
    type Value: Copy + Default + 'static;
    /// All lanes.
    fn get(self, registers: &Registers) -> &[Self::Value; LANES];
    /// All lanes, to write.
    fn get_mut(self, registers: &mut Registers) -> &mut [Self::Value; LANES];

    /// Writes the lanes in `mask`.
    #[inline(always)]
    fn set(self, registers: &mut Registers, mask: u32, value: &[Self::Value; LANES]) {
        let target = self.get_mut(registers);
        if mask == ALL {
            *target = *value;
        } else {
            for lane in 0..LANES {
                if mask >> lane & 1 != 0 {
                    target[lane] = value[lane];
                }
            }
        }
    }
}

macro_rules! slot {
    ($handle:ident, $value:ty, $file:ident) => {
        impl Slot for $handle {
            type Value = $value;
            #[inline(always)]
            fn get(self, registers: &Registers) -> &[$value; LANES] {
                &registers.$file[self.0 as usize]
            }
            #[inline(always)]
            fn get_mut(self, registers: &mut Registers) -> &mut [$value; LANES] {
                &mut registers.$file[self.0 as usize]
            }
        }
    };
}

slot!(R16, u16, r16);
slot!(R32, u32, r32);
slot!(R64, u64, r64);

impl Registers {
    /// Registers that all hold zero.
    pub fn new(counts: RegisterCounts) -> Self {
        Self {
            // Zero pages of the system: a warp touches only the registers of its role.
            r16: bytemuck::zeroed_vec(counts.r16 as usize),
            r32: bytemuck::zeroed_vec(counts.r32 as usize),
            r64: bytemuck::zeroed_vec(counts.r64 as usize),
            predicates: bytemuck::zeroed_vec(counts.predicates as usize),
        }
    }

    pub fn set_predicate(&mut self, predicate: Predicate, mask: u32, value: u32) {
        let target = &mut self.predicates[predicate.0 as usize];
        *target = *target & !mask | value & mask;
    }
}

impl Register {
    pub fn bytes(self) -> u32 {
        match self {
            Self::R16(_) => 2,
            Self::R32(_) => 4,
            Self::R64(_) => 8,
        }
    }

    /// All lanes, zero-extended.
    #[inline]
    pub fn read(self, registers: &Registers) -> [u64; LANES] {
        match self {
            Self::R16(r) => r.get(registers).map(u64::from),
            Self::R32(r) => r.get(registers).map(u64::from),
            Self::R64(r) => *r.get(registers),
        }
    }

    /// One lane, zero-extended.
    #[inline]
    pub fn lane(self, registers: &Registers, lane: usize) -> u64 {
        match self {
            Self::R16(r) => u64::from(r.get(registers)[lane]),
            Self::R32(r) => u64::from(r.get(registers)[lane]),
            Self::R64(r) => r.get(registers)[lane],
        }
    }

    /// Writes one lane, truncated to the register's width.
    #[inline]
    pub fn set_lane(self, registers: &mut Registers, lane: usize, value: u64) {
        match self {
            Self::R16(r) => r.get_mut(registers)[lane] = value as u16,
            Self::R32(r) => r.get_mut(registers)[lane] = value as u32,
            Self::R64(r) => r.get_mut(registers)[lane] = value,
        }
    }

    /// Writes the lanes in `mask`, truncated to the register's width.
    #[inline]
    pub fn write(self, registers: &mut Registers, mask: u32, value: &[u64; LANES]) {
        match self {
            Self::R16(r) => r.set(registers, mask, &value.map(|lane| lane as u16)),
            Self::R32(r) => r.set(registers, mask, &value.map(|lane| lane as u32)),
            Self::R64(r) => r.set(registers, mask, value),
        }
    }
}

/// The lanes of a mask, lowest first.
#[inline(always)]
pub(crate) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            lane
        })
    })
}
