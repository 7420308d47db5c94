//! The last accesses of every byte: one cell for a line of 128 bytes, split into 8 of 16 bytes where some of it is written,
//! and those in turn where accesses are smaller.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::clock::Clock;

const PAGE_SHIFT: u32 = 12;
const LINE: u64 = 128;
const PAGE_CELLS: u32 = (1 << PAGE_SHIFT) / LINE as u32;
/// Bytes of a cell at each level of splitting, and into how many it is split.
const LEVELS: [(u32, u32); 4] = [(LINE as u32, 8), (16, 4), (4, 4), (1, 0)];
/// All eighths of a cell.
const WHOLE: u8 = 0xff;

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
    pub launch: usize,
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
const READ_ONLY: u32 = 16;
const WAITS: u32 = 32;
const SITE_SHIFT: u32 = 6;
const FLAGS: u32 = (1 << SITE_SHIFT) - 1;

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

    /// The same, by `ld.global.nc`.
    pub fn read_only(self) -> Self {
        Self { site: self.site | READ_ONLY, ..self }
    }

    /// The same, by a wait for an mbarrier.
    pub fn waits(self) -> Self {
        Self { site: self.site | WAITS, ..self }
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
    /// Where it begins: a global address, or one of [`shared_key`].
    pub key: u64,
    pub record: Record,
    pub clock: &'a Clock,
    pub mode: Mode,
    /// An atomic: it reads what it writes over.
    pub observes: bool,
    /// Of each warp.
    pub homes: &'a [Site],
    /// What came before the launch, to any of its warps.
    pub began: &'a Clock,
}

/// What is wrong with two accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClashKind {
    /// Nothing orders them.
    Race,
    /// They are ordered, but no proxy fence lies between.
    Proxy,
    /// A read by `ld.global.nc`, and a write while the kernel runs.
    ReadOnly,
    /// A tensor map was written, and no fence of its proxy lies between that and its use.
    TensorMap,
    /// A wait for a phase of an mbarrier, and the completion of the next, which nothing orders.
    Phase,
}

