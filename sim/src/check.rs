//! Finds accesses that nothing orders, by happens-before (PTX ISA 8.6, "Memory Consistency Model").
//!
//! Every warp has one clock for each set of its lanes that know the same; an asynchronous copy or wgmma is an agent of its
//! own, which knows what its issuer knew, and whose accesses are known to whoever learns of its completion. Edges are
//! what the model calls synchronisation: barriers, `bar.warp.sync`, mbarrier phases, waits for groups, and release and
//! acquire patterns of sufficient scope. Shuffles and votes order no memory. Whatever a run has not interleaved wrongly
//! is reported too, if nothing would have kept it from happening.

mod clock;
mod phases;
mod reads;
mod sequential;
mod shadow;
mod verdicts;

use std::collections::VecDeque;
use std::ops::Range;

use crate::error::Fault;
use crate::program::{CopyKind, Space, WgmmaUse};
use crate::waiver::Policy;
use clock::{Clock, Entry};
use phases::Phases;
use sequential::Sequential;
use shadow::{Actor, Agent, FastMap, Shadow, Site};
pub(crate) use shadow::{Clash, ClashKind, Mode, Record, Scope, is_shared, shared_key, shared_owner};
pub(crate) use verdicts::Verdicts;

/// Lanes with the same clock.
#[derive(Debug, Clone)]
struct View {
    lanes: u32,
    clock: Clock,
}

/// A clock that a fence of some lanes has set aside: to be published by a later store, or read by an earlier load and to
/// be learned at a later fence.
#[derive(Debug, Clone)]
struct Aside {
    lanes: u32,
    scope: Scope,
    /// The warp's tick at a release fence: each lane adds what it did itself.
    tick: u32,
    clock: Clock,
}

/// The bulk groups of a lane: the agents that stand for reads and for writes, and how many groups were committed.
#[derive(Debug, Clone, Copy)]
struct Groups {
    lane: usize,
    kind: CopyKind,
    reads: u32,
    writes: u32,
    committed: u32,
}

#[derive(Debug, Default)]
struct WarpState {
    /// The time of its accesses.
    tick: u32,
    /// What it did at this tick was handed on: its next access comes later.
    handed_on: bool,
    /// Lanes that do not exist.
    absent: u32,
    views: Vec<View>,
    fenced: Vec<Aside>,
    /// Of `fence.mbarrier_init`: what a relaxed arrival at the cluster's barrier hands on.
    initialised: Vec<Aside>,
    observed: Vec<Aside>,
    groups: Vec<Groups>,
    wgmma_committed: u32,
    /// Groups of wgmmas that were waited for.
    wgmma_waited: u32,
    wgmma_fenced: bool,
    /// By their place among those that some wgmma uses.
    wgmma_registers: Vec<RegisterState>,
}

/// A register that some wgmma uses.
#[derive(Debug, Clone, Copy, Default)]
struct RegisterState {
    /// The group of the last wgmma that was given it, and its instruction.
    group: u32,
    given_at: u32,
    /// Written since the last fence, and where.
    written: bool,
    written_at: u32,
}

/// What was wrong with a register of a wgmma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RegisterMisuse {
    UnderWay,
    Unfenced,
    NeverFenced,
}

/// Where an agent runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Home {
    pub launch: usize,
    pub device: usize,
    pub cluster: u64,
    pub cta: u64,
    pub index: [u32; 3],
    pub warp: u32,
}

/// What the barrier of a cluster hands on.
#[derive(Debug, Default)]
struct ClusterPhases {
    /// CTAs of the cluster that were started.
    ctas: u32,
    arriving: Clock,
    complete: Clock,
}

#[derive(Debug)]
struct Product {
    clock: Clock,
    pc: u32,
    tick: u32,
}

#[derive(Debug, Default)]
struct CtaChecks {
    cluster: u64,
    /// Number of the first warp, and how many there are.
    warps: (u32, u32),
    /// Stands for the reads of its copies to several CTAs: the agent, and how many there were.
    multicasts: Option<(u32, u32)>,
    shared_bytes: u64,
    mbarriers: FastMap<u32, Phases>,
    barriers: Vec<Clock>,
    /// wgmmas that were issued and not carried out, of each warpgroup.
    products: Vec<VecDeque<Product>>,
    /// First agent of the warpgroups.
    first_group: u32,
}

/// What a store has published at a word.
#[derive(Debug, Clone)]
struct Published {
    scope: Scope,
    site: Site,
    clock: Clock,
}

