//! NumPy's `.npy` and safetensors.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::{Dtype, SafeTensors};

use crate::values::{Contents, Scalar};

const MAGIC: &[u8] = b"\x93NUMPY";

/// NumPy has no bf16 and no FP8: what ml_dtypes writes is bytes without a type.
const TYPES: [(&str, Scalar); 14] = [
    ("|u1", Scalar::U8),
    ("|i1", Scalar::S8),
    ("<u2", Scalar::U16),
    ("<i2", Scalar::S16),
    ("<u4", Scalar::U32),
    ("<i4", Scalar::S32),
    ("<u8", Scalar::U64),
    ("<i8", Scalar::S64),
    ("<f2", Scalar::F16),
    ("<f4", Scalar::F32),
    ("<f8", Scalar::F64),
    ("<V2", Scalar::Bf16),
    ("|V1", Scalar::E4m3),
    ("|b1", Scalar::U8),
];

/// What stands behind a key in the header, up to where it ends.
fn field<'a>(header: &'a str, key: &str) -> Result<&'a str> {
    let start = header.find(&format!("'{key}'")).with_context(|| format!("the header has no `{key}`"))?;
    let rest = header[start + key.len() + 2..].trim_start().strip_prefix(':').context("a `:` is missing")?.trim_start();
    let end = if rest.starts_with('(') { rest.find(')').map(|at| at + 1) } else { rest.find([',', '}']) };
    Ok(rest[..end.unwrap_or(rest.len())].trim())
}

/// Reads the bytes of an `.npy`.
pub fn parse_npy(bytes: &[u8]) -> Result<Contents> {
    let rest = bytes.strip_prefix(MAGIC).context("it does not start as an .npy does")?;
    let (version, rest) = rest.split_first_chunk::<2>().context("it is too short")?;
    let (length, rest) = if version[0] == 1 {
        let (length, rest) = rest.split_first_chunk::<2>().context("it is too short")?;
        (usize::from(u16::from_le_bytes(*length)), rest)
    } else {
        let (length, rest) = rest.split_first_chunk::<4>().context("it is too short")?;
        (u32::from_le_bytes(*length) as usize, rest)
    };
    ensure!(length <= rest.len(), "its header is cut off");
    let (header, data) = rest.split_at(length);
    let header = std::str::from_utf8(header).context("its header is no text")?;
    ensure!(field(header, "fortran_order")? == "False", "its order is Fortran's");
    let descr = field(header, "descr")?.trim_matches(['\'', '"']);
    let plain = descr.replace('|', "<");
    let known = TYPES.iter().find(|(name, _)| *name == descr || name.replace('|', "<") == plain);
    let (_, scalar) = known.with_context(|| format!("its type is `{descr}`"))?;
    let dims = field(header, "shape")?.trim_matches(['(', ')']);
    let dims = dims.split(',').map(str::trim).filter(|dim| !dim.is_empty());
    let shape = dims.map(crate::values::number).collect::<Result<Vec<u64>>>()?;
    let bytes = shape.iter().try_fold(scalar.bytes() as u64, |bytes, dim| bytes.checked_mul(*dim));
    ensure!(bytes == Some(data.len() as u64), "it has {} bytes for a shape of {shape:?}", data.len());
    Ok(Contents { bytes: data.len() as u64, data: Some(data.to_vec()), scalar: Some(*scalar), shape })
}

/// An `.npy` with these elements.
pub fn npy(data: &[u8], scalar: Scalar, shape: &[u64]) -> Vec<u8> {
    let descr = match scalar {
        Scalar::E5m2 => "|V1",
        _ => TYPES.iter().find(|(_, known)| *known == scalar).map_or("|u1", |(name, _)| name),
    };
    let dims: String = shape.iter().map(|dim| format!("{dim}, ")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    // The data starts on a multiple of 64.
    let total = (MAGIC.len() + 4 + header.len() + 1).next_multiple_of(64);
    header.push_str(&" ".repeat(total - MAGIC.len() - 4 - header.len() - 1));
    header.push('\n');
    [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), data].concat()
}

pub fn read_npy(path: &Path) -> Result<Contents> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_npy(&bytes).with_context(|| path.display().to_string())
}

/// A tensor of a safetensors file.
pub fn read_safetensors(path: &Path, name: &str) -> Result<Contents> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| path.display().to_string())?;
    let tensor = tensors.tensor(name).with_context(|| path.display().to_string())?;
    let scalar = match tensor.dtype() {
        Dtype::U8 | Dtype::BOOL => Scalar::U8,
        Dtype::I8 => Scalar::S8,
        Dtype::U16 => Scalar::U16,
        Dtype::I16 => Scalar::S16,
        Dtype::U32 => Scalar::U32,
        Dtype::I32 => Scalar::S32,
        Dtype::U64 => Scalar::U64,
        Dtype::I64 => Scalar::S64,
        Dtype::F16 => Scalar::F16,
        Dtype::BF16 => Scalar::Bf16,
        Dtype::F32 => Scalar::F32,
        Dtype::F64 => Scalar::F64,
        Dtype::F8_E4M3 => Scalar::E4m3,
        Dtype::F8_E5M2 => Scalar::E5m2,
        other => bail!("tensor `{name}` has type {other:?}"),
    };
    let data = tensor.data().to_vec();
    let shape = tensor.shape().iter().map(|dim| *dim as u64).collect();
    Ok(Contents { bytes: data.len() as u64, data: Some(data), scalar: Some(scalar), shape })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn npy_files_are_read_as_written() {
        for (scalar, shape) in [(Scalar::F32, vec![2, 3]), (Scalar::Bf16, vec![5]), (Scalar::S64, vec![])] {
            let count = shape.iter().product::<u64>() as usize;
            let data: Vec<u8> = (0..count * scalar.bytes()).map(|i| i as u8).collect();
            let file = npy(&data, scalar, &shape);
            assert_eq!((file.len() - data.len()) % 64, 0);
            let read = parse_npy(&file).unwrap();
            assert_eq!((read.data.unwrap(), read.scalar, read.shape), (data, Some(scalar), shape));
        }
        assert!(parse_npy(b"\x93NUMPY\x01\x00\xff\xff").is_err());
        assert!(parse_npy(b"text").is_err());
    }
}
