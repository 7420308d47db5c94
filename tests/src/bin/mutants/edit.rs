//! Edits of PTX text: which instructions, named by what they are and by the functions that they were inlined from, and what becomes
//! of them. Line numbers and registers change with every build of the kernel; these names do not.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// What happens to an instruction.
#[derive(Clone, Copy, Debug)]
pub enum Edit {
    /// It is gone.
    Drop,
    /// Its text changes.
    Replace(&'static str, &'static str),
    /// A value is added to an operand. Operands are counted over registers and numbers, from the end if negative.
    Add(i32, i64),
    /// The lowest bit of an operand is flipped.
    Flip(i32),
    /// Two operands are exchanged.
    Swap(usize, usize),
    /// An operand becomes a value.
    Become(i32, i64),
    /// Only these bits of an operand are left.
    And(i32, u32),
    /// An operand becomes the rank of the executing CTA in its cluster.
    BecomeRank(i32),
    /// An operand is an address in an array at this offset of shared memory, and its distance from there loses a bit.
    WithoutBit(i32, u32, u32),
    /// A wait for an mbarrier finds it complete.
    Pass,
    /// The next conditional branch is always taken.
    Branch,
    /// The next conditional branch is never taken.
    Stay,
    /// It becomes a move of this value to its first operand.
    Set(u64),
    /// It is there twice.
    Twice,
    /// It moves behind the next instruction that contains this text.
    Behind(&'static str),
}

/// Instructions, and what happens to them.
#[derive(Clone, Copy, Debug)]
pub struct Plant {
    /// What the instruction starts with.
    pub instruction: &'static str,
    /// Functions that it was inlined from, innermost first, as `file::function`, with spaces between; all are there.
    pub from: &'static str,
    /// Which place in the first of these functions, in the order of its lines; all if absent.
    pub place: Option<usize>,
    /// What happens to it.
    pub edit: Edit,
}

/// PTX, line by line, and where the lines come from.
pub struct Source<'a> {
    lines: Vec<&'a str>,
    /// Of each line: the frames it was inlined from, innermost first.
    frames: Vec<Vec<Frame>>,
}

/// A place in the kernel's sources.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Frame {
    /// `file::function`
    function: String,
    line: u32,
    column: u32,
}

impl fmt::Display for Plant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of `{}` from {} (place {:?})", self.edit, self.instruction, self.from, self.place)
    }
}

impl<'a> Source<'a> {
    /// Reads `ptx`; the kernel's sources are in `root`.
    ///
    /// # Errors
    /// `.loc` lines of sources that cannot be read.
    pub fn read(ptx: &'a str, root: &Path) -> Result<Self> {
        let mut functions = Functions { root, files: BTreeMap::new() };
        let mut current = Vec::new();
        let mut source = Self { lines: Vec::new(), frames: Vec::new() };
        for line in ptx.lines() {
            if line.trim_start().starts_with(".loc")
                && let Some((_, places)) = line.split_once("//")
            {
                let places = places.split("@[").map(|place| place.trim().trim_end_matches([' ', ']']));
                current = places.map(|place| functions.frame(place)).collect::<Result<_>>()?;
            }
            source.lines.push(line);
            source.frames.push(current.clone());
        }
        Ok(source)
    }

    /// The text with every edit made.
    ///
    /// # Errors
    /// A plant that names no instruction, or that changes nothing.
    pub fn edited(&self, plants: &[Plant]) -> Result<String> {
        let mut lines: Vec<String> = self.lines.iter().map(|line| (*line).to_owned()).collect();
        for plant in plants {
            let found = self.find(plant)?;
            ensure!(!found.is_empty(), "no instruction for {plant}");
            for at in found {
                let before = lines.clone();
                apply(&mut lines, at, plant.edit).with_context(|| format!("{plant}, PTX line {}", at + 1))?;
                ensure!(lines != before, "{plant} changes nothing at PTX line {}", at + 1);
            }
        }
        Ok(lines.join("\n") + "\n")
    }

    /// Indices of the lines that a plant means.
    fn find(&self, plant: &Plant) -> Result<Vec<usize>> {
        let wanted: Vec<_> = plant.from.split(' ').collect();
        let mut by_place: BTreeMap<&Frame, Vec<usize>> = BTreeMap::new();
        for (at, (line, frames)) in self.lines.iter().zip(&self.frames).enumerate() {
            let matches = line.trim_start().starts_with(plant.instruction)
                && wanted.iter().all(|wanted| frames.iter().any(|frame| frame.function == *wanted));
            if matches && let Some(place) = frames.iter().find(|frame| frame.function == wanted[0]) {
                by_place.entry(place).or_default().push(at);
            }
        }
        match plant.place {
            None => Ok(by_place.into_values().flatten().collect()),
            Some(place) => {
                let count = by_place.len();
                let found = by_place.into_values().nth(place);
                found.with_context(|| format!("{plant}: there are {count} places"))
            }
        }
    }
}

