//! Small kernels of kinds that compilers make, each of which once gave wrong values, wrong time or a wrong error.

mod common;

use common::{Setup, error, kernel, lanes, run};
use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType};
use ptx_sim::{Arg, Check, Launch, Machine, Module, RunOptions, SimError, TensorMap, TensorMapSpec};

fn seed(seed: u64) -> RunOptions {
    RunOptions { seed, step_limit: Some(1_000_000), ..RunOptions::default() }
}

/// Runs an entry of `ptx` in one CTA on a buffer of `words` words, its only parameter; gives the buffer.
fn run_entry(ptx: &str, entry: &str, threads: u32, words: usize) -> Result<Vec<u32>, SimError> {
    let module = Module::parse(ptx).unwrap_or_else(|error| panic!("{error}"));
    let mut machine = Machine::new(1);
    let out = machine.alloc(0, 4 * words as u64, "out")?;
    machine.fill(out, 4 * words as u64, 0)?;
    let launch = Launch {
        device: 0,
        module: &module,
        entry,
        grid: [1; 3],
        cluster: [1; 3],
        block: [threads, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::U64(out)],
    };
    machine.run(&[launch], &seed(0))?;
    let mut bytes = vec![0; 4 * words];
    machine.read(out, &mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect())
}

/// The carry flag of `sub.cc` is "no borrow": lane 5 - 7 borrows, 7 - 7 and 9 - 7 do not. `addc` adds the flag, and `subc`
/// subtracts one where it is clear.
#[test]
fn the_carry_flag_of_a_subtraction_is_no_borrow() {
    let flags = |second: &str| {
        lanes(&format!(
            "add.u32 %r2, %r1, 5; sub.cc.u32 %r3, %r2, 7; {second} %r4, 0, 0; and.b32 %r4, %r4, 3; st.global.u32 [%rd1], %r4;"
        ))
    };
    assert_eq!(flags("addc.u32")[..4], [0, 0, 1, 1]);
    assert_eq!(flags("subc.u32")[..4], [3, 3, 0, 0]);
    // A chain of three words: 2^64 - 1.
    let words = lanes(
        "sub.cc.u32 %r2, 0, 1; subc.cc.u32 %r3, 0, 0; subc.u32 %r4, 1, 0; add.u32 %r3, %r3, %r2; add.u32 %r4, %r4, %r3;
         st.global.u32 [%rd1], %r4;",
    );
    assert_eq!(words[0], u32::MAX - 1);
}

/// nvcc's `unsigned __int128` product, and its quotient by 32 bits.
#[test]
fn numbers_of_128_bits() {
    let module = Module::parse(include_str!("data/i128.ptx")).unwrap();
    let a: Vec<u64> = (0..32).map(|i| u64::MAX / (i + 1)).collect();
    let b: Vec<u64> = (0..32).map(|i| 0x9e37_79b9_7f4a_7c15 >> i).collect();
    let divisor: Vec<u32> = (0..32).map(|i| 3 + i * 77_777_777).collect();
    let mut machine = Machine::new(1);
    let mut upload = |bytes: &[u8]| {
        let address = machine.alloc(0, bytes.len() as u64, "in").unwrap();
        machine.write(address, bytes).unwrap();
        Arg::U64(address)
    };
    let args = [bytemuck::cast_slice(&a), bytemuck::cast_slice(&b), bytemuck::cast_slice(&divisor)].map(&mut upload);
    let out = machine.alloc(0, 32 * 32, "out").unwrap();
    let launch = Launch {
        device: 0,
        module: &module,
        entry: "d128",
        grid: [1; 3],
        cluster: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 0,
        args: args.into_iter().chain([Arg::U64(out), Arg::U32(32)]).collect(),
    };
    machine.run(&[launch], &seed(0)).unwrap();
    let mut words = vec![0u64; 4 * 32];
    machine.read(out, bytemuck::cast_slice_mut(&mut words)).unwrap();
    for i in 0..32 {
        let product = u128::from(a[i]) * u128::from(b[i]);
        let quotient = product / u128::from(divisor[i] | 1);
        let parts = [product as u64, (product >> 64) as u64, quotient as u64, (quotient >> 64) as u64];
        assert_eq!(words[4 * i..4 * i + 4], parts, "row {i}");
    }
}

