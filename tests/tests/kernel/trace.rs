//! What a traced launch records: all of the work, in order, and a right result beside it.

use std::collections::BTreeMap;

use ferromoe::trace::{CONSUMERS, PRODUCER, PUBLISHER, ROLE_NAMES, RankTrace, Span, Trace};
use ferromoe::{Error, MoeConfig, SimOptions};
use ferromoe_kernel::schedule::{ScheduleShape, TaskCursor, TileRing};
use ferromoe_kernel::task::Phase;
use ferromoe_kernel::trace::Activity;
use ferromoe_tests::{Case, Choices, Tokens, traced_group};
use serde_json::Value;

/// Phase, expert, tile and weight row of a matrix product, with how often it was met.
type Products = BTreeMap<[u32; 4], usize>;

fn case(tokens: &[usize]) -> Case {
    let config = MoeConfig { hidden: 192, intermediate: 320, top_k: 3, shared_experts: 1, ..Case::default().config };
    Case { config, tokens: tokens.to_vec(), ..Case::default() }
}

/// The launch that holds against the reference, and its trace.
fn record(case: &Case) -> (Tokens, Trace) {
    let mut layer = case.layer_on(&traced_group(case.ranks(), case.sim));
    layer.moe.record_trace(4096).unwrap();
    let tokens = case.tokens();
    layer.check(&tokens, &format!("{case:?}"));
    let trace = layer.moe.trace().unwrap();
    (tokens, trace)
}

/// All products of a rank, from the routing.
fn expected(case: &Case, tokens: &Tokens, rank: usize) -> Products {
    let config = &case.config;
    let per_rank = config.experts / case.ranks();
    let mut rows = vec![0u32; per_rank + config.shared_experts];
    for expert in tokens.routing.iter().flat_map(|routing| routing.topk_idx()) {
        if let Some(local) = usize::try_from(*expert).ok().and_then(|expert| expert.checked_sub(rank * per_rank))
            && local < per_rank
        {
            rows[config.shared_experts + local] += 1;
        }
    }
    rows[..config.shared_experts].fill(case.tokens[rank] as u32);
    let format = *config.experts_format.kernel();
    let shape = ScheduleShape {
        format,
        wave_tiles: 1,
        part_tiles: u32::MAX,
        ring: TileRing { first_tile: 0, first_row: 0, place_rows: 0, tiles: 1 },
        linear1_rows: 2 * config.intermediate as u32,
        linear2_rows: config.hidden as u32,
        combine_chunks: 0,
        cluster: 1,
        most_rows: rows.iter().copied().max().unwrap_or(0),
    };
    let mut cursor = TaskCursor::new(shape, &rows[..]);
    let task = |ticket| cursor.seek(ticket, &rows[..]);
    (0..)
        .map(task)
        .take_while(|task| task.phase < Phase::Combine as u32)
        .map(|task| ([task.phase, task.expert, task.tile, task.weight_row], 1))
        .collect()
}

/// The products that a role of all CTAs met. The last CTA of a cluster may have one behind the last weight row.
fn recorded(case: &Case, rank: &RankTrace, role: usize) -> Products {
    let limits = [2 * case.config.intermediate, case.config.hidden];
    let mut products = Products::new();
    for cta in &rank.ctas {
        for part in cta.roles[role].chunk_by(|one, next| one.task.is_some() && one.task == next.task) {
            let Some(task) = part[0].task else { continue };
            if (task.weight_row as usize) < limits[task.phase as usize] {
                *products.entry([task.phase, task.expert, task.tile, task.weight_row]).or_default() += 1;
            }
        }
    }
    products
}