/// Functions of the kernel's sources by line.
struct Functions<'a> {
    root: &'a Path,
    /// Of each file: the first lines of its functions, and their names.
    files: BTreeMap<String, Vec<(u32, String)>>,
}

impl Functions<'_> {
    /// `path:line:column` as a frame; LLVM leaves out a column of 0.
    fn frame(&mut self, place: &str) -> Result<Frame> {
        let mut parts = place.split(':');
        let path = parts.next().unwrap_or_default();
        let mut number = || parts.next().map_or(Ok(0), str::parse);
        let (line, column) = (number(), number());
        let (Ok(line), Ok(column)) = (line, column) else {
            bail!("`{place}` is not path:line:column");
        };
        let stem = Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !path.starts_with("kernel/") {
            return Ok(Frame { function: stem, line, column });
        }
        if !self.files.contains_key(path) {
            let file = self.root.join(path);
            let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            self.files.insert(path.to_owned(), functions(&text));
        }
        let functions = &self.files[path];
        let name = functions.iter().rev().find(|(first, _)| *first <= line).map_or("", |(_, name)| name);
        Ok(Frame { function: format!("{stem}::{name}"), line, column })
    }
}

/// First line and name of every function in Rust text as rustfmt leaves it.
fn functions(text: &str) -> Vec<(u32, String)> {
    let named = |line: &str| {
        let line = line.trim_start();
        let start = if line.starts_with("fn ") { 0 } else { line.find(" fn ")? + 1 };
        if line.starts_with("//") {
            return None;
        }
        let name = &line[start + 3..];
        let end = name.find(|c: char| !c.is_alphanumeric() && c != '_')?;
        Some(name[..end].to_owned())
    };
    text.lines().zip(1..).filter_map(|(line, number)| Some((number, named(line)?))).collect()
}

fn apply(lines: &mut [String], at: usize, edit: Edit) -> Result<()> {
    let line = lines[at].clone();
    match edit {
        Edit::Drop => lines[at].clear(),
        Edit::Replace(from, to) => lines[at] = line.replacen(from, to, 1),
        Edit::Add(operand, value) => {
            lines[at] = with_operand(&line, operand, |bits, old| format!("add.s{bits} mutant, {old}, {value};"))?
        }
        Edit::Flip(operand) => {
            lines[at] = with_operand(&line, operand, |bits, old| format!("xor.b{bits} mutant, {old}, 1;"))?
        }
        Edit::Swap(first, second) => {
            let operands = operands(&line);
            let (Some(first), Some(second)) = (operands.get(first), operands.get(second)) else {
                bail!("`{line}` has only {} operands", operands.len());
            };
            let [a, b] = [first, second].map(|place| &line[place.clone()]);
            let (before, between, behind) = (&line[..first.start], &line[first.end..second.start], &line[second.end..]);
            lines[at] = format!("{before}{b}{between}{a}{behind}");
        }
        Edit::Become(operand, value) => {
            lines[at] = with_operand(&line, operand, |bits, _| format!("mov.b{bits} mutant, {value};"))?
        }
        Edit::And(operand, mask) => {
            lines[at] = with_operand(&line, operand, |bits, old| format!("and.b{bits} mutant, {old}, {mask};"))?
        }
        Edit::BecomeRank(operand) => {
            lines[at] = with_operand(&line, operand, |_, _| "mov.u32 mutant, %cluster_ctarank;".to_owned())?
        }
        Edit::WithoutBit(operand, first, bit) => {
            // Dynamic shared memory begins at a multiple of 1024.
            lines[at] = with_operand(&line, operand, |bits, old| {
                format!(
                    "sub.s{bits} mutant, {old}, {first};\nand.b{bits} mutant, mutant, {bit};\nsub.s{bits} mutant, {old}, mutant;"
                )
            })?
        }
        Edit::Pass => lines[at] = "setp.eq.u32 complete, 0, 0;".to_owned(),
        Edit::Branch => {
            let branch = next(lines, at, |line| line.starts_with('@') && line.contains("bra"))?;
            lines[branch] = lines[branch][lines[branch].find("bra").unwrap_or(0)..].to_owned();
        }
        Edit::Stay => {
            let branch = next(lines, at, |line| line.starts_with('@') && line.contains("bra"))?;
            lines[branch].clear();
        }
        Edit::Set(value) => {
            let target = line.split([' ', ',']).find(|word| word.trim_start().starts_with("%r"));
            let target = target.with_context(|| format!("`{line}` has no register"))?;
            let bits = if target.starts_with("%rd") { 64 } else { 32 };
            lines[at] = format!("mov.b{bits} {target}, {value};");
        }
        Edit::Twice => lines[at] = format!("{line}\n{line}"),
        Edit::Behind(other) => {
            let other = next(lines, at, |line| line.contains(other) && !line.starts_with("//"))?;
            lines[other] = format!("{}\n{line}", lines[other]);
            lines[at].clear();
        }
    }
    Ok(())
}

