//! Which instructions are about another device's memory.

use super::Context;
use crate::check::Scope;
use crate::program::{Address, Op, Space};
use crate::registers::lanes;

impl Context<'_> {
    /// Whether an instruction touches memory that is away, or is ordered after stores to such: it waits until all devices
    /// stand still.
    #[inline]
    pub(super) fn needs_peers(&self, op: &Op, active: u32) -> bool {
        let (global, releases) = match op {
            Op::Load(access) => (global(access.space, access.address), None),
            Op::Store(access) => {
                (global(access.space, access.address), access.order.releases().then_some(access.scope))
            }
            Op::Atomic(atomic) => {
                (global(atomic.space, atomic.address), atomic.order.releases().then_some(atomic.scope))
            }
            Op::Fence { scope, .. } => (None, Some(*scope)),
            Op::TensorMapReplace(operation) => (global(operation.space, operation.address), None),
            Op::TensorMapPublish { to, scope, .. } => (Some(*to), Some(*scope)),
            Op::TensorCopy(copy) => (Some(copy.map), None),
            Op::SmallCopy(copy) => (Some(copy.source), None),
            // Issued without its memory, if only an error needs that.
            Op::BulkCopy(copy) => {
                let places = [(copy.source_space, copy.source), (copy.destination_space, copy.destination)];
                return places.into_iter().any(|(space, address)| {
                    space == Space::Global && self.any_away(address, active, |address| !address.is_multiple_of(16))
                });
            }
            _ => return false,
        };
        global.is_some_and(|address| self.any_away(address, active, |_| true))
            || releases.is_some_and(|scope| self.releases_away(scope))
    }

    fn any_away(&self, address: Address, active: u32, matters: impl Fn(u64) -> bool) -> bool {
        if self.memory.is_whole() {
            return false;
        }
        let addresses = self.addresses(address);
        lanes(active).any(|lane| self.memory.is_away(addresses[lane]) && matters(addresses[lane]))
    }

    fn releases_away(&self, scope: Scope) -> bool {
        self.memory.releases_away(self.state.device, self.state.cluster.id(), scope)
    }
}

/// The address of an access that may be to global memory.
fn global(space: Space, address: Address) -> Option<Address> {
    matches!(space, Space::Global | Space::Generic).then_some(address)
}
