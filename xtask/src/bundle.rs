//! `cargo xtask bundle`: a folder that checks and measures on a GPU machine with no Rust and no network.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use xshell::{Shell, cmd};

use crate::build;
use crate::{progress, workspace};

/// A bundle must travel easily.
const MAX_BYTES: u64 = 40 << 20;

/// The scripts at the top of the bundle.
const SCRIPTS: [(&str, &str); 2] =
    [("check", include_str!("../bundle/check.sh")), ("bench", include_str!("../bundle/bench.sh"))];

/// Makes `target/bundle/` anew: `ferromoe`, `tests/` with the correctness tests, `fixtures/`,
/// `torch_baseline.py`, and the scripts `check` and `bench`.
///
/// # Errors
/// When something does not build, or the bundle is larger than 40 MB.
pub fn bundle() -> Result<()> {
    build::ensure()?;
    let bundle = workspace::target_dir().join("bundle");
    let shell = Shell::new()?;
    shell.change_dir(workspace::root());
    clear(&shell, &bundle)?;
    shell.create_dir(bundle.join("tests"))?;

    let programs = progress::step("building the programs", || {
        executables(&shell, "bin", &["build", "-p", "ferromoe", "--bin", "ferromoe"])
    })?;
    let tests = progress::step("building the tests", || {
        executables(&shell, "test", &["test", "--no-run", "-p", "ferromoe-tests", "--test", "*"])
    })?;
    for (name, file) in &programs {
        strip(&shell, file, &bundle.join(name))?;
    }
    for (name, file) in &tests {
        strip(&shell, file, &bundle.join("tests").join(name))?;
    }
    shell.copy_file("bench/torch_baseline.py", bundle.join("torch_baseline.py"))?;
    copy_folder(&workspace::root().join("tests/fixtures"), &bundle.join("fixtures"))?;
    for (name, text) in SCRIPTS {
        let file = bundle.join(name);
        shell.write_file(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {} executable", file.display()))?;
    }

    let bytes = folder_bytes(&bundle)?;
    if bytes > MAX_BYTES {
        bail!("{} has {bytes} bytes; it must have at most {MAX_BYTES}", bundle.display());
    }
    let names: Vec<&str> = tests.iter().map(|(name, _)| name.as_str()).collect();
    eprintln!("{}: {:.1} MB, tests: {}", bundle.display(), bytes as f64 / 1e6, names.join(", "));
    Ok(())
}

/// What a bundle holds, or has held, beside the scripts.
const CONTENTS: [&str; 5] = ["ferromoe", "tests", "ferromoe.ptx", "fixtures", "torch_baseline.py"];

/// Removes what an earlier bundle put there, and nothing else, such as results that `bench` left.
fn clear(shell: &Shell, bundle: &Path) -> Result<()> {
    for name in CONTENTS.into_iter().chain(SCRIPTS.map(|(name, _)| name)) {
        shell.remove_path(bundle.join(name))?;
    }
    Ok(())
}

/// Runs a cargo command in release mode; gives the executables of one kind of target that came of it, by name. (Tests bring the
/// programs of their package along.)
fn executables(shell: &Shell, kind: &str, command: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let cargo = workspace::cargo();
    let format = "--message-format=json-render-diagnostics";
    let messages = cmd!(shell, "{cargo} {command...} --release {format}").quiet().read()?;
    let found: Vec<_> = messages.lines().filter_map(|message| executable(message, kind)).collect();
    if found.is_empty() {
        bail!("`cargo {}` built no executable", command.join(" "));
    }
    Ok(found)
}

/// The target's name and executable of one of cargo's messages, if it is about one of this kind.
fn executable(message: &str, kind: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["target"]["kind"] != json!([kind]) {
        return None;
    }
    let file = message["executable"].as_str()?;
    Some((message["target"]["name"].as_str()?.to_owned(), file.into()))
}

/// Copies a program without its symbols, which are most of it.
fn strip(shell: &Shell, from: &Path, to: &Path) -> Result<()> {
    cmd!(shell, "strip -o {to} {from}").quiet().run().context("strip comes with the linker's package, binutils")
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in entries(from)? {
        let target = to.join(entry.file_name().unwrap_or_default());
        if entry.is_dir() {
            copy_folder(&entry, &target)?;
        } else {
            fs::copy(&entry, &target).with_context(|| format!("cannot copy {}", entry.display()))?;
        }
    }
    Ok(())
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let bytes = |entry: PathBuf| if entry.is_dir() { folder_bytes(&entry) } else { Ok(entry.metadata()?.len()) };
    entries(folder)?.into_iter().map(bytes).sum()
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    Ok(entries.map(|entry| Ok(entry?.path())).collect::<Result<_, std::io::Error>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_messages_name_executables() {
        let message =
            r#"{"reason":"compiler-artifact","target":{"name":"layer","kind":["test"]},"executable":"/t/layer-1f"}"#;
        assert_eq!(executable(message, "test"), Some(("layer".into(), "/t/layer-1f".into())));
        assert_eq!(executable(message, "bin"), None);
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"ferromoe","kind":["test"]},"executable":null}"#;
        assert_eq!(executable(library, "test"), None);
        assert_eq!(executable("warning: text", "test"), None);
    }

    #[test]
    fn the_scripts_are_ones_that_a_shell_understands() {
        let shell = Shell::new().unwrap();
        for (_, text) in SCRIPTS {
            cmd!(shell, "sh -n").stdin(text).quiet().run().unwrap();
        }
    }

    #[test]
    fn what_was_measured_in_an_earlier_bundle_stays() {
        let shell = Shell::new().unwrap();
        let bundle = workspace::target_dir().join("bundle-clear-test");
        shell.remove_path(&bundle).unwrap();
        for name in ["ferromoe", "tests/kernel", "fixtures/mixtral/config.json", "bench", "bench-20260101.jsonl"] {
            shell.write_file(bundle.join(name), "").unwrap();
        }
        clear(&shell, &bundle).unwrap();
        assert_eq!(entries(&bundle).unwrap(), [bundle.join("bench-20260101.jsonl")]);
        shell.remove_path(bundle).unwrap();
    }

    #[test]
    fn a_folder_is_copied_with_everything_in_it() {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundle");
        let to = workspace::target_dir().join("bundle-test");
        copy_folder(&from, &to).unwrap();
        assert_eq!(folder_bytes(&to).unwrap(), folder_bytes(&from).unwrap());
        fs::remove_dir_all(to).unwrap();
    }
}