/// The first line after `at` for which `wanted` holds.
fn next(lines: &[String], at: usize, wanted: impl Fn(&str) -> bool) -> Result<usize> {
    let found = (at + 1..lines.len()).find(|&line| wanted(lines[line].trim_start()));
    found.context("no such line follows")
}

/// Where a line's registers and numbers are.
fn operands(line: &str) -> Vec<Range<usize>> {
    let is_operand = |text: &str| text.starts_with("%r") || text.starts_with(|c: char| c.is_ascii_digit());
    let opcode = line.trim_start().find([' ', '\t']).unwrap_or(0) + line.len() - line.trim_start().len();
    let mut operands = Vec::new();
    let mut start = opcode;
    for (end, c) in line.char_indices().skip_while(|(index, _)| *index < opcode) {
        if !(c.is_alphanumeric() || c == '%' || c == '_') {
            if is_operand(&line[start..end]) {
                operands.push(start..end);
            }
            start = end + 1;
        }
    }
    operands
}

/// The instruction with another operand, in a scope of its own: what `change` makes of the old one, of so many bits.
fn with_operand(line: &str, operand: i32, change: impl Fn(u32, &str) -> String) -> Result<String> {
    let operands = operands(line);
    let index = if operand < 0 { operand + operands.len() as i32 } else { operand };
    let place = usize::try_from(index).ok().and_then(|index| operands.get(index));
    let place = place.with_context(|| format!("`{line}` has only {} operands", operands.len()))?.clone();
    let old = &line[place.clone()];
    let kinds = [("%rd", 64), ("%rs", 16)];
    let bits = kinds.iter().find(|(kind, _)| old.starts_with(kind)).map_or(32, |(_, bits)| *bits);
    let change = change(bits, old);
    let new = format!("{}mutant{}", &line[..place.start], &line[place.end..]);
    Ok(format!("{{\n.reg .b{bits} mutant;\n{change}\n{new}\n}}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "\t.loc\t1 5 9 // rust/x.rs:5:9 @[ kernel/src/device/fence.rs:9:14 ]\n\tfence.proxy.async;\n@%p1 bra $L;\n\tbar.sync 0, %r5;\n";

    fn root() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    #[test]
    fn an_instruction_is_found_by_the_function_it_was_inlined_from() {
        let source = Source::read(PTX, &root()).expect("readable");
        let plant = |instruction, from, edit| [Plant { instruction, from, place: None, edit }];
        let edited = source.edited(&plant("fence.proxy", "fence::fence_acq_rel_gpu", Edit::Drop)).expect("found");
        assert_eq!(edited, PTX.replace("\tfence.proxy.async;", ""));
        source.edited(&plant("fence.proxy", "fence::other", Edit::Drop)).expect_err("another function");
        source.edited(&plant("fence", "fence::fence_acq_rel_gpu", Edit::Replace("x.y", "z"))).expect_err("no change");
        let edited = source.edited(&plant("fence", "fence::fence_acq_rel_gpu", Edit::Branch)).expect("found");
        assert_eq!(edited, PTX.replace("@%p1 bra", "bra"));
    }

    #[test]
    fn operands_are_counted_from_either_end() {
        let line = "ld.x.v2.u32 [%rd7, {%r1, %r2}], 16, _;";
        for (operand, bits, old, new) in [
            (0, 64, "%rd7", "[mutant, {%r1, %r2}], 16"),
            (2, 32, "%r2", "[%rd7, {%r1, mutant}], 16"),
            (-1, 32, "16", "[%rd7, {%r1, %r2}], mutant"),
        ] {
            let expected =
                format!("{{\n.reg .b{bits} mutant;\nadd.s{bits} mutant, {old}, -8;\nld.x.v2.u32 {new}, _;\n}}");
            let less = |bits, old: &str| format!("add.s{bits} mutant, {old}, -8;");
            assert_eq!(with_operand(line, operand, less).expect("an operand"), expected);
        }
        with_operand(line, 4, |_, _| String::new()).expect_err("four operands");
        let mut lines = [line.to_owned()];
        apply(&mut lines, 0, Edit::Swap(1, 2)).expect("both operands");
        assert_eq!(lines[0], "ld.x.v2.u32 [%rd7, {%r2, %r1}], 16, _;");
    }

    #[test]
    fn functions_are_found_in_rust() {
        let text = "/// fn no\npub const fn a(x: u32) {\n}\n    fn b<T>() {\n// fn c()\n";
        assert_eq!(functions(text), [(2, "a".to_owned()), (4, "b".to_owned())]);
    }
}
