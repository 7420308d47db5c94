//! The tensor maps of a rank's weights and pools.

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::{Shape, WorkspaceLayout};
use ferromoe_kernel::params::{TensorMap, TensorMaps};
use ferromoe_kernel::tile::{MAX_TILES, WEIGHT_TILE, loaded_rows};

use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType, TensorMapSpec};

use crate::backend::Backend;
use crate::error::Result;

/// Encodes all maps of one rank, for clusters of `cluster` CTAs. The addresses are those of its workspace and of its two weight buffers, in this order.
pub(crate) fn tensor_maps(
    backend: &dyn Backend,
    shape: &Shape,
    format: &Format,
    layout: &WorkspaceLayout,
    cluster: u32,
    [workspace, linear1, linear2]: [u64; 3],
) -> Result<TensorMaps> {
    let (hidden, intermediate) = (u64::from(shape.hidden), u64::from(shape.intermediate));
    let weights = |address, columns, rows| {
        let dims = vec![columns, rows, shape.local_experts().into()];
        encode(backend, format, address, dims, vec![format.k_block(), WEIGHT_TILE, 1])
    };
    let pool = |address, columns| -> Result<_> {
        let mut maps = [TensorMap([0; 16]); MAX_TILES];
        for (index, map) in (0..format.tiles.count).zip(&mut maps) {
            let rows = loaded_rows(format.tiles.width(index), cluster);
            let dims = vec![columns, layout.pool_rows];
            *map = encode(backend, format, address, dims, vec![format.k_block(), rows])?;
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

/// The map of a dense tensor of the format, innermost dimension first; tiles of it are loaded with the 128-byte swizzle.
fn encode(backend: &dyn Backend, format: &Format, address: u64, dims: Vec<u64>, tile: Vec<u32>) -> Result<TensorMap> {
    let strides =
        (1..dims.len()).map(|outer| dims[..outer].iter().product::<u64>() * u64::from(format.element_bytes)).collect();
    let spec = TensorMapSpec {
        data_type: if format.scaled { TensorMapDataType::U8 } else { TensorMapDataType::Bf16 },
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
