//! Route: each valid (token, k) gets a slot in its expert's list on the rank that owns the expert.
//!
//! Dispatch warps claim chunks of tokens; while tokens are few, one chunk is all of them. The warp that finishes a rank's last chunk publishes
//! the rank's counts to every rank.

use crate::device::atomic::{atom_add_acq_rel_gpu, atom_add_relaxed_gpu, red_min_relaxed_gpu_u64};
use crate::device::barrier::bar_warp_sync;
use crate::device::global::{ld_relaxed_gpu_u32, ld_weak_f32, st_relaxed_sys_u64, st_weak_u32, st_weak_u64};
use crate::device::warp::{ballot, shfl_idx};
use crate::launch::Launch;
use crate::layout::{FOLLOWER, ListPlace, RowMeta};
use crate::roles::choice::{Choice, check, lanes_alike, load};
use crate::schedule::{ROUTE_PASSES, route_chunks, route_step, route_tokens};
use crate::status::BadChoice;
use crate::warps::WARP;

const PASSES: usize = ROUTE_PASSES as usize;
/// Counts that a lane has under way at once.
const COUNTS_AT_ONCE: usize = 8;

/// Routes chunks until none is left.
#[inline(always)]
pub fn route(launch: &Launch, lane: u32) {
    let counters = &launch.params().workspace.counter;
    let (tokens, top_k) = (launch.tokens(), launch.params().shape.top_k);
    let (per_chunk, chunks) = (route_tokens(tokens, top_k), route_chunks(tokens, top_k));
    let mut claimed = launch.claim(counters.route_ticket, lane);
    // Under way together with the claim: while tokens are few, nothing else is there to do.
    let mut chosen = Chosen::load(launch, 0, per_chunk.min(tokens), lane);
    loop {
        let chunk = shfl_idx(claimed, 0);
        if chunk >= chunks {
            return;
        }
        mark!(launch, Route, chunk);
        let (mut token, end) = (chunk * per_chunk, tokens.min((chunk + 1) * per_chunk));
        if chunk > 0 {
            chosen = Chosen::load(launch, token, end, lane);
        }
        while token < end {
            let next = Chosen::load(launch, token + route_step(top_k), end, lane);
            chosen.send(launch, token, lane);
            chosen = next;
            token += route_step(top_k);
        }
        // The lists of the whole warp, then of all warps, come before the counts that are published.
        bar_warp_sync();
        let mut routed = 1;
        if lane == 0 && chunks > 1 {
            launch.fence();
            // SAFETY: a counter of this launch.
            routed += unsafe { atom_add_acq_rel_gpu(launch.counter(counters.routed_chunks, 0), 1) };
        }
        if shfl_idx(routed, 0) == chunks {
            mark!(launch, PublishCounts);
            publish(launch, lane);
        }
        claimed = launch.claim(counters.route_ticket, lane);
    }
}

/// The token and the choice that a lane looks at in a pass over the tokens from `first` on.
#[inline(always)]
fn choice_at(top_k: u32, first: u32, pass: usize, lane: u32) -> (u32, u32) {
    let lanes = top_k.next_power_of_two();
    (first + (pass as u32 * WARP + lane) / lanes, lane % lanes)
}

/// What a lane has loaded of the choices of a few tokens, one in each pass.
struct Chosen {
    ids: [u32; PASSES],
    weights: [f32; PASSES],
}

impl Chosen {
    /// Starts to load the choices of the tokens from `first` on that are below `end`.
    #[inline(always)]
    fn load(launch: &Launch, first: u32, end: u32, lane: u32) -> Self {
        let top_k = launch.params().shape.top_k;
        // SAFETY: zeros are valid.
        let mut chosen: Self = unsafe { core::mem::zeroed() };
        unroll!(PASS < PASSES, {
            let (token, k) = choice_at(top_k, first, PASS, lane);
            let exists = k < top_k && token < end;
            chosen.ids[PASS] = load(launch, token, k, exists);
            if exists {
                // SAFETY: within the [tokens][top_k] weights.
                chosen.weights[PASS] = unsafe { ld_weak_f32(launch.topk_weight(token * top_k + k)) };
            }
        });
        chosen
    }

    /// Checks the choices, and puts each into its expert's list.
    #[inline(always)]
    fn send(&self, launch: &Launch, first: u32, lane: u32) {
        let params = launch.params();
        let shape = &params.shape;
        // SAFETY: zeros are valid.
        let (mut experts, mut slots): ([u32; PASSES], [u32; PASSES]) = unsafe { core::mem::zeroed() };
        // All slots are under way before the first is needed.
        unroll!(PASS < PASSES, {
            let (token, k) = choice_at(shape.top_k, first, PASS, lane);
            experts[PASS] = u32::MAX;
            match check(shape, self.ids[PASS], token, lane) {
                Choice::Expert(expert) => {
                    experts[PASS] = expert;
                    let sent = launch.counter(params.workspace.counter.sent, expert);
                    // SAFETY: `expert` is below the number of experts.
                    slots[PASS] = unsafe { atom_add_relaxed_gpu(sent, 1) };
                }
                Choice::Bad(fault) => {
                    let report = BadChoice { layer: params.layer, token, k, fault }.pack();
                    // SAFETY: the status words lie in the workspace.
                    unsafe { red_min_relaxed_gpu_u64(&raw mut (*launch.status()).bad_choice, report) };
                }
                Choice::None => {}
            }
        });
        // SAFETY: zeros are valid.
        let mut followers: [u32; PASSES] = unsafe { core::mem::zeroed() };
        // A single rank has no way through this.
        if shape.ranks > 1 {
            followers = Self::send_followers(launch, &experts, &slots, first, lane);
        }
        unroll!(PASS < PASSES, {
            let (token, k) = choice_at(shape.top_k, first, PASS, lane);
            if experts[PASS] < shape.experts {
                let (owner, local) = (experts[PASS] / shape.routed_experts(), experts[PASS] % shape.routed_experts());
                let combine_row = token * shape.slots() + k;
                let entry = RowMeta { combine_row, rank: followers[PASS], weight: self.weights[PASS] };
                let place = launch.list_place(owner, params.rank, local, slots[PASS]);
                // SAFETY: a token names an expert at most once, so that the slot is below the maximum of tokens.
                unsafe { st_weak_u64(place, entry.pack()) };
            }
        });
    }

