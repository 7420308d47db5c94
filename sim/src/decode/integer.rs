//! Integer and logic instructions.

use super::opcode::Opcode;
use super::operands::{binary, expect_count, immediate, operand, ternary, unary};
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::program::Op;
use crate::registers::{Predicate, R16, R32, R64, Register};

/// One closure per width and signedness: `$x` and `$y` have the native type.
macro_rules! by_type {
    ($self:ident, $kind:expr, $o:expr, |$x:ident, $y:ident| $body:expr) => {
        match $kind {
            Type::U16 | Type::B16 => by_type!(@ $self, $o, R16, u16, u16, $x, $y, $body),
            Type::S16 => by_type!(@ $self, $o, R16, i16, u16, $x, $y, $body),
            Type::U32 | Type::B32 => by_type!(@ $self, $o, R32, u32, u32, $x, $y, $body),
            Type::S32 => by_type!(@ $self, $o, R32, i32, u32, $x, $y, $body),
            Type::U64 | Type::B64 => by_type!(@ $self, $o, R64, u64, u64, $x, $y, $body),
            Type::S64 => by_type!(@ $self, $o, R64, i64, u64, $x, $y, $body),
            other => return Err(format!("type {other:?}")),
        }
    };
    (@ $self:ident, $o:expr, $slot:ident, $native:ty, $raw:ty, $x:ident, $y:ident, $body:expr) => {{
        let d: $slot = $self.write(operand($o, 0)?)?;
        let a: $slot = $self.read(operand($o, 1)?, KIND_OF.with_bytes::<$slot>())?;
        let b: $slot = $self.read(operand($o, 2)?, KIND_OF.with_bytes::<$slot>())?;
        binary(d, a, b, |x: $raw, y: $raw| {
            let ($x, $y) = (x as $native, y as $native);
            ($body) as $raw
        })
    }};
}

macro_rules! by_type1 {
    ($self:ident, $kind:expr, $o:expr, |$x:ident| $body:expr) => {
        match $kind.bytes() {
            2 => by_type1!(@ $self, $o, R16, i16, u16, $x, $body),
            4 => by_type1!(@ $self, $o, R32, i32, u32, $x, $body),
            8 => by_type1!(@ $self, $o, R64, i64, u64, $x, $body),
            _ => return Err(format!("type {:?}", $kind)),
        }
    };
    (@ $self:ident, $o:expr, $slot:ident, $native:ty, $raw:ty, $x:ident, $body:expr) => {{
        let d: $slot = $self.write(operand($o, 0)?)?;
        let a: $slot = $self.read(operand($o, 1)?, KIND_OF.with_bytes::<$slot>())?;
        unary(d, a, |x: $raw| {
            let $x = x as $native;
            ($body) as $raw
        })
    }};
}

/// The untyped kind of a register file.
struct KindOf;
const KIND_OF: KindOf = KindOf;

impl KindOf {
    fn with_bytes<R: super::operands::Typed>(&self) -> Type {
        match R::BYTES {
            2 => Type::B16,
            4 => Type::B32,
            _ => Type::B64,
        }
    }
}

impl Decoder {
    pub(super) fn decode_integer(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let op = match opcode.name() {
            "add" | "sub" | "addc" | "subc" | "madc" => self.add_sub(opcode, operands)?,
            "mul" | "mad" | "mul24" | "mad24" => self.multiply(opcode, operands)?,
            "div" | "rem" | "min" | "max" => self.divide(opcode, operands)?,
            "abs" | "neg" | "not" | "cnot" => self.one_operand(opcode, operands)?,
            "and" | "or" | "xor" => self.logic(opcode, operands)?,
            "shl" | "shr" => self.shift(opcode, operands)?,
            "shf" => self.funnel_shift(opcode, operands)?,
            "lop3" => self.lop3(opcode, operands)?,
            "bfe" | "bfi" | "bmsk" | "szext" => self.bit_field(opcode, operands)?,
            "brev" | "clz" | "popc" | "bfind" => self.bit_count(opcode, operands)?,
            "fns" => self.find_nth_set(opcode, operands)?,
            "sad" => self.absolute_difference(opcode, operands)?,
            _ => self.dot_product(opcode, operands)?,
        };
        self.push(op);
        Ok(())
    }

