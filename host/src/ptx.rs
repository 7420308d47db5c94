//! The kernel's PTX, as `cargo xtask build` made it: a module for each number format.

use crate::config::ExpertFormat;

/// The PTX module of a format's kernel, for sm_90a; `traced`: one that records what its roles do when (see [`crate::DeviceGroup::open_traced`]). Its first line is
/// the stamp: a digest of the kernel's sources.
pub fn kernel_ptx(format: ExpertFormat, traced: bool) -> &'static str {
    match (format, traced) {
        (ExpertFormat::Bf16, false) => include_str!("../ptx/bf16.ptx"),
        (ExpertFormat::Bf16, true) => include_str!("../ptx/bf16-trace.ptx"),
        (ExpertFormat::Fp8, false) => include_str!("../ptx/fp8.ptx"),
        (ExpertFormat::Fp8, true) => include_str!("../ptx/fp8-trace.ptx"),
    }
}

/// The digest in the stamp of the bf16 module: all are made from the same sources.
pub(crate) fn source_digest() -> [u8; 32] {
    let mut digest = [0; 32];
    let stamp = kernel_ptx(ExpertFormat::Bf16, false).lines().next();
    let stamp = stamp.and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
    for (byte, digits) in digest.iter_mut().zip(stamp.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).unwrap_or_default();
        *byte = u8::from_str_radix(digits, 16).unwrap_or_default();
    }
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_stamps() {
        let digits: String = source_digest().iter().map(|byte| format!("{byte:02x}")).collect();
        let first = kernel_ptx(ExpertFormat::Bf16, false).lines().next();
        assert_eq!(first, Some(format!("// source digest: sha256 {digits}").as_str()));
    }
}