const FIBONACCI: &str = "
.func (.param .b32 result) fib (.param .b32 number)
{ .reg .pred %p<2>; .reg .b32 %r<9>; .reg .b64 %rd<2>;
  ld.param.u32 %r8, [number]; setp.lt.s32 %p1, %r8, 2; @%p1 bra SMALL;
  add.s32 %r4, %r8, -1;
  { .param .b32 param0; st.param.b32 [param0], %r4; .param .b32 retval0; call.uni (retval0), fib, (param0);
    ld.param.b32 %r5, [retval0]; }
  add.s32 %r6, %r8, -2;
  { .param .b32 param0; st.param.b32 [param0], %r6; .param .b32 retval0; call.uni (retval0), fib, (param0);
    ld.param.b32 %r7, [retval0]; }
  add.s32 %r8, %r7, %r5;
SMALL: st.param.b32 [result], %r8; ret; }";

/// Each lane computes the Fibonacci number of its index modulo 12.
#[test]
fn recursion_keeps_what_belongs_to_each_call() {
    let body = "rem.u32 %r2, %r1, 12; { .param .b32 a; .param .b32 b; st.param.b32 [a], %r2; call.uni (b), fib, (a);
                ld.param.b32 %r3, [b]; } st.global.u32 [%rd1], %r3;";
    let (words, _) = run(&kernel(FIBONACCI, body), &Setup::default()).unwrap();
    let numbers = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89];
    assert_eq!(words[..32], (0..32).map(|lane| numbers[lane % 12]).collect::<Vec<_>>());
}

/// Two functions call each other, under a guard whose register the call changes: is the number of lane odd?
#[test]
fn recursion_of_two_functions_with_guarded_calls() {
    let function = |name: &str, other: &str, at_zero: u32| {
        format!(
            ".func (.param .b32 result) {name} (.param .b32 number)
             {{ .reg .pred %p<2>; .reg .b32 %r<5>; .param .b32 a; .param .b32 b;
                ld.param.u32 %r1, [number]; setp.ne.u32 %p1, %r1, 0; mov.u32 %r2, {at_zero}; sub.u32 %r3, %r1, 1;
                st.param.b32 [a], %r3; @%p1 call (b), {other}, (a); @%p1 ld.param.b32 %r2, [b];
                st.param.b32 [result], %r2; ret; }}"
        )
    };
    let declaration = ".func (.param .b32 result) is_odd (.param .b32 number);";
    let globals = format!("{declaration}\n{}\n{}", function("is_even", "is_odd", 1), function("is_odd", "is_even", 0));
    let body = "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call (b), is_odd, (a); ld.param.b32 %r3, [b]; }
                st.global.u32 [%rd1], %r3;";
    let (words, _) = run(&kernel(&globals, body), &Setup::default()).unwrap();
    assert_eq!(words[..32], (0..32).map(|lane| lane % 2).collect::<Vec<_>>());
}

/// A function that may call itself would need its local arrays anew in each call: that is refused when the module is read.
#[test]
fn recursion_with_addresses_of_local_memory_is_refused() {
    let function =
        ".func f (.param .b32 n) { .reg .b64 %rd<2>; .local .b8 place[8]; mov.u64 %rd1, place; call f, (n); ret; }";
    let body = "{ .param .b32 a; st.param.b32 [a], %r1; call f, (a); }";
    let message = Module::parse(&kernel(function, body)).unwrap_err().to_string();
    assert!(
        message.contains("the address of `place`, in local memory, in a function that may call itself"),
        "{message}"
    );
}

/// 100 and 400 sleeps of 1000 ns take 100 and 400 us, and are no livelock.
#[test]
fn sleep_takes_its_time() {
    for count in [100, 400] {
        let body = format!(
            "mov.u32 %r2, 0; LOOP: nanosleep.u32 1000; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, {count}; @%p1 bra LOOP;
             st.global.u32 [%rd1], %r2;"
        );
        let (words, cost) = run(&kernel("", &body), &Setup::default()).unwrap();
        assert_eq!(words[0], count);
        let expected = u64::from(count) * 1000;
        assert!((expected..expected * 5 / 4).contains(&cost.simulated_ns), "{} ns", cost.simulated_ns);
    }
}

