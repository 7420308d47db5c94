//! Tensor maps and the tiles that `cp.async.bulk.tensor` copies through them (CUDA driver API, `cuTensorMapEncodeTiled`;
//! PTX ISA 8.6, "Tensors").

mod tile;

pub use tile::{TilePiece, TilePieces};

use TensorMapError as E;
use thiserror::Error;

/// A tile's shared-memory address must be a multiple of this.
pub const SHARED_ALIGNMENT: u32 = 128;

/// What [`OutOfBoundsFill::NaN`] fills with.
pub const NAN_FILL: u16 = 0x7FF7;

/// Tiles are smaller than this many bytes (the CUDA 13.0 driver accepts 229,376 and refuses 262,144).
pub const MAX_BOX_BYTES: u64 = 1 << 18;

/// Element types, numbered as `CUtensorMapDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum TensorMapDataType {
    U8 = 0,
    U16 = 1,
    U32 = 2,
    S32 = 3,
    U64 = 4,
    S64 = 5,
    F16 = 6,
    F32 = 7,
    F64 = 8,
    Bf16 = 9,
    F32FlushSubnormals = 10,
    Tf32 = 11,
    Tf32FlushSubnormals = 12,
}

impl TensorMapDataType {
    /// Bytes of one element.
    pub const fn bytes(self) -> u32 {
        use TensorMapDataType as D;
        match self {
            D::U8 => 1,
            D::U16 | D::F16 | D::Bf16 => 2,
            D::U32 | D::S32 | D::F32 | D::F32FlushSubnormals | D::Tf32 | D::Tf32FlushSubnormals => 4,
            D::U64 | D::S64 | D::F64 => 8,
        }
    }

    const fn is_float(self) -> bool {
        use TensorMapDataType as D;
        !matches!(self, D::U8 | D::U16 | D::U32 | D::S32 | D::U64 | D::S64)
    }

    fn from_number(number: u8) -> Option<Self> {
        use TensorMapDataType as D;
        let all = [
            D::U8,
            D::U16,
            D::U32,
            D::S32,
            D::U64,
            D::S64,
            D::F16,
            D::F32,
            D::F64,
            D::Bf16,
            D::F32FlushSubnormals,
            D::Tf32,
            D::Tf32FlushSubnormals,
        ];
        all.get(number as usize).copied()
    }
}

/// Shared-memory swizzle, numbered as `CUtensorMapSwizzle`. The pattern is one of shared ADDRESS bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Swizzle {
    /// Rows follow each other unchanged.
    #[default]
    None = 0,
    /// Bit 4 ^= bit 7.
    B32 = 1,
    /// Bits 4-5 ^= bits 7-8.
    B64 = 2,
    /// Bits 4-6 ^= bits 7-9.
    B128 = 3,
}

impl Swizzle {
    /// Where the byte at `address` of the unswizzled layout lies.
    #[inline]
    pub const fn apply(self, address: u32) -> u32 {
        // 0, 1, 3 or 7 in units of 16 bytes.
        let chunks = (1 << self as u8) - 1;
        address ^ ((address >> 7 & chunks) << 4)
    }

    /// Width of the swizzled rows in bytes, 16 without swizzle.
    pub const fn span(self) -> u32 {
        16 << self as u8
    }

    fn from_number(number: u8) -> Option<Self> {
        [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128].get(number as usize).copied()
    }
}

/// What a load writes for elements outside the tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum OutOfBoundsFill {
    /// Zeros.
    #[default]
    Zero = 0,
    /// NaNs: every 16 bits are [`NAN_FILL`], in 32 and 64-bit types too (observed on an H200).
    NaN = 1,
}

