//! Loads and stores.

use super::cluster::state_at;
use super::{Context, Executed, Flow};
use crate::check::{self, Mode, Order, Scope, shared_key};
use crate::cost::Direction;
use crate::decode::SHARED_START;
use crate::error::Fault;
use crate::memory::{Copied, GlobalMemory, TrackedBytes, Window, window_offset};
use crate::program::{Access, Space};
use crate::registers::{LANES, Registers, Slot, lanes};
use crate::waiver::Check;

/// Repeats of the same read that make it a poll, after which a warp pauses.
const POLL_REPEATS: u32 = 2;

impl Context<'_> {
    pub(super) fn load(&mut self, access: &Access, index: usize, active: u32) -> Executed {
        let addresses = self.addresses(access.address);
        match access.space {
            Space::Generic => {
                for (space, group, offsets) in windows(&addresses, active) {
                    self.load_from(space, access, &offsets, group)?;
                }
            }
            space => self.load_from(space, access, &addresses, active)?,
        }
        if access.order != Order::Weak {
            return Ok(self.note_read(access, index, &addresses, active));
        }
        Ok(Flow::Next)
    }

    /// A read that may be a poll: once it repeats, the warp pauses so that the others run.
    fn note_read(&mut self, access: &Access, index: usize, addresses: &[u64; LANES], active: u32) -> Flow {
        let digest = lanes(active).fold(u64::from(active), |digest, lane| {
            let value = access.registers.iter().fold(addresses[lane], |value, register| {
                value.rotate_left(17).wrapping_add(register.lane(&self.warp.registers, lane))
            });
            (digest ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        self.poll(index, digest)
    }

    /// Counts an operation that found what it found last time.
    pub(super) fn poll(&mut self, index: usize, digest: u64) -> Flow {
        let pc = self.warp.fragments[index].pc;
        if !self.warp.polls.repeated(pc, digest) {
            self.warp.polls.repeats = 0;
            return Flow::Next;
        }
        self.cost.polls += 1;
        self.warp.polled = true;
        self.warp.polls.repeats += 1;
        let repeats = self.warp.polls.repeats;
        if repeats < POLL_REPEATS {
            return Flow::Next;
        }
        let pause = 32u64 << (repeats - POLL_REPEATS).min(6);
        Flow::Pause(self.time() + 1 + self.random.below(pause))
    }

    fn load_from(&mut self, space: Space, access: &Access, addresses: &[u64; LANES], active: u32) -> Result<(), Fault> {
        let bytes = access.element as usize * access.registers.len();
        let first = addresses[active.trailing_zeros() as usize % LANES];
        let uniform = space != Space::Local && lanes(active).all(|lane| addresses[lane] == first);
        // All lanes read the same: once is enough.
        let readers = if uniform { active & active.wrapping_neg() } else { active };
        match space {
            Space::Shared | Space::Cluster => {
                for lane in lanes(readers) {
                    self.fault_lanes = 1 << lane;
                    let place = self.locate(addresses[lane], space)?;
                    let shared = &state_at(self.state, self.peers, place).shared;
                    let at = shared_range(shared, place.address, bytes)?;
                    if !shared.is_written(at, bytes) {
                        let fault =
                            Fault::Uninitialised { place: shared_place(shared, place.address), bytes: bytes as u64 };
                        self.findings.judge(fault, self.pc, 1 << lane)?;
                    }
                    let data = &shared.data()[at..at + bytes];
                    unpack(&mut self.warp.registers, access, lane, data);
                }
            }
            Space::Global | Space::Generic => {
                self.load_global(access, addresses, readers, bytes)?;
            }
            Space::Local => {
                for lane in lanes(readers) {
                    self.fault_lanes = 1 << lane;
                    let at = self.local_range(lane, addresses[lane], bytes)?;
                    if !self.warp.local.is_partly_written(at, bytes) {
                        let fault = Fault::Uninitialised {
                            place: format!("local memory + {}", addresses[lane]),
                            bytes: bytes as u64,
                        };
                        self.findings.judge(fault, self.pc, 1 << lane)?;
                    }
                    let data = &self.warp.local.data()[at..at + bytes];
                    unpack(&mut self.warp.registers, access, lane, data);
                }
            }
            Space::Param => {
                for lane in lanes(readers) {
                    self.fault_lanes = 1 << lane;
                    let at = addresses[lane];
                    let data = usize::try_from(at)
                        .ok()
                        .and_then(|at| self.launch.parameters.get(at..at.checked_add(bytes)?))
                        .ok_or_else(|| Fault::OutOfBounds {
                            place: format!("parameters + {at} (there are {} bytes)", self.launch.parameters.len()),
                            bytes: bytes as u64,
                        })?;
                    unpack(&mut self.warp.registers, access, lane, data);
                }
            }
        }
        if uniform {
            spread(&mut self.warp.registers, access, active);
        }
        if self.checker.is_some() {
            self.check_access(space, access, addresses, readers, if uniform { active } else { 0 }, Mode::Read)?;
        }
        self.fault_lanes = 0;
        Ok(())
    }

    /// Tells the checks of an access by each of `active`, or of one by all of `together`.
    fn check_access(
        &mut self,
        space: Space,
        access: &Access,
        addresses: &[u64; LANES],
        active: u32,
        together: u32,
        mode: Mode,
    ) -> Result<(), Fault> {
        if matches!(space, Space::Local | Space::Param) {
            return Ok(());
        }
        let bytes = u64::from(access.element) * access.registers.len() as u64;
        let (order, scope) = (access.order, access.scope);
        for lane in lanes(active) {
            let lanes = if together == 0 { 1 << lane } else { together };
            let key = match space {
                Space::Shared | Space::Cluster => {
                    let at = self.locate(addresses[lane], space)?;
                    shared_key(at.cta, at.address)
                }
                _ => addresses[lane],
            };
            let Some(checker) = self.checker.as_deref_mut() else {
                return Ok(());
            };
            // The load of an acquire comes before what it learns.
            let one = check::Access {
                warp: self.agent,
                lanes,
                pc: self.pc,
                reads: false,
                mode,
                strong: order.strong(scope),
                read_only: access.read_only,
                waits: false,
            };
            if let Err(fault) = checker.access(one, key, bytes) {
                self.fault_lanes = lanes;
                return Err(fault);
            }
            if order == Order::Weak {
                continue;
            }
            match mode {
                Mode::Read => checker.observe(self.agent, lanes, key, bytes, order, scope),
                Mode::Write => checker.publish(self.agent, lanes, key, bytes, order, scope, false),
            }
        }
        Ok(())
    }

    /// Performs those earlier stores that these lanes' accesses of global memory must come after.
    pub(super) fn perform(&mut self, addresses: &[u64; LANES], active: u32, bytes: usize) {
        let (device, cluster) = (self.state.device, self.state.cluster.id());
        if self.memory.is_settled(device) {
            return;
        }
        let range = |lane: usize| addresses[lane]..addresses[lane].saturating_add(bytes as u64);
        let (first, last) = lanes(active)
            .fold((u64::MAX, 0), |(first, last), lane| (first.min(addresses[lane]), last.max(range(lane).end)));
        if self.memory.is_pending(device, cluster, &(first..last)) {
            for lane in lanes(active) {
                self.memory.perform(device, cluster, &range(lane));
            }
        }
    }

    /// What the CTA's cluster has stored so far becomes visible in a scope.
    pub(super) fn release(&mut self, scope: Scope) {
        self.memory.release(self.state.device, self.state.cluster.id(), scope, self.now, self.random);
    }

    fn load_global(
        &mut self,
        access: &Access,
        addresses: &[u64; LANES],
        active: u32,
        bytes: usize,
    ) -> Result<(), Fault> {
        self.perform(addresses, active, bytes);
        let mut rest = active;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            self.fault_lanes = 1 << lane;
            let start = addresses[lane];
            check_aligned(self.memory, start, bytes)?;
            let local = GlobalMemory::device_of(start) == self.state.device;
            let (allocation, _) = self.memory.find(start, bytes as u64)?;
            let mut unwritten = None;
            // As many lanes as are in this allocation.
            while rest != 0 {
                let lane = rest.trailing_zeros() as usize;
                let offset = addresses[lane].wrapping_sub(allocation.base);
                let length = allocation.bytes.len() as u64;
                if offset > length || offset + bytes as u64 > length || offset % bytes as u64 != 0 {
                    break;
                }
                let offset = offset as usize;
                if !allocation.bytes.is_written(offset, bytes) {
                    unwritten.get_or_insert(lane);
                    if self.findings.fails(Check::UninitialisedRead) {
                        break;
                    }
                }
                let data = &allocation.bytes.data()[offset..offset + bytes];
                unpack(&mut self.warp.registers, access, lane, data);
                if local {
                    allocation.lines.touch(offset, bytes, Direction::Read, self.cost);
                } else {
                    allocation.lines.cross(offset, bytes, Direction::Read, self.cost);
                }
                rest &= rest - 1;
            }
            if let Some(lane) = unwritten {
                self.fault_lanes = 1 << lane;
                let fault = Fault::Uninitialised { place: self.memory.place(addresses[lane]), bytes: bytes as u64 };
                self.findings.judge(fault, self.pc, 1 << lane)?;
            }
        }
        Ok(())
    }

    pub(super) fn store(&mut self, access: &Access, active: u32) -> Executed {
        let addresses = self.addresses(access.address);
        match access.space {
            Space::Generic => {
                for (space, group, offsets) in windows(&addresses, active) {
                    self.store_to(space, access, &offsets, group)?;
                }
            }
            space => self.store_to(space, access, &addresses, active)?,
        }
        Ok(Flow::Next)
    }

    fn store_to(&mut self, space: Space, access: &Access, addresses: &[u64; LANES], active: u32) -> Result<(), Fault> {
        let bytes = access.element as usize * access.registers.len();
        let mut buffer = [0u8; 64];
        let mut late = false;
        if matches!(space, Space::Global | Space::Generic) {
            if access.order.releases() {
                self.release(access.scope);
            }
            // The checks find a missing release in any order of the stores; what they know of strong ones is of one order.
            late = self.checker.is_none() && self.random.below(4) == 0;
            if !late {
                self.perform(addresses, active, bytes);
            }
        }
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            pack(&self.warp.registers, access, lane, &mut buffer);
            let data = &buffer[..bytes];
            let address = addresses[lane];
            match space {
                Space::Shared | Space::Cluster => {
                    let place = self.locate(address, space)?;
                    let state = state_at(self.state, self.peers, place);
                    let at = shared_range(&state.shared, place.address, bytes)?;
                    state.shared.write(at, data);
                }
                Space::Global | Space::Generic => {
                    check_aligned(self.memory, address, bytes)?;
                    let local = GlobalMemory::device_of(address) == self.state.device;
                    let (allocation, offset) = self.memory.find(address, bytes as u64)?;
                    if !late {
                        allocation.bytes.write(offset, data);
                    }
                    if local {
                        allocation.lines.touch(offset, bytes, Direction::Write, self.cost);
                    } else {
                        allocation.lines.cross(offset, bytes, Direction::Write, self.cost);
                    }
                    if late {
                        let (device, cluster) = (self.state.device, self.state.cluster.id());
                        self.memory.store_late(device, cluster, address, data, self.now, self.random);
                    }
                }
                Space::Local => {
                    let at = self.local_range(lane, address, bytes)?;
                    self.warp.local.write(at, data);
                }
                Space::Param => {
                    return Err(Fault::Operand("kernel parameters cannot be written".to_owned()));
                }
            }
        }
        if self.checker.is_some() {
            self.check_access(space, access, addresses, active, 0, Mode::Write)?;
        }
        self.fault_lanes = 0;
        if space != Space::Local {
            *self.progress += 1;
            self.warp.polls.reset();
        }
        Ok(())
    }

    fn local_range(&self, lane: usize, address: u64, bytes: usize) -> Result<usize, Fault> {
        let size = self.warp.local.len() / LANES;
        let place = || format!("local memory + {address} (there are {size} bytes)");
        if address.checked_add(bytes as u64).is_none_or(|end| end > size as u64) {
            return Err(Fault::OutOfBounds { place: place(), bytes: bytes as u64 });
        }
        if !address.is_multiple_of(bytes as u64) {
            return Err(Fault::Misaligned { place: place(), align: bytes as u64 });
        }
        Ok(lane * size + address as usize)
    }

    pub(super) fn copy_local(&mut self, from: u32, to: u32, bytes: u32, active: u32) -> Executed {
        let size = self.warp.local.len() / LANES;
        for lane in lanes(active) {
            let base = lane * size;
            let mut copied = Copied::default();
            let length = bytes as usize;
            let local = &mut self.warp.local;
            local.copy_out(base + from as usize, length, &mut copied);
            local.copy_in(base + to as usize, &copied, 0, length);
        }
        Ok(Flow::Next)
    }
}

