//! The layer as an engine drives it: launches queued on memory of its own, and a group of which every rank is driven apart, by
//! a thread that stands for a process.

use std::time::Duration;

use super::*;
use crate::config::ExpertFormat;
use crate::group::{Device, DeviceGroup, SimOptions};
use crate::rendezvous::RendezvousAddress;
use crate::testing::{EngineRank, Tokens, layer, small_config};
use crate::tokens::Fp8Tokens;
use crate::workspace::WorkspaceSizes;

const LONG: Duration = Duration::from_secs(60);
/// Long enough for ranks that come, also on a busy machine.
const SHORT: Duration = Duration::from_secs(3);

/// Runs `rank` in a thread for each of `present`, with a group of `ranks` ranks that each joins; the results in their order.
fn processes<T: Send>(
    ranks: usize,
    present: &[usize],
    timeout: Duration,
    rank: impl Fn(usize, DeviceGroup) -> T + Sync,
) -> Vec<Result<T>> {
    let folder = tempfile::tempdir().unwrap();
    let address = RendezvousAddress::Unix(folder.path().join("group"));
    let join = |number| {
        let group = DeviceGroup::join(Device::Sim(SimOptions::default()), number, ranks, &address, timeout)?;
        Ok(rank(number, group))
    };
    std::thread::scope(|scope| {
        let join = &join;
        let threads: Vec<_> = present.iter().map(|&number| scope.spawn(move || join(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn queued_launches_run_on_the_engines_memory_with_any_token_counts() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 2).unwrap();
    let moe = layer(&group, &config, &weights).unwrap();
    let engine = [0, 1].map(|rank| EngineRank::new(&group, &config, rank));
    for (step, counts) in [[3, 16], [0, 1], [16, 0], [7, 7]].into_iter().enumerate() {
        let tokens = counts.map(|count| Tokens::random(&config, count, (10 * step + count) as u64));
        for (rank, (engine, tokens)) in engine.iter().zip(&tokens).enumerate() {
            engine.write(tokens);
            // SAFETY: the engine's memory is as large as it says, and lives to the end of the test.
            unsafe { moe.enqueue(rank, engine.stream.raw(), engine.inputs()) }.unwrap();
        }
        engine.iter().for_each(|engine| engine.stream.synchronize().unwrap());
        moe.workspace().check().unwrap();
        for (engine, tokens) in engine.iter().zip(&tokens) {
            tokens.check(&config, &weights, &engine.output(tokens), &format!("step {step}"));
        }
    }
}

#[test]
fn a_rank_may_queue_ahead_of_the_others() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 2).unwrap();
    let moe = layer(&group, &config, &weights).unwrap();
    let engine = [0, 1].map(|rank| EngineRank::new(&group, &config, rank));
    let tokens = [4, 9].map(|count| Tokens::random(&config, count, count as u64));
    engine.iter().zip(&tokens).for_each(|(engine, tokens)| engine.write(tokens));
    for rank in [0, 0, 1, 1] {
        // SAFETY: the engine's memory is as large as it says, and lives to the end of the test.
        unsafe { moe.enqueue(rank, engine[rank].stream.raw(), engine[rank].inputs()) }.unwrap();
    }
    moe.workspace().check().unwrap();
    for (engine, tokens) in engine.iter().zip(&tokens) {
        tokens.check(&config, &weights, &engine.output(tokens), "after two launches");
    }
}

#[test]
fn a_rank_that_is_not_queued_is_named_when_others_are_waited_for() {
    let config = small_config();
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 2).unwrap();
    let weights = ExpertWeights::random(&config, 5);
    let mut moe = layer(&group, &config, &weights).unwrap();
    moe.set_deadline(Duration::from_millis(1));
    let engine = EngineRank::new(&group, &config, 0);
    let tokens = Tokens::random(&config, 5, 1);
    engine.write(&tokens);
    // SAFETY: the engine's memory is as large as it says, and lives to the end of the test.
    unsafe { moe.enqueue(0, engine.stream.raw(), engine.inputs()) }.unwrap();
    engine.stream.synchronize().unwrap();
    let error = moe.workspace().check().unwrap_err();
    assert!(matches!(error, Error::Deadline { rank: 0, missing: 1, .. }), "{error}");
    let outputs = moe.forward(&[tokens.batch(), tokens.batch()]).unwrap();
    outputs.iter().for_each(|output| tokens.check(&config, &weights, &output.output, "after the deadline"));
}

#[test]
fn a_count_above_the_maximum_in_device_memory_is_reported_and_the_next_launch_works() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 2).unwrap();
    let moe = layer(&group, &config, &weights).unwrap();
    let engine = [0, 1].map(|rank| EngineRank::new(&group, &config, rank));
    let tokens = [16, 5].map(|count| Tokens::random(&config, count, count as u64));
    let launch = || {
        for (rank, engine) in engine.iter().enumerate() {
            // SAFETY: the engine's memory is as large as it says, and lives to the end of the test.
            unsafe { moe.enqueue(rank, engine.stream.raw(), engine.inputs()) }.unwrap();
        }
        moe.workspace().check()
    };
    engine.iter().zip(&tokens).for_each(|(engine, tokens)| engine.write(tokens));
    for excess in [17, u32::MAX] {
        engine[0].write_count(excess);
        let error = launch().unwrap_err();
        assert!(
            matches!(error, Error::TooManyTokens { rank: 0, tokens, max: 16 } if tokens == excess as usize),
            "{error}"
        );
        tokens[1].check(&config, &weights, &engine[1].output(&tokens[1]), "the rank with a good count");
    }
    engine[0].write_count(16);
    launch().unwrap();
    for (engine, tokens) in engine.iter().zip(&tokens) {
        tokens.check(&config, &weights, &engine.output(tokens), "after a count that was too large");
    }
}

