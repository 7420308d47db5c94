//! Runs the launches of a device together: which warp goes on, when copies land, what ends a wait.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use crate::asynchronous::{AsyncQueue, Event, Issuer, Place};
use crate::check::{Checker, Clash, ClashKind, Home, Mode, Record, is_shared, shared_owner};
use crate::cost::Cost;
use crate::cta::{
    BARRIERS, Cluster, Cta, CtaState, Fragment, NamedBarrier, ORIGIN_BYTES, Polls, Wait, Warp, Warpgroup,
    initial_registers,
};
use crate::error::{Fault, Position, SimError, Stuck};
use crate::execute::{Context, Failure, GROUP_WARPS, LaunchInfo, NEVER, bytes_left, is_complete};
use crate::machine::RunOptions;
use crate::memory::{GlobalMemory, TrackedBytes};
use crate::profile::{Kind, Profiler};
use crate::program::{BarrierReduction, Entry, Module, Op};
use crate::random::Random;
use crate::registers::{ALL, LANES, Registers, Slot};
use crate::skew::Skew;
use crate::waiver::{Check, Findings, Verdict};

/// Simulated time is kept in units of 2^-16 ns.
pub(crate) const TIME_SHIFT: u32 = 16;
/// When nothing has changed for so long in simulated time, nothing ever will: one hour, in nanoseconds.
pub(crate) const HOPELESS_NS: u64 = 3_600_000_000_000;

/// So many findings of a run are reported.
const MOST_REPORTS: usize = 1000;

/// A launch that was found to be sound.
pub(crate) struct Prepared<'a> {
    pub module: &'a Module,
    pub entry: &'a Entry,
    pub info: LaunchInfo,
    pub threads: u32,
    /// All of a CTA's shared memory, from address 0.
    pub shared_bytes: u32,
    pub dynamic_bytes: u32,
}

/// A launch while it runs.
pub(crate) struct Running<'a> {
    pub prepared: &'a Prepared<'a>,
    /// CTAs in all, none if another device runs them.
    total: u64,
    next_cta: u64,
    finished: u64,
    pub cost: Cost,
}

/// What waits until all devices stand still, as it is about memory that is away.
enum Parked {
    /// Lanes of a warp of a CTA, by its slot.
    Lanes { slot: usize, warp: usize, mask: u32 },
    /// The next stage of an operation.
    Operation(u64, Event),
}

/// How far a device has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// To the time it was given.
    Time,
    /// To where only others can let it go on, if anyone can.
    Blocked,
    /// To the end of all its launches.
    Done,
    /// Beyond the limit of steps.
    StepLimit,
}

/// All that runs on a device.
pub(crate) struct Run<'a> {
    pub device: usize,
    pub memory: GlobalMemory,
    /// Of all devices, in the caller's order.
    pub launches: Vec<Running<'a>>,
    pub ctas: Vec<Option<Box<Cta>>>,
    pub queue: AsyncQueue,
    pub random: Random,
    skew: Skew,
    /// Warp instructions so far, all launches together.
    pub step: u64,
    pub options: &'a RunOptions,
    /// Changes that a waiting warp may wait for.
    pub progress: u64,
    /// Warps that can go on: slot and warp.
    ready: Vec<(usize, usize)>,
    /// Ends of timed waits: time, slot, identity of the CTA, warp.
    timers: BinaryHeap<Reverse<(u64, usize, u64, usize)>>,
    pub time: u64,
    /// CTAs that are resident.
    resident: u32,
    /// Slots that CTAs have left, and places among the SMs.
    free_slots: BTreeSet<usize>,
    free_sms: BTreeSet<u32>,
    next_cta_id: u64,
    /// In the order in which they have come.
    parked: Vec<Parked>,
    /// What kernels have printed.
    pub printed: String,
    /// What checks have found and the run goes on after.
    pub findings: Findings,
    pub reports: Vec<SimError>,
    /// The checks of accesses, if they are on.
    pub checker: Option<Box<Checker>>,
    /// What takes how long, if that is asked for.
    pub profiler: Option<Box<Profiler>>,
    /// When `progress` last changed, as far as idle periods are concerned.
    idle: (u64, u64),
}

