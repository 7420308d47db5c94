//! Divergence, barriers, memory checks, atomics, asynchronous copies and matrix products, each as a small kernel.

mod common;

use common::{Setup, error, kernel, lanes, run};
use ptx_sim::{Arg, Launch, Machine, Module, RunOptions, Traffic, WarpWaits};

#[test]
fn divergent_lanes_meet_again() {
    let words = lanes(
        "and.b32 %r2, %r1, 3; setp.eq.u32 %p1, %r2, 0; @%p1 bra ZERO; setp.eq.u32 %p2, %r2, 1; @%p2 bra ONE;
         add.u32 %r3, %r1, 100; bra.uni JOIN;
         ZERO: mul.lo.u32 %r3, %r1, 2; bra.uni JOIN;
         ONE: mov.u32 %r3, 7;
         JOIN: activemask.b32 %r4; st.global.u32 [%rd1], %r3; st.global.u32 [%rd1+128], %r4;",
    );
    let expected: Vec<u32> = (0..32)
        .map(|lane| match lane & 3 {
            0 => lane * 2,
            1 => 7,
            _ => lane + 100,
        })
        .collect();
    assert_eq!(words, expected);
}

#[test]
fn loops_of_different_length_leave_the_warp_converged() {
    let (words, _) = run(
        &kernel(
            "",
            "mov.u32 %r2, 0; mov.u32 %r3, 0;
             LOOP: add.u32 %r3, %r3, %r2; add.u32 %r2, %r2, 1; setp.le.u32 %p1, %r2, %r1; @%p1 bra LOOP;
             activemask.b32 %r4; st.global.u32 [%rd1], %r3; st.global.u32 [%rd1+128], %r4;",
        ),
        &Setup::default(),
    )
    .unwrap();
    for lane in 0..32 {
        assert_eq!(words[lane], (0..=lane as u32).sum::<u32>());
        assert_eq!(words[32 + lane], u32::MAX);
    }
}

#[test]
fn a_lane_may_spin_on_a_later_lane() {
    // Lanes 1 to 31 wait in a loop, at a smaller address than the code lane 0 runs.
    let (words, _) = run(
        &kernel(
            ".shared .align 4 .b32 flag;",
            "mov.u32 %r9, flag; setp.ne.u32 %p1, %r1, 0; mov.u32 %r3, 0; @!%p1 st.shared.u32 [%r9], 0;
             bar.warp.sync 0xffffffff; @!%p1 bra SET;
             SPIN: ld.volatile.shared.u32 %r3, [%r9]; setp.eq.u32 %p2, %r3, 0; @%p2 bra SPIN; bra.uni DONE;
             SET: mov.u32 %r3, 5; st.volatile.shared.u32 [%r9], 5;
             DONE: st.global.u32 [%rd1], %r3;",
        ),
        &Setup::default(),
    )
    .unwrap();
    assert_eq!(words[..32], [5; 32]);
}

#[test]
fn shuffles_follow_the_specification() {
    let words =
        lanes("add.u32 %r2, %r1, 100; shfl.sync.idx.b32 %r3|%p1, %r2, 5, 0x1f, 0xffffffff; st.global.u32 [%rd1], %r3;");
    assert_eq!(words, [105; 32]);
    let words = lanes("shfl.sync.up.b32 %r3, %r1, 1, 0, 0xffffffff; st.global.u32 [%rd1], %r3;");
    assert_eq!(words[..4], [0, 0, 1, 2]);
    let words = lanes(
        "shfl.sync.down.b32 %r3|%p1, %r1, 8, 0x181f, -1; selp.u32 %r3, %r3, 999, %p1; st.global.u32 [%rd1], %r3;",
    );
    let expected: Vec<u32> = (0..32).map(|_| 999).collect();
    assert_eq!(words, expected);
    let words = lanes("shfl.sync.bfly.b32 %r3, %r1, 16, 0x1f, 0xffffffff; st.global.u32 [%rd1], %r3;");
    assert_eq!(words, (0..32).map(|lane| lane ^ 16).collect::<Vec<u32>>());
}