#[test]
fn addresses_that_the_kernel_cannot_use_are_refused() {
    let config = small_config();
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 1).unwrap();
    let moe = layer(&group, &config, &ExpertWeights::random(&config, 5)).unwrap();
    let engine = EngineRank::new(&group, &config, 0);
    let good = engine.inputs();
    let states = |address| RankInputs { hidden_states: address, ..good };
    let ids = |address| RankInputs { topk_idx: address, ..good };
    let weights = |address| RankInputs { topk_weights: address, ..good };
    let count = |address| RankInputs { tokens: address, ..good };
    let output = |address| RankInputs { output: address, ..good };
    type With<'a> = &'a dyn Fn(u64) -> RankInputs;
    let cases: [(&str, With, u64, u64); 5] = [
        ("hidden states", &states, good.hidden_states, 16),
        ("expert ids", &ids, good.topk_idx, 4),
        ("routing weights", &weights, good.topk_weights, 4),
        ("token count", &count, good.tokens, 4),
        ("output", &output, good.output, 16),
    ];
    for (what, with, address, alignment) in cases {
        let null = "the address must not be null, also where the rank has no tokens".to_owned();
        let odd = address + alignment / 2;
        for (bad, expected) in [(0, null), (odd, format!("the address must be a multiple of {alignment}"))] {
            // SAFETY: nothing is launched.
            let error = message(unsafe { moe.enqueue(0, engine.stream.raw(), with(bad)) });
            assert_eq!(error, format!("the {what} of rank 0 at {bad:#x} cannot be used; {expected}"));
        }
    }
    // SAFETY: nothing is launched.
    let error = message(unsafe { moe.enqueue(1, engine.stream.raw(), engine.inputs()) });
    assert_eq!(error, "rank 1 is not of this process, which has ranks 0 to 0");
    assert_eq!(message(group.alloc(1, 64, "state")), error);
}

/// Queued with an engine's own memory, on a rank beside one whose tokens are bf16.
#[test]
fn fp8_tokens_give_the_bits_that_their_bf16_ones_give() {
    let config = MoeConfig { hidden: 192, experts_format: ExpertFormat::Fp8, ..small_config() };
    let weights = ExpertWeights::random(&config, 5);
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 2).unwrap();
    let mut moe = layer(&group, &config, &weights).unwrap();
    let tokens = [9, 14].map(|count| Tokens::random(&config, count, count as u64));
    let batch = tokens.each_ref().map(Tokens::batch);
    let expected = moe.forward(&batch).unwrap();
    let fp8 = Fp8Tokens::quantise(&tokens[1].hidden_states, config.hidden, config.scales).unwrap();
    let outputs = moe.forward(&[batch[0], RankBatch { hidden_states: (&fp8).into(), ..batch[1] }]).unwrap();
    let engine = [0, 1].map(|rank| EngineRank::new(&group, &config, rank));
    engine.iter().zip(&tokens).for_each(|(engine, tokens)| engine.write(tokens));
    let [values, scales] = [fp8.values(), bytemuck::cast_slice(fp8.scales())].map(|contents| {
        let buffer = group.alloc(1, contents.len() as u64, "FP8 tokens").unwrap();
        buffer.write(contents).unwrap();
        buffer
    });
    let (plain, good) = (engine[0].inputs(), engine[1].inputs());
    let good = RankInputs { hidden_states: values.address(), hidden_scales: scales.address(), ..good };
    let odd = RankInputs { hidden_scales: good.hidden_scales + 2, ..good };
    // SAFETY: nothing is launched.
    let error = message(unsafe { moe.enqueue(1, engine[1].stream.raw(), odd) });
    let address = odd.hidden_scales;
    let text = "cannot be used; the address must be a multiple of 4";
    assert_eq!(error, format!("the hidden scales of rank 1 at {address:#x} {text}"));
    for (rank, inputs) in [plain, good].into_iter().enumerate() {
        // SAFETY: the memory is as large as it says, and lives to the end of the test.
        unsafe { moe.enqueue(rank, engine[rank].stream.raw(), inputs) }.unwrap();
    }
    moe.workspace().check().unwrap();
    for rank in 0..2 {
        assert!(outputs[rank].output == expected[rank].output, "rank {rank}, as a batch");
        assert!(engine[rank].output(&tokens[rank]) == expected[rank].output, "rank {rank}, queued");
    }
}

