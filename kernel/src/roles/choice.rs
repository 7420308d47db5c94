//! A token's choices of experts, checked before any becomes an address.

use crate::device::global::ld_weak_u32;
use crate::device::warp::match_any;
use crate::launch::Launch;
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

/// Checks the entries of a warp: each `active` lane looks at `(token, k)`, lanes with the same `token` at different `k`. All lanes call this.
#[inline(always)]
pub fn choose(launch: &Launch, token: u32, k: u32, active: bool, lane: u32) -> Choice {
    let shape = &launch.params().shape;
    // SAFETY: active lanes stay within the [tokens][top_k] ids.
    let id = if active { unsafe { ld_weak_u32(launch.topk_id(token * shape.top_k + k)) } } else { u32::MAX };
    let in_range = id < shape.experts;
    // Lanes of one token meet at their expert; every other lane is alone. Warps hold at most 32 neighbouring tokens.
    let key = if in_range { (token % 32) << 24 | id } else { u32::MAX - lane };
    let first = match_any(key).trailing_zeros() == lane;
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