#[test]
fn votes_matches_and_reductions() {
    let words = lanes(
        "and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 1; vote.sync.ballot.b32 %r3, %p1, 0xffffffff;
         vote.sync.any.pred %p2, %p1, 0xffffffff; vote.sync.all.pred %p3, !%p1, 0xffffffff;
         selp.u32 %r4, 1, 0, %p2; selp.u32 %r5, 2, 0, %p3; add.u32 %r4, %r4, %r5; xor.b32 %r3, %r3, %r4;
         st.global.u32 [%rd1], %r3;",
    );
    assert_eq!(words, [0xaaaa_aaaa ^ 1; 32]);
    let words = lanes("shr.u32 %r2, %r1, 3; match.any.sync.b32 %r3, %r2, 0xffffffff; st.global.u32 [%rd1], %r3;");
    let expected: Vec<u32> = (0..32).map(|lane| 0xff << (lane / 8 * 8)).collect();
    assert_eq!(words, expected);
    let words = lanes("redux.sync.add.u32 %r3, %r1, 0xffffffff; st.global.u32 [%rd1], %r3;");
    assert_eq!(words, [496; 32]);
    let words = lanes("sub.s32 %r2, %r1, 7; redux.sync.min.s32 %r3, %r2, 0xffffffff; st.global.u32 [%rd1], %r3;");
    assert_eq!(words, [-7i32 as u32; 32]);
    let words = lanes("elect.sync %r2|%p1, 0xffffffff; selp.u32 %r3, 1, 0, %p1; st.global.u32 [%rd1], %r3;");
    assert_eq!(words[0], 1);
    assert_eq!(words[1..], [0; 31]);
}

#[test]
fn a_shuffle_waits_for_lanes_that_come_by_another_path() {
    let words = lanes(
        "setp.lt.u32 %p1, %r1, 9; @%p1 bra SMALL; mov.u32 %r2, 3; bra.uni JOIN; SMALL: mov.u32 %r2, 4;
         JOIN: shfl.sync.idx.b32 %r3, %r2, 31, 0x1f, 0xffffffff; st.global.u32 [%rd1], %r3;",
    );
    assert_eq!(words, [3; 32]);
}

#[test]
fn atomics_of_all_threads_add_up() {
    for seed in 0..4 {
        let setup = Setup {
            threads: 256,
            ctas: 8,
            options: RunOptions { seed, residency: Some(3), ..RunOptions::default() },
            ..Setup::default()
        };
        let (words, _) = run(
            &kernel(
                "",
                "atom.relaxed.gpu.global.add.u32 %r3, [%rd2], 1; red.global.max.u32 [%rd2+4], %r3;
                         mov.u32 %r4, %ctaid.x; red.release.sys.global.add.u32 [%rd2+8], %r4;",
            ),
            &setup,
        )
        .unwrap();
        assert_eq!(words[..3], [2048, 2047, 256 * 28]);
    }
}

#[test]
fn barriers_order_warps() {
    for seed in 0..8 {
        let setup = Setup { threads: 128, options: RunOptions { seed, ..RunOptions::default() }, ..Setup::default() };
        let (words, _) = run(
            &kernel(
                ".shared .align 4 .b8 tile[512];",
                "mov.u32 %r2, tile; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3; st.shared.u32 [%r4], %r1;
                 bar.sync 0; mov.u32 %r5, 127; sub.u32 %r5, %r5, %r1; shl.b32 %r5, %r5, 2; add.u32 %r5, %r5, %r2;
                 ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd1], %r6;",
            ),
            &setup,
        )
        .unwrap();
        assert_eq!(words[..128], (0..128).rev().collect::<Vec<u32>>());
    }
}

#[test]
fn named_barriers_pair_producers_with_consumers() {
    // Warp 0 consumes what warp 1 produces; barrier 3 counts both, and warp 1 does not wait.
    let body = "mov.u32 %r2, tile; setp.ge.u32 %p1, %r1, 32; @%p1 bra PRODUCE;
         bar.sync 3, 64; ld.shared.u32 %r3, [%r2]; st.global.u32 [%rd1], %r3; bra.uni END;
         PRODUCE: st.shared.u32 [%r2], 42; bar.arrive 3, 64; END:";
    for seed in 0..8 {
        let setup = Setup { threads: 64, options: RunOptions { seed, ..RunOptions::default() }, ..Setup::default() };
        let (words, _) = run(&kernel(".shared .align 4 .b32 tile;", body), &setup).unwrap();
        assert_eq!(words[..32], [42; 32]);
    }
}

#[test]
fn a_barrier_reduces() {
    let setup = Setup { threads: 96, ..Setup::default() };
    let (words, _) = run(
        &kernel(
            "",
            "setp.lt.u32 %p1, %r1, 50; bar.red.popc.u32 %r3, 0, %p1; bar.red.and.pred %p2, 0, %p1;
                     bar.red.or.pred %p3, 0, %p1; selp.u32 %r4, 100, 0, %p2; selp.u32 %r5, 1000, 0, %p3;
                     add.u32 %r3, %r3, %r4; add.u32 %r3, %r3, %r5; st.global.u32 [%rd1], %r3;",
        ),
        &setup,
    )
    .unwrap();
    assert_eq!(words[..96], [1050; 96]);
}

