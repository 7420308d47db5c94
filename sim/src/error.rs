//! What can go wrong: in the text of a module, on the host side, and while a kernel runs.

use std::fmt;

use crate::mbarrier::MbarrierError;

/// PTX that cannot be read.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ParseError {
    /// The text is not PTX.
    #[error("PTX line {line}: {message}")]
    Syntax {
        /// Line in the PTX text, from 1.
        line: u32,
        /// What was wrong.
        message: String,
    },
    /// An instruction, or a form of it, that the simulator does not know.
    #[error("PTX line {line}: `{instruction}` is not supported: {reason}")]
    Unsupported {
        /// Line in the PTX text, from 1.
        line: u32,
        /// The opcode with its modifiers.
        instruction: String,
        /// What about it is not supported.
        reason: String,
    },
    /// Several of these, in the order of the text.
    #[error("{}", lines(.errors))]
    Several {
        /// Each of them.
        errors: Vec<ParseError>,
    },
}

/// Errors, one a line.
pub(crate) fn lines(errors: &[ParseError]) -> String {
    errors.iter().map(ParseError::to_string).collect::<Vec<_>>().join("\n")
}

impl ParseError {
    /// The line in the PTX text, from 1; of several errors the first one's.
    pub fn line(&self) -> u32 {
        match self {
            Self::Syntax { line, .. } | Self::Unsupported { line, .. } => *line,
            Self::Several { errors } => errors.first().map_or(0, Self::line),
        }
    }

    pub(crate) fn syntax(line: u32, message: impl Into<String>) -> Self {
        Self::Syntax { line, message: message.into() }
    }
}

/// Where a warp was: in the source, and in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Position {
    /// Source line as `file:line < caller < caller`, the places it was inlined at; empty where the PTX has no `.loc`.
    pub source: String,
    /// Line in the PTX text, from 1.
    pub ptx_line: u32,
    /// The opcode with its modifiers.
    pub instruction: String,
    /// Device (rank).
    pub device: usize,
    /// Entry that runs.
    pub entry: String,
    /// CTA in the grid.
    pub cta: [u32; 3],
    /// Warp in the CTA.
    pub warp: u32,
    /// Lanes concerned, one bit each.
    pub lanes: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.source.is_empty() {
            write!(f, "{}, ", self.source)?;
        }
        write!(
            f,
            "PTX line {} `{}`, device {}, {}, CTA ({},{},{}), warp {}, lanes {:#010x}",
            self.ptx_line,
            self.instruction,
            self.device,
            self.entry,
            self.cta[0],
            self.cta[1],
            self.cta[2],
            self.warp,
            self.lanes
        )
    }
}

/// A group of lanes that could not go on, and what it waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Where it is.
    pub position: Position,
    /// What it waits for.
    pub waits_for: String,
}

/// A run, or a host-side access to the machine's memory, that failed.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SimError {
    /// A kernel did something that is an error on the device.
    #[error("{fault} ({position})")]
    Fault {
        /// What happened.
        fault: Fault,
        /// Where.
        position: Box<Position>,
    },
    /// No warp can ever go on.
    #[error("deadlock: no warp can go on{}", list(.0))]
    Deadlock(Vec<Stuck>),
    /// Warps poll or sleep in turn, and nothing that they look at changes any more.
    #[error("livelock: warps only poll or sleep, and nothing changes any more{}", list(.0))]
    Livelock(Vec<Stuck>),
    /// The run took more steps than [`crate::RunOptions::step_limit`].
    #[error("the run passed its limit of {limit} warp instructions{}", list(.warps))]
    StepLimit {
        /// The limit, in warp instructions.
        limit: u64,
        /// Every group of lanes that was still running.
        warps: Vec<Stuck>,
    },
    /// A launch that cannot be started.
    #[error("launch of `{entry}`: {message}")]
    Launch {
        /// Entry that was to be launched.
        entry: String,
        /// What was wrong, and what would be right.
        message: String,
    },
    /// A host-side access to the machine's memory that failed.
    #[error("host access: {0}")]
    Host(Fault),
    /// A device that the machine does not have.
    #[error("device {device} does not exist: this machine has {devices}")]
    NoDevice {
        /// The device asked for.
        device: usize,
        /// How many there are.
        devices: usize,
    },
}

fn list(warps: &[Stuck]) -> String {
    warps.iter().map(|stuck| format!("\n  waits for {}: {}", stuck.waits_for, stuck.position)).collect()
}

