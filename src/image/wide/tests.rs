//! Weights scattered over two simulated devices and the host in every way a segment can lie, against plain reads.

use super::super::shard::Attached;
use super::*;
use crate::memory::simulated::SimulatedDevice;
use crate::memory::{HostMemory, block_hash};
use crate::model::{Dtype, ModelDirectory};
use crate::source::{Boundary, Place, Segment, Source, row_major};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::atomic::Ordering;

const ROWS: u64 = 96;
const COLUMNS: u64 = 56;

/// How a tensor of ROWS x COLUMNS lies in memories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Whole,
    Halves,
    Columns,
    /// A row, and the others behind it, in a wider matrix.
    Stacked,
    /// Each row of one device apart from the next.
    Padded,
    Transposed,
    Cast,
    Host,
    Disk,
}

struct World {
    _directory: tempfile::TempDir,
    model: Arc<ModelDirectory>,
    image: Attached,
    devices: [Arc<SimulatedDevice>; 2],
    memories: Vec<Arc<dyn Memory>>,
}

fn segment(memory: usize, at: [u64; 2], shape: [u64; 2], strides: [u64; 2], offset: u64, dtype: Dtype) -> Segment {
    let (at, shape, strides) = (at.to_vec(), shape.to_vec(), strides.to_vec());
    Segment { memory, offset, at, shape, strides, dtype, replica: false }
}

