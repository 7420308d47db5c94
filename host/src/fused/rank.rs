//! One rank's part of a layer.

use ferromoe_kernel::layout::Shape;
use ferromoe_kernel::params::Params;
use ferromoe_kernel::schedule::TileRing;
use ferromoe_kernel::trace::TraceBuffer;

use super::DEFAULT_DEADLINE;
use crate::config::MoeConfig;
use crate::error::Result;
use crate::maps::tensor_maps;
use crate::memory::DeviceBuffer;
use crate::weights::LaidOutWeights;
use crate::workspace::Workspace;

/// What a layer has on one rank.
pub(super) struct Rank {
    /// For clusters of one CTA, and for the largest ones.
    pub(super) params: [Params; 2],
    pub(super) linear1: DeviceBuffer,
    pub(super) linear2: DeviceBuffer,
    /// The scales of both, in a format with scales.
    _scales: Option<[DeviceBuffer; 2]>,
}

impl Rank {
    /// The rank's part of the layer of this number.
    pub(super) fn new(
        workspace: &Workspace,
        config: &MoeConfig,
        number: u32,
        shape: Shape,
        rank: usize,
        weights: &LaidOutWeights,
    ) -> Result<Self> {
        let backend = &workspace.group().backend;
        let format = config.experts_format.kernel();
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
        let layout = workspace.layout();
        let own = workspace.rank(rank)?.own.address();
        let addresses = [own, linear1.address(), linear2.address()];
        let maps = |cluster| tensor_maps(&**backend, &shape, format, layout, cluster, addresses);
        let cut = layout.cut(&shape, format, backend.sms(rank));
        let single = Params {
            maps: maps(1)?,
            symmetric_bases: workspace.bases(),
            workspace_base: own,
            linear1_scales: scales_at(0),
            linear2_scales: scales_at(1),
            deadline_ns: DEFAULT_DEADLINE.as_nanos() as u64,
            symmetric: *workspace.symmetric(),
            workspace: *layout,
            shape,
            rank: rank as u32,
            swiglu_limit: config.swiglu_limit.unwrap_or(f32::INFINITY),
            wave_tiles: cut.wave_tiles,
            cluster: 1,
            scale_kind: config.scales as u32,
            layer: number,
            part_tiles: cut.part_tiles,
            ring_tiles: cut.ring_tiles,
            place_rows: TileRing::place_rows(&shape, format),
            trace: TraceBuffer::NONE,
            reserved: [0; 6],
        };
        let cluster = format.max_cluster.min(backend.resident_ctas(rank));
        let params = [single, Params { maps: maps(cluster)?, cluster, ..single }];
        Ok(Self { params, linear1, linear2, _scales: scales })
    }

    /// The parameter block for a launch in which no rank has more tokens than this.
    pub(super) fn params(&self, most_tokens: u32) -> &Params {
        let [single, clustered] = &self.params;
        if clusters_pay(&single.shape, most_tokens) { clustered } else { single }
    }
}

/// Mean rows of an expert from which on a cluster pays: with fewer, weights are most of the bytes, and CTAs that wait for each other cost
/// more than the tokens that they need not load twice (docs/history.md).
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