    fn add_sub(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let sets_carry = opcode.take("cc");
        if sets_carry || opcode.name().ends_with('c') {
            return self.carry_arithmetic(opcode, o, sets_carry);
        }
        expect_count(o, 3)?;
        let saturate = opcode.take("sat");
        let kind = opcode.need_type()?;
        if matches!(kind, Type::B16 | Type::B32 | Type::B64) {
            return Err(format!("type {kind:?}"));
        }
        let add = opcode.name() == "add";
        if add && !saturate && matches!(kind, Type::U16x2 | Type::S16x2) {
            return self.halves(kind, o, |x, y| x.wrapping_add(y));
        }
        Ok(match (add, saturate) {
            (true, false) => by_type!(self, kind, o, |x, y| x.wrapping_add(y)),
            (false, false) => by_type!(self, kind, o, |x, y| x.wrapping_sub(y)),
            (true, true) => by_type!(self, kind, o, |x, y| x.saturating_add(y)),
            (false, true) => by_type!(self, kind, o, |x, y| x.saturating_sub(y)),
        })
    }

    fn multiply(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let is_mad = opcode.name().starts_with("mad");
        expect_count(o, if is_mad { 4 } else { 3 })?;
        if opcode.name().ends_with("24") {
            return self.multiply24(opcode, o, is_mad);
        }
        if opcode.take("cc") {
            return self.carry_arithmetic(opcode, o, true);
        }
        let part = opcode.take_one(&["lo", "hi", "wide"]).ok_or("`.lo`, `.hi` or `.wide` is missing")?;
        if opcode.take("sat") {
            return Err("saturation is not supported".to_owned());
        }
        let kind = opcode.need_type()?;
        match (part, is_mad) {
            ("lo", false) => Ok(by_type!(self, kind, o, |x, y| x.wrapping_mul(y))),
            ("hi", false) => Ok(match kind {
                Type::U16 => by_type!(self, kind, o, |x, y| (i128::from(x) * i128::from(y)) >> 16),
                Type::S16 => by_type!(self, kind, o, |x, y| (i128::from(x) * i128::from(y)) >> 16),
                Type::U32 => by_type!(self, kind, o, |x, y| (i128::from(x) * i128::from(y)) >> 32),
                Type::S32 => by_type!(self, kind, o, |x, y| (i128::from(x) * i128::from(y)) >> 32),
                Type::U64 => by_type!(self, kind, o, |x, y| ((x as u128) * (y as u128)) >> 64),
                Type::S64 => {
                    by_type!(self, kind, o, |x, y| (i128::from(x as i64) * i128::from(y as i64)) >> 64)
                }
                other => return Err(format!("type {other:?}")),
            }),
            ("wide", false) => self.wide(kind, o),
            ("lo", true) => {
                let op = match kind.bytes() {
                    2 => ternary(
                        self.write::<R16>(&o[0])?,
                        self.read::<R16>(&o[1], kind)?,
                        self.read::<R16>(&o[2], kind)?,
                        self.read::<R16>(&o[3], kind)?,
                        |x, y, z| x.wrapping_mul(y).wrapping_add(z),
                    ),
                    4 => ternary(
                        self.write::<R32>(&o[0])?,
                        self.read::<R32>(&o[1], kind)?,
                        self.read::<R32>(&o[2], kind)?,
                        self.read::<R32>(&o[3], kind)?,
                        |x, y, z| x.wrapping_mul(y).wrapping_add(z),
                    ),
                    _ => ternary(
                        self.write::<R64>(&o[0])?,
                        self.read::<R64>(&o[1], kind)?,
                        self.read::<R64>(&o[2], kind)?,
                        self.read::<R64>(&o[3], kind)?,
                        |x, y, z| x.wrapping_mul(y).wrapping_add(z),
                    ),
                };
                Ok(op)
            }
            ("hi", true) => self.mad_high(kind, o),
            _ => self.mad_wide(kind, o),
        }
    }

    fn multiply24(&mut self, opcode: &mut Opcode<'_>, o: &[Operand], is_mad: bool) -> Decoded<Op> {
        let high = opcode.take_one(&["lo", "hi"]) == Some("hi");
        let kind = opcode.need_type()?;
        let signed = kind.is_signed();
        let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
        let c = if is_mad { self.read(&o[3], kind)? } else { self.constant32(0) };
        let extend = move |x: u32| {
            if signed { i64::from((x << 8) as i32 >> 8) } else { i64::from(x & 0xff_ffff) }
        };
        let shift = if high { 16 } else { 0 };
        Ok(ternary(d, a, b, c, move |x, y, z| (((extend(x) * extend(y)) >> shift) as u32).wrapping_add(z)))
    }

