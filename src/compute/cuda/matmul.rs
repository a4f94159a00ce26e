//! Matrix products: a thin layer over cuBLASLt that keeps a plan for every size it meets. Operands are bf16, sums f32.
//!
//! The library's first guess of an algorithm is often not its best: products that are worth it are timed, once, among the
//! few that it thinks best, of which only those are taken that add in the same order as the first one. So what is fastest
//! today decides nothing about results. Sizes that the library refuses go to a plain kernel.

use super::{Gpu, GpuError, Part, Result, Weight, linear, memory};
use crate::compute::cpu::weight::Kind;
use crate::memory::cuda::{Library, load};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::c_void;

/// Scratch of the library: what NVIDIA advises for Hopper.
pub const WORKSPACE: u64 = 32 << 20;
/// Candidates that are timed, and from how many operations (multiply-adds) on.
const CANDIDATES: usize = 16;
const WORTH_TIMING: u64 = 1 << 30;

/// One operand, row-major: rows `stride` elements apart. `turned`: it stands as its transpose.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    pub(super) address: u64,
    pub(super) stride: usize,
    pub(super) turned: bool,
    /// Elements from its address on that are there.
    elements: u64,
}

impl Operand {
    /// A matrix of bf16.
    pub fn new(part: Part, stride: usize) -> Operand {
        Operand { address: part.address, stride, turned: false, elements: part.bytes / 2 }
    }

    /// A weight of bf16 where it lives.
    pub fn weight(w: &Weight) -> Operand {
        assert_eq!(w.kind, Kind::Bf16);
        let elements = (w.rows.saturating_sub(1) * w.stride + w.columns) as u64;
        Operand { address: w.address, stride: w.stride, turned: false, elements }
    }

    pub fn t(self) -> Operand {
        Operand { turned: !self.turned, ..self }
    }

    /// Is all of `rows x columns` (as it stands in the product) there?
    fn check(&self, rows: usize, columns: usize) {
        let (rows, columns) = if self.turned { (columns, rows) } else { (rows, columns) };
        let needs = if rows == 0 { 0 } else { ((rows - 1) * self.stride + columns) as u64 };
        assert!(self.stride >= columns && needs <= self.elements, "{rows} x {columns} by {self:?}");
    }
}

/// Where a product goes: row-major, rows `stride` apart, f32 where `wide`, else bf16; written, or added to.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub part: Part,
    pub stride: usize,
    pub wide: bool,
    pub add: bool,
}

impl Output {
    pub fn bf16(part: Part, stride: usize) -> Output {
        Output { part, stride, wide: false, add: false }
    }

    pub fn f32(part: Part, stride: usize) -> Output {
        Output { part, stride, wide: true, add: false }
    }

    /// `+=` instead of `=`.
    pub fn added(self) -> Output {
        Output { add: true, ..self }
    }
}

/// A checked product.
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Operand,
    pub b: Operand,
    pub out: u64,
    pub stride: usize,
    pub wide: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    strides: [usize; 3],
    turned: [bool; 2],
    wide: bool,
    add: bool,
    alignment: [u8; 3],
}

pub(super) struct Plans {
    handle: sys::cublasLtHandle_t,
    workspace: super::Buffer,
    plans: Mutex<HashMap<Key, Option<Plan>>>,
}

// SAFETY: the handle and the plans are used by whoever holds the `Gpu`, one thread at a time; the library ties neither to
// a thread.
unsafe impl Send for Plans {}
// SAFETY: as above; the map of plans has its lock.
unsafe impl Sync for Plans {}

