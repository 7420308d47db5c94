//! Vector clocks: what an agent knows to have happened before.
//!
//! A warp counts ticks; its lanes share the count. An entry says up to which tick the accesses of all lanes are known,
//! and of some lanes up to which later one. Where two entries name different lanes, their union takes the later tick:
//! that may hide a race, but never invents one.

use std::sync::Arc;

use crate::program::Space;
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

    /// Whether what some lane did at `tick` or later is known.
    pub fn reaches(self, tick: u32) -> bool {
        tick <= self.all || tick <= self.tick && self.lanes != 0
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

/// What joins with another: the least that knows all of both.
trait Lattice: Copy + Default + PartialEq {
    fn join(self, other: Self) -> Self;
}

impl Lattice for Entry {
    #[inline]
    fn join(self, other: Self) -> Self {
        self.joined(other)
    }
}

impl Lattice for u32 {
    #[inline]
    fn join(self, other: Self) -> Self {
        self.max(other)
    }
}

/// Agents of one chunk: about those of a CTA, which learns of most others' news never or all at once.
const CHUNK: usize = 16;

type Chunk<T> = Option<Arc<[T; CHUNK]>>;

/// A value for each agent, in chunks that clones share.
#[derive(Debug, Clone, Default)]
struct Known<T>(Arc<Vec<Chunk<T>>>);

impl<T: Lattice> Known<T> {
    #[inline]
    fn get(&self, agent: u32) -> Option<T> {
        let chunk = self.0.get(agent as usize / CHUNK)?.as_ref()?;
        Some(chunk[agent as usize % CHUNK])
    }

    fn learn(&mut self, agent: u32, news: T) {
        let known = self.get(agent).unwrap_or_default();
        let joined = known.join(news);
        if joined == known {
            return;
        }
        let chunks = Arc::make_mut(&mut self.0);
        let index = agent as usize / CHUNK;
        if chunks.len() <= index {
            chunks.resize(index + 1, None);
        }
        let chunk = chunks[index].get_or_insert_with(|| Arc::new([T::default(); CHUNK]));
        Arc::make_mut(chunk)[agent as usize % CHUNK] = joined;
    }

    fn join(&mut self, other: &Self) {
        if Arc::ptr_eq(&self.0, &other.0) {
            return;
        }
        if self.0.is_empty() {
            self.0 = other.0.clone();
            return;
        }
        for (index, theirs) in other.0.iter().enumerate() {
            let Some(theirs) = theirs else {
                continue;
            };
            let news = match self.0.get(index).and_then(Option::as_ref) {
                None => theirs.clone(),
                Some(mine) if Arc::ptr_eq(mine, theirs) => continue,
                Some(mine) => {
                    let joined: [T; CHUNK] = std::array::from_fn(|agent| mine[agent].join(theirs[agent]));
                    if joined == **mine {
                        continue;
                    }
                    // Whoever knows the same shares it, and need not be compared again.
                    if joined == **theirs { theirs.clone() } else { Arc::new(joined) }
                }
            };
            let chunks = Arc::make_mut(&mut self.0);
            if chunks.len() <= index {
                chunks.resize(index + 1, None);
            }
            chunks[index] = Some(news);
        }
    }
}

/// Everything that an agent knows. Clones share their parts until one is changed.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock {
    warps: Known<Entry>,
    /// The same for ordinary accesses to global and to shared memory that a proxy fence has made visible to the
    /// asynchronous proxy.
    proxied: [Known<Entry>; 2],
    /// Ordinary accesses to global memory that `fence.proxy.tensormap::generic` has released, and those of them that such a fence
    /// has acquired since; hardly any kernel has them.
    mapped: Option<Box<[Known<Entry>; 2]>>,
    /// Strong writes that were read: they come before, though what their warp did before them does not.
    seen: Known<Entry>,
    /// Of asynchronous operations, by the agent that stands for their completion.
    completed: Known<u32>,
    /// Reads that are over, of warps whose writes are not known.
    read: Known<Entry>,
}

impl Clock {
    pub fn join(&mut self, other: &Self) {
        self.warps.join(&other.warps);
        for (mine, theirs) in self.proxied.iter_mut().zip(&other.proxied) {
            mine.join(theirs);
        }
        if let Some(theirs) = &other.mapped {
            self.mapped.get_or_insert_default().iter_mut().zip(&**theirs).for_each(|(mine, theirs)| mine.join(theirs));
        }
        self.seen.join(&other.seen);
        self.completed.join(&other.completed);
        self.read.join(&other.read);
    }

