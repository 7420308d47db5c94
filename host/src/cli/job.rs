//! What one `ferromoe run` has to do: a layer, its input and routing, cut over the ranks.

use std::ops::Range;
use std::path::PathBuf;

use ferromoe::{
    Checkpoint, Error, ExpertFormat, Fp8Tokens, HfLayer, HiddenStates, MoeConfig, MoeInput, RankBatch, Result, Routing,
    WorkspaceSizes, example, reference, split_tokens,
};

use super::args::{RouteArg, RunArgs};
use super::routing::RoutingCheck;
use super::verdict::{FiniteTokens, Place};

/// Random tokens where no input is given.
const RANDOM_TOKENS: usize = 64;

/// A checked job: nothing about it can still be wrong but the expert ids, which the device checks.
pub struct Job {
    /// The checkpoint's folder, or what stands for it.
    pub checkpoint: String,
    pub layer: HfLayer,
    pub config: MoeConfig,
    pub input: MoeInput,
    /// The input's file, or what stands for it.
    pub input_name: PathBuf,
    /// The tokens whose result can be compared.
    pub finite: FiniteTokens,
    pub routing: Routing,
    pub route: RouteArg,
    /// How the routing compares with the file's, where it is computed though the file has one for this layer.
    pub check: Option<RoutingCheck>,
    /// The tokens of each rank.
    pub shares: Vec<Range<usize>>,
}

/// What a result is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compared {
    /// The input file's `output_f32`.
    OutputF32,
    /// `reference::forward`.
    Reference,
    /// `reference::forward_a8`.
    Fp8Reference,
}

impl Compared {
    /// What it is to people.
    pub fn name(self) -> &'static str {
        match self {
            Self::OutputF32 => "output_f32 of the input file",
            Self::Reference => "the f64 reference",
            Self::Fp8Reference => "the reference that quantises as the kernel does",
        }
    }
}

impl Job {
    /// Reads and checks everything.
    pub fn prepare(args: &RunArgs) -> Result<Self> {
        let (checkpoint, name) = match &args.checkpoint {
            Some(dir) => (Checkpoint::open(dir)?, dir.display().to_string()),
            None => (example::checkpoint()?, example::NAME.to_owned()),
        };
        let input_name = args.input.clone().unwrap_or_else(|| match &args.checkpoint {
            Some(_) => "random tokens".into(),
            None => example::NAME.into(),
        });
        let input = match &args.input {
            Some(path) => Some(MoeInput::open(path)?),
            None if args.checkpoint.is_none() => Some(example::input()?),
            None => None,
        };
        let recorded_at = input.as_ref().and_then(|input| input.layer);
        let number = args.layer.or(recorded_at).or_else(|| checkpoint.first_moe_layer()).unwrap_or(0);
        let layer = checkpoint.layer(number)?;
        let input = input.unwrap_or_else(|| {
            MoeInput::random(
                RANDOM_TOKENS,
                layer.config(1).hidden,
                layer.router.vocabulary(),
                args.seed.unwrap_or_default(),
            )
        });

        let mut config = layer.config(input.tokens.div_ceil(args.ranks.max(1)).max(1));
        config.experts_format = args.experts.map_or(config.experts_format, ExpertFormat::from);
        config.validate(args.ranks)?;
        check_fit(&config, &input)?;
        let (routing, route, check) = route_tokens(args.route, &layer, &input)?;
        let shares = split_tokens(input.tokens, args.ranks);
        let finite = FiniteTokens::find(&input.hidden_states, config.hidden, &routing);
        let job = Self { checkpoint: name, layer, config, input, input_name, finite, routing, route, check, shares };
        job.check_values()?;
        Ok(job)
    }

    /// What a workspace for the layer has to hold.
    pub fn workspace_sizes(&self) -> WorkspaceSizes {
        WorkspaceSizes::of([&self.config])
    }

    /// Checks that there is something to compare if there are tokens, and something to compare it with.
    fn check_values(&self) -> Result<()> {
        let problem =
            |name: &str, problem| Err(Error::TensorValue { path: self.input_name.clone(), name: name.into(), problem });
        if let (Some(others), 0) = (&self.finite.others, self.finite.count()) {
            let Place { token, column, value } = &others.first;
            return problem(
                others.tensor,
                format!(
                    "no token is finite, so there is nothing to compare; token {token}, column {column} is {value}"
                ),
            );
        }
        let recorded = self.recorded_output().unwrap_or_default().iter().copied().map(f64::from);
        match self.finite.first_not_finite(recorded) {
            Some(Place { token, column, value }) => problem(
                "output_f32",
                format!(
                    "token {token}, column {column} is {value}, though the token's input is finite; it must be finite"
                ),
            ),
            None => Ok(()),
        }
    }

    /// The file's `output_f32`, if it belongs to the layer and experts that run.
    fn recorded_output(&self) -> Option<&[f32]> {
        let same_layer = self.input.layer.is_none_or(|layer| layer == self.layer.layer);
        let same_routing = self.check.as_ref().is_none_or(|check| check.same == self.input.tokens);
        self.input.output_f32.as_deref().filter(|_| same_layer && same_routing)
    }

