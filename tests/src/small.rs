//! The small matrix: cases that between them go through every role, wait and ring of the kernel, and are cheap enough to run
//! thousands of times.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferromoe::{
    DeviceGroup, Error, Expert, ExpertFormat, ExpertWeights, FusedMoe, Matrix, MoeConfig, Routing, ScaleKind,
    SimOptions, WeightMatrix, Workspace, WorkspaceSizes, reference,
};
use half::bf16;
use ptx_sim::{Module, ParseError, RunOptions, SimError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::{Case, Choices, Tokens, tolerance};

/// How long one wait of the kernel may last, in simulated time: a launch of a small case takes a tenth of it.
const DEADLINE: Duration = Duration::from_millis(4);

/// The number formats that the small matrix has cases of.
pub const FORMATS: [ExpertFormat; 2] = [ExpertFormat::Bf16, ExpertFormat::Fp8];

/// The format of this name, for options of commands.
///
/// # Errors
/// None has it.
pub fn format_of(name: &str) -> Result<ExpertFormat, String> {
    let found = FORMATS.into_iter().find(|format| format.name() == name);
    found.ok_or_else(|| format!("there are {}", FORMATS.map(ExpertFormat::name).join(" and ")))
}

/// The kernel of every format.
pub struct Modules([Arc<Module>; FORMATS.len()]);

impl Modules {
    /// Parses them.
    ///
    /// # Errors
    /// PTX that the simulator does not read.
    pub fn parse() -> Result<Self, ParseError> {
        let module = |format| Module::parse(ferromoe::kernel_ptx(format, false)).map(Arc::new);
        let [bf16, fp8] = FORMATS.map(module);
        Ok(Self([bf16?, fp8?]))
    }

    /// That of a format.
    pub fn of(&self, format: ExpertFormat) -> &Arc<Module> {
        &self.0[usize::from(format == ExpertFormat::Fp8)]
    }
}

/// What a launch must give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expectation {
    /// The reference's output, on every rank.
    Output,
    /// An error that names this token's expert id, which does not exist.
    BadExpert {
        /// The rank that has the token.
        rank: usize,
        /// The token.
        token: usize,
        /// The choice.
        k: usize,
    },
    /// An error that names the rank that was not launched.
    LostRank(usize),
}

/// A case with all that does not depend on the seed.
pub struct SmallCase {
    /// What it is called, for messages and commands.
    pub name: &'static str,
    case: Case,
    weights: ExpertWeights,
    tokens: Tokens,
    reference: Vec<Vec<f64>>,
    /// What each launch gives, in order; all are launches of one layer.
    launches: Vec<Expectation>,
}

/// What the launches of a case took.
#[derive(Clone, Copy, Debug)]
pub struct Ran {
    /// Warp instructions of the launches that gave an output.
    pub instructions: u64,
    /// What they took.
    pub time: Duration,
    /// Of all of this process's threads, meanwhile.
    pub processor_time: Duration,
}

/// What this process has used so far.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Why a run is not as it must be.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The simulator ended the run.
    #[error("{0}")]
    Simulator(SimError),
    /// The kernel, or the library, reported an error where there is none, or another than there is.
    #[error("unexpected error: {0}")]
    Reported(Error),
    /// No error where there is one.
    #[error("no error where {0:?} was expected")]
    Unreported(Expectation),
    /// Another output than the reference's.
    #[error("rank {rank} has a relative L2 error of {error:.2e} in launch {launch}")]
    WrongResult {
        /// The rank.
        rank: usize,
        /// The launch, from 0.
        launch: usize,
        /// Its error.
        error: f64,
    },
    /// An output that is too large or too small as a whole.
    #[error("all of rank {rank} is off by {bias:.2e} in launch {launch}")]
    Biased {
        /// The rank.
        rank: usize,
        /// The launch, from 0.
        launch: usize,
        /// By how much.
        bias: f64,
    },
}

/// By how much all of a right output in bf16 may be too large or too small. What is rounded goes either way, and in the mean of so many values nowhere; what is cut off does not.
const BIAS: f64 = 6e-4;

