//! A picture of a launch: a row for every CTA, in it a lane for dispatch, the producer and each consumer warpgroup; above them the waves.

use std::fmt::Write as _;

use ferromoe_kernel::task::Phase;
use ferromoe_kernel::trace::Activity;

use super::{CONSUMERS, DISPATCH, PRODUCER, RankTrace, Span, Trace};

/// Pixels of the time axis; what is shorter than one is shown by what takes most of it.
const COLUMNS: usize = 1600;
/// Left of the time axis.
const LEFT: f64 = 90.0;
/// Right of it.
const RIGHT: f64 = 20.0;
/// Height of the title and legend.
const HEAD: f64 = 74.0;
/// Height of a wave's row.
const WAVE: f64 = 11.0;
/// Height that all CTAs of a rank take together, if their rows do not become too low or too high for it.
const ROWS: f64 = 1188.0;
/// A CTA's row is as many times [`ROW`] high as that gives, within these bounds.
const TIMES: (f64, f64) = (1.0, 5.0);
/// Height of the lowest row, the last pixel of which is left free.
const ROW: f64 = 9.0;
/// Lanes of the lowest row: the role, and its place from and to.
const LANES: [(usize, f64, f64); 5] = [
    (DISPATCH, 0.0, 1.0),
    (PRODUCER, 1.0, 2.0),
    (CONSUMERS[0], 2.0, 4.0),
    (CONSUMERS[1], 4.0, 6.0),
    (CONSUMERS[2], 6.0, 8.0),
];

/// What is drawn alike.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    name: &'static str,
    colour: &'static str,
}

const fn kind(name: &'static str, colour: &'static str) -> Kind {
    Kind { name, colour }
}

const ROUTE: Kind = kind("route, counts", "#1b7837");
const PULL: Kind = kind("pull", "#5aae61");
const LOAD: Kind = kind("load", "#c3d3e3");
const TOKENS: Kind = kind("producer waits for tokens", "#e31a1c");
const STAGE: Kind = kind("wait for first stage", "#fee08b");
const MULTIPLY1: Kind = kind("linear 1", "#2166ac");
const FINISH1: Kind = kind("its epilogue", "#92c5de");
const MULTIPLY2: Kind = kind("linear 2", "#d95f0e");
const FINISH2: Kind = kind("its epilogue", "#fdb87d");
const COMBINE: Kind = kind("combine", "#762a83");
const RESULTS: Kind = kind("wait for results", "#d4b9da");
const IDLE: Kind = kind("no task, set up", "#e9e9e9");
const KINDS: [Kind; 12] =
    [ROUTE, PULL, LOAD, TOKENS, STAGE, MULTIPLY1, FINISH1, MULTIPLY2, FINISH2, COMBINE, RESULTS, IDLE];

fn kind_of(span: &Span) -> Kind {
    let first = span.phase() == Some(Phase::Linear1);
    match span.activity {
        Activity::Route | Activity::PublishCounts => ROUTE,
        Activity::Pull | Activity::ClaimRows => PULL,
        Activity::LoadWeights | Activity::Load => LOAD,
        Activity::WaitForTokens => TOKENS,
        Activity::WaitForStage => STAGE,
        Activity::Multiply => {
            if first {
                MULTIPLY1
            } else {
                MULTIPLY2
            }
        }
        Activity::Epilogue => {
            if first {
                FINISH1
            } else {
                FINISH2
            }
        }
        Activity::Combine => COMBINE,
        Activity::WaitForResults => RESULTS,
        _ => IDLE,
    }
}

impl Trace {
    /// The picture as SVG, rank below rank on one time axis.
    pub fn svg(&self, title: &str) -> String {
        let mut picture = Picture { text: String::new(), top: HEAD, scale: COLUMNS as f64 / self.end().max(1) as f64 };
        for rank in &self.ranks {
            picture.rank(rank, self.end());
        }
        let (width, height) = (LEFT + COLUMNS as f64 + RIGHT, picture.top);
        let mut head = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height:.0}\" viewBox=\"0 0 {width} {height:.0}\" \
             font-family=\"sans-serif\" font-size=\"11\" shape-rendering=\"crispEdges\">\n\
             <rect width=\"{width}\" height=\"{height:.0}\" fill=\"white\"/>\n"
        );
        put(&mut head, format_args!("<text x=\"10\" y=\"22\" font-size=\"15\">{}</text>", escape(title)));
        let mut x = 10.0;
        for Kind { name, colour } in KINDS {
            put(&mut head, format_args!("<rect x=\"{x:.0}\" y=\"40\" width=\"14\" height=\"12\" fill=\"{colour}\"/>"));
            put(&mut head, format_args!("<text x=\"{:.0}\" y=\"50\">{name}</text>", x + 18.0));
            x += 36.0 + 6.2 * name.len() as f64;
        }
        head + &picture.text + "</svg>\n"
    }
}

