//! Plants bugs in the kernel's PTX, one at a time, and counts which of them the simulator and the small matrix find.

mod edit;
mod list;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use ferromoe::{Error, ExpertFormat};
use ferromoe_tests::repeat::quoted;
use ferromoe_tests::small::{FORMATS, Failure, Modules, SmallCase, format_of, run_options, small_matrix};
use indicatif::{ParallelProgressIterator, ProgressBar, ProgressStyle};
use ptx_sim::{Fault, Module, Position, SimError};
use rayon::prelude::*;

use crate::edit::Source;
use crate::list::{Mutant, mutants};

/// The share of planted bugs that must be found.
const REQUIRED_PERCENT: usize = 95;
/// How many times the warp instructions of the right kernel a mutant may take.
const PATIENCE: u64 = 30;

/// Plants bugs in the kernel's PTX, one at a time, and counts which are found.
#[derive(Parser)]
#[command(bin_name = "cargo xtask mutants")]
struct Arguments {
    /// Seeds that each bug gets to be found in.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Only bugs whose description contains this.
    #[arg(long)]
    only: Option<String>,
    /// Only bugs in the kernel of this format: bf16 or fp8.
    #[arg(long, value_parser = format_of)]
    format: Option<ExpertFormat>,
    /// Without the simulator's checks, in weak memory: only what goes wrong counts.
    #[arg(long, conflicts_with = "write")]
    unchecked: bool,
    /// Only count the bugs.
    #[arg(long, conflicts_with_all = ["seeds", "unchecked", "write"])]
    list: bool,
    /// Write the table to docs/mutants.md.
    #[arg(long, conflicts_with_all = ["only", "format"])]
    write: bool,
}

/// What finds bugs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finder {
    /// A check of the simulator: order, proxies, barriers, operands.
    Check,
    /// An access out of bounds, misaligned or of memory that nothing has written.
    Memory,
    /// Deadlock, livelock, or a deadline that passed.
    Progress,
    /// The output, or what the launch reported.
    Result,
    /// A panic of the simulator: a bug of its own.
    Panic,
}

impl Finder {
    const ALL: [Self; 5] = [Self::Check, Self::Memory, Self::Progress, Self::Result, Self::Panic];

    fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Memory => "memory error",
            Self::Progress => "no progress",
            Self::Result => "wrong result",
            Self::Panic => "**simulator panicked**",
        }
    }
}

/// How a bug was found.
struct Found {
    by: Finder,
    how: String,
    case: &'static str,
    seed: u64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mutants = chosen(arguments.only.as_deref(), arguments.format)?;
    let modules = planted(&mutants, &root)?;
    let broken: Vec<_> = modules.iter().filter_map(|module| module.as_ref().err()).collect();
    ensure!(
        broken.is_empty(),
        "bugs that cannot be planted:\n{}",
        lines(broken.iter().map(|error| format!("  {error:#}")))
    );
    println!("{} planted bugs", mutants.len());
    if arguments.list {
        return Ok(true);
    }
    let mut cases = small_matrix();
    cases.retain(|case| mutants.iter().any(|mutant| mutant.format == case.format()));
    let limits = right_kernel(&cases, !arguments.unchecked)?;
    // A mutant that makes the simulator panic is shown in the table, once.
    std::panic::set_hook(Box::new(|_| {}));
    let progress = ProgressBar::new(mutants.len() as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} bugs, {elapsed} ({eta} left)")?);
    let found: Vec<Option<Found>> = modules
        .into_par_iter()
        .zip(&mutants)
        .map(|(module, mutant)| {
            let of_format: Vec<_> =
                cases.iter().zip(&limits).filter(|(case, _)| case.format() == mutant.format).collect();
            find(&of_format, &Arc::new(module.expect("checked above")), arguments.seeds, !arguments.unchecked)
        })
        .progress_with(progress)
        .collect();
    let table = table(&mutants, &found);
    println!("{table}");
    if arguments.write {
        write(&root.join("docs/mutants.md"), &table)?;
    }
    for (mutant, found) in mutants.iter().zip(&found) {
        let missed = found.as_ref().is_none_or(|found| found.by == Finder::Panic);
        if missed && mutant.harmless.is_none() {
            let unchecked = if arguments.unchecked { " --unchecked" } else { "" };
            let (what, seeds) = (quoted(mutant.what), arguments.seeds);
            eprintln!("not found; repeat it with\n  cargo xtask mutants --only {what} --seeds {seeds}{unchecked}");
        }
    }
    // A simulator that panics has found nothing.
    let caught = found.iter().flatten().filter(|found| found.by != Finder::Panic).count();
    Ok(caught * 100 >= REQUIRED_PERCENT * found.len())
}

