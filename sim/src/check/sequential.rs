//! `fence.sc`, which `membar` is (PTX ISA 8.6, "Fence-SC"): these fences have one order, and synchronise in it.
//!
//! A fence comes before another one if a strong write after the first was read before the second: the other order would
//! have a read see a write that comes after it. So the write carries what the fences that come before it have released, and
//! the reader's CTA keeps that for fences that come after the read. "After" is by happens-before, across threads: all
//! threads may fence, meet at a barrier, and leave one of them to write the flag, and the same on the reader's side.

use super::clock::{Clock, Entry};
use super::shadow::{FastMap, Scope, Site};
use super::{Checker, is_shared, shared_owner};
use crate::registers::lanes as each_lane;

/// What a CTA has read and no later fence has made use of, at most.
const HEARD: usize = 256;

/// The last fence of some lanes of a warp.
#[derive(Debug, Clone)]
struct Fence {
    warp: u32,
    tick: u32,
    lanes: u32,
    scope: Scope,
    /// What they knew, without what they did themselves.
    clock: Clock,
}

/// What fences before a strong write have released.
#[derive(Debug, Clone)]
struct Carried {
    /// Different for all writes.
    number: u64,
    scope: Scope,
    site: Site,
    clock: Clock,
}

/// That lanes of a warp have read it.
#[derive(Debug, Clone)]
struct Heard {
    warp: u32,
    tick: u32,
    lanes: u32,
    carried: Carried,
}

/// The state of these checks.
#[derive(Debug, Default)]
pub(super) struct Sequential {
    fences: Vec<Fence>,
    words: FastMap<u64, Vec<Carried>>,
    /// By CTA.
    heard: FastMap<u64, Vec<Heard>>,
    next: u64,
}

/// Those of `lanes` of a warp whose doing at a tick comes before what `mine` of warp `me` do now.
fn before(clock: &Clock, (me, mine): (u32, u32), (warp, tick, lanes): (u32, u32, u32)) -> u32 {
    let known = |lane: &usize| warp == me && mine >> lane & 1 != 0 || clock.knows(warp, tick, 1 << lane);
    each_lane(lanes).filter(known).fold(0, |all, lane| all | 1 << lane)
}

impl Checker {
    /// `fence.sc`: comes after what its threads know to have been read, and releases what they know.
    pub fn fence_sequentially(&mut self, warp: u32, lanes: u32, scope: Scope) {
        let Some(&site) = self.scopes.get(warp as usize) else {
            return;
        };
        for heard in self.sequential.heard.get(&site.cta).cloned().unwrap_or_default() {
            let Carried { scope: other, site: there, clock, .. } = heard.carried;
            if !scope.covers(site, there) || !other.covers(site, there) {
                continue;
            }
            for lane in each_lane(lanes) {
                let clock_of = self.snapshot_of_lane(warp, lane);
                if before(&clock_of, (warp, 1 << lane), (heard.warp, heard.tick, heard.lanes)) != 0 {
                    self.learn(warp, 1 << lane, |mine| mine.join(&clock));
                }
            }
        }
        let Some(state) = self.warps.get(warp as usize) else {
            return;
        };
        let fences = &mut self.sequential.fences;
        for fence in fences.iter_mut().filter(|fence| fence.warp == warp && fence.scope <= scope) {
            fence.lanes &= !lanes;
        }
        fences.retain(|fence| fence.lanes != 0);
        let views = state.views.iter().filter(|view| view.lanes & lanes != 0);
        fences.extend(views.map(|view| Fence {
            warp,
            tick: state.tick,
            lanes: view.lanes & lanes,
            scope,
            clock: view.clock.clone(),
        }));
        self.advance(warp);
    }

    fn snapshot_of_lane(&self, warp: u32, lane: usize) -> Clock {
        let views = self.warps.get(warp as usize).map_or(&[][..], |state| &state.views);
        views.iter().find(|view| view.lanes >> lane & 1 != 0).map_or_else(Clock::default, |view| view.clock.clone())
    }

    /// A strong write to words: what the fences before it have released goes with it.
    pub(super) fn carry(&mut self, warp: u32, lanes: u32, words: &[u64], chain: bool) {
        if self.sequential.fences.is_empty() && self.sequential.words.is_empty() {
            return;
        }
        let mut news: Vec<Carried> = Vec::new();
        let views = self.warps.get(warp as usize).map_or(&[][..], |state| &state.views);
        for view in views.iter().filter(|view| view.lanes & lanes != 0) {
            let mine = view.lanes & lanes;
            for fence in &self.sequential.fences {
                let known = before(&view.clock, (warp, mine), (fence.warp, fence.tick, fence.lanes));
                let Some(&site) = self.scopes.get(fence.warp as usize).filter(|_| known != 0) else {
                    continue;
                };
                let mut clock = fence.clock.clone();
                clock.learn(fence.warp, Entry::new(fence.tick, known));
                match news.iter_mut().find(|news| news.scope == fence.scope && news.site.cta == site.cta) {
                    Some(news) => news.clock.join(&clock),
                    None => {
                        self.sequential.next += 1;
                        news.push(Carried { number: self.sequential.next, scope: fence.scope, site, clock });
                    }
                }
            }
        }
        for word in words {
            let known = self.sequential.words.entry(*word).or_default();
            if !chain {
                known.clear();
            }
            for new in &news {
                known.retain(|known| known.scope != new.scope || known.site.cta != new.site.cta);
                known.push(new.clone());
            }
            if known.is_empty() {
                self.sequential.words.remove(word);
            }
        }
    }

    /// A strong read of a word.
    pub(super) fn hear(&mut self, warp: u32, lanes: u32, site: Site, word: u64) {
        let Some(carried) = self.sequential.words.get(&word) else {
            return;
        };
        let tick = self.warps.get(warp as usize).map_or(0, |state| state.tick);
        let heard = self.sequential.heard.entry(site.cta).or_default();
        for carried in carried.iter().filter(|carried| carried.site.cta != site.cta) {
            let same = |old: &&mut Heard| old.carried.number == carried.number && old.warp == warp;
            match heard.iter_mut().find(same) {
                // The first read counts: more comes after it.
                Some(old) if lanes & !old.lanes == 0 => {}
                _ => heard.push(Heard { warp, tick, lanes, carried: carried.clone() }),
            }
        }
        let surplus = heard.len().saturating_sub(HEARD);
        heard.drain(..surplus);
    }

    /// A CTA has exited: its fences come before nothing that is still to be written.
    pub(super) fn forget_sequence(&mut self, cta: u64, (first, count): (u32, u32)) {
        let sequential = &mut self.sequential;
        sequential.heard.remove(&cta);
        sequential.fences.retain(|fence| !(first..first + count).contains(&fence.warp));
        sequential.words.retain(|key, _| !is_shared(*key) || shared_owner(*key) != cta);
    }
}
