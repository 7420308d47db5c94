//! Each check with a kernel that is right and one that is wrong by one instruction.

mod common;

use common::{Setup, kernel, run};
use ptx_sim::mbarrier::MbarrierError;
use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType};
use ptx_sim::{Arg, Check, Fault, Launch, Machine, Module, RunOptions, SimError, TensorMap, TensorMapSpec};

fn setup(threads: u32, ctas: u32, seed: u64) -> Setup {
    let options = RunOptions { seed, step_limit: Some(1_000_000), checks: true, ..RunOptions::default() };
    Setup { threads, ctas, input: vec![7; 4096], options, ..Setup::default() }
}

/// The error of each of ten seeds, if there is one.
fn outcomes(globals: &str, body: &str, threads: u32, ctas: u32) -> Vec<Result<(), SimError>> {
    let text = kernel(globals, body);
    (0..10).map(|seed| run(&text, &setup(threads, ctas, seed)).map(|_| ())).collect()
}

fn passes(globals: &str, body: &str, threads: u32, ctas: u32) {
    for outcome in outcomes(globals, body, threads, ctas) {
        outcome.unwrap_or_else(|error| panic!("{error}"));
    }
}

/// In every seed, the error of a kernel with `what` replaced by `by`; the kernel as it is passes.
fn breaks(globals: &str, body: &str, (what, by): (&str, &str), threads: u32, ctas: u32) -> Vec<SimError> {
    passes(globals, body, threads, ctas);
    assert!(body.contains(what), "{what}");
    let broken = body.replacen(what, by, 1);
    outcomes(globals, &broken, threads, ctas)
        .into_iter()
        .map(|outcome| outcome.expect_err("it ran to its end"))
        .collect()
}

fn races(errors: Vec<SimError>) -> String {
    for error in &errors {
        assert!(matches!(error, SimError::Fault { fault: Fault::Race { .. }, .. }), "{error}");
    }
    errors[0].to_string()
}

/// The errors tell that a proxy fence of all memory or of this state space is missing.
fn proxy_fences(errors: Vec<SimError>, missing: &str) {
    for error in &errors {
        let SimError::Fault { fault: Fault::ProxyFence { space, .. }, .. } = error else { panic!("{error}") };
        assert!(*space == missing && error.to_string().contains(&format!("fence.proxy.async.{missing}:")), "{error}");
    }
}

const TILE: &str = ".shared .align 1024 .b8 tile[4096]; .shared .align 8 .b64 bar[4];";

#[test]
fn a_barrier_orders_shared_memory() {
    let body = "mov.u32 %r2, tile; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3; st.shared.u32 [%r4], %r1;
        bar.sync 0;
        xor.b32 %r5, %r3, 252; add.u32 %r5, %r5, %r2; ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd1], %r6;";
    // Some seeds meet bytes that nothing has written yet.
    for error in breaks(TILE, body, ("bar.sync 0;", ""), 64, 1) {
        let SimError::Fault { fault, .. } = &error else { panic!("{error}") };
        assert!(matches!(fault, Fault::Race { .. } | Fault::Uninitialised { .. }), "{error}");
    }
}

#[test]
fn a_race_names_both_accesses() {
    let body = "mov.u32 %r2, tile; setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.u32 [%r2], 1;
        bar.sync 0; @!%p1 ld.shared.u32 %r3, [%r2]; bar.sync 0; @%p1 st.shared.u32 [%r2], 2;";
    let text = races(breaks(TILE, body, ("[%r2]; bar.sync 0;", "[%r2];"), 64, 1));
    assert!(text.contains("shared memory 0x400") && text.contains("device 0"), "{text}");
    assert!(text.contains("warp 0") && text.contains("warp 1"), "{text}");
    assert!(text.contains("st.shared.u32") && text.contains("ld.shared.u32"), "{text}");
}

#[test]
fn a_warp_barrier_orders_lanes() {
    let body = "mov.u32 %r2, tile; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3; st.shared.u32 [%r4], %r1;
        bar.warp.sync 0xffffffff;
        xor.b32 %r5, %r3, 124; add.u32 %r5, %r5, %r2; ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd1], %r6;";
    races(breaks(TILE, body, ("bar.warp.sync 0xffffffff;", ""), 32, 1));
    // A shuffle orders no memory.
    races(breaks(TILE, body, ("bar.warp.sync 0xffffffff;", "shfl.sync.idx.b32 %r9, %r1, 0, 0x1f, -1;"), 32, 1));
}

#[test]
fn an_mbarrier_hands_over_what_its_arrivals_released() {
    // Warp 0 stores and arrives, warp 1 waits and loads.
    let body = "mov.u32 %r2, tile; mov.u32 %r3, bar; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r3], 1;
        bar.sync 0; setp.ge.u32 %p2, %r1, 32; @%p2 bra READER;
        shl.b32 %r4, %r1, 2; add.u32 %r4, %r4, %r2; st.shared.u32 [%r4], %r1; bar.warp.sync -1;
        @%p1 mbarrier.arrive.shared.b64 _, [%r3]; bra DONE;
        READER: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra READER;
        ld.shared.u32 %r6, [%r2+124]; st.global.u32 [%rd1], %r6; DONE:";
    races(breaks(TILE, body, ("bar.warp.sync -1;", ""), 64, 1));
    races(breaks(TILE, body, ("arrive.shared", "arrive.relaxed.cta.shared"), 64, 1));
    races(
        breaks(TILE, body, ("bar.sync 0;", ""), 64, 1)
            .into_iter()
            .filter(|error| error.to_string().contains("race"))
            .collect::<Vec<_>>()
            .into_iter()
            .chain(breaks(TILE, body, ("bar.warp.sync -1;", ""), 64, 1))
            .collect(),
    );
}

/// Lane 0 of CTA 0 publishes a value, that of CTA 1 waits for it.
fn message(store: &str, load: &str) -> String {
    format!(
        "setp.ne.u32 %p1, %r1, 0; @%p1 exit; mov.u32 %r2, %ctaid.x; setp.ne.u32 %p2, %r2, 0; @%p2 bra READER;
         st.global.u32 [%rd3], 42; {store} exit;
         READER: {load} setp.eq.u32 %p3, %r4, 0; @%p3 bra READER; LOADED: ld.global.u32 %r5, [%rd3]; st.global.u32 [%rd2], %r5;"
    )
}

#[test]
fn release_and_acquire_order_global_memory() {
    let (store, load) = ("st.release.gpu.global.u32 [%rd2+128], 1;", "ld.acquire.gpu.global.u32 %r4, [%rd2+128];");
    let good = message(store, load);
    races(breaks("", &good, ("st.release.gpu", "st.relaxed.gpu"), 32, 2));
    races(breaks("", &good, ("ld.acquire.gpu", "ld.relaxed.gpu"), 32, 2));
    races(breaks("", &good, ("st.release.gpu", "st.release.cta"), 32, 2));
    races(breaks("", &good, ("ld.acquire.gpu", "ld.acquire.cta"), 32, 2));
    races(breaks("", &good, ("st.release.gpu.global", "st.global"), 32, 2));
}

