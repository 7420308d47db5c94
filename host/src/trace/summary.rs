//! Where the time of a launch goes, as tables.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use ferromoe_kernel::task::Phase;
use ferromoe_kernel::tile::WEIGHT_TILE;
use ferromoe_kernel::trace::Activity;

use super::{CONSUMERS, DISPATCH, PRODUCER, PUBLISHER, RankTrace, SCHEDULER, Span};

/// One rank's launch in figures.
#[derive(Clone, Debug)]
pub struct Summary {
    rank: usize,
    /// CTAs of the launch.
    pub ctas: usize,
    /// From the first CTA's start to the last role's end, in nanoseconds.
    pub ns: u64,
    /// The smallest difference between two time stamps of a role, in nanoseconds.
    pub clock_step: u64,
    /// Nanoseconds of a CTA's launch in which at least one of its warpgroups multiplies, on the CTA with the least, the median and the most.
    pub multiplying: [u64; 3],
    /// The same of those in which both do.
    pub both_multiplying: [u64; 3],
    /// What came when.
    pub milestones: Vec<Milestone>,
    /// What the roles did.
    pub shares: Vec<Share>,
    /// What matrix products took, by phase and width.
    pub products: Vec<Product>,
}

/// A moment, in nanoseconds from the start of the launch, over the CTAs that have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Milestone {
    /// What happened then.
    pub what: &'static str,
    /// On the first, the median and the last CTA.
    pub ns: [u64; 3],
}

/// The time of a role in one activity: sums over a CTA's launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The role; both consumer warpgroups are one.
    pub role: &'static str,
    /// What it did.
    pub activity: Activity,
    /// The phase of the products, for what belongs to one.
    pub phase: Option<Phase>,
    /// Nanoseconds, on the median CTA and on that with the most.
    pub ns: [u64; 2],
    /// Spans, on the median CTA.
    pub spans: u64,
}

/// The tasks of one phase and width: medians in nanoseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// Linear 1 or linear 2.
    pub phase: Phase,
    /// Tokens of the tile.
    pub width: u32,
    /// Tasks of the rank.
    pub tasks: u64,
    /// From the task to its first stage.
    pub wait: u64,
    /// The product.
    pub multiply: u64,
    /// All behind it.
    pub epilogue: u64,
    /// Operations of the product, padding included.
    pub operations: f64,
}

const ROLES: [(&str, &[usize]); 5] = [
    ("consumers", &CONSUMERS),
    ("producer", &[PRODUCER]),
    ("publisher", &[PUBLISHER]),
    ("scheduler", &[SCHEDULER]),
    ("dispatch", &[DISPATCH]),
];

impl Summary {
    /// Sums up one rank's launch of a layer with these sizes.
    pub fn new(trace: &RankTrace, hidden: usize, intermediate: usize) -> Self {
        let [multiplying, both_multiplying] = overlap(trace);
        let steps = trace.ctas.iter().flat_map(|cta| cta.roles.iter().flatten()).map(Span::ns);
        Self {
            rank: trace.rank,
            ctas: trace.ctas.len(),
            ns: trace.ns(),
            clock_step: steps.filter(|&step| step > 0).min().unwrap_or(0),
            multiplying,
            both_multiplying,
            milestones: milestones(trace),
            shares: ROLES.into_iter().flat_map(|(name, roles)| shares(trace, name, roles)).collect(),
            products: products(trace, hidden, intermediate),
        }
    }
}

