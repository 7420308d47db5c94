use super::*;
use proptest::prelude::*;

fn spec(dims: &[u64], strides: &[u64], box_dims: &[u32], swizzle: Swizzle) -> TensorMapSpec {
    TensorMapSpec {
        data_type: TensorMapDataType::Bf16,
        global_address: 0x1_0000,
        dims: dims.to_vec(),
        strides: strides.to_vec(),
        box_dims: box_dims.to_vec(),
        element_strides: vec![1; dims.len()],
        swizzle,
        fill: OutOfBoundsFill::Zero,
    }
}

/// By how much the 16-byte chunk's index is changed in each of the eight 128-byte lines of the pattern.
fn swizzle_table(swizzle: Swizzle) -> [u32; 8] {
    match swizzle {
        Swizzle::None => [0; 8],
        Swizzle::B32 => [0, 1, 0, 1, 0, 1, 0, 1],
        Swizzle::B64 => [0, 1, 2, 3, 0, 1, 2, 3],
        Swizzle::B128 => [0, 1, 2, 3, 4, 5, 6, 7],
    }
}

/// Global address of every shared byte, element by element: (shared, global).
fn expected_bytes(spec: &TensorMapSpec, coordinates: &[i32], base: u32) -> Vec<(u32, Option<u64>)> {
    let element = spec.data_type.bytes();
    let counts: Vec<u32> = (0..spec.dims.len())
        .map(|i| match i {
            0 => spec.box_dims[0],
            _ => (0..spec.box_dims[i]).step_by(spec.element_strides[i] as usize).count() as u32,
        })
        .collect();
    let width = match spec.swizzle {
        Swizzle::None => spec.box_dims[0] * element,
        Swizzle::B32 => 32,
        Swizzle::B64 => 64,
        Swizzle::B128 => 128,
    };
    let mut bytes = Vec::new();
    for index in 0..counts.iter().product::<u32>() {
        let (mut rest, mut row, mut rows, mut global, mut inside, mut column) =
            (index, 0, 1, spec.global_address as i64, true, 0);
        for (i, &count) in counts.iter().enumerate() {
            let step = rest % count;
            rest /= count;
            let coordinate = coordinates[i] as i64 + if i == 0 { step } else { step * spec.element_strides[i] } as i64;
            inside &= (0..spec.dims[i] as i64).contains(&coordinate);
            global += coordinate * if i == 0 { element as i64 } else { spec.strides[i - 1] as i64 };
            if i == 0 {
                column = step;
            } else {
                row += step * rows;
                rows *= count;
            }
        }
        for byte in 0..element {
            let address = base + row * width + column * element + byte;
            let (line, chunk, within) = (address / 128, address % 128 / 16, address % 16);
            let swizzled = line * 128 + (chunk ^ swizzle_table(spec.swizzle)[line as usize % 8]) * 16 + within;
            bytes.push((swizzled, inside.then_some((global + byte as i64) as u64)));
        }
    }
    bytes.sort();
    bytes
}

fn piece_bytes(map: &TensorMap, coordinates: &[i32], base: u32) -> Vec<(u32, Option<u64>)> {
    let mut bytes = Vec::new();
    for piece in map.tile_pieces(coordinates, base) {
        assert!(piece.bytes > 0);
        assert!(map.spec.swizzle == Swizzle::None || piece.bytes <= 16);
        for i in 0..piece.bytes {
            bytes.push((piece.shared_address + i, piece.global.map(|global| global + i as u64)));
        }
    }
    bytes.sort();
    bytes
}

#[test]
fn a_whole_swizzled_row_is_eight_pieces() {
    let map = TensorMap::new(&spec(&[128, 32], &[256], &[64, 16], Swizzle::B128)).unwrap();
    assert_eq!((map.box_bytes(), map.shared_bytes()), (2048, 2048));
    let pieces: Vec<_> = map.tile_pieces(&[64, 3], 1024).collect();
    assert_eq!(pieces.len(), 16 * 8);
    // Row 5 starts at shared 1024 + 5 * 128; its chunk 0 is moved to 0 ^ 5.
    assert_eq!(
        pieces[40],
        TilePiece { shared_address: 1024 + 5 * 128 + 5 * 16, global: Some(0x1_0000 + 8 * 256 + 128), bytes: 16 }
    );
    let whole = TensorMap::new(&spec(&[128, 32], &[256], &[64, 16], Swizzle::None)).unwrap();
    assert_eq!(whole.tile_pieces(&[64, 3], 1024).count(), 16);
}

