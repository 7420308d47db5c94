//! Litmus tests: what other CTAs and devices may see of a CTA's stores, and what a release makes them see. All without the
//! checks, so that it is the values that tell.

mod common;

use common::{Setup, kernel};
use ptx_sim::{Arg, Launch, Machine, Module, RunOptions};

/// Words of the buffer `out`, all 0 at first.
const WORDS: usize = 1024;

/// Runs one thread for each of `devices`: `%r1` is its number in the list, `%rd2` a buffer on device `home`.
fn run(body: &str, home: usize, devices: &[usize], seed: u64) -> Vec<u32> {
    let module = Module::parse(&kernel("", &format!("cvt.u32.u64 %r1, %rd3; {body}"))).unwrap();
    let mut machine = Machine::new(1 + devices.iter().max().unwrap());
    let out = machine.alloc(home, 4 * WORDS as u64, "out").unwrap();
    machine.fill(out, 4 * WORDS as u64, 0).unwrap();
    let launches: Vec<_> = devices
        .iter()
        .enumerate()
        .map(|(number, &device)| Launch {
            device,
            module: &module,
            entry: "k",
            grid: [1, 1, 1],
            block: [1, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: 4096,
            args: vec![Arg::U64(out), Arg::U64(number as u64)],
        })
        .collect();
    let options = RunOptions { seed, step_limit: Some(1_000_000), checks: false, ..RunOptions::default() };
    machine.run(&launches, &options).unwrap_or_else(|error| panic!("{error}"));
    let mut bytes = vec![0; 4 * WORDS];
    machine.read(out, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// Thread 0 stores 41 to word 0 and raises the flag, word 1; thread 1 sees the flag, and copies word 0 to word 64.
fn passing(raise: &str) -> String {
    format!(
        "setp.ne.u32 %p1, %r1, 0; @%p1 bra READ;
         st.global.u32 [%rd2], 41; {raise} ret;
         READ: ld.relaxed.sys.global.u32 %r3, [%rd2+4]; setp.eq.u32 %p2, %r3, 0; @%p2 bra READ;
         fence.acq_rel.sys; ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd2+256], %r4;"
    )
}

/// What thread 1 of [`passing`] finds, in 20 seeds.
fn passed(raise: &str, home: usize, devices: [usize; 2]) -> Vec<u32> {
    (0..20).map(|seed| run(&passing(raise), home, &devices, seed)[64]).collect()
}

const RELEASES: [&str; 6] = [
    "fence.acq_rel.SCOPE; st.relaxed.sys.global.u32 [%rd2+4], 1;",
    "fence.sc.SCOPE; st.volatile.global.u32 [%rd2+4], 1;",
    "st.release.SCOPE.global.u32 [%rd2+4], 1;",
    "red.release.SCOPE.global.add.u32 [%rd2+4], 1;",
    "atom.acq_rel.SCOPE.global.exch.b32 %r5, [%rd2+4], 1;",
    "membar.SCOPE; atom.relaxed.sys.global.cas.b32 %r5, [%rd2+4], 0, 1;",
];

#[test]
fn a_release_makes_stores_visible_in_its_scope() {
    for release in RELEASES {
        let with = |scope: &str| {
            let scope = if release.starts_with("membar") && scope == "gpu" { "gl" } else { scope };
            release.replace("SCOPE", scope)
        };
        // On one device, and from a device to another whose memory it is, and to another of its own memory.
        for (home, devices) in [(0, [0, 0]), (1, [0, 1]), (0, [0, 1])] {
            assert_eq!(passed(&with("sys"), home, devices), [41; 20], "{release} {home} {devices:?}");
            let gpu = passed(&with("gpu"), home, devices);
            assert_eq!(gpu.contains(&0), devices[0] != devices[1], "{release} {home} {devices:?}: {gpu:?}");
            let cta = passed(&with("cta"), home, devices);
            assert!(cta.contains(&0) && cta.iter().all(|value| [0, 41].contains(value)), "{release}: {cta:?}");
        }
    }
}

#[test]
fn stores_without_a_release_come_late() {
    for raise in ["st.relaxed.sys.global.u32 [%rd2+4], 1;", "red.relaxed.sys.global.add.u32 [%rd2+4], 1;"] {
        for (home, devices) in [(0, [0, 0]), (1, [0, 1]), (0, [0, 1])] {
            let found = passed(raise, home, devices);
            assert!(found.contains(&0) && found.contains(&41), "{raise} {home} {devices:?}: {found:?}");
        }
    }
}

/// A bulk store is done for its issuer when its group is; others see it after a release.
#[test]
fn bulk_stores_are_released_too() {
    let body = |release: &str| {
        format!(
            "setp.ne.u32 %p1, %r1, 0; @%p1 bra READ;
             mov.u32 %r2, 2048; st.shared.v4.u32 [%r2], {{41, 42, 43, 44}}; fence.proxy.async;
             cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 16;
             cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
             {release} red.relaxed.gpu.global.add.u32 [%rd2+128], 1; ret;
             READ: ld.acquire.gpu.global.u32 %r3, [%rd2+128]; setp.eq.u32 %p2, %r3, 0; @%p2 bra READ;
             ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd2+256], %r4;"
        )
    };
    let found = |release: &str| (0..400).map(|seed| run(&body(release), 0, &[0, 0], seed)[64]).collect::<Vec<_>>();
    assert_eq!(found("fence.acq_rel.gpu;"), [41; 400]);
    let late = found("");
    assert!(late.contains(&0) && late.contains(&41), "{late:?}");
}

/// Two stores, even to one line, are seen in either order; two to one word only in theirs.
#[test]
fn stores_are_seen_in_any_order() {
    let body = "setp.ne.u32 %p1, %r1, 0; @%p1 bra READ;
        st.global.u32 [%rd2], 1; st.global.u32 [%rd2+8], 1; st.global.u32 [%rd2], 2; st.global.u32 [%rd2+8], 2; ret;
        READ: mov.u32 %r10, 0;
        NEXT: ld.relaxed.sys.global.u32 %r4, [%rd2]; ld.relaxed.sys.global.u32 %r5, [%rd2+8];
        mul.wide.u32 %rd5, %r10, 8; add.s64 %rd5, %rd5, %rd2; st.global.v2.u32 [%rd5+256], {%r4, %r5};
        add.u32 %r10, %r10, 1; add.u32 %r6, %r4, %r5; setp.lt.u32 %p2, %r6, 4; setp.lt.and.u32 %p2, %r10, 400, %p2;
        @%p2 bra NEXT;";
    let (mut first, mut second) = (false, false);
    for seed in 0..20 {
        let words = run(body, 0, &[0, 0], seed);
        let mut last = [0, 0];
        for seen in words[64..].chunks_exact(2) {
            if seen == [0, 0] {
                continue;
            }
            assert!(seen[0] >= last[0] && seen[1] >= last[1], "{last:?}, then {seen:?}");
            first |= seen[0] > seen[1];
            second |= seen[1] > seen[0];
            last = [seen[0], seen[1]];
        }
        assert_eq!([words[0], words[2]], [2, 2]);
    }
    assert!(first && second, "{first} {second}");
}

/// Store buffering: both threads may miss the other's store, but not with `fence.sc` between.
#[test]
fn both_may_read_before_either_store_is_seen() {
    let body = |fence: &str| {
        format!(
            "mul.wide.u32 %rd5, %r1, 256; add.s64 %rd6, %rd2, %rd5; xor.b32 %r2, %r1, 1;
             mul.wide.u32 %rd5, %r2, 256; add.s64 %rd7, %rd2, %rd5;
             st.relaxed.sys.global.u32 [%rd6], 1; {fence} ld.relaxed.sys.global.u32 %r4, [%rd7];
             add.u32 %r4, %r4, 10; st.global.u32 [%rd6+4], %r4;"
        )
    };
    for devices in [[0, 0], [0, 1]] {
        let missed = |fence: &str| {
            let both = |seed| run(&body(fence), 0, &devices, seed);
            (0..20).map(both).filter(|words| words[1] == 10 && words[65] == 10).count()
        };
        assert!(missed("") > 0, "{devices:?}");
        assert_eq!(missed("fence.sc.sys;"), 0, "{devices:?}");
    }
}

/// Thread 0 releases to its device, thread 1 there passes the flag on to a peer: word 0 comes with it.
#[test]
fn releases_are_cumulative() {
    let body = "setp.eq.u32 %p1, %r1, 1; @%p1 bra PASS; setp.eq.u32 %p1, %r1, 2; @%p1 bra READ;
        st.global.u32 [%rd2], 41; st.release.gpu.global.u32 [%rd2+128], 1; ret;
        PASS: ld.acquire.gpu.global.u32 %r3, [%rd2+128]; setp.eq.u32 %p2, %r3, 0; @%p2 bra PASS;
        red.release.sys.global.add.u32 [%rd2+132], 1; ret;
        READ: ld.acquire.sys.global.u32 %r3, [%rd2+132]; setp.eq.u32 %p2, %r3, 0; @%p2 bra READ;
        ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd2+256], %r4;";
    for home in [0, 1] {
        for seed in 0..40 {
            assert_eq!(run(body, home, &[0, 0, 1], seed)[64], 41, "{home} {seed}");
        }
    }
}