const BULK: &str = "
    mov.u32 %r10, pool; mov.u32 %r11, bar; setp.ne.u32 %p1, %r1, 0; @%p1 bra WAIT;
    mbarrier.init.shared::cta.b64 [%r11], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd3], 128, [%r11];
    add.u32 %r12, %r10, 128; add.s64 %rd4, %rd3, 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%rd4], 128, [%r11];
    WAIT: bar.sync 0;
    SPIN: { .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%r11], 0; selp.u32 %r13, 1, 0, done; }
    setp.eq.u32 %p2, %r13, 0; @%p2 bra SPIN;
    shl.b32 %r14, %r1, 2; add.u32 %r14, %r14, %r10; ld.shared.u32 %r15, [%r14]; add.u32 %r15, %r15, 1;
    st.shared.u32 [%r14], %r15; fence.proxy.async; bar.sync 0; @%p1 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r10], 256; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0; END:";

#[test]
fn bulk_copies_land_before_what_waits_for_them() {
    let input: Vec<u8> = (0..64u32).flat_map(|word| (word * 3).to_le_bytes()).collect();
    for seed in 0..32 {
        let setup = Setup {
            threads: 64,
            input: input.clone(),
            shared_bytes: 1024,
            options: RunOptions { seed, ..RunOptions::default() },
            ..Setup::default()
        };
        let globals = ".extern .shared .align 1024 .b8 pool[]; .shared .align 8 .b64 bar;";
        let (words, cost) = run(&kernel(globals, BULK), &setup).unwrap_or_else(|e| panic!("{seed}: {e}"));
        assert_eq!(words[..64], (0..64).map(|word| word * 3 + 1).collect::<Vec<u32>>());
        assert_eq!((cost.hbm_read, cost.hbm_write), (256, 256));
    }
}

#[test]
fn missing_arrival_is_a_deadlock_that_names_the_wait() {
    let body = BULK.replace("expect_tx.shared::cta.b64 _, [%r11], 256", "expect_tx.shared::cta.b64 _, [%r11], 272");
    let setup = Setup { threads: 64, input: vec![0; 256], shared_bytes: 1024, ..Setup::default() };
    let globals = ".extern .shared .align 1024 .b8 pool[]; .shared .align 8 .b64 bar;";
    let text = error(globals, &body, &setup);
    assert!(text.starts_with("deadlock"), "{text}");
    assert!(text.contains("16 bytes pending"), "{text}");
    assert!(text.contains("warp 0") && text.contains("warp 1"), "{text}");
}

#[test]
fn barrier_deadlock_is_reported() {
    let text = error("", "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 1, 96;", &Setup { threads: 96, ..Setup::default() });
    assert!(text.contains("barrier 1, at which 32 of 96 threads have arrived"), "{text}");
}

#[test]
fn memory_errors_name_the_place() {
    let setup = Setup::default();
    let text = error("", "st.global.u32 [%rd2+4096], %r1;", &setup);
    assert!(text.contains("out of bounds") && text.contains("`out`+4096"), "{text}");
    let text = error("", ".loc 1 7 1\nst.global.u32 [%rd1+2], %r1;", &setup);
    assert!(text.contains("misaligned") && text.contains("`out`+2"), "{text}");
    let text = error(".shared .align 4 .b32 x;", "ld.shared.u32 %r3, [x];", &setup);
    assert!(text.contains("uninitialised"), "{text}");
    let text = error("", "ld.global.u32 %r3, [0];", &setup);
    assert!(text.contains("no buffer"), "{text}");
    let text = error("", "trap;", &setup);
    assert!(text.contains("trapped"), "{text}");
}

#[test]
fn sync_masks_that_name_exited_lanes_are_errors() {
    let setup = Setup::default();
    let text =
        error("", "setp.eq.u32 %p1, %r1, 3; @%p1 exit; shfl.sync.idx.b32 %r3, %r1, 0, 0x1f, 0xffffffff;", &setup);
    assert!(text.contains("have exited"), "{text}");
    let text = error("", "bar.warp.sync 0xfffffffe;", &setup);
    assert!(text.contains("not in their own member mask"), "{text}");
}

#[test]
fn deadline_expires_in_simulated_time() {
    let (words, cost) = run(
        &kernel(
            "",
            "mov.u64 %rd4, %globaltimer; add.s64 %rd4, %rd4, 2000000000;
                     SPIN: ld.acquire.sys.global.u32 %r3, [%rd2]; setp.ne.u32 %p1, %r3, 0; @%p1 bra END;
                     nanosleep.u32 100; mov.u64 %rd5, %globaltimer; setp.lt.u64 %p2, %rd5, %rd4; @%p2 bra SPIN;
                     st.global.u32 [%rd1+128], 77; END:",
        ),
        &Setup::default(),
    )
    .unwrap();
    assert_eq!(words[32..64], [77; 32]);
    assert!(cost.simulated_ns >= 2_000_000_000 && cost.instructions < 100_000, "{cost:?}");
}

