//! mbarrier instructions, lane by lane.

use super::access::{shared_place, shared_range};
use super::cluster::{SharedAt, state_at};
use super::{Context, Executed, Flow};
use crate::check::{Access, Mode, Scope, shared_key};
use crate::cta::{CtaState, Phase, Wait, Warp};
use crate::error::Fault;
use crate::mbarrier::{Mbarrier, MbarrierError};
use crate::mbarrier_op::{MbarrierAction, MbarrierOp};
use crate::program::{Space, WaitPhase};
use crate::registers::{LANES, Slot, lanes};
use crate::waiver::Check;

/// How long `try_wait` suspends a warp at most, in simulated nanoseconds, unless it says so itself. The device's
/// limit is its own.
const SUSPEND_NS: u64 = 1000;

/// One of so many `try_wait`s that would suspend their warp gives up at once, as it may.
const GIVES_UP: u64 = 16;

fn misuse(state: &CtaState, address: u32, error: MbarrierError) -> Fault {
    Fault::Mbarrier { place: shared_place(&state.shared, u64::from(address)), error }
}

/// Applies a change to the mbarrier at a shared address; the word before it, and whether its phase was completed. With `checked`, bytes
/// that nothing can announce any more are an error.
pub(crate) fn update(
    state: &mut CtaState,
    address: u32,
    checked: bool,
    change: impl FnOnce(Mbarrier) -> Result<Mbarrier, MbarrierError>,
) -> Result<(u64, bool), Fault> {
    let word = read_word(state, address)?;
    let changed = |before: Mbarrier| {
        let after = change(before)?;
        if checked {
            after.check_announced()?;
        }
        Ok((before, after))
    };
    let (before, after) = Mbarrier::decode(word).and_then(changed).map_err(|error| misuse(state, address, error))?;
    state.shared.write(address as usize, &after.encode().to_le_bytes());
    state.changed = true;
    Ok((word, after.parity() != before.parity()))
}

fn read_word(state: &CtaState, address: u32) -> Result<u64, Fault> {
    let at = shared_range(&state.shared, u64::from(address), 8)?;
    let mut word = [0; 8];
    word.copy_from_slice(&state.shared.data()[at..at + 8]);
    Ok(u64::from_le_bytes(word))
}

/// The mbarrier at a shared address, if there is one.
fn mbarrier_at(state: &CtaState, address: u32) -> Option<Mbarrier> {
    Mbarrier::decode(read_word(state, address).ok()?).ok()
}

/// The first of a CTA's mbarriers that has bytes pending, as the CTA exits.
pub(crate) fn bytes_left(state: &CtaState, mbarriers: &[u32]) -> Option<Fault> {
    mbarriers.iter().find_map(|&address| {
        let tx_count = mbarrier_at(state, address)?.tx_count();
        (tx_count != 0).then(|| misuse(state, address, MbarrierError::BytesLeft { tx_count }))
    })
}

/// Whether the phase that a wait names is complete.
pub(crate) fn is_complete(state: &CtaState, address: u32, phase: Phase) -> Result<bool, Fault> {
    let complete = |barrier: Mbarrier| match phase {
        Phase::Parity(parity) if parity > 1 => Err(MbarrierError::Parity { parity }),
        Phase::Parity(parity) => Ok(barrier.test_parity(parity)),
        Phase::State(word) => barrier.test_state(word),
    };
    Mbarrier::decode(read_word(state, address)?).and_then(complete).map_err(|error| misuse(state, address, error))
}

/// A wait's operands.
struct Waited {
    done: crate::registers::Predicate,
    phase: WaitPhase,
    suspends: bool,
    limit: Option<crate::registers::R32>,
    relaxed: bool,
    scope: Scope,
}

