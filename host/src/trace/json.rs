//! The trace event format that Perfetto and Chrome open: a process is a rank, a thread a role of a CTA.

use std::io::{self, Write};

use ferromoe_kernel::task::{Phase, Task};
use ferromoe_kernel::tile::Tiles;
use ferromoe_kernel::trace::Activity;
use serde::Serialize;

use super::{ROLE_NAMES, Span, Trace};

/// One event. Times are in microseconds.
#[derive(Serialize)]
struct Event<'a, A> {
    ph: &'static str,
    name: &'a str,
    pid: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    tid: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<A>,
}

#[derive(Serialize)]
struct Name {
    name: String,
}

#[derive(Serialize)]
struct SortIndex {
    sort_index: usize,
}

#[derive(Serialize)]
struct TaskArgs {
    expert: u32,
    tile: u32,
    rows: u32,
    width: u32,
    weight_row: u32,
}

#[derive(Serialize)]
struct Number {
    number: u64,
}

impl Trace {
    /// Writes the trace as JSON. A matrix product is an event around those of its parts.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write_json(&self, title: &str, out: &mut impl Write) -> io::Result<()> {
        write!(out, "{{\"displayTimeUnit\":\"ns\",\"otherData\":{{\"title\":{}}},", serde_json::to_string(title)?)?;
        out.write_all(b"\"traceEvents\":[")?;
        let mut events = Events { out, any: false };
        for rank in &self.ranks {
            events.name("process_name", rank.rank, None, format!("rank {}", rank.rank))?;
            for (cta, trace) in rank.ctas.iter().enumerate() {
                for (role, spans) in trace.roles.iter().enumerate().filter(|(_, spans)| !spans.is_empty()) {
                    let tid = cta * ROLE_NAMES.len() + role + 1;
                    let name = format!("CTA {cta} (SM {}) {}", trace.sm, ROLE_NAMES[role]);
                    events.name("thread_name", rank.rank, Some(tid), name)?;
                    events.sort_index(rank.rank, tid)?;
                    events.spans(rank.format.tiles, rank.rank, tid, spans)?;
                }
            }
        }
        out.write_all(b"\n]}\n")
    }
}

struct Events<'a, W> {
    out: &'a mut W,
    any: bool,
}

impl<W: Write> Events<'_, W> {
    fn put(&mut self, event: &impl Serialize) -> io::Result<()> {
        self.out.write_all(if self.any { b",\n" } else { b"\n" })?;
        self.any = true;
        Ok(serde_json::to_writer(&mut *self.out, event)?)
    }

    fn name(&mut self, what: &str, pid: usize, tid: Option<usize>, name: String) -> io::Result<()> {
        self.put(&Event { ph: "M", name: what, pid, tid, ts: None, dur: None, args: Some(Name { name }) })
    }

    fn sort_index(&mut self, pid: usize, tid: usize) -> io::Result<()> {
        let args = Some(SortIndex { sort_index: tid });
        self.put(&Event { ph: "M", name: "thread_sort_index", pid, tid: Some(tid), ts: None, dur: None, args })
    }

    fn complete(
        &mut self,
        thread: (usize, usize),
        name: &str,
        span: &Span,
        args: Option<impl Serialize>,
    ) -> io::Result<()> {
        let us = |ns: u64| Some(ns as f64 / 1e3);
        let (pid, tid) = thread;
        self.put(&Event { ph: "X", name, pid, tid: Some(tid), ts: us(span.start), dur: us(span.ns()), args })
    }

    fn spans(&mut self, tiles: Tiles, pid: usize, tid: usize, spans: &[Span]) -> io::Result<()> {
        let thread = (pid, tid);
        for part in spans.chunk_by(|one, next| one.task.is_some() && one.task == next.task) {
            if let Some(task) = part[0].task {
                let whole = Span { end: part[part.len() - 1].end, ..part[0] };
                self.complete(thread, phase_name(&task), &whole, Some(task_args(tiles, &task)))?;
            }
            for span in part.iter().filter(|span| span.ns() > 0) {
                let numbered = matches!(span.activity, Activity::Route | Activity::Pull | Activity::Combine);
                let number = numbered.then_some(Number { number: span.argument });
                self.complete(thread, span.activity.label(), span, number)?;
            }
        }
        Ok(())
    }
}

/// "linear 1" or "linear 2".
fn phase_name(task: &Task) -> &'static str {
    if task.phase == Phase::Linear1 as u32 { "linear 1" } else { "linear 2" }
}

fn task_args(tiles: Tiles, task: &Task) -> TaskArgs {
    let Task { expert, tile, rows, width, weight_row, .. } = *task;
    TaskArgs { expert, tile, rows, width: tiles.width(width), weight_row }
}

#[cfg(test)]
mod tests {
    use ferromoe_kernel::format::Format;
    use serde_json::Value;

    use super::*;
    use crate::trace::{CtaTrace, RankTrace};

    #[test]
    fn a_product_is_an_event_around_its_parts() {
        let task = Task { expert: 3, weight_row: 256, rows: 9, tile: 5, width: 1, ..Task::plain(Phase::Linear2, 0) };
        let span = |activity, start, end, task| Span { activity, start, end, task, argument: 0 };
        let spans = vec![
            span(Activity::WaitForStage, 2000, 2000, Some(task)),
            span(Activity::Multiply, 2000, 4500, Some(task)),
            span(Activity::Combine, 4500, 5000, None),
        ];
        let cta = CtaTrace { sm: 9, roles: vec![vec![], spans] };
        let trace = Trace {
            ranks: vec![RankTrace {
                rank: 1,
                ctas: vec![cta],
                start: 0,
                end: 5000,
                wave_tiles: 1,
                format: Format::BF16,
            }],
            one_clock: true,
        };
        let mut out = Vec::new();
        trace.write_json("a \"title\"", &mut out).unwrap();
        let json: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json["otherData"]["title"], "a \"title\"");
        let events: Vec<_> =
            json["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").collect();
        let shown: Vec<_> =
            events.iter().map(|event| (event["name"].as_str().unwrap(), &event["ts"], &event["dur"])).collect();
        let number = |value: f64| Value::from(value);
        let (two, half) = (number(2.0), number(2.5));
        assert_eq!(
            shown,
            [("linear 2", &two, &half), ("multiply", &two, &half), ("combine", &number(4.5), &number(0.5))]
        );
        let args = serde_json::json!({ "expert": 3, "tile": 5, "rows": 9, "width": 16, "weight_row": 256 });
        assert_eq!((&events[0]["args"], &events[0]["pid"], &events[0]["tid"]), (&args, &1.into(), &2.into()));
    }
}
