//! The marks that rustc leaves out of the LLVM module of a device program.

/// The launch bounds of every kernel of a module (PTX ISA, performance-tuning directives `.maxntid` and `.minnctapersm`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchBounds {
    /// Most threads a CTA is launched with.
    pub threads: u32,
    /// CTAs that must fit on an SM at once.
    pub ctas_per_sm: u32,
}

/// Marks up a module in LLVM's text form:
/// - every `asm sideeffect` call and every function becomes `convergent`, as CUDA's compilers have it: rustc omits it, and LLVM would copy a
///   barrier, or the call of a function that has one, into both sides of a branch;
/// - a kernel's references become structures passed by value, in the constant bank (CUDA's `__grid_constant__`): rustc cannot pass one
///   that is aligned to more than 16 bytes;
/// - every kernel gets its launch bounds: rustc has no way to say them, and without them ptxas ignores `setmaxnreg` (C7508).
///
/// Returns the new text and the number of kernels in it.
pub fn mark(module: &str, bounds: LaunchBounds) -> (String, usize) {
    let mut out = String::with_capacity(module.len() + 4096);
    let mut kernels = 0;
    for line in module.lines() {
        if let Some(at) = asm_arguments_end(line) {
            splice(&mut out, line, at, " convergent");
        } else if let Some(at) = attributes_start(line) {
            if !is_kernel(line) {
                splice(&mut out, line, at, " convergent");
                out.push('\n');
                continue;
            }
            let LaunchBounds { threads, ctas_per_sm } = bounds;
            let (head, tail) = line.split_at(at);
            let line = format!("{}{tail}", pass_by_value(head));
            let at = line.len() - tail.len();
            splice(
                &mut out,
                &line,
                at,
                &format!(" convergent \"nvvm.maxntid\"=\"{threads}\" \"nvvm.minctasm\"=\"{ctas_per_sm}\""),
            );
            kernels += 1;
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    (out, kernels)
}

/// A kernel's definition, up to its attributes, with every `ptr .. align A .. dereferenceable(N) %name` passed by value.
fn pass_by_value(definition: &str) -> String {
    let mut out = String::new();
    let mut rest = definition;
    while let Some((head, tail)) = rest.split_once(" dereferenceable(") {
        let (Some(start), Some((bytes, behind))) = (head.rfind("ptr "), tail.split_once(')')) else { break };
        let align = head[start..].split(" align ").nth(1).and_then(|align| align.split(' ').next()).unwrap_or("1");
        let attributes = format!("noalias readonly byval([{bytes} x i8]) align {align} \"nvvm.grid_constant\"");
        out.push_str(&format!("{}ptr {attributes}", &head[..start]));
        rest = behind;
    }
    out + rest
}

fn splice(out: &mut String, line: &str, at: usize, insertion: &str) {
    out.push_str(&line[..at]);
    out.push_str(insertion);
    out.push_str(&line[at..]);
}

/// Where the function attributes of an `asm sideeffect` call begin: behind its argument list.
fn asm_arguments_end(line: &str) -> Option<usize> {
    const ASM: &str = " asm sideeffect ";
    let asm = line.find(ASM)? + ASM.len();
    // `.. "template", "constraints"(arguments) attributes`; LLVM writes a quote inside a string as \22.
    let constraints_end = line[asm..].match_indices('"').nth(3)?.0 + asm + 1;
    closing_parenthesis(line, constraints_end)
}

/// Whether a function's definition is that of a kernel.
fn is_kernel(definition: &str) -> bool {
    definition.split('@').next().is_some_and(|head| head.split(' ').any(|word| word == "ptx_kernel"))
}

/// Where the function attributes of a definition begin: behind its parameters and the linkage words after them.
fn attributes_start(line: &str) -> Option<usize> {
    let name = line.strip_prefix("define ")?.find('@')? + "define ".len();
    let mut at = closing_parenthesis(line, name + line[name..].find('(')?)?;
    for word in [" unnamed_addr", " local_unnamed_addr"] {
        if line[at..].starts_with(word) {
            at += word.len();
        }
    }
    Some(at)
}

/// The position behind the parenthesis that closes the one at `open`; parentheses in strings do not count.
fn closing_parenthesis(line: &str, open: usize) -> Option<usize> {
    let mut depth = 0;
    let mut in_string = false;
    for (at, byte) in line.bytes().enumerate().skip(open) {
        match byte {
            b'"' => in_string = !in_string,
            b'(' if !in_string => depth += 1,
            b')' if !in_string => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
        if depth == 0 {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: LaunchBounds = LaunchBounds { threads: 384, ctas_per_sm: 1 };

    fn marked(line: &str) -> String {
        mark(line, BOUNDS).0.trim_end().to_owned()
    }

    #[test]
    fn inline_assembly_becomes_convergent() {
        assert_eq!(
            marked(r#"  call void asm sideeffect alignstack "bar.sync 1, 128;", "~{memory}"(), !dbg !38, !srcloc !41"#),
            r#"  call void asm sideeffect alignstack "bar.sync 1, 128;", "~{memory}"() convergent, !dbg !38, !srcloc !41"#
        );
        assert_eq!(
            marked(
                r#"  %1 = tail call i32 asm sideeffect "x (${0}, \22$1\22", "=r,l"(ptr getelementptr (i8, ptr @a, i64 8), i32 %2) #46, !dbg !1"#
            ),
            r#"  %1 = tail call i32 asm sideeffect "x (${0}, \22$1\22", "=r,l"(ptr getelementptr (i8, ptr @a, i64 8), i32 %2) convergent #46, !dbg !1"#
        );
    }

    #[test]
    fn kernels_get_launch_bounds() {
        let line = "define ptx_kernel void @moe(ptr noundef align(4) %p, i32 %n) unnamed_addr #1 !dbg !54 {";
        let (text, kernels) = mark(line, BOUNDS);
        assert_eq!(kernels, 1);
        assert_eq!(
            text.trim_end(),
            "define ptx_kernel void @moe(ptr noundef align(4) %p, i32 %n) unnamed_addr convergent \"nvvm.maxntid\"=\"384\" \"nvvm.minctasm\"=\"1\" #1 !dbg !54 {"
        );
    }

    #[test]
    fn functions_become_convergent() {
        let (text, kernels) = mark("define internal void @ptx_kernel(i32 %n) unnamed_addr #1 {", BOUNDS);
        assert_eq!(
            (text.trim_end(), kernels),
            ("define internal void @ptx_kernel(i32 %n) unnamed_addr convergent #1 {", 0)
        );
    }

    #[test]
    fn references_are_passed_by_value() {
        let line = "define ptx_kernel void @moe(ptr noalias noundef readonly align 64 captures(address, read_provenance) dereferenceable(2880) %params, i64 %n) unnamed_addr #1 {";
        let head = "define ptx_kernel void @moe(ptr noalias readonly byval([2880 x i8]) align 64 \"nvvm.grid_constant\" %params, i64 %n)";
        assert!(marked(line).starts_with(head), "{}", marked(line));
    }

    #[test]
    fn other_lines_stay() {
        for line in [r#"  %1 = call i32 asm "mov.u32 $0, %x;", "=r"() #2"#, "  call ptx_kernel void @moe()"] {
            assert_eq!(mark(line, BOUNDS), (format!("{line}\n"), 0));
        }
    }
}
