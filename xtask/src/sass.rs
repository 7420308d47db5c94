//! A kernel's SASS as nvdisasm prints it: its instructions, its control flow, and the loops that multiply.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use anyhow::Result;
use xshell::cmd;

use crate::nvidia::NvidiaTools;
use crate::workspace;

/// A kernel's machine code.
#[derive(Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    instructions: Vec<Instruction>,
    labels: HashMap<String, usize>,
}

#[derive(Debug)]
struct Instruction {
    /// Hexadecimal, as printed.
    address: String,
    predicated: bool,
    opcode: String,
    operands: String,
}

/// A loop that multiplies, and in which no smaller loop does.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Loop {
    /// Address of its first instruction, in hexadecimal.
    pub address: String,
    /// The Ns of its wgmmas.
    pub widths: BTreeSet<u32>,
    /// wgmmas of one round.
    pub wgmma: u32,
    /// Other instructions of the same round. The round counted is the path that multiplies most, of these the one with the fewest
    /// instructions in inner loops (waits that spin; each at most once), of these the longest. What only diverged warps run is no path.
    pub others: u32,
    /// Groups of wgmmas that its strictest wait leaves in flight; none if it has no wait.
    pub in_flight: Option<u32>,
    /// Loads and stores of local memory.
    pub local_accesses: u32,
}

/// Disassembles a cubin.
///
/// # Errors
/// When nvdisasm cannot read the file.
pub fn disassemble(tools: &NvidiaTools, cubin: &Path) -> Result<Vec<Kernel>> {
    let shell = workspace::shell()?;
    let nvdisasm = &tools.nvdisasm;
    Ok(parse(&cmd!(shell, "{nvdisasm} -c {cubin}").quiet().read()?))
}

/// The kernels of a disassembly.
pub fn parse(sass: &str) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in sass.lines() {
        if let Some(name) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            kernels.push(Kernel { name: name.to_owned(), instructions: Vec::new(), labels: HashMap::new() });
        } else if let Some(kernel) = kernels.last_mut() {
            if let Some(instruction) = Instruction::parse(line) {
                kernel.instructions.push(instruction);
            } else if let Some(label) = line.strip_suffix(':') {
                kernel.labels.insert(label.to_owned(), kernel.instructions.len());
            }
        }
    }
    kernels
}

impl Instruction {
    /// Whether it loads or stores local memory.
    fn is_local_access(&self) -> bool {
        matches!(self.operation(), "LDL" | "STL")
    }

    /// Takes in `/*0010*/ @!P0 BRA.U UP0, `(.L_x_1) ;`.
    fn parse(line: &str) -> Option<Self> {
        let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
        let text = rest.rsplit_once(';')?.0.trim();
        let (predicated, text) = match text.strip_prefix('@') {
            Some(predicated) => (true, predicated.split_once(' ')?.1.trim_start()),
            None => (false, text),
        };
        let (opcode, operands) = text.split_once(' ').unwrap_or((text, ""));
        Some(Self { address: address.into(), predicated, opcode: opcode.into(), operands: operands.trim().into() })
    }

    /// The opcode without its modifiers.
    fn operation(&self) -> &str {
        self.opcode.split('.').next().unwrap_or_default()
    }

    /// The N of a wgmma (`HGMMA.64xNx16` and its kin).
    fn wgmma_width(&self) -> Option<u32> {
        let mut parts = self.opcode.split('.');
        parts.next()?.strip_suffix("GMMA")?;
        parts.next()?.split('x').nth(1)?.parse().ok()
    }

    /// Groups of wgmmas that a wait leaves in flight.
    fn in_flight(&self) -> Option<u32> {
        self.opcode.starts_with("WARPGROUP.DEPBAR").then(|| self.last_number())?
    }

    /// The last operand.
    fn last_number(&self) -> Option<u32> {
        u32::from_str_radix(self.operands.rsplit(' ').next()?.strip_prefix("0x")?, 16).ok()
    }

    /// Where it may jump to.
    fn labels(&self) -> Vec<&str> {
        let list = self.operands.split_once("BRANCH_TARGETS ").map(|(_, list)| list.split('"').next());
        match list.flatten() {
            Some(list) => list.split(',').collect(),
            None => self.operands.split("`(").skip(1).filter_map(|rest| rest.split(')').next()).collect(),
        }
    }
}

impl Kernel {
    /// How many instructions it has.
    pub fn len(&self) -> u32 {
        self.instructions.len() as u32
    }