#[test]
fn fp8_tokens_that_do_not_fit_the_layer_are_refused() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    let group = DeviceGroup::open(Device::Sim(SimOptions::default()), 1).unwrap();
    let mut moe = layer(&group, &config, &weights).unwrap();
    let engine = EngineRank::new(&group, &config, 0);
    let tokens = Tokens::random(&config, 5, 1);
    let fp8 = Fp8Tokens::quantise(&tokens.hidden_states, config.hidden, config.scales).unwrap();
    let with = |values, scales| RankBatch { hidden_states: HiddenStates::Fp8 { values, scales }, ..tokens.batch() };
    let expected =
        "rank 0 has FP8 tokens, and the layer's experts run in bf16; they must run in fp8, or the tokens must be bf16";
    assert_eq!(message(moe.forward(&[with(fp8.values(), fp8.scales())])), expected);
    let inputs = RankInputs { hidden_scales: engine.inputs().topk_weights, ..engine.inputs() };
    // SAFETY: nothing is launched.
    assert_eq!(message(unsafe { moe.enqueue(0, engine.stream.raw(), inputs) }), expected);

    let config = MoeConfig { experts_format: ExpertFormat::Fp8, ..config };
    let mut moe = layer(&group, &config, &weights).unwrap();
    for (values, scales, found) in [
        (320, 4, "4 hidden scales; it must have 5 for 5 tokens"),
        (319, 5, "319 hidden states; it must have 256 for 4 tokens"),
        (256, 4, "10 expert ids; it must have 8 for 4 tokens"),
    ] {
        let error = message(moe.forward(&[with(&fp8.values()[..values], &fp8.scales()[..scales])]));
        assert_eq!(error, format!("the batch of rank 0 has {found}"));
    }
}

#[test]
fn ranks_driven_apart_give_the_references_output() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    for ranks in [2, 4] {
        let present: Vec<_> = (0..ranks).rev().collect();
        let forwards = processes(ranks, &present, LONG, |rank, group| {
            assert_eq!((group.ranks(), group.local_ranks()), (ranks, rank..rank + 1));
            let mut moe = layer(&group, &config, &weights)?;
            for step in 0..3 {
                let tokens = Tokens::random(&config, (5 * rank + 7 * step) % 17, (100 * step + rank) as u64);
                let outputs = moe.forward(&[tokens.batch()])?;
                tokens.check(&config, &weights, &outputs[0].output, &format!("{ranks} ranks, step {step}"));
            }
            Ok::<_, Error>(())
        });
        forwards.into_iter().for_each(|forward| forward.unwrap().unwrap());
    }
}

#[test]
fn ranks_driven_apart_queue_launches_on_hidden_states_that_all_can_read() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    let queued = processes(2, &[0, 1], LONG, |rank, group| {
        let moe = layer(&group, &config, &weights)?;
        let tokens = Tokens::random(&config, 6 + rank, rank as u64);
        moe.workspace().hidden_states(rank)?.write(bytemuck::cast_slice(&tokens.hidden_states))?;
        let engine = EngineRank::new(&group, &config, rank);
        engine.write(&tokens);
        // SAFETY: nothing is launched.
        let error = message(unsafe { moe.enqueue(rank, engine.stream.raw(), engine.inputs()) });
        assert!(error.contains("other processes read them, so they must be at 0x"), "{error}");
        let inputs = RankInputs { hidden_states: moe.workspace().hidden_states(rank)?.address(), ..engine.inputs() };
        for _ in 0..2 {
            // SAFETY: the engine's memory is as large as it says, and lives until the launch has ended.
            unsafe { moe.enqueue(rank, engine.stream.raw(), inputs) }?;
        }
        engine.stream.synchronize()?;
        moe.workspace().check()?;
        tokens.check(&config, &weights, &engine.output(&tokens), "queued");
        assert!(matches!(moe.workspace().hidden_states(1 - rank), Err(Error::NotLocal { .. })));
        Ok::<_, Error>(())
    });
    queued.into_iter().for_each(|queued| queued.unwrap().unwrap());
}

