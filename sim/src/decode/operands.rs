//! Operands to registers: immediates become constant registers, special registers a load into a scratch one.

use super::scope::Symbol;
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::memory::{CODE_WINDOW, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::parse::literal_bits;
use crate::program::{Address, Base, Condition, Op, Space, Special};
use crate::registers::{LANES, Predicate, R16, R32, R64, Register, Registers, Slot};

/// The operand at `index`.
pub(crate) fn operand(operands: &[Operand], index: usize) -> Decoded<&Operand> {
    operands.get(index).ok_or_else(|| format!("operand {} is missing", index + 1))
}

/// An error unless there are exactly `count` operands.
pub(crate) fn expect_count(operands: &[Operand], count: usize) -> Decoded<()> {
    if operands.len() == count { Ok(()) } else { Err(format!("{count} operands expected, {} found", operands.len())) }
}

/// A compile-time integer operand.
pub(crate) fn immediate(operand: &Operand) -> Decoded<i64> {
    match operand {
        Operand::Integer(value) => i64::try_from(*value).map_err(|_| format!("immediate {value} is out of range")),
        other => Err(format!("an immediate is expected, found {other:?}")),
    }
}

/// A register handle of one width.
pub(crate) trait Typed: Slot {
    const BYTES: u32;
    fn from_register(register: Register) -> Option<Self>;
}

impl Typed for R16 {
    const BYTES: u32 = 2;
    fn from_register(register: Register) -> Option<Self> {
        match register {
            Register::R16(r) => Some(r),
            _ => None,
        }
    }
}

impl Typed for R32 {
    const BYTES: u32 = 4;
    fn from_register(register: Register) -> Option<Self> {
        match register {
            Register::R32(r) => Some(r),
            _ => None,
        }
    }
}

impl Typed for R64 {
    const BYTES: u32 = 8;
    fn from_register(register: Register) -> Option<Self> {
        match register {
            Register::R64(r) => Some(r),
            _ => None,
        }
    }
}

/// The special register a name stands for (PTX ISA, "Special Registers").
fn special(name: &str) -> Option<(Special, u32)> {
    let axis = |base: &str| {
        let rest = name.strip_prefix(base)?.strip_prefix('.')?;
        ["x", "y", "z"].iter().position(|axis| *axis == rest)
    };
    type OfAxis = fn(usize) -> Special;
    let per_axis: [(&str, OfAxis); 8] = [
        ("%tid", Special::Thread),
        ("%ntid", Special::CtaThreads),
        ("%ctaid", Special::Cta),
        ("%nctaid", Special::GridCtas),
        ("%clusterid", Special::Cluster),
        ("%nclusterid", Special::GridClusters),
        ("%cluster_ctaid", Special::ClusterCta),
        ("%cluster_nctaid", Special::ClusterCtas),
    ];
    for (base, make) in per_axis {
        if let Some(axis) = axis(base) {
            return Some((make(axis), 4));
        }
    }
    if let Some(number) = name.strip_prefix("%envreg").and_then(|number| number.parse::<u32>().ok()) {
        // What a driver puts there is its own affair; here it is nothing.
        return (number < 32).then_some((Special::Constant(0), 4));
    }
    Some(match name {
        "%laneid" => (Special::Lane, 4),
        "%warpid" => (Special::Warp, 4),
        "%nwarpid" => (Special::Warps, 4),
        "%smid" => (Special::Sm, 4),
        "%nsmid" => (Special::Sms, 4),
        "%gridid" => (Special::GridId, 8),
        "%clock" => (Special::Clock, 4),
        "%clock_hi" => (Special::Constant(0), 4),
        "%clock64" => (Special::Clock, 8),
        "%globaltimer" => (Special::GlobalTimer { high: false }, 8),
        "%globaltimer_lo" => (Special::GlobalTimer { high: false }, 4),
        "%globaltimer_hi" => (Special::GlobalTimer { high: true }, 4),
        "%lanemask_eq" => (Special::LanemaskEq, 4),
        "%lanemask_le" => (Special::LanemaskLe, 4),
        "%lanemask_lt" => (Special::LanemaskLt, 4),
        "%lanemask_ge" => (Special::LanemaskGe, 4),
        "%lanemask_gt" => (Special::LanemaskGt, 4),
        "%dynamic_smem_size" => (Special::DynamicSharedBytes, 4),
        "%total_smem_size" => (Special::TotalSharedBytes, 4),
        "%cluster_ctarank" => (Special::ClusterRank, 4),
        "%cluster_nctarank" => (Special::ClusterSize, 4),
        "WARP_SZ" => (Special::Constant(LANES as u32), 4),
        _ => return None,
    })
}

impl Decoder {
    pub(super) fn predicate_named(&self, name: &str) -> Decoded<Predicate> {
        match self.scopes.find(name) {
            Some(Symbol::Predicate(predicate)) => Ok(predicate),
            _ => Err(format!("`{name}` is not a predicate register")),
        }
    }

    fn note_use(&mut self, register: Register, written: bool) {
        if let Register::R32(register) = register {
            self.used.push(crate::program::WgmmaUse { register: register.0, written });
        }
    }

    /// A fresh register that no name stands for.
    pub(super) fn scratch(&mut self, bytes: u32) -> Register {
        let counts = &mut self.module.registers;
        let counter = match bytes {
            1 | 2 => &mut counts.r16,
            4 => &mut counts.r32,
            _ => &mut counts.r64,
        };
        let index = *counter;
        *counter += 1;
        match bytes {
            1 | 2 => Register::R16(R16(index)),
            4 => Register::R32(R32(index)),
            _ => Register::R64(R64(index)),
        }
    }

    pub(super) fn scratch_predicate(&mut self) -> Predicate {
        let index = self.module.registers.predicates;
        self.module.registers.predicates += 1;
        Predicate(index)
    }

    /// The register that holds a constant in every lane.
    pub(super) fn constant(&mut self, bytes: u32, value: u64) -> Register {
        let bytes = bytes.max(2);
        let known = self.constants.get(&(bytes, value)).copied();
        let make = |index| match bytes {
            2 => Register::R16(R16(index)),
            4 => Register::R32(R32(index)),
            _ => Register::R64(R64(index)),
        };
        if let Some(index) = known {
            return make(index);
        }
        let register = self.scratch(bytes);
        let constants = &mut self.module.constants;
        let index = match register {
            Register::R16(r) => {
                constants.r16.push((r.0, value as u16));
                r.0
            }
            Register::R32(r) => {
                constants.r32.push((r.0, value as u32));
                r.0
            }
            Register::R64(r) => {
                constants.r64.push((r.0, value));
                r.0
            }
        };
        self.constants.insert((bytes, value), index);
        register
    }

    pub(super) fn constant32(&mut self, value: u32) -> R32 {
        match self.constant(4, u64::from(value)) {
            Register::R32(r) => r,
            _ => R32(0),
        }
    }

    /// The register that holds an offset from the start of dynamic shared memory, in every lane.
    fn dynamic_shared(&mut self, bytes: u32, offset: i64) -> Register {
        let bytes = bytes.max(4);
        let known = self.dynamic.get(&(bytes, offset)).copied();
        let make = |index| if bytes == 4 { Register::R32(R32(index)) } else { Register::R64(R64(index)) };
        if let Some(index) = known {
            return make(index);
        }
        let register = self.scratch(bytes);
        if let Register::R32(R32(index)) | Register::R64(R64(index)) = register {
            self.dynamic.insert((bytes, offset), index);
        }
        self.module.constants.dynamic.push((register, offset));
        register
    }

    /// A source operand of any kind; immediates get the size of `kind`.
    pub(super) fn source(&mut self, operand: &Operand, kind: Type) -> Decoded<Register> {
        if let Some(bits) = literal_bits(operand, false, kind) {
            return Ok(self.constant(kind.bytes(), bits));
        }
        let Operand::Name(name, offset) = operand else {
            return Err(format!("{operand:?} is not a value"));
        };
        match self.scopes.find(name) {
            Some(Symbol::Register(register)) if *offset == 0 => {
                self.note_use(register, false);
                return Ok(register);
            }
            Some(symbol) => return self.symbol_address(symbol, *offset, kind.bytes(), name),
            None => {}
        }
        let Some((which, bytes)) = special(name) else {
            return Err(format!("`{name}` is not known"));
        };
        let destination = self.scratch(bytes);
        self.push(Op::Special { destination, which });
        Ok(destination)
    }

    /// The address of a variable as a value, in its own state space (what `mov` gives).
    fn symbol_address(&mut self, symbol: Symbol, offset: i64, bytes: u32, name: &str) -> Decoded<Register> {
        let constant = |place: u32| (i64::from(place) + offset) as u64;
        Ok(match symbol {
            Symbol::Shared(place) => self.constant(bytes, constant(place)),
            Symbol::DynamicShared => self.dynamic_shared(bytes, offset),
            Symbol::Local { .. } if self.calls.is_recursive(self.current) => {
                return Err(format!("the address of `{name}`, in local memory, in a function that may call itself"));
            }
            Symbol::Local { place, .. } => self.constant(bytes, constant(place)),
            Symbol::External => return Err(format!("`{name}` is external: modules are not linked")),
            Symbol::KernelParameter(place) => self.constant(bytes, constant(place)),
            Symbol::Function(index) => self.constant(bytes, CODE_WINDOW + u64::from(index)),
            Symbol::Global(variable) => {
                let destination = R64(self.module.registers.r64);
                self.module.registers.r64 += 1;
                self.push(Op::GlobalAddress { destination, variable, offset });
                Register::R64(destination)
            }
            _ => return Err(format!("`{name}` is not a value")),
        })
    }

    /// A source register that is exactly as wide as its type.
    pub(super) fn read<R: Typed>(&mut self, operand: &Operand, kind: Type) -> Decoded<R> {
        let register = self.source(operand, kind)?;
        R::from_register(register)
            .ok_or_else(|| format!("{operand:?} has {} bits where {} are needed", 8 * register.bytes(), 8 * R::BYTES))
    }

    pub(super) fn read32(&mut self, operand: &Operand) -> Decoded<R32> {
        self.read(operand, Type::B32)
    }

    /// A destination register; `_` is one that nothing reads.
    pub(super) fn destination(&mut self, operand: &Operand, bytes: u32) -> Decoded<Register> {
        match operand {
            Operand::Name(name, 0) if name == "_" => Ok(self.scratch(bytes)),
            Operand::Name(name, 0) => match self.scopes.find(name) {
                Some(Symbol::Register(register)) => {
                    self.note_use(register, true);
                    Ok(register)
                }
                _ => Err(format!("`{name}` is not a register")),
            },
            other => Err(format!("{other:?} is not a register")),
        }
    }

    /// A destination register that is exactly as wide as its type.
    pub(super) fn write<R: Typed>(&mut self, operand: &Operand) -> Decoded<R> {
        let register = self.destination(operand, R::BYTES)?;
        R::from_register(register)
            .ok_or_else(|| format!("{operand:?} has {} bits where {} are needed", 8 * register.bytes(), 8 * R::BYTES))
    }

    pub(super) fn write_predicate(&mut self, operand: &Operand) -> Decoded<Predicate> {
        match operand {
            Operand::Name(name, 0) if name == "_" => Ok(self.scratch_predicate()),
            Operand::Name(name, 0) => self.predicate_named(name),
            other => Err(format!("{other:?} is not a predicate register")),
        }
    }

    /// A predicate source: a register, `!` a register, or an integer literal as true or false.
    pub(super) fn condition(&mut self, operand: &Operand) -> Decoded<Condition> {
        let (name, negate) = match operand {
            Operand::Name(name, 0) => (name, false),
            Operand::Not(name) => (name, true),
            Operand::Integer(value) => {
                // A fresh predicate register is false in every lane.
                let predicate = self.scratch_predicate();
                return Ok(Condition { predicate, negate: *value != 0 });
            }
            other => return Err(format!("{other:?} is not a predicate")),
        };
        Ok(Condition { predicate: self.predicate_named(name)?, negate })
    }

    /// The elements of `{a, b}`, or the operand itself.
    pub(super) fn elements<'a>(&self, operand: &'a Operand) -> &'a [Operand] {
        match operand {
            Operand::Vector(list) => list,
            other => std::slice::from_ref(other),
        }
    }

    pub(super) fn read_all32(&mut self, operand: &Operand) -> Decoded<Box<[R32]>> {
        let list = self.elements(operand);
        list.iter().map(|element| self.read32(element)).collect()
    }

    pub(super) fn write_all32(&mut self, operand: &Operand) -> Decoded<Box<[R32]>> {
        let list = self.elements(operand);
        list.iter().map(|element| self.write(element)).collect()
    }

    /// `[a+8]`: the address, and the space it is really in when the opcode names `space`.
    pub(super) fn address(&mut self, operand: &Operand, space: Space) -> Decoded<(Address, Space)> {
        let inner = match operand {
            Operand::Address(list) if list.len() == 1 => &list[0],
            Operand::Address(_) => return Err("a plain address is expected".to_owned()),
            other => other,
        };
        self.address_value(inner, space)
    }

    /// The address that stands first between brackets, or alone.
    pub(super) fn address_value(&mut self, operand: &Operand, space: Space) -> Decoded<(Address, Space)> {
        let absolute = |offset: i64, space| Ok((Address { base: Base::None, offset }, space));
        let (name, offset) = match operand {
            Operand::Integer(value) => {
                let offset = i64::try_from(*value).map_err(|_| format!("address {value} is out of range"))?;
                return absolute(offset, space);
            }
            Operand::Name(name, offset) => (name, *offset),
            other => return Err(format!("{other:?} is not an address")),
        };
        let in_window = |window: u64, place: u32| {
            let generic = if space == Space::Generic { window } else { 0 };
            generic as i64 + i64::from(place) + offset
        };
        match self.scopes.find(name) {
            Some(Symbol::Register(Register::R64(r))) => Ok((Address { base: Base::R64(r), offset }, space)),
            Some(Symbol::Register(Register::R32(r))) => Ok((Address { base: Base::R32(r), offset }, space)),
            Some(Symbol::Shared(place)) => absolute(in_window(SHARED_WINDOW, place), space),
            Some(Symbol::DynamicShared) => {
                let (bytes, window) = if space == Space::Generic { (8, SHARED_WINDOW) } else { (4, 0) };
                let base = match self.dynamic_shared(bytes, offset.wrapping_add_unsigned(window)) {
                    Register::R64(r) => Base::R64(r),
                    Register::R32(r) => Base::R32(r),
                    Register::R16(_) => Base::None,
                };
                Ok((Address { base, offset: 0 }, space))
            }
            Some(Symbol::Local { place, .. }) if space == Space::Param => {
                absolute(i64::from(place) + offset, Space::Local)
            }
            Some(Symbol::Local { place, .. }) => absolute(in_window(LOCAL_WINDOW, place), space),
            Some(Symbol::KernelParameter(place)) => absolute(in_window(PARAM_WINDOW, place), space),
            Some(Symbol::External) => Err(format!("`{name}` is external: modules are not linked")),
            Some(symbol @ Symbol::Global(_)) => {
                let base = match self.symbol_address(symbol, offset, 8, name)? {
                    Register::R64(r) => Base::R64(r),
                    _ => Base::None,
                };
                Ok((Address { base, offset: 0 }, space))
            }
            _ => Err(format!("`{name}` is not an address")),
        }
    }
}