#[test]
fn fences_make_patterns_of_relaxed_accesses() {
    let store = "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%rd2+128], 1;";
    let load = "ld.relaxed.gpu.global.u32 %r4, [%rd2+128];";
    let good = message(store, load).replace("LOADED:", "fence.acq_rel.gpu;");
    races(breaks("", &good, ("fence.acq_rel.gpu; st", "st"), 32, 2));
    races(breaks("", &good, ("fence.acq_rel.gpu; st", "fence.acq_rel.cta; st"), 32, 2));
    races(breaks("", &good, ("fence.acq_rel.gpu; ld", "ld"), 32, 2));
    // Later atomics carry on what the first has released.
    let good =
        message("red.release.gpu.global.add.u32 [%rd2+128], 1;", "atom.acquire.gpu.global.or.b32 %r4, [%rd2+128], 0;");
    races(breaks("", &good, ("red.release.gpu", "red.relaxed.gpu"), 32, 2));
    races(breaks("", &good, ("atom.acquire.gpu", "atom.relaxed.gpu"), 32, 2));
}

#[test]
fn a_peer_is_out_of_a_gpus_scope() {
    for (scope, races) in [("sys", false), ("gpu", true)] {
        let text = kernel(
            "",
            &format!(
                "setp.ne.u32 %p1, %r1, 0; @%p1 exit; ld.global.u32 %r2, [%rd3]; setp.ne.u32 %p2, %r2, 0; @%p2 bra READER;
                 st.global.u32 [%rd2+64], 42; st.release.{scope}.global.u32 [%rd2+128], 1; exit;
                 READER: ld.acquire.{scope}.global.u32 %r4, [%rd2+128]; setp.eq.u32 %p3, %r4, 0; @%p3 bra READER;
                 ld.global.u32 %r5, [%rd2+64]; st.global.u32 [%rd2], %r5;"
            ),
        );
        let module = Module::parse(&text).unwrap();
        let mut machine = Machine::new(2);
        let out = machine.alloc(1, 1024, "mailbox").unwrap();
        machine.fill(out, 1024, 0).unwrap();
        let launches: Vec<Launch> = (0..2)
            .map(|device| {
                let role = machine.alloc(device, 4, "role").unwrap();
                machine.write(role, &(device as u32).to_le_bytes()).unwrap();
                Launch {
                    device,
                    module: &module,
                    entry: "k",
                    grid: [1, 1, 1],
                    cluster: [1, 1, 1],
                    block: [32, 1, 1],
                    shared_bytes: 0,
                    args: vec![Arg::U64(out), Arg::U64(role)],
                }
            })
            .collect();
        let result = machine.run(&launches, &RunOptions { checks: true, ..RunOptions::default() });
        match result {
            Ok(_) => assert!(!races),
            Err(error) => assert!(races && error.to_string().contains("`mailbox`+"), "{error}"),
        }
    }
}

/// Lane 0 loads 64 bytes with a bulk copy and reads them.
const COPY: &str = "mov.u32 %r2, tile; mov.u32 %r3, bar; setp.ne.u32 %p1, %r1, 0; @%p1 exit;
    mbarrier.init.shared.b64 [%r3], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 64;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd3], 64, [%r3];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra WAIT;
    ld.shared.u32 %r6, [%r2]; st.global.u32 [%rd1], %r6;";

#[test]
fn what_a_bulk_copy_writes_is_read_after_its_phase() {
    for error in breaks(TILE, COPY, ("mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra WAIT;", ""), 32, 1) {
        let SimError::Fault { fault, .. } = &error else { panic!("{error}") };
        // Where the copy has not landed, the bytes were never written.
        assert!(matches!(fault, Fault::Race { .. } | Fault::Uninitialised { .. }), "{error}");
    }
    for wrong in ["", "fence.proxy.async.global;"] {
        proxy_fences(breaks(TILE, COPY, ("fence.mbarrier_init.release.cluster;", wrong), 32, 1), "shared::cta");
    }
}

#[test]
fn a_stage_is_refilled_after_it_was_read() {
    // Warp 1 reads what warp 0 has loaded, twice.
    let body = "mov.u32 %r2, tile; mov.u32 %r3, bar; setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared.b64 [%r3], 1; @%p1 mbarrier.init.shared.b64 [%r3+8], 1; fence.proxy.async; bar.sync 0;
        setp.ge.u32 %p2, %r1, 32; @%p2 bra READER; @!%p1 exit; mov.u32 %r7, 1;
        FILL: mbarrier.try_wait.parity.shared.b64 %p3, [%r3+8], %r7; @!%p3 bra FILL;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd3], 64, [%r3];
        setp.eq.u32 %p4, %r7, 0; mov.u32 %r7, 0; @!%p4 bra FILL; exit;
        READER: mov.u32 %r7, 0; setp.eq.u32 %p1, %r1, 32;
        WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], %r7; @!%p3 bra WAIT;
        ld.shared.u32 %r6, [%r2]; st.global.u32 [%rd1], %r6; bar.warp.sync -1;
        @%p1 mbarrier.arrive.shared.b64 _, [%r3+8]; setp.eq.u32 %p4, %r7, 1; mov.u32 %r7, 1; @!%p4 bra WAIT;";
    races(breaks(TILE, body, ("bar.warp.sync -1;", ""), 64, 1));
    races(breaks(
        TILE,
        body,
        (
            "ld.shared.u32 %r6, [%r2]; st.global.u32 [%rd1], %r6; bar.warp.sync -1;\n        @%p1 mbarrier.arrive.shared.b64 _, [%r3+8];",
            "@%p1 mbarrier.arrive.shared.b64 _, [%r3+8]; ld.shared.u32 %r6, [%r2]; st.global.u32 [%rd1], %r6; bar.warp.sync -1;",
        ),
        64,
        1,
    ));
}

/// Proxy fences of shared memory, however they are written.
const SHARED_FENCES: [&str; 5] = [
    "fence.proxy.async.shared::cta;",
    "fence.proxy.async.shared::cluster;",
    "membar.proxy.async.shared::cta;",
    "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;",
    "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;",
];

#[test]
fn a_load_from_global_memory_needs_a_proxy_fence_of_it() {
    let body = COPY
        .replace(
            "mbarrier.arrive.expect_tx",
            "st.global.u32 [%rd2], 9; fence.proxy.async.global; mbarrier.arrive.expect_tx",
        )
        .replace("[%r2], [%rd3], 64", "[%r2], [%rd2], 64");
    for right in ["fence.proxy.async;", "membar.proxy.async;", "membar.proxy.async.global;"] {
        passes(TILE, &body.replace("fence.proxy.async.global;", right), 32, 1);
    }
    for wrong in SHARED_FENCES.into_iter().chain(["", "fence.proxy.alias;"]) {
        let errors = breaks(TILE, &body, ("fence.proxy.async.global;", wrong), 32, 1);
        assert!(errors[0].to_string().contains("`out`+0"), "{}", errors[0]);
        proxy_fences(errors, "global");
    }
}