/// A kind, from when and until when.
type Bar = (Kind, u64, u64);

struct Picture {
    text: String,
    /// Where the next part begins.
    top: f64,
    /// Pixels of a nanosecond.
    scale: f64,
}

impl Picture {
    fn x(&self, ns: u64) -> f64 {
        LEFT + ns as f64 * self.scale
    }

    fn rank(&mut self, rank: &RankTrace, end: u64) {
        let label = format!("rank {}: {:.1} us", rank.rank, rank.ns() as f64 / 1e3);
        put(&mut self.text, format_args!("<text x=\"10\" y=\"{:.0}\" font-size=\"13\">{label}</text>", self.top + 8.0));
        self.top += 16.0;
        self.waves(rank);
        let times = (ROWS / ROW / rank.ctas.len().max(1) as f64).floor().clamp(TIMES.0, TIMES.1);
        let row = times * ROW;
        let every = (14.0 / row).ceil() as usize;
        let every = if every > 5 { every.next_multiple_of(10) } else { every };
        let bottom = self.top + row * rank.ctas.len() as f64;
        self.ticks(end, bottom);
        let mut paths: Vec<(Kind, f64, String)> = Vec::new();
        for (index, cta) in rank.ctas.iter().enumerate() {
            let top = self.top + row * index as f64;
            if index % every == 0 {
                let y = top + (row / 2.0 + 4.0).min(row);
                put(
                    &mut self.text,
                    format_args!("<text x=\"{:.0}\" y=\"{y:.1}\" text-anchor=\"end\">CTA {index}</text>", LEFT - 6.0),
                );
            }
            for (role, from, to) in LANES {
                let middle = top + times * (from + to) / 2.0;
                for (kind, first, columns) in self.runs(cta.roles.get(role).map_or(&[], Vec::as_slice)) {
                    let thick = times * (to - from);
                    let at = paths.iter().position(|(of, width, _)| *of == kind && *width == thick);
                    let at = at.unwrap_or_else(|| {
                        paths.push((kind, thick, String::new()));
                        paths.len() - 1
                    });
                    put(&mut paths[at].2, format_args!("M{} {middle:.2}h{columns}", LEFT as usize + first));
                }
            }
        }
        for (Kind { name, colour }, thick, path) in paths {
            put(
                &mut self.text,
                format_args!(
                    "<path stroke=\"{colour}\" stroke-width=\"{thick:.2}\" fill=\"none\" d=\"{path}\"><title>{name}</title></path>"
                ),
            );
        }
        self.top = bottom + 34.0;
    }

