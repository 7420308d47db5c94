//! `mov`, `cvta`, `isspacep`, `selp`, `slct`, `prmt`, `mapa` and `getctarank`.

use super::opcode::Opcode;
use super::operands::{Typed, convert, expect_count, operand, ternary, unary};
use super::scope::Symbol;
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::memory::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Window, window_offset};
use crate::program::{Condition, Op, Special};
use crate::registers::{LANES, R16, R32, R64, Register, Registers, Slot};

const CVTA_SPACES: [&str; 7] = ["global", "shared", "shared::cta", "shared::cluster", "local", "const", "param"];

impl Decoder {
    pub(super) fn decode_move(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        match opcode.name() {
            "mov" => self.decode_mov(opcode, operands),
            "cvta" => self.decode_cvta(opcode, operands),
            "isspacep" => self.decode_isspacep(opcode, operands),
            "selp" => self.decode_selp(opcode, operands),
            "slct" => self.decode_slct(opcode, operands),
            "prmt" => self.decode_prmt(opcode, operands),
            "mapa" => {
                let generic = !opcode.take("shared::cluster");
                let kind = opcode.need_type()?;
                let destination = self.destination(operand(operands, 0)?, kind.bytes())?;
                let address = self.source(operand(operands, 1)?, kind)?;
                let rank = self.read32(operand(operands, 2)?)?;
                self.push(Op::MapShared { destination, address, rank, generic });
                Ok(())
            }
            _ => {
                let generic = !opcode.take("shared::cluster");
                let kind = opcode.need_type()?;
                let destination = self.write(operand(operands, 0)?)?;
                let address = self.source(operand(operands, 1)?, kind)?;
                self.push(Op::CtaRank { destination, address, generic });
                Ok(())
            }
        }
    }

