//! Runs the small matrix over many seeds: a number of them, going on where the last soak was stopped, or fresh ones for a time.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use ferromoe_tests::repeat::quoted;
use ferromoe_tests::small::{Modules, SmallCase, run_options, small_matrix};
use indicatif::{ParallelProgressIterator, ProgressBar, ProgressStyle};
use rayon::prelude::*;

/// Runs the small matrix over many seeds: a number of them, going on where the last soak was stopped, or fresh ones for a time.
#[derive(Parser)]
#[command(bin_name = "cargo xtask soak")]
struct Arguments {
    /// Seeds to run: 0 to N - 1.
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Only this seed, whether it was run before or not.
    #[arg(long, value_name = "S", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Only this case.
    #[arg(long, value_name = "NAME", requires = "seed")]
    case: Option<String>,
    /// As many seeds as can be begun in so many seconds: fresh ones, which come from the time of day.
    #[arg(long, value_name = "S", conflicts_with_all = ["seeds", "seed", "restart"], value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// The first of the fresh seeds, to repeat those of another day.
    #[arg(long, value_name = "S", requires = "seconds")]
    base: Option<u64>,
    /// Without the simulator's checks, in weak memory: only what goes wrong counts.
    #[arg(long)]
    unchecked: bool,
    /// Forget the seeds that were run before.
    #[arg(long, conflicts_with = "seed")]
    restart: bool,
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
    let mut cases = small_matrix();
    if let Some(name) = &arguments.case {
        let names: Vec<_> = cases.iter().map(|case| case.name).collect();
        cases.retain(|case| case.name == name);
        if cases.is_empty() {
            bail!("there is no case `{name}`; there are {names:?}");
        }
    }
    if let Some(seed) = arguments.seed {
        run_seed(&cases, &modules, seed, !arguments.unchecked)?;
        println!("seed {seed}: all right");
        return Ok(());
    }
    let checks = !arguments.unchecked;
    if let Some(seconds) = arguments.seconds {
        return run_fresh(&cases, &modules, arguments.base, Duration::from_secs(seconds), checks);
    }
    let path = done_path(checks)?;
    if arguments.restart && path.exists() {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    let (done, file) = open_done(&path)?;
    let file = Mutex::new(file);
    let left: Vec<_> = (0..arguments.seeds).filter(|seed| !done.contains(seed)).collect();
    let before = arguments.seeds - left.len() as u64;
    if before > 0 {
        println!("{before} of {} seeds were run before ({})", arguments.seeds, path.display());
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {elapsed} ({eta} left)")?;
    let progress = ProgressBar::new(left.len() as u64).with_style(style);
    left.par_iter().progress_with(progress).try_for_each(|&seed| {
        run_seed(&cases, &modules, seed, !arguments.unchecked)?;
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(file, "{seed}").with_context(|| format!("cannot write {}", path.display()))
    })?;
    println!("{} cases, {} seeds: all right", cases.len(), arguments.seeds);
    Ok(())
}

/// Runs seeds from `base` on until the time is up; the last ones begun are finished.
fn run_fresh(cases: &[SmallCase], modules: &Modules, base: Option<u64>, budget: Duration, checks: bool) -> Result<()> {
    // Milliseconds: no two soaks have seeds in common.
    let today = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let base = base.unwrap_or_else(today);
    println!("fresh seeds from {base} on, for {} s; `--base {base}` repeats them", budget.as_secs());
    let start = Instant::now();
    let next = AtomicU64::new(base);
    (0..rayon::current_num_threads()).into_par_iter().try_for_each(|_| {
        while start.elapsed() < budget {
            run_seed(cases, modules, next.fetch_add(1, Ordering::Relaxed), checks)?;
        }
        anyhow::Ok(())
    })?;
    let seeds = next.into_inner().wrapping_sub(base);
    println!("{} cases, {seeds} seeds from {base} on: all right ({:.0} s)", cases.len(), start.elapsed().as_secs_f64());
    Ok(())
}

fn run_seed(cases: &[SmallCase], modules: &Modules, seed: u64, checks: bool) -> Result<()> {
    for case in cases {
        let name = case.name;
        case.run(modules.of(case.format()), seed, &run_options(None, checks)).map_err(|failure| {
            let unchecked = if checks { "" } else { " --unchecked" };
            let command = format!("cargo xtask soak --case {} --seed {seed}{unchecked}", quoted(name));
            anyhow!("case `{name}` failed with seed {seed}: {failure}\nrepeat it with\n  {command}")
        })?;
    }
    Ok(())
}

/// The seeds that this kernel has passed: a file beside cargo's build outputs, named by the digest of the kernel's sources.
fn done_path(checks: bool) -> Result<PathBuf> {
    let binary = std::env::current_exe().context("cannot tell where this program is")?;
    let target = binary.ancestors().nth(2).context("this program is not in cargo's target folder")?;
    let digest = ferromoe::kernel_ptx(ferromoe::ExpertFormat::Bf16, false)
        .lines()
        .next()
        .and_then(|line| line.rsplit(' ').next())
        .unwrap_or_default();
    Ok(target.join("soak").join(format!("{digest:.16}{}.seeds", if checks { "" } else { ".unchecked" })))
}

fn open_done(path: &PathBuf) -> Result<(BTreeSet<u64>, File)> {
    let context = || format!("cannot use {}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(context)?;
    }
    let done = match fs::read_to_string(path) {
        Ok(text) => text.lines().filter_map(|line| line.parse().ok()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeSet::new(),
        Err(error) => return Err(error).with_context(context),
    };
    let file = OpenOptions::new().create(true).append(true).open(path).with_context(context)?;
    Ok((done, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_soak_of_nothing_and_options_without_effect_are_refused() {
        for (options, expected) in [
            ("--seeds 0", "0 is not in 1.."),
            ("--seconds 0", "0 is not in 1.."),
            ("--case plain", "--seed"),
            ("--base 7", "--seconds"),
            ("--seed 1 --restart", "cannot be used with"),
            ("--seed 1 --seeds 2", "cannot be used with"),
            ("--seed 1 --seconds 2", "cannot be used with"),
        ] {
            let words = ["soak"].into_iter().chain(options.split_whitespace());
            let error = Arguments::try_parse_from(words).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{options}: {error}");
        }
    }
}