#[test]
fn a_store_from_shared_memory_needs_a_proxy_fence_and_a_wait() {
    let body = "mov.u32 %r2, tile; setp.eq.u32 %p1, %r1, 0; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3;
        st.shared.u32 [%r4], %r1; fence.proxy.async; bar.warp.sync -1; @!%p1 bra LAST;
        cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 128; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
        LAST: bar.warp.sync -1; st.shared.u32 [%r4], 9;
        @%p1 cp.async.bulk.wait_group 0; bar.warp.sync -1; ld.global.u32 %r5, [%rd1];";
    for right in SHARED_FENCES {
        passes(TILE, &body.replace("fence.proxy.async;", right), 32, 1);
    }
    for wrong in ["", "fence.proxy.async.global;"] {
        proxy_fences(breaks(TILE, body, ("fence.proxy.async;", wrong), 32, 1), "shared::cta");
    }
    races(breaks(TILE, body, ("cp.async.bulk.wait_group.read 0;", ""), 32, 1));
    for error in breaks(TILE, body, ("@%p1 cp.async.bulk.wait_group 0;", ""), 32, 1) {
        assert!(error.to_string().contains("race"), "{error}");
    }
}

#[test]
fn checks_can_be_switched_off() {
    let body = "mov.u32 %r2, tile; st.shared.u32 [%r2], %r1;";
    let mut setup = setup(64, 1, 0);
    assert!(run(&kernel(TILE, body), &setup).is_err());
    setup.options.checks = false;
    assert!(run(&kernel(TILE, body), &setup).is_ok());
}

/// One warpgroup multiplies what it has stored itself, with eight accumulators.
const PRODUCT: &str = "mov.u32 %r2, tile; shl.b32 %r3, %r1, 5; add.u32 %r4, %r2, %r3; mov.u32 %r5, 0;
    st.shared.v4.u32 [%r4], {%r5, %r5, %r5, %r5}; st.shared.v4.u32 [%r4+16], {%r5, %r5, %r5, %r5};
    fence.proxy.async; bar.sync 0;
    cvt.u64.u32 %rd10, %r2; shr.u64 %rd10, %rd10, 4; or.b64 %rd10, %rd10, 0x1000080000;
    mov.u32 %r20, 0; mov.u32 %r21, 0; mov.u32 %r22, 0; mov.u32 %r23, 0; setp.eq.u32 %p1, %r5, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, %rd10, %rd10, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.u32 %r6, %r20, %r21; bar.sync 0; st.shared.u32 [%r4], %r6;";
const OPERANDS: &str = ".shared .align 1024 .b8 tile[16384];";

#[test]
fn wgmma_reads_what_was_fenced_and_before_it_is_overwritten() {
    passes(OPERANDS, &PRODUCT.replace("fence.proxy.async;", "fence.proxy.async.shared::cta;"), 128, 1);
    for wrong in ["", "fence.proxy.async.global;"] {
        proxy_fences(breaks(OPERANDS, PRODUCT, ("fence.proxy.async;", wrong), 128, 1), "shared::cta");
    }
    let unordered =
        races(breaks(OPERANDS, PRODUCT, ("add.u32 %r6, %r20, %r21; bar.sync 0;", "mov.u32 %r6, 1;"), 128, 1));
    assert!(unordered.contains("wgmma.mma_async"), "{unordered}");
}