    /// Loads and stores of local memory.
    pub fn local_accesses(&self) -> u32 {
        self.instructions.iter().filter(|instruction| instruction.is_local_access()).count() as u32
    }

    /// The register counts that `setmaxnreg.dec` (`USETMAXREG.DEALLOC`) or `.inc` (`USETMAXREG.TRY_ALLOC`) sets.
    pub fn set_registers(&self, opcode: &str) -> BTreeSet<u32> {
        let sets = self.instructions.iter().filter(|instruction| instruction.opcode.starts_with(opcode));
        sets.filter_map(Instruction::last_number).collect()
    }

    /// The widths of its wgmmas, in loops or not.
    pub fn widths(&self) -> BTreeSet<u32> {
        self.instructions.iter().filter_map(Instruction::wgmma_width).collect()
    }

    /// The loops that multiply, in the order of their addresses.
    pub fn loops(&self) -> Vec<Loop> {
        let mut flow = self.flow();
        let mut cycles = Vec::new();
        for start in (0..self.instructions.len()).filter(|&i| self.instructions[i].wgmma_width().is_some()) {
            while let Some(cycle) = flow.cut_cycle(start) {
                cycles.push(cycle);
            }
        }
        let innermost = |cycle: &&Cycle| !cycles.iter().any(|other| other.is_within(cycle));
        let mut loops: Vec<_> = cycles.iter().filter(innermost).collect();
        loops.sort_by_key(|cycle| cycle.nodes.first().copied());
        loops.into_iter().map(|cycle| self.measure(cycle, &mut flow)).collect()
    }

    /// Counts a round of a loop whose back edges are cut.
    fn measure(&self, cycle: &Cycle, flow: &mut Flow) -> Loop {
        let mut inner = BTreeSet::new();
        for &node in &cycle.nodes {
            while let Some(cycle) = flow.cut_cycle(node) {
                inner.extend(cycle.nodes);
            }
        }
        let mut best: BTreeMap<usize, Option<Round>> = BTreeMap::new();
        let rounds = cycle.entries.iter().filter_map(|&entry| self.best_round(entry, cycle, &inner, flow, &mut best));
        let round = rounds.max().unwrap_or_default();
        let instructions = || cycle.nodes.iter().map(|&node| &self.instructions[node]);
        Loop {
            address: instructions().next().map_or_else(String::new, |first| first.address.clone()),
            widths: instructions().filter_map(Instruction::wgmma_width).collect(),
            wgmma: round.wgmma,
            others: round.instructions - round.wgmma,
            in_flight: instructions().filter_map(Instruction::in_flight).min(),
            local_accesses: instructions().filter(|instruction| instruction.is_local_access()).count() as u32,
        }
    }

    /// The best path from `node` to the end of a round.
    fn best_round(
        &self,
        node: usize,
        cycle: &Cycle,
        inner: &BTreeSet<usize>,
        flow: &Flow,
        best: &mut BTreeMap<usize, Option<Round>>,
    ) -> Option<Round> {
        if let Some(known) = best.get(&node) {
            return *known;
        }
        let following = flow.next[node].iter().filter(|next| cycle.nodes.contains(next));
        let rest = following.filter_map(|&next| self.best_round(next, cycle, inner, flow, best)).max();
        let rest = rest.max(cycle.latches.contains(&node).then(Round::default));
        let round = rest.map(|rest| Round {
            wgmma: rest.wgmma + u32::from(self.instructions[node].wgmma_width().is_some()),
            not_spinning: rest.not_spinning - i32::from(inner.contains(&node)),
            instructions: rest.instructions + 1,
        });
        best.insert(node, round);
        round
    }

    fn flow(&self) -> Flow {
        let end = self.instructions.len();
        let target = |label: &str| self.labels.get(label).copied().filter(|&target| target < end);
        let edges = |call: &dyn Fn(usize) -> Vec<usize>| {
            let edges = self.instructions.iter().enumerate().map(|(node, instruction)| {
                let jumps = || instruction.labels().into_iter().filter_map(target);
                let after = (node + 1 < end).then_some(node + 1);
                let conditional = instruction.predicated || !instruction.operands.starts_with('`');
                match instruction.operation() {
                    // Taken by a warp that has diverged where it must not.
                    "BRA" if instruction.opcode.ends_with(".DIV") => after.into_iter().collect(),
                    "BRA" | "JMP" => jumps().chain(after.filter(|_| conditional)).collect(),
                    "BRX" | "BRXU" | "JMX" | "JMXU" | "EXIT" | "RET" | "BPT" | "KILL" => {
                        jumps().chain(after.filter(|_| instruction.predicated)).collect()
                    }
                    "CALL" => call(node),
                    _ => after.into_iter().collect(),
                }
            });
            edges.collect::<Vec<Vec<usize>>>()
        };
        // A call goes on behind itself unless its function never returns, as panics.
        let into = edges(&|call| self.instructions[call].labels().into_iter().filter_map(target).collect());
        let returns = |call| {
            let reached = reachable(call, &into);
            reached
                .iter()
                .zip(&self.instructions)
                .any(|(&reached, instruction)| reached && instruction.operation() == "RET")
        };
        Flow::new(edges(&|call| (returns(call) && call + 1 < end).then_some(call + 1).into_iter().collect()))
    }
}

