//! Which warps of a CTA are what. Those that are not consumers fill a warpgroup; consumers are whole warpgroups.

/// Threads of a warp.
pub const WARP: u32 = 32;
/// Threads of a warpgroup.
pub const WARPGROUP: u32 = 128;
/// Warps that route and pull.
pub const DISPATCH_WARPS: u32 = 1;
/// The producer warp's number in the CTA, behind the dispatch warps.
pub const PRODUCER_WARP: u32 = DISPATCH_WARPS;
/// The scheduler warp's number.
pub const SCHEDULER_WARP: u32 = PRODUCER_WARP + 1;
/// The publisher warp's number.
pub const PUBLISHER_WARP: u32 = SCHEDULER_WARP + 1;
/// The first consumer warp's number.
pub const CONSUMER_WARP: u32 = PUBLISHER_WARP + 1;
/// The most consumer warpgroups of a format.
pub const MAX_CONSUMER_WARPGROUPS: u32 = 3;

const _: () = assert!((CONSUMER_WARP * WARP).is_multiple_of(WARPGROUP));
