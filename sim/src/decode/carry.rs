//! Extended-precision arithmetic: instructions that set or use the carry flag, `CC.CF` (PTX ISA, "Extended-Precision
//! Integer Arithmetic Instructions").

use super::opcode::Opcode;
use super::operands::expect_count;
use super::{Decoded, Decoder};
use crate::ast::Operand;
use crate::program::Op;
use crate::registers::{LANES, Predicate, Registers};

/// The flag of every lane; no name stands for it.
pub(super) const CARRY: Predicate = Predicate(0);

#[derive(Clone, Copy)]
enum Operation {
    Add,
    Subtract,
    MultiplyAdd { high: bool, signed: bool },
}

impl Operation {
    /// The result of `bits` bits, and the flag. A subtraction is the sum with the complement, as on hardware: its flag is
    /// the carry of that sum, which is set where there is no borrow, and `subc` subtracts one where it is clear. `addc` after
    /// `sub.cc` adds just that flag.
    fn apply(self, bits: u32, [a, b, c]: [u64; 3], carry: bool) -> (u64, bool) {
        let modulus = 1u128 << bits;
        let (a, b, c, carry) = (u128::from(a), u128::from(b), u128::from(c), u128::from(carry));
        let sum = match self {
            Self::Add => a + b + carry,
            Self::Subtract => {
                let sum = a + (modulus - 1 - b) + carry;
                return ((sum % modulus) as u64, sum >= modulus);
            }
            Self::MultiplyAdd { high: false, .. } => a.wrapping_mul(b) % modulus + c + carry,
            Self::MultiplyAdd { signed: false, .. } => ((a * b) >> bits) + c + carry,
            Self::MultiplyAdd { .. } => {
                let extend = |x: u128| (x << (128 - bits)) as i128 >> (128 - bits);
                (((extend(a) * extend(b)) >> bits) as u128 % modulus) + c + carry
            }
        };
        ((sum % modulus) as u64, sum >= modulus)
    }
}

impl Decoder {
    /// `add.cc`, `addc`, `sub.cc`, `subc`, `mad.cc` and `madc`; `sets` is whether `.cc` was there.
    pub(super) fn carry_arithmetic(&mut self, opcode: &mut Opcode<'_>, o: &[Operand], sets: bool) -> Decoded<Op> {
        let name = opcode.name();
        let uses = name.ends_with('c');
        let part = opcode.take_one(&["lo", "hi"]);
        let kind = opcode.need_type()?;
        let bytes = kind.bytes();
        if !matches!(bytes, 4 | 8) || kind.is_float() {
            return Err(format!("type {kind:?}"));
        }
        let operation = match (name.trim_end_matches('c'), part) {
            ("add", None) => Operation::Add,
            ("sub", None) => Operation::Subtract,
            ("mad", Some(part)) => Operation::MultiplyAdd { high: part == "hi", signed: kind.is_signed() },
            _ => return Err("`.lo` or `.hi` is missing, or out of place".to_owned()),
        };
        let multiplies = matches!(operation, Operation::MultiplyAdd { .. });
        expect_count(o, if multiplies { 4 } else { 3 })?;
        let d = self.destination(&o[0], bytes)?;
        let (a, b) = (self.source(&o[1], kind)?, self.source(&o[2], kind)?);
        let c = if multiplies { self.source(&o[3], kind)? } else { self.constant(bytes, 0) };
        if [d, a, b, c].iter().any(|register| register.bytes() != bytes) {
            return Err(format!("an operand does not have {} bits", 8 * bytes));
        }
        // What is added without a flag: a complement is one less than the negative.
        let without = if matches!(operation, Operation::Subtract) { u32::MAX } else { 0 };
        Ok(Op::Alu(Box::new(move |registers: &mut Registers, mask| {
            let (x, y, z) = (a.read(registers), b.read(registers), c.read(registers));
            let flags = if uses { registers.predicates[CARRY.0 as usize] } else { without };
            let (mut out, mut carries) = ([0; LANES], 0);
            for lane in 0..LANES {
                let operands = [x[lane], y[lane], z[lane]];
                let (value, carry) = operation.apply(8 * bytes, operands, flags >> lane & 1 != 0);
                out[lane] = value;
                carries |= u32::from(carry) << lane;
            }
            d.write(registers, mask, &out);
            if sets {
                registers.set_predicate(CARRY, mask, carries);
            }
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_and_no_borrows() {
        let multiply = |high, signed| Operation::MultiplyAdd { high, signed };
        let max = u64::from(u32::MAX);
        assert_eq!(Operation::Add.apply(32, [max, 0, 0], true), (0, true));
        assert_eq!(Operation::Add.apply(64, [u64::MAX, 5, 0], false), (4, true));
        // 3 - 3, 3 - 3 - 1, 3 - 2 - 1, 0 - 2^64 + 1
        assert_eq!(Operation::Subtract.apply(32, [3, 3, 0], true), (0, true));
        assert_eq!(Operation::Subtract.apply(32, [3, 3, 0], false), (max, false));
        assert_eq!(Operation::Subtract.apply(32, [3, 2, 0], false), (0, true));
        assert_eq!(Operation::Subtract.apply(64, [0, u64::MAX, 0], true), (1, false));
        assert_eq!(multiply(false, false).apply(32, [1 << 31, 2, 7], false), (7, false));
        assert_eq!(multiply(true, false).apply(32, [1 << 31, 2, max], false), (0, true));
        assert_eq!(multiply(true, true).apply(32, [max, 1, 0], false), (max, false));
        assert_eq!(multiply(true, true).apply(32, [max, max, 1], false), (1, false));
    }
}
