//! What a run tells: for people, and as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use ptx_sim::Cost;
use serde::{Serialize, Serializer};

use super::args::RouteArg;
use super::job::{Compared, Job};
use super::routing::RoutingCheck;
use super::verdict::{Distance, NotFinite, Place, Verdict};

/// The largest relative L2 error of a right result.
pub const ERROR_LIMIT: f64 = 1e-2;

/// The counters of a rank: the name in JSON, the name for people, the value.
const COUNTERS: [Counter; 13] = [
    ("instructions", "warp instructions", |cost| cost.instructions),
    ("thread_instructions", "thread instructions", |cost| cost.thread_instructions),
    ("hbm_read_bytes", "HBM bytes read", |cost| cost.hbm_read),
    ("hbm_write_bytes", "HBM bytes written", |cost| cost.hbm_write),
    ("l2_bytes", "L2 bytes", |cost| cost.l2_bytes),
    ("nvlink_read_bytes", "NVLink bytes read", |cost| cost.nvlink_read),
    ("nvlink_write_bytes", "NVLink bytes written", |cost| cost.nvlink_write),
    ("tensor_ops", "tensor-core operations", |cost| cost.tensor_ops),
    ("waits", "waits", |cost| cost.waits),
    ("mbarrier_waits", "mbarrier waits", |cost| cost.mbarriers().waits),
    ("mbarrier_waits_met", "of them met at once", |cost| cost.mbarriers().met),
    ("polls", "polls", |cost| cost.polls),
    ("simulated_ns", "simulated ns", |cost| cost.simulated_ns),
];

type Counter = (&'static str, &'static str, fn(&Cost) -> u64);

/// What came of a job. Its JSON form is the output of `ferromoe run --json`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub checkpoint: String,
    pub model_type: &'static str,
    pub layer: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
    pub shared_experts: usize,
    pub swiglu_limit: Option<f32>,
    /// The number format that the experts ran in: "bf16" or "fp8".
    pub experts_format: &'static str,
    /// The one that the checkpoint has them in.
    pub checkpoint_format: &'static str,
    pub tokens: usize,
    pub tokens_per_rank: Vec<usize>,
    pub ranks: usize,
    pub device: String,
    /// Bytes of the workspace on each rank; all layers of a model can share one.
    pub workspace_bytes: u64,
    pub seed: u64,
    /// "file" or "compute".
    pub route: &'static str,
    /// How that compares with the routing of the input file; null where it was not compared.
    pub route_check: Option<RoutingCheck>,
    /// Tensors of the input file that nobody reads.
    pub unread_input: Vec<String>,
    pub compared_with: Compared,
    /// Tokens that were compared: those whose input is finite.
    pub compared_tokens: usize,
    /// The others, by their first; null where there are none.
    pub input_not_finite: Option<NotFinite>,
    /// The first value of a compared token that is not finite; null where all are.
    pub output_not_finite: Option<Place>,
    /// As well, of what it is compared with.
    pub expected_not_finite: Option<Place>,
    /// Null where no token was compared, or the output or what it is compared with is not finite.
    pub relative_l2_error: Option<f64>,
    pub error_limit: f64,
    pub passed: bool,
    /// How far the output is from what it need not be near to: of FP8 experts, from the results without quantised tokens.
    pub beside: Vec<Distance>,
    /// Each rank's counters; empty on a GPU.
    #[serde(serialize_with = "costs_by_name")]
    pub cost: Vec<Cost>,
    /// Each rank's time of the launch: measured on a GPU, simulated time in the simulator.
    pub rank_seconds: Vec<f64>,
    /// Wall time of the forward pass on this machine.
    pub seconds: f64,
}

/// How a job ran.
pub struct Execution {
    pub device: String,
    pub workspace_bytes: u64,
    pub cost: Vec<Cost>,
    pub rank_elapsed: Vec<Duration>,
    pub elapsed: Duration,
}

