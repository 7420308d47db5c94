//! The order of an expert's rows: by slot, then by source rank. Neighbouring rows come from different ranks, and each owner begins with
//! another one, so that no two read over the same link at once.

use crate::layout::MAX_RANKS;

const RANKS: usize = MAX_RANKS as usize;

/// The rank whose rows have `place` in the order of rank `owner`: the one behind it has the first, itself the last.
pub const fn source_at(owner: u32, ranks: u32, place: u32) -> u32 {
    let source = owner + 1 + place;
    if source < ranks { source } else { source - ranks }
}

/// The place of rank `source` in the order of rank `owner`.
pub const fn place_of(owner: u32, ranks: u32, source: u32) -> u32 {
    let place = source + ranks - 1 - owner;
    if place < ranks { place } else { place - ranks }
}

/// Rows that each source has for one expert, by place; 0 where there is no rank.
#[derive(Clone, Copy, Debug)]
pub struct Sources(pub [u32; RANKS]);

// `unroll!` has branches for counts beyond the array's, which are never taken.
#[allow(clippy::out_of_bounds_indexing)]
impl Sources {
    /// The place of the source, and the slot, of the expert's row `index`: rounds of one row a source, as long as it has one.
    #[inline(always)]
    pub fn locate(&self, index: u32) -> (u32, u32) {
        let (mut slot, mut left) = (0, index);
        loop {
            // Rounds with the same sources: those that have a row at `slot`, up to the end of the first that ends.
            let (mut active, mut end) = (0, u32::MAX);
            unroll!(PLACE < RANKS, {
                if self.0[PLACE] > slot {
                    active += 1;
                    end = if self.0[PLACE] < end { self.0[PLACE] } else { end };
                }
            });
            if active == 0 {
                // Behind the last row.
                return (0, 0);
            }
            if left < active * (end - slot) {
                slot += left / active;
                break;
            }
            left -= active * (end - slot);
            slot = end;
        }
        let first = self.index_of(0, slot);
        let (mut place, mut rows) = (0, 0);
        unroll!(PLACE < RANKS, {
            if self.0[PLACE] > slot {
                if first + rows <= index {
                    place = PLACE as u32;
                }
                rows += 1;
            }
        });
        (place, slot)
    }

    /// The index of a source's row among the expert's: what [`Self::locate`] takes.
    #[inline(always)]
    pub fn index_of(&self, place: u32, slot: u32) -> u32 {
        let mut index = 0;
        unroll!(PLACE < RANKS, {
            index += if self.0[PLACE] < slot { self.0[PLACE] } else { slot };
            index += (self.0[PLACE] > slot && (PLACE as u32) < place) as u32;
        });
        index
    }
}
