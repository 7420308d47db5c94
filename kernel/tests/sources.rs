//! The order of an expert's rows, over random counts.

use ferromoe_kernel::layout::MAX_RANKS;
use ferromoe_kernel::sources::{Sources, place_of, source_at};
use proptest::prelude::*;

fn sources() -> impl Strategy<Value = Sources> {
    prop::array::uniform8(prop_oneof![Just(0u32), Just(3u32), 0..40u32, 0..2000u32]).prop_map(Sources)
}

proptest! {
    /// Every row comes once: slot by slot, and within a slot from each source that has it, in the order of their places.
    #[test]
    fn rows_come_round_by_round(sources in sources()) {
        let most = sources.0.into_iter().max().unwrap_or(0);
        let rounds = (0..most).flat_map(|slot| (0..MAX_RANKS).map(move |place| (place, slot)));
        for (index, (place, slot)) in rounds.filter(|&(place, slot)| sources.0[place as usize] > slot).enumerate() {
            prop_assert_eq!(sources.locate(index as u32), (place, slot));
            prop_assert_eq!(sources.index_of(place, slot), index as u32);
        }
    }

    /// Behind the last row nothing is found that is out of bounds.
    #[test]
    fn behind_the_last_row_is_the_first(sources in sources(), behind in 0..5u32) {
        prop_assert_eq!(sources.locate(sources.0.iter().sum::<u32>() + behind), (0, 0));
    }
}

#[test]
fn each_owner_begins_with_another_rank_and_ends_with_itself() {
    for ranks in 1..=MAX_RANKS {
        for owner in 0..ranks {
            let order: Vec<_> = (0..ranks).map(|place| source_at(owner, ranks, place)).collect();
            let expected: Vec<_> = (1..=ranks).map(|step| (owner + step) % ranks).collect();
            assert_eq!(order, expected, "rank {owner} of {ranks}");
            let places = order.iter().map(|&source| place_of(owner, ranks, source));
            assert!(places.eq(0..ranks), "rank {owner} of {ranks}");
        }
    }
}