/// CTA 0 sets a flag after 100 us of sleep; CTA 1 polls it until a deadline. One of 10 ms does not pass, one of 50 us does.
#[test]
fn deadlines_do_not_pass_before_what_comes_earlier() {
    for (deadline, expected) in [(10_000_000, 1), (50_000, 2)] {
        let body = format!(
            "mov.u32 %r9, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 ret; setp.eq.u32 %p1, %r9, 1; @%p1 bra WAIT;
             mov.u32 %r2, 0; LOOP: nanosleep.u32 1000; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 100; @%p1 bra LOOP;
             membar.gl; st.volatile.global.u32 [%rd2+8], 1; ret;
             WAIT: mov.u64 %rd4, %globaltimer; mov.u32 %r3, 1;
             POLL: mov.u64 %rd5, %globaltimer; sub.u64 %rd5, %rd5, %rd4; setp.gt.u64 %p2, %rd5, {deadline};
             @%p2 bra LATE; nanosleep.u32 200; ld.volatile.global.u32 %r4, [%rd2+8]; setp.eq.u32 %p2, %r4, 0; @%p2 bra POLL;
             bra.uni DONE; LATE: mov.u32 %r3, 2; DONE: st.global.u32 [%rd2], %r3;"
        );
        for number in 0..8 {
            let setup = Setup { ctas: 2, options: seed(number), ..Setup::default() };
            assert_eq!(run(&kernel("", &body), &setup).unwrap().0[0], expected, "deadline {deadline}, seed {number}");
        }
    }
}

/// Kernels with 12,000 bytes of static shared memory, one with 128, and one that uses what the module has.
fn static_shared() -> String {
    let entry = |name: &str, declaration: &str, array: &str, offset: u32| {
        format!(
            ".visible .entry {name}(.param .u64 out) {{ .reg .b32 %r<4>; .reg .b64 %rd<4>; {declaration}
             ld.param.u64 %rd1, [out]; mov.u32 %r1, %tid.x; mul.lo.u32 %r2, %r1, 4; mov.u32 %r3, {array};
             add.u32 %r2, %r2, %r3; st.shared.u32 [%r2+{offset}], %r1; mov.u32 %r3, %total_smem_size;
             st.global.u32 [%rd1], %r3; ret; }}\n"
        )
    };
    let own = |name: &str, bytes: u32, offset: u32| {
        entry(name, &format!(".shared .align 4 .b8 array_{name}[{bytes}];"), &format!("array_{name}"), offset)
    };
    let kernels: String = ["a", "b", "c", "d"].map(|name| own(name, 12_000, 0)).concat();
    let common = ".shared .align 16 .b8 common[256];\n.extern .shared .align 16 .b8 pool[];\n";
    let header = ".version 8.6\n.target sm_90a\n.address_size 64\n";
    let uses = entry("uses_common", "", "common", 0);
    format!("{header}{common}{}{kernels}{uses}", own("small", 128, 64))
}

/// A kernel's shared memory is what it uses itself: beside the 1024 bytes of the system 128, 12,000 and 256 bytes.
#[test]
fn static_shared_memory_is_each_kernels_own() {
    let ptx = static_shared();
    for (entry, bytes) in [("a", 12_000), ("d", 12_000), ("uses_common", 256)] {
        assert_eq!(run_entry(&ptx, entry, 32, 1).unwrap()[0], 1024 + bytes, "{entry}");
    }
    // Lane 16 stores at 64 + 16 * 4, the first byte after the kernel's 128.
    let message = run_entry(&ptx, "small", 32, 1).unwrap_err().to_string();
    assert!(message.contains("out of bounds: 4 bytes at shared memory 0x480"), "{message}");
}

