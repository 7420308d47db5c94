//! Stores that are not performed yet: what makes global memory weak.
//!
//! A weak or relaxed store waits here, for a time that the seed chose, first among the stores of its cluster (a CTA, where
//! there are no clusters), then among those of its device, and is then performed: written to memory, for all to see. Before
//! that it is performed by whoever must see it: an access of its cluster, or of its device once it is the device's. A release
//! makes it the device's (GPU scope) or performs it (system scope). As all reads are of memory, and stores to a byte are
//! performed in order where program order or a release orders them, this is no weaker than PTX's memory model: a store is
//! late, and nothing else.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;

use crate::random::Random;

/// Who sees the stores that have reached the device.
pub(crate) const DEVICE: u64 = u64::MAX;

const LINE_BYTES: u64 = 128;
/// A store waits up to 2^11 ns at its first stop, and up to 8 times that at the second, as peers see each other's accesses with
/// some delay too (see `quanta`).
fn delay(owner: u64, random: &mut Random) -> u64 {
    random.spread(12) * if owner == DEVICE { 8 } else { 1 }
}

/// A line's bytes that are not performed.
#[derive(Debug, Clone)]
struct Line {
    /// One bit for each.
    mask: u128,
    data: [u8; LINE_BYTES as usize],
    /// When the next of them go on, in nanoseconds.
    due: u64,
    /// Some have gone on: the rest does next.
    parted: bool,
}

/// The stores by one device's CTAs that are not performed.
#[derive(Debug, Clone, Default)]
pub(crate) struct StoreBuffer {
    /// By who sees them, a cluster or [`DEVICE`], and their address in lines.
    lines: BTreeMap<(u64, u64), Line>,
    due: BinaryHeap<Reverse<(u64, u64, u64)>>,
    /// How many of the lines there are for each hash of an address: most accesses need look no further.
    filter: Vec<u32>,
}

const FILTER_BITS: u32 = 12;
/// A range of more lines than this is looked up without the filter.
const FILTERED_LINES: u64 = 32;

fn hash(line: u64) -> usize {
    (line.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - FILTER_BITS)) as usize
}

/// Bits of the bytes of a line that are in a range of addresses.
fn bits(line: u64, range: &Range<u64>) -> u128 {
    let base = line * LINE_BYTES;
    let first = range.start.max(base) - base;
    let end = range.end.min(base + LINE_BYTES) - base;
    (u128::MAX >> (LINE_BYTES - (end - first))) << first
}

/// The lines of a range of addresses, which is not empty.
fn lines(range: &Range<u64>) -> std::ops::RangeInclusive<u64> {
    range.start / LINE_BYTES..=(range.end - 1) / LINE_BYTES
}

impl Line {
    /// Takes bytes out of the line, run by run: their address, and what they are to be.
    fn take(&mut self, line: u64, bits: u128, mut perform: impl FnMut(u64, &[u8])) {
        let mut rest = self.mask & bits;
        self.mask &= !bits;
        while rest != 0 {
            let first = rest.trailing_zeros();
            let count = (rest >> first).trailing_ones();
            let at = first as usize;
            perform(line * LINE_BYTES + u64::from(first), &self.data[at..at + count as usize]);
            rest &= (u128::MAX).checked_shl(first + count).unwrap_or(0);
        }
    }
}

impl StoreBuffer {
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Adds a store; younger than all that `owner` has here.
    pub fn put(&mut self, owner: u64, address: u64, bytes: &[u8], now: u64, random: &mut Random) {
        let range = address..address + bytes.len() as u64;
        for line in lines(&range) {
            let bits = bits(line, &range);
            let first = bits.trailing_zeros() as usize;
            let from = (line * LINE_BYTES + first as u64 - address) as usize;
            let length = bits.count_ones() as usize;
            let entry = self.entry(owner, line, now, random);
            entry.mask |= bits;
            entry.data[first..first + length].copy_from_slice(&bytes[from..from + length]);
        }
    }

    fn entry(&mut self, owner: u64, line: u64, now: u64, random: &mut Random) -> &mut Line {
        let (due, filter) = (&mut self.due, &mut self.filter);
        self.lines.entry((owner, line)).or_insert_with(|| {
            filter.resize(1 << FILTER_BITS, 0);
            filter[hash(line)] += 1;
            let time = now + delay(owner, random);
            due.push(Reverse((time, owner, line)));
            Line { mask: 0, data: [0; LINE_BYTES as usize], due: time, parted: false }
        })
    }

    fn remove(&mut self, owner: u64, line: u64) -> Option<Line> {
        let removed = self.lines.remove(&(owner, line));
        if removed.is_some() {
            self.filter[hash(line)] -= 1;
        }
        removed
    }

