//! Single instructions on chosen operands, against values worked out by hand from the PTX ISA.

mod common;

use common::{Setup, kernel, run};

/// Runs `body`, which stores `%r9` (or `%rd9`), in one thread and gives back the two words at `[%rd2]`.
fn result(body: &str, wide: bool) -> u64 {
    let store = if wide { "st.global.b64 [%rd2], %rd9;" } else { "st.global.b32 [%rd2], %r9;" };
    let setup = Setup { threads: 1, ..Setup::default() };
    let (words, _) = run(&kernel("", &format!("{body} {store}")), &setup).unwrap_or_else(|e| panic!("{body}: {e}"));
    if wide { u64::from(words[1]) << 32 | u64::from(words[0]) } else { u64::from(words[0]) }
}

#[track_caller]
fn check(cases: &[(&str, u32)]) {
    for (body, expected) in cases {
        assert_eq!(result(body, false) as u32, *expected, "{body}");
    }
}

#[track_caller]
fn check_wide(cases: &[(&str, u64)]) {
    for (body, expected) in cases {
        assert_eq!(result(body, true), *expected, "{body}");
    }
}

#[test]
fn integer_arithmetic() {
    check(&[
        ("mov.u32 %r2, 0xffffffff; add.u32 %r9, %r2, 2;", 1),
        ("mov.u32 %r2, 0x7fffffff; add.sat.s32 %r9, %r2, 1;", 0x7fff_ffff),
        ("mov.u32 %r2, 3; sub.s32 %r9, %r2, 5;", -2i32 as u32),
        ("mov.u32 %r2, 0x80000001; mul.lo.u32 %r9, %r2, 6;", 6),
        ("mov.u32 %r2, 0x80000001; mul.hi.u32 %r9, %r2, 6;", 3),
        ("mov.u32 %r2, 0x80000000; mul.hi.s32 %r9, %r2, 2;", 0xffff_ffff),
        ("mov.u32 %r2, -7; mad.lo.s32 %r9, %r2, 3, 1;", -20i32 as u32),
        ("mov.u32 %r2, 0x1000007; mul24.lo.u32 %r9, %r2, 3;", 21),
        ("mov.u32 %r2, -7; div.s32 %r9, %r2, 2;", -3i32 as u32),
        ("mov.u32 %r2, -7; rem.s32 %r9, %r2, 2;", -1i32 as u32),
        ("mov.u32 %r2, -7; div.u32 %r9, %r2, 2;", 0x7fff_fffc),
        ("mov.u32 %r2, -7; min.s32 %r9, %r2, 2;", -7i32 as u32),
        ("mov.u32 %r2, -7; min.u32 %r9, %r2, 2;", 2),
        ("mov.u32 %r2, -7; max.s32 %r9, %r2, 2;", 2),
        ("mov.u32 %r2, -7; abs.s32 %r9, %r2;", 7),
        ("mov.u32 %r2, 7; neg.s32 %r9, %r2;", -7i32 as u32),
        ("mov.u32 %r2, 3; sad.s32 %r9, %r2, -4, 10;", 17),
        ("mov.b16 %h2, 0xffff; mov.b16 %h3, 2; mul.wide.s16 %r9, %h2, %h3;", -2i32 as u32),
        ("mov.b16 %h2, 0xffff; mov.b16 %h3, 2; mul.wide.u16 %r9, %h2, %h3;", 0x1_fffe),
        ("mov.b16 %h2, 0xfff0; add.s16 %h3, %h2, 0x20; cvt.u32.u16 %r9, %h3;", 0x10),
        ("mov.u32 %r2, 0x01020304; dp4a.u32.u32 %r9, %r2, %r2, 5;", 5 + 1 + 4 + 9 + 16),
        ("mov.u32 %r2, 0xff0203fe; dp4a.s32.s32 %r9, %r2, 0x01010101, 0;", 2),
    ]);
    check_wide(&[
        ("mov.u64 %rd4, 0xffffffffffffffff; add.s64 %rd9, %rd4, 3;", 2),
        ("mov.u32 %r2, 0xffffffff; mul.wide.u32 %rd9, %r2, 0xffffffff;", 0xffff_fffe_0000_0001),
        ("mov.u32 %r2, 0xffffffff; mul.wide.s32 %rd9, %r2, 5;", -5i64 as u64),
        ("mov.u32 %r2, 3; mov.u64 %rd4, 100; mad.wide.u32 %rd9, %r2, 7, %rd4;", 121),
        ("mov.u64 %rd4, 0x100000000; mul.hi.u64 %rd9, %rd4, %rd4;", 1),
        ("mov.u64 %rd4, 0x100000000; mul.lo.s64 %rd9, %rd4, 9;", 9 << 32),
        ("mov.u64 %rd4, -9; div.s64 %rd9, %rd4, 4;", -2i64 as u64),
        ("mov.u64 %rd4, 1000000000007; rem.u64 %rd9, %rd4, 1000;", 7),
    ]);
}