/// By how much a part of its own the output is larger than expected, in the mean.
fn bias(output: &[bf16], expected: &[f64]) -> f64 {
    let product = |of: &dyn Fn(usize) -> f64| (0..expected.len()).map(|at| of(at) * expected[at]).sum::<f64>();
    let square = product(&|at| expected[at]);
    if square == 0.0 { 0.0 } else { product(&|at| output[at].to_f64()) / square - 1.0 }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Simulator(error) => Self::Simulator(error),
            other => Self::Reported(other),
        }
    }
}

impl SmallCase {
    fn new(
        name: &'static str,
        config: MoeConfig,
        tokens: &[usize],
        choices: Choices,
        sim: SimOptions,
        launches: &[Expectation],
    ) -> Self {
        let max_tokens_per_rank = tokens.iter().copied().max().unwrap_or(0).max(1);
        let config = MoeConfig { max_tokens_per_rank, ..config };
        let case = Case { config, tokens: tokens.to_vec(), choices, sim, data: 1 };
        let (weights, tokens) = (weights(&case.config, case.data), tokens_of(&case));
        let reference = tokens.hidden_states.iter().zip(&tokens.routing).map(|(states, routing)| {
            reference::of_format(&case.config, &weights, states, routing)
                .expect("a case that the reference can compute")
        });
        let reference = reference.collect();
        Self { name, case, weights, tokens, reference, launches: launches.to_vec() }
    }

    /// The case on another number of ranks, each with the tokens of one of its own; experts are rounded up to what the ranks divide.
    pub fn on_ranks(&self, ranks: usize) -> Self {
        let Case { config, tokens, choices, sim, .. } = &self.case;
        let config = MoeConfig { experts: config.experts.next_multiple_of(ranks), ..config.clone() };
        let tokens: Vec<_> = tokens.iter().copied().cycle().take(ranks).collect();
        Self::new(self.name, config, &tokens, *choices, *sim, &self.launches)
    }

    /// The format of its experts.
    pub fn format(&self) -> ExpertFormat {
        self.case.config.experts_format
    }

    /// Whether every launch gives an output.
    pub fn succeeds(&self) -> bool {
        self.launches.iter().all(|launch| *launch == Expectation::Output)
    }

    /// Runs all launches of the case with this kernel, and returns what they took.
    ///
    /// # Errors
    /// The first launch that is not as it must be.
    pub fn run(&self, module: &Arc<Module>, seed: u64, run: &RunOptions) -> Result<Ran, Failure> {
        let sim = SimOptions { seed, ..self.case.sim };
        // After a deadline waits fall through, and nothing orders what is thrown away.
        let drains = self.launches.iter().any(|launch| matches!(launch, Expectation::LostRank(_)));
        let run = RunOptions { checks: run.checks && !drains, ..run.clone() };
        let group = DeviceGroup::simulated(Some(module.clone()), self.case.ranks(), sim, run)?;
        let workspace = Workspace::new(&group, &WorkspaceSizes::of([&self.case.config]))?;
        let mut moe = FusedMoe::new(&workspace, &self.case.config, &self.weights)?;
        moe.set_deadline(DEADLINE);
        let (mut instructions, began, used) = (0, Instant::now(), processor_time());
        for (launch, expectation) in self.launches.iter().enumerate() {
            instructions += self.launch(&mut moe, launch, *expectation)?;
        }
        let processor_time = processor_time().saturating_sub(used);
        Ok(Ran { instructions, time: began.elapsed(), processor_time })
    }

