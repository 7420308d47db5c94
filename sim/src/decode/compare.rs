//! `setp`, `set`, `testp`.

use super::opcode::Opcode;
use super::operands::{operand, pack};
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::convert::arithmetic::{HalfType, flush};
use crate::program::{Condition, Op};
use crate::registers::{LANES, Predicate, R16, R32, R64, Registers, Slot};

/// A predicate from one source.
pub(super) fn compare1<A: Slot>(d: Predicate, a: A, f: impl Fn(A::Value) -> bool + Send + Sync + 'static) -> Op {
    Op::Alu(Box::new(move |registers: &mut Registers, mask| {
        let mut bits = [false; LANES];
        let x = a.get(registers);
        for lane in 0..LANES {
            bits[lane] = f(x[lane]);
        }
        registers.set_predicate(d, mask, pack(&bits));
    }))
}

/// A comparison of two registers, as a mask over lanes.
type Comparison = Box<dyn Fn(&Registers) -> u32 + Send + Sync>;

fn comparison<A: Slot>(a: A, b: A, f: impl Fn(A::Value, A::Value) -> bool + Send + Sync + 'static) -> Comparison {
    Box::new(move |registers| {
        let mut bits = [false; LANES];
        let (x, y) = (a.get(registers), b.get(registers));
        for lane in 0..LANES {
            bits[lane] = f(x[lane], y[lane]);
        }
        pack(&bits)
    })
}

#[derive(Clone, Copy)]
enum Join {
    And,
    Or,
    Xor,
}

impl Join {
    fn apply(self, a: u32, b: u32) -> u32 {
        match self {
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
        }
    }
}

macro_rules! ordered {
    ($name:expr, $a:expr, $b:expr, |$x:ident| $view:expr) => {
        match $name {
            "eq" => comparison($a, $b, |$x, y| {
                $view == {
                    let $x = y;
                    $view
                }
            }),
            "ne" => comparison($a, $b, |$x, y| {
                $view != {
                    let $x = y;
                    $view
                }
            }),
            "lt" | "lo" => comparison($a, $b, |$x, y| {
                $view < {
                    let $x = y;
                    $view
                }
            }),
            "le" | "ls" => comparison($a, $b, |$x, y| {
                $view <= {
                    let $x = y;
                    $view
                }
            }),
            "gt" | "hi" => comparison($a, $b, |$x, y| {
                $view > {
                    let $x = y;
                    $view
                }
            }),
            "ge" | "hs" => comparison($a, $b, |$x, y| {
                $view >= {
                    let $x = y;
                    $view
                }
            }),
            other => return Err(format!("comparison `.{other}` of this type")),
        }
    };
}

/// Comparisons of floating-point values; the `u` forms are also true of unordered operands.
fn float_comparison<T: PartialOrd + Copy>(name: &str) -> Decoded<fn(T, T) -> bool> {
    fn unordered<T: PartialOrd>(x: &T, y: &T) -> bool {
        x.partial_cmp(y).is_none()
    }
    Ok(match name {
        "eq" => |x, y| x == y,
        "ne" => |x, y| x != y && !unordered(&x, &y),
        "lt" => |x, y| x < y,
        "le" => |x, y| x <= y,
        "gt" => |x, y| x > y,
        "ge" => |x, y| x >= y,
        "equ" => |x, y| x == y || unordered(&x, &y),
        "neu" => |x, y| x != y,
        "ltu" => |x, y| x < y || unordered(&x, &y),
        "leu" => |x, y| x <= y || unordered(&x, &y),
        "gtu" => |x, y| x > y || unordered(&x, &y),
        "geu" => |x, y| x >= y || unordered(&x, &y),
        "num" => |x, y| !unordered(&x, &y),
        "nan" => |x, y| unordered(&x, &y),
        other => return Err(format!("comparison `.{other}` of this type")),
    })
}

const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
];