impl Report {
    pub fn new(job: &Job, seed: u64, execution: Execution, verdict: Verdict) -> Self {
        let config = &job.config;
        Self {
            checkpoint: job.checkpoint.clone(),
            model_type: job.layer.family.model_type(),
            layer: job.layer.layer,
            hidden: config.hidden,
            intermediate: config.intermediate,
            experts: config.experts,
            top_k: config.top_k,
            shared_experts: config.shared_experts,
            swiglu_limit: config.swiglu_limit,
            experts_format: config.experts_format.name(),
            checkpoint_format: job.layer.weights.format().name(),
            tokens: job.input.tokens,
            tokens_per_rank: job.shares.iter().map(ExactSizeIterator::len).collect(),
            ranks: job.shares.len(),
            device: execution.device,
            workspace_bytes: execution.workspace_bytes,
            seed,
            route: match job.route {
                RouteArg::File => "file",
                RouteArg::Compute => "compute",
            },
            route_check: job.check.clone(),
            unread_input: job.input.unread.clone(),
            compared_with: verdict.compared_with,
            compared_tokens: verdict.compared_tokens,
            input_not_finite: verdict.input_not_finite,
            output_not_finite: verdict.output_not_finite,
            expected_not_finite: verdict.expected_not_finite,
            relative_l2_error: (verdict.error.is_finite() && verdict.compared_tokens > 0).then_some(verdict.error),
            error_limit: ERROR_LIMIT,
            passed: verdict.error <= ERROR_LIMIT && job.check.as_ref().is_none_or(|check| check.contradictions == 0),
            beside: verdict.beside,
            cost: execution.cost,
            rank_seconds: execution.rank_elapsed.iter().map(Duration::as_secs_f64).collect(),
            seconds: execution.elapsed.as_secs_f64(),
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "layer    {} of {} ({})", self.layer, self.checkpoint, self.model_type)?;
        write!(f, "         hidden {}, intermediate {}, ", self.hidden, self.intermediate)?;
        write!(f, "{} experts, top-{}, {} shared", self.experts, self.top_k, self.shared_experts)?;
        match self.swiglu_limit {
            Some(limit) => writeln!(f, ", SwiGLU limit {limit}")?,
            None => writeln!(f)?,
        }
        match (self.experts_format, self.checkpoint_format) {
            ("bf16", "bf16") => {}
            (runs, kept) if runs == kept => writeln!(f, "format   {runs}")?,
            (runs, kept) => writeln!(f, "format   {runs}, made of {kept} weights")?,
        }
        let shares: Vec<String> = self.tokens_per_rank.iter().map(usize::to_string).collect();
        writeln!(f, "tokens   {} on {} ranks: {}", self.tokens, self.ranks, shares.join(" + "))?;
        if let Some(NotFinite { tokens, tensor, first: Place { token, column, value } }) = &self.input_not_finite {
            let others = match tokens - 1 {
                0 => String::new(),
                others => format!(", nor {} {others} more", if others == 1 { "is" } else { "are" }),
            };
            let own = "results of such tokens are not compared";
            writeln!(
                f,
                "         token {token} of the input is not finite ({tensor}, column {column}: {value}){others}; {own}"
            )?;
        }
        if !self.unread_input.is_empty() {
            writeln!(f, "         not read of the input: {}", self.unread_input.join(", "))?;
        }
        match (self.route, &self.route_check) {
            ("file", _) => writeln!(f, "routing  as in the input file")?,
            (_, None) => writeln!(f, "routing  by the checkpoint's router")?,
            (_, Some(check)) => writeln!(f, "routing  by the checkpoint's router; {}", check.text(self.tokens))?,
        }
        writeln!(f, "device   {}", self.device)?;
        let mebibytes = self.workspace_bytes as f64 / f64::from(1 << 20);
        writeln!(f, "memory   {mebibytes:.1} MiB of workspace on each rank, which all layers of a model share")?;
        self.write_costs(f)?;
        let slowest = self.rank_seconds.iter().copied().fold(0.0, f64::max);
        writeln!(
            f,
            "time     {:.3} s on this machine; the slowest rank's launch took {:.1} us",
            self.seconds,
            1e6 * slowest
        )?;
        let instructions: u64 = self.cost.iter().map(|cost| cost.instructions).sum();
        if instructions > 0 {
            let speed = instructions as f64 / 1e6 / self.seconds.max(1e-9);
            writeln!(f, "         {speed:.1} million warp instructions a second")?;
        }
        write!(f, "result   {}", self.result())?;
        for Distance { compared_with, relative_l2_error } in &self.beside {
            let error = relative_l2_error.map_or("not finite".to_owned(), |error| format!("{error:.2e}"));
            write!(f, "\n         {error} against {}", compared_with.name())?;
        }
        Ok(())
    }
}