impl<'a> Run<'a> {
    /// Starts a device's launches, all memory being away.
    pub fn new(device: usize, devices: usize, prepared: &'a [Prepared<'a>], options: &'a RunOptions) -> Self {
        let ctas = |prepared: &Prepared<'_>| prepared.info.grid.iter().map(|size| u64::from(*size)).product();
        Run {
            device,
            memory: GlobalMemory::away(devices),
            launches: prepared
                .iter()
                .map(|prepared| Running {
                    prepared,
                    total: if prepared.info.device == device { ctas(prepared) } else { 0 },
                    next_cta: 0,
                    finished: 0,
                    cost: Cost::default(),
                })
                .collect(),
            ctas: Vec::new(),
            queue: AsyncQueue::new(device as u64, devices as u64),
            random: Random::new(options.seed ^ (device as u64).wrapping_mul(0xd6e8_feb8_6659_fd93)),
            skew: Skew::new(options.seed),
            step: 0,
            options,
            progress: 0,
            ready: Vec::new(),
            timers: BinaryHeap::new(),
            time: 0,
            resident: 0,
            free_slots: BTreeSet::new(),
            free_sms: BTreeSet::new(),
            next_cta_id: device as u64,
            parked: Vec::new(),
            printed: String::new(),
            findings: Findings { policy: options.policy(), list: Vec::new() },
            reports: Vec::new(),
            checker: None,
            profiler: options.profile.is_some().then(|| Box::new(Profiler::new())),
            idle: (0, 0),
        }
    }

    /// Runs until a time, or until nothing can go on before it.
    pub fn drive(&mut self, until: u64) -> Result<Progress, SimError> {
        self.measure(|run| run.drive_on(until))
    }

    fn drive_on(&mut self, until: u64) -> Result<Progress, SimError> {
        self.start_ctas();
        while self.now() < until {
            while let Some((number, event)) = self.queue.pop(self.step) {
                if self.needs_peers(&event) {
                    self.parked.push(Parked::Operation(number, event));
                } else {
                    self.land_measured(number, event)?;
                }
            }
            let now = self.now();
            if self.memory.advance_stores(now, &mut self.random) {
                self.progress += 1;
            }
            self.wake_timers();
            if self.ready.is_empty() && self.options.in_order {
                self.start_ctas();
            }
            if self.ready.is_empty() {
                if let Some(due) = self.queue.next_due() {
                    self.step = due;
                } else if self.launches_done() {
                    return Ok(Progress::Done);
                } else if !self.pass_time(until) {
                    if until != NEVER {
                        self.time = self.time.max(until << TIME_SHIFT);
                    }
                    return Ok(Progress::Blocked);
                }
                continue;
            }
            let chosen = self.skew.choose(&self.ready, self.step, &mut self.random);
            let (slot, warp) = self.ready.swap_remove(chosen);
            self.run_slice(slot, warp, None)?;
            if self.options.step_limit.is_some_and(|limit| self.step > limit) {
                return Ok(Progress::StepLimit);
            }
        }
        Ok(Progress::Time)
    }

    /// Carries out what is parked, all memory being here; whether there was anything.
    pub fn meet_peers(&mut self) -> Result<bool, SimError> {
        self.measure(Self::carry_out)
    }

    fn measure<T>(&mut self, run: impl FnOnce(&mut Self) -> T) -> T {
        let began = self.profiler.is_some().then(Instant::now);
        let result = run(self);
        if let (Some(profiler), Some(began)) = (&mut self.profiler, began) {
            profiler.active += began.elapsed();
        }
        result
    }

    fn carry_out(&mut self) -> Result<bool, SimError> {
        let delivered = self.memory.deliver();
        self.progress += u64::from(delivered);
        let parked = std::mem::take(&mut self.parked);
        let any = delivered || !parked.is_empty();
        for one in parked {
            match one {
                Parked::Lanes { slot, warp, mask } => self.run_slice(slot, warp, Some(mask))?,
                Parked::Operation(number, event) => self.land_measured(number, event)?,
            }
        }
        Ok(any)
    }

    fn land_measured(&mut self, number: u64, event: Event) -> Result<(), SimError> {
        let kind = if matches!(event, Event::Wgmma { .. }) { Kind::Product } else { Kind::Copy };
        let began = self.profiler.is_some().then(Instant::now);
        let issuer = event.issuer();
        let landed = self.land(number, event);
        if self.findings.policy.keep_going {
            self.report_findings(issuer);
        }
        landed?;
        if let (Some(profiler), Some(began)) = (&mut self.profiler, began) {
            profiler.add(kind, 0, 0, began);
        }
        Ok(())
    }

    /// Whether the next stage of an operation is about memory that is away, or comes after one that is.
    fn needs_peers(&self, event: &Event) -> bool {
        match event {
            Event::Transfer(transfer) => transfer.parts.iter().any(|part| {
                let place = if transfer.data.is_some() { part.to } else { part.from };
                matches!(place, Place::Global(address) if self.memory.is_away(address))
            }),
            Event::Wgmma { .. } => false,
            Event::Arrive { after, .. } => {
                !self.parked.is_empty() && after.iter().any(|copy| !self.queue.is_done(*copy, false))
            }
        }
    }

    /// Whether nothing is left to do that anyone could see.
    fn launches_done(&mut self) -> bool {
        let done = self.launches.iter().all(|launch| launch.finished == launch.total);
        done && self.parked.is_empty() && (self.memory.is_whole() || self.memory.next_store().is_none())
    }

    /// When the device goes on: now, at a time, or never by itself.
    pub fn next_time(&mut self) -> Option<u64> {
        if !self.ready.is_empty() || self.queue.next_due().is_some() {
            return Some(self.now());
        }
        let timer = self.timers.peek().map(|Reverse((next, ..))| *next);
        timer.into_iter().chain(self.memory.next_store()).min()
    }

    /// Something has changed, on whatever device.
    pub fn note_progress(&mut self) {
        self.idle = (self.now(), self.progress);
    }

    /// Whether some lanes poll, and need only time to go on.
    pub fn is_polling(&self) -> bool {
        let mut fragments = self.ctas.iter().flatten().flat_map(|cta| &cta.warps).flat_map(|warp| &warp.fragments);
        fragments.any(|fragment| matches!(fragment.wait, None | Some(Wait::Time)))
    }

    /// Simulated time, in nanoseconds.
    pub fn now(&self) -> u64 {
        self.time >> TIME_SHIFT
    }

    /// Nothing can go on before some time has passed. The longer nothing has changed, the larger the steps, so that
    /// deadlines expire soon. Whether there is hope that it does.
    fn pass_time(&mut self, until: u64) -> bool {
        let now = self.now();
        if self.idle.1 != self.progress {
            self.note_progress();
        }
        let idle = now - self.idle.0;
        match self.next_time() {
            Some(next) if idle < HOPELESS_NS => {
                self.time = (next.max(now) + idle / 8).min(until) << TIME_SHIFT;
                true
            }
            _ => false,
        }
    }

    fn wake_timers(&mut self) {
        let now = self.now();
        while let Some(Reverse((time, slot, id, warp))) = self.timers.peek().copied() {
            if time > now {
                break;
            }
            self.timers.pop();
            let Some(cta) = self.ctas[slot].as_mut().filter(|cta| cta.state.id == id) else {
                continue;
            };
            let state = &mut cta.warps[warp];
            for fragment in &mut state.fragments {
                if fragment.wait.is_some() && fragment.until <= now {
                    fragment.timed_out = fragment.wait != Some(Wait::Time);
                    fragment.wait = None;
                }
            }
            enqueue(&mut self.ready, state, slot, warp);
        }
    }

    /// Runs a warp for a while, or the one instruction at which its lanes `parked` wait for peers.
    fn run_slice(&mut self, slot: usize, warp: usize, parked: Option<u32>) -> Result<(), SimError> {
        let budget = if parked.is_none() { self.random.spread(10) } else { 1 };
        let (step, now) = (self.step, self.now());
        // Out of its slot, so that the others are at hand as its peers.
        let Some(mut cta) = self.ctas[slot].take() else {
            return Ok(());
        };
        cta.warps[warp].queued &= parked.is_some();
        let launch = &mut self.launches[cta.state.launch];
        let agent = cta.state.first_agent + warp as u32;
        let mut context = Context {
            printed: &mut self.printed,
            findings: &mut self.findings,
            checker: self.checker.as_deref_mut(),
            profiler: self.profiler.as_deref_mut(),
            agent,
            pc: 0,
            module: launch.prepared.module,
            launch: &launch.prepared.info,
            memory: &mut self.memory,
            peers: &mut self.ctas,
            warp: &mut cta.warps[warp],
            state: &mut cta.state,
            warp_index: warp,
            slot,
            queue: &mut self.queue,
            random: &mut self.random,
            cost: &mut launch.cost,
            now,
            step,
            executed: 0,
            progress: &mut self.progress,
            fault_lanes: 0,
        };
        let result = context.run(budget, parked);
        let executed = context.executed;
        self.ctas[slot] = Some(cta);
        if self.findings.policy.keep_going {
            self.report_findings(Issuer { slot, cta: 0, warp, lanes: ALL, pc: 0 });
        }
        self.step += executed;
        self.time += self.skew.slowness() * (executed << TIME_SHIFT) / u64::from(self.resident.max(1));
        if let Err(Failure { fault, pc, lanes }) = result {
            let issuer = Issuer { slot, cta: 0, warp, lanes, pc };
            return Err(self.failed(fault, issuer));
        }
        let Some(cta) = self.ctas[slot].as_mut() else {
            return Ok(());
        };
        let (id, changed) = (cta.state.id, std::mem::take(&mut cta.state.changed));
        let members = cta.state.cluster.members.clone();
        let state = &mut cta.warps[warp];
        enqueue(&mut self.ready, state, slot, warp);
        for fragment in state.fragments.iter_mut().filter(|fragment| !fragment.armed) {
            if fragment.wait == Some(Wait::Peers) {
                fragment.armed = true;
                self.parked.push(Parked::Lanes { slot, warp, mask: fragment.mask });
            } else if fragment.wait.is_some() && fragment.until != NEVER {
                fragment.armed = true;
                self.timers.push(Reverse((fragment.until, slot, id, warp)));
            }
        }
        if changed {
            self.settle(slot)?;
        }
        if members.len() > 1 {
            for &(slot, id) in members.iter() {
                let peer = self.ctas[slot].as_mut().filter(|cta| cta.state.id == id);
                if peer.is_some_and(|cta| std::mem::take(&mut cta.state.changed)) {
                    self.settle(slot)?;
                }
            }
        }
        Ok(())
    }

    /// Completes the phase of a cluster's barrier if every thread has arrived or exited.
    fn settle_cluster(&mut self, members: &[(usize, u64)]) {
        let ctas = || {
            let running = members.iter().filter_map(|(slot, id)| Some((self.ctas[*slot].as_deref()?, id)));
            running.filter(|(cta, id)| cta.state.id == **id).map(|(cta, _)| cta)
        };
        let missing = |warp: &Warp| warp.live & !warp.cluster_arrived != 0;
        if !ctas().any(|cta| cta.state.cluster.arrived) || ctas().flat_map(|cta| &cta.warps).any(missing) {
            return;
        }
        for &(slot, id) in members {
            let Some(cta) = self.ctas[slot].as_mut().filter(|cta| cta.state.id == id) else {
                continue;
            };
            cta.state.cluster.arrived = false;
            for (index, warp) in cta.warps.iter_mut().enumerate() {
                warp.cluster_passed = std::mem::take(&mut warp.cluster_arrived);
                for fragment in &mut warp.fragments {
                    if fragment.wait == Some(Wait::Cluster) {
                        fragment.wait = None;
                    }
                }
                enqueue(&mut self.ready, warp, slot, index);
            }
        }
        if let Some(checker) = &mut self.checker {
            checker.complete_cluster(members[0].1);
        }
    }

    /// Lets every warp of a CTA go on whose wait has ended, and ends the CTA when all its warps have.
    pub fn settle(&mut self, slot: usize) -> Result<(), SimError> {
        let Some(cta) = self.ctas[slot].as_mut() else {
            return Ok(());
        };
        let members = cta.state.cluster.members.clone();
        if cta.live_warps() == 0 {
            self.finish_cta(slot)?;
            self.settle_cluster(&members);
            return Ok(());
        }
        let module = self.launches[cta.state.launch].prepared.module;
        release_barriers(cta, module, self.checker.as_deref_mut());
        let Cta { state, warps } = &mut **cta;
        for (index, warp) in warps.iter_mut().enumerate() {
            for at in 0..warp.fragments.len() {
                let fragment = &warp.fragments[at];
                let ended = match fragment.wait {
                    Some(Wait::Mbarrier { address, phase }) => {
                        // A broken mbarrier ends the wait too: executed again, it reports itself.
                        is_complete(state, address, phase).unwrap_or(true)
                    }
                    Some(Wait::Groups { kind, pending, read }) => {
                        warp.outstanding(kind, fragment.mask, pending).all(|copy| self.queue.is_done(copy, read))
                    }
                    Some(Wait::Wgmma { executed }) => state.warpgroups[index / GROUP_WARPS].executed >= executed,
                    Some(Wait::MaxRegisters { count }) => {
                        (count - warp.max_registers) * LANES as u32 <= state.free_registers
                    }
                    _ => false,
                };
                if ended {
                    warp.fragments[at].wait = None;
                }
            }
            enqueue(&mut self.ready, warp, slot, index);
        }
        self.settle_cluster(&members);
        Ok(())
    }

    fn finish_cta(&mut self, slot: usize) -> Result<(), SimError> {
        let Some(cta) = self.ctas[slot].as_ref() else {
            return Ok(());
        };
        let (id, exited_at) = (cta.state.id, cta.state.exited_at);
        let last = Issuer { slot, cta: id, warp: exited_at.0, lanes: ALL, pc: exited_at.1 };
        self.finish_stores(id)?;
        let Some(cta) = self.ctas[slot].as_ref() else {
            return Ok(());
        };
        if let Some(issuer) = self.queue.needs(id) {
            let fault = Fault::Synchronisation(
                "the CTA has exited before this operation on its shared memory was waited for".to_owned(),
            );
            return Err(self.failed(fault, issuer));
        }
        if let Some(checker) = &self.checker
            && let Some(fault) = bytes_left(&cta.state, &checker.mbarriers(cta.state.id))
        {
            self.judge(fault, last)?;
        }
        let Some(cta) = self.ctas[slot].as_ref() else {
            return Ok(());
        };
        for (index, group) in cta.warps.chunks_exact(GROUP_WARPS).enumerate() {
            let Some(other) = group.iter().position(|warp| warp.max_registers != group[0].max_registers) else {
                continue;
            };
            // The warp that executed one more: its last is what the others lack.
            let at = if group[other].registers_set_at.is_some() { other } else { 0 };
            let warp = index * GROUP_WARPS + at;
            let fault = Fault::Synchronisation(format!(
                "setmaxnreg by a part of a warpgroup: its warps have ended with {:?} registers a thread",
                group.iter().map(|warp| warp.max_registers).collect::<Vec<_>>()
            ));
            let pc = group[at].registers_set_at.unwrap_or(0);
            return Err(self.failed(fault, Issuer { slot, cta: cta.state.id, warp, lanes: ALL, pc }));
        }
        let now = self.now();
        let launch = &mut self.launches[cta.state.launch];
        launch.finished += 1;
        if launch.finished == launch.total {
            launch.cost.simulated_ns = now;
        }
        self.resident -= 1;
        if let Some(clash) = self.checker.as_mut().and_then(|checker| checker.finish_cta(id)) {
            let place = shared_place_of(clash.key & 0xff_ffff);
            let (before, earlier) = self
                .checker
                .as_ref()
                .map_or_else(Default::default, |checker| self.side(checker, clash.before, clash.before_mode));
            let fault = Fault::ExitRace { place, before, earlier: Box::new(earlier) };
            self.judge(fault, last)?;
        }
        if let Some(cta) = self.ctas[slot].take() {
            self.free_sms.insert(cta.state.sm);
        }
        self.free_slots.insert(slot);
        self.start_ctas();
        Ok(())
    }

    /// Copies that a CTA exits without a wait for read its shared memory now, if that is waived or only reported.
    fn finish_stores(&mut self, cta: u64) -> Result<(), SimError> {
        if self.findings.fails(Check::ExitWithStores) {
            return Ok(());
        }
        for (number, mut transfer) in self.queue.take_reads(cta) {
            let issuer = transfer.issuer;
            if !self.findings.policy.allow.contains(Check::ExitWithStores) {
                let message = "the CTA has exited before this operation on its shared memory was waited for".to_owned();
                let report = self.failed(Fault::Synchronisation(message), issuer);
                self.report(report);
            }
            transfer.data = Some(self.read_parts(number, &transfer).map_err(|fault| self.failed(fault, issuer))?);
            let due = self.step + self.random.spread(12);
            self.queue.again(due, number, Event::Transfer(transfer));
        }
        Ok(())
    }

    /// An error, unless the fault is waived or only reported.
    fn judge(&mut self, fault: Fault, issuer: Issuer) -> Result<(), SimError> {
        match self.findings.policy.verdict(Check::of(&fault)) {
            Verdict::Ignore => Ok(()),
            Verdict::Report => {
                let report = self.failed(fault, issuer);
                self.report(report);
                Ok(())
            }
            Verdict::Fail => Err(self.failed(fault, issuer)),
        }
    }

    /// Keeps what was found, once for each kind and place in the text.
    fn report(&mut self, report: SimError) {
        let same = |one: &SimError, other: &SimError| match (one, other) {
            (SimError::Fault { fault, position }, SimError::Fault { fault: other, position: there }) => {
                Check::of(fault) == Check::of(other)
                    && position.ptx_line == there.ptx_line
                    && position.entry == there.entry
            }
            _ => false,
        };
        if self.reports.len() < MOST_REPORTS && !self.reports.iter().any(|known| same(known, &report)) {
            self.reports.push(report);
        }
    }

    /// Reports what the checks have found since the last time, in a slice of a warp or when an operation was due.
    fn report_findings(&mut self, issuer: Issuer) {
        for (fault, pc, lanes) in std::mem::take(&mut self.findings.list) {
            let report = self.failed(fault, Issuer { pc, lanes, ..issuer });
            self.report(report);
        }
        let found = self.checker.as_mut().map_or_else(Vec::new, |checker| std::mem::take(&mut checker.verdicts.found));
        for clash in found {
            if let Some(checker) = &self.checker {
                let report = self.clashed(checker, &clash);
                self.report(report);
            }
        }
    }

    fn start_ctas(&mut self) {
        loop {
            let mut started = false;
            for launch in 0..self.launches.len() {
                let state = &self.launches[launch];
                let cluster = state.prepared.info.cluster.iter().product::<u32>();
                if state.next_cta < state.total
                    && self.may_start(launch)
                    && self.resident + cluster <= state.prepared.info.places
                {
                    self.start_cluster(launch);
                    started = true;
                }
            }
            if !started {
                return;
            }
        }
    }

    /// Whether CTAs of a launch may start: where launches run in order, once all that earlier ones did is done.
    fn may_start(&self, launch: usize) -> bool {
        if !self.options.in_order || self.launches[launch].next_cta > 0 {
            return true;
        }
        let finished = self.launches[..launch].iter().all(|earlier| earlier.finished == earlier.total);
        let idle = || self.resident == 0 && self.queue.next_due().is_none() && self.parked.is_empty();
        finished && idle() && self.memory.is_performed(self.device)
    }

    /// Starts the CTAs of the next cluster together.
    fn start_cluster(&mut self, launch: usize) {
        let running = &mut self.launches[launch];
        let info = &running.prepared.info;
        let cluster = info.cluster;
        let count = cluster.iter().product::<u32>();
        let [x, y, _] = std::array::from_fn(|axis| info.grid[axis] / cluster[axis]);
        let number = running.next_cta / u64::from(count);
        running.next_cta += u64::from(count);
        let first = place_of(number, [x, y]);
        // The lowest that are free.
        let slots = self.ctas.len();
        let mut free: Vec<usize> = self.free_slots.iter().take(count as usize).copied().collect();
        free.iter().for_each(|slot| _ = self.free_slots.remove(slot));
        free.extend((slots..).take(count as usize - free.len()));
        let devices = self.memory.devices();
        let ids = (self.next_cta_id..).step_by(devices);
        let members: Arc<[(usize, u64)]> = free.into_iter().zip(ids).take(count as usize).collect();
        self.next_cta_id += u64::from(count) * devices as u64;
        for rank in 0..count {
            let inside = place_of(u64::from(rank), [cluster[0], cluster[1]]);
            let index = std::array::from_fn(|axis| first[axis] * cluster[axis] + inside[axis]);
            self.start_cta(launch, index, Cluster { members: members.clone(), rank, arrived: false });
        }
    }

    fn start_cta(&mut self, launch: usize, index: [u32; 3], cluster: Cluster) {
        let prepared = self.launches[launch].prepared;
        let device = self.device;
        let (slot, id) = cluster.members[cluster.rank as usize];
        let sm = self.free_sms.pop_first().unwrap_or(self.resident);
        let warp_count = prepared.threads.div_ceil(32) as usize;
        let registers = initial_registers(prepared.threads);
        let warps: Vec<Warp> = (0..warp_count).map(|warp| new_warp(prepared, warp as u32, registers)).collect();
        let first_agent = self.checker.as_mut().map_or(0, |checker| {
            let live: Vec<u32> = warps.iter().map(|warp| warp.live).collect();
            let home = Home { launch, device, cluster: cluster.members[0].1, cta: id, index, warp: 0 };
            checker.start_cta(home, &live, warp_count / GROUP_WARPS, u64::from(prepared.shared_bytes))
        });
        let cta = Cta {
            state: CtaState {
                id,
                launch,
                device,
                index,
                cluster,
                exited_at: (0, 0),
                first_agent,
                sm,
                shared: TrackedBytes::new(prepared.shared_bytes as usize),
                origins: vec![0; (prepared.shared_bytes as usize).div_ceil(ORIGIN_BYTES)],
                dynamic_bytes: prepared.dynamic_bytes,
                barriers: vec![NamedBarrier::default(); BARRIERS as usize],
                warpgroups: vec![Warpgroup::default(); warp_count / GROUP_WARPS],
                free_registers: 0,
                changed: false,
            },
            warps,
        };
        self.resident += 1;
        if slot == self.ctas.len() {
            self.ctas.push(None);
        }
        self.ready.extend((0..warp_count).map(|warp| (slot, warp)));
        self.ctas[slot] = Some(Box::new(cta));
    }

    /// An error at an instruction.
    pub fn failed(&self, fault: Fault, issuer: Issuer) -> SimError {
        if let Some(checker) = &self.checker
            && let Some(clash) = checker.verdicts.clash
        {
            return self.clashed(checker, &clash);
        }
        let position = self.position(issuer);
        SimError::Fault { fault, position: Box::new(position) }
    }

    /// Two accesses that nothing orders, as an error at the later one.
    fn clashed(&self, checker: &Checker, clash: &Clash) -> SimError {
        let place = match is_shared(clash.key) {
            false => self.memory.place(clash.key),
            true => {
                let place = shared_place_of(clash.key & 0xff_ffff);
                let id = shared_owner(clash.key);
                match self.ctas.iter().flatten().find(|cta| cta.state.id == id) {
                    Some(cta) if cta.state.cluster.members.len() > 1 => {
                        format!("{place} of CTA ({},{},{})", cta.state.index[0], cta.state.index[1], cta.state.index[2])
                    }
                    _ => place,
                }
            }
        };
        let (before, earlier) = self.side(checker, clash.before, clash.before_mode);
        let (now, position) = self.side(checker, clash.now, clash.now_mode);
        let earlier = Box::new(earlier);
        let fault = match clash.kind {
            ClashKind::Race => Fault::Race { place, now, before, earlier },
            ClashKind::Proxy => {
                let space = if is_shared(clash.key) { "shared::cta" } else { "global" };
                Fault::ProxyFence { space, place, now, before, earlier }
            }
            ClashKind::ReadOnly => Fault::ReadOnly { place, now, before, earlier },
            ClashKind::TensorMap => Fault::TensorMapFence { place, before, earlier },
            ClashKind::Phase => Fault::PhaseOrder { place, earlier },
        };
        SimError::Fault { fault, position: Box::new(position) }
    }

    /// An access of a clash, in words, and where it was.
    fn side(&self, checker: &Checker, record: Record, mode: Mode) -> (String, Position) {
        let Some(home) = checker.home(record) else {
            return (String::new(), Position::default());
        };
        let launch = &self.launches[home.launch].prepared;
        let instruction = launch.module.code.get(record.pc() as usize);
        let position = Position {
            source: launch.module.source(record.pc()),
            ptx_line: instruction.map_or(0, |known| known.line),
            instruction: instruction.map_or_else(String::new, |known| known.name.to_string()),
            device: home.device,
            entry: launch.entry.name.clone(),
            cta: home.index,
            warp: home.warp,
            lanes: record.lanes(),
        };
        let strength = if record.strong().is_some() { "strong " } else { "" };
        let agent = if record.is_async() { "asynchronous " } else { strength };
        (format!("{agent}{}", if mode == Mode::Read { "read" } else { "write" }), position)
    }

    fn position(&self, issuer: Issuer) -> Position {
        let Some(cta) = self.ctas.get(issuer.slot).and_then(Option::as_ref) else {
            return Position::default();
        };
        let launch = &self.launches[cta.state.launch].prepared;
        let instruction = launch.module.code.get(issuer.pc as usize);
        Position {
            source: launch.module.source(issuer.pc),
            ptx_line: instruction.map_or(0, |instruction| instruction.line),
            instruction: instruction.map_or_else(String::new, |known| known.name.to_string()),
            device: cta.state.device,
            entry: launch.entry.name.clone(),
            cta: cta.state.index,
            warp: issuer.warp as u32,
            lanes: issuer.lanes,
        }
    }

    /// Where every group of lanes is, and what it waits for.
    pub fn stuck(&self) -> Vec<Stuck> {
        let mut list = Vec::new();
        for (slot, cta) in self.ctas.iter().enumerate() {
            let Some(cta) = cta else { continue };
            for (index, warp) in cta.warps.iter().enumerate() {
                for fragment in &warp.fragments {
                    let issuer = Issuer { slot, cta: cta.state.id, warp: index, lanes: fragment.mask, pc: fragment.pc };
                    list.push(Stuck { position: self.position(issuer), waits_for: describe(cta, warp, fragment) });
                }
            }
        }
        list.sort_by_key(|stuck| (stuck.position.cta, stuck.position.warp));
        list
    }
}