    fn wide(&mut self, kind: Type, o: &[Operand]) -> Decoded<Op> {
        Ok(match kind {
            Type::U16 | Type::S16 => {
                let (d, a, b): (R32, R16, R16) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                if kind.is_signed() {
                    binary(d, a, b, |x, y| (i32::from(x as i16) * i32::from(y as i16)) as u32)
                } else {
                    binary(d, a, b, |x, y| u32::from(x) * u32::from(y))
                }
            }
            Type::U32 | Type::S32 => {
                let (d, a, b): (R64, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                if kind.is_signed() {
                    binary(d, a, b, |x, y| (i64::from(x as i32) * i64::from(y as i32)) as u64)
                } else {
                    binary(d, a, b, |x, y| u64::from(x) * u64::from(y))
                }
            }
            other => return Err(format!("type {other:?}")),
        })
    }

    fn mad_wide(&mut self, kind: Type, o: &[Operand]) -> Decoded<Op> {
        Ok(match kind {
            Type::U16 | Type::S16 => {
                let signed = kind.is_signed();
                ternary(
                    self.write::<R32>(&o[0])?,
                    self.read::<R16>(&o[1], kind)?,
                    self.read::<R16>(&o[2], kind)?,
                    self.read::<R32>(&o[3], Type::B32)?,
                    move |x, y, z| {
                        let product = if signed {
                            (i32::from(x as i16) * i32::from(y as i16)) as u32
                        } else {
                            u32::from(x) * u32::from(y)
                        };
                        product.wrapping_add(z)
                    },
                )
            }
            Type::U32 | Type::S32 => {
                let signed = kind.is_signed();
                ternary(
                    self.write::<R64>(&o[0])?,
                    self.read::<R32>(&o[1], kind)?,
                    self.read::<R32>(&o[2], kind)?,
                    self.read::<R64>(&o[3], Type::B64)?,
                    move |x, y, z| {
                        let product = if signed {
                            (i64::from(x as i32) * i64::from(y as i32)) as u64
                        } else {
                            u64::from(x) * u64::from(y)
                        };
                        product.wrapping_add(z)
                    },
                )
            }
            other => return Err(format!("type {other:?}")),
        })
    }

    fn mad_high(&mut self, kind: Type, o: &[Operand]) -> Decoded<Op> {
        let signed = kind.is_signed();
        Ok(match kind.bytes() {
            4 => ternary(
                self.write::<R32>(&o[0])?,
                self.read::<R32>(&o[1], kind)?,
                self.read::<R32>(&o[2], kind)?,
                self.read::<R32>(&o[3], kind)?,
                move |x, y, z| {
                    let high = if signed {
                        ((i64::from(x as i32) * i64::from(y as i32)) >> 32) as u32
                    } else {
                        ((u64::from(x) * u64::from(y)) >> 32) as u32
                    };
                    high.wrapping_add(z)
                },
            ),
            8 => ternary(
                self.write::<R64>(&o[0])?,
                self.read::<R64>(&o[1], kind)?,
                self.read::<R64>(&o[2], kind)?,
                self.read::<R64>(&o[3], kind)?,
                move |x, y, z| {
                    let high = if signed {
                        ((i128::from(x as i64) * i128::from(y as i64)) >> 64) as u64
                    } else {
                        ((u128::from(x) * u128::from(y)) >> 64) as u64
                    };
                    high.wrapping_add(z)
                },
            ),
            _ => return Err(format!("type {kind:?}")),
        })
    }

    fn divide(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 3)?;
        let relu = opcode.take("relu");
        let kind = opcode.need_type()?;
        let extremum = matches!(opcode.name(), "min" | "max");
        if relu && !(extremum && matches!(kind, Type::S32 | Type::S16x2)) {
            return Err(format!("`.relu` of type {kind:?}"));
        }
        if relu || matches!(kind, Type::U16x2 | Type::S16x2) {
            let f: fn(i32, i32) -> i32 = match opcode.name() {
                "min" => Ord::min,
                "max" => Ord::max,
                other => return Err(format!("`{other}` of type {kind:?}")),
            };
            let f = move |x, y| if relu { f(x, y).max(0) } else { f(x, y) };
            if kind != Type::S32 {
                return self.halves(kind, o, f);
            }
            let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
            return Ok(binary(d, a, b, move |x, y| f(x as i32, y as i32) as u32));
        }
        if matches!(kind, Type::B16 | Type::B32 | Type::B64) {
            return Err(format!("type {kind:?}"));
        }
        // Division by zero gives an unspecified value: all ones, as the hardware does; its remainder is the dividend.
        Ok(match opcode.name() {
            "div" => by_type!(self, kind, o, |x, y| if y == 0 { !y } else { x.wrapping_div(y) }),
            "rem" => by_type!(self, kind, o, |x, y| if y == 0 { x } else { x.wrapping_rem(y) }),
            "min" => by_type!(self, kind, o, |x, y| x.min(y)),
            _ => by_type!(self, kind, o, |x, y| x.max(y)),
        })
    }