    /// What the output should be: in bf16 what the file records, or else the reference's; in FP8 that of the reference that quantises as the
    /// kernel does.
    pub fn expected(&self) -> Result<(Vec<f64>, Compared)> {
        if self.config.experts_format == ExpertFormat::Fp8 {
            let of = |tokens| reference::forward_a8(&self.config, &self.layer.weights, tokens, &self.routing);
            let output = match self.fp8_tokens() {
                Some(tokens) => of(tokens)?,
                None => of(&Fp8Tokens::quantise(&self.input.hidden_states, self.config.hidden, self.config.scales)?)?,
            };
            return Ok((output, Compared::Fp8Reference));
        }
        match self.recorded() {
            Some(output) => Ok((output, Compared::OutputF32)),
            None => Ok((self.plain()?, Compared::Reference)),
        }
    }

    /// What else the distance to is told, for it is no verdict: in FP8 the outputs without quantised tokens.
    pub fn beside(&self) -> Result<Vec<(Vec<f64>, Compared)>> {
        if self.config.experts_format != ExpertFormat::Fp8 {
            return Ok(Vec::new());
        }
        let recorded = self.recorded().map(|output| (output, Compared::OutputF32));
        Ok([(self.plain()?, Compared::Reference)].into_iter().chain(recorded).collect())
    }

    fn plain(&self) -> Result<Vec<f64>> {
        reference::forward(&self.config, &self.layer.weights, &self.input.hidden_states, &self.routing)
    }

    fn recorded(&self) -> Option<Vec<f64>> {
        Some(self.recorded_output()?.iter().map(|&value| f64::from(value)).collect())
    }

    /// The input's FP8 tokens, if that is what the kernel gets. Experts in bf16 get what they stand for, rounded.
    fn fp8_tokens(&self) -> Option<&Fp8Tokens> {
        self.input.fp8.as_ref().filter(|_| self.config.experts_format == ExpertFormat::Fp8)
    }

    /// Rank `rank`'s tokens.
    pub fn share(&self, rank: usize) -> RankBatch<'_> {
        let tokens = &self.shares[rank];
        let of = |width: usize| tokens.start * width..tokens.end * width;
        let (hidden, top_k) = (self.config.hidden, self.config.top_k);
        RankBatch {
            hidden_states: match self.fp8_tokens() {
                Some(fp8) => {
                    let groups = fp8.scales().len() / fp8.tokens().max(1);
                    HiddenStates::Fp8 { values: &fp8.values()[of(hidden)], scales: &fp8.scales()[of(groups)] }
                }
                None => HiddenStates::Bf16(&self.input.hidden_states[of(hidden)]),
            },
            topk_idx: &self.routing.topk_idx()[of(top_k)],
            topk_weights: &self.routing.topk_weights()[of(top_k)],
        }
    }
}

/// Checks the input against the layer.
fn check_fit(config: &MoeConfig, input: &MoeInput) -> Result<()> {
    let wrong = |what: &str, found, expected| Error::Size {
        what: what.into(),
        found: format!("[T, {found}] values"),
        expected: format!("[T, {expected}] for this checkpoint's layer"),
    };
    if input.hidden != config.hidden {
        return Err(wrong("`hidden_states` of the input", input.hidden, config.hidden));
    }
    match &input.routing {
        Some(routing) if routing.top_k() != config.top_k => {
            Err(wrong("`topk_idx` of the input", routing.top_k(), config.top_k))
        }
        _ => Ok(()),
    }
}