/// What a path through a loop is judged by, most important first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Round {
    wgmma: u32,
    not_spinning: i32,
    instructions: u32,
}

/// Instructions that reach each other.
#[derive(Debug)]
struct Cycle {
    nodes: BTreeSet<usize>,
    /// Those that are reached from outside.
    entries: BTreeSet<usize>,
    /// Those that went on to an entry.
    latches: BTreeSet<usize>,
}

impl Cycle {
    fn is_within(&self, other: &Self) -> bool {
        self.nodes.len() < other.nodes.len() && self.nodes.is_subset(&other.nodes)
    }
}

/// Which nodes are reached from `start` by one edge or more.
fn reachable(start: usize, edges: &[Vec<usize>]) -> Vec<bool> {
    let mut reached = vec![false; edges.len()];
    let mut open = vec![start];
    while let Some(node) = open.pop() {
        for &next in &edges[node] {
            if !std::mem::replace(&mut reached[next], true) {
                open.push(next);
            }
        }
    }
    reached
}

/// A kernel's control flow, one node an instruction.
struct Flow {
    next: Vec<Vec<usize>>,
    previous: Vec<Vec<usize>>,
}

impl Flow {
    /// What is not reached from the first instruction leads nowhere: it must not look like a second way into a loop.
    fn new(mut next: Vec<Vec<usize>>) -> Self {
        let reached = if next.is_empty() { Vec::new() } else { reachable(0, &next) };
        let mut previous = vec![Vec::new(); next.len()];
        for (node, following) in next.iter_mut().enumerate() {
            if node > 0 && !reached[node] {
                following.clear();
            }
            following.iter().for_each(|&after| previous[after].push(node));
        }
        Self { next, previous }
    }

