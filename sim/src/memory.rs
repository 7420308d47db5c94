//! Byte memories that know which bytes were written, and the global memory of all devices.

use std::ops::Range;

use crate::check::Scope;
use crate::cost::Lines;
use crate::error::{Fault, SimError};
use crate::random::Random;
use crate::store_buffer::{DEVICE, StoreBuffer};

/// Where an address points: the top byte of a generic address names its window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    Global,
    Shared,
    Local,
    Param,
    Code,
}

const WINDOW_SHIFT: u32 = 56;
const DEVICE_SHIFT: u32 = 40;
/// Allocations are this far apart, so that an overrun never lands in another one.
const GUARD_BYTES: u64 = 4096;
/// Every allocation starts on a multiple of this.
const ALLOCATION_ALIGN: u64 = 1024;

/// Generic address of offset 0 of the shared window.
pub(crate) const SHARED_WINDOW: u64 = 1 << WINDOW_SHIFT;
/// Generic address of offset 0 of the local window.
pub(crate) const LOCAL_WINDOW: u64 = 2 << WINDOW_SHIFT;
/// Generic address of offset 0 of the kernel parameters.
pub(crate) const PARAM_WINDOW: u64 = 3 << WINDOW_SHIFT;
/// Addresses of functions.
pub(crate) const CODE_WINDOW: u64 = 4 << WINDOW_SHIFT;

impl Window {
    /// The window of a generic address.
    #[inline]
    pub fn of(address: u64) -> Self {
        match address >> WINDOW_SHIFT {
            1 => Self::Shared,
            2 => Self::Local,
            3 => Self::Param,
            4 => Self::Code,
            _ => Self::Global,
        }
    }
}

/// Offset of a generic address in its window.
#[inline]
pub(crate) fn window_offset(address: u64) -> u64 {
    address & ((1 << WINDOW_SHIFT) - 1)
}

/// Bytes, with one bit each that says whether it was ever written.
#[derive(Debug, Clone, Default)]
pub(crate) struct TrackedBytes {
    data: Vec<u8>,
    /// Empty if all are.
    written: Vec<u64>,
}

impl TrackedBytes {
    /// `length` bytes, none written.
    pub fn new(length: usize) -> Self {
        Self { data: vec![0; length], written: vec![0; length.div_ceil(64)] }
    }

    /// `length` zeros, all written. They take memory only where something else is written.
    pub fn zeros(length: usize) -> Self {
        Self { data: vec![0; length], written: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether a byte was written.
    fn has(&self, at: usize) -> bool {
        self.written.is_empty() || self.written[at / 64] >> (at % 64) & 1 != 0
    }

    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The bytes, to change some that are written already.
    pub fn data_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// Whether all of a range was written; the caller has checked its bounds.
    #[inline]
    pub fn is_written(&self, offset: usize, length: usize) -> bool {
        if self.written.is_empty() {
            return true;
        }
        let (word, bit) = (offset / 64, offset % 64);
        if bit + length <= 64 && length < 64 {
            let mask = ((1u64 << length) - 1) << bit;
            return self.written[word] & mask == mask;
        }
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let count = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            if self.written[at / 64] & mask != mask {
                return false;
            }
            at += count;
        }
        true
    }

    /// Whether any of a range was written.
    pub fn is_partly_written(&self, offset: usize, length: usize) -> bool {
        (offset..offset + length).any(|at| self.has(at))
    }

    /// Marks a range as written.
    #[inline]
    pub fn mark(&mut self, offset: usize, length: usize) {
        if self.written.is_empty() {
            return;
        }
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let count = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            self.written[at / 64] |= mask;
            at += count;
        }
    }

    /// Forgets that a range was written.
    pub fn unmark(&mut self, offset: usize, length: usize) {
        if self.written.is_empty() {
            self.written = vec![u64::MAX; self.data.len().div_ceil(64)];
        }
        for at in offset..offset + length {
            self.written[at / 64] &= !(1 << (at % 64));
        }
    }

