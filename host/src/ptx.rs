//! The kernel's PTX, as `cargo xtask build` made it.

/// The PTX module with the kernel, for sm_90a. Its first line is the stamp: a digest of the kernel's sources.
pub static PTX: &str = include_str!("../ptx/ferromoe.ptx");

/// The same kernel, but it records what its roles do when: see [`crate::DeviceGroup::open_traced`].
pub static TRACED_PTX: &str = include_str!("../ptx/ferromoe-trace.ptx");

/// The digest in the stamp.
pub(crate) fn source_digest() -> [u8; 32] {
    let mut digest = [0; 32];
    let stamp = PTX.lines().next().and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
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
        assert_eq!(PTX.lines().next(), Some(format!("// source digest: sha256 {digits}").as_str()));
    }
}
