//! `ptx-sim run FILE.ptx --entry NAME ...`: runs a kernel on a simulated GPU, with every check, and says what it cost.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use ptx_sim::wgmma::Fp8Sums;
use ptx_sim::{Arg, Cost, Launch, Machine, Module, RunOptions, SimError};

/// Runs PTX on the CPU and checks it while it runs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a kernel. Exit code 0 if all is right, 1 if the kernel has an error, 2 for bad input.
    Run(Run),
    /// Read PTX and list its kernels.
    List {
        /// The PTX.
        file: PathBuf,
    },
}

#[derive(clap::Args)]
struct Run {
    /// The PTX.
    file: PathBuf,
    /// Kernel to run; not needed where there is only one.
    #[arg(long)]
    entry: Option<String>,
    /// CTAs: x, x,y or x,y,z.
    #[arg(long, default_value = "1")]
    grid: Dimensions,
    /// CTAs of a cluster: x, x,y or x,y,z; what the kernel says if absent.
    #[arg(long, default_value = "1")]
    cluster: Dimensions,
    /// Threads of a CTA: x, x,y or x,y,z.
    #[arg(long, default_value = "32")]
    block: Dimensions,
    /// Dynamic shared memory of a CTA, in bytes.
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    shared: u32,
    /// A kernel parameter, in order: `u32:N`, `u64:N`, `f32:X`, or a pointer to a new buffer: `new:BYTES` (uninitialised),
    /// `zeros:BYTES`, `file:PATH` (the file's bytes), `u32s:N,N,...`, `f32s:X,X,...`.
    #[arg(long = "arg", value_name = "KIND:VALUE", allow_hyphen_values = true)]
    args: Vec<Parameter>,
    /// Print a parameter's buffer after the run: `INDEX:u32` or `INDEX:f32`, parameters counted from 0.
    #[arg(long = "show", value_name = "INDEX:TYPE")]
    shows: Vec<Show>,
    /// Write a parameter's buffer to a file after the run.
    #[arg(long = "save", value_name = "INDEX:PATH")]
    saves: Vec<Save>,
    /// Chooses the interleaving of warps and the moments of asynchronous operations.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Run with so many seeds, from --seed on, until one fails.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// CTAs that are resident at once; all if absent.
    #[arg(long)]
    residency: Option<u32>,
    /// Do without the checks that take time: data races and proxy fences.
    #[arg(long)]
    no_checks: bool,
    /// Add the products of a `wgmma` of e4m3 or e5m2 in f32, in place of the few bits that Hopper keeps.
    #[arg(long)]
    exact_fp8: bool,
    /// End the run after so many warp instructions.
    #[arg(long, value_name = "N")]
    step_limit: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Dimensions([u32; 3]);

impl FromStr for Dimensions {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut sizes = [1; 3];
        let parts: Vec<_> = text.split([',', 'x']).collect();
        ensure!(parts.len() <= 3, "`{text}` has more than three dimensions");
        for (size, part) in sizes.iter_mut().zip(parts) {
            *size = part.trim().parse().with_context(|| format!("`{part}` is not a number"))?;
        }
        Ok(Self(sizes))
    }
}

/// A kernel parameter as the command line has it.
#[derive(Clone, Debug, PartialEq)]
enum Parameter {
    Value(Arg),
    New(u64),
    Buffer(Vec<u8>),
}

impl FromStr for Parameter {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, value) = text.split_once(':').with_context(|| format!("`{text}` is not KIND:VALUE, as in u32:5"))?;
        Ok(match kind {
            "u32" => Self::Value(Arg::U32(number(value)?)),
            "u64" => Self::Value(Arg::U64(number(value)?)),
            "f32" => Self::Value(Arg::F32(number(value)?)),
            "new" => Self::New(number(value)?),
            "zeros" => Self::Buffer(vec![0; number(value)?]),
            "file" => Self::Buffer(fs::read(value).with_context(|| format!("cannot read {value}"))?),
            "u32s" => Self::Buffer(numbers::<u32>(value)?.into_iter().flat_map(u32::to_le_bytes).collect()),
            "f32s" => Self::Buffer(numbers::<f32>(value)?.into_iter().flat_map(f32::to_le_bytes).collect()),
            _ => bail!("`{kind}` is no kind; there are u32, u64, f32, new, zeros, file, u32s and f32s"),
        })
    }
}

fn number<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> Result<T> {
    text.trim().parse().with_context(|| format!("`{text}` is not such a number"))
}

fn numbers<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> Result<Vec<T>> {
    text.split(',').map(number).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Element {
    U32,
    F32,
}

#[derive(Clone, Debug)]
struct Show {
    index: usize,
    element: Element,
}

impl FromStr for Show {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (index, element) =
            text.split_once(':').with_context(|| format!("`{text}` is not INDEX:TYPE, as in 0:f32"))?;
        let element = match element {
            "u32" => Element::U32,
            "f32" => Element::F32,
            _ => bail!("`{element}` is no element type; there are u32 and f32"),
        };
        Ok(Self { index: number(index)?, element })
    }
}

#[derive(Clone, Debug)]
struct Save {
    index: usize,
    path: PathBuf,
}

