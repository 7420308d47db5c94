//! Asynchronous copies: checked and queued here, carried out by the scheduler when they are due.

use super::access::shared_range;
use super::{Context, Executed, Flow, NEVER};
use crate::asynchronous::{Completion, CopyPart, Event, Place, Transfer};
use crate::cta::Wait;
use crate::error::Fault;
use crate::mbarrier::Mbarrier;
use crate::memory::{Copied, Window, window_offset};
use crate::program::{
    Address, AsyncStore, AtomicOperation, AtomicType, BulkCopy, CopyKind, SmallCopy, Space, TensorCopy,
};
use crate::registers::{LANES, Slot, lanes};
use crate::tensor_map::{TensorMap, TensorMapDataType};

impl Context<'_> {
    fn enqueue(
        &mut self,
        lane: usize,
        parts: Vec<CopyPart>,
        completion: Completion,
        reduction: Option<(AtomicOperation, AtomicType, u32)>,
        targets: &[(usize, u64)],
        data: Option<Copied>,
    ) -> Result<(), Fault> {
        let is_store = data.is_some();
        let own = [(self.slot, self.state.id)];
        let (&target, others) = targets.split_first().unwrap_or((&own[0], &[]));
        let multicast: Vec<_> = others.iter().map(|other| (self.queue.reserve(), *other)).collect();
        let issuer = self.issuer(1 << lane);
        let due = self.due();
        let number = self.queue.push(
            due,
            Event::Transfer(Transfer {
                issuer,
                launch: self.state.launch,
                device: self.state.device,
                cluster: self.state.cluster.id(),
                target,
                multicast: multicast.clone(),
                parts,
                completion,
                reduction,
                data,
            }),
        );
        if let Completion::Group(kind) = completion {
            self.warp.groups(kind, lane).open.push(number);
        }
        if let Some(checker) = &mut self.checker {
            let (kind, mbarrier) = match completion {
                Completion::Group(kind) => (kind, None),
                Completion::Mbarrier { address, .. } => {
                    // A store's data is the issuer's own: it is none of the asynchronous proxy.
                    (if is_store { CopyKind::Small } else { CopyKind::Bulk }, Some((target.1, address)))
                }
            };
            checker.issue_copy(number, self.agent, lane, self.pc, kind, mbarrier);
            if let Some((cta, address)) = mbarrier {
                self.fault_lanes = 1 << lane;
                checker.copy_signals(number, (cta, address))?;
                if !multicast.is_empty() {
                    checker.issue_multicast(number, self.agent);
                }
                for (next, (_, cta)) in multicast {
                    checker.fork_copy(number, next, (cta, address));
                    checker.copy_signals(next, (cta, address))?;
                }
            }
        }
        *self.progress += 1;
        Ok(())
    }

    /// The offset of a copy's mbarrier, and the CTAs it writes to: the one whose shared memory `to` is in, or those that
    /// `.multicast::cluster` names.
    fn targets(&self, to: u64, mbarrier: u64, multicast: Option<u16>) -> Result<(u32, Vec<(usize, u64)>), Fault> {
        let (at, signal) = (self.locate(to, Space::Cluster)?, self.locate(mbarrier, Space::Cluster)?);
        shared_range(&self.state.shared, signal.address, 8)?;
        let address = signal.address as u32;
        let Some(mask) = multicast else {
            if signal.cta != at.cta {
                return Err(Fault::Operand("the mbarrier of a copy is in another CTA than its destination".to_owned()));
            }
            return Ok((address, vec![(at.slot, at.cta)]));
        };
        if mask == 0 {
            return Err(Fault::Operand("a multicast to no CTA: its mask is 0".to_owned()));
        }
        let ranks = (0..16).filter(|rank| mask >> rank & 1 != 0);
        let peers = ranks.map(|rank| self.peer_at(rank, at.address).map(|peer| (peer.slot, peer.cta)));
        Ok((address, peers.collect::<Result<_, _>>()?))
    }

    fn place(&self, space: Space, address: u64, bytes: u32) -> Result<Place, Fault> {
        let misaligned = |place: String| Fault::Misaligned { place, align: 16 };
        if space == Space::Global {
            if !address.is_multiple_of(16) {
                return Err(misaligned(self.memory.place(address)));
            }
            return Ok(Place::Global(address));
        }
        // All CTAs of a cluster have as much shared memory.
        let (shared, address) = (&self.state.shared, self.locate(address, space)?.address);
        shared_range(shared, address, 16)?;
        if address + u64::from(bytes) > shared.len() as u64 {
            return Err(Fault::OutOfBounds {
                place: super::access::shared_place(shared, address),
                bytes: u64::from(bytes),
            });
        }
        Ok(Place::Shared(address as u32))
    }

    pub(super) fn bulk_copy(&mut self, copy: &BulkCopy, active: u32) -> Executed {
        let (to, from) = (self.addresses(copy.destination), self.addresses(copy.source));
        let mbarriers = copy.mbarrier.map(|address| self.addresses(address));
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let bytes = copy.bytes.get(&self.warp.registers)[lane];
            if !bytes.is_multiple_of(16) {
                return Err(Fault::Operand(format!("a bulk copy of {bytes} bytes; it must be a multiple of 16")));
            }
            let part = CopyPart {
                from: self.place(copy.source_space, from[lane], bytes)?,
                to: self.place(copy.destination_space, to[lane], bytes)?,
                bytes,
            };
            let (completion, targets) = match mbarriers {
                Some(addresses) => {
                    let mask = copy.multicast.map(|mask| mask.get(&self.warp.registers)[lane]);
                    let (address, targets) = self.targets(to[lane], addresses[lane], mask)?;
                    (Completion::Mbarrier { address, bytes }, targets)
                }
                None => (Completion::Group(CopyKind::Bulk), Vec::new()),
            };
            let parts = if bytes == 0 { Vec::new() } else { vec![part] };
            self.enqueue(lane, parts, completion, copy.reduction, &targets, None)?;
        }
        self.fault_lanes = 0;
        Ok(Flow::Next)
    }

    pub(super) fn tensor_copy(&mut self, copy: &TensorCopy, active: u32) -> Executed {
        let maps = self.addresses(copy.map);
        let places = self.addresses(copy.shared);
        let mbarriers = copy.mbarrier.map(|address| self.addresses(address));
        let space = if mbarriers.is_some() { Space::Cluster } else { Space::Shared };
        let mut issued = active;
        if mbarriers.is_none() && copy.reduction.is_none() {
            // Lanes that store the same tile to the same place do so once: CUTLASS has a whole warp execute its stores.
            let registers = &self.warp.registers;
            let same = |one: usize, other: usize| {
                (maps[one], places[one]) == (maps[other], places[other])
                    && copy.coordinates.iter().all(|by| by.get(registers)[one] == by.get(registers)[other])
            };
            let first = |lane: &usize| !lanes(active).take_while(|other| other < lane).any(|other| same(other, *lane));
            issued = lanes(active).filter(first).fold(0, |all, lane| all | 1 << lane);
        }
        for lane in lanes(issued) {
            self.fault_lanes = 1 << lane;
            let map = self.tensor_map(maps[lane])?;
            if let Some(checker) = &mut self.checker
                && Window::of(maps[lane]) != Window::Param
            {
                checker.use_tensor_map(self.agent, 1 << lane, self.pc, maps[lane])?;
            }
            let coordinates: Vec<i32> =
                copy.coordinates.iter().map(|register| register.get(&self.warp.registers)[lane] as i32).collect();
            let base = self.locate(places[lane], space)?.address as u32;
            map.check_tile(&coordinates, base).map_err(|error| Fault::Operand(error.to_string()))?;
            let bytes = u32::try_from(map.box_bytes()).unwrap_or(u32::MAX);
            let extent = u32::try_from(map.shared_bytes()).unwrap_or(u32::MAX);
            self.place(Space::Shared, u64::from(base), extent)?;
            let load = copy.mbarrier.is_some();
            let mut parts = Vec::new();
            for piece in map.tile_pieces(&coordinates, base) {
                let shared = Place::Shared(piece.shared_address);
                let (from, to) = match (load, piece.global) {
                    (true, Some(address)) => (Place::Global(address), shared),
                    (true, None) => (Place::Fill(map.fill_pattern()), shared),
                    (false, Some(address)) => (shared, Place::Global(address)),
                    (false, None) => continue,
                };
                parts.push(CopyPart { from, to, bytes: piece.bytes });
            }
            let (completion, targets) = match mbarriers {
                Some(addresses) => {
                    let mask = copy.multicast.map(|mask| mask.get(&self.warp.registers)[lane]);
                    let (address, targets) = self.targets(places[lane], addresses[lane], mask)?;
                    (Completion::Mbarrier { address, bytes }, targets)
                }
                None => (Completion::Group(CopyKind::Bulk), Vec::new()),
            };
            let reduction = match copy.reduction {
                Some(operation) => {
                    let (kind, element) = reduction_type(map.spec().data_type)?;
                    Some((operation, kind, element))
                }
                None => None,
            };
            self.enqueue(lane, parts, completion, reduction, &targets, None)?;
        }
        self.fault_lanes = 0;
        Ok(Flow::Next)
    }

    /// Reads the 128 bytes of a tensor map from global memory or the kernel's parameters.
    fn tensor_map(&mut self, address: u64) -> Result<TensorMap, Fault> {
        if !address.is_multiple_of(64) {
            return Err(Fault::Misaligned {
                place: format!("tensor map at {}", self.memory.place(address)),
                align: 64,
            });
        }
        let mut bytes = [0u8; 128];
        if Window::of(address) == Window::Param {
            let at = window_offset(address) as usize;
            let data = self.launch.parameters.get(at..at + 128);
            bytes.copy_from_slice(
                data.ok_or_else(|| Fault::OutOfBounds { place: format!("parameters + {at}"), bytes: 128 })?,
            );
        } else {
            self.perform(&[address; LANES], 1, 128);
            let (allocation, offset) = self.memory.find(address, 128)?;
            if !allocation.bytes.is_written(offset, 128) {
                return Err(Fault::Uninitialised { place: self.memory.place(address), bytes: 128 });
            }
            bytes.copy_from_slice(&allocation.bytes.data()[offset..offset + 128]);
        }
        TensorMap::decode(&bytes)
            .map_err(|error| Fault::Operand(format!("tensor map at {}: {error}", self.memory.place(address))))
    }

    pub(super) fn small_copy(&mut self, copy: &SmallCopy, active: u32) -> Executed {
        let (to, from) = (self.shared_addresses(copy.destination, false, active)?, self.addresses(copy.source));
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let registers = &self.warp.registers;
            let ignored = copy.ignore_source.is_some_and(|condition| {
                let value = registers.predicates[condition.predicate.0 as usize];
                (value >> lane & 1 != 0) != condition.negate
            });
            let mut read = copy.source_bytes.map_or(copy.bytes, |bytes| bytes.get(registers)[lane]);
            if read > copy.bytes {
                return Err(Fault::Operand(format!("a copy of {} bytes cannot read {read}", copy.bytes)));
            }
            if ignored {
                read = 0;
            }
            shared_range(&self.state.shared, u64::from(to[lane]), copy.bytes as usize)?;
            super::access::check_aligned(self.memory, from[lane], copy.bytes as usize)?;
            let mut parts = Vec::new();
            if read > 0 {
                parts.push(CopyPart { from: Place::Global(from[lane]), to: Place::Shared(to[lane]), bytes: read });
            }
            if read < copy.bytes {
                parts.push(CopyPart {
                    from: Place::Fill([0; 2]),
                    to: Place::Shared(to[lane] + read),
                    bytes: copy.bytes - read,
                });
            }
            self.enqueue(lane, parts, Completion::Group(CopyKind::Small), None, &[], None)?;
        }
        self.fault_lanes = 0;
        Ok(Flow::Next)
    }

    pub(super) fn async_store(&mut self, store: &AsyncStore, active: u32) -> Executed {
        let access = &store.access;
        let (places, mbarriers) = (self.addresses(access.address), self.addresses(store.mbarrier));
        let bytes = access.element as usize * access.registers.len();
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let at = self.locate_generic(places[lane], access.space)?;
            let mbarrier = self.locate_generic(mbarriers[lane], access.space)?;
            if mbarrier.cta != at.cta {
                return Err(Fault::Operand(
                    "the mbarrier of an asynchronous store is in another CTA than its destination".to_owned(),
                ));
            }
            // All CTAs of a cluster have as much shared memory.
            shared_range(&self.state.shared, at.address, bytes)?;
            shared_range(&self.state.shared, mbarrier.address, 8)?;
            let mut buffer = [0; 64];
            super::access::pack(&self.warp.registers, access, lane, &mut buffer);
            let data = Copied { data: buffer[..bytes].to_vec(), unwritten: Vec::new() };
            let part =
                CopyPart { from: Place::Fill([0; 2]), to: Place::Shared(at.address as u32), bytes: bytes as u32 };
            let completion = Completion::Mbarrier { address: mbarrier.address as u32, bytes: bytes as u32 };
            self.enqueue(lane, vec![part], completion, store.reduction, &[(at.slot, at.cta)], Some(data))?;
        }
        self.fault_lanes = 0;
        Ok(Flow::Next)
    }

    /// Arrives on an mbarrier once all earlier `cp.async` of each lane are done.
    pub(super) fn small_copy_arrive(
        &mut self,
        mbarrier: Address,
        generic: bool,
        increases: bool,
        active: u32,
    ) -> Executed {
        let addresses = self.shared_addresses(mbarrier, generic, active)?;
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let address = addresses[lane];
            if increases {
                super::update_mbarrier(self.state, address, false, Mbarrier::add_pending)?;
                *self.progress += 1;
            }
            let groups = self.warp.groups(CopyKind::Small, lane);
            let after: Vec<u64> = groups.committed.iter().flatten().chain(&groups.open).copied().collect();
            let issuer = self.issuer(1 << lane);
            let due = self.due();
            let number = self.queue.push(due, Event::Arrive { issuer, address, after });
            if let Some(checker) = &mut self.checker {
                checker.issue_arrive(number, self.agent, lane, self.pc);
            }
        }
        self.fault_lanes = 0;
        Ok(Flow::Next)
    }

    pub(super) fn commit_group(&mut self, kind: CopyKind, active: u32) -> Executed {
        for lane in lanes(active) {
            if let Some(checker) = &mut self.checker {
                checker.commit_group(self.agent, lane, kind);
            }
            let queue = &*self.queue;
            let groups = self.warp.copies[kind as usize].iter_mut().find(|(owner, _)| *owner == lane);
            if let Some((_, groups)) = groups {
                let group = std::mem::take(&mut groups.open);
                groups.committed.push_back(group);
                while groups.committed.front().is_some_and(|group| group.iter().all(|copy| queue.is_done(*copy, false)))
                    && groups.committed.len() > 1
                {
                    groups.committed.pop_front();
                }
            }
        }
        Ok(Flow::Next)
    }

    pub(super) fn wait_group(&mut self, kind: CopyKind, pending: u32, read: bool, active: u32) -> Executed {
        let done = self.warp.outstanding(kind, active, pending).all(|copy| self.queue.is_done(copy, read));
        if done && let Some(checker) = &mut self.checker {
            checker.wait_group(self.agent, active, kind, pending, read);
        }
        Ok(if done { Flow::Next } else { Flow::Wait(Wait::Groups { kind, pending, read }, NEVER) })
    }
}

fn reduction_type(kind: TensorMapDataType) -> Result<(AtomicType, u32), Fault> {
    use TensorMapDataType as D;
    Ok(match kind {
        D::U32 => (AtomicType::Unsigned, 4),
        D::S32 => (AtomicType::Signed, 4),
        D::U64 => (AtomicType::Unsigned, 8),
        D::S64 => (AtomicType::Signed, 8),
        D::F16 => (AtomicType::F16, 2),
        D::Bf16 => (AtomicType::Bf16, 2),
        D::F32 | D::F32FlushSubnormals => (AtomicType::F32, 4),
        D::F64 => (AtomicType::F64, 8),
        other => {
            return Err(Fault::Operand(format!("a reduction into a tensor of {other:?}")));
        }
    })
}
