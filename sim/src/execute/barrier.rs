//! Barriers of a CTA, and the pool of registers.

use super::{Context, Executed, Flow, NEVER};
use crate::cta::{BARRIERS, Wait};
use crate::error::Fault;
use crate::program::Barrier;
use crate::registers::{LANES, Slot, lanes};

impl Context<'_> {
    /// Arrives; the scheduler releases a barrier when all have (see `Cta::settle`).
    pub(super) fn barrier(&mut self, barrier: &Barrier, active: u32) -> Executed {
        if let Some(wait) = self.all_lanes(active) {
            return Ok(wait);
        }
        let lane = active.trailing_zeros() as usize % LANES;
        let ids = barrier.id.get(&self.warp.registers);
        let id = ids[lane];
        if lanes(active).any(|lane| ids[lane] != id) {
            return Err(Fault::Synchronisation("lanes of a warp name different barriers".to_owned()));
        }
        if id >= BARRIERS {
            return Err(Fault::Synchronisation(format!("barrier {id}; a CTA has 0 to 15")));
        }
        let expected = match barrier.threads {
            None => None,
            Some(threads) => {
                let threads = threads.get(&self.warp.registers)[lane];
                let most = self.launch.block.iter().product::<u32>().next_multiple_of(32);
                if threads == 0 || threads % 32 != 0 || threads > most {
                    return Err(Fault::Synchronisation(format!(
                        "barrier {id} for {threads} threads; it must be a multiple of 32 up to the CTA's {most}"
                    )));
                }
                Some(threads)
            }
        };
        let truths = barrier.reduction.as_ref().map_or(0, |(_, condition)| {
            let value = self.warp.registers.predicates[condition.predicate.0 as usize];
            (if condition.negate { !value } else { value } & active).count_ones()
        });
        let state = &mut self.state.barriers[id as usize];
        if state.arrived == 0 {
            state.expected = expected;
        } else if state.expected != expected {
            return Err(Fault::Synchronisation(format!(
                "barrier {id} for {expected:?} threads, but warps that arrived before said {:?}",
                state.expected
            )));
        }
        state.arrived += LANES as u32;
        if barrier.reduction.is_some() {
            state.truths += truths;
            state.votes += active.count_ones();
        }
        if let Some(expected) = state.expected
            && state.arrived > expected
        {
            return Err(Fault::Synchronisation(format!(
                "{} threads have arrived at barrier {id}, which is for {expected}",
                state.arrived
            )));
        }
        state.waiting |= !barrier.arrive;
        if let Some(checker) = &mut self.checker {
            checker.arrive_barrier(self.agent, active, self.state.id, id);
        }
        self.state.changed = true;
        *self.progress += 1;
        self.warp.polls.reset();
        Ok(if barrier.arrive { Flow::Next } else { Flow::Wait(Wait::Barrier { id }, NEVER) })
    }

    /// `setmaxnreg`: an increase waits until other warps have given up enough registers.
    pub(super) fn max_registers(&mut self, count: u32, increase: bool, active: u32) -> Executed {
        if let Some(wait) = self.whole_warp(active)? {
            return Ok(wait);
        }
        let held = self.warp.max_registers;
        if increase != (count > held) && count != held {
            return Err(Fault::Synchronisation(format!(
                "setmaxnreg.{} to {count} registers from {held}",
                if increase { "inc" } else { "dec" }
            )));
        }
        let lanes = LANES as u32;
        if increase {
            let needed = (count - held) * lanes;
            if self.state.free_registers < needed {
                return Ok(Flow::Wait(Wait::MaxRegisters { count }, NEVER));
            }
            self.state.free_registers -= needed;
        } else {
            self.state.free_registers += (held - count) * lanes;
        }
        self.warp.max_registers = count;
        self.warp.registers_set_at = Some(self.pc);
        self.state.changed = true;
        *self.progress += 1;
        Ok(Flow::Next)
    }
}
