//! The kernel's arguments: the parameter block, by value, and what changes from launch to launch.

use crate::layout::{MAX_RANKS, Shape, SymmetricLayout, WorkspaceLayout};
use crate::tile::MAX_TILES;
use crate::trace::TraceBuffer;

/// A tensor map as the driver encodes it (CUDA driver API, `CUtensorMap`): 128 bytes, 64-byte aligned.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct TensorMap(pub [u64; 16]);

/// The tensor maps of one rank, innermost dimension first, of elements of the format; a k-block is 128 bytes of a row. All have the 128-byte swizzle.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct TensorMaps {
    /// Linear 1 weights `[hidden, 2 * intermediate, local_experts]`, box k-block x 128 x 1.
    pub linear1: TensorMap,
    /// Linear 2 weights `[intermediate, hidden, local_experts]`, box k-block x 128 x 1.
    pub linear2: TensorMap,
    /// Token pool `[hidden, pool_rows]`, box k-block x what one CTA of a cluster loads of a token tile; one map a width.
    pub tokens: [TensorMap; MAX_TILES],
    /// Intermediate pool `[intermediate, pool_rows]`, boxes as those of the token pool.
    pub intermediate: [TensorMap; MAX_TILES],
}

/// What stays the same from launch to launch: the kernel's first argument, by value. It lies in the constant bank, where a field costs neither
/// a load nor a register.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Params {
    /// Tensor maps of the weights and pools.
    pub maps: TensorMaps,
    /// Base address of every rank's symmetric buffer, as this rank sees it.
    pub symmetric_bases: [u64; MAX_RANKS as usize],
    /// Base address of this rank's workspace.
    pub workspace_base: u64,
    /// f32 `[local_experts][tiles of linear 1][k-blocks of hidden][4]`: the scales of the weight tiles, as [`crate::format::WEIGHT_SCALES_BYTES`] says; 0 in a format without.
    pub linear1_scales: u64,
    /// f32 `[local_experts][tiles of linear 2][k-blocks of intermediate][4]`: likewise.
    pub linear2_scales: u64,
    /// How long one wait may last, in nanoseconds.
    pub deadline_ns: u64,
    /// Offsets in the symmetric buffers, for the sizes of the layer's workspace.
    pub symmetric: SymmetricLayout,
    /// Offsets in the workspace, for its sizes.
    pub workspace: WorkspaceLayout,
    /// Sizes of the layer.
    pub shape: Shape,
    /// This rank.
    pub rank: u32,
    /// SwiGLU clamp: gate at most this, up within plus and minus this. Infinity for none.
    pub swiglu_limit: f32,
    /// Token tiles of one wave, at least 1.
    pub wave_tiles: u32,
    /// CTAs of a cluster, for which the maps of the pools are made.
    pub cluster: u32,
    /// What scales of tokens and intermediate may be: a [`crate::quantise::ScaleKind`].
    pub scale_kind: u32,
    /// Number of the layer among those of its workspace.
    pub layer: u32,
    /// The most token tiles of a part, at least 1.
    pub part_tiles: u32,
    /// Tiles of the ring.
    pub ring_tiles: u32,
    /// Pool rows of each of them.
    pub place_rows: u32,
    /// Where a traced kernel records.
    pub trace: TraceBuffer,
    /// Zero: up to the alignment.
    pub reserved: [u64; 6],
}

/// The kernel's other arguments, in order, each 8 bytes: what may change from launch to launch. All are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Arguments {
    /// bf16 `[tokens][hidden]`, 16-byte aligned; in a format without scales read by every rank. With [`Self::hidden_scales`] e4m3.
    pub hidden_states: u64,
    /// 0, or f32 `[tokens][groups of hidden]`: the hidden states are e4m3, and have these scales. For a format with scales.
    pub hidden_scales: u64,
    /// i32 `[tokens][top_k]`; -1 is "no expert".
    pub topk_ids: u64,
    /// f32 `[tokens][top_k]`.
    pub topk_weights: u64,
    /// u32: the number of tokens, at most the maximum.
    pub tokens: u64,
    /// bf16 `[tokens][hidden]`, 16-byte aligned; written.
    pub output: u64,
}

const _: () = assert!(size_of::<TensorMap>() == 128);
// Kernel parameters have at most 4 KB in front of CUDA 12.1 (CUDA programming guide, "function parameters").
const _: () = assert!(size_of::<Params>() + size_of::<Arguments>() <= 4096);