/// One source.
pub(crate) fn unary<D: Slot, A: Slot>(d: D, a: A, f: impl Fn(A::Value) -> D::Value + Send + Sync + 'static) -> Op {
    Op::Alu(Box::new(move |registers: &mut Registers, mask| {
        let mut out = [D::Value::default(); LANES];
        let x = a.get(registers);
        for lane in 0..LANES {
            out[lane] = f(x[lane]);
        }
        d.set(registers, mask, &out);
    }))
}

/// Two sources.
pub(crate) fn binary<D: Slot, A: Slot, B: Slot>(
    d: D,
    a: A,
    b: B,
    f: impl Fn(A::Value, B::Value) -> D::Value + Send + Sync + 'static,
) -> Op {
    Op::Alu(Box::new(move |registers: &mut Registers, mask| {
        let mut out = [D::Value::default(); LANES];
        let (x, y) = (a.get(registers), b.get(registers));
        for lane in 0..LANES {
            out[lane] = f(x[lane], y[lane]);
        }
        d.set(registers, mask, &out);
    }))
}

/// Three sources.
pub(crate) fn ternary<D: Slot, A: Slot, B: Slot, C: Slot>(
    d: D,
    a: A,
    b: B,
    c: C,
    f: impl Fn(A::Value, B::Value, C::Value) -> D::Value + Send + Sync + 'static,
) -> Op {
    Op::Alu(Box::new(move |registers: &mut Registers, mask| {
        let mut out = [D::Value::default(); LANES];
        let (x, y, z) = (a.get(registers), b.get(registers), c.get(registers));
        for lane in 0..LANES {
            out[lane] = f(x[lane], y[lane], z[lane]);
        }
        d.set(registers, mask, &out);
    }))
}

/// One source of any width, through 64 bits.
pub(crate) fn convert(d: Register, a: Register, f: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Op {
    Op::Alu(Box::new(move |registers: &mut Registers, mask| {
        let mut value = a.read(registers);
        for lane in &mut value {
            *lane = f(*lane);
        }
        d.write(registers, mask, &value);
    }))
}

/// Packs 32 truth values into a mask.
#[inline(always)]
pub(crate) fn pack(bits: &[bool; LANES]) -> u32 {
    let mut mask = 0;
    for (index, chunk) in bits.chunks_exact(8).enumerate() {
        let mut bytes = [0u8; 8];
        for (byte, bit) in bytes.iter_mut().zip(chunk) {
            *byte = u8::from(*bit);
        }
        // Gathers the low bit of each byte into the top byte.
        let packed = u64::from_le_bytes(bytes).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        mask |= (packed as u32) << (8 * index);
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pack_orders_lanes_from_bit_zero() {
        let mut bits = [false; LANES];
        for lane in [0, 3, 8, 21, 31] {
            bits[lane] = true;
        }
        assert_eq!(pack(&bits), 1 | 1 << 3 | 1 << 8 | 1 << 21 | 1 << 31);
    }
}
