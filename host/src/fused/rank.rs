//! One rank's memory.

use std::sync::Arc;

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::{BF16_BYTES, MAX_RANKS, Shape, SymmetricLayout, WorkspaceLayout};
use ferromoe_kernel::params::Params;
use ferromoe_kernel::schedule::weight_tasks;
use ferromoe_kernel::status::Status;
use ferromoe_kernel::tile::MAX_CLUSTER;
use ferromoe_kernel::trace::TraceBuffer;

use super::{DEFAULT_DEADLINE, RankBatch, RankInputs};
use crate::backend::Backend;
use crate::config::MoeConfig;
use crate::error::Result;
use crate::maps::tensor_maps;
use crate::memory::DeviceBuffer;
use crate::weights::LaidOutWeights;

/// What a layer has on one rank.
pub(super) struct Rank {
    /// For clusters of one CTA, and for the largest ones.
    pub(super) params: [Params; 2],
    pub(super) workspace: DeviceBuffer,
    pub(super) linear1: DeviceBuffer,
    pub(super) linear2: DeviceBuffer,
    /// The scales of both, in a format with scales.
    _scales: Option<[DeviceBuffer; 2]>,
    /// Where [`FusedMoe::forward`] puts its batch.
    pub(super) inputs: InputBuffers,
}

/// Device copies of a rank's batch and output, for the most tokens there can be.
pub(super) struct InputBuffers {
    /// bf16 [max_tokens, H] behind what [`SymmetricLayout`] lays out, where every rank can read it.
    pub(super) hidden_states: DeviceBuffer,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    pub(super) output: DeviceBuffer,
}

impl Rank {
    pub(super) fn new(
        backend: &Arc<dyn Backend>,
        config: &MoeConfig,
        shape: Shape,
        rank: usize,
        symmetric_bases: [u64; MAX_RANKS as usize],
        symmetric: &DeviceBuffer,
        weights: &LaidOutWeights,
    ) -> Result<Self> {
        let format = config.experts_format.kernel();
        let layout = WorkspaceLayout::new(&shape, format);
        // Zeroed: counters start at 0, and the padding rows of the pools hold numbers from the first launch on.
        let workspace = zeroed(backend, rank, layout.bytes, "workspace")?;
        backend.write(rank, workspace.address() + layout.status, bytemuck::bytes_of(&Status::CLEAR))?;
        let [first, second] = weights.matrices();
        let linear1 = DeviceBuffer::with(backend, rank, first, "linear 1 weights")?;
        let linear2 = DeviceBuffer::with(backend, rank, second, "linear 2 weights")?;
        let scales = match weights.scales() {
            Some([first, second]) => Some([
                DeviceBuffer::with(backend, rank, bytemuck::cast_slice(first), "linear 1 scales")?,
                DeviceBuffer::with(backend, rank, bytemuck::cast_slice(second), "linear 2 scales")?,
            ]),
            None => None,
        };
        let scales_at = |index: usize| scales.as_ref().map_or(0, |scales| scales[index].address());
        let sms = backend.sms(rank);
        let (pools, first, second) = (workspace.address(), linear1.address(), linear2.address());
        let maps = |cluster| tensor_maps(&**backend, &shape, format, &layout, cluster, pools, first, second);
        let single = Params {
            maps: maps(1)?,
            symmetric_bases,
            workspace_base: workspace.address(),
            linear1_scales: scales_at(0),
            linear2_scales: scales_at(1),
            deadline_ns: DEFAULT_DEADLINE.as_nanos() as u64,
            symmetric: SymmetricLayout::new(&shape, format),
            workspace: layout,
            shape,
            rank: rank as u32,
            swiglu_limit: config.swiglu_limit.unwrap_or(f32::INFINITY),
            wave_tiles: wave_tiles(&shape, format, sms),
            cluster: 1,
            scale_kind: config.scales as u32,
            trace: TraceBuffer::NONE,
            reserved: [0; 7],
        };
        // A task of several weight tiles keeps a CTA to itself: with scales, clusters were slower (docs/performance.md).
        let most = if format.linear1_tiles > 1 { 1 } else { MAX_CLUSTER };
        let cluster = most.min(backend.resident_ctas(rank));
        Ok(Self {
            params: [single, Params { maps: maps(cluster)?, cluster, ..single }],
            workspace,
            linear1,
            linear2,
            _scales: scales,
            inputs: InputBuffers::new(backend, rank, &shape, format, symmetric)?,
        })
    }

    /// The parameter block for a launch in which no rank has more tokens than this.
    pub(super) fn params(&self, most_tokens: u32) -> &Params {
        let [single, clustered] = &self.params;
        if clusters_pay(&single.shape, most_tokens) { clustered } else { single }
    }

