//! The planted bugs. What both formats share has its bugs in the kernel of bf16 alone; what is FP8's own is in [`fp8`].

mod fp8;

use ferromoe::ExpertFormat;
use ferromoe_kernel::format::Format;
use ferromoe_kernel::layout::MAX_LOCAL_EXPERTS;
use ferromoe_kernel::shared::{PASS_BYTES, SharedLayout};

/// The format of most bugs.
const FORMAT: Format = Format::BF16;
const CONSUMER_WARPS: u32 = FORMAT.consumer_warps();
const TASK_FINISHED_OFFSET: u32 = SharedLayout::new(&FORMAT).task_finished;
const MAX_TOKEN_TILE: u32 = FORMAT.tiles.widest();

const fn stage_bytes(width: u32) -> u32 {
    FORMAT.stage_bytes(width)
}

use crate::edit::Edit::{
    Add, And, Become, BecomeRank, Behind, Branch, Drop, Flip, Pass, Replace, Set, Stay, Swap, Twice, WithoutBit,
};
use crate::edit::{Edit, Plant};

/// A bug, as one or more edits of the kernel's PTX.
pub struct Mutant {
    /// What is wrong with it.
    pub what: &'static str,
    /// In whose kernel it is planted.
    pub format: ExpertFormat,
    /// The edits.
    pub plants: Vec<Plant>,
    /// Why nothing can find it, where that is so.
    pub harmless: Option<&'static str>,
}

impl Mutant {
    fn and(mut self, other: Self) -> Self {
        self.plants.extend(other.plants);
        self
    }

    fn harmless(self, why: &'static str) -> Self {
        Self { harmless: Some(why), ..self }
    }
}

fn bug(what: &'static str, instruction: &'static str, from: &'static str, edit: Edit) -> Mutant {
    planted(what, Plant { instruction, from, place: None, edit })
}

fn bug_at(what: &'static str, instruction: &'static str, from: &'static str, place: usize, edit: Edit) -> Mutant {
    planted(what, Plant { instruction, from, place: Some(place), edit })
}

fn planted(what: &'static str, plant: Plant) -> Mutant {
    Mutant { what, format: ExpertFormat::Bf16, plants: vec![plant], harmless: None }
}

const PROXY: &str = "fence.proxy.async";
/// Of several ranks.
const FENCE: &str = "fence.acq_rel.sys";
/// Of one rank alone.
const FENCE_ALONE: &str = "fence.acq_rel.gpu";
/// One of a warpgroup's, each under a condition.
const SYNC: &str = "@";
const WAIT: &str = "mbarrier.try_wait";
/// At a barrier of this CTA, or of any by its address in the cluster.
const ARRIVE: &str = "mbarrier.arrive.shared";
/// At a barrier of this CTA.
const OWN_ARRIVE: &str = "mbarrier.arrive.shared::cta";
/// At a peer's, with what was written for it.
const PEER_ARRIVE: &str = "mbarrier.arrive.release.cluster.shared::cluster";
const MULTICAST: &str = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast";
const CLUSTER: &str = "barrier.cluster";
const CLUSTER_ARRIVE: &str = "barrier.cluster.arrive";
const CLUSTER_WAIT: &str = "barrier.cluster.wait";
const EXPECT: &str = "mbarrier.arrive.expect_tx";
const INIT: &str = "mbarrier.init";
const ATOM: &str = "atom.";
const STAGE: i64 = stage_bytes(MAX_TOKEN_TILE) as i64;

/// A fence of global memory becomes one of shared memory.
const OF_SHARED: Edit = Replace(".global", ".shared::cta");

/// Why one fence less is no bug where barriers are initialised.
const INITIALISED: &str =
    "the other of the two fences and the cluster's barrier behind them, whose arrival is a release, do the same";
/// Why one fence less is no bug between two bulk copies.
const COMPLETED: &str = "rows are written and read by bulk copies, and the completion of one is followed by an implicit proxy \
    fence (PTX ISA, \"Async proxy\")";

/// Why it is no bug to claim a task earlier.
const CLAIMED: &str =
    "when a task is claimed decides which CTA has it, and nothing else: its slot is waited for where it is written";

/// Why nothing finds that the lanes of a warp are not brought together at the end.
const ALIGNED: &str = "the cluster's barrier behind it orders as much, and the simulator's `.aligned` instructions wait for all lanes, \
    where a device demands that they are together";