#[test]
fn logic_and_shifts() {
    check(&[
        ("mov.u32 %r2, 0xf0f0; and.b32 %r9, %r2, 0xff;", 0xf0),
        ("mov.u32 %r2, 0xf0f0; xor.b32 %r9, %r2, 0xffff;", 0x0f0f),
        ("mov.u32 %r2, 0xf0f0; not.b32 %r9, %r2;", 0xffff_0f0f),
        ("mov.u32 %r2, 5; cnot.b32 %r9, %r2;", 0),
        ("mov.u32 %r2, 1; shl.b32 %r9, %r2, 31;", 0x8000_0000),
        ("mov.u32 %r2, 1; shl.b32 %r9, %r2, 32;", 0),
        ("mov.u32 %r2, 0x80000000; shr.s32 %r9, %r2, 40;", 0xffff_ffff),
        ("mov.u32 %r2, 0x80000000; shr.u32 %r9, %r2, 31;", 1),
        ("mov.u32 %r2, 0x12345678; mov.u32 %r3, 0x9abcdef0; shf.l.wrap.b32 %r9, %r2, %r3, 8;", 0xbcde_f012),
        ("mov.u32 %r2, 0x12345678; mov.u32 %r3, 0x9abcdef0; shf.r.wrap.b32 %r9, %r2, %r3, 40;", 0xf012_3456),
        ("mov.u32 %r2, 0x12345678; mov.u32 %r3, 0x9abcdef0; shf.r.clamp.b32 %r9, %r2, %r3, 40;", 0x9abc_def0),
        (
            "mov.u32 %r2, 0xff; mov.u32 %r3, 0xf0; mov.u32 %r4, 0x3c; lop3.b32 %r9, %r2, %r3, %r4, 0x96;",
            0xff ^ 0xf0 ^ 0x3c,
        ),
        ("mov.u32 %r2, 0x12345678; bfe.u32 %r9, %r2, 8, 12;", 0x456),
        ("mov.u32 %r2, 0x12345678; bfe.s32 %r9, %r2, 3, 4;", 0xffff_ffff),
        ("mov.u32 %r2, 0xab; mov.u32 %r3, 0xffffffff; bfi.b32 %r9, %r2, %r3, 8, 8;", 0xffff_abff),
        ("mov.u32 %r2, 0x00f0; popc.b32 %r9, %r2;", 4),
        ("mov.u32 %r2, 0x00f0; clz.b32 %r9, %r2;", 24),
        ("mov.u64 %rd4, 0x00f0; clz.b64 %r9, %rd4;", 56),
        ("mov.u32 %r2, 0x00f0; brev.b32 %r9, %r2;", 0x0f00_0000),
        ("mov.u32 %r2, -256; bfind.s32 %r9, %r2;", 7),
        ("mov.u32 %r2, 0x33221100; mov.u32 %r3, 0x77665544; prmt.b32 %r9, %r2, %r3, 0x7250;", 0x7722_5500),
        ("mov.u32 %r2, 4; mov.u32 %r3, 6; bmsk.clamp.b32 %r9, %r2, %r3;", 0x3f0),
        ("mov.u32 %r2, 0x1f8; szext.wrap.s32 %r9, %r2, 4;", 0xffff_fff8),
    ]);
    check_wide(&[
        ("mov.u32 %r2, 1; mov.u32 %r3, 2; mov.b64 %rd9, {%r2, %r3};", 2 << 32 | 1),
        (
            "mov.u64 %rd4, 0x1122334455667788; mov.b64 {%r2, %r3}, %rd4; mov.b64 %rd9, {%r3, %r2};",
            0x5566_7788_1122_3344,
        ),
        (
            "mov.u64 %rd4, 0x0004000300020001; mov.b64 {%h1, %h2, %h3, %h4}, %rd4; mov.b64 %rd9, {%h4, %h3, %h2, %h1};",
            0x0001_0002_0003_0004,
        ),
        ("mov.u64 %rd4, 1; shl.b64 %rd9, %rd4, 40;", 1 << 40),
        ("mov.u64 %rd4, 0xff00000000000000; shr.s64 %rd9, %rd4, 60;", u64::MAX),
    ]);
}