#[test]
fn every_product_is_recorded_once_by_every_role_that_has_to_do_with_it() {
    let sim = SimOptions { sms: 5, ..SimOptions::default() };
    for case in [
        case(&[40]),
        case(&[0, 70]),
        // Enough tokens for clusters.
        Case { sim, choices: Choices::AllTo(2), ..case(&[300, 9]) },
        Case { choices: Choices::Nobody, ..case(&[5]) },
    ] {
        let (tokens, trace) = record(&case);
        assert_eq!(trace.ranks.len(), case.ranks());
        for rank in &trace.ranks {
            let expected = expected(&case, &tokens, rank.rank);
            for role in CONSUMERS.into_iter().take(2).chain([PRODUCER, PUBLISHER]) {
                assert_eq!(
                    recorded(&case, rank, role),
                    expected,
                    "{} of rank {}: {case:?}",
                    ROLE_NAMES[role],
                    rank.rank
                );
            }
        }
    }
}

#[test]
fn a_product_is_waited_for_then_made_then_stored() {
    let (_, trace) = record(&case(&[50, 20]));
    for spans in trace.ranks.iter().flat_map(|rank| &rank.ctas).map(|cta| &cta.roles[CONSUMERS[0]]) {
        assert!(spans.windows(2).all(|pair| pair[0].end == pair[1].start));
        for part in spans.chunk_by(|one, next| one.task.is_some() && one.task == next.task) {
            if part[0].task.is_some() {
                let first: Vec<_> = part.iter().take(3).map(|span| span.activity).collect();
                assert_eq!(first, [Activity::WaitForStage, Activity::Multiply, Activity::Epilogue]);
            }
        }
    }
    // No product of linear 1 begins before the first rows are there.
    let first = |role: usize, activity: Activity, time: fn(&Span) -> u64| {
        let spans = trace.ranks[0].ctas.iter().flat_map(|cta| &cta.roles[role]);
        spans.filter(|span| span.activity == activity).map(time).min().unwrap()
    };
    assert!(first(0, Activity::Pull, |span| span.end) <= first(CONSUMERS[0], Activity::Multiply, |span| span.start));
}

#[test]
fn the_file_is_json_whose_events_nest() {
    let (_, trace) = record(&case(&[33, 18]));
    let mut file = Vec::new();
    trace.write_json("a layer", &mut file).unwrap();
    let json: Value = serde_json::from_slice(&file).unwrap();
    let mut threads: BTreeMap<(u64, u64), Vec<(f64, f64)>> = BTreeMap::new();
    for event in json["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X") {
        let [pid, tid] = ["pid", "tid"].map(|field| event[field].as_u64().unwrap());
        let [start, length] = ["ts", "dur"].map(|field| event[field].as_f64().unwrap());
        threads.entry((pid, tid)).or_default().push((start, start + length));
    }
    let ctas: usize = trace.ranks.iter().map(|rank| rank.ctas.len()).sum();
    assert_eq!(threads.len(), ctas * (CONSUMERS[0] + 2));
    for (thread, events) in threads {
        let mut open: Vec<f64> = Vec::new();
        let mut last = 0.0;
        for (start, end) in events {
            assert!(start >= last, "{thread:?}: events out of order");
            last = start;
            while open.last().is_some_and(|&outer| outer <= start + 1e-6) {
                open.pop();
            }
            assert!(open.last().is_none_or(|&outer| end <= outer + 1e-6), "{thread:?}: {start} to {end} overlaps");
            open.push(end);
        }
    }
}

#[test]
fn what_cannot_be_recorded_is_told() {
    let case = case(&[9]);
    assert!(matches!(case.layer().moe.record_trace(4), Err(Error::NotTraced)));
    let mut layer = case.layer_on(&traced_group(1, case.sim));
    assert!(matches!(layer.moe.trace(), Err(Error::NotTraced)));
    layer.moe.record_trace(4).unwrap();
    let error = layer.moe.trace().unwrap_err().to_string();
    assert!(error.contains("no launch has recorded it"), "{error}");
    layer.check(&case.tokens(), "a buffer that is too small");
    let error = layer.moe.trace().unwrap_err().to_string();
    assert!(error.contains("capacity of 4 records"), "{error}");
}