/// An asynchronous copy under way.
#[derive(Debug, Clone)]
struct Flight {
    clock: Clock,
    issuer: u32,
    lanes: u32,
    pc: u32,
    reads: (u32, u32),
    writes: (u32, u32),
    async_proxy: bool,
    /// How many phases of the mbarrier that it completes on its issuer knew to be complete.
    phases_known: u32,
}

impl Flight {
    /// Its reads or its writes, as an access.
    fn record(&self, (agent, tick): (u32, u32), strong: Option<Scope>) -> Record {
        Record::new(Agent::Async(agent), tick, self.lanes, self.pc, strong, self.async_proxy, self.issuer)
    }
}

/// An ordinary access of some lanes of a warp.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    pub warp: u32,
    pub lanes: u32,
    pub pc: u32,
    pub mode: Mode,
    /// An atomic, which reads what it writes over.
    pub reads: bool,
    pub strong: Option<Scope>,
    /// By `ld.global.nc`.
    pub read_only: bool,
    /// A wait for an mbarrier.
    pub waits: bool,
}

/// Which side of a release or acquire pattern an instruction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Order {
    #[default]
    Weak,
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

impl Order {
    pub fn acquires(self) -> bool {
        matches!(self, Self::Acquire | Self::AcquireRelease)
    }

    pub fn releases(self) -> bool {
        matches!(self, Self::Release | Self::AcquireRelease)
    }

    /// The scope of a strong access.
    pub fn strong(self, scope: Scope) -> Option<Scope> {
        (self != Self::Weak).then_some(scope)
    }
}

/// The state of all checks of a run.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    homes: Vec<Home>,
    scopes: Vec<Site>,
    warps: Vec<WarpState>,
    clusters: FastMap<u64, ClusterPhases>,
    ctas: FastMap<u64, CtaChecks>,
    shadow: Shadow,
    words: FastMap<u64, Vec<Published>>,
    sequential: Sequential,
    flights: FastMap<u64, Flight>,
    agents: u32,
    /// What came before each launch that others came before.
    began: FastMap<usize, Clock>,
    /// Launches of a device come one after the other.
    in_order: bool,
    /// Of each device, what its CTAs that have ended did and knew, where launches come in order.
    ended: FastMap<usize, Clock>,
    nothing: Clock,
    pub verdicts: Verdicts,
}

impl Checker {
    /// The checks of a run, whose launches of a device may come one after the other.
    pub fn new(policy: Policy, in_order: bool) -> Self {
        Self { verdicts: Verdicts::new(policy), in_order, ..Self::default() }
    }

    /// A CTA starts: gives its first warp's number. `live` are the lanes of each warp.
    pub fn start_cta(&mut self, home: Home, live: &[u32], groups: usize, shared_bytes: u64) -> u32 {
        let first = self.homes.len() as u32;
        let ended = self.ended.get(&home.device);
        let began = self.began.entry(home.launch).or_insert_with(|| {
            let Some(mut clock) = ended.cloned() else {
                return Clock::default();
            };
            // The end of a kernel is a fence of every kind.
            clock.fence_proxy(Space::Generic);
            [true, false].into_iter().for_each(|release| clock.fence_tensor_map(release));
            clock
        });
        let members = (0..live.len()).chain((0..groups).map(|group| group * 4));
        for warp in members {
            self.homes.push(Home { warp: warp as u32, ..home });
            let Home { device, cluster, cta, launch, .. } = home;
            self.scopes.push(Site { device, cluster, cta, launch });
        }
        self.warps.extend(live.iter().map(|live| WarpState {
            tick: 1,
            absent: !live,
            views: vec![View { lanes: *live, clock: began.clone() }],
            ..WarpState::default()
        }));
        self.warps.resize_with(self.homes.len(), WarpState::default);
        let checks = CtaChecks {
            cluster: home.cluster,
            warps: (first, live.len() as u32),
            shared_bytes,
            barriers: vec![Clock::default(); crate::cta::BARRIERS as usize],
            products: (0..groups).map(|_| VecDeque::new()).collect(),
            first_group: first + live.len() as u32,
            ..CtaChecks::default()
        };
        self.ctas.insert(home.cta, checks);
        self.clusters.entry(home.cluster).or_default().ctas += 1;
        first
    }