/// Every planted bug.
pub fn mutants() -> Vec<Mutant> {
    [
        fences(),
        mbarrier_waits(),
        mbarrier_arrivals(),
        early_work(),
        stages_of_another_cut(),
        bulk_copies(),
        followers(),
        products(),
        results(),
        barriers(),
        clusters(),
        global_order(),
        global_counts(),
        progress(),
        fp8::mutants(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn fences() -> Vec<Mutant> {
    vec![
        bug(
            "no `fence.mbarrier_init` behind the barriers' initialisation",
            "fence.mbarrier_init",
            "entry::init_mbarriers",
            Drop,
        )
        .harmless(INITIALISED),
        bug("no proxy fence behind the barriers' initialisation", PROXY, "entry::init_mbarriers", Drop)
            .harmless(INITIALISED),
        bug("no fence at all behind the barriers' initialisation", PROXY, "entry::init_mbarriers", Drop).and(bug(
            "",
            "fence.mbarrier_init",
            "entry::init_mbarriers",
            Drop,
        )),
        bug(
            "no proxy fence between a result's flag and the bulk loads of the result",
            PROXY,
            "combine::wait_for_flag",
            Drop,
        ),
        bug(
            "no proxy fence between the count of pulled rows and their tensor loads",
            PROXY,
            "produce::load_linear1",
            Drop,
        )
        .harmless(COMPLETED),
        bug(
            "no proxy fence between the count of stored columns and their tensor loads",
            PROXY,
            "produce::load_linear2",
            Drop,
        ),
        bug("no proxy fence between a pulled row and its count", PROXY, "pull::pull", Drop).harmless(COMPLETED),
        bug(
            "proxy fence between a result's flag and the bulk loads of the result is of shared memory",
            PROXY,
            "combine::wait_for_flag",
            OF_SHARED,
        ),
        bug("proxy fences between two bulk copies are all of shared memory", PROXY, "produce::load_linear1", OF_SHARED)
            .and(bug("", PROXY, "pull::pull", OF_SHARED))
            .harmless(COMPLETED),
        bug_at("no fence between the lists and the count of routed chunks", FENCE, "route::route", 0, Drop).harmless(
            "the count releases and acquires, and the fence before the counts orders what it has acquired too",
        ),
        bug("no fence before the counts are published", FENCE, "route::publish", Drop),
        bug("fence before the counts are published has GPU scope", FENCE, "route::publish", Replace(".sys", ".gpu")),
        bug_at("no fence between the result rows and their count", FENCE, "publish::announce_results", 0, Drop),
        bug_at("no fence before a flag is raised", FENCE, "publish::announce_results", 1, Drop),
        bug_at(
            "fence before a flag is raised has GPU scope",
            FENCE,
            "publish::announce_results",
            1,
            Replace(".sys", ".gpu"),
        ),
        bug("every rank fences for its GPU alone", FENCE, "launch::fence", Replace(".sys", ".gpu")),
        bug("one rank alone has no fences", FENCE_ALONE, "launch::fence", Drop),
        bug_at(
            "one rank alone has no fence before a flag is raised",
            FENCE_ALONE,
            "publish::announce_results",
            1,
            Drop,
        ),
        bug("one rank alone fences for its CTAs alone", FENCE_ALONE, "launch::fence", Replace(".gpu", ".cta")),
        bug_at("no fence at the lists, and the count of routed chunks relaxed", FENCE, "route::route", 0, Drop)
            .and(bug("", "atom.acq_rel", "route::route", Replace("acq_rel", "relaxed"))),
    ]
}

/// Waits for mbarriers: each passed, then each for the other parity.
fn mbarrier_waits() -> Vec<Mutant> {
    let finished = "mbarrier::wait publish::publish";
    vec![
        bug("a consumer does not wait for a task", WAIT, "cta::look cta::look_warp", Pass),
        bug("the producer does not wait for a task", WAIT, "cta::look produce::produce", Pass),
        bug("the publisher does not wait for a task", WAIT, "cta::look publish::publish", Pass),
        bug("the scheduler does not wait for a free slot", WAIT, "cta::put", Pass),
        bug_at("the scheduler does not wait until the next task is wanted", WAIT, "cta::wait", 0, Pass)
            .harmless(CLAIMED),
        bug_at("a consumer loads what the rows have before the first stage is full", WAIT, "bf16::run", 0, Pass),
        bug("a consumer does not wait for full stages", WAIT, "bf16::multiply", Pass),
        bug("the producer does not wait for free stages", WAIT, "produce::load_weights", Pass),
        bug("the publisher does not wait for a finished task", WAIT, finished, Pass),
        bug("a pulled piece is stored before it has landed", WAIT, "pull::copy_pieces", Pass),
        bug("a combined piece is read before it has landed", WAIT, "combine::sum", Pass),
        bug("a consumer waits for a task with the other parity", WAIT, "cta::look cta::look_warp", Flip(1)),
        bug("the producer waits for a task with the other parity", WAIT, "cta::look produce::produce", Flip(1)),
        bug("the publisher waits for a task with the other parity", WAIT, "cta::look publish::publish", Flip(1)),
        bug("the scheduler waits for the slot with the other parity", WAIT, "cta::put", Flip(1)),
        bug_at(
            "the scheduler waits with the other parity until the next task is wanted",
            WAIT,
            "cta::wait",
            0,
            Flip(1),
        ),
        bug_at("what the rows have is loaded with the other parity", WAIT, "bf16::run", 0, Flip(1)),
        bug("a consumer waits for stages with the other parity", WAIT, "bf16::multiply", Flip(1)),
        bug("the producer waits for stages with the other parity", WAIT, "produce::load_weights", Flip(1)),
        bug("the publisher waits for a finished task with the other parity", WAIT, finished, Flip(1)),
        bug("a pulled piece is waited for with the other parity", WAIT, "pull::copy_pieces", Flip(1)),
        bug("a combined piece is waited for with the other parity", WAIT, "combine::sum", Flip(1)),
    ]
}

fn mbarrier_arrivals() -> Vec<Mutant> {
    let counts = [
        "stages full after two arrivals",
        "stages free before the last consumer warp",
        "a task slot is full after two arrivals",
        "a task slot is free before the last role",
        "the next task is wanted after two arrivals",
        "the counts are there after two arrivals",
        "a task is handed over before the last warp has finished it",
        "pull buffers full after two arrivals",
        "combine buffers full after two arrivals",
    ];
    let count = |(place, what)| {
        let change = if [1, 3, 6].contains(&place) { -1 } else { 1 };
        bug_at(what, INIT, "entry::init_mbarriers", place, Add(-1, change))
    };
    let mut bugs = vec![
        bug("a task is not announced", ARRIVE, "cta::put", Drop),
        bug_at("the producer does not say that the next task is wanted", ARRIVE, "produce::load", 1, Drop),
        bug("the producer does not give the task slot back", ARRIVE, "cta::give_back produce::produce", Drop),
        bug("the publisher does not give the task slot back", ARRIVE, "cta::give_back publish::publish", Drop),
        bug(
            "consumers do not give the slot of a product back",
            ARRIVE,
            "cta::release_warp consume::multiply_tasks",
            Drop,
        ),
        bug("consumers do not give the slot of a chunk back", ARRIVE, "cta::release_warp combine::combine", Drop),
        bug("consumers do not give stages back", ARRIVE, "bf16::multiply", Drop),
        bug_at("consumers do not give the last stage of a task back", ARRIVE, "bf16::multiply", 1, Drop),
        bug("a finished task is not handed over", ARRIVE, "consumer::hand_over", Drop),
        bug("a task is announced twice", ARRIVE, "cta::put", Twice),
        bug_at("the producer says twice that the next task is wanted", ARRIVE, "produce::load", 1, Twice),
        bug("consumers give the task slot back twice", ARRIVE, "cta::release_warp consume::multiply_tasks", Twice),
        bug("consumers give stages back twice", ARRIVE, "bf16::multiply", Twice),
        bug("a finished task is handed over twice", ARRIVE, "consumer::hand_over", Twice),
        bug("a task is announced in the next slot", OWN_ARRIVE, "cta::put", Add(0, 8)),
        bug("a finished task is handed over as the next one", OWN_ARRIVE, "consumer::hand_over", Add(0, 8)),
        bug("consumers give the next stage back", ARRIVE, "bf16::multiply", Add(0, 8)),
        bug(
            "the producer gives the task slot back before it has read it",
            "ld.shared.v4",
            "cta::look produce::produce",
            Behind("mbarrier.arrive"),
        ),
        bug_at(
            "the publisher gives the task slot back before it has read it",
            "ld.shared.v4",
            "publish::publish cta::look",
            1,
            Behind("mbarrier.arrive"),
        ),
        bug("a task is announced before it is written", "st.shared.v4", "cta::put", Behind("mbarrier.arrive")),
        bug_at(
            "the producer says that the next task is wanted before the first block of this one is loaded",
            "setp.eq",
            "produce::load",
            7,
            Become(-1, 0),
        )
        .harmless(CLAIMED),
        bug("a stage expects 16 bytes too many", EXPECT, "produce::load_weights", Add(-1, 16)),
        bug("a stage expects 16 bytes too few", EXPECT, "produce::load_weights", Add(-1, -16)),
        bug("a pull buffer expects 16 bytes too many", EXPECT, "pull::pull", Add(-1, 16)),
        bug("a pull buffer expects 16 bytes too few", EXPECT, "pull::pull", Add(-1, -16)),
        bug("a combine buffer expects 16 bytes too many", EXPECT, "combine::load", Add(-1, 16)),
        bug("a combine buffer expects 16 bytes too few", EXPECT, "combine::load", Add(-1, -16)),
        bug("the producer's ring has a stage less", "setp.eq", "cta::advance produce::load", Add(-1, -1)),
        bug("the consumers' ring never wraps", "setp.eq", "cta::wrap bf16::multiply", Add(-1, -1)),
        bug_at("the producer reads a task twice", "add.s32", "cta::take produce::produce", 2, Replace(", 1;", ", 0;")),
        bug("consumers read a task twice", "add.s32", "cta::release_warp combine::combine", Replace(", 1;", ", 0;")),
        bug("the scheduler has a task slot more", "setp.eq", "cta::wrap cta::wait", Replace(", 2;", ", 3;")),
        bug("consumers look at the first task slot only", "and.b32", "cta::at cta::look_warp", Replace(", 1;", ", 0;")),
        bug(
            "consumers take the parity of a task from the next bit",
            "bfe.u32",
            "cta::at cta::look_warp",
            Replace(", 1, 1;", ", 2, 1;"),
        ),
        bug_at(
            "the publisher takes the parity of a finished task from the bit before",
            "bfe.u32",
            "publish::publish cta::at",
            1,
            Replace(", 2, 1;", ", 1, 1;"),
        ),
        bug(
            "the ring of finished tasks is as long as that of the slots",
            OWN_ARRIVE,
            "consumer::hand_over",
            WithoutBit(0, TASK_FINISHED_OFFSET, 16),
        )
        .and(bug("", WAIT, "mbarrier::wait publish::publish", WithoutBit(0, TASK_FINISHED_OFFSET, 16)))
        .and(bug_at("", "bfe.u32", "publish::publish cta::at", 1, Replace(", 2, 1;", ", 1, 1;"))),
        bug(
            "the ring of combine loads has a buffer more",
            "setp.eq",
            "cta::advance combine::load",
            Replace(", 8;", ", 9;"),
        ),
    ];
    bugs.extend(counts.into_iter().enumerate().map(count));
    bugs
}

/// What begins before the counts are there, and how the counts are announced.
fn early_work() -> Vec<Mutant> {
    let (scheduler, meta, first_task) =
        ("schedule::schedule", "launch::write_row pull::copy_shared", "task::words schedule::schedule");
    vec![
        bug_at("pull does not wait for the counts", WAIT, "pull::pull", 1, Pass),
        bug_at("pull waits for the counts with the other parity", WAIT, "pull::pull", 1, Flip(1)),
        bug_at("the counts are not announced", OWN_ARRIVE, scheduler, 1, Drop),
        bug_at("the counts are announced twice", OWN_ARRIVE, scheduler, 1, Twice),
        bug_at("the counts are announced as the next task that is wanted", OWN_ARRIVE, scheduler, 1, Add(0, -8)),
        bug_at("the counts are announced before all lanes have acquired theirs", "bar.warp.sync", scheduler, 1, Drop),
        bug_at(
            "the first task has a token more than there are",
            "sub.s32",
            "schedule::product schedule::early_task",
            4,
            Add(1, 1),
        ),
        bug_at("the first task has the stages of the widest tile", "shl.b32", first_task, 0, Become(1, 9)),
        bug_at("every ticket of shared rows is the first", "mad.lo.s32", "pull::pull", 1, Become(1, 0)),
        bug_at("the first ticket of routed rows is the last of shared ones", "sub.s32", "pull::pull", 5, Add(2, 1)),
        bug_at("the first ticket of routed rows is left out", "sub.s32", "pull::pull", 5, Add(2, -1)),
        bug("rows of the next shared expert are pulled one further", "mad.lo.s32", "schedule::shared_row", Add(1, 1)),
        bug_at(
            "rows of the next shared expert are counted one tile further",
            "sub.s32",
            "schedule::shared_row",
            0,
            Add(2, 1),
        ),
        bug("shared rows are those of the next token", "mad.lo.s64", "pull:: pull::pull", Add(1, 1)),
        bug("results of shared rows go to the next row", "mad.lo.s64", meta, Add(1, 1)),
        bug(
            "results of shared rows go to the next rank",
            "ld.param.b64",
            "launch::symmetric_base launch::write_row pull::copy_shared",
            Add(1, 8),
        ),
        bug(
            "shared experts have half of their weight",
            "st.global.u32",
            meta,
            Become(-1, i64::from(0.5_f32.to_bits())),
        ),
    ]
}

/// How a CTA goes on from the first product's stages to those of the launch, if they are cut otherwise.
fn stages_of_another_cut() -> Vec<Mutant> {
    let (producer, consumers, old) = ("produce::retire", "consumer::pass_stage", "schedule::hand_out_tasks");
    vec![
        bug_at("no task says that stages were cut otherwise", "selp.b32", old, 1, Set(0)),
        bug_at("a task says that there were two stages less", "selp.b32", old, 1, Add(2, -2 << 16)),
        bug_at("the producer does not pass over old stages", "setp.eq", "produce::load", 1, Branch),
        bug_at("consumers do not pass over old stages", "setp.eq", "consume::multiply_tasks", 2, Branch),
        bug("the producer waits for no old stage", WAIT, producer, Pass),
        bug("the producer waits for old stages with the other parity", WAIT, producer, Flip(1)),
        bug_at("the producer does not wait until all old stages are free", WAIT, producer, 1, Pass),
        bug("the producer does not say which old stages it has passed over", OWN_ARRIVE, producer, Drop),
        bug("the producer says twice which old stages it has passed over", OWN_ARRIVE, producer, Twice),
        bug("consumers do not wait for the producer to pass over old stages", WAIT, consumers, Pass),
        bug("consumers wait for old stages with the other parity", WAIT, consumers, Flip(1)),
        bug("consumers do not give old stages back", ARRIVE, consumers, Drop),
        bug("consumers give old stages back twice", ARRIVE, consumers, Twice),
        bug("consumers give old stages back to their own CTA only", "mapa.shared::cluster", consumers, BecomeRank(2)),
        bug("consumers give old stages back to the first CTA only", "mapa.shared::cluster", consumers, Become(2, 0)),
    ]
}

fn bulk_copies() -> Vec<Mutant> {
    vec![
        bug("stores of pulled rows are in no bulk group", "cp.async.bulk.commit_group", "pull::pull", Drop),
        bug("a pull buffer is refilled before it was read", "cp.async.bulk.wait_group.read", "pull::pull", Drop),
        bug("a pulled row is counted before it is stored", "cp.async.bulk.wait_group ", "pull::pull", Drop),
        bug(
            "a pulled row is counted when its buffer was read",
            "cp.async.bulk.wait_group ",
            "pull::pull",
            Replace("wait_group", "wait_group.read"),
        ),
        bug(
            "a pulled row is counted while its last piece is stored",
            "cp.async.bulk.wait_group ",
            "pull::pull",
            Replace(" 0;", " 1;"),
        ),
        bug("tokens are loaded into the next stage", "cp.async.bulk.tensor.2d.shared", "produce::load", Add(0, STAGE)),
        bug("tokens are loaded from the next row on", "cp.async.bulk.tensor.2d.shared", "produce::load", Add(3, 1)),
        bug(
            "weights are loaded into the next stage",
            "cp.async.bulk.tensor.3d.shared",
            "produce::load_weights",
            Add(0, STAGE),
        ),
        bug(
            "weights are those of the next k-block",
            "cp.async.bulk.tensor.3d.shared",
            "produce::load_weights",
            Add(2, 64),
        ),
        bug(
            "weights of the narrowest tiles are those of the next k-block",
            "cp.async.bulk.tensor.3d.shared",
            "bulk::tensor_load_3d_evict_first",
            Add(2, 64),
        ),
        bug(
            "a tensor load completes on the next stage's barrier",
            "cp.async.bulk.tensor.2d.shared",
            "produce::load",
            Add(4, 8),
        ),
        bug("a stored piece is 16 bytes short", "cp.async.bulk.global", "pull::pull", Add(-1, -16)),
        bug("a stored piece is 16 bytes long", "cp.async.bulk.global", "pull::pull", Add(-1, 16)),
        bug("a combined piece is 16 bytes long", "cp.async.bulk.shared", "combine::load", Add(2, 16)),
    ]
}

/// Rows that are pulled with another of the same token.
fn followers() -> Vec<Mutant> {
    let (place, company) = ("st.global.u32", "route::send_followers");
    vec![
        bug("where followers are is not told", place, company, Drop),
        bug("followers are said to be one slot further", place, company, Add(-1, i64::from(MAX_LOCAL_EXPERTS))),
        bug("followers are said to be of the next expert", place, company, Add(-1, 1)),
        bug("the highest expert leads its followers", "min.u32", company, Replace("min", "max")),
        bug("followers are found with the choice of the next lane", "shfl.sync", company, Add(2, 1)),
        bug("the places of followers are read one word further", "ld.global.u32", "pull::follower", Add(-1, 4)),
        bug(
            "a pull buffer is refilled before all lanes with followers have read it",
            "bar.warp.sync",
            "pull::copy_pieces",
            Drop,
        ),
        bug_at(
            "a pull buffer expects a leader more than it gets",
            "popc.b32",
            "pull::copy_pieces",
            0,
            Add(-1, 1 << 31),
        ),
    ]
}

fn products() -> Vec<Mutant> {
    let wait = "wgmma.wait_group";
    vec![
        bug("no `wgmma.fence`", "wgmma.fence", "bf16::multiply", Drop),
        bug("no `wgmma.commit_group`", "wgmma.commit_group", "bf16::multiply", Drop),
        bug_at("no wait for the products before", wait, "bf16::multiply", 0, Drop),
        bug_at("two products stay in flight where one may", wait, "bf16::multiply", 0, Replace(" 1;", " 2;")),
        bug_at("no wait for the last products", wait, "bf16::multiply", 1, Drop),
        bug("the product's tokens are the next stage's", "mov.b64 b,", "bf16::multiply", Add(0, STAGE / 16)),
        bug("the product's weights are the next stage's", "mov.b64 a,", "bf16::multiply", Add(0, STAGE / 16)),
        bug("the product's tokens begin 16 bytes too far", "mov.b64 b,", "bf16::multiply", Add(0, 1)),
        bug("consumers take more registers than there are", "setmaxnreg.inc", "entry::forward", Replace("208", "240")),
        bug("helper warps keep their registers", "setmaxnreg.dec", "entry::forward", Drop),
    ]
}

/// How products leave the consumers.
fn results() -> Vec<Mutant> {
    let (linear1, linear2, store, transpose) = ("bf16::finish_linear1", "linear2::finish", "st.global.v4", "stmatrix");
    let (loads, metas, pass) = ("consumer::load_rows", "launch::write_row pull::copy", i64::from(PASS_BYTES));
    vec![
        bug("linear 1 stores columns 16 bytes too far", store, linear1, Add(0, 16)),
        bug("linear 1 cuts its results off", "cvt.rn.bf16x2", "bf16::stage_activated", Replace(".rn", ".rz")),
        bug("routing weights are cut off to bf16", "st.global.u32", "launch::write_row", And(-1, 0xffff_0000)),
        bug("linear 2 stores rows 16 bytes too far", store, linear2, Add(0, 16)),
        bug_at("linear 1 stores columns that do not exist", "setp.ge", linear1, 0, Stay),
        bug_at("linear 2 stores columns that do not exist", "setp.ge", linear2, 0, Stay),
        bug_at("linear 2 stores rows behind the tile's last", "setp.ge", linear2, 1, Add(-1, 1)),
        bug("linear 1 stages a pass where the one before it lies", transpose, linear1, Add(0, -pass)),
        bug_at(
            "linear 2 stores the next pass",
            "ld.shared.v4",
            "consumer::store_passes linear2::finish",
            0,
            Add(-1, pass),
        ),
        bug(
            "what the rows have lies where the second warpgroup's does",
            "cp.async.ca",
            loads,
            Add(0, 8 * i64::from(FORMAT.warpgroup_tokens)),
        ),
        bug("rows have what the next ones have", "cp.async.ca", loads, Add(1, 8)),
        bug("what the rows have is not waited for", "cp.async.wait_all", "bf16::run", Drop),
        bug("results go to the next row", "mad.lo.s64", metas, Add(1, 1)),
        bug(
            "results go to the next rank",
            "ld.param.b64",
            "launch::symmetric_base launch::write_row pull::copy",
            Add(1, 8),
        ),
        bug(
            "results have the address of the next row of the tile",
            "ld.shared.u64",
            "consumer::result_row",
            Add(-1, 8),
        ),
        bug("rows have the routing weights of the next two", "ld.shared.v2", "consumer::row_weights", Add(-1, 8)),
    ]
}

fn barriers() -> Vec<Mutant> {
    let (rows_there, warp) = ("bf16::run consumer::sync", "bar.warp.sync");
    vec![
        bug("consumers combine before all are done with the stages", "bar.sync", "consume::consume", Drop),
        bug_at("what the rows have is read before all of it is there", SYNC, rows_there, 0, Drop),
        bug("linear 1 stores columns before all are staged", SYNC, "consumer::sync bf16::finish_linear1", Drop),
        bug("linear 2 stores rows before all are staged", SYNC, "consumer::sync linear2::finish", Drop),
        bug("a warpgroup's barrier does without a warp", SYNC, "consumer::sync", Replace("128", "96")),
        bug_at("a warpgroup meets at another barrier once", "@first bar.sync", rows_there, 0, Replace(" 2,", " 3,")),
        bug("a task slot is given back before all lanes have read it", warp, "cta::release_warp", Drop),
        bug(
            "a task slot's warp barrier leaves out half the warp",
            warp,
            "cta::release_warp",
            Replace("0xffffffff", "0x0000ffff"),
        ),
        bug("a task is handed over before all lanes have stored their results", warp, "consumer::hand_over", Drop),
        bug("a combine buffer is refilled before all lanes have read it", warp, "combine::sum", Drop),
        bug("results are loaded before all lanes have seen their flags", warp, "combine::wait_for_results", Drop),
        bug("lists are counted before all lanes have written them", warp, "route::route", Drop),
        bug("counts are published before all lanes have told where the rows are", warp, "route::publish", Drop),
        bug_at("no warp barrier at the end", warp, "entry::forward", 5, Drop).harmless(ALIGNED),
    ]
}

/// What CTAs of a cluster do for each other, and where they wait for each other.
fn clusters() -> Vec<Mutant> {
    let (entry, multiply, write) = ("entry::forward cluster::barrier_cluster", "bf16::multiply", "cta::put");
    let (warps, roles) = (i64::from(CONSUMER_WARPS), i64::from(2 + CONSUMER_WARPS));
    let mapa = "mapa.shared::cluster";
    let apart = |what, place| {
        bug_at(what, CLUSTER_ARRIVE, entry, place, Replace("barrier.cluster.arrive.release.aligned", "bar.sync 0"))
            .and(bug_at("", CLUSTER_WAIT, entry, place, Drop))
    };
    vec![
        bug_at("no barrier behind the initialisation", CLUSTER, entry, 0, Drop),
        bug_at("no barrier before CTAs end", CLUSTER, entry, 1, Drop),
        apart("CTAs of a cluster begin apart from each other", 0),
        apart("CTAs of a cluster end apart from each other", 1),
        bug_at(
            "the barrier behind the initialisation releases nothing",
            CLUSTER_ARRIVE,
            entry,
            0,
            Replace("release", "relaxed"),
        )
        .harmless("only mbarriers were written, and `fence.mbarrier_init` is for just that"),
        bug_at(
            "no `fence.mbarrier_init`, and the barrier behind it releases nothing",
            CLUSTER_ARRIVE,
            entry,
            0,
            Replace("release", "relaxed"),
        )
        .and(bug("", "fence.mbarrier_init", "entry::init_mbarriers", Drop)),
        bug_at("the barrier before CTAs end releases nothing", CLUSTER_ARRIVE, entry, 1, Replace("release", "relaxed")),
        bug_at(
            "stages are free when one CTA's consumers have read them",
            INIT,
            "entry::init_mbarriers",
            1,
            Become(-1, warps),
        ),
        bug_at(
            "a task slot is free when one CTA's roles have read it",
            INIT,
            "entry::init_mbarriers",
            3,
            Become(-1, roles),
        ),
        bug_at(
            "the next task is wanted when one CTA's producer says so",
            INIT,
            "entry::init_mbarriers",
            4,
            Become(-1, 1),
        ),
        bug("the second CTA's producer says to it that the next task is wanted", mapa, "produce::load", BecomeRank(2)),
        bug("consumers give stages back to their own CTA only", mapa, multiply, BecomeRank(2)),
        bug("consumers give stages back to the first CTA only", mapa, multiply, Become(2, 0)),
        bug("consumers of the second CTA give the task slot back to it", mapa, "cta::release_warp", BecomeRank(2)),
        bug(
            "the second CTA's producer gives the task slot back to it",
            mapa,
            "cta::give_back produce::produce",
            BecomeRank(2),
        ),
        bug(
            "the second CTA's publisher gives the task slot back to it",
            mapa,
            "cta::give_back publish::publish",
            BecomeRank(2),
        ),
        bug("token tiles go to the first CTA only", MULTICAST, "produce::load", Become(-1, 1)),
        bug("token tiles go to the second CTA only", MULTICAST, "produce::load", Become(-1, 2)),
        bug("a CTA's share of the token tile begins 8 rows further", MULTICAST, "produce::load", Add(3, 8)),
        bug_at("the second CTA's task is written to the first", mapa, "cta::put cluster::mapa", 0, Become(2, 0)),
        bug_at("the second CTA's task is announced to the first", mapa, "cta::put cluster::mapa", 1, Become(2, 0)),
        bug("the second CTA's task is not announced", PEER_ARRIVE, write, Drop),
        bug(
            "the second CTA's task is announced before it is written",
            "st.shared::cluster",
            write,
            Behind("mbarrier.arrive"),
        ),
        bug("the second CTA's task is announced without a scope", PEER_ARRIVE, write, Replace(".release.cluster", "")),
        bug(
            "the second CTA waits for its task with CTA scope",
            WAIT,
            "cta::look mbarrier::try_wait_cluster",
            Replace(".acquire.cluster", ""),
        ),
        bug_at(
            "both CTAs multiply the same weight rows",
            "st.shared::cluster",
            "cta::put cluster::store_v4",
            0,
            Add(3, -128),
        ),
    ]
}

fn global_order() -> Vec<Mutant> {
    let (load, count, counts) = ("ld.acquire", "ld.relaxed.sys", "schedule::gather_counts");
    let (rows, columns, flags) = ("produce::load_linear1", "produce::load_linear2", "combine::wait_for_flag");
    let relaxed = Replace("acquire", "relaxed");
    let release = "red.release";
    vec![
        bug("rows are waited for with a relaxed load", load, rows, relaxed),
        bug("columns are waited for with a relaxed load", load, columns, relaxed),
        bug("counts are loaded, but nothing is acquired with them", FENCE, counts, Drop),
        bug("results are waited for with a relaxed load", load, flags, relaxed),
        bug("rows are waited for with CTA scope", load, rows, Replace(".gpu", ".cta")),
        bug("columns are waited for with CTA scope", load, columns, Replace(".gpu", ".cta")),
        bug("counts are loaded with GPU scope", count, counts, Replace(".sys", ".gpu")),
        bug("fence behind the counts has GPU scope", FENCE, counts, Replace(".sys", ".gpu")),
        bug(
            "counts are added up by ordinary stores",
            "red.relaxed.cta.shared",
            counts,
            Replace("red.relaxed.cta.shared.add", "st.shared"),
        ),
        bug("results are waited for with GPU scope", load, flags, Replace(".sys", ".gpu")),
        bug("rows are not waited for", load, rows, Set(0x7fff_ffff)),
        bug("columns are not waited for", load, columns, Set(0x7fff_ffff)),
        bug_at("one pulled row is not waited for", "setp.lt", rows, 1, Add(-1, -1)),
        bug_at("the columns of one task are not waited for", "setp.lt", columns, 1, Add(-1, -1)),
        bug("counts of the first launch are not waited for", count, counts, Set(1 << 32)),
        bug("results of the first launch are not waited for", load, flags, Set(1)),
        bug("pulled rows are counted relaxed", release, "pull::pull", Replace("release", "relaxed")),
        bug("stored columns are counted relaxed", release, "publish::announce_columns", Replace("release", "relaxed")),
        bug("pulled rows are counted with CTA scope", release, "pull::pull", Replace(".gpu", ".cta")),
        bug("stored columns are counted with CTA scope", release, "publish::announce_columns", Replace(".gpu", ".cta")),
        bug(
            "where a row's result goes is written behind the row's count",
            "st.global.u64",
            "launch::write_row pull::pull",
            Behind("red.release"),
        ),
        bug(
            "a row's weight is written behind the row's count",
            "st.global.u32",
            "launch::write_row pull::pull",
            Behind("red.release"),
        ),
        bug("flags are raised with GPU scope", "st.relaxed.sys", "publish::announce_results", Replace(".sys", ".gpu")),
        bug(
            "flags are raised by an ordinary store",
            "st.relaxed.sys",
            "publish::announce_results",
            Replace(".relaxed.sys", ""),
        ),
        bug("counts are published with GPU scope", "st.relaxed.sys", "route::publish", Replace(".sys", ".gpu")),
        bug(
            "counts are published by an ordinary store",
            "st.relaxed.sys",
            "route::publish",
            Replace(".relaxed.sys", ""),
        ),
        bug(
            "routed chunks are counted relaxed, with CTA scope",
            "atom.acq_rel",
            "route::route",
            Replace("acq_rel.gpu", "relaxed.cta"),
        ),
        bug("results are counted with CTA scope", ATOM, "publish::announce_results", Replace(".gpu", ".cta")),
        bug("the end of CTAs is counted relaxed", ATOM, "entry::end_launch", Replace("acq_rel", "relaxed")),
        bug("the end of CTAs is counted with CTA scope", ATOM, "entry::end_launch", Replace(".gpu", ".cta")),
        bug("list places are claimed with CTA scope", ATOM, "route::send", Replace(".gpu", ".cta")),
        bug("tasks are claimed with CTA scope", ATOM, "schedule::claim_task", Replace(".gpu", ".cta")),
        bug("rows are claimed with CTA scope", ATOM, "launch::claim pull::pull", Replace(".gpu", ".cta")),
    ]
}

fn global_counts() -> Vec<Mutant> {
    let last_tile = "tile::last_tile_row tile::rows_of_tile schedule::product";
    vec![
        bug("pulled rows are not counted", "red.release", "pull::pull", Drop),
        bug("pulled rows are counted twice", "red.release", "pull::pull", Twice),
        bug("stored columns are not counted", "red.release", "publish::announce_columns", Drop),
        bug("stored columns are counted twice", "red.release", "publish::announce_columns", Twice),
        bug("every task of an expert raises its flag", ATOM, "publish::announce_results", Stay),
        bug("no task of an expert raises its flag", ATOM, "publish::announce_results", Branch),
        bug("tasks of an expert count two", ATOM, "publish::announce_results", Add(-1, 1)),
        bug_at("counts of all launches lie in the same places", "mul.lo.s64", "route::route", 1, Become(2, 0))
            .and(bug("", "mul.lo.s64", "publish::publish", Become(2, 0)))
            .and(bug("", "mad.lo.s64", "schedule:: schedule::schedule", Become(2, 0)))
            .harmless("a launch of the small matrix has ended on all ranks before the next one begins on any"),
        bug("flags have the next launch's epoch", "st.relaxed.sys", "publish::announce_results", Add(-1, 1)),
        bug("counts are one too high", "st.relaxed.sys", "route::publish", Add(-1, 1)),
        bug("counts are one too low", "st.relaxed.sys", "route::publish", Add(-1, -1)),
        bug("list places are claimed two by two", ATOM, "route::send", Add(-1, 1)),
        bug("every second task is skipped", ATOM, "schedule::claim_task", Twice),
        bug("every second row is skipped", ATOM, "launch::claim pull::pull", Twice),
        bug("every second chunk of tokens is skipped", ATOM, "launch::claim route::route", Twice),
        bug("routed chunks count two", "atom.acq_rel", "route::route", Add(-1, 1)),
        bug("experts with rows are not marked", "st.shared", "schedule::look_at_rows", Drop),
        bug("experts are marked that have no rows", "st.shared", "schedule::look_at_rows", Add(-1, 1)),
        bug_at("a group has one tile more", "div.u32", "schedule::product", 1, Add(-1, 1)),
        bug_at("a group of tiles ends one task late", "div.u32", "schedule::product", 0, Add(-1, 1)).harmless(
            "no expert of the small matrix has more tokens than a group (16 MB); properties of the order would find it",
        ),
        bug_at(
            "the first row of a tile is counted into the one before",
            "setp.lt",
            "tile::tile_of_row schedule::seek",
            0,
            Add(-1, 1),
        ),
        bug(
            "the first shared row of a tile is counted into the one before",
            "setp.lt",
            "tile::tile_of_row schedule::shared_row",
            Add(-1, 1),
        ),
        bug_at(
            "followers are counted as if the last two tiles did not share their rows",
            "add.s32",
            "tile::last_tile_row tile::tile_of_row pull::follower",
            3,
            Become(1, i64::from(MAX_TOKEN_TILE)),
        ),
        bug_at(
            "an expert's last tile begins 32 rows later than its rows are counted",
            "add.s32",
            last_tile,
            2,
            Add(1, 32),
        ),
        bug_at(
            "an expert's last two tiles do not share their rows",
            "add.s32",
            last_tile,
            2,
            Become(1, i64::from(MAX_TOKEN_TILE)),
        ),
        bug_at(
            "rows of the next expert are counted one tile further",
            "add.s32",
            "schedule::next pull::pull",
            3,
            Add(1, 1),
        ),
        bug("rows of routed experts are pulled one further", "mad.lo.s32", "schedule::pool_row pull::pull", Add(-1, 1)),
        bug("where the rows are is not told", "st.global.u64", "route::publish", Drop),
        bug("counters are not zeroed for the next launch", "st.global.u32", "schedule::zero_next_counters", Drop),
        bug("the epoch moves on with every CTA", ATOM, "entry::end_launch", Stay),
        bug_at("the count of ended CTAs is not reset", "st.global.u32", "entry::end_launch", 0, Drop),
        bug_at("the epoch does not move on", "st.global.u32", "entry::end_launch", 1, Drop),
        bug("choices that do not exist are not reported", "red.relaxed.gpu.global.min", "route::send", Drop),
        bug(
            "the last bad choice is reported, not the first",
            "red.relaxed.gpu.global.min",
            "route::send",
            Replace("min", "max"),
        ),
    ]
}

fn progress() -> Vec<Mutant> {
    let deadline = "setp.gt.u64";
    vec![
        bug("the wait for counts has no deadline", deadline, "launch::wait_until schedule::gather_counts", Stay),
        bug("waits other than that for counts have no deadline", deadline, "launch::wait_until produce::load", Stay)
            .and(bug("", deadline, "launch::wait_until combine::wait_for_flag", Stay))
            .harmless("a rank that is lost publishes no counts: that wait ends, and all others fall through"),
        bug("a deadline that passes is not reported", "atom.relaxed.gpu.global.cas", "launch::wait_until", Drop),
        bug("the deadline passes at once", deadline, "launch::wait_until", Branch),
        bug("a deadline is compared with the time since 1970", "sub.s64", "launch::wait_until", Become(-1, 0)),
    ]
}