#[test]
fn endless_poll_is_a_livelock_and_endless_work_meets_the_limit() {
    let text = error(
        "",
        "SPIN: ld.volatile.global.u32 %r3, [%rd2]; setp.eq.u32 %p1, %r3, 0; @%p1 bra SPIN;",
        &Setup::default(),
    );
    assert!(text.starts_with("livelock"), "{text}");
    let setup = Setup { options: RunOptions { step_limit: Some(10_000), ..RunOptions::default() }, ..Setup::default() };
    let text = error("", "SPIN: add.u32 %r3, %r3, 1; bra SPIN;", &setup);
    assert!(text.contains("limit of 10000"), "{text}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let body = "atom.global.add.u32 %r3, [%rd2], 1; mov.u32 %r4, %ctaid.x; shl.b32 %r4, %r4, 5; add.u32 %r4, %r4, %r1;
                add.u32 %r4, %r4, 32; mul.wide.u32 %rd4, %r4, 4; add.s64 %rd4, %rd4, %rd2; st.global.u32 [%rd4], %r3;";
    let go = |seed| {
        let setup = Setup {
            ctas: 16,
            options: RunOptions { seed, residency: Some(4), ..RunOptions::default() },
            ..Setup::default()
        };
        run(&kernel("", body), &setup).unwrap()
    };
    assert_eq!(go(5), go(5));
    assert_ne!(go(5).0, go(6).0);
}

#[test]
fn functions_pass_parameters() {
    let globals = ".func (.param .b32 result) twice(.param .b32 value) { .reg .b32 a<3>; ld.param.b32 a1, [value];
                   add.u32 a2, a1, a1; st.param.b32 [result], a2; ret; }";
    let (words, _) = run(
        &kernel(
            globals,
            "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), twice, (a); ld.param.b32 %r3, [b]; }
                          st.global.u32 [%rd1], %r3;",
        ),
        &Setup::default(),
    )
    .unwrap();
    assert_eq!(words[..32], (0..32).map(|lane| 2 * lane).collect::<Vec<u32>>());
}

