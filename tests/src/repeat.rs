//! The one command that repeats a run that failed.

use std::panic;
use std::path::Path;
use std::sync::Once;

/// From now on a test that panics also says how it is repeated.
pub fn name_failing_tests() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |what| {
            before(what);
            let test = std::thread::current();
            let program = std::env::current_exe().unwrap_or_default();
            let by_cargo = std::env::var_os("CARGO_MANIFEST_DIR").is_some();
            eprintln!("repeat it with\n  {}", test_command(&program, test.name(), by_cargo));
        }));
    });
}

/// The command for one test of a program of tests, or for all of them where the thread is not a test's.
fn test_command(program: &Path, thread: Option<&str>, by_cargo: bool) -> String {
    let test = thread.filter(|name| *name != "main").map(|name| format!(" {name} --exact")).unwrap_or_default();
    if !by_cargo {
        return format!("{}{test}", quoted(&program.to_string_lossy()));
    }
    let stem = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let name = stem.rsplit_once('-').map_or(&*stem, |(name, _)| name);
    format!("cargo test -p ferromoe-tests --test {name} --{test}")
}

/// Text as one word for a shell.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_is_named_to_cargo_or_to_its_program() {
        let program = Path::new("/t/debug/deps/layer-0b1d");
        let command = "cargo test -p ferromoe-tests --test layer -- uneven_tokens --exact";
        assert_eq!(test_command(program, Some("uneven_tokens"), true), command);
        assert_eq!(test_command(program, Some("main"), true), "cargo test -p ferromoe-tests --test layer --");
        assert_eq!(test_command(Path::new("tests/layer"), Some("a"), false), "tests/layer a --exact");
    }

    #[test]
    fn words_survive_a_shell() {
        for (text, expected) in
            [("tiles", "tiles"), ("wide rows", "'wide rows'"), ("it's", r"'it'\''s'"), ("`x`", "'`x`'")]
        {
            assert_eq!(quoted(text), expected);
        }
    }
}
