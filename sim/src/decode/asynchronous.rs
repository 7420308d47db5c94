//! Asynchronous copies, and matrix instructions.

use super::memory::{CACHE_HINTS, atomic_type, take_atomic_operation};
use super::opcode::Opcode;
use super::operands::{expect_count, immediate, operand};
use super::{Decoded, Decoder};
use crate::ast::{Operand, Type};
use crate::matrix::MmaShape;
use crate::program::*;
use crate::wgmma::{Major, OperandType, WgmmaShape};

fn space_of(part: &str) -> Option<Space> {
    match part {
        "global" => Some(Space::Global),
        "shared" | "shared::cta" => Some(Space::Shared),
        "shared::cluster" => Some(Space::Cluster),
        _ => None,
    }
}

fn operand_type(kind: Type) -> Decoded<OperandType> {
    Ok(match kind {
        Type::F16 => OperandType::F16,
        Type::Bf16 => OperandType::Bf16,
        Type::Tf32 => OperandType::Tf32,
        Type::E4m3 => OperandType::E4m3,
        Type::E5m2 => OperandType::E5m2,
        other => return Err(format!("matrices of type {other:?}")),
    })
}

/// `m64n128k16` as three numbers.
fn matrix_shape(part: &str) -> Option<[usize; 3]> {
    let (m, rest) = part.strip_prefix('m')?.split_once('n')?;
    let (n, k) = match rest.split_once('k') {
        Some((n, k)) => (n, k.parse().ok()?),
        None => (rest, 0),
    };
    Some([m.parse().ok()?, n.parse().ok()?, k])
}

impl Decoder {
    pub(super) fn decode_asynchronous(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        match opcode.name() {
            "cp" => self.decode_copy(opcode, operands),
            "wgmma" => self.decode_wgmma(opcode, operands),
            "mma" => self.decode_mma(opcode, operands),
            "tensormap" => self.decode_tensor_map(opcode, operands),
            _ => self.decode_matrix_access(opcode, operands),
        }
    }

    fn decode_copy(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let reduces = opcode.take("reduce");
        if !opcode.take("async") {
            return Err("`.async` is missing".to_owned());
        }
        let kind = if opcode.take("bulk") { CopyKind::Bulk } else { CopyKind::Small };
        if opcode.take("commit_group") {
            self.push(Op::CommitGroup(kind));
            return Ok(());
        }
        if opcode.take("wait_group") {
            let read = opcode.take("read");
            let pending = immediate(operand(operands, 0)?)?;
            let pending = u32::try_from(pending).map_err(|_| format!("{pending} groups"))?;
            self.push(Op::WaitGroup { kind, pending, read });
            return Ok(());
        }
        match kind {
            CopyKind::Small => self.decode_small_copy(opcode, operands),
            CopyKind::Bulk if opcode.take("prefetch") => {
                opcode.ignore(&["tensor", "1d", "2d", "3d", "4d", "5d", "tile", "L2", "global"]);
                opcode.take("L2::cache_hint");
                self.push(Op::Nothing);
                Ok(())
            }
            CopyKind::Bulk if opcode.take("tensor") => self.decode_tensor_copy(opcode, operands, reduces),
            CopyKind::Bulk => self.decode_bulk_copy(opcode, operands, reduces),
        }
    }

    fn decode_small_copy(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        if opcode.take("wait_all") {
            // "Equivalent to commit_group and wait_group 0" (PTX ISA 8.6, "cp.async.wait_all").
            self.push(Op::CommitGroup(CopyKind::Small));
            self.push(Op::WaitGroup { kind: CopyKind::Small, pending: 0, read: false });
            return Ok(());
        }
        if opcode.take("mbarrier") {
            if !opcode.take("arrive") {
                return Err("`.arrive` is missing".to_owned());
            }
            let increases = !opcode.take("noinc");
            let named = opcode.take_map(space_of).unwrap_or(Space::Generic);
            opcode.take("b64");
            let (mbarrier, space) = self.address(operand(operands, 0)?, named)?;
            self.push(Op::SmallCopyArrive { mbarrier, generic: space == Space::Generic, increases });
            return Ok(());
        }
        opcode.ignore(&CACHE_HINTS);
        let hint = opcode.take("L2::cache_hint");
        let (to, from) = (opcode.take_map(space_of), opcode.take_map(space_of));
        if (to, from) != (Some(Space::Shared), Some(Space::Global)) {
            return Err("it copies from global to shared memory only".to_owned());
        }
        let (destination, _) = self.address(operand(operands, 0)?, Space::Shared)?;
        let (source, _) = self.address(operand(operands, 1)?, Space::Global)?;
        let bytes = immediate(operand(operands, 2)?)?;
        if !matches!(bytes, 4 | 8 | 16) {
            return Err(format!("{bytes} bytes; it must be 4, 8 or 16"));
        }
        let last = operands.len() - usize::from(hint);
        let (mut source_bytes, mut ignore_source) = (None, None);
        if last == 4 {
            match &operands[3] {
                Operand::Name(name, 0) if self.predicate_named(name).is_ok() => {
                    ignore_source = Some(self.condition(&operands[3])?);
                }
                size => source_bytes = Some(self.read32(size)?),
            }
        } else if last != 3 {
            return Err(format!("{} operands", operands.len()));
        }
        self.push(Op::SmallCopy(Box::new(SmallCopy {
            destination,
            source,
            bytes: bytes as u32,
            source_bytes,
            ignore_source,
        })));
        Ok(())
    }