/// Place of a number counted along x, then y, then z.
fn place_of(number: u64, [x, y]: [u32; 2]) -> [u32; 3] {
    let (x, y) = (u64::from(x), u64::from(y));
    [(number % x) as u32, (number / x % y) as u32, (number / (x * y)) as u32]
}

fn shared_place_of(address: u64) -> String {
    format!("shared memory {address:#x}")
}

fn new_warp(prepared: &Prepared<'_>, index: u32, max_registers: u32) -> Warp {
    let module = prepared.module;
    let threads = prepared.threads - index * LANES as u32;
    let live = if threads >= LANES as u32 { ALL } else { (1 << threads) - 1 };
    let mut registers = Registers::new(module.registers);
    for (register, value) in &module.constants.r16 {
        registers.r16[*register as usize] = [*value; LANES];
    }
    for (register, value) in &module.constants.r32 {
        registers.r32[*register as usize] = [*value; LANES];
    }
    for (register, value) in &module.constants.r64 {
        registers.r64[*register as usize] = [*value; LANES];
    }
    for (register, offset) in &module.constants.dynamic {
        let value = i64::from(prepared.entry.shared.dynamic()) + offset;
        register.write(&mut registers, ALL, &[value as u64; LANES]);
    }
    Warp {
        registers,
        fragments: vec![Fragment {
            pc: prepared.entry.start,
            mask: live,
            wait: None,
            until: NEVER,
            timed_out: false,
            armed: false,
            stack: Vec::new(),
        }],
        live,
        local: TrackedBytes::new(prepared.entry.local_bytes as usize * LANES),
        saved: HashMap::new(),
        copies: Default::default(),
        wgmma_issued: 0,
        wgmma_commits: Vec::new(),
        max_registers,
        registers_set_at: None,
        queued: true,
        diverged: 0,
        polls: Polls::default(),
        polled: false,
        unmet: Vec::new(),
        cluster_arrived: 0,
        cluster_passed: 0,
    }
}

