//! `atom` and `red`.

use super::access::{check_aligned, shared_range};
use super::cluster::state_at;
use super::{Context, Executed, Flow};
use crate::check::{self, Mode, shared_key};
use crate::convert::arithmetic::{Extremum, ExtremumMode, HalfMode, HalfType};
use crate::cost::Direction;
use crate::error::Fault;
use crate::memory::{GlobalMemory, Window, window_offset};
use crate::program::{Atomic, AtomicOperation, AtomicType, Space};
use crate::registers::{Register, lanes};

/// The new value of an element of `bytes` bytes.
pub(crate) fn combine(
    operation: AtomicOperation,
    kind: AtomicType,
    bytes: u32,
    old: u64,
    operand: u64,
    swap: u64,
) -> u64 {
    use AtomicOperation as O;
    use AtomicType as T;
    let signed = |value: u64| {
        let shift = 64 - 8 * bytes;
        (value << shift) as i64 >> shift
    };
    let half = match kind {
        T::F16 => Some(HalfType::F16),
        T::Bf16 => Some(HalfType::Bf16),
        _ => None,
    };
    let extremum = |which| {
        half.map(|format| {
            let mode = ExtremumMode::default();
            u64::from(format.extremum(which, old as u16, operand as u16, mode))
        })
    };
    let value = match operation {
        O::Add => match (kind, half) {
            (_, Some(format)) => u64::from(format.add(old as u16, operand as u16, HalfMode::default())),
            (T::F32, _) => {
                let sum = f32::from_bits(old as u32) + f32::from_bits(operand as u32);
                u64::from(sum.to_bits())
            }
            (T::F64, _) => (f64::from_bits(old) + f64::from_bits(operand)).to_bits(),
            _ => old.wrapping_add(operand),
        },
        O::And => old & operand,
        O::Or => old | operand,
        O::Xor => old ^ operand,
        O::Exchange => operand,
        O::CompareAndSwap => {
            if old == operand {
                swap
            } else {
                old
            }
        }
        O::Increment => {
            if old >= operand {
                0
            } else {
                old + 1
            }
        }
        O::Decrement => {
            if old == 0 || old > operand {
                operand
            } else {
                old - 1
            }
        }
        O::Min => extremum(Extremum::Min).unwrap_or_else(|| match kind {
            T::Signed => signed(old).min(signed(operand)) as u64,
            _ => old.min(operand),
        }),
        O::Max => extremum(Extremum::Max).unwrap_or_else(|| match kind {
            T::Signed => signed(old).max(signed(operand)) as u64,
            _ => old.max(operand),
        }),
    };
    if bytes == 8 { value } else { value & ((1 << (8 * bytes)) - 1) }
}

impl Context<'_> {
    /// Lanes go in order, one after the other.
    pub(super) fn atomic(&mut self, atomic: &Atomic, index: usize, active: u32) -> Executed {
        let addresses = self.addresses(atomic.address);
        let whole = (atomic.element * atomic.packed) as usize * atomic.operand.len();
        let (mut changed, mut digest) = (false, u64::from(active));
        if atomic.order.releases() {
            self.release(atomic.scope);
        }
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let mut address = addresses[lane];
            let shared = match atomic.space {
                Space::Shared | Space::Cluster => Some(atomic.space),
                Space::Generic if Window::of(address) == Window::Shared => {
                    address = window_offset(address);
                    Some(Space::Cluster)
                }
                Space::Generic if Window::of(address) == Window::Local => {
                    return Err(Fault::Operand("an atomic on local memory".to_owned()));
                }
                _ => None,
            };
            if let Some(space) = shared {
                let place = self.locate(address, space)?;
                let shared = &mut state_at(self.state, self.peers, place).shared;
                let at = shared_range(shared, place.address, whole)?;
                if !shared.is_written(at, whole) {
                    let fault = Fault::Uninitialised {
                        place: super::access::shared_place(shared, place.address),
                        bytes: whole as u64,
                    };
                    self.findings.judge(fault, self.pc, 1 << lane)?;
                    shared.mark(at, whole);
                }
                let data = &mut shared.data_mut()[at..at + whole];
                changed |= apply(&mut self.warp.registers, atomic, lane, data, &mut digest);
                self.check_atomic(atomic, lane, shared_key(place.cta, place.address), whole)?;
                continue;
            }
            check_aligned(self.memory, address, whole)?;
            self.memory.perform(
                self.state.device,
                self.state.cluster.id(),
                &(address..address.saturating_add(whole as u64)),
            );
            let local = GlobalMemory::device_of(address) == self.state.device;
            let (allocation, offset) = self.memory.find(address, whole as u64)?;
            if !allocation.bytes.is_written(offset, whole) {
                let fault = Fault::Uninitialised { place: self.memory.place(address), bytes: whole as u64 };
                self.findings.judge(fault, self.pc, 1 << lane)?;
            }
            let (allocation, offset) = self.memory.find(address, whole as u64)?;
            allocation.bytes.mark(offset, whole);
            if local {
                allocation.lines.touch(offset, whole, Direction::Write, self.cost);
            } else {
                allocation.lines.cross(offset, whole, Direction::Write, self.cost);
                if atomic.destination.is_some() {
                    allocation.lines.cross(offset, whole, Direction::Read, self.cost);
                }
            }
            let data = &mut allocation.bytes.data_mut()[offset..offset + whole];
            digest ^= address;
            changed |= apply(&mut self.warp.registers, atomic, lane, data, &mut digest);
            self.check_atomic(atomic, lane, address, whole)?;
        }
        self.fault_lanes = 0;
        if changed {
            *self.progress += 1;
            self.warp.polls.reset();
            return Ok(Flow::Next);
        }
        Ok(self.poll(index, digest))
    }
}