#[test]
fn branch_tables_and_initialised_globals() {
    let globals = ".global .align 8 .u64 link = generic(table)+8; .const .align 4 .b32 table[4] = {10, 20, 30, 0x28};";
    let (words, _) = run(
        &kernel(globals, "and.b32 %r2, %r1, 3; T: .branchtargets A, B, C, D; brx.idx %r2, T;
                          A: mov.u32 %r3, 1; bra J; B: mov.u32 %r3, 2; bra J; C: mov.u32 %r3, 3; bra J; D: mov.u32 %r3, 4;
                          J: ld.global.u64 %rd4, [link]; ld.u32 %r4, [%rd4]; ld.const.u32 %r5, [table+12];
                          add.u32 %r3, %r3, %r4; add.u32 %r3, %r3, %r5; st.global.u32 [%rd1], %r3;"),
        &Setup::default(),
    )
    .unwrap();
    assert_eq!(words[..32], (0..32).map(|lane| lane % 4 + 71).collect::<Vec<u32>>());
}

#[test]
fn setmaxnreg_moves_registers_between_warpgroups() {
    // 384 threads start with 168 registers each; 240 for eight warps need what four warps give up.
    let body = "setp.lt.u32 %p1, %r1, 128; @%p1 bra GIVE; setmaxnreg.inc.sync.aligned.u32 240; bra END;
                GIVE: setmaxnreg.dec.sync.aligned.u32 24; END: st.global.u32 [%rd1], 1;";
    let setup = Setup { threads: 384, ..Setup::default() };
    let (words, _) = run(&kernel("", body), &setup).unwrap();
    assert_eq!(words[..384], [1; 384]);
    let text = error("", &body.replace("u32 24;", "u32 80;"), &setup);
    assert!(text.contains("240 registers a thread"), "{text}");
}

#[test]
fn peers_share_one_address_space_and_their_traffic_is_nvlink() {
    let text = kernel(
        "",
        "ld.relaxed.sys.global.u32 %r3, [%rd3]; st.relaxed.sys.global.u32 [%rd1], %r3; fence.acq_rel.sys; bar.warp.sync 0xffffffff;
         setp.ne.u32 %p1, %r1, 0; @!%p1 red.release.sys.global.add.u32 [%rd2+512], 1;
         SPIN: ld.acquire.sys.global.u32 %r4, [%rd3+512]; setp.eq.u32 %p2, %r4, 0; @%p2 bra SPIN;",
    );
    let module = Module::parse(&text).unwrap();
    let mut machine = Machine::new(2);
    let buffers: Vec<u64> = (0..2)
        .map(|device| {
            let buffer = machine.alloc(device, 1024, &format!("buffer {device}")).unwrap();
            machine.fill(buffer, 1024, 0).unwrap();
            machine.write(buffer, &(device as u32 + 7).to_le_bytes()).unwrap();
            buffer
        })
        .collect();
    // Each device reads its own buffer, writes the other's, and waits for the other.
    let launches: Vec<Launch> = (0..2)
        .map(|device| Launch {
            device,
            module: &module,
            entry: "k",
            grid: [1, 1, 1],
            cluster: [1, 1, 1],
            block: [32, 1, 1],
            shared_bytes: 0,
            args: vec![Arg::U64(buffers[1 - device] + 128), Arg::U64(buffers[device] + 128)],
        })
        .collect();
    for (device, buffer) in buffers.iter().enumerate() {
        machine.write(buffer + 128, &(device as u32 + 7).to_le_bytes()).unwrap();
    }
    let costs = machine.run(&launches, &RunOptions::default()).unwrap();
    for cost in costs {
        assert_eq!((cost.nvlink_write, cost.nvlink_read), (32 * 4 + 4, 0));
        assert_eq!((cost.hbm_read, cost.hbm_write), (256, 0));
    }
    for buffer in &buffers {
        // Words of all lanes are in the second line, the counter in the sixth.
        for (lines, read, written) in [(0..8, 256, 32 * 4 + 4), (1..2, 128, 32 * 4), (5..6, 128, 4), (2..5, 0, 0)] {
            let traffic = machine.traffic(buffer + 128 * lines.start..buffer + 128 * lines.end).unwrap();
            let expected = Traffic { hbm_read: read, nvlink_write: written, ..Traffic::default() };
            assert_eq!(traffic, expected, "{lines:?}");
        }
    }
    machine.traffic(buffers[0]..buffers[0] + (1 << 20)).unwrap_err();
}

#[test]
fn residency_limits_ctas_and_smids() {
    let setup =
        Setup { ctas: 12, options: RunOptions { residency: Some(2), ..RunOptions::default() }, ..Setup::default() };
    let body = "mov.u32 %r2, %smid; mov.u32 %r3, %nsmid; mul.wide.u32 %rd4, %r2, 4; add.s64 %rd4, %rd4, %rd2;
                setp.ne.u32 %p1, %r1, 0; @%p1 exit; red.global.add.u32 [%rd4], 1; red.global.max.u32 [%rd2+64], %r3;";
    let (words, _) = run(&kernel("", body), &setup).unwrap();
    assert_eq!(words[0] + words[1], 12);
    assert_eq!((words[2], words[16]), (0, 2));
}

#[test]
fn launches_are_checked() {
    let module = Module::parse(&kernel("", "")).unwrap();
    let mut machine = Machine::new(1);
    let good = Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::U64(0), Arg::U64(0)],
    };
    let mut fails = |launch: Launch, reason: &str| {
        let text = machine.run(&[launch], &RunOptions::default()).unwrap_err().to_string();
        assert!(text.contains(reason), "{text}");
    };
    fails(Launch { device: 1, ..good.clone() }, "device 1 does not exist");
    fails(Launch { entry: "q", ..good.clone() }, "no such entry");
    fails(Launch { block: [1025, 1, 1], ..good.clone() }, "1 to 1024");
    fails(Launch { grid: [0, 1, 1], ..good.clone() }, "grid");
    fails(Launch { shared_bytes: 1 << 20, ..good.clone() }, "shared memory");
    fails(Launch { args: vec![Arg::U64(0)], ..good.clone() }, "the kernel takes 2");
    fails(Launch { args: vec![Arg::U64(0), Arg::U32(0)], ..good.clone() }, "it must have 8");
    assert!(machine.run(&[good], &RunOptions::default()).is_ok());
}

