//! Properties of the order of work and of the layouts, over random shapes and token counts.

use std::collections::{HashMap, HashSet};

use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::{Shape, SymmetricLayout, WorkspaceLayout};
use ferromoe_kernel::quantise::groups;
use ferromoe_kernel::schedule::{
    Cut, MAX_PULL_ROWS, Row, RowCursor, ScheduleShape, TaskCursor, TileRing, WAVES_AHEAD, combine_chunks,
    combine_tokens, group_tiles, pull_rows, route_chunks, route_step, route_tokens, shared_row,
};
use ferromoe_kernel::task::{Phase, Task};
use ferromoe_kernel::tile::WEIGHT_TILE;
use proptest::prelude::*;

const LINEAR1: u32 = Phase::Linear1 as u32;
const LINEAR2: u32 = Phase::Linear2 as u32;
const COMBINE: u32 = Phase::Combine as u32;

fn tasks(shape: ScheduleShape, rows: &[u32]) -> Vec<Task> {
    let mut cursor = TaskCursor::new(shape, rows);
    (0..).map(|ticket| cursor.seek(ticket, rows)).take_while(|task| task.phase != Phase::End as u32).collect()
}

/// A format of any kind.
fn format() -> impl Strategy<Value = Format> {
    prop::sample::select(&Format::ALL[..])
}

