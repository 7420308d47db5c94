//! Where the processor time of a run goes, by kind of instruction.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::program::{Op, Space};

/// Kinds of instructions that a [`Profile`] tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From registers to registers, within a lane; branches too.
    Arithmetic,
    /// Loads and stores of parameters and of local memory.
    Local,
    /// Loads and stores of shared memory, `ldmatrix` and `stmatrix`.
    Shared,
    /// Loads and stores of global memory, and by generic addresses.
    Global,
    /// Atomics.
    Atomic,
    /// Between the lanes of a warp.
    Lanes,
    /// Fences and named barriers.
    Barrier,
    /// `mbarrier`.
    Mbarrier,
    /// Asynchronous copies: their issue, the waits for their groups, and the copying.
    Copy,
    /// `wgmma` and `mma`: issue, waits, and the products.
    Product,
    /// No instruction: which warp runs next, and what ends its wait.
    Scheduling,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Arithmetic,
        Self::Local,
        Self::Shared,
        Self::Global,
        Self::Atomic,
        Self::Lanes,
        Self::Barrier,
        Self::Mbarrier,
        Self::Copy,
        Self::Product,
        Self::Scheduling,
    ];

    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Arithmetic => "arithmetic, branches",
            Self::Local => "local memory, parameters",
            Self::Shared => "shared memory",
            Self::Global => "global memory",
            Self::Atomic => "atomics",
            Self::Lanes => "shuffles, votes",
            Self::Barrier => "fences, barriers",
            Self::Mbarrier => "mbarriers",
            Self::Copy => "asynchronous copies",
            Self::Product => "wgmma, mma",
            Self::Scheduling => "scheduling",
        }
    }

    pub(crate) fn of(op: &Op) -> Self {
        let memory = |space: Space| match space {
            Space::Shared | Space::Cluster => Self::Shared,
            Space::Local | Space::Param => Self::Local,
            Space::Global | Space::Generic => Self::Global,
        };
        match op {
            Op::Load(access) | Op::Store(access) => memory(access.space),
            Op::Matrix(_) => Self::Shared,
            Op::CopyLocal { .. } => Self::Local,
            Op::Atomic(_) => Self::Atomic,
            Op::Shuffle(_)
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Reduce { .. }
            | Op::Elect { .. }
            | Op::ActiveMask(_)
            | Op::WarpBarrier(_) => Self::Lanes,
            Op::Fence { .. } | Op::FenceProxy(_) | Op::FenceTensorMap { .. } | Op::Barrier(_) => Self::Barrier,
            Op::Mbarrier(_) => Self::Mbarrier,
            Op::BulkCopy(_)
            | Op::TensorCopy(_)
            | Op::SmallCopy(_)
            | Op::AsyncStore(_)
            | Op::TensorMapReplace(_)
            | Op::TensorMapPublish { .. }
            | Op::SmallCopyArrive { .. }
            | Op::CommitGroup(_)
            | Op::WaitGroup { .. } => Self::Copy,
            Op::Wgmma(_) | Op::WgmmaFence | Op::WgmmaCommit | Op::WgmmaWait(_) | Op::Mma(_) => Self::Product,
            _ => Self::Arithmetic,
        }
    }
}

/// What the instructions of one kind took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindCost {
    /// Warp instructions.
    pub instructions: u64,
    /// The same, times the lanes active in each.
    pub thread_instructions: u64,
    /// Time on the machine that simulates.
    pub time: Duration,
}

impl KindCost {
    fn add(&mut self, other: Self) {
        self.instructions += other.instructions;
        self.thread_instructions += other.thread_instructions;
        self.time += other.time;
    }
}

/// Counts and times by kind of instruction, of all runs whose [`crate::RunOptions::profile`] it was.
///
/// A profiled run is slower: the clock is read twice for all but arithmetic. What that takes is measured and left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    kinds: [KindCost; Kind::ALL.len()],
}

impl Profile {
    /// What the instructions of a kind took.
    pub fn kind(&self, kind: Kind) -> KindCost {
        self.kinds[kind as usize]
    }

    /// What all took together.
    pub fn total(&self) -> KindCost {
        self.kinds.iter().fold(KindCost::default(), |mut total, kind| {
            total.add(*kind);
            total
        })
    }
}

/// A profile while its run goes on.
#[derive(Debug)]
pub(crate) struct Profiler {
    profile: Profile,
    /// What reading the clock takes, and how often that was done.
    reading: Duration,
    readings: u32,
    /// What the device's share of the run took so far.
    pub active: Duration,
    /// When the slice began, how often the clock had been read, and what was added since.
    slice: (Instant, u32, KindCost),
}

impl Profiler {
    pub fn new() -> Self {
        const READINGS: u32 = 1000;
        let begin = Instant::now();
        for _ in 1..READINGS {
            std::hint::black_box(Instant::now());
        }
        let reading = begin.elapsed() / READINGS;
        let slice = (begin, 0, KindCost::default());
        Self { profile: Profile::default(), reading, readings: 0, active: Duration::ZERO, slice }
    }

    /// So many (0 or 1) instructions of `lanes`, and what they set off, began at a time and end now.
    pub fn add(&mut self, kind: Kind, instructions: u64, lanes: u32, began: Instant) {
        let time = began.elapsed().saturating_sub(self.reading);
        self.readings += 2;
        let cost = KindCost { instructions, thread_instructions: instructions * u64::from(lanes.count_ones()), time };
        self.profile.kinds[kind as usize].add(cost);
        self.slice.2.add(cost);
    }

    pub fn begin_slice(&mut self) {
        self.slice = (Instant::now(), self.readings, KindCost::default());
    }

    /// A slice of so many instructions is over: those that were not added one by one are arithmetic, and so is the rest of its time.
    pub fn end_slice(&mut self, instructions: u64, thread_instructions: u64) {
        let (began, readings, added) = self.slice;
        let time = began.elapsed().saturating_sub(added.time + self.reading * (self.readings - readings + 1));
        self.readings += 2;
        self.profile.kinds[Kind::Arithmetic as usize].add(KindCost {
            instructions: instructions - added.instructions,
            thread_instructions: thread_instructions - added.thread_instructions,
            time,
        });
    }

    /// The run is over: what is left of its time was scheduling.
    pub fn finish(mut self, into: &Mutex<Profile>) {
        let known = self.profile.total().time + self.reading * self.readings;
        self.profile.kinds[Kind::Scheduling as usize].time += self.active.saturating_sub(known);
        let mut into = into.lock().unwrap_or_else(PoisonError::into_inner);
        for (kind, new) in into.kinds.iter_mut().zip(self.profile.kinds) {
            kind.add(new);
        }
    }
}