/// Active lanes by the window their generic address is in, with the offsets there.
fn windows(addresses: &[u64; LANES], active: u32) -> impl Iterator<Item = (Space, u32, [u64; LANES])> + use<'_> {
    [
        (Window::Global, Space::Global),
        (Window::Shared, Space::Cluster),
        (Window::Local, Space::Local),
        (Window::Param, Space::Param),
        (Window::Code, Space::Global),
    ]
    .into_iter()
    .filter_map(move |(window, space)| {
        let group = lanes(active)
            .filter(|lane| Window::of(addresses[*lane]) == window)
            .fold(0, |group, lane| group | 1 << lane);
        let offsets = match space {
            Space::Global => *addresses,
            _ => addresses.map(window_offset),
        };
        (group != 0).then_some((space, group, offsets))
    })
}

/// An offset in shared memory as a description.
pub(crate) fn shared_place(shared: &TrackedBytes, address: u64) -> String {
    format!("shared memory {address:#x} (the CTA has {SHARED_START:#x} to {:#x})", shared.len())
}

/// Checks an access to shared memory; the address is its offset.
pub(crate) fn shared_range(shared: &TrackedBytes, address: u64, bytes: usize) -> Result<usize, Fault> {
    let end = address.checked_add(bytes as u64);
    if address < u64::from(SHARED_START) || end.is_none_or(|end| end > shared.len() as u64) {
        return Err(Fault::OutOfBounds { place: shared_place(shared, address), bytes: bytes as u64 });
    }
    if !address.is_multiple_of(bytes as u64) {
        return Err(Fault::Misaligned { place: shared_place(shared, address), align: bytes as u64 });
    }
    Ok(address as usize)
}

