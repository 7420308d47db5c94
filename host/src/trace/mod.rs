//! What ran when: the records of a traced launch as time spans, one after the other for every role of every CTA, and what is made of
//! them: a file for Perfetto, a table, a picture.

mod json;
mod summary;
mod svg;

pub use summary::{Milestone, Product, Share, Summary};

use ferromoe_kernel::format::Format;
use ferromoe_kernel::task::{Phase, Task};
use ferromoe_kernel::trace::{Activity, Argument, ROLES, Record};

use crate::error::{Error, Result};

/// The roles of a CTA, in the order of their records.
pub const ROLE_NAMES: [&str; ROLES as usize] =
    ["dispatch", "producer", "scheduler", "publisher", "consumers 0", "consumers 1", "consumers 2"];
/// Number of the dispatch role.
pub const DISPATCH: usize = 0;
/// Number of the producer.
pub const PRODUCER: usize = 1;
/// Number of the scheduler.
pub const SCHEDULER: usize = 2;
/// Number of the publisher.
pub const PUBLISHER: usize = 3;
/// Numbers of the consumer warpgroups.
pub const CONSUMERS: [usize; 3] = [4, 5, 6];

/// Clocks of ranks that begin further apart than this are not one clock.
const MOST_APART_NS: u64 = 1_000_000_000;

/// One launch on all ranks of a process.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The ranks, in order.
    pub ranks: Vec<RankTrace>,
    /// Whether the ranks' clocks agree; if not, each rank begins at 0.
    pub one_clock: bool,
}

/// One rank's launch. Times are nanoseconds from the moment at which the first CTA of the first rank began.
#[derive(Clone, Debug)]
pub struct RankTrace {
    /// The rank.
    pub rank: usize,
    /// Its CTAs, by number.
    pub ctas: Vec<CtaTrace>,
    /// When its first CTA began.
    pub start: u64,
    /// When its last role ended.
    pub end: u64,
    /// Token tiles of one wave.
    pub wave_tiles: u32,
    /// The number format that its kernel is of.
    pub format: Format,
}

/// One CTA.
#[derive(Clone, Debug)]
pub struct CtaTrace {
    /// The SM it ran on.
    pub sm: u32,
    /// Each role's spans: each begins where the one before ends.
    pub roles: Vec<Vec<Span>>,
}

/// What a role did for a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// What.
    pub activity: Activity,
    /// From when on.
    pub start: u64,
    /// Until when.
    pub end: u64,
    /// The matrix product that it belongs to; its pool row is not recorded.
    pub task: Option<Task>,
    /// What else the activity is about; see [`Activity`].
    pub argument: u64,
}

impl Span {
    /// How long, in nanoseconds.
    pub fn ns(&self) -> u64 {
        self.end - self.start
    }

    /// The phase of its task.
    pub fn phase(&self) -> Option<Phase> {
        self.task.map(|task| if task.phase == Phase::Linear1 as u32 { Phase::Linear1 } else { Phase::Linear2 })
    }
}

impl Trace {
    /// Each rank's number, token tiles of a wave, and records, `[CTAs][ROLES][capacity]`.
    ///
    /// # Errors
    /// A role that recorded nothing, more than the capacity, or times that run backwards.
    pub(crate) fn new(format: Format, ranks: Vec<(usize, u32, Vec<Record>)>, capacity: usize) -> Result<Self> {
        let mut ranks: Vec<RankTrace> = ranks
            .into_iter()
            .map(|(rank, wave_tiles, records)| RankTrace::new(format, rank, wave_tiles, &records, capacity))
            .collect::<Result<_>>()?;
        let first = ranks.iter().map(|rank| rank.start).min().unwrap_or(0);
        let one_clock = ranks.iter().all(|rank| rank.start - first <= MOST_APART_NS);
        for rank in &mut ranks {
            rank.move_to(if one_clock { first } else { rank.start });
        }
        Ok(Self { ranks, one_clock })
    }

    /// A time line that a model made: each rank's CTAs, and token tiles of a wave.
    pub(crate) fn modelled(format: Format, ranks: impl Iterator<Item = (Vec<CtaTrace>, u32)>) -> Self {
        let rank = |(rank, (ctas, wave_tiles)): (usize, (Vec<CtaTrace>, u32))| RankTrace {
            rank,
            start: 0,
            end: last_end(&ctas),
            ctas,
            wave_tiles,
            format,
        };
        Self { ranks: ranks.enumerate().map(rank).collect(), one_clock: true }
    }