/// Puts a warp among those that can go on, if it can.
fn enqueue(ready: &mut Vec<(usize, usize)>, warp: &mut Warp, slot: usize, index: usize) {
    let can_run = warp.fragments.iter().any(|fragment| fragment.wait.is_none());
    if can_run && !warp.queued {
        warp.queued = true;
        ready.push((slot, index));
    }
}

/// Releases the barriers of a CTA at which all have arrived.
fn release_barriers(cta: &mut Cta, module: &Module, mut checker: Option<&mut Checker>) {
    let live = cta.live_warps() * LANES as u32;
    for id in 0..cta.state.barriers.len() {
        let barrier = &cta.state.barriers[id];
        if barrier.arrived == 0 || barrier.arrived < barrier.expected.unwrap_or(live) {
            continue;
        }
        let barrier = std::mem::take(&mut cta.state.barriers[id]);
        let id = id as u32;
        for (index, warp) in cta.warps.iter_mut().enumerate() {
            for fragment in &mut warp.fragments {
                if fragment.wait != Some(Wait::Barrier { id }) {
                    continue;
                }
                let reduction = match &module.code[fragment.pc as usize].op {
                    Op::Barrier(operation) => operation.reduction,
                    _ => None,
                };
                let truth = |value: bool| if value { ALL } else { 0 };
                match reduction {
                    Some((BarrierReduction::And(d), _)) => {
                        let all = truth(barrier.truths == barrier.votes);
                        warp.registers.set_predicate(d, fragment.mask, all);
                    }
                    Some((BarrierReduction::Or(d), _)) => {
                        let any = truth(barrier.truths > 0);
                        warp.registers.set_predicate(d, fragment.mask, any);
                    }
                    Some((BarrierReduction::Count(d), _)) => {
                        d.set(&mut warp.registers, fragment.mask, &[barrier.truths; LANES]);
                    }
                    None => {}
                }
                fragment.wait = None;
                fragment.pc += 1;
                if let Some(checker) = &mut checker {
                    checker.leave_barrier(cta.state.first_agent + index as u32, fragment.mask, cta.state.id, id);
                }
            }
        }
        if let Some(checker) = &mut checker {
            checker.reset_barrier(cta.state.id, id);
        }
    }
}

