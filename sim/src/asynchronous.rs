//! Copies and matrix products that are under way, each due at a moment the seed chose.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::memory::Copied;
use crate::program::{AtomicOperation, AtomicType, CopyKind};

/// Where a copied range lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Global(u64),
    /// Of the issuing CTA as a source, of the transfer's target as a destination.
    Shared(u32),
    /// A source outside the tensor: what to fill with, repeated.
    Fill([u8; 2]),
}

/// A contiguous part of a copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CopyPart {
    pub from: Place,
    pub to: Place,
    pub bytes: u32,
}

/// Who is told when a copy is done.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Completion {
    /// Complete these bytes on the mbarrier at this shared address.
    Mbarrier { address: u32, bytes: u32 },
    /// A group of a lane.
    Group(CopyKind),
}

/// Who issued an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Issuer {
    /// Slot of the CTA, and its identity.
    pub slot: usize,
    pub cta: u64,
    pub warp: usize,
    pub lanes: u32,
    pub pc: u32,
}

/// A copy under way.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub issuer: Issuer,
    pub launch: usize,
    pub device: usize,
    /// The cluster of the CTA that issued it.
    pub cluster: u64,
    /// The CTA in whose shared memory the destination (if it is shared) and the mbarrier are: slot and identity.
    pub target: (usize, u64),
    /// Other CTAs of the cluster that are written at the same addresses, once the source was read, each as an operation
    /// with a number of its own.
    pub multicast: Vec<(u64, (usize, u64))>,
    pub parts: Vec<CopyPart>,
    pub completion: Completion,
    pub reduction: Option<(AtomicOperation, AtomicType, u32)>,
    /// What was read, once it was, part after part.
    pub data: Option<Copied>,
}

/// What is due.
#[derive(Debug)]
pub(crate) enum Event {
    /// The next stage of a copy: read the source, or write the destination.
    Transfer(Transfer),
    /// The oldest wgmma of a warpgroup.
    Wgmma { issuer: Issuer, group: usize },
    /// `cp.async.mbarrier.arrive`: arrives once these copies are done.
    Arrive { issuer: Issuer, address: u32, after: Vec<u64> },
}

impl Event {
    /// Who has issued it.
    pub fn issuer(&self) -> Issuer {
        match self {
            Self::Transfer(transfer) => transfer.issuer,
            Self::Wgmma { issuer, .. } | Self::Arrive { issuer, .. } => *issuer,
        }
    }
}

/// How far a copy has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Issued,
    Read,
}

/// All operations under way, by the step at which they are due.
#[derive(Debug, Default)]
pub(crate) struct AsyncQueue {
    due: BinaryHeap<Reverse<(u64, u64)>>,
    events: HashMap<u64, Event>,
    stages: HashMap<u64, Stage>,
    next: u64,
    stride: u64,
}

impl AsyncQueue {
    /// A queue that numbers operations by `first`, `first + stride` and so on.
    pub fn new(first: u64, stride: u64) -> Self {
        Self { next: first, stride, ..Self::default() }
    }

    /// Adds an operation and returns its number.
    pub fn push(&mut self, due: u64, event: Event) -> u64 {
        let number = self.reserve();
        if matches!(event, Event::Transfer(_)) {
            self.stages.insert(number, Stage::Issued);
        }
        self.events.insert(number, event);
        self.due.push(Reverse((due, number)));
        number
    }

    /// A number for an operation that comes later.
    pub fn reserve(&mut self) -> u64 {
        self.next += self.stride;
        self.next - self.stride
    }

    /// Puts an operation back, for its next stage.
    pub fn again(&mut self, due: u64, number: u64, event: Event) {
        self.stages.insert(number, Stage::Read);
        self.events.insert(number, event);
        self.due.push(Reverse((due, number)));
    }

    pub fn finish(&mut self, number: u64) {
        self.stages.remove(&number);
    }

    /// Whether a copy has read its source (`read`), or is done.
    pub fn is_done(&self, number: u64, read: bool) -> bool {
        match self.stages.get(&number) {
            None => true,
            Some(Stage::Read) => read,
            Some(Stage::Issued) => false,
        }
    }

    /// The next operation that is due by step `until`, with its number.
    pub fn pop(&mut self, until: u64) -> Option<(u64, Event)> {
        let Reverse((due, _)) = self.due.peek()?;
        if *due > until {
            return None;
        }
        let Reverse((_, number)) = self.due.pop()?;
        Some((number, self.events.remove(&number)?))
    }

    /// When the next operation is due.
    pub fn next_due(&self) -> Option<u64> {
        self.due.peek().map(|Reverse((due, _))| *due)
    }

    /// Takes the transfers out that are still to read a CTA's shared memory; put them back with [`Self::again`].
    pub fn take_reads(&mut self, cta: u64) -> Vec<(u64, Transfer)> {
        let reads = |event: &Event| match event {
            Event::Transfer(transfer) => {
                transfer.data.is_none()
                    && transfer.issuer.cta == cta
                    && transfer.multicast.is_empty()
                    && matches!(transfer.completion, Completion::Group(_))
                    && transfer.parts.iter().any(|part| matches!(part.from, Place::Shared(_)))
            }
            _ => false,
        };
        let mut numbers: Vec<u64> =
            self.events.iter().filter(|(_, event)| reads(event)).map(|(number, _)| *number).collect();
        numbers.sort_unstable();
        let taken = numbers.into_iter().filter_map(|number| match self.events.remove(&number)? {
            Event::Transfer(transfer) => Some((number, transfer)),
            _ => None,
        });
        let taken = taken.collect::<Vec<_>>();
        // Their old moments are gone.
        self.due.retain(|Reverse((_, number))| !taken.iter().any(|(other, _)| other == number));
        taken
    }

    /// An operation that still needs a CTA's shared memory or registers.
    pub fn needs(&self, cta: u64) -> Option<Issuer> {
        let mut found: Vec<(u64, Issuer)> = self
            .events
            .iter()
            .filter_map(|(number, event)| match event {
                Event::Transfer(transfer) => {
                    let reads = transfer.data.is_none()
                        && transfer.issuer.cta == cta
                        && transfer.parts.iter().any(|part| matches!(part.from, Place::Shared(_)));
                    let targets = transfer.multicast.iter().map(|(_, target)| target).chain([&transfer.target]);
                    let writes = match transfer.completion {
                        Completion::Mbarrier { .. } => { targets }.any(|(_, target)| *target == cta),
                        Completion::Group(_) => transfer.data.is_none() && transfer.target.1 == cta,
                    };
                    (reads || writes).then_some((*number, transfer.issuer))
                }
                Event::Wgmma { issuer, .. } | Event::Arrive { issuer, .. } => {
                    (issuer.cta == cta).then_some((*number, *issuer))
                }
            })
            .collect();
        found.sort_by_key(|(number, _)| *number);
        found.first().map(|(_, issuer)| *issuer)
    }
}
