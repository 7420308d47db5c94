//! Tensor maps that a kernel changes: `tensormap.replace` and `tensormap.cp_fenceproxy`.

use super::access::{check_aligned, shared_range};
use super::cluster::state_at;
use super::{Context, Executed, Flow};
use crate::check::{Access, Mode, Scope, shared_key};
use crate::error::Fault;
use crate::memory::{Window, window_offset};
use crate::program::{Address, Space, TensorMapField, TensorMapReplace};
use crate::registers::{LANES, lanes};
use crate::tensor_map::{OutOfBoundsFill, Swizzle, TensorMap, TensorMapDataType, TensorMapSpec};

/// Bytes of a tensor map, and their alignment for the instructions here.
const BYTES: usize = 128;

/// Element types as `tensormap.replace` numbers them (PTX ISA 8.6, "tensormap.replace").
fn element_type(number: u64) -> Option<TensorMapDataType> {
    use TensorMapDataType as D;
    let types = [
        D::U8,
        D::U16,
        D::U32,
        D::S32,
        D::U64,
        D::S64,
        D::F16,
        D::F32,
        D::F32FlushSubnormals,
        D::F64,
        D::Bf16,
        D::Tf32,
        D::Tf32FlushSubnormals,
    ];
    types.get(usize::try_from(number).ok()?).copied()
}

/// Changes a field; no field may make the map one that cannot be, but fields need not fit each other until it is used.
fn replace(spec: &mut TensorMapSpec, field: TensorMapField, ordinal: usize, value: u64) -> Option<()> {
    let small = |limit: u64| (1..=limit).contains(&value).then_some(value as u32);
    match field {
        TensorMapField::GlobalAddress => spec.global_address = value,
        TensorMapField::Rank => {
            let rank = (value < 5).then_some(value as usize + 1)?;
            spec.dims.resize(rank, 1);
            spec.box_dims.resize(rank, 1);
            spec.element_strides.resize(rank, 1);
            spec.strides.resize(rank - 1, 16);
        }
        TensorMapField::BoxDim => *spec.box_dims.get_mut(ordinal)? = small(256)?,
        TensorMapField::GlobalDim => *spec.dims.get_mut(ordinal)? = u64::from(small(u64::from(u32::MAX))?),
        TensorMapField::GlobalStride => *spec.strides.get_mut(ordinal)? = value,
        TensorMapField::ElementStride => *spec.element_strides.get_mut(ordinal)? = small(8)?,
        TensorMapField::ElementType => spec.data_type = element_type(value)?,
        TensorMapField::Interleave => return (value == 0).then_some(()),
        TensorMapField::Swizzle => {
            let modes = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];
            spec.swizzle = *modes.get(usize::try_from(value).ok()?)?;
        }
        TensorMapField::Fill => {
            spec.fill = *[OutOfBoundsFill::Zero, OutOfBoundsFill::NaN].get(usize::try_from(value).ok()?)?;
        }
    }
    Some(())
}

impl Context<'_> {
    pub(super) fn replace_in_map(&mut self, operation: &TensorMapReplace, active: u32) -> Executed {
        let addresses = self.addresses(operation.address);
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let value = operation.value.lane(&self.warp.registers, lane);
            let mut bytes = self.map_bytes(operation.space, addresses[lane], lane)?;
            TensorMap::change(&mut bytes, |spec| replace(spec, operation.field, operation.ordinal, value))
                .map_err(|error| Fault::Operand(error.to_string()))?
                .ok_or_else(|| Fault::Operand(format!("{value} is no {:?} of a tensor map", operation.field)))?;
            self.set_map_bytes(operation.space, addresses[lane], lane, &bytes)?;
        }
        self.fault_lanes = 0;
        *self.progress += 1;
        Ok(Flow::Next)
    }

    /// The warp copies a map from shared to global memory, and releases it.
    pub(super) fn publish_map(&mut self, to: Address, from: Address, scope: Scope, active: u32) -> Executed {
        if let Some(wait) = self.whole_warp(active)? {
            return Ok(wait);
        }
        let (to, from) = (self.addresses(to)[0], self.addresses(from)[0]);
        let bytes = self.map_bytes(Space::Shared, from, 0)?;
        self.set_map_bytes(Space::Global, to, 0, &bytes)?;
        self.release(scope);
        if let Some(checker) = &mut self.checker {
            checker.fence_tensor_map(self.agent, active, scope, true);
        }
        self.fault_lanes = 0;
        *self.progress += 1;
        Ok(Flow::Next)
    }

    fn map_bytes(&mut self, space: Space, address: u64, lane: usize) -> Result<[u8; BYTES], Fault> {
        let mut bytes = [0; BYTES];
        let (space, address) = self.map_place(space, address);
        if space == Space::Global {
            check_aligned(self.memory, address, BYTES)?;
            self.perform(&[address; LANES], 1, BYTES);
            let (allocation, offset) = self.memory.find(address, BYTES as u64)?;
            bytes.copy_from_slice(&allocation.bytes.data()[offset..offset + BYTES]);
        } else {
            let place = self.locate(address, Space::Shared)?;
            let shared = &state_at(self.state, self.peers, place).shared;
            let at = shared_range(shared, place.address, BYTES)?;
            bytes.copy_from_slice(&shared.data()[at..at + BYTES]);
        }
        self.check_map(space, address, lane, Mode::Read)?;
        Ok(bytes)
    }

    fn set_map_bytes(&mut self, space: Space, address: u64, lane: usize, bytes: &[u8; BYTES]) -> Result<(), Fault> {
        let (space, address) = self.map_place(space, address);
        if space == Space::Global {
            check_aligned(self.memory, address, BYTES)?;
            self.perform(&[address; LANES], 1, BYTES);
            let (allocation, offset) = self.memory.find(address, BYTES as u64)?;
            allocation.bytes.write(offset, bytes);
        } else {
            let place = self.locate(address, Space::Shared)?;
            let shared = &mut state_at(self.state, self.peers, place).shared;
            let at = shared_range(shared, place.address, BYTES)?;
            shared.write(at, bytes);
        }
        self.check_map(space, address, lane, Mode::Write)
    }

    /// A generic address by its window.
    fn map_place(&self, space: Space, address: u64) -> (Space, u64) {
        match Window::of(address) {
            Window::Shared if space == Space::Generic => (Space::Shared, window_offset(address)),
            _ if space == Space::Generic => (Space::Global, address),
            _ => (space, address),
        }
    }

    fn check_map(&mut self, space: Space, address: u64, lane: usize, mode: Mode) -> Result<(), Fault> {
        let (agent, pc, cta) = (self.agent, self.pc, self.state.id);
        let Some(checker) = self.checker.as_deref_mut() else {
            return Ok(());
        };
        let key = if space == Space::Global { address } else { shared_key(cta, address) };
        let access = Access {
            warp: agent,
            lanes: 1 << lane,
            pc,
            mode,
            reads: false,
            strong: None,
            read_only: false,
            waits: false,
        };
        checker.access(access, key, BYTES as u64)
    }
}