    /// Learns what another clock knows to be over: reads, and asynchronous operations; of writes nothing.
    pub fn join_reads(&mut self, other: &Self) {
        self.read.join(&other.warps);
        self.read.join(&other.read);
        self.seen.join(&other.seen);
        self.completed.join(&other.completed);
    }

    /// Learns what lanes of a warp did up to a tick.
    pub fn learn(&mut self, warp: u32, entry: Entry) {
        self.warps.learn(warp, entry);
    }

    /// Learns that the reads by lanes of a warp, up to a tick, are over.
    pub fn end_reads(&mut self, warp: u32, entry: Entry) {
        self.read.learn(warp, entry);
    }

    /// Has read what lanes of a warp wrote at a tick.
    pub fn see(&mut self, warp: u32, tick: u32, lanes: u32) {
        self.seen.learn(warp, Entry::new(tick, lanes));
    }

    pub fn has_seen(&self, warp: u32, tick: u32, lanes: u32) -> bool {
        self.seen.get(warp).is_some_and(|entry| entry.covers(tick, lanes))
    }

    /// Learns that the operations of an agent are complete up to a tick.
    pub fn learn_completed(&mut self, agent: u32, tick: u32) {
        self.completed.learn(agent, tick);
    }

    /// Makes all that is known of global memory, of shared memory or (generic) of both visible to the asynchronous proxy.
    pub fn fence_proxy(&mut self, space: Space) {
        for (fenced, proxied) in [Space::Global, Space::Shared].into_iter().zip(&mut self.proxied) {
            if space == fenced || space == Space::Generic {
                proxied.join(&self.warps);
            }
        }
    }

    /// Releases all that is known to the proxy of tensor maps, or acquires there what was released.
    pub fn fence_tensor_map(&mut self, release: bool) {
        let [released, acquired] = &mut **self.mapped.get_or_insert_default();
        if release { released.join(&self.warps) } else { acquired.join(released) }
    }

    /// Knows of ordinary accesses only what another clock did.
    pub fn forget_warps(&mut self, other: &Self) {
        self.warps = other.warps.clone();
    }

    #[inline]
    pub fn knows(&self, warp: u32, tick: u32, lanes: u32) -> bool {
        self.warps.get(warp).is_some_and(|entry| entry.covers(tick, lanes))
    }

    /// Whether reads by lanes of a warp are known to be over, by what is known of reads only.
    #[inline]
    pub fn knows_read(&self, warp: u32, tick: u32, lanes: u32) -> bool {
        self.read.get(warp).is_some_and(|entry| entry.covers(tick, lanes))
    }

    /// Whether a read by some lane of a warp, at a tick or later, is known to be over, by what is known of reads only.
    pub fn knows_read_of_any(&self, warp: u32, tick: u32) -> bool {
        self.read.get(warp).is_some_and(|entry| entry.reaches(tick))
    }

    /// Up to which tick the operations of an agent are known to be complete.
    pub fn completed(&self, agent: u32) -> u32 {
        self.completed.get(agent).unwrap_or(0)
    }

    /// Whether accesses to shared or to global memory are known to be visible to the asynchronous proxy.
    #[inline]
    pub fn knows_proxied(&self, shared: bool, warp: u32, tick: u32, lanes: u32) -> bool {
        self.proxied[usize::from(shared)].get(warp).is_some_and(|entry| entry.covers(tick, lanes))
    }

    /// Whether accesses are known to be visible to the proxy of tensor maps.
    pub fn knows_mapped(&self, warp: u32, tick: u32, lanes: u32) -> bool {
        let entry = self.mapped.as_ref().and_then(|mapped| mapped[1].get(warp));
        entry.is_some_and(|entry| entry.covers(tick, lanes))
    }

    #[inline]
    pub fn knows_completed(&self, agent: u32, tick: u32) -> bool {
        self.completed.get(agent).is_some_and(|known| known >= tick)
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
        for (space, global, shared) in
            [(Space::Generic, true, true), (Space::Global, true, false), (Space::Shared, false, true)]
        {
            let mut clock = Clock::default();
            clock.learn(2, Entry::new(4, 1));
            let proxied = |clock: &Clock, tick| [false, true].map(|shared| clock.knows_proxied(shared, 2, tick, 1));
            assert!(clock.knows(2, 4, 1) && proxied(&clock, 4) == [false, false]);
            clock.fence_proxy(space);
            clock.learn(2, Entry::new(5, 1));
            assert!(proxied(&clock, 4) == [global, shared] && proxied(&clock, 5) == [false, false], "{space:?}");
        }
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
