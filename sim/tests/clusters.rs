//! Clusters of several CTAs: two textbook kernels, right and wrong, and each instruction by itself.

mod common;

use common::{Setup, kernel, run};
use ptx_sim::{Arg, Fault, Launch, Machine, Module, RunOptions, SimError};

const SHARED: &str = ".shared .align 128 .b8 tile[1024]; .shared .align 8 .b64 bar[4];";

fn setup(threads: u32, ctas: u32, seed: u64) -> Setup {
    let options = RunOptions { seed, step_limit: Some(1_000_000), checks: true, ..RunOptions::default() };
    let input = (0..1024u32).flat_map(u32::to_le_bytes).collect();
    Setup { threads, ctas, cluster: 2, input, options, ..Setup::default() }
}

fn words(body: &str, setup: &Setup) -> Vec<u32> {
    run(&kernel(SHARED, body), setup).unwrap_or_else(|error| panic!("{error}")).0
}

/// In each of ten seeds, the error of a kernel.
fn errors(body: &str, threads: u32) -> Vec<SimError> {
    let text = kernel(SHARED, body);
    (0..10).map(|seed| run(&text, &setup(threads, 2, seed)).expect_err("it ran to its end")).collect()
}

fn replaced(body: &str, what: &str, by: &str) -> String {
    assert!(body.contains(what), "{what}");
    body.replacen(what, by, 1)
}

fn fault(error: &SimError) -> &Fault {
    let SimError::Fault { fault, .. } = error else { panic!("{error}") };
    fault
}

/// Two CTAs share a tile of 32 words, of which each loads a half for both, four times into the same stage. `bar` is full,
/// `bar+8` empty; lanes 0 and 1 of the reading warp tell both CTAs that the tile was read.
const MULTICAST: &str = "mov.u32 %r2, tile; mov.u32 %r3, bar; mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r3], 1; @%p1 mbarrier.init.shared.b64 [%r3+8], 2;
    @%p1 fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
    mov.u32 %r7, 0; setp.ge.u32 %p2, %r1, 32; @%p2 bra READER; @!%p1 bra END;
    shl.b32 %r11, %r10, 6; add.u32 %r12, %r2, %r11; cvt.u64.u32 %rd4, %r11; add.u64 %rd3, %rd3, %rd4; mov.u16 %h1, 3;
    FILL: and.b32 %r13, %r7, 1; xor.b32 %r14, %r13, 1;
    EMPTY: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3+8], %r14; @!%p3 bra EMPTY;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r12], [%rd3], 64, [%r3], %h1;
    add.u32 %r7, %r7, 1; add.u64 %rd3, %rd3, 128; setp.lt.u32 %p4, %r7, 4; @%p4 bra FILL; bra END;
    READER: sub.u32 %r15, %r1, 32; setp.lt.u32 %p5, %r15, 2; and.b32 %r16, %r15, 1; add.u32 %r17, %r3, 8;
    mapa.shared::cluster.u32 %r18, %r17, %r16; shl.b32 %r19, %r15, 2; add.u32 %r19, %r19, %r2; mov.u32 %r20, 0;
    FULL: and.b32 %r13, %r7, 1;
    TRY: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3], %r13; @!%p3 bra TRY;
    ld.shared.u32 %r21, [%r19]; add.u32 %r20, %r20, %r21; bar.warp.sync -1;
    @%p5 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r18];
    add.u32 %r7, %r7, 1; setp.lt.u32 %p4, %r7, 4; @%p4 bra FULL;
    shl.b32 %r22, %r10, 5; add.u32 %r22, %r22, %r15; mul.wide.u32 %rd5, %r22, 4; add.u64 %rd5, %rd5, %rd2;
    st.global.u32 [%rd5], %r20;
    END: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;";

#[test]
fn a_multicast_pipeline_gives_both_ctas_every_tile() {
    for seed in 0..20 {
        let (words, cost) = run(&kernel(SHARED, MULTICAST), &setup(64, 2, seed)).unwrap_or_else(|e| panic!("{e}"));
        // Lane l reads l, l + 32, l + 64, l + 96.
        let expected: Vec<u32> = (0..64).map(|lane| 4 * (lane % 32) + 32 + 64 + 96).collect();
        assert_eq!(words[..64], expected);
        // Each byte of the four tiles was read once, though it went to two CTAs; 64 words were stored.
        assert_eq!((cost.hbm_read, cost.l2_bytes), (4 * 128, 4 * 128 + 4 * 64));
    }
}