fn wgmma_registers(errors: Vec<SimError>, text: &str) {
    for error in &errors {
        let SimError::Fault { fault: Fault::WgmmaRegisters(message), .. } = error else { panic!("{error}") };
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn wgmma_owns_its_registers_until_it_is_waited_for() {
    wgmma_registers(breaks(OPERANDS, PRODUCT, ("wgmma.wait_group.sync.aligned 0;", ""), 128, 1), "not been waited for");
    wgmma_registers(
        breaks(OPERANDS, PRODUCT, ("wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;"), 128, 1),
        "not been waited for",
    );
    wgmma_registers(breaks(OPERANDS, PRODUCT, ("wgmma.fence.sync.aligned;", ""), 128, 1), "none came before");
    wgmma_registers(
        breaks(OPERANDS, PRODUCT, ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned; mov.u32 %r20, 1;"), 128, 1),
        "no fence came after",
    );
}

#[test]
fn a_swizzled_matrix_starts_where_its_pattern_does() {
    let swizzled = PRODUCT.replace("0x1000080000", "0xC000001000010000");
    for error in breaks(
        OPERANDS,
        &swizzled,
        ("cvt.u64.u32 %rd10, %r2;", "add.u32 %r7, %r2, 128; cvt.u64.u32 %rd10, %r7;"),
        128,
        1,
    ) {
        assert!(error.to_string().contains("misaligned matrix descriptor"), "{error}");
    }
}

#[test]
fn setmaxnreg_is_executed_by_whole_warpgroups() {
    let body = "setp.lt.u32 %p1, %r1, 128; @!%p1 bra END; setmaxnreg.dec.sync.aligned.u32 80; END: mov.u32 %r2, 0;";
    for error in breaks("", body, ("%r1, 128;", "%r1, 96;"), 256, 1) {
        let text = error.to_string();
        assert!(text.contains("part of a warpgroup") && text.contains("setmaxnreg.dec"), "{text}");
    }
}

/// What is wrong with the mbarrier, in every seed.
fn mbarrier_errors(errors: Vec<SimError>) -> Vec<MbarrierError> {
    let misuse = |error: SimError| match error {
        SimError::Fault { fault: Fault::Mbarrier { error, .. }, .. } => error,
        other => panic!("{other}"),
    };
    errors.into_iter().map(misuse).collect()
}

#[test]
fn an_mbarrier_in_use_is_not_initialised_again() {
    let body =
        "mov.u32 %r3, bar; setp.ne.u32 %p1, %r1, 0; setp.ge.u32 %p2, %r1, 32; @!%p1 mbarrier.init.shared.b64 [%r3], 1;
        bar.sync 0; @!%p1 mbarrier.arrive.shared.b64 _, [%r3];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra WAIT;
        bar.sync 1; @!%p1 mbarrier.inval.shared.b64 [%r3]; @!%p1 mbarrier.init.shared.b64 [%r3], 2;";
    let again = breaks(TILE, body, ("@!%p1 mbarrier.inval.shared.b64 [%r3];", ""), 64, 1);
    assert_eq!(mbarrier_errors(again), [MbarrierError::InUse; 10]);
    // Where the other warp has not come yet, it finds another barrier, or none.
    for error in breaks(TILE, body, ("bar.sync 1;", ""), 64, 1) {
        let stuck = matches!(error, SimError::Deadlock(_));
        assert!(
            stuck || error.to_string().contains("data race") || error.to_string().contains("no mbarrier"),
            "{error}"
        );
    }
}

#[test]
fn an_mbarrier_takes_as_many_arrivals_as_it_waits_for() {
    let twice = "[%r3], 64; mbarrier.arrive.shared.b64 _, [%r3];";
    let errors = breaks(TILE, COPY, ("[%r3], 64;", twice), 32, 1);
    assert_eq!(mbarrier_errors(errors), [MbarrierError::OverArrival { count: 1, pending: 0 }; 10]);
    let errors = breaks(TILE, COPY, ("init.shared.b64 [%r3], 1;", "init.shared.b64 [%r3], 0;"), 32, 1);
    assert_eq!(mbarrier_errors(errors), [MbarrierError::CountOutOfRange { count: 0 }; 10]);
    // Drops what it has not to drop.
    let dropping = "mov.u32 %r3, bar; setp.ne.u32 %p1, %r1, 0; @%p1 exit; mbarrier.init.shared.b64 [%r3], 2;
        mbarrier.arrive_drop.shared.b64 _, [%r3]; mbarrier.arrive.shared.b64 _, [%r3]; mbarrier.arrive.shared.b64 _, [%r3];";
    let errors =
        breaks(TILE, dropping, ("arrive_drop.shared.b64 _, [%r3];", "arrive_drop.shared.b64 _, [%r3], 3;"), 32, 1);
    assert_eq!(mbarrier_errors(errors), [MbarrierError::OverArrival { count: 3, pending: 2 }; 10]);
}

#[test]
fn an_mbarrier_counts_its_bytes() {
    // The range: 2^20 - 1 bytes expected, or come too early.
    let body = "mov.u32 %r3, bar; setp.ne.u32 %p1, %r1, 0; @%p1 exit; mbarrier.init.shared.b64 [%r3], 1;
        mbarrier.expect_tx.relaxed.cta.shared.b64 [%r3], 1048575; mbarrier.complete_tx.relaxed.cta.shared.b64 [%r3], 1048575;
        mbarrier.complete_tx.relaxed.cta.shared.b64 [%r3], 1048575; mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 1048575;";
    let over = ("expect_tx.relaxed.cta.shared.b64 [%r3], 1048575;", "expect_tx.relaxed.cta.shared.b64 [%r3], 1048576;");
    let overflow = MbarrierError::TxCountOverflow { tx_count: 1 << 20 };
    assert_eq!(mbarrier_errors(breaks(TILE, body, over, 32, 1)), vec![overflow; 10]);
    let under = ("mbarrier.expect_tx.relaxed.cta.shared.b64 [%r3], 1048575;", "");
    let underflow = MbarrierError::TxCountUnderflow { tx_count: -2 * 1048575 };
    assert_eq!(mbarrier_errors(breaks(TILE, body, under, 32, 1)), vec![underflow; 10]);
    // More comes than was announced; less comes.
    let errors = breaks(TILE, COPY, ("[%r3], 64;", "[%r3], 48;"), 32, 1);
    assert_eq!(mbarrier_errors(errors), [MbarrierError::Unannounced { bytes: 16 }; 10]);
    for error in breaks(TILE, COPY, ("[%r3], 64;", "[%r3], 80;"), 32, 1) {
        assert!(matches!(error, SimError::Deadlock(_)) && error.to_string().contains("16 bytes pending"), "{error}");
    }
    // Nobody waits for it.
    let errors = breaks(TILE, body, ("_, [%r3], 1048575;", "_, [%r3], 1048574;"), 32, 1);
    assert_eq!(mbarrier_errors(errors), [MbarrierError::Unannounced { bytes: 1 }; 10]);
    let errors = breaks(TILE, body, ("mbarrier.complete_tx.relaxed.cta.shared.b64 [%r3], 1048575;\n", ""), 32, 1);
    assert_eq!(mbarrier_errors(errors), [MbarrierError::BytesLeft { tx_count: 1048575 }; 10]);
}

#[test]
fn phases_and_copies_are_told_apart() {
    // Two phases are known to be over before the first copy.
    let phase = |parity: u32| {
        format!(
            "mbarrier.arrive.shared.b64 _, [%r3]; P{parity}: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], {parity}; @!%p3 bra P{parity};"
        )
    };
    let body =
        COPY.replace("mbarrier.arrive.expect_tx", &format!("{} {} mbarrier.arrive.expect_tx", phase(0), phase(1)));
    let body = body.replace(
        "ld.shared.u32 %r6, [%r2];",
        "SPIN: add.u32 %r9, %r9, 1; setp.lt.u32 %p4, %r9, 200; @%p4 bra SPIN; ld.shared.u32 %r6, [%r2];",
    );
    let body = body.replace("mov.u32 %r2, tile;", "mov.u32 %r2, tile; mov.u32 %r9, 0;")
        + " LATER: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra LATER;";
    for error in
        breaks(TILE, &body, ("WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra WAIT;", ""), 32, 1)
    {
        let SimError::Fault { fault, .. } = &error else { panic!("{error}") };
        assert!(matches!(fault, Fault::Race { .. } | Fault::Uninitialised { .. }), "{error}");
    }
}

/// Warp 0 fills what warp 1 empties, four times: `bar` is full, `bar+8` empty.
const RING: &str = "mov.u32 %r3, bar; setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r3], 1; @%p1 mbarrier.init.shared.b64 [%r3+8], 1; bar.sync 0;
    mov.u32 %r5, 0; setp.ge.u32 %p2, %r1, 32; @%p2 bra READER; @!%p1 exit;
    FILL: and.b32 %r6, %r5, 1; xor.b32 %r6, %r6, 1;
    EMPTY: mbarrier.try_wait.parity.shared.b64 %p3, [%r3+8], %r6; @!%p3 bra EMPTY;
    mbarrier.arrive.shared.b64 _, [%r3]; add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 4; @%p4 bra FILL; exit;
    READER: setp.eq.u32 %p5, %r1, 32;
    FULL: and.b32 %r6, %r5, 1; mov.u32 %r7, %r6;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], %r7; @!%p3 bra WAIT;
    bar.warp.sync -1; @%p5 mbarrier.arrive.shared.b64 _, [%r3+8]; add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 4; @%p4 bra FULL;";

fn wrong_phases(errors: Vec<SimError>) {
    for error in errors {
        let SimError::Fault { fault, .. } = &error else { panic!("{error}") };
        let wrong =
            matches!(fault, Fault::PhaseOrder { .. } | Fault::Mbarrier { error: MbarrierError::WrongPhase { .. }, .. });
        assert!(wrong, "{error}");
    }
}

#[test]
fn a_wait_is_for_the_phase_that_it_means() {
    // The other parity: the first wait passes at once, each later one a round too early.
    wrong_phases(breaks(TILE, RING, ("mov.u32 %r7, %r6;", "xor.b32 %r7, %r6, 1;"), 64, 1));
    // The same parity in every round: every second wait is for the phase before.
    wrong_phases(breaks(TILE, RING, ("mov.u32 %r7, %r6;", "mov.u32 %r7, 0;"), 64, 1));
    // Who fills does not wait, and who empties comes too late.
    let hasty = ("EMPTY: mbarrier.try_wait.parity.shared.b64 %p3, [%r3+8], %r6; @!%p3 bra EMPTY;", "");
    wrong_phases(breaks(TILE, RING, hasty, 64, 1));
    for error in breaks(TILE, RING, ("mov.u32 %r7, %r6;", "mov.u32 %r7, 2;"), 64, 1) {
        assert!(error.to_string().contains("phase parity 2"), "{error}");
    }
}

#[test]
fn waits_that_mean_what_they_say_are_right() {
    // Twice for one phase, by polling, and by the state that an arrival has returned.
    let twice = RING.replace(
        "bar.warp.sync -1;",
        "AGAIN: mbarrier.test_wait.parity.shared.b64 %p3, [%r3], %r7; @!%p3 bra AGAIN; bar.warp.sync -1;",
    );
    passes(TILE, &twice, 64, 1);
    passes(TILE, &RING.replace("mbarrier.try_wait", "mbarrier.test_wait"), 64, 1);
    let state = "mov.u32 %r3, bar; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r3], 64; bar.sync 0; mov.u32 %r5, 0;
        NEXT: mbarrier.arrive.shared.b64 %rd5, [%r3];
        WAIT: mbarrier.try_wait.shared.b64 %p3, [%r3], %rd5; @!%p3 bra WAIT;
        add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 5; @%p4 bra NEXT;";
    passes(TILE, state, 64, 1);
    // A warp that has learned by a barrier of the CTA that phases are over need not have waited for them.
    let skips = RING.replace("@!%p1 exit;", "setp.ge.u32 %p6, %r1, 16; @%p6 bra LATER; @!%p1 bra LATER;");
    let skips = skips.replace("@%p4 bra FILL; exit;", "@%p4 bra FILL; bra LATER;").replace(
        "@%p4 bra FULL;",
        "@%p4 bra FULL;
        LATER: bar.sync 1; LAST: mbarrier.try_wait.parity.shared.b64 %p3, [%r3+8], 1; @!%p3 bra LAST;",
    );
    passes(TILE, &skips, 64, 1);
}

#[test]
fn barriers_are_for_the_threads_that_come() {
    let body = "mov.u32 %r2, 64; setp.ge.u32 %p1, %r1, 32; @%p1 mov.u32 %r2, 64; bar.sync 1, %r2; bar.sync 1, 64; bar.arrive 2, 64; bar.sync 3;";
    for (what, by, expected) in [
        ("@%p1 mov.u32 %r2, 64;", "@%p1 mov.u32 %r2, 96;", "it must be a multiple of 32 up to the CTA's 64"),
        (
            "@%p1 mov.u32 %r2, 64;",
            "@%p1 mov.u32 %r2, 32;",
            "32 of 64 threads have arrived|warps that arrived before said",
        ),
        ("mov.u32 %r2, 64;", "mov.u32 %r2, 40;", "multiple of 32"),
        ("bar.sync 1, 64;", "@%p1 bar.sync 1, 64;", "barrier 1, at which 32 of 64 threads have arrived"),
    ] {
        for error in breaks("", body, (what, by), 64, 1) {
            // Where the warp that is enough alone comes first, the other is left.
            let text = error.to_string();
            assert!(expected.split('|').any(|expected| text.contains(expected)), "{by}: {error}");
        }
    }
}

#[test]
fn sync_masks_name_lanes_that_come() {
    let body =
        "setp.ge.u32 %p1, %r1, 16; @%p1 bra END; shfl.sync.idx.b32 %r2, %r1, 3, 0x1f, 0xffff; bar.warp.sync 0xffff;
        vote.sync.ballot.b32 %r3, %p1, 0xffff; bra.uni LAST; END: exit; LAST: st.global.u32 [%rd1], %r3;";
    for (what, by, expected) in [
        ("0x1f, 0xffff;", "0x1f, -1;", "lanes 0xffff0000"),
        ("bar.warp.sync 0xffff;", "bar.warp.sync -1;", "lanes 0xffff0000"),
        ("0x1f, 0xffff;", "0x1f, 0xff;", "lanes 0x0000ff00 are not in their own member mask"),
    ] {
        for error in breaks("", body, (what, by), 32, 1) {
            assert!(error.to_string().contains(expected), "{by}: {error}");
        }
    }
    // Lanes that are elsewhere for good: they wait for each other.
    let apart = body.replace("END: exit;", "END: bar.warp.sync 0xffff0000;");
    passes("", &apart, 32, 1);
    let wrong = apart.replace("sync 0xffff0000;", "sync -1;").replace("0x1f, 0xffff;", "0x1f, -1;");
    for outcome in outcomes("", &wrong, 32, 1) {
        let error = outcome.expect_err("lanes apart");
        assert!(matches!(error, SimError::Deadlock(_)) && error.to_string().contains("bar.warp.sync"), "{error}");
    }
}

#[test]
fn setmaxnreg_takes_registers_that_others_gave_back() {
    let body = "setp.lt.u32 %p1, %r1, 128; @%p1 bra GIVE; setmaxnreg.inc.sync.aligned.u32 240; bra END;
        GIVE: setmaxnreg.dec.sync.aligned.u32 24; END: st.global.u32 [%rd1], 1;";
    for error in breaks("", body, ("setmaxnreg.dec.sync.aligned.u32 24;", ""), 384, 1) {
        assert!(
            matches!(error, SimError::Deadlock(_)) && error.to_string().contains("240 registers a thread"),
            "{error}"
        );
    }
    for error in breaks("", body, ("dec.sync.aligned.u32 24;", "inc.sync.aligned.u32 24;"), 384, 1) {
        assert!(error.to_string().contains("setmaxnreg.inc to 24 registers"), "{error}");
    }
}

#[test]
fn a_product_reads_its_own_stage_and_is_waited_for_before_a_refill() {
    // Thread 0 fills the second stage while the first is multiplied, and the first after that.
    let fill = |stage: &str, bar: &str| {
        format!(
            "@!%p2 bra {stage}; mbarrier.arrive.expect_tx.shared.b64 _, [%r9+{bar}], 64;
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2+{stage}], [%rd3], 64, [%r9+{bar}];
             WAIT{stage}: mbarrier.try_wait.parity.shared.b64 %p3, [%r9+{bar}], 0; @!%p3 bra WAIT{stage}; S{stage}:"
        )
        .replace(&format!("bra {stage};"), &format!("bra S{stage};"))
    };
    let both = PRODUCT
        .replace("st.shared.v4.u32 [%r4], {", "st.shared.v4.u32 [%r4+8192], {%r5, %r5, %r5, %r5}; st.shared.v4.u32 [%r4+8208], {%r5, %r5, %r5, %r5}; st.shared.v4.u32 [%r4], {")
        .replace("fence.proxy.async; bar.sync 0;", "mov.u32 %r9, bar; setp.eq.u32 %p2, %r1, 0; @%p2 mbarrier.init.shared.b64 [%r9], 1;
            @%p2 mbarrier.init.shared.b64 [%r9+8], 1; fence.proxy.async; bar.sync 0;")
        .replace("wgmma.commit_group.sync.aligned;", &format!("wgmma.commit_group.sync.aligned; {} bar.warp.sync -1;", fill("8192", "0")))
        .replace("add.u32 %r6, %r20, %r21; bar.sync 0; st.shared.u32 [%r4], %r6;", &format!("bar.sync 0; {} bar.warp.sync -1; add.u32 %r6, %r20, %r21;", fill("0", "8")))
        .replace("or.b64 %rd10, %rd10, 0x1000080000;", "or.b64 %rd10, %rd10, 0x1000080000; add.u64 %rd10, %rd10, 0;");
    let globals = ".shared .align 1024 .b8 tile[16384]; .shared .align 8 .b64 bar[2];";
    let text = races(breaks(globals, &both, ("add.u64 %rd10, %rd10, 0;", "add.u64 %rd10, %rd10, 512;"), 128, 1));
    assert!(text.contains("wgmma.mma_async") && text.contains("cp.async.bulk"), "{text}");
    let early = ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;");
    let text = races(breaks(
        globals,
        &both.replace("add.u32 %r6, %r20, %r21;", "wgmma.wait_group.sync.aligned 0;"),
        early,
        128,
        1,
    ));
    assert!(text.contains("wgmma.mma_async") && text.contains("cp.async.bulk"), "{text}");
}

/// Runs the kernel that stores a word and the one that loads it: one after the other, or together.
fn two_launches(together: bool) -> Result<(), SimError> {
    let text = kernel(
        "",
        "setp.eq.u64 %p1, %rd3, 0; @%p1 bra LOAD; st.global.u32 [%rd1], 1; exit; LOAD: ld.global.u32 %r2, [%rd1];",
    );
    let module = Module::parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let mut machine = Machine::new(1);
    let out = machine.alloc(0, 128, "out")?;
    machine.fill(out, 128, 0)?;
    let launches = [1, 0].map(|role| Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::U64(out), Arg::U64(role)],
    });
    let options = RunOptions { checks: true, ..RunOptions::default() };
    match together {
        true => machine.run(&launches, &options).map(|_| ()),
        false => launches.iter().try_for_each(|launch| machine.run(std::slice::from_ref(launch), &options).map(|_| ())),
    }
}

