//! mbarriers: what their phases hand on, and whether a wait can be for another phase than it means.
//!
//! A wait names a phase by its parity, and so tells it only from its neighbours. It must come before the phase after the one that it waits for
//! is complete: whatever lets that phase complete must be ordered after the wait. Else the wait may find the barrier a phase further, and then
//! it passes too early or waits for ever.
//!
//! Bytes that complete on a barrier count for whatever phase is current then. So who sends them must know that the phase before the one that they
//! are meant for is complete, or they may count for that one.

use super::clock::{Clock, Entry};
use super::shadow::{Agent, ClashKind, Site, shared_key};
use super::{Checker, Clash, Mode, Record, Scope};
use crate::error::Fault;
use crate::mbarrier::MbarrierError;

/// What arrivals hand on.
#[derive(Debug, Clone, Default)]
struct Handed {
    /// To any wait: from the mbarrier's own CTA.
    near: Clock,
    /// To waits of cluster scope: from other CTAs.
    far: Clock,
}

/// A wait that has seen its phase complete.
#[derive(Debug, Clone, Copy)]
struct Passed {
    record: Record,
    /// The wgmmas of its warpgroup, and the first group that the warp commits after the wait: who waits for that group comes later
    /// than the wait, whichever warp it is.
    product: Option<(u32, u32)>,
}

/// The phases of an mbarrier.
#[derive(Debug, Default)]
pub(super) struct Phases {
    /// Stands for the copies that complete here, of which so many were issued.
    pub agent: u32,
    pub issued: u32,
    /// Stands for the completion of phases, of which there were so many.
    phase_agent: u32,
    completed: u32,
    /// It was initialised, and not invalidated.
    live: bool,
    arriving: Handed,
    complete: Handed,
    /// What is over before the current phase is complete, whatever is handed on.
    before: Clock,
    /// Waits for the last phase that was completed.
    passed: Vec<Passed>,
}

impl Phases {
    fn arrive(&mut self, clock: &Clock, near: bool) {
        if near { &mut self.arriving.near } else { &mut self.arriving.far }.join(clock);
    }
}

impl Checker {
    pub(super) fn phases(&mut self, cta: u64, address: u32) -> Option<&mut Phases> {
        let checks = self.ctas.get_mut(&cta)?;
        let agents = &mut self.agents;
        Some(checks.mbarriers.entry(address).or_insert_with(|| {
            *agents += 2;
            Phases { agent: *agents - 2, phase_agent: *agents - 1, ..Phases::default() }
        }))
    }

    /// `mbarrier.init` (`live`) or `mbarrier.inval`: nothing was handed on yet. `in_use`: the memory holds an mbarrier.
    ///
    /// # Errors
    /// The initialisation of an mbarrier that is one already.
    pub fn init_mbarrier(&mut self, (cta, address): (u64, u32), live: bool, in_use: bool) -> Result<(), MbarrierError> {
        if self.phases(cta, address).is_some_and(|phases| live && phases.live && in_use) {
            return Err(MbarrierError::InUse);
        }
        let phase_agent = self.agents;
        self.agents += 1;
        if let Some(phases) = self.phases(cta, address) {
            // Nobody knows of the phases of what becomes another barrier.
            *phases = Phases { agent: phases.agent, issued: phases.issued, phase_agent, live, ..Phases::default() };
        }
        Ok(())
    }

    /// The mbarriers of a CTA, by address.
    pub fn mbarriers(&self, cta: u64) -> Vec<u32> {
        let phases = self.ctas.get(&cta).into_iter().flat_map(|checks| &checks.mbarriers);
        let mut addresses: Vec<u32> = phases.filter(|(_, phases)| phases.live).map(|(address, _)| *address).collect();
        addresses.sort_unstable();
        addresses
    }

