//! Executes instructions of one warp.

mod access;
mod atomic;
mod barrier;
mod calls;
mod cluster;
mod copies;
mod lanes;
mod mbarriers;
mod peers;
mod special;
mod tensor_core;
mod tensor_maps;

pub(crate) use access::shared_place;
pub(crate) use atomic::combine;
pub(crate) use calls::SavedFrame;
pub(crate) use mbarriers::{bytes_left, is_complete, update as update_mbarrier};
pub(crate) use tensor_core::GROUP_WARPS;

use std::time::Instant;

use crate::asynchronous::{AsyncQueue, Issuer};
use crate::check::{Checker, RegisterMisuse};
use crate::cost::Cost;
use crate::cta::{Cta, CtaState, Fragment, Wait, Warp};
use crate::error::Fault;
use crate::memory::GlobalMemory;
use crate::profile::{Kind, Profiler};
use crate::program::{Address, Base, Instruction, Module, Op, Space};
use crate::random::Random;
use crate::registers::{LANES, R32, lanes};
use crate::waiver::Findings;

/// What a launch gives all of its CTAs.
#[derive(Debug)]
pub(crate) struct LaunchInfo {
    pub device: usize,
    pub grid: [u32; 3],
    /// CTAs of a cluster, and whether the launch or the entry says so.
    pub cluster: [u32; 3],
    pub is_explicit: bool,
    pub block: [u32; 3],
    pub parameters: Vec<u8>,
    /// Addresses of the module's variables on this device.
    pub variables: Vec<u64>,
    /// CTAs that can be resident at once: the device's SMs.
    pub places: u32,
    /// `%globaltimer` when the run began.
    pub timer_start: u64,
}

/// Everything an instruction can touch.
pub(crate) struct Context<'a> {
    pub module: &'a Module,
    pub launch: &'a LaunchInfo,
    pub memory: &'a mut GlobalMemory,
    pub state: &'a mut CtaState,
    /// The other CTAs by slot, where those of the cluster are.
    pub peers: &'a mut [Option<Box<Cta>>],
    pub warp: &'a mut Warp,
    pub warp_index: usize,
    pub slot: usize,
    pub queue: &'a mut AsyncQueue,
    pub random: &'a mut Random,
    pub cost: &'a mut Cost,
    /// Simulated time at the start of the slice, in nanoseconds.
    pub now: u64,
    /// Steps of the run before the slice.
    pub step: u64,
    /// Instructions of this slice.
    pub executed: u64,
    /// Changes of memory or of synchronisation state that another warp may wait for.
    pub progress: &'a mut u64,
    /// Lanes that a fault is about; all active ones if 0.
    pub fault_lanes: u32,
    /// What checks have found and the run goes on after.
    pub findings: &'a mut Findings,
    /// What the device's kernels have printed.
    pub printed: &'a mut String,
    pub checker: Option<&'a mut Checker>,
    pub profiler: Option<&'a mut Profiler>,
    /// The warp's number in the checks.
    pub agent: u32,
    /// The instruction that is executed.
    pub pc: u32,
}

/// Where a warp failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub fault: Fault,
    pub pc: u32,
    pub lanes: u32,
}

/// What happens after an instruction.
pub(crate) enum Flow {
    Next,
    Jump(u32),
    /// Wait at this instruction until a condition holds or (simulated) time is up, then execute it again.
    Wait(Wait, u64),
    /// Go on at the next instruction, but let others run until a time.
    Pause(u64),
    /// The fragments were changed; choose again.
    Restructured,
}

type Executed = Result<Flow, Fault>;

/// Never, as a time.
pub(crate) const NEVER: u64 = u64::MAX;