    fn decode_mov(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 2)?;
        let vector = opcode.take_one(&["v2", "v4"]);
        let kind = opcode.need_type()?;
        let (to, from) = (&operands[0], &operands[1]);
        if vector.is_some() {
            return self.decode_vector_move(kind, to, from);
        }
        if kind == Type::Pred {
            let d = self.write_predicate(to)?;
            if matches!(from, Operand::Name(name, 0) if name == "%is_explicit_cluster") {
                let explicit = R32(self.module.registers.r32);
                self.module.registers.r32 += 1;
                self.push(Op::Special { destination: Register::R32(explicit), which: Special::IsExplicitCluster });
                self.push(super::compare::compare1(d, explicit, |explicit| explicit != 0));
                return Ok(());
            }
            let source = self.condition(from)?;
            self.push(Op::Alu(Box::new(move |registers: &mut Registers, mask| {
                let value = registers.predicates[source.predicate.0 as usize];
                let value = if source.negate { !value } else { value };
                registers.set_predicate(d, mask, value);
            })));
            return Ok(());
        }
        match (to, from) {
            (Operand::Vector(parts), Operand::Name(..)) => self.unpack(kind, parts, from),
            (_, Operand::Vector(parts)) => self.pack_vector(kind, to, parts),
            _ => {
                let d = self.destination(to, kind.bytes())?;
                if let Operand::Name(name, _) = from
                    && matches!(self.scopes.find(name), Some(Symbol::Label(_)))
                {
                    return Err("the address of a label is not supported".to_owned());
                }
                let a = self.source(from, kind)?;
                self.push(copy(d, a));
                Ok(())
            }
        }
    }

    /// `mov.v4.u32 {%r1, %r2, %r3, %r4}, %tid`: one part after the other.
    fn decode_vector_move(&mut self, kind: Type, to: &Operand, from: &Operand) -> Decoded<()> {
        let parts = self.elements(to);
        let sources = match from {
            Operand::Name(name, 0) => {
                let axis = |axis: &&str| Operand::Name(format!("{name}.{axis}"), 0);
                ["x", "y", "z"].iter().map(axis).chain([Operand::Integer(0)]).collect()
            }
            other => self.elements(other).to_vec(),
        };
        if !(2..=4).contains(&parts.len()) || parts.len() > sources.len() {
            return Err(format!("{} parts of a vector", parts.len()));
        }
        // All are read before any is written.
        let values: Vec<Register> =
            sources.iter().take(parts.len()).map(|part| self.source(part, kind)).collect::<Decoded<_>>()?;
        let mut kept = Vec::new();
        for value in values {
            let scratch = self.scratch(value.bytes());
            self.push(copy(scratch, value));
            kept.push(scratch);
        }
        for (part, value) in parts.iter().zip(kept) {
            let d = self.destination(part, kind.bytes())?;
            self.push(copy(d, value));
        }
        Ok(())
    }

    /// `mov.b64 {%r1, %r2}, %rd1`
    fn unpack(&mut self, kind: Type, parts: &[Operand], from: &Operand) -> Decoded<()> {
        let source = self.source(from, kind)?;
        let bytes = kind.bytes() / parts.len().max(1) as u32;
        if bytes == 0 || bytes * parts.len() as u32 != kind.bytes() {
            return Err(format!("{} parts do not divide the value", parts.len()));
        }
        // Parts may overlap the source; they are different widths of file, so they never do.
        for (index, part) in parts.iter().enumerate() {
            if matches!(part, Operand::Name(name, 0) if name == "_") {
                continue;
            }
            let d = self.destination(part, bytes.max(2))?;
            let shift = 8 * bytes * index as u32;
            let mask = (1u64 << (8 * bytes)) - 1;
            self.push(convert(d, source, move |x| x >> shift & mask));
        }
        Ok(())
    }

    /// `mov.b64 %rd1, {%r1, %r2}`
    fn pack_vector(&mut self, kind: Type, to: &Operand, parts: &[Operand]) -> Decoded<()> {
        let d = self.destination(to, kind.bytes())?;
        let bytes = kind.bytes() / parts.len().max(1) as u32;
        if bytes == 0 || bytes * parts.len() as u32 != kind.bytes() {
            return Err(format!("{} parts do not make the value", parts.len()));
        }
        let part_kind = match bytes {
            1 => Type::B8,
            2 => Type::B16,
            _ => Type::B32,
        };
        let mut sources = Vec::new();
        for part in parts {
            sources.push(self.source(part, part_kind)?);
        }
        if let (Register::R64(d), [Register::R32(a), Register::R32(b)]) = (d, &sources[..]) {
            let op = super::operands::binary(d, *a, *b, |x, y| u64::from(x) | u64::from(y) << 32);
            self.push(op);
            return Ok(());
        }
        let width = 8 * bytes;
        self.push(Op::Alu(Box::new(move |registers: &mut Registers, mask| {
            let mut out = [0u64; LANES];
            for (index, source) in sources.iter().enumerate() {
                let value = source.read(registers);
                let part = (1u64 << width) - 1;
                for lane in 0..LANES {
                    out[lane] |= (value[lane] & part) << (width * index as u32);
                }
            }
            d.write(registers, mask, &out);
        })));
        Ok(())
    }

    fn decode_cvta(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 2)?;
        let to = opcode.take("to");
        let space = opcode.take_one(&CVTA_SPACES).ok_or("a state space is missing")?;
        let kind = opcode.need_type()?;
        if kind.bytes() != 8 {
            return Err("only 64-bit generic addresses are supported".to_owned());
        }
        let d: R64 = self.write(&operands[0])?;
        let a: R64 = self.read(&operands[1], kind)?;
        let window = match space {
            "global" | "const" => 0,
            "local" => LOCAL_WINDOW,
            "param" => PARAM_WINDOW,
            _ => SHARED_WINDOW,
        };
        let op = if to && window != 0 { unary(d, a, window_offset) } else { unary(d, a, move |x| x | window) };
        self.push(op);
        Ok(())
    }

    fn decode_isspacep(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 2)?;
        let space = opcode.take_one(&CVTA_SPACES).ok_or("a state space is missing")?;
        let wanted = match space {
            "global" => Window::Global,
            "local" => Window::Local,
            "param" => Window::Param,
            "const" => return Err("constant and global memory are one here".to_owned()),
            _ => Window::Shared,
        };
        let d = self.write_predicate(&operands[0])?;
        let a: R64 = self.read(&operands[1], Type::U64)?;
        if matches!(space, "shared" | "shared::cta") {
            self.push(Op::IsOwnShared { destination: d, address: a });
            return Ok(());
        }
        self.push(super::compare::compare1(d, a, move |x| Window::of(x) == wanted));
        Ok(())
    }

    fn decode_selp(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 4)?;
        let kind = opcode.need_type()?;
        let condition = self.condition(&operands[3])?;
        let op = match kind.bytes() {
            2 => select(
                self.write::<R16>(&operands[0])?,
                self.read(&operands[1], kind)?,
                self.read(&operands[2], kind)?,
                condition,
            ),
            4 => select(
                self.write::<R32>(&operands[0])?,
                self.read(&operands[1], kind)?,
                self.read(&operands[2], kind)?,
                condition,
            ),
            8 => select(
                self.write::<R64>(&operands[0])?,
                self.read(&operands[1], kind)?,
                self.read(&operands[2], kind)?,
                condition,
            ),
            _ => return Err(format!("type {kind:?}")),
        };
        self.push(op);
        Ok(())
    }

    fn decode_slct(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 4)?;
        opcode.ignore(&["ftz"]);
        let kind = opcode.need_type()?;
        let by = opcode.need_type()?;
        let chooses_first = match by {
            Type::S32 => |x: u32| x as i32 >= 0,
            Type::F32 => |x: u32| f32::from_bits(x) >= 0.0,
            _ => return Err(format!("selection by {by:?}")),
        };
        let c: R32 = self.read(&operands[3], by)?;
        let op = match kind.bytes() {
            4 => ternary(
                self.write::<R32>(&operands[0])?,
                self.read::<R32>(&operands[1], kind)?,
                self.read::<R32>(&operands[2], kind)?,
                c,
                move |x, y, z| if chooses_first(z) { x } else { y },
            ),
            8 => ternary(
                self.write::<R64>(&operands[0])?,
                self.read::<R64>(&operands[1], kind)?,
                self.read::<R64>(&operands[2], kind)?,
                c,
                move |x, y, z| if chooses_first(z) { x } else { y },
            ),
            _ => return Err(format!("type {kind:?}")),
        };
        self.push(op);
        Ok(())
    }

    fn decode_prmt(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 4)?;
        let mode = opcode.take_one(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]);
        let kind = opcode.need_type()?;
        let d: R32 = self.write(&operands[0])?;
        let a: R32 = self.read(&operands[1], kind)?;
        let b: R32 = self.read(&operands[2], kind)?;
        let c: R32 = self.read(&operands[3], kind)?;
        self.push(ternary(d, a, b, c, move |x, y, z| permute(mode, x, y, z)));
        Ok(())
    }
}