/// Dynamic shared memory starts after each kernel's own static memory: at 1024 in one kernel, at 1024 + 48 in the other.
#[test]
fn dynamic_shared_memory_follows_each_kernels_static_memory() {
    let entry = |name: &str, declaration: &str| {
        format!(
            ".visible .entry {name}(.param .u64 out) {{ .reg .b32 %r<4>; .reg .b64 %rd<4>; {declaration}
             ld.param.u64 %rd1, [out]; mov.u32 %r1, pool; st.shared.u32 [pool+4], %r1; ld.shared.u32 %r2, [%r1+4];
             mov.u64 %rd2, pool; cvta.shared.u64 %rd2, %rd2; ld.u32 %r3, [%rd2+4]; st.global.v2.u32 [%rd1], {{%r2, %r3}};
             ret; }}\n"
        )
    };
    let ptx = format!(
        ".version 8.6\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 pool[];\n{}{}",
        entry("plain", ""),
        entry("with_static", ".shared .align 4 .b8 own[36]; st.shared.u32 [own], 0;")
    );
    let module = Module::parse(&ptx).unwrap();
    for (entry, expected) in [("plain", 1024), ("with_static", 1024 + 48)] {
        let mut machine = Machine::new(1);
        let out = machine.alloc(0, 8, "out").unwrap();
        let launch = Launch {
            device: 0,
            module: &module,
            entry,
            grid: [1; 3],
            cluster: [1; 3],
            block: [1; 3],
            shared_bytes: 8,
            args: vec![Arg::U64(out)],
        };
        machine.run(&[launch], &seed(0)).unwrap();
        let mut words = [0u32; 2];
        machine.read(out, bytemuck::bytes_of_mut(&mut words)).unwrap();
        assert_eq!(words, [expected; 2], "{entry}");
    }
}

/// As `cuda_fp16.h` has it: directives without a space, and comparisons of packed halves. 1 > 0.5, 1 > 2 is false.
#[test]
fn halves_as_cuda_has_them() {
    let words = lanes(
        "mov.b32 %r2, 0x3c003c00; mov.b32 %r3, 0x38004000;
         {.reg.b16         hl, hu;         .reg.pred low, high;
          mov.b32 {hl, hu}, %r2; mov.b32 %r4, {hu, hl};
          set.gt.f16x2.f16x2 %r5, %r4, %r3; set.gt.u32.f16x2 %r6, %r4, %r3;
          setp.gt.f16x2 low|high, %r4, %r3; selp.u32 %r7, 1, 0, low; selp.u32 %r8, 2, 0, high; or.b32 %r7, %r7, %r8;
          set.gt.u16.f16 %h1, hl, 0x4000; cvt.u32.u16 %r9, %h1; }
         st.global.u32 [%rd1], %r5; st.global.u32 [%rd1+128], %r6; st.global.u32 [%rd1+256], %r7;",
    );
    assert_eq!(words[0], 0x3c00_0000);
    let (words, _) = run(
        &kernel(
            "",
            "mov.b32 %r4, 0x3c003c00; mov.b32 %r3, 0x38004000; setp.gt.f16x2 %p1|%p2, %r4, %r3; selp.u32 %r7, 1, 0, %p1;
             selp.u32 %r8, 2, 0, %p2; or.b32 %r7, %r7, %r8; set.gt.u32.f16x2 %r6, %r4, %r3; st.global.v2.u32 [%rd2], {%r6, %r7};",
        ),
        &Setup { threads: 1, ..Setup::default() },
    )
    .unwrap();
    assert_eq!(words[..2], [0xffff_0000, 2]);
}