#[test]
fn comparisons_and_selections() {
    check(&[
        ("mov.u32 %r2, -1; setp.lt.s32 %p1, %r2, 0; selp.u32 %r9, 1, 2, %p1;", 1),
        ("mov.u32 %r2, -1; setp.lt.u32 %p1, %r2, 0; selp.u32 %r9, 1, 2, %p1;", 2),
        ("mov.u32 %r2, 5; setp.hi.u32 %p1|%p2, %r2, 4; selp.u32 %r9, 1, 2, %p2;", 2),
        ("mov.u32 %r2, 5; setp.eq.u32 %p1, %r2, 5; setp.lt.and.u32 %p3, %r2, 3, %p1; selp.u32 %r9, 1, 2, %p3;", 2),
        ("mov.u32 %r2, 5; setp.eq.u32 %p1, %r2, 5; setp.lt.or.u32 %p3, %r2, 3, !%p1; selp.u32 %r9, 1, 2, %p3;", 2),
        ("mov.u32 %r2, 5; setp.eq.u32 %p1, %r2, 5; setp.lt.xor.u32 %p3, %r2, 3, %p1; selp.u32 %r9, 1, 2, %p3;", 1),
        ("mov.b32 %f1, 0f7fc00000; setp.lt.f32 %p1, %f1, 0f00000000; selp.u32 %r9, 1, 2, %p1;", 2),
        ("mov.b32 %f1, 0f7fc00000; setp.ltu.f32 %p1, %f1, 0f00000000; selp.u32 %r9, 1, 2, %p1;", 1),
        ("mov.b32 %f1, 0f7fc00000; setp.ne.f32 %p1, %f1, %f1; selp.u32 %r9, 1, 2, %p1;", 2),
        ("mov.b32 %f1, 0f7fc00000; setp.neu.f32 %p1, %f1, %f1; selp.u32 %r9, 1, 2, %p1;", 1),
        ("mov.b32 %f1, 0f7fc00000; setp.nan.f32 %p1, %f1, %f1; selp.u32 %r9, 1, 2, %p1;", 1),
        ("mov.b32 %f1, 0f00000001; setp.gt.ftz.f32 %p1, %f1, 0f00000000; selp.u32 %r9, 1, 2, %p1;", 2),
        ("mov.b32 %f1, 0f00000001; setp.gt.f32 %p1, %f1, 0f00000000; selp.u32 %r9, 1, 2, %p1;", 1),
        ("mov.u32 %r2, 5; set.eq.u32.u32 %r9, %r2, 5;", 0xffff_ffff),
        ("mov.b32 %f1, 0f7f800000; testp.infinite.f32 %p1, %f1; selp.u32 %r9, 1, 2, %p1;", 1),
        ("mov.u32 %r2, -3; slct.u32.s32 %r9, 10, 20, %r2;", 20),
        (
            "setp.eq.u32 %p1, %r1, 0; and.pred %p2, %p1, !%p1; or.pred %p3, %p2, %p1; not.pred %p4, %p3; selp.u32 %r9, 1, 2, %p4;",
            2,
        ),
    ]);
}

