//! What the user sees while something takes time.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Steps shorter than this leave no line behind.
const WORTH_TELLING: Duration = Duration::from_secs(2);

/// Runs `work` under a spinner labelled `label`; where stderr is no terminal the label is printed instead.
/// A step that took longer than two seconds leaves a line with its time.
pub fn step<T>(label: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let spinner = ProgressBar::new_spinner().with_message(label.to_owned());
    if std::io::stderr().is_terminal() {
        spinner.set_style(ProgressStyle::with_template("{spinner} {msg} ({elapsed})")?);
        spinner.enable_steady_tick(Duration::from_millis(100));
    } else {
        eprintln!("{label} ...");
    }
    let result = work();
    spinner.finish_and_clear();
    if start.elapsed() > WORTH_TELLING {
        let end = if result.is_ok() { "done" } else { "failed" };
        eprintln!("{label}: {end} in {:.1} s", start.elapsed().as_secs_f64());
    }
    result
}