#[test]
fn launches_are_ordered_by_the_one_before() {
    two_launches(false).unwrap_or_else(|error| panic!("{error}"));
    let error = two_launches(true).expect_err("a race");
    assert!(matches!(error, SimError::Fault { fault: Fault::Race { .. }, .. }), "{error}");
}

#[test]
fn progress_is_made_under_any_residency() {
    // Every CTA waits for the one before it; the wrong kernel for the one after it.
    let body = "setp.ne.u32 %p1, %r1, 0; @%p1 exit; mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd5, %r2, 4; add.u64 %rd5, %rd5, %rd2;
        setp.eq.u32 %p2, %r2, 0; @%p2 bra GO; SPIN: ld.acquire.gpu.global.u32 %r4, [%rd5+-4]; setp.eq.u32 %p3, %r4, 0; @%p3 bra SPIN;
        GO: st.release.gpu.global.u32 [%rd5], 1;";
    let wrong = body.replace("setp.eq.u32 %p2, %r2, 0;", "setp.eq.u32 %p2, %r2, 3;").replace("[%rd5+-4]", "[%rd5+4]");
    let with = |body: &str, residency| {
        let mut setup = setup(32, 4, 1);
        setup.options.residency = residency;
        run(&kernel("", body), &setup).map(|_| ())
    };
    for residency in [None, Some(1), Some(2)] {
        with(body, residency).unwrap_or_else(|error| panic!("{error}"));
    }
    with(&wrong, Some(4)).unwrap_or_else(|error| panic!("{error}"));
    let error = with(&wrong, Some(1)).expect_err("CTA 1 never starts");
    assert!(matches!(error, SimError::Livelock(_)), "{error}");
}