    /// An arrival, before the phase it belongs to is completed.
    pub fn arrive_mbarrier(&mut self, warp: u32, lanes: u32, place: (u64, u32), scope: Scope, relaxed: bool) {
        let Some(&Site { cta: own, .. }) = self.scopes.get(warp as usize) else {
            return;
        };
        let mut known = self.snapshot(warp, lanes);
        let mut clock = if relaxed { self.released(warp, lanes, scope, true) } else { known.clone() };
        if let Some((.., agent, _)) = self.group_agent(warp) {
            // Its warpgroup has made the products that it has waited for together, so all of it is done with reading their
            // operands: CUTLASS's pipelines give them back by one arrival for four warps.
            let waited = self.warps.get(warp as usize).map_or(0, |state| state.wgmma_waited);
            let whole = Entry::new(waited, crate::registers::ALL);
            known.end_reads(agent, whole);
            clock.end_reads(agent, whole);
        }
        let tick = self.warps.get(warp as usize).map_or(0, |state| state.tick);
        if let Some(phases) = self.phases(place.0, place.1) {
            phases.before.join_reads(&known);
            if own == place.0 {
                phases.arrive(&clock, true);
            } else {
                // That the arrival itself came before is known to whoever saw the phase complete.
                phases.arriving.near.see(warp, tick, lanes);
                if scope >= Scope::Cluster {
                    phases.arrive(&clock, false);
                } else {
                    // Pipelines (CUTLASS's among them) say so that they are done with reading. That needs no fence on hardware, which
                    // `.release.cluster` would bring.
                    phases.arriving.near.join_reads(&clock);
                }
            }
        }
        self.advance(warp);
    }

    /// A change of the bytes that the current phase expects: it comes before the phase's completion, and hands nothing on.
    pub fn precede_phase(&mut self, warp: u32, lanes: u32, (cta, address): (u64, u32)) {
        let clock = self.snapshot(warp, lanes);
        if let Some(phases) = self.phases(cta, address) {
            phases.before.join_reads(&clock);
        }
        self.advance(warp);
    }

    /// The access of a warp that completes a phase, see [`Self::complete_phase`].
    pub fn completion(&self, warp: u32, lanes: u32, pc: u32) -> Record {
        let tick = self.warps.get(warp as usize).map_or(0, |state| state.tick);
        Record::new(Agent::Warp(warp), tick, lanes, pc, Some(Scope::Cta), false, warp)
    }

    /// The current phase of an mbarrier is complete, by this access.
    ///
    /// # Errors
    /// A wait for the phase before, which nothing orders before this.
    pub fn complete_phase(&mut self, now: Record, cta: u64, address: u32) -> Result<(), Fault> {
        let Some(phases) = self.phases(cta, address) else {
            return Ok(());
        };
        let (before, passed) = (std::mem::take(&mut phases.before), std::mem::take(&mut phases.passed));
        phases.completed += 1;
        phases.complete = std::mem::take(&mut phases.arriving);
        phases.complete.near.learn_completed(phases.phase_agent, phases.completed);
        let late = passed.iter().find(|wait| {
            let known = before.knows_read_of_any(wait.record.issuer, wait.record.tick());
            !known && !wait.product.is_some_and(|(agent, tick)| before.knows_read_of_any(agent, tick))
        });
        let Some(late) = late else {
            return Ok(());
        };
        let clash = Clash {
            before: late.record,
            before_mode: Mode::Read,
            now,
            now_mode: Mode::Write,
            kind: ClashKind::Phase,
            key: shared_key(cta, u64::from(address)),
        };
        self.verdicts.judge(clash, &self.ctas)
    }

    /// How many phases of an mbarrier some lanes of a warp know to be complete.
    pub(super) fn phases_known(&mut self, warp: u32, (cta, address): (u64, u32)) -> u32 {
        let agent = self.phases(cta, address).map(|phases| phases.phase_agent);
        let views = self.warps.get(warp as usize).map_or(&[][..], |state| &state.views);
        agent.and_then(|agent| views.iter().map(|view| view.clock.completed(agent)).max()).unwrap_or(0)
    }