/// As `cuda::pipeline` does: every thread copies, arrives when its copies are done (in addition to the 64 arrivals that are
/// expected), and arrives itself; at the end the last warp invalidates the mbarrier that all have waited at.
#[test]
fn asynchronous_arrivals_that_the_phase_waits_for_too() {
    let globals = ".shared .align 16 .b8 place[1024]; .shared .align 8 .b64 full; .shared .align 4 .u32 users;";
    let body = "mov.u32 %r9, full; mov.u32 %r8, users; setp.ne.u32 %p1, %r1, 0; @%p1 bra READY;
        mbarrier.init.shared.b64 [%r9], 64; st.relaxed.cta.shared.b32 [%r8], 64;
        READY: bar.sync 0; mov.u32 %r10, place; mad.lo.u32 %r11, %r1, 16, %r10; mul.wide.u32 %rd4, %r1, 16;
        add.u64 %rd4, %rd4, %rd3; cp.async.cg.shared.global [%r11], [%rd4], 16, 16;
        cp.async.mbarrier.arrive.shared.b64 [%r9]; mbarrier.arrive.shared::cta.b64 %rd5, [%r9], 1;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0; @!%p2 bra WAIT;
        xor.b32 %r12, %r1, 63; mad.lo.u32 %r12, %r12, 16, %r10; ld.shared.u32 %r13, [%r12]; st.global.u32 [%rd1], %r13;
        activemask.b32 %r14; match.any.sync.b32 %r15, %r8, %r14; mov.u32 %r16, %laneid; setp.ne.u32 %p3, %r16, 0;
        @%p3 ret; popc.b32 %r17, %r15; neg.s32 %r18, %r17; fence.sc.cta;
        atom.add.acquire.cta.shared.u32 %r19, [%r8], %r18; setp.ne.u32 %p3, %r19, %r17; @%p3 ret;
        mbarrier.inval.shared.b64 [%r9];";
    let input: Vec<u8> = (0..64u32).flat_map(|i| [i; 4]).flat_map(u32::to_le_bytes).collect();
    for number in 0..50 {
        let setup = Setup { threads: 64, input: input.clone(), options: seed(number), ..Setup::default() };
        let (words, _) = run(&kernel(globals, body), &setup).unwrap_or_else(|error| panic!("seed {number}: {error}"));
        assert_eq!(words[..64], (0..64).rev().collect::<Vec<u32>>());
    }
}

/// Producers write, each with `producer` after its store, meet at a barrier, and one sets a flag; consumers see it in one
/// thread, meet, and read, each with `consumer` before.
fn flag(producer: &str, consumer: &str) -> String {
    kernel(
        "",
        &format!(
            "mov.u32 %r9, %ctaid.x; setp.eq.u32 %p1, %r9, 0; setp.ne.u32 %p2, %r1, 0; @%p1 bra PRODUCE;
             @%p2 bra MEET; POLL: ld.volatile.global.u32 %r3, [%rd3]; setp.eq.u32 %p3, %r3, 0; @%p3 bra POLL;
             MEET: bar.sync 0; {consumer} ld.global.u32 %r4, [%rd1]; st.global.u32 [%rd1+1024], %r4; ret;
             PRODUCE: add.u32 %r5, %r1, 42; st.global.u32 [%rd1], %r5; {producer} bar.sync 0; @%p2 ret;
             st.volatile.global.u32 [%rd3], 1;"
        ),
    )
}

/// `membar` is `fence.sc`: all threads' fences, a barrier and one flag order what they wrote, and nothing less does.
#[test]
fn fences_in_one_order_carry_over_a_barrier() {
    for number in 0..30 {
        let setup = Setup { ctas: 2, threads: 64, options: seed(number), ..Setup::default() };
        for fence in ["membar.gl;", "fence.sc.gpu;", "membar.sys;"] {
            let (words, _) =
                run(&flag(fence, fence), &setup).unwrap_or_else(|error| panic!("{fence} {number}: {error}"));
            assert_eq!(words[256..320], (42..106).collect::<Vec<u32>>());
        }
        for (producer, consumer) in [
            ("", "membar.gl;"),
            ("membar.gl;", ""),
            ("fence.acq_rel.gpu;", "membar.gl;"),
            ("membar.gl;", "fence.acq_rel.gpu;"),
            ("membar.cta;", "membar.gl;"),
            ("membar.gl;", "membar.cta;"),
        ] {
            let result = run(&flag(producer, consumer), &setup);
            assert!(result.is_err(), "{producer} {consumer} seed {number}");
        }
    }
}

