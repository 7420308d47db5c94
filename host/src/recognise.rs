//! Whose tensors a checkpoint has, where nobody knows its `model_type`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::error::Error;
use crate::family::{
    BLOCKS, Experts, FAMILIES, FamilySpec, LAYER_PREFIXES, Layout, Parts, SHARED_GATE, Shared, Stored,
};
use crate::files::Files;

/// The error for a `model_type` that no family has.
pub(crate) fn unknown_model_type(path: &Path, model_type: &str, fits: &[&str]) -> Error {
    let known: Vec<&str> =
        FAMILIES.iter().filter(|family| family.can_run()).flat_map(|family| family.model_types).copied().collect();
    let problem = match fits {
        [] => format!("is {model_type:?}; supported are {}", known.join(", ")),
        _ => format!(
            "is {model_type:?}, which is not known, but the tensors have the names of {}; if the layer is the same, say so in a copy of the file",
            fits.join(" or ")
        ),
    };
    Error::Field { path: path.to_owned(), field: "model_type".into(), problem }
}

/// The families, by `model_type`, whose names a layer's tensors have: all of them and no others.
pub(crate) fn families_that_fit(files: &Files) -> Vec<&'static str> {
    let mut layers: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for name in files.names() {
        for rest in LAYER_PREFIXES.iter().filter_map(|prefix| name.strip_prefix(prefix)) {
            if let Some((number, tensor)) = rest.split_once('.')
                && number.bytes().all(|digit| digit.is_ascii_digit())
                && BLOCKS.iter().any(|block| tensor.starts_with(block))
            {
                layers.entry(&name[..name.len() - tensor.len()]).or_default().insert(tensor);
            }
        }
    }
    let fits = |spec: &&FamilySpec| {
        layers.values().any(|names| spec.layouts.iter().any(|layout| has_names(spec, layout, names)))
    };
    FAMILIES.iter().filter(fits).map(|spec| spec.model_types[0]).collect()
}

/// Whether a layer of this family may have these tensors and no others.
fn has_names(spec: &FamilySpec, layout: &Layout, names: &BTreeSet<&str>) -> bool {
    let mut needed = vec![layout.router.to_owned(), layout.experts.first()];
    if spec.router.bias {
        needed.push(layout.bias.to_owned());
    }
    if let Shared::Gated(_) = spec.shared {
        needed.push(SHARED_GATE.to_owned());
    }
    let of_parts = |rest: &str, parts: &Parts| parts.iter().any(|part| rest.strip_prefix(part) == Some(".weight"));
    let expert = |name: &str| match &layout.experts {
        Experts::Each { prefix, parts } => name
            .strip_prefix(prefix)
            .and_then(|rest| rest.strip_prefix('.')?.split_once('.'))
            .is_some_and(|(_, rest)| of_parts(rest, parts)),
        Experts::Fused { gate_up, down } | Experts::Transposed { gate_up, down } => [*gate_up, *down].contains(&name),
    };
    let shared = |name: &str| match (&spec.shared, &layout.shared) {
        (Shared::None, _) => false,
        (_, Stored::Apart { prefix, parts }) => {
            name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')).is_some_and(|rest| of_parts(rest, parts))
        }
        (_, Stored::Fused { gate_up, down }) => [*gate_up, *down].contains(&name),
    };
    needed.iter().all(|name| names.contains(name.as_str()))
        && names.iter().all(|name| needed.iter().any(|needed| needed == name) || expert(name) || shared(name))
}
