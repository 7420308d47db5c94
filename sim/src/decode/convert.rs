//! `cvt`.

use super::opcode::Opcode;
use super::operands::{convert, operand, unary};
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::convert::{Conversion, NumericType, Rounding, pack_saturated};
use crate::program::Op;
use crate::registers::{LANES, Register, Registers};

/// The scalar of a type, and how many of it a register holds.
fn numeric(kind: Type) -> Decoded<(NumericType, u32)> {
    use NumericType as N;
    Ok(match kind {
        Type::U8 | Type::B8 => (N::U8, 1),
        Type::U16 => (N::U16, 1),
        Type::U32 => (N::U32, 1),
        Type::U64 => (N::U64, 1),
        Type::S8 => (N::S8, 1),
        Type::S16 => (N::S16, 1),
        Type::S32 => (N::S32, 1),
        Type::S64 => (N::S64, 1),
        Type::F16 => (N::F16, 1),
        Type::Bf16 => (N::Bf16, 1),
        Type::Tf32 => (N::Tf32, 1),
        Type::F32 => (N::F32, 1),
        Type::F64 => (N::F64, 1),
        Type::F16x2 => (N::F16, 2),
        Type::Bf16x2 => (N::Bf16, 2),
        Type::E4m3x2 => (N::E4m3, 2),
        Type::E5m2x2 => (N::E5m2, 2),
        other => return Err(format!("type {other:?}")),
    })
}

impl Decoder {
    pub(super) fn decode_convert(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        if opcode.take("pack") {
            return self.decode_pack(opcode, operands);
        }
        let rounding = opcode.take_one(&["rni", "rzi", "rmi", "rpi", "rna", "rn", "rz", "rm", "rp"]);
        let flush_subnormals = opcode.take("ftz");
        let saturate = opcode.take("sat");
        let saturate_finite = opcode.take("satfinite");
        let relu = opcode.take("relu");
        let (to_kind, from_kind) = (opcode.need_type()?, opcode.need_type()?);
        let ((to, to_count), (from, from_count)) = (numeric(to_kind)?, numeric(from_kind)?);
        let conversion = Conversion {
            rounding: match rounding {
                None | Some("rn" | "rni") => Rounding::Nearest,
                Some("rna") => Rounding::NearestAway,
                Some("rz" | "rzi") => Rounding::Zero,
                Some("rm" | "rmi") => Rounding::Down,
                Some(_) => Rounding::Up,
            },
            to_integral: rounding.is_some_and(|name| name.len() == 3 && name.ends_with('i')),
            saturate,
            flush_subnormals,
            relu,
            saturate_finite,
            ..Conversion::new(to, from)
        };
        let bytes = to_kind.bytes().max(2);
        let d = self.destination(operand(operands, 0)?, bytes)?;
        if d.bytes() < bytes {
            return Err(format!("the destination holds only {} bytes", d.bytes()));
        }
        let a = self.source(operand(operands, 1)?, from_kind)?;
        let op = match (to_count, from_count, operands.len()) {
            (2, 1, 3) => {
                let b = self.source(&operands[2], from_kind)?;
                Op::Alu(Box::new(move |registers: &mut Registers, mask| {
                    let (x, mut y) = (a.read(registers), b.read(registers));
                    for lane in 0..LANES {
                        y[lane] = conversion.apply_pair(x[lane], y[lane]);
                    }
                    d.write(registers, mask, &y);
                }))
            }
            (2, 2, 2) => convert(d, a, move |x| conversion.apply_packed(x)),
            (1, 1, 2) => plain(d, a, conversion),
            _ => return Err("operands do not fit the types".to_owned()),
        };
        self.push(op);
        Ok(())
    }

    fn decode_pack(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        if !opcode.take("sat") {
            return Err("`.sat` is missing".to_owned());
        }
        let to = opcode.need_type()?;
        opcode.need_type()?;
        opcode.take("b32");
        let d: crate::registers::R32 = self.write(operand(operands, 0)?)?;
        let a = self.read32(operand(operands, 1)?)?;
        let b = self.read32(operand(operands, 2)?)?;
        let c = match operands.get(3) {
            Some(c) => self.read32(c)?,
            None => self.constant32(0),
        };
        let (width, signed) = (8 * to.bytes(), to.is_signed());
        self.push(super::operands::ternary(d, a, b, c, move |x, y, z| pack_saturated(width, signed, x, y, z)));
        Ok(())
    }
}

/// One value to one value; the commonest as loops of their own.
fn plain(d: Register, a: Register, conversion: Conversion) -> Op {
    use NumericType as N;
    let is_default = conversion == Conversion::new(conversion.to, conversion.from);
    match (conversion.to, conversion.from, d, a) {
        (N::U64, N::U32, Register::R64(d), Register::R32(a)) => unary(d, a, u64::from),
        (N::S64, N::S32, Register::R64(d), Register::R32(a)) => unary(d, a, |x| x as i32 as i64 as u64),
        (N::U32 | N::S32, N::U64 | N::S64, Register::R32(d), Register::R64(a)) if is_default => {
            unary(d, a, |x| x as u32)
        }
        (N::F32, N::S32, Register::R32(d), Register::R32(a)) if is_default => {
            unary(d, a, |x| (x as i32 as f32).to_bits())
        }
        (N::F32, N::U32, Register::R32(d), Register::R32(a)) if is_default => unary(d, a, |x| (x as f32).to_bits()),
        _ => convert(d, a, move |x| conversion.apply(x)),
    }
}