    /// `f` of the two halves of a register, each extended as its type says.
    fn halves(
        &mut self,
        kind: Type,
        o: &[Operand],
        f: impl Fn(i32, i32) -> i32 + Send + Sync + 'static,
    ) -> Decoded<Op> {
        let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
        let signed = kind.is_signed();
        let extend = move |half: u32| if signed { i32::from(half as u16 as i16) } else { i32::from(half as u16) };
        let one = move |x: u32, y: u32| f(extend(x), extend(y)) as u32 & 0xFFFF;
        Ok(binary(d, a, b, move |x: u32, y: u32| one(x >> 16, y >> 16) << 16 | one(x, y)))
    }

    fn one_operand(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 2)?;
        let kind = opcode.need_type()?;
        Ok(match (opcode.name(), kind) {
            ("not", Type::Pred) => {
                let (d, a) = (self.write_predicate(&o[0])?, self.condition(&o[1])?);
                Op::Alu(Box::new(move |registers, mask| {
                    let value = registers.predicates[a.predicate.0 as usize];
                    registers.set_predicate(d, mask, if a.negate { value } else { !value });
                }))
            }
            ("abs", _) => by_type1!(self, kind, o, |x| x.wrapping_abs()),
            ("neg", _) => by_type1!(self, kind, o, |x| x.wrapping_neg()),
            ("not", _) => by_type1!(self, kind, o, |x| !x),
            _ => by_type1!(self, kind, o, |x| x == 0),
        })
    }

    fn logic(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 3)?;
        let kind = opcode.need_type()?;
        if kind == Type::Pred {
            let d = self.write_predicate(&o[0])?;
            let (a, b) = (self.condition(&o[1])?, self.condition(&o[2])?);
            let f: fn(u32, u32) -> u32 = match opcode.name() {
                "and" => |x, y| x & y,
                "or" => |x, y| x | y,
                _ => |x, y| x ^ y,
            };
            return Ok(Op::Alu(Box::new(move |registers, mask| {
                let value = |index: Predicate, negate: bool| {
                    registers.predicates[index.0 as usize] ^ if negate { u32::MAX } else { 0 }
                };
                let value = f(value(a.predicate, a.negate), value(b.predicate, b.negate));
                registers.set_predicate(d, mask, value);
            })));
        }
        if !matches!(kind, Type::B16 | Type::B32 | Type::B64) {
            return Err(format!("type {kind:?}"));
        }
        Ok(match opcode.name() {
            "and" => by_type!(self, kind, o, |x, y| x & y),
            "or" => by_type!(self, kind, o, |x, y| x | y),
            _ => by_type!(self, kind, o, |x, y| x ^ y),
        })
    }

    fn shift(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 3)?;
        let kind = opcode.need_type()?;
        let left = opcode.name() == "shl";
        let signed = kind.is_signed();
        let by: R32 = self.read(&o[2], Type::U32)?;
        // Amounts beyond the width count as the width.
        Ok(match kind.bytes() {
            2 => {
                let (d, a): (R16, R16) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                match (left, signed) {
                    (true, _) => binary(d, a, by, |x, n| if n > 15 { 0 } else { x << n }),
                    (_, true) => binary(d, a, by, |x, n| (x as i16 >> n.min(15)) as u16),
                    _ => binary(d, a, by, |x, n| if n > 15 { 0 } else { x >> n }),
                }
            }
            4 => {
                let (d, a): (R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                match (left, signed) {
                    (true, _) => binary(d, a, by, |x, n| if n > 31 { 0 } else { x << n }),
                    (_, true) => binary(d, a, by, |x, n| (x as i32 >> n.min(31)) as u32),
                    _ => binary(d, a, by, |x, n| if n > 31 { 0 } else { x >> n }),
                }
            }
            8 => {
                let (d, a): (R64, R64) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                match (left, signed) {
                    (true, _) => binary(d, a, by, |x, n| if n > 63 { 0 } else { x << n }),
                    (_, true) => binary(d, a, by, |x, n| (x as i64 >> n.min(63)) as u64),
                    _ => binary(d, a, by, |x, n| if n > 63 { 0 } else { x >> n }),
                }
            }
            _ => return Err(format!("type {kind:?}")),
        })
    }

    fn funnel_shift(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 4)?;
        let left = opcode.take_one(&["l", "r"]).ok_or("`.l` or `.r` is missing")? == "l";
        let wrap = opcode.take_one(&["wrap", "clamp"]).ok_or("`.wrap` or `.clamp` is missing")? == "wrap";
        let kind = opcode.need_type()?;
        let d: R32 = self.write(&o[0])?;
        let (a, b, c): (R32, R32, R32) = (self.read(&o[1], kind)?, self.read(&o[2], kind)?, self.read(&o[3], kind)?);
        Ok(ternary(d, a, b, c, move |low, high, n| {
            let n = if wrap { n & 31 } else { n.min(32) };
            let both = u64::from(high) << 32 | u64::from(low);
            if left { (both << n >> 32) as u32 } else { (both >> n) as u32 }
        }))
    }

    fn lop3(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let kind = opcode.need_type()?;
        expect_count(o, 5)?;
        let d: R32 = self.write(&o[0])?;
        let (a, b, c): (R32, R32, R32) = (self.read(&o[1], kind)?, self.read(&o[2], kind)?, self.read(&o[3], kind)?);
        let table = immediate(&o[4])? as u32;
        Ok(ternary(d, a, b, c, move |x, y, z| lop3(x, y, z, table)))
    }

    fn bit_field(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let clamp = opcode.take_one(&["clamp", "wrap"]);
        let kind = opcode.need_type()?;
        let name = opcode.name();
        let d = self.destination(operand(o, 0)?, kind.bytes())?;
        let a = self.source(operand(o, 1)?, kind)?;
        let width = 8 * kind.bytes();
        let signed = kind.is_signed();
        match name {
            "bfe" => {
                expect_count(o, 4)?;
                let (b, c) = (self.read32(&o[2])?, self.read32(&o[3])?);
                if let (Register::R32(d), Register::R32(a)) = (d, a) {
                    return Ok(ternary(d, a, b, c, move |x, at, length| {
                        extract(u64::from(x), at, length, 32, signed) as u32
                    }));
                }
                let (Register::R64(d), Register::R64(a)) = (d, a) else {
                    return Err(format!("type {kind:?}"));
                };
                Ok(ternary(d, a, b, c, move |x, at, length| extract(x, at, length, 64, signed)))
            }
            "bfi" => {
                expect_count(o, 5)?;
                let b = self.source(&o[2], kind)?;
                let (c, length) = (self.read32(&o[3])?, self.read32(&o[4])?);
                let (c, length) = (Register::R32(c), Register::R32(length));
                Ok(Op::Alu(Box::new(move |registers, mask| {
                    let (x, mut y) = (a.read(registers), b.read(registers));
                    let (at, length) = (c.read(registers), length.read(registers));
                    for lane in 0..crate::registers::LANES {
                        y[lane] = insert(x[lane], y[lane], at[lane] as u32, length[lane] as u32, width);
                    }
                    d.write(registers, mask, &y);
                })))
            }
            "bmsk" => {
                expect_count(o, 3)?;
                let clamp = clamp == Some("clamp");
                let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                Ok(binary(d, a, b, move |at, length| {
                    let (at, length) = if clamp { (at.min(32), length.min(32)) } else { (at & 31, length & 31) };
                    ((((1u64 << length) - 1) << at) & 0xffff_ffff) as u32
                }))
            }
            _ => {
                expect_count(o, 3)?;
                let clamp = clamp == Some("clamp");
                let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                Ok(binary(d, a, b, move |x, n| {
                    let n = if clamp { n.min(32) } else { n & 31 };
                    match (n, signed) {
                        (0, _) => 0,
                        (_, true) => ((x << (32 - n)) as i32 >> (32 - n)) as u32,
                        _ => x << (32 - n) >> (32 - n),
                    }
                }))
            }
        }
    }

    fn bit_count(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let shift_amount = opcode.take("shiftamt");
        let kind = opcode.need_type()?;
        let d = operand(o, 0)?;
        let a = self.source(operand(o, 1)?, kind)?;
        expect_count(o, 2)?;
        if opcode.name() == "brev" {
            return Ok(match a {
                Register::R32(a) => unary(self.write::<R32>(d)?, a, u32::reverse_bits),
                Register::R64(a) => unary(self.write::<R64>(d)?, a, u64::reverse_bits),
                Register::R16(_) => return Err(format!("type {kind:?}")),
            });
        }
        let d: R32 = self.write(d)?;
        let signed = kind.is_signed();
        Ok(match (opcode.name(), a) {
            ("clz", Register::R32(a)) => unary(d, a, u32::leading_zeros),
            ("clz", Register::R64(a)) => unary(d, a, u64::leading_zeros),
            ("popc", Register::R32(a)) => unary(d, a, u32::count_ones),
            ("popc", Register::R64(a)) => unary(d, a, u64::count_ones),
            (_, Register::R32(a)) => unary(d, a, move |x| {
                let x = if signed && (x as i32) < 0 { !x } else { x };
                find_leading(u64::from(x), 32, shift_amount)
            }),
            (_, Register::R64(a)) => unary(d, a, move |x| {
                let x = if signed && (x as i64) < 0 { !x } else { x };
                find_leading(x, 64, shift_amount)
            }),
            _ => return Err(format!("type {kind:?}")),
        })
    }

    fn find_nth_set(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 4)?;
        let kind = opcode.need_type()?;
        Ok(ternary(
            self.write::<R32>(&o[0])?,
            self.read::<R32>(&o[1], kind)?,
            self.read::<R32>(&o[2], Type::U32)?,
            self.read::<R32>(&o[3], Type::S32)?,
            |mask, base, offset| nth_set(mask, base, offset as i32),
        ))
    }

    fn absolute_difference(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 4)?;
        let kind = opcode.need_type()?;
        let signed = kind.is_signed();
        if kind.bytes() != 4 {
            return Err(format!("type {kind:?}"));
        }
        Ok(ternary(
            self.write::<R32>(&o[0])?,
            self.read::<R32>(&o[1], kind)?,
            self.read::<R32>(&o[2], kind)?,
            self.read::<R32>(&o[3], kind)?,
            move |x, y, z| {
                let difference = if signed { (x as i32).abs_diff(y as i32) } else { x.abs_diff(y) };
                difference.wrapping_add(z)
            },
        ))
    }

    fn dot_product(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        expect_count(o, 4)?;
        let four = opcode.name() == "dp4a";
        let high = opcode.take_one(&["lo", "hi"]) == Some("hi");
        let (a_kind, b_kind) = (opcode.need_type()?, opcode.need_type()?);
        let byte = |x: u32, index: u32, signed: bool| {
            let byte = (x >> (8 * index)) as u8;
            if signed { i32::from(byte as i8) } else { i32::from(byte) }
        };
        let half = |x: u32, index: u32, signed: bool| {
            let half = (x >> (16 * index)) as u16;
            if signed { i32::from(half as i16) } else { i32::from(half) }
        };
        let (a_signed, b_signed) = (a_kind.is_signed(), b_kind.is_signed());
        Ok(ternary(
            self.write::<R32>(&o[0])?,
            self.read::<R32>(&o[1], Type::B32)?,
            self.read::<R32>(&o[2], Type::B32)?,
            self.read::<R32>(&o[3], Type::B32)?,
            move |x, y, z| {
                let sum: i32 = if four {
                    (0..4).map(|index| byte(x, index, a_signed) * byte(y, index, b_signed)).sum()
                } else {
                    let first = if high { 2 } else { 0 };
                    (0..2)
                        .map(|index| half(x, index, a_signed).wrapping_mul(byte(y, first + index, b_signed)))
                        .fold(0, i32::wrapping_add)
                };
                z.wrapping_add(sum as u32)
            },
        ))
    }
}