    /// A CTA has exited; an access to its shared memory by another one that nothing orders before that, if there is any.
    pub fn finish_cta(&mut self, cta: u64) -> Option<Clash> {
        let checks = self.ctas.remove(&cta)?;
        let mut clash = None;
        if self.in_order {
            self.end_cta(checks.warps);
        }
        if self.clusters.get(&checks.cluster).is_some_and(|cluster| cluster.ctas > 1) {
            let (first, count) = checks.warps;
            let mut clock = Clock::default();
            (first..first + count).for_each(|warp| clock.join(&self.snapshot(warp, u32::MAX)));
            clash = self.shadow.unknown_to_exit(cta, checks.shared_bytes, &clock, &self.scopes);
        }
        if self.ctas.values().all(|other| other.cluster != checks.cluster) {
            self.clusters.remove(&checks.cluster);
        }
        self.forget_sequence(cta, checks.warps);
        self.shadow.forget_shared(cta, checks.shared_bytes);
        self.words.retain(|key, _| !is_shared(*key) || shared_owner(*key) != cta);
        clash
    }

    /// What warps of a CTA that has exited did and knew comes before the next launch.
    fn end_cta(&mut self, (first, count): (u32, u32)) {
        let Some(device) = self.homes.get(first as usize).map(|home| home.device) else {
            return;
        };
        let mut clock = Clock::default();
        for warp in first..first + count {
            self.hand_on(warp, u32::MAX, &mut clock);
            for groups in self.warps.get(warp as usize).into_iter().flat_map(|state| &state.groups) {
                clock.learn_completed(groups.reads, groups.committed + 1);
                clock.learn_completed(groups.writes, groups.committed + 1);
            }
        }
        self.ended.entry(device).or_default().join(&clock);
    }

    /// Where the warp of a record ran.
    pub fn home(&self, record: Record) -> Option<Home> {
        self.homes.get(record.issuer as usize).copied()
    }

    /// Checks and remembers an access.
    pub fn access(&mut self, access: Access, key: u64, bytes: u64) -> Result<(), Fault> {
        let Access { warp, lanes, pc, mode, reads: observes, strong, read_only, waits } = access;
        let Some(state) = self.warps.get_mut(warp as usize) else {
            return Ok(());
        };
        if std::mem::take(&mut state.handed_on) {
            state.tick += 1;
        }
        for view in &state.views {
            let lanes = lanes & view.lanes;
            if lanes == 0 {
                continue;
            }
            let record = Record::new(Agent::Warp(warp), state.tick, lanes, pc, strong, false, warp);
            let record = if read_only { record.read_only() } else { record };
            let record = if waits { record.waits() } else { record };
            let began = self.scopes.get(warp as usize).and_then(|site| self.began.get(&site.launch));
            let began = began.unwrap_or(&self.nothing);
            let actor = Actor { key, record, clock: &view.clock, mode, observes, homes: &self.scopes, began };
            if let Err(clash) = self.shadow.access(bytes, &actor) {
                self.verdicts.judge(clash, &self.ctas)?;
            }
        }
        if !self.shadow.observed.is_empty() {
            for seen in std::mem::take(&mut self.shadow.observed) {
                self.learn(warp, lanes, |clock| clock.see(seen.issuer, seen.tick(), seen.lanes()));
            }
        }
        Ok(())
    }

    /// What some lanes of a warp know now, with what they themselves did.
    fn snapshot(&self, warp: u32, lanes: u32) -> Clock {
        let mut clock = Clock::default();
        self.hand_on(warp, lanes, &mut clock);
        clock
    }

    /// The same, for a clock that knows more.
    fn hand_on(&self, warp: u32, lanes: u32, clock: &mut Clock) {
        let Some(state) = self.warps.get(warp as usize) else {
            return;
        };
        for view in state.views.iter().filter(|view| view.lanes & lanes != 0) {
            clock.join(&view.clock);
        }
        clock.learn(warp, Entry::new(state.tick, lanes | state.absent));
    }

    /// Later accesses of the warp are not part of what was handed on before.
    fn advance(&mut self, warp: u32) {
        if let Some(state) = self.warps.get_mut(warp as usize) {
            state.handed_on = true;
        }
    }

    fn learn(&mut self, warp: u32, lanes: u32, change: impl Fn(&mut Clock)) {
        let Some(state) = self.warps.get_mut(warp as usize) else {
            return;
        };
        for index in 0..state.views.len() {
            let view = &mut state.views[index];
            if view.lanes & lanes == 0 {
                continue;
            }
            let rest = view.lanes & !lanes;
            let before = (rest != 0).then(|| view.clock.clone());
            view.lanes &= lanes;
            change(&mut view.clock);
            if let Some(clock) = before {
                state.views.push(View { lanes: rest, clock });
            }
        }
    }