/// A text of an assertion, and what is printed; an error names the first.
#[test]
fn assertions_and_printing() {
    let globals = ".extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);
        .extern .func __assertfail(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 c) .noreturn;
        .global .align 1 .b8 text[20] = {108, 97, 110, 101, 32, 37, 100, 58, 32, 37, 46, 50, 102, 32, 37, 115, 10, 0, 0, 0};
        .global .align 1 .b8 word[4] = {111, 107, 33, 0};";
    let body = "setp.gt.u32 %p1, %r1, 1; @%p1 ret;
        .local .align 8 .b8 pack[24]; mov.u64 %rd4, pack; cvta.local.u64 %rd5, %rd4; st.local.u32 [pack], %r1;
        mov.f64 %fd1, 0d3FF8000000000000; st.local.f64 [pack+8], %fd1; mov.u64 %rd6, word; st.local.u64 [pack+16], %rd6;
        mov.u64 %rd7, text; { .param .b64 a; .param .b64 b; .param .b32 r; st.param.b64 [a], %rd7; st.param.b64 [b], %rd5;
        call.uni (r), vprintf, (a, b); ld.param.b32 %r2, [r]; st.global.u32 [%rd1], %r2; }";
    let module = Module::parse(&kernel(globals, body)).unwrap();
    let mut machine = Machine::new(1);
    let out = machine.alloc(0, 128, "out").unwrap();
    let launch = Launch {
        device: 0,
        module: &module,
        entry: "k",
        grid: [1; 3],
        cluster: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::U64(out), Arg::U64(out)],
    };
    machine.run(&[launch], &seed(0)).unwrap();
    assert_eq!(machine.take_printed(), "lane 0: 1.50 ok!\nlane 1: 1.50 ok!\n");
    let body = "mov.u64 %rd4, word; { .param .b64 a; .param .b64 b; .param .b32 c; .param .b64 d; .param .b64 e;
        st.param.b64 [a], %rd4; st.param.b64 [b], %rd4; st.param.b32 [c], 17; st.param.b64 [d], %rd4; st.param.b64 [e], 1;
        call.uni __assertfail, (a, b, c, d, e); }";
    let message = error(globals, body, &Setup::default());
    assert!(message.contains("assertion `ok!` failed at ok!:17, ok!"), "{message}");
}

/// Calls through registers of two functions, by parity of the lane, with parameters and results: 2n and 3n + 1.
#[test]
fn calls_through_registers_take_parameters() {
    let function = |name: &str, line: &str| {
        format!(
            ".func (.param .b32 result) {name} (.param .b32 number) {{ .reg .b32 %r<3>; ld.param.u32 %r1, [number]; {line}
             st.param.b32 [result], %r2; ret; }}\n"
        )
    };
    let globals = function("twice", "add.u32 %r2, %r1, %r1;") + &function("thrice", "mad.lo.u32 %r2, %r1, 3, 1;");
    let body = "and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; mov.u64 %rd4, twice; mov.u64 %rd5, thrice;
        selp.b64 %rd6, %rd4, %rd5, %p1;
        { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1;
          prototype_0 : .callprototype (.param .b32 _) _ (.param .b32 _);
          call (b), %rd6, (a), prototype_0; ld.param.b32 %r3, [b]; }
        st.global.u32 [%rd1], %r3;";
    let (words, _) = run(&kernel(&globals, body), &Setup::default()).unwrap();
    let expected = |n: u32| if n.is_multiple_of(2) { 2 * n } else { 3 * n + 1 };
    assert_eq!(words[..32], (0..32).map(expected).collect::<Vec<_>>());
    let message = error(&globals, "mov.u64 %rd4, twice; call %rd4, (), p;", &Setup::default());
    assert!(message.contains("other parameters or results"), "{message}");
}

/// What is not supported refuses the kernels that have it, or call a function that has it, and all of it is listed.
#[test]
fn kernels_are_refused_one_by_one() {
    let entry = |name: &str, line: &str| format!(".visible .entry {name}(.param .u64 out)\n{{ {line} ret; }}\n");
    let ptx = format!(
        ".version 8.6\n.target sm_90a\n.address_size 64\n.func f() {{ wild.u32 a; ret; }}\n{}{}{}{}",
        entry("good", ""),
        entry("calls", "call f;"),
        entry("wide", ".reg .b128 q; frobnicate.b32 x, y;"),
        entry("other", "tex.1d.v4.s32.s32 a, [b];")
    );
    let module = Module::parse(&ptx).unwrap();
    let refused: Vec<_> = module.refused().map(|(name, errors)| (name, errors.len())).collect();
    assert_eq!(refused, [("calls", 1), ("wide", 2), ("other", 1)]);
    assert!(run_entry(&ptx, "good", 32, 1).is_ok());
    let message = run_entry(&ptx, "wide", 32, 1).unwrap_err().to_string();
    for part in ["PTX line 10: `.reg` is not supported: registers of type B128", "PTX line 10: `frobnicate.b32`"] {
        assert!(message.contains(part), "{message}");
    }
    let all_bad = ptx.replace("good(.param .u64 out)\n{", "good(.param .u64 out)\n{ wild;");
    assert_eq!(Module::parse(&all_bad).unwrap_err().to_string().lines().count(), 5);
}

