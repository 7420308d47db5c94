//! A PTX module as written.

/// `.u32`, `.bf16x2`, ...: the fundamental and packed types of the PTX ISA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U16x2,
    U32,
    U64,
    S8,
    S16,
    S16x2,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
    Tf32,
    E4m3,
    E5m2,
    E4m3x2,
    E5m2x2,
}

impl Type {
    /// The type a modifier names.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "pred" => Self::Pred,
            "b8" => Self::B8,
            "b16" => Self::B16,
            "b32" => Self::B32,
            "b64" => Self::B64,
            "b128" => Self::B128,
            "u8" => Self::U8,
            "u16" => Self::U16,
            "u16x2" => Self::U16x2,
            "u32" => Self::U32,
            "u64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s16x2" => Self::S16x2,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "f16" => Self::F16,
            "f16x2" => Self::F16x2,
            "bf16" => Self::Bf16,
            "bf16x2" => Self::Bf16x2,
            "f32" => Self::F32,
            "f64" => Self::F64,
            "tf32" => Self::Tf32,
            "e4m3" => Self::E4m3,
            "e5m2" => Self::E5m2,
            "e4m3x2" => Self::E4m3x2,
            "e5m2x2" => Self::E5m2x2,
            _ => return None,
        })
    }

    /// Size in memory, in bytes (a predicate counts 1).
    pub fn bytes(self) -> u32 {
        match self {
            Self::Pred | Self::B8 | Self::U8 | Self::S8 | Self::E4m3 | Self::E5m2 => 1,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::Bf16 => 2,
            Self::E4m3x2 | Self::E5m2x2 => 2,
            Self::B32 | Self::U32 | Self::S32 | Self::F32 | Self::Tf32 => 4,
            Self::F16x2 | Self::Bf16x2 | Self::U16x2 | Self::S16x2 => 4,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 8,
            Self::B128 => 16,
        }
    }

    pub fn is_signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S16x2 | Self::S32 | Self::S64)
    }

    pub fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }
}

/// Where a variable lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateSpace {
    Register,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// One element of an initialiser.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum InitialValue {
    /// A literal, as the bits of the variable's type.
    Bits(u64),
    /// An address: symbol, offset, and the right shift that a byte mask such as `0xFF00(symbol)` asks for.
    Address { symbol: String, offset: i64, shift: u32 },
}

/// A declared variable, parameter, or range of registers.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub name: String,
    pub space: StateSpace,
    pub element: Type,
    /// Size in bytes; 0 for an unsized (`[]`) array.
    pub bytes: u64,
    pub align: u64,
    pub is_extern: bool,
    /// For `%r<100>`: 100 registers named `%r0` to `%r99`.
    pub count: Option<u32>,
    pub initial: Vec<InitialValue>,
}

/// An operand as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// A register, special register, label, function or variable, with an offset added.
    Name(String, i64),
    /// `!%p`.
    Not(String),
    /// An integer literal.
    Integer(i128),
    /// A single-precision literal (`0f...` or decimal), its bits, and the double it came from if decimal.
    Single(u32),
    /// A double-precision literal's bits.
    Double(u64),
    /// `{a, b}`.
    Vector(Vec<Operand>),
    /// `[a]`, `[a+8]`, `[a, {b, c}]`.
    Address(Vec<Operand>),
    /// `(a, b)` of a call.
    List(Vec<Operand>),
    /// `a|b`.
    Pair(Box<Operand>, Box<Operand>),
}

/// `@%p` or `@!%p`.
#[derive(Clone, Debug)]
pub(crate) struct GuardName {
    pub name: String,
    pub negate: bool,
}

/// An instruction as written.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub guard: Option<GuardName>,
    /// The opcode with its modifiers: `ld.global.v4.u32`.
    pub opcode: String,
    pub operands: Vec<Operand>,
    pub line: u32,
}

/// A `.loc`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct Location {
    pub file: u32,
    pub line: u32,
    /// File number and line that it was inlined at.
    pub inlined_at: Option<(u32, u32)>,
    /// LLVM's comment on the line: the chain of all places it was inlined at.
    pub comment: String,
}

/// One statement of a body.
#[derive(Clone, Debug)]
pub(crate) enum Statement {
    Label(String),
    Instruction(Instruction),
    Location(Location),
    Variable(Variable, u32),
    Block(Vec<Statement>),
    /// `name: .branchtargets a, b;`
    BranchTargets(String, Vec<String>),
}

/// An entry or a device function.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub name: String,
    pub is_entry: bool,
    pub returns: Vec<Variable>,
    pub parameters: Vec<Variable>,
    /// `.maxntid` or `.reqntid`, threads of a CTA.
    pub max_threads: Option<u32>,
    pub cluster: ClusterDirectives,
    pub body: Option<Vec<Statement>>,
    pub line: u32,
}

/// What the directives of an entry say of its clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClusterDirectives {
    /// `.reqnctapercluster`, CTAs along x, y, z.
    pub required: Option<[u32; 3]>,
    /// `.maxclusterrank`, CTAs of a cluster.
    pub most: Option<u32>,
    /// `.explicitcluster`: a launch must name a cluster.
    pub explicit: bool,
}

/// A whole module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ast {
    pub files: Vec<(u32, String)>,
    pub variables: Vec<(Variable, u32)>,
    pub functions: Vec<Function>,
}