impl Report {
    /// The verdict, in words.
    fn result(&self) -> String {
        let against = self.compared_with.name();
        if self.compared_tokens == 0 {
            return "nothing to compare: the input has 0 tokens".into();
        }
        let part = match self.tokens - self.compared_tokens {
            0 => String::new(),
            _ => format!("; over {} of {} tokens, whose input is finite", self.compared_tokens, self.tokens),
        };
        let wrong = self.route_check.as_ref().and_then(|check| check.wrong(self.tokens));
        let verdict = match (self.passed, wrong) {
            (true, _) => "right".to_owned(),
            (false, Some(wrong)) => format!("WRONG: {wrong}; with the computed routing"),
            (false, None) => "WRONG".to_owned(),
        };
        let place = |place: &Place| format!("token {}, column {} is {}", place.token, place.column, place.value);
        match (self.relative_l2_error, &self.output_not_finite, &self.expected_not_finite) {
            (Some(error), ..) => {
                format!(
                    "{verdict}: relative L2 error {error:.2e} against {against}, limit {:.0e}{part}",
                    self.error_limit
                )
            }
            (None, Some(output), None) => {
                format!("{verdict}: not finite, compared with {against}: {}{part}", place(output))
            }
            (None, _, Some(expected)) => {
                format!("{verdict}: {against} is not finite, so nothing can be compared: {}{part}", place(expected))
            }
            (None, None, None) => format!("{verdict}: not finite, compared with {against}{part}"),
        }
    }

