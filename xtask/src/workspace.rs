//! Where things are in the repository.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use xshell::Shell;

/// The repository's root: the parent of this crate's folder.
pub fn root() -> PathBuf {
    let xtask = env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    let xtask = Path::new(&xtask);
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// The kernel crate's folder.
pub fn kernel_crate() -> PathBuf {
    root().join("kernel")
}

/// Where xtask keeps what it builds and installs; cargo's own build outputs lie beside it.
pub fn target_dir() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    root().join(target)
}

/// The cargo that runs us, or the one on the path.
pub fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// The first file called `name` in a folder of `PATH`.
pub fn on_path(name: &str) -> Option<PathBuf> {
    all_on_path(name).next()
}

/// Every file called `name` in the folders of `PATH`, in their order.
pub fn all_on_path(name: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let folders: Vec<PathBuf> = env::var_os("PATH").map_or_else(Vec::new, |path| env::split_paths(&path).collect());
    let name = name.to_owned();
    folders.into_iter().map(move |folder| folder.join(&name)).filter(|file| file.is_file())
}

/// rustup's home folder, which holds its toolchains.
pub fn rustup_home() -> Option<PathBuf> {
    let home = || env::home_dir().map(|home| home.join(".rustup"));
    env::var_os("RUSTUP_HOME").map(PathBuf::from).or_else(home)
}

/// A shell for programs other than the cargo that runs us: without the library folders that rustup and cargo prepended to
/// `LD_LIBRARY_PATH`, which make another toolchain's rustc load this one's compiler.
pub fn shell() -> Result<Shell> {
    let shell = Shell::new()?;
    if let Some(folders) = env::var_os("LD_LIBRARY_PATH") {
        let ours: Vec<PathBuf> = rustup_home().into_iter().chain([target_dir()]).collect();
        shell.set_var("LD_LIBRARY_PATH", env::join_paths(folders_outside(&folders, &ours))?);
    }
    Ok(shell)
}

/// The folders of a search path that lie in none of `roots`.
fn folders_outside(folders: &OsStr, roots: &[PathBuf]) -> Vec<PathBuf> {
    let outside = |folder: &PathBuf| !roots.iter().any(|root| folder.starts_with(root));
    env::split_paths(folders).filter(outside).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cargos_library_folders_are_dropped() {
        let folders = OsStr::new("/repo/target/debug/deps:/usr/local/nvidia/lib64:/home/.rustup/toolchains/x/lib");
        let ours = ["/home/.rustup".into(), "/repo/target".into()];
        assert_eq!(folders_outside(folders, &ours), [PathBuf::from("/usr/local/nvidia/lib64")]);
    }
}