    /// Writes and marks; the caller has checked the bounds.
    #[inline]
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.mark(offset, bytes.len());
    }

    /// Appends a copy of a range to `copied`.
    pub fn copy_out(&self, offset: usize, length: usize, copied: &mut Copied) {
        let start = copied.data.len();
        copied.data.extend_from_slice(&self.data[offset..offset + length]);
        if !self.is_written(offset, length) {
            copied.unwritten.extend((0..length).filter(|at| !self.has(offset + at)).map(|at| start + at));
        }
    }

    /// Writes a part of what was copied, unwritten bytes as unwritten ones.
    pub fn copy_in(&mut self, offset: usize, copied: &Copied, start: usize, length: usize) {
        self.write(offset, &copied.data[start..start + length]);
        let first = copied.unwritten.partition_point(|at| *at < start);
        for &at in &copied.unwritten[first..] {
            if at >= start + length {
                break;
            }
            self.unmark(offset + at - start, 1);
        }
    }
}

/// Bytes on their way from one memory to another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Copied {
    pub data: Vec<u8>,
    /// Places in `data` that nothing had written, in order.
    pub unwritten: Vec<usize>,
}

/// One buffer of global memory.
#[derive(Debug, Clone)]
pub(crate) struct Allocation {
    pub base: u64,
    pub name: String,
    pub bytes: TrackedBytes,
    /// What this run did with it, for the cost counters.
    pub lines: Lines,
}

/// The global memories of all devices, one address space. While devices run side by side, each has its own memory here, and
/// those of the others are away.
#[derive(Debug, Clone, Default)]
pub(crate) struct GlobalMemory {
    devices: Vec<DeviceMemory>,
    /// Stores that are to be performed in memory that is away.
    outbound: Vec<(u64, Vec<u8>)>,
}

#[derive(Debug, Clone, Default)]
struct DeviceMemory {
    away: bool,
    /// In order of their addresses.
    allocations: Vec<Allocation>,
    next: u64,
    /// What the device's CTAs have stored, to any device's memory, and is not performed.
    stores: StoreBuffer,
}

impl GlobalMemory {
    pub fn new(devices: usize) -> Self {
        Self {
            devices: (0..devices as u64)
                .map(|device| DeviceMemory { next: (device + 1) << DEVICE_SHIFT, ..DeviceMemory::default() })
                .collect(),
            outbound: Vec::new(),
        }
    }

    /// As many devices, all of them away.
    pub fn away(devices: usize) -> Self {
        let mut memory = Self::new(devices);
        memory.devices.iter_mut().for_each(|device| device.away = true);
        memory
    }

    /// Moves a device's memory from here to there, or from there to here.
    pub fn exchange(&mut self, device: usize, there: &mut Self) {
        std::mem::swap(&mut self.devices[device], &mut there.devices[device]);
    }

    /// Does so with all memories.
    pub fn exchange_all(&mut self, there: &mut Self) {
        std::mem::swap(&mut self.devices, &mut there.devices);
    }

    /// Whether no device is away.
    #[inline]
    pub fn is_whole(&self) -> bool {
        self.devices.iter().all(|device| !device.away)
    }

    /// Whether an address is in the memory of a device that is away.
    #[inline]
    pub fn is_away(&self, address: u64) -> bool {
        self.devices.get(Self::device_of(address)).is_some_and(|device| device.away)
    }

    /// Whether a release by a cluster must wait, for stores to memory that is away.
    pub fn releases_away(&self, device: usize, cluster: u64, scope: Scope) -> bool {
        let own = (device as u64 + 1) << DEVICE_SHIFT..(device as u64 + 2) << DEVICE_SHIFT;
        let stores = &self.devices[device].stores;
        let holds = || [cluster, DEVICE].iter().any(|owner| stores.holds_outside(*owner, &own));
        scope == Scope::Sys && !self.is_whole() && (!self.outbound.is_empty() || holds())
    }

    /// Performs a store; its range was found when it was stored to.
    fn store(&mut self, address: u64, bytes: &[u8]) {
        if self.is_away(address) {
            self.outbound.push((address, bytes.to_vec()));
        } else if let Ok((allocation, offset)) = self.find(address, bytes.len() as u64) {
            allocation.bytes.write(offset, bytes);
        }
    }

    /// Performs the stores that were to be in memory that was away; whether there were any.
    pub fn deliver(&mut self) -> bool {
        let outbound = std::mem::take(&mut self.outbound);
        outbound.iter().for_each(|(address, bytes)| self.store(*address, bytes));
        !outbound.is_empty()
    }

    pub fn devices(&self) -> usize {
        self.devices.len()
    }

    /// The device whose memory an address is in.
    #[inline]
    pub fn device_of(address: u64) -> usize {
        ((address >> DEVICE_SHIFT) as usize).wrapping_sub(1)
    }