#[test]
fn livelock_is_told_from_deadlock() {
    let poll = "setp.eq.u32 %p1, %r1, 0; @%p1 st.relaxed.gpu.global.u32 [%rd2], 1;
        SPIN: ld.relaxed.gpu.global.u32 %r4, [%rd2]; setp.eq.u32 %p2, %r4, 0; @%p2 bra SPIN;";
    for error in breaks("", poll, ("@%p1 st.relaxed.gpu.global.u32 [%rd2], 1;", ""), 32, 1) {
        assert!(matches!(error, SimError::Livelock(_)), "{error}");
    }
    let wait = "mov.u32 %r3, bar; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r3], 1; bar.sync 0;
        @%p1 mbarrier.arrive.shared.b64 _, [%r3];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra WAIT;";
    for error in breaks(TILE, wait, ("@%p1 mbarrier.arrive.shared.b64 _, [%r3];", ""), 32, 1) {
        assert!(matches!(error, SimError::Deadlock(_)), "{error}");
    }
}

/// Two warpgroups in turns: the first multiplies a tile and one of its warps gives it back by an mbarrier, as CUTLASS does; the
/// second writes it anew. Without the wait for the product before the arrival, that is a race.
const GIVEN_BACK: &str =
    "mov.u32 %r2, tile; and.b32 %r30, %r1, 127; shl.b32 %r3, %r30, 5; add.u32 %r4, %r2, %r3; mov.u32 %r5, 0;
    setp.ge.u32 %p2, %r1, 128; mov.u32 %r9, empty; setp.ne.u32 %p3, %r1, 0;
    @!%p3 mbarrier.init.shared.b64 [%r9], 1; @%p2 bra.uni OTHER;
    st.shared.v4.u32 [%r4], {%r5, %r5, %r5, %r5}; st.shared.v4.u32 [%r4+16], {%r5, %r5, %r5, %r5};
    OTHER: fence.proxy.async; bar.sync 0; @%p2 bra.uni WRITE;
    cvt.u64.u32 %rd10, %r2; shr.u64 %rd10, %rd10, 4; or.b64 %rd10, %rd10, 0x1000080000;
    mov.u32 %r20, 0; mov.u32 %r21, 0; mov.u32 %r22, 0; mov.u32 %r23, 0; setp.eq.u32 %p1, %r5, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, %rd10, %rd10, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    @!%p3 mbarrier.arrive.shared.b64 %rd12, [%r9]; wgmma.wait_group.sync.aligned 0; ret;
    WRITE: mbarrier.try_wait.parity.shared.b64 %p4, [%r9], 0; @!%p4 bra WRITE; st.shared.u32 [%r4], %r1;";

#[test]
fn one_arrival_gives_a_warpgroups_operands_back() {
    let globals = ".shared .align 1024 .b8 tile[16384]; .shared .align 8 .b64 empty;";
    passes(globals, GIVEN_BACK, 256, 1);
    let early = ("wgmma.wait_group.sync.aligned 0;\n    @!%p3", "@!%p3");
    let message = races(breaks(globals, GIVEN_BACK, early, 256, 1));
    assert!(message.contains("wgmma.mma_async"), "{message}");
}

