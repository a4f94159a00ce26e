//! How Hopper's copy engine (TMA) finds tiles of a matrix: descriptions that the driver makes and a kernel takes as an
//! argument ("Tensor Map Object Management" in the driver's documentation).

use super::{Gpu, Result};
use cudarc::driver::DeviceRepr;
use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

/// Rows and columns of a box: 128 bytes a row, which is what the swizzle of the products' operands goes by.
const BOX: u32 = 64;

/// Rows of `heads` heads of `head_dim` elements side by side, in bf16, rows `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub address: u64,
    pub rows: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub stride: usize,
}

/// One kernel's maps, as its struct of as many in a row.
#[repr(C, align(128))]
#[derive(Debug, Clone, Copy)]
pub struct Maps<const N: usize>([CUtensorMap; N]);

// SAFETY: plain numbers in C's layout; a kernel takes them as an argument aligned to 64 bytes.
unsafe impl<const N: usize> DeviceRepr for Maps<N> {}

impl<const N: usize> Maps<N> {
    /// Boxes of 64 columns of one head and 64 rows, at any column, head and row; what lies outside reads as zero. The address
    /// and the rows' distance in bytes are multiples of 16.
    pub fn new(gpu: &Gpu, of: [Heads; N]) -> Result<Maps<N>> {
        Maps::of_rows(gpu, of.map(|x| (x, BOX as usize)))
    }

    /// The same with boxes of so many rows each, 256 at most.
    pub fn of_rows(gpu: &Gpu, of: [(Heads, usize); N]) -> Result<Maps<N>> {
        let mut maps = Maps([CUtensorMap { opaque: [0; 16] }; N]);
        for (map, (x, rows)) in maps.0.iter_mut().zip(of) {
            let sizes = [x.head_dim as u64, x.heads as u64, x.rows as u64];
            let strides = [2 * x.head_dim as u64, 2 * x.stride as u64];
            let (shape, steps) = ([BOX, 1, rows as u32], [1; 3]);
            // SAFETY: the map and the arrays are there and as long as three dimensions want; the driver reads no matrix here,
            // and the copy engine stays inside the sizes.
            let code = unsafe {
                cuTensorMapEncodeTiled(
                    map,
                    CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    3,
                    x.address as *mut _,
                    sizes.as_ptr(),
                    strides.as_ptr(),
                    shape.as_ptr(),
                    steps.as_ptr(),
                    CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                    CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            };
            gpu.noted(code.result(), "describe a matrix to the copy engine")?;
        }
        Ok(maps)
    }
}
