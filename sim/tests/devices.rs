//! Devices that run side by side: what one run gives does not depend on the threads it has.

mod common;

use std::num::NonZeroUsize;

use common::kernel;
use ptx_sim::{Arg, Cost, Launch, Machine, Module, RunOptions, SimError};

const DEVICES: usize = 3;
const BYTES: usize = 4096;

/// What a run leaves: its costs or its error, and the memory of all devices.
type Left = (Result<Vec<Cost>, String>, Vec<u8>);

/// Runs a body on every device, in 2 CTAs of 64 threads: `%r1` is the thread's number in its device and `%r2` the device's, `%rd2` is a
/// buffer on device 0, and `%rd3` one on the next device. Buffers start as zeros.
fn run(body: &str, options: &RunOptions) -> (Result<Vec<Cost>, SimError>, Vec<u8>) {
    let text = kernel(
        ".visible .global .align 4 .u32 number;",
        &format!(
            ".shared .align 128 .b8 tile[1024]; .shared .align 8 .b64 bar;
             mov.u32 %r3, %ctaid.x; shl.b32 %r3, %r3, 6; add.u32 %r1, %r1, %r3;
             shr.u64 %rd5, %rd3, 40; cvt.u32.u64 %r2, %rd5; add.u32 %r2, %r2, {}; rem.u32 %r2, %r2, {DEVICES};
             {body}",
            DEVICES - 2,
        ),
    );
    let module = Module::parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let mut machine = Machine::new(DEVICES);
    let buffers: Vec<u64> = (0..DEVICES)
        .map(|device| {
            let buffer = machine.alloc(device, BYTES as u64, &format!("buffer {device}")).unwrap();
            machine.fill(buffer, BYTES as u64, 0).unwrap();
            buffer
        })
        .collect();
    let launches: Vec<_> = (0..DEVICES)
        .map(|device| Launch {
            device,
            module: &module,
            entry: "k",
            grid: [2, 1, 1],
            cluster: [1, 1, 1],
            block: [64, 1, 1],
            shared_bytes: 0,
            args: vec![Arg::U64(buffers[0]), Arg::U64(buffers[(device + 1) % DEVICES])],
        })
        .collect();
    let result = machine.run(&launches, options);
    let mut memory = vec![0; DEVICES * BYTES];
    for (buffer, bytes) in buffers.iter().zip(memory.chunks_exact_mut(BYTES)) {
        machine.read(*buffer, bytes).unwrap();
    }
    (result, memory)
}

fn options(seed: u64) -> RunOptions {
    RunOptions { seed, step_limit: Some(1_000_000), checks: false, ..RunOptions::default() }
}

/// What a body leaves, which is the same on 1, 2 and 3 threads.
fn left(body: &str, seed: u64) -> Left {
    let on = |threads| {
        let (result, memory) = run(body, &RunOptions { threads: NonZeroUsize::new(threads), ..options(seed) });
        (result.map_err(|error| error.to_string()), memory)
    };
    let first = on(1);
    for threads in [2, 3] {
        assert!(on(threads) == first, "seed {seed}: {threads} threads give another run than 1");
    }
    first
}

/// Every thread draws a ticket from device 0, tells the next device, waits for all, copies what the next device was told, and leaves
/// that beside its ticket and the time.
const TALK: &str = "atom.relaxed.sys.global.add.u32 %r4, [%rd2], 1; mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd4, %rd3;
    st.global.u32 [%rd4+1024], %r4; bar.sync 0;
    and.b32 %r5, %r1, 63; setp.ne.u32 %p1, %r5, 0; @%p1 bra WAIT; red.release.sys.global.add.u32 [%rd2+4], 1;
    WAIT: ld.acquire.sys.global.u32 %r6, [%rd2+4]; setp.ne.u32 %p2, %r6, 6; @%p2 bra WAIT;
    mov.u32 %r7, bar; mov.u32 %r8, tile; @%p1 bra LANDED; mbarrier.init.shared.b64 [%r7], 1; fence.proxy.async;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r7], 512;
    add.s64 %rd6, %rd3, 1024;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r8], [%rd6], 512, [%r7];
    LANDED: bar.sync 0; LAND: mbarrier.try_wait.parity.shared.b64 %p3, [%r7], 0; @!%p3 bra LAND;
    shl.b32 %r9, %r1, 2; add.u32 %r9, %r9, %r8; ld.shared.u32 %r10, [%r9]; mov.u64 %rd7, %globaltimer; cvt.u32.u64 %r11, %rd7;
    mul.wide.u32 %rd8, %r1, 16; add.s64 %rd8, %rd8, %rd3; st.global.v4.u32 [%rd8+2048], {%r4, %r10, %r11, %r6};";