#[test]
fn small_copies_wait_by_group_and_by_mbarrier() {
    let body = "mov.u32 %r10, tile; shl.b32 %r11, %r1, 4; add.u32 %r10, %r10, %r11; cvt.u64.u32 %rd5, %r11;
        add.s64 %rd4, %rd3, %rd5; mov.u32 %r12, bar; setp.ne.u32 %p1, %r1, 0; @!%p1 mbarrier.init.shared.b64 [%r12], 32;
        bar.sync 0; cp.async.cg.shared.global [%r10], [%rd4], 16, 8; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r10]; add.u32 %r6, %r2, %r3; add.u32 %r6, %r6, %r4; add.u32 %r6, %r6, %r5;
        cp.async.ca.shared.global [%r10], [%rd4], 4; cp.async.mbarrier.arrive.noinc.shared.b64 [%r12];
        SPIN: mbarrier.test_wait.parity.shared.b64 %p2, [%r12], 0; @!%p2 bra SPIN;
        ld.shared.u32 %r7, [%r10]; add.u32 %r6, %r6, %r7; st.global.u32 [%rd1], %r6;";
    for seed in 0..16 {
        let setup = Setup {
            input: (0..128u32).flat_map(u32::to_le_bytes).collect(),
            options: RunOptions { seed, ..RunOptions::default() },
            ..Setup::default()
        };
        let globals = ".shared .align 16 .b8 tile[512]; .shared .align 8 .b64 bar;";
        let (words, _) = run(&kernel(globals, body), &setup).unwrap_or_else(|error| panic!("{seed}: {error}"));
        let expected: Vec<u32> = (0..32).map(|lane| 4 * lane + (4 * lane + 1) + 4 * lane).collect();
        assert_eq!(words[..32], expected);
    }
}

#[test]
fn bulk_reductions_add_in_memory() {
    let body = "mov.u32 %r10, tile; shl.b32 %r11, %r1, 2; add.u32 %r11, %r11, %r10; st.shared.u32 [%r11], %r1;
        fence.proxy.async; bar.sync 0; setp.ne.u32 %p1, %r1, 0; @%p1 exit; mov.u32 %r3, 0;
        LOOP: cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd2], [%r10], 128; cp.async.bulk.commit_group;
        add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 5; @%p2 bra LOOP; cp.async.bulk.wait_group.read 0;";
    let (words, _) = run(&kernel(".shared .align 128 .b8 tile[128];", body), &Setup::default()).unwrap();
    assert_eq!(words[..32], (0..32).map(|lane| 5 * lane).collect::<Vec<u32>>());
}

#[test]
fn warp_matrices_multiply() {
    // A = 16 x 16 of 1 on the diagonal, from shared memory; B = 16 x 8 with B[k][n] = k + n; D = A * B.
    let body = "mov.u32 %r10, tile; shl.b32 %r2, %r1, 4; add.u32 %r3, %r10, %r2; shl.b32 %r4, %r2, 0; cvt.u64.u32 %rd4, %r4;
        add.s64 %rd4, %rd3, %rd4; ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd4]; st.shared.v4.u32 [%r3], {%r5, %r6, %r7, %r8};
        bar.warp.sync 0xffffffff;
        // Rows of the matrices are rows of A: 0-7 left, 8-15 left, 0-7 right, 8-15 right.
        and.b32 %r12, %r1, 15; shl.b32 %r12, %r12, 5; shr.u32 %r13, %r1, 4; shl.b32 %r13, %r13, 4; add.u32 %r12, %r12, %r13;
        add.u32 %r12, %r12, %r10; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r12];
        // B: column lane / 4, rows 2 * (lane % 4) and the next, then 8 more.
        shr.u32 %r14, %r1, 2; and.b32 %r15, %r1, 3; shl.b32 %r15, %r15, 1; add.u32 %r16, %r14, %r15; add.u32 %r17, %r16, 1;
        cvt.rn.f32.u32 %f1, %r16; cvt.rn.f32.u32 %f2, %r17; cvt.rn.bf16x2.f32 %r24, %f2, %f1;
        add.u32 %r16, %r16, 8; add.u32 %r17, %r17, 8; cvt.rn.f32.u32 %f1, %r16; cvt.rn.f32.u32 %f2, %r17;
        cvt.rn.bf16x2.f32 %r25, %f2, %f1; mov.b32 %f3, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f4, %f5, %f6, %f7}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%f3, %f3, %f3, %f3};
        shl.b32 %r18, %r14, 5; shl.b32 %r19, %r15, 2; add.u32 %r18, %r18, %r19; cvt.u64.u32 %rd5, %r18; add.s64 %rd5, %rd5, %rd2;
        st.global.v2.f32 [%rd5], {%f4, %f5}; st.global.v2.f32 [%rd5+256], {%f6, %f7};";
    let diagonal = |index: usize| if index / 16 == index % 16 { 0x3f80u16 } else { 0 };
    let setup = Setup { input: (0..256).flat_map(|index| diagonal(index).to_le_bytes()).collect(), ..Setup::default() };
    let (words, cost) = run(&kernel(".shared .align 16 .b8 tile[512];", body), &setup).unwrap();
    for (index, word) in words[..128].iter().enumerate() {
        assert_eq!(f32::from_bits(*word), (index / 8 + index % 8) as f32, "row {}, column {}", index / 8, index % 8);
    }
    assert_eq!(cost.tensor_ops, 2 * 16 * 8 * 16);
}

