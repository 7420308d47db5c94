//! Matrix instructions.

use super::access::shared_range;
use super::{Context, Executed, Flow, NEVER};
use crate::asynchronous::Event;
use crate::check::{Access, Mode, shared_key};
use crate::cta::{QueuedWgmma, Wait};
use crate::error::Fault;
use crate::matrix::{MatrixCount, ldmatrix, mma, mma_f16, stmatrix};
use crate::program::{MatrixAccess, Mma, Space, Wgmma, WgmmaA};
use crate::registers::{ALL, LANES, R32, R64, Slot};

/// Warps of a warpgroup.
pub(crate) const GROUP_WARPS: usize = 4;

impl Context<'_> {
    /// Issues one product; it is queued once the fourth warp of the group has issued it.
    pub(super) fn wgmma(&mut self, wgmma: &Wgmma, active: u32) -> Executed {
        if let Some(wait) = self.whole_warp(active)? {
            return Ok(wait);
        }
        let group_index = self.warp_index / GROUP_WARPS;
        let a = match wgmma.a {
            WgmmaA::Descriptor(register) => self.uniform64(register, "descriptor of A")?,
            WgmmaA::Registers(_) => 0,
        };
        let b = self.uniform64(wgmma.b, "descriptor of B")?;
        let scale = self.warp.registers.predicates[wgmma.scale_d.predicate.0 as usize];
        let scale_d = match if wgmma.scale_d.negate { !scale } else { scale } {
            0 => false,
            ALL => true,
            _ => {
                return Err(Fault::Synchronisation("scale-d differs between the lanes of a warp".to_owned()));
            }
        };
        let issuer = self.issuer(ALL);
        let pc = issuer.pc;
        let due = self.due();
        let bit = 1u32 << (self.warp_index % GROUP_WARPS);
        let Some(group) = self.state.warpgroups.get_mut(group_index) else {
            return Err(Fault::Synchronisation("wgmma needs whole warpgroups of four warps".to_owned()));
        };
        let place = (self.warp.wgmma_issued - group.executed) as usize;
        if let Some(checker) = &mut self.checker {
            checker.issue_wgmma(self.agent, place, pc);
        }
        let issued = QueuedWgmma { pc, issued: bit, a, b, scale_d };
        match group.queue.get_mut(place) {
            None => group.queue.push_back(issued),
            Some(known) => {
                if (known.pc, known.a, known.b, known.scale_d) != (pc, a, b, scale_d) {
                    return Err(Fault::Synchronisation(
                        "the warps of a warpgroup issue different wgmma instructions or operands".to_owned(),
                    ));
                }
                known.issued |= bit;
            }
        }
        let complete = group.queue[place].issued == (1 << GROUP_WARPS) - 1;
        if complete {
            // Products of a warpgroup are carried out in order.
            group.last_due = due.max(group.last_due + 1);
            let due = group.last_due;
            self.queue.push(due, Event::Wgmma { issuer, group: group_index });
        }
        self.warp.wgmma_issued += 1;
        *self.progress += 1;
        Ok(Flow::Next)
    }

    fn uniform64(&self, register: R64, what: &str) -> Result<u64, Fault> {
        let values = register.get(&self.warp.registers);
        if values.iter().any(|value| *value != values[0]) {
            return Err(Fault::Synchronisation(format!("the {what} differs between the lanes of a warp")));
        }
        Ok(values[0])
    }

    pub(super) fn wgmma_commit(&mut self, active: u32) -> Executed {
        if let Some(wait) = self.whole_warp(active)? {
            return Ok(wait);
        }
        if let Some(checker) = &mut self.checker {
            checker.commit_wgmma(self.agent);
        }
        let warp = &mut *self.warp;
        let executed = self.state.warpgroups.get(self.warp_index / GROUP_WARPS).map_or(0, |group| group.executed);
        // Groups that are done need not be remembered; a wait counts from the latest.
        if warp.wgmma_commits.len() > 16 {
            warp.wgmma_commits.retain(|commit| *commit > executed);
        }
        warp.wgmma_commits.push(warp.wgmma_issued);
        Ok(Flow::Next)
    }

    pub(super) fn wgmma_wait(&mut self, pending: u32, active: u32) -> Executed {
        if let Some(wait) = self.whole_warp(active)? {
            return Ok(wait);
        }
        let commits = &self.warp.wgmma_commits;
        let needed = commits.len().checked_sub(1 + pending as usize).map_or(0, |last| commits[last]);
        let executed = self.state.warpgroups.get(self.warp_index / GROUP_WARPS).map_or(0, |group| group.executed);
        if executed < needed {
            return Ok(Flow::Wait(Wait::Wgmma { executed: needed }, NEVER));
        }
        if let Some(checker) = &mut self.checker {
            checker.wait_wgmma(self.agent, pending);
            checker.end_reads(self.agent, active);
        }
        Ok(Flow::Next)
    }

    pub(super) fn matrix(&mut self, access: &MatrixAccess, active: u32) -> Executed {
        if let Some(wait) = self.whole_warp(active)? {
            return Ok(wait);
        }
        let count = match access.registers.len() {
            1 => MatrixCount::One,
            2 => MatrixCount::Two,
            _ => MatrixCount::Four,
        };
        let addresses = self.shared_addresses(access.address, access.space == Space::Generic, active)?;
        if access.store {
            let mut registers = [[0; LANES]; 4];
            for (values, register) in registers.iter_mut().zip(&access.registers) {
                *values = *register.get(&self.warp.registers);
            }
            let shared = &mut self.state.shared;
            stmatrix(count, access.transpose, &addresses, &registers, |address, row| {
                let at = shared_range(shared, u64::from(address), 16)?;
                shared.write(at, &row);
                Ok::<(), Fault>(())
            })?;
            self.check_matrix(access, &addresses, Mode::Write)?;
            *self.progress += 1;
            return Ok(Flow::Next);
        }
        let (findings, pc) = (&mut *self.findings, self.pc);
        let shared = &self.state.shared;
        let values = ldmatrix(count, access.transpose, &addresses, |address| {
            let at = shared_range(shared, u64::from(address), 16)?;
            if !shared.is_written(at, 16) {
                let fault =
                    Fault::Uninitialised { place: super::access::shared_place(shared, u64::from(address)), bytes: 16 };
                findings.judge(fault, pc, active)?;
            }
            let mut row = [0; 16];
            row.copy_from_slice(&shared.data()[at..at + 16]);
            Ok(row)
        })?;
        for (register, values) in access.registers.iter().zip(&values) {
            register.set(&mut self.warp.registers, ALL, values);
        }
        self.check_matrix(access, &addresses, Mode::Read)?;
        Ok(Flow::Next)
    }

    /// Tells the checks of the rows: each lane's is accessed by the whole warp, as the lanes have met.
    fn check_matrix(&mut self, access: &MatrixAccess, addresses: &[u32; LANES], mode: Mode) -> Result<(), Fault> {
        let Some(checker) = self.checker.as_deref_mut() else {
            return Ok(());
        };
        for address in &addresses[..8 * access.registers.len()] {
            let one = Access {
                warp: self.agent,
                lanes: ALL,
                pc: self.pc,
                reads: false,
                mode,
                strong: None,
                read_only: false,
                waits: false,
            };
            checker.access(one, shared_key(self.state.id, u64::from(*address)), 16)?;
        }
        Ok(())
    }

    pub(super) fn mma(&mut self, operation: &Mma, active: u32) -> Executed {
        if let Some(wait) = self.whole_warp(active)? {
            return Ok(wait);
        }
        let registers = &self.warp.registers;
        let gather =
            |list: &[R32], index: usize| list.get(index).map_or([0; LANES], |register| *register.get(registers));
        let a: [[u32; LANES]; 4] = std::array::from_fn(|index| gather(&operation.a, index));
        let b: [[u32; LANES]; 2] = std::array::from_fn(|index| gather(&operation.b, index));
        let fail = |error: crate::matrix::MmaError| Fault::Operand(error.to_string());
        if operation.half {
            let mut d: [[u32; LANES]; 2] = std::array::from_fn(|index| gather(&operation.c, index));
            mma_f16(operation.shape, &a, &b, &mut d).map_err(fail)?;
            for (register, values) in operation.d.iter().zip(&d) {
                register.set(&mut self.warp.registers, ALL, values);
            }
        } else {
            let mut d: [[f32; LANES]; 4] = std::array::from_fn(|index| gather(&operation.c, index).map(f32::from_bits));
            mma(operation.shape, &a, &b, &mut d).map_err(fail)?;
            for (register, values) in operation.d.iter().zip(&d) {
                register.set(&mut self.warp.registers, ALL, &values.map(f32::to_bits));
            }
        }
        self.cost.tensor_ops += 2 * 16 * 8 * operation.shape.depth as u64;
        Ok(Flow::Next)
    }
}
