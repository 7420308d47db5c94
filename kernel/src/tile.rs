//! The tile family of the two matrix products.
//!
//! Weights are the A operand of wgmma, tokens the B operand: a task multiplies 128 weight rows by up to [`MAX_TOKEN_TILE`] tokens.
//! The rows of an expert are cut into tiles of the largest width, and the rest gets the smallest width that holds it.

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

/// Pool rows that `rows` rows of one expert take, padded so that every tile lies within its expert's rows.
pub const fn padded_rows(rows: u32) -> u32 {
    let rest = rows % MAX_TOKEN_TILE;
    if rest == 0 { rows } else { rows - rest + token_tile(tile_index(rest)) }
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
    fn the_rest_of_an_expert_gets_the_smallest_tile_that_holds_it() {
        for (rows, tiles, padded) in [
            (0, 0, 0),
            (1, 1, 8),
            (8, 1, 8),
            (9, 1, 16),
            (17, 1, 32),
            (64, 1, 64),
            (65, 1, 96),
            (129, 1, 160),
            (225, 1, 256),
            (256, 1, 256),
            (257, 2, 264),
            (600, 3, 608),
        ] {
            assert_eq!((token_tiles(rows), padded_rows(rows)), (tiles, padded), "{rows} rows");
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