    /// The lanes share what they know: `bar.warp.sync`.
    pub fn join_lanes(&mut self, warp: u32, lanes: u32) {
        let clock = self.snapshot(warp, lanes);
        self.set_view(warp, lanes, clock);
        self.advance(warp);
    }

    fn set_view(&mut self, warp: u32, lanes: u32, clock: Clock) {
        let Some(state) = self.warps.get_mut(warp as usize) else {
            return;
        };
        for view in &mut state.views {
            view.lanes &= !lanes;
        }
        state.views.retain(|view| view.lanes != 0);
        state.views.push(View { lanes, clock });
    }

    /// A named barrier: arrival.
    pub fn arrive_barrier(&mut self, warp: u32, lanes: u32, cta: u64, id: u32) {
        let clock = self.snapshot(warp, lanes);
        if let Some(barrier) = self.ctas.get_mut(&cta).and_then(|checks| checks.barriers.get_mut(id as usize)) {
            barrier.join(&clock);
        }
        self.advance(warp);
    }

    /// A named barrier: all have arrived; these lanes go on.
    pub fn leave_barrier(&mut self, warp: u32, lanes: u32, cta: u64, id: u32) {
        let barrier = self.ctas.get(&cta).and_then(|checks| checks.barriers.get(id as usize)).cloned();
        if let Some(barrier) = barrier {
            let mut clock = self.snapshot(warp, lanes);
            clock.join(&barrier);
            self.set_view(warp, lanes, clock);
            self.advance(warp);
        }
    }

    /// A named barrier is free again.
    pub fn reset_barrier(&mut self, cta: u64, id: u32) {
        if let Some(barrier) = self.ctas.get_mut(&cta).and_then(|checks| checks.barriers.get_mut(id as usize)) {
            *barrier = Clock::default();
        }
    }

    /// What an arrival of some lanes hands on: all they know, or as a relaxed one what their fences have set aside.
    fn released(&self, warp: u32, lanes: u32, scope: Scope, relaxed: bool) -> Clock {
        if !relaxed {
            return self.snapshot(warp, lanes);
        }
        let mut clock = Clock::default();
        let fenced = self.warps.get(warp as usize).map_or(&[][..], |state| &state.fenced);
        for aside in fenced.iter().filter(|aside| aside.lanes & lanes != 0 && aside.scope >= scope) {
            clock.join(&aside.clock);
            clock.learn(warp, Entry::new(aside.tick, aside.lanes & lanes));
        }
        clock
    }

    /// `barrier.cluster.arrive`.
    pub fn arrive_cluster(&mut self, warp: u32, lanes: u32, relaxed: bool) {
        let mut clock = self.released(warp, lanes, Scope::Cluster, relaxed);
        if relaxed && let Some(state) = self.warps.get(warp as usize) {
            for aside in state.initialised.iter().filter(|aside| aside.lanes & lanes != 0) {
                clock.join(&aside.clock);
            }
        }
        if let Some(site) = self.scopes.get(warp as usize)
            && let Some(phases) = self.clusters.get_mut(&site.cluster)
        {
            phases.arriving.join(&clock);
        }
        self.advance(warp);
    }

    /// All threads of a cluster have arrived.
    pub fn complete_cluster(&mut self, cluster: u64) {
        if let Some(phases) = self.clusters.get_mut(&cluster) {
            phases.complete = std::mem::take(&mut phases.arriving);
        }
    }

    /// `barrier.cluster.wait`.
    pub fn wait_cluster(&mut self, warp: u32, lanes: u32) {
        let cluster = self.scopes.get(warp as usize).map(|site| site.cluster);
        if let Some(complete) =
            cluster.and_then(|cluster| self.clusters.get(&cluster)).map(|known| known.complete.clone())
        {
            self.learn(warp, lanes, |clock| clock.join(&complete));
        }
    }

    /// `fence.mbarrier_init`: it releases the initialisations to the cluster, and to the asynchronous proxy. All that came
    /// before is taken for one.
    pub fn fence_mbarrier_init(&mut self, warp: u32, lanes: u32) {
        self.fence_proxy(warp, lanes, Space::Shared);
        let clock = self.snapshot(warp, lanes);
        if let Some(state) = self.warps.get_mut(warp as usize) {
            state.initialised.retain(|aside| aside.lanes & !lanes != 0);
            state.initialised.push(Aside { lanes, scope: Scope::Cluster, tick: state.tick, clock });
        }
        self.advance(warp);
    }

