//! Each check with a kernel that is right and one that is wrong by one instruction.

mod common;

use common::{Setup, kernel, run};
use ptx_sim::{Arg, Fault, Launch, Machine, Module, RunOptions, SimError};

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

fn proxy_fences(errors: Vec<SimError>) {
    for error in &errors {
        assert!(matches!(error, SimError::Fault { fault: Fault::ProxyFence { .. }, .. }), "{error}");
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
    proxy_fences(breaks(TILE, COPY, ("fence.mbarrier_init.release.cluster;", ""), 32, 1));
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

#[test]
fn a_store_from_shared_memory_needs_a_proxy_fence_and_a_wait() {
    let body = "mov.u32 %r2, tile; setp.eq.u32 %p1, %r1, 0; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3;
        st.shared.u32 [%r4], %r1; fence.proxy.async; bar.warp.sync -1; @!%p1 bra LAST;
        cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 128; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
        LAST: bar.warp.sync -1; st.shared.u32 [%r4], 9;
        @%p1 cp.async.bulk.wait_group 0; bar.warp.sync -1; ld.global.u32 %r5, [%rd1];";
    proxy_fences(breaks(TILE, body, ("fence.proxy.async;", ""), 32, 1));
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
    proxy_fences(breaks(OPERANDS, PRODUCT, ("fence.proxy.async;", ""), 128, 1));
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

#[test]
fn an_mbarrier_in_use_is_not_initialised_again() {
    let body =
        "mov.u32 %r3, bar; setp.ne.u32 %p1, %r1, 0; setp.ge.u32 %p2, %r1, 32; @!%p1 mbarrier.init.shared.b64 [%r3], 1;
        bar.sync 0; @!%p1 mbarrier.arrive.shared.b64 _, [%r3];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra WAIT;
        bar.sync 1; @!%p1 mbarrier.init.shared.b64 [%r3], 2;";
    // Where the other warp has not come yet, it finds a barrier whose phase is not complete.
    for error in breaks(TILE, body, ("bar.sync 1;", ""), 64, 1) {
        let stuck = matches!(error, SimError::Deadlock(_));
        assert!(stuck || error.to_string().contains("data race"), "{error}");
    }
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