#[test]
fn floating_point() {
    let f = f32::to_bits;
    check(&[
        ("mov.b32 %f1, 0f3f800000; add.rn.f32 %r9, %f1, 0f33800000;", f(1.0)),
        ("mov.b32 %f1, 0f3f800000; add.rp.f32 %r9, %f1, 0f33800000;", f(1.0) + 1),
        ("mov.b32 %f1, 0f7f800000; sub.f32 %r9, %f1, %f1;", 0x7fff_ffff),
        ("mov.b32 %f1, 0f40000000; mul.rn.f32 %r9, %f1, 0f40400000;", f(6.0)),
        ("mov.b32 %f1, 0f40000000; mul.sat.f32 %r9, %f1, 0f40400000;", f(1.0)),
        ("mov.b32 %f1, 0f3f800001; mov.b32 %f2, 0fbf800002; fma.rn.f32 %r9, %f1, %f1, %f2;", 2f32.powi(-46).to_bits()),
        ("mov.b32 %f1, 0f3f800000; div.rn.f32 %r9, %f1, 0f40400000;", f(1.0 / 3.0)),
        ("mov.b32 %f1, 0f40800000; sqrt.rn.f32 %r9, %f1;", f(2.0)),
        ("mov.b32 %f1, 0f40400000; rcp.rn.f32 %r9, %f1;", f(1.0 / 3.0)),
        ("mov.b32 %f1, 0f40400000; ex2.approx.ftz.f32 %r9, %f1;", f(8.0)),
        ("mov.b32 %f1, 0fff800000; ex2.approx.f32 %r9, %f1;", 0),
        ("mov.b32 %f1, 0f41000000; lg2.approx.f32 %r9, %f1;", f(3.0)),
        ("mov.b32 %f1, 0f80000000; rcp.approx.ftz.f32 %r9, %f1;", 0xff80_0000),
        ("mov.b32 %f1, 0f7fc00000; max.f32 %r9, %f1, 0f3f800000;", f(1.0)),
        ("mov.b32 %f1, 0f7fc00000; max.NaN.f32 %r9, %f1, 0f3f800000;", 0x7fff_ffff),
        ("mov.b32 %f1, 0f80000000; min.f32 %r9, %f1, 0f00000000;", 0x8000_0000),
        ("mov.b32 %f1, 0fc0000000; abs.f32 %r9, %f1;", f(2.0)),
        ("mov.b32 %f1, 0f40000000; neg.f32 %r9, %f1;", f(-2.0)),
        ("mov.b32 %f1, 0fbf800000; copysign.f32 %r9, %f1, 0f40000000;", f(-2.0)),
        ("mov.b16 %h1, 0x3c00; mov.b16 %h2, 0x4000; fma.rn.f16 %h3, %h1, %h2, %h2; cvt.u32.u16 %r9, %h3;", 0x4400),
        ("mov.b32 %r2, 0x3f804000; add.rn.bf16x2 %r9, %r2, %r2;", 0x4000_4080),
        ("mov.b32 %r2, 0xbf803f80; max.bf16x2 %r9, %r2, 0x00000000;", 0x0000_3f80),
    ]);
    check_wide(&[
        (
            "mov.b64 %fd1, 0d3ff0000000000000; mov.b64 %fd2, 0d4008000000000000; div.rn.f64 %fd3, %fd1, %fd2; mov.b64 %rd9, %fd3;",
            (1.0f64 / 3.0).to_bits(),
        ),
        (
            "mov.b64 %fd1, 0d4008000000000000; fma.rn.f64 %fd3, %fd1, %fd1, 0dbff0000000000000; mov.b64 %rd9, %fd3;",
            8f64.to_bits(),
        ),
    ]);
}