#[test]
fn a_multicast_waits_for_the_consumers_of_both_ctas() {
    // Each CTA hears of its own consumers only: too early for the other's.
    let own_only = replaced(MULTICAST, "[%r3+8], 2;", "[%r3+8], 1;");
    let own_only = replaced(&own_only, "setp.lt.u32 %p5, %r15, 2;", "setp.eq.u32 %p5, %r15, %r10;");
    let wrong_scopes = [
        ("arrive.release.cluster.shared::cluster", "arrive.relaxed.cluster.shared::cluster"),
        ("EMPTY: mbarrier.try_wait.parity.acquire.cluster", "EMPTY: mbarrier.try_wait.parity.acquire.cta"),
    ];
    let scopes = wrong_scopes.map(|(what, by)| replaced(MULTICAST, what, by));
    for body in scopes.iter().chain([&own_only]) {
        for error in errors(body, 64) {
            assert!(matches!(fault(&error), Fault::Race { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("asynchronous write") && text.contains("multicast::cluster"), "{text}");
            assert!(text.contains("of CTA (0,0,0)") || text.contains("of CTA (1,0,0)"), "{text}");
        }
    }
}

#[test]
fn an_arrival_without_a_scope_says_that_reading_is_done() {
    // Enough for a refill of what was read...
    let unscoped = replaced(MULTICAST, "arrive.release.cluster.shared::cluster", "arrive.shared::cluster");
    let unscoped =
        replaced(&unscoped, "EMPTY: mbarrier.try_wait.parity.acquire.cluster", "EMPTY: mbarrier.try_wait.parity");
    for body in [&unscoped, &replaced(&unscoped, "arrive.shared::cluster", "arrive.release.cta.shared::cluster")] {
        for seed in 0..20 {
            words(body, &setup(64, 2, seed));
        }
    }
    // ...but not for what was written.
    let store = "st.shared::cluster.u32 [%r5+4], 9; mbarrier.arrive.shared::cluster.b64 _, [%r6];";
    let own = "st.shared::cluster.u32 [%r5+4], 9; fence.acq_rel.cta; mbarrier.arrive.release.cta.shared::cluster.b64 _, [%r6];";
    for act in [store, own] {
        for error in errors(&remote(act), 32) {
            assert!(matches!(fault(&error), Fault::Race { .. }), "{error}");
        }
    }
}

#[test]
fn a_cta_outlives_what_the_cluster_does_to_it() {
    let body = replaced(
        MULTICAST,
        "END: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        "END: mov.u32 %r40, 0;",
    );
    for error in errors(&body, 64) {
        let expected = match fault(&error) {
            Fault::ExitRace { .. } | Fault::PeerExited { .. } => true,
            other => other.to_string().contains("exited before"),
        };
        assert!(expected, "{error}");
    }
}

/// CTA 0 sends CTA 1 two tiles, each to a place of its own and to the same mbarrier, of which CTA 1 alone expects the bytes. `bar+8` of
/// CTA 0 tells that the first has come.
const TWO_TILES: &str = "mov.u32 %r2, tile; mov.u32 %r3, bar; mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r3], 1; @%p1 mbarrier.init.shared.b64 [%r3+8], 1;
    @%p1 fence.mbarrier_init.release.cluster; mov.u32 %r20, 0;
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
    @!%p1 bra END; setp.eq.u32 %p2, %r10, 1; @%p2 bra READER;
    mov.u32 %r11, 1; mapa.shared::cluster.u32 %r12, %r2, %r11; mapa.shared::cluster.u32 %r13, %r3, %r11;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%rd3], 64, [%r13];
    HEAR: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3+8], 0; @!%p3 bra HEAR;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r12+64], [%rd3+64], 64, [%r13]; bra END;
    READER: mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64;
    ONE: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], 0; @!%p3 bra ONE;
    add.u32 %r14, %r3, 8; mapa.shared::cluster.u32 %r15, %r14, 0;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r15];
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64;
    TWO: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], 1; @!%p3 bra TWO;
    ld.shared.u32 %r20, [%r2+4]; ld.shared.u32 %r21, [%r2+68]; add.u32 %r20, %r20, %r21; st.global.u32 [%rd2], %r20;
    END: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;";

