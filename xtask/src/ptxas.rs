//! What ptxas says of a PTX file.

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
    /// Named barriers of the CTA; none for a function that is not a kernel.
    pub barriers: Option<u32>,
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

impl Report {
    /// Takes in what `ptxas -v` printed.
    pub fn parse(text: &str) -> Self {
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

    /// What says that wgmma is serialised or setmaxnreg ignored: the C75xx family.
    pub fn serialisations(&self) -> impl Iterator<Item = &String> {
        self.warnings.iter().filter(|line| diagnostic_code(line).is_some_and(|code| code.starts_with("C75")))
    }
}

impl Function {
    /// Bytes that spills store and load.
    pub fn spilled_bytes(&self) -> u32 {
        self.spill_store_bytes + self.spill_load_bytes
    }

    /// Takes in a line of numbers: `0 bytes stack frame, ..` or `Used 168 registers, used 5 barriers, 1024 bytes smem`.
    fn take(&mut self, line: &str) {
        for part in line.split(',').map(|part| part.trim().trim_start_matches(['U', 'u']).trim_start_matches("sed ")) {
            let Some((number, what)) = part.split_once(' ') else { continue };
            let Ok(number) = number.parse() else { continue };
            match what {
                "registers" => self.registers = Some(number),
                "barriers" => self.barriers = Some(number),
                "bytes smem" => self.shared_bytes = number,
                "bytes stack frame" => self.stack_bytes = number,
                "bytes spill stores" => self.spill_store_bytes = number,
                "bytes spill loads" => self.spill_load_bytes = number,
                _ => {}
            }
        }
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
    fn a_report_is_read_function_by_function() {
        let moe = Function {
            name: "moe".into(),
            registers: Some(168),
            barriers: Some(16),
            shared_bytes: 1024,
            ..Function::default()
        };
        let panic = Function { name: "panic".into(), ..Function::default() };
        assert_eq!(Report::parse(CLEAN), Report { functions: vec![moe, panic], warnings: Vec::new() });
    }

    #[test]
    fn serialised_wgmma_is_told_from_other_advice() {
        let serialised =
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..";
        let other = "ptxas info    : (C8001) Something else";
        let report = Report::parse(&format!("{CLEAN}{serialised}\n{other}\n"));
        assert_eq!(report.warnings, [serialised, other]);
        assert_eq!(report.serialisations().collect::<Vec<_>>(), [serialised]);
        assert_eq!(diagnostic_code("ptxas info : (Cubin)"), None);
    }
}