impl Decoder {
    pub(super) fn decode_compare(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        if opcode.name() == "testp" {
            return self.decode_testp(opcode, operands);
        }
        let name = opcode.take_one(&COMPARISONS).ok_or("the comparison is missing")?;
        let join = opcode.take_one(&["and", "or", "xor"]).map(|join| match join {
            "and" => Join::And,
            "or" => Join::Or,
            _ => Join::Xor,
        });
        let ftz = opcode.take("ftz");
        let is_set = opcode.name() == "set";
        let result = if is_set { Some(opcode.need_type()?) } else { None };
        let kind = opcode.need_type()?;
        let (a, b) = (operand(operands, 1)?, operand(operands, 2)?);
        // Of packed types the upper halves give a mask of their own.
        let (test, upper) = if is_packed(kind) {
            let (a, b): (R32, R32) = (self.read(a, kind)?, self.read(b, kind)?);
            (packed_comparison(name, kind, ftz, a, b, 0)?, Some(packed_comparison(name, kind, ftz, a, b, 16)?))
        } else {
            (self.comparison(name, kind, ftz, a, b)?, None)
        };
        let joined = match join {
            Some(join) => Some((join, self.condition(operand(operands, 3)?)?)),
            None if operands.len() > 3 => {
                return Err("more operands than expected".to_owned());
            }
            None => None,
        };
        if let Some(result) = result {
            let truth = truth_of(result, kind)?;
            let d = self.destination(operand(operands, 0)?, result.bytes())?;
            if d.bytes() != result.bytes() {
                return Err(format!("the destination has {} bits", 8 * d.bytes()));
            }
            self.push(Op::Alu(Box::new(move |registers: &mut Registers, mask| {
                let bits = join_with(registers, test(registers), joined);
                let upper = upper.as_ref().map_or(bits, |upper| join_with(registers, upper(registers), joined));
                let [low, high] = [u64::from(truth & 0xffff), u64::from(truth & 0xffff_0000)];
                let mut out = [0; LANES];
                for (lane, value) in out.iter_mut().enumerate() {
                    *value =
                        if bits >> lane & 1 != 0 { low } else { 0 } | if upper >> lane & 1 != 0 { high } else { 0 };
                }
                d.write(registers, mask, &out);
            })));
            return Ok(());
        }
        let (d, second) = match operand(operands, 0)? {
            Operand::Pair(first, second) => (self.write_predicate(first)?, Some(self.write_predicate(second)?)),
            other => (self.write_predicate(other)?, None),
        };
        if upper.is_some() != second.is_some() && upper.is_some() {
            return Err("a packed comparison gives two predicates, `p|q`".to_owned());
        }
        self.push(Op::Alu(Box::new(move |registers: &mut Registers, mask| {
            let bits = test(registers);
            let value = join_with(registers, bits, joined);
            if let Some(second) = second {
                let other = upper.as_ref().map_or(!bits, |upper| upper(registers));
                let other = join_with(registers, other, joined);
                registers.set_predicate(d, mask, value);
                registers.set_predicate(second, mask, other);
            } else {
                registers.set_predicate(d, mask, value);
            }
        })));
        Ok(())
    }

    fn comparison(&mut self, name: &str, kind: Type, ftz: bool, a: &Operand, b: &Operand) -> Decoded<Comparison> {
        use Type::*;
        Ok(match kind {
            F32 => {
                let (a, b): (R32, R32) = (self.read(a, kind)?, self.read(b, kind)?);
                return float32(name, ftz, a, b);
            }
            F64 => {
                let test = float_comparison::<f64>(name)?;
                let (a, b): (R64, R64) = (self.read(a, kind)?, self.read(b, kind)?);
                comparison(a, b, move |x, y| test(f64::from_bits(x), f64::from_bits(y)))
            }
            F16 | Bf16 => {
                let test = float_comparison::<f32>(name)?;
                let format = if kind == F16 { HalfType::F16 } else { HalfType::Bf16 };
                let value = move |bits: u16| half_value(format, bits, ftz);
                let (a, b): (R16, R16) = (self.read(a, kind)?, self.read(b, kind)?);
                comparison(a, b, move |x, y| test(value(x), value(y)))
            }
            U16 | B16 => {
                let (a, b): (R16, R16) = (self.read(a, kind)?, self.read(b, kind)?);
                ordered!(name, a, b, |x| x)
            }
            S16 => {
                let (a, b): (R16, R16) = (self.read(a, kind)?, self.read(b, kind)?);
                ordered!(name, a, b, |x| x as i16)
            }
            U32 | B32 => {
                let (a, b): (R32, R32) = (self.read(a, kind)?, self.read(b, kind)?);
                ordered!(name, a, b, |x| x)
            }
            S32 => {
                let (a, b): (R32, R32) = (self.read(a, kind)?, self.read(b, kind)?);
                ordered!(name, a, b, |x| x as i32)
            }
            U64 | B64 => {
                let (a, b): (R64, R64) = (self.read(a, kind)?, self.read(b, kind)?);
                ordered!(name, a, b, |x| x)
            }
            S64 => {
                let (a, b): (R64, R64) = (self.read(a, kind)?, self.read(b, kind)?);
                ordered!(name, a, b, |x| x as i64)
            }
            other => return Err(format!("type {other:?}")),
        })
    }