    /// `fence.acq_rel` and `fence.sc`.
    pub fn fence(&mut self, warp: u32, lanes: u32, scope: Scope) {
        let Some(state) = self.warps.get_mut(warp as usize) else {
            return;
        };
        let observed: Vec<Aside> =
            state.observed.iter().filter(|aside| aside.lanes & lanes != 0 && aside.scope <= scope).cloned().collect();
        for aside in &mut state.observed {
            if aside.scope <= scope {
                aside.lanes &= !lanes;
            }
        }
        state.observed.retain(|aside| aside.lanes != 0);
        for aside in observed {
            self.learn(warp, aside.lanes & lanes, |clock| clock.join(&aside.clock));
        }
        if let Some(state) = self.warps.get_mut(warp as usize) {
            let tick = state.tick;
            let views = state.views.iter().filter(|view| view.lanes & lanes != 0);
            let fenced: Vec<Aside> =
                views.map(|view| Aside { lanes: view.lanes & lanes, scope, tick, clock: view.clock.clone() }).collect();
            for aside in &mut state.fenced {
                if aside.scope <= scope {
                    aside.lanes &= !lanes;
                }
            }
            state.fenced.retain(|aside| aside.lanes != 0);
            state.fenced.extend(fenced);
        }
        self.advance(warp);
    }

    /// `fence.proxy.async`: of global, shared or (generic) all memory.
    pub fn fence_proxy(&mut self, warp: u32, lanes: u32, space: Space) {
        self.fence_own(warp, lanes, |clock| clock.fence_proxy(space));
    }

    /// `fence.proxy.tensormap::generic`, which is a fence of memory too.
    pub fn fence_tensor_map(&mut self, warp: u32, lanes: u32, scope: Scope, release: bool) {
        if release {
            self.fence_own(warp, lanes, |clock| clock.fence_tensor_map(true));
            self.fence(warp, lanes, scope);
        } else {
            self.fence(warp, lanes, scope);
            self.fence_own(warp, lanes, |clock| clock.fence_tensor_map(false));
        }
    }

    /// A lane uses the tensor map at an address of global memory.
    pub fn use_tensor_map(&mut self, warp: u32, lanes: u32, pc: u32, key: u64) -> Result<(), Fault> {
        let clock = self.snapshot(warp, lanes);
        let tick = self.warps.get(warp as usize).map_or(0, |state| state.tick);
        let record = Record::new(Agent::Warp(warp), tick, lanes, pc, None, true, warp);
        let homes = &self.scopes;
        let actor =
            Actor { key, record, clock: &clock, mode: Mode::Read, observes: false, homes, began: &self.nothing };
        self.shadow.use_map(128, &actor).or_else(|clash| self.verdicts.judge(clash, &self.ctas))
    }

    /// A fence of what lanes of a warp did, and of what they know.
    fn fence_own(&mut self, warp: u32, lanes: u32, fence: impl Fn(&mut Clock)) {
        let Some(state) = self.warps.get(warp as usize) else {
            return;
        };
        let (tick, absent) = (state.tick, state.absent);
        let single = lanes.is_power_of_two();
        self.learn(warp, lanes, |clock| {
            if single {
                clock.learn(warp, Entry::new(tick, lanes));
                fence(clock);
            } else {
                // Each lane fences its own accesses; that others' are not yet known is left to the race check.
                let known = clock.clone();
                clock.learn(warp, Entry::new(tick, lanes | absent));
                fence(clock);
                clock.forget_warps(&known);
            }
        });
        self.advance(warp);
    }

    /// A strong load, or the load of an atomic: what it may learn, at once or at a later fence.
    pub fn observe(&mut self, warp: u32, lanes: u32, key: u64, bytes: u64, order: Order, scope: Scope) {
        let Some(&me) = self.scopes.get(warp as usize) else {
            return;
        };
        for word in (key & !3..key + bytes).step_by(4) {
            self.hear(warp, lanes, me, word);
            let Some(published) = self.words.get(&word) else {
                continue;
            };
            let seen: Vec<(Scope, Clock)> = published
                .iter()
                .filter(|known| known.scope.covers(known.site, me))
                .map(|known| {
                    let scopes = [Scope::Cta, Scope::Cluster, Scope::Gpu];
                    let needed = scopes.into_iter().find(|scope| scope.covers(known.site, me));
                    (needed.unwrap_or(Scope::Sys), known.clock.clone())
                })
                .collect();
            for (needed, clock) in seen {
                if order.acquires() && needed <= scope {
                    self.learn(warp, lanes, |mine| mine.join(&clock));
                } else if let Some(state) = self.warps.get_mut(warp as usize) {
                    match state.observed.iter_mut().find(|aside| aside.lanes == lanes && aside.scope == needed) {
                        Some(aside) => aside.clock.join(&clock),
                        None => state.observed.push(Aside { lanes, scope: needed, tick: 0, clock }),
                    }
                }
            }
        }
    }

