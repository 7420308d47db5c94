//! The tensor maps of a rank's weights and pools.

use ferromoe_kernel::layout::{BF16_BYTES, Shape, WorkspaceLayout};
use ferromoe_kernel::params::{TensorMap, TensorMaps};
use ferromoe_kernel::tile::{K_BLOCK, TOKEN_TILES, WEIGHT_TILE, loaded_rows};

use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType, TensorMapSpec};

use crate::backend::Backend;
use crate::error::Result;

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
    let weights = |address, columns, rows| {
        let dims = vec![columns, rows, shape.local_experts().into()];
        encode(backend, address, dims, vec![K_BLOCK, WEIGHT_TILE, 1])
    };
    let pool = |address, columns| -> Result<_> {
        let mut maps = [TensorMap([0; 16]); TOKEN_TILES.len()];
        for (map, width) in maps.iter_mut().zip(TOKEN_TILES) {
            let dims = vec![columns, shape.pool_rows().into()];
            *map = encode(backend, address, dims, vec![K_BLOCK, loaded_rows(width, cluster)])?;
        }
        Ok(maps)
    };
    Ok(TensorMaps {
        linear1: weights(linear1, hidden, 2 * intermediate)?,
        linear2: weights(linear2, intermediate, hidden)?,
        tokens: pool(workspace + layout.tokens, hidden)?,
        intermediate: pool(workspace + layout.intermediate, intermediate)?,
    })
}

/// The map of a dense bf16 tensor, innermost dimension first; tiles of it are loaded with the 128-byte swizzle.
fn encode(backend: &dyn Backend, address: u64, dims: Vec<u64>, tile: Vec<u32>) -> Result<TensorMap> {
    let strides = (1..dims.len()).map(|outer| dims[..outer].iter().product::<u64>() * BF16_BYTES).collect();
    let spec = TensorMapSpec {
        data_type: TensorMapDataType::Bf16,
        global_address: address,
        element_strides: vec![1; dims.len()],
        dims,
        strides,
        box_dims: tile,
        swizzle: Swizzle::B128,
        fill: OutOfBoundsFill::Zero,
    };
    Ok(TensorMap(bytemuck::cast(backend.encode_tensor_map(&spec)?)))
}