impl Context<'_> {
    /// Runs until `budget` instructions are done or no lane can go on; or the one instruction at which the lanes `parked` wait
    /// for peers.
    pub fn run(&mut self, budget: u64, parked: Option<u32>) -> Result<(), Failure> {
        let mut threads = 0;
        let mut result = Ok(());
        if let Some(profiler) = &mut self.profiler {
            profiler.begin_slice();
        }
        if let Some(mask) = parked {
            let waits = |fragment: &Fragment| fragment.wait == Some(Wait::Peers) && fragment.mask == mask;
            if let Some(index) = self.warp.fragments.iter().position(waits) {
                self.warp.fragments[index].wait = None;
                result = self.run_fragment(index, 1, &mut threads);
            }
        }
        while parked.is_none() && self.executed < budget && result.is_ok() {
            let Some(index) = self.choose() else {
                break;
            };
            result = self.run_fragment(index, budget, &mut threads);
        }
        self.cost.instructions += self.executed;
        self.cost.thread_instructions += threads;
        if let Some(profiler) = &mut self.profiler {
            profiler.end_slice(self.executed, threads);
        }
        result
    }

    /// The fragment to run: the one furthest behind, so that lanes meet again; now and then another one, so that
    /// lanes that wait in a loop for other lanes do not keep them from running.
    fn choose(&mut self) -> Option<usize> {
        let fragments = &mut self.warp.fragments;
        if fragments.len() == 1 {
            return fragments[0].wait.is_none().then_some(0);
        }
        merge(fragments);
        let runnable = || fragments.iter().enumerate().filter(|(_, fragment)| fragment.wait.is_none());
        self.warp.diverged += 1;
        let count = runnable().count() as u64;
        if count > 1 && self.warp.diverged.is_multiple_of(32) {
            let chosen = self.random.below(count) as usize;
            return runnable().nth(chosen).map(|(index, _)| index);
        }
        runnable().min_by_key(|(_, fragment)| fragment.pc).map(|(index, _)| index)
    }

    fn run_fragment(&mut self, index: usize, budget: u64, threads: &mut u64) -> Result<(), Failure> {
        let module = self.module;
        let code = &module.code[..];
        let mask = self.warp.fragments[index].mask;
        let mut pc = self.warp.fragments[index].pc;
        let diverged = self.warp.fragments.len() > 1;
        loop {
            let instruction = &code[pc as usize];
            let active = match instruction.guard {
                None => mask,
                Some(guard) => {
                    let value = self.warp.registers.predicates[guard.predicate.0 as usize];
                    mask & if guard.negate { !value } else { value }
                }
            };
            if !instruction.wgmma_registers.is_empty() && active != 0 && self.checker.is_some() {
                self.pc = pc;
                self.check_wgmma_registers(instruction)
                    .or_else(|fault| self.findings.judge(fault, pc, active))
                    .map_err(|fault| Failure { fault, pc, lanes: active })?;
            }
            self.executed += 1;
            *threads += u64::from(active.count_ones());
            match &instruction.op {
                Op::Alu(run) => {
                    if active != 0 {
                        run(&mut self.warp.registers, active);
                    }
                    pc += 1;
                }
                Op::Branch(target) => {
                    if active == mask {
                        pc = *target;
                    } else if active == 0 {
                        pc += 1;
                    } else {
                        self.split(index, pc + 1, mask & !active, *target, active);
                        return Ok(());
                    }
                }
                _ if active == 0 => pc += 1,
                op => {
                    if active != mask && op.needs_all_lanes() {
                        self.split(index, pc + 1, mask & !active, pc, active);
                        return Ok(());
                    }
                    self.warp.fragments[index].pc = pc;
                    if self.needs_peers(op, active) {
                        let fragment = &mut self.warp.fragments[index];
                        (fragment.wait, fragment.until, fragment.armed) = (Some(Wait::Peers), NEVER, false);
                        self.executed -= 1;
                        *threads -= u64::from(active.count_ones());
                        return Ok(());
                    }
                    self.pc = pc;
                    self.fault_lanes = 0;
                    let began = self.profiler.is_some().then(Instant::now);
                    let flow = self.execute(op, index, active).map_err(|fault| Failure {
                        fault,
                        pc,
                        lanes: if self.fault_lanes == 0 { active } else { self.fault_lanes },
                    })?;
                    if let (Some(profiler), Some(began)) = (&mut self.profiler, began) {
                        profiler.add(Kind::of(op), 1, active, began);
                    }
                    match flow {
                        Flow::Next => pc += 1,
                        Flow::Jump(target) => pc = target,
                        Flow::Wait(wait, until) => {
                            let fragment = &mut self.warp.fragments[index];
                            fragment.wait = Some(wait);
                            fragment.until = until;
                            fragment.armed = false;
                            self.cost.waits += 1;
                            return Ok(());
                        }
                        Flow::Pause(until) => {
                            let fragment = &mut self.warp.fragments[index];
                            fragment.pc = pc + 1;
                            fragment.wait = Some(Wait::Time);
                            fragment.until = until;
                            fragment.armed = false;
                            return Ok(());
                        }
                        Flow::Restructured => return Ok(()),
                    }
                }
            }
            if self.executed >= budget || diverged && self.should_switch(index, pc) {
                self.warp.fragments[index].pc = pc;
                return Ok(());
            }
        }
    }

    /// Whether other lanes are at `pc` too, or are behind it and can run.
    fn should_switch(&self, index: usize, pc: u32) -> bool {
        self.warp.fragments.iter().enumerate().any(|(other, fragment)| {
            other != index && (fragment.pc == pc || fragment.wait.is_none() && fragment.pc < pc)
        })
    }

    fn split(&mut self, index: usize, stay_pc: u32, stay: u32, go_pc: u32, go: u32) {
        let fragment = &mut self.warp.fragments[index];
        fragment.pc = stay_pc;
        fragment.mask = stay;
        let other = Fragment {
            pc: go_pc,
            mask: go,
            wait: None,
            until: NEVER,
            timed_out: false,
            armed: false,
            stack: fragment.stack.clone(),
        };
        self.warp.fragments.push(other);
    }

    fn execute(&mut self, op: &Op, index: usize, active: u32) -> Executed {
        match op {
            Op::Alu(run) => {
                run(&mut self.warp.registers, active);
                Ok(Flow::Next)
            }
            Op::Nothing => Ok(Flow::Next),
            Op::WgmmaFence => {
                if let Some(checker) = &mut self.checker {
                    checker.fence_wgmma(self.agent);
                }
                Ok(Flow::Next)
            }
            Op::Fence { scope, sequential } => {
                self.release(*scope);
                if let Some(checker) = &mut self.checker {
                    if *sequential {
                        checker.fence_sequentially(self.agent, active, *scope);
                    }
                    checker.fence(self.agent, active, *scope);
                }
                Ok(Flow::Next)
            }
            Op::FenceProxy(space) => {
                if let Some(checker) = &mut self.checker {
                    checker.fence_proxy(self.agent, active, *space);
                }
                Ok(Flow::Next)
            }
            Op::FenceTensorMap { release, scope } => {
                self.release(*scope);
                if let Some(checker) = &mut self.checker {
                    checker.fence_tensor_map(self.agent, active, *scope, *release);
                }
                Ok(Flow::Next)
            }
            Op::FenceMbarrierInit => {
                if let Some(checker) = &mut self.checker {
                    checker.fence_mbarrier_init(self.agent, active);
                }
                Ok(Flow::Next)
            }
            Op::MapShared { destination, address, rank, generic } => {
                self.map_shared(*destination, *address, *rank, *generic, active)
            }
            Op::CtaRank { destination, address, generic } => self.cta_rank(*destination, *address, *generic, active),
            Op::IsOwnShared { destination, address } => self.is_own_shared(*destination, *address, active),
            Op::ClusterArrive { relaxed, aligned } => self.cluster_arrive(*relaxed, *aligned, active),
            Op::ClusterWait { aligned } => self.cluster_wait(*aligned, active),
            Op::Branch(target) => Ok(Flow::Jump(*target)),
            Op::Special { destination, which } => {
                self.special(*destination, *which, active);
                Ok(Flow::Next)
            }
            Op::GlobalAddress { destination, variable, offset } => {
                let base = self.launch.variables[*variable as usize];
                let address = base.wrapping_add_signed(*offset);
                crate::registers::Register::R64(*destination).write(
                    &mut self.warp.registers,
                    active,
                    &[address; LANES],
                );
                Ok(Flow::Next)
            }
            Op::BranchIndex { index: by, targets } => self.branch_index(index, *by, targets),
            Op::Call(target) => self.call(index, *target, u32::MAX),
            Op::CallIndirect(call) => self.call_indirect(index, call),
            Op::Return => self.return_from(index, active),
            Op::SaveFrame(frame) => {
                self.save_frame(&self.module.frames[*frame as usize], active);
                Ok(Flow::Next)
            }
            Op::RestoreFrame { frame, results } => {
                self.restore_frame(&self.module.frames[*frame as usize], results, active);
                Ok(Flow::Next)
            }
            Op::HostCall { which, arguments, result } => self.host_call(*which, arguments, *result, active),
            Op::Exit => self.exit(index, active),
            Op::Trap => Err(Fault::Trap),
            Op::CopyLocal { from, to, bytes } => self.copy_local(*from, *to, *bytes, active),
            Op::Load(access) => self.load(access, index, active),
            Op::Store(access) => self.store(access, active),
            Op::Atomic(atomic) => self.atomic(atomic, index, active),
            Op::Shuffle(shuffle) => self.shuffle(shuffle, active),
            Op::Vote { mode, result, condition, members } => self.vote(*mode, *result, *condition, *members, active),
            Op::Match { destination, all, require_all, value, members } => {
                self.match_lanes(*destination, *all, *require_all, *value, *members, active)
            }
            Op::Reduce { operation, destination, source, members } => {
                self.reduce(*operation, *destination, *source, *members, active)
            }
            Op::Elect { leader, elected, members } => self.elect(*leader, *elected, *members, active),
            Op::ActiveMask(destination) => {
                crate::registers::Slot::set(*destination, &mut self.warp.registers, active, &[active; LANES]);
                Ok(Flow::Next)
            }
            Op::WarpBarrier(members) => self.warp_barrier(*members, index, active),
            Op::Barrier(barrier) => self.barrier(barrier, active),
            Op::Mbarrier(operation) => self.mbarrier(operation, index, active),
            Op::BulkCopy(copy) => self.bulk_copy(copy, active),
            Op::TensorCopy(copy) => self.tensor_copy(copy, active),
            Op::SmallCopy(copy) => self.small_copy(copy, active),
            Op::AsyncStore(store) => self.async_store(store, active),
            Op::TensorMapReplace(operation) => self.replace_in_map(operation, active),
            Op::TensorMapPublish { to, from, scope } => self.publish_map(*to, *from, *scope, active),
            Op::SmallCopyArrive { mbarrier, generic, increases } => {
                self.small_copy_arrive(*mbarrier, *generic, *increases, active)
            }
            Op::CommitGroup(kind) => self.commit_group(*kind, active),
            Op::WaitGroup { kind, pending, read } => self.wait_group(*kind, *pending, *read, active),
            Op::Wgmma(wgmma) => self.wgmma(wgmma, active),
            Op::WgmmaCommit => self.wgmma_commit(active),
            Op::WgmmaWait(pending) => self.wgmma_wait(*pending, active),
            Op::Matrix(access) => self.matrix(access, active),
            Op::Mma(mma) => self.mma(mma, active),
            Op::MaxRegisters { count, increase } => self.max_registers(*count, *increase, active),
            Op::Sleep(duration) => self.sleep(*duration, active),
        }
    }

    fn sleep(&mut self, duration: R32, active: u32) -> Executed {
        let longest = lanes(active).map(|lane| self.warp.registers.r32[duration.0 as usize][lane]).max().unwrap_or(0);
        // A warp that sleeps without a look at anything waits for no one: it goes on when its time has come.
        if !std::mem::take(&mut self.warp.polled) {
            *self.progress += 1;
        }
        Ok(Flow::Pause(self.time() + u64::from(longest.max(1))))
    }

    /// Registers of a wgmma that is under way are its own; those it is given must be fenced.
    fn check_wgmma_registers(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        let Some(checker) = self.checker.as_deref_mut() else {
            return Ok(());
        };
        let found = match instruction.op {
            Op::Wgmma(_) => checker.give_registers(self.agent, &instruction.wgmma_registers, self.pc),
            _ => checker.use_registers(self.agent, &instruction.wgmma_registers, self.pc),
        };
        found.map_err(|(misuse, pc)| {
            let at = |pc: u32| {
                let line = self.module.code.get(pc as usize).map_or(0, |known| known.line);
                let source = self.module.source(pc);
                if source.is_empty() { format!("PTX line {line}") } else { format!("{source}, PTX line {line}") }
            };
            Fault::WgmmaRegisters(match misuse {
                RegisterMisuse::UnderWay => {
                    format!("a register of the wgmma at [{}], which has not been waited for, is used", at(pc))
                }
                RegisterMisuse::Unfenced => format!(
                    "missing wgmma.fence: a register of this wgmma was written at [{}], and no fence came after",
                    at(pc)
                ),
                RegisterMisuse::NeverFenced => {
                    "missing wgmma.fence: none came before this warp's first wgmma".to_owned()
                }
            })
        })
    }

    /// Simulated time, in nanoseconds: that of the slice's start, for a later slice may start before this one's
    /// instructions, counted one by one, would end. Clocks never run backwards.
    fn time(&self) -> u64 {
        self.now
    }

    fn issuer(&self, lanes: u32) -> Issuer {
        let pc =
            self.warp.fragments.iter().find(|fragment| fragment.mask & lanes != 0).map_or(0, |fragment| fragment.pc);
        Issuer { slot: self.slot, cta: self.state.id, warp: self.warp_index, lanes, pc }
    }

    /// When an asynchronous operation issued now is to take its next step.
    fn due(&mut self) -> u64 {
        self.step + self.executed + self.random.spread(13)
    }

    fn exit(&mut self, index: usize, active: u32) -> Executed {
        self.warp.live &= !active;
        let fragment = &mut self.warp.fragments[index];
        fragment.mask &= !active;
        fragment.pc += 1;
        if fragment.mask == 0 {
            self.warp.fragments.remove(index);
        }
        for fragment in &mut self.warp.fragments {
            if matches!(fragment.wait, Some(Wait::Lanes { .. } | Wait::WarpBarrier { .. })) {
                fragment.wait = None;
            }
        }
        self.state.exited_at = (self.warp_index, self.pc);
        self.state.changed = true;
        *self.progress += 1;
        Ok(Flow::Restructured)
    }

    fn branch_index(&mut self, index: usize, by: R32, targets: &[u32]) -> Executed {
        let mask = self.warp.fragments[index].mask;
        let values = self.warp.registers.r32[by.0 as usize];
        let mut groups: Vec<(u32, u32)> = Vec::new();
        for lane in lanes(mask) {
            let target = *targets.get(values[lane] as usize).ok_or_else(|| {
                Fault::Operand(format!("branch index {} in a list of {} targets", values[lane], targets.len()))
            })?;
            match groups.iter_mut().find(|(known, _)| *known == target) {
                Some((_, group)) => *group |= 1 << lane,
                None => groups.push((target, 1 << lane)),
            }
        }
        if let [(target, _)] = groups[..] {
            return Ok(Flow::Jump(target));
        }
        for &(target, group) in &groups[1..] {
            let fragment = &self.warp.fragments[index];
            let (pc, rest) = (fragment.pc, fragment.mask & !group);
            self.split(index, pc, rest, target, group);
        }
        self.warp.fragments[index].pc = groups[0].0;
        Ok(Flow::Restructured)
    }

    /// An address operand in each lane.
    fn addresses(&self, address: Address) -> [u64; LANES] {
        let registers = &self.warp.registers;
        match address.base {
            Base::None => [address.offset as u64; LANES],
            Base::R32(r) => {
                let offset = address.offset as u32;
                registers.r32[r.0 as usize].map(|base| u64::from(base.wrapping_add(offset)))
            }
            Base::R64(r) => {
                let offset = address.offset as u64;
                let mut addresses = registers.r64[r.0 as usize];
                for address in &mut addresses {
                    *address = address.wrapping_add(offset);
                }
                addresses
            }
        }
    }

    /// Offsets in the executing CTA's shared memory of an operand that may be generic.
    fn shared_addresses(&mut self, address: Address, generic: bool, active: u32) -> Result<[u32; LANES], Fault> {
        let mut addresses = self.addresses(address);
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let offset = if generic { self.in_window(addresses[lane])? } else { addresses[lane] };
            addresses[lane] = self.locate(offset, Space::Shared)?.address;
            if addresses[lane] > u64::from(u32::MAX) {
                return Err(Fault::Operand(format!("address {:#x} is not in shared memory", addresses[lane])));
            }
        }
        self.fault_lanes = 0;
        Ok(addresses.map(|address| address as u32))
    }
}

