//! What the kernel's machine code and sources must keep to, and the tables that say whether they do.

use std::collections::BTreeSet;
use std::fmt;

use ferromoe_kernel::format::Format;
use ferromoe_kernel::shared::SharedLayout;

use crate::ptxas::{Function, Report};
use crate::sass::{Kernel, Loop};
use crate::size::DeviceSide;

/// Registers of an SM that a CTA's threads share equally at launch; ptxas hands out multiples of 8 (CUDA programming guide, compute capability 9.0).
const fn registers_at_launch(format: &Format) -> u32 {
    65536 / format.threads() / 8 * 8
}
/// Shared memory of a CTA, static and dynamic (CUDA programming guide, compute capability 9.0: 227 KB).
const SHARED: u32 = 227 * 1024;
/// One stage is multiplied, one keeps the products in flight, one is loaded: with fewer the tensor cores wait for memory.
const LEAST_STAGES: u32 = 3;
/// ptxas counts all 16 when a barrier's number is in a register: then nothing shows which barriers the roles use.
const NAMED_BARRIERS: u32 = 15;
/// The token tiles from which on a product is limited by the tensor cores. Narrower ones wait for memory, whatever is issued beside them.
const WIDE: u32 = 64;
/// Lines of code of the modules that only the device compiles, all formats: a reader gets through them in a day.
const DEVICE_LINES: u32 = 3200;
/// Lines of code of a function. clippy.toml has the same limit for what clippy sees; it does not see the device's modules.
const FUNCTION_LINES: u32 = 120;

/// Limits that a number format has for itself.
struct OwnLimits {
    /// Instructions issued for each wgmma of a wide tile, four of which make a stage.
    beside_wgmma: u32,
    /// Groups of wgmmas that a loop's waits leave in flight.
    least_in_flight: u32,
    /// Bytes of spills, and loads and stores of local memory: all of a kernel's.
    spilled_bytes: u32,
    stack_bytes: u32,
    local_accesses: u32,
    /// Those of a loop that multiplies a wide tile.
    local_in_loop: u32,
}

impl OwnLimits {
    fn of(format: &Format) -> Self {
        if format.scaled {
            // Every product of a k-block is promoted: 64 FMAs of a thread beside four wgmmas. The warpgroups take turns at the tensor cores, so that none has to keep a group in flight.
            // 64 sums and 64 products leave a consumer no register to keep anything else from task to task: that is spilled, but hardly within a loop.
            Self {
                beside_wgmma: 32,
                least_in_flight: 0,
                spilled_bytes: 1060,
                stack_bytes: 128,
                local_accesses: 260,
                local_in_loop: 2,
            }
        } else {
            // What loads descriptors, waits and counts must hide behind a 64x64x16 product, 32 cycles for each of the four schedulers. Four of the nine are ptxas' habit: it puts each
            // wgmma's two descriptors together anew. With no group in flight the tensor cores would stand still while the next is issued.
            Self {
                beside_wgmma: 9,
                least_in_flight: 1,
                // A dispatch warp that follows a token's rows to their places in the ring, and nobody else.
                spilled_bytes: 104,
                stack_bytes: 56,
                local_accesses: 22,
                local_in_loop: 0,
            }
        }
    }
}

/// What a figure must be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    None,
    Exactly(u32),
    AtMost(u32),
    AtLeast(u32),
}

impl Limit {
    fn holds(self, value: Option<f64>) -> bool {
        match self {
            Self::None => true,
            Self::Exactly(limit) => value == Some(limit.into()),
            Self::AtMost(limit) => value.is_some_and(|value| value <= limit.into()),
            Self::AtLeast(limit) => value.is_some_and(|value| value >= limit.into()),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Exactly(limit) => write!(out, "= {limit}"),
            Self::AtMost(limit) => write!(out, "<= {limit}"),
            Self::AtLeast(limit) => write!(out, ">= {limit}"),
        }
    }
}

/// A figure of a row; none where what should be counted was not found.
struct Figure {
    what: &'static str,
    value: Option<f64>,
    limit: Limit,
}

impl Figure {
    fn new(what: &'static str, value: impl Into<Option<u32>>, limit: Limit) -> Self {
        Self { what, value: value.into().map(f64::from), limit }
    }

    /// `-` for none, else at most one decimal.
    fn text(&self) -> String {
        self.value.map_or_else(|| "-".into(), |value| format!("{}", (value * 10.).round() / 10.))
    }
}