    /// The largest cycle of `node`, whose edges back to where it is entered are cut, so that the next call finds the next smaller one.
    fn cut_cycle(&mut self, node: usize) -> Option<Cycle> {
        let forward = reachable(node, &self.next);
        if !forward[node] {
            return None;
        }
        let backward = reachable(node, &self.previous);
        let nodes: BTreeSet<usize> = (0..forward.len()).filter(|&i| forward[i] && backward[i]).collect();
        let entered = |node: &usize| self.previous[*node].iter().any(|before| !nodes.contains(before));
        let mut entries: BTreeSet<usize> = nodes.iter().copied().filter(entered).collect();
        if entries.is_empty() {
            entries.extend(nodes.first());
        }
        let mut latches = BTreeSet::new();
        for &node in &nodes {
            let edges = self.next[node].len();
            self.next[node].retain(|next| !entries.contains(next));
            if self.next[node].len() < edges {
                latches.insert(node);
            }
        }
        for &entry in &entries {
            self.previous[entry].retain(|before| !nodes.contains(before));
        }
        Some(Cycle { nodes, entries, latches })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernel `moe` of these lines, each `label:` or an instruction.
    fn kernel(lines: &str) -> Kernel {
        let line = |(address, line): (usize, &str)| match line.trim() {
            label if label.ends_with(':') => label.to_owned(),
            instruction => format!("        /*{address:04x}*/    {instruction} ;"),
        };
        let lines: Vec<String> = lines.trim().lines().enumerate().map(line).collect();
        parse(&format!(".text.moe:\n{}\n", lines.join("\n"))).remove(0)
    }

    fn found(address: &str, widths: &[u32], wgmma: u32, others: u32, in_flight: Option<u32>) -> Loop {
        Loop {
            address: address.into(),
            widths: widths.iter().copied().collect(),
            wgmma,
            others,
            in_flight,
            local_accesses: 0,
        }
    }

    const TASKS: &str = "
        MOV R0, RZ
        .L_task:
        LDS R2, [R3]
        @P4 BRA `(.L_end)
        .L_loop:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R19+UR36], R20
        @!P2 BRA `(.L_spin)
        .L_go:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, UP0
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        @!P0 BRA `(.L_first)
        SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R4+URZ], RZ
        .L_first:
        @P3 BRA `(.L_loop)
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        BRA `(.L_task)
        .L_end:
        EXIT
        .L_spin:
        YIELD
        SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R19+UR36], R20
        @!P2 BRA `(.L_spin)
        BRA `(.L_go)";

    #[test]
    fn a_round_takes_the_release_and_neither_the_spin_nor_what_is_around_the_loop() {
        // Wait, branch, 2 wgmmas, group wait, branch, arrive, branch.
        assert_eq!(kernel(TASKS).loops(), [found("0005", &[64], 2, 6, Some(1))]);
    }

    #[test]
    fn a_wait_that_spins_in_line_counts_once() {
        let inline = TASKS.replace("@!P2 BRA `(.L_spin)\n        .L_go:", "@!P2 BRA `(.L_loop)\n        .L_go:");
        assert_eq!(kernel(&inline).loops(), [found("0005", &[64], 2, 6, Some(1))]);
        let behind = inline.replace(".L_loop:\n", ".L_loop:\n        NOP\n        .L_wait:\n");
        let behind = behind.replace("@!P2 BRA `(.L_loop)", "@!P2 BRA `(.L_wait)");
        assert_eq!(kernel(&behind).loops(), [found("0005", &[64], 2, 7, Some(1))]);
    }

    #[test]
    fn wgmmas_before_the_loop_do_not_make_the_tasks_a_loop() {
        let peeled = TASKS.replacen("LDS R2, [R3]", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24", 1);
        assert_eq!(kernel(&peeled).loops(), [found("0005", &[64], 2, 6, Some(1))]);
    }

    #[test]
    fn wgmmas_in_no_loop_are_in_no_loop() {
        let straight = kernel("HGMMA.64x8x16.F32.BF16 R24, gdesc[UR20], R24, gsb0\nEXIT");
        assert_eq!((straight.loops(), straight.widths()), (vec![], [8].into()));
    }

    #[test]
    fn a_loop_may_be_entered_in_its_middle() {
        let loops = kernel(
            "BRX R18 -0xce0 (*\"BRANCH_TARGETS .L_0,.L_1\"*)
            .L_0:
            HGMMA.64x32x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
            WARPGROUP.DEPBAR.LE gsb0, 0x1
            .L_1:
            MOV R1, R2
            HGMMA.64x32x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
            WARPGROUP.DEPBAR.LE gsb0, 0x0
            BRA.U UP0, `(.L_0)
            EXIT",
        );
        // From one entry to the next: the second half is the longer one.
        assert_eq!(loops.loops(), [found("0002", &[32], 1, 3, Some(0))]);
    }

    #[test]
    fn nothing_comes_back_from_a_panic_or_goes_where_warps_diverge() {
        let panics = |last: &str| {
            let text = "
                .L_loop:
                HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
                @P1 BRA `(.L_panic)
                BRA.DIV UR4, `(.L_divergent)
                .L_back:
                @P0 BRA `(.L_loop)
                EXIT
                .L_divergent:
                NOP
                NOP
                BRA `(.L_back)
                .L_panic:
                CALL.REL.NOINC `($moe$panic)
                BRA `(.L_loop)
                $moe$panic:
                ";
            kernel(&format!("{text}{last}")).loops()
        };
        assert_eq!(panics("BPT.TRAP 0x1"), [found("0001", &[128], 1, 3, None)]);
        assert_eq!(panics("RET.REL.NODEC R4 `(moe)")[0].wgmma, 1);
        assert_eq!(panics("RET.REL.NODEC R4 `(moe)")[0].others, 3);
    }

    #[test]
    fn registers_and_local_memory_are_found() {
        let kernel = kernel(
            "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xd0
            USETMAXREG.DEALLOC.CTAPOOL 0x58
            @P0 STL.64 [R1+0x8], R2
            LDL R2, [R1]
            LDS R2, [R1]",
        );
        assert_eq!(kernel.set_registers("USETMAXREG.TRY_ALLOC"), [208].into());
        assert_eq!(kernel.set_registers("USETMAXREG.DEALLOC"), [88].into());
        assert_eq!((kernel.local_accesses(), kernel.len()), (2, 5));
    }
}