    /// Makes bytes the device's.
    fn pass_on(&mut self, line: u64, bytes: &Line, now: u64, random: &mut Random) {
        let entry = self.entry(DEVICE, line, now, random);
        entry.mask |= bytes.mask;
        for (at, (mine, new)) in entry.data.iter_mut().zip(&bytes.data).enumerate() {
            if bytes.mask >> at & 1 != 0 {
                *mine = *new;
            }
        }
    }

    /// Makes all that an owner has the device's.
    pub fn pass_on_all(&mut self, owner: u64, now: u64, random: &mut Random) {
        let found: Vec<u64> = self.lines.range((owner, 0)..=(owner, u64::MAX)).map(|((_, line), _)| *line).collect();
        for line in found {
            if let Some(bytes) = self.remove(owner, line) {
                self.pass_on(line, &bytes, now, random);
            }
        }
    }

    /// Takes out what an owner has in a range of addresses.
    pub fn take(&mut self, owner: u64, range: &Range<u64>, mut perform: impl FnMut(u64, &[u8])) {
        let of_range = lines(range);
        let found = self.lines.range((owner, *of_range.start())..=(owner, *of_range.end()));
        let found: Vec<u64> = found.map(|((_, line), _)| *line).collect();
        for line in found {
            if let Some(entry) = self.lines.get_mut(&(owner, line)) {
                entry.take(line, bits(line, range), &mut perform);
                if entry.mask == 0 {
                    self.remove(owner, line);
                }
            }
        }
    }

    /// Takes out everything: the device's first, which is older.
    pub fn take_all(&mut self, mut perform: impl FnMut(u64, &[u8])) {
        let mut lines = std::mem::take(&mut self.lines);
        for device in [true, false] {
            for ((owner, line), entry) in &mut lines {
                if (*owner == DEVICE) == device {
                    entry.take(*line, u128::MAX, &mut perform);
                }
            }
        }
        self.due.clear();
        self.filter.clear();
    }

    /// Whether anything may be in a range of addresses.
    pub fn may_hold(&self, range: &Range<u64>) -> bool {
        let mut of_range = lines(range);
        let count = of_range.end() - of_range.start();
        !self.lines.is_empty() && (count >= FILTERED_LINES || of_range.any(|line| self.filter[hash(line)] != 0))
    }

    /// Whether an owner has anything in a range of addresses.
    pub fn holds(&self, owner: u64, range: &Range<u64>) -> bool {
        let of_range = lines(range);
        self.lines
            .range((owner, *of_range.start())..=(owner, *of_range.end()))
            .any(|((_, line), entry)| entry.mask & bits(*line, range) != 0)
    }

    /// Whether an owner has anything outside a range of addresses of whole lines.
    pub fn holds_outside(&self, owner: u64, range: &Range<u64>) -> bool {
        let (start, end) = (range.start / LINE_BYTES, range.end / LINE_BYTES);
        let any = |first, last| first <= last && self.lines.range((owner, first)..=(owner, last)).next().is_some();
        any(0, start - 1) || any(end, u64::MAX)
    }

    /// Lets all bytes go on whose time has come, of each line a part of the words, so that they need not keep their order:
    /// from a cluster to the device if there are others (`peers`), else out of here. Whether there were any.
    pub fn advance(&mut self, now: u64, peers: bool, random: &mut Random, mut perform: impl FnMut(u64, &[u8])) -> bool {
        let mut any = false;
        while let Some(Reverse((due, owner, line))) = self.due.peek().copied().filter(|Reverse((due, ..))| *due <= now)
        {
            self.due.pop();
            let Some(entry) = self.lines.get_mut(&(owner, line)).filter(|entry| entry.due == due) else {
                continue;
            };
            any = true;
            let choice = if entry.parted { u64::MAX } else { random.next() };
            entry.parted = true;
            let words = (0..LINE_BYTES / 8).filter(|word| choice >> word & 1 != 0);
            let bits = words.fold(0, |bits, word| bits | 0xff << (8 * word));
            let passed = (peers && owner != DEVICE).then(|| Line { mask: entry.mask & bits, ..entry.clone() });
            match &passed {
                Some(_) => entry.mask &= !bits,
                None => entry.take(line, bits, &mut perform),
            }
            if entry.mask == 0 {
                self.remove(owner, line);
            } else {
                entry.due = now + delay(owner, random);
                self.due.push(Reverse((entry.due, owner, line)));
            }
            if let Some(bytes) = passed.filter(|bytes| bytes.mask != 0) {
                self.pass_on(line, &bytes, now, random);
            }
        }
        any
    }

    /// Whether anything may be due.
    pub fn is_due(&self, now: u64) -> bool {
        self.due.peek().is_some_and(|Reverse((due, ..))| *due <= now)
    }

    /// When something is due next.
    pub fn next_due(&mut self) -> Option<u64> {
        loop {
            let Reverse((due, owner, line)) = *self.due.peek()?;
            if self.lines.get(&(owner, line)).is_some_and(|entry| entry.due == due) {
                return Some(due);
            }
            self.due.pop();
        }
    }
}