/// Two accesses that nothing orders as they must be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clash {
    pub before: Record,
    pub before_mode: Mode,
    pub now: Record,
    pub now_mode: Mode,
    pub kind: ClashKind,
    /// Where: see [`Actor::key`]; to 128 bytes.
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
                    || before_mode == Mode::Read && self.clock.knows_read(warp, before.tick, lanes)
                    || before.site & STRONG != 0 && self.clock.has_seen(warp, before.tick, before.lanes)
                    || before.site & WAITS != 0 && self.knows_wait(warp, before)
            }
        }
    }

    /// Whether a wait for an mbarrier by some lanes together is over: it is for all of them if it is for one, as the instruction is
    /// (`cuda::pipeline` has one lane invalidate the barrier that all have waited at).
    #[cold]
    fn knows_wait(&self, warp: u32, wait: Record) -> bool {
        let known = |lane: usize| {
            let lane = 1 << lane;
            wait.agent == self.record.agent && self.record.lanes & lane != 0
                || self.clock.knows(warp, wait.tick, lane)
                || self.clock.knows_read(warp, wait.tick, lane)
        };
        crate::registers::lanes(wait.lanes).any(known)
    }

    /// Whether the accesses are unordered, and no race as both are strong.
    #[inline]
    fn check(&self, before: Record, before_mode: Mode) -> Result<bool, Clash> {
        if before.tick == 0 {
            return Ok(false);
        }
        let me = &self.record;
        let clash = |kind| Err(Clash { before, before_mode, now: *me, now_mode: self.mode, kind, key: 0 });
        if !self.follows(before, before_mode) {
            return if self.morally_strong(*me, before) { Ok(true) } else { clash(ClashKind::Race) };
        }
        if me.in_async_proxy()
            && !before.in_async_proxy()
            && before_mode == Mode::Write
            && let Agent::Warp(warp) = Agent::unpack(before.agent)
            && !self.clock.knows_proxied(is_shared(self.key), warp, before.tick, before.lanes)
        {
            return clash(ClashKind::Proxy);
        }
        if (me.site | before.site) & READ_ONLY != 0 && self.breaks_read_only(before, before_mode) {
            return clash(ClashKind::ReadOnly);
        }
        Ok(false)
    }

    /// Of two accesses in order, of which one is by `ld.global.nc`: whether the other is a write while the same kernel runs.
    #[cold]
    fn breaks_read_only(&self, before: Record, before_mode: Mode) -> bool {
        let launch = |record: Record| self.homes.get(record.issuer as usize).map(|site| site.launch);
        match before_mode {
            Mode::Read => self.mode == Mode::Write && launch(before) == launch(self.record),
            Mode::Write => {
                let earlier = Actor { clock: self.began, record: Record::default(), ..*self };
                !earlier.follows(before, Mode::Write)
            }
        }
    }

    /// Checks the use of a tensor map, by who last wrote a part of it.
    fn check_map(&self, before: Record) -> Result<(), Clash> {
        let clash =
            |kind| Clash { before, before_mode: Mode::Write, now: self.record, now_mode: Mode::Read, kind, key: 0 };
        if before.tick == 0 {
            return Ok(());
        }
        if !self.follows(before, Mode::Write) {
            return Err(clash(ClashKind::Race));
        }
        match Agent::unpack(before.agent) {
            Agent::Warp(warp) if !self.clock.knows_mapped(warp, before.tick, before.lanes) => {
                Err(clash(ClashKind::TensorMap))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    write: Record,
    read: Read,
    /// Other reads since the write: list number plus one.
    others: u32,
    /// First of the cells for its parts.
    split: u32,
}

/// The latest read of a cell.
#[derive(Debug, Clone, Copy, Default)]
struct Read {
    record: Record,
    /// Which eighths of a line it read; of smaller cells it reads all.
    eighths: u8,
}

impl Read {
    /// Whether whoever is ordered after this read is so after another one.
    fn subsumes(&self, other: &Self) -> bool {
        other.record.agent == self.record.agent
            && other.record.lanes & !self.record.lanes == 0
            && other.eighths & !self.eighths == 0
    }

    /// Adds another read to this one, if that loses nothing but which wgmma or copy of a group it was.
    fn absorb(&mut self, other: &Self) -> bool {
        let (mine, theirs) = (&mut self.record, &other.record);
        let alike =
            if mine.in_async_proxy() { (mine.site ^ theirs.site) & FLAGS == 0 } else { mine.site == theirs.site };
        if mine.tick == 0 || mine.agent != theirs.agent || mine.tick != theirs.tick || !alike {
            return false;
        }
        if self.eighths == other.eighths {
            mine.lanes |= theirs.lanes;
            return true;
        }
        let same = mine.lanes == theirs.lanes;
        if same {
            self.eighths |= other.eighths;
        }
        same
    }
}

/// The cells of all memories.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    cells: Vec<Cell>,
    pages: FastMap<u64, u32>,
    recent: Option<(u64, u32)>,
    lists: Vec<Vec<Read>>,
    /// Strong writes that the last accesses have read, and that no clock had ordered before.
    pub observed: Vec<Record>,
    free_lists: Vec<u32>,
    /// By level.
    free_parts: [Vec<u32>; 3],
    free_pages: Vec<u32>,
}

/// A map by numbers.
pub(super) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// A multiplicative hash of numbers.
#[derive(Debug, Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
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
    /// Checks and remembers an access to `bytes` bytes.
    pub fn access(&mut self, bytes: u64, actor: &Actor<'_>) -> Result<(), Clash> {
        let (mut at, end) = (actor.key, actor.key + bytes);
        while at < end {
            let first = self.page(at >> PAGE_SHIFT);
            let page_end = ((at >> PAGE_SHIFT) + 1) << PAGE_SHIFT;
            let stop = end.min(page_end);
            while at < stop {
                let cell = first + (at / LINE) as u32 % PAGE_CELLS;
                let offset = at % LINE;
                let length = (LINE - offset).min(stop - at);
                self.visit(cell, 0, offset as u32, length as u32, actor).map_err(|clash| Clash { key: at, ..clash })?;
                at += length;
            }
        }
        Ok(())
    }

    /// Checks the use of a tensor map, without remembering it.
    pub fn use_map(&self, bytes: u64, actor: &Actor<'_>) -> Result<(), Clash> {
        let (at, end) = (actor.key, actor.key + bytes);
        for line in at / LINE..end.div_ceil(LINE) {
            let start = line * LINE;
            let Some(first) = self.pages.get(&(start >> PAGE_SHIFT)) else {
                continue;
            };
            let mut rest = vec![(first + line as u32 % PAGE_CELLS, 0, start)];
            while let Some((cell, level, from)) = rest.pop() {
                let (size, parts) = LEVELS[level];
                if from >= end || from + u64::from(size) <= at {
                    continue;
                }
                let Cell { write, split, .. } = self.cells[cell as usize];
                if split == 0 {
                    actor.check_map(write).map_err(|clash| Clash { key: from, ..clash })?;
                } else {
                    let each = size / parts;
                    rest.extend((0..parts).map(|part| (split + part, level + 1, from + u64::from(part * each))));
                }
            }
        }
        Ok(())
    }

    /// An access to the shared memory of a CTA, by another one, that `clock` does not know: what a CTA that exits knows.
    pub fn unknown_to_exit(&self, cta: u64, bytes: u64, clock: &Clock, homes: &[Site]) -> Option<Clash> {
        let now = Record::new(Agent::Warp(u32::MAX >> 1), 0, 0, 0, None, false, 0);
        let actor = Actor {
            key: shared_key(cta, 0),
            record: now,
            clock,
            mode: Mode::Write,
            observes: false,
            homes,
            began: clock,
        };
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
                let mut rest = vec![(first + cell, 0)];
                while let Some((at, level)) = rest.pop() {
                    let Cell { write, read, others, split } = self.cells[at as usize];
                    if split != 0 {
                        let parts = LEVELS[level].1;
                        rest.extend((split..split + parts).map(|part| (part, level + 1)));
                    }
                    let list = if others == 0 { &[][..] } else { &self.lists[others as usize - 1] };
                    let reads = list.iter().chain([&read]).map(|read| (read.record, Mode::Read));
                    if let Some((before, before_mode)) =
                        reads.chain([(write, Mode::Write)]).find(|(record, mode)| unknown(*record, *mode))
                    {
                        let key = key + u64::from(cell) * LINE;
                        return Some(Clash {
                            before,
                            before_mode,
                            now,
                            now_mode: Mode::Write,
                            kind: ClashKind::Race,
                            key,
                        });
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
                    self.clear(cell, 0);
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

    /// An access to a part of a cell.
    fn visit(&mut self, cell: u32, level: usize, at: u32, length: u32, actor: &Actor<'_>) -> Result<(), Clash> {
        let (size, parts) = LEVELS[level];
        let whole = length == size;
        if self.cells[cell as usize].split == 0 {
            if whole {
                return match actor.mode {
                    Mode::Read => self.read(cell, WHOLE, actor),
                    Mode::Write => self.write(cell, actor),
                };
            }
            if level == 0 && actor.mode == Mode::Read && (at | length).is_multiple_of(size / 8) {
                let eighths = ((1u32 << (length / (size / 8))) - 1) << (at / (size / 8));
                return self.read(cell, eighths as u8, actor);
            }
            self.split(cell, level);
        }
        let first = self.cells[cell as usize].split;
        let part_size = size / parts;
        for part in at / part_size..=(at + length - 1) / part_size {
            let (start, end) = (at.max(part * part_size), (at + length).min((part + 1) * part_size));
            self.visit(first + part, level + 1, start - part * part_size, end - start, actor)?;
        }
        if whole && actor.mode == Mode::Write {
            self.clear(cell, level);
            self.cells[cell as usize].write = actor.record;
        }
        Ok(())
    }

    fn split(&mut self, cell: u32, level: usize) {
        let parts = LEVELS[level].1;
        let first = self.free_parts[level].pop().unwrap_or_else(|| {
            let first = self.cells.len() as u32;
            self.cells.resize(self.cells.len() + parts as usize, Cell::default());
            first
        });
        let whole = self.cells[cell as usize];
        for part in 0..parts {
            // Only of a line are there reads of less than all.
            let of_part = |read: Read| match read.eighths >> part & 1 {
                0 => Read::default(),
                _ => Read { eighths: WHOLE, ..read },
            };
            let mut copy = Cell { read: of_part(whole.read), ..whole };
            if whole.others != 0 {
                copy.others = self.new_list();
                let [from, to] = [whole.others, copy.others].map(|number| number as usize - 1);
                let mut list = std::mem::take(&mut self.lists[to]);
                list.extend(self.lists[from].iter().map(|read| of_part(*read)).filter(|read| read.record.tick != 0));
                self.lists[to] = list;
            }
            self.cells[(first + part) as usize] = copy;
        }
        self.drop_list(cell);
        self.cells[cell as usize] = Cell { split: first, ..Cell::default() };
    }

    fn clear(&mut self, cell: u32, level: usize) {
        let first = self.cells[cell as usize].split;
        if first != 0 {
            for part in 0..LEVELS[level].1 {
                self.clear(first + part, level + 1);
            }
            self.free_parts[level].push(first);
        }
        self.drop_list(cell);
        self.cells[cell as usize] = Cell::default();
    }

    /// The number, plus one, of an empty list.
    fn new_list(&mut self) -> u32 {
        self.free_lists.pop().unwrap_or_else(|| {
            self.lists.push(Vec::new());
            self.lists.len() as u32
        })
    }

    fn drop_list(&mut self, cell: u32) {
        let number = std::mem::take(&mut self.cells[cell as usize].others);
        if number != 0 {
            self.lists[number as usize - 1].clear();
            self.free_lists.push(number);
        }
    }

    #[inline]
    fn read(&mut self, at: u32, eighths: u8, actor: &Actor<'_>) -> Result<(), Clash> {
        let cell = &mut self.cells[at as usize];
        let me = Read { record: actor.record, eighths };
        if actor.check(cell.write, Mode::Write)? {
            self.observed.push(cell.write);
        }
        if cell.read.absorb(&me) {
            return Ok(());
        }
        let last = std::mem::replace(&mut cell.read, me);
        let covered = last.eighths & !eighths == 0;
        let replaced = last.record.tick == 0 || me.subsumes(&last);
        if replaced || cell.others == 0 && covered && actor.follows(last.record, Mode::Read) {
            return Ok(());
        }
        if cell.others == 0 {
            let number = self.new_list();
            self.lists[number as usize - 1].push(last);
            self.cells[at as usize].others = number;
            return Ok(());
        }
        let list = &mut self.lists[cell.others as usize - 1];
        for known in list.iter_mut() {
            if last.subsumes(known) {
                *known = last;
                return Ok(());
            }
            if known.absorb(&last) {
                return Ok(());
            }
        }
        list.push(last);
        Ok(())
    }

    #[inline]
    fn write(&mut self, at: u32, actor: &Actor<'_>) -> Result<(), Clash> {
        let cell = &mut self.cells[at as usize];
        if actor.check(cell.write, Mode::Write)? && actor.observes {
            self.observed.push(cell.write);
        }
        actor.check(cell.read.record, Mode::Read)?;
        cell.write = actor.record;
        cell.read = Read::default();
        if cell.others != 0 {
            let number = cell.others as usize - 1;
            for known in &self.lists[number] {
                actor.check(known.record, Mode::Read)?;
            }
            self.drop_list(at);
        }
        Ok(())
    }
}

/// Whether a key is one of shared memory.
pub(crate) fn is_shared(key: u64) -> bool {
    key >> 63 != 0
}

/// The CTA of a key of shared memory.
pub(crate) fn shared_owner(key: u64) -> u64 {
    key >> 24 & ((1 << 39) - 1)
}

/// The key of an address in a CTA's shared memory.
pub(crate) fn shared_key(cta: u64, address: u64) -> u64 {
    1 << 63 | cta << 24 | address
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An access of one lane of a warp: the warp, how, where and how many bytes.
    fn accesses() -> impl Strategy<Value = Vec<(u32, Mode, u64, u64)>> {
        let mode = prop_oneof![4 => Just(Mode::Read), 1 => Just(Mode::Write)];
        let granules = (0u64..16, 1u64..17).prop_map(|(at, length)| (16 * at, 16 * length));
        let place = prop_oneof![granules, (0u64..256, 1u64..64)];
        prop::collection::vec(
            (0u32..3, mode, place).prop_map(|(warp, mode, (at, length))| (warp, mode, at, length)),
            1..40,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Among warps that know nothing of each other, the first race is found, and nothing else: as with a list of the
        /// accesses of every byte.
        #[test]
        fn cells_are_as_good_as_bytes(accesses in accesses()) {
            let mut shadow = Shadow::default();
            let mut bytes: Vec<Vec<(u32, Mode)>> = vec![Vec::new(); 1024];
            for (step, (warp, mode, at, length)) in accesses.into_iter().enumerate() {
                let range = at as usize..(at + length) as usize;
                let others = bytes[range.clone()].iter().flatten().filter(|(other, _)| *other != warp);
                let race = others.into_iter().any(|(_, other)| (*other, mode) != (Mode::Read, Mode::Read));
                let record = Record::new(Agent::Warp(warp), 1 + step as u32, 1, 0, None, false, warp);
                let actor = Actor { key: at, record, clock: &Clock::default(), mode, observes: false, homes: &[], began: &Clock::default() };
                prop_assert_eq!(shadow.access(length, &actor).is_err(), race);
                if race {
                    break;
                }
                bytes[range].iter_mut().for_each(|known| known.push((warp, mode)));
            }
        }
    }
}