    pub(super) fn upload_batch(&self, backend: &dyn Backend, batch: &RankBatch<'_>) -> Result<()> {
        let params = &self.params[0];
        let tokens = (batch.hidden_states.len() / params.shape.hidden as usize) as u32;
        let inputs = &self.inputs;
        inputs.hidden_states.write(bytemuck::cast_slice(batch.hidden_states))?;
        inputs.topk_idx.write(bytemuck::cast_slice(batch.topk_idx))?;
        inputs.topk_weights.write(bytemuck::cast_slice(batch.topk_weights))?;
        inputs.tokens.write(bytemuck::bytes_of(&tokens))?;
        // NaN everywhere: a value that the kernel does not write is never one of an earlier launch.
        backend.fill(params.rank as usize, inputs.output.address(), inputs.output.bytes(), 0xff)
    }
}

impl InputBuffers {
    fn new(
        backend: &Arc<dyn Backend>,
        rank: usize,
        shape: &Shape,
        format: &Format,
        symmetric: &DeviceBuffer,
    ) -> Result<Self> {
        let choices = u64::from(shape.max_tokens) * u64::from(shape.top_k) * 4;
        Ok(Self {
            hidden_states: symmetric.tail(SymmetricLayout::new(shape, format).bytes(shape, format), "hidden states"),
            topk_idx: DeviceBuffer::new(backend, rank, choices, "expert ids")?,
            topk_weights: DeviceBuffer::new(backend, rank, choices, "routing weights")?,
            tokens: DeviceBuffer::new(backend, rank, 4, "token count")?,
            output: DeviceBuffer::new(backend, rank, states_bytes(shape), "output")?,
        })
    }

    pub(super) fn arguments(&self, most_tokens: u32) -> RankInputs {
        RankInputs {
            hidden_states: self.hidden_states.address(),
            hidden_scales: 0,
            topk_idx: self.topk_idx.address(),
            topk_weights: self.topk_weights.address(),
            tokens: self.tokens.address(),
            output: self.output.address(),
            most_tokens,
        }
    }
}

/// A rank's symmetric buffer, with its hidden states behind what the kernel lays out. Zeroed but for those.
pub(super) fn symmetric_buffer(
    backend: &Arc<dyn Backend>,
    rank: usize,
    shape: &Shape,
    format: &Format,
) -> Result<DeviceBuffer> {
    let bytes = SymmetricLayout::new(shape, format).bytes(shape, format);
    let buffer = DeviceBuffer::new(backend, rank, bytes + states_bytes(shape), "symmetric buffer")?;
    backend.fill(rank, buffer.address(), bytes, 0)?;
    Ok(buffer)
}

/// Bytes of the most hidden states that a rank can have.
fn states_bytes(shape: &Shape) -> u64 {
    u64::from(shape.max_tokens) * u64::from(shape.hidden) * BF16_BYTES
}

fn zeroed(backend: &Arc<dyn Backend>, rank: usize, bytes: u64, name: &'static str) -> Result<DeviceBuffer> {
    let buffer = DeviceBuffer::new(backend, rank, bytes, name)?;
    backend.fill(rank, buffer.address(), bytes, 0)?;
    Ok(buffer)
}

/// Token tiles of one wave: enough that their linear 1 gives every SM two tasks.
pub(crate) fn wave_tiles(shape: &Shape, format: &Format, sms: u32) -> u32 {
    (2 * sms).div_ceil(weight_tasks(2 * shape.intermediate, format.linear1_rows(), 1)).max(1)
}

/// Mean rows of an expert from which on a cluster pays: with fewer, weights are most of the bytes, and CTAs that wait for each other cost
/// more than the tokens that they need not load twice (docs/measurements.md).
const CLUSTER_ROWS: u64 = 64;

/// Whether a launch in which no rank has more than `tokens` tokens is faster with clusters.
pub(crate) fn clusters_pay(shape: &Shape, tokens: u32) -> bool {
    let choices = u64::from(tokens) * u64::from(shape.ranks * shape.top_k);
    choices / u64::from(shape.experts.max(1)) >= CLUSTER_ROWS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_for_many_rows_an_expert() {
        let shape = Shape {
            hidden: 64,
            intermediate: 64,
            experts: 32,
            shared_experts: 1,
            top_k: 8,
            max_tokens: 8192,
            ranks: 1,
        };
        for (tokens, pay) in [(0, false), (255, false), (256, true), (u32::MAX, true)] {
            assert_eq!(clusters_pay(&shape, tokens), pay, "{tokens} tokens");
        }
    }
}
