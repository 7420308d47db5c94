//! Scalar types as the command line names them, and values of them as bytes.

use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use ptx_sim::tensor_map::TensorMapDataType;

/// The type of a scalar or of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    F16,
    Bf16,
    F32,
    F64,
    E4m3,
    E5m2,
}

const NAMES: [(&str, Scalar); 14] = [
    ("u8", Scalar::U8),
    ("s8", Scalar::S8),
    ("u16", Scalar::U16),
    ("s16", Scalar::S16),
    ("u32", Scalar::U32),
    ("s32", Scalar::S32),
    ("u64", Scalar::U64),
    ("s64", Scalar::S64),
    ("f16", Scalar::F16),
    ("bf16", Scalar::Bf16),
    ("f32", Scalar::F32),
    ("f64", Scalar::F64),
    ("e4m3", Scalar::E4m3),
    ("e5m2", Scalar::E5m2),
];

impl FromStr for Scalar {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = NAMES.iter().find(|(name, _)| *name == text);
        let names = || NAMES.map(|(name, _)| name).join(", ");
        found.map(|(_, scalar)| *scalar).with_context(|| format!("`{text}` is no type; there are {}", names()))
    }
}

/// A number of whatever kind `text` has.
pub fn number<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> Result<T> {
    text.trim().parse().with_context(|| format!("`{text}` is not such a number"))
}

/// An integer, decimal or `0x...`, that fits so many bytes, signed or not.
fn integer(text: &str, bytes: usize, signed: bool) -> Result<Vec<u8>> {
    let trimmed = text.trim();
    let value = match trimmed.strip_prefix("0x") {
        Some(digits) => i128::from_str_radix(digits, 16).with_context(|| format!("`{text}` is not such a number"))?,
        None => number(trimmed)?,
    };
    let bits = 8 * bytes as u32;
    let range = if signed { -(1i128 << (bits - 1))..1i128 << (bits - 1) } else { 0..1i128 << bits };
    ensure!(range.contains(&value), "`{text}` does not fit {bits} bits");
    Ok(value.to_le_bytes()[..bytes].to_vec())
}

impl Scalar {
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::S8 | Self::E4m3 | Self::E5m2 => 1,
            Self::U16 | Self::S16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::S32 | Self::F32 => 4,
            Self::U64 | Self::S64 | Self::F64 => 8,
        }
    }

    /// A value's bytes. Those of FP8 types are given as they are, `0x38`.
    pub fn parse(self, text: &str) -> Result<Vec<u8>> {
        Ok(match self {
            Self::F16 => f16::from_f64(number(text)?).to_le_bytes().to_vec(),
            Self::Bf16 => bf16::from_f64(number(text)?).to_le_bytes().to_vec(),
            Self::F32 => number::<f32>(text)?.to_le_bytes().to_vec(),
            Self::F64 => number::<f64>(text)?.to_le_bytes().to_vec(),
            Self::S8 | Self::S16 | Self::S32 | Self::S64 => integer(text, self.bytes(), true)?,
            _ => integer(text, self.bytes(), false)?,
        })
    }

    /// Values that commas part.
    pub fn parse_list(self, text: &str) -> Result<Vec<u8>> {
        let parts = text.split(',').map(|part| self.parse(part)).collect::<Result<Vec<_>>>()?;
        Ok(parts.concat())
    }

    /// An element as a number; 64-bit integers lose their low bits.
    pub fn value(self, bytes: &[u8]) -> f64 {
        let word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => word as f64,
            Self::S8 => f64::from(word as i8),
            Self::S16 => f64::from(word as i16),
            Self::S32 => f64::from(word as i32),
            Self::S64 => word as i64 as f64,
            Self::F16 => f16::from_bits(word as u16).to_f64(),
            Self::Bf16 => bf16::from_bits(word as u16).to_f64(),
            Self::F32 => f64::from(f32::from_bits(word as u32)),
            Self::F64 => f64::from_bits(word),
            // The upper byte of an f16.
            Self::E5m2 => f16::from_bits((word as u16) << 8).to_f64(),
            Self::E4m3 => e4m3(word as u8),
        }
    }

    /// An element as text.
    pub fn show(self, bytes: &[u8]) -> String {
        let word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        match self {
            Self::U64 => word.to_string(),
            Self::S64 => (word as i64).to_string(),
            Self::F32 => f32::from_bits(word as u32).to_string(),
            _ => self.value(bytes).to_string(),
        }
    }

    /// The element type of a tensor map.
    pub fn of_tensor_map(self) -> Result<TensorMapDataType> {
        use TensorMapDataType as D;
        Ok(match self {
            Self::U8 | Self::S8 | Self::E4m3 | Self::E5m2 => D::U8,
            Self::U16 => D::U16,
            Self::U32 => D::U32,
            Self::S32 => D::S32,
            Self::U64 => D::U64,
            Self::S64 => D::S64,
            Self::F16 => D::F16,
            Self::Bf16 => D::Bf16,
            Self::F32 => D::F32,
            Self::F64 => D::F64,
            Self::S16 => bail!("tensor maps have no s16"),
        })
    }
}

/// Four bits of exponent, three of mantissa, no infinities.
fn e4m3(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if bits & 0x80 != 0 { -magnitude } else { magnitude }
}

/// `4x8`: the outermost dimension first.
pub fn shape(text: &str) -> Result<Vec<u64>> {
    text.split('x').map(number).collect()
}

/// The contents of a buffer, and what is known of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// None where it stays uninitialised.
    pub data: Option<Vec<u8>>,
    pub bytes: u64,
    pub scalar: Option<Scalar>,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
}

impl Contents {
    pub fn of(data: Vec<u8>) -> Self {
        Self { bytes: data.len() as u64, data: Some(data), scalar: None, shape: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_every_type() {
        for (name, text, bytes, shown) in [
            ("u8", "255", vec![255], "255"),
            ("s8", "-1", vec![255], "-1"),
            ("u16", "0x0102", vec![2, 1], "258"),
            ("s16", "-2", vec![254, 255], "-2"),
            ("s32", "-7", vec![249, 255, 255, 255], "-7"),
            ("u64", "18446744073709551615", vec![255; 8], "18446744073709551615"),
            ("f16", "1.5", vec![0, 0x3e], "1.5"),
            ("bf16", "-2", vec![0, 0xc0], "-2"),
            ("f64", "0.5", vec![0, 0, 0, 0, 0, 0, 0xe0, 0x3f], "0.5"),
            ("e4m3", "0x7e", vec![0x7e], "448"),
            ("e5m2", "0xc0", vec![0xc0], "-2"),
        ] {
            let scalar: Scalar = name.parse().unwrap();
            assert_eq!(scalar.parse(text).unwrap(), bytes, "{name}");
            assert_eq!(scalar.show(&bytes), shown, "{name}");
        }
        for (name, text) in [("u8", "256"), ("s8", "128"), ("u32", "-1"), ("f32", "x")] {
            assert!(name.parse::<Scalar>().unwrap().parse(text).is_err(), "{name} {text}");
        }
        assert_eq!(e4m3(1), 2f64.powi(-9));
    }
}