    /// When the last rank ended.
    pub fn end(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.end).max().unwrap_or(0)
    }
}

impl RankTrace {
    fn new(format: Format, rank: usize, wave_tiles: u32, records: &[Record], capacity: usize) -> Result<Self> {
        let per_cta = (capacity * ROLE_NAMES.len()).max(1);
        let ctas: Vec<CtaTrace> = records
            .chunks(per_cta)
            .enumerate()
            .map(|(cta, records)| CtaTrace::new(&format, rank, cta, records, capacity))
            .collect::<Result<_>>()?;
        let spans = || ctas.iter().flat_map(|cta| cta.roles.iter().flatten());
        let start = spans().map(|span| span.start).min().unwrap_or(0);
        let end = last_end(&ctas);
        Ok(Self { rank, ctas, start, end, wave_tiles, format })
    }

    /// Counts time from `origin` on.
    fn move_to(&mut self, origin: u64) {
        self.start -= origin;
        self.end -= origin;
        for span in self.ctas.iter_mut().flat_map(|cta| cta.roles.iter_mut().flatten()) {
            span.start -= origin;
            span.end -= origin;
        }
    }

    /// How long the launch took, in nanoseconds.
    pub fn ns(&self) -> u64 {
        self.end - self.start
    }
}

fn last_end(ctas: &[CtaTrace]) -> u64 {
    ctas.iter().flat_map(|cta| cta.roles.iter().flatten()).map(|span| span.end).max().unwrap_or(0)
}

impl CtaTrace {
    fn new(format: &Format, rank: usize, cta: usize, records: &[Record], capacity: usize) -> Result<Self> {
        let wrong = |role: usize, problem: String| Error::Trace { rank, cta, role: ROLE_NAMES[role], problem };
        let mut sm = 0;
        let mut roles = Vec::new();
        let recorded = CONSUMERS[0] + format.consumer_warpgroups as usize;
        for (role, records) in records.chunks(capacity).enumerate() {
            if role >= recorded {
                roles.push(Vec::new());
                continue;
            }
            let found: Option<Vec<_>> = records
                .iter()
                .map(|record| record.activity().map(|(activity, argument)| (record.time_ns, activity, argument)))
                .collect();
            let found = found.ok_or_else(|| wrong(role, "holds words that no kernel writes".into()))?;
            match found.first() {
                Some(&(time, Activity::Start, argument)) if time > 0 => sm = argument.0 as u32,
                _ => return Err(wrong(role, "does not begin: no launch has recorded it".into())),
            }
            let Some(done) = found.iter().position(|&(_, activity, _)| activity == Activity::Done) else {
                return Err(wrong(role, format!("does not end within the capacity of {capacity} records")));
            };
            if found[..=done].windows(2).any(|pair| pair[1].0 < pair[0].0) {
                return Err(wrong(role, "has times that run backwards".into()));
            }
            roles.push(spans(&found[..=done]));
        }
        Ok(Self { sm, roles })
    }
}

