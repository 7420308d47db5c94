//! What happens when an asynchronous operation is due.

use std::ops::Range;

use crate::asynchronous::{Completion, CopyPart, Event, Issuer, Place, Transfer};
use crate::check::{Mode, shared_key};
use crate::cost::Direction;
use crate::cta::Cta;
use crate::error::{Fault, SimError};
use crate::execute::{GROUP_WARPS, combine, shared_place, update_mbarrier};
use crate::memory::{Copied, GlobalMemory};
use crate::program::{AtomicOperation, AtomicType, Op, Wgmma, WgmmaA};
use crate::registers::{LANES, R32, Slot, lanes};
use crate::schedule::{Run, TIME_SHIFT};
use crate::waiver::Check;
use crate::wgmma::descriptor::MatrixDescriptor;
use crate::wgmma::{self, THREADS};

impl Run<'_> {
    /// Carries out the next stage of an operation.
    pub fn land(&mut self, number: u64, event: Event) -> Result<(), SimError> {
        self.progress += 1;
        match event {
            Event::Transfer(mut transfer) => {
                let (issuer, target) = (transfer.issuer, transfer.target);
                if transfer.data.is_some() {
                    self.write_parts(number, &transfer).map_err(|fault| self.failed(fault, issuer))?;
                    self.queue.finish(number);
                } else {
                    let data = self.read_parts(number, &transfer).map_err(|fault| self.failed(fault, issuer))?;
                    for (next, target) in std::mem::take(&mut transfer.multicast) {
                        let part = Transfer {
                            target,
                            parts: transfer.parts.clone(),
                            multicast: Vec::new(),
                            data: Some(data.clone()),
                            ..transfer
                        };
                        let due = self.step + self.random.spread(12);
                        self.queue.again(due, next, Event::Transfer(part));
                    }
                    transfer.data = Some(data);
                    let due = self.step + self.random.spread(12);
                    self.queue.again(due, number, Event::Transfer(transfer));
                }
                if target.1 != issuer.cta {
                    self.settle(target.0)?;
                }
                self.settle(issuer.slot)
            }
            Event::Wgmma { issuer, group } => {
                self.multiply(issuer, group).map_err(|fault| self.failed(fault, issuer))?;
                self.settle(issuer.slot)
            }
            Event::Arrive { issuer, address, after } => {
                if after.iter().any(|copy| !self.queue.is_done(*copy, false)) {
                    let due = self.step + self.random.spread(12);
                    let event = Event::Arrive { issuer, address, after };
                    let next = self.queue.push(due, event);
                    if let Some(checker) = &mut self.checker {
                        checker.postpone(number, next);
                    }
                    return Ok(());
                }
                let checker = self.checker.as_mut();
                let completion = checker.map(|checker| checker.land_arrive(number, issuer.cta, address));
                let checked = completion.is_some() && !self.findings.policy.allow.contains(Check::UnannouncedBytes);
                let arrived = match self.cta(issuer) {
                    Some(cta) => update_mbarrier(&mut cta.state, address, checked, |barrier| barrier.arrive(1)),
                    None => Ok((0, false)),
                };
                let (_, completed) = arrived.map_err(|fault| self.failed(fault, issuer))?;
                if completed && let (Some(checker), Some(completion)) = (&mut self.checker, completion) {
                    let ordered = checker.complete_phase(completion, issuer.cta, address);
                    ordered.map_err(|fault| self.failed(fault, issuer))?;
                }
                self.settle(issuer.slot)
            }
        }
    }

    /// The CTA that issued an operation, while it runs.
    fn cta(&mut self, issuer: Issuer) -> Option<&mut Cta> {
        self.ctas[issuer.slot].as_deref_mut().filter(|cta| cta.state.id == issuer.cta)
    }

    pub fn read_parts(&mut self, number: u64, transfer: &Transfer) -> Result<Copied, Fault> {
        let bytes: u32 = transfer.parts.iter().map(|part| part.bytes).sum();
        let mut copied = Copied { data: Vec::with_capacity(bytes as usize), unwritten: Vec::new() };
        let issuer = transfer.issuer;
        let source = self.ctas[issuer.slot].as_deref().filter(|cta| cta.state.id == issuer.cta);
        if let Some(checker) = &mut self.checker {
            let parts = transfer.parts.iter().map(|part| (part.from, part.bytes));
            checker.copy_access(number, Mode::Read, &ranges(parts, issuer.cta), false)?;
        }
        let cost = &mut self.launches[transfer.launch].cost;
        for CopyPart { from, bytes, .. } in &transfer.parts {
            let length = *bytes as usize;
            match *from {
                Place::Fill(pattern) => {
                    let bytes = pattern.iter().cycle().take(length);
                    copied.data.extend(bytes);
                }
                Place::Shared(at) => {
                    // A CTA does not exit before its copies were read.
                    if let Some(cta) = source {
                        cta.state.shared.copy_out(at as usize, length, &mut copied);
                    }
                }
                Place::Global(address) => {
                    let range = address..address.saturating_add(u64::from(*bytes));
                    self.memory.perform(transfer.device, transfer.cluster, &range);
                    let (allocation, offset) = self.memory.find(address, u64::from(*bytes))?;
                    allocation.bytes.copy_out(offset, length, &mut copied);
                    if GlobalMemory::device_of(address) == transfer.device {
                        allocation.lines.touch(offset, length, Direction::Read, cost);
                    } else {
                        allocation.lines.cross(offset, length, Direction::Read, cost);
                    }
                }
            }
        }
        Ok(copied)
    }

    fn write_parts(&mut self, number: u64, transfer: &Transfer) -> Result<(), Fault> {
        let Some(copied) = &transfer.data else {
            return Ok(());
        };
        // Writes to global memory may outlive the CTA.
        let (slot, target) = transfer.target;
        let mut cta = self.ctas[slot].as_deref_mut().filter(|cta| cta.state.id == target);
        if let Some(checker) = &mut self.checker {
            // Shared memory of a CTA that has ended is no one's.
            let there = transfer.parts.iter().filter(|part| cta.is_some() || !matches!(part.to, Place::Shared(_)));
            let ranges = ranges(there.map(|part| (part.to, part.bytes)), target);
            checker.copy_access(number, Mode::Write, &ranges, transfer.reduction.is_some())?;
        }
        let mut start = 0;
        // That it is done is known to its issuer; others learn of it by a release, as of a store.
        let late = self.checker.is_none()
            && transfer.reduction.is_none()
            && copied.unwritten.is_empty()
            && self.random.below(16) == 0;
        let now = self.time >> TIME_SHIFT;
        for part in &transfer.parts {
            let length = part.bytes as usize;
            match part.to {
                Place::Fill(_) => {}
                Place::Shared(at) => {
                    let Some(cta) = &mut cta else {
                        continue;
                    };
                    let (shared, at) = (&mut cta.state.shared, at as usize);
                    match transfer.reduction {
                        None => shared.copy_in(at, copied, start, length),
                        Some(reduction) => {
                            if !shared.is_written(at, length) {
                                let place = shared_place(shared, at as u64);
                                let fault = Fault::Uninitialised { place, bytes: length as u64 };
                                self.findings.judge(fault, transfer.issuer.pc, transfer.issuer.lanes)?;
                                shared.mark(at, length);
                            }
                            let data = &mut shared.data_mut()[at..at + length];
                            reduce(reduction, data, &copied.data[start..start + length]);
                        }
                    }
                }
                Place::Global(address) => {
                    if !late {
                        let range = address..address.saturating_add(u64::from(part.bytes));
                        self.memory.perform(transfer.device, transfer.cluster, &range);
                    }
                    let (allocation, offset) = self.memory.find(address, u64::from(part.bytes))?;
                    match transfer.reduction {
                        None if late => {}
                        None => allocation.bytes.copy_in(offset, copied, start, length),
                        Some(reduction) => {
                            if !allocation.bytes.is_written(offset, length) {
                                let fault = Fault::Uninitialised {
                                    place: self.memory.place(address),
                                    bytes: u64::from(part.bytes),
                                };
                                self.findings.judge(fault, transfer.issuer.pc, transfer.issuer.lanes)?;
                            }
                            let (allocation, offset) = self.memory.find(address, u64::from(part.bytes))?;
                            allocation.bytes.mark(offset, length);
                            let data = &mut allocation.bytes.data_mut()[offset..offset + length];
                            reduce(reduction, data, &copied.data[start..start + length]);
                        }
                    }
                    let (allocation, offset) = self.memory.find(address, u64::from(part.bytes))?;
                    let cost = &mut self.launches[transfer.launch].cost;
                    if GlobalMemory::device_of(address) == transfer.device {
                        allocation.lines.touch(offset, length, Direction::Write, cost);
                    } else {
                        allocation.lines.cross(offset, length, Direction::Write, cost);
                    }
                    if late {
                        let bytes = &copied.data[start..start + length];
                        self.memory.store_late(
                            transfer.device,
                            transfer.cluster,
                            address,
                            bytes,
                            now,
                            &mut self.random,
                        );
                    }
                }
            }
            start += length;
        }
        if let (Some(cta), Some(&CopyPart { from, to: Place::Shared(at), .. })) = (&mut cta, transfer.parts.first()) {
            cta.state.set_origin(at as usize, start, from);
        }
        let mbarrier = match transfer.completion {
            Completion::Mbarrier { address, .. } => Some(address),
            Completion::Group(_) => None,
        };
        if let (Some(checker), Some(address), Some(cta)) = (&mut self.checker, mbarrier, &cta)
            && start > 0
            && let Err(error) = checker.check_bytes(number, (target, address))
        {
            let place = shared_place(&cta.state.shared, u64::from(address));
            let fault = Fault::Mbarrier { place, error };
            self.findings.judge(fault, transfer.issuer.pc, transfer.issuer.lanes)?;
        }
        let completion = self.checker.as_mut().map(|checker| checker.land_copy(number, target, mbarrier));
        if let (Completion::Mbarrier { address, bytes }, Some(cta)) = (transfer.completion, cta) {
            let checked = completion.is_some() && !self.findings.policy.allow.contains(Check::UnannouncedBytes);
            let (_, completed) =
                update_mbarrier(&mut cta.state, address, checked, |barrier| barrier.complete_tx(bytes))?;
            if completed && let (Some(checker), Some(completion)) = (&mut self.checker, completion) {
                checker.complete_phase(completion, target, address)?;
            }
        }
        Ok(())
    }

    /// Executes the oldest product of a warpgroup.
    fn multiply(&mut self, issuer: Issuer, group_index: usize) -> Result<(), Fault> {
        let (check, sums) = (self.options.check_matrix_operands, self.options.fp8_sums);
        let Some(cta) = self.ctas[issuer.slot].as_deref_mut().filter(|cta| cta.state.id == issuer.cta) else {
            return Ok(());
        };
        let launch = &mut self.launches[cta.state.launch];
        let Cta { state, warps } = cta;
        let group = &mut state.warpgroups[group_index];
        let Some(issued) = group.queue.pop_front() else {
            return Ok(());
        };
        group.executed += 1;
        let Op::Wgmma(operation) = &launch.prepared.module.code[issued.pc as usize].op else {
            return Ok(());
        };
        let Wgmma { shape, half, accumulators, a, .. } = &**operation;
        let fail = |error: wgmma::WgmmaError| Fault::Operand(error.to_string());
        let a_descriptor = matches!(a, WgmmaA::Descriptor(_)).then_some(issued.a);
        if let Some(checker) = &mut self.checker {
            for descriptor in a_descriptor.into_iter().chain([issued.b]) {
                MatrixDescriptor::decode(descriptor).check_alignment().map_err(Fault::Operand)?;
            }
            let mut ranges = Vec::new();
            wgmma::operand_ranges(shape, a_descriptor, issued.b, |range| ranges.push(range)).map_err(fail)?;
            checker.multiply(state.first_agent + issuer.warp as u32, &ranges)?;
        }
        if check {
            let mut unwritten = None;
            let shared = &state.shared;
            wgmma::operand_ranges(shape, a_descriptor, issued.b, |range| {
                let (at, length) = (range.start as usize, range.len());
                if at + length <= shared.len() && !shared.is_written(at, length) {
                    unwritten.get_or_insert(range);
                }
            })
            .map_err(fail)?;
            if let Some(range) = unwritten {
                let fault = Fault::Uninitialised {
                    place: shared_place(&state.shared, u64::from(range.start)),
                    bytes: range.len() as u64,
                };
                self.findings.judge(fault, issued.pc, issuer.lanes)?;
            }
        }
        let warps = &mut warps[group_index * GROUP_WARPS..(group_index + 1) * GROUP_WARPS];
        let gather = |warps: &[crate::cta::Warp], register: R32| {
            let mut values = [0u32; THREADS];
            for (warp, part) in warps.iter().zip(values.chunks_exact_mut(LANES)) {
                part.copy_from_slice(register.get(&warp.registers));
            }
            values
        };
        let from_registers;
        let a = match a {
            WgmmaA::Descriptor(_) => wgmma::WgmmaA::Descriptor(issued.a),
            WgmmaA::Registers(registers) => {
                from_registers = registers.map(|register| gather(warps, register));
                wgmma::WgmmaA::Registers(&from_registers)
            }
        };
        let shared = state.shared.data();
        let mut values: Vec<[u32; THREADS]> = accumulators.iter().map(|register| gather(warps, *register)).collect();
        if *half {
            wgmma::execute_f16(shape, a, issued.b, shared, &mut values, issued.scale_d, sums).map_err(fail)?;
        } else {
            let floats: &mut [[f32; THREADS]] = bytemuck::cast_slice_mut(&mut values);
            wgmma::execute(shape, a, issued.b, shared, floats, issued.scale_d, sums).map_err(fail)?;
        }
        for (register, values) in accumulators.iter().zip(&values) {
            for (warp, part) in warps.iter_mut().zip(values.chunks_exact(LANES)) {
                register.get_mut(&mut warp.registers).copy_from_slice(part);
            }
        }
        launch.cost.tensor_ops += shape.operations();
        let origin = a_descriptor.map_or(0, |descriptor| state.origin(MatrixDescriptor::decode(descriptor).start));
        if origin != 0
            && !self.memory.is_away(origin)
            && let Ok((allocation, offset)) = self.memory.find(origin, 1)
        {
            allocation.lines.multiply(offset, shape.operations());
        }
        Ok(())
    }
}

