//! The tensor maps of a rank's weights and pools.

use ferromoe_kernel::layout::{BF16_BYTES, Shape, WorkspaceLayout};
use ferromoe_kernel::params::{ACTIVATION_MAPS, TensorMap, TensorMaps};
use ferromoe_kernel::shared::ACTIVATION_TOKENS;
use ferromoe_kernel::tile::{K_BLOCK, TOKEN_TILES, WEIGHT_TILE, loaded_rows};

use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType, TensorMapSpec};

use crate::backend::Backend;
use crate::error::Result;

/// Intermediate columns that one warpgroup stores at once.
const ACTIVATION_COLUMNS: u32 = 32;

/// Encodes all maps of one rank, for clusters of `cluster` CTAs. The addresses are those of its workspace and of its two weight buffers.
pub(crate) fn tensor_maps(
    backend: &dyn Backend,
    shape: &Shape,
    layout: &WorkspaceLayout,
    cluster: u32,
    workspace: u64,
    linear1: u64,
    linear2: u64,
) -> Result<TensorMaps> {
    let (hidden, intermediate) = (u64::from(shape.hidden), u64::from(shape.intermediate));
    let (tokens, activations) = (workspace + layout.tokens, workspace + layout.intermediate);
    let weights = |address, columns, rows| {
        let dims = vec![columns, rows, shape.local_experts().into()];
        encode(backend, address, dims, vec![K_BLOCK, WEIGHT_TILE, 1], Swizzle::B128)
    };
    let pool = |address, columns, tile: Vec<u32>, swizzle| {
        encode(backend, address, vec![columns, shape.pool_rows().into()], tile, swizzle)
    };
    let loads = |address, columns| -> Result<_> {
        let mut maps = [TensorMap([0; 16]); TOKEN_TILES.len()];
        for (map, width) in maps.iter_mut().zip(TOKEN_TILES) {
            *map = pool(address, columns, vec![K_BLOCK, loaded_rows(width, cluster)], Swizzle::B128)?;
        }
        Ok(maps)
    };
    let mut activation = [TensorMap([0; 16]); ACTIVATION_MAPS];
    for (map, width) in activation.iter_mut().zip(TOKEN_TILES) {
        let tile = vec![ACTIVATION_COLUMNS, width.min(ACTIVATION_TOKENS)];
        *map = pool(activations, intermediate, tile, Swizzle::B64)?;
    }
    Ok(TensorMaps {
        linear1: weights(linear1, hidden, 2 * intermediate)?,
        linear2: weights(linear2, intermediate, hidden)?,
        tokens: loads(tokens, hidden)?,
        intermediate: loads(activations, intermediate)?,
        activation,
    })
}

/// The map of a dense bf16 tensor, innermost dimension first.
fn encode(backend: &dyn Backend, address: u64, dims: Vec<u64>, tile: Vec<u32>, swizzle: Swizzle) -> Result<TensorMap> {
    let strides = (1..dims.len()).map(|outer| dims[..outer].iter().product::<u64>() * BF16_BYTES).collect();
    let spec = TensorMapSpec {
        data_type: TensorMapDataType::Bf16,
        global_address: address,
        element_strides: vec![1; dims.len()],
        dims,
        strides,
        box_dims: tile,
        swizzle,
        fill: OutOfBoundsFill::Zero,
    };
    Ok(TensorMap(bytemuck::cast(backend.encode_tensor_map(&spec)?)))
}