/// What a group of lanes waits for, in words.
fn describe(cta: &Cta, warp: &Warp, fragment: &Fragment) -> String {
    match fragment.wait {
        None => "nothing (it can run)".to_owned(),
        Some(Wait::Lanes { members }) => {
            format!("lanes {:#010x} of its warp at this instruction", members & !fragment.mask)
        }
        Some(Wait::WarpBarrier { members }) => {
            format!("lanes {:#010x} at bar.warp.sync", members & !fragment.mask)
        }
        Some(Wait::Barrier { id }) => {
            let barrier = &cta.state.barriers[id as usize];
            let expected = barrier.expected.unwrap_or(cta.live_warps() * LANES as u32);
            format!("barrier {id}, at which {} of {expected} threads have arrived", barrier.arrived)
        }
        Some(Wait::Cluster) => "the other threads of its cluster at barrier.cluster".to_owned(),
        Some(Wait::Mbarrier { address, phase }) => {
            let at = address as usize;
            let state = cta
                .state
                .shared
                .data()
                .get(at..at + 8)
                .and_then(|word| word.try_into().ok())
                .and_then(|word| crate::mbarrier::Mbarrier::decode(u64::from_le_bytes(word)).ok())
                .map_or_else(
                    || "which is not one".to_owned(),
                    |barrier| {
                        format!(
                            "which is in phase parity {} with {} arrivals and {} bytes pending",
                            barrier.parity(),
                            barrier.pending(),
                            barrier.tx_count()
                        )
                    },
                );
            format!("{phase:?} of the mbarrier at shared {address:#x}, {state}")
        }
        Some(Wait::Groups { kind, pending, read }) => format!(
            "{} groups of {kind:?} copies{} to be done but {pending}",
            warp.outstanding(kind, fragment.mask, 0).count(),
            if read { " (reading)" } else { "" }
        ),
        Some(Wait::Wgmma { executed }) => {
            format!("wgmma number {executed} of its warpgroup, which other warps have not issued")
        }
        Some(Wait::MaxRegisters { count }) => {
            format!("{count} registers a thread; {} are free in the CTA", cta.state.free_registers)
        }
        Some(Wait::Peers) => "its turn to work on another device's memory".to_owned(),
        Some(Wait::Time) => "time to pass, or a word in memory to change".to_owned(),
    }
}
