//! A token's choices of experts, checked before any becomes an address.

use crate::device::global::ld_weak_u32;
use crate::device::warp::match_any;
use crate::launch::Launch;
use crate::layout::Shape;
use crate::status::Fault;

/// One entry of the top-k ids.
#[derive(Clone, Copy)]
pub enum Choice {
    /// An expert of the layer, named by this token for the first time.
    Expert(u32),
    /// -1, or a lane without an entry.
    None,
    /// Masked.
    Bad(Fault),
}

/// [`load`], then [`check`].
#[inline(always)]
pub fn choose(launch: &Launch, token: u32, k: u32, active: bool, lane: u32) -> Choice {
    check(&launch.params().shape, load(launch, token, k, active), token, lane)
}

/// The id at `(token, k)`; -1 if not `active`.
#[inline(always)]
pub fn load(launch: &Launch, token: u32, k: u32, active: bool) -> u32 {
    // SAFETY: active lanes stay within the [tokens][top_k] ids.
    if active { unsafe { ld_weak_u32(launch.topk_id(token * launch.params().shape.top_k + k)) } } else { u32::MAX }
}

/// Checks the ids of a warp: lanes with the same `token` hold different entries of it. All lanes call this.
#[inline(always)]
pub fn check(shape: &Shape, id: u32, token: u32, lane: u32) -> Choice {
    let in_range = id < shape.experts;
    let first = lanes_alike(token, id, in_range, lane).trailing_zeros() == lane;
    if in_range && first {
        Choice::Expert(id)
    } else if in_range {
        Choice::Bad(Fault::Repeated)
    } else if id == u32::MAX {
        Choice::None
    } else {
        Choice::Bad(Fault::OutOfRange)
    }
}

/// The `active` lanes that have the same `token`, one of at most 32 neighbours, and the same `value`, below 2^24, as this one, if it is active itself. All lanes call
/// this.
#[inline(always)]
pub fn lanes_alike(token: u32, value: u32, active: bool, lane: u32) -> u32 {
    // One key for all others: a match takes the longer, the more different keys there are.
    let lanes = match_any(if active { (token % 32) << 24 | value } else { u32::MAX });
    if active { lanes } else { 1 << lane }
}
