//! The state of a running CTA: shared memory, barriers, and its warps.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::asynchronous::Place;
use crate::execute::SavedFrame;
use crate::memory::TrackedBytes;
use crate::program::{CopyKind, WaitPhase};
use crate::registers::Registers;

/// Named barriers of a CTA.
pub(crate) const BARRIERS: u32 = 16;
/// Shared memory whose origin is one: the stretch in which a 128-byte swizzle repeats.
pub(crate) const ORIGIN_BYTES: usize = 1024;
/// Registers of an SM.
const SM_REGISTERS: u32 = 65536;

/// What a group of lanes waits for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Wait {
    /// The other lanes of a `.sync` mask, at the same instruction.
    Lanes { members: u32 },
    /// The other lanes of a `bar.warp.sync` mask.
    WarpBarrier { members: u32 },
    /// A barrier of the CTA.
    Barrier { id: u32 },
    /// The barrier of the cluster.
    Cluster,
    /// An mbarrier's phase, until a time.
    Mbarrier { address: u32, phase: Phase },
    /// All but the last few groups of copies of some lanes.
    Groups { kind: CopyKind, pending: u32, read: bool },
    /// Products of the warpgroup, up to a number.
    Wgmma { executed: u64 },
    /// Registers from the CTA's pool.
    MaxRegisters { count: u32 },
    /// Time to pass.
    Time,
    /// All devices to stand still: the instruction is about another one's memory.
    Peers,
}

/// A phase as a wait names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Parity(u32),
    State(u64),
}

impl Phase {
    pub fn of(phase: WaitPhase, registers: &Registers, lane: usize) -> Self {
        match phase {
            WaitPhase::Parity(r) => Self::Parity(registers.r32[r.0 as usize][lane]),
            WaitPhase::State(r) => Self::State(registers.r64[r.0 as usize][lane]),
        }
    }
}

/// Lanes of a warp that are at the same instruction.
#[derive(Debug, Clone)]
pub(crate) struct Fragment {
    pub pc: u32,
    pub mask: u32,
    pub wait: Option<Wait>,
    /// The wait may end at this time, in nanoseconds.
    pub until: u64,
    /// The wait has ended by time.
    pub timed_out: bool,
    /// The scheduler knows of `until`.
    pub armed: bool,
    pub stack: Vec<ReturnTo>,
}

/// Where a function returns to, and its number if it was called through a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReturnTo {
    pub pc: u32,
    pub callee: u32,
}

/// Groups of asynchronous copies that a lane has committed, oldest first; and the open one.
#[derive(Debug, Clone, Default)]
pub(crate) struct CopyGroups {
    pub open: Vec<u64>,
    pub committed: VecDeque<Vec<u64>>,
}

/// A warp.
#[derive(Debug)]
pub(crate) struct Warp {
    pub registers: Registers,
    pub fragments: Vec<Fragment>,
    /// Lanes that exist and have not exited.
    pub live: u32,
    pub local: TrackedBytes,
    /// By lane: what functions had that were called again, the last one last.
    pub saved: HashMap<usize, Vec<SavedFrame>>,
    /// Groups of each lane that has made a copy: `cp.async`, `cp.async.bulk`.
    pub copies: [Vec<(usize, CopyGroups)>; 2],
    /// wgmma instructions issued, and how many there were at each commit.
    pub wgmma_issued: u64,
    pub wgmma_commits: Vec<u64>,
    pub max_registers: u32,
    /// The last `setmaxnreg`.
    pub registers_set_at: Option<u32>,
    /// Already in the list of warps that can run.
    pub queued: bool,
    /// Slices run while diverged, for fairness.
    pub diverged: u32,
    pub polls: Polls,
    /// It has found something as it was, or has looked at the time, since its last `nanosleep`.
    pub polled: bool,
    /// Phases of mbarriers that a wait has found incomplete, and none complete since.
    pub unmet: Vec<(u32, Phase)>,
    /// Lanes that have arrived at the cluster's barrier, and lanes whose arrival's phase is complete that have not waited.
    pub cluster_arrived: u32,
    pub cluster_passed: u32,
}

/// The last polling reads: place, and a digest of where and what was read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Polls {
    pub seen: [(u32, u64); 4],
    pub next: usize,
    /// Repeats in a row.
    pub repeats: u32,
}

impl Polls {
    /// Whether the same instruction has read the same as last time, with nothing written in between.
    pub fn repeated(&mut self, pc: u32, digest: u64) -> bool {
        match self.seen.iter_mut().find(|(seen, _)| *seen == pc + 1) {
            Some((_, last)) => std::mem::replace(last, digest) == digest,
            None => {
                self.seen[self.next % 4] = (pc + 1, digest);
                self.next += 1;
                false
            }
        }
    }