/// A CTA sees its own stores, by loads, atomics and bulk copies, and an atomic is not undone by an earlier store.
#[test]
fn a_cta_sees_its_own_stores() {
    let body = "setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
        st.global.u32 [%rd2], 5; atom.relaxed.gpu.global.add.u32 %r4, [%rd2], 1; ld.global.u32 %r5, [%rd2];
        st.global.v4.u32 [%rd2+16], {1, 2, 3, 4}; st.global.u8 [%rd2+17], 7; ld.global.u32 %r6, [%rd2+16];
        mov.u32 %r2, 2048; mov.u32 %r3, 2064; mbarrier.init.shared.b64 [%r3], 1; fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 %rd5, [%r3], 16;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2+16], 16, [%r3];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r3], 0; @!%p2 bra WAIT;
        ld.shared.u32 %r7, [%r2];
        st.global.v4.u32 [%rd2+256], {%r4, %r5, %r6, %r7};
        DONE:";
    for home in [0, 1] {
        for seed in 0..40 {
            let words = run(body, home, &[0, 1], seed);
            assert_eq!((words[0], &words[64..68]), (6, &[5, 6, 0x701, 0x701][..]), "{home} {seed}");
        }
    }
}

/// Each of two devices stores to a word on the other or on itself, and reads the other word: with a fence between, one of them at least
/// sees what the other has stored.
#[test]
fn a_fence_keeps_stores_before_loads() {
    let found = |fence: &str, [first, second]: [u32; 2]| -> Vec<[u32; 2]> {
        let body = format!(
            "setp.ne.u32 %p1, %r1, 0; @%p1 bra OTHER;
             st.relaxed.sys.global.u32 [%rd2+{first}], 1; {fence} ld.relaxed.sys.global.u32 %r4, [%rd2+{second}];
             st.global.u32 [%rd2+256], %r4; ret;
             OTHER: st.relaxed.sys.global.u32 [%rd2+{second}], 1; {fence} ld.relaxed.sys.global.u32 %r4, [%rd2+{first}];
             st.global.u32 [%rd2+384], %r4;"
        );
        let words = (0..60).map(|seed| run(&body, 0, &[0, 1], seed));
        words.map(|words| [words[64], words[96]]).collect()
    };
    assert!(!found("fence.sc.sys;", [0, 512]).contains(&[0, 0]));
    assert!(found("", [0, 512]).contains(&[0, 0]));
}