/// The bugs of this format whose description contains `only`; at least one.
fn chosen(only: Option<&str>, format: Option<ExpertFormat>) -> Result<Vec<Mutant>> {
    let mut mutants = mutants();
    mutants.retain(|mutant| format.is_none_or(|format| mutant.format == format));
    let all = mutants.len();
    mutants.retain(|mutant| only.is_none_or(|only| mutant.what.contains(only)));
    ensure!(
        !mutants.is_empty(),
        "none of the {all} planted bugs has {:?} in its description; docs/mutants.md lists them",
        only.unwrap_or_default()
    );
    Ok(mutants)
}

/// The kernel with each bug.
fn planted(mutants: &[Mutant], root: &Path) -> Result<Vec<Result<Module>>> {
    let [bf16, fp8] = FORMATS.map(|format| Source::read(ferromoe::kernel_ptx(format, false), root));
    let (bf16, fp8) = (bf16?, fp8?);
    let source = |format| if format == ExpertFormat::Bf16 { &bf16 } else { &fp8 };
    Ok(mutants.iter().map(|mutant| plant(source(mutant.format), mutant)).collect())
}

fn plant(source: &Source<'_>, mutant: &Mutant) -> Result<Module> {
    let ptx = source.edited(&mutant.plants).with_context(|| mutant.what.to_owned())?;
    Module::parse(&ptx).with_context(|| mutant.what.to_owned())
}

/// Runs the kernel as it is, and returns each case's limit of warp instructions.
fn right_kernel(cases: &[SmallCase], checks: bool) -> Result<Vec<u64>> {
    let modules = Modules::parse()?;
    let limit = |case: &SmallCase| match case.run(modules.of(case.format()), 0, &run_options(None, checks)) {
        Ok(ran) => Ok(PATIENCE * ran.instructions),
        Err(failure) => bail!(
            "the kernel without a bug fails case `{}`: {failure}\nrepeat it with\n  cargo xtask soak --case {} --seed 0{}",
            case.name,
            quoted(case.name),
            if checks { "" } else { " --unchecked" }
        ),
    };
    cases.par_iter().map(limit).collect()
}

/// The first failure over all seeds and cases, which have their limits of warp instructions.
fn find(cases: &[(&SmallCase, &u64)], module: &Arc<Module>, seeds: u64, checks: bool) -> Option<Found> {
    (0..seeds).find_map(|seed| {
        cases.iter().find_map(|(case, limit)| {
            let run = || case.run(module, seed, &run_options(Some(**limit), checks));
            // Every run has its own machine, so nothing half-done survives a panic.
            let (by, how) = match catch_unwind(AssertUnwindSafe(run)) {
                Ok(Ok(_)) => return None,
                Ok(Err(failure)) => describe(&failure),
                Err(_) => (Finder::Panic, String::new()),
            };
            Some(Found { by, how, case: case.name, seed })
        })
    })
}

/// What found a bug, and how, in a few words.
fn describe(failure: &Failure) -> (Finder, String) {
    match failure {
        Failure::Simulator(SimError::Fault { fault, position }) => describe_fault(fault, position),
        Failure::Simulator(SimError::Deadlock(_)) => (Finder::Progress, "deadlock".to_owned()),
        Failure::Simulator(SimError::StepLimit { .. }) => (Finder::Progress, "livelock".to_owned()),
        Failure::Simulator(SimError::Host(fault)) => (Finder::Memory, short(&fault.to_string())),
        Failure::Simulator(other) => (Finder::Check, short(&other.to_string())),
        Failure::Reported(Error::Deadline { stage, .. }) => (Finder::Progress, format!("deadline of {stage:?}")),
        Failure::Reported(other) => (Finder::Result, short(&other.to_string())),
        Failure::Unreported(_) => (Finder::Result, "an error that was not reported".to_owned()),
        Failure::Biased { .. } => (Finder::Result, "an output that is too small or too large".to_owned()),
        Failure::WrongResult { .. } => (Finder::Result, "wrong output".to_owned()),
    }
}

