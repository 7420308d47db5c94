//! A decoded module: a flat list of instructions with resolved registers, addresses and targets.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ast::{ClusterDirectives, InitialValue};
use crate::check::{Order, Scope};
use crate::error::ParseError;
use crate::mbarrier_op::MbarrierOp;
use crate::registers::{Predicate, R16, R32, R64, Register, RegisterCounts, Registers};

/// A register-to-register instruction, compiled to a closure over its operands; the second argument is the
/// mask of active lanes.
pub(crate) type Alu = Box<dyn Fn(&mut Registers, u32) + Send + Sync>;

/// PTX, read and decoded once, for any number of launches.
pub struct Module {
    pub(crate) id: u64,
    pub(crate) code: Vec<Instruction>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) functions: Vec<Callee>,
    /// What each function has of registers and local memory.
    pub(crate) frames: Vec<Frame>,
    pub(crate) variables: Vec<GlobalVariable>,
    pub(crate) locations: Vec<SourceLocation>,
    pub(crate) registers: RegisterCounts,
    pub(crate) constants: Constants,
    /// Bytes of local memory of a lane, for all functions.
    pub(crate) local_bytes: u32,
}

impl Module {
    /// Reads and decodes a module.
    ///
    /// Instructions that the simulator does not know refuse the kernels that have them, or may call a function that does:
    /// [`Module::refused`] lists them.
    ///
    /// # Errors
    /// Text that is not PTX; and all those instructions, with their lines, where they leave no kernel.
    pub fn parse(ptx: &str) -> Result<Self, ParseError> {
        crate::decode::decode(&crate::parse::parse(ptx)?)
    }

    /// Names of the entries, in the order of the text.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.name.as_str())
    }

    /// Kernels that cannot be launched, and why.
    pub fn refused(&self) -> impl Iterator<Item = (&str, &[ParseError])> {
        let refused = self.entries.iter().filter(|entry| !entry.refused.is_empty());
        refused.map(|entry| (entry.name.as_str(), &entry.refused[..]))
    }

    /// Source line of an instruction as `file:line`, empty if unknown.
    pub(crate) fn source(&self, pc: u32) -> String {
        self.code
            .get(pc as usize)
            .and_then(|instruction| self.locations.get(instruction.location as usize))
            .map_or_else(String::new, SourceLocation::to_string)
    }

    pub(crate) fn next_id() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module")
            .field("entries", &self.entries)
            .field("instructions", &self.code.len())
            .finish_non_exhaustive()
    }
}

/// Immediate operands live in registers that every warp starts with.
#[derive(Debug, Default)]
pub(crate) struct Constants {
    pub r16: Vec<(u32, u16)>,
    pub r32: Vec<(u32, u32)>,
    pub r64: Vec<(u32, u64)>,
    /// Offsets from the start of a kernel's dynamic shared memory.
    pub dynamic: Vec<(Register, i64)>,
}

/// The static shared memory of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedLayout {
    /// First byte after it.
    pub end: u32,
    /// Alignment of what follows it.
    pub align: u32,
}

impl Default for SharedLayout {
    fn default() -> Self {
        Self { end: crate::decode::SHARED_START, align: 16 }
    }
}

impl SharedLayout {
    /// Where dynamic shared memory starts.
    pub fn dynamic(self) -> u32 {
        self.end.next_multiple_of(self.align)
    }
}

/// A function as calls see it: its first instruction, `u32::MAX` if there is no body, and where it expects parameters and leaves
/// results: offsets in local memory, and bytes.
#[derive(Debug, Clone)]
pub(crate) struct Callee {
    pub start: u32,
    pub returns: Vec<(u32, u32)>,
    pub parameters: Vec<(u32, u32)>,
}

/// What belongs to a function and would be lost when it is called again before it has returned.
#[derive(Debug, Clone, Default)]
pub(crate) struct Frame {
    pub r16: Range<u32>,
    pub r32: Range<u32>,
    pub r64: Range<u32>,
    pub predicates: Range<u32>,
    /// Local memory.
    pub local: Vec<Range<u32>>,
}

/// A call through a register. Parameters and results are copied between the places of the callee's and those here.
#[derive(Debug)]
pub(crate) struct IndirectCall {
    pub address: R64,
    pub arguments: Box<[(u32, u32)]>,
    pub results: Box<[(u32, u32)]>,
}

