//! Properties of the order of work and of the layouts, over random shapes and token counts.

use std::collections::{HashMap, HashSet};

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::{Shape, SymmetricLayout, WorkspaceLayout};
use ferromoe_kernel::schedule::{
    MAX_PULL_ROWS, Phase, RowCursor, ScheduleShape, Task, TaskCursor, WAVES_AHEAD, combine_chunks, combine_tokens,
    group_tiles, pull_rows, route_chunks, route_step, route_tokens, shared_row,
};
use ferromoe_kernel::tile::{MAX_TOKEN_TILE, TOKEN_TILES, WEIGHT_TILE, padded_rows, token_tiles};
use proptest::prelude::*;

const LINEAR1: u32 = Phase::Linear1 as u32;
const LINEAR2: u32 = Phase::Linear2 as u32;
const COMBINE: u32 = Phase::Combine as u32;

fn tasks(shape: ScheduleShape, rows: &[u32]) -> Vec<Task> {
    let mut cursor = TaskCursor::new(shape, rows);
    (0..).map(|ticket| cursor.seek(ticket, rows)).take_while(|task| task.phase != Phase::End as u32).collect()
}

fn schedule() -> impl Strategy<Value = (ScheduleShape, Vec<u32>)> {
    let rows = prop::collection::vec(prop_oneof![Just(0u32), 1..40u32, 60..300u32, 900..3000u32], 1..12);
    (rows, 1..6u32, 1..6u32, prop_oneof![1..9u32, 100..200u32], 0..5u32).prop_map(
        |(rows, wave_tiles, intermediate, hidden, combine_chunks)| {
            let shape = ScheduleShape {
                wave_tiles,
                linear1_rows: 128 * intermediate,
                linear2_rows: 64 * hidden,
                combine_chunks,
                cluster: 1,
                most_rows: rows.iter().copied().max().unwrap_or(0),
            };
            (shape, rows)
        },
    )
}

