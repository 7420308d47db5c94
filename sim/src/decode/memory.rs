//! `ld`, `st`, `atom`, `red`, `prefetch` and the cache hints.

use super::opcode::Opcode;
use super::operands::operand;
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::check::{Order, Scope};
use crate::program::{Access, AsyncStore, Atomic, AtomicOperation, AtomicType, Op, Space};
use crate::registers::Register;

/// Cache operators and eviction hints, which change no value.
pub(super) const CACHE_HINTS: [&str; 24] = [
    "ca",
    "cg",
    "cs",
    "cv",
    "lu",
    "wb",
    "wt",
    "nc",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::evict_normal",
    "L2::evict_first",
    "L2::evict_last",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "unified",
    "mmio",
    "evict_normal",
    "level::eviction_priority",
    "L2::evict_unchanged",
];

const SCOPES: [&str; 4] = ["cta", "cluster", "gpu", "sys"];

/// The scope modifier.
pub(super) fn take_scope(opcode: &mut Opcode<'_>) -> Option<Scope> {
    Some(match opcode.take_one(&SCOPES)? {
        "cta" => Scope::Cta,
        "cluster" => Scope::Cluster,
        "gpu" => Scope::Gpu,
        _ => Scope::Sys,
    })
}

fn take_order(opcode: &mut Opcode<'_>) -> Option<Order> {
    Some(match opcode.take_one(&["relaxed", "acquire", "release", "acq_rel"])? {
        "relaxed" => Order::Relaxed,
        "acquire" => Order::Acquire,
        "release" => Order::Release,
        _ => Order::AcquireRelease,
    })
}

/// The state space modifier of an access.
pub(super) fn take_space(opcode: &mut Opcode<'_>) -> Space {
    match opcode.take_one(&[
        "global",
        "const",
        "shared::cta",
        "shared::cluster",
        "shared",
        "local",
        "param::entry",
        "param::func",
        "param",
    ]) {
        None => Space::Generic,
        Some("global" | "const") => Space::Global,
        // Without a sub-qualifier it is the executing CTA's (PTX ISA 8.6, "ld").
        Some("shared::cta" | "shared") => Space::Shared,
        Some("shared::cluster") => Space::Cluster,
        Some("local") => Space::Local,
        Some(_) => Space::Param,
    }
}

/// The operation and element type of an atomic.
pub(super) fn atomic_type(kind: Type) -> Decoded<(AtomicType, u32, u32)> {
    Ok(match kind {
        Type::F16 => (AtomicType::F16, 2, 1),
        Type::Bf16 => (AtomicType::Bf16, 2, 1),
        Type::F16x2 => (AtomicType::F16, 2, 2),
        Type::Bf16x2 => (AtomicType::Bf16, 2, 2),
        Type::F32 => (AtomicType::F32, 4, 1),
        Type::F64 => (AtomicType::F64, 8, 1),
        Type::B16 | Type::B32 | Type::B64 | Type::U32 | Type::U64 => (AtomicType::Unsigned, kind.bytes(), 1),
        Type::S32 | Type::S64 => (AtomicType::Signed, kind.bytes(), 1),
        other => return Err(format!("type {other:?}")),
    })
}

pub(super) fn take_atomic_operation(opcode: &mut Opcode<'_>) -> Option<AtomicOperation> {
    opcode.take_map(|part| {
        Some(match part {
            "add" => AtomicOperation::Add,
            "and" => AtomicOperation::And,
            "or" => AtomicOperation::Or,
            "xor" => AtomicOperation::Xor,
            "exch" => AtomicOperation::Exchange,
            "cas" => AtomicOperation::CompareAndSwap,
            "inc" => AtomicOperation::Increment,
            "dec" => AtomicOperation::Decrement,
            "min" => AtomicOperation::Min,
            "max" => AtomicOperation::Max,
            _ => return None,
        })
    })
}