/// Lanes read, wait for products together, and one of them gives the buffer back: right, as all loads are done by the wait.
/// Without that wait it is a race.
#[test]
fn loads_are_over_after_an_aligned_wait() {
    let globals = ".shared .align 16 .b8 tile[1024]; .shared .align 8 .b64 empty;";
    let body = "mov.u32 %r2, tile; mov.u32 %r9, empty; setp.ne.u32 %p1, %r1, 0; setp.ge.u32 %p2, %r1, 128;
        shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3; @!%p1 mbarrier.init.shared.b64 [%r9], 4;
        st.shared.u32 [%r4], %r1; bar.sync 0; @%p2 bra WRITE; ld.shared.u32 %r5, [%r4];
        wgmma.wait_group.sync.aligned 0; and.b32 %r6, %r1, 31; setp.eq.u32 %p3, %r6, 0;
        @%p3 mbarrier.arrive.shared.b64 %rd12, [%r9]; st.global.u32 [%rd1], %r5; ret;
        WRITE: mbarrier.try_wait.parity.shared.b64 %p4, [%r9], 0; @!%p4 bra WRITE; sub.u32 %r4, %r4, 512;
        st.shared.u32 [%r4], %r1;";
    passes(globals, body, 256, 1);
    races(breaks(globals, body, ("wgmma.wait_group.sync.aligned 0;", ""), 256, 1));
    // A wait for an mbarrier is none of these, whether lanes pass it together or not.
    let globals = &format!("{globals} .shared .align 8 .b64 over;");
    let body = body.replace(
        "bar.sync 0;",
        "@!%p1 mbarrier.init.shared.b64 [over], 1; @!%p1 mbarrier.arrive.shared.b64 %rd12, [over]; bar.sync 0;",
    );
    let wait = "AGAIN: mbarrier.try_wait.parity.shared.b64 %p5, [over], 0; @!%p5 bra AGAIN;";
    races(breaks(globals, &body, ("wgmma.wait_group.sync.aligned 0;", wait), 256, 1));
}

/// A whole warp stores one tile to a tensor: one store. Two lanes that store different tiles are two.
#[test]
fn a_warp_stores_a_tile_once() {
    let globals = ".shared .align 128 .b8 tile[128];";
    let body = "mov.u32 %r2, tile; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3; st.shared.u32 [%r4], %r1;
        fence.proxy.async.shared::cta; bar.sync 0; mov.u32 %r5, 0;
        cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%rd3, {%r5}], [%r2];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; bar.sync 0; st.shared.u32 [%r4], %r5;
        cp.async.bulk.wait_group 0;";
    for seed in 0..10 {
        let module = Module::parse(&kernel(globals, body)).unwrap();
        let mut machine = Machine::new(1);
        let out = machine.alloc(0, 128, "out").unwrap();
        let map = machine.alloc(0, 128, "map").unwrap();
        let spec = TensorMapSpec {
            data_type: TensorMapDataType::U32,
            global_address: out,
            dims: vec![32],
            strides: vec![],
            box_dims: vec![32],
            element_strides: vec![1],
            swizzle: Swizzle::None,
            fill: OutOfBoundsFill::Zero,
        };
        machine.write(map, &TensorMap::encode(&spec).unwrap()).unwrap();
        let launch = Launch {
            device: 0,
            module: &module,
            entry: "k",
            grid: [1; 3],
            cluster: [1; 3],
            block: [32, 1, 1],
            shared_bytes: 0,
            args: vec![Arg::U64(out), Arg::U64(map)],
        };
        let cost = machine.run(&[launch], &setup(32, 1, seed).options).unwrap()[0];
        let mut words = [0u32; 32];
        machine.read(out, bytemuck::bytes_of_mut(&mut words)).unwrap();
        assert_eq!(words, std::array::from_fn(|lane| lane as u32));
        assert_eq!(cost.hbm_write, 128);
    }
}

fn checked(allow: &[Check], keep_going: bool) -> Setup {
    let base = setup(32, 1, 1);
    Setup { options: RunOptions { allow: allow.iter().copied().collect(), keep_going, ..base.options.clone() }, ..base }
}

/// A program for each check that can be waived: it fails, and does not where the check is waived; waiving others does not help.
#[test]
fn checks_are_waived_one_by_one() {
    let globals = ".shared .align 128 .b8 tile[1024]; .shared .align 8 .b64 bar;";
    let start = "mov.u32 %r2, tile; mov.u32 %r9, bar; setp.ne.u32 %p1, %r1, 0;";
    let cases = [
        (
            Check::DataRace,
            "st.global.u32 [%rd2+4], %r1; xor.b32 %r3, %r1, 1; add.u32 %r3, %r3, 1; st.global.u32 [%rd2+4], %r3;",
        ),
        (Check::UninitialisedRead, "ld.shared.u32 %r3, [%r2]; st.global.u32 [%rd1], %r3;"),
        (
            Check::InitWithoutProxyFence,
            "@%p1 ret; mbarrier.init.shared.b64 [%r9], 1; mbarrier.arrive.expect_tx.shared.b64 %rd6, [%r9], 16;
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd3], 16, [%r9];
             W: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra W;",
        ),
        (
            Check::MissingProxyFence,
            "@%p1 ret; st.shared.v4.u32 [%r2], {%r1, %r1, %r1, %r1};
             cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 16; cp.async.bulk.commit_group;
             cp.async.bulk.wait_group 0;",
        ),
        (
            Check::ExitWithStores,
            "@%p1 ret; st.shared.v4.u32 [%r2], {%r1, %r1, %r1, %r1}; fence.proxy.async;
             cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 16; cp.async.bulk.commit_group;",
        ),
        (Check::WrittenReadOnly, "ld.global.nc.u32 %r3, [%rd1+256]; st.global.u32 [%rd1+256], %r3;"),
        (
            Check::UnorderedBytes,
            "@%p1 ret; mbarrier.init.shared.b64 [%r9], 2; fence.proxy.async; mbarrier.arrive.shared.b64 %rd6, [%r9];
             mbarrier.arrive.shared.b64 %rd6, [%r9]; mbarrier.arrive.expect_tx.shared.b64 %rd6, [%r9], 16;
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd3], 16, [%r9];
             V: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra V; mbarrier.arrive.shared.b64 %rd6, [%r9];
             W: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 1; @!%p2 bra W;",
        ),
        (Check::ExitWithBytes, "@%p1 ret; mbarrier.init.shared.b64 [%r9], 1; mbarrier.expect_tx.shared.b64 [%r9], 16;"),
        (Check::InitInUse, "@%p1 ret; mbarrier.init.shared.b64 [%r9], 1; mbarrier.init.shared.b64 [%r9], 1;"),
    ];
    for (check, body) in cases {
        let ptx = kernel(globals, &format!("{start}\n{body}"));
        let others: Vec<Check> = Check::ALL.iter().copied().filter(|other| *other != check).collect();
        for waived in [&[][..], &others] {
            assert!(run(&ptx, &checked(waived, false)).is_err(), "{check} with {waived:?}");
        }
        run(&ptx, &checked(&[check], false)).unwrap_or_else(|error| panic!("{check}: {error}"));
        run(&ptx, &checked(&[], true)).unwrap_or_else(|error| panic!("{check}: {error}"));
    }
}