    fn decode_testp(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        /// Of a value, and whether it is subnormal in its own format.
        type Property = fn(f64, bool) -> bool;
        let tests: [(&str, Property); 6] = [
            ("finite", |x, _| x.is_finite()),
            ("infinite", |x, _| x.is_infinite()),
            ("number", |x, _| !x.is_nan()),
            ("notanumber", |x, _| x.is_nan()),
            ("normal", |x, subnormal| x.is_finite() && x != 0.0 && !subnormal),
            ("subnormal", |_, subnormal| subnormal),
        ];
        let (_, test) = tests.into_iter().find(|(name, _)| opcode.take(name)).ok_or("the property is missing")?;
        let kind = opcode.need_type()?;
        let d = self.write_predicate(operand(operands, 0)?)?;
        let op = if kind == Type::F32 {
            let a: R32 = self.read(operand(operands, 1)?, kind)?;
            compare1(d, a, move |x| {
                let x = f32::from_bits(x);
                test(f64::from(x), x.is_subnormal())
            })
        } else {
            let a: R64 = self.read(operand(operands, 1)?, kind)?;
            compare1(d, a, move |x| {
                let x = f64::from_bits(x);
                test(x, x.is_subnormal())
            })
        };
        self.push(op);
        Ok(())
    }
}

/// f32 comparisons, the ordered ones as loops of their own.
fn float32(name: &str, ftz: bool, a: R32, b: R32) -> Decoded<Comparison> {
    let value = f32::from_bits;
    Ok(match (name, ftz) {
        ("eq", false) => comparison(a, b, move |x, y| value(x) == value(y)),
        ("neu", false) => comparison(a, b, move |x, y| value(x) != value(y)),
        ("lt", false) => comparison(a, b, move |x, y| value(x) < value(y)),
        ("le", false) => comparison(a, b, move |x, y| value(x) <= value(y)),
        ("gt", false) => comparison(a, b, move |x, y| value(x) > value(y)),
        ("ge", false) => comparison(a, b, move |x, y| value(x) >= value(y)),
        _ => {
            let test = float_comparison::<f32>(name)?;
            let view = move |bits| {
                let x = f32::from_bits(bits);
                if ftz { flush(x) } else { x }
            };
            comparison(a, b, move |x, y| test(view(x), view(y)))
        }
    })
}

/// What `set` writes where a comparison of `kind` is true.
fn truth_of(result: Type, kind: Type) -> Decoded<u32> {
    let half = |format: Type| if format == Type::F16 { 0x3c00 } else { 0x3f80 };
    Ok(match result {
        Type::F32 if !is_packed(kind) => 1f32.to_bits(),
        Type::U32 | Type::S32 => u32::MAX,
        Type::U16 | Type::S16 if matches!(kind, Type::F16 | Type::Bf16) => 0xffff,
        Type::F16 | Type::Bf16 if kind == result => half(result),
        Type::F16x2 if kind == result => half(Type::F16) * 0x1_0001,
        Type::Bf16x2 if kind == result => half(Type::Bf16) * 0x1_0001,
        other => return Err(format!("result of type {other:?}")),
    })
}

/// A comparison of the halves from bit `shift` on.
fn packed_comparison(name: &str, kind: Type, ftz: bool, a: R32, b: R32, shift: u32) -> Decoded<Comparison> {
    let test = float_comparison::<f32>(name)?;
    let format = if kind == Type::F16x2 { HalfType::F16 } else { HalfType::Bf16 };
    let value = move |bits: u32| half_value(format, (bits >> shift) as u16, ftz);
    Ok(comparison(a, b, move |x, y| test(value(x), value(y))))
}

/// A half as a number, with `ftz` zero instead of a subnormal f16.
fn half_value(format: HalfType, bits: u16, ftz: bool) -> f32 {
    let subnormal = ftz && format == HalfType::F16 && bits & 0x7c00 == 0;
    format.to_f32(if subnormal { bits & 0x8000 } else { bits })
}

fn is_packed(kind: Type) -> bool {
    matches!(kind, Type::F16x2 | Type::Bf16x2)
}

fn join_with(registers: &Registers, bits: u32, joined: Option<(Join, Condition)>) -> u32 {
    let Some((join, condition)) = joined else {
        return bits;
    };
    let other = registers.predicates[condition.predicate.0 as usize];
    join.apply(bits, if condition.negate { !other } else { other })
}