    pub fn allocate(&mut self, device: usize, bytes: u64, name: &str) -> Result<u64, SimError> {
        let devices = self.devices.len();
        let memory = self.devices.get_mut(device).ok_or(SimError::NoDevice { device, devices })?;
        let base = memory.next;
        let end = (device as u64 + 2) << DEVICE_SHIFT;
        if bytes > end - base - 2 * GUARD_BYTES {
            return Err(SimError::Host(Fault::Operand(format!(
                "`{name}` of {bytes} bytes does not fit: a device has 1 TiB of addresses"
            ))));
        }
        memory.next = (base + bytes + GUARD_BYTES).next_multiple_of(ALLOCATION_ALIGN);
        memory.allocations.push(Allocation {
            base,
            name: name.to_owned(),
            bytes: TrackedBytes::new(bytes as usize),
            lines: Lines::new(bytes as usize),
        });
        Ok(base)
    }

    /// Makes all of an allocation zeros, without use of memory for them.
    pub fn zero(&mut self, address: u64) {
        if let Ok((allocation, 0)) = self.find(address, 1) {
            allocation.bytes = TrackedBytes::zeros(allocation.bytes.len());
        }
    }

    pub fn free(&mut self, address: u64) -> Result<(), SimError> {
        let found = self.devices.get_mut(Self::device_of(address)).and_then(|memory| {
            let index = memory.allocations.binary_search_by_key(&address, |allocation| allocation.base).ok()?;
            Some(memory.allocations.remove(index))
        });
        match found {
            Some(_) => Ok(()),
            None => Err(SimError::Host(Fault::Operand(format!(
                "{} is not the start of an allocation",
                self.place(address)
            )))),
        }
    }

    /// The allocation that holds all of a range, and the range's offset in it.
    #[inline]
    pub fn find(&mut self, address: u64, bytes: u64) -> Result<(&mut Allocation, usize), Fault> {
        match self.locate(address, bytes) {
            Some((device, index)) => {
                let allocation = &mut self.devices[device].allocations[index];
                let offset = (address - allocation.base) as usize;
                Ok((allocation, offset))
            }
            None => Err(Fault::OutOfBounds { place: self.place(address), bytes }),
        }
    }

    #[inline]
    fn locate(&self, address: u64, bytes: u64) -> Option<(usize, usize)> {
        let device = Self::device_of(address);
        let allocations = &self.devices.get(device)?.allocations;
        let index = allocations.partition_point(|allocation| allocation.base <= address).checked_sub(1)?;
        let allocation = &allocations[index];
        let offset = address - allocation.base;
        (offset.checked_add(bytes)? <= allocation.bytes.len() as u64).then_some((device, index))
    }

    /// An address as buffer name and offset.
    pub fn place(&self, address: u64) -> String {
        let device = Self::device_of(address);
        let nearest = self.devices.get(device).and_then(|memory| {
            let index = memory.allocations.partition_point(|allocation| allocation.base <= address);
            memory.allocations.get(index.checked_sub(1)?)
        });
        match nearest {
            Some(allocation) => {
                let (offset, length) = (address - allocation.base, allocation.bytes.len() as u64);
                let beyond = if offset >= length {
                    format!(", which is {} bytes past its end", offset - length)
                } else {
                    String::new()
                };
                format!(
                    "`{}`+{offset} (a buffer of {length} bytes on device {device}{beyond}; address {address:#x})",
                    allocation.name
                )
            }
            None => format!("address {address:#x}, which is in no buffer"),
        }
    }

    /// Whether all stores by a device's CTAs are performed.
    #[inline]
    pub fn is_settled(&self, device: usize) -> bool {
        self.devices[device].stores.is_empty()
    }

    /// Whether they are, and have reached memory that is away.
    pub fn is_performed(&self, device: usize) -> bool {
        self.is_settled(device) && self.outbound.is_empty()
    }

    /// Whether a cluster has stored to a range of addresses, or its device has for all its CTAs, and that is not performed.
    pub fn is_pending(&self, device: usize, cluster: u64, range: &Range<u64>) -> bool {
        let stores = &self.devices[device].stores;
        stores.may_hold(range) && (stores.holds(cluster, range) || stores.holds(DEVICE, range))
    }