fn schedule() -> impl Strategy<Value = (ScheduleShape, Vec<u32>)> {
    let rows = prop::collection::vec(prop_oneof![Just(0u32), 1..40u32, 60..300u32, 900..3000u32], 1..12);
    (format(), rows, (1..6u32, 1..6u32), 1..6u32, prop_oneof![1..9u32, 100..200u32], 0..5u32).prop_map(
        |(format, rows, (wave_tiles, part_tiles), intermediate, hidden, combine_chunks)| {
            let tiles = Cut::least_ring(wave_tiles, part_tiles);
            let shape = ScheduleShape {
                format,
                wave_tiles,
                part_tiles,
                ring: TileRing { first_tile: 0, first_row: 0, place_rows: format.tiles.widest(), tiles },
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
        let tiles: u32 = rows.iter().map(|&rows| shape.format.tiles.tiles(rows)).sum();
        let blocks = shape.linear1_rows.div_ceil(shape.format.linear1_rows()) + shape.linear2_rows.div_ceil(WEIGHT_TILE);
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

    /// When linear 2 of a part begins, linear 1 has come to the parts that begin less than [`WAVES_AHEAD`] waves of tiles behind it, and not further.
    #[test]
    fn linear_1_is_waves_ahead((shape, rows) in schedule()) {
        // First tile of each part, and the tile behind the last.
        let mut parts = vec![0];
        for &rows in &rows {
            let (first, tiles) = (parts[parts.len() - 1], shape.format.tiles.tiles(rows));
            parts.extend((1..=tiles).filter(|tile| *tile == tiles || tile % shape.part_tiles == 0).map(|tile| first + tile));
        }
        let part_of = |tile: u32| parts.partition_point(|&first| first <= tile) - 1;
        let mut begun = HashSet::new();
        for task in tasks(shape, &rows).iter().filter(|task| task.phase != COMBINE) {
            let part = part_of(task.tile);
            if task.phase == LINEAR1 {
                begun.insert(part);
                continue;
            }
            let ahead = parts[part + 1] + WAVES_AHEAD * shape.wave_tiles;
            let due: HashSet<_> = (0..parts.len() - 1).filter(|&part| parts[part] < ahead).collect();
            prop_assert_eq!(&begun, &due, "at {:?}", task);
        }
    }

    /// With the least ring and a single CTA, which works through the tickets in order, a tile's rows are pulled before its linear 1, although every pull waits for the rows that it
    /// overwrites, and for those of its whole ticket; and they are in their places until linear 2 is through.
    #[test]
    fn the_least_ring_is_enough((shape, rows) in schedule(), shared_experts in 0..3usize, batch in 1..=MAX_PULL_ROWS) {
        let cut = shape.format.tiles;
        let mut rows = rows;
        let tokens = rows[0];
        let shared_experts = shared_experts.min(rows.len());
        rows[..shared_experts].fill(tokens);
        let shared_experts = shared_experts as u32;
        let first_tile = shared_experts * cut.tiles(tokens);
        let first_row = shared_experts * cut.padded_rows(tokens) + 8;
        let ring = TileRing { first_tile, first_row, ..shape.ring };
        let shape = ScheduleShape { ring, ..shape };
        let mut cursor = RowCursor::new(cut, ring);
        let pulls: Vec<Row> = (shared_experts * tokens..rows.iter().sum()).map_while(|number| cursor.seek(number, &rows[..])).collect();
        let mut pulls = pulls.chunks(batch as usize).peekable();
        // The tile of each pool row that has been pulled, and the tiles whose linear 2 is through.
        let (mut places, mut done) = (HashMap::new(), HashMap::new());
        let blocks = shape.linear2_rows.div_ceil(WEIGHT_TILE);
        for task in tasks(shape, &rows).iter().filter(|task| task.phase != COMBINE) {
            let is_free = |row: &Row| ring.before(row.tile).is_none_or(|before| done.get(&before) == Some(&blocks));
            while let Some(ticket) = pulls.next_if(|ticket| ticket.iter().all(is_free)) {
                places.extend(ticket.iter().map(|row| (row.pool_row, row.tile)));
            }
            if task.tile >= first_tile {
                for row in task.pool_row..task.pool_row + task.rows {
                    prop_assert_eq!(places.get(&row), Some(&task.tile), "row {} of {:?}", row, task);
                }
            } else {
                prop_assert!(task.pool_row + cut.width(task.width) <= first_row);
            }
            if task.phase == LINEAR2 {
                *done.entry(task.tile).or_insert(0) += 1;
            }
        }
        prop_assert!(pulls.next().is_none());
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
            let tiles = shape.format.tiles;
            let first_tile: u32 = rows[..task.expert as usize].iter().map(|&rows| tiles.tiles(rows)).sum();
            let (part, tile) = ((task.tile - first_tile) / shape.part_tiles, (task.tile - first_tile) % shape.part_tiles);
            let group = tile / group_tiles(tiles, shape.format.row_bytes(columns));
            let block = (task.phase, task.expert, part, group, task.weight_row);
            prop_assert!(last == Some(block) || blocks.insert(block), "{task:?} comes back to a block of weights");
            last = Some(block);
        }
    }

    /// A group's tokens fill at most 16 MB, a single tile's aside; twice as many tiles, with both sizes rounded up to powers of two, would fill more.
    #[test]
    fn a_group_s_tokens_stay_in_the_cache(format in format(), columns in (1..400u32).prop_map(|blocks| 64 * blocks)) {
        let (widest, row_bytes) = (format.tiles.widest(), format.row_bytes(columns));
        let group = group_tiles(format.tiles, row_bytes);
        prop_assert!(group.is_power_of_two() && (group == 1 || group * widest * row_bytes <= 16 << 20));
        prop_assert!(2 * group * widest.next_power_of_two() * row_bytes.next_power_of_two() > 16 << 20);
    }

    /// What shared experts have to do is known before the counts are, but for the widest tile.
    #[test]
    fn early_tasks_and_rows_are_the_first((shape, routed) in schedule(), shared_experts in 0..3u32, tokens in prop_oneof![Just(0u32), 1..40u32, 200..900u32]) {
        let rows: Vec<_> = std::iter::repeat_n(tokens, shared_experts as usize).chain(routed).collect();
        let tiles = shape.format.tiles;
        let shape = ScheduleShape { ring: TileRing { first_tile: shared_experts * tiles.tiles(tokens), ..shape.ring }, ..shape };
        let all = tasks(shape, &rows);
        let mut found = 0;
        for (ticket, task) in all.iter().enumerate() {
            let Some(early) = shape.early_task(shared_experts, tokens, ticket as u32) else { break };
            prop_assert_eq!(Task { widest: task.widest, ..early }, *task);
            found += 1;
        }
        let early = all.iter().filter(|task| task.phase == LINEAR1 && task.expert == 0 && shared_experts > 0 && task.tile < shape.part_tiles).count();
        prop_assert_eq!(found, early);
        let mut cursor = RowCursor::new(shape.format.tiles, shape.ring);
        for number in 0..shared_experts * tokens {
            prop_assert_eq!(shared_row(shape.format.tiles, shared_experts, tokens, number), cursor.seek(number, &rows[..]));
        }
        prop_assert_eq!(shared_row(shape.format.tiles, shared_experts, tokens, shared_experts * tokens), None);
    }

    /// Tiles cover the pulled rows of their expert, and share no pool row with each other where all have a place.
    #[test]
    fn tiles_and_rows_agree((shape, rows) in schedule()) {
        let shape = ScheduleShape { ring: TileRing { tiles: u32::MAX, ..shape.ring }, ..shape };
        let mut cursor = RowCursor::new(shape.format.tiles, shape.ring);
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
            end = tile.pool_row + shape.format.tiles.width(tile.width);
            prop_assert!(tile.rows >= 1 && tile.rows <= shape.format.tiles.width(tile.width));
            for offset in 0..tile.rows {
                let row = row.next().expect("a pulled row for every row of a tile");
                prop_assert_eq!((row.expert, row.tile, row.pool_row), (tile.expert, tile.tile, tile.pool_row + offset));
            }
        }
        prop_assert_eq!(row.next(), None);
    }

    /// A lane of a ticket's rows sees every eighth row, or so; what it makes of them does not depend on which those are.
    #[test]
    fn a_row_cursor_that_skips_rows_finds_the_same((shape, rows) in schedule(), stride in 1..300usize, first in 0..9usize) {
        let (mut all, mut skipping) = (RowCursor::new(shape.format.tiles, shape.ring), RowCursor::new(shape.format.tiles, shape.ring));
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

    /// Any routing fits the counters of tiles, and every tile of a layer its place in the pools of a workspace for that and others.
    #[test]
    fn pools_hold_any_routing(shape in shape(), format in format(), other in shape(), sms in 1..200u32, draws in prop::collection::vec(0..1000u32, 1..64)) {
        let routed = shape.routed_experts();
        let choices = shape.ranks * shape.max_tokens * shape.top_k.min(routed);
        let mut left = choices;
        let mut rows = vec![0u32; routed as usize];
        for (expert, draw) in draws.iter().cycle().take(routed as usize).enumerate() {
            rows[expert] = (draw * shape.max_tokens * shape.ranks / 1000).min(left);
            left -= rows[expert];
        }
        rows.extend(vec![shape.max_tokens; shape.shared_experts as usize]);
        let tiles = rows.iter().map(|&rows| format.tiles.tiles(rows)).sum::<u32>();
        prop_assert!(tiles <= shape.most_tiles(&format));
        let other = Shape { experts: other.routed_experts() * shape.ranks, ranks: shape.ranks, ..other };
        let sizes = larger_of(shape, other);
        let layout = WorkspaceLayout::new(&sizes, &Format::ALL);
        let cut = layout.cut(&shape, &format, sms);
        let place_rows = TileRing::place_rows(&shape, &format);
        prop_assert!(shape.shared_rows(&format) as u64 <= layout.ring_row);
        prop_assert!(layout.ring_row + (cut.ring_tiles * place_rows) as u64 <= layout.pool_rows);
        let least = Cut::least_ring(cut.wave_tiles, cut.part_tiles);
        prop_assert!(cut.wave_tiles > 0 && cut.part_tiles > 0 && cut.ring_tiles >= least.min(shape.routed_tiles(&format)));
    }

    /// A rank that is at its next layer must write nothing that another still reads of the last.
    #[test]
    fn layers_of_different_shapes_keep_parities_and_sources_apart(a in shape(), b in shape()) {
        let b = Shape { experts: b.routed_experts() * a.ranks, ranks: a.ranks, ..b };
        let b = Shape { top_k: b.top_k.min(b.experts), ..b };
        let sizes = larger_of(a, b);
        let layout = SymmetricLayout::new(&sizes, &Format::ALL);
        let (ranks, top_k, tokens) = (sizes.ranks as u64, sizes.top_k as u64, sizes.max_tokens as u64);
        for shape in [a, b] {
            for format in &Format::ALL {
                prop_assert!(shape.most_tiles(format) <= sizes.most_tiles(format));
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

    /// Pools of a workspace for several formats have the largest of each.
    #[test]
    fn parts_of_a_layout_do_not_overlap(shape in shape(), formats in prop::sample::subsequence(&Format::ALL[..], 1..=Format::ALL.len())) {
        let most = |size: &dyn Fn(&Format) -> u64| formats.iter().map(size).max().unwrap_or(0);
        let layout = SymmetricLayout::new(&shape, &formats);
        let (ranks, routed, slots) = (shape.ranks as u64, shape.routed_experts() as u64, shape.slots() as u64);
        let (tokens, hidden) = (shape.max_tokens as u64, shape.hidden as u64);
        let record = most(&|format| if format.scaled { format.record_bytes(shape.hidden) as u64 } else { 0 });
        in_order(&[
            (layout.counts, 2 * ranks * routed * 8),
            (layout.hidden, 2 * ranks * 8),
            (layout.layers, 2 * ranks * 8),
            (layout.flags, (shape.experts + shape.shared_experts) as u64 * 4),
            (layout.lists, ranks * routed * tokens * 8),
            (layout.followers, ranks * tokens * shape.top_k as u64 * 4),
            (layout.combine, tokens * slots * hidden * 2),
            (layout.quantised, ranks * 4),
            (layout.records, tokens * record),
            (layout.bytes(&shape, &formats), 0),
        ])?;
        let layout = WorkspaceLayout::new(&shape, &formats);
        let rows = layout.pool_rows;
        let elements = |columns: u32| most(&|format| format.row_bytes(columns) as u64);
        let scales = |columns| most(&|format| if format.scaled { groups(columns) as u64 * 4 } else { 0 });
        in_order(&[
            (layout.status, 24),
            (layout.epoch, 8),
            (layout.counters, 2 * layout.counter.bytes),
            (layout.row_result, rows * 8),
            (layout.row_weight, rows * 4),
            (layout.tokens, rows * elements(shape.hidden)),
            (layout.token_scales, rows * scales(shape.hidden)),
            (layout.intermediate, rows * elements(shape.intermediate)),
            (layout.intermediate_scales, rows * scales(shape.intermediate)),
            (layout.bytes, 0),
        ])?;
        let (counter, tiles) = (layout.counter, most(&|format| shape.most_tiles(format) as u64) * 4);
        in_order(&[
            (counter.quantise_ticket, 4),
            (counter.quantised, 4),
            (counter.route_ticket, 4),
            (counter.routed_chunks, 4),
            (counter.pull_ticket, 4),
            (counter.task_ticket, 4),
            (counter.sent, shape.experts as u64 * 4),
            (counter.rows_ready, tiles),
            (counter.columns_ready, tiles),
            (counter.tile_done, tiles),
            (counter.expert_done, shape.local_experts() as u64 * 4),
            (counter.bytes, 0),
        ])?;
    }
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

/// Sizes in which layers of both shapes fit.
fn larger_of(a: Shape, b: Shape) -> Shape {
    Shape {
        hidden: a.hidden.max(b.hidden),
        intermediate: a.intermediate.max(b.intermediate),
        experts: a.experts.max(b.experts),
        shared_experts: a.shared_experts.max(b.shared_experts),
        top_k: a.top_k.max(b.top_k),
        max_tokens: a.max_tokens.max(b.max_tokens),
        ranks: a.ranks,
    }
}

/// Each part (offset, bytes) begins aligned, behind the one before.
fn in_order(parts: &[(u64, u64)]) -> Result<(), TestCaseError> {
    for (part, pair) in parts.windows(2).enumerate() {
        prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "part {part} overlaps the next: {pair:?}");
        prop_assert!(pair[1].0.is_multiple_of(256), "part {} is misaligned", part + 1);
    }
    Ok(())
}