#[test]
fn every_edge_of_a_tensor() {
    // 20 x 5 elements with padded rows; boxes that lie before, across, inside, around and beyond each edge.
    for swizzle in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
        let mut spec = spec(&[20, 5], &[48], &[(swizzle.span() / 2).max(16), 3], swizzle);
        for element_stride in [1, 2] {
            spec.element_strides[1] = element_stride;
            let map = TensorMap::new(&spec).unwrap();
            for x in [-80, -64, -32, -16, -8, 0, 8, 16, 24, i32::MAX - 7, i32::MIN] {
                for y in [-4, -3, -2, -1, 0, 2, 3, 4, 5, 6, i32::MAX, i32::MIN] {
                    map.check_tile(&[x, y], 0x400).unwrap();
                    assert_eq!(
                        piece_bytes(&map, &[x, y], 0x400),
                        expected_bytes(&spec, &[x, y], 0x400),
                        "{swizzle:?} {x} {y}"
                    );
                }
            }
        }
    }
}

#[test]
fn short_rows_are_a_span_apart() {
    // Observed on an H200: 8 elements (16 bytes) in a 128-byte swizzle.
    let map = TensorMap::new(&spec(&[64, 64], &[128], &[8, 3], Swizzle::B128)).unwrap();
    assert_eq!((map.box_bytes(), map.shared_bytes()), (48, 384));
    let addresses: Vec<_> = map.tile_pieces(&[0, 0], 0).map(|piece| piece.shared_address).collect();
    assert_eq!(addresses, [0, 128 + 16, 256 + 32]);
}

#[test]
fn every_rule_is_checked() {
    type Change = fn(&mut TensorMapSpec);
    let good = spec(&[64, 64], &[128], &[64, 8], Swizzle::B128);
    assert!(TensorMap::new(&good).is_ok());
    let bad: [(Change, &str); 19] = [
        (|s| s.dims.clear(), "0 dimensions; it must have 1 to 5"),
        (|s| s.dims = vec![1; 6], "6 dimensions"),
        (|s| s.strides.clear(), "strides has 0 entries; a tensor of 2 dimensions needs 1"),
        (|s| s.box_dims.push(1), "box_dims has 3 entries"),
        (|s| s.element_strides.clear(), "element_strides has 0 entries"),
        (|s| s.global_address += 8, "0x10008 is not a multiple of 16"),
        (|s| s.dims[1] = 0, "dims[1] is 0"),
        (|s| s.dims[1] = (1 << 32) + 1, "dims[1] is 4294967297"),
        (|s| s.strides[0] = 136, "strides[0] is 136; it must be a multiple of 16"),
        (|s| s.strides[0] = 1 << 40, "strides[0] is 1099511627776"),
        (|s| s.box_dims[1] = 0, "box_dims[1] is 0; it must be 1 to 256"),
        (|s| s.box_dims[1] = 257, "box_dims[1] is 257"),
        (|s| s.element_strides[1] = 0, "element_strides[1] is 0; it must be 1 to 8"),
        (|s| s.element_strides[0] = 9, "element_strides[0] is 9"),
        (|s| s.box_dims[0] = 4, "innermost dimension is 8 bytes; it must be a multiple of 16"),
        (|s| s.box_dims[0] = 72, "innermost dimension is 144 bytes; with this swizzle it must be at most 128"),
        (|s| s.swizzle = Swizzle::B32, "at most 32"),
        (
            |s| {
                s.data_type = TensorMapDataType::U32;
                s.box_dims[0] = 32;
                s.fill = OutOfBoundsFill::NaN;
            },
            "not U32",
        ),
        (
            |s| {
                s.data_type = TensorMapDataType::F32;
                s.swizzle = Swizzle::None;
                s.box_dims = vec![256, 256];
            },
            "holds 262144 bytes",
        ),
    ];
    for (change, message) in bad {
        let mut changed = good.clone();
        change(&mut changed);
        let error = TensorMap::encode(&changed).unwrap_err().to_string();
        assert!(error.contains(message), "{error} does not say {message}");
    }
    // What the driver takes although one might expect otherwise.
    for strides in [0, 16, (1 << 40) - 16] {
        assert!(TensorMap::new(&TensorMapSpec { strides: vec![strides], ..good.clone() }).is_ok());
    }
    assert!(TensorMap::new(&spec(&[64, 4, 4], &[512, 128], &[64, 2, 2], Swizzle::B128)).is_ok());
    let nan = TensorMapSpec { fill: OutOfBoundsFill::NaN, ..good };
    assert_eq!(TensorMap::new(&nan).unwrap().fill_pattern(), [0xF7, 0x7F]);
}