fn world(layouts: &[Layout], pad: usize) -> World {
    let directory = tempfile::tempdir().unwrap();
    let bytes = ROWS * COLUMNS * 2;
    let mut header = serde_json::Map::new();
    for i in 0..layouts.len() as u64 {
        let entry = serde_json::json!({
            "dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [i * bytes, (i + 1) * bytes]});
        header.insert(format!("t{i:03}"), entry);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.extend(vec![b' '; pad]);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    let data = layouts.len() * bytes as usize;
    file.extend((0..data).map(|i| (i * 7 % 251) as u8));
    std::fs::write(directory.path().join("model.safetensors"), file).unwrap();
    let model = Arc::new(ModelDirectory::open(directory.path()).unwrap());

    let devices = [(); 2].map(|()| Arc::new(SimulatedDevice::default()));
    let room = 64 + layouts.len() as u64 * bytes * 4;
    let on = |d: usize| Arc::new(devices[d].memory(room)) as Arc<dyn Memory>;
    let memories = vec![on(0), on(1), Arc::new(HostMemory::anonymous(room, "host").unwrap()) as Arc<dyn Memory>, on(0)];
    let fill: Vec<u8> = (0..room).map(|i| (i * 131 % 241) as u8).collect();
    memories.iter().for_each(|m| m.write(0, &fill).unwrap());

    let mut places = HashMap::new();
    for (i, layout) in layouts.iter().enumerate() {
        let offset = i as u64 * bytes * 4 + 8;
        let half = ROWS / 2;
        let plain = row_major(&[ROWS, COLUMNS]);
        let strides = [plain[0], plain[1]];
        let whole = |memory, dtype| segment(memory, [0, 0], [ROWS, COLUMNS], strides, offset, dtype);
        let live = match layout {
            Layout::Disk => {
                places.insert(format!("t{i:03}"), Place::OnlyOnDisk);
                continue;
            }
            Layout::Whole => vec![whole(0, Dtype::BF16)],
            Layout::Halves => vec![
                segment(0, [0, 0], [half, COLUMNS], strides, offset, Dtype::BF16),
                segment(3, [half, 0], [ROWS - half, COLUMNS], strides, offset, Dtype::BF16),
            ],
            Layout::Columns => {
                let left = COLUMNS / 2;
                vec![
                    segment(0, [0, 0], [ROWS, left], [left, 1], offset, Dtype::BF16),
                    segment(1, [0, left], [ROWS, COLUMNS - left], [COLUMNS - left, 1], offset, Dtype::BF16),
                ]
            }
            Layout::Stacked => {
                let wide = COLUMNS + 8;
                vec![
                    segment(0, [1, 0], [ROWS - 1, COLUMNS], [wide, 1], offset + 2 * wide, Dtype::BF16),
                    segment(0, [0, 0], [1, COLUMNS], strides, offset, Dtype::BF16),
                ]
            }
            Layout::Padded => vec![segment(1, [0, 0], [ROWS, COLUMNS], [COLUMNS + 3, 1], offset, Dtype::BF16)],
            Layout::Transposed => vec![segment(0, [0, 0], [ROWS, COLUMNS], [1, ROWS], offset, Dtype::BF16)],
            Layout::Cast => vec![whole(1, Dtype::F32)],
            Layout::Host => vec![whole(2, Dtype::BF16)],
        };
        places.insert(format!("t{i:03}"), Place::Live(live));
    }
    let source = Source {
        updates: Default::default(),
        memories: memories.clone(),
        places,
        only_live: Vec::new(),
        engines: Vec::new(),
        boundary: Arc::new(Boundary::new(Vec::new())),
    };
    let image = Attached::new(model.clone(), Arc::new(source));
    World { _directory: directory, model, image, devices, memories }
}

/// All bytes, by the way that knows nothing of devices.
fn plain(image: &Attached) -> Vec<u8> {
    let mut bytes = vec![0; image.shard_bytes(0) as usize];
    image.read_with(0, 0, &mut bytes, &mut copy).unwrap();
    bytes
}

fn hashes(bytes: &[u8]) -> Vec<Hash> {
    bytes.chunks(BLOCK).map(block_hash).collect()
}

fn live(image: &Attached) -> Blocks {
    image.live_blocks(0).into_iter().map(|r| (0, r)).collect()
}

fn layouts() -> impl Strategy<Value = Vec<Layout>> {
    use Layout::*;
    let any = prop::sample::select(vec![Whole, Whole, Halves, Columns, Stacked, Padded, Transposed, Cast, Host, Disk]);
    prop::collection::vec(any, 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_changed_is_found_whatever_way_the_weights_lie(layouts in layouts(), pad in 0usize..9, writes in prop::collection::vec((0usize..4, 0u64..1 << 20), 0..6)) {
        let world = world(&layouts, pad);
        let (before, ranges) = (plain(&world.image), live(&world.image));
        let known = hashes(&before);
        prop_assert!(world.image.changed(&ranges, &[&known]).unwrap().is_empty());
        for (memory, at) in writes {
            let at = at % (world.memories[memory].bytes() - 2);
            let mut value = [0; 2];
            world.memories[memory].read(at, &mut value).unwrap();
            world.memories[memory].write(at, &value.map(|b| b ^ 0x35)).unwrap();
        }
        let after = hashes(&plain(&world.image));
        let expected: Vec<u64> = (0..known.len()).filter(|&i| known[i] != after[i]).map(|i| i as u64).collect();
        // Twice: planned anew, and by the plan that was kept.
        for _ in 0..2 {
            let changed = world.image.changed(&ranges, &[&known]).unwrap();
            prop_assert!(changed.windows(2).all(|w| w[0].1.end <= w[1].1.start));
            prop_assert_eq!(changed.into_iter().flat_map(|(_, r)| r).collect::<Vec<_>>(), expected.clone());
        }
    }

    #[test]
    fn parts_are_read_as_they_are(layouts in layouts(), pad in 0usize..9, cuts in prop::collection::vec((0usize..60_000, 1usize..30_000), 1..6)) {
        let world = world(&layouts, pad);
        let all = plain(&world.image);
        let cuts: Vec<Range<usize>> = cuts
            .into_iter()
            .map(|(at, len)| (at % all.len(), len))
            .map(|(at, len)| at..(at + len).min(all.len()))
            .collect();
        let mut buffers: Vec<Vec<u8>> = cuts.iter().map(|c| vec![0xEE; c.len()]).collect();
        let mut parts: Vec<Part<'_>> = cuts
            .iter()
            .zip(&mut buffers)
            .map(|(c, dst)| Part { shard: 0, offset: c.start as u64, dst })
            .collect();
        world.image.read_parts(&mut parts).unwrap();
        for (cut, buffer) in cuts.iter().zip(&buffers) {
            prop_assert_eq!(&all[cut.clone()], &buffer[..]);
        }
    }
}

#[test]
fn rows_that_lie_evenly_apart_in_one_memory_are_found_and_others_are_told_why() {
    use Layout::*;
    let world = world(&[Whole, Padded, Cast, Host, Stacked, Halves, Columns, Transposed], 0);
    let rows = |i: usize| world.image.tensor(&format!("t{i:03}")).unwrap().0.even_rows(COLUMNS);
    for (i, memory, stride, element) in
        [(0, 0, COLUMNS, 2), (1, 1, COLUMNS + 3, 2), (2, 1, COLUMNS, 4), (3, 2, COLUMNS, 2), (4, 0, COLUMNS + 8, 2)]
    {
        let found = rows(i).unwrap();
        assert_eq!((found.rows, found.columns, found.stride, found.element), (ROWS, COLUMNS, stride, element), "{i}");
        assert!(Arc::ptr_eq(&found.memory, &world.memories[memory]));
        assert_eq!(found.offset, i as u64 * ROWS * COLUMNS * 2 * 4 + 8);
        assert_eq!(found.bytes(), ((ROWS - 1) * stride + COLUMNS) * element);
    }
    for (i, why) in [(5, "several memories"), (6, "within its rows"), (7, "within its rows")] {
        assert!(rows(i).unwrap_err().contains(why), "{i}: {:?}", rows(i));
    }
}

#[test]
fn devices_hash_what_lies_in_them_whole_and_the_processor_the_little_that_is_left() {
    let layouts = [Layout::Whole, Layout::Halves, Layout::Padded, Layout::Whole];
    // Data that starts at a multiple of 8, as every writer of such files makes it: no block cuts an element.
    let aligned = |w: &World| w.model.shards[0].header.tensors[0].start.is_multiple_of(8);
    let world = (0..8).map(|pad| world(&layouts, pad)).find(aligned).unwrap();
    let known = hashes(&plain(&world.image));
    world.image.changed(&live(&world.image), &[&known]).unwrap();
    let hashed: u64 = world.devices.iter().map(|d| d.hashed.load(Ordering::Relaxed)).sum();
    let blocks = known.len() as u64;
    // Not: the block with the header's end, the file's short last one, and two where tensors of two devices meet.
    assert!(hashed >= blocks - 4, "{hashed} of {blocks}");
}
