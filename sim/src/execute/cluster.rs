//! Clusters: their window of shared memory, and their barrier.
//!
//! An address of shared memory has the rank of its CTA, plus one, in bits 24 to 31; 0 there is the executing CTA, as for
//! every address of shared::cta that no `mapa` has given.

use super::{Context, Executed, Flow, NEVER};
use crate::cta::{Cta, CtaState, Wait};
use crate::error::Fault;
use crate::memory::{SHARED_WINDOW, Window, window_offset};
use crate::program::Space;
use crate::registers::{LANES, R32, R64, Register, lanes};

const RANK_SHIFT: u32 = 24;

/// A place in the shared memory of a CTA of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SharedAt {
    pub slot: usize,
    /// Identity of the CTA.
    pub cta: u64,
    /// Offset in its shared memory.
    pub address: u64,
}

/// The state of a CTA of the cluster: the executing one's, or a peer's.
pub(super) fn state_at<'s>(own: &'s mut CtaState, peers: &'s mut [Option<Box<Cta>>], at: SharedAt) -> &'s mut CtaState {
    match peers.get_mut(at.slot).and_then(Option::as_mut) {
        Some(peer) if at.cta != own.id => &mut peer.state,
        _ => own,
    }
}

impl Context<'_> {
    fn rank_of(&self, address: u64) -> u32 {
        match address >> RANK_SHIFT {
            0 => self.state.cluster.rank,
            rank => u32::try_from(rank - 1).unwrap_or(u32::MAX),
        }
    }

    /// Whose shared memory an address in the shared window is in. One beyond the cluster's is left as it is: it is out of
    /// bounds wherever it is used.
    #[inline]
    pub(super) fn locate(&self, address: u64, space: Space) -> Result<SharedAt, Fault> {
        if address >> RANK_SHIFT == 0 {
            return Ok(SharedAt { slot: self.slot, cta: self.state.id, address });
        }
        self.locate_mapped(address, space)
    }

    fn locate_mapped(&self, address: u64, space: Space) -> Result<SharedAt, Fault> {
        let own = SharedAt { slot: self.slot, cta: self.state.id, address };
        let rank = self.rank_of(address);
        if rank as usize >= self.state.cluster.members.len() {
            return Ok(own);
        }
        let address = address & ((1 << RANK_SHIFT) - 1);
        if rank == self.state.cluster.rank {
            return Ok(SharedAt { address, ..own });
        }
        if space == Space::Shared {
            return Err(Fault::Operand(format!(
                "shared memory {address:#x} of the cluster's CTA of rank {rank} is not in shared::cta of the executing one"
            )));
        }
        self.peer_at(rank, address)
    }

    /// A place in the shared memory of the CTA of a rank.
    pub(super) fn peer_at(&self, rank: u32, address: u64) -> Result<SharedAt, Fault> {
        let Some(&(slot, cta)) = self.state.cluster.members.get(rank as usize) else {
            let count = self.state.cluster.members.len();
            return Err(Fault::Operand(format!("rank {rank} in a cluster of {count} CTAs")));
        };
        if cta != self.state.id && self.peers[slot].as_ref().is_none_or(|peer| peer.state.id != cta) {
            return Err(Fault::PeerExited { place: format!("shared memory {address:#x}"), rank });
        }
        Ok(SharedAt { slot, cta, address })
    }

    /// The same of a generic address, or one of the shared window, by its space.
    pub(super) fn locate_generic(&self, address: u64, space: Space) -> Result<SharedAt, Fault> {
        if space != Space::Generic {
            return self.locate(address, space);
        }
        if Window::of(address) != Window::Shared {
            return Err(Fault::Operand(format!("address {address:#x} is not in shared memory")));
        }
        self.locate(window_offset(address), Space::Cluster)
    }

    pub(super) fn map_shared(
        &mut self,
        destination: Register,
        address: Register,
        rank: R32,
        generic: bool,
        active: u32,
    ) -> Executed {
        let count = self.state.cluster.members.len();
        let mut values = [0; LANES];
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let (from, rank) =
                (address.lane(&self.warp.registers, lane), self.warp.registers.r32[rank.0 as usize][lane]);
            if rank as usize >= count {
                return Err(Fault::Operand(format!("rank {rank} in a cluster of {count} CTAs")));
            }
            let at = if generic { self.in_window(from)? } else { from };
            let offset = at & ((1 << RANK_SHIFT) - 1);
            let window = if generic { SHARED_WINDOW } else { 0 };
            values[lane] = window | u64::from(rank + 1) << RANK_SHIFT | offset;
        }
        self.fault_lanes = 0;
        destination.write(&mut self.warp.registers, active, &values);
        Ok(Flow::Next)
    }

    pub(super) fn in_window(&self, address: u64) -> Result<u64, Fault> {
        if Window::of(address) == Window::Shared {
            return Ok(window_offset(address));
        }
        Err(Fault::Operand(format!("address {address:#x} is not in shared memory")))
    }

    pub(super) fn cta_rank(&mut self, destination: R32, address: Register, generic: bool, active: u32) -> Executed {
        let mut values = [0; LANES];
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let from = address.lane(&self.warp.registers, lane);
            let at = if generic { self.in_window(from)? } else { from };
            values[lane] = u64::from(self.rank_of(at));
        }
        self.fault_lanes = 0;
        Register::R32(destination).write(&mut self.warp.registers, active, &values);
        Ok(Flow::Next)
    }

    pub(super) fn is_own_shared(
        &mut self,
        destination: crate::registers::Predicate,
        address: R64,
        active: u32,
    ) -> Executed {
        let addresses = self.warp.registers.r64[address.0 as usize];
        let own = lanes(active).filter(|lane| {
            let address = addresses[*lane];
            Window::of(address) == Window::Shared && self.rank_of(window_offset(address)) == self.state.cluster.rank
        });
        let own = own.fold(0, |all, lane| all | 1 << lane);
        self.warp.registers.set_predicate(destination, active, own);
        Ok(Flow::Next)
    }

    /// Arrives; the scheduler completes the phase when every thread of the cluster has (see `Run::settle_cluster`).
    pub(super) fn cluster_arrive(&mut self, relaxed: bool, aligned: bool, active: u32) -> Executed {
        if aligned && let Some(wait) = self.all_lanes(active) {
            return Ok(wait);
        }
        let twice = active & (self.warp.cluster_arrived | self.warp.cluster_passed);
        if twice != 0 {
            self.fault_lanes = twice;
            return Err(Fault::Synchronisation(
                "a second barrier.cluster.arrive without a barrier.cluster.wait between".to_owned(),
            ));
        }
        if let Some(checker) = &mut self.checker {
            checker.arrive_cluster(self.agent, active, relaxed);
        }
        self.warp.cluster_arrived |= active;
        self.state.cluster.arrived = true;
        self.state.changed = true;
        *self.progress += 1;
        self.warp.polls.reset();
        Ok(Flow::Next)
    }

    pub(super) fn cluster_wait(&mut self, aligned: bool, active: u32) -> Executed {
        if aligned && let Some(wait) = self.all_lanes(active) {
            return Ok(wait);
        }
        let never = active & !(self.warp.cluster_arrived | self.warp.cluster_passed);
        if never != 0 {
            self.fault_lanes = never;
            return Err(Fault::Synchronisation(
                "barrier.cluster.wait without a barrier.cluster.arrive before".to_owned(),
            ));
        }
        if active & self.warp.cluster_arrived != 0 {
            return Ok(Flow::Wait(Wait::Cluster, NEVER));
        }
        self.warp.cluster_passed &= !active;
        if let Some(checker) = &mut self.checker {
            checker.wait_cluster(self.agent, active);
            if aligned {
                checker.end_reads(self.agent, active);
            }
        }
        Ok(Flow::Next)
    }
}
