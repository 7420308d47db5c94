//! The tile family of the two matrix products.
//!
//! Weights are the A operand of wgmma, tokens the B operand: a task multiplies 128 weight rows by up to [`MAX_TOKEN_TILE`] tokens.
//! The rows of an expert are cut into tiles of the largest width, but the last two share theirs evenly, each of the smallest width that holds them: a narrow tile takes
//! longer than its share, for its weights take as long to come, and shared memory has more to move for each operation.

/// Weight rows of one task: 64 for each of the two consumer warpgroups.
pub const WEIGHT_TILE: u32 = 128;

/// Weight rows of one warpgroup, the M of wgmma.
pub const WARPGROUP_ROWS: u32 = 64;

/// Elements of the contraction dimension in one pipeline stage: 64 bf16 fill one 128-byte swizzle row.
pub const K_BLOCK: u32 = 64;

/// Elements of the contraction dimension that one bf16 wgmma consumes.
pub const K_STEP: u32 = 16;

/// Widths of the token tiles, ascending; a width is the N of wgmma.
pub const TOKEN_TILES: [u32; 10] = [8, 16, 32, 64, 96, 128, 160, 192, 224, 256];

/// The widest token tile.
pub const MAX_TOKEN_TILE: u32 = TOKEN_TILES[TOKEN_TILES.len() - 1];

/// Rows of gate (then of up) that alternate in the prepared linear 1 weights, so that one thread's accumulators hold both.
pub const GATE_UP_GROUP: u32 = 8;

const _: () = assert!(WEIGHT_TILE == 2 * WARPGROUP_ROWS);
const _: () = {
    let mut index = 0;
    while index < TOKEN_TILES.len() {
        assert!(token_tile(index as u32) == TOKEN_TILES[index]);
        assert!(tile_index(TOKEN_TILES[index]) == index as u32);
        assert!(index == 0 || tile_index(TOKEN_TILES[index - 1] + 1) == index as u32);
        index += 1;
    }
};

/// The width of the tile with this index: [`TOKEN_TILES`] without a table, which would lie in memory.
pub const fn token_tile(index: u32) -> u32 {
    if index < 4 { 8 << index } else { 32 * (index - 1) }
}

/// Index into [`TOKEN_TILES`] of the tile for `rows` tokens (1 to [`MAX_TOKEN_TILE`]; more counts as the widest).
pub const fn tile_index(rows: u32) -> u32 {
    match rows {
        0..=8 => 0,
        9..=16 => 1,
        17..=MAX_TOKEN_TILE => rows.div_ceil(32) + 1,
        _ => TOKEN_TILES.len() as u32 - 1,
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

/// Tiles that `rows` rows of one expert are cut into.
pub const fn token_tiles(rows: u32) -> u32 {
    rows.div_ceil(MAX_TOKEN_TILE)
}

/// The rows, from the first to behind the last, of tile `tile` of an expert that has `rows` rows.
pub const fn rows_of_tile(tile: u32, rows: u32) -> (u32, u32) {
    let last = last_tile_row(rows);
    if tile + 1 == token_tiles(rows) {
        (last, rows)
    } else {
        let (first, end) = (tile * MAX_TOKEN_TILE, (tile + 1) * MAX_TOKEN_TILE);
        (first, if end < last { end } else { last })
    }
}

/// The tile that holds row `row` of an expert that has `rows` rows.
pub const fn tile_of_row(row: u32, rows: u32) -> u32 {
    if row < last_tile_row(rows) { row / MAX_TOKEN_TILE } else { token_tiles(rows) - 1 }
}

/// First row of the last tile of an expert that has `rows` rows.
const fn last_tile_row(rows: u32) -> u32 {
    let full = rows.saturating_sub(1) / MAX_TOKEN_TILE * MAX_TOKEN_TILE;
    if full == 0 {
        0
    } else {
        // The last tile but one has half of the two, rounded up to a width.
        let before = full - MAX_TOKEN_TILE;
        before + token_tile(tile_index((rows - before).div_ceil(2)))
    }
}

/// Pool rows that `rows` rows of one expert take, padded so that every tile lies within its expert's rows.
pub const fn padded_rows(rows: u32) -> u32 {
    let last = last_tile_row(rows);
    if rows == 0 { 0 } else { last + token_tile(tile_index(rows - last)) }
}

/// The most rows that [`padded_rows`] adds to one expert.
pub const MAX_PADDING: u32 = {
    let mut most = TOKEN_TILES[0] - 1;
    let mut index = 1;
    while index < TOKEN_TILES.len() {
        let padding = TOKEN_TILES[index] - TOKEN_TILES[index - 1] - 1;
        if padding > most {
            most = padding;
        }
        index += 1;
    }
    most
};

#[cfg(test)]
mod tests {
    use super::*;

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
            let cut = (0..token_tiles(rows)).map(|tile| rows_of_tile(tile, rows)).map(|(first, end)| end - first);
            assert!(cut.eq(tiles.iter().copied()) && padded_rows(rows) == padded, "{rows} rows");
        }
    }

    #[test]
    fn tiles_hold_an_expert_s_rows_in_order() {
        for rows in 0..1000 {
            let mut next = 0;
            for tile in 0..token_tiles(rows) {
                let (first, end) = rows_of_tile(tile, rows);
                assert!(first == next && first < end && end - first <= MAX_TOKEN_TILE, "{rows} rows, tile {tile}");
                assert!((first..end).all(|row| tile_of_row(row, rows) == tile), "{rows} rows, tile {tile}");
                assert!(first.is_multiple_of(32), "{rows} rows: tile {tile} begins within a swizzle atom");
                next = end;
            }
            assert_eq!(next, rows);
        }
    }

    #[test]
    fn padding_stays_below_its_bound() {
        for rows in 0..1000 {
            let padding = padded_rows(rows) - rows;
            assert!(padding <= MAX_PADDING, "{rows} rows are padded by {padding}");
        }
    }
}
