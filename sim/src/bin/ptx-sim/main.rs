//! `ptx-sim run FILE.ptx --entry NAME ...`: runs a kernel on a simulated GPU, with every check, and says what it cost; and
//! `ptx-sim plan FILE`: several launches on several devices.

mod files;
mod session;
mod values;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use ptx_sim::wgmma::Fp8Sums;
use ptx_sim::{Check, RunOptions};
use session::{LaunchLine, Modules, NamedBuffer, NamedMap, OnDisk, Session, Show, Step};

/// Runs PTX on the CPU and checks it while it runs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a kernel. Exit code 0 if all is right, 1 if the kernel has an error or a result is not as expected, 2 for bad input.
    Run(Box<Run>),
    /// Run several launches, on several devices: a file with a step a line, of which --help is `plan-help`.
    Plan(Plan),
    /// Say what the lines of a plan can be.
    PlanHelp,
    /// Read PTX and list its kernels.
    List {
        /// The PTX.
        file: PathBuf,
    },
}

#[derive(clap::Args)]
struct Run {
    #[command(flatten)]
    launch: LaunchLine,
    /// A buffer for `--arg ptr:NAME` and tensor maps: `NAME[@DEVICE]=KIND:VALUE`, as of --arg.
    #[arg(long = "buffer", value_name = "NAME=KIND:VALUE")]
    buffers: Vec<NamedBuffer>,
    /// A tensor map: `NAME=BUFFER[+OFFSET],shape=X[xY..],box=X[xY..]` with `,strides=BYTES[x..]`, `,swizzle=none|32|64|128`,
    /// `,type=TYPE`, `,fill=zero|nan` and `,element-strides=X[xY..]`, all innermost dimension first.
    #[arg(long = "tensor-map", value_name = "NAME=BUFFER,shape=..,box=..")]
    maps: Vec<NamedMap>,
    /// Print a buffer after the run: `NAME:TYPE`. The name of a parameter's own buffer is its index, from 0.
    #[arg(long = "show", value_name = "NAME:TYPE")]
    shows: Vec<Show>,
    /// Write a buffer to a file after the run: `NAME:PATH[:TYPE]`, as an .npy if it is called so.
    #[arg(long = "save", value_name = "NAME:PATH")]
    saves: Vec<OnDisk>,
    /// Compare a buffer with an .npy after the run: `NAME:PATH[:TYPE[:TOLERANCE]]`.
    #[arg(long = "expect", value_name = "NAME:PATH")]
    expected: Vec<OnDisk>,
    /// Devices of the machine.
    #[arg(long, default_value_t = 1)]
    devices: usize,
    #[command(flatten)]
    how: How,
}

#[derive(clap::Args)]
struct Plan {
    /// The steps.
    file: PathBuf,
    #[command(flatten)]
    how: How,
}

/// How all runs are made.
#[derive(clap::Args)]
struct How {
    /// Chooses the interleaving of warps and the moments of asynchronous operations.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Run with so many seeds, from --seed on, until one fails.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// CTAs that are resident at once on a device; as many as fit on 132 SMs if absent.
    #[arg(long)]
    residency: Option<u32>,
    /// Do without the checks that take time: data races and proxy fences.
    #[arg(long)]
    no_checks: bool,
    /// Add the products of a `wgmma` of e4m3 or e5m2 in f32, in place of the few bits that Hopper keeps.
    #[arg(long)]
    exact_fp8: bool,
    /// Waive a check, such as data-race, uninitialised-read, exit-with-stores or init-without-proxy-fence.
    #[arg(long = "allow", value_name = "CHECK")]
    allow: Vec<Check>,
    /// Go on after what a check has found, and report all of it.
    #[arg(long)]
    keep_going: bool,
    /// End the run after so many warp instructions.
    #[arg(long, value_name = "N", default_value_t = RunOptions::STEP_LIMIT)]
    step_limit: u64,
}

/// A line of a plan. Words are parted by spaces; `#` starts a comment.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    step: LineStep,
}

