//! The `ptx-sim` command.

use std::process::{Command, Output};

const NVCC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/nvcc.ptx");

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ptx-sim")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_kernel_runs_and_shows_its_result() {
    let ones = format!("f32s:{}", vec!["1"; 300].join(","));
    let output = run(&[
        "run", NVCC, "--entry", "reduce", "--grid", "3", "--block", "256", "--arg", &ones, "--arg", "zeros:4", "--arg",
        "u32:300", "--show", "1:f32", "--seeds", "2",
    ]);
    let stdout = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(stdout.matches("parameter 1: 300\n").count(), 2, "{stdout}");
    assert!(stdout.contains("reduce, seed 1: "), "{stdout}");
}

#[test]
fn errors_of_the_kernel_and_of_the_input_are_told_apart() {
    let too_short = ["run", NVCC, "--entry", "reduce", "--arg", "f32s:1,2", "--arg", "zeros:4", "--arg", "u32:3"];
    for (arguments, code, expected) in [
        (&too_short[..], 1, "out of bounds"),
        (&["run", NVCC], 2, "choose one with --entry"),
        (&["run", NVCC, "--entry", "nothing"], 2, "no such entry"),
        (&["run", "nothing.ptx"], 2, "cannot read nothing.ptx"),
        (&["run", NVCC, "--entry", "reduce", "--show", "0:f32"], 2, "parameter 0 is no buffer"),
    ] {
        let output = run(arguments);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}

#[test]
fn kernels_are_listed() {
    let output = run(&["list", NVCC]);
    assert!(text(&output.stdout).lines().any(|entry| entry == "product"), "{output:?}");
}

/// A file for tests; each has a name of its own.
fn scratch(name: &str) -> String {
    format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"))
}

fn success(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Adds a structure's `.f32` at 0, times its `.s16` at 4, to what a pointer at 8 points to; and an `.u8` of its own.
const STRUCTURE: &str = ".version 8.6\n.target sm_90a\n.address_size 64
.visible .entry add(.param .align 8 .b8 all[16], .param .u8 more) { .reg .f32 %f<5>; .reg .s16 %h<2>; .reg .u16 %m<2>;
.reg .b64 %rd<4>; .reg .u32 %r<2>; ld.param.f32 %f1, [all]; ld.param.s16 %h1, [all+4]; ld.param.u64 %rd1, [all+8];
ld.param.u8 %m1, [more]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.u64 %rd1, %rd1, %rd2;
cvt.rn.f32.s16 %f2, %h1; cvt.rn.f32.u16 %f4, %m1; ld.global.f32 %f3, [%rd1]; fma.rn.f32 %f3, %f1, %f2, %f3;
add.f32 %f3, %f3, %f4; st.global.f32 [%rd1], %f3; ret; }";

#[test]
fn structures_and_npy_files() {
    let (ptx, array, wrong) = (scratch("structure.ptx"), scratch("structure.npy"), scratch("structure_wrong.npy"));
    std::fs::write(&ptx, STRUCTURE).unwrap();
    // 1.5 * -2 + 7 = 4, added to 0, 1, 2, 3.
    let common = ["run", &ptx, "--block", "4", "--arg", "struct:f32:1.5,s16:-2,ptr:x", "--arg", "u8:7"];
    let saves = format!("x:{array}");
    let first = [&common[..], &["--buffer", "x=f32s:0,1,2,3", "--save", &saves, "--show", "x:f32"]].concat();
    assert!(success(&first).contains("x: 4 5 6 7\n"));
    // What was saved comes back: 4 is added again.
    let (buffer, other) = (format!("x=npy:{array}"), format!("x:{wrong}"));
    let again = [&common[..], &["--buffer", &buffer, "--show", "x:f32", "--save", &other]].concat();
    assert!(success(&again).contains("x: 8 9 10 11\n"));
    let expects = |path: &str, tolerance: &str| {
        let expected = format!("x:{path}:f32:{tolerance}");
        run(&[&common[..], &["--buffer", "x=f32s:0,1,2,3", "--expect", &expected]].concat())
    };
    assert!(expects(&array, "0").status.success());
    assert!(expects(&wrong, "4").status.success());
    let output = expects(&wrong, "3.5");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("element 3 is 7, 11 expected")
            || text(&output.stderr).contains("is 4, 8 expected")
    );
}

/// Copies a tile of 8 x 4 words through a tensor map that is a parameter, and stores it as it lies in shared memory.
const TILE: &str = ".version 8.6\n.target sm_90a\n.address_size 64
.visible .entry tile(.param .align 64 .b8 map[128], .param .u64 out) { .reg .b64 %rd<6>; .reg .b32 %r<8>; .reg .pred %p<3>;
.shared .align 128 .b8 place[128]; .shared .align 8 .b64 full;
mov.b64 %rd1, map; cvta.param.u64 %rd1, %rd1; ld.param.u64 %rd2, [out]; mov.u32 %r1, %tid.x; mov.u32 %r2, place;
mov.u32 %r3, full; setp.ne.u32 %p1, %r1, 0; @%p1 bra WAIT; mbarrier.init.shared.b64 [%r3], 1; fence.proxy.async.shared::cta;
mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 128;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd1, {8, 2}], [%r3];
WAIT: bar.sync 0; AGAIN: mbarrier.try_wait.parity.shared.b64 %p2, [%r3], 0; @!%p2 bra AGAIN;
shl.b32 %r4, %r1, 2; add.u32 %r5, %r2, %r4; ld.shared.u32 %r6, [%r5]; cvt.u64.u32 %rd3, %r4; add.u64 %rd3, %rd3, %rd2;
st.global.u32 [%rd3], %r6; ret; }";

