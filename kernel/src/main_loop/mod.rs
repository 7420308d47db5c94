//! What depends on the number format: how tokens come to other ranks, what a stage holds besides its two tiles, the products, and the end of linear 1.
//!
//! The roles, the order of work, the protocol, linear 2's stores and combine do not know the format.

pub mod activation;
pub mod linear2;

#[cfg(feature = "bf16")]
mod bf16;
#[cfg(feature = "fp8")]
mod fp8;

#[cfg(feature = "bf16")]
pub use bf16::Bf16 as Loop;
#[cfg(feature = "fp8")]
pub use fp8::Fp8 as Loop;

use crate::consumer::Consumer;
use crate::cta::{Cta, Ring};
use crate::device::address::SharedAddress;
use crate::launch::Launch;
use crate::task::{Block, Task};

/// The main loop of a format.
pub trait MainLoop {
    /// Where a task's scales are.
    type Scales;

    /// Consumers, at the start, together with those of all CTAs: in a format with scales makes records of this rank's tokens where all ranks read them, and writes the
    /// shared experts' rows.
    fn quantise(launch: &Launch, lane: u32);

    /// Producer: whether all rows of a linear 1 task's tile are in the pool.
    fn rows_there(launch: &Launch, task: &Task) -> bool;

    /// Dispatch: waits until the records of rank `source` are there, if this lane `waits`. All lanes call this.
    fn wait_for_records(launch: &Launch, waits: bool, source: u32);

    /// Address of a token of rank `source`: [`crate::format::Format::record_bytes`].
    fn token(launch: &Launch, source: u32, token: u32) -> u64;

    /// Dispatch: stores what of a token's scales lies in a piece of its record, `bytes` bytes from `at` on, which has landed at `piece`.
    fn store_scales(launch: &Launch, piece: SharedAddress, at: u32, bytes: u32, pool_row: u32);

    /// Producer: where a task's scales are.
    fn scales(launch: &Launch, task: &Task) -> Self::Scales;

    /// Bytes of a stage's scales for a token tile of this width.
    fn scale_bytes(width: u32) -> u32;

    /// Producer: loads the scales of a stage's weight tile.
    fn load_weight_scales(scales: &Self::Scales, cta: Cta, stage: u32, at: Block);

    /// Producer: loads the scales of a stage's token tile.
    fn load_token_scales(scales: &Self::Scales, cta: Cta, task: &Task, stage: u32, at: Block);

    /// Consumers: the products of a task, and their results into the intermediate pool or to the tokens' ranks. Every warp calls this.
    fn run(consumer: Consumer<'_>, task: &Task, ring: &mut Ring);
}