    pub fn reset(&mut self) {
        self.seen = Default::default();
        self.repeats = 0;
    }
}

/// A wgmma that not every warp has issued, or that has not been executed.
#[derive(Debug, Clone)]
pub(crate) struct QueuedWgmma {
    pub pc: u32,
    /// One bit for each warp of the group.
    pub issued: u32,
    pub a: u64,
    pub b: u64,
    pub scale_d: bool,
}

/// Four warps that issue wgmma together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Warpgroup {
    pub queue: VecDeque<QueuedWgmma>,
    /// Number of the first in the queue, which is how many were executed.
    pub executed: u64,
    /// When the last of those scheduled is due.
    pub last_due: u64,
}

/// A named barrier.
#[derive(Debug, Clone, Default)]
pub(crate) struct NamedBarrier {
    /// Threads that have arrived, in whole warps.
    pub arrived: u32,
    /// Threads that must arrive; none yet, or all of the CTA.
    pub expected: Option<u32>,
    pub waiting: bool,
    /// `bar.red`: lanes whose predicate was true, and lanes that took part.
    pub truths: u32,
    pub votes: u32,
}

/// The cluster of a CTA, and its place in it.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    /// Slot and identity of each CTA, by rank; the first's identity is the cluster's.
    pub members: Arc<[(usize, u64)]>,
    pub rank: u32,
    /// Some lane of this CTA has arrived at the cluster's barrier, whose phase is not complete.
    pub arrived: bool,
}

impl Cluster {
    /// Unique in the run.
    pub fn id(&self) -> u64 {
        self.members.first().map_or(0, |(_, id)| *id)
    }
}

/// What is shared by the warps of a CTA.
#[derive(Debug)]
pub(crate) struct CtaState {
    /// Unique in the run.
    pub id: u64,
    pub launch: usize,
    pub device: usize,
    pub index: [u32; 3],
    pub cluster: Cluster,
    /// Warp and instruction of the last exit.
    pub exited_at: (usize, u32),
    /// Number of the first warp in the checks.
    pub first_agent: u32,
    /// Which of the device's places it runs in.
    pub sm: u32,
    pub shared: TrackedBytes,
    /// Where in global memory each [`ORIGIN_BYTES`] of it were last copied from, for the cost counters; 0 for nowhere there.
    pub origins: Vec<u64>,
    pub dynamic_bytes: u32,
    pub barriers: Vec<NamedBarrier>,
    pub warpgroups: Vec<Warpgroup>,
    /// Registers that no warp holds.
    pub free_registers: u32,
    /// Something changed that a waiting warp may wait for.
    pub changed: bool,
}

impl CtaState {
    /// A copy has filled `bytes` of shared memory from `at` on; `from` is the place of its first byte.
    pub fn set_origin(&mut self, at: usize, bytes: usize, from: Place) {
        let origin = if let Place::Global(address) = from { address } else { 0 };
        if let Some(stretches) = self.origins.get_mut(at / ORIGIN_BYTES..(at + bytes).div_ceil(ORIGIN_BYTES)) {
            stretches.fill(origin);
        }
    }

    /// Where the copy that last filled this place of shared memory began to read.
    pub fn origin(&self, at: u32) -> u64 {
        self.origins.get(at as usize / ORIGIN_BYTES).copied().unwrap_or(0)
    }
}

/// A running CTA.
#[derive(Debug)]
pub(crate) struct Cta {
    pub state: CtaState,
    pub warps: Vec<Warp>,
}

impl Cta {
    pub fn live_warps(&self) -> u32 {
        self.warps.iter().filter(|warp| warp.live != 0).count() as u32
    }
}

/// Registers each thread of a CTA starts with, as ptxas chooses them for one CTA per SM.
pub(crate) fn initial_registers(threads: u32) -> u32 {
    let share = SM_REGISTERS / threads.next_multiple_of(128).max(128);
    (share / 8 * 8).min(248)
}

impl Warp {
    /// Bytes of groups that a wait must see done: of each lane in `mask`, all but the last `pending`.
    pub fn outstanding(&self, kind: CopyKind, mask: u32, pending: u32) -> impl Iterator<Item = u64> + '_ {
        self.copies[kind as usize].iter().filter(move |(lane, _)| mask >> lane & 1 != 0).flat_map(move |(_, groups)| {
            let count = groups.committed.len().saturating_sub(pending as usize);
            groups.committed.iter().take(count).flatten().copied()
        })
    }

    pub fn groups(&mut self, kind: CopyKind, lane: usize) -> &mut CopyGroups {
        let list = &mut self.copies[kind as usize];
        let index = match list.iter().position(|(owner, _)| *owner == lane) {
            Some(index) => index,
            None => {
                list.push((lane, CopyGroups::default()));
                list.len() - 1
            }
        };
        &mut list[index].1
    }
}