/// What `cuTensorMapEncodeTiled` takes. Lists are innermost dimension first. Interleaved layouts do not exist here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Element type.
    pub data_type: TensorMapDataType,
    /// Address of element 0, a multiple of 16.
    pub global_address: u64,
    /// Extents in elements, one per dimension (1 to 5 of them), each 1 to 2^32.
    pub dims: Vec<u64>,
    /// Bytes from one element to the next in dimensions 1 and up (one fewer than `dims`), multiples of 16 below 2^40.
    pub strides: Vec<u64>,
    /// Extents of the tile in elements, each 1 to 256; the innermost is a multiple of 16 bytes, and with swizzle no
    /// longer than its span.
    pub box_dims: Vec<u32>,
    /// Traversal strides in elements, each 1 to 8: every n-th element of the box is copied. The innermost is ignored but
    /// checked.
    pub element_strides: Vec<u32>,
    /// Shared-memory swizzle.
    pub swizzle: Swizzle,
    /// Out-of-bounds fill; NaN only for floating-point types.
    pub fill: OutOfBoundsFill,
}

/// Why a tensor map is invalid.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TensorMapError {
    /// Not 1 to 5 dimensions.
    #[error("the tensor has {rank} dimensions; it must have 1 to 5")]
    Rank {
        /// Number of dimensions.
        rank: usize,
    },
    /// A list's length does not fit the number of dimensions.
    #[error("{list} has {length} entries; a tensor of {rank} dimensions needs {expected}")]
    Length {
        /// Which list.
        list: &'static str,
        /// Its length.
        length: usize,
        /// Number of dimensions.
        rank: usize,
        /// The length it must have.
        expected: usize,
    },
    /// The global address is misaligned.
    #[error("global address {address:#x} is not a multiple of 16")]
    Address {
        /// The address.
        address: u64,
    },
    /// An entry of a list is out of range.
    #[error("{list}[{dimension}] is {value}; it must be {rule}")]
    Entry {
        /// Which list.
        list: &'static str,
        /// Index in the list.
        dimension: usize,
        /// The entry.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// The box's rows are no multiple of 16 bytes.
    #[error("the box's innermost dimension is {bytes} bytes; it must be a multiple of 16")]
    InnerBytes {
        /// Bytes of one row.
        bytes: u32,
    },
    /// The box's rows are longer than the swizzle's span.
    #[error("the box's innermost dimension is {bytes} bytes; with this swizzle it must be at most {span}")]
    SwizzleSpan {
        /// Bytes of one row.
        bytes: u32,
        /// The swizzle's span.
        span: u32,
    },
    /// The box is too large.
    #[error("the box holds {bytes} bytes; it must be less than {MAX_BOX_BYTES}")]
    BoxBytes {
        /// Bytes of the box.
        bytes: u64,
    },
    /// A NaN fill for integers.
    #[error("NaN fill needs a floating-point type, not {data_type:?}")]
    NaNFill {
        /// The element type.
        data_type: TensorMapDataType,
    },
    /// A tile's coordinates do not fit the map's rank.
    #[error("{given} tile coordinates for a tensor map of {rank} dimensions")]
    CoordinateCount {
        /// Coordinates passed.
        given: usize,
        /// Number of dimensions.
        rank: usize,
    },
    /// The innermost coordinate is not a multiple of 16 bytes.
    #[error("the innermost tile coordinate {coordinate} is {bytes} bytes; it must be a multiple of 16 bytes")]
    InnerCoordinate {
        /// The coordinate, in elements.
        coordinate: i32,
        /// The same in bytes.
        bytes: i64,
    },
    /// The tile's shared address is misaligned.
    #[error("tile at shared address {address:#x}; it must be a multiple of {SHARED_ALIGNMENT}")]
    SharedAddress {
        /// The address.
        address: u32,
    },
    /// 128 bytes that [`TensorMap::encode`] did not write.
    #[error("the 128 bytes hold no tensor map")]
    NotATensorMap,
}

/// A valid tensor map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    spec: TensorMapSpec,
}

const MAGIC: [u8; 8] = *b"ptxsimTM";

