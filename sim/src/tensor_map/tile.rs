//! A tile as pieces of memory.

use super::{Swizzle, TensorMap};

/// Bytes that are contiguous in shared memory, and in global memory or outside the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilePiece {
    /// Where the piece lies in shared memory, swizzle applied.
    pub shared_address: u32,
    /// Where it lies in global memory; `None` outside the tensor (a load fills it, a store skips it).
    pub global: Option<u64>,
    /// Its length: at most 16 with swizzle, up to a row of the box without.
    pub bytes: u32,
}

/// Iterator over the pieces of a tile, in the order of the shared-memory layout before swizzling.
pub struct TilePieces<'a> {
    map: &'a TensorMap,
    coordinates: [i64; 5],
    swizzle: Swizzle,
    /// Longest piece.
    chunk: u32,
    row_bytes: u32,
    /// Bytes of a row that lie inside the tensor's innermost dimension.
    inside: (u32, u32),
    /// Steps taken in the outer dimensions, and whether none is left.
    steps: [u32; 5],
    done: bool,
    /// The current row: its shared address before swizzling, the global address of its first byte (meaningful only in
    /// `row_inside`), and the position in it.
    row_shared: u32,
    row_global: u64,
    row_inside: (u32, u32),
    position: u32,
}

impl TensorMap {
    /// The pieces of the tile at `coordinates` (in elements, innermost first) and the shared address `shared_base`; see
    /// [`TensorMap::check_tile`] for what they must be.
    pub fn tile_pieces(&self, coordinates: &[i32], shared_base: u32) -> TilePieces<'_> {
        let mut wide = [0; 5];
        for (wide, &coordinate) in wide.iter_mut().zip(coordinates) {
            *wide = coordinate as i64;
        }
        let element = self.spec.data_type.bytes() as i64;
        let row_bytes = self.row_bytes();
        let inside = |edge: i64| ((edge - wide[0]) * element).clamp(0, row_bytes as i64) as u32;
        let swizzle = self.spec.swizzle;
        let mut pieces = TilePieces {
            map: self,
            coordinates: wide,
            swizzle,
            chunk: if swizzle == Swizzle::None { row_bytes } else { 16 },
            row_bytes,
            inside: (inside(0), inside(self.spec.dims[0] as i64)),
            steps: [0; 5],
            done: false,
            row_shared: shared_base,
            row_global: 0,
            row_inside: (0, 0),
            position: 0,
        };
        pieces.locate_row();
        pieces
    }
}

impl TilePieces<'_> {
    fn locate_row(&mut self) {
        let spec = &self.map.spec;
        let mut offset = self.coordinates[0] * spec.data_type.bytes() as i64;
        let mut row_inside = self.inside;
        for dimension in 1..spec.dims.len() {
            let step = self.steps[dimension] * spec.element_strides[dimension];
            let coordinate = self.coordinates[dimension] + step as i64;
            if coordinate < 0 || coordinate >= spec.dims[dimension] as i64 {
                row_inside = (0, 0);
            }
            offset = offset.wrapping_add(coordinate.wrapping_mul(spec.strides[dimension - 1] as i64));
        }
        self.row_global = spec.global_address.wrapping_add_signed(offset);
        self.row_inside = row_inside;
        self.position = 0;
    }

    fn next_row(&mut self) {
        for dimension in 1..self.map.rank() {
            self.steps[dimension] += 1;
            if self.steps[dimension] < self.map.copied(dimension) {
                self.row_shared = self.row_shared.wrapping_add(self.map.row_pitch());
                return self.locate_row();
            }
            self.steps[dimension] = 0;
        }
        self.done = true;
    }
}

impl Iterator for TilePieces<'_> {
    type Item = TilePiece;

    #[inline]
    fn next(&mut self) -> Option<TilePiece> {
        if self.position == self.row_bytes {
            self.next_row();
        }
        if self.done {
            return None;
        }
        let (start, (first, end)) = (self.position, self.row_inside);
        let (inside, limit) = if start < first {
            (false, first)
        } else if start < end {
            (true, end)
        } else {
            (false, self.row_bytes)
        };
        let bytes = (limit - start).min(self.chunk - start % self.chunk);
        self.position += bytes;
        Some(TilePiece {
            shared_address: self.swizzle.apply(self.row_shared.wrapping_add(start)),
            global: inside.then(|| self.row_global.wrapping_add(start as u64)),
            bytes,
        })
    }
}
