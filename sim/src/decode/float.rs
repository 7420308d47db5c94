//! Floating-point arithmetic.

use super::opcode::Opcode;
use super::operands::{binary, expect_count, operand, ternary, unary};
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::convert::Rounding;
use crate::convert::arithmetic::{
    Approximation, CANONICAL_NAN_F32, Extremum, ExtremumMode, FloatMode, HalfMode, HalfType, add_f32, div_f32,
    extremum_f32, extremum_f64, flush, fma_f32, mul_f32, packed, sqrt_f32,
};
use crate::program::Op;
use crate::registers::{R16, R32, R64};

/// Whether an arithmetic opcode names a floating-point type.
pub(super) fn is_float(opcode: &Opcode<'_>) -> bool {
    opcode.names_float()
}

/// Modifiers all floating-point instructions share.
struct Modifiers {
    rounding: Option<&'static str>,
    ftz: bool,
    saturate: bool,
    relu: bool,
}

impl Modifiers {
    fn take(opcode: &mut Opcode<'_>) -> Self {
        Self {
            rounding: opcode.take_one(&["rn", "rz", "rm", "rp"]),
            ftz: opcode.take("ftz"),
            saturate: opcode.take("sat"),
            relu: opcode.take("relu"),
        }
    }

    fn float(&self) -> FloatMode {
        FloatMode {
            rounding: match self.rounding {
                Some("rz") => Rounding::Zero,
                Some("rm") => Rounding::Down,
                Some("rp") => Rounding::Up,
                _ => Rounding::Nearest,
            },
            flush_subnormals: self.ftz,
            saturate: self.saturate,
        }
    }

    fn half(&self) -> HalfMode {
        HalfMode { flush_subnormals: self.ftz, saturate: self.saturate, relu: self.relu }
    }
}

fn f(bits: u32) -> f32 {
    f32::from_bits(bits)
}

fn g(bits: u64) -> f64 {
    f64::from_bits(bits)
}

fn canonical(value: f32) -> u32 {
    if value.is_nan() { CANONICAL_NAN_F32.to_bits() } else { value.to_bits() }
}