/// What a kernel did wrong, without where.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// An access outside of every allocation.
    #[error("out of bounds: {bytes} bytes at {place}")]
    OutOfBounds {
        /// The address: buffer and offset.
        place: String,
        /// Bytes accessed.
        bytes: u64,
    },
    /// An access that is not aligned to its size.
    #[error("misaligned: {place} is not a multiple of {align}")]
    Misaligned {
        /// The address: buffer and offset.
        place: String,
        /// Alignment that was needed, in bytes.
        align: u64,
    },
    /// A read of memory that nothing has written.
    #[error("uninitialised: {bytes} bytes read at {place}, never written")]
    Uninitialised {
        /// The address: buffer and offset.
        place: String,
        /// Bytes accessed.
        bytes: u64,
    },
    /// `trap`, `brkpt`, or a call that does not return.
    #[error("the kernel trapped")]
    Trap,
    /// `__assertfail`: an assertion of the kernel's that does not hold.
    #[error("assertion `{text}` failed at {place}")]
    Assertion {
        /// The condition.
        text: String,
        /// `file:line, function`.
        place: String,
    },
    /// A synchronising instruction used wrongly.
    #[error("{0}")]
    Synchronisation(String),
    /// An mbarrier used wrongly.
    #[error("mbarrier at {place}: {error}")]
    Mbarrier {
        /// Its address.
        place: String,
        /// What is wrong.
        error: MbarrierError,
    },
    /// A phase of an mbarrier completes, and nothing orders that after a wait for the phase before it.
    #[error(
        "wrong phase: a phase of the mbarrier at {place} is completed, and nothing orders that after the wait for the phase before by \
         [{earlier}]: had that come later, it would have been for another phase"
    )]
    PhaseOrder {
        /// The mbarrier's address.
        place: String,
        /// Where the wait was.
        earlier: Box<Position>,
    },
    /// A read by `ld.global.nc` of what is written while the kernel runs, or such a write.
    #[error(
        "{now} at {place}, after the {before} by [{earlier}]: what `ld.global.nc` reads must be read-only while the kernel runs"
    )]
    ReadOnly {
        /// The address: buffer and offset.
        place: String,
        /// What the access does.
        now: String,
        /// What the one before did.
        before: String,
        /// Where the one before was.
        earlier: Box<Position>,
    },
    /// A tensor map that was written, and used without a fence of its proxy in between.
    #[error(
        "missing fence.proxy.tensormap: a copy uses the tensor map at {place}, after the {before} by [{earlier}], without \
         fence.proxy.tensormap::generic.release there and .acquire here in between"
    )]
    TensorMapFence {
        /// The address: buffer and offset.
        place: String,
        /// What the write was.
        before: String,
        /// Where it was.
        earlier: Box<Position>,
    },
    /// Two accesses to the same place, one of them a write, that nothing orders.
    #[error("data race: {now} at {place}, which nothing orders after the {before} by [{earlier}]")]
    Race {
        /// The address: buffer and offset.
        place: String,
        /// What the access does.
        now: String,
        /// What the one before did.
        before: String,
        /// Where the one before was.
        earlier: Box<Position>,
    },
    /// An ordinary write, and an asynchronous access after it, with no proxy fence between.
    #[error(
        "missing fence.proxy.async or fence.proxy.async.{space}: {now} at {place}, which is ordered after the {before} by [{earlier}], but not across proxies"
    )]
    ProxyFence {
        /// The state space that the fence must be of, if not of all.
        space: &'static str,
        /// The address: buffer and offset.
        place: String,
        /// What the access does.
        now: String,
        /// What the one before did.
        before: String,
        /// Where the one before was.
        earlier: Box<Position>,
    },
    /// An access to shared memory of a CTA of the cluster that has exited; on the device, anything may happen.
    #[error("{place} is of the cluster's CTA of rank {rank}, which has exited")]
    PeerExited {
        /// The address.
        place: String,
        /// The CTA's rank in the cluster.
        rank: u32,
    },
    /// A CTA exits, and nothing orders that after an access to its shared memory by another CTA of its cluster.
    #[error(
        "the CTA exits, and nothing orders that after the {before} of its {place} by another CTA of the cluster, at [{earlier}]"
    )]
    ExitRace {
        /// The address.
        place: String,
        /// What the access did.
        before: String,
        /// Where it was.
        earlier: Box<Position>,
    },
    /// A register of a wgmma used while it is under way, or given to one without a `wgmma.fence`.
    #[error("{0}")]
    WgmmaRegisters(String),
    /// An asynchronous copy, tensor map or matrix instruction used wrongly.
    #[error("{0}")]
    Operand(String),
}
