//! How fast the simulator runs the kernel's own PTX, and what its checks cost.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use clap::builder::RangedU64ValueParser;
use ferromoe::MAX_RANKS;
use ferromoe_tests::small::{Modules, SmallCase, small_matrix};
use ptx_sim::{Kind, Module, Profile, RunOptions};

/// Thread instructions, those of wgmma left out, that the simulator should run in a second of one core.
const RATE_GOAL: f64 = 20e6;
/// How many times longer a run with checks may take.
const CHECKS_GOAL: f64 = 4.0;

/// Measures the simulator on the kernel's PTX: layers of the small matrix, in processor time of this machine.
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench simulator")]
struct Arguments {
    /// Ranks to simulate, one table row each.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8", value_name = "N,...", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_RANKS as u64))]
    ranks: Vec<usize>,
    /// Runs of each kind; the fastest counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    runs: u32,
    /// Show by kind of instruction what every case takes, not only those that fall short.
    #[arg(long)]
    profile: bool,
}

/// What one case took.
struct Measured {
    /// Without checks.
    time: Duration,
    with_checks: Duration,
    /// The time that passes without checks: on one thread, and on all.
    passed: [Duration; 2],
    /// Of a third kind of run, slower than the first.
    profile: Profile,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let modules = Modules::parse()?;
    println!(
        "The kernel's PTX in the simulator, a second being one of processor time; the fastest of {} runs.\n\
         Goals: {:.0} M thread instructions/s without checks and without wgmma, checks on at most {CHECKS_GOAL}x.\n\n\
         {:<14} {:>5} {:>14} {:>21} {:>10} {:>11} {:>9} {:>12}",
        arguments.runs,
        RATE_GOAL / 1e6,
        "case",
        "ranks",
        "warp instr/s",
        "thread instr/s, no wgmma",
        "checks",
        "wgmma time",
        "1 thread",
        "all threads"
    );
    let mut short = 0;
    for case in small_matrix().iter().filter(|case| case.succeeds()) {
        for &ranks in &arguments.ranks {
            let measured = measure(&case.on_ranks(ranks), modules.of(case.format()), arguments.runs)
                .with_context(|| format!("case `{}` on {ranks} ranks", case.name))?;
            let (rate, ratio) = (measured.thread_rate(), measured.checks_ratio());
            println!(
                "{:<14} {ranks:>5} {:>12.2} M {:>22.1} M {ratio:>9.2}x {:>10.0}% {:>6.0} ms {:>11.2}x",
                case.name,
                measured.warp_rate() / 1e6,
                rate / 1e6,
                100.0 * measured.product_time().as_secs_f64() / measured.time.as_secs_f64(),
                1e3 * measured.passed[0].as_secs_f64(),
                measured.passed[0].as_secs_f64() / measured.passed[1].as_secs_f64(),
            );
            let falls_short = rate < RATE_GOAL || ratio > CHECKS_GOAL;
            short += u32::from(falls_short);
            if falls_short || arguments.profile {
                println!("{}", table(&measured.profile));
            }
        }
    }
    println!("{}", if short == 0 { "All meet the goals.".into() } else { format!("{short} fall short.") });
    Ok(())
}

/// Runs a case without checks on one thread and on all, with checks, and with a profile, each from the same seed.
fn measure(case: &SmallCase, module: &Arc<Module>, runs: u32) -> Result<Measured> {
    let run = |options: &RunOptions| case.run(module, 0, options);
    let plain = RunOptions { checks: false, threads: Some(NonZeroUsize::MIN), ..RunOptions::default() };
    let [checked, parallel] =
        [RunOptions { checks: true, ..plain.clone() }, RunOptions { threads: None, ..plain.clone() }];
    let mut measured = Measured {
        time: Duration::MAX,
        with_checks: Duration::MAX,
        passed: [Duration::MAX; 2],
        profile: Profile::default(),
    };
    for turn in 0..runs {
        let ran = run(&plain)?;
        measured.time = measured.time.min(ran.processor_time);
        measured.passed = [measured.passed[0].min(ran.time), measured.passed[1].min(run(&parallel)?.time)];
        measured.with_checks = measured.with_checks.min(run(&checked)?.processor_time);
        let profile = Arc::new(Mutex::new(Profile::default()));
        run(&RunOptions { profile: Some(profile.clone()), ..plain.clone() })?;
        let profile = profile.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if turn == 0 || profile.total().time < measured.profile.total().time {
            measured.profile = profile;
        }
    }
    Ok(measured)
}

impl Measured {
    fn warp_rate(&self) -> f64 {
        self.profile.total().instructions as f64 / self.time.as_secs_f64()
    }

    /// One wgmma is worth thousands of other instructions: neither it nor its time counts.
    fn thread_rate(&self) -> f64 {
        let threads = self.profile.total().thread_instructions - self.profile.kind(Kind::Product).thread_instructions;
        threads as f64 / self.time.saturating_sub(self.product_time()).as_secs_f64()
    }

    /// Of the time without checks, as the profile shares it out.
    fn product_time(&self) -> Duration {
        let [products, all] =
            [self.profile.kind(Kind::Product), self.profile.total()].map(|cost| cost.time.as_secs_f64());
        self.time.mul_f64(products / all.max(f64::MIN_POSITIVE))
    }

    fn checks_ratio(&self) -> f64 {
        self.with_checks.as_secs_f64() / self.time.as_secs_f64()
    }
}

/// Where the time of a run without checks goes.
fn table(profile: &Profile) -> String {
    let total = profile.total();
    let part = |part: f64, whole: f64| 100.0 * part / whole.max(f64::MIN_POSITIVE);
    let row = |kind: &Kind| {
        let cost = profile.kind(*kind);
        let each = |value: f64| {
            if cost.instructions == 0 { "-".into() } else { format!("{:.1}", value / cost.instructions as f64) }
        };
        format!(
            "    {:<26} {:>6.1}% {:>13.1}% {:>8} {:>18}\n",
            kind.name(),
            part(cost.time.as_secs_f64(), total.time.as_secs_f64()),
            part(cost.instructions as f64, total.instructions as f64),
            each(cost.time.as_nanos() as f64),
            each(cost.thread_instructions as f64)
        )
    };
    let rows: String = Kind::ALL.iter().map(row).collect();
    format!("    {:<26} {:>7} {:>14} {:>8} {:>18}\n{rows}", "", "time", "warp instr", "ns each", "lanes active")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_ranks_and_runs_that_cannot_be_are_refused() {
        for (options, expected) in [
            ("--ranks 0", "0 is not in 1..=8"),
            ("--ranks 2,9", "9 is not in 1..=8"),
            ("--ranks two", "invalid digit"),
            ("--runs 0", "0 is not in 1.."),
        ] {
            let words = ["simulator"].into_iter().chain(options.split_whitespace());
            let error = Arguments::try_parse_from(words).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{options}: {error}");
        }
    }
}
