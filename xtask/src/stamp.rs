//! The stamp that ties the committed PTX to the sources it was made from.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// What the first line of a stamped PTX file begins with; the digest follows.
const PREFIX: &str = "// source digest: sha256 ";

/// The digest of a kernel crate: SHA-256 over `recipe` (how it is compiled), its `Cargo.toml` and every file under `src/`,
/// each as path, length and contents, in the order of the paths.
pub fn digest(crate_dir: &Path, recipe: &str) -> Result<String> {
    let mut files = vec![crate_dir.join("Cargo.toml")];
    collect(&crate_dir.join("src"), &mut files)?;
    files.sort();
    let mut hash = Sha256::new();
    hash.update(recipe);
    for file in files {
        let contents = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(crate_dir)?.to_string_lossy().into_owned();
        hash.update(format!("\0{name}\0{}\0", contents.len()));
        hash.update(contents);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// `ptx` with the digest as its first line and the compilers as its second.
pub fn apply(digest: &str, compilers: &str, ptx: &str) -> String {
    format!("{PREFIX}{digest}\n// compilers: {compilers}\n{ptx}")
}

/// The digest in the first line of a PTX text, if it has one.
pub fn read(ptx: &str) -> Option<&str> {
    ptx.lines().next()?.strip_prefix(PREFIX)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_reads_back() {
        let stamped = apply("00ff", "rustc 1.0", ".version 8.6\n");
        assert_eq!(read(&stamped), Some("00ff"));
        assert!(stamped.ends_with("\n.version 8.6\n"));
        assert_eq!(read(".version 8.6\n"), None);
    }

    #[test]
    fn the_digest_changes_with_the_recipe_only_when_it_should() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let digest = |recipe| digest(here, recipe).unwrap();
        assert_eq!(digest("a"), digest("a"));
        assert_ne!(digest("a"), digest("b"));
        assert_eq!(digest("a").len(), 64);
    }
}