proptest! {
    #[test]
    fn every_task_comes_once((shape, rows) in schedule()) {
        let mut seen = HashSet::new();
        for task in tasks(shape, &rows) {
            prop_assert!(seen.insert((task.phase, task.expert, task.weight_row, task.tile)), "{task:?} comes twice");
        }
        let tiles: u32 = rows.iter().map(|&rows| token_tiles(rows)).sum();
        let blocks = shape.linear1_rows.div_ceil(WEIGHT_TILE) + shape.linear2_rows.div_ceil(WEIGHT_TILE);
        prop_assert_eq!(seen.len() as u32, tiles * blocks + shape.combine_chunks);
    }

    #[test]
    fn dependencies_have_smaller_tickets((shape, rows) in schedule()) {
        let tasks = tasks(shape, &rows);
        let last = |phase| tasks.iter().enumerate().filter(|(_, task)| task.phase == phase)
            .map(|(ticket, task)| (task.tile, ticket)).collect::<HashMap<_, _>>();
        let linear1 = last(LINEAR1);
        let mut linear2_end = 0;
        for (ticket, task) in tasks.iter().enumerate().filter(|(_, task)| task.phase == LINEAR2) {
            prop_assert!(linear1[&task.tile] < ticket, "{task:?} precedes its tile's linear 1");
            linear2_end = ticket;
        }
        for (ticket, task) in tasks.iter().enumerate().filter(|(_, task)| task.phase == COMBINE) {
            prop_assert!(ticket >= linear2_end, "{task:?} precedes linear 2");
        }
    }

    /// When linear 2 of an expert begins, linear 1 has come to the experts that begin less than [`WAVES_AHEAD`] waves of tiles behind it, and not further.
    #[test]
    fn linear_1_is_waves_ahead((shape, rows) in schedule()) {
        let first_tile = |expert: u32| rows[..expert as usize].iter().map(|&rows| token_tiles(rows)).sum::<u32>();
        let mut begun = HashSet::new();
        for task in tasks(shape, &rows).iter().filter(|task| task.phase != COMBINE) {
            if task.phase == LINEAR1 {
                begun.insert(task.expert);
                continue;
            }
            let ahead = first_tile(task.expert + 1) + WAVES_AHEAD * shape.wave_tiles;
            let hit = (0..rows.len() as u32).filter(|&expert| rows[expert as usize] > 0);
            let due: HashSet<u32> = hit.filter(|&expert| first_tile(expert) < ahead).collect();
            prop_assert_eq!(&begun, &due, "at {:?}", task);
        }
    }

    /// Each CTA sees only the tickets it claims; what it makes of them does not depend on which those are.
    #[test]
    fn a_cursor_that_skips_tickets_finds_the_same_tasks((shape, rows) in schedule(), stride in 1..9usize, first in 0..9usize) {
        let all = tasks(shape, &rows);
        let mut cursor = TaskCursor::new(shape, &rows[..]);
        for ticket in (first..all.len()).step_by(stride) {
            prop_assert_eq!(cursor.seek(ticket as u32, &rows[..]), all[ticket]);
        }
    }

    /// The tiles of a group take turns at a block of weights: tickets that share one are neighbours.
    #[test]
    fn a_group_of_tiles_goes_through_the_weights_once((shape, rows) in schedule()) {
        let mut blocks = HashSet::new();
        let mut last = None;
        for task in tasks(shape, &rows).iter().filter(|task| task.phase != COMBINE) {
            let columns = if task.phase == LINEAR1 { shape.linear2_rows } else { shape.linear1_rows / 2 };
            let first_tile: u32 = rows[..task.expert as usize].iter().map(|&rows| token_tiles(rows)).sum();
            let block = (task.phase, task.expert, (task.tile - first_tile) / group_tiles(columns), task.weight_row);
            prop_assert!(last == Some(block) || blocks.insert(block), "{task:?} comes back to a block of weights");
            last = Some(block);
        }
    }

    /// A group's tokens fill at most 16 MB, a single tile's aside; twice as many tiles, rounded up to a power of two columns, would fill more.
    #[test]
    fn a_group_s_tokens_stay_in_the_cache(columns in (1..400u32).prop_map(|blocks| 64 * blocks)) {
        let (group, tile_bytes) = (group_tiles(columns), 2 * MAX_TOKEN_TILE * columns);
        prop_assert!(group.is_power_of_two() && (group == 1 || group * tile_bytes <= 16 << 20));
        prop_assert!(2 * group * 2 * MAX_TOKEN_TILE * columns.next_power_of_two() > 16 << 20);
    }

    /// What shared experts have to do is known before the counts are, but for the widest tile.
    #[test]
    fn early_tasks_and_rows_are_the_first((shape, routed) in schedule(), shared_experts in 0..3u32, tokens in prop_oneof![Just(0u32), 1..40u32, 200..900u32]) {
        let rows: Vec<_> = std::iter::repeat_n(tokens, shared_experts as usize).chain(routed).collect();
        let all = tasks(shape, &rows);
        let mut found = 0;
        for (ticket, task) in all.iter().enumerate() {
            let Some(early) = shape.early_task(shared_experts, tokens, ticket as u32) else { break };
            prop_assert_eq!(Task { widest: task.widest, ..early }, *task);
            found += 1;
        }
        let early = all.iter().filter(|task| task.phase == LINEAR1 && task.expert == 0 && shared_experts > 0).count();
        prop_assert_eq!(found, early);
        let mut cursor = RowCursor::START;
        for number in 0..shared_experts * tokens {
            prop_assert_eq!(shared_row(shared_experts, tokens, number), cursor.seek(number, &rows[..]));
        }
        prop_assert_eq!(shared_row(shared_experts, tokens, shared_experts * tokens), None);
    }

    /// Tiles cover the pulled rows of their expert, and share no pool row with each other.
    #[test]
    fn tiles_and_rows_agree((shape, rows) in schedule()) {
        let mut cursor = RowCursor::START;
        let pulled: Vec<_> = (0..rows.iter().sum()).map(|ticket| {
            cursor.seek(ticket, &rows[..]).expect("a row for every ticket")
        }).collect();
        prop_assert_eq!(cursor.seek(pulled.len() as u32, &rows[..]), None);
        let mut tiles: Vec<_> = tasks(shape, &rows).into_iter().filter(|task| task.phase == LINEAR1 && task.weight_row == 0).collect();
        tiles.sort_by_key(|task| task.tile);
        let mut row = pulled.iter();
        let mut end = 0;
        for (number, tile) in tiles.iter().enumerate() {
            prop_assert_eq!(tile.tile as usize, number);
            prop_assert!(tile.pool_row >= end);
            end = tile.pool_row + TOKEN_TILES[tile.width as usize];
            prop_assert!(tile.rows >= 1 && tile.rows <= TOKEN_TILES[tile.width as usize]);
            for offset in 0..tile.rows {
                let row = row.next().expect("a pulled row for every row of a tile");
                prop_assert_eq!((row.expert, row.tile, row.pool_row), (tile.expert, tile.tile, tile.pool_row + offset));
            }
        }
        prop_assert_eq!(row.next(), None);
        prop_assert_eq!(end, rows.iter().map(|&rows| padded_rows(rows)).sum::<u32>());
    }

    /// A lane of a ticket's rows sees every eighth row, or so; what it makes of them does not depend on which those are.
    #[test]
    fn a_row_cursor_that_skips_rows_finds_the_same((_, rows) in schedule(), stride in 1..300usize, first in 0..9usize) {
        let (mut all, mut skipping) = (RowCursor::START, RowCursor::START);
        let numbers = 0..rows.iter().sum::<u32>() + 9;
        let found: Vec<_> = numbers.map(|number| all.seek(number, &rows[..])).collect();
        for number in (first..found.len()).step_by(stride) {
            prop_assert_eq!(skipping.seek(number as u32, &rows[..]), found[number]);
        }
    }

    #[test]
    fn pull_tickets_grow_with_the_rows(rows in 0..100_000u32, ctas in 1..200u32) {
        let batch = pull_rows(rows, ctas);
        prop_assert!(batch.is_power_of_two() && batch <= MAX_PULL_ROWS);
        prop_assert!(batch == 1 || batch * 4 * ctas <= rows, "{batch} rows a ticket leave CTAs without work");
    }

    #[test]
    fn chunks_cover_all_tokens(tokens in 0..5000u32, top_k in 1..33u32, ctas in 1..200u32) {
        let (per_ticket, tickets, step) = (route_tokens(tokens, top_k), route_chunks(tokens, top_k), route_step(top_k));
        prop_assert!(tickets >= 1 && tickets * per_ticket >= tokens && tokens >= (tickets - 1) * per_ticket);
        // A single ticket has few tokens, and of several each is one step.
        let right = if tickets == 1 { per_ticket <= 2 * step } else { per_ticket == step };
        prop_assert!(right, "{per_ticket} tokens a ticket, {step} a step");
        let per_chunk = combine_tokens(tokens, ctas);
        prop_assert!((1..=16).contains(&per_chunk));
        let chunks = combine_chunks(tokens, ctas);
        prop_assert!(chunks * per_chunk >= tokens && tokens >= chunks.saturating_sub(1) * per_chunk);
    }

    /// Any routing fits the pools: the one that pads most, and the one that has all tokens at the fewest experts.
    #[test]
    fn pools_hold_any_routing(shape in shape(), draws in prop::collection::vec(0..1000u32, 1..64)) {
        let routed = shape.routed_experts();
        let choices = shape.ranks * shape.max_tokens * shape.top_k.min(routed);
        let mut left = choices;
        let mut rows = vec![0u32; routed as usize];
        for (expert, draw) in draws.iter().cycle().take(routed as usize).enumerate() {
            rows[expert] = (draw * shape.max_tokens * shape.ranks / 1000).min(left);
            left -= rows[expert];
        }
        rows.extend(vec![shape.max_tokens; shape.shared_experts as usize]);
        prop_assert!(rows.iter().map(|&rows| padded_rows(rows)).sum::<u32>() <= shape.pool_rows());
        prop_assert!(rows.iter().map(|&rows| token_tiles(rows)).sum::<u32>() <= shape.pool_tiles());
    }

    /// A rank that is at its next layer must write nothing that another still reads of the last.
    #[test]
    fn layers_of_different_shapes_keep_parities_and_sources_apart(a in shape(), b in shape()) {
        let b = Shape { experts: b.routed_experts() * a.ranks, ranks: a.ranks, ..b };
        let b = Shape { top_k: b.top_k.min(b.experts), ..b };
        let sizes = Shape {
            hidden: a.hidden.max(b.hidden),
            intermediate: a.intermediate.max(b.intermediate),
            experts: a.experts.max(b.experts),
            shared_experts: a.shared_experts.max(b.shared_experts),
            top_k: a.top_k.max(b.top_k),
            max_tokens: a.max_tokens.max(b.max_tokens),
            ranks: a.ranks,
        };
        let layout = SymmetricLayout::new(&sizes, &Format::ALL);
        let (ranks, top_k, tokens) = (sizes.ranks as u64, sizes.top_k as u64, sizes.max_tokens as u64);
        for shape in [a, b] {
            for format in &Format::ALL {
                prop_assert!(shape.pool_rows(format) <= sizes.pool_rows(format));
                prop_assert!(shape.pool_tiles(format) <= sizes.pool_tiles(format));
            }
            let (last_expert, last_rank) = (shape.routed_experts() - 1, shape.ranks - 1);
            for parity in 0..2 {
                let places = [layout.count_index(&shape, parity, 0, 0), layout.count_index(&shape, parity, last_rank, last_expert)];
                let first = parity as u64 * layout.counts_of_parity;
                prop_assert!(places.iter().all(|place| (first..first + layout.counts_of_parity).contains(place)));
            }
            if shape.max_tokens == 0 {
                continue;
            }
            let last_token = shape.max_tokens - 1;
            for source in 0..shape.ranks {
                let places = [layout.list_index(&shape, source, 0, 0), layout.list_index(&shape, source, last_expert, last_token)];
                let first = source as u64 * layout.lists_of_source;
                prop_assert!(places.iter().all(|place| (first..first + layout.lists_of_source).contains(place)));
                let last = shape.top_k - 1;
                let places = [layout.follower_index(&shape, source, 0, 0), layout.follower_index(&shape, source, last_token, last)];
                let first = source as u64 * layout.followers_of_source;
                prop_assert!(places.iter().all(|place| (first..first + layout.followers_of_source).contains(place)));
            }
        }
        prop_assert!(layout.lists + ranks * layout.lists_of_source * 8 <= layout.followers);
        prop_assert!(layout.followers + ranks * tokens * top_k * 4 <= layout.combine);
    }

    #[test]
    fn parts_of_a_layout_do_not_overlap(shape in shape()) {
        let layout = SymmetricLayout::new(&shape);
        let (ranks, routed, slots) = (shape.ranks as u64, shape.routed_experts() as u64, shape.slots() as u64);
        let (tokens, hidden, rows) = (shape.max_tokens as u64, shape.hidden as u64, shape.pool_rows() as u64);
        in_order(&[
            (layout.counts, 2 * ranks * routed * 8),
            (layout.hidden, 2 * ranks * 8),
            (layout.layers, 2 * ranks * 8),
            (layout.flags, (shape.experts + shape.shared_experts) as u64 * 4),
            (layout.lists, ranks * routed * tokens * 8),
            (layout.followers, ranks * tokens * shape.top_k as u64 * 4),
            (layout.combine, tokens * slots * hidden * 2),
            (layout.bytes(&shape), 0),
        ])?;
        let layout = WorkspaceLayout::new(&shape);
        let counter = layout.counter;
        let tiles = shape.pool_tiles() as u64 * 4;
        in_order(&[
            (layout.status, 24),
            (layout.epoch, 8),
            (layout.counters, 2 * counter.bytes),
            (layout.row_meta, rows * 8),
            (layout.tokens, rows * hidden * 2),
            (layout.intermediate, rows * shape.intermediate as u64 * 2),
            (layout.bytes, 0),
        ])?;
        in_order(&[
            (counter.route_ticket, 4),
            (counter.routed_chunks, 4),
            (counter.pull_ticket, 4),
            (counter.task_ticket, 4),
            (counter.sent, shape.experts as u64 * 4),
            (counter.rows_ready, tiles),
            (counter.columns_ready, tiles),
            (counter.expert_done, shape.local_experts() as u64 * 4),
            (counter.bytes, 0),
        ])?;
    }
}

