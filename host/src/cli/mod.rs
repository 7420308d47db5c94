//! The `ferromoe` command: what it takes, what it prints, and its exit codes.

mod args;
mod bench;
mod counts;
mod job;
mod output;
mod print;
mod report;
mod routing;
mod run;
mod trace;
mod verdict;

use anyhow::Result;
use clap::Parser;
use ferromoe::{CudaError, Error};

use args::{Cli, Command, RunArgs};
use output::NotWritten;

/// The result is wrong, or the run failed, or what came of it could not be written.
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
        eprintln!("error: {error:#}");
        exit_code(&error)
    })
}

fn run(args: &RunArgs) -> Result<u8> {
    let report = run::run(args)?;
    if args.json {
        print::json(&report)?;
    } else {
        print::text(&report.to_string())?;
    }
    Ok(if report.passed { 0 } else { FAILED })
}

/// Everything is the input's fault but what happens on the device, and afterwards.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<NotWritten>() {
        return FAILED;
    }
    match error.downcast_ref::<Error>() {
        Some(Error::Cuda(CudaError::NoDriver { .. })) => NO_DRIVER,
        Some(Error::Cuda(CudaError::TooFewGpus { .. })) => BAD_INPUT,
        Some(
            Error::Cuda(_)
            | Error::Deadline { .. }
            | Error::WrongResult(_)
            | Error::Simulator(_)
            | Error::Ptx(_)
            | Error::TensorMap(_),
        ) => FAILED,
        _ => BAD_INPUT,
    }
}
