//! Decoded mbarrier instructions.

use crate::check::Scope;
use crate::program::{Address, Space};
use crate::registers::{Predicate, R32, R64};

/// An mbarrier instruction on the object at `address` in shared memory.
#[derive(Debug)]
pub(crate) struct MbarrierOp {
    pub address: Address,
    /// Generic, or shared memory of the CTA or its cluster.
    pub space: Space,
    pub action: MbarrierAction,
    /// `.relaxed`: neither releases nor acquires.
    pub relaxed: bool,
    pub scope: Scope,
}

/// What an mbarrier instruction does.
#[derive(Debug)]
pub(crate) enum MbarrierAction {
    Init {
        count: R32,
    },
    Invalidate,
    Arrive {
        state: Option<R64>,
        count: R32,
        expect_bytes: Option<R32>,
        drop: bool,
        no_complete: bool,
    },
    ExpectBytes {
        bytes: R32,
    },
    CompleteBytes {
        bytes: R32,
    },
    Wait {
        done: Predicate,
        phase: WaitPhase,
        /// `try_wait` may suspend; `test_wait` never does.
        suspends: bool,
        /// Longest suspension, in nanoseconds.
        limit: Option<R32>,
    },
}

/// How a wait names its phase.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WaitPhase {
    Parity(R32),
    State(R64),
}