    /// Changes a device's stores that are not performed, with a function that performs some.
    fn with_stores<T>(
        &mut self,
        device: usize,
        change: impl FnOnce(&mut StoreBuffer, &mut dyn FnMut(u64, &[u8])) -> T,
    ) -> T {
        let mut stores = std::mem::take(&mut self.devices[device].stores);
        let result = change(&mut stores, &mut |address, bytes| self.store(address, bytes));
        self.devices[device].stores = stores;
        result
    }

    /// A store by a CTA of a cluster that may be performed late; the caller has checked the range.
    pub fn store_late(
        &mut self,
        device: usize,
        cluster: u64,
        address: u64,
        bytes: &[u8],
        now: u64,
        random: &mut Random,
    ) {
        self.devices[device].stores.put(cluster, address, bytes, now, random);
    }

    /// Performs the stores that an access by a cluster comes after in the order of its bytes.
    pub fn perform(&mut self, device: usize, cluster: u64, range: &Range<u64>) {
        if !self.is_pending(device, cluster, range) {
            return;
        }
        self.with_stores(device, |stores, perform| {
            stores.take(DEVICE, range, &mut *perform);
            stores.take(cluster, range, perform);
        });
    }

    /// A release by a thread of a cluster: what the cluster has stored so far is visible in the scope.
    pub fn release(&mut self, device: usize, cluster: u64, scope: Scope, now: u64, random: &mut Random) {
        if self.is_settled(device) || scope < Scope::Gpu {
            return;
        }
        let peers = self.devices.len() > 1;
        self.with_stores(device, |stores, perform| {
            if peers {
                stores.pass_on_all(cluster, now, random);
                if scope == Scope::Sys {
                    stores.take(DEVICE, &(0..u64::MAX), perform);
                }
            } else {
                stores.take(cluster, &(0..u64::MAX), perform);
            }
        });
    }

    /// Lets the stores go on whose time has come; whether there were any.
    pub fn advance_stores(&mut self, now: u64, random: &mut Random) -> bool {
        let peers = self.devices.len() > 1;
        let mut any = false;
        for device in 0..self.devices.len() {
            if self.devices[device].stores.is_due(now) {
                any |= self.with_stores(device, |stores, perform| stores.advance(now, peers, random, perform));
            }
        }
        any
    }

    /// When a store is to go on next.
    pub fn next_store(&mut self) -> Option<u64> {
        self.devices.iter_mut().filter_map(|memory| memory.stores.next_due()).min()
    }

    /// Performs all stores.
    pub fn settle(&mut self) {
        for device in 0..self.devices.len() {
            self.with_stores(device, |stores, perform| stores.take_all(perform));
        }
    }

    /// Forgets which lines were touched.
    pub fn start_run(&mut self) {
        for memory in &mut self.devices {
            for allocation in &mut memory.allocations {
                allocation.lines.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_bits() {
        let mut memory = TrackedBytes::new(300);
        let mut zeros = TrackedBytes::zeros(100);
        assert!(zeros.is_written(0, 100));
        zeros.unmark(3, 1);
        assert!(!zeros.is_written(0, 4) && zeros.is_written(4, 96));
        memory.mark(60, 10);
        assert!(memory.is_written(60, 10));
        assert!(!memory.is_written(59, 2));
        assert!(!memory.is_written(64, 8));
        assert!(memory.is_partly_written(64, 8));
        memory.mark(0, 300);
        assert!(memory.is_written(0, 300));
        memory.unmark(128, 1);
        assert!(!memory.is_written(0, 300));
        let mut copied = Copied::default();
        memory.copy_out(127, 3, &mut copied);
        assert_eq!(copied.unwritten, [1]);
        memory.copy_in(10, &copied, 0, 3);
        assert!(memory.is_written(10, 1) && !memory.is_written(11, 1));
    }

    #[test]
    fn addresses_name_their_buffer() {
        let mut memory = GlobalMemory::new(2);
        let first = memory.allocate(1, 100, "first").unwrap();
        memory.allocate(1, 100, "second").unwrap();
        assert_eq!(GlobalMemory::device_of(first), 1);
        let error = memory.find(first + 98, 4).unwrap_err().to_string();
        assert!(error.contains("`first`+98"), "{error}");
        assert!(memory.find(first + 96, 4).is_ok());
        assert!(memory.find(0, 4).is_err());
        assert!(memory.free(first + 4).is_err());
        assert!(memory.free(first).is_ok());
        assert!(memory.find(first, 4).is_err());
    }
}