    /// A table with a line for every counter and a column for every rank.
    fn write_costs(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.cost.is_empty() {
            return Ok(());
        }
        let name_width = COUNTERS.iter().map(|(_, name, _)| name.len()).max().unwrap_or(0);
        let cell_width =
            |cost: &Cost| COUNTERS.iter().map(|(_, _, value)| grouped(value(cost)).len()).max().unwrap_or(0);
        let widths: Vec<usize> = self.cost.iter().map(|cost| cell_width(cost).max("rank 0".len())).collect();
        write!(f, "cost     {:name_width$}", "")?;
        for (rank, width) in widths.iter().enumerate() {
            write!(f, "  {:>width$}", format!("rank {rank}"))?;
        }
        writeln!(f)?;
        for (_, name, value) in COUNTERS {
            write!(f, "         {name:name_width$}")?;
            for (cost, width) in self.cost.iter().zip(&widths) {
                write!(f, "  {:>width$}", grouped(value(cost)))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Each rank's counters as an object.
fn costs_by_name<S: Serializer>(costs: &[Cost], serializer: S) -> Result<S::Ok, S::Error> {
    let by_name = |cost| COUNTERS.iter().map(|&(name, _, value)| (name, value(cost))).collect::<BTreeMap<_, _>>();
    serializer.collect_seq(costs.iter().map(by_name))
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::{Value, json};

    use super::*;
    use crate::cli::args::{Cli, Command};

    fn report(error: f64) -> Report {
        let Command::Run(args) = Cli::try_parse_from(["ferromoe", "run"]).unwrap().command else { panic!("not run") };
        let job = Job::prepare(&args).unwrap();
        let cost = |instructions| Cost { instructions, ..Cost::default() };
        let execution = Execution {
            device: "2 ranks".into(),
            workspace_bytes: 3 << 19,
            cost: vec![cost(12), cost(3_456_789)],
            rank_elapsed: vec![Duration::from_micros(5), Duration::from_micros(9)],
            elapsed: Duration::from_millis(1500),
        };
        let (expected, compared_with) = job.expected().unwrap();
        let verdict = job.finite.compare(&vec![half::bf16::ONE; expected.len()], &expected, compared_with);
        Report::new(&job, 3, execution, Verdict { error, ..verdict })
    }

    #[test]
    fn people_read_what_ran_and_how_right_it_is() {
        let text = report(3.21e-3).to_string();
        for line in [
            "layer    0 of bundled deepseek-v3 example (deepseek_v3)",
            "         hidden 192, intermediate 64, 16 experts, top-4, 1 shared",
            "tokens   50 on 2 ranks: 25 + 25",
            "routing  as in the input file",
            "memory   1.5 MiB of workspace on each rank, which all layers of a model share",
            "cost                             rank 0     rank 1",
            "         warp instructions           12  3,456,789",
            "         NVLink bytes read            0          0",
            "time     1.500 s on this machine; the slowest rank's launch took 9.0 us",
            "         2.3 million warp instructions a second",
            "result   right: relative L2 error 3.21e-3 against output_f32 of the input file, limit 1e-2",
        ] {
            assert!(text.lines().any(|found| found == line), "{text}\nlacks {line:?}");
        }
        assert!(report(1.01e-2).to_string().contains("result   WRONG: relative L2 error 1.01e-2"));
    }

    #[test]
    fn fp8_results_are_also_told_from_what_they_need_not_be_near_to() {
        let distance = |compared_with, relative_l2_error| Distance { compared_with, relative_l2_error };
        let beside = vec![distance(Compared::Reference, Some(3.4e-2)), distance(Compared::OutputF32, None)];
        let report = Report { experts_format: "fp8", compared_with: Compared::Fp8Reference, beside, ..report(1e-3) };
        let text = report.to_string();
        let end = "result   right: relative L2 error 1.00e-3 against the reference that quantises as the kernel does, limit 1e-2\n         \
                   3.40e-2 against the f64 reference\n         not finite against output_f32 of the input file";
        assert!(text.ends_with(end), "{text}");
        assert!(text.contains("\nformat   fp8, made of bf16 weights\n"), "{text}");
        let json = serde_json::to_value(report).unwrap();
        assert_eq!((&json["experts_format"], &json["checkpoint_format"]), (&json!("fp8"), &json!("bf16")));
        assert_eq!(json["beside"][0], json!({"compared_with": "reference", "relative_l2_error": 3.4e-2}));
        assert_eq!(json["beside"][1]["relative_l2_error"], Value::Null);
    }

    #[test]
    fn programs_read_one_object() {
        let json = serde_json::to_value(report(1e-2)).unwrap();
        assert_eq!(json["passed"], true);
        assert_eq!(json["relative_l2_error"], 1e-2);
        assert_eq!(json["compared_with"], "output_f32");
        assert_eq!(json["tokens_per_rank"], json!([25, 25]));
        assert_eq!(json["workspace_bytes"], 3 << 19);
        assert_eq!(json["cost"][1]["instructions"], 3_456_789);
    }

    #[test]
    fn an_error_that_is_no_number_does_not_pass() {
        for error in [f64::NAN, f64::INFINITY] {
            let report = report(error);
            assert!(!report.passed && report.to_string().contains("WRONG: not finite"));
            assert_eq!(serde_json::to_value(report).unwrap()["relative_l2_error"], Value::Null);
        }
    }

    #[test]
    fn digits_are_grouped() {
        let texts = [0, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567"]);
    }
}
