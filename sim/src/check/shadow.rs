//! The last accesses of every byte: one cell for 16 bytes, split where accesses are smaller.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::clock::Clock;

const PAGE_SHIFT: u32 = 12;
const GRANULE: u64 = 16;
const PAGE_CELLS: u32 = (1 << PAGE_SHIFT) / GRANULE as u32;

/// How far a strong access is meant to be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    Cta,
    Cluster,
    Gpu,
    Sys,
}

/// Where a warp runs, for scopes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site {
    pub device: usize,
    pub cluster: u64,
    pub cta: u64,
}

impl Scope {
    /// Whether `one` and `other` are both in the scope of either.
    pub(super) fn covers(self, one: Site, other: Site) -> bool {
        match self {
            Self::Cta => one.cta == other.cta,
            Self::Cluster => one.cluster == other.cluster,
            Self::Gpu => one.device == other.device,
            Self::Sys => true,
        }
    }
}

/// Who made an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Agent {
    /// A warp, or the wgmmas of a warpgroup.
    Warp(u32),
    /// Asynchronous operations that complete in one place.
    Async(u32),
}

impl Agent {
    fn pack(self) -> u32 {
        match self {
            Self::Warp(number) => number << 1,
            Self::Async(number) => number << 1 | 1,
        }
    }

    fn unpack(packed: u32) -> Self {
        if packed & 1 == 0 { Self::Warp(packed >> 1) } else { Self::Async(packed >> 1) }
    }
}

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Read,
    Write,
}

/// One access, as it is remembered. A tick of 0 means none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Record {
    agent: u32,
    tick: u32,
    /// Lanes of the warp; of an asynchronous operation, unused.
    lanes: u32,
    /// Instruction, and how it accessed.
    site: u32,
    /// The warp that issued it.
    pub issuer: u32,
}

const PROXY: u32 = 1;
const STRONG: u32 = 2;
const SCOPE_SHIFT: u32 = 2;
const SITE_SHIFT: u32 = 4;

impl Record {
    pub fn new(
        agent: Agent,
        tick: u32,
        lanes: u32,
        pc: u32,
        strong: Option<Scope>,
        async_proxy: bool,
        issuer: u32,
    ) -> Self {
        let scope = strong.map_or(0, |scope| STRONG | (scope as u32) << SCOPE_SHIFT);
        let site = pc << SITE_SHIFT | scope | if async_proxy { PROXY } else { 0 };
        Self { agent: agent.pack(), tick, lanes, site, issuer }
    }

    pub fn is_async(self) -> bool {
        matches!(Agent::unpack(self.agent), Agent::Async(_)) || self.in_async_proxy()
    }

    pub fn in_async_proxy(self) -> bool {
        self.site & PROXY != 0
    }

    pub fn strong(self) -> Option<Scope> {
        let scope = [Scope::Cta, Scope::Cluster, Scope::Gpu, Scope::Sys][(self.site >> SCOPE_SHIFT & 3) as usize];
        (self.site & STRONG != 0).then_some(scope)
    }

    pub fn pc(self) -> u32 {
        self.site >> SITE_SHIFT
    }

    pub fn tick(self) -> u32 {
        self.tick
    }

    pub fn lanes(self) -> u32 {
        self.lanes
    }
}

/// An access that is being checked.
pub(crate) struct Actor<'a> {
    pub record: Record,
    pub clock: &'a Clock,
    pub mode: Mode,
    /// An atomic: it reads what it writes over.
    pub observes: bool,
    /// Of each warp.
    pub homes: &'a [Site],
}

/// Two accesses that nothing orders.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clash {
    pub before: Record,
    pub before_mode: Mode,
    pub now: Record,
    pub now_mode: Mode,
    /// They are ordered, but no proxy fence lies between.
    pub only_proxy: bool,
    /// Where: see [`Shadow::access`]; to 16 bytes.
    pub key: u64,
}