#[test]
fn a_cta_must_wait_for_its_copies() {
    let body =
        "mov.u32 %r10, tile; mov.u32 %r11, bar; setp.ne.u32 %p1, %r1, 0; @%p1 exit; mbarrier.init.shared.b64 [%r11], 1;
        fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared.b64 _, [%r11], 16;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd3], 16, [%r11];";
    let text = error(".shared .align 16 .b8 tile[16]; .shared .align 8 .b64 bar;", body, &Setup::default());
    assert!(text.contains("exited before") && text.contains("cp.async.bulk"), "{text}");
}

#[test]
fn a_wait_is_met_or_not_however_often_it_is_tried_again() {
    // Warp 0 arrives late, and then finds its phase complete; warp 1 waits in vain several times, and then looks once more.
    let body = "mov.u32 %r3, bar; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r3], 1;
        bar.sync 0; setp.ge.u32 %p2, %r1, 32; @%p2 bra WAIT; nanosleep.u32 5000;
        @%p1 mbarrier.arrive.shared.b64 _, [%r3]; bar.warp.sync -1;
        WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0, 1000; @!%p3 bra WAIT;
        @!%p2 exit;
        AGAIN: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0, 1000; @!%p3 bra AGAIN;";
    let setup = Setup { threads: 64, ..Setup::default() };
    let (_, cost) = run(&kernel(".shared .align 8 .b8 bar[8];", body), &setup).unwrap();
    let found = cost.warps.map(|warp| (warp.waits, warp.met));
    assert_eq!((found[0], found[1], cost.mbarriers()), ((1, 1), (2, 1), WarpWaits { waits: 3, met: 2 }));
    assert!(cost.polls > 1);
}

/// A grid of 4000 CTAs takes about ten times as long as one of 400, and as many are resident at once as fit: 132 SMs with 16
/// CTAs of 128 threads each, or 2 of 100 KiB.
#[test]
fn time_grows_with_the_number_of_ctas() {
    let body = "mov.u32 %r2, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 ret; mov.u32 %r3, %nsmid;
        mul.wide.u32 %rd4, %r2, 4; add.u64 %rd4, %rd4, %rd2; st.global.u32 [%rd4], %r3;";
    let time = |ctas: u32, shared_bytes: u32, checks: bool| {
        let began = std::time::Instant::now();
        let options = RunOptions { checks, ..RunOptions::default() };
        let setup = Setup { ctas, threads: 128, shared_bytes, out_words: 4096, options, ..Setup::default() };
        let (words, _) = run(&kernel("", body), &setup).unwrap();
        let resident = words[0];
        assert!(words[..ctas as usize].iter().all(|word| *word == resident));
        (resident, began.elapsed())
    };
    assert_eq!(time(400, 0, false).0, 400);
    assert_eq!(time(4000, 0, false).0, 132 * 16);
    assert_eq!(time(4000, 100 << 10, false).0, 132 * 2);
    for checks in [false, true] {
        let (few, many) = (time(400, 0, checks).1, time(4000, 0, checks).1);
        assert!(many < few * 60 + std::time::Duration::from_millis(500), "{few:?}, {many:?}, checks {checks}");
    }
}

/// A variable of 3 GiB takes memory where it is written only.
#[test]
fn large_variables_are_sparse() {
    let globals = ".global .align 16 .b8 large[3221225472];";
    let body = "mov.u64 %rd4, large; ld.global.u32 %r2, [%rd4+3221225408]; add.u32 %r2, %r2, %r1;
        mul.wide.u32 %rd5, %r1, 67108864; add.u64 %rd5, %rd5, %rd4; st.global.u32 [%rd5], %r2; ld.global.u32 %r3, [%rd5];
        st.global.u32 [%rd1], %r3;";
    let (words, _) = run(&kernel(globals, body), &Setup::default()).unwrap();
    assert_eq!(words[..32], (0..32).collect::<Vec<u32>>());
}

/// A kernel that never ends meets the limit of steps, here a small one.
#[test]
fn a_step_limit_ends_endless_kernels() {
    assert_eq!(RunOptions::default().step_limit, Some(RunOptions::STEP_LIMIT));
    let options = RunOptions { step_limit: Some(10_000), ..RunOptions::default() };
    let message = error("", "LOOP: bra LOOP;", &Setup { options, ..Setup::default() });
    assert!(message.contains("limit of 10000 warp instructions"), "{message}");
}