#[test]
fn conversions() {
    let f = f32::to_bits;
    check(&[
        ("mov.b32 %f1, 0f40200000; cvt.rni.s32.f32 %r9, %f1;", 2),
        ("mov.b32 %f1, 0f40200000; cvt.rpi.s32.f32 %r9, %f1;", 3),
        ("mov.b32 %f1, 0fc0200000; cvt.rzi.s32.f32 %r9, %f1;", -2i32 as u32),
        ("mov.b32 %f1, 0fbf800000; cvt.rzi.u32.f32 %r9, %f1;", 0),
        ("mov.b32 %f1, 0f7fc00000; cvt.rzi.s32.f32 %r9, %f1;", 0),
        ("mov.b32 %f1, 0f4f800000; cvt.rzi.s32.f32 %r9, %f1;", 0x7fff_ffff),
        ("mov.u32 %r2, 16777217; cvt.rn.f32.u32 %r9, %r2;", f(16_777_216.0)),
        ("mov.u32 %r2, 16777217; cvt.rp.f32.u32 %r9, %r2;", f(16_777_218.0)),
        ("mov.u32 %r2, -3; cvt.rn.f32.s32 %r9, %r2;", f(-3.0)),
        ("mov.u32 %r2, 0x1ff; cvt.s32.s8 %r9, %r2;", u32::MAX),
        ("mov.u32 %r2, 0x1ff; cvt.u32.u8 %r9, %r2;", 0xff),
        ("mov.u32 %r2, 300; cvt.sat.u8.u32 %r9, %r2;", 255),
        ("mov.b32 %f1, 0f3f818000; mov.b32 %f2, 0f40000000; cvt.rn.bf16x2.f32 %r9, %f1, %f2;", 0x3f82_4000),
        (
            "mov.b32 %f1, 0f43e40000; mov.b32 %f2, 0f3f800000; cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2; cvt.u32.u16 %r9, %h1;",
            0x7e38,
        ),
        ("mov.b16 %h1, 0x3f80; cvt.f32.bf16 %r9, %h1;", f(1.0)),
        ("mov.b32 %f1, 0f3f800000; cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r9, %h1;", 0x3c00),
        ("mov.b64 %fd1, 0d3ff0000000000001; cvt.rp.f32.f64 %r9, %fd1;", f(1.0) + 1),
    ]);
    check_wide(&[
        ("mov.u32 %r2, -3; cvt.s64.s32 %rd9, %r2;", -3i64 as u64),
        ("mov.u32 %r2, -3; cvt.u64.u32 %rd9, %r2;", 0xffff_fffd),
        ("mov.b32 %f1, 0f5f000000; cvt.rzi.u64.f32 %rd9, %f1;", 1 << 63),
    ]);
}

