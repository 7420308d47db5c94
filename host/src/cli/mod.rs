//! The `ferromoe` command: what it takes, what it prints, and its exit codes.

mod args;
mod bench;
mod counts;
mod job;
mod output;
mod report;
mod run;
mod trace;

use std::io::{self, Write};

use clap::Parser;
use ferromoe::{CudaError, Error, Result};

use args::{Cli, Command, RunArgs};
use report::Report;

/// The result is wrong, or the run failed.
const FAILED: u8 = 1;
/// The input cannot be used.
const BAD_INPUT: u8 = 2;
/// GPUs were asked for, and there is no CUDA driver.
const NO_DRIVER: u8 = 3;

/// Runs the command; gives the exit code.
pub fn main() -> u8 {
    let done = match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Bench(args) => bench::bench(&args).map(|()| 0),
        Command::Trace(args) => trace::trace(&args).map(|()| 0),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        exit_code(&error)
    })
}

fn run(args: &RunArgs) -> Result<u8> {
    let report = run::run(args)?;
    // A reader that has gone away (`| head`) does not change how the run went.
    let _ = print(&report, args.json);
    Ok(if report.passed { 0 } else { FAILED })
}

fn print(report: &Report, json: bool) -> io::Result<()> {
    let text = if json { serde_json::to_string(report)? } else { report.to_string() };
    writeln!(io::stdout(), "{text}")
}

/// Everything is the input's fault but what happens on the device.
fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Cuda(CudaError::NoDriver { .. }) => NO_DRIVER,
        Error::Cuda(CudaError::TooFewGpus { .. }) => BAD_INPUT,
        Error::Cuda(_)
        | Error::Deadline { .. }
        | Error::WrongResult(_)
        | Error::Simulator(_)
        | Error::Ptx(_)
        | Error::TensorMap(_) => FAILED,
        _ => BAD_INPUT,
    }
}