/// `fns` by the PTX ISA's pseudocode, and vectors of special registers; environment registers are 0.
#[test]
fn rarer_instructions() {
    for (mask, base, offset, expected) in [
        (0b1011_0100u32, 2, 0, 2),
        (0b1011_0100, 3, 0, -1),
        (0b1011_0100, 0, 2, 4),
        (0b1011_0100, 7, -3, 4),
        (0b1, 5, 1, -1),
    ] {
        let words =
            lanes(&format!("mov.u32 %r2, {mask}; fns.b32 %r3, %r2, {base}, {offset}; st.global.u32 [%rd1], %r3;"));
        assert_eq!(words[0] as i32, expected, "{mask:#b} {base} {offset}");
    }
    let words = lanes(
        "mov.v4.u32 {%r2, %r3, %r4, %r5}, %tid; mov.u32 %r6, %envreg3; add.u32 %r2, %r2, %r6; add.u32 %r2, %r2, %r3;
         add.u32 %r2, %r2, %r4; add.u32 %r2, %r2, %r5; st.global.u32 [%rd1], %r2;",
    );
    assert_eq!(words, (0..32).collect::<Vec<u32>>());
    let words = lanes(
        "ld.global.L2::128B.u32 %r2, [%rd1]; ld.global.nc.L2::256B.u32 %r3, [%rd1+1024]; st.global.u32 [%rd1], %r3;",
    );
    assert_eq!(words[0], 0);
}

/// What ptxas refuses for sm_90a.
#[test]
fn what_ptxas_refuses_is_refused() {
    let eight = |letter: &str| (0..8).map(|i| format!("%{letter}{i}")).collect::<Vec<_>>().join(", ");
    for (body, reason) in [
        (format!("ld.global.v8.f32 {{{}}}, [%rd1];", eight("r")), "sm_100"),
        ("ld.global.v4.b64 {%rd4, %rd5, %rd6, %rd7}, [%rd1];".to_owned(), "16 bytes"),
        (
            "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1, 0, 1;"
                .to_owned(),
            "only matrices of 16-bit types",
        ),
    ] {
        let message = Module::parse(&kernel("", &body)).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}

/// Each lane of CTA 0 stores to, and adds in, CTA 1's shared memory; CTA 1 waits for 32 * (8 + 4) bytes.
#[test]
fn asynchronous_stores_complete_on_an_mbarrier() {
    let globals = ".shared .align 8 .b8 place[256]; .shared .align 8 .b64 full; .shared .align 4 .u32 sum;";
    let wait = "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r9], 0; @!%p3 bra WAIT;";
    let body = "mov.u32 %r2, %cluster_ctarank; mul.lo.u32 %r20, %r2, 384; mov.u32 %r9, full; mov.u32 %r10, place; mov.u32 %r11, sum;
        setp.ne.u32 %p1, %r1, 0; @%p1 bra READY; mbarrier.init.shared.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], %r20; st.shared.u32 [%r11], 100;
        READY: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; setp.eq.u32 %p2, %r2, 1; @%p2 bra WAIT;
        mapa.shared::cluster.u32 %r12, %r9, 1; mad.lo.u32 %r13, %r1, 8, %r10; mapa.shared::cluster.u32 %r13, %r13, 1;
        mapa.shared::cluster.u32 %r14, %r11, 1; add.u32 %r15, %r1, 7;
        st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%r13], {%r1, %r15}, [%r12];
        red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r14], %r1, [%r12];
        bra.uni DONE;
        WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r9], 0; @!%p3 bra WAIT;
        xor.b32 %r16, %r1, 31; mad.lo.u32 %r16, %r16, 8, %r10; ld.shared.v2.u32 {%r17, %r18}, [%r16];
        ld.shared.u32 %r19, [%r11]; st.global.u32 [%rd1], %r17; st.global.u32 [%rd1+128], %r18;
        st.global.u32 [%rd1+256], %r19;
        DONE: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;";
    for number in 0..30 {
        let setup = Setup { ctas: 2, cluster: 2, options: seed(number), ..Setup::default() };
        let (words, _) = run(&kernel(globals, body), &setup).unwrap_or_else(|error| panic!("seed {number}: {error}"));
        assert_eq!(words[..32], (0..32).rev().collect::<Vec<u32>>());
        assert_eq!(words[32..64], (7..39).rev().collect::<Vec<u32>>());
        assert_eq!(words[64..96], [100 + 496; 32]);
    }
    // Without the wait nothing orders the reads after the stores.
    let unordered = body.replace(wait, "WAIT:");
    assert!(unordered != body);
    for number in 0..10 {
        let setup = Setup { ctas: 2, cluster: 2, options: seed(number), ..Setup::default() };
        run(&kernel(globals, &unordered), &setup).unwrap_err();
    }
}