#[test]
fn halves_of_a_register() {
    check(&[
        ("mov.u32 %r2, 0xffff0005; max.u16x2 %r9, %r2, 0x00070003;", 0xffff_0005),
        ("mov.u32 %r2, 0xffff0005; max.s16x2 %r9, %r2, 0x00070003;", 0x0007_0005),
        ("mov.u32 %r2, 0xffff0005; min.u16x2 %r9, %r2, 0x00070003;", 0x0007_0003),
        ("mov.u32 %r2, 0xffff0005; min.s16x2 %r9, %r2, 0x00070003;", 0xffff_0003),
        ("mov.u32 %r2, 0xffff0005; min.relu.s16x2 %r9, %r2, 0x00070003;", 0x0000_0003),
        ("mov.u32 %r2, 0xfff1fff2; max.relu.s16x2 %r9, %r2, 0x8000fff7;", 0),
        ("mov.u32 %r2, -7; max.relu.s32 %r9, %r2, -2;", 0),
        ("mov.u32 %r2, -7; min.relu.s32 %r9, %r2, 2;", 0),
        ("mov.u32 %r2, 7; min.relu.s32 %r9, %r2, 2;", 2),
        ("mov.u32 %r2, 0xffff0005; add.u16x2 %r9, %r2, 0x0002fffe;", 0x0001_0003),
        ("mov.u32 %r2, 0xffff0005; add.s16x2 %r9, %r2, 0x00027ffe;", 0x0001_8003),
        // bf16: NaN wins with `.NaN` alone; 0x7fff is the canonical one.
        ("mov.u32 %r2, 0x7fc03f80; max.NaN.bf16x2 %r9, %r2, 0xc0004000;", 0x7fff_4000),
        ("mov.u32 %r2, 0x7fc03f80; max.bf16x2 %r9, %r2, 0xc0004000;", 0xc000_4000),
        ("mov.u32 %r2, 0x7fc03f80; min.NaN.bf16x2 %r9, %r2, 0xc0004000;", 0x7fff_3f80),
        ("mov.u32 %r2, 0x3f80bf80; min.bf16x2 %r9, %r2, 0x4000c000;", 0x3f80_c000),
        ("mov.u32 %r2, 0x3f80c040; max.xorsign.abs.bf16x2 %r9, %r2, 0xc0003f80;", 0xc000_c040),
        ("mov.u32 %r2, 0xbf803f80; abs.bf16x2 %r9, %r2;", 0x3f80_3f80),
        ("mov.u32 %r2, 0xbf803f80; neg.bf16x2 %r9, %r2;", 0x3f80_bf80),
        ("mov.u32 %r2, 0x40404000; mul.rn.bf16x2 %r9, %r2, 0xbf003fc0;", 0xbfc0_4040),
        ("mov.u32 %r2, 0x40404000; mul.bf16x2 %r9, %r2, 0xbf003fc0;", 0xbfc0_4040),
        ("mov.u32 %r2, 0x40404000; fma.rn.bf16x2 %r9, %r2, 0xbf003fc0, 0x3f803f80;", 0xbf00_4080),
        ("mov.u32 %r2, 0x40404000; fma.rn.relu.bf16x2 %r9, %r2, 0xbf003fc0, 0x3f803f80;", 0x0000_4080),
        ("mov.u32 %r2, 0x40404000; sub.rn.bf16x2 %r9, %r2, 0x3f803f80;", 0x4000_3f80),
        ("mov.u32 %r2, 0x3c004000; mul.rn.f16x2 %r9, %r2, 0x4200b800;", 0x4200_bc00),
        ("mov.u32 %r2, 0x8000fc00; and.b32 %r9, %r2, 0x7fff7fff;", 0x0000_7c00),
        ("mov.b16 %h1, 0xbf80; abs.bf16 %h2, %h1; cvt.u32.u16 %r9, %h2;", 0x3f80),
    ]);
}

/// Four e2m1 values made e4m3 by a table of eight bytes and their signs: what kernels of four-bit weights do.
#[test]
fn four_bits_to_eight_by_a_permutation() {
    let table = "mov.b32 %r2, 0x3c383000; mov.b32 %r3, 0x4c484440;";
    // 0, 0.5, 1, 1.5, then -2, -3, -4, -6.
    let body = |nibbles: u32| {
        format!(
            "{table} mov.b32 %r4, {nibbles:#x}; and.b32 %r5, %r4, 0x7777; prmt.b32 %r6, %r2, %r3, %r5;
             prmt.b32 %r7, %r4, 0, 0x1100; shl.b32 %r8, %r7, 4; lop3.b32 %r8, %r8, 0x00800080, 0, 0xc0;
             and.b32 %r7, %r7, 0x80008000; or.b32 %r8, %r8, %r7; or.b32 %r9, %r6, %r8;"
        )
    };
    assert_eq!(result(&body(0x3210), false), 0x3c38_3000);
    assert_eq!(result(&body(0xfedc), false), 0xccc8_c4c0);
    check(&[
        ("mov.b32 %r2, 0x80ff7f01; prmt.b32 %r9, %r2, 0, 0xba98;", 0xffff_0000),
        ("mov.b32 %r2, 0x44332211; mov.b32 %r3, 0x88776655; prmt.b32.f4e %r9, %r2, %r3, 1;", 0x5544_3322),
        ("mov.b32 %r2, 0x44332211; mov.b32 %r3, 0x88776655; prmt.b32.rc8 %r9, %r2, %r3, 2;", 0x3333_3333),
    ]);
}