pub(super) fn check_aligned(memory: &GlobalMemory, address: u64, bytes: usize) -> Result<(), Fault> {
    if address.is_multiple_of(bytes as u64) {
        return Ok(());
    }
    Err(Fault::Misaligned { place: memory.place(address), align: bytes as u64 })
}

/// Moves the bytes of one lane to its registers.
#[inline]
fn unpack(registers: &mut Registers, access: &Access, lane: usize, data: &[u8]) {
    for (register, part) in access.registers.iter().zip(data.chunks_exact(access.element as usize)) {
        let mut value = read_word(part);
        if access.signed {
            let shift = 64 - 8 * access.element;
            value = ((value << shift) as i64 >> shift) as u64;
        }
        register.set_lane(registers, lane, value);
    }
}

/// Up to 8 bytes as a number.
#[inline(always)]
fn read_word(bytes: &[u8]) -> u64 {
    match *bytes {
        [a] => u64::from(a),
        [a, b] => u64::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    }
}

#[inline]
pub(super) fn pack(registers: &Registers, access: &Access, lane: usize, buffer: &mut [u8; 64]) {
    let element = access.element as usize;
    for (index, register) in access.registers.iter().enumerate() {
        let value = register.lane(registers, lane);
        let place = &mut buffer[index * element..(index + 1) * element];
        match element {
            4 => place.copy_from_slice(&(value as u32).to_le_bytes()),
            8 => place.copy_from_slice(&value.to_le_bytes()),
            _ => place.copy_from_slice(&value.to_le_bytes()[..element]),
        }
    }
}

/// Copies what the first active lane has loaded to all of them.
fn spread(registers: &mut Registers, access: &Access, active: u32) {
    use crate::registers::Register;
    let lane = active.trailing_zeros() as usize % LANES;
    for register in &access.registers {
        match *register {
            Register::R16(r) => {
                let value = r.get(registers)[lane];
                r.set(registers, active, &[value; LANES]);
            }
            Register::R32(r) => {
                let value = r.get(registers)[lane];
                r.set(registers, active, &[value; LANES]);
            }
            Register::R64(r) => {
                let value = r.get(registers)[lane];
                r.set(registers, active, &[value; LANES]);
            }
        }
    }
}