/// A function that the host provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostFunction {
    /// `vprintf(format, arguments)`
    Print,
    /// `__assertfail(message, file, line, function, character size)`
    Assert,
}

/// A kernel.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub start: u32,
    pub parameters: Vec<Parameter>,
    pub max_threads: Option<u32>,
    pub cluster: ClusterDirectives,
    pub shared: SharedLayout,
    /// Bytes of local memory a lane needs.
    pub local_bytes: u32,
    /// What of it is not supported.
    pub refused: Vec<ParseError>,
}

/// A kernel parameter's place in the parameter space.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub name: String,
    pub offset: u32,
    pub bytes: u32,
}

/// A `.global` or `.const` variable; every device has its own.
#[derive(Debug)]
pub(crate) struct GlobalVariable {
    pub name: String,
    pub bytes: u64,
    pub element_bytes: u32,
    pub initial: Vec<InitialValue>,
    /// What the initialiser's addresses name.
    pub references: Vec<Reference>,
}

/// What a symbol in an initialiser stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reference {
    Variable(u32),
    Function(u32),
}

/// A `.loc`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceLocation {
    /// `file:line`.
    pub place: String,
    /// The places it was inlined at, the nearest first.
    pub callers: Vec<String>,
}

impl fmt::Display for SourceLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        self.callers.iter().try_for_each(|caller| write!(f, " < {caller}"))
    }
}

/// `@%p` or `@!%p`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    pub predicate: Predicate,
    pub negate: bool,
}

/// One instruction.
pub(crate) struct Instruction {
    pub op: Op,
    pub guard: Option<Guard>,
    /// Line in the PTX text.
    pub line: u32,
    /// Index into [`Module::locations`], `u32::MAX` for none.
    pub location: u32,
    /// The opcode as written.
    pub name: std::sync::Arc<str>,
    /// Registers that some wgmma accumulates in or reads A from, by their place among those: what the instruction uses of them.
    pub wgmma_registers: Box<[WgmmaUse]>,
}

/// Use of a register that some wgmma uses too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WgmmaUse {
    pub register: u32,
    pub written: bool,
}

/// State space of a memory access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    /// Of the executing CTA.
    Shared,
    /// Of the CTAs of its cluster.
    Cluster,
    Local,
    Param,
}

/// The register part of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Base {
    None,
    R32(R32),
    R64(R64),
}

/// `[base + offset]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub base: Base,
    pub offset: i64,
}

/// `ld` or `st`, of one value or a vector.
#[derive(Debug)]
pub(crate) struct Access {
    pub space: Space,
    pub address: Address,
    pub registers: Box<[Register]>,
    /// Bytes of one element.
    pub element: u32,
    /// Sign-extend into a wider destination.
    pub signed: bool,
    /// Unless it is weak, a repeated one may be a poll.
    pub order: Order,
    pub scope: Scope,
    /// `ld.global.nc`: of what nothing writes while the kernel runs.
    pub read_only: bool,
}

/// The operation of `atom` and `red`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomicOperation {
    Add,
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    Increment,
    Decrement,
    Min,
    Max,
}

/// How the bits of an atomic operand are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomicType {
    Unsigned,
    Signed,
    F16,
    Bf16,
    F32,
    F64,
}

/// `atom` or `red`.
#[derive(Debug)]
pub(crate) struct Atomic {
    pub space: Space,
    pub address: Address,
    pub operation: AtomicOperation,
    pub kind: AtomicType,
    /// Bytes of one element; packed types count as two elements per register.
    pub element: u32,
    /// Halves of a register that are operated on separately (2 for `f16x2`).
    pub packed: u32,
    pub destination: Option<Box<[Register]>>,
    pub operand: Box<[Register]>,
    pub order: Order,
    pub scope: Scope,
    /// New value of a compare-and-swap, whose `operand` is the compare value.
    pub swap: Option<Register>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

/// `shfl.sync`.
#[derive(Debug)]
pub(crate) struct Shuffle {
    pub mode: ShuffleMode,
    pub destination: R32,
    pub in_range: Option<Predicate>,
    pub source: R32,
    pub lane: R32,
    pub clamp: R32,
    pub members: R32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

/// A predicate that may be negated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Condition {
    pub predicate: Predicate,
    pub negate: bool,
}

/// Where a vote's result goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum VoteResult {
    Predicate(Predicate),
    Mask(R32),
}