/// `lop3`: bit `4a + 2b + c` of the table, for each bit.
fn lop3(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let mut result = 0;
    for index in 0..8 {
        if table >> index & 1 != 0 {
            let x = if index & 4 != 0 { a } else { !a };
            let y = if index & 2 != 0 { b } else { !b };
            let z = if index & 1 != 0 { c } else { !c };
            result |= x & y & z;
        }
    }
    result
}

/// `bfe` (PTX ISA, "bfe"); `width` is the operand's, in bits.
fn extract(x: u64, at: u32, length: u32, width: u32, signed: bool) -> u64 {
    let (at, length) = (at & 0xff, length & 0xff);
    let negative = signed && length > 0 && x >> (at + length - 1).min(width - 1) & 1 != 0;
    let field = if at >= width { 0 } else { x >> at };
    let kept = length.min(width.saturating_sub(at));
    let mask = if kept >= 64 { u64::MAX } else { (1 << kept) - 1 };
    if negative { field & mask | !mask } else { field & mask }
}

/// `bfi`: the low `length` bits of `x` placed in `y` at `at`.
fn insert(x: u64, y: u64, at: u32, length: u32, width: u32) -> u64 {
    let (at, length) = (at & 0xff, length & 0xff);
    if at >= width {
        return y;
    }
    let kept = length.min(width - at);
    let mask = if kept >= 64 { u64::MAX } else { (1 << kept) - 1 };
    y & !(mask << at) | (x & mask) << at
}