impl Context<'_> {
    fn check_atomic(&mut self, atomic: &Atomic, lane: usize, key: u64, bytes: usize) -> Result<(), Fault> {
        let Some(checker) = self.checker.as_deref_mut() else {
            return Ok(());
        };
        let (warp, lanes, bytes) = (self.agent, 1 << lane, bytes as u64);
        let (order, scope) = (atomic.order, atomic.scope);
        let access = check::Access {
            warp,
            lanes,
            pc: self.pc,
            reads: true,
            mode: Mode::Write,
            strong: Some(scope),
            read_only: false,
            waits: false,
        };
        checker.access(access, key, bytes)?;
        if atomic.destination.is_some() {
            checker.observe(warp, lanes, key, bytes, order, scope);
        }
        checker.publish(warp, lanes, key, bytes, order, scope, true);
        Ok(())
    }
}

/// Changes the bytes of one lane; whether they are different now.
fn apply(
    registers: &mut crate::registers::Registers,
    atomic: &Atomic,
    lane: usize,
    data: &mut [u8],
    digest: &mut u64,
) -> bool {
    let element = atomic.element as usize;
    let width = element * atomic.packed as usize;
    let bits = 8 * atomic.element;
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    let mut changed = false;
    for (index, operand) in atomic.operand.iter().enumerate() {
        let operand = operand.lane(registers, lane);
        let swap = atomic.swap.map_or(0, |register: Register| register.lane(registers, lane));
        let mut old_word = 0;
        for part in 0..atomic.packed as usize {
            let at = index * width + part * element;
            let mut word = [0u8; 8];
            word[..element].copy_from_slice(&data[at..at + element]);
            let old = u64::from_le_bytes(word);
            let shift = 8 * (part * element) as u32;
            let new = combine(atomic.operation, atomic.kind, atomic.element, old, operand >> shift & mask, swap & mask);
            data[at..at + element].copy_from_slice(&new.to_le_bytes()[..element]);
            changed |= new != old;
            old_word |= old << shift;
        }
        *digest = (*digest ^ old_word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if let Some(destination) = &atomic.destination {
            destination[index].set_lane(registers, lane, old_word);
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations() {
        use AtomicOperation::*;
        let unsigned = |operation, old, operand| combine(operation, AtomicType::Unsigned, 4, old, operand, 7);
        assert_eq!(unsigned(Add, 0xffff_ffff, 2), 1);
        assert_eq!(unsigned(Exchange, 5, 9), 9);
        assert_eq!(unsigned(CompareAndSwap, 5, 5), 7);
        assert_eq!(unsigned(CompareAndSwap, 5, 6), 5);
        assert_eq!(unsigned(Increment, 3, 3), 0);
        assert_eq!(unsigned(Increment, 2, 3), 3);
        assert_eq!(unsigned(Decrement, 0, 3), 3);
        assert_eq!(unsigned(Decrement, 9, 3), 3);
        assert_eq!(unsigned(Decrement, 2, 3), 1);
        assert_eq!(unsigned(Min, 0xffff_fffe, 1), 1);
        assert_eq!(combine(Min, AtomicType::Signed, 4, 0xffff_fffe, 1, 0), 0xffff_fffe);
        assert_eq!(
            combine(Add, AtomicType::F32, 4, u64::from(1.5f32.to_bits()), u64::from(2f32.to_bits()), 0),
            u64::from(3.5f32.to_bits())
        );
        assert_eq!(combine(Add, AtomicType::Bf16, 2, 0x3f80, 0x3f80, 0), 0x4000);
    }
}
