//! What proptest chooses and shrinks: the tensors of a model, and how an engine keeps each of them.

use super::cast::CASTABLE;
use proptest::collection::vec;
use proptest::prelude::*;
use weightfs::model::Dtype;

pub const DTYPES: [Dtype; 22] = [
    Dtype::BOOL,
    Dtype::F4,
    Dtype::F6_E2M3,
    Dtype::F6_E3M2,
    Dtype::U8,
    Dtype::I8,
    Dtype::F8_E5M2,
    Dtype::F8_E4M3,
    Dtype::F8_E8M0,
    Dtype::F8_E4M3FNUZ,
    Dtype::F8_E5M2FNUZ,
    Dtype::I16,
    Dtype::U16,
    Dtype::F16,
    Dtype::BF16,
    Dtype::I32,
    Dtype::U32,
    Dtype::F32,
    Dtype::C64,
    Dtype::F64,
    Dtype::I64,
    Dtype::U64,
];

#[derive(Debug, Clone)]
pub struct Recipe {
    pub shards: Vec<ShardRecipe>,
    /// One shard without an index, or any number with one.
    pub index: bool,
    pub ranks: usize,
    /// Of everything that need not shrink: values, gaps, orders, which memory.
    pub seed: u64,
}

#[derive(Debug, Clone)]
pub struct ShardRecipe {
    /// Bytes of metadata, so that the data starts at any alignment.
    pub padding: usize,
    /// At least one: an index cannot name a shard without.
    pub tensors: Vec<TensorRecipe>,
}

#[derive(Debug, Clone)]
pub struct TensorRecipe {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub keep: Keep,
}

/// How the engine keeps a tensor.
#[derive(Debug, Clone)]
pub enum Keep {
    Absent,
    Opaque,
    /// In the place of the live tensor before it, whose dtype and shape it takes.
    Tied,
    Live {
        /// Cut at (dimension, position), one after the other, each cut through one of the boxes there are.
        cuts: Vec<(usize, usize)>,
        /// Another dtype, where both can be cast.
        dtype: Option<Dtype>,
        /// Dimensions in another order, with gaps.
        strided: bool,
        /// Boxes on more than one rank.
        replicas: bool,
    },
}

pub fn recipes() -> impl Strategy<Value = Recipe> {
    (vec(shard(), 1..4), any::<bool>(), 1usize..4, any::<u64>()).prop_map(|(shards, index, ranks, seed)| {
        let index = index || shards.len() > 1;
        Recipe { shards, index, ranks, seed }
    })
}

fn shard() -> impl Strategy<Value = ShardRecipe> {
    (0usize..40, vec(tensor(), 1..5)).prop_map(|(padding, tensors)| ShardRecipe { padding, tensors })
}

fn tensor() -> impl Strategy<Value = TensorRecipe> {
    // Types that can be cast come more often: they have more ways to be wrong.
    let dtype = prop_oneof![proptest::sample::select(&DTYPES[..]), proptest::sample::select(&CASTABLE[..])];
    (dtype, shape(), keep()).prop_map(|(dtype, mut shape, keep)| {
        // Types smaller than a byte come in whole bytes only.
        if dtype.bitsize() < 8 {
            match shape.last_mut() {
                Some(last) => *last = last.next_multiple_of(4),
                None => shape.push(4),
            }
        }
        TensorRecipe { dtype, shape, keep }
    })
}

fn shape() -> impl Strategy<Value = Vec<usize>> {
    let small = vec(prop_oneof![9 => 1usize..8, 1 => Just(0)], 0..5);
    let long = (vec(1usize..4, 0..2), 500usize..6000, vec(1usize..3, 0..2))
        .prop_map(|(before, long, after)| [before, vec![long], after].concat());
    prop_oneof![3 => small, 1 => long]
}

fn keep() -> impl Strategy<Value = Keep> {
    let cuts = vec((0usize..4, 1usize..5000), 0..5);
    let dtype = proptest::option::weighted(0.5, proptest::sample::select(&CASTABLE[..]));
    let live = (cuts, dtype, any::<bool>(), any::<bool>()).prop_map(|(cuts, dtype, strided, replicas)| Keep::Live {
        cuts,
        dtype,
        strided,
        replicas,
    });
    prop_oneof![1 => Just(Keep::Absent), 1 => Just(Keep::Opaque), 1 => Just(Keep::Tied), 7 => live]
}