/// A run that goes on reports two races and an uninitialised read, each once, in their order, and writes what it computes.
#[test]
fn a_run_goes_on_and_reports() {
    let body = "mov.u32 %r2, tile; st.global.u32 [%rd2+512], %r1;\nst.global.u32 [%rd2+512], 7;
        ld.shared.u32 %r3, [%r2];\nld.shared.u32 %r3, [%r2+4]; add.u32 %r4, %r1, 1; st.global.u32 [%rd1], %r4;";
    let module = Module::parse(&kernel(".shared .align 128 .b8 tile[1024];", body)).unwrap();
    let mut machine = Machine::new(1);
    let out = machine.alloc(0, 4096, "out").unwrap();
    let launch = Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [2, 1, 1],
        cluster: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::U64(out), Arg::U64(out)],
    };
    machine.run(&[launch], &checked(&[], true).options).unwrap();
    let reports: Vec<String> = machine.take_reports().iter().map(ToString::to_string).collect();
    let count = |text: &str| reports.iter().filter(|report| report.contains(text)).count();
    assert_eq!(count("uninitialised"), 2, "{reports:#?}");
    assert!(count("data race") >= 1, "{reports:#?}");
    assert!(reports.len() < 10, "{reports:#?}");
    let mut words = [0u32; 32];
    machine.read(out, bytemuck::bytes_of_mut(&mut words)).unwrap();
    assert_eq!(words, std::array::from_fn(|lane| lane as u32 + 1));
}

#[test]
fn what_is_read_only_is_not_written_by_the_same_launch() {
    let read_only = |errors: Vec<SimError>| {
        for error in &errors {
            assert!(matches!(error, SimError::Fault { fault: Fault::ReadOnly { .. }, .. }), "{error}");
        }
    };
    // Written before, by another warp, in order; and afterwards.
    let body = "st.global.u32 [%rd1], %r1; bar.sync 0; xor.b32 %r2, %r1, 32; mul.wide.u32 %rd4, %r2, 4; add.s64 %rd4, %rd4, %rd2;
        ld.global.u32 %r3, [%rd4]; st.global.u32 [%rd1+1024], %r3;";
    read_only(breaks("", body, ("ld.global.u32 %r3", "ld.global.nc.u32 %r3"), 64, 1));
    let body = "mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd4, %rd3; ld.global.nc.u32 %r3, [%rd4]; bar.sync 0;
        st.global.u32 [%rd1], %r3; setp.eq.u32 %p1, %r1, 40; @%p1 st.global.u32 [%rd2], 1;";
    let body = body.replace("@%p1 st.global.u32 [%rd2], 1;", "@%p1 st.global.u32 [%rd2+512], 1;");
    read_only(breaks("", &body, ("[%rd2+512], 1", "[%rd3], 1"), 64, 1));
}

/// Lane 0 of warp 0 makes a tensor map of the one in the input, and lane 0 of warp 1 loads a tile of 32 words with it.
const NEW_MAP: &str =
    "mov.u32 %r2, tile; mov.u32 %r3, bar; mov.u32 %r10, 0; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 32;
    @%p1 mbarrier.init.shared.b64 [%r3], 1; @%p1 fence.mbarrier_init.release.cluster; @!%p1 bra MADE;
    mov.u32 %r4, 0; mov.u64 %rd5, %rd3; mov.u64 %rd6, %rd2;
    COPY: ld.global.u64 %rd7, [%rd5]; st.global.u64 [%rd6], %rd7; add.s64 %rd5, %rd5, 8; add.s64 %rd6, %rd6, 8;
    add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 16; @%p3 bra COPY;
    fence.proxy.tensormap::generic.release.gpu;
    MADE: bar.sync 0; @!%p2 bra END;
    fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 128;
    cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd2, {%r10}], [%r3];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r3], 0; @!%p4 bra WAIT;
    ld.shared.u32 %r5, [%r2+20]; st.global.u32 [%rd2+256], %r5; END:";

#[test]
fn a_tensor_map_that_was_written_needs_fences_of_its_proxy() {
    let result = |body: &str, seed: u64| -> Result<u32, SimError> {
        let module = Module::parse(&kernel(TILE, body)).unwrap();
        let mut machine = Machine::new(1);
        let words: Vec<u8> = (100..132u32).flat_map(u32::to_le_bytes).collect();
        let tensor = machine.alloc(0, 128, "tensor")?;
        machine.write(tensor, &words)?;
        let spec = TensorMapSpec {
            data_type: TensorMapDataType::U32,
            global_address: tensor,
            dims: vec![32],
            strides: vec![],
            box_dims: vec![32],
            element_strides: vec![1],
            swizzle: Swizzle::None,
            fill: OutOfBoundsFill::Zero,
        };
        let (out, input) = (machine.alloc(0, 512, "out")?, machine.alloc(0, 128, "map")?);
        machine.fill(out, 512, 0)?;
        machine.write(input, &TensorMap::encode(&spec).unwrap())?;
        let launch = Launch {
            device: 0,
            module: &module,
            entry: "k",
            grid: [1, 1, 1],
            cluster: [1, 1, 1],
            block: [64, 1, 1],
            shared_bytes: 0,
            args: vec![Arg::U64(out), Arg::U64(input)],
        };
        machine.run(&[launch], &RunOptions { seed, checks: true, ..RunOptions::default() })?;
        let mut word = [0; 4];
        machine.read(out + 256, &mut word)?;
        Ok(u32::from_le_bytes(word))
    };
    let fences =
        ["fence.proxy.tensormap::generic.release.gpu;", "fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;"];
    for seed in 0..10 {
        assert_eq!(result(NEW_MAP, seed).unwrap_or_else(|error| panic!("{error}")), 105);
        for fence in fences {
            assert!(NEW_MAP.contains(fence));
            let error = result(&NEW_MAP.replace(fence, "fence.acq_rel.gpu;"), seed).unwrap_err();
            assert!(matches!(error, SimError::Fault { fault: Fault::TensorMapFence { .. }, .. }), "{error}");
        }
        // Without the barrier nothing orders the two at all; a map that nobody writes needs nothing.
        let error = result(&NEW_MAP.replace("MADE: bar.sync 0;", "MADE:"), seed).unwrap_err().to_string();
        assert!(error.contains("data race") || error.contains("mbarrier") || error.contains("tensor map"), "{error}");
        let given = NEW_MAP.replace("[%rd2, {%r10}]", "[%rd3, {%r10}]").replace(fences[1], "");
        assert_eq!(result(&given, seed).unwrap(), 105);
    }
}