#[test]
fn time_begins_at_a_large_value_that_the_seed_chooses() {
    let starts: Vec<u64> = (0..20)
        .map(|seed| {
            let options = RunOptions { seed, ..RunOptions::default() };
            let setup = Setup { threads: 1, options, ..Setup::default() };
            let body = "mov.u64 %rd4, %globaltimer; st.global.u64 [%rd2], %rd4;
                mov.u32 %r4, %globaltimer_hi; mov.u32 %r5, %globaltimer_lo; st.global.v2.u32 [%rd2+8], {%r5, %r4};";
            let (words, _) = run(&kernel("", body), &setup).unwrap();
            let time = |at: usize| u64::from(words[at + 1]) << 32 | u64::from(words[at]);
            assert!((time(2)).abs_diff(time(0)) < 100);
            time(0)
        })
        .collect();
    assert!(starts.iter().all(|start| *start >> 60 == 1));
    assert!(starts.windows(2).all(|two| two[0] != two[1]));
    // In half of the runs the lower half wraps soon.
    assert!((5..16).contains(&starts.iter().filter(|start| **start as u32 > 0xfffe_0000).count()), "{starts:x?}");
}

#[test]
fn a_deadline_against_the_absolute_timer_never_comes_right() {
    // Right: a second after the start. Wrong: at a second, which is long over, as the sum shows.
    let body = |start: &str| {
        format!(
            "{start} add.s64 %rd4, %rd4, 1000000000; mov.u32 %r9, 0;
             SPIN: add.u32 %r9, %r9, 1; mov.u64 %rd5, %globaltimer; setp.lt.u64 %p2, %rd5, %rd4;
             setp.lt.and.u32 %p2, %r9, 100, %p2; @%p2 bra SPIN; st.global.u32 [%rd1], %r9;"
        )
    };
    let count = |start: &str| run(&kernel("", &body(start)), &Setup::default()).unwrap().0[0];
    assert_eq!(count("mov.u64 %rd4, %globaltimer;"), 100);
    assert_eq!(count("mov.u64 %rd4, 0;"), 1);
}

#[test]
fn a_try_wait_may_give_up_early() {
    // The second warp arrives after a while; the first one waits, in a loop or not.
    let body = |again: &str| {
        format!(
            "mov.u32 %r3, bar; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r3], 1; bar.sync 0; mov.u32 %r9, 0;
             setp.ge.u32 %p2, %r1, 32; @%p2 bra LATER;
             TRY: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; {again} selp.u32 %r9, 1, 2, %p3; bra END;
             LATER: setp.ne.u32 %p4, %r1, 32; @%p4 bra END; mbarrier.arrive.shared.b64 _, [%r3];
             END: st.global.u32 [%rd1], %r9;"
        )
    };
    let results = |again: &str| -> Vec<u32> {
        let text = kernel(".shared .align 8 .b64 bar;", &body(again));
        (0..100)
            .map(|seed| {
                let options = RunOptions { seed, ..RunOptions::default() };
                run(&text, &Setup { threads: 64, options, ..Setup::default() }).unwrap().0[0]
            })
            .collect()
    };
    assert!(results("@!%p3 bra TRY;").iter().all(|result| *result == 1));
    let once = results("");
    assert!(once.contains(&1) && once.contains(&2), "{once:?}");
}

#[test]
fn some_seeds_hold_a_warp_back_for_long() {
    // Warp 1 sets a flag at once, and warp 0 looks at it after 400 instructions: wrong, if it takes that for long enough.
    let body = "setp.ge.u32 %p1, %r1, 32; @%p1 bra SET; mov.u32 %r9, 0;
        COUNT: add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 400; @%p2 bra COUNT;
        ld.relaxed.gpu.global.u32 %r3, [%rd2+256]; setp.eq.u32 %p3, %r1, 0; @%p3 st.global.u32 [%rd2], %r3; bra END;
        SET: mov.u32 %r4, 1; setp.eq.u32 %p4, %r1, 32; @%p4 st.relaxed.gpu.global.u32 [%rd2+256], %r4; END:";
    let missed = |seeds: &mut dyn Iterator<Item = u64>| {
        seeds
            .filter(|&seed| {
                let options = RunOptions { seed, ..RunOptions::default() };
                run(&kernel("", body), &Setup { threads: 64, options, ..Setup::default() }).unwrap().0[0] == 0
            })
            .count()
    };
    assert_eq!(missed(&mut (0..400).step_by(2)), 0);
    assert!(missed(&mut (1..400).step_by(2)) > 0);
}