#[test]
fn ranks_driven_apart_recover_together_from_layers_in_the_wrong_order() {
    let config = small_config();
    let results = processes(2, &[0, 1], SHORT, |rank, group| {
        let workspace = Workspace::new(&group, &WorkspaceSizes::of([&config]))?;
        let weights = [5, 6].map(|seed| ExpertWeights::random(&config, seed));
        let mut layers = Vec::new();
        for weights in &weights {
            layers.push(FusedMoe::new(&workspace, &config, weights)?);
        }
        let tokens = Tokens::random(&config, 4 + rank, rank as u64);
        let error = layers[rank].forward(&[tokens.batch()]).unwrap_err();
        let (ours, theirs) = (rank, 1 - rank);
        assert!(
            matches!(error, Error::LayerOrder { rank: r, layer, other, other_layer } if [r, layer, other, other_layer] == [ours, ours, theirs, theirs]),
            "{error}"
        );
        let error = layers[0].forward(&[tokens.batch()]).unwrap_err();
        assert!(matches!(error, Error::NotRecovered), "{error}");
        workspace.recover()?;
        for (layer, weights) in layers.iter_mut().zip(&weights) {
            let outputs = layer.forward(&[tokens.batch()])?;
            tokens.check(&config, weights, &outputs[0].output, "after the wrong order");
        }
        Ok::<_, Error>(())
    });
    results.into_iter().for_each(|result| result.unwrap().unwrap());
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let errors = processes(3, &[0, 2], SHORT, |_, _| ());
    for (error, by) in errors.into_iter().zip(["", "rank 0 reports: "]) {
        let error = message(error);
        assert!(error.starts_with(&format!("{by}rank 1 did not come to unix:")), "{error}");
    }
}

#[test]
fn a_rank_with_another_layer_is_named_to_all() {
    let errors = processes(2, &[0, 1], LONG, |rank, group| {
        let config = MoeConfig { top_k: 2 - rank, ..small_config() };
        message(layer(&group, &config, &ExpertWeights::random(&config, 5)))
    });
    for error in errors {
        assert_eq!(error.unwrap(), "rank 1 has a top-k of 1, rank 0 has 2; all ranks must have the same");
    }
}

#[test]
fn a_rank_that_cannot_make_its_part_is_named_to_all() {
    let config = small_config();
    let errors = processes(2, &[0, 1], LONG, |rank, group| {
        let weights = ExpertWeights::random(&MoeConfig { hidden: 64 * (1 + rank), ..config.clone() }, 5);
        message(layer(&group, &config, &weights))
    });
    let errors: Vec<_> = errors.into_iter().map(Result::unwrap).collect();
    assert_eq!(errors[0], "rank 1 could not make its part of the layer; its own error says why");
    assert!(errors[1].contains("shape [64, 128]"), "{errors:?}");
}

#[test]
fn ranks_driven_apart_recover_together_from_a_launch_that_lost_one() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    for lost in [0, 1] {
        let results = processes(2, &[0, 1], SHORT, |rank, group| {
            let mut moe = layer(&group, &config, &weights)?;
            let tokens = Tokens::random(&config, 4 + rank, rank as u64);
            moe.set_deadline(Duration::from_millis(1));
            if rank != lost {
                let error = moe.forward(&[tokens.batch()]).unwrap_err();
                assert!(matches!(error, Error::Deadline { missing, .. } if missing == lost), "{error}");
                let error = moe.forward(&[tokens.batch()]).unwrap_err();
                assert!(matches!(error, Error::NotRecovered), "{error}");
            }
            moe.workspace().recover()?;
            moe.set_deadline(DEFAULT_DEADLINE);
            for step in 0..2 {
                let outputs = moe.forward(&[tokens.batch()])?;
                tokens.check(&config, &weights, &outputs[0].output, &format!("step {step} after the loss"));
            }
            Ok::<_, Error>(())
        });
        results.into_iter().for_each(|result| result.unwrap().unwrap());
    }
}