#[test]
fn bytes_for_a_phase_come_behind_the_phase_before() {
    for seed in 0..10 {
        assert_eq!(words(TWO_TILES, &setup(32, 2, seed))[0], 1 + 17);
    }
    // The first tile's bytes and the second's may come in either order, or both in the first phase.
    let early = replaced(TWO_TILES, "@!%p3 bra HEAR;", "");
    let early = replaced(&early, "HEAR: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3+8], 0;", "");
    for error in errors(&early, 32) {
        let text = error.to_string();
        assert!(text.contains("too early") || text.contains("more than were expected"), "{text}");
    }
    // A wait that acquires nothing orders nothing.
    let relaxed =
        replaced(TWO_TILES, "HEAR: mbarrier.try_wait.parity.acquire", "HEAR: mbarrier.try_wait.parity.relaxed");
    for error in errors(&relaxed, 32) {
        assert!(error.to_string().contains("too early"), "{error}");
    }
}

#[test]
fn a_multicast_needs_initialised_mbarriers_in_every_cta() {
    let fence = replaced(MULTICAST, "@%p1 fence.mbarrier_init.release.cluster;", "");
    for error in errors(&fence, 64) {
        assert!(matches!(fault(&error), Fault::ProxyFence { .. } | Fault::Race { .. }), "{error}");
    }
    let start = replaced(
        MULTICAST,
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;",
        "bar.sync 0;",
    );
    for error in errors(&start, 64) {
        let uninitialised = error.to_string().contains("no mbarrier");
        assert!(uninitialised || matches!(fault(&error), Fault::Race { .. }), "{error}");
    }
}

/// Every thread stores a word, and reads the one of the other CTA's thread of the same number.
const EXCHANGE: &str = "mov.u32 %r2, tile; mov.u32 %r10, %ctaid.x; shl.b32 %r3, %r1, 2; add.u32 %r3, %r3, %r2;
    shl.b32 %r4, %r10, 8; add.u32 %r4, %r4, %r1; st.shared.u32 [%r3], %r4;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    mov.u32 %r5, %cluster_ctarank; xor.b32 %r5, %r5, 1; mapa.shared::cluster.u32 %r6, %r3, %r5;
    ld.shared::cluster.u32 %r7, [%r6]; mul.wide.u32 %rd4, %r10, 256; add.u64 %rd1, %rd1, %rd4; st.global.u32 [%rd1], %r7;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;";

#[test]
fn ctas_exchange_shared_memory() {
    let generic = EXCHANGE
        .replace(
            "mapa.shared::cluster.u32 %r6, %r3, %r5;",
            "cvt.u64.u32 %rd5, %r3; cvta.shared.u64 %rd5, %rd5; mapa.u64 %rd6, %rd5, %r5;",
        )
        .replace("ld.shared::cluster.u32 %r7, [%r6];", "ld.u32 %r7, [%rd6];");
    for body in [EXCHANGE, &generic] {
        for seed in 0..20 {
            let words = words(body, &setup(64, 4, seed));
            let expected: Vec<u32> = (0..256).map(|at| 256 * ((at / 64) ^ 1) + at % 64).collect();
            assert_eq!(words[..256], expected);
        }
    }
    let barrier = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;";
    for by in ["", "bar.sync 0;", "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;"] {
        for error in errors(&replaced(EXCHANGE, barrier, by), 64) {
            let found = fault(&error);
            assert!(matches!(found, Fault::Race { .. } | Fault::Uninitialised { .. }), "{error}");
        }
    }
    let last = replaced(EXCHANGE, "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", "");
    for error in errors(&last, 64) {
        assert!(matches!(fault(&error), Fault::ExitRace { .. } | Fault::PeerExited { .. }), "{error}");
    }
}