    /// The bytes of a copy are about to count for the current phase of an mbarrier.
    ///
    /// # Errors
    /// Nothing orders the copy behind the phase before.
    pub fn check_bytes(&mut self, number: u64, (cta, address): (u64, u32)) -> Result<(), MbarrierError> {
        let completed = self.phases(cta, address).map_or(0, |phases| phases.completed);
        match self.flights.get(&number) {
            Some(flight) if flight.phases_known < completed => {
                Err(MbarrierError::UnorderedBytes { completed, known: flight.phases_known })
            }
            _ => Ok(()),
        }
    }

    /// A warp evaluates a wait: the parity must be of the current phase or the one before, as far as the warp can know them.
    ///
    /// # Errors
    /// It is of neither: the barrier is further than the warp can know. `at` is the parity of the barrier's current phase.
    pub fn check_parity(
        &mut self,
        warp: u32,
        (cta, address): (u64, u32),
        parity: u32,
        at: u32,
    ) -> Result<(), MbarrierError> {
        let Some(completed) = self.phases(cta, address).map(|phases| phases.completed) else {
            return Ok(());
        };
        let known = self.phases_known(warp, (cta, address));
        // The latest phase of this parity that the warp may wait for: the first that it does not know to be complete, or the last that it does.
        let meant = if known & 1 == parity { known + 1 } else { known };
        // A barrier that was overwritten is not what was counted.
        if completed > meant && completed & 1 == at {
            return Err(MbarrierError::WrongPhase { parity, completed, known });
        }
        Ok(())
    }

    /// A wait has seen its phase complete; with acquire semantics unless it is relaxed.
    pub fn wait_mbarrier(
        &mut self,
        (warp, lanes, pc): (u32, u32, u32),
        place: (u64, u32),
        scope: Scope,
        relaxed: bool,
    ) {
        let record = self.completion(warp, lanes, pc);
        let product = self.group_agent(warp).map(|(.., agent, _)| agent);
        let committed = self.warps.get(warp as usize).map_or(0, |state| state.wgmma_committed);
        let Some(phases) = self.phases(place.0, place.1) else {
            return;
        };
        let wait = Passed { record, product: product.map(|agent| (agent, committed + 1)) };
        match phases.passed.iter_mut().find(|known| known.record.issuer == warp) {
            Some(known) => *known = wait,
            None => phases.passed.push(wait),
        }
        let (agent, completed) = (phases.phase_agent, phases.completed);
        let complete = (!relaxed).then(|| phases.complete.clone());
        self.learn(warp, lanes, |clock| {
            clock.learn_completed(agent, completed);
            if let Some(complete) = &complete {
                clock.join(&complete.near);
                if scope >= Scope::Cluster {
                    clock.join(&complete.far);
                }
            }
        });
    }

    /// A copy is done; where it completes on an mbarrier, the current phase hands on what it did. Returns its access, for
    /// [`Self::complete_phase`].
    pub fn land_copy(&mut self, number: u64, cta: u64, mbarrier: Option<u32>) -> Record {
        let Some(flight) = self.flights.remove(&number) else {
            return Record::default();
        };
        let own = self.scopes.get(flight.issuer as usize).is_some_and(|site| site.cta == cta);
        if let Some(phases) = mbarrier.and_then(|address| self.phases(cta, address)) {
            // It releases at cluster scope (PTX ISA 8.6, "cp.async.bulk"), and is known to be done to any wait.
            phases.arrive(&flight.clock, own);
            phases.before.join_reads(&flight.clock);
            for (agent, tick) in [flight.reads, flight.writes] {
                phases.arriving.near.learn_completed(agent, tick);
            }
        }
        flight.record(flight.writes, Some(Scope::Cluster))
    }

    /// An arrival that waited for copies, as [`Self::land_copy`].
    pub fn land_arrive(&mut self, number: u64, cta: u64, address: u32) -> Record {
        let Some(flight) = self.flights.remove(&number) else {
            return Record::default();
        };
        if let Some(phases) = self.phases(cta, address) {
            phases.arrive(&flight.clock, true);
            phases.before.join_reads(&flight.clock);
        }
        flight.record(flight.writes, Some(Scope::Cta))
    }
}