#[test]
fn bytes_of_two_numbers() {
    let pair = |high: f32, low: f32, conversion: &str| {
        let (high, low) = (high.to_bits(), low.to_bits());
        result(
            &format!(
                "mov.b32 %f1, 0f{high:08x}; mov.b32 %f2, 0f{low:08x}; {conversion} %h1, %f1, %f2; cvt.u32.u16 %r9, %h1;"
            ),
            false,
        )
    };
    let e4m3 = "cvt.rn.satfinite.e4m3x2.f32";
    assert_eq!(pair(f32::NAN, -f32::NAN, e4m3), 0x7f7f);
    assert_eq!(pair(f32::INFINITY, f32::NEG_INFINITY, e4m3), 0x7efe);
    assert_eq!(pair(449.0, -1000.0, e4m3), 0x7efe);
    // Ties go to the even neighbour: 17 between 16 and 18, 19 between 18 and 20; 2^-10 to 0, 3 * 2^-10 to 2^-8.
    assert_eq!(pair(17.0, 19.0, e4m3), 0x585a);
    assert_eq!(pair(2f32.powi(-10), 3.0 * 2f32.powi(-10), e4m3), 0x0002);
    assert_eq!(pair(-0.0, 2f32.powi(-9), e4m3), 0x8001);
    assert_eq!(pair(-1.0, 1.0, "cvt.rn.satfinite.relu.e4m3x2.f32"), 0x0038);
    assert_eq!(pair(f32::NAN, 1e6, "cvt.rn.satfinite.e5m2x2.f32"), 0x7f7b);
    check(&[
        ("mov.b16 %h1, 0x7fc0; cvt.rn.f16x2.e4m3x2 %r9, %h1;", 0x7fff_c000),
        ("mov.b16 %h1, 0x7e01; cvt.rn.f16x2.e4m3x2 %r9, %h1;", 0x5f00_1800),
        ("mov.b16 %h1, 0xbc38; cvt.rn.relu.f16x2.e4m3x2 %r9, %h1;", 0x0000_3c00),
        ("mov.b16 %h1, 0x7c3c; cvt.rn.f16x2.e5m2x2 %r9, %h1;", 0x7c00_3c00),
        ("mov.b32 %r2, 0x7e01bc00; cvt.rn.satfinite.e4m3x2.f16x2 %h1, %r2; cvt.u32.u16 %r9, %h1;", 0x7fb8),
        ("mov.b32 %r2, 0x7bff1000; cvt.rn.satfinite.e5m2x2.f16x2 %h1, %r2; cvt.u32.u16 %r9, %h1;", 0x7b10),
    ]);
}

#[test]
fn loads_extend_and_stores_truncate() {
    check(&[
        ("st.global.u32 [%rd2+64], 0x8081ff02; ld.global.s8 %r9, [%rd2+65];", u32::MAX),
        ("st.global.u32 [%rd2+64], 0x8081ff02; ld.global.u8 %r9, [%rd2+65];", 0xff),
        ("st.global.u32 [%rd2+64], 0x8081ff02; ld.global.s16 %r9, [%rd2+66];", 0xffff_8081),
        ("mov.u32 %r2, 0xaabbccdd; st.global.u8 [%rd2+65], %r2; ld.global.u32 %r9, [%rd2+64];", 0xdd00),
        (
            "st.global.v2.u32 [%rd2+64], {7, 9}; ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd2+64]; add.u32 %r9, %r2, %r3;",
            16,
        ),
        (
            ".shared .align 16 .b8 pad[16]; mov.u32 %r4, pad; st.shared.v2.f32 [%r4+8], {0f3f800000, 0f40000000}; ld.shared.v2.f32 {%f1, %f2}, [%r4+8]; add.f32 %r9, %f1, %f2;",
            3f32.to_bits(),
        ),
        (
            ".shared .align 16 .b8 pad[16]; mov.u32 %r4, pad; st.shared.v4.b32 [%r4], {1, 2, 3, 4}; ld.shared.v2.u32 {%r2, %r3}, [%r4+8]; mad.lo.u32 %r9, %r2, 10, %r3;",
            34,
        ),
        (
            ".local .align 8 .b8 stack[16]; mov.u64 %rd4, stack; cvta.local.u64 %rd5, %rd4; st.u32 [%rd5+4], 77; ld.local.u32 %r9, [stack+4];",
            77,
        ),
        (
            "cvta.to.global.u64 %rd4, %rd2; isspacep.global %p1, %rd4; isspacep.shared %p2, %rd4; selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; or.b32 %r9, %r2, %r3;",
            1,
        ),
    ]);
    check_wide(&[("ld.param.u64 %rd4, [out]; sub.s64 %rd9, %rd4, %rd2;", 0)]);
}

