//! What ptxas says of a PTX file, and what it must not say.

use std::fmt;
use std::path::Path;

use anyhow::{Result, bail};
use xshell::cmd;

use crate::nvidia::NvidiaTools;
use crate::workspace;

/// ptxas's account of one function (`ptxas -v`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Registers per thread; `None` for a function that is not a kernel.
    pub registers: Option<u32>,
    /// Static shared memory, in bytes.
    pub shared_bytes: u32,
    /// Stack frame, in bytes.
    pub stack_bytes: u32,
    /// Bytes stored by spills.
    pub spill_store_bytes: u32,
    /// Bytes loaded by spills.
    pub spill_load_bytes: u32,
}

/// ptxas's account of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Every function of the file.
    pub functions: Vec<Function>,
    /// Warnings and performance advice, as written.
    pub warnings: Vec<String>,
}

/// Assembles `ptx` for `arch` into `cubin`.
///
/// # Errors
/// ptxas's own message when it rejects the file.
pub fn assemble(tools: &NvidiaTools, arch: &str, ptx: &Path, cubin: &Path) -> Result<Report> {
    let shell = workspace::shell()?;
    let ptxas = &tools.ptxas;
    let output = cmd!(shell, "{ptxas} -arch={arch} -v {ptx} -o {cubin}").quiet().ignore_status().output()?;
    let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("ptxas rejects {}:\n{text}", ptx.display());
    }
    Ok(Report::parse(&text))
}

/// How many instructions of each function's SASS are `wgmma` (`HGMMA` and its kin), of how many: `(name, wgmma, all)`.
///
/// # Errors
/// When nvdisasm cannot read the file.
pub fn count_wgmma(tools: &NvidiaTools, cubin: &Path) -> Result<Vec<(String, usize, usize)>> {
    let shell = workspace::shell()?;
    let nvdisasm = &tools.nvdisasm;
    Ok(count_in_sass(&cmd!(shell, "{nvdisasm} -c {cubin}").quiet().read()?))
}

fn count_in_sass(sass: &str) -> Vec<(String, usize, usize)> {
    let mut counts: Vec<(String, usize, usize)> = Vec::new();
    for line in sass.lines() {
        if let Some(name) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            counts.push((name.to_owned(), 0, 0));
        } else if let Some((_, wgmma, all)) = counts.last_mut().filter(|_| line.trim_start().starts_with("/*")) {
            *all += 1;
            *wgmma += usize::from(line.split([' ', '.']).any(|word| word.ends_with("GMMA")));
        }
    }
    counts
}

impl Report {
    fn parse(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            let note = line.strip_prefix("ptxas info").map(|rest| rest.trim_start_matches([' ', ':']));
            if let Some(name) = note.and_then(|note| note.strip_prefix("Function properties for ")) {
                report.functions.push(Function { name: name.to_owned(), ..Function::default() });
            } else if line.contains("warning") || diagnostic_code(line).is_some() {
                report.warnings.push(line.to_owned());
            } else if let Some(function) = report.functions.last_mut() {
                function.take(note.unwrap_or(line));
            }
        }
        report
    }

    /// Everything a ferromoe kernel must not have: spills, stack frames, and the C75xx family, which says that wgmma is
    /// serialised or setmaxnreg ignored.
    pub fn faults(&self) -> Vec<String> {
        let functions = self.functions.iter().filter_map(|function| {
            let Function { name, stack_bytes, spill_store_bytes, spill_load_bytes, .. } = function;
            (stack_bytes + spill_store_bytes + spill_load_bytes > 0).then(|| {
                format!("{name}: stack frame {stack_bytes} B, spill stores {spill_store_bytes} B, spill loads {spill_load_bytes} B; all must be 0")
            })
        });
        let warnings =
            self.warnings.iter().filter(|line| diagnostic_code(line).is_some_and(|code| code.starts_with("C75")));
        functions.chain(warnings.cloned()).collect()
    }
}