#[test]
fn a_run_does_not_depend_on_its_threads() {
    let all: Vec<Left> = (0..10).map(|seed| left(TALK, seed)).collect();
    for (costs, memory) in &all {
        let words: Vec<u32> = memory.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words[..2], [384, 6], "{costs:?}");
        let mut tickets = Vec::new();
        for device in words.chunks_exact(BYTES / 4) {
            for (thread, left) in device[512..].chunks_exact(4).enumerate() {
                assert_eq!((left[1], left[3]), (left[0], 6), "thread {thread}");
                assert_eq!(device[256 + thread], left[0]);
                tickets.push(left[0]);
            }
        }
        tickets.sort_unstable();
        assert!(tickets.iter().copied().eq(0..384));
    }
    assert!(all.windows(2).all(|two| two[0] != two[1]), "two seeds give the same run");
}

#[test]
fn checked_runs_repeat_and_find_nothing_in_what_is_right() {
    let checked = |seed| run(TALK, &RunOptions { checks: true, ..options(seed) });
    for seed in 0..5 {
        let (result, memory) = checked(seed);
        assert_eq!(result.as_ref().map_err(ToString::to_string), checked(seed).0.as_ref().map_err(ToString::to_string));
        assert!(result.is_ok() && memory == checked(seed).1, "{result:?}");
    }
}

#[test]
fn of_several_errors_one_is_reported_on_any_number_of_threads() {
    let trap = "mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd4, %rd3; st.global.u32 [%rd4], %r2; trap;";
    let away = "mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd4, %rd3; ld.global.u32 %r4, [%rd4+4000];";
    let reports: Vec<_> =
        (0..10).map(|seed| [left(trap, seed).0.unwrap_err(), left(away, seed).0.unwrap_err()]).collect();
    for [trap, away] in &reports {
        assert!(trap.contains("device "), "{trap}");
        assert!(away.contains("4 bytes past its end") || away.contains("`buffer "), "{away}");
    }
    assert!(reports.iter().any(|report| report != &reports[0]), "every seed has the same error first");
}

#[test]
fn what_never_comes_from_a_peer_is_told_from_a_deadlock() {
    let poll = "WAIT: ld.acquire.sys.global.u32 %r4, [%rd3]; setp.eq.u32 %p1, %r4, 0; @%p1 bra WAIT;";
    let wait = "setp.ne.u32 %p1, %r1, 0; @%p1 exit; setp.eq.u32 %p2, %r2, 0; @%p2 exit; bar.sync 1, 64;";
    for (body, devices, is_livelock) in [(poll, 3, true), (wait, 2, false)] {
        for threads in [1, 2] {
            let stuck = match run(body, &RunOptions { threads: NonZeroUsize::new(threads), ..options(3) }).0 {
                Err(SimError::Livelock(stuck)) if is_livelock => stuck,
                Err(SimError::Deadlock(stuck)) if !is_livelock => stuck,
                other => panic!("{other:?}"),
            };
            let mut named: Vec<_> = stuck.iter().map(|stuck| stuck.position.device).collect();
            assert!(named.is_sorted());
            named.dedup();
            assert_eq!(named.len(), devices);
        }
    }
}

#[test]
fn time_passes_for_all_devices() {
    // Each device waits for a word that only a device that has given up a wait of 2 ms writes; all of them see times close to each other.
    let body = "setp.ne.u32 %p1, %r1, 0; @%p1 exit; setp.ne.u32 %p2, %r2, 1; @%p2 bra WAIT;
        mov.u64 %rd8, %globaltimer; SLEEP: mov.u64 %rd6, %globaltimer; sub.u64 %rd6, %rd6, %rd8; ld.relaxed.sys.global.u32 %r5, [%rd3+8]; setp.lt.u64 %p3, %rd6, 2000000; @%p3 bra SLEEP;
        st.release.sys.global.u32 [%rd2+64], 1;
        WAIT: ld.acquire.sys.global.u32 %r4, [%rd2+64]; setp.eq.u32 %p4, %r4, 0; @%p4 bra WAIT;
        mov.u64 %rd7, %globaltimer; st.global.u64 [%rd3], %rd7;";
    let (costs, memory) = left(body, 1);
    let times = memory.chunks_exact(BYTES).map(|device| u64::from_le_bytes(device[..8].try_into().unwrap()));
    let times: Vec<_> = times.collect();
    assert!(
        times.iter().all(|time| *time >= 2_000_000) && costs.unwrap().iter().all(|cost| cost.polls < 10_000),
        "{times:?}"
    );
    assert!(times.iter().max().unwrap() - times.iter().min().unwrap() < 1_000_000, "{times:?}");
}

/// Each of two devices tells the other of its launch, and waits for the other's word of the same one. `%rd4` is where, by the number of
/// the launch, which lies at `out + 64` and which the launch itself counts up.
const EPOCHS: &str = "setp.ne.u32 %p1, %r1, 0; @%p1 exit; ld.global.u32 %r4, [%rd2+64]; and.b32 %r5, %r4, 1;
    mul.wide.u32 %rd4, %r5, 4; add.s64 %rd5, %rd3, %rd4; add.s64 %rd6, %rd2, %rd4; add.u32 %r6, %r4, 1;
    st.release.sys.global.u32 [%rd5], %r6;
    WAIT: ld.acquire.sys.global.u32 %r7, [%rd6]; setp.ne.u32 %p2, %r7, %r6; @%p2 bra WAIT;
    st.global.u32 [%rd2+64], %r6;";