impl Actor<'_> {
    /// Whether two accesses are strong, and each in the other's scope.
    fn morally_strong(&self, one: Record, other: Record) -> bool {
        let (Some(mine), Some(theirs)) = (one.strong(), other.strong()) else {
            return false;
        };
        let (Some(here), Some(there)) = (self.homes.get(one.issuer as usize), self.homes.get(other.issuer as usize))
        else {
            return false;
        };
        mine.min(theirs).covers(*here, *there)
    }

    /// Whether an access comes before this one in causality order.
    #[inline]
    fn follows(&self, before: Record, before_mode: Mode) -> bool {
        let me = &self.record;
        let same = before.agent == me.agent;
        match Agent::unpack(before.agent) {
            Agent::Async(agent) => same && before.tick == me.tick || self.clock.knows_completed(agent, before.tick),
            Agent::Warp(warp) => {
                let lanes = if same && me.lanes.is_power_of_two() { before.lanes & !me.lanes } else { before.lanes };
                lanes == 0
                    // The same lanes together: each writes what it wrote before.
                    || same && before.lanes == me.lanes && (before_mode, self.mode) == (Mode::Write, Mode::Write)
                    // Lanes of one instruction that write the same place: one of them wins.
                    || same && before.tick == me.tick && before.pc() == me.pc()
                    || self.clock.knows(warp, before.tick, lanes)
                    || before.site & STRONG != 0 && self.clock.has_seen(warp, before.tick, before.lanes)
            }
        }
    }

    /// Whether the accesses are unordered, and no race as both are strong.
    #[inline]
    fn check(&self, before: Record, before_mode: Mode) -> Result<bool, Clash> {
        if before.tick == 0 {
            return Ok(false);
        }
        let me = &self.record;
        let clash = |only_proxy| Err(Clash { before, before_mode, now: *me, now_mode: self.mode, only_proxy, key: 0 });
        if !self.follows(before, before_mode) {
            return if self.morally_strong(*me, before) { Ok(true) } else { clash(false) };
        }
        if me.in_async_proxy()
            && !before.in_async_proxy()
            && before_mode == Mode::Write
            && let Agent::Warp(warp) = Agent::unpack(before.agent)
            && !self.clock.knows_proxied(warp, before.tick, before.lanes)
        {
            return clash(true);
        }
        Ok(false)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    write: Record,
    /// The latest read.
    read: Record,
    /// Other reads since the write: list number plus one.
    others: u32,
    /// First of four cells for the quarters.
    split: u32,
}

/// The cells of all memories.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    cells: Vec<Cell>,
    pages: HashMap<u64, u32, BuildHasherDefault<PageHasher>>,
    recent: Option<(u64, u32)>,
    lists: Vec<Vec<Record>>,
    /// Strong writes that the last accesses have read, and that no clock had ordered before.
    pub observed: Vec<Record>,
    free_lists: Vec<u32>,
    free_quarters: Vec<u32>,
    free_pages: Vec<u32>,
}

/// A multiplicative hash of page numbers.
#[derive(Debug, Default)]
pub(crate) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

impl Shadow {
    /// Checks and remembers an access to `bytes` bytes at a key: a global address, or one of [`shared_key`].
    pub fn access(&mut self, key: u64, bytes: u64, actor: &Actor<'_>) -> Result<(), Clash> {
        let (mut at, end) = (key, key + bytes);
        while at < end {
            let first = self.page(at >> PAGE_SHIFT);
            let page_end = ((at >> PAGE_SHIFT) + 1) << PAGE_SHIFT;
            let stop = end.min(page_end);
            while at < stop {
                let cell = first + (at >> 4) as u32 % PAGE_CELLS;
                let offset = at % GRANULE;
                let length = (GRANULE - offset).min(stop - at);
                self.visit(cell, GRANULE as u32, offset as u32, length as u32, actor)
                    .map_err(|clash| Clash { key: at, ..clash })?;
                at += length;
            }
        }
        Ok(())
    }

    /// An access to the shared memory of a CTA, by another one, that `clock` does not know: what a CTA that exits knows.
    pub fn unknown_to_exit(&self, cta: u64, bytes: u64, clock: &Clock, homes: &[Site]) -> Option<Clash> {
        let now = Record::new(Agent::Warp(u32::MAX >> 1), 0, 0, 0, None, false, 0);
        let actor = Actor { record: now, clock, mode: Mode::Write, observes: false, homes };
        let unknown = |record: Record, mode: Mode| {
            let foreign = homes.get(record.issuer as usize).is_some_and(|home| home.cta != cta);
            record.tick != 0 && foreign && !actor.follows(record, mode)
        };
        for page in 0..=bytes >> PAGE_SHIFT {
            let key = shared_key(cta, page << PAGE_SHIFT);
            let Some(first) = self.pages.get(&(key >> PAGE_SHIFT)) else {
                continue;
            };
            for cell in 0..PAGE_CELLS {
                let mut rest = vec![first + cell];
                while let Some(at) = rest.pop() {
                    let Cell { write, read, others, split } = self.cells[at as usize];
                    if split != 0 {
                        rest.extend(split..split + 4);
                    }
                    let list = if others == 0 { &[][..] } else { &self.lists[others as usize - 1] };
                    let reads = list.iter().chain([&read]).map(|record| (*record, Mode::Read));
                    if let Some((before, before_mode)) =
                        reads.chain([(write, Mode::Write)]).find(|(record, mode)| unknown(*record, *mode))
                    {
                        let key = key + u64::from(cell) * GRANULE;
                        return Some(Clash { before, before_mode, now, now_mode: Mode::Write, only_proxy: false, key });
                    }
                }
            }
        }
        None
    }

    /// Forgets the shared memory of a CTA.
    pub fn forget_shared(&mut self, cta: u64, bytes: u64) {
        self.recent = None;
        for page in 0..=bytes >> PAGE_SHIFT {
            let key = shared_key(cta, page << PAGE_SHIFT) >> PAGE_SHIFT;
            if let Some(first) = self.pages.remove(&key) {
                for cell in first..first + PAGE_CELLS {
                    self.clear(cell);
                }
                self.free_pages.push(first);
            }
        }
    }

