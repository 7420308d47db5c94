//! Everything that can go wrong, as one enum: what was wrong, the value, and what would be right.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::config::{MAX_LOCAL_EXPERTS, MAX_RANKS, MAX_TOP_K, SIZE_STEP};

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read, mapped or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// "read", "write", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is not a safetensors file, or only a part of one.
    #[error("{path} is not a complete safetensors file: {source}")]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: safetensors::SafeTensorError,
    },
    /// A JSON file cannot be parsed.
    #[error("{path} is not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: serde_json::Error,
    },
    /// A field of a JSON file is missing, of another type, or has a value that is not supported.
    #[error("{path}: `{field}` {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field's name.
        field: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A folder holds no checkpoint.
    #[error("{dir} has neither model.safetensors nor model.safetensors.index.json{}", other_files(found))]
    NoModel {
        /// The folder.
        dir: PathBuf,
        /// The files there that look like weights.
        found: Vec<String>,
    },
    /// A file that Git LFS stands in for.
    #[error("{path} is a Git LFS pointer, not the file itself; `git lfs pull` fetches it")]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// The weights are quantised in a way that is not supported.
    #[error("{path}: the checkpoint is quantised ({method}), which is not supported")]
    Quantised {
        /// The file that says so.
        path: PathBuf,
        /// The kind of quantisation.
        method: String,
    },
    /// A layer that the kernel cannot run.
    #[error("{path}: {what} is not supported yet, and a {family} layer has it")]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// The model family.
        family: &'static str,
        /// What the kernel lacks.
        what: String,
    },
    /// Tensors of the layer that nobody reads.
    #[error(
        "{path} has `{}`{}, which a {family} layer with these settings does not have: the result would be without them",
        first_of(names),
        more_than(names)
    )]
    UnreadTensors {
        /// The file.
        path: PathBuf,
        /// The model family.
        family: &'static str,
        /// The tensors.
        names: Vec<String>,
    },
    /// A layer whose experts are there in two forms.
    #[error("{path} has both `{first}` and `{second}`; a layer has its experts in one place")]
    TwoLayouts {
        /// The file.
        path: PathBuf,
        /// A tensor of one form.
        first: String,
        /// A tensor of the other.
        second: String,
    },
    /// The checkpoint has fewer layers.
    #[error("layer {layer} does not exist: the model has layers 0 to {}", layers.saturating_sub(1))]
    NoSuchLayer {
        /// The layer asked for.
        layer: usize,
        /// The model's number of layers.
        layers: usize,
    },
    /// The layer has no experts.
    #[error("layer {layer} is dense, it has no experts; {}", first_moe.map_or("no layer of this model has any".to_owned(), |first| format!("the first layer with experts is {first}")))]
    DenseLayer {
        /// The layer asked for.
        layer: usize,
        /// The first layer that has experts, if one has.
        first_moe: Option<usize>,
    },
    /// A tensor is not in the file that should hold it.
    #[error("{path} has no tensor `{name}`")]
    TensorMissing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has an element type that cannot be used.
    #[error("tensor `{name}` of {path} is {found}; it must be {expected}")]
    TensorDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its element type.
        found: String,
        /// The element types that would do.
        expected: &'static str,
    },
    /// A tensor has another shape than its place needs.
    #[error("tensor `{name}` of {path} has shape {found:?}; it must be {expected}")]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that would do.
        expected: String,
    },
    /// A tensor has values that cannot be used.
    #[error("tensor `{name}` of {path}: {problem}")]
    TensorValue {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A kernel that no layer has asked for.
    #[error("the kernel {entry} was not prepared before its launch")]
    NotPrepared {
        /// Its entry.
        entry: &'static str,
    },
    /// A slice or a matrix given by the caller has another size than the configuration needs.
    #[error("{what} has {found}; it must have {expected}")]
    Size {
        /// What has the wrong size.
        what: String,
        /// Its size.
        found: String,
        /// The size that would be right.
        expected: String,
    },
    /// A block scale that is no scale.
    #[error("{problem}")]
    BlockScale {
        /// Which scale, its value, and what would be right.
        problem: String,
    },
    /// A cut of a matrix of e4m3 numbers that would part a block.
    #[error(
        "a matrix with a scale for each block of {block} x {block} cannot be cut at {what} {cut}; cuts must be at multiples of {block}"
    )]
    BlockCut {
        /// "row" or "column".
        what: &'static str,
        /// Where it was to be cut.
        cut: usize,
        /// Rows and columns of a block.
        block: usize,
    },
    /// Shared experts that lie in one matrix whose blocks span two of them.
    #[error(
        "the {count} shared experts of width {intermediate} cannot be cut from their common matrices, which have a scale for each {block} rows or columns; their width must be a multiple of {block}"
    )]
    SharedBlocks {
        /// Number of shared experts.
        count: usize,
        /// Width of one.
        intermediate: usize,
        /// Rows and columns of a block.
        block: usize,
    },
    /// A trace was asked of a group whose kernel records nothing.
    #[error("the group's kernel records no trace; DeviceGroup::open_traced opens one whose kernel does")]
    NotTraced,
    /// A trace that cannot be read.
    #[error("the trace of {role} of CTA {cta} on rank {rank} {problem}")]
    Trace {
        /// The rank.
        rank: usize,
        /// The CTA.
        cta: usize,
        /// The role.
        role: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Number of ranks out of range.
    #[error("{ranks} ranks are not possible; it must be from 1 to {MAX_RANKS}")]
    Ranks {
        /// The number asked for.
        ranks: usize,
    },
    /// The experts cannot be cut evenly.
    #[error("{experts} experts cannot be cut evenly over {ranks} ranks; the ranks must divide the experts")]
    ExpertsNotDivisible {
        /// Number of experts.
        experts: usize,
        /// Number of ranks.
        ranks: usize,
    },
    /// Hidden or intermediate size that does not fit the tiles.
    #[error("the {what} size is {value}; it must be a positive multiple of {SIZE_STEP}")]
    SizeStep {
        /// "hidden" or "intermediate".
        what: &'static str,
        /// The size.
        value: usize,
    },
    /// Top-k out of range.
    #[error("top-k is {top_k}; with {experts} experts it must be from 1 to {}", (*experts).min(MAX_TOP_K))]
    TopK {
        /// The top-k.
        top_k: usize,
        /// Number of experts.
        experts: usize,
    },
    /// More experts on a rank than the kernel keeps count of.
    #[error(
        "{local} experts on each of {ranks} ranks, shared ones included, are too many; it must be at most {MAX_LOCAL_EXPERTS}"
    )]
    LocalExperts {
        /// Number of ranks.
        ranks: usize,
        /// Experts on one rank, shared ones included.
        local: usize,
    },
    /// The configured maximum of tokens is out of range.
    #[error(
        "a maximum of {max} tokens per rank is not possible; with this top-k and these experts it must be from 1 to {most}"
    )]
    MaxTokens {
        /// `MoeConfig::max_tokens_per_rank`.
        max: usize,
        /// The largest that would do.
        most: usize,
    },
    /// More tokens than buffers were made for.
    #[error("rank {rank} has {tokens} tokens; the configured maximum is {max} per rank")]
    TooManyTokens {
        /// The rank.
        rank: usize,
        /// Its tokens.
        tokens: usize,
        /// `MoeConfig::max_tokens_per_rank`.
        max: usize,
    },
    /// The clamp is not usable.
    #[error("the SwiGLU limit is {limit}; it must be a finite number above 0, or none")]
    SwigluLimit {
        /// The limit.
        limit: f32,
    },
    /// A token is routed to an expert that does not exist.
    #[error("rank {rank}, token {token}, k {k}: expert {}does not exist; ids are 0 to {}, or -1 for no expert", expert.map_or(String::new(), |id| format!("{id} ")), experts.saturating_sub(1))]
    ExpertId {
        /// The rank that holds the token.
        rank: usize,
        /// The token, counted within its rank.
        token: usize,
        /// The place in the token's top-k.
        k: usize,
        /// The expert id, where it is known: not after a queued launch.
        expert: Option<i32>,
        /// Number of experts.
        experts: usize,
    },
    /// A token names an expert twice.
    #[error("rank {rank}, token {token}, k {k}: expert {}is there a second time; a token's experts must differ", expert.map_or(String::new(), |id| format!("{id} ")))]
    RepeatedExpert {
        /// The rank that holds the token.
        rank: usize,
        /// The token, counted within its rank.
        token: usize,
        /// The place in the token's top-k.
        k: usize,
        /// The expert id, where it is known: not after a queued launch.
        expert: Option<i32>,
    },
    /// A layer that is larger than what its workspace was made for.
    #[error("the layer does not fit its workspace: it has {}", excesses.iter().map(Excess::to_string).collect::<Vec<_>>().join(", and "))]
    NotInWorkspace {
        /// The sizes that do not fit.
        excesses: Vec<Excess>,
    },
    /// A layer in a number format that its workspace was not made for.
    #[error("the layer's experts run in {format}, and its workspace was made for {formats}")]
    NotThatFormat {
        /// The layer's.
        format: &'static str,
        /// The workspace's.
        formats: String,
    },
    /// FP8 tokens for a layer that cannot take them.
    #[error(
        "rank {rank} has FP8 tokens, and the layer's experts run in {experts}; they must run in fp8, or the tokens must be bf16"
    )]
    TokensFormat {
        /// The rank.
        rank: usize,
        /// The format of the layer's experts.
        experts: &'static str,
    },
    /// More layers than a workspace can tell apart.
    #[error("a workspace has at most {most} layers")]
    TooManyLayers {
        /// The most layers.
        most: u32,
    },
    /// Two ranks have launched different layers of a workspace at the same time.
    #[error(
        "rank {rank} launched layer {layer} of the workspace when rank {other} launched layer {other_layer}; all ranks must launch its layers in \
         the same order"
    )]
    LayerOrder {
        /// The rank that noticed.
        rank: usize,
        /// The number of its layer.
        layer: usize,
        /// The other rank.
        other: usize,
        /// The number of its layer.
        other_layer: usize,
    },
    /// A wait of the kernel ran past its deadline.
    #[error("rank {rank} waited in vain for rank {missing}: {}; did every rank launch?", waited_for(*stage, *subject))]
    Deadline {
        /// The rank that waited.
        rank: usize,
        /// What it waited for.
        stage: ferromoe_kernel::status::Stage,
        /// The rank that should have delivered it.
        missing: usize,
        /// The expert (for counts and results) or the tile (for rows and columns).
        subject: u32,
    },
    /// A rank of another process, or none.
    #[error("rank {rank} is not of this process, which has ranks {} to {}", local.start, local.end.saturating_sub(1))]
    NotLocal {
        /// The rank.
        rank: usize,
        /// The ranks of this process.
        local: std::ops::Range<usize>,
    },
    /// An address that the kernel cannot use.
    #[error("the {what} of rank {rank} at {address:#x} cannot be used; {expected}")]
    Address {
        /// What is there.
        what: &'static str,
        /// The rank.
        rank: usize,
        /// The device address.
        address: u64,
        /// What would be right.
        expected: String,
    },
    /// A launch after one that ended with [`Error::Deadline`] or [`Error::LayerOrder`], in a group of several processes.
    #[error("the ranks are out of step after a launch that failed; every process must call `Workspace::recover` first")]
    NotRecovered,
    /// GPUs are missing, or the CUDA driver failed.
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// The processes of a group did not meet.
    #[error(transparent)]
    Rendezvous(#[from] crate::rendezvous::RendezvousError),
    /// The simulator found an error in the kernel, or cannot go on.
    #[error("simulator: {0}")]
    Simulator(#[from] ptx_sim::SimError),
    /// The simulator cannot read the PTX.
    #[error("simulator: {0}")]
    Ptx(#[from] ptx_sim::ParseError),
    /// A tensor map that the simulator refuses.
    #[error("tensor map: {0}")]
    TensorMap(#[from] ptx_sim::tensor_map::TensorMapError),
    /// A benchmarked layer's output is not what it should be.
    #[error("wrong result: {0}")]
    WrongResult(String),
    /// A hash-routed layer was given no token ids, or one outside its table.
    #[error("this layer routes by token id, and {problem}")]
    InputIds {
        /// What is wrong with them, and what would be right.
        problem: String,
    },
}

/// A size of a layer that its workspace has no room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excess {
    /// "a hidden size of", ...
    pub what: &'static str,
    /// The layer's.
    pub layer: usize,
    /// What the workspace was made for.
    pub workspace: usize,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, layer, workspace } = self;
        write!(f, "{what} {layer}, {} more than the {workspace} it was made for", layer.saturating_sub(*workspace))
    }
}

fn other_files(found: &[String]) -> String {
    match found {
        [] => String::new(),
        _ => format!(", only {}; without an index nobody can say which tensors are where", found.join(", ")),
    }
}

fn first_of(names: &[String]) -> &str {
    names.first().map_or("", String::as_str)
}

fn more_than(names: &[String]) -> String {
    match names.len() {
        0 | 1 => String::new(),
        count => format!(" and {} more up to `{}`", count - 1, names[count - 1]),
    }
}

fn waited_for(stage: ferromoe_kernel::status::Stage, subject: u32) -> String {
    use ferromoe_kernel::status::Stage;
    match stage {
        Stage::Layer => format!("it launched layer {subject}"),
        Stage::Records => "dispatch had not all of its quantised tokens".into(),
        Stage::Counts => format!("dispatch had no token counts for expert {subject}"),
        Stage::Rows => format!("linear 1 had not all rows of tile {subject}"),
        Stage::Columns => format!("linear 2 had not all columns of tile {subject}"),
        Stage::Ring => format!("dispatch had no place for rows: linear 2 of tile {subject} was not through"),
        Stage::Results => format!("combine had no results of expert {subject}"),
    }
}
