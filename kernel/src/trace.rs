//! What a traced kernel records: the moment at which a role of a CTA begins to do something else.
//!
//! Only a kernel that is compiled with the feature `trace` records (`record.rs`).

use crate::format::Format;
use crate::layout::MAX_LOCAL_EXPERTS;
use crate::shared::{SHARED_LIMIT, SharedLayout};
use crate::task::Task;
use crate::tile::{MAX_TILES, WEIGHT_TILE};
use crate::warps::{CONSUMER_WARP, DISPATCH_WARPS, MAX_CONSUMER_WARPGROUPS};

/// Roles of a CTA that record, each for itself: dispatch, producer, scheduler, publisher and every consumer warpgroup, in the order of their
/// warps; a format with fewer of these leaves the last without records. A warpgroup records what its first warp does.
pub const ROLES: u32 = CONSUMER_WARP + MAX_CONSUMER_WARPGROUPS;

/// Byte offset of the roles' counts of records (u32) in a traced CTA's dynamic shared memory: behind what any format uses.
pub const COUNTS_OFFSET: u32 = SHARED_LIMIT - ROLES * 4;

const _: () = assert!(COUNTS_OFFSET.is_multiple_of(4) && DISPATCH_WARPS == 1);
const _: () = {
    let mut index = 0;
    while index < Format::ALL.len() {
        assert!(SharedLayout::new(&Format::ALL[index]).bytes <= COUNTS_OFFSET);
        index += 1;
    }
};

/// Where a launch records.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct TraceBuffer {
    /// Device address of [`Record`] `[CTAs][ROLES][capacity]`, 16-byte aligned.
    pub address: u64,
    /// Records of one role; what comes later is lost. 0 for a launch that is not traced.
    pub capacity: u32,
    /// Zero.
    pub reserved: u32,
}

impl TraceBuffer {
    /// Of a launch that is not traced.
    pub const NONE: Self = Self { address: 0, capacity: 0, reserved: 0 };
}

/// One record: what a role does from a moment on.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Record {
    /// `%globaltimer`, in nanoseconds.
    pub time_ns: u64,
    /// The [`Activity`] in bits 0..8, its argument above.
    pub word: u64,
}

macro_rules! activities {
    ($($(#[doc = $doc:literal])* $name:ident = $label:literal,)*) => {
        /// What a role can be doing.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Activity {
            $($(#[doc = $doc])* $name,)*
        }

        impl Activity {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name for people.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }
        }
    };
}

activities! {
    /// From the start of the CTA on. Argument: `%smid`.
    Start = "set up",
    /// Dispatch: routes a chunk of tokens. Argument: the chunk.
    Route = "route",
    /// Dispatch: tells all ranks this rank's counts.
    PublishCounts = "publish counts",
    /// Dispatch: waits for the scheduler warp to gather all counts.
    WaitForCounts = "wait for counts",
    /// Dispatch: claims a ticket of rows and finds its first row.
    ClaimRows = "claim rows",
    /// Dispatch: copies the rows of a ticket. Argument: their number in the ticket order, of the first.
    Pull = "pull",
    /// Scheduler: waits for the counts of all ranks.
    GatherCounts = "gather counts",
    /// Scheduler: claims a ticket and finds its task.
    ClaimTask = "claim task",
    /// Scheduler: waits for a free slot, and hands a task to the roles. Argument: the task.
    HandOut = "hand out",
    /// Producer, consumers: no task is there yet.
    WaitForTask = "wait for a task",
    /// Producer: waits for free stages and loads the weights of the first. Argument: the task.
    LoadWeights = "load first weights",
    /// Producer: waits for the tile's rows or columns.
    WaitForTokens = "wait for tokens",
    /// Producer: loads the stages, each when it is free.
    Load = "load",
    /// Consumers: wait for the first stage of a task. Argument: the task.
    WaitForStage = "wait for first stage",
    /// Consumers: the product, waits for later stages included.
    Multiply = "multiply",
    /// Consumers: results to bf16, into the intermediate pool or to their ranks.
    Epilogue = "epilogue",
    /// Consumers: wait for the other warpgroup before the first chunk is combined.
    WaitForWarpgroup = "wait for warpgroup",
    /// Consumers: sum a chunk of tokens. Argument: the chunk.
    Combine = "combine",
    /// Consumers: wait for the results of a token.
    WaitForResults = "wait for results",
    /// Publisher: waits for the consumers to finish a task.
    WaitForFinished = "wait for a finished task",
    /// Publisher: waits for the stores to be complete, and counts them. Argument: the task.
    Announce = "announce",
    /// The role has ended.
    Done = "done",
}

impl Record {
    /// What the role does from then on, and the argument; none for a word that no kernel writes.
    pub fn activity(&self) -> Option<(Activity, Argument)> {
        Some((*Activity::ALL.get(self.word as usize & 0xff)?, Argument(self.word >> 8)))
    }
}

/// What an activity is about; at most 56 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument(pub u64);

impl From<u32> for Argument {
    #[inline(always)]
    fn from(value: u32) -> Self {
        Self(value as u64)
    }
}

/// Phase in bits 0..2, expert in 2..12, width index in 12..16, rows less one in 16..24, weight tile in 24..36, tile in 36..56.
impl From<&Task> for Argument {
    #[inline(always)]
    fn from(task: &Task) -> Self {
        let Task { phase, expert, weight_row, rows, tile, width, .. } = *task;
        let low = phase | expert << 2 | width << 12 | (rows.wrapping_sub(1) & 0xff) << 16;
        Self(low as u64 | ((weight_row / WEIGHT_TILE) as u64) << 24 | (tile as u64) << 36)
    }
}

impl Argument {
    /// The task, but for its pool row, its expert's tasks and the launch's widest tile, which are 0.
    pub const fn task(self) -> Task {
        let word = self.0;
        Task {
            phase: word as u32 & 3,
            expert: (word >> 2) as u32 & 0x3ff,
            weight_row: ((word >> 24) as u32 & 0xfff) * WEIGHT_TILE,
            pool_row: 0,
            rows: ((word >> 16) as u32 & 0xff) + 1,
            tile: (word >> 36) as u32,
            width: (word >> 12) as u32 & 0xf,
            expert_tasks: 0,
            widest: 0,
            old_stages: 0,
        }
    }
}

const _: () = assert!(MAX_LOCAL_EXPERTS <= 1 << 10 && Format::BF16.tiles.widest() <= 1 << 8 && MAX_TILES <= 1 << 4);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Phase;

    #[test]
    fn a_task_comes_back_from_its_word() {
        for (rows, width) in [(1, 0), (256, 9)] {
            let task = Task {
                phase: Phase::Linear2 as u32,
                expert: 511,
                weight_row: 128 * 223,
                rows,
                tile: (1 << 20) - 1,
                width,
                ..Task::plain(Phase::End, 0)
            };
            let word = Argument::from(&task);
            assert_eq!((word.task(), word.0 >> 56), (task, 0));
        }
    }

    #[test]
    fn a_record_says_what_and_with_which_argument() {
        let record = Record { time_ns: 5, word: 0x1234 << 8 | Activity::Pull as u64 };
        assert_eq!(record.activity(), Some((Activity::Pull, Argument(0x1234))));
        assert_eq!(Record { time_ns: 5, word: 200 }.activity(), None);
        assert_eq!(Activity::Done.label(), "done");
    }
}