impl TensorMap {
    /// Checks a specification against the rules of `cuTensorMapEncodeTiled`.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn new(spec: &TensorMapSpec) -> Result<Self, TensorMapError> {
        let rank = spec.dims.len();
        if !(1..=5).contains(&rank) {
            return Err(E::Rank { rank });
        }
        let lengths = [
            ("strides", spec.strides.len(), rank - 1),
            ("box_dims", spec.box_dims.len(), rank),
            ("element_strides", spec.element_strides.len(), rank),
        ];
        for (list, length, expected) in lengths {
            if length != expected {
                return Err(E::Length { list, length, rank, expected });
            }
        }
        if !spec.global_address.is_multiple_of(16) {
            return Err(E::Address { address: spec.global_address });
        }
        let wide = |list: &[u32]| list.iter().map(|&x| x as u64).collect::<Vec<_>>();
        check_entries("dims", &spec.dims, "1 to 2^32", |x| (1..=1 << 32).contains(&x))?;
        check_entries("strides", &spec.strides, "a multiple of 16 below 2^40", |x| {
            x.is_multiple_of(16) && x < 1 << 40
        })?;
        check_entries("box_dims", &wide(&spec.box_dims), "1 to 256", |x| (1..=256).contains(&x))?;
        check_entries("element_strides", &wide(&spec.element_strides), "1 to 8", |x| (1..=8).contains(&x))?;
        let bytes = spec.box_dims[0] * spec.data_type.bytes();
        if !bytes.is_multiple_of(16) {
            return Err(E::InnerBytes { bytes });
        }
        let span = spec.swizzle.span();
        if spec.swizzle != Swizzle::None && bytes > span {
            return Err(E::SwizzleSpan { bytes, span });
        }
        if spec.fill == OutOfBoundsFill::NaN && !spec.data_type.is_float() {
            return Err(E::NaNFill { data_type: spec.data_type });
        }
        let map = TensorMap { spec: spec.clone() };
        match map.box_bytes() {
            bytes if bytes >= MAX_BOX_BYTES => Err(E::BoxBytes { bytes }),
            _ => Ok(map),
        }
    }

    /// Checks a specification and encodes it in a format of this simulator's own.
    ///
    /// # Errors
    /// See [`TensorMap::new`].
    pub fn encode(spec: &TensorMapSpec) -> Result<[u8; 128], TensorMapError> {
        Ok(TensorMap::new(spec)?.to_bytes())
    }

    /// The 128 bytes that [`TensorMap::decode`] reads.
    pub fn to_bytes(&self) -> [u8; 128] {
        let spec = &self.spec;
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(MAGIC);
        bytes.extend([spec.data_type as u8, spec.dims.len() as u8, spec.swizzle as u8, spec.fill as u8]);
        bytes.extend(spec.global_address.to_le_bytes());
        bytes.extend(spec.dims.iter().flat_map(|dim| ((dim - 1) as u32).to_le_bytes()));
        bytes.extend(spec.strides.iter().flat_map(|stride| stride.to_le_bytes()));
        bytes.extend(spec.box_dims.iter().map(|dim| (dim - 1) as u8));
        bytes.extend(spec.element_strides.iter().map(|&stride| stride as u8));
        let mut encoded = [0; 128];
        encoded[..bytes.len()].copy_from_slice(&bytes);
        encoded
    }

    /// Reads what [`TensorMap::encode`] wrote.
    ///
    /// # Errors
    /// [`TensorMapError::NotATensorMap`], or the rule that changed bytes break.
    pub fn decode(bytes: &[u8; 128]) -> Result<Self, TensorMapError> {
        TensorMap::new(&Self::decode_spec(bytes)?)
    }

    /// Changes an encoded map, whose fields need not fit each other before or after. Gives what `change` gives.
    pub(crate) fn change<T>(
        bytes: &mut [u8; 128],
        change: impl FnOnce(&mut TensorMapSpec) -> T,
    ) -> Result<T, TensorMapError> {
        let mut spec = Self::decode_spec(bytes)?;
        let result = change(&mut spec);
        *bytes = TensorMap { spec }.to_bytes();
        Ok(result)
    }

    fn decode_spec(bytes: &[u8; 128]) -> Result<TensorMapSpec, TensorMapError> {
        let mut rest = &bytes[..];
        if take::<8>(&mut rest)? != MAGIC {
            return Err(E::NotATensorMap);
        }
        let [data_type, rank, swizzle, fill] = take(&mut rest)?;
        if !(1..=5).contains(&rank) {
            return Err(E::NotATensorMap);
        }
        let global_address = u64::from_le_bytes(take(&mut rest)?);
        let mut dims = Vec::new();
        for _ in 0..rank {
            dims.push(u32::from_le_bytes(take(&mut rest)?) as u64 + 1);
        }
        let mut strides = Vec::new();
        for _ in 1..rank {
            strides.push(u64::from_le_bytes(take(&mut rest)?));
        }
        let (box_dims, rest) = rest.split_at(rank as usize);
        let (element_strides, _) = rest.split_at(rank as usize);
        Ok(TensorMapSpec {
            data_type: TensorMapDataType::from_number(data_type).ok_or(E::NotATensorMap)?,
            global_address,
            dims,
            strides,
            box_dims: box_dims.iter().map(|&x| x as u32 + 1).collect(),
            element_strides: element_strides.iter().map(|&x| x as u32).collect(),
            swizzle: Swizzle::from_number(swizzle).ok_or(E::NotATensorMap)?,
            fill: match fill {
                0 => OutOfBoundsFill::Zero,
                1 => OutOfBoundsFill::NaN,
                _ => return Err(E::NotATensorMap),
            },
        })
    }

    /// What the map was made from.
    pub fn spec(&self) -> &TensorMapSpec {
        &self.spec
    }

    /// Number of dimensions, which is also the number of coordinates of a tile.
    pub fn rank(&self) -> usize {
        self.spec.dims.len()
    }

    /// What a load writes outside the tensor, again and again from an even address.
    pub fn fill_pattern(&self) -> [u8; 2] {
        match self.spec.fill {
            OutOfBoundsFill::Zero => [0, 0],
            OutOfBoundsFill::NaN => NAN_FILL.to_le_bytes(),
        }
    }

    /// Bytes of a tile, out-of-bounds ones included: what a load completes on its mbarrier.
    pub fn box_bytes(&self) -> u64 {
        self.row_bytes() as u64 * self.rows()
    }

    /// Bytes of shared memory that a tile extends over: more than [`TensorMap::box_bytes`] if rows are shorter than the
    /// swizzle's span, as they are then the span apart.
    pub fn shared_bytes(&self) -> u64 {
        self.row_pitch() as u64 * self.rows()
    }

    /// Checks a tile's position, as the device does.
    ///
    /// # Errors
    /// The number of coordinates, an innermost coordinate or a shared address off its alignment. (An H200 takes an
    /// innermost coordinate that is no multiple of 16 bytes for an illegal instruction.)
    pub fn check_tile(&self, coordinates: &[i32], shared_base: u32) -> Result<(), TensorMapError> {
        if coordinates.len() != self.rank() {
            return Err(E::CoordinateCount { given: coordinates.len(), rank: self.rank() });
        }
        let coordinate = coordinates[0];
        let bytes = coordinate as i64 * self.spec.data_type.bytes() as i64;
        if bytes % 16 != 0 {
            return Err(E::InnerCoordinate { coordinate, bytes });
        }
        if !shared_base.is_multiple_of(SHARED_ALIGNMENT) {
            return Err(E::SharedAddress { address: shared_base });
        }
        Ok(())
    }

    fn rows(&self) -> u64 {
        (1..self.rank()).map(|i| self.copied(i) as u64).product()
    }

    /// Distance of rows in shared memory.
    fn row_pitch(&self) -> u32 {
        if self.spec.swizzle == Swizzle::None { self.row_bytes() } else { self.spec.swizzle.span() }
    }

    fn row_bytes(&self) -> u32 {
        self.spec.box_dims[0] * self.spec.data_type.bytes()
    }

    /// Elements copied along an outer dimension.
    fn copied(&self, dimension: usize) -> u32 {
        self.spec.box_dims[dimension].div_ceil(self.spec.element_strides[dimension])
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], TensorMapError> {
    let (head, rest) = bytes.split_first_chunk().ok_or(E::NotATensorMap)?;
    *bytes = rest;
    Ok(*head)
}

fn check_entries(
    list: &'static str,
    entries: &[u64],
    rule: &'static str,
    valid: impl Fn(u64) -> bool,
) -> Result<(), TensorMapError> {
    match entries.iter().position(|&value| !valid(value)) {
        Some(dimension) => Err(E::Entry { list, dimension, value: entries[dimension], rule }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