    /// A strong store, or the store of an atomic (`chain`: what was published before stays so).
    #[allow(clippy::too_many_arguments)]
    pub fn publish(&mut self, warp: u32, lanes: u32, key: u64, bytes: u64, order: Order, scope: Scope, chain: bool) {
        let Some(&site) = self.scopes.get(warp as usize) else {
            return;
        };
        let words: Vec<u64> = (key & !3..key + bytes).step_by(4).collect();
        self.carry(warp, lanes, &words, chain);
        let mut news: Vec<Published> = Vec::new();
        if order.releases() {
            news.push(Published { scope, site, clock: self.snapshot(warp, lanes) });
        }
        if let Some(state) = self.warps.get(warp as usize) {
            for aside in state.fenced.iter().filter(|aside| aside.lanes & lanes != 0) {
                let mut clock = aside.clock.clone();
                clock.learn(warp, Entry::new(aside.tick, aside.lanes & lanes));
                news.push(Published { scope: aside.scope, site, clock });
            }
        }
        for word in words {
            if news.is_empty() {
                if !chain {
                    self.words.remove(&word);
                }
                continue;
            }
            let known = self.words.entry(word).or_default();
            if !chain {
                known.clear();
            }
            for new in &news {
                match known.iter_mut().find(|known| known.scope == new.scope && known.site.cta == new.site.cta) {
                    Some(known) => known.clock.join(&new.clock),
                    None => known.push(new.clone()),
                }
            }
        }
        if order.releases() {
            self.advance(warp);
        }
    }

    fn groups(&mut self, warp: u32, lane: usize, kind: CopyKind) -> Option<&mut Groups> {
        let state = self.warps.get_mut(warp as usize)?;
        let index = match state.groups.iter().position(|groups| groups.lane == lane && groups.kind == kind) {
            Some(index) => index,
            None => {
                let (reads, writes) = (self.agents, self.agents + 1);
                self.agents += 2;
                state.groups.push(Groups { lane, kind, reads, writes, committed: 0 });
                state.groups.len() - 1
            }
        };
        state.groups.get_mut(index)
    }

    /// A lane issues an asynchronous copy, which completes at an mbarrier of some CTA or in the lane's open group.
    pub fn issue_copy(
        &mut self,
        number: u64,
        warp: u32,
        lane: usize,
        pc: u32,
        kind: CopyKind,
        mbarrier: Option<(u64, u32)>,
    ) {
        let clock = self.snapshot(warp, 1 << lane);
        let agents = match mbarrier {
            Some((cta, address)) => self.phases(cta, address).map(|phases| {
                phases.issued += 1;
                ((phases.agent, phases.issued), (phases.agent, phases.issued))
            }),
            None => self
                .groups(warp, lane, kind)
                .map(|groups| ((groups.reads, groups.committed + 1), (groups.writes, groups.committed + 1))),
        };
        let phases_known = mbarrier.map_or(0, |place| self.phases_known(warp, place));
        if let Some((reads, writes)) = agents {
            let async_proxy = kind == CopyKind::Bulk;
            let flight = Flight { clock, issuer: warp, lanes: 1 << lane, pc, reads, writes, async_proxy, phases_known };
            self.flights.insert(number, flight);
        }
        self.advance(warp);
    }

    /// A copy that was issued is one to several CTAs, each with an mbarrier of its own: who has seen any of them complete
    /// knows that the source was read.
    pub fn issue_multicast(&mut self, number: u64, warp: u32) {
        let Some(checks) = self.scopes.get(warp as usize).and_then(|site| self.ctas.get_mut(&site.cta)) else {
            return;
        };
        let agents = &mut self.agents;
        let (agent, count) = checks.multicasts.get_or_insert_with(|| {
            *agents += 1;
            (*agents - 1, 0)
        });
        *count += 1;
        if let Some(flight) = self.flights.get_mut(&number) {
            flight.reads = (*agent, *count);
        }
    }

