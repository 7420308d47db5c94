//! The files of a checkpoint folder, and the tensors of one layer within them.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::family::BLOCKS;
use crate::fields::Fields;
use crate::matrix::Bytes;
use crate::tensors::{LFS_POINTER, Tensor, TensorFile};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Where the tensors of a checkpoint are.
pub(crate) enum Files {
    Single(TensorFile),
    Sharded { index: PathBuf, file_of: HashMap<String, PathBuf> },
}

impl Files {
    pub fn open(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            return Ok(Files::Single(TensorFile::open(&single)?));
        }
        if !index.exists() {
            return Err(Error::NoModel { dir: dir.to_owned(), found: weight_files(dir) });
        }
        let fields = Fields::parse(&index, &read(&index)?)?;
        let mut file_of = HashMap::new();
        for (tensor, file) in fields.object("weight_map")? {
            let wrong = || fields.error("weight_map", format!("has {file} for {tensor:?}; it must be a file name"));
            file_of.insert(tensor.clone(), dir.join(file.as_str().ok_or_else(wrong)?));
        }
        Ok(Files::Sharded { index, file_of })
    }

    /// One file that is in memory; `dir` stands for its folder in errors.
    pub fn embedded(dir: &Path, model: Bytes) -> Result<Self> {
        Ok(Files::Single(TensorFile::new(&dir.join(SINGLE), model)?))
    }

    /// The names of all tensors.
    pub fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Files::Single(file) => Box::new(file.names()),
            Files::Sharded { file_of, .. } => Box::new(file_of.keys().map(String::as_str)),
        }
    }

    /// The file that says which tensors there are.
    pub fn path(&self) -> &Path {
        match self {
            Files::Single(file) => file.path(),
            Files::Sharded { index, .. } => index,
        }
    }

    /// The tensors whose names begin with `prefix`; of a sharded checkpoint, only their files are opened.
    pub fn of_layer(&self, prefix: &str) -> Result<LayerTensors<'_>> {
        let mut unread: BTreeSet<String> =
            self.names().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect();
        let mut opened = HashMap::new();
        if let Files::Sharded { file_of, .. } = self {
            for (_, path) in file_of.iter().filter(|(name, _)| name.starts_with(prefix)) {
                if !opened.contains_key(path.as_path()) {
                    let file = TensorFile::open(path)?;
                    // What a file has beyond the index counts as well.
                    unread.extend(file.names().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned));
                    opened.insert(path.as_path(), file);
                }
            }
        }
        unread.retain(|name| BLOCKS.iter().any(|block| name.starts_with(block)));
        Ok(LayerTensors { files: self, prefix: prefix.to_owned(), opened, unread: Mutex::new(unread) })
    }
}

/// The tensors of one layer, which remember which of its feed-forward block's were not asked for. Names are relative to the layer.
pub(crate) struct LayerTensors<'a> {
    files: &'a Files,
    prefix: String,
    opened: HashMap<&'a Path, TensorFile>,
    unread: Mutex<BTreeSet<String>>,
}

impl LayerTensors<'_> {
    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// A tensor that has to be there.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let found = self.find(name).ok_or_else(|| self.missing(name))?;
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(found)
    }

    /// The names that were not asked for.
    pub fn unread(&self) -> Vec<String> {
        let unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        unread.iter().map(|name| format!("{}{name}", self.prefix)).collect()
    }

    pub fn path(&self) -> &Path {
        self.files.path()
    }

    fn find(&self, name: &str) -> Option<Tensor<'_>> {
        let name = format!("{}{name}", self.prefix);
        match self.files {
            Files::Single(file) => file.find(&name),
            Files::Sharded { file_of, .. } => self.opened.get(file_of.get(&name)?.as_path())?.find(&name),
        }
    }

    /// The error for a tensor that is not there; where it is there in a quantised form, it says so.
    fn missing(&self, name: &str) -> Error {
        let stem = name.strip_suffix("weight").unwrap_or(name);
        let packed = [
            ("qweight", "awq or gptq"),
            ("weight_packed", "compressed-tensors"),
            ("weight_blocks", "mxfp4"),
            ("weight.absmax", "bitsandbytes"),
        ];
        let unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        let found = packed.iter().find(|(suffix, _)| unread.contains(&format!("{stem}{suffix}")));
        match found {
            Some((_, method)) => Error::Quantised { path: self.path().to_owned(), method: (*method).to_owned() },
            None => Error::TensorMissing { path: self.path().to_owned(), name: format!("{}{name}", self.prefix) },
        }
    }
}

/// The files of a folder that look like weights, sorted: those of a set, if there are any. What cannot be listed is not there.
fn weight_files(dir: &Path) -> Vec<String> {
    let kinds = ["safetensors", "bin", "pt", "pth", "gguf"];
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().extension().is_some_and(|ext| kinds.iter().any(|kind| ext == *kind)))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    if names.iter().any(|name| name.contains("-of-")) {
        names.retain(|name| name.contains("-of-"));
    }
    names
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { action: "read", path: path.to_owned(), source })?;
    if bytes.starts_with(LFS_POINTER) {
        return Err(Error::LfsPointer { path: path.to_owned() });
    }
    Ok(bytes)
}
