//! Bugs in what is FP8's own: records, scales, its products and its end of linear 1.

use ferromoe::ExpertFormat;
use ferromoe_kernel::format::{Format, WEIGHT_SCALES_BYTES};

use super::{
    ARRIVE, ATOM, Add, Become, Drop, EXPECT, FENCE, FENCE_ALONE, Flip, Mutant, PROXY, Pass, Replace, SYNC, Set, Swap,
    Twice, WAIT, bug, bug_at,
};

const WARP_SYNC: &str = "bar.warp.sync";
const SCALES: &str = "ld.shared";

/// Every bug of FP8 alone.
pub fn mutants() -> Vec<Mutant> {
    let all = [records(), waits_for_records(), loaded_scales(), products(), barriers(), quantised(), counters()];
    all.into_iter().flatten().map(|mutant| Mutant { format: ExpertFormat::Fp8, ..mutant }).collect()
}

/// How tokens become records, and are announced.
fn records() -> Vec<Mutant> {
    let (write, store, copies) = ("record::write", "record::store", "record::store_scales");
    vec![
        bug_at("units of records are counted without a fence", FENCE, write, 0, Drop).harmless(
            "the count releases and acquires, and the fence before the flags orders what it has acquired too",
        ),
        bug_at("units of records are counted without a fence, and relaxed", FENCE, write, 0, Drop).and(bug(
            "",
            "atom.acq_rel",
            write,
            Replace("acq_rel", "relaxed"),
        )),
        bug_at("no fence before the flags of records are raised", FENCE, write, 1, Drop),
        bug_at("fence before the flags of records has GPU scope", FENCE, write, 1, Replace(".sys", ".gpu")),
        bug("one rank alone has no fence at its records", FENCE_ALONE, write, Drop),
        bug("one rank alone has no fence at its records, and counts them relaxed", FENCE_ALONE, write, Drop).and(bug(
            "",
            "atom.acq_rel",
            write,
            Replace("acq_rel", "relaxed"),
        )),
        bug("records are counted before all lanes have written them", WARP_SYNC, write, Drop),
        bug("units of records are counted with CTA scope", "atom.acq_rel", write, Replace(".gpu", ".cta")),
        bug_at("the flags of records are raised one unit early", "setp.ne", write, 6, Replace("ne.b32", "lt.u32"))
            .and(bug_at("", "setp.ne", write, 6, Add(-1, -1))),
        bug(
            "units of records are claimed with CTA scope",
            ATOM,
            "launch::claim record::write",
            Replace(".gpu", ".cta"),
        ),
        bug("every second unit of records is skipped", ATOM, "launch::claim record::write", Twice),
        bug("flags of records are raised with GPU scope", "st.relaxed.sys", write, Replace(".sys", ".gpu")),
        bug("flags of records are raised by an ordinary store", "st.relaxed.sys", write, Replace(".relaxed.sys", "")),
        bug("flags of records have the next launch's epoch", "st.relaxed.sys", write, Add(-1, 1)),
        bug("the flags of records are not raised", "st.relaxed.sys", write, Drop),
        bug_at("a record's columns lie 8 bytes further", "st.global.u64", store, 0, Add(0, 8)),
        bug_at("a record's scales are those of the next group", "st.global.u32", store, 0, Add(0, 4)),
        bug_at("a record's scales are not written", "st.global.u32", store, 0, Drop),
        bug_at("shared experts get no columns", "st.global.u64", store, 1, Drop),
        bug_at("shared experts get the scales of the next row", "st.global.u32", store, 1, Add(0, 4)),
        bug(
            "results of shared rows of records go to the next row",
            "st.global.u64",
            "launch::write_row record::write",
            Add(-1, 64),
        ),
        bug(
            "shared rows of records have half of their weight",
            "st.global.u32",
            "launch::write_row record::write",
            Become(-1, i64::from(0.5_f32.to_bits())),
        ),
        bug("the group's maximum is over half of its lanes", "shfl.sync.idx", "record::quantise", Flip(2)),
        bug(
            "the group's maximum is that of every second column",
            "max.NaN",
            "record::larger_half record::quantise",
            Become(-1, 0),
        ),
        bug("a pulled row's scales are those of the next group", SCALES, copies, Add(-1, 4)),
        bug("a pulled row's scales go to the next row", "st.global.u32", copies, Add(0, 4)),
        bug("a pulled row's scales are not stored", "st.global.u32", copies, Drop),
    ]
}