/// The lanes of `a` in `d`, both of any width.
pub(super) fn copy(d: Register, a: Register) -> Op {
    match (d, a) {
        (Register::R32(d), Register::R32(a)) => unary(d, a, |x| x),
        (Register::R64(d), Register::R64(a)) => unary(d, a, |x| x),
        (Register::R16(d), Register::R16(a)) => unary(d, a, |x| x),
        _ => convert(d, a, |x| x),
    }
}

fn select<R: Typed>(d: R, a: R, b: R, condition: Condition) -> Op {
    Op::Alu(Box::new(move |registers: &mut Registers, mask| {
        let flip = if condition.negate { u32::MAX } else { 0 };
        let chosen = registers.predicates[condition.predicate.0 as usize] ^ flip;
        let (x, y) = (a.get(registers), b.get(registers));
        let mut out = [<R as Slot>::Value::default(); LANES];
        for lane in 0..LANES {
            out[lane] = if chosen & 1 << lane != 0 { x[lane] } else { y[lane] };
        }
        d.set(registers, mask, &out);
    }))
}

/// `prmt.b32` (PTX ISA, "prmt").
fn permute(mode: Option<&str>, a: u32, b: u32, c: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let select = c & 3;
    let chosen: [u32; 4] = match mode {
        None => {
            let mut out = [0u8; 4];
            for (index, byte) in out.iter_mut().enumerate() {
                let nibble = c >> (4 * index);
                let value = bytes[(nibble & 7) as usize];
                *byte = if nibble & 8 == 0 {
                    value
                } else if value & 0x80 != 0 {
                    0xff
                } else {
                    0
                };
            }
            return u32::from_le_bytes(out);
        }
        Some("f4e") => [0, 1, 2, 3].map(|index| index + select),
        Some("b4e") => [8u32, 7, 6, 5].map(|index| (index + select) % 8),
        Some("rc8") => [select; 4],
        Some("ecl") => [0, 1, 2, 3].map(|index: u32| index.max(select)),
        Some("ecr") => [0, 1, 2, 3].map(|index: u32| index.min(select)),
        _ => {
            let base = 2 * (select & 1);
            [base, base + 1, base, base + 1]
        }
    };
    u32::from_le_bytes(chosen.map(|index| bytes[index as usize]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permute_modes() {
        let (a, b) = (0x8382_8180, 0x0706_0504);
        assert_eq!(permute(None, a, b, 0x7531), 0x0705_8381);
        assert_eq!(permute(None, a, b, 0x8888), 0xffff_ffff);
        assert_eq!(permute(None, a, b, 0xcccc), 0);
        assert_eq!(permute(Some("f4e"), a, b, 1), 0x0483_8281);
        assert_eq!(permute(Some("b4e"), a, b, 0), 0x0506_0780);
        assert_eq!(permute(Some("rc8"), a, b, 2), 0x8282_8282);
        assert_eq!(permute(Some("ecl"), a, b, 2), 0x8382_8282);
        assert_eq!(permute(Some("ecr"), a, b, 1), 0x8181_8180);
        assert_eq!(permute(Some("rc16"), a, b, 1), 0x8382_8382);
    }
}
