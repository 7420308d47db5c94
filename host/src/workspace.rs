//! What the layers of a model share: the buffers that ranks write to each other, pools, counters and epochs.

mod sizes;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::{MAX_LAYERS, MAX_RANKS, Shape, SymmetricLayout, WorkspaceLayout};
use ferromoe_kernel::status::{BadChoice, Fault, Stage, Status, Timeout};

use crate::backend::Backend;
use crate::config::MoeConfig;
use crate::error::{Error, Result};
use crate::fused::{HiddenStates, RankBatch, RankInputs};
use crate::group::DeviceGroup;
use crate::memory::DeviceBuffer;
use crate::rendezvous::RendezvousError;

pub use sizes::WorkspaceSizes;
pub(crate) use sizes::layer_shape;
use sizes::{COUNT_BYTES, choices_bytes, scales_bytes, states_bytes, symmetric_bytes};

/// Device memory that all layers of a model share, made once for a group; a layer itself holds only its weights. Cloning shares it.
///
/// Layers run one after the other. Their launches may be queued behind each other on every rank's stream without anybody waiting, also in one CUDA
/// graph, in the same order on all ranks: a rank that launches another layer than the others gets [`Error::LayerOrder`]. Layers are numbered from 0 in
/// the order in which they were made.
#[derive(Clone)]
pub struct Workspace {
    shared: Arc<Shared>,
}

struct Shared {
    group: DeviceGroup,
    sizes: WorkspaceSizes,
    /// The sizes as the kernel's layouts take them.
    shape: Shape,
    /// The formats as they take them.
    formats: Vec<Format>,
    symmetric: SymmetricLayout,
    layout: WorkspaceLayout,
    /// Base address of every rank's symmetric buffer, as this process sees it.
    bases: [u64; MAX_RANKS as usize],
    /// Those of this process.
    ranks: Vec<WorkspaceRank>,
    /// The ranks of a group of several processes are out of step.
    broken: AtomicBool,
    /// What errors say of each layer.
    layers: Mutex<Vec<Layer>>,
    /// Held while a layer is made: layers are numbered in order.
    making: Mutex<()>,
    /// Held from a batch's way to the ranks to its outputs' way back.
    running: Mutex<()>,
    /// Reached through the parameter blocks of all ranks.
    _symmetric: Vec<DeviceBuffer>,
}

/// What errors say of a layer.
#[derive(Clone, Copy)]
struct Layer {
    experts: usize,
    top_k: usize,
    max_tokens: usize,
}

/// A workspace on one rank.
pub(crate) struct WorkspaceRank {
    /// What [`WorkspaceLayout`] lays out.
    pub(crate) own: DeviceBuffer,
    /// Where a layer puts a batch.
    pub(crate) inputs: InputBuffers,
}

/// Device copies of a rank's batch and output, for the most tokens there can be.
pub(crate) struct InputBuffers {
    /// bf16 [tokens, H] behind what [`SymmetricLayout`] lays out, where every rank can read it. Of FP8 tokens e4m3.
    pub(crate) hidden_states: DeviceBuffer,
    /// f32 [tokens, ceil(H / 128)], where a layer can take FP8 tokens.
    hidden_scales: Option<DeviceBuffer>,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    pub(crate) output: DeviceBuffer,
}