impl Function {
    /// Takes in a line of numbers: `0 bytes stack frame, ..` or `Used 168 registers, .., 1024 bytes smem`.
    fn take(&mut self, line: &str) {
        for part in line.split(',').map(|part| part.trim().trim_start_matches("Used ")) {
            let Some((number, what)) = part.split_once(' ') else { continue };
            let Ok(number) = number.parse() else { continue };
            match what {
                "registers" => self.registers = Some(number),
                "bytes smem" => self.shared_bytes = number,
                "bytes stack frame" => self.stack_bytes = number,
                "bytes spill stores" => self.spill_store_bytes = number,
                "bytes spill loads" => self.spill_load_bytes = number,
                _ => {}
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let row = |out: &mut fmt::Formatter, name: &str, cells: [&str; 5]| {
            let [registers, shared, stack, stores, loads] = cells;
            writeln!(out, "{registers:>9}  {shared:>10}  {stack:>11}  {stores:>12}  {loads:>11}  {name}")
        };
        row(out, "function", ["registers", "shared (B)", "stack (B)", "spilled (B)", "filled (B)"])?;
        for function in &self.functions {
            let registers = function.registers.map_or_else(|| "-".to_owned(), |count| count.to_string());
            let Function { shared_bytes, stack_bytes, spill_store_bytes, spill_load_bytes, .. } = function;
            let [shared, stack, stores, loads] =
                [shared_bytes, stack_bytes, spill_store_bytes, spill_load_bytes].map(|n| n.to_string());
            row(out, &function.name, [&registers, &shared, &stack, &stores, &loads])?;
        }
        self.warnings.iter().try_for_each(|warning| writeln!(out, "{warning}"))
    }
}

/// `C7510` in `ptxas info    : (C7510) Potential Performance Loss: ..`.
fn diagnostic_code(line: &str) -> Option<&str> {
    let code = line.split_once("(C")?.1.split_once(')')?.0;
    let start = line.find("(C")? + 1;
    (!code.is_empty() && code.bytes().all(|byte| byte.is_ascii_digit())).then(|| &line[start..=start + code.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: &str = "ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function 'moe' for 'sm_90a'
ptxas info    : Function properties for moe
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1024 bytes smem
ptxas info    : Compile time = 333.887 ms
ptxas info    : Function properties for panic
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
";

    #[test]
    fn a_clean_report_has_no_faults() {
        let report = Report::parse(CLEAN);
        let moe = Function { name: "moe".into(), registers: Some(168), shared_bytes: 1024, ..Function::default() };
        let panic = Function { name: "panic".into(), ..Function::default() };
        assert_eq!(report, Report { functions: vec![moe, panic], warnings: Vec::new() });
        assert_eq!(report.faults(), Vec::<String>::new());
    }

    #[test]
    fn spills_and_stack_frames_are_faults() {
        let spilled = CLEAN.replacen(
            "0 bytes stack frame, 0 bytes spill stores, 0",
            "16 bytes stack frame, 8 bytes spill stores, 12",
            1,
        );
        let faults = Report::parse(&spilled).faults();
        assert_eq!(faults, ["moe: stack frame 16 B, spill stores 8 B, spill loads 12 B; all must be 0"]);
    }

    #[test]
    fn serialised_wgmma_is_a_fault() {
        let line =
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..";
        let report = Report::parse(&format!("{CLEAN}{line}\n"));
        assert_eq!(report.faults(), [line]);
        assert_eq!(diagnostic_code(line), Some("C7510"));
        assert_eq!(diagnostic_code("ptxas info : (Cubin)"), None);
    }

    #[test]
    fn wgmma_is_counted_in_sass() {
        let sass = ".text.moe:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24, UP1 ;
        /*0020*/              @P0 QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR24], R24 ;
";
        assert_eq!(count_in_sass(sass), [("moe".to_owned(), 2, 3)]);
    }
}