    fn launch(&self, moe: &mut FusedMoe, launch: usize, expectation: Expectation) -> Result<u64, Failure> {
        let bad_tokens = match expectation {
            Expectation::BadExpert { rank, token, k } => Some(self.with_bad_id(rank, token, k)),
            _ => None,
        };
        let tokens = bad_tokens.as_ref().unwrap_or(&self.tokens);
        let lost = if let Expectation::LostRank(rank) = expectation { Some(rank) } else { None };
        let launched: Vec<_> = (0..self.case.ranks()).filter(|rank| Some(*rank) != lost).collect();
        match (moe.forward_on(&launched, &tokens.batch()), expectation) {
            (Ok(outputs), Expectation::Output) => {
                for (rank, (output, expected)) in outputs.iter().zip(&self.reference).enumerate() {
                    let error = reference::relative_l2(&output.output, expected);
                    if error.is_nan() || error > tolerance(self.case.config.experts_format) {
                        return Err(Failure::WrongResult { rank, launch, error });
                    }
                    let bias = bias(&output.output, expected);
                    if self.format() == ExpertFormat::Bf16 && bias.abs() > BIAS {
                        return Err(Failure::Biased { rank, launch, bias });
                    }
                }
                Ok(outputs.iter().filter_map(|output| output.cost).map(|cost| cost.instructions).sum())
            }
            (Ok(_), expected) => Err(Failure::Unreported(expected)),
            (Err(Error::ExpertId { rank, token, k, .. }), expected)
                if expected == (Expectation::BadExpert { rank, token, k }) =>
            {
                Ok(0)
            }
            (Err(Error::Deadline { missing, .. }), expected) if expected == Expectation::LostRank(missing) => Ok(0),
            (Err(error), _) => Err(error.into()),
        }
    }

    /// The case's tokens, but this choice and a later token's name experts that do not exist.
    fn with_bad_id(&self, rank: usize, token: usize, k: usize) -> Tokens {
        let mut tokens = tokens_of(&self.case);
        let routing = &tokens.routing[rank];
        let mut ids = routing.topk_idx().to_vec();
        for token in [token, token + 1] {
            ids[token * routing.top_k() + k] = self.case.config.experts as i32;
        }
        tokens.routing[rank] =
            Routing::new(routing.top_k(), ids, routing.topk_weights().to_vec()).expect("as many ids as before");
        tokens
    }
}

/// How the small matrix is run: with every check of the simulator, or without any, in weak memory, where only what goes wrong counts.
/// A run has one thread, as many runs go on at once.
pub fn run_options(step_limit: Option<u64>, checks: bool) -> RunOptions {
    RunOptions { step_limit, checks, threads: Some(NonZeroUsize::MIN), ..RunOptions::default() }
}

/// The small matrix: the cases of every format.
pub fn small_matrix() -> Vec<SmallCase> {
    let mut cases = bf16_cases();
    cases.extend(fp8_cases());
    cases
}

/// How large the values of a group are: unlike those of its neighbours, so that another group's scale shows.
fn magnitude(number: usize) -> f32 {
    [1.0, 0.4, 1.7, 0.7, 1.3][number % 5]
}

/// Random weights; of a format with scales, blocks unlike each other.
fn weights(config: &MoeConfig, seed: u64) -> ExpertWeights {
    if config.experts_format == ExpertFormat::Bf16 {
        return ExpertWeights::random(config, seed);
    }
    let mut random = StdRng::seed_from_u64(seed);
    let mut matrix = |rows: usize, columns: usize, first: usize| {
        let bound = (3.0 / columns as f32).sqrt();
        let value = |at: usize| {
            let block = first + at / columns / 128 + 2 * (at % columns / 128);
            bf16::from_f32(magnitude(block) * random.random_range(-bound..=bound))
        };
        let values = (0..rows * columns).map(value).collect();
        WeightMatrix::from(Matrix::new(values, rows, columns).expect("as many values as the matrix has"))
    };
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let mut expert = |number: usize| Expert {
        gate: matrix(intermediate, hidden, number),
        up: matrix(intermediate, hidden, number + 1),
        down: matrix(hidden, intermediate, number + 2),
    };
    ExpertWeights {
        experts: (0..config.experts).map(&mut expert).collect(),
        shared: (0..config.shared_experts).map(expert).collect(),
    }
}

/// The tokens of a case; of a format with scales, groups of columns unlike each other.
fn tokens_of(case: &Case) -> Tokens {
    let mut tokens = case.tokens();
    if case.config.experts_format != ExpertFormat::Bf16 {
        let hidden = case.config.hidden;
        for (at, value) in tokens.hidden_states.iter_mut().flat_map(|states| states.iter_mut().enumerate()) {
            *value = bf16::from_f32(value.to_f32() * magnitude(at / hidden + 3 * (at % hidden / 128)));
        }
    }
    tokens
}

