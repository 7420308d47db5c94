//! The result as a safetensors file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ferromoe::{Error, Result};
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Checks that a file can be made at `path`, before work is spent on what goes into it.
pub fn check(path: &Path) -> Result<()> {
    let refuse = |reason: &str| Err(failed(path, io::Error::other(reason.to_owned())));
    match path.is_dir() {
        true => refuse("it is a folder; it must be a file name"),
        false if path.file_name().is_none() => refuse("it has no file name"),
        false if !folder(path).is_dir() => refuse("its folder does not exist"),
        false => Ok(()),
    }
}

/// Writes `output` BF16 [tokens, hidden] to `path`: whole, or not at all.
pub fn write(path: &Path, output: &[bf16], tokens: usize, hidden: usize) -> Result<()> {
    let bytes = bytemuck::cast_slice(output);
    let serialized = TensorView::new(Dtype::BF16, vec![tokens, hidden], bytes)
        .and_then(|view| safetensors::serialize([("output", view)], None))
        .map_err(|error| failed(path, io::Error::other(error)))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder(path).join(format!(".{name}.{}.tmp", std::process::id()));
    let written = write_through(&temporary, &serialized).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // What failed is worth telling, not that its remains could not be removed either.
        let _ = fs::remove_file(&temporary);
        failed(path, source)
    })
}

fn write_through(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::Io { action: "write", path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.safetensors");
        fs::write(&path, "something older").unwrap();
        let values: Vec<bf16> = (0..6).map(|value| bf16::from_f32(value as f32)).collect();
        write(&path, &values, 2, 3).unwrap();
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("output").unwrap();
        assert_eq!((view.dtype(), view.shape()), (Dtype::BF16, &[2, 3][..]));
        assert_eq!(view.data(), bytemuck::cast_slice::<bf16, u8>(&values));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the file is left");
    }

    #[test]
    fn impossible_places_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check(dir.path()).unwrap_err().to_string().contains("it is a folder"));
        assert!(check(&dir.path().join("absent/out")).unwrap_err().to_string().contains("folder does not exist"));
        check(&dir.path().join("out")).unwrap();
        write(&dir.path().join("absent/out"), &[], 0, 3).unwrap_err();
    }
}