/// v3 with tiles of 256 tokens, of which 4 stages fit: linear 1 has 112 k-blocks, linear 2 has 32. With tiles of 8 there are the most, 6.
#[test]
fn a_task_is_claimed_two_rounds_of_the_stages_before_the_end_of_the_last() {
    let shape =
        Shape { hidden: 7168, intermediate: 2048, experts: 8, shared_experts: 0, top_k: 1, max_tokens: 1, ranks: 1 };
    let claim_block = |phase, widest| Task { widest, ..Task::plain(phase, 0) }.claim_block(&shape);
    let widest = TOKEN_TILES.len() as u32 - 1;
    assert_eq!([claim_block(Phase::Linear1, widest), claim_block(Phase::Linear2, widest)], [104, 24]);
    assert_eq!([claim_block(Phase::Linear1, 0), claim_block(Phase::Linear2, 0)], [100, 20]);
    let short = Shape { intermediate: 768, ..shape };
    assert_eq!(Task::plain(Phase::Linear2, 0).claim_block(&short), 0);
}

fn shape() -> impl Strategy<Value = Shape> {
    (1..9u32, 1..9u32, 0..3u32, 1..33u32, 0..300u32, 1..5u32, 1..5u32).prop_map(
        |(ranks, routed, shared_experts, top_k, max_tokens, hidden, intermediate)| Shape {
            hidden: 64 * hidden,
            intermediate: 64 * intermediate,
            experts: ranks * routed,
            shared_experts,
            top_k: top_k.min(ranks * routed),
            max_tokens,
            ranks,
        },
    )
}

/// Each part (offset, bytes) begins aligned, behind the one before.
fn in_order(parts: &[(u64, u64)]) -> Result<(), TestCaseError> {
    for (part, pair) in parts.windows(2).enumerate() {
        prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "part {part} overlaps the next: {pair:?}");
        prop_assert!(pair[1].0.is_multiple_of(256), "part {} is misaligned", part + 1);
    }
    Ok(())
}