/// Runs it four times on each of two devices: in one run, in order, or in one run after the other.
fn epochs(body: &str, overlap: bool, options: &RunOptions) -> Result<Vec<u32>, SimError> {
    let module = Module::parse(&kernel("", body)).unwrap();
    let mut machine = Machine::new(2);
    let buffers = [0, 1].map(|device| machine.alloc(device, 128, "words").unwrap());
    buffers.iter().for_each(|buffer| machine.fill(*buffer, 128, 0).unwrap());
    let launches = |count: usize| -> Vec<Launch<'_>> {
        let one = |device: usize| Launch {
            device,
            module: &module,
            entry: "k",
            grid: [1, 1, 1],
            cluster: [1, 1, 1],
            block: [32, 1, 1],
            shared_bytes: 0,
            args: vec![Arg::U64(buffers[device]), Arg::U64(buffers[1 - device])],
        };
        (0..2 * count).map(|index| one(index % 2)).collect()
    };
    if overlap {
        machine.run(&launches(4), &RunOptions { in_order: true, ..options.clone() })?;
    } else {
        (0..4).try_for_each(|_| machine.run(&launches(1), options).map(|_| ()))?;
    }
    let number = |buffer: u64| {
        let mut bytes = [0; 4];
        machine.read(buffer + 64, &mut bytes).map(|()| u32::from_le_bytes(bytes))
    };
    buffers.map(number).into_iter().collect()
}

#[test]
fn launches_of_one_device_overlap_with_the_next_of_another() {
    // Wrong: one place for all launches, in which the next launch's word comes before this one's was read.
    let one_place = EPOCHS.replace("and.b32 %r5, %r4, 1;", "mov.u32 %r5, 0;");
    let mut missed = 0;
    for seed in 0..40 {
        for checks in [false, true] {
            let options = RunOptions { checks, ..options(seed) };
            assert_eq!(epochs(EPOCHS, true, &options).unwrap_or_else(|error| panic!("seed {seed}: {error}")), [4, 4]);
            assert_eq!(epochs(EPOCHS, false, &options).unwrap(), [4, 4]);
            assert_eq!(epochs(&one_place, false, &options).unwrap(), [4, 4]);
            missed += u32::from(epochs(&one_place, true, &options).is_ok());
        }
    }
    assert!(missed < 72, "{missed} of 80");
}

#[test]
fn a_launch_comes_behind_all_of_the_one_before() {
    // The first launch stores by all its threads, and by a bulk copy that it does not wait for; the second reads that by `ld.global.nc`, by
    // another warp than wrote it, and copies it on.
    let body = "mov.u32 %r2, tile; ld.global.u32 %r4, [%rd2+1020]; setp.ne.u32 %p1, %r4, 0; @%p1 bra SECOND;
        st.global.u32 [%rd1], %r1; shl.b32 %r5, %r1, 2; add.u32 %r5, %r5, %r2; st.shared.u32 [%r5], %r1; fence.proxy.async;
        bar.sync 0; setp.ne.u32 %p2, %r1, 0; @%p2 exit; mov.u32 %r6, 1; st.global.u32 [%rd2+1020], %r6;
        cp.async.bulk.global.shared::cta.bulk_group [%rd2+256], [%r2], 256;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; exit;
        SECOND: xor.b32 %r7, %r1, 63; mul.wide.u32 %rd4, %r7, 4; add.s64 %rd5, %rd4, %rd2;
        ld.global.nc.u32 %r8, [%rd5]; ld.global.nc.u32 %r9, [%rd5+256]; add.u32 %r8, %r8, %r9; st.global.u32 [%rd1+512], %r8;";
    let module = Module::parse(&kernel(".shared .align 128 .b8 tile[256];", body)).unwrap();
    for seed in 0..20 {
        for checks in [false, true] {
            let mut machine = Machine::new(2);
            let out = machine.alloc(0, 1024, "out").unwrap();
            machine.fill(out, 1024, 0).unwrap();
            let launch = Launch {
                device: 0,
                module: &module,
                entry: "k",
                grid: [1, 1, 1],
                cluster: [1, 1, 1],
                block: [64, 1, 1],
                shared_bytes: 0,
                args: vec![Arg::U64(out), Arg::U64(0)],
            };
            let options = RunOptions { in_order: true, checks, ..options(seed) };
            machine.run(&[launch.clone(), launch], &options).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let mut bytes = [0; 256];
            machine.read(out + 512, &mut bytes).unwrap();
            let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
            assert!(words.eq((0..64).map(|thread| 2 * (63 - thread))));
        }
    }
}
