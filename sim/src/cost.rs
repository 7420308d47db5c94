//! What a launch cost, and which memory it was about.

use std::collections::BTreeMap;
use std::ops::{AddAssign, Range};

/// Bytes of a line of device memory.
pub(crate) const LINE_BYTES: usize = 128;

/// The most warps of a CTA.
pub(crate) const CTA_WARPS: usize = 32;

/// Counters of one launch.
///
/// Global memory is counted by a simple rule: the first touch of a 128-byte line in a run is one line of device-memory
/// traffic (reads and writes apart), and every byte that an instruction or copy moves is L2 traffic. Bytes in another
/// device's memory are NVLink traffic instead, and count in neither. A multicast to several CTAs of a cluster reads its
/// source once, and counts once; shared memory, of a peer CTA too, counts in none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Warp instructions executed.
    pub instructions: u64,
    /// The same, times the lanes active in each.
    pub thread_instructions: u64,
    /// Bytes read from this device's memory.
    pub hbm_read: u64,
    /// Bytes written to this device's memory.
    pub hbm_write: u64,
    /// Bytes moved between this device's SMs and its L2.
    pub l2_bytes: u64,
    /// Bytes read from other devices.
    pub nvlink_read: u64,
    /// Bytes written to other devices.
    pub nvlink_write: u64,
    /// Floating-point operations of tensor-core instructions.
    pub tensor_ops: u64,
    /// Times that a warp had to wait.
    pub waits: u64,
    /// Waits for mbarriers by the warp's number in its CTA, over all CTAs.
    pub warps: [WarpWaits; CTA_WARPS],
    /// Waits that were tried again without success, and repeated reads of an unchanged word.
    pub polls: u64,
    /// Simulated time from the start of the run to the launch's end, in nanoseconds.
    pub simulated_ns: u64,
}

impl Cost {
    /// The waits of all warps.
    pub fn mbarriers(&self) -> WarpWaits {
        self.warps.iter().fold(WarpWaits::default(), |sum, warp| WarpWaits {
            waits: sum.waits + warp.waits,
            met: sum.met + warp.met,
        })
    }
}

/// Waits for an mbarrier's phase that ended with the phase complete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WarpWaits {
    /// All of them.
    pub waits: u64,
    /// Those that found the phase complete at first look.
    pub met: u64,
}

/// What a run moved to and from a range of a device's memory, and computed from it: the launches' counters, told apart by place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes read from the range by its own device, as [`Cost::hbm_read`] counts them.
    pub hbm_read: u64,
    /// Bytes written by its own device, as [`Cost::hbm_write`] counts them.
    pub hbm_write: u64,
    /// Bytes read by other devices.
    pub nvlink_read: u64,
    /// Bytes written by other devices.
    pub nvlink_write: u64,
    /// Operations of the wgmmas whose matrix A is in shared memory that was last filled by a bulk copy from the range.
    pub tensor_ops: u64,
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.hbm_read += other.hbm_read;
        self.hbm_write += other.hbm_write;
        self.nvlink_read += other.nvlink_read;
        self.nvlink_write += other.nvlink_write;
        self.tensor_ops += other.tensor_ops;
    }
}

/// What a run did with the lines of one allocation. An access over several lines that is not counted line by line is the first one's.
#[derive(Debug, Clone)]
pub(crate) struct Lines {
    /// One bit for each line that its device has read, and written.
    read: Vec<u64>,
    written: Vec<u64>,
    /// All else, by line.
    other: BTreeMap<usize, Traffic>,
}

impl Lines {
    /// Of an allocation of so many bytes.
    pub fn new(bytes: usize) -> Self {
        let words = bytes.div_ceil(LINE_BYTES).div_ceil(64);
        Self { read: vec![0; words], written: vec![0; words], other: BTreeMap::new() }
    }

    /// A run begins.
    pub fn clear(&mut self) {
        self.read.fill(0);
        self.written.fill(0);
        self.other.clear();
    }

    /// Counts an access by the device whose memory it is.
    #[inline]
    pub fn touch(&mut self, offset: usize, bytes: usize, direction: Direction, cost: &mut Cost) {
        cost.l2_bytes += bytes as u64;
        let (lines, total) = match direction {
            Direction::Read => (&mut self.read, &mut cost.hbm_read),
            Direction::Write => (&mut self.written, &mut cost.hbm_write),
        };
        for line in offset / LINE_BYTES..=(offset + bytes - 1) / LINE_BYTES {
            let bit = 1u64 << (line % 64);
            let word = &mut lines[line / 64];
            if *word & bit == 0 {
                *word |= bit;
                *total += LINE_BYTES as u64;
            }
        }
    }

    /// Counts an access by another device.
    pub fn cross(&mut self, offset: usize, bytes: usize, direction: Direction, cost: &mut Cost) {
        let line = self.other.entry(offset / LINE_BYTES).or_default();
        let (of_line, total) = match direction {
            Direction::Read => (&mut line.nvlink_read, &mut cost.nvlink_read),
            Direction::Write => (&mut line.nvlink_write, &mut cost.nvlink_write),
        };
        *of_line += bytes as u64;
        *total += bytes as u64;
    }

    /// Counts a product with a matrix A that was copied from here.
    pub fn multiply(&mut self, offset: usize, operations: u64) {
        self.other.entry(offset / LINE_BYTES).or_default().tensor_ops += operations;
    }

    /// The counters of the lines that begin in a range of offsets.
    pub fn traffic(&self, range: Range<usize>) -> Traffic {
        let lines = range.start.div_ceil(LINE_BYTES)..range.end.div_ceil(LINE_BYTES);
        let bytes = |bits: &[u64]| {
            lines.clone().filter(|line| bits[line / 64] >> (line % 64) & 1 != 0).count() as u64 * LINE_BYTES as u64
        };
        let own = Traffic { hbm_read: bytes(&self.read), hbm_write: bytes(&self.written), ..Traffic::default() };
        self.other.range(lines.clone()).fold(own, |mut sum, (_, line)| {
            sum += *line;
            sum
        })
    }
}

/// Which way bytes of global memory go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}
