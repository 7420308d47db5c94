//! Files that a command writes: the place is found and checked before the work, and a file appears there whole or not at all.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ferromoe::{Error, Result};
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A file that could not be written after the work was done.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}: {source}")]
pub struct NotWritten {
    /// The file.
    pub path: PathBuf,
    /// The system's reason.
    pub source: io::Error,
}

/// The place of a file.
#[derive(Debug)]
pub struct Target {
    /// As the user named it.
    path: PathBuf,
    /// Behind all symbolic links.
    resolved: PathBuf,
    found: Option<Metadata>,
    /// Whether a new file takes the place of what is there; what must stay is written to: a device, a pipe, a file that has other
    /// names or another owner, or is in a folder that takes no new files.
    replace: bool,
}

impl Target {
    /// Finds the place at `path`.
    ///
    /// # Errors
    /// A folder, a socket, a file or folder that must not be written, a folder that does not exist, or the standard output.
    pub fn find(path: &Path) -> Result<Self> {
        Self::try_find(path).map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
    }

    fn try_find(path: &Path) -> io::Result<Self> {
        let found = match fs::metadata(path) {
            Ok(found) => Some(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let refuse = |reason: &str| Err(io::Error::other(reason.to_owned()));
        let path = path.to_owned();
        let Some(found) = found else {
            let resolved = resolve(&path)?;
            Temporary::make(folder(&resolved))?;
            return Ok(Self { path, resolved, found: None, replace: true });
        };
        if found.is_dir() {
            return refuse("it is a folder; it must be a file name");
        }
        if found.file_type().is_socket() {
            return refuse("it is a socket; it must be a file, a pipe or a device");
        }
        if is_standard_output(&found) {
            return refuse("it is the standard output, where the report goes; it must be another file");
        }
        if !found.is_file() {
            return Ok(Self { resolved: path.clone(), path, found: Some(found), replace: false });
        }
        let resolved = resolve(&path)?;
        OpenOptions::new().write(true).open(&resolved)?;
        let new = Temporary::make(folder(&resolved)).and_then(|new| new.file.metadata());
        let replace = new.is_ok_and(|new| found.nlink() == 1 && (found.uid(), found.gid()) == (new.uid(), new.gid()));
        Ok(Self { path, resolved, found: Some(found), replace })
    }

    /// As the user named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether what is written here would be found at `path`: the same file, under whatever name.
    pub fn is_at(&self, path: &Path) -> bool {
        match (&self.found, fs::metadata(path)) {
            (Some(ours), Ok(theirs)) => identity(ours) == identity(&theirs),
            // Neither is there.
            (None, Err(_)) => resolve(path).is_ok_and(|resolved| resolved == self.resolved),
            _ => false,
        }
    }

    /// Refuses a place where something is that is read, or would be if it were there.
    ///
    /// # Errors
    /// If it is one of `files`.
    pub fn refuse_any_of(&self, files: &[PathBuf]) -> Result<()> {
        match files.iter().find(|file| self.is_at(file)) {
            Some(file) => Err(self.refused(&format!("it would replace {}, which is read", file.display()))),
            None => Ok(()),
        }
    }

    /// Refuses a place that another file of the same command goes to. All may go to one device, such as /dev/null.
    ///
    /// # Errors
    /// If it is that of `other`.
    pub fn refuse_same(&self, other: &Self, option: &str) -> Result<()> {
        let device = self.found.as_ref().is_some_and(|found| found.file_type().is_char_device());
        match self.is_at(&other.path) && !device {
            true => Err(self.refused(&format!("{option} goes there too; each must have a file of its own"))),
            false => Ok(()),
        }
    }

    fn refused(&self, reason: &str) -> Error {
        Error::Io { action: "write", path: self.path.clone(), source: io::Error::other(reason.to_owned()) }
    }

    /// Writes the file.
    ///
    /// # Errors
    /// The system's; a file that is replaced as a whole is then as it was.
    pub fn write(
        &self,
        contents: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
    ) -> std::result::Result<(), NotWritten> {
        let written = if self.replace { self.replace(contents) } else { self.write_through(contents) };
        written.map_err(|source| NotWritten { path: self.path.clone(), source })
    }

    fn replace(&self, contents: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> io::Result<()> {
        let new = Temporary::make(folder(&self.resolved))?;
        fill(&new.file, contents)?;
        if let Some(found) = &self.found {
            new.file.set_permissions(found.permissions())?;
        }
        new.file.sync_all()?;
        fs::rename(&new.path, &self.resolved)
    }

    fn write_through(&self, contents: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> io::Result<()> {
        fill(&OpenOptions::new().write(true).truncate(true).open(&self.resolved)?, contents)
    }
}

fn fill(file: &File, contents: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::new(file);
    contents(&mut out)?;
    out.flush()
}

/// A new file that is gone with this, unless it was renamed.
struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    fn make(folder: &Path) -> io::Result<Self> {
        let mut number = 0;
        loop {
            let path = folder.join(format!(".ferromoe-{}-{number}.tmp", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { path, file }),
                // What a process of the same number left behind.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing of this name.
        let _ = fs::remove_file(&self.path);
    }
}

/// The path behind all symbolic links, also if there is nothing yet.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    if path.file_name().is_none() || path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(io::Error::other("it names a folder; it must be a file name"));
    }
    let mut path = path.to_owned();
    // As many as the system follows; it has told of more before this.
    for _ in 0..40 {
        match fs::read_link(&path) {
            Ok(target) => path = folder(&path).join(target),
            Err(_) => break,
        }
    }
    let folder = fs::canonicalize(folder(&path)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::other("its folder does not exist"),
        _ => error,
    })?;
    match path.file_name() {
        Some(name) => Ok(folder.join(name)),
        None => Err(io::Error::other("it names a folder; it must be a file name")),
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Device and inode: the same for one file under all its names.
fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// A terminal or another device may get both.
fn is_standard_output(found: &Metadata) -> bool {
    let output = io::stdout().as_fd().try_clone_to_owned().and_then(|output| File::from(output).metadata());
    !found.file_type().is_char_device() && output.is_ok_and(|output| identity(&output) == identity(found))
}

/// A safetensors file with `output` BF16 [tokens, hidden].
///
/// # Errors
/// As [`Target::write`].
pub fn write_tensor(
    target: &Target,
    output: &[bf16],
    tokens: usize,
    hidden: usize,
) -> std::result::Result<(), NotWritten> {
    target.write(|out| {
        let serialized = TensorView::new(Dtype::BF16, vec![tokens, hidden], bytemuck::cast_slice(output))
            .and_then(|view| safetensors::serialize([("output", view)], None))
            .map_err(io::Error::other)?;
        out.write_all(&serialized)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use safetensors::SafeTensors;

    use super::*;

    fn write(path: &Path, text: &str) {
        Target::find(path).unwrap().write(|out| out.write_all(text.as_bytes())).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_written_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.safetensors");
        fs::write(&path, "something older").unwrap();
        let values: Vec<bf16> = (0..6).map(|value| bf16::from_f32(value as f32)).collect();
        write_tensor(&Target::find(&path).unwrap(), &values, 2, 3).unwrap();
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("output").unwrap();
        assert_eq!((view.dtype(), view.shape()), (Dtype::BF16, &[2, 3][..]));
        assert_eq!(view.data(), bytemuck::cast_slice::<bf16, u8>(&values));
        assert_eq!(names(dir.path()), ["out.safetensors"], "nothing but the file is left");
    }

    #[test]
    fn impossible_places_are_refused_before_the_work() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "").unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        symlink("absent/out", at("astray")).unwrap();
        symlink("round", at("round")).unwrap();
        for (name, expected) in [
            ("", "it is a folder"),
            ("..", "it is a folder"),
            ("new/", "it names a folder"),
            ("absent/out", "folder does not exist"),
            ("astray", "folder does not exist"),
            ("file/out", "Not a directory"),
            ("round", "symbolic link"),
            ("socket", "it is a socket"),
        ] {
            let error = Target::find(&at(name)).unwrap_err().to_string();
            assert!(error.starts_with("cannot write ") && error.contains(expected), "{name}: {error}");
        }
        Target::find(Path::new("")).unwrap_err();
        assert_eq!(names(dir.path()), ["astray", "file", "round", "socket"]);
    }

    #[test]
    fn a_file_keeps_its_mode_its_links_and_its_place_behind_links() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("folder")).unwrap();
        for name in ["secret", "one", "folder/target"] {
            fs::write(at(name), "something older and longer").unwrap();
        }
        fs::set_permissions(at("secret"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::hard_link(at("one"), at("two")).unwrap();
        symlink("folder/target", at("link")).unwrap();
        symlink("folder/new", at("dangling")).unwrap();
        symlink("dangling", at("twice")).unwrap();
        write(&at("secret"), "new");
        assert_eq!(fs::metadata(at("secret")).unwrap().permissions().mode() & 0o7777, 0o640);
        write(&at("one"), "new");
        assert_eq!(fs::read(at("two")).unwrap(), b"new");
        write(&at("link"), "new");
        assert_eq!(fs::read(at("folder/target")).unwrap(), b"new");
        write(&at("twice"), "new");
        assert_eq!(fs::read(at("folder/new")).unwrap(), b"new");
        for link in ["link", "dangling", "twice"] {
            assert!(fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link}");
        }
        assert_eq!(names(dir.path()), ["dangling", "folder", "link", "one", "secret", "twice", "two"]);
        assert_eq!(names(&at("folder")), ["new", "target"]);
    }

    #[test]
    fn a_file_that_cannot_be_finished_is_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "older").unwrap();
        let fails = |out: &mut BufWriter<&File>| {
            out.write_all(&[0; 100_000])?;
            Err(io::Error::other("no more"))
        };
        let error = Target::find(&path).unwrap().write(fails).unwrap_err().to_string();
        assert!(error.ends_with("out: no more"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"older");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn devices_and_pipes_are_written_to() {
        let null = Target::find(Path::new("/dev/null")).unwrap();
        assert!(!null.replace);
        null.write(|out| out.write_all(b"text")).unwrap();
        null.refuse_same(&null, "--svg").unwrap();
        let full = Target::find(Path::new("/dev/full")).unwrap();
        let error = full.write(|out| out.write_all(b"text")).unwrap_err().to_string();
        assert!(error.starts_with("cannot write /dev/full: No space left"), "{error}");
    }

    #[test]
    fn one_file_is_known_under_all_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("folder")).unwrap();
        fs::write(at("read"), "").unwrap();
        fs::hard_link(at("read"), at("hard")).unwrap();
        symlink("read", at("soft")).unwrap();
        symlink("folder", at("way")).unwrap();
        let read = [at("read"), at("folder/absent")];
        for name in ["read", "hard", "soft", "folder/../read", "folder/absent", "way/absent"] {
            let error = Target::find(&at(name)).unwrap().refuse_any_of(&read).unwrap_err().to_string();
            assert!(error.contains("it would replace") && error.contains("which is read"), "{name}: {error}");
        }
        for name in ["new", "folder/new"] {
            Target::find(&at(name)).unwrap().refuse_any_of(&read).unwrap();
        }
        let [one, same] = ["new", "folder/../new"].map(|name| Target::find(&at(name)).unwrap());
        let error = one.refuse_same(&same, "--svg").unwrap_err().to_string();
        assert!(error.contains("--svg goes there too"), "{error}");
    }
}
