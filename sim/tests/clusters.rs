//! Clusters of several CTAs: two textbook kernels, right and wrong, and each instruction by itself.

mod common;

use common::{Setup, kernel, run};
use ptx_sim::{Fault, RunOptions, SimError};

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
        ("arrive.release.cluster.shared::cluster", "arrive.release.cta.shared::cluster"),
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