/// `redux.sync`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reduction {
    Add,
    Min { signed: bool },
    Max { signed: bool },
    And,
    Or,
    Xor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BarrierReduction {
    And(Predicate),
    Or(Predicate),
    Count(R32),
}

/// `bar` and `barrier`, of a CTA.
#[derive(Debug)]
pub(crate) struct Barrier {
    pub id: R32,
    pub threads: Option<R32>,
    /// `arrive` goes on at once.
    pub arrive: bool,
    pub reduction: Option<(BarrierReduction, Condition)>,
}

/// `cp.async.bulk` of a linear range.
#[derive(Debug)]
pub(crate) struct BulkCopy {
    pub destination: Address,
    pub destination_space: Space,
    pub source: Address,
    pub source_space: Space,
    pub bytes: R32,
    /// Where to complete; a bulk group if absent.
    pub mbarrier: Option<Address>,
    /// `.multicast::cluster`: the CTAs of the cluster to copy to, a bit each.
    pub multicast: Option<R16>,
    /// `cp.reduce.async.bulk`.
    pub reduction: Option<(AtomicOperation, AtomicType, u32)>,
}

/// `cp.async.bulk.tensor` in tile mode.
#[derive(Debug)]
pub(crate) struct TensorCopy {
    pub map: Address,
    pub coordinates: Box<[R32]>,
    pub shared: Address,
    /// Present for loads.
    pub mbarrier: Option<Address>,
    /// As in [`BulkCopy`].
    pub multicast: Option<R16>,
    /// `cp.reduce.async.bulk.tensor`: stores only; the element type is the map's.
    pub reduction: Option<AtomicOperation>,
}

/// Ampere's `cp.async` from global to shared memory.
#[derive(Debug)]
pub(crate) struct SmallCopy {
    pub destination: Address,
    pub source: Address,
    pub bytes: u32,
    /// Bytes actually read; the rest is zero-filled.
    pub source_bytes: Option<R32>,
    pub ignore_source: Option<Condition>,
}

/// `st.async` and `red.async`: to shared memory of the cluster, completing bytes on an mbarrier there.
#[derive(Debug)]
pub(crate) struct AsyncStore {
    /// What an `st` would be.
    pub access: Access,
    pub mbarrier: Address,
    pub reduction: Option<(AtomicOperation, AtomicType, u32)>,
}

/// A field of a tensor map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TensorMapField {
    GlobalAddress,
    Rank,
    BoxDim,
    GlobalDim,
    GlobalStride,
    ElementStride,
    ElementType,
    Interleave,
    Swizzle,
    Fill,
}

/// `tensormap.replace`.
#[derive(Debug)]
pub(crate) struct TensorMapReplace {
    pub address: Address,
    pub space: Space,
    pub field: TensorMapField,
    /// The dimension, for fields that have one value for each.
    pub ordinal: usize,
    pub value: Register,
}

/// Which asynchronous copies a group instruction is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyKind {
    /// `cp.async`
    Small,
    /// `cp.async.bulk`
    Bulk,
}

/// `wgmma.mma_async`.
#[derive(Debug)]
pub(crate) struct Wgmma {
    pub shape: crate::wgmma::WgmmaShape,
    /// The accumulators are f16 pairs.
    pub half: bool,
    pub accumulators: Box<[R32]>,
    pub a: WgmmaA,
    pub b: R64,
    pub scale_d: Condition,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum WgmmaA {
    Descriptor(R64),
    Registers([R32; 4]),
}

/// `ldmatrix` and `stmatrix`.
#[derive(Debug)]
pub(crate) struct MatrixAccess {
    pub registers: Box<[R32]>,
    pub address: Address,
    pub space: Space,
    pub transpose: bool,
    pub store: bool,
}

/// `mma.sync`.
#[derive(Debug)]
pub(crate) struct Mma {
    pub shape: crate::matrix::MmaShape,
    /// The accumulators are f16 pairs.
    pub half: bool,
    pub d: Box<[R32]>,
    pub a: Box<[R32]>,
    pub b: Box<[R32]>,
    pub c: Box<[R32]>,
}

/// Special registers, as operands of `mov`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Special {
    Thread(usize),
    CtaThreads(usize),
    Cta(usize),
    GridCtas(usize),
    Cluster(usize),
    GridClusters(usize),
    ClusterCta(usize),
    ClusterCtas(usize),
    ClusterRank,
    ClusterSize,
    IsExplicitCluster,
    Lane,
    Warp,
    Warps,
    Sm,
    Sms,
    Clock,
    GlobalTimer { high: bool },
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    DynamicSharedBytes,
    TotalSharedBytes,
    Constant(u32),
    GridId,
}