#[test]
fn tensor_maps_as_parameters() {
    let ptx = scratch("tile.ptx");
    std::fs::write(&ptx, TILE).unwrap();
    let values: Vec<String> = (0..16 * 6).map(|i| i.to_string()).collect();
    let buffer = format!("x=u32s:{}", values.join(","));
    let map = "m=x,shape=16x6,box=8x4,swizzle=none";
    let stdout = success(&[
        "run",
        &ptx,
        "--buffer",
        &buffer,
        "--tensor-map",
        map,
        "--arg",
        "map:m",
        "--arg",
        "new:u32:4x8",
        "--show",
        "1:u32",
    ]);
    // Rows 2 to 5 of 16, columns 8 to 15.
    let expected: Vec<String> =
        (2..6).flat_map(|row| (8..16).map(move |column| (16 * row + column).to_string())).collect();
    assert!(stdout.contains(&format!("parameter 1: {}\n", expected.join(" "))), "{stdout}");
}

/// Two devices: the first launch of a plan writes to the other's memory and raises a flag there, for which the second waits.
const PEERS: &str = ".version 8.6\n.target sm_90a\n.address_size 64
.visible .entry send(.param .u64 to, .param .u64 flag, .param .f64 value) { .reg .b64 %rd<4>; .reg .f64 %fd<2>;
ld.param.u64 %rd1, [to]; ld.param.u64 %rd2, [flag]; ld.param.f64 %fd1, [value]; st.global.f64 [%rd1], %fd1;
st.release.sys.global.u32 [%rd2], 1; ret; }
.visible .entry receive(.param .u64 from, .param .u64 flag) { .reg .b64 %rd<4>; .reg .f64 %fd<2>; .reg .u32 %r<2>; .reg .pred %p<2>;
ld.param.u64 %rd1, [from]; ld.param.u64 %rd2, [flag]; WAIT: ld.acquire.sys.global.u32 %r1, [%rd2]; setp.eq.u32 %p1, %r1, 0;
@%p1 bra WAIT; ld.global.f64 %fd1, [%rd1]; add.f64 %fd1, %fd1, %fd1; st.global.f64 [%rd1+8], %fd1; ret; }
.visible .entry again(.param .u64 at) { .reg .b64 %rd<2>; .reg .f64 %fd<2>; ld.param.u64 %rd1, [at]; ld.global.f64 %fd1, [%rd1];
add.f64 %fd1, %fd1, 0d3FF0000000000000; st.global.f64 [%rd1], %fd1; ret; }";

#[test]
fn plans_have_several_devices_and_launches() {
    let (ptx, plan) = (scratch("peers.ptx"), scratch("peers.plan"));
    std::fs::write(&ptx, PEERS).unwrap();
    let steps = format!(
        "devices 2\nbuffer x@1=new:f64:2\nbuffer flag@1=zeros:4  # raised by device 0\n
         launch {ptx} --entry send --block 1 --arg ptr:x --arg ptr:flag --arg f64:1.25
         launch {ptx} --entry receive --device 1 --block 1 --arg ptr:x --arg ptr:flag\nrun\nshow x:f64
         launch {ptx} --entry again --device 1 --block 1 --arg ptr:x+8\nrun\nshow x:f64\n"
    );
    std::fs::write(&plan, steps).unwrap();
    let stdout = success(&["plan", &plan, "--seeds", "5"]);
    assert_eq!(stdout.matches("x: 1.25 2.5\n").count(), 5, "{stdout}");
    assert_eq!(stdout.matches("x: 1.25 3.5\n").count(), 5, "{stdout}");
    std::fs::write(&plan, "run\nbuffer x\n").unwrap();
    let output = run(&["plan", &plan]);
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("line 2"), "{}", text(&output.stderr));
}

#[test]
fn checks_are_waived_and_reported() {
    let ptx = scratch("unwritten.ptx");
    let body = "ld.shared.u32 %r1, [place];\nld.shared.u32 %r1, [place+4]; ret;";
    std::fs::write(
        &ptx,
        format!(
            ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ .reg .u32 %r<2>;
             .shared .align 4 .b8 place[8];\n{body} }}\n.visible .entry bad() {{ wild.u32; ret; }}"
        ),
    )
    .unwrap();
    let common = ["run", &ptx, "--entry", "k"];
    assert_eq!(run(&common).status.code(), Some(1));
    success(&[&common[..], &["--allow", "uninitialised-read"]].concat());
    let output = run(&[&common[..], &["--keep-going"]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr).matches("uninitialised: 4 bytes").count(), 2, "{}", text(&output.stderr));
    let output = run(&[&common[..], &["--allow", "everything"]].concat());
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("there are data-race"));
    let output = run(&["list", &ptx]);
    assert!(text(&output.stdout) == "k\nbad\n" && text(&output.stderr).contains("bad cannot run: PTX line"));
    let output = run(&["run", &ptx, "--entry", "bad"]);
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("`wild.u32` is not supported"));
}

/// The example's plan: 10 * (1, 2, 3, 4) + (5, 6, 7, 8), and 10 * (5, 6, 7, 8).
#[test]
fn the_example_of_a_plan_runs() {
    let directory = env!("CARGO_MANIFEST_DIR");
    let output = Command::new(env!("CARGO_BIN_EXE_ptx-sim"))
        .args(["plan", "examples/saxpy.plan"])
        .current_dir(directory)
        .output()
        .unwrap();
    let stdout = text(&output.stdout);
    assert!(stdout.contains("y: 15 26 37 48\n") && stdout.contains("y1: 50 60 70 80\n"), "{stdout}{output:?}");
}