/// A map of 64 words gets other dimensions and another address in shared memory, goes to global memory, and a copy through it
/// reads the 8 words from the second half that its box has.
#[test]
fn tensor_maps_are_changed_by_kernels() {
    let spec = TensorMapSpec {
        data_type: TensorMapDataType::U32,
        global_address: 0,
        dims: vec![64],
        strides: vec![],
        box_dims: vec![4],
        element_strides: vec![1],
        swizzle: Swizzle::None,
        fill: OutOfBoundsFill::Zero,
    };
    let mut input = TensorMap::encode(&spec).unwrap().to_vec();
    input.extend((0..64u32).flat_map(u32::to_le_bytes));
    let globals = ".shared .align 128 .b8 map[128]; .shared .align 128 .b8 tile[128]; .shared .align 8 .b64 full;
        .global .align 128 .b8 kept[128];";
    let body = "mov.u32 %r9, full; mov.u32 %r10, map; mov.u32 %r11, tile; mov.u64 %rd9, kept; shl.b32 %r2, %r1, 2;
        cvt.u64.u32 %rd5, %r2; add.u64 %rd6, %rd3, %rd5; ld.global.u32 %r3, [%rd6]; add.u32 %r4, %r10, %r2;
        st.shared.u32 [%r4], %r3; add.u64 %rd7, %rd3, 256; bar.sync 0; setp.ne.u32 %p1, %r1, 0; @%p1 bra PUBLISH;
        tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r10], %rd7;
        tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r10], 0, 6;
        tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r10], 0, 8;
        mbarrier.init.shared.b64 [%r9], 1; fence.proxy.async.shared::cta;
        PUBLISH: bar.warp.sync 0xffffffff;
        tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd9], [%r10], 128;
        @%p1 bra WAIT; fence.proxy.tensormap::generic.acquire.gpu [%rd9], 128;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 32;
        cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r11], [%rd9, {0}], [%r9];
        WAIT: bar.warp.sync 0xffffffff; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r9], 0; @!%p3 bra AGAIN;
        setp.ge.u32 %p2, %r1, 8; @%p2 ret; add.u32 %r4, %r11, %r2; ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd1], %r5;";
    for number in 0..10 {
        let setup = Setup { input: input.clone(), options: seed(number), ..Setup::default() };
        let (words, _) = run(&kernel(globals, body), &setup).unwrap_or_else(|error| panic!("seed {number}: {error}"));
        // The words of the input's second half from byte 256 on, 32 to 37, and zeros where the map now ends.
        assert_eq!(words[..8], [32, 33, 34, 35, 36, 37, 0, 0]);
    }
    let acquire = "fence.proxy.tensormap::generic.acquire.gpu [%rd9], 128;";
    let unfenced = body.replace(acquire, "");
    let message = error(globals, &unfenced, &Setup { input: input.clone(), options: seed(0), ..Setup::default() });
    assert!(message.contains("missing fence.proxy.tensormap"), "{message}");
    let options = RunOptions { allow: [Check::MissingTensorMapFence].into(), ..seed(0) };
    run(&kernel(globals, &unfenced), &Setup { input: input.clone(), options, ..Setup::default() }).unwrap();
    let message = error(globals, &body.replace("[%r10], 0, 8;", "[%r10], 3, 8;"), &Setup { input, ..Setup::default() });
    assert!(message.contains("8 is no BoxDim of a tensor map"), "{message}");
}