/// Figures that belong together, a row for each thing measured; all rows have the same columns.
pub struct Table {
    title: &'static str,
    rows: Vec<(String, Vec<Figure>)>,
}

impl Table {
    /// Every figure beyond its limit: what it is, its value, the limit.
    pub fn faults(&self) -> Vec<String> {
        let figures = self.rows.iter().flat_map(|(name, figures)| figures.iter().map(move |figure| (name, figure)));
        let broken = figures.filter(|(_, figure)| !figure.limit.holds(figure.value));
        broken
            .map(|(name, figure)| format!("{name}: {} is {}, must be {}", figure.what, figure.text(), figure.limit))
            .collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let Some((_, columns)) = self.rows.first() else { return Ok(()) };
        let row = |out: &mut fmt::Formatter, cells: &mut dyn Iterator<Item = String>, name: &str| {
            for (cell, column) in cells.zip(columns) {
                write!(out, "{cell:>width$}  ", width = column.what.len().max(9))?;
            }
            writeln!(out, "{name}")
        };
        row(out, &mut columns.iter().map(|column| column.what.to_owned()), self.title)?;
        for (name, figures) in &self.rows {
            row(out, &mut figures.iter().map(Figure::text), name)?;
        }
        let limit = |column: usize| {
            let limits = self.rows.iter().map(|(_, figures)| figures[column].limit);
            limits.into_iter().find(|&limit| limit != Limit::None).map_or_else(String::new, |limit| limit.to_string())
        };
        row(out, &mut (0..columns.len()).map(limit), "limit")
    }
}

/// A row for every entry of the PTX, and for any other function that needs local memory: registers by role, memory, barriers.
pub fn entries(report: &Report, kernels: &[Kernel], format: &Format) -> Table {
    let own = OwnLimits::of(format);
    let at_most = |most: u32| if most == 0 { Limit::Exactly(0) } else { Limit::AtMost(most) };
    let row = |function: &Function| {
        let entry = function.registers.is_some();
        let kernel = kernels.iter().find(|kernel| kernel.name == function.name);
        // Only what multiplies has roles, stages and dynamic shared memory.
        let fused = entry && kernel.is_none_or(|kernel| !kernel.widths().is_empty());
        let if_so = |applies, limit| if applies { limit } else { Limit::None };
        let registers = |what, opcode, expected| {
            let found = kernel.map(|kernel| kernel.set_registers(opcode)).unwrap_or_default();
            let other = found.iter().find(|&&count| count != expected).or(found.first());
            Figure::new(what, other.copied(), if_so(fused, Limit::Exactly(expected)))
        };
        let dynamic = if fused { SharedLayout::new(format).bytes } else { 0 };
        let stages = format.packed_stages() >> (4 * (format.tiles.count - 1));
        let figures = vec![
            Figure::new("registers", function.registers, if_so(entry, Limit::AtMost(registers_at_launch(format)))),
            registers("helpers", "USETMAXREG.DEALLOC", format.helper_registers),
            registers("consumers", "USETMAXREG.TRY_ALLOC", format.consumer_registers),
            Figure::new("shared (B)", function.shared_bytes + dynamic, Limit::AtMost(SHARED)),
            Figure::new("stages", fused.then_some(stages as u32), if_so(fused, Limit::AtLeast(LEAST_STAGES))),
            Figure::new("stack (B)", function.stack_bytes, at_most(own.stack_bytes)),
            Figure::new("spilled (B)", function.spilled_bytes(), at_most(own.spilled_bytes)),
            Figure::new("LDL, STL", kernel.map(Kernel::local_accesses), if_so(entry, at_most(own.local_accesses))),
            Figure::new("C75xx", report.serialisations().count() as u32, Limit::Exactly(0)),
            Figure::new("barriers", function.barriers, if_so(entry, Limit::AtMost(NAMED_BARRIERS))),
            Figure::new("SASS", kernel.map(Kernel::len), Limit::None),
        ];
        (function.name.clone(), figures)
    };
    let shown =
        |function: &&Function| function.registers.is_some() || function.stack_bytes + function.spilled_bytes() > 0;
    Table { title: "entry", rows: report.functions.iter().filter(shown).map(row).collect() }
}

/// What is wrong with a kernel that records: it is held to no other limit, but to run as the one that does not it must keep its values in registers as well as that.
pub fn spills(report: &Report, format: &Format) -> Option<String> {
    let spilled: u32 = report.functions.iter().map(Function::spilled_bytes).sum();
    (spilled > OwnLimits::of(format).spilled_bytes).then(|| format!("{spilled} bytes are spilled"))
}