/// The first and the last of a role's spans that `is`, on each CTA: its start or end.
fn milestones(trace: &RankTrace) -> Vec<Milestone> {
    type Find = fn(&[Span]) -> Option<u64>;
    let (first_consumers, start) = (CONSUMERS[0], trace.start);
    let finds: [(&'static str, usize, Find); 12] = [
        ("the CTA begins", SCHEDULER, |spans| Some(spans.first()?.start)),
        ("counts published", DISPATCH, |spans| end_of_last(spans, |span| span.activity == Activity::PublishCounts)),
        ("counts of all ranks gathered", SCHEDULER, |spans| {
            end_of_last(spans, |span| span.activity == Activity::GatherCounts)
        }),
        ("first rows pulled", DISPATCH, |spans| Some(spans.iter().find(|span| span.activity == Activity::Pull)?.end)),
        ("last rows pulled", DISPATCH, |spans| end_of_last(spans, |span| span.activity == Activity::Pull)),
        ("first task handed out", SCHEDULER, |spans| {
            Some(spans.iter().find(|span| span.activity == Activity::HandOut)?.start)
        }),
        ("first product begins", first_consumers, |spans| {
            Some(spans.iter().find(|span| span.activity == Activity::Multiply)?.start)
        }),
        ("last linear 1 ends", first_consumers, |spans| {
            end_of_last(spans, |span| span.phase() == Some(Phase::Linear1))
        }),
        ("last linear 2 ends", first_consumers, |spans| {
            end_of_last(spans, |span| span.phase() == Some(Phase::Linear2))
        }),
        ("first chunk to combine", first_consumers, |spans| {
            Some(spans.iter().find(|span| span.activity == Activity::Combine)?.start)
        }),
        ("last wait for results ends", first_consumers, |spans| {
            end_of_last(spans, |span| span.activity == Activity::WaitForResults)
        }),
        ("consumers end", first_consumers, |spans| Some(spans.last()?.end)),
    ];
    let milestone = |(what, role, find): (&'static str, usize, Find)| {
        let mut times: Vec<u64> =
            trace.ctas.iter().filter_map(|cta| find(cta.roles.get(role)?)).map(|at| at - start).collect();
        times.sort_unstable();
        let ns = [*times.first()?, median(&times), *times.last()?];
        Some(Milestone { what, ns })
    };
    finds.into_iter().filter_map(milestone).collect()
}

fn end_of_last(spans: &[Span], is: impl Fn(&Span) -> bool) -> Option<u64> {
    spans.iter().rev().find(|span| is(span)).map(|span| span.end)
}

/// How long at least one, and how long both warpgroups of a CTA multiply: least, median and most over the CTAs.
fn overlap(trace: &RankTrace) -> [[u64; 3]; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for cta in &trace.ctas {
        // +1 where a product begins, -1 where one ends.
        let mut edges: Vec<(u64, i32)> = CONSUMERS
            .iter()
            .filter_map(|&role| cta.roles.get(role))
            .flatten()
            .filter(|span| span.activity == Activity::Multiply)
            .flat_map(|span| [(span.start, 1), (span.end, -1)])
            .collect();
        edges.sort_unstable();
        let (mut under_way, mut since, mut sums) = (0, 0, [0; 2]);
        for (at, step) in edges {
            for (least, sum) in [1, 2].into_iter().zip(&mut sums) {
                *sum += if under_way >= least { at - since } else { 0 };
            }
            (under_way, since) = (under_way + step, at);
        }
        times.iter_mut().zip(sums).for_each(|(times, sum)| times.push(sum));
    }
    times.map(|mut times| {
        times.sort_unstable();
        [times.first().copied().unwrap_or(0), median(&times), times.last().copied().unwrap_or(0)]
    })
}

/// The median of sorted values; 0 of none.
fn median(sorted: &[u64]) -> u64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

/// An activity, and the number of the phase that it belongs to.
type Kind = (Activity, Option<u32>);

/// What the roles with these numbers did, most of the time first.
fn shares(trace: &RankTrace, role: &'static str, numbers: &[usize]) -> Vec<Share> {
    let mut sums: BTreeMap<Kind, Vec<(u64, u64)>> = BTreeMap::new();
    let all: Vec<&Vec<Span>> =
        trace.ctas.iter().flat_map(|cta| numbers.iter().filter_map(|&number| cta.roles.get(number))).collect();
    // A format with fewer consumer warpgroups leaves the last without spans.
    let all: Vec<&Vec<Span>> = all.into_iter().filter(|spans| !spans.is_empty()).collect();
    for (index, spans) in all.iter().enumerate() {
        for span in *spans {
            let key = (span.activity, span.phase().map(|phase| phase as u32));
            let sum = &mut sums.entry(key).or_insert_with(|| vec![(0, 0); all.len()])[index];
            *sum = (sum.0 + span.ns(), sum.1 + 1);
        }
    }
    let share = |((activity, phase), sums): (Kind, Vec<(u64, u64)>)| {
        let (mut ns, mut spans): (Vec<u64>, Vec<u64>) = sums.into_iter().unzip();
        ns.sort_unstable();
        spans.sort_unstable();
        let most = ns.last().copied().unwrap_or(0);
        let phase = phase.map(|phase| if phase == Phase::Linear1 as u32 { Phase::Linear1 } else { Phase::Linear2 });
        Share { role, activity, phase, ns: [median(&ns), most], spans: median(&spans) }
    };
    let mut shares: Vec<Share> = sums.into_iter().map(share).collect();
    shares.sort_by_key(|share| std::cmp::Reverse(share.ns));
    shares
}

/// Medians over all tasks of both consumer warpgroups.
fn products(trace: &RankTrace, hidden: usize, intermediate: usize) -> Vec<Product> {
    let mut times: BTreeMap<(u32, u32), [Vec<u64>; 3]> = BTreeMap::new();
    let consumers = trace.ctas.iter().flat_map(|cta| CONSUMERS.iter().filter_map(|&number| cta.roles.get(number)));
    for spans in consumers {
        for part in spans.chunk_by(|one, next| one.task.is_some() && one.task == next.task) {
            let Some(task) = part[0].task else { continue };
            let sum = |is: fn(Activity) -> bool| part.iter().filter(|span| is(span.activity)).map(Span::ns).sum();
            let found = times.entry((task.phase, task.width)).or_default();
            found[0].push(sum(|activity| activity == Activity::WaitForStage));
            found[1].push(sum(|activity| activity == Activity::Multiply));
            found[2].push(sum(|activity| !matches!(activity, Activity::WaitForStage | Activity::Multiply)));
        }
    }
    let product = |((phase, width), mut times): ((u32, u32), [Vec<u64>; 3])| {
        times.iter_mut().for_each(|times| times.sort_unstable());
        let first = phase == Phase::Linear1 as u32;
        let (phase, depth) = if first { (Phase::Linear1, hidden) } else { (Phase::Linear2, intermediate) };
        let tiles = trace.format.tiles;
        let weight_rows = if first { trace.format.linear1_rows() } else { WEIGHT_TILE };
        let width = tiles.width(width.min(tiles.count - 1));
        Product {
            phase,
            width,
            tasks: times[0].len() as u64 / u64::from(trace.format.consumer_warpgroups),
            wait: median(&times[0]),
            multiply: median(&times[1]),
            epilogue: median(&times[2]),
            operations: 2.0 * f64::from(weight_rows * width) * depth as f64,
        }
    };
    times.into_iter().map(product).collect()
}

fn phase_name(phase: Phase) -> &'static str {
    if phase == Phase::Linear1 { "linear 1" } else { "linear 2" }
}

