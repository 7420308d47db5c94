//! The project's commands: `cargo xtask build | run | bench | trace | test | mutants | soak | lint | bundle | doctor`.

mod build;
mod bundle;
mod cuda_builder;
mod device_compiler;
mod doctor;
mod ir;
mod limits;
mod lint;
mod nvidia;
mod progress;
mod ptxas;
mod run;
mod sass;
mod size;
mod stamp;
mod test;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, runs and checks ferromoe.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compile the kernel crate to host/ptx/, once as it runs and once as it records traces.
    Build {
        /// Build even if the PTX is up to date with its sources.
        #[arg(long)]
        force: bool,
        /// Only check that it is.
        #[arg(long, conflicts_with = "force")]
        check: bool,
    },
    /// Run `ferromoe run` in release mode, building what is missing first.
    Run {
        /// Its arguments; put `--` before them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run `ferromoe bench` in release mode, building what is missing first; or `bench simulator`: how fast the simulator is.
    Bench {
        /// `ferromoe bench`'s arguments, after `--`; or `simulator` and its own, such as `--profile`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run `ferromoe trace` in release mode, building what is missing first.
    Trace {
        /// Its arguments; put `--` before them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Check everything: the PTX's stamp, the lint, all tests, a minute of soak. Installs what they need.
    Test,
    /// Plant bugs in the kernel's PTX and count which are found, in how few runs; 0 if 95% are.
    Mutants {
        /// Its arguments: `--seeds N`, `--only TEXT`, `--unchecked`, `--write`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run the small matrix over many seeds, going on where the last soak was stopped.
    Soak {
        /// Its arguments: `--seeds N`, `--seconds S`, `--seed S --case NAME`, `--unchecked`, `--restart`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Hold the kernel's machine code to its limits, and check the Rust with rustfmt, clippy and rustdoc.
    Lint,
    /// Make target/bundle/: checks and measures on a GPU machine with no Rust and no network.
    Bundle,
    /// Say what is installed, what is missing, and what to type.
    Doctor,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Build { check: true, .. } => build::check(),
        Command::Build { force, .. } => build::build(force),
        Command::Run { args } => run::run("run", &args),
        Command::Bench { args } if args.first().is_some_and(|first| first == "simulator") => {
            run::run_tests("speed", &args[1..])
        }
        Command::Bench { args } => run::run("bench", &args),
        Command::Trace { args } => run::run("trace", &args),
        Command::Mutants { args } => run::run_tests("mutants", &args),
        Command::Soak { args } => run::run_tests("soak", &args),
        Command::Test => test::test(),
        Command::Lint => lint::lint(),
        Command::Bundle => bundle::bundle(),
        Command::Doctor => doctor::doctor(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