/// What reads records waits for them.
fn waits_for_records() -> Vec<Mutant> {
    let (acquire, wait, shared) = ("ld.acquire.sys", "record::wait", "record::all_written");
    vec![
        bug(
            "records of other ranks are not waited for",
            "setp.eq",
            "record::wait",
            Replace("setp.eq.b32", "setp.le.u32"),
        ),
        bug("records are waited for with a relaxed load", acquire, wait, Replace("acquire", "relaxed")),
        bug("records are waited for with GPU scope", acquire, wait, Replace(".sys", ".gpu")),
        bug("no proxy fence between the flags of records and their bulk loads", PROXY, wait, Drop),
        bug("records are pulled before all lanes have seen their flags", WARP_SYNC, wait, Drop)
            .harmless("the warp meets once more before its first load, where what a piece's bytes are is announced"),
        bug("rows of shared experts are not waited for", "ld.acquire.gpu", shared, Set(0x7fff_ffff)),
        bug(
            "rows of shared experts are waited for with a relaxed load",
            "ld.acquire.gpu",
            shared,
            Replace("acquire", "relaxed"),
        ),
        bug("one unit of the shared experts' rows is not waited for", "setp.ge.u32", shared, Add(-1, -1)),
        bug(
            "columns are waited for with a relaxed load",
            "ld.acquire",
            "produce::load_linear2",
            Replace("acquire", "relaxed"),
        ),
        bug(
            "no proxy fence between the count of stored columns and their tensor loads",
            PROXY,
            "produce::load_linear2",
            Drop,
        ),
        bug(
            "no proxy fence between the count of pulled rows and their tensor loads",
            PROXY,
            "produce::load_linear1",
            Drop,
        ),
    ]
}

/// What comes into a stage beside its tiles, and what of it a thread takes.
fn loaded_scales() -> Vec<Mutant> {
    let (weights, tokens) = ("mod::load_weight_scales", "mod::load_token_scales");
    let (bulk, narrow, wide) = ("cp.async.bulk", "narrow::multiply", "wide::multiply");
    let bytes = i64::from(WEIGHT_SCALES_BYTES);
    let next_stage = i64::from(Format::FP8.scale_stage_bytes());
    vec![
        bug("a weight tile has the scales of the next k-block", bulk, weights, Add(1, bytes)),
        bug("a weight tile has the scales of the tile behind it", "mad.lo.s32", weights, Add(1, 1)),
        bug("a weight tile's scales come into the next stage", bulk, weights, Add(0, next_stage)),
        bug("tokens have the scales of the next k-block", "mad.lo.s64", tokens, Add(1, 1)),
        bug("tokens have the scales of those four rows further", bulk, tokens, Add(1, 16)),
        bug("the tokens' scales complete on the next stage's barrier", bulk, tokens, Add(-1, 8)),
        bug("a stage expects no scales of weights", EXPECT, "produce::load_weights", Add(-1, -bytes)),
        bug_at("gate and up scales are exchanged in narrow tiles", SCALES, narrow, 0, Swap(0, 1)),
        bug_at("gate and up scales are exchanged in wide tiles", SCALES, wide, 0, Swap(0, 1)),
        bug_at("narrow tiles take the scales of the next two tokens", SCALES, narrow, 1, Add(-1, 8)),
        bug_at("two tokens of narrow tiles have each other's scales", SCALES, narrow, 1, Swap(0, 1)),
        bug_at("wide tiles take the scale of the next token", SCALES, wide, 1, Add(-1, 4)),
        bug_at("a thread's second token has the scale of the first", SCALES, wide, 2, Add(-1, -32)),
        bug_at("narrow tiles take the scales of the next stage's tokens", SCALES, narrow, 1, Add(-1, next_stage)),
    ]
}

/// Products and their promotion, in narrow tiles and in wide ones.
fn products() -> Vec<Mutant> {
    let of = |what: [&'static str; 2], instruction, plant: fn(&'static str, &'static str, &'static str) -> Mutant| {
        let [narrow, wide] = what;
        [plant(narrow, instruction, "narrow::multiply"), plant(wide, instruction, "wide::multiply")]
    };
    [
        of(
            [
                "products of narrow tiles are added to those of the k-block before",
                "products of wide tiles are added to those of the k-block before",
            ],
            "wgmma.mma_async",
            |what, instruction, from| bug_at(what, instruction, from, 0, Replace(", 0, 1, 1;", ", 1, 1, 1;")),
        ),
        of(
            [
                "narrow tiles are promoted once, with the last scales",
                "wide tiles are promoted once, with the last scales",
            ],
            "wgmma.mma_async",
            |what, instruction, from| {
                bug_at(what, instruction, from, 0, Replace(", 0, 1, 1;", ", 1, 1, 1;")).and(bug(
                    "",
                    "fma.rn.f32",
                    from,
                    Become(-1, 0),
                ))
            },
        ),
        of(
            ["narrow tiles keep the last k-block's products only", "wide tiles keep the last k-block's products only"],
            "fma.rn.f32",
            |what, instruction, from| bug(what, instruction, from, Become(-1, 0)),
        ),
        of(
            [
                "the first 32 columns of a k-block of narrow tiles are all that counts",
                "the first 32 columns of a k-block of wide tiles are all that counts",
            ],
            "wgmma.mma_async",
            |what, instruction, from| bug_at(what, instruction, from, 1, Drop),
        ),
        of(
            ["products of narrow tiles are not waited for", "products of wide tiles are not waited for"],
            "wgmma.wait_group",
            |what, instruction, from| bug(what, instruction, from, Drop),
        ),
        of(
            ["no `wgmma.fence` in narrow tiles", "no `wgmma.fence` in wide tiles"],
            "wgmma.fence",
            |what, instruction, from| bug(what, instruction, from, Drop),
        ),
        of(
            ["no `wgmma.commit_group` in narrow tiles", "no `wgmma.commit_group` in wide tiles"],
            "wgmma.commit_group",
            |what, instruction, from| bug(what, instruction, from, Drop),
        ),
        of(
            [
                "consumers do not wait for full stages of narrow tiles",
                "consumers do not wait for full stages of wide tiles",
            ],
            WAIT,
            |what, instruction, from| bug(what, instruction, from, Pass),
        ),
        of(
            ["stages of narrow tiles are given back twice", "stages of wide tiles are given back twice"],
            ARRIVE,
            |what, instruction, from| bug(what, instruction, from, Twice),
        ),
        of(
            [
                "the second operand of narrow tiles begins 16 bytes too far",
                "the second operand of wide tiles begins 16 bytes too far",
            ],
            "mov.b64 b,",
            |what, instruction, from| bug(what, instruction, from, Add(0, 1)),
        ),
    ]
    .into_iter()
    .flatten()
    .chain([
        bug(
            "a warpgroup without a part of a task does not wait for its stages",
            WAIT,
            "consumer::pass_stage mod::pass",
            Pass,
        ),
        bug(
            "a warpgroup without a part of a task does not give its stages back",
            ARRIVE,
            "consumer::give_back mod::pass",
            Drop,
        ),
    ])
    .collect()
}