    /// When each wave's tiles are in linear 1 and in linear 2, and when rows are pulled.
    fn waves(&mut self, rank: &RankTrace) {
        let spans = |roles: &'static [usize]| {
            rank.ctas.iter().flat_map(move |cta| roles.iter().filter_map(|&role| cta.roles.get(role)).flatten())
        };
        let mut bars: Vec<(String, Vec<Bar>)> = Vec::new();
        let pulls = || spans(&[DISPATCH]).filter(|span| span.activity == Activity::Pull);
        let combines = || spans(&CONSUMERS).filter(|span| span.activity == Activity::Combine);
        let range = |spans: &mut dyn Iterator<Item = &Span>| {
            spans.fold(None, |range: Option<(u64, u64)>, span| {
                let (start, end) = range.unwrap_or((span.start, span.end));
                Some((start.min(span.start), end.max(span.end)))
            })
        };
        let bar = |kind, range: Option<(u64, u64)>| range.map(|(start, end)| (kind, start, end)).into_iter();
        bars.push((
            "pull, combine".into(),
            bar(PULL, range(&mut pulls())).chain(bar(COMBINE, range(&mut combines()))).collect(),
        ));
        let wave_of = |span: &Span| span.task.map(|task| task.tile / rank.wave_tiles.max(1));
        let waves = spans(&CONSUMERS).filter_map(wave_of).max().map_or(0, |wave| wave + 1);
        for wave in 0..waves {
            let of = |phase: Phase| {
                range(&mut spans(&CONSUMERS).filter(|span| wave_of(span) == Some(wave) && span.phase() == Some(phase)))
            };
            let both = bar(MULTIPLY1, of(Phase::Linear1)).chain(bar(MULTIPLY2, of(Phase::Linear2)));
            bars.push((format!("wave {wave}"), both.collect()));
        }
        for (name, bars) in bars {
            put(
                &mut self.text,
                format_args!(
                    "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
                    LEFT - 6.0,
                    self.top + WAVE - 2.0
                ),
            );
            for (index, (Kind { colour, .. }, start, end)) in bars.into_iter().enumerate() {
                // Linear 2 of a wave may begin before its linear 1 ends: one is the upper half, one the lower.
                let (x, y, width) =
                    (self.x(start), self.top + index as f64 * WAVE / 2.0, (self.x(end) - self.x(start)).max(1.0));
                put(
                    &mut self.text,
                    format_args!(
                        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                        WAVE / 2.0 - 0.5
                    ),
                );
            }
            self.top += WAVE;
        }
        self.top += 6.0;
    }

    /// The time axis below `bottom`, with lines up through the rows.
    fn ticks(&mut self, end: u64, bottom: f64) {
        let step = tick_step(end);
        for tick in (0..).map(|tick| tick * step).take_while(|&tick| tick <= end) {
            let x = self.x(tick);
            put(
                &mut self.text,
                format_args!(
                    "<path stroke=\"#999\" stroke-width=\"1\" d=\"M{x:.1} {:.1}V{:.1}\"/>",
                    self.top,
                    bottom + 5.0
                ),
            );
            let us = tick as f64 / 1e3;
            let unit = if tick == 0 { " us" } else { "" };
            put(
                &mut self.text,
                format_args!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{us}{unit}</text>", bottom + 17.0),
            );
        }
    }

    /// Runs of columns in which the same kind takes most of the time: kind, first column, columns.
    fn runs(&self, spans: &[Span]) -> Vec<(Kind, usize, usize)> {
        let mut shares = vec![[0.0f64; KINDS.len()]; COLUMNS];
        for span in spans {
            let kind = kind_of(span);
            let Some(index) = KINDS.iter().position(|other| *other == kind) else { continue };
            let (from, to) = (span.start as f64 * self.scale, span.end as f64 * self.scale);
            for (column, shares) in
                shares.iter_mut().enumerate().take((to.ceil() as usize).min(COLUMNS)).skip(from as usize)
            {
                shares[index] += to.min(column as f64 + 1.0) - from.max(column as f64);
            }
        }
        let mut runs: Vec<(Kind, usize, usize)> = Vec::new();
        for (column, shares) in shares.iter().enumerate() {
            let most =
                (0..KINDS.len()).max_by(|&a, &b| shares[a].total_cmp(&shares[b])).filter(|&most| shares[most] > 0.0);
            let Some(most) = most else { continue };
            match runs.last_mut() {
                Some((kind, first, columns)) if *kind == KINDS[most] && *first + *columns == column => *columns += 1,
                _ => runs.push((KINDS[most], column, 1)),
            }
        }
        runs
    }
}

/// 1, 2 or 5 times a power of ten nanoseconds, for about a dozen ticks.
fn tick_step(end: u64) -> u64 {
    let mut power = 1u64;
    loop {
        for factor in [1, 2, 5] {
            if end / (power * factor) <= 16 {
                return power * factor;
            }
        }
        power *= 10;
    }
}

/// Adds a line.
fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_shows_what_takes_most_of_it() {
        // 4 ns a column.
        let picture = Picture { text: String::new(), top: 0.0, scale: 0.25 };
        let span = |activity, start, end| Span { activity, start, end, task: None, argument: 0 };
        let spans = [
            span(Activity::Pull, 0, 9),
            span(Activity::Route, 9, 10),
            span(Activity::Combine, 10, 12),
            span(Activity::Combine, 20, 30),
        ];
        let runs: Vec<_> =
            picture.runs(&spans).into_iter().map(|(kind, first, columns)| (kind.name, first, columns)).collect();
        assert_eq!(runs, [("pull", 0, 2), ("combine", 2, 1), ("combine", 5, 3)]);
    }

    #[test]
    fn ticks_are_round_and_about_a_dozen() {
        assert_eq!([100, 351_000, 11_132_000].map(tick_step), [10, 50_000, 1_000_000]);
    }

    #[test]
    fn a_title_is_text() {
        let picture = Trace { ranks: vec![], one_clock: true }.svg("a < b & c");
        assert!(picture.contains("a &lt; b &amp; c") && picture.ends_with("</svg>\n"), "{picture}");
    }
}