/// A place as the checks know it.
/// The parts of a copy as keys of the checks: pieces that follow each other, or that fill an aligned stretch of 128 bytes in
/// the order of a swizzle, are one range.
fn ranges(parts: impl Iterator<Item = (Place, u32)>, cta: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let add = |ranges: &mut Vec<Range<u64>>, range: Range<u64>| match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    };
    let close = |ranges: &mut Vec<_>, stretch: u64, eighths: u32| match eighths {
        0xff => add(ranges, stretch..stretch + 128),
        _ => lanes(eighths).map(|eighth| stretch + 16 * eighth as u64).for_each(|start| add(ranges, start..start + 16)),
    };
    // The stretch that pieces are in, and which of its eighths.
    let (mut stretch, mut eighths) = (0, 0u32);
    for (place, bytes) in parts {
        let start = match place {
            Place::Fill(_) => continue,
            Place::Shared(at) => shared_key(cta, u64::from(at)),
            Place::Global(address) => address,
        };
        if bytes == 16 && start.is_multiple_of(16) {
            if stretch != start & !127 {
                close(&mut ranges, stretch, std::mem::take(&mut eighths));
                stretch = start & !127;
            }
            eighths |= 1 << (start % 128 / 16);
            continue;
        }
        close(&mut ranges, stretch, std::mem::take(&mut eighths));
        add(&mut ranges, start..start + u64::from(bytes));
    }
    close(&mut ranges, stretch, eighths);
    ranges
}

/// Combines `operand` into `data`, element by element.
fn reduce((operation, kind, element): (AtomicOperation, AtomicType, u32), data: &mut [u8], operand: &[u8]) {
    let size = element as usize;
    let word = |bytes: &[u8]| {
        let mut word = [0u8; 8];
        word[..size].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    for (old, new) in data.chunks_exact_mut(size).zip(operand.chunks_exact(size)) {
        let value = combine(operation, kind, element, word(old), word(new), 0);
        old.copy_from_slice(&value.to_le_bytes()[..size]);
    }
}
