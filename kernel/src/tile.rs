//! The tile family of the two matrix products.
//!
//! Weights are the A operand of wgmma, tokens the B operand: a task multiplies 128 weight rows by the tokens of a tile.
//! (FP8 has it the other way round where tiles are wide.)
//! The rows of an expert are cut into tiles of the largest width, but the last two share theirs evenly, each of the smallest width that holds them: a narrow tile takes
//! longer than its share, for its weights take as long to come, and shared memory has more to move for each operation.

/// Weight rows of one task: 64 for each of the two consumer warpgroups.
pub const WEIGHT_TILE: u32 = 128;

/// Weight rows of one warpgroup, the M of wgmma.
pub const WARPGROUP_ROWS: u32 = 64;

/// Bytes of the contraction dimension in one pipeline stage: a 128-byte swizzle row.
pub const K_BLOCK_BYTES: u32 = 128;

/// Bytes of the contraction dimension that one wgmma consumes (PTX ISA 8.6, wgmma: k16 of bf16, k32 of e4m3).
pub const K_STEP_BYTES: u32 = 32;

/// Rows of gate (then of up) that alternate in the prepared linear 1 weights, so that one thread's accumulators hold both.
pub const GATE_UP_GROUP: u32 = 8;

const _: () = assert!(WEIGHT_TILE == 2 * WARPGROUP_ROWS);

/// The widths of a format's token tiles: 8, 16, 32, 64, and from there on in even steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// From one width to the next, from 64 on.
    pub step: u32,
    /// How many widths there are.
    pub count: u32,
}

/// The most widths of a format.
pub const MAX_TILES: usize = 10;

impl Tiles {
    /// The width of the tile with this index; without a table, which would lie in memory.
    #[inline(always)]
    pub const fn width(self, index: u32) -> u32 {
        if index < 4 { 8 << index } else { 64 + self.step * (index - 3) }
    }

    /// The widest tile.
    #[inline(always)]
    pub const fn widest(self) -> u32 {
        self.width(self.count - 1)
    }

    /// Index of the tile for `rows` tokens (1 to the widest; more counts as the widest).
    #[inline(always)]
    pub const fn index(self, rows: u32) -> u32 {
        if rows <= 8 {
            0
        } else if rows <= 16 {
            1
        } else if rows <= 32 {
            2
        } else if rows <= 64 {
            3
        } else if rows <= self.widest() {
            3 + (rows - 64).div_ceil(self.step)
        } else {
            self.count - 1
        }
    }

    /// Tiles that `rows` rows of one expert are cut into.
    #[inline(always)]
    pub const fn tiles(self, rows: u32) -> u32 {
        rows.div_ceil(self.widest())
    }

    /// The rows, from the first to behind the last, of tile `tile` of an expert that has `rows` rows.
    #[inline(always)]
    pub const fn rows_of_tile(self, tile: u32, rows: u32) -> (u32, u32) {
        let last = self.last_tile_row(rows);
        if tile + 1 == self.tiles(rows) {
            (last, rows)
        } else {
            let (first, end) = (tile * self.widest(), (tile + 1) * self.widest());
            (first, if end < last { end } else { last })
        }
    }

    /// The tile that holds row `row` of an expert that has `rows` rows.
    #[inline(always)]
    pub const fn tile_of_row(self, row: u32, rows: u32) -> u32 {
        if row < self.last_tile_row(rows) { row / self.widest() } else { self.tiles(rows) - 1 }
    }

    /// First row of the last tile of an expert that has `rows` rows.
    #[inline(always)]
    const fn last_tile_row(self, rows: u32) -> u32 {
        let full = rows.saturating_sub(1) / self.widest() * self.widest();
        if full == 0 {
            0
        } else {
            // The last tile but one has half of the two, rounded up to a width.
            let before = full - self.widest();
            before + self.width(self.index((rows - before).div_ceil(2)))
        }
    }

    /// Pool rows that `rows` rows of one expert take, padded so that every tile lies within its expert's rows.
    #[inline(always)]
    pub const fn padded_rows(self, rows: u32) -> u32 {
        let last = self.last_tile_row(rows);
        if rows == 0 { 0 } else { last + self.width(self.index(rows - last)) }
    }

    /// The most rows that [`Self::padded_rows`] adds to one expert.
    pub const fn max_padding(self) -> u32 {
        let mut most = self.width(0) - 1;
        let mut index = 1;
        while index < self.count {
            let padding = self.width(index) - self.width(index - 1) - 1;
            if padding > most {
                most = padding;
            }
            index += 1;
        }
        most
    }
}

/// The most CTAs of a cluster: they work on neighbouring weight tiles of one token tile.
pub const MAX_CLUSTER: u32 = 2;

/// Rows of a token tile of `width` rows that one CTA of a cluster loads for all of it. Tiles that cannot be cut into whole swizzle
/// atoms of eight rows are loaded by each CTA for itself.
pub const fn loaded_rows(width: u32, cluster: u32) -> u32 {
    let share = width / cluster;
    if share.is_multiple_of(8) { share } else { width }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    const TILES: Tiles = Format::BF16.tiles;

    #[test]
    fn the_last_two_tiles_share_their_rows() {
        for (rows, tiles, padded) in [
            (0, &[][..], 0),
            (1, &[1], 8),
            (8, &[8], 8),
            (9, &[9], 16),
            (17, &[17], 32),
            (64, &[64], 64),
            (65, &[65], 96),
            (129, &[129], 160),
            (225, &[225], 256),
            (256, &[256], 256),
            (257, &[160, 97], 288),
            (320, &[160, 160], 320),
            (384, &[192, 192], 384),
            (385, &[224, 161], 416),
            (450, &[256, 194], 480),
            (512, &[256, 256], 512),
            (600, &[256, 192, 152], 608),
        ] {
            let cut = (0..TILES.tiles(rows)).map(|tile| TILES.rows_of_tile(tile, rows)).map(|(first, end)| end - first);
            assert!(cut.eq(tiles.iter().copied()) && TILES.padded_rows(rows) == padded, "{rows} rows");
        }
    }

    #[test]
    fn tiles_hold_an_expert_s_rows_in_order() {
        for rows in 0..1000 {
            let mut next = 0;
            for tile in 0..TILES.tiles(rows) {
                let (first, end) = TILES.rows_of_tile(tile, rows);
                assert!(first == next && first < end && end - first <= TILES.widest(), "{rows} rows, tile {tile}");
                assert!((first..end).all(|row| TILES.tile_of_row(row, rows) == tile), "{rows} rows, tile {tile}");
                assert!(first.is_multiple_of(32), "{rows} rows: tile {tile} begins within a swizzle atom");
                next = end;
            }
            assert_eq!(next, rows);
        }
    }

    #[test]
    fn padding_stays_below_its_bound() {
        for rows in 0..1000 {
            let padding = TILES.padded_rows(rows) - rows;
            assert!(padding <= TILES.max_padding(), "{rows} rows are padded by {padding}");
        }
    }
}