impl Display for Summary {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let us = |ns: u64| ns as f64 / 1e3;
        let percent = |ns: u64| 100.0 * ns as f64 / self.ns.max(1) as f64;
        let Self { rank, ctas, ns, clock_step, .. } = self;
        writeln!(f, "rank {rank}: {:.1} us on {ctas} CTAs; the clock steps by {clock_step} ns", us(*ns))?;
        writeln!(f, "\n  {:<34} {:>10} {:>10} {:>10}", "us from the start", "first CTA", "median", "last CTA")?;
        for Milestone { what, ns: [first, median, last] } in &self.milestones {
            writeln!(f, "  {what:<34} {:>10.1} {:>10.1} {:>10.1}", us(*first), us(*median), us(*last))?;
        }
        writeln!(f, "\n  {:<34} {:>10} {:>10} {:>10}", "multiplying, of the launch", "least CTA", "median", "most")?;
        for (what, [least, median, most]) in
            [("at least one warpgroup", self.multiplying), ("both warpgroups", self.both_multiplying)]
        {
            writeln!(f, "  {what:<34} {:>9.1}% {:>9.1}% {:>9.1}%", percent(least), percent(median), percent(most))?;
        }
        let mut role = "";
        for share in &self.shares {
            if share.role != role {
                role = share.role;
                writeln!(
                    f,
                    "\n  {role:<34} {:>7} {:>7} {:>11} {:>10} {:>8}",
                    "median", "most", "median us", "most us", "times"
                )?;
            }
            let name = match share.phase {
                Some(phase) => format!("{}, {}", share.activity.label(), phase_name(phase)),
                None => share.activity.label().to_owned(),
            };
            let [median, most] = share.ns;
            writeln!(
                f,
                "  {name:<34} {:>6.1}% {:>6.1}% {:>11.1} {:>10.1} {:>8}",
                percent(median),
                percent(most),
                us(median),
                us(most),
                share.spans
            )?;
        }
        writeln!(
            f,
            "\n  {:<9} {:>5} {:>8} {:>12} {:>12} {:>12} {:>21}",
            "products", "width", "tasks", "wait us", "multiply us", "epilogue us", "TFLOP/s while at it"
        )?;
        for product in &self.products {
            // A task's two warpgroups multiply at the same time, and every CTA has one task.
            let rate = product.operations * *ctas as f64 / product.multiply.max(1) as f64 / 1e3;
            writeln!(
                f,
                "  {:<9} {:>5} {:>8} {:>12.2} {:>12.2} {:>12.2} {rate:>21.0}",
                phase_name(product.phase),
                product.width,
                product.tasks,
                us(product.wait),
                us(product.multiply),
                us(product.epilogue)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ferromoe_kernel::task::Task;

    use super::*;
    use ferromoe_kernel::format::Format;

    use crate::trace::{CtaTrace, ROLE_NAMES};

    /// Consumers that wait for `wait`, multiply for 100 and store for 20, on a task of width 32.
    fn consumers(wait: u64) -> Vec<Span> {
        let task = Some(Task { width: 2, rows: 20, ..Task::plain(Phase::Linear1, 0) });
        let span = |activity, start, end, task| Span { activity, start, end, task, argument: 0 };
        vec![
            span(Activity::Start, 10, 20, None),
            span(Activity::WaitForStage, 20, 20 + wait, task),
            span(Activity::Multiply, 20 + wait, 120 + wait, task),
            span(Activity::Epilogue, 120 + wait, 140 + wait, task),
        ]
    }

    /// A CTA whose second warpgroup waits 4 longer than the first.
    fn cta(wait: u64) -> CtaTrace {
        let mut roles = vec![Vec::new(); ROLE_NAMES.len()];
        roles[CONSUMERS[0]] = consumers(wait);
        roles[CONSUMERS[1]] = consumers(wait + 4);
        CtaTrace { sm: 0, roles }
    }

    #[test]
    fn times_are_medians_and_the_most_over_ctas() {
        let trace = RankTrace {
            rank: 3,
            ctas: [30, 10, 50].map(cta).to_vec(),
            start: 10,
            end: 210,
            wave_tiles: 1,
            format: Format::BF16,
        };
        let summary = Summary::new(&trace, 64, 128);
        assert_eq!((summary.ns, summary.ctas, summary.clock_step), (200, 3, 10));
        assert_eq!((summary.multiplying, summary.both_multiplying), ([104; 3], [96; 3]));
        let wait = summary.shares.iter().find(|share| share.activity == Activity::WaitForStage).unwrap();
        // Of 10, 14, 30, 34, 50, 54.
        assert_eq!((wait.role, wait.phase, wait.ns, wait.spans), ("consumers", Some(Phase::Linear1), [34, 54], 1));
        assert_eq!(summary.shares[0].activity, Activity::Multiply);
        let begins = summary.milestones.iter().find(|milestone| milestone.what == "first product begins").unwrap();
        assert_eq!(begins.ns, [20, 40, 60]);
        let expected = Product {
            phase: Phase::Linear1,
            width: 32,
            tasks: 3,
            wait: 34,
            multiply: 100,
            epilogue: 20,
            operations: 2.0 * 128.0 * 32.0 * 64.0,
        };
        assert_eq!(summary.products, [expected]);
        let text = summary.to_string();
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains("wait for first stage, linear 1 17.0% 27.0%"), "{text}");
    }
}