    /// The part of a multicast that goes to another CTA, from now on under its own number.
    pub fn fork_copy(&mut self, number: u64, next: u64, (cta, address): (u64, u32)) {
        let writes = self.phases(cta, address).map(|phases| {
            phases.issued += 1;
            (phases.agent, phases.issued)
        });
        let issuer = self.flights.get(&number).map(|flight| flight.issuer);
        let phases_known = issuer.map_or(0, |issuer| self.phases_known(issuer, (cta, address)));
        if let (Some(flight), Some(writes)) = (self.flights.get(&number), writes) {
            let part = Flight { writes, phases_known, ..flight.clone() };
            self.flights.insert(next, part);
        }
    }

    /// A copy reads or writes ranges of bytes.
    pub fn copy_access(&mut self, number: u64, mode: Mode, ranges: &[Range<u64>], atomic: bool) -> Result<(), Fault> {
        let Some(flight) = self.flights.get(&number) else {
            return Ok(());
        };
        let part = if mode == Mode::Read { flight.reads } else { flight.writes };
        let record = flight.record(part, atomic.then_some(Scope::Gpu));
        for range in ranges {
            let (key, bytes) = (range.start, range.end - range.start);
            let actor = Actor {
                key,
                record,
                clock: &flight.clock,
                mode,
                observes: false,
                homes: &self.scopes,
                began: &self.nothing,
            };
            self.shadow.access(bytes, &actor).or_else(|clash| self.verdicts.judge(clash, &self.ctas))?;
        }
        Ok(())
    }

    /// The mbarrier that a copy completes on must have been initialised in its sight.
    pub fn copy_signals(&mut self, number: u64, (cta, address): (u64, u32)) -> Result<(), Fault> {
        let Some(flight) = self.flights.get(&number) else {
            return Ok(());
        };
        let record = flight.record(flight.writes, Some(Scope::Cluster));
        let key = shared_key(cta, u64::from(address));
        let actor = Actor {
            key,
            record,
            clock: &flight.clock,
            mode: Mode::Read,
            observes: false,
            homes: &self.scopes,
            began: &self.nothing,
        };
        self.shadow.access(8, &actor).or_else(|clash| self.verdicts.judge(clash, &self.ctas))
    }

    pub fn commit_group(&mut self, warp: u32, lane: usize, kind: CopyKind) {
        if let Some(groups) = self.groups(warp, lane, kind) {
            groups.committed += 1;
        }
    }

    /// The lanes have waited for all but their last `pending` groups.
    pub fn wait_group(&mut self, warp: u32, lanes: u32, kind: CopyKind, pending: u32, read: bool) {
        let Some(state) = self.warps.get(warp as usize) else {
            return;
        };
        let waited: Vec<Groups> = state
            .groups
            .iter()
            .filter(|groups| groups.kind == kind && lanes >> groups.lane & 1 != 0)
            .copied()
            .collect();
        for groups in waited {
            let tick = groups.committed.saturating_sub(pending);
            self.learn(warp, 1 << groups.lane, |clock| {
                clock.learn_completed(groups.reads, tick);
                if !read {
                    clock.learn_completed(groups.writes, tick);
                }
            });
        }
    }

    /// `cp.async.mbarrier.arrive`: what a lane's copies so far will hand on, to be kept under the event's number.
    pub fn issue_arrive(&mut self, number: u64, warp: u32, lane: usize, pc: u32) {
        let mut clock = self.snapshot(warp, 1 << lane);
        if let Some(groups) = self.groups(warp, lane, CopyKind::Small) {
            clock.learn_completed(groups.reads, groups.committed + 1);
            clock.learn_completed(groups.writes, groups.committed + 1);
        }
        let none = (u32::MAX >> 1, 0);
        self.flights.insert(
            number,
            Flight {
                clock,
                issuer: warp,
                lanes: 1 << lane,
                pc,
                reads: none,
                writes: none,
                async_proxy: false,
                phases_known: 0,
            },
        );
        self.advance(warp);
    }

    /// The arrival is tried again, under another number.
    pub fn postpone(&mut self, number: u64, next: u64) {
        if let Some(flight) = self.flights.remove(&number) {
            self.flights.insert(next, flight);
        }
    }

    fn group_agent(&self, warp: u32) -> Option<(u64, usize, u32, u32)> {
        let home = self.homes.get(warp as usize)?;
        let checks = self.ctas.get(&home.cta)?;
        let group = home.warp / 4;
        if group as usize >= checks.products.len() {
            return None;
        }
        Some((home.cta, group as usize, checks.first_group + group, 0xff << (8 * (home.warp % 4))))
    }