impl Workspace {
    /// Allocates all buffers. The processes of a group call this together.
    ///
    /// # Errors
    /// Sizes that the kernel cannot run or that are not those of every process, memory that runs out, or another process that did not come.
    pub fn new(group: &DeviceGroup, sizes: &WorkspaceSizes) -> Result<Self> {
        let (shape, formats) = (sizes.shape(group.ranks())?, sizes.kernel_formats());
        let backend = &group.backend;
        let mut parts: Vec<_> = sizes.named().into_iter().map(|(what, size)| (what, size.to_string())).collect();
        parts.push(("the formats", sizes.format_names()));
        agree(&**backend, &parts)?;
        let local = backend.local_ranks();
        let symmetric: Vec<_> =
            local.clone().map(|rank| symmetric_buffer(backend, rank, &shape, &formats)).collect::<Result<_>>()?;
        let addresses: Vec<_> = symmetric.iter().map(DeviceBuffer::address).collect();
        let mut bases = [0; MAX_RANKS as usize];
        let shared = backend.share(&addresses, "symmetric buffer")?;
        bases[..shared.len()].copy_from_slice(&shared);
        let make = |(rank, symmetric)| WorkspaceRank::new(backend, rank, &shape, &formats, symmetric);
        let ranks: Result<Vec<_>> = local.zip(&symmetric).map(make).collect();
        // The symmetric buffers of a workspace that cannot be are released by all processes together.
        let ranks = all_ready(&**backend, ranks, "workspace")?;
        let shared = Shared {
            group: group.clone(),
            sizes: sizes.clone(),
            shape,
            symmetric: SymmetricLayout::new(&shape, &formats),
            layout: WorkspaceLayout::new(&shape, &formats),
            formats,
            bases,
            ranks,
            broken: AtomicBool::new(false),
            layers: Mutex::default(),
            making: Mutex::default(),
            running: Mutex::default(),
            _symmetric: symmetric,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The group that it was made for.
    pub fn group(&self) -> &DeviceGroup {
        &self.shared.group
    }

    /// The sizes that it was made for.
    pub fn sizes(&self) -> &WorkspaceSizes {
        &self.shared.sizes
    }

    /// Memory for a rank's hidden states, bf16 [tokens, H] or e4m3 of as many, that the ranks of all processes can read.
    /// [`crate::FusedMoe::forward`] puts them there; an engine whose layer before writes there needs no copy.
    ///
    /// # Errors
    /// A rank of another process.
    pub fn hidden_states(&self, rank: usize) -> Result<&DeviceBuffer> {
        Ok(&self.rank(rank)?.inputs.hidden_states)
    }

    /// What the launches of all layers on this process's ranks since the last call reported. No launch may be running.
    ///
    /// # Errors
    /// As [`crate::FusedMoe::forward`]; the layers can be used again, in a group of several processes after [`Self::recover`]
    /// where it was the deadline or the order of layers.
    pub fn check(&self) -> Result<()> {
        self.check_status(None)
    }

    /// Makes the ranks agree again after a launch that ran past its deadline, or one of different layers. A group of one process does this by itself. The
    /// processes of a larger group call it together, once the launches of each have ended; a rank that was not
    /// waiting itself meets the deadline at its next launch, and then calls this too.
    ///
    /// # Errors
    /// Another process that does not come, or a driver that fails.
    pub fn recover(&self) -> Result<()> {
        let (backend, layout) = (&*self.group().backend, self.layout());
        let mut last = 0u32;
        for (rank, state) in self.numbered() {
            let mut epoch = 0u32;
            backend.read(rank, state.own.address() + layout.epoch, bytemuck::bytes_of_mut(&mut epoch))?;
            last = last.max(epoch);
        }
        for epoch in backend.exchange(bytemuck::bytes_of(&last))? {
            last = last.max(bytemuck::pod_read_unaligned(&epoch));
        }
        for (rank, state) in self.numbered() {
            let base = state.own.address();
            backend.write(rank, base + layout.epoch, bytemuck::bytes_of(&[last, 0]))?;
            backend.fill(rank, base + layout.counters, 2 * layout.counter.bytes, 0)?;
            backend.write(rank, base + layout.status, bytemuck::bytes_of(&Status::CLEAR))?;
        }
        self.shared.broken.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The sizes as the kernel's layouts take them.
    pub(crate) fn shape(&self) -> &Shape {
        &self.shared.shape
    }

    /// The formats as they take them.
    pub(crate) fn formats(&self) -> &[Format] {
        &self.shared.formats
    }

    pub(crate) fn symmetric(&self) -> &SymmetricLayout {
        &self.shared.symmetric
    }

    pub(crate) fn layout(&self) -> &WorkspaceLayout {
        &self.shared.layout
    }

    /// Base address of every rank's symmetric buffer, as this process sees it.
    pub(crate) fn bases(&self) -> [u64; MAX_RANKS as usize] {
        self.shared.bases
    }

    /// The ranks of this process.
    pub(crate) fn local_ranks(&self) -> Range<usize> {
        self.group().backend.local_ranks()
    }

    pub(crate) fn rank(&self, rank: usize) -> Result<&WorkspaceRank> {
        let local = self.local_ranks();
        let found = rank.checked_sub(local.start).and_then(|index| self.shared.ranks.get(index));
        found.ok_or(Error::NotLocal { rank, local })
    }

    fn numbered(&self) -> impl Iterator<Item = (usize, &WorkspaceRank)> {
        self.local_ranks().zip(&self.shared.ranks)
    }

    pub(crate) fn spans_processes(&self) -> bool {
        self.shared.ranks.len() < self.shared.shape.ranks as usize
    }

    /// No launch may follow one that several processes have to recover from.
    pub(crate) fn check_usable(&self) -> Result<()> {
        if self.shared.broken.load(Ordering::Relaxed) { Err(Error::NotRecovered) } else { Ok(()) }
    }

    /// Holds other batches back: there is one set of buffers for them, and ranks launch layers in one order.
    pub(crate) fn run_alone(&self) -> MutexGuard<'_, ()> {
        lock(&self.shared.running)
    }

    /// Makes a layer, which gets its number and its shape. The processes of a group call this together.
    ///
    /// # Errors
    /// A layer that does not fit, one layer too many, what `make` returns, or another process that makes another layer or none.
    pub(crate) fn add_layer<T>(
        &self,
        config: &MoeConfig,
        make: impl FnOnce(u32, Shape) -> Result<T>,
    ) -> Result<(u32, T)> {
        let shape = layer_shape(config, self.group().ranks())?;
        self.sizes().check(config)?;
        let _making = lock(&self.shared.making);
        let number = lock(&self.shared.layers).len() as u32;
        if number == MAX_LAYERS {
            return Err(Error::TooManyLayers { most: MAX_LAYERS });
        }
        let backend = &*self.group().backend;
        agree_on_layer(backend, number, config)?;
        let made = all_ready(backend, make(number, shape), "layer")?;
        let MoeConfig { experts, top_k, max_tokens_per_rank: max_tokens, .. } = *config;
        lock(&self.shared.layers).push(Layer { experts, top_k, max_tokens });
        Ok((number, made))
    }

    /// Reads and clears the status words of all ranks; the batch of a layer, if it is known, gives the ids that were wrong.
    pub(crate) fn check_status(&self, batch: Option<(u32, &[RankBatch<'_>])>) -> Result<()> {
        let backend = &*self.group().backend;
        let mut statuses = Vec::new();
        for (rank, state) in self.numbered() {
            let address = state.own.address() + self.layout().status;
            let mut status = Status::CLEAR;
            backend.read(rank, address, bytemuck::bytes_of_mut(&mut status))?;
            if status != Status::CLEAR {
                backend.write(rank, address, bytemuck::bytes_of(&Status::CLEAR))?;
            }
            statuses.push((rank, status));
        }
        // A wait that ran out leaves counters and epochs as they were at that moment.
        let timeouts = statuses.iter().filter_map(|&(rank, status)| Some((rank, Timeout::unpack(status.timeout)?)));
        // A rank that drains makes others wait in vain, in later stages: the first stage is nearest to the cause.
        let timeout = timeouts.min_by_key(|(_, (timeout, _))| timeout.stage as u8);
        match timeout {
            Some(_) if self.spans_processes() => self.shared.broken.store(true, Ordering::Relaxed),
            Some(_) => self.recover()?,
            None => {}
        }
        for &(rank, status) in &statuses {
            if let Some(choice) = BadChoice::unpack(status.bad_choice) {
                return Err(self.bad_choice(rank, choice, batch));
            }
            if status.excess_tokens != 0 {
                let layer = self.layer((status.excess_tokens >> 32) as u32);
                let tokens = status.excess_tokens as u32 as usize;
                return Err(Error::TooManyTokens { rank, tokens, max: layer.max_tokens });
            }
        }
        match timeout {
            Some((rank, (Timeout { stage: Stage::Layer, rank: other, subject }, layer))) => Err(Error::LayerOrder {
                rank,
                layer: layer as usize,
                other: other as usize,
                other_layer: subject as usize,
            }),
            Some((rank, (Timeout { stage, rank: missing, subject }, _))) => {
                Err(Error::Deadline { rank, stage, missing: missing as usize, subject })
            }
            None => Ok(()),
        }
    }

    fn bad_choice(&self, rank: usize, choice: BadChoice, batch: Option<(u32, &[RankBatch<'_>])>) -> Error {
        let (token, k) = (choice.token as usize, choice.k as usize);
        let layer = self.layer(choice.layer);
        let batch = batch.filter(|(number, _)| *number == choice.layer);
        let tokens = batch.and_then(|(_, batch)| batch.get(rank - self.local_ranks().start));
        let expert = tokens.and_then(|tokens| tokens.topk_idx.get(token * layer.top_k + k).copied());
        match choice.fault {
            Fault::OutOfRange => Error::ExpertId { rank, token, k, expert, experts: layer.experts },
            Fault::Repeated => Error::RepeatedExpert { rank, token, k, expert },
        }
    }

    /// What is known of the layer of this number.
    fn layer(&self, number: u32) -> Layer {
        let unknown =
            Layer { experts: self.sizes().experts, top_k: self.sizes().top_k, max_tokens: self.sizes().tokens };
        lock(&self.shared.layers).get(number as usize).copied().unwrap_or(unknown)
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace").field("group", self.group()).field("sizes", self.sizes()).finish_non_exhaustive()
    }
}

impl WorkspaceRank {
    fn new(
        backend: &Arc<dyn Backend>,
        rank: usize,
        sizes: &Shape,
        formats: &[Format],
        symmetric: &DeviceBuffer,
    ) -> Result<Self> {
        let layout = WorkspaceLayout::new(sizes, formats);
        // Zeroed: counters start at 0, and the padding rows of the pools hold numbers from the first launch on.
        let own = DeviceBuffer::new(backend, rank, layout.bytes, "workspace")?;
        backend.fill(rank, own.address(), layout.bytes, 0)?;
        backend.write(rank, own.address() + layout.status, bytemuck::bytes_of(&Status::CLEAR))?;
        Ok(Self { own, inputs: InputBuffers::new(backend, rank, sizes, formats, symmetric)? })
    }
}

impl InputBuffers {
    fn new(
        backend: &Arc<dyn Backend>,
        rank: usize,
        sizes: &Shape,
        formats: &[Format],
        symmetric: &DeviceBuffer,
    ) -> Result<Self> {
        let choices = choices_bytes(sizes);
        let scales = match scales_bytes(sizes, formats) {
            0 => None,
            bytes => Some(DeviceBuffer::new(backend, rank, bytes, "hidden scales")?),
        };
        Ok(Self {
            hidden_states: symmetric.tail(SymmetricLayout::new(sizes, formats).bytes(sizes, formats), "hidden states"),
            hidden_scales: scales,
            topk_idx: DeviceBuffer::new(backend, rank, choices, "expert ids")?,
            topk_weights: DeviceBuffer::new(backend, rank, choices, "routing weights")?,
            tokens: DeviceBuffer::new(backend, rank, COUNT_BYTES, "token count")?,
            output: DeviceBuffer::new(backend, rank, states_bytes(sizes), "output")?,
        })
    }

    /// What a launch gets after [`Self::upload`] of a batch with such hidden states.
    pub(crate) fn arguments(&self, states: &HiddenStates<'_>, most_tokens: u32) -> RankInputs {
        let scales = self.hidden_scales.as_ref().filter(|_| states.scales().is_some());
        RankInputs {
            hidden_states: self.hidden_states.address(),
            hidden_scales: scales.map_or(0, DeviceBuffer::address),
            topk_idx: self.topk_idx.address(),
            topk_weights: self.topk_weights.address(),
            tokens: self.tokens.address(),
            output: self.output.address(),
            most_tokens,
        }
    }

    /// Puts a batch of tokens of `hidden` elements on its rank.
    pub(crate) fn upload(
        &self,
        backend: &dyn Backend,
        rank: usize,
        hidden: usize,
        batch: &RankBatch<'_>,
    ) -> Result<()> {
        let tokens = batch.tokens(hidden) as u32;
        self.hidden_states.write(batch.hidden_states.bytes())?;
        if let (Some(buffer), Some(scales)) = (&self.hidden_scales, batch.hidden_states.scales()) {
            buffer.write(bytemuck::cast_slice(scales))?;
        }
        self.topk_idx.write(bytemuck::cast_slice(batch.topk_idx))?;
        self.topk_weights.write(bytemuck::cast_slice(batch.topk_weights))?;
        self.tokens.write(bytemuck::bytes_of(&tokens))?;
        // NaN everywhere: a value that the kernel does not write is never one of an earlier launch.
        backend.fill(rank, self.output.address(), self.output.bytes(), 0xff)
    }
}

/// A rank's symmetric buffer, with its hidden states behind what the kernel lays out. Zeroed but for those.
fn symmetric_buffer(
    backend: &Arc<dyn Backend>,
    rank: usize,
    sizes: &Shape,
    formats: &[Format],
) -> Result<DeviceBuffer> {
    let buffer = DeviceBuffer::new(backend, rank, symmetric_bytes(sizes, formats), "symmetric buffer")?;
    backend.fill(rank, buffer.address(), SymmetricLayout::new(sizes, formats).bytes(sizes, formats), 0)?;
    Ok(buffer)
}

/// What this process made, if every other made its part too.
fn all_ready<T>(backend: &dyn Backend, made: Result<T>, what: &'static str) -> Result<T> {
    let ready = backend.exchange(&[made.is_ok().into()]);
    let made = made?;
    if let Some(rank) = ready?.iter().position(|ready| ready != &[1]) {
        return Err(RendezvousError::NotReady { rank, what }.into());
    }
    Ok(made)
}

/// Checks that all processes make the same layer.
fn agree_on_layer(backend: &dyn Backend, number: u32, config: &MoeConfig) -> Result<()> {
    let limit = config.swiglu_limit.map_or_else(|| "none".into(), |limit| limit.to_string());
    agree(
        backend,
        &[
            ("a hidden size of", config.hidden.to_string()),
            ("an intermediate size of", config.intermediate.to_string()),
            ("a number of experts of", config.experts.to_string()),
            ("a number of shared experts of", config.shared_experts.to_string()),
            ("a top-k of", config.top_k.to_string()),
            ("a maximum of tokens per rank of", config.max_tokens_per_rank.to_string()),
            ("a SwiGLU limit of", limit),
            ("experts in", config.experts_format.name().into()),
            ("scales of", format!("{:?}", config.scales)),
            ("a layer number of", number.to_string()),
        ],
    )
}

/// Checks that all processes have the same values.
fn agree(backend: &dyn Backend, parts: &[(&'static str, String)]) -> Result<()> {
    // Blobs have one size: every part is padded to more than any number takes.
    let blob: String = parts.iter().map(|(_, value)| format!("{value:<64}")).collect();
    let blobs = backend.exchange(blob.as_bytes())?;
    for (rank, theirs) in blobs.iter().enumerate() {
        for (&(what, _), (theirs, ours)) in parts.iter().zip(theirs.chunks(64).zip(blobs[0].chunks(64))) {
            if theirs != ours {
                let text = |part| String::from_utf8_lossy(part).trim_end().to_owned();
                return Err(RendezvousError::Mismatch { rank, what, theirs: text(theirs), ours: text(ours) }.into());
            }
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