    fn decode_bulk_copy(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand], reduces: bool) -> Decoded<()> {
        let to = opcode.take_map(space_of).ok_or("the destination's space is missing")?;
        let from = opcode.take_map(space_of).ok_or("the source's space is missing")?;
        let signals = opcode.take("mbarrier::complete_tx::bytes");
        let multicasts = opcode.take("multicast::cluster");
        if multicasts && (from, to, reduces) != (Space::Global, Space::Cluster, false) {
            return Err("a multicast is from global to shared::cluster memory".to_owned());
        }
        if !signals && !opcode.take("bulk_group") {
            return Err("the completion mechanism is missing".to_owned());
        }
        if signals == (to == Space::Global) {
            return Err("this completion mechanism does not go with these spaces".to_owned());
        }
        let hint = opcode.take("L2::cache_hint");
        let reduction = if reduces {
            let operation = take_atomic_operation(opcode).ok_or("the operation is missing")?;
            opcode.take("noftz");
            let kind = opcode.need_type()?;
            let (atomic, element, packed) = atomic_type(kind)?;
            if packed != 1 {
                return Err(format!("type {kind:?}"));
            }
            Some((operation, atomic, element))
        } else {
            None
        };
        let expected = 3 + usize::from(signals) + usize::from(multicasts) + usize::from(hint);
        expect_count(operands, expected)?;
        let (destination, _) = self.address(&operands[0], to)?;
        let (source, _) = self.address(&operands[1], from)?;
        let bytes = self.read32(&operands[2])?;
        let mbarrier = if signals { Some(self.address(&operands[3], Space::Cluster)?.0) } else { None };
        let multicast = if multicasts { Some(self.read(&operands[4], Type::U16)?) } else { None };
        self.push(Op::BulkCopy(Box::new(BulkCopy {
            destination,
            destination_space: to,
            source,
            source_space: from,
            bytes,
            mbarrier,
            multicast,
            reduction,
        })));
        Ok(())
    }

    fn decode_tensor_copy(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand], reduces: bool) -> Decoded<()> {
        let dimensions = opcode
            .take_map(|part| {
                let digit = part.strip_suffix('d')?.parse::<usize>().ok()?;
                (1..=5).contains(&digit).then_some(digit)
            })
            .ok_or("the number of dimensions is missing")?;
        let to = opcode.take_map(space_of).ok_or("the destination's space is missing")?;
        opcode.take_map(space_of).ok_or("the source's space is missing")?;
        opcode.take("tile");
        let load = to != Space::Global;
        let mechanism = if load { "mbarrier::complete_tx::bytes" } else { "bulk_group" };
        if !opcode.take(mechanism) {
            return Err(format!("`.{mechanism}` is missing"));
        }
        let multicasts = opcode.take("multicast::cluster");
        if multicasts && to != Space::Cluster {
            return Err("a multicast is from global to shared::cluster memory".to_owned());
        }
        let hint = opcode.take("L2::cache_hint");
        let reduction =
            if reduces { Some(take_atomic_operation(opcode).ok_or("the operation is missing")?) } else { None };
        expect_count(operands, 2 + usize::from(load) + usize::from(multicasts) + usize::from(hint))?;
        let (map, place) = if load { (&operands[1], &operands[0]) } else { (&operands[0], &operands[1]) };
        let Operand::Address(parts) = map else {
            return Err("`[map, {coordinates}]` is expected".to_owned());
        };
        let [map, coordinates] = &parts[..] else {
            return Err("`[map, {coordinates}]` is expected".to_owned());
        };
        let (map, _) = self.address_value(map, Space::Generic)?;
        let coordinates = self.read_all32(coordinates)?;
        if coordinates.len() != dimensions {
            return Err(format!("{dimensions} coordinates expected, {} found", coordinates.len()));
        }
        let (shared, _) = self.address(place, Space::Cluster)?;
        let mbarrier = if load { Some(self.address(&operands[2], Space::Cluster)?.0) } else { None };
        let multicast = if multicasts { Some(self.read(&operands[3], Type::U16)?) } else { None };
        self.push(Op::TensorCopy(Box::new(TensorCopy { map, coordinates, shared, mbarrier, multicast, reduction })));
        Ok(())
    }

    /// `tensormap.replace` and `tensormap.cp_fenceproxy` (PTX ISA 8.6).
    fn decode_tensor_map(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        if opcode.take("cp_fenceproxy") {
            opcode.ignore(&["global", "shared::cta", "tensormap::generic", "release", "sync", "aligned"]);
            let scope = super::memory::take_scope(opcode).ok_or("the scope is missing")?;
            expect_count(operands, 3)?;
            if immediate(&operands[2])? != 128 {
                return Err("the size must be 128".to_owned());
            }
            let (to, _) = self.address(&operands[0], Space::Global)?;
            let (from, _) = self.address(&operands[1], Space::Shared)?;
            self.push(Op::TensorMapPublish { to, from, scope });
            return Ok(());
        }
        if !opcode.take("replace") || !opcode.take("tile") {
            return Err("only tensormap.replace.tile and tensormap.cp_fenceproxy are known".to_owned());
        }
        let (field, has_ordinal) = opcode
            .take_map(|part| {
                Some(match part {
                    "global_address" => (TensorMapField::GlobalAddress, false),
                    "rank" => (TensorMapField::Rank, false),
                    "box_dim" => (TensorMapField::BoxDim, true),
                    "global_dim" => (TensorMapField::GlobalDim, true),
                    "global_stride" => (TensorMapField::GlobalStride, true),
                    "element_stride" => (TensorMapField::ElementStride, true),
                    "elemtype" => (TensorMapField::ElementType, false),
                    "interleave_layout" => (TensorMapField::Interleave, false),
                    "swizzle_mode" => (TensorMapField::Swizzle, false),
                    "fill_mode" => (TensorMapField::Fill, false),
                    _ => return None,
                })
            })
            .ok_or("the field is missing")?;
        let named = opcode.take_map(space_of).unwrap_or(Space::Generic);
        opcode.take("b1024");
        let kind = opcode.need_type()?;
        expect_count(operands, 2 + usize::from(has_ordinal))?;
        let (address, space) = self.address(&operands[0], named)?;
        let ordinal = if has_ordinal { immediate(&operands[1])? } else { 0 };
        let ordinal = usize::try_from(ordinal).map_err(|_| format!("dimension {ordinal}"))?;
        let value = self.source(&operands[1 + usize::from(has_ordinal)], kind)?;
        self.push(Op::TensorMapReplace(Box::new(TensorMapReplace { address, space, field, ordinal, value })));
        Ok(())
    }

    fn decode_wgmma(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        opcode.ignore(&["sync", "aligned"]);
        match opcode.take_one(&["fence", "commit_group", "wait_group", "mma_async"]) {
            Some("fence") => self.push(Op::WgmmaFence),
            Some("commit_group") => self.push(Op::WgmmaCommit),
            Some("wait_group") => {
                let pending = immediate(operand(operands, 0)?)?;
                if !(0..8).contains(&pending) {
                    return Err(format!("{pending} groups; it must be 0 to 7"));
                }
                self.push(Op::WgmmaWait(pending as u32));
            }
            Some(_) => return self.decode_wgmma_product(opcode, operands),
            None => return Err("the operation is missing".to_owned()),
        }
        Ok(())
    }

    fn decode_wgmma_product(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let [m, n, k] = opcode.take_map(matrix_shape).ok_or("the shape is missing")?;
        let result = opcode.need_type()?;
        let half = match result {
            Type::F32 => false,
            Type::F16 => true,
            other => return Err(format!("accumulators of type {other:?}")),
        };
        let a_type = operand_type(opcode.need_type()?)?;
        let b_type = operand_type(opcode.need_type()?)?;
        let mut shape = WgmmaShape { b_type, ..WgmmaShape::new(n, a_type) };
        if m != 64 || k != shape.k() || !(8..=256).contains(&n) || n % 8 != 0 {
            return Err("there is no such shape".to_owned());
        }
        let accumulators = self.write_all32(operand(operands, 0)?)?;
        let needed = shape.accumulators() / if half { 2 } else { 1 };
        if accumulators.len() != needed {
            return Err(format!("{needed} accumulators expected, {} found", accumulators.len()));
        }
        let a = match operand(operands, 1)? {
            registers @ Operand::Vector(_) => {
                let list = self.read_all32(registers)?;
                WgmmaA::Registers((&list[..]).try_into().map_err(|_| "A in registers takes four of them".to_owned())?)
            }
            descriptor => WgmmaA::Descriptor(self.read(descriptor, Type::B64)?),
        };
        let b = self.read(operand(operands, 2)?, Type::B64)?;
        let scale_d = self.condition(operand(operands, 3)?)?;
        let mut rest = operands[4..].iter();
        let mut negates = || match rest.next().map(immediate) {
            Some(Ok(1)) => Ok(false),
            Some(Ok(-1)) => Ok(true),
            _ => Err("the scale of A and B must be 1 or -1".to_owned()),
        };
        (shape.negate_a, shape.negate_b) = (negates()?, negates()?);
        let mut transposed: Vec<Major> = Vec::new();
        for flag in rest {
            transposed.push(match immediate(flag)? {
                0 => Major::K,
                1 => Major::MN,
                other => return Err(format!("a transpose flag of {other}; it must be 0 or 1")),
            });
        }
        if !transposed.is_empty() && !matches!(a_type, OperandType::F16 | OperandType::Bf16) {
            return Err("only matrices of 16-bit types can be transposed, so others have no such operands".to_owned());
        }
        match (&a, &transposed[..]) {
            (_, []) => {}
            (WgmmaA::Descriptor(_), [a, b]) => (shape.a_major, shape.b_major) = (*a, *b),
            (WgmmaA::Registers(_), [b]) => shape.b_major = *b,
            _ => return Err("the number of transpose flags is wrong".to_owned()),
        }
        self.push(Op::Wgmma(Box::new(Wgmma { shape, half, accumulators, a, b, scale_d })));
        Ok(())
    }

    fn decode_matrix_access(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 2)?;
        let store = opcode.name() == "stmatrix";
        opcode.ignore(&["sync", "aligned"]);
        if !opcode.take("m8n8") {
            return Err("only the shape m8n8 is supported".to_owned());
        }
        let count = match opcode.take_one(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some(_) => 4,
            None => return Err("the number of matrices is missing".to_owned()),
        };
        let transpose = opcode.take("trans");
        let named = opcode.take_map(space_of).unwrap_or(Space::Generic);
        if opcode.need_type()? != Type::B16 {
            return Err("only `.b16` elements are supported".to_owned());
        }
        let (place, list) = if store { (&operands[0], &operands[1]) } else { (&operands[1], &operands[0]) };
        let (address, space) = self.address(place, named)?;
        let registers = if store { self.read_all32(list)? } else { self.write_all32(list)? };
        if registers.len() != count {
            return Err(format!("{count} registers expected"));
        }
        self.push(Op::Matrix(Box::new(MatrixAccess { registers, address, space, transpose, store })));
        Ok(())
    }

    fn decode_mma(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 4)?;
        opcode.ignore(&["sync", "aligned"]);
        let shape = opcode.take_map(matrix_shape).ok_or("the shape is missing")?;
        let [16, 8, depth] = shape else {
            return Err("only the shapes m16n8 are supported".to_owned());
        };
        if !opcode.take("row") || !opcode.take("col") {
            return Err("only `.row.col` is supported".to_owned());
        }
        let half = match opcode.need_type()? {
            Type::F32 => false,
            Type::F16 => true,
            other => return Err(format!("accumulators of type {other:?}")),
        };
        let a_type = operand_type(opcode.need_type()?)?;
        let b_type = operand_type(opcode.need_type()?)?;
        opcode.need_type()?;
        let (d, c) = (self.write_all32(&operands[0])?, self.read_all32(&operands[3])?);
        let (a, b) = (self.read_all32(&operands[1])?, self.read_all32(&operands[2])?);
        let bytes = depth * a_type.bytes();
        let accumulators = if half { 2 } else { 4 };
        if !matches!(bytes, 16 | 32)
            || (a.len(), b.len()) != (bytes / 8, bytes / 16)
            || d.len() != accumulators
            || c.len() != accumulators
        {
            return Err("the registers do not fit the shape".to_owned());
        }
        self.push(Op::Mma(Box::new(Mma { shape: MmaShape { depth, a_type, b_type }, half, d, a, b, c })));
        Ok(())
    }
}