    /// Finds out which of a lane's choices, one in each pass, follow another that goes to the same rank for the same token, and tells that rank where;
    /// how many follow each, or [`FOLLOWER`]. An expert that does not exist is no choice. All lanes call this.
    #[inline(always)]
    fn send_followers(
        launch: &Launch,
        experts: &[u32; PASSES],
        slots: &[u32; PASSES],
        first: u32,
        lane: u32,
    ) -> [u32; PASSES] {
        let params = launch.params();
        let shape = &params.shape;
        // SAFETY: zeros are valid. The lanes whose choices go to the same rank, for the same token.
        let (mut together, mut followers): ([u32; PASSES], [u32; PASSES]) = unsafe { core::mem::zeroed() };
        unroll!(PASS < PASSES, {
            let (token, _) = choice_at(shape.top_k, first, PASS, lane);
            let owner = experts[PASS] / shape.routed_experts();
            // Rows of the own rank do not cross: as many CTAs as there are rows may copy them.
            let crosses = experts[PASS] < shape.experts && owner != params.rank;
            together[PASS] = lanes_alike(token, owner, crosses, lane);
        });
        if ballot(together.iter().any(|lanes| lanes.count_ones() > 1)) == 0 {
            return followers;
        }
        let lanes = shape.top_k.next_power_of_two();
        let mut leads = [u32::MAX; PASSES];
        for k in 0..lanes {
            let other = lane / lanes * lanes + k;
            unroll!(PASS < PASSES, {
                let expert = shfl_idx(experts[PASS], other);
                if together[PASS] >> other & 1 == 1 {
                    leads[PASS] = leads[PASS].min(expert << WARP.ilog2() | other);
                }
            });
        }
        unroll!(PASS < PASSES, {
            let leader = leads[PASS] % WARP;
            followers[PASS] = together[PASS].count_ones() - 1;
            if leader != lane {
                followers[PASS] = FOLLOWER;
                let (token, _) = choice_at(shape.top_k, first, PASS, lane);
                let (owner, local) = (experts[PASS] / shape.routed_experts(), experts[PASS] % shape.routed_experts());
                let number = (together[PASS] & !(1 << leader) & ((1 << lane) - 1)).count_ones();
                let place = launch.follower_place(owner, params.rank, token, number);
                // SAFETY: a token has fewer followers than choices.
                unsafe { st_weak_u32(place, ListPlace { expert: local, slot: slots[PASS] }.pack()) };
            }
        });
        followers
    }
}

/// Tells every rank which layer this rank has launched and where its hidden states are, then how many rows it gets for each of its experts.
#[inline(always)]
fn publish(launch: &Launch, lane: u32) {
    let params = launch.params();
    let shape = &params.shape;
    if lane < shape.ranks {
        let distance = launch.hidden_states().wrapping_sub(launch.symmetric_base(params.rank));
        // SAFETY: every rank has a place for every source's distance.
        unsafe { st_weak_u64(launch.hidden_distance(lane, params.rank), distance) };
        // SAFETY: every rank has a place for every source's layer.
        unsafe { st_relaxed_sys_u64(launch.layer_place(lane, params.rank), launch.launched_layer()) };
    }
    bar_warp_sync();
    let mut first = lane;
    while first < shape.experts {
        // SAFETY: zeros are valid u32.
        let mut counts: [u32; COUNTS_AT_ONCE] = unsafe { core::mem::zeroed() };
        unroll!(COUNT < COUNTS_AT_ONCE, {
            let expert = (first + COUNT as u32 * WARP).min(shape.experts - 1);
            // SAFETY: a counter of this launch.
            counts[COUNT] = unsafe { ld_relaxed_gpu_u32(launch.counter(params.workspace.counter.sent, expert)) };
        });
        // The counts are under way while the lists are.
        launch.fence();
        unroll!(COUNT < COUNTS_AT_ONCE, {
            let expert = first + COUNT as u32 * WARP;
            if expert < shape.experts {
                let (owner, local) = (expert / shape.routed_experts(), expert % shape.routed_experts());
                let place = launch.symmetric(owner, params.symmetric.counts, launch.count_index(params.rank, local));
                let word = (launch.epoch() as u64) << 32 | counts[COUNT] as u64;
                // SAFETY: every rank has a place for every source's count of each of its experts.
                unsafe { st_relaxed_sys_u64(place, word) };
            }
        });
        first += COUNTS_AT_ONCE as u32 * WARP;
    }
}