/// What an instruction does.
pub(crate) enum Op {
    Alu(Alu),
    /// Changes nothing that values depend on: prefetches, hints.
    Nothing,
    /// `fence.acq_rel`; `fence.sc` and `membar`, which are sequential.
    Fence {
        scope: Scope,
        sequential: bool,
    },
    /// `fence.proxy.async`: of global, shared or (generic) all memory.
    FenceProxy(Space),
    /// `fence.proxy.tensormap::generic`.
    FenceTensorMap {
        release: bool,
        scope: Scope,
    },
    /// `fence.mbarrier_init.release.cluster`.
    FenceMbarrierInit,
    /// `mapa`: the address of the same place in the shared memory of the CTA of a rank.
    MapShared {
        destination: Register,
        address: Register,
        rank: R32,
        generic: bool,
    },
    /// `getctarank`.
    CtaRank {
        destination: R32,
        address: Register,
        generic: bool,
    },
    /// `isspacep.shared::cta`.
    IsOwnShared {
        destination: Predicate,
        address: R64,
    },
    /// `barrier.cluster.arrive`.
    ClusterArrive {
        relaxed: bool,
        aligned: bool,
    },
    /// `barrier.cluster.wait`.
    ClusterWait {
        aligned: bool,
    },
    Special {
        destination: Register,
        which: Special,
    },
    GlobalAddress {
        destination: R64,
        variable: u32,
        offset: i64,
    },
    Branch(u32),
    BranchIndex {
        index: R32,
        targets: Box<[u32]>,
    },
    Call(u32),
    CallIndirect(Box<IndirectCall>),
    /// Sets aside what belongs to a function, before a call that may lead back to it.
    SaveFrame(u32),
    /// Takes it back, but for the results of the call.
    RestoreFrame {
        frame: u32,
        results: Box<[(u32, u32)]>,
    },
    HostCall {
        which: HostFunction,
        /// Places in local memory.
        arguments: Box<[u32]>,
        result: Option<u32>,
    },
    Return,
    Exit,
    Trap,
    /// Between two places of a lane's local memory.
    CopyLocal {
        from: u32,
        to: u32,
        bytes: u32,
    },
    Load(Box<Access>),
    Store(Box<Access>),
    Atomic(Box<Atomic>),
    Shuffle(Box<Shuffle>),
    Vote {
        mode: VoteMode,
        result: VoteResult,
        condition: Condition,
        members: R32,
    },
    Match {
        destination: R32,
        all: Option<Predicate>,
        require_all: bool,
        value: Register,
        members: R32,
    },
    Reduce {
        operation: Reduction,
        destination: R32,
        source: R32,
        members: R32,
    },
    Elect {
        leader: R32,
        elected: Predicate,
        members: R32,
    },
    ActiveMask(R32),
    WarpBarrier(R32),
    Barrier(Box<Barrier>),
    Mbarrier(Box<MbarrierOp>),
    BulkCopy(Box<BulkCopy>),
    TensorCopy(Box<TensorCopy>),
    SmallCopy(Box<SmallCopy>),
    AsyncStore(Box<AsyncStore>),
    TensorMapReplace(Box<TensorMapReplace>),
    /// `tensormap.cp_fenceproxy`.
    TensorMapPublish {
        to: Address,
        from: Address,
        scope: Scope,
    },
    /// `cp.async.mbarrier.arrive`
    SmallCopyArrive {
        mbarrier: Address,
        generic: bool,
        /// Without `.noinc`: the phase waits for this arrival too.
        increases: bool,
    },
    CommitGroup(CopyKind),
    WaitGroup {
        kind: CopyKind,
        pending: u32,
        read: bool,
    },
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait(u32),
    Matrix(Box<MatrixAccess>),
    Mma(Box<Mma>),
    MaxRegisters {
        count: u32,
        increase: bool,
    },
    Sleep(R32),
}

pub(crate) use crate::mbarrier_op::WaitPhase;