#[test]
fn special_registers_name_the_cluster() {
    // Clusters of 2 x 1 x 2 in a grid of 4 x 3 x 2; CTA (3, 1, 1) is in cluster (1, 1, 0), at (1, 0, 1) there, rank 3.
    let store = |name: &str, at: usize| format!("mov.u32 %r5, {name}; st.global.u32 [%rd2+{}], %r5;", 4 * at);
    let names = ["%clusterid", "%nclusterid", "%cluster_ctaid", "%cluster_nctaid"];
    let mut body = "mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; setp.eq.u32 %p1, %r1, 0;
        setp.eq.and.u32 %p1, %r2, 3, %p1; setp.eq.and.u32 %p1, %r3, 1, %p1; setp.eq.and.u32 %p1, %r4, 1, %p1;
        @!%p1 bra END;"
        .to_owned();
    for (at, name) in names.iter().flat_map(|name| ["x", "y", "z"].map(|axis| format!("{name}.{axis}"))).enumerate() {
        body += &store(&name, at);
    }
    body += &store("%cluster_ctarank", 12);
    body += &store("%cluster_nctarank", 13);
    body += "mov.pred %p2, %is_explicit_cluster; selp.u32 %r5, 1, 0, %p2; st.global.u32 [%rd2+56], %r5; END:";
    let text = kernel("", &body);
    let directive = text.replace("\n{\n", "\n.reqnctapercluster 2, 1, 2\n{\n");
    for (text, cluster) in [(&text, [2, 1, 2]), (&directive, [2, 1, 2]), (&directive, [1, 1, 1])] {
        let words = launch(text, [4, 3, 2], cluster, None).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(words[..15], [1, 1, 0, 2, 3, 1, 1, 0, 1, 2, 1, 2, 3, 4, 1]);
    }
    let words = launch(&text, [4, 3, 2], [1, 1, 1], None).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(words[..15], [3, 1, 1, 4, 3, 2, 0, 0, 0, 1, 1, 1, 0, 1, 0]);
}