    /// A warp issues its part of a wgmma, the `place`th that is not carried out.
    pub fn issue_wgmma(&mut self, warp: u32, place: usize, pc: u32) {
        let clock = self.snapshot(warp, u32::MAX);
        let tick = self.warps.get(warp as usize).map_or(1, |state| state.wgmma_committed + 1);
        if let Some((cta, group, ..)) = self.group_agent(warp)
            && let Some(queue) = self.ctas.get_mut(&cta).and_then(|checks| checks.products.get_mut(group))
        {
            match queue.get_mut(place) {
                Some(product) => product.clock.join(&clock),
                None => queue.push_back(Product { clock, pc, tick }),
            }
        }
        self.advance(warp);
    }

    fn register(&mut self, warp: u32, register: u32) -> Option<&mut RegisterState> {
        let registers = &mut self.warps.get_mut(warp as usize)?.wgmma_registers;
        if registers.len() <= register as usize {
            registers.resize(register as usize + 1, RegisterState::default());
        }
        registers.get_mut(register as usize)
    }

    /// An instruction other than a wgmma uses registers.
    pub fn use_registers(&mut self, warp: u32, used: &[WgmmaUse], pc: u32) -> Result<(), (RegisterMisuse, u32)> {
        let waited = self.warps.get(warp as usize).map_or(0, |state| state.wgmma_waited);
        for WgmmaUse { register, written } in used {
            let Some(state) = self.register(warp, *register) else {
                continue;
            };
            if state.group > waited {
                return Err((RegisterMisuse::UnderWay, state.given_at));
            }
            if *written {
                (state.written, state.written_at) = (true, pc);
            }
        }
        Ok(())
    }

    /// A wgmma is given registers. Those that one under way accumulates in may be accumulated in further.
    pub fn give_registers(&mut self, warp: u32, used: &[WgmmaUse], pc: u32) -> Result<(), (RegisterMisuse, u32)> {
        let Some(state) = self.warps.get(warp as usize) else {
            return Ok(());
        };
        if !state.wgmma_fenced {
            return Err((RegisterMisuse::NeverFenced, pc));
        }
        let group = state.wgmma_committed + 1;
        for WgmmaUse { register, .. } in used {
            let Some(state) = self.register(warp, *register) else {
                continue;
            };
            if state.written {
                return Err((RegisterMisuse::Unfenced, state.written_at));
            }
            (state.group, state.given_at) = (group, pc);
        }
        Ok(())
    }

    /// `wgmma.fence`.
    pub fn fence_wgmma(&mut self, warp: u32) {
        if let Some(state) = self.warps.get_mut(warp as usize) {
            state.wgmma_fenced = true;
            for register in &mut state.wgmma_registers {
                register.written = false;
            }
        }
    }

    pub fn commit_wgmma(&mut self, warp: u32) {
        if let Some(state) = self.warps.get_mut(warp as usize) {
            state.wgmma_committed += 1;
        }
    }

    pub fn wait_wgmma(&mut self, warp: u32, pending: u32) {
        let Some((.., agent, lanes)) = self.group_agent(warp) else {
            return;
        };
        let committed = self.warps.get(warp as usize).map_or(0, |state| state.wgmma_committed);
        let tick = committed.saturating_sub(pending);
        if let Some(state) = self.warps.get_mut(warp as usize) {
            state.wgmma_waited = state.wgmma_waited.max(tick);
        }
        self.learn(warp, u32::MAX, |clock| clock.learn(agent, Entry::new(tick, lanes)));
    }

    /// The oldest wgmma of a warpgroup reads these ranges of shared memory.
    pub fn multiply(&mut self, warp: u32, ranges: &[Range<u32>]) -> Result<(), Fault> {
        let Some((cta, group, agent, _)) = self.group_agent(warp) else {
            return Ok(());
        };
        let product = self.ctas.get_mut(&cta).and_then(|checks| checks.products.get_mut(group)?.pop_front());
        let Some(Product { clock, pc, tick }) = product else {
            return Ok(());
        };
        let record = Record::new(Agent::Warp(agent), tick, u32::MAX, pc, None, true, warp);
        for range in ranges {
            let key = shared_key(cta, u64::from(range.start));
            let actor = Actor {
                key,
                record,
                clock: &clock,
                mode: Mode::Read,
                observes: false,
                homes: &self.scopes,
                began: &self.nothing,
            };
            let found = self.shadow.access(range.len() as u64, &actor);
            found.or_else(|clash| self.verdicts.judge(clash, &self.ctas))?;
        }
        Ok(())
    }
}