/// `fns`: the `offset`th bit that is set, from `base` on upwards, or downwards if it is negative; `base` itself for 0.
fn nth_set(mask: u32, base: u32, offset: i32) -> u32 {
    let is_set = |bit: &u32| mask >> bit & 1 != 0;
    let base = base.min(32);
    let nth = (offset.unsigned_abs() as usize).saturating_sub(1);
    let found = match offset {
        0 => (base..32).take(1).find(is_set),
        1.. => (base..32).filter(is_set).nth(nth),
        _ if base < 32 => (0..=base).rev().filter(is_set).nth(nth),
        _ => None,
    };
    found.unwrap_or(u32::MAX)
}

fn find_leading(x: u64, width: u32, shift_amount: bool) -> u32 {
    match x.checked_ilog2() {
        None => u32::MAX,
        Some(bit) if shift_amount => width - 1 - bit,
        Some(bit) => bit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lop3_tables() {
        let (a, b, c) = (0xF0F0_F0F0u32, 0xCCCC_CCCC, 0xAAAA_AAAA);
        assert_eq!(lop3(a, b, c, 0x80), a & b & c);
        assert_eq!(lop3(a, b, c, 0xFE), a | b | c);
        assert_eq!(lop3(a, b, c, 0x96), a ^ b ^ c);
        assert_eq!(lop3(a, b, c, 0x1A), (a & b | c) ^ a);
    }

    #[test]
    fn bit_fields() {
        assert_eq!(extract(0xabcd_1234, 8, 8, 32, false), 0x12);
        assert_eq!(extract(0x0000_f000, 12, 4, 32, true), u64::MAX);
        assert_eq!(extract(0x8000_0000, 28, 16, 32, true) as u32, 0xffff_fff8);
        assert_eq!(extract(0x8000_0000, 40, 4, 32, true) as u32, u32::MAX);
        assert_eq!(extract(7, 0, 0, 32, true), 0);
        assert_eq!(extract(u64::MAX, 0, 64, 64, false), u64::MAX);
        assert_eq!(insert(0xff, 0, 4, 4, 32), 0xf0);
        assert_eq!(insert(0xff, 0x1234, 32, 4, 32), 0x1234);
        assert_eq!(insert(u64::MAX, 0, 60, 10, 64), 0xf << 60);
        assert_eq!(find_leading(0, 32, false), u32::MAX);
        assert_eq!(find_leading(0x10, 32, false), 4);
        assert_eq!(find_leading(0x10, 32, true), 27);
    }
}