/// Runs a kernel whose output starts as zeros.
fn launch(text: &str, grid: [u32; 3], cluster: [u32; 3], residency: Option<u32>) -> Result<Vec<u32>, SimError> {
    let module = Module::parse(text).unwrap_or_else(|error| panic!("{error}"));
    let mut machine = Machine::new(1);
    let out = machine.alloc(0, 4096, "out")?;
    machine.fill(out, 4096, 0)?;
    let args = vec![Arg::U64(out), Arg::U64(out)];
    let launch =
        Launch { device: 0, module: &module, entry: "k", grid, cluster, block: [32, 1, 1], shared_bytes: 0, args };
    machine.run(&[launch], &RunOptions { residency, checks: true, ..RunOptions::default() })?;
    let mut bytes = vec![0; 4096];
    machine.read(out, &mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

#[test]
fn launches_that_no_device_would_take_are_refused() {
    let text = kernel("", "mov.u32 %r2, 0;");
    let with = |directive: &str| text.replace("\n{\n", &format!("\n{directive}\n{{\n"));
    for (text, grid, cluster, residency, expected) in [
        (text.clone(), [3, 1, 1], [2, 1, 1], None, "do not divide"),
        (text.clone(), [9, 1, 1], [9, 1, 1], None, "1 to 8"),
        (text.clone(), [8, 1, 1], [0, 1, 1], None, "1 to 8"),
        (text.clone(), [8, 1, 1], [4, 1, 1], Some(3), "a residency of 3 CTAs, but its clusters have 4"),
        (with(".reqnctapercluster 2"), [8, 1, 1], [4, 1, 1], None, ".reqnctapercluster is [2, 1, 1]"),
        (with(".maxclusterrank 2"), [8, 1, 1], [4, 1, 1], None, "1 to 2"),
        (with(".explicitcluster"), [8, 1, 1], [1, 1, 1], None, "names no cluster"),
    ] {
        let error = launch(&text, grid, cluster, residency).expect_err(expected);
        assert!(matches!(error, SimError::Launch { .. }) && error.to_string().contains(expected), "{error}");
    }
    launch(&with(".explicitcluster .reqnctapercluster 2"), [8, 1, 1], [1, 1, 1], None).unwrap();
}

#[test]
fn a_residency_is_of_whole_clusters() {
    // Every CTA needs its peer: with five places, two clusters run at once.
    let mut setup = setup(64, 12, 3);
    setup.options.residency = Some(5);
    let places = format!("{EXCHANGE} mov.u32 %r30, %nsmid; st.global.u32 [%rd1], %r30;");
    assert_eq!(words(&places, &setup)[..64], [4; 64]);
}

/// CTA 0 (predicate `%p1` in its thread 0) does something to shared memory of CTA 1, which waits at `bar` and stores a word.
fn remote(act: &str) -> String {
    format!(
        "mov.u32 %r2, tile; mov.u32 %r3, bar; mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p2, %r1, 0;
         @%p2 mbarrier.init.shared.b64 [%r3], 1; @%p2 fence.mbarrier_init.release.cluster;
         st.shared.u32 [%r2], 5; st.shared.u32 [%r2+4], 6; st.shared.u32 [%r2+8], 7; st.shared.u32 [%r2+12], 8;
         fence.proxy.async; barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
         setp.eq.and.u32 %p1, %r10, 0, %p2; mov.u32 %r4, 1; mapa.shared::cluster.u32 %r5, %r2, %r4;
         mapa.shared::cluster.u32 %r6, %r3, %r4; mov.u16 %h1, 2; mov.u32 %r8, 16;
         @!%p1 bra OTHER; {act}
         OTHER: setp.eq.u32 %p4, %r10, 0; @%p4 bra END;
         WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3], 0; @!%p3 bra WAIT;
         ld.shared.u32 %r7, [%r2+4]; st.global.u32 [%rd1], %r7;
         END: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    )
}

#[test]
fn a_cta_acts_on_its_peer() {
    let copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes";
    for (act, expected) in [
        // A store and an arrival.
        ("st.shared::cluster.u32 [%r5+4], 9; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6], 1;", 9),
        // The same, by generic addresses.
        (
            "cvt.u64.u32 %rd5, %r5; cvta.shared::cluster.u64 %rd5, %rd5; st.u32 [%rd5+4], 9;
             cvt.u64.u32 %rd6, %r6; cvta.shared::cluster.u64 %rd6, %rd6; mbarrier.arrive.release.cluster.b64 _, [%rd6];",
            9,
        ),
        ("red.relaxed.cluster.shared::cluster.add.u32 [%r5+4], 9; fence.acq_rel.cluster;
          mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r6];", 15),
        ("atom.shared::cluster.exch.b32 %r9, [%r5+4], 9; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];", 9),
        // Copies: from global memory, to one CTA and as a multicast that leaves the issuing one out; from shared memory.
        (
            &format!("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r6], 16; {copy} [%r5], [%rd3], 16, [%r6];"),
            1,
        ),
        (
            &format!(
                "mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%r6], 16;
                 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
                 {copy}.multicast::cluster [%r2], [%rd3], %r8, [%r3], %h1;"
            ),
            1,
        ),
        (
            "st.shared.u32 [%r2+4], 11; fence.proxy.async;
             mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r6], 16;
             cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r5], [%r2], 16, [%r6];",
            11,
        ),
    ] {
        for seed in 0..10 {
            let words = words(&remote(act), &setup(32, 2, seed));
            assert_eq!(words[..32], [expected; 32], "{act}");
        }
    }
}

#[test]
fn what_a_peer_wrote_is_read_after_its_phase() {
    let act = "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r6], 16;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd3], 16, [%r3], %h1;";
    let early = replaced(
        &remote(act),
        "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3], 0; @!%p3 bra WAIT;",
        "",
    );
    let relaxed =
        remote("st.shared::cluster.u32 [%r5+4], 9; mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r6];");
    for body in [early, relaxed] {
        for error in errors(&body, 32) {
            let unfinished = error.to_string().contains("exited before this operation");
            assert!(unfinished || matches!(fault(&error), Fault::Race { .. }), "{error}");
        }
    }
}