/// Joins fragments that are at the same place.
fn merge(fragments: &mut Vec<Fragment>) {
    let can_join = |fragment: &Fragment| matches!(fragment.wait, None | Some(Wait::Lanes { .. }));
    let mut first = 0;
    while first < fragments.len() {
        let mut second = first + 1;
        while second < fragments.len() {
            let (a, b) = (&fragments[first], &fragments[second]);
            let waiting = a.wait.is_some() && b.wait.is_some();
            if a.pc == b.pc && can_join(a) && can_join(b) && a.stack == b.stack {
                let joined = fragments.swap_remove(second);
                let fragment = &mut fragments[first];
                fragment.mask |= joined.mask;
                if !waiting || joined.mask != 0 {
                    fragment.wait = None;
                }
            } else {
                second += 1;
            }
        }
        first += 1;
    }
}

impl Op {
    /// Whether lanes that the guard excludes go on without the others: instructions that wait, call or change the
    /// fragment itself.
    fn needs_all_lanes(&self) -> bool {
        !matches!(
            self,
            Self::Alu(_)
                | Self::Nothing
                | Self::Fence { .. }
                | Self::FenceProxy(_)
                | Self::FenceTensorMap { .. }
                | Self::FenceMbarrierInit
                | Self::MapShared { .. }
                | Self::CtaRank { .. }
                | Self::IsOwnShared { .. }
                | Self::Special { .. }
                | Self::GlobalAddress { .. }
                | Self::Branch(_)
                | Self::Load(_)
                | Self::Store(_)
                | Self::Atomic(_)
                | Self::CopyLocal { .. }
                | Self::SaveFrame(_)
                | Self::RestoreFrame { .. }
                | Self::HostCall { .. }
                | Self::ActiveMask(_)
                | Self::BulkCopy(_)
                | Self::TensorCopy(_)
                | Self::SmallCopy(_)
                | Self::AsyncStore(_)
                | Self::TensorMapReplace(_)
                | Self::CommitGroup(_)
                | Self::Exit
                | Self::Trap
        )
    }
}