/// Within a cluster its barrier, or a release of cluster scope, is enough; between clusters it is not.
#[test]
fn a_cluster_orders_its_own() {
    let body = |meet: &str| {
        format!(
            "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra READ; st.global.u32 [%rd2], 41; {meet} ret;
             READ: WAIT: ld.acquire.gpu.global.u32 %r3, [%rd2+128]; setp.eq.u32 %p2, %r3, 0; @%p2 bra WAIT;
             ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd2+256], %r4;"
        )
    };
    let barrier = "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @!%p1 st.global.u32 [%rd2], 41;
        barrier.cluster.arrive; barrier.cluster.wait; @!%p1 bra DONE;
        ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd2+256], %r4; DONE:";
    let release = body("red.release.cluster.global.add.u32 [%rd2+128], 1;");
    let found = |text: &str, ctas: u32| -> Vec<u32> {
        let options = |seed| RunOptions { seed, checks: false, ..RunOptions::default() };
        let setup = |seed| Setup { threads: 1, ctas: 2, cluster: ctas, options: options(seed), ..Setup::default() };
        (0..40).map(|seed| common::run(&kernel("", text), &setup(seed)).unwrap().0[64]).collect()
    };
    assert_eq!(found(barrier, 2), [41; 40]);
    assert_eq!(found(&release, 2), [41; 40]);
    assert!(found(&release, 1).contains(&0));
}
