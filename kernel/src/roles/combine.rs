//! Combine: the sum of a token's results, in the order of its choices, then the shared experts'.

use crate::cta::{Cta, Ring};
use crate::device::barrier::bar_warp_sync;
use crate::device::bulk::bulk_load;
use crate::device::convert::bf16x2;
use crate::device::fence::fence_proxy_async;
use crate::device::global::{ld_acquire_sys_u32, st_weak_v4};
use crate::device::special::ctas;
use crate::device::warp::ballot;
use crate::launch::Launch;
use crate::roles::choice::{Choice, choose};
use crate::schedule::combine_tokens;
use crate::shared::{COMBINE_BUFFERS, COMBINE_BYTES, CONSUMER_WARPS, WARP};
use crate::status::{Stage, Timeout};

/// Columns of one piece of a row; a warp sums piece by piece.
pub const COLUMNS_PER_PIECE: u32 = COMBINE_BYTES / 2;
/// Columns of one 16-byte access.
const COLUMNS_PER_LANE: u32 = 8;
/// Accesses of one lane to a whole piece.
const GROUPS: usize = (COLUMNS_PER_PIECE / (COLUMNS_PER_LANE * WARP)) as usize;

/// A consumer warp that combines.
pub struct Combiner<'a> {
    launch: &'a Launch,
    cta: Cta,
    warp: u32,
    lane: u32,
    ring: Ring,
}

/// A piece of one token's result rows.
struct Piece {
    token: u32,
    first_column: u32,
    columns: u32,
}

impl<'a> Combiner<'a> {
    /// `warp` counts all consumer warps of the CTA.
    #[inline(always)]
    pub fn new(launch: &'a Launch, cta: Cta, warp: u32, lane: u32) -> Self {
        Self { launch, cta, warp, lane, ring: Ring::new() }
    }

    /// One chunk of tokens: the CTA's warps share its pieces.
    #[inline(always)]
    pub fn combine(&mut self, chunk: u32) {
        let hidden = self.launch.params().shape.hidden;
        let all = self.launch.tokens();
        let tokens = combine_tokens(all, ctas());
        // The last CTA of a cluster may have none.
        let first = (chunk * tokens).min(all);
        let pieces = hidden.div_ceil(COLUMNS_PER_PIECE);
        let items = tokens.min(all - first) * pieces;
        let mut item = self.warp;
        while item < items {
            let first_column = item % pieces * COLUMNS_PER_PIECE;
            self.sum(Piece {
                token: first + item / pieces,
                first_column,
                columns: COLUMNS_PER_PIECE.min(hidden - first_column),
            });
            item += CONSUMER_WARPS;
        }
    }

    /// Sums one piece over the token's results, at most [`COMBINE_BUFFERS`] of them on their way at once.
    #[inline(always)]
    fn sum(&mut self, piece: Piece) {
        let mut pending = self.wait_for_results(piece.token);
        let mut to_load = pending;
        let mut loading = self.ring;
        for _ in 0..COMBINE_BUFFERS {
            self.load_next(&piece, &mut to_load, &mut loading);
        }
        // SAFETY: zeros are valid f32.
        let mut sums: [[f32; COLUMNS_PER_LANE as usize]; GROUPS] = unsafe { core::mem::zeroed() };
        while pending != 0 {
            let buffer = self.warp * COMBINE_BUFFERS + self.ring.slot;
            self.cta.combine_full(buffer).wait(self.ring.parity);
            unroll!(GROUP < GROUPS, {
                let column = self.column::<GROUP>();
                if column < piece.columns {
                    // SAFETY: the piece has landed.
                    let values = unsafe { self.cta.combine_buffer(buffer).offset(column * 2).load_v4() };
                    unroll!(PAIR < 4, {
                        sums[GROUP][2 * PAIR] += f32::from_bits(values[PAIR] << 16);
                        sums[GROUP][2 * PAIR + 1] += f32::from_bits(values[PAIR] & 0xffff_0000);
                    });
                }
            });
            bar_warp_sync();
            self.ring.advance(COMBINE_BUFFERS);
            self.load_next(&piece, &mut to_load, &mut loading);
            pending &= pending - 1;
        }
        let output = self.launch.output_row(piece.token).wrapping_add(piece.first_column as usize * 2);
        unroll!(GROUP < GROUPS, {
            let column = self.column::<GROUP>();
            if column < piece.columns {
                let [a, b, c, d, e, f, g, h] = sums[GROUP];
                let values = [bf16x2(a, b), bf16x2(c, d), bf16x2(e, f), bf16x2(g, h)];
                // SAFETY: the output has a row for every token.
                unsafe { st_weak_v4(output.wrapping_add(column as usize * 2), values) };
            }
        });
    }

    /// First column of this lane's access `GROUP`, within a piece.
    #[inline(always)]
    fn column<const GROUP: usize>(&self) -> u32 {
        (GROUP as u32 * WARP + self.lane) * COLUMNS_PER_LANE
    }

    /// Waits until all results of a token are there; returns the set of its slots.
    #[inline(always)]
    fn wait_for_results(&self, token: u32) -> u64 {
        let shape = &self.launch.params().shape;
        let rank = self.launch.params().rank;
        let mut chosen = false;
        if let Choice::Expert(expert) = choose(self.launch, token, self.lane, self.lane < shape.top_k, self.lane) {
            chosen = true;
            self.wait_for_flag(expert, expert / shape.routed_experts(), expert);
        }
        if self.lane < shape.shared_experts {
            let flag = shape.experts + self.lane;
            self.wait_for_flag(flag, rank, flag);
        }
        let slots = ballot(chosen) as u64;
        bar_warp_sync();
        slots | ((1 << shape.shared_experts) - 1) << shape.top_k
    }

    #[inline(always)]
    fn wait_for_flag(&self, flag: u32, rank: u32, subject: u32) {
        let params = self.launch.params();
        let address = self.launch.symmetric(params.rank, params.symmetric.flags, flag as u64);
        let epoch = self.launch.epoch();
        let missing = || Timeout { stage: Stage::Results, rank, subject };
        // SAFETY: a flag of this rank.
        self.launch.wait_until(missing, || unsafe { ld_acquire_sys_u32(address) } == epoch);
        // The results were acquired by an ordinary load, and will be read by bulk copies.
        fence_proxy_async();
    }

    /// Starts to load the next slot's piece, if one is left.
    #[inline(always)]
    fn load_next(&self, piece: &Piece, to_load: &mut u64, ring: &mut Ring) {
        if *to_load == 0 {
            return;
        }
        if self.lane == 0 {
            let params = self.launch.params();
            let row = piece.token as u64 * params.shape.slots() as u64 + to_load.trailing_zeros() as u64;
            let at = row * self.launch.row_bytes() as u64 + piece.first_column as u64 * 2;
            let buffer = self.warp * COMBINE_BUFFERS + ring.slot;
            let full = self.cta.combine_full(buffer);
            full.arrive_expect_tx(piece.columns * 2);
            // SAFETY: the row is this rank's, complete, and all lanes are done with the buffer.
            unsafe {
                let source = self.launch.symmetric(params.rank, params.symmetric.combine, at);
                bulk_load(self.cta.combine_buffer(buffer), source, piece.columns * 2, full);
            }
        }
        *to_load &= *to_load - 1;
        ring.advance(COMBINE_BUFFERS);
    }
}
