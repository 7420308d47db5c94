//! Combine: the sum of a token's results, in the order of its choices, then the shared experts'.

use crate::cta::{CONSUMER_WARPS, Cta, Ring, TaskReader};
use crate::device::barrier::bar_warp_sync;
use crate::device::bulk::bulk_load;
use crate::device::convert::bf16x2;
use crate::device::fence::fence_proxy_async_global;
use crate::device::global::{ld_acquire_sys_u32, st_weak_v4};
use crate::device::special::ctas;
use crate::device::warp::ballot;
use crate::launch::Launch;
use crate::roles::choice::{Choice, choose};
use crate::schedule::combine_tokens;
use crate::shared::{COMBINE_BUFFERS, COMBINE_BYTES};
use crate::status::{Stage, Timeout};
use crate::warps::WARP;

/// Columns of one piece of a row; a warp sums piece by piece.
const COLUMNS_PER_PIECE: u32 = COMBINE_BYTES / 2;
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
    /// The buffer that lands next.
    landing: Ring,
    /// The buffer that is free next.
    free: Ring,
    /// Buffers between the two.
    under_way: u32,
}

/// A piece of one token's result rows.
struct Piece {
    token: u32,
    first_column: u32,
    columns: u32,
    /// The slots that hold a result.
    slots: u64,
    /// Those of them whose loads have not begun.
    to_load: u64,
}

impl<'a> Combiner<'a> {
    /// `warp` counts all consumer warps of the CTA.
    #[inline(always)]
    pub fn new(launch: &'a Launch, cta: Cta, warp: u32, lane: u32) -> Self {
        Self { launch, cta, warp, lane, landing: Ring::new(), free: Ring::new(), under_way: 0 }
    }

    /// One chunk of tokens: each of the CTA's warps has an even share of its pieces, those of one token after the other. While one piece is
    /// summed, the next is on its way. The task slot is given back with the last piece: the next chunk is that of a CTA which is about to have no other.
    #[inline(always)]
    pub fn combine(&mut self, chunk: u32, tasks: &mut TaskReader) {
        mark!(self.launch, Combine, chunk);
        let hidden = self.launch.params().shape.hidden;
        let all = self.launch.tokens();
        let tokens = combine_tokens(all, ctas());
        // The last CTA of a cluster may have none.
        let first = (chunk * tokens).min(all);
        let per_token = hidden.div_ceil(COLUMNS_PER_PIECE);
        let pieces = tokens.min(all - first) * per_token;
        let share = pieces.div_ceil(CONSUMER_WARPS);
        let mut index = (self.warp * share).min(pieces);
        let end = (index + share).min(pieces);
        let (mut next, mut known, mut released) = (None, None, false);
        loop {
            let current = next.take();
            if index < end {
                let (token, first_column) = (first + index / per_token, index % per_token * COLUMNS_PER_PIECE);
                let slots = match known {
                    Some((of, slots)) if of == token => slots,
                    _ => self.wait_for_results(token),
                };
                known = Some((token, slots));
                let columns = COLUMNS_PER_PIECE.min(hidden - first_column);
                next = Some(Piece { token, first_column, columns, slots, to_load: slots });
                index += 1;
            }
            if next.is_none() && !released {
                released = true;
                tasks.release_warp(self.lane);
            }
            match current {
                Some(piece) => self.sum(piece, &mut next),
                None if next.is_some() => {}
                None => return,
            }
        }
    }

    /// Sums one piece over the token's results; buffers that get free are the next one's.
    #[inline(always)]
    fn sum(&mut self, mut piece: Piece, next: &mut Option<Piece>) {
        // SAFETY: zeros are valid f32.
        let mut sums: [[f32; COLUMNS_PER_LANE as usize]; GROUPS] = unsafe { core::mem::zeroed() };
        while piece.slots != 0 {
            self.load(&mut piece);
            if let Some(next) = next {
                self.load(next);
            }
            let buffer = self.warp * COMBINE_BUFFERS + self.landing.slot;
            self.cta.combine_full(buffer).wait(self.landing.parity);
            // All are loaded before the first is added.
            // SAFETY: zeros are valid u32.
            let mut values: [[u32; COLUMNS_PER_LANE as usize / 2]; GROUPS] = unsafe { core::mem::zeroed() };
            unroll!(GROUP < GROUPS, {
                let column = self.column::<GROUP>();
                if column < piece.columns {
                    // SAFETY: the piece has landed.
                    values[GROUP] = unsafe { self.cta.combine_buffer(buffer).offset(column * 2).load_v4() };
                }
            });
            unroll!(GROUP < GROUPS, {
                unroll!(PAIR < 4, {
                    sums[GROUP][2 * PAIR] += f32::from_bits(values[GROUP][PAIR] << 16);
                    sums[GROUP][2 * PAIR + 1] += f32::from_bits(values[GROUP][PAIR] & 0xffff_0000);
                });
            });
            bar_warp_sync();
            self.landing.advance(COMBINE_BUFFERS);
            self.under_way -= 1;
            piece.slots &= piece.slots - 1;
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
        mark!(self.launch, WaitForResults);
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
        mark!(self.launch, Combine);
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
        fence_proxy_async_global();
    }

    /// Starts to load a piece's slots, as many as there are free buffers for. A piece before it has begun to load all of its slots.
    #[inline(always)]
    fn load(&mut self, piece: &mut Piece) {
        let params = self.launch.params();
        while self.under_way < COMBINE_BUFFERS && piece.to_load != 0 {
            if self.lane == 0 {
                let row = piece.token as u64 * params.shape.slots() as u64 + piece.to_load.trailing_zeros() as u64;
                let at = row * self.launch.row_bytes() as u64 + piece.first_column as u64 * 2;
                let buffer = self.warp * COMBINE_BUFFERS + self.free.slot;
                let full = self.cta.combine_full(buffer);
                full.arrive_expect_tx(piece.columns * 2);
                // SAFETY: the row is this rank's, complete, and all lanes are done with the buffer.
                unsafe {
                    let source = self.launch.symmetric(params.rank, params.symmetric.combine, at);
                    bulk_load(self.cta.combine_buffer(buffer), source, piece.columns * 2, full);
                }
            }
            piece.to_load &= piece.to_load - 1;
            self.free.advance(COMBINE_BUFFERS);
            self.under_way += 1;
        }
    }
}