impl Decoder {
    pub(super) fn decode_float(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let op = match opcode.name() {
            "min" | "max" => self.extremum(opcode, operands)?,
            "abs" | "neg" | "copysign" => self.sign(opcode, operands)?,
            "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => {
                self.function_of_one(opcode, operands)?
            }
            "add" | "sub" | "mul" | "fma" | "mad" | "div" => {
                let modifiers = Modifiers::take(opcode);
                // Divisions are exact, which `.approx` and `.full` allow.
                if opcode.name() == "div" {
                    opcode.ignore(&["approx", "full"]);
                }
                let kind = opcode.need_type()?;
                match kind {
                    Type::F32 => self.single(opcode.name(), &modifiers, operands)?,
                    Type::F64 => self.double(opcode.name(), &modifiers, operands)?,
                    Type::F16 | Type::Bf16 | Type::F16x2 | Type::Bf16x2 => {
                        self.half(opcode.name(), kind, &modifiers, operands)?
                    }
                    other => return Err(format!("type {other:?}")),
                }
            }
            _ => return Err("not a floating-point instruction".to_owned()),
        };
        self.push(op);
        Ok(())
    }

    fn single(&mut self, name: &str, modifiers: &Modifiers, o: &[Operand]) -> Decoded<Op> {
        let kind = Type::F32;
        let mode = modifiers.float();
        let plain = mode == FloatMode::default();
        let three = matches!(name, "fma" | "mad");
        expect_count(o, if three { 4 } else { 3 })?;
        let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
        Ok(match (name, plain) {
            ("add", true) => binary(d, a, b, |x, y| canonical(f(x) + f(y))),
            ("sub", true) => binary(d, a, b, |x, y| canonical(f(x) - f(y))),
            ("mul", true) => binary(d, a, b, |x, y| canonical(f(x) * f(y))),
            ("add", _) => binary(d, a, b, move |x, y| add_f32(f(x), f(y), mode).to_bits()),
            ("sub", _) => binary(d, a, b, move |x, y| add_f32(f(x), -f(y), mode).to_bits()),
            ("mul", _) => binary(d, a, b, move |x, y| mul_f32(f(x), f(y), mode).to_bits()),
            ("div", _) => binary(d, a, b, move |x, y| div_f32(f(x), f(y), mode).to_bits()),
            _ => {
                let c: R32 = self.read(&o[3], kind)?;
                ternary(d, a, b, c, move |x, y, z| fma_f32(f(x), f(y), f(z), mode).to_bits())
            }
        })
    }

    fn double(&mut self, name: &str, modifiers: &Modifiers, o: &[Operand]) -> Decoded<Op> {
        let kind = Type::F64;
        if !matches!(modifiers.rounding, None | Some("rn")) {
            return Err("f64 arithmetic rounds to nearest only".to_owned());
        }
        let three = matches!(name, "fma" | "mad");
        expect_count(o, if three { 4 } else { 3 })?;
        let (d, a, b): (R64, R64, R64) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
        Ok(match name {
            "add" => binary(d, a, b, |x, y| (g(x) + g(y)).to_bits()),
            "sub" => binary(d, a, b, |x, y| (g(x) - g(y)).to_bits()),
            "mul" => binary(d, a, b, |x, y| (g(x) * g(y)).to_bits()),
            "div" => binary(d, a, b, |x, y| (g(x) / g(y)).to_bits()),
            _ => {
                let c: R64 = self.read(&o[3], kind)?;
                ternary(d, a, b, c, |x, y, z| g(x).mul_add(g(y), g(z)).to_bits())
            }
        })
    }

    fn half(&mut self, name: &str, kind: Type, modifiers: &Modifiers, o: &[Operand]) -> Decoded<Op> {
        let format = match kind {
            Type::F16 | Type::F16x2 => HalfType::F16,
            _ => HalfType::Bf16,
        };
        let mode = modifiers.half();
        if !matches!(modifiers.rounding, None | Some("rn")) {
            return Err("16-bit arithmetic rounds to nearest only".to_owned());
        }
        let three = name == "fma";
        expect_count(o, if three { 4 } else { 3 })?;
        let operation: Box<dyn Fn(u16, u16, u16) -> u16 + Send + Sync> = match name {
            "add" => Box::new(move |x, y, _| format.add(x, y, mode)),
            "sub" => Box::new(move |x, y, _| format.add(x, y ^ 0x8000, mode)),
            "mul" => Box::new(move |x, y, _| format.mul(x, y, mode)),
            "fma" => Box::new(move |x, y, z| format.fma(x, y, z, mode)),
            other => return Err(format!("`{other}` of 16-bit floats")),
        };
        let third = if three { &o[3] } else { &o[2] };
        if kind.bytes() == 4 {
            let (d, a, b, c): (R32, R32, R32, R32) =
                (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?, self.read(third, kind)?);
            return Ok(ternary(d, a, b, c, move |x, y, z| packed([x, y, z], &operation)));
        }
        let (d, a, b, c): (R16, R16, R16, R16) =
            (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?, self.read(third, kind)?);
        Ok(ternary(d, a, b, c, operation))
    }

    fn extremum(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let which = if opcode.name() == "min" { Extremum::Min } else { Extremum::Max };
        let mode = ExtremumMode {
            flush_subnormals: opcode.take("ftz"),
            propagate_nan: opcode.take("NaN"),
            xor_sign_abs: opcode.take("xorsign") && opcode.take("abs"),
        };
        let kind = opcode.need_type()?;
        if o.len() == 4 && kind == Type::F32 {
            let (d, a, b, c): (R32, R32, R32, R32) =
                (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?, self.read(&o[3], kind)?);
            return Ok(ternary(d, a, b, c, move |x, y, z| {
                let first = extremum_f32(which, f(x), f(y), mode);
                extremum_f32(which, first, f(z), mode).to_bits()
            }));
        }
        expect_count(o, 3)?;
        Ok(match kind {
            Type::F32 => {
                let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                binary(d, a, b, move |x, y| extremum_f32(which, f(x), f(y), mode).to_bits())
            }
            Type::F64 => {
                let (d, a, b): (R64, R64, R64) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                binary(d, a, b, move |x, y| extremum_f64(which, g(x), g(y)).to_bits())
            }
            Type::F16 | Type::Bf16 => {
                let format = half_format(kind);
                let (d, a, b): (R16, R16, R16) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                binary(d, a, b, move |x, y| format.extremum(which, x, y, mode))
            }
            Type::F16x2 | Type::Bf16x2 => {
                let format = half_format(kind);
                let (d, a, b): (R32, R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?, self.read(&o[2], kind)?);
                binary(d, a, b, move |x, y| packed([x, y, 0], |x, y, _| format.extremum(which, x, y, mode)))
            }
            other => return Err(format!("type {other:?}")),
        })
    }

    fn sign(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let ftz = opcode.take("ftz");
        let kind = opcode.need_type()?;
        let absolute = opcode.name() == "abs";
        if opcode.name() == "copysign" {
            expect_count(o, 3)?;
            return Ok(match kind {
                Type::F32 => binary(
                    self.write::<R32>(&o[0])?,
                    self.read::<R32>(&o[1], kind)?,
                    self.read::<R32>(&o[2], kind)?,
                    |x, y| x & 1 << 31 | y & !(1 << 31),
                ),
                Type::F64 => binary(
                    self.write::<R64>(&o[0])?,
                    self.read::<R64>(&o[1], kind)?,
                    self.read::<R64>(&o[2], kind)?,
                    |x, y| x & 1 << 63 | y & !(1 << 63),
                ),
                other => return Err(format!("type {other:?}")),
            });
        }
        expect_count(o, 2)?;
        Ok(match kind {
            Type::F32 => {
                let (d, a): (R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                unary(d, a, move |x| {
                    let x = if ftz { flush(f(x)).to_bits() } else { x };
                    if absolute { x & !(1 << 31) } else { x ^ 1 << 31 }
                })
            }
            Type::F64 => {
                let (d, a): (R64, R64) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                unary(d, a, move |x| if absolute { x & !(1 << 63) } else { x ^ 1 << 63 })
            }
            Type::F16 | Type::Bf16 => {
                let (d, a): (R16, R16) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                unary(d, a, move |x| if absolute { x & 0x7fff } else { x ^ 0x8000 })
            }
            Type::F16x2 | Type::Bf16x2 => {
                let (d, a): (R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                unary(d, a, move |x| if absolute { x & 0x7fff_7fff } else { x ^ 0x8000_8000 })
            }
            other => return Err(format!("type {other:?}")),
        })
    }

    fn function_of_one(&mut self, opcode: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Op> {
        let which = match opcode.name() {
            "rcp" => Approximation::Rcp,
            "sqrt" => Approximation::Sqrt,
            "rsqrt" => Approximation::Rsqrt,
            "sin" => Approximation::Sin,
            "cos" => Approximation::Cos,
            "lg2" => Approximation::Lg2,
            "ex2" => Approximation::Ex2,
            _ => Approximation::Tanh,
        };
        let approximate = opcode.take("approx");
        let modifiers = Modifiers::take(opcode);
        let ftz = modifiers.ftz;
        let kind = opcode.need_type()?;
        expect_count(o, 2)?;
        let can_round = matches!(which, Approximation::Rcp | Approximation::Sqrt);
        let rounds = can_round && modifiers.rounding.is_some();
        if !approximate && !rounds {
            return Err("`.approx` is missing".to_owned());
        }
        Ok(match kind {
            Type::F32 => {
                let (d, a): (R32, R32) = (self.write(operand(o, 0)?)?, self.read(&o[1], kind)?);
                let mode = modifiers.float();
                match (approximate, which) {
                    (true, _) => unary(d, a, move |x| which.f32(f(x), ftz).to_bits()),
                    (_, Approximation::Rcp) => unary(d, a, move |x| div_f32(1.0, f(x), mode).to_bits()),
                    _ => unary(d, a, move |x| sqrt_f32(f(x), mode).to_bits()),
                }
            }
            Type::F64 => {
                let (d, a): (R64, R64) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                match (approximate, which, modifiers.rounding) {
                    (true, _, _) => unary(d, a, move |x| which.f64(g(x), ftz).to_bits()),
                    (_, Approximation::Rcp, Some("rn")) => unary(d, a, |x| (1.0 / g(x)).to_bits()),
                    (_, _, Some("rn")) => unary(d, a, |x| g(x).sqrt().to_bits()),
                    _ => return Err("f64 arithmetic rounds to nearest only".to_owned()),
                }
            }
            Type::F16 | Type::Bf16 if approximate => {
                let format = half_format(kind);
                let (d, a): (R16, R16) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                unary(d, a, move |x| which.half(format, x, ftz))
            }
            Type::F16x2 | Type::Bf16x2 if approximate => {
                let format = half_format(kind);
                let (d, a): (R32, R32) = (self.write(&o[0])?, self.read(&o[1], kind)?);
                unary(d, a, move |x| packed([x, 0, 0], |x, _, _| which.half(format, x, ftz)))
            }
            other => return Err(format!("type {other:?}")),
        })
    }
}

fn half_format(kind: Type) -> HalfType {
    match kind {
        Type::F16 | Type::F16x2 => HalfType::F16,
        _ => HalfType::Bf16,
    }
}