/// The library's descriptions of one product, and the algorithm chosen.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Not yet timed: the first is the one above.
    candidates: Vec<sys::cublasLtMatmulAlgo_t>,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created by `Plan::new`, destroyed once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for Plans {
    fn drop(&mut self) {
        self.plans.lock().clear();
        // SAFETY: created in `new`, destroyed once, after its plans.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn failed(e: CublasError) -> GpuError {
    GpuError::Library(format!("cuBLASLt failed: {e:?}"))
}

/// The power of two, up to 256, that divides an address.
fn alignment(address: u64) -> u8 {
    address.trailing_zeros().min(8) as u8
}

/// `out (m x n) = a (m x k) b (k x n)`, or `+=`.
pub fn matmul(gpu: &Gpu, out: Output, m: usize, n: usize, k: usize, a: Operand, b: Operand) -> Result<()> {
    a.check(m, k);
    b.check(k, n);
    assert!(out.stride >= n);
    out.part.holds(if m == 0 { 0 } else { (m - 1) * out.stride + n }, if out.wide { 4 } else { 2 });
    if m == 0 || n == 0 {
        return Ok(());
    }
    let p = Product { m, n, k, a, b, out: out.part.address, stride: out.stride, wide: out.wide };
    if k == 0 {
        // The library refuses it; the sum of nothing is zero.
        return linear::matmul_plain(gpu, &p, out.add);
    }
    let key = Key {
        sizes: [m, n, k],
        strides: [a.stride, b.stride, out.stride],
        turned: [a.turned, b.turned],
        wide: out.wide,
        add: out.add,
        alignment: [a.address, b.address, p.out].map(alignment),
    };
    let mut plans = gpu.plans.plans.lock();
    if let std::collections::hash_map::Entry::Vacant(slot) = plans.entry(key) {
        slot.insert(Plan::new(gpu, &p, key.alignment)?);
    }
    match plans.get_mut(&key).expect("it is there now") {
        Some(plan) => {
            plan.choose(gpu, &p)?;
            let what = || (format!("matmul {m} {n} {k}"), 2 * (m * n) as u64 * k as u64);
            gpu.timed(what, || plan.run(gpu, &p, p.out, out.add, &plan.algorithm))
        }
        None => linear::matmul_plain(gpu, &p, out.add),
    }
}

impl Plans {
    pub fn new(memory: &memory::Pool) -> Result<Plans> {
        load(Library::CublasLt)
            .map_err(|why| GpuError::Library(format!("training on the GPU needs cuBLASLt: {why}")))?;
        let handle = result::create_handle().map_err(failed)?;
        memory.extend(WORKSPACE)?;
        Ok(Plans { handle, workspace: memory.take(WORKSPACE, memory::End::Low)?, plans: Mutex::default() })
    }
}

impl Plan {
    /// `None` where the library has no algorithm.
    fn new(gpu: &Gpu, p: &Product, alignment: [u8; 3]) -> Result<Option<Plan>> {
        use sys::cublasLtMatmulDescAttributes_t as Describe;
        use sys::cublasLtMatmulPreferenceAttributes_t as Prefer;
        // Everything turned: the library thinks in columns, so that our row-major c = a b is its c' = b' a'.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F).map_err(failed)?;
        let kind = if p.wide { sys::cudaDataType_t::CUDA_R_32F } else { sys::cudaDataType_t::CUDA_R_16BF };
        let layout = |kind, rows: usize, columns: usize, stride: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64).map_err(failed)
        };
        let sixteen = sys::cudaDataType_t::CUDA_R_16BF;
        let (b0, b1) = if p.b.turned { (p.k, p.n) } else { (p.n, p.k) };
        let (a0, a1) = if p.a.turned { (p.m, p.k) } else { (p.k, p.m) };
        let layouts = [
            layout(sixteen, b0, b1, p.b.stride)?,
            layout(sixteen, a0, a1, p.a.stride)?,
            layout(kind, p.n, p.m, p.stride)?,
        ];
        // SAFETY: numbers in C's layout, which mean nothing until the library has filled them.
        let algorithm = unsafe { std::mem::zeroed() };
        let mut plan = Plan { description, layouts, algorithm, candidates: Vec::new() };
        let preference = result::create_matmul_pref().map_err(failed)?;
        // SAFETY: as above; its state, an enum, is "success" as zero.
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = vec![unsafe { std::mem::zeroed() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: each attribute is given a pointer to a value of its type and that type's size; `found` has room for as
        // many results as are asked for.
        let code = unsafe {
            for (attribute, turned) in [
                (Describe::CUBLASLT_MATMUL_DESC_TRANSA, p.b.turned),
                (Describe::CUBLASLT_MATMUL_DESC_TRANSB, p.a.turned),
            ] {
                let turned = turned as i32; // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
                result::set_matmul_desc_attribute(description, attribute, (&raw const turned).cast(), 4)
                    .map_err(failed)?;
            }
            let workspace = WORKSPACE as usize;
            result::set_matmul_pref_attribute(
                preference,
                Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
            .map_err(failed)?;
            for (attribute, power) in [
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment[1]),
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment[0]),
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment[2]),
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment[2]),
            ] {
                let bytes = 1u32 << power;
                result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), 4)
                    .map_err(failed)?;
            }
            let [a, b, c] = plan.layouts;
            let code = sys::cublasLtMatmulAlgoGetHeuristic(
                gpu.plans.handle,
                description,
                a,
                b,
                c,
                c,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            );
            let _ = result::destroy_matmul_pref(preference);
            code
        };
        found.truncate(if code == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS { count as usize } else { 0 });
        found.retain(|f| f.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && f.workspaceSize as u64 <= WORKSPACE);
        let Some(first) = found.first() else { return Ok(None) };
        plan.algorithm = first.algo;
        if found.len() > 1 && (p.m * p.n) as u64 * p.k as u64 >= WORTH_TIMING {
            plan.candidates = found.iter().map(|f| f.algo).collect();
        }
        Ok(Some(plan))
    }

    /// Times the candidates on the operands themselves, where there is memory for two more results beside this one; without,
    /// the next such product does.
    fn choose(&mut self, gpu: &Gpu, p: &Product) -> Result<()> {
        if self.candidates.is_empty() {
            return Ok(());
        }
        let bytes = p.m * p.stride * if p.wide { 4 } else { 2 };
        let whole = bytes.next_multiple_of(4) as u64;
        let scratch = [gpu.spare(whole), gpu.spare(whole), gpu.spare(4)];
        let [Some(first), Some(other), Some(differ)] = scratch else { return Ok(()) };
        gpu.clear(first.part())?;
        gpu.clear(other.part())?;
        let mut best = f32::INFINITY;
        for (i, candidate) in std::mem::take(&mut self.candidates).into_iter().enumerate() {
            let to = if i == 0 { &first } else { &other };
            // The first run loads the kernel. What it does not write, between rows, is zero in both.
            self.run(gpu, p, to.part().address, false, &candidate)?;
            if i > 0 {
                gpu.clear(differ.part())?;
                linear::compare(gpu, first.part(), other.part(), whole as usize, differ.part())?;
                if gpu.download::<i32>(differ.part(), 1)?[0] != 0 {
                    continue;
                }
            }
            let start = gpu.mark()?;
            for _ in 0..3 {
                self.run(gpu, p, to.part().address, false, &candidate)?;
            }
            let end = gpu.mark()?;
            let time = gpu.noted(start.elapsed_ms(&end), "time a product")?;
            if time < best {
                (best, self.algorithm) = (time, candidate);
            }
        }
        Ok(())
    }

    fn run(&self, gpu: &Gpu, p: &Product, out: u64, add: bool, algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<()> {
        let (one, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let [a, b, c] = self.layouts;
        gpu.device.bind()?;
        // SAFETY: the operands were checked against their sizes in `matmul`, `out` is the product's own or scratch of its
        // size, and the workspace belongs to this stream alone.
        let done = unsafe {
            result::matmul(
                gpu.plans.handle,
                self.description,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                p.b.address as *const c_void,
                a,
                p.a.address as *const c_void,
                b,
                out as *const c_void,
                c,
                out as *mut c_void,
                c,
                algorithm,
                gpu.plans.workspace.part().address as *mut c_void,
                WORKSPACE as usize,
                gpu.stream.cu_stream() as sys::cudaStream_t,
            )
        };
        done.map_err(failed)
    }
}