fn barriers() -> Vec<Mutant> {
    let (narrow, wide, pair) = ("narrow::run", "wide::run", "bar.sync");
    vec![
        bug_at(
            "a stage of narrow tiles is given back before all lanes have read its scales",
            WARP_SYNC,
            "narrow::multiply",
            1,
            Drop,
        ),
        bug_at(
            "a stage of wide tiles is given back before all lanes have read its scales",
            WARP_SYNC,
            "wide::multiply",
            1,
            Drop,
        ),
        bug_at("narrow tiles are quantised before both warpgroups have staged them", pair, narrow, 0, Drop),
        bug_at("narrow tiles are staged before both warpgroups have quantised those before", pair, narrow, 1, Drop),
        bug(
            "results go where they do before the addresses of narrow tiles are there",
            SYNC,
            "narrow::run consumer::sync",
            Drop,
        ),
        bug_at(
            "what the rows of wide tiles have is read before all of it is there",
            SYNC,
            "wide::run consumer::sync",
            0,
            Drop,
        ),
        bug_at("wide tiles are stored before all are staged", SYNC, "wide::run consumer::sync", 1, Drop),
        bug_at(
            "addresses of wide tiles are written again before all have been read",
            SYNC,
            "wide::run consumer::sync",
            2,
            Drop,
        ),
        bug("what the rows of narrow tiles have is not waited for", "cp.async.wait_all", narrow, Drop),
        bug("what the rows of wide tiles have is not waited for", "cp.async.wait_all", wide, Drop),
        bug(
            "no proxy fence before the combine buffers take the memory of staged rows",
            PROXY,
            "fence::fence_proxy_async_shared consume::consume",
            Drop,
        ),
        bug("consumers combine before all are done with the stages", "bar.sync", "consume::consume", Drop),
    ]
}

/// The end of linear 1.
fn quantised() -> Vec<Mutant> {
    let (store, scale) = ("group::store", "quantise::new");
    vec![
        bug("the maximum of an intermediate group is over half of its lanes", "shfl.sync.idx", store, Flip(2)),
        bug(
            "the maximum of an intermediate group is that of every second column",
            "max.NaN",
            "record::larger_half group::store",
            Become(-1, 0),
        ),
        bug("a scale of the intermediate goes to the next row", "st.global.u32", store, Add(0, 4)),
        bug(
            "all scales of the intermediate go to the first group",
            "shl.b64",
            "launch::workspace group::store",
            Become(1, 0),
        ),
        bug("scales of the intermediate are not stored", "st.global.u32", store, Drop),
        bug_at(
            "the second half of an intermediate group lies where the first does",
            "st.global.u64",
            store,
            1,
            Add(0, -64),
        ),
        bug_at("the second half of an intermediate group is not looked at", "ld.shared.v4", store, 1, Add(-1, 16)),
        bug("intermediate groups are staged 16 bytes too far", "stmatrix", "narrow::run", Add(0, 16)),
        bug("a wide tile's columns are staged 16 bytes too far", "stmatrix", "wide::run", Add(0, 16)),
        bug("scales are rounded down to powers of two", "add.s32", scale, Become(2, 0)),
        bug("scales are not rounded to powers of two", "add.s32", scale, Become(2, 0)).and(bug(
            "",
            "and.b32",
            scale,
            Replace("-8388608", "-1"),
        )),
        bug("scales are twice as large as they are said to be", "rcp.approx", scale, Add(1, 1 << 23)),
    ]
}

fn counters() -> Vec<Mutant> {
    vec![bug("counters are not zeroed for the next launch", "st.global.u32", "schedule::zero_next_counters", Drop)]
}