impl FromStr for Save {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (index, path) = text.split_once(':').with_context(|| format!("`{text}` is not INDEX:PATH"))?;
        Ok(Self { index: number(index)?, path: path.into() })
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(run) => run.all_seeds(),
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

fn read(file: &PathBuf) -> Result<Module> {
    let ptx = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Module::parse(&ptx).with_context(|| file.display().to_string())
}

fn list(file: &PathBuf) -> Result<ExitCode> {
    for entry in read(file)?.entries() {
        println!("{entry}");
    }
    Ok(ExitCode::SUCCESS)
}

impl Run {
    fn all_seeds(&self) -> Result<ExitCode> {
        let module = read(&self.file)?;
        let entries: Vec<_> = module.entries().collect();
        let entry = match (&self.entry, entries.as_slice()) {
            (Some(entry), _) => entry.as_str(),
            (None, [only]) => only,
            (None, _) => bail!("{} has the kernels {entries:?}: choose one with --entry", self.file.display()),
        };
        for index in self.shows.iter().map(|show| show.index).chain(self.saves.iter().map(|save| save.index)) {
            let parameter = self.args.get(index);
            let is_buffer = matches!(parameter, Some(Parameter::New(_) | Parameter::Buffer(_)));
            ensure!(is_buffer, "parameter {index} is no buffer: there are {} parameters", self.args.len());
        }
        for seed in self.seed..self.seed.saturating_add(self.seeds) {
            if !self.one_seed(&module, entry, seed)? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Runs with one seed; false if the kernel has an error.
    fn one_seed(&self, module: &Module, entry: &str, seed: u64) -> Result<bool> {
        let mut machine = Machine::new(1);
        let mut buffers = vec![None; self.args.len()];
        let mut args = Vec::new();
        for (index, parameter) in self.args.iter().enumerate() {
            let name = format!("parameter {index}");
            let (bytes, contents) = match parameter {
                Parameter::Value(arg) => {
                    args.push(arg.clone());
                    continue;
                }
                Parameter::New(bytes) => (*bytes, None),
                Parameter::Buffer(contents) => (contents.len() as u64, Some(contents)),
            };
            let address = machine.alloc(0, bytes.max(1), &name)?;
            if let Some(contents) = contents {
                machine.write(address, contents)?;
            }
            buffers[index] = Some((address, bytes as usize));
            args.push(Arg::U64(address));
        }
        let (grid, block) = (self.grid.0, self.block.0);
        let cluster = self.cluster.0;
        let launch = Launch { device: 0, module, entry, grid, cluster, block, shared_bytes: self.shared, args };
        let options = RunOptions {
            seed,
            residency: self.residency,
            step_limit: self.step_limit,
            checks: !self.no_checks,
            fp8_sums: if self.exact_fp8 { Fp8Sums::Exact } else { Fp8Sums::Hopper },
            ..RunOptions::default()
        };
        match machine.run(&[launch], &options) {
            Ok(costs) => costs.iter().for_each(|cost| print_cost(entry, seed, cost)),
            Err(error @ SimError::Launch { .. }) => return Err(error.into()),
            Err(error) => {
                eprintln!("{entry}, seed {seed}: {error}");
                eprintln!("repeat it with the same arguments and --seed {seed} --seeds 1");
                return Ok(false);
            }
        }
        let mut contents = |index: usize| -> Result<Vec<u8>> {
            let (address, bytes) = buffers[index].context("no buffer")?;
            let mut contents = vec![0; bytes];
            machine.read(address, &mut contents).with_context(|| format!("parameter {index}"))?;
            Ok(contents)
        };
        for save in &self.saves {
            fs::write(&save.path, contents(save.index)?)
                .with_context(|| format!("cannot write {}", save.path.display()))?;
        }
        for show in &self.shows {
            println!("parameter {}: {}", show.index, words(&contents(show.index)?, show.element));
        }
        Ok(true)
    }
}

/// A buffer's elements; what is left of a last one is not shown.
fn words(contents: &[u8], element: Element) -> String {
    let word = |bytes: &[u8; 4]| match element {
        Element::U32 => u32::from_le_bytes(*bytes).to_string(),
        Element::F32 => f32::from_le_bytes(*bytes).to_string(),
    };
    contents.as_chunks().0.iter().map(word).collect::<Vec<_>>().join(" ")
}

fn print_cost(entry: &str, seed: u64, cost: &Cost) {
    println!(
        "{entry}, seed {seed}: {} warp instructions ({} thread instructions), {} tensor-core operations, \
         {} B read and {} B written in device memory, {} B through L2, {} waits, {} ns simulated",
        cost.instructions,
        cost.thread_instructions,
        cost.tensor_ops,
        cost.hbm_read,
        cost.hbm_write,
        cost.l2_bytes,
        cost.waits,
        cost.simulated_ns
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters() {
        let parse = |text: &str| text.parse::<Parameter>().map_err(|error| format!("{error:#}"));
        assert_eq!(parse("u32:7"), Ok(Parameter::Value(Arg::U32(7))));
        assert_eq!(parse("f32:-1.5"), Ok(Parameter::Value(Arg::F32(-1.5))));
        assert_eq!(parse("zeros:3"), Ok(Parameter::Buffer(vec![0; 3])));
        assert_eq!(parse("u32s:1, 256"), Ok(Parameter::Buffer(vec![1, 0, 0, 0, 0, 1, 0, 0])));
        for (text, expected) in [("7", "KIND:VALUE"), ("i8:1", "no kind"), ("u32:-1", "`-1`"), ("f32s:1,x", "`x`")] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn dimensions() {
        assert_eq!("8".parse::<Dimensions>().unwrap(), Dimensions([8, 1, 1]));
        assert_eq!("8,2,3".parse::<Dimensions>().unwrap(), Dimensions([8, 2, 3]));
        assert!("1,2,3,4".parse::<Dimensions>().is_err());
        assert!("".parse::<Dimensions>().is_err());
    }
}