fn describe_fault(fault: &Fault, position: &Position) -> (Finder, String) {
    let (finder, what) = match fault {
        Fault::Race { place, now, before, earlier } => {
            let what = format!("data race: {now} at {}, after the {before} in {}", short(place), source_line(earlier));
            (Finder::Check, what)
        }
        Fault::OutOfBounds { .. } | Fault::Misaligned { .. } | Fault::Uninitialised { .. } => {
            (Finder::Memory, short(&fault.to_string()))
        }
        _ => (Finder::Check, short(&fault.to_string())),
    };
    (finder, format!("{what}, in {}", source_line(position)))
}

/// The innermost line of the kernel that is not one of its wrappers of instructions.
fn source_line(position: &Position) -> &str {
    let mut lines = position.source.split(" < ").map(|line| line.trim_start_matches("kernel/src/"));
    lines.find(|line| !line.starts_with("device/")).unwrap_or_default()
}

/// The first line of a message, without what it says in parentheses and in its second half, cut where a table would become too wide.
fn short(message: &str) -> String {
    const WIDTH: usize = 100;
    let line = message.lines().next().unwrap_or_default();
    let line = line.split(", which").next().unwrap_or_default();
    let mut depth = 0;
    let mut outside = |c: &char| {
        depth += i32::from(*c == '(');
        let keep = depth == 0;
        depth -= i32::from(*c == ')');
        keep
    };
    let line: String = line.chars().filter(|c| outside(c)).collect();
    let line = line.replace(" ,", ",").replace(" :", ":").replace('|', "\\|");
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.trim_end().to_owned(),
    }
}

fn table(mutants: &[Mutant], found: &[Option<Found>]) -> String {
    let mut text =
        summary(found) + "\n\n| bug | kernel | found by | how | case | seed |\n| --- | --- | --- | --- | --- | --- |\n";
    for (mutant, found) in mutants.iter().zip(found) {
        let (what, kernel) = (mutant.what, mutant.format.name());
        text += &match found {
            Some(Found { by, how, case, seed }) => {
                format!("| {what} | {kernel} | {} | {how} | {case} | {seed} |\n", by.name())
            }
            None => {
                format!("| {what} | {kernel} | **nothing** | {} | | |\n", mutant.harmless.unwrap_or("not explained"))
            }
        };
    }
    text
}

/// How many bugs were found, and by what.
fn summary(found: &[Option<Found>]) -> String {
    let by = |finder: Finder| found.iter().flatten().filter(|found| found.by == finder).count();
    let counts = Finder::ALL.map(|finder| (by(finder), finder.name()));
    let counts: Vec<_> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, name)| format!("{name} {n}")).collect();
    let first = found.iter().flatten().filter(|found| found.seed == 0).count();
    let all = found.iter().flatten().count();
    format!(
        "{all} of {} planted bugs were found ({}), {first} of them with the first seed.",
        found.len(),
        counts.join(", ")
    )
}

/// Puts the table between the file's markers.
fn write(path: &PathBuf, table: &str) -> Result<()> {
    const BEGIN: &str = "<!-- table: cargo xtask mutants --write -->\n";
    const END: &str = "<!-- end of table -->";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parts = text.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    let (head, tail) = parts.with_context(|| format!("{} has no place for the table", path.display()))?;
    std::fs::write(path, format!("{head}{BEGIN}\n{table}\n{END}{tail}"))?;
    Ok(())
}

fn lines(lines: impl Iterator<Item = String>) -> String {
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_over_nothing_and_options_without_effect_are_refused() {
        for (options, expected) in [
            ("--seeds 0", "0 is not in 1.."),
            ("--list --seeds 3", "cannot be used with"),
            ("--list --write", "cannot be used with"),
            ("--only x --write", "cannot be used with"),
            ("--format fp8 --write", "cannot be used with"),
            ("--format fp16", "there are bf16 and fp8"),
            ("--write --unchecked", "cannot be used with"),
        ] {
            let words = ["mutants"].into_iter().chain(options.split_whitespace());
            let error = Arguments::try_parse_from(words).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{options}: {error}");
        }
        let error = chosen(Some("no such bug"), None).err().unwrap().to_string();
        assert!(error.contains("has \"no such bug\" in its description"), "{error}");
        assert!(chosen(Some(mutants()[0].what), Some(ExpertFormat::Bf16)).is_ok());
    }
}
