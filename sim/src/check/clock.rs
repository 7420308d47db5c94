//! Vector clocks: what an agent knows to have happened before.
//!
//! A warp counts ticks; its lanes share the count. An entry says up to which tick the accesses of all lanes are known,
//! and of some lanes up to which later one. Where two entries name different lanes, their union takes the later tick:
//! that may hide a race, but never invents one.

use std::rc::Rc;

use crate::registers::ALL;

/// What is known of one warp (or, in parts of eight lanes, of the four warps' wgmmas of a warpgroup).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Entry {
    all: u32,
    tick: u32,
    lanes: u32,
}

impl Entry {
    pub fn new(tick: u32, lanes: u32) -> Self {
        if lanes == ALL { Self { all: tick, tick: 0, lanes: 0 } } else { Self { all: 0, tick, lanes } }
    }

    /// Whether what `lanes` did at `tick` is known.
    #[inline]
    pub fn covers(self, tick: u32, lanes: u32) -> bool {
        tick <= self.all || lanes & !if tick <= self.tick { self.lanes } else { 0 } == 0
    }

    #[inline]
    fn joined(self, other: Self) -> Self {
        let mut all = self.all.max(other.all);
        let (mut tick, mut lanes) = (self.tick.max(other.tick), 0);
        for part in [self, other] {
            if part.tick > all {
                lanes |= part.lanes;
            }
        }
        if lanes == ALL {
            all = all.max(self.tick.min(other.tick));
            lanes = if self.tick == other.tick {
                all = tick;
                0
            } else if self.tick > other.tick {
                self.lanes
            } else {
                other.lanes
            };
        }
        if tick <= all || lanes == 0 {
            (tick, lanes) = (0, 0);
        }
        Self { all, tick, lanes }
    }
}

/// Everything that an agent knows. Clones share their parts until one is changed.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock {
    warps: Rc<Vec<Entry>>,
    /// The same for ordinary accesses that a proxy fence has made visible to the asynchronous proxy.
    proxied: Rc<Vec<Entry>>,
    /// Strong writes that were read: they come before, though what their warp did before them does not.
    seen: Rc<Vec<Entry>>,
    /// Of asynchronous operations, by the agent that stands for their completion.
    completed: Rc<Vec<u32>>,
}

impl Clock {
    pub fn join(&mut self, other: &Self) {
        join_entries(&mut self.warps, &other.warps);
        join_entries(&mut self.proxied, &other.proxied);
        join_entries(&mut self.seen, &other.seen);
        if Rc::ptr_eq(&self.completed, &other.completed) {
            return;
        }
        let news = other.completed.len() > self.completed.len()
            || self.completed.iter().zip(other.completed.iter()).any(|(mine, theirs)| mine < theirs);
        if news {
            let mine = Rc::make_mut(&mut self.completed);
            if mine.len() < other.completed.len() {
                mine.resize(other.completed.len(), 0);
            }
            for (mine, theirs) in mine.iter_mut().zip(other.completed.iter()) {
                *mine = (*mine).max(*theirs);
            }
        }
    }

    /// Learns what lanes of a warp did up to a tick.
    pub fn learn(&mut self, warp: u32, entry: Entry) {
        learn(&mut self.warps, warp, entry);
    }

    /// Has read what lanes of a warp wrote at a tick.
    pub fn see(&mut self, warp: u32, tick: u32, lanes: u32) {
        if !self.has_seen(warp, tick, lanes) {
            learn(&mut self.seen, warp, Entry::new(tick, lanes));
        }
    }

    pub fn has_seen(&self, warp: u32, tick: u32, lanes: u32) -> bool {
        self.seen.get(warp as usize).is_some_and(|entry| entry.covers(tick, lanes))
    }

    /// Learns that the operations of an agent are complete up to a tick.
    pub fn learn_completed(&mut self, agent: u32, tick: u32) {
        if self.completed.get(agent as usize).is_none_or(|known| *known < tick) {
            let completed = Rc::make_mut(&mut self.completed);
            if completed.len() <= agent as usize {
                completed.resize(agent as usize + 1, 0);
            }
            completed[agent as usize] = tick;
        }
    }

    /// Makes all that is known visible to the asynchronous proxy.
    pub fn fence_proxy(&mut self) {
        join_entries(&mut self.proxied, &self.warps);
    }

    /// Knows of ordinary accesses only what another clock did.
    pub fn forget_warps(&mut self, other: &Self) {
        self.warps = other.warps.clone();
    }

    #[inline]
    pub fn knows(&self, warp: u32, tick: u32, lanes: u32) -> bool {
        self.warps.get(warp as usize).is_some_and(|entry| entry.covers(tick, lanes))
    }

    #[inline]
    pub fn knows_proxied(&self, warp: u32, tick: u32, lanes: u32) -> bool {
        self.proxied.get(warp as usize).is_some_and(|entry| entry.covers(tick, lanes))
    }

    #[inline]
    pub fn knows_completed(&self, agent: u32, tick: u32) -> bool {
        self.completed.get(agent as usize).is_some_and(|known| *known >= tick)
    }
}

fn learn(entries: &mut Rc<Vec<Entry>>, warp: u32, entry: Entry) {
    let entries = Rc::make_mut(entries);
    if entries.len() <= warp as usize {
        entries.resize(warp as usize + 1, Entry::default());
    }
    let known = &mut entries[warp as usize];
    *known = known.joined(entry);
}

fn join_entries(mine: &mut Rc<Vec<Entry>>, theirs: &Rc<Vec<Entry>>) {
    if Rc::ptr_eq(mine, theirs) || theirs.is_empty() {
        return;
    }
    if mine.is_empty() {
        *mine = theirs.clone();
        return;
    }
    let news = theirs.len() > mine.len()
        || mine.iter().zip(theirs.iter()).any(|(mine, theirs)| mine != theirs && mine.joined(*theirs) != *mine);
    if news {
        let mine = Rc::make_mut(mine);
        if mine.len() < theirs.len() {
            mine.resize(theirs.len(), Entry::default());
        }
        for (mine, theirs) in mine.iter_mut().zip(theirs.iter()) {
            *mine = mine.joined(*theirs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lanes_are_known_apart() {
        let entry = Entry::new(3, ALL).joined(Entry::new(5, 1));
        assert!(entry.covers(3, ALL) && entry.covers(5, 1) && !entry.covers(4, 2) && !entry.covers(6, 1));
        assert_eq!(Entry::new(5, 0xffff).joined(Entry::new(5, 0xffff_0000)), Entry::new(5, ALL));
    }

    #[test]
    fn a_fence_makes_what_is_known_visible_to_the_proxy() {
        let mut clock = Clock::default();
        clock.learn(2, Entry::new(4, 1));
        assert!(clock.knows(2, 4, 1) && !clock.knows_proxied(2, 4, 1));
        clock.fence_proxy();
        clock.learn(2, Entry::new(5, 1));
        assert!(clock.knows_proxied(2, 4, 1) && !clock.knows_proxied(2, 5, 1));
    }

    proptest! {
        /// A joined entry knows all that either part knew.
        #[test]
        fn joins_lose_nothing(parts in prop::collection::vec((1u32..6, prop_oneof![Just(ALL), any::<u32>()]), 1..6), tick in 1u32..6, lane in 0u32..32) {
            let joined = parts.iter().fold(Entry::default(), |known, (tick, lanes)| known.joined(Entry::new(*tick, *lanes)));
            let wanted = parts.iter().any(|(known, lanes)| tick <= *known && lanes >> lane & 1 != 0);
            prop_assert!(!wanted || joined.covers(tick, 1 << lane));
        }
    }
}