/// A row for every loop that multiplies, and for every width of wgmma that is in none: narrow ones first.
pub fn loops(kernels: &[Kernel], format: &Format) -> Table {
    let mut rows = Vec::new();
    for kernel in kernels {
        let mut loops = kernel.loops();
        let looped: BTreeSet<u32> = loops.iter().flat_map(|one| one.widths.clone()).collect();
        let alone = kernel.widths().into_iter().filter(|width| !looped.contains(width));
        loops.extend(alone.map(|width| Loop { widths: [width].into(), ..Loop::default() }));
        loops.sort_by_key(|one| one.widths.last().copied());
        rows.extend(loops.into_iter().map(|one| (loop_name(kernel, &one), loop_figures(&one, &OwnLimits::of(format)))));
    }
    Table { title: "loop", rows }
}

fn loop_name(kernel: &Kernel, found: &Loop) -> String {
    let width = found.widths.last().copied().unwrap_or_default();
    let place = if found.wgmma == 0 { "in no loop".into() } else { format!("loop at {}", found.address) };
    format!("{}: n{width} {place}", kernel.name)
}

fn loop_figures(found: &Loop, own: &OwnLimits) -> Vec<Figure> {
    let width = found.widths.last().copied();
    let beside = (found.wgmma > 0).then(|| f64::from(found.others) / f64::from(found.wgmma));
    let limit = if width >= Some(WIDE) { Limit::AtMost(own.beside_wgmma) } else { Limit::None };
    vec![
        Figure::new("width", width, Limit::None),
        Figure::new("wgmma", found.wgmma, Limit::AtLeast(1)),
        Figure::new("others", found.others, Limit::None),
        Figure { what: "beside each wgmma", value: beside, limit },
        Figure::new("groups in flight", found.in_flight, Limit::AtLeast(own.least_in_flight)),
        Figure::new("LDL, STL", found.local_accesses, Limit::AtMost(own.local_in_loop)),
    ]
}

