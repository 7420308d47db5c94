//! How long the device side is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The modules that only the device compiles, counted in lines of code: neither blank nor all comment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DeviceSide {
    /// All lines.
    pub lines: u32,
    /// Those of the longest function, signature included.
    pub longest_lines: u32,
    /// That function's name.
    pub longest: String,
}

/// Counts the modules that `lib.rs` in `source` has for `nvptx64` alone; what host and device share does not count.
///
/// # Errors
/// When a source file cannot be read.
pub fn device_side(source: &Path) -> Result<DeviceSide> {
    let read = |file: &Path| fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()));
    let mut device = DeviceSide::default();
    for module in device_modules(&read(&source.join("lib.rs"))?) {
        let folder = source.join(module);
        let files = if folder.is_dir() { rust_files(&folder)? } else { vec![folder.with_extension("rs")] };
        for file in files {
            device.add(&read(&file)?);
        }
    }
    Ok(device)
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(files.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs")).collect())
}

/// The modules behind `#[cfg(target_arch = "nvptx64")]`.
fn device_modules(lib: &str) -> Vec<&str> {
    let mut device_only = false;
    let mut modules = Vec::new();
    for line in lib.lines() {
        if line.starts_with("#[") {
            device_only |= line == "#[cfg(target_arch = \"nvptx64\")]";
            continue;
        }
        let module = line.trim_start_matches("pub ").strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';'));
        modules.extend(module.filter(|_| device_only));
        device_only = false;
    }
    modules
}

impl DeviceSide {
    /// Adds a file that rustfmt has formatted: a function ends at the brace under its first letter.
    fn add(&mut self, text: &str) {
        let lines: Vec<&str> =
            text.lines().filter(|line| !line.trim().is_empty() && !line.trim().starts_with("//")).collect();
        self.lines += lines.len() as u32;
        for (start, line) in lines.iter().enumerate() {
            let Some(name) = function_name(line) else { continue };
            let indent = line.len() - line.trim_start().len();
            let ends = |line: &&&str| line.len() == indent + 1 && line.ends_with('}');
            let Some(end) = lines[start..].iter().position(|line| ends(&line)) else { continue };
            if end as u32 + 1 > self.longest_lines {
                (self.longest_lines, self.longest) = (end as u32 + 1, name.to_owned());
            }
        }
    }
}

/// `wait` in `pub unsafe fn wait<const N: u32>(`; none for a declaration or a function of one line.
fn function_name(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let (before, after) =
        if let Some(after) = line.strip_prefix("fn ") { ("", after) } else { line.split_once(" fn ")? };
    let known =
        |word: &str| word.starts_with("pub") || word.starts_with('"') || ["const", "unsafe", "extern"].contains(&word);
    let opens = !line.ends_with(';') && !line.ends_with('}');
    (opens && before.split(' ').all(|word| word.is_empty() || known(word))).then(|| after.split(['(', '<']).next())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_for_the_device_alone_are_told_from_shared_ones() {
        let lib = "pub mod layout;\n\n#[cfg(target_arch = \"nvptx64\")]\n#[macro_use]\nmod unroll;\n#[cfg(test)]\nmod tests;\n\
                   #[cfg(target_arch = \"nvptx64\")]\npub mod device;\npub mod tile;\n";
        assert_eq!(device_modules(lib), ["unroll", "device"]);
    }

    #[test]
    fn a_function_ends_at_the_brace_under_it() {
        let text = "impl A {
    /// Waits.
    pub const unsafe fn wait<const N: u32>(
        self,
    ) {

        if self.0 { x(); }
    }
}
pub unsafe extern \"ptx-kernel\" fn entry() {
    let f = |x| x;
    // calls fn wait
}
fn short() {}
trait B {
    fn declared(&self);
}
";
        let mut device = DeviceSide::default();
        device.add(text);
        assert_eq!(device, DeviceSide { lines: 14, longest_lines: 5, longest: "wait".into() });
    }
}