    fn page(&mut self, number: u64) -> u32 {
        if let Some((known, first)) = self.recent
            && known == number
        {
            return first;
        }
        let first = match self.pages.get(&number) {
            Some(first) => *first,
            None => {
                let first = self.free_pages.pop().unwrap_or_else(|| {
                    let first = self.cells.len() as u32;
                    self.cells.resize(self.cells.len() + PAGE_CELLS as usize, Cell::default());
                    first
                });
                self.pages.insert(number, first);
                first
            }
        };
        self.recent = Some((number, first));
        first
    }

    fn visit(&mut self, cell: u32, size: u32, at: u32, length: u32, actor: &Actor<'_>) -> Result<(), Clash> {
        let whole = length == size;
        if self.cells[cell as usize].split == 0 {
            if whole {
                return match actor.mode {
                    Mode::Read => self.read(cell, actor),
                    Mode::Write => self.write(cell, actor),
                };
            }
            self.split(cell);
        }
        let first = self.cells[cell as usize].split;
        let quarter = size / 4;
        for part in at / quarter..=(at + length - 1) / quarter {
            let (start, end) = (at.max(part * quarter), (at + length).min((part + 1) * quarter));
            self.visit(first + part, quarter, start - part * quarter, end - start, actor)?;
        }
        if whole && actor.mode == Mode::Write {
            self.clear(cell);
            self.cells[cell as usize].write = actor.record;
        }
        Ok(())
    }

    fn split(&mut self, cell: u32) {
        let first = self.free_quarters.pop().unwrap_or_else(|| {
            let first = self.cells.len() as u32;
            self.cells.resize(self.cells.len() + 4, Cell::default());
            first
        });
        let whole = self.cells[cell as usize];
        for part in 0..4 {
            let mut copy = whole;
            if whole.others != 0 {
                let list = self.lists[whole.others as usize - 1].clone();
                copy.others = self.new_list(list);
            }
            self.cells[(first + part) as usize] = copy;
        }
        self.drop_list(cell);
        self.cells[cell as usize] = Cell { split: first, ..Cell::default() };
    }

    fn clear(&mut self, cell: u32) {
        let first = self.cells[cell as usize].split;
        if first != 0 {
            for part in 0..4 {
                self.clear(first + part);
            }
            self.free_quarters.push(first);
        }
        self.drop_list(cell);
        self.cells[cell as usize] = Cell::default();
    }

    fn new_list(&mut self, list: Vec<Record>) -> u32 {
        match self.free_lists.pop() {
            Some(number) => {
                self.lists[number as usize - 1] = list;
                number
            }
            None => {
                self.lists.push(list);
                self.lists.len() as u32
            }
        }
    }

    fn drop_list(&mut self, cell: u32) {
        let number = std::mem::take(&mut self.cells[cell as usize].others);
        if number != 0 {
            self.lists[number as usize - 1].clear();
            self.free_lists.push(number);
        }
    }

    #[inline]
    fn read(&mut self, at: u32, actor: &Actor<'_>) -> Result<(), Clash> {
        let cell = &mut self.cells[at as usize];
        let last = cell.read;
        let me = actor.record;
        if actor.check(cell.write, Mode::Write)? {
            self.observed.push(cell.write);
        }
        if last.agent == me.agent && last.tick == me.tick && last.tick != 0 && last.site == me.site {
            cell.read.lanes |= me.lanes;
            return Ok(());
        }
        cell.read = me;
        let replaced = last.tick == 0 || last.agent == me.agent && last.lanes & !me.lanes == 0;
        if replaced || cell.others == 0 && actor.follows(last, Mode::Read) {
            return Ok(());
        }
        if cell.others == 0 {
            let number = self.new_list(vec![last]);
            self.cells[at as usize].others = number;
            return Ok(());
        }
        let list = &mut self.lists[cell.others as usize - 1];
        match list.iter_mut().find(|known| known.agent == last.agent && known.lanes & !last.lanes == 0) {
            Some(known) => *known = last,
            None => list.push(last),
        }
        Ok(())
    }

    #[inline]
    fn write(&mut self, at: u32, actor: &Actor<'_>) -> Result<(), Clash> {
        let cell = &mut self.cells[at as usize];
        if actor.check(cell.write, Mode::Write)? && actor.observes {
            self.observed.push(cell.write);
        }
        actor.check(cell.read, Mode::Read)?;
        cell.write = actor.record;
        cell.read = Record::default();
        if cell.others != 0 {
            let number = cell.others as usize - 1;
            for known in &self.lists[number] {
                actor.check(*known, Mode::Read)?;
            }
            self.drop_list(at);
        }
        Ok(())
    }
}

/// The CTA of a key of shared memory.
pub(crate) fn shared_owner(key: u64) -> u64 {
    key >> 24 & ((1 << 39) - 1)
}

/// The key of an address in a CTA's shared memory.
pub(crate) fn shared_key(cta: u64, address: u64) -> u64 {
    1 << 63 | cta << 24 | address
}