/// A layer of the small matrix.
fn config(hidden: usize, intermediate: usize, experts: usize, top_k: usize, shared_experts: usize) -> MoeConfig {
    MoeConfig { hidden, intermediate, experts, top_k, shared_experts, ..Case::default().config }
}

fn sms(sms: u32, residency: Option<u32>) -> SimOptions {
    SimOptions { sms, residency, seed: 0 }
}

fn bf16_cases() -> Vec<SmallCase> {
    use Expectation::{BadExpert, LostRank, Output};
    let case = SmallCase::new;
    vec![
        // More k-blocks than stages in both products, two waves of experts, a shared expert, odd last blocks.
        case("layer", config(448, 448, 8, 3, 1), &[20, 9], Choices::Random, sms(3, None), &[Output; 3]),
        // Two tiles of one expert that share its rows, those of followers too, on a rank whose first product has stages for a narrow tile; and more than one chunk of tokens to route.
        case("tiles", config(64, 64, 4, 2, 1), &[259, 14], Choices::AllTo(3), sms(3, None), &[Output; 2]),
        // Two clusters of two CTAs a rank, with an odd number of weight blocks, and tiles of several widths. On one rank the widest needs another cut of the pipeline than the
        // first product, which ends within its second round of six stages, and the next one's first round takes stages that were left of that.
        case("clusters", config(448, 192, 4, 2, 1), &[80, 82], Choices::AllTo(0), sms(4, None), &[Output; 2]),
        // Rows of several pull and combine pieces, for one expert of a rank or for two.
        case("wide rows", config(6208, 64, 4, 2, 0), &[5, 3], Choices::Random, sms(2, None), &[Output; 2]),
        // More results than combine buffers, and one CTA at a time.
        case("many choices", config(64, 64, 16, 12, 2), &[9, 6], Choices::Sparse, sms(3, Some(1)), &[Output; 2]),
        // One rank alone, with several tasks of an expert in both products.
        case("one rank", config(320, 192, 4, 2, 1), &[9], Choices::Random, sms(3, None), &[Output; 2]),
        // What the kernel reports, and that it works again afterwards.
        case(
            "bad choices",
            config(64, 64, 4, 2, 1),
            &[11, 18],
            Choices::Random,
            sms(2, None),
            &[BadExpert { rank: 1, token: 4, k: 1 }, Output],
        ),
        case("lost rank", config(64, 64, 4, 2, 1), &[11, 18], Choices::Random, sms(2, None), &[LostRank(1), Output]),
    ]
}

/// Sizes are no multiples of 128, so that every last group of columns is half a group, in most.
fn fp8_cases() -> Vec<SmallCase> {
    use Expectation::{LostRank, Output};
    let case = |name, config, tokens: &[usize], choices, sim, launches: &[Expectation]| {
        let config = MoeConfig { experts_format: ExpertFormat::Fp8, ..config };
        SmallCase::new(name, config, tokens, choices, sim, launches)
    };
    let powers_of_two = MoeConfig { scales: ScaleKind::PowerOfTwo, ..config(320, 192, 4, 2, 1) };
    vec![
        // Narrow tiles, tasks of two weight tiles and of one, a shared expert; a chunk to combine has a token for each warp, so that all have their buffers.
        case("fp8 layer", config(448, 320, 8, 3, 1), &[34, 9], Choices::Random, sms(3, None), &[Output; 3]),
        // Wide tiles of one expert that share its rows, narrow ones of the others, and more than one chunk of tokens to route.
        case("fp8 tiles", config(192, 128, 4, 2, 1), &[259, 14], Choices::AllTo(3), sms(3, None), &[Output; 2]),
        // Records of several units, pulled in several pieces; so many columns that sums without promotion would be wrong.
        case("fp8 wide rows", config(4160, 64, 4, 2, 1), &[5, 3], Choices::Random, sms(2, None), &[Output; 2]),
        // One rank alone, with tiles of 128 tokens and scales that are powers of two.
        case("fp8 one rank", powers_of_two, &[70], Choices::AllTo(1), sms(3, None), &[Output; 2]),
        case(
            "fp8 lost rank",
            config(64, 64, 4, 2, 1),
            &[11, 18],
            Choices::Random,
            sms(2, None),
            &[LostRank(1), Output],
        ),
    ]
}