impl Context<'_> {
    /// Tells the checks of a wait by each lane.
    fn check_waits(&mut self, addresses: &[u32; LANES], phase: WaitPhase, active: u32) -> Result<(), Fault> {
        let Some(checker) = self.checker.as_deref_mut() else {
            return Ok(());
        };
        let mut rest = active;
        while rest != 0 {
            let address = addresses[rest.trailing_zeros() as usize % LANES];
            let same = lanes(rest).filter(|lane| addresses[*lane] == address).fold(0, |all, lane| all | 1 << lane);
            let access = Access {
                warp: self.agent,
                lanes: same,
                pc: self.pc,
                reads: false,
                mode: Mode::Read,
                strong: Some(Scope::Cta),
                read_only: false,
                waits: true,
            };
            checker.access(access, shared_key(self.state.id, u64::from(address)), 8)?;
            if let (WaitPhase::Parity(parity), Some(barrier)) = (phase, mbarrier_at(self.state, address)) {
                let parities = parity.get(&self.warp.registers);
                for parity in [0, 1].into_iter().filter(|parity| lanes(same).any(|lane| parities[lane] == *parity)) {
                    let place = (self.state.id, address);
                    if let Err(error) = checker.check_parity(self.agent, place, parity, barrier.parity()) {
                        self.findings.judge(misuse(self.state, address, error), self.pc, same)?;
                    }
                }
            }
            rest &= !same;
        }
        Ok(())
    }

    pub(super) fn mbarrier(&mut self, operation: &MbarrierOp, index: usize, active: u32) -> Executed {
        if let MbarrierAction::Wait { done, phase, suspends, limit } = operation.action {
            let addresses = self.shared_addresses(operation.address, operation.space == Space::Generic, active)?;
            let wait = Waited { done, phase, suspends, limit, relaxed: operation.relaxed, scope: operation.scope };
            return self.mbarrier_wait(index, &addresses, wait, active);
        }
        let addresses = self.addresses(operation.address);
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let place = self.locate_mbarrier(operation, addresses[lane])?;
            let address = place.address as u32;
            self.check_mbarrier(operation, place, lane)?;
            let checked = self.checker.is_some() && !self.findings.policy.allow.contains(Check::UnannouncedBytes);
            let state = state_at(self.state, self.peers, place);
            let registers = &self.warp.registers;
            let mut completed = false;
            match &operation.action {
                MbarrierAction::Init { count } => {
                    let count = count.get(registers)[lane];
                    let at = shared_range(&state.shared, u64::from(address), 8)?;
                    let barrier = Mbarrier::init(count).map_err(|error| misuse(state, address, error))?;
                    state.shared.write(at, &barrier.encode().to_le_bytes());
                }
                MbarrierAction::Invalidate => {
                    update(state, address, checked, Ok)?;
                    let word = Mbarrier::INVALID.to_le_bytes();
                    state.shared.write(address as usize, &word);
                    state.shared.unmark(address as usize, 8);
                }
                MbarrierAction::ExpectBytes { bytes } => {
                    let bytes = bytes.get(registers)[lane];
                    (_, completed) = update(state, address, checked, |barrier| barrier.expect_tx(bytes))?;
                }
                MbarrierAction::CompleteBytes { bytes } => {
                    let bytes = bytes.get(registers)[lane];
                    (_, completed) = update(state, address, checked, |barrier| barrier.complete_tx(bytes))?;
                }
                MbarrierAction::Arrive { state: before, count, expect_bytes, drop, no_complete } => {
                    let count = count.get(registers)[lane];
                    let bytes = expect_bytes.map(|bytes| bytes.get(registers)[lane]);
                    let word;
                    (word, completed) = update(state, address, checked, |barrier| match bytes {
                        Some(bytes) if *drop => barrier.expect_tx(bytes)?.arrive_drop(count),
                        Some(bytes) => barrier.arrive_expect_tx(bytes),
                        None if *drop => barrier.arrive_drop(count),
                        None if *no_complete => barrier.arrive_no_complete(count),
                        None => barrier.arrive(count),
                    })?;
                    if let Some(before) = before {
                        before.get_mut(&mut self.warp.registers)[lane] = word;
                    }
                }
                MbarrierAction::Wait { .. } => {}
            }
            if completed && let Some(checker) = &mut self.checker {
                let completion = checker.completion(self.agent, 1 << lane, self.pc);
                checker.complete_phase(completion, place.cta, address)?;
            }
        }
        self.fault_lanes = 0;
        *self.progress += 1;
        self.warp.polls.reset();
        Ok(Flow::Next)
    }

    /// Tells the checks: an mbarrier is used by many, but initialised before.
    fn check_mbarrier(&mut self, operation: &MbarrierOp, place: SharedAt, lane: usize) -> Result<(), Fault> {
        let Some(checker) = self.checker.as_deref_mut() else {
            return Ok(());
        };
        let (warp, lanes, address) = (self.agent, 1 << lane, place.address as u32);
        let at = (place.cta, address);
        let live = matches!(operation.action, MbarrierAction::Init { .. });
        let changes = live || matches!(operation.action, MbarrierAction::Invalidate);
        if changes {
            let in_use = mbarrier_at(self.state, address).is_some();
            if let Err(error) = checker.init_mbarrier(at, live, in_use) {
                self.findings.judge(misuse(self.state, address, error), self.pc, lanes)?;
                let _ = checker.init_mbarrier(at, live, false);
            }
        }
        let (mode, strong) = if changes { (Mode::Write, None) } else { (Mode::Read, Some(Scope::Cluster)) };
        let access = Access { warp, lanes, pc: self.pc, reads: false, mode, strong, read_only: false, waits: false };
        checker.access(access, shared_key(place.cta, place.address), 8)?;
        match operation.action {
            MbarrierAction::Arrive { .. } => {
                checker.arrive_mbarrier(warp, lanes, at, operation.scope, operation.relaxed);
            }
            _ if !changes => checker.precede_phase(warp, lanes, at),
            _ => {}
        }
        Ok(())
    }

    /// The mbarrier at an address: a peer's only for what may be done to one (PTX ISA 8.6, "mbarrier").
    fn locate_mbarrier(&self, operation: &MbarrierOp, address: u64) -> Result<SharedAt, Fault> {
        let at = self.locate_generic(address, operation.space)?;
        let own = match &operation.action {
            MbarrierAction::Arrive { state, no_complete, .. } => state.is_some() || *no_complete,
            action => !matches!(action, MbarrierAction::ExpectBytes { .. } | MbarrierAction::CompleteBytes { .. }),
        };
        if own && at.cta != self.state.id {
            return Err(Fault::Synchronisation("it works on mbarriers of the executing CTA only".to_owned()));
        }
        if at.address > u64::from(u32::MAX) {
            return Err(Fault::Operand(format!("address {address:#x} is not in shared memory")));
        }
        Ok(at)
    }

    /// A wait is over; whether it, or an earlier try at it, has found a phase incomplete.
    fn forget_unmet(&mut self, addresses: &[u32; LANES], phase: WaitPhase, active: u32) -> bool {
        let Warp { unmet, registers, .. } = &mut *self.warp;
        let looks = unmet.len();
        unmet.retain(|look| !lanes(active).any(|lane| *look == (addresses[lane], Phase::of(phase, registers, lane))));
        unmet.len() < looks
    }

    fn mbarrier_wait(&mut self, index: usize, addresses: &[u32; LANES], wait: Waited, active: u32) -> Executed {
        let Waited { done, phase, suspends, limit, relaxed, scope } = wait;
        self.check_waits(addresses, phase, active)?;
        let (mut complete, mut blocking) = (0, None);
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let wanted = Phase::of(phase, &self.warp.registers, lane);
            if is_complete(self.state, addresses[lane], wanted)? {
                complete |= 1 << lane;
            } else {
                blocking.get_or_insert((addresses[lane], wanted, lane));
            }
        }
        self.fault_lanes = 0;
        let timed_out = std::mem::take(&mut self.warp.fragments[index].timed_out);
        if let Some((address, phase, lane)) = blocking {
            if !self.warp.unmet.contains(&(address, phase)) {
                self.warp.unmet.push((address, phase));
            }
            if suspends && !timed_out && self.random.below(GIVES_UP) != 0 {
                let limit = limit.map_or(SUSPEND_NS, |limit| u64::from(limit.get(&self.warp.registers)[lane]));
                let until = self.time() + limit;
                return Ok(Flow::Wait(Wait::Mbarrier { address, phase }, until));
            }
            self.cost.polls += 1;
            self.warp.polled = true;
        } else {
            let met = !self.forget_unmet(addresses, phase, active);
            let waits = &mut self.cost.warps[self.warp_index];
            waits.waits += 1;
            waits.met += u64::from(met);
        }
        self.warp.registers.set_predicate(done, active, complete);
        if complete != 0
            && let Some(checker) = self.checker.as_deref_mut()
        {
            let mut rest = complete;
            while rest != 0 {
                let address = addresses[rest.trailing_zeros() as usize % LANES];
                let same = lanes(rest).filter(|lane| addresses[*lane] == address).fold(0, |all, lane| all | 1 << lane);
                checker.wait_mbarrier((self.agent, same, self.pc), (self.state.id, address), scope, relaxed);
                rest &= !same;
            }
        }
        if blocking.is_some() && !suspends {
            return Ok(self.poll(index, u64::from(complete)));
        }
        Ok(Flow::Next)
    }
}