impl Decoder {
    pub(super) fn decode_memory(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        match opcode.name() {
            "ld" | "ldu" => self.decode_access(opcode, operands, false),
            "st" => self.decode_access(opcode, operands, true),
            "atom" | "red" => self.decode_atomic(opcode, operands),
            "createpolicy" => self.decode_policy(opcode, operands),
            _ => {
                // Prefetches and priorities; `prefetch.tensormap` too.
                take_space(opcode);
                opcode.ignore(&["L1", "L2", "tensormap"]);
                opcode.ignore(&CACHE_HINTS);
                self.push(Op::Nothing);
                Ok(())
            }
        }
    }

    fn decode_access(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand], store: bool) -> Decoded<()> {
        if opcode.take("async") {
            return self.decode_async_store(opcode, operands);
        }
        let volatile = opcode.take("volatile");
        // `.volatile` is as `.relaxed.sys` (PTX ISA 8.6, "ld").
        let order = if volatile { Order::Relaxed } else { take_order(opcode).unwrap_or_default() };
        opcode.take("weak");
        let scope = take_scope(opcode).unwrap_or(Scope::Sys);
        let named = take_space(opcode);
        let read_only = opcode.take("nc") || opcode.name() == "ldu";
        opcode.ignore(&CACHE_HINTS);
        // The cache policy operand that follows is a hint too.
        let hint = opcode.take("L2::cache_hint");
        let count = match opcode.take_one(&["v2", "v4", "v8"]) {
            Some("v2") => 2,
            Some("v4") => 4,
            Some(_) => return Err("vectors of 8 are of sm_100 and later".to_owned()),
            None => 1,
        };
        let kind = opcode.need_type()?;
        if matches!(kind, Type::Pred | Type::B128) {
            return Err(format!("type {kind:?}"));
        }
        if count as u32 * kind.bytes() > 16 {
            return Err("vectors have at most 16 bytes before sm_100".to_owned());
        }
        let expected = 2 + usize::from(hint);
        if operands.len() != expected {
            return Err(format!("{expected} operands expected"));
        }
        let (place, value) = if store { (&operands[0], &operands[1]) } else { (&operands[1], &operands[0]) };
        let (address, space) = self.address(place, named)?;
        let list = self.elements(value);
        if list.len() != count {
            return Err(format!("{count} registers expected, {} found", list.len()));
        }
        let registers: Vec<Register> = list
            .iter()
            .map(
                |element| {
                    if store { self.source(element, kind) } else { self.destination(element, kind.bytes().max(2)) }
                },
            )
            .collect::<Decoded<_>>()?;
        if registers.iter().any(|register| register.bytes() < kind.bytes()) {
            return Err("a register is narrower than the type".to_owned());
        }
        let access = Box::new(Access {
            space,
            address,
            registers: registers.into(),
            element: kind.bytes(),
            signed: kind.is_signed(),
            order,
            scope,
            read_only,
        });
        self.push(if store { Op::Store(access) } else { Op::Load(access) });
        Ok(())
    }

    /// `st.async [a], b, [mbarrier]` and `red.async` (PTX ISA 8.6).
    fn decode_async_store(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let reduces = opcode.name() == "red";
        opcode.ignore(if reduces { &["relaxed", "cluster"] } else { &["weak"] });
        if opcode.name() == "ld" || !opcode.take("mbarrier::complete_tx::bytes") {
            return Err("only stores that complete on an mbarrier are asynchronous on sm_90".to_owned());
        }
        let space = if opcode.take("shared::cluster") { Space::Cluster } else { Space::Generic };
        let operation =
            if reduces { Some(take_atomic_operation(opcode).ok_or("the operation is missing")?) } else { None };
        let count = match opcode.take_one(&["v2", "v4"]) {
            _ if reduces => 1,
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        };
        let kind = opcode.need_type()?;
        if !matches!(kind.bytes(), 4 | 8) || count * kind.bytes() > 16 {
            return Err(format!("{count} of type {kind:?}"));
        }
        let reduction = match operation {
            Some(operation) => {
                let (atomic, element, _) = atomic_type(kind)?;
                Some((operation, atomic, element))
            }
            None => None,
        };
        if operands.len() != 3 {
            return Err("3 operands expected".to_owned());
        }
        let (address, _) = self.address(&operands[0], space)?;
        let values = self.elements(&operands[1]);
        if values.len() != count as usize {
            return Err(format!("{count} values expected, {} found", values.len()));
        }
        let registers: Vec<_> = values.iter().map(|value| self.source(value, kind)).collect::<Decoded<_>>()?;
        if registers.iter().any(|register| register.bytes() != kind.bytes()) {
            return Err("a register is not as wide as the type".to_owned());
        }
        let (mbarrier, _) = self.address(&operands[2], space)?;
        let access = Access {
            space,
            address,
            registers: registers.into(),
            element: kind.bytes(),
            signed: false,
            order: Order::Weak,
            scope: Scope::Cluster,
            read_only: false,
        };
        self.push(Op::AsyncStore(Box::new(AsyncStore { access, mbarrier, reduction })));
        Ok(())
    }

    fn decode_atomic(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        if opcode.take("async") {
            return self.decode_async_store(opcode, operands);
        }
        let returns = opcode.name() == "atom";
        // Without qualifiers: relaxed, at GPU scope (PTX ISA 8.6, "atom").
        let order = take_order(opcode).unwrap_or(Order::Relaxed);
        let scope = take_scope(opcode).unwrap_or(Scope::Gpu);
        let named = take_space(opcode);
        let operation = take_atomic_operation(opcode).ok_or("the operation is missing")?;
        let hint = opcode.take("L2::cache_hint");
        opcode.take("noftz");
        let count = match opcode.take_one(&["v2", "v4", "v8"]) {
            Some("v2") => 2,
            Some("v4") => 4,
            Some(_) => 8,
            None => 1,
        };
        let type_of = opcode.need_type()?;
        let (kind, element, packed) = atomic_type(type_of)?;
        let float = matches!(kind, AtomicType::F16 | AtomicType::Bf16 | AtomicType::F32 | AtomicType::F64);
        let float_min_max = matches!(kind, AtomicType::F16 | AtomicType::Bf16)
            && matches!(operation, AtomicOperation::Min | AtomicOperation::Max);
        if float && operation != AtomicOperation::Add && !float_min_max {
            return Err(format!("{operation:?} of type {type_of:?}"));
        }
        let first = usize::from(returns);
        let swaps = operation == AtomicOperation::CompareAndSwap;
        let expected = first + 2 + usize::from(swaps) + usize::from(hint);
        if operands.len() != expected {
            return Err(format!("{expected} operands expected"));
        }
        let (address, space) = self.address(operand(operands, first)?, named)?;
        let destination = if returns {
            let list = self.elements(&operands[0]);
            let registers: Vec<_> =
                list.iter().map(|part| self.destination(part, type_of.bytes())).collect::<Decoded<_>>()?;
            Some(registers.into_boxed_slice())
        } else {
            None
        };
        let sources = self.elements(operand(operands, first + 1)?);
        if sources.len() != count {
            return Err(format!("{count} values expected"));
        }
        let values: Vec<_> = sources.iter().map(|part| self.source(part, type_of)).collect::<Decoded<_>>()?;
        let swap = if swaps { Some(self.source(&operands[first + 2], type_of)?) } else { None };
        self.push(Op::Atomic(Box::new(Atomic {
            space,
            address,
            operation,
            kind,
            element,
            packed,
            destination,
            operand: values.into(),
            order,
            scope,
            swap,
        })));
        Ok(())
    }

    /// A cache policy is an opaque value that only hints read.
    fn decode_policy(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        take_space(opcode);
        opcode.ignore(&["fractional", "range", "cvt", "L2"]);
        opcode.ignore(&CACHE_HINTS);
        // Primary and secondary priority may be the same word.
        opcode.ignore(&CACHE_HINTS);
        opcode.need_type()?;
        let d = self.destination(operand(operands, 0)?, 8)?;
        let zero = self.constant(8, 0);
        self.push(super::moves::copy(d, zero));
        Ok(())
    }
}
