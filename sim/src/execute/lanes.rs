//! Shuffles, votes and the other instructions in which lanes work together.

use super::{Context, Executed, Flow, NEVER};
use crate::cta::Wait;
use crate::error::Fault;
use crate::program::{Condition, Reduction, Shuffle, ShuffleMode, VoteMode, VoteResult};
use crate::registers::{ALL, LANES, Predicate, R32, Register, Slot, lanes};

/// Groups of lanes that named the same members, or what is missing.
pub(super) enum Gathered {
    Groups(Vec<u32>),
    Missing { members: u32 },
}

/// Lanes must be in the member mask that they name.
fn check_members(members: u32, lanes: u32) -> Result<(), Fault> {
    let others = lanes & !members;
    if others == 0 {
        return Ok(());
    }
    Err(Fault::Synchronisation(format!("lanes {others:#010x} are not in their own member mask {members:#010x}")))
}

impl Context<'_> {
    /// The groups that a `.sync` instruction's lanes form by their member masks.
    pub(super) fn gather(&mut self, members: R32, active: u32) -> Result<Gathered, Fault> {
        let masks = members.get(&self.warp.registers);
        let (mut groups, mut rest) = (Vec::new(), active);
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            let wanted = masks[lane];
            let group = lanes(rest).filter(|lane| masks[*lane] == wanted).fold(0, |group, lane| group | 1 << lane);
            check_members(wanted, group)?;
            let missing = wanted & !group;
            if missing & !self.warp.live != 0 {
                return Err(Fault::Synchronisation(format!(
                    "the member mask {wanted:#010x} names lanes {:#010x}, which have exited or never existed",
                    missing & !self.warp.live
                )));
            }
            if missing & active != 0 {
                return Err(Fault::Synchronisation(format!(
                    "lanes {:#010x} named the member mask {wanted:#010x}, lanes {:#010x} in it another one",
                    group,
                    missing & active
                )));
            }
            if missing != 0 {
                return Ok(Gathered::Missing { members: wanted });
            }
            groups.push(group);
            rest &= !group;
        }
        Ok(Gathered::Groups(groups))
    }

    /// For `.aligned` instructions: all lanes that have not exited must be here.
    pub(super) fn all_lanes(&self, active: u32) -> Option<Flow> {
        let members = self.warp.live;
        (active != members).then_some(Flow::Wait(Wait::Lanes { members }, NEVER))
    }

    /// For instructions of which every lane of the warp is part.
    pub(super) fn whole_warp(&self, active: u32) -> Result<Option<Flow>, Fault> {
        if self.warp.live != ALL {
            return Err(Fault::Synchronisation(format!(
                "an `.aligned` instruction in a warp whose lanes {:#010x} have exited or never existed",
                !self.warp.live
            )));
        }
        Ok(self.all_lanes(active))
    }

    pub(super) fn shuffle(&mut self, shuffle: &Shuffle, active: u32) -> Executed {
        match self.gather(shuffle.members, active)? {
            Gathered::Missing { members } => {
                return Ok(Flow::Wait(Wait::Lanes { members }, NEVER));
            }
            Gathered::Groups(_) => {}
        }
        let registers = &mut self.warp.registers;
        let source = *shuffle.source.get(registers);
        let (by, clamp) = (*shuffle.lane.get(registers), *shuffle.clamp.get(registers));
        let (mut out, mut valid) = ([0; LANES], 0);
        for lane in lanes(active) {
            // PTX ISA, "shfl.sync": the clamp value and the segment mask.
            let (b, bound, segment) = (by[lane] & 0x1f, clamp[lane] & 0x1f, clamp[lane] >> 8 & 0x1f);
            let lane_number = lane as u32;
            let highest = (lane_number & segment) | (bound & !segment);
            let lowest = lane_number & segment;
            let (from, in_range) = match shuffle.mode {
                ShuffleMode::Up => {
                    let from = lane_number.wrapping_sub(b) as i32;
                    (from as u32, from >= highest as i32)
                }
                ShuffleMode::Down => (lane_number + b, lane_number + b <= highest),
                ShuffleMode::Butterfly => (lane_number ^ b, lane_number ^ b <= highest),
                ShuffleMode::Index => {
                    let from = lowest | (b & !segment);
                    (from, from <= highest)
                }
            };
            let from = if in_range { from as usize } else { lane };
            if active >> from & 1 == 0 {
                self.fault_lanes = 1 << lane;
                return Err(Fault::Synchronisation(format!("lane {lane} reads lane {from}, which does not take part")));
            }
            out[lane] = source[from];
            valid |= u32::from(in_range) << lane;
        }
        shuffle.destination.set(registers, active, &out);
        if let Some(predicate) = shuffle.in_range {
            registers.set_predicate(predicate, active, valid);
        }
        Ok(Flow::Next)
    }

    pub(super) fn vote(
        &mut self,
        mode: VoteMode,
        result: VoteResult,
        condition: Condition,
        members: R32,
        active: u32,
    ) -> Executed {
        let groups = match self.gather(members, active)? {
            Gathered::Missing { members } => {
                return Ok(Flow::Wait(Wait::Lanes { members }, NEVER));
            }
            Gathered::Groups(groups) => groups,
        };
        let registers = &mut self.warp.registers;
        let value = registers.predicates[condition.predicate.0 as usize];
        let value = if condition.negate { !value } else { value };
        for group in groups {
            let ballot = value & group;
            let truth = match mode {
                VoteMode::All => ballot == group,
                VoteMode::Any => ballot != 0,
                VoteMode::Uniform => ballot == 0 || ballot == group,
                VoteMode::Ballot => false,
            };
            match result {
                VoteResult::Predicate(d) => {
                    registers.set_predicate(d, group, if truth { ALL } else { 0 });
                }
                VoteResult::Mask(d) => d.set(registers, group, &[ballot; LANES]),
            }
        }
        Ok(Flow::Next)
    }

    pub(super) fn match_lanes(
        &mut self,
        destination: R32,
        all: Option<Predicate>,
        require_all: bool,
        value: Register,
        members: R32,
        active: u32,
    ) -> Executed {
        let groups = match self.gather(members, active)? {
            Gathered::Missing { members } => {
                return Ok(Flow::Wait(Wait::Lanes { members }, NEVER));
            }
            Gathered::Groups(groups) => groups,
        };
        let registers = &mut self.warp.registers;
        let values = value.read(registers);
        let (mut out, mut same) = ([0; LANES], 0);
        for group in groups {
            for lane in lanes(group) {
                let equal = lanes(group)
                    .filter(|other| values[*other] == values[lane])
                    .fold(0, |mask, other| mask | 1 << other);
                out[lane] = match (require_all, equal == group) {
                    (true, false) => 0,
                    _ => equal,
                };
                same |= u32::from(equal == group) << lane;
            }
        }
        destination.set(registers, active, &out);
        if let Some(predicate) = all {
            registers.set_predicate(predicate, active, same);
        }
        Ok(Flow::Next)
    }

    pub(super) fn reduce(
        &mut self,
        operation: Reduction,
        destination: R32,
        source: R32,
        members: R32,
        active: u32,
    ) -> Executed {
        let groups = match self.gather(members, active)? {
            Gathered::Missing { members } => {
                return Ok(Flow::Wait(Wait::Lanes { members }, NEVER));
            }
            Gathered::Groups(groups) => groups,
        };
        let registers = &mut self.warp.registers;
        let values = *source.get(registers);
        for group in groups {
            let mut list = lanes(group).map(|lane| values[lane]);
            let signed = |value: u32| value as i32;
            let first = list.next().unwrap_or(0);
            let result = list.fold(first, |a, b| match operation {
                Reduction::Add => a.wrapping_add(b),
                Reduction::Min { signed: true } => signed(a).min(signed(b)) as u32,
                Reduction::Min { .. } => a.min(b),
                Reduction::Max { signed: true } => signed(a).max(signed(b)) as u32,
                Reduction::Max { .. } => a.max(b),
                Reduction::And => a & b,
                Reduction::Or => a | b,
                Reduction::Xor => a ^ b,
            });
            destination.set(registers, group, &[result; LANES]);
        }
        Ok(Flow::Next)
    }

    pub(super) fn elect(&mut self, leader: R32, elected: Predicate, members: R32, active: u32) -> Executed {
        let groups = match self.gather(members, active)? {
            Gathered::Missing { members } => {
                return Ok(Flow::Wait(Wait::Lanes { members }, NEVER));
            }
            Gathered::Groups(groups) => groups,
        };
        let registers = &mut self.warp.registers;
        for group in groups {
            let first = group.trailing_zeros();
            leader.set(registers, group, &[first; LANES]);
            registers.set_predicate(elected, group, 1 << first);
        }
        Ok(Flow::Next)
    }

    /// The lanes of a `bar.warp.sync` may be at different instructions.
    pub(super) fn warp_barrier(&mut self, members: R32, index: usize, active: u32) -> Executed {
        let masks = *members.get(&self.warp.registers);
        let wanted = masks[active.trailing_zeros() as usize % LANES];
        if lanes(active).any(|lane| masks[lane] != wanted) {
            // Lanes with other masks wait on their own.
            let same = lanes(active).filter(|lane| masks[*lane] == wanted).fold(0, |mask, lane| mask | 1 << lane);
            let pc = self.warp.fragments[index].pc;
            let rest = self.warp.fragments[index].mask & !same;
            self.split(index, pc, same, pc, rest);
            return self.join_warp_barrier(wanted, index, same);
        }
        self.join_warp_barrier(wanted, index, active)
    }

    fn join_warp_barrier(&mut self, wanted: u32, index: usize, active: u32) -> Executed {
        check_members(wanted, active)?;
        if wanted & !self.warp.live != 0 {
            return Err(Fault::Synchronisation(format!(
                "the member mask {wanted:#010x} names lanes {:#010x}, which have exited or never existed",
                wanted & !self.warp.live
            )));
        }
        let wait = Wait::WarpBarrier { members: wanted };
        let waiting = |wait_of: Option<Wait>| wait_of == Some(wait);
        let arrived = self
            .warp
            .fragments
            .iter()
            .filter(|fragment| waiting(fragment.wait))
            .fold(active, |mask, fragment| mask | fragment.mask);
        if arrived != wanted {
            return Ok(Flow::Wait(wait, NEVER));
        }
        if let Some(checker) = &mut self.checker {
            checker.join_lanes(self.agent, wanted);
        }
        for fragment in &mut self.warp.fragments {
            if waiting(fragment.wait) {
                fragment.wait = None;
                fragment.pc += 1;
            }
        }
        self.warp.fragments[index].pc += 1;
        Ok(Flow::Restructured)
    }
}