#[test]
fn atomics_return_the_old_value() {
    check(&[
        ("st.global.u32 [%rd2+64], 5; atom.global.add.u32 %r9, [%rd2+64], 3;", 5),
        ("st.global.u32 [%rd2+64], 5; atom.global.cas.b32 %r2, [%rd2+64], 5, 9; ld.global.u32 %r9, [%rd2+64];", 9),
        (
            "st.global.u32 [%rd2+64], 5; atom.acq_rel.gpu.global.exch.b32 %r2, [%rd2+64], 6; ld.global.u32 %r3, [%rd2+64]; mad.lo.u32 %r9, %r2, 10, %r3;",
            56,
        ),
        ("st.global.u32 [%rd2+64], 5; atom.global.inc.u32 %r2, [%rd2+64], 5; ld.global.u32 %r9, [%rd2+64];", 0),
        ("st.global.u32 [%rd2+64], 0; red.global.min.s32 [%rd2+64], -4; ld.global.u32 %r9, [%rd2+64];", -4i32 as u32),
        (
            "st.global.u32 [%rd2+64], 0x3f800000; red.global.add.f32 [%rd2+64], 0f40000000; ld.global.u32 %r9, [%rd2+64];",
            3f32.to_bits(),
        ),
        (
            "st.global.u32 [%rd2+64], 0x3f803f80; red.global.add.noftz.bf16x2 [%rd2+64], 0x3f804000; ld.global.u32 %r9, [%rd2+64];",
            0x4000_4040,
        ),
        (
            "st.global.v2.u32 [%rd2+64], {0, 0x3f800000}; red.global.add.v2.f32 [%rd2+64], {0f3f800000, 0f3f800000}; ld.global.u32 %r9, [%rd2+68];",
            2f32.to_bits(),
        ),
    ]);
}

#[test]
fn unknown_instructions_and_modifiers_are_refused_with_their_line() {
    for (body, reason) in [
        ("frobnicate.u32 %r1, %r2;", "no such instruction"),
        ("add.u32.wild %r1, %r2, %r3;", "wild"),
        ("add.u32 %r1, %rd2, %r3;", "64 bits where 32"),
        ("mov.u32 %r1, %nowhere;", "`%nowhere` is not known"),
        ("bra NOWHERE;", "no label"),
        ("fence.proxy.async.local;", "`.local` is not known here"),
        ("fence.proxy.async.const;", "`.const` is not known here"),
        ("fence.proxy.async.param;", "`.param` is not known here"),
        ("fence.proxy.async.shared;", "`.shared` is not known here"),
        ("fence.proxy.async.global.shared::cta;", "`.shared::cta` is not known here"),
        ("fence.proxy.alias.global;", "`.global` is not known here"),
        ("membar.gl.alias;", "`.alias` is not known here"),
        ("membar.proxy.tensormap::generic;", "the proxy is missing"),
        ("fence.proxy.tensormap::generic.release;", "the scope is missing"),
        ("fence.proxy.async::generic.global;", "`.acquire` or `.release` is missing"),
        ("fence.proxy.async::generic.acquire.cluster;", "`.sync_restrict::shared::cluster.cluster` is missing"),
        ("wgmma.mma_async.sync.aligned.m64n24k32.f32.bf16.bf16 {%r1}, %rd1, %rd1, 1, 1, 1;", "no such shape"),
    ] {
        let ptx = kernel("", &format!("\n\n{body}"));
        let line = 1 + ptx.lines().position(|line| line.starts_with(body)).unwrap();
        let error = ptx_sim::Module::parse(&ptx).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains(&format!("line {line}:")), "{error}");
    }
}
