//! PTX that compilers made, spoiled: whatever the text, parsing and running it end, with a result or an error.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use ptx_sim::{Arg, Launch, Machine, Module, RunOptions};

/// PTX, one of its kernels, and its parameters: `P` is a pointer to a buffer of [`BUFFER`] bytes, `L` 64 bits, `W` 32 bits.
const KERNELS: [(&str, &str, &str); 10] = [
    (include_str!("data/compiled_o1.ptx"), "k", "PL"),
    (include_str!("data/compiled_o3.ptx"), "k", "PL"),
    (include_str!("data/nvcc.ptx"), "reduce", "PPW"),
    (include_str!("data/nvcc.ptx"), "product", "PPPW"),
    (include_str!("data/nvcc.ptx"), "bulk", "PP"),
    (include_str!("data/nvcc_mma.ptx"), "mma_product", "PPPWWW"),
    (include_str!("data/triton_product.ptx"), "product", "PPPWWWPP"),
    (include_str!("data/triton_softmax.ptx"), "softmax", "PPWPP"),
    (include_str!("data/i128.ptx"), "d128", "PPPPW"),
    (include_str!("data/calls.ptx"), "calls", "P"),
];

const BUFFER: usize = 16384;

/// What takes the place of a piece of PTX: numbers at the edges of their types, and what opens, closes and names things.
const PIECES: [&str; 16] = [
    "-99999999999999999999 ",
    "4294967295",
    "0",
    "-1",
    "0x7fffffffffffffff",
    "0f7FC00000",
    "{ ",
    "}",
    "[",
    "\"",
    "/*",
    "@!%p1 ",
    ".b128 ",
    "%r99999999",
    ";",
    "$L__BB0_1",
];

#[derive(Clone, Debug)]
enum Spoil {
    Remove,
    CopyFrom(prop::sample::Index),
    SwapWith(prop::sample::Index),
    Become(usize),
    Insert(usize),
    /// One letter becomes another.
    Letter(prop::sample::Index, char),
}

fn spoil() -> impl Strategy<Value = (prop::sample::Index, Spoil)> {
    let index = any::<prop::sample::Index>;
    let kind = prop_oneof![
        Just(Spoil::Remove),
        index().prop_map(Spoil::CopyFrom),
        index().prop_map(Spoil::SwapWith),
        (0..PIECES.len()).prop_map(Spoil::Become),
        (0..PIECES.len()).prop_map(Spoil::Insert),
        (index(), any::<char>()).prop_map(|(at, letter)| Spoil::Letter(at, letter)),
    ];
    (index(), kind)
}

/// The text with some pieces, cut at spaces and punctuation, replaced.
fn spoiled(ptx: &str, spoils: Vec<(prop::sample::Index, Spoil)>) -> String {
    let mut pieces: Vec<String> =
        ptx.split_inclusive([' ', '\t', ',', ';', '\n', '.', '[']).map(str::to_owned).collect();
    for (at, spoil) in spoils {
        let at = at.index(pieces.len());
        match spoil {
            Spoil::Remove => drop(pieces.remove(at)),
            Spoil::CopyFrom(other) => pieces[at] = pieces[other.index(pieces.len())].clone(),
            Spoil::SwapWith(other) => {
                let other = other.index(pieces.len());
                pieces.swap(at, other);
            }
            Spoil::Become(piece) => pieces[at] = PIECES[piece].to_owned(),
            Spoil::Insert(piece) => pieces.insert(at, PIECES[piece].to_owned()),
            Spoil::Letter(which, letter) => {
                let mut letters: Vec<char> = pieces[at].chars().collect();
                let which = which.index(letters.len());
                letters[which] = letter;
                pieces[at] = letters.into_iter().collect();
            }
        }
    }
    pieces.concat()
}

fn run((ptx, entry, parameters): (&str, &str, &str), seed: u64) {
    let Ok(module) = Module::parse(ptx) else {
        return;
    };
    let mut machine = Machine::new(1);
    let parameter = |kind| match kind {
        'P' => {
            let address = machine.alloc(0, BUFFER as u64, "buffer").unwrap();
            machine.fill(address, BUFFER as u64, 1).unwrap();
            Arg::U64(address)
        }
        'L' => Arg::U64(40),
        _ => Arg::U32(32),
    };
    let args = parameters.chars().map(parameter).collect();
    let block = [128, 1, 1];
    let launch = Launch {
        device: 0,
        module: &module,
        entry,
        grid: [2, 1, 1],
        cluster: [1, 1, 1],
        block,
        shared_bytes: 24576,
        args,
    };
    let _ = machine.run(&[launch], &RunOptions { seed, step_limit: Some(20_000), ..RunOptions::default() });
}