#[test]
fn misuse_of_a_cluster_is_an_error() {
    for (act, expected) in [
        ("ld.shared.u32 %r7, [%r5];", "is not in shared::cta"),
        ("mapa.shared::cluster.u32 %r7, %r2, 2;", "rank 2 in a cluster of 2 CTAs"),
        (
            "cvt.u64.u32 %rd6, %r6; cvta.shared.u64 %rd6, %rd6; mbarrier.arrive.b64 %rd7, [%rd6];",
            "of the executing CTA only",
        ),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd3], 16, [%r3];",
            "another CTA than its destination",
        ),
        (
            "mov.u16 %h1, 0; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd3], 16, [%r3], %h1;",
            "its mask is 0",
        ),
        (
            "mov.u16 %h1, 6; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd3], 16, [%r3], %h1;",
            "rank 2 in a cluster of 2 CTAs",
        ),
        ("barrier.cluster.wait;", "without a barrier.cluster.arrive"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "second barrier.cluster.arrive"),
        ("st.shared::cluster.u32 [%r5+65536], 1;", "out of bounds"),
    ] {
        for error in errors(&remote(act), 32) {
            assert!(error.to_string().contains(expected), "{act}: {error}");
        }
    }
    for (instruction, expected) in [
        ("mbarrier.init.shared::cluster.b64 [%r3], 1;", "executing CTA only"),
        ("mbarrier.try_wait.parity.shared::cluster.b64 %p1, [%r3], 0;", "executing CTA only"),
        ("mbarrier.arrive.shared::cluster.b64 %rd4, [%r3];", "must be `_`"),
        (
            "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd3], 16, [%r3], %h1;",
            "shared::cluster",
        ),
    ] {
        let error = Module::parse(&kernel(SHARED, instruction)).expect_err(instruction).to_string();
        assert!(error.contains(expected), "{instruction}: {error}");
    }
}

#[test]
fn memory_of_a_cta_that_has_exited_is_gone() {
    // CTA 1 exits at once; CTA 0 reads its memory when it is gone, if not before.
    let body = "mov.u32 %r2, tile; mov.u32 %r3, %cluster_ctarank; setp.ne.u32 %p1, %r3, 0; @%p1 exit; mov.u32 %r9, 0;
        SPIN: add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 20000; @%p2 bra SPIN;
        mov.u32 %r4, 1; mapa.shared::cluster.u32 %r5, %r2, %r4; st.shared::cluster.u32 [%r5], 1;";
    for error in errors(body, 32) {
        assert!(matches!(fault(&error), Fault::PeerExited { rank: 1, .. }), "{error}");
    }
}

#[test]
fn exited_threads_count_as_arrived() {
    let body = "mov.u32 %r3, %cluster_ctarank; setp.ne.u32 %p1, %r3, 0; @%p1 exit; setp.gt.u32 %p2, %r1, 40; @%p2 exit;
        barrier.cluster.arrive; barrier.cluster.wait; st.global.u32 [%rd1], 1;";
    for seed in 0..10 {
        let words = words(body, &setup(64, 2, seed));
        assert_eq!(words[..64].iter().sum::<u32>(), 41);
    }
    let stuck = "mov.u32 %r3, %cluster_ctarank; setp.ne.u32 %p1, %r3, 0; @%p1 bra STUCK;
        barrier.cluster.arrive; barrier.cluster.wait; ret; STUCK: setp.ge.u32 %p2, %r1, 32; @%p2 exit; bar.sync 1, 64;";
    let error = errors(stuck, 64).remove(0);
    assert!(matches!(error, SimError::Deadlock(_)) && error.to_string().contains("barrier.cluster"), "{error}");
}

#[test]
fn addresses_name_their_cta() {
    let body = "mov.u32 %r2, tile; mov.u32 %r3, %cluster_ctarank; xor.b32 %r4, %r3, 1; cvt.u64.u32 %rd4, %r2;
        cvta.shared.u64 %rd4, %rd4; mapa.shared::cluster.u32 %r5, %r2, %r4; mapa.u64 %rd5, %rd4, %r4; mapa.u64 %rd6, %rd4, %r3;
        getctarank.shared::cluster.u32 %r6, %r5; getctarank.u64 %r7, %rd5; getctarank.u64 %r8, %rd4;
        isspacep.shared::cta %p1, %rd4; isspacep.shared::cta %p2, %rd6; isspacep.shared::cta %p3, %rd5;
        isspacep.shared::cluster %p4, %rd5; selp.u32 %r10, 1, 0, %p1; selp.u32 %r11, 2, 0, %p2; selp.u32 %r12, 4, 0, %p3;
        selp.u32 %r13, 8, 0, %p4; add.u32 %r10, %r10, %r11; add.u32 %r10, %r10, %r12; add.u32 %r10, %r10, %r13;
        mul.wide.u32 %rd7, %r3, 16; add.u64 %rd7, %rd7, %rd2; st.global.v4.u32 [%rd7], {%r6, %r7, %r8, %r10};";
    assert_eq!(words(body, &setup(1, 2, 0))[..8], [1, 1, 0, 11, 0, 0, 1, 11]);
}