/// The length of the device side and of its longest function.
pub fn sources(device: &DeviceSide) -> Table {
    let figures = vec![
        Figure::new("lines", device.lines, Limit::AtMost(DEVICE_LINES)),
        Figure::new("longest fn", device.longest_lines, Limit::AtMost(FUNCTION_LINES)),
    ];
    Table {
        title: "sources",
        rows: vec![(format!("device modules of kernel/src, longest fn {}", device.longest), figures)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sass;

    const PTXAS: &str = "ptxas info    : Function properties for moe
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 5 barriers
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
";

    fn clean_sass() -> String {
        ".text.moe:
        /*0000*/ @P0 USETMAXREG.DEALLOC.CTAPOOL 0x58 ;
        /*0010*/ USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xd0 ;
.L_loop:
        /*0020*/ MOV R0, R1 ;
        /*0030*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/ @P0 BRA `(.L_loop) ;
        /*0060*/ EXIT ;
"
        .into()
    }

    fn faults(ptxas: &str, sass: &str) -> Vec<String> {
        let kernels = sass::parse(sass);
        [entries(&Report::parse(ptxas), &kernels, &Format::BF16).faults(), loops(&kernels, &Format::BF16).faults()]
            .concat()
    }

    #[test]
    fn a_kernel_within_its_limits_has_no_faults() {
        assert_eq!(faults(PTXAS, &clean_sass()), Vec::<String>::new());
    }

    #[test]
    fn what_ptxas_reports_is_held_to_its_limits() {
        for (found, instead, fault) in [
            ("Used 168 reg", "Used 176 reg", "moe: registers is 176, must be <= 168".into()),
            ("used 5 barriers", "used 16 barriers", "moe: barriers is 16, must be <= 15".into()),
            (", used 5 barriers", "", "moe: barriers is -, must be <= 15".into()),
            (
                "5 barriers",
                "5 barriers, 65536 bytes smem",
                format!("moe: shared (B) is {}, must be <= 232448", SharedLayout::new(&Format::BF16).bytes + 65536),
            ),
            ("0 bytes stack frame", "64 bytes stack frame", "moe: stack (B) is 64, must be <= 56".into()),
            ("0 bytes spill stores, 0", "100 bytes spill stores, 12", "moe: spilled (B) is 112, must be <= 104".into()),
        ] {
            assert_eq!(faults(&PTXAS.replacen(found, instead, 1), &clean_sass()), [fault]);
        }
    }

    #[test]
    fn the_stack_of_a_function_that_is_no_entry_is_limited_too() {
        let (entry, helper) = PTXAS.split_at(PTXAS.rfind("0 bytes stack").unwrap());
        let ptxas = format!("{entry}{}", helper.replace("0 bytes stack", "80 bytes stack"));
        assert_eq!(faults(&ptxas, &clean_sass()), ["helper: stack (B) is 80, must be <= 56"]);
    }

    #[test]
    fn serialised_wgmma_is_a_fault() {
        let ptxas = format!("{PTXAS}ptxas info    : (C7510) Potential Performance Loss: ..\n");
        assert_eq!(faults(&ptxas, &clean_sass()), ["moe: C75xx is 1, must be = 0"]);
    }

    #[test]
    fn machine_code_is_held_to_its_limits() {
        let beside = "        /*0070*/ NOP ;\n".repeat(7);
        let local = "        /*0018*/ LDL R0, [R1] ;\n";
        for (found, instead, fault) in [
            ("DEALLOC.CTAPOOL 0x58", "DEALLOC.CTAPOOL 0x60", "moe: helpers is 96, must be = 88"),
            ("TRY_ALLOC.CTAPOOL UP0, 0xd0", "TRY_ALLOC.CTAPOOL UP0, 0xc8", "moe: consumers is 200, must be = 208"),
            ("USETMAXREG.TRY_ALLOC", "NOP", "moe: consumers is -, must be = 208"),
            (".L_loop:\n", &format!("{}.L_loop:\n", local.repeat(23)), "moe: LDL, STL is 23, must be <= 22"),
            ("gsb0, 0x1", "gsb0, 0x0", "moe: n64 loop at 0020: groups in flight is 0, must be >= 1"),
            ("WARPGROUP.DEPBAR", "NOP", "moe: n64 loop at 0020: groups in flight is -, must be >= 1"),
            (
                ".L_loop:\n",
                &format!(".L_loop:\n{beside}"),
                "moe: n64 loop at 0070: beside each wgmma is 10, must be <= 9",
            ),
        ] {
            assert_eq!(faults(PTXAS, &clean_sass().replacen(found, instead, 1)), [fault], "{found} as {instead}");
        }
    }

    #[test]
    fn narrow_tiles_may_issue_more() {
        let narrow = clean_sass()
            .replace("64x64x16", "64x32x16")
            .replace(".L_loop:\n", &format!(".L_loop:\n{}", "        /*0070*/ NOP ;\n".repeat(40)));
        assert_eq!(faults(PTXAS, &narrow), Vec::<String>::new());
    }

    #[test]
    fn wgmma_outside_of_loops_and_code_that_is_not_there_are_faults() {
        let straight = clean_sass().replace("@P0 BRA `(.L_loop)", "NOP");
        let expected = [
            "moe: n64 in no loop: wgmma is 0, must be >= 1",
            "moe: n64 in no loop: beside each wgmma is -, must be <= 9",
            "moe: n64 in no loop: groups in flight is -, must be >= 1",
        ];
        assert_eq!(faults(PTXAS, &straight), expected);
        assert_eq!(
            faults(PTXAS, ""),
            [
                "moe: helpers is -, must be = 88",
                "moe: consumers is -, must be = 208",
                "moe: LDL, STL is -, must be <= 22"
            ]
        );
    }

    #[test]
    fn stages_and_sources_are_held_to_their_limits() {
        assert!(!Limit::AtLeast(LEAST_STAGES).holds(Some(f64::from(LEAST_STAGES - 1))));
        let device =
            |lines, longest_lines| sources(&DeviceSide { lines, longest_lines, longest: "pull".into() }).faults();
        assert_eq!(device(3200, 120), Vec::<String>::new());
        let name = "device modules of kernel/src, longest fn pull";
        assert_eq!(
            device(3201, 121),
            [format!("{name}: lines is 3201, must be <= 3200"), format!("{name}: longest fn is 121, must be <= 120")]
        );
    }

    #[test]
    fn a_table_shows_every_figure_over_its_limit() {
        let table = sources(&DeviceSide { lines: 2600, longest_lines: 42, longest: "pull".into() }).to_string();
        let expected = "    lines  longest fn  sources
     2600          42  device modules of kernel/src, longest fn pull
  <= 3200      <= 120  limit
";
        assert_eq!(table, expected);
    }
}