#[test]
fn the_kernels_are_right_before_they_are_spoiled() {
    for (ptx, entry, _) in KERNELS {
        let module = Module::parse(ptx).unwrap_or_else(|error| panic!("{entry}: {error}"));
        assert!(module.entries().any(|name| name == entry), "{entry}");
    }
}

/// A text in which something comes `n` times, and what that is.
fn repeated(n: usize) -> Vec<(&'static str, String)> {
    let head = ".version 8.6\n.target sm_90a\n.address_size 64\n";
    let each = |text: &dyn Fn(usize) -> String| (0..n).map(text).collect::<String>();
    let kernel =
        |body: String| format!("{head}.visible .entry k() {{ .reg .b32 %r<9>; .reg .pred %p<3>; {body} ret; }}");
    let functions = each(&|i| format!(".func f{i}() {{ ret; }}"));
    let wgmma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16";
    vec![
        ("entries", head.to_owned() + &each(&|i| format!(".visible .entry f{i}() {{ ret; }}"))),
        ("calls", kernel(each(&|i| format!("call.uni f{i}, ();"))).replace(head, &format!("{head}{functions}"))),
        ("variables", head.to_owned() + &each(&|i| format!(".global .b32 g{i};"))),
        ("labels", kernel(each(&|i| format!("bra L{i};")) + &each(&|i| format!("L{i}:")))),
        ("scopes", kernel("{ .reg .b32 q; mov.u32 q, 1; }".repeat(n))),
        ("nested scopes", kernel("{ .reg .b32 q;".repeat(n) + &"}".repeat(n))),
        ("registers", kernel(each(&|i| format!(".reg .b32 q{i}; mov.u32 q{i}, {i};")))),
        ("register ranges", kernel(each(&|i| format!(".reg .b32 q{i}<9>; mov.u32 q{i}8, {i};")))),
        ("constants", kernel(each(&|i| format!("add.u32 %r2, %r1, {i};")))),
        (
            "products",
            kernel(each(&|i| {
                format!(
                    ".reg .b64 d{i}; .reg .f32 a{i}; {wgmma} {{a{i},a{i},a{i},a{i}}}, d{i}, d{i}, 1, 1, 1, 0, 0; add.f32 a{i}, a{i}, a{i};"
                )
            })),
        ),
        ("lines", kernel(each(&|i| format!(".loc 1 {i} 1 // a.rs:{i}:1 @[ b.rs:{i}:2 ]\nadd.u32 %r1, %r1, 1;\n")))),
        ("files", head.to_owned() + &each(&|i| format!(".file {i} \"a{i}\"\n"))),
        ("operands", kernel(format!("mov.u32 {};", "%r1,".repeat(n)))),
        ("modifiers", kernel(format!("mov{} %r1, 1;", ".u32".repeat(n)))),
        ("parentheses", kernel(format!("mov.u32 %r1, {}1;", "(".repeat(n)))),
        ("minus signs", kernel(format!("mov.u32 %r1, {}1;", "-".repeat(n)))),
        ("initialisers", format!("{head}.global .b8 g[9] = {}1", "{".repeat(n))),
        ("places inlined from", kernel(format!(".loc 1 1 1 // {}\nadd.u32 %r1, %r1, 1;\n", "a.rs:1:1 @[ ".repeat(n)))),
    ]
}

#[test]
fn parsing_takes_no_longer_than_the_text_is_long() {
    for (what, text) in repeated(40_000) {
        let began = Instant::now();
        let _ = Module::parse(&text);
        assert!(began.elapsed() < Duration::from_secs(5), "{what}: {:?} for {} bytes", began.elapsed(), text.len());
    }
}

proptest! {
    #[test]
    fn truncated_ptx_never_panics(which in 0..KERNELS.len(), end in any::<prop::sample::Index>()) {
        let (ptx, entry, parameters) = KERNELS[which];
        let end = ptx.floor_char_boundary(end.index(ptx.len()));
        run((&ptx[..end], entry, parameters), 0);
    }

    #[test]
    fn spoiled_ptx_never_panics_nor_hangs(
        which in 0..KERNELS.len(),
        spoils in prop::collection::vec(spoil(), 1..8),
        seed in 0..4u64,
    ) {
        let (ptx, entry, parameters) = KERNELS[which];
        run((&spoiled(ptx, spoils), entry, parameters), seed);
    }

    #[test]
    fn any_text_never_panics(text in "\\PC*") {
        let _ = Module::parse(&text);
        let _ = Module::parse(&format!(".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ {text} }}"));
    }
}