#[derive(Subcommand)]
enum LineStep {
    /// Devices of the machine: the first line, if there are several.
    Devices {
        /// How many.
        count: usize,
    },
    /// A buffer, as of --buffer.
    Buffer {
        /// NAME[@DEVICE]=KIND:VALUE
        buffer: NamedBuffer,
    },
    /// A tensor map, as of --tensor-map.
    TensorMap {
        /// NAME=BUFFER,shape=..,box=..
        map: NamedMap,
    },
    /// A launch, as of `run`. All launches up to the next `run` run together.
    Launch(LaunchLine),
    /// Run the launches so far, until all are done.
    Run,
    /// Print a buffer.
    Show {
        /// NAME:TYPE
        show: Show,
    },
    /// Write a buffer to a file.
    Save {
        /// NAME:PATH[:TYPE]
        save: OnDisk,
    },
    /// Compare a buffer with an .npy.
    Expect {
        /// NAME:PATH[:TYPE[:TOLERANCE]]
        expected: OnDisk,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(run) => run.all(),
        Command::Plan(plan) => plan.all(),
        Command::PlanHelp => {
            println!("{}", <Line as clap::CommandFactory>::command().render_long_help());
            Ok(ExitCode::SUCCESS)
        }
        Command::List { file } => list(&file),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn list(file: &std::path::Path) -> Result<ExitCode> {
    let module = session::read(file)?;
    for entry in module.entries() {
        println!("{entry}");
    }
    for (entry, errors) in module.refused() {
        for error in errors {
            eprintln!("{entry} cannot run: {error}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Run {
    fn all(self) -> Result<ExitCode> {
        let mut steps: Vec<Step> = self.buffers.into_iter().map(Step::Buffer).collect();
        steps.extend(self.maps.into_iter().map(Step::Map));
        steps.extend([Step::Launch(self.launch), Step::Run]);
        steps.extend(self.saves.into_iter().map(Step::Save));
        steps.extend(self.shows.into_iter().map(Step::Show));
        steps.extend(self.expected.into_iter().map(Step::Expect));
        all_seeds(&self.how, self.devices, &steps)
    }
}

impl Plan {
    fn all(self) -> Result<ExitCode> {
        let text = fs::read_to_string(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        let (mut devices, mut steps) = (1, Vec::new());
        for (index, line) in text.lines().enumerate() {
            let words: Vec<_> = line.split('#').next().unwrap_or_default().split_whitespace().collect();
            if words.is_empty() {
                continue;
            }
            let place = || format!("{}, line {}", self.file.display(), index + 1);
            let line = Line::try_parse_from(words).with_context(place)?;
            steps.push(match line.step {
                LineStep::Devices { count } => {
                    ensure!(steps.is_empty(), "{}: devices come first", place());
                    devices = count;
                    continue;
                }
                LineStep::Buffer { buffer } => Step::Buffer(buffer),
                LineStep::TensorMap { map } => Step::Map(map),
                LineStep::Launch(launch) => Step::Launch(launch),
                LineStep::Run => Step::Run,
                LineStep::Show { show } => Step::Show(show),
                LineStep::Save { save } => Step::Save(save),
                LineStep::Expect { expected } => Step::Expect(expected),
            });
        }
        all_seeds(&self.how, devices, &steps)
    }
}

/// Does all steps with each seed, each time on a new machine.
fn all_seeds(how: &How, devices: usize, steps: &[Step]) -> Result<ExitCode> {
    let modules = Modules::of(steps)?;
    session::check_names(steps)?;
    for seed in how.seed..how.seed.saturating_add(how.seeds) {
        let options = RunOptions {
            seed,
            residency: how.residency,
            step_limit: Some(how.step_limit),
            checks: !how.no_checks,
            allow: how.allow.iter().copied().collect(),
            keep_going: how.keep_going,
            fp8_sums: if how.exact_fp8 { Fp8Sums::Exact } else { Fp8Sums::Hopper },
            ..RunOptions::default()
        };
        let mut session = Session::new(devices, &modules, options);
        for step in steps {
            if !session.step(step)? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