/// The spans between the marks of one role. A task holds from the activity that names it to the next that is of no task.
fn spans(marks: &[(u64, Activity, Argument)]) -> Vec<Span> {
    use Activity as A;
    let mut spans: Vec<Span> = Vec::with_capacity(marks.len());
    let mut task = None;
    let mut argument = 0;
    for pair in marks.windows(2) {
        let ((start, activity, word), (end, ..)) = (pair[0], pair[1]);
        match activity {
            A::LoadWeights | A::HandOut | A::WaitForStage | A::Announce => {
                let named = word.task();
                task = (named.phase <= Phase::Linear2 as u32).then_some(named);
                argument = 0;
            }
            A::WaitForTokens | A::Load | A::Multiply | A::Epilogue => {}
            // A chunk goes on behind the wait for results.
            A::Combine if spans.last().is_some_and(|last| last.activity == A::WaitForResults) => {}
            A::WaitForResults => {}
            _ => (task, argument) = (None, word.0),
        }
        let span = Span { activity, start, end, task, argument };
        match spans.last_mut() {
            Some(last) if (last.activity, last.task, last.argument) == (activity, task, argument) => last.end = end,
            _ => spans.push(span),
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(time_ns: u64, activity: Activity, argument: impl Into<Argument>) -> Record {
        Record { time_ns, word: argument.into().0 << 8 | activity as u64 }
    }

    fn task(phase: Phase) -> Task {
        Task { expert: 3, weight_row: 256, rows: 9, tile: 5, ..Task::plain(phase, 0) }
    }

    /// One CTA on SM 7, all of whose roles do `marks` from 1000 on; two records more than that fit.
    fn records(marks: &[Record]) -> (Vec<Record>, usize) {
        let capacity = marks.len() + 2;
        let role = |_| {
            let mut role = vec![record(0, Activity::Start, 0); capacity];
            role[0] = record(1000, Activity::Start, 7);
            role[1..=marks.len()].copy_from_slice(marks);
            role
        };
        ((0..ROLES).flat_map(role).collect(), capacity)
    }

    #[test]
    fn marks_become_spans_with_their_tasks() {
        let named = task(Phase::Linear2);
        let (records, capacity) = records(&[
            record(1010, Activity::WaitForTask, 0),
            record(1020, Activity::WaitForStage, &named),
            record(1030, Activity::Multiply, 0),
            record(1060, Activity::Epilogue, 0),
            record(1061, Activity::Epilogue, 0),
            record(1070, Activity::Combine, 4),
            record(1071, Activity::WaitForResults, 0),
            record(1075, Activity::Combine, 0),
            record(1080, Activity::Done, 0),
        ]);
        let trace = Trace::new(Format::FP8, vec![(2, 1, records)], capacity).unwrap();
        let rank = &trace.ranks[0];
        assert_eq!((rank.rank, rank.start, rank.end, rank.ctas[0].sm), (2, 0, 80, 7));
        let span = |activity, start, end, task, argument| Span { activity, start, end, task, argument };
        let expected = [
            span(Activity::Start, 0, 10, None, 7),
            span(Activity::WaitForTask, 10, 20, None, 0),
            span(Activity::WaitForStage, 20, 30, Some(named), 0),
            span(Activity::Multiply, 30, 60, Some(named), 0),
            span(Activity::Epilogue, 60, 70, Some(named), 0),
            span(Activity::Combine, 70, 71, None, 4),
            span(Activity::WaitForResults, 71, 75, None, 4),
            span(Activity::Combine, 75, 80, None, 4),
        ];
        assert!(rank.ctas[0].roles.iter().all(|role| role == &expected), "{:#?}", rank.ctas[0].roles[0]);
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        for (marks, problem) in [
            (vec![record(1010, Activity::WaitForTask, 0)], "capacity of 3"),
            (vec![record(990, Activity::Done, 0)], "backwards"),
            (vec![Record { time_ns: 1010, word: 99 }], "no kernel writes"),
        ] {
            let (records, capacity) = records(&marks);
            let error = Trace::new(Format::FP8, vec![(0, 1, records)], capacity).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        let error = Trace::new(Format::FP8, vec![(1, 1, vec![record(0, Activity::Start, 0); 2 * ROLES as usize])], 2)
            .unwrap_err()
            .to_string();
        assert!(error.contains("rank 1") && error.contains("no launch"), "{error}");
    }

    #[test]
    fn clocks_that_do_not_agree_begin_at_zero_each() {
        let rank = |from: u64| {
            let (mut records, capacity) = records(&[record(1010, Activity::Done, 0)]);
            records.iter_mut().filter(|record| record.time_ns > 0).for_each(|record| record.time_ns += from);
            assert_eq!(capacity, 3);
            records
        };
        let starts = |from| {
            let trace = Trace::new(Format::FP8, vec![(0, 1, rank(500)), (1, 1, rank(from))], 3).unwrap();
            (trace.one_clock, trace.ranks.iter().map(|rank| rank.start).collect::<Vec<_>>())
        };
        assert_eq!(starts(2500), (true, vec![0, 2000]));
        assert_eq!(starts(5_000_000_000), (false, vec![0, 0]));
    }
}