/// The routing, where it comes from, and [`Job::check`].
fn route_tokens(
    asked: Option<RouteArg>,
    layer: &HfLayer,
    input: &MoeInput,
) -> Result<(Routing, RouteArg, Option<RoutingCheck>)> {
    match (asked, &input.routing) {
        (None | Some(RouteArg::File), Some(recorded)) => Ok((recorded.clone(), RouteArg::File, None)),
        (Some(RouteArg::File), None) => Err(Error::Size {
            what: "the input".into(),
            found: "no `topk_idx` and `topk_weights`".into(),
            expected: "both for --route file; --route compute asks the checkpoint's router".into(),
        }),
        _ => {
            let routing = layer.router.route(&input.hidden_states, input.input_ids.as_deref())?;
            let check = RoutingCheck::new(layer, input, &routing)?;
            Ok((routing, RouteArg::Compute, check))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::{Cli, Command};

    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");

    fn prepare(options: &str) -> Result<Job> {
        let words = options.replace('@', FIXTURES);
        let words = ["ferromoe", "run"].into_iter().chain(words.split_whitespace());
        let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
        Job::prepare(&args)
    }

    #[test]
    fn without_arguments_the_example_runs() {
        let job = prepare("").unwrap();
        assert_eq!((job.layer.layer, job.config.hidden, job.route), (0, 192, RouteArg::File));
        assert_eq!(job.shares, [0..25, 25..50]);
        assert_eq!(job.config.max_tokens_per_rank, 25);
        let RankBatch { hidden_states: HiddenStates::Bf16(states), topk_idx, topk_weights } = job.share(1) else {
            panic!("the example's tokens are bf16")
        };
        assert_eq!((states.len(), topk_idx.len(), topk_weights.len()), (25 * 192, 25 * 4, 25 * 4));
        assert_eq!(topk_idx, &job.routing.topk_idx()[100..]);
        assert_eq!(job.expected().unwrap().1, Compared::OutputF32);
    }

    #[test]
    fn experts_run_in_the_checkpoints_format_or_in_the_one_asked_for() {
        let fp8 = "--checkpoint @/qwen3-moe-fp8 --input @/qwen3-moe-fp8/moe_io.safetensors";
        for (options, format, compared) in [
            (fp8.to_owned(), ExpertFormat::Fp8, Compared::Fp8Reference),
            (format!("{fp8} --experts bf16"), ExpertFormat::Bf16, Compared::OutputF32),
            ("--experts fp8".into(), ExpertFormat::Fp8, Compared::Fp8Reference),
            ("--experts bf16".into(), ExpertFormat::Bf16, Compared::OutputF32),
        ] {
            let job = prepare(&options).unwrap();
            assert_eq!((job.config.experts_format, job.expected().unwrap().1), (format, compared), "{options}");
        }
        let job = prepare(fp8).unwrap();
        let (expected, _) = job.expected().unwrap();
        let beside = job.beside().unwrap();
        let names: Vec<_> = beside.iter().map(|(_, compared)| *compared).collect();
        assert_eq!(names, [Compared::Reference, Compared::OutputF32]);
        let [plain, recorded] = [0, 1].map(|at| reference::relative_l2_f64(&expected, &beside[at].0));
        assert!(plain > 2e-2 && (plain - recorded).abs() < 1e-5, "{plain} {recorded}");
        assert!(prepare("").unwrap().beside().unwrap().is_empty());
    }

    #[test]
    fn the_layer_is_the_recorded_one_or_the_first_with_experts() {
        let v4 = "--checkpoint @/deepseek-v4";
        assert_eq!(prepare(&format!("{v4} --input @/deepseek-v4/moe_io.safetensors")).unwrap().layer.layer, 1);
        let hashed = prepare(v4).unwrap();
        assert_eq!((hashed.layer.layer, hashed.input.tokens, hashed.route), (0, 64, RouteArg::Compute));
        assert_eq!(hashed.expected().unwrap().1, Compared::Reference);
        assert_eq!(prepare(&format!("{v4} --layer 1")).unwrap().layer.layer, 1);
    }

    #[test]
    fn recorded_outputs_count_only_for_their_layer() {
        let input = "--checkpoint @/deepseek-v4 --input @/deepseek-v4/moe_io.safetensors";
        let compared = |options: &str| prepare(&format!("{input} {options}")).unwrap().expected().unwrap().1;
        assert_eq!(compared(""), Compared::OutputF32);
        assert_eq!(compared("--layer 0"), Compared::Reference);
        assert_eq!(compared("--route compute"), Compared::OutputF32);
    }

    #[test]
    fn computed_routing_is_held_against_the_recorded_one() {
        for name in ["mixtral", "qwen3-moe", "deepseek-v3", "deepseek-v4"] {
            let io = format!("--checkpoint @/{name} --input @/{name}/moe_io.safetensors --ranks 4 --route compute");
            let job = prepare(&io).unwrap();
            let check = job.check.unwrap();
            assert!(100 * check.same >= 97 * job.input.tokens && check.contradictions == 0, "{name}: {check:?}");
            assert_eq!(check.same + check.near_ties, job.input.tokens);
        }
    }

    #[test]
    fn the_seed_makes_the_random_tokens() {
        let states = |seed: u64| prepare(&format!("--checkpoint @/mixtral --seed {seed}")).unwrap().input.hidden_states;
        assert_eq!(states(1), states(1));
        assert_ne!(states(1), states(2));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (options, expected) in [
            ("--ranks 0", "0 ranks are not possible"),
            ("--ranks 9", "9 ranks are not possible"),
            ("--ranks 3", "16 experts cannot be cut evenly over 3 ranks"),
            ("--layer 1", "layer 1 does not exist"),
            ("--checkpoint @/absent", "absent/config.json"),
            ("--input @/absent", "absent"),
            ("--input @/mixtral/config.json", "not a complete safetensors file"),
            ("--input @/mixtral/moe_io.safetensors", "[T, 256] values; it must have [T, 192]"),
            ("--checkpoint @/mixtral --input @/deepseek-v4/moe_io.safetensors --layer 0", "`topk_idx`"),
            ("--checkpoint @/mixtral --route file", "--route compute"),
        ] {
            let error = prepare(options).err().unwrap().to_string();
            assert!(error.contains(expected), "{options}: {error:?} lacks {expected:?}");
        }
    }
}