#[test]
fn tile_positions_are_checked() {
    let map = TensorMap::new(&spec(&[64, 64], &[128], &[64, 8], Swizzle::B128)).unwrap();
    assert_eq!(map.check_tile(&[-8, -1], 128), Ok(()));
    assert_eq!(map.check_tile(&[4, 0], 0), Err(E::InnerCoordinate { coordinate: 4, bytes: 8 }));
    assert_eq!(map.check_tile(&[0, 0], 64), Err(E::SharedAddress { address: 64 }));
    assert_eq!(map.check_tile(&[0], 0), Err(E::CoordinateCount { given: 1, rank: 2 }));
}

#[test]
fn other_bytes_are_no_tensor_map() {
    assert_eq!(TensorMap::decode(&[0; 128]), Err(E::NotATensorMap));
    let good = TensorMap::encode(&spec(&[64, 64], &[128], &[64, 8], Swizzle::B128)).unwrap();
    for (at, byte) in [(0, 0), (8, 13), (9, 0), (9, 6), (10, 4), (11, 2)] {
        let mut changed = good;
        changed[at] = byte;
        assert!(TensorMap::decode(&changed).is_err(), "byte {at} = {byte}");
    }
}

fn any_spec() -> impl Strategy<Value = TensorMapSpec> {
    let dimension = (1u64..40, 0u64..40, 1u32..5, 1u32..4);
    (prop::collection::vec(dimension, 1..=5), 0usize..4, 0usize..4, any::<bool>()).prop_map(
        |(dimensions, swizzle, data_type, nan)| {
            use TensorMapDataType as D;
            let data_type = [D::U8, D::Bf16, D::F32, D::F64][data_type];
            let swizzle = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128][swizzle];
            let rows = if swizzle == Swizzle::None { 4 } else { swizzle.span() / 16 };
            let mut box_dims: Vec<u32> = dimensions.iter().map(|d| d.2).collect();
            box_dims[0] = (box_dims[0] - 1) % rows * 16 / data_type.bytes() + 16 / data_type.bytes();
            TensorMapSpec {
                data_type,
                global_address: 1 << 20,
                dims: dimensions.iter().map(|d| d.0).collect(),
                strides: dimensions[1..].iter().map(|d| d.1 * 16).collect(),
                box_dims,
                element_strides: dimensions.iter().map(|d| d.3).collect(),
                swizzle,
                fill: if nan && data_type != D::U8 { OutOfBoundsFill::NaN } else { OutOfBoundsFill::Zero },
            }
        },
    )
}

proptest! {
    #[test]
    fn pieces_cover_the_tile(spec in any_spec(), at in prop::array::uniform5(-12i32..50), base in 0u32..20) {
        let map = TensorMap::decode(&TensorMap::encode(&spec).unwrap()).unwrap();
        prop_assert_eq!(map.spec(), &spec);
        let mut coordinates = at[..spec.dims.len()].to_vec();
        coordinates[0] = coordinates[0] * 16 / spec.data_type.bytes() as i32;
        let bytes = piece_bytes(&map, &coordinates, base * 128);
        prop_assert_eq!(bytes.len() as u64, map.box_bytes());
        prop_assert!(bytes.iter().all(|byte| (byte.0 as u64) < base as u64 * 128 + map.shared_bytes().next_multiple_of(1024)));
        prop_assert_eq!(bytes, expected_bytes(&spec, &coordinates, base * 128));
    }
}
