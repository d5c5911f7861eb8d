//! Matrix products by cuBLASLt: `c = epilogue(alpha · op(a) · op(b) + beta · c)`, one or a batch of them.
//!
//! # Rows and columns
//!
//! Matrices here are row-major, as everywhere in the host: element (i, j) of a matrix is at `i * leading + j`. cuBLASLt
//! thinks in columns, and reads the same memory as the transposed matrix. So it is asked for `cᵀ = op(b)ᵀ · op(a)ᵀ`: the
//! operands change places, rows become columns, and whether an operand is transposed stays as it is. A bias is added to
//! every row: it has a number for each of the n columns, as a linear layer's bias.
//!
//! # The same bits
//!
//! A plan gives the same bits at each run on the same GPU with the same library. Another candidate of the heuristic may sum
//! in another order, so a choice that was measured ([`Blas::fastest`]) must be kept where runs are to be repeated. Sums, also
//! those of a product that is split along k, are f32.

mod ffi;

use crate::device::{Context, Device, Event, Queue, lock};
use crate::driver::Handle;
use crate::element::{Compute, Element};
use crate::error::CudaError;
use ffi::{Functions, HeuristicResult, Object};
use std::any::Any;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, Weak};

/// So many candidates are asked of the heuristic.
const CANDIDATES: usize = 16;
/// Bias and auxiliary matrix are at multiples of this.
const EPILOGUE_ALIGNMENT: usize = 16;
/// A measurement runs each candidate so often, and takes the mean.
const MEASURED_RUNS: usize = 10;

/// A matrix in device memory, or a batch of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    /// The type of its numbers.
    pub element: Element,
    /// Whether memory holds the transposed matrix: a is m × k, so memory holds k rows of m.
    pub transposed: bool,
    /// Elements from one row in memory to the next.
    pub leading: usize,
    /// Elements from one matrix of a batch to the next; 0 for an operand that all products share.
    pub batch_stride: usize,
}

impl Matrix {
    /// A matrix that is not transposed, of no batch.
    pub fn new(element: Element, leading: usize) -> Matrix {
        Matrix { element, transposed: false, leading, batch_stride: 0 }
    }
}

/// What is done to a product before it is stored. Bias and auxiliary matrix are of c's type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    #[default]
    None,
    /// A bias of n numbers is added to every row.
    Bias,
    /// GELU in its tanh approximation, which is the only one that cuBLASLt has.
    GeluTanh,
    /// Bias, then [`Epilogue::GeluTanh`].
    BiasGeluTanh,
    /// [`Epilogue::BiasGeluTanh`], and what goes into the GELU is stored in the auxiliary matrix, whose rows are `leading`
    /// elements apart (a multiple of 8).
    BiasGeluTanhKept {
        /// Elements from one row of the auxiliary matrix to the next.
        leading: usize,
    },
    /// The product times the GELU's derivative at the auxiliary matrix.
    GeluTanhGradient {
        /// Elements from one row of the auxiliary matrix to the next.
        leading: usize,
    },
    /// [`Epilogue::GeluTanhGradient`], and its sums over the rows go where the bias is: n numbers.
    GeluTanhGradientBiasGradient {
        /// Elements from one row of the auxiliary matrix to the next.
        leading: usize,
    },
}

impl Epilogue {
    fn code(self) -> u32 {
        match self {
            Epilogue::None => ffi::EPILOGUE_DEFAULT,
            Epilogue::Bias => ffi::EPILOGUE_BIAS,
            Epilogue::GeluTanh => ffi::EPILOGUE_GELU,
            Epilogue::BiasGeluTanh => ffi::EPILOGUE_GELU | ffi::EPILOGUE_BIAS,
            Epilogue::BiasGeluTanhKept { .. } => ffi::EPILOGUE_GELU | ffi::EPILOGUE_BIAS | ffi::EPILOGUE_AUX,
            Epilogue::GeluTanhGradient { .. } => ffi::EPILOGUE_DGELU,
            Epilogue::GeluTanhGradientBiasGradient { .. } => ffi::EPILOGUE_DGELU_BGRAD,
        }
    }

    fn has_bias(self) -> bool {
        !matches!(self, Epilogue::None | Epilogue::GeluTanh | Epilogue::GeluTanhGradient { .. })
    }

    /// How far apart the auxiliary matrix's rows are, if there is one.
    fn auxiliary(self) -> Option<usize> {
        match self {
            Epilogue::BiasGeluTanhKept { leading }
            | Epilogue::GeluTanhGradient { leading }
            | Epilogue::GeluTanhGradientBiasGradient { leading } => Some(leading),
            _ => None,
        }
    }
}

/// A product, or a batch of them: `c = epilogue(alpha · op(a) · op(b) + beta · c)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gemm {
    /// Rows of op(a) and c.
    pub m: usize,
    /// Columns of op(b) and c.
    pub n: usize,
    /// Columns of op(a), rows of op(b).
    pub k: usize,
    /// m × k.
    pub a: Matrix,
    /// k × n.
    pub b: Matrix,
    /// m × n, not transposed.
    pub c: Matrix,
    /// How many products; with more than 1 there are no auxiliary matrix and no bias.
    pub batch: usize,
    /// How products of f32 are formed.
    pub compute: Compute,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what c held before; with 0 it is not read.
    pub beta: f32,
    /// What is done before storing.
    pub epilogue: Epilogue,
    /// A power of two that divides all addresses, in bytes. 16 allows the fast algorithms; 256 is that of an allocation.
    pub alignment: usize,
}

/// Where a product's matrices are: addresses in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operands {
    /// The left operand.
    pub a: u64,
    /// The right operand.
    pub b: u64,
    /// The result.
    pub c: u64,
    /// The bias, or where its gradient goes, at a multiple of 16; for an epilogue that has one.
    pub bias: u64,
    /// The auxiliary matrix, at a multiple of 16; for an epilogue that has one.
    pub auxiliary: u64,
    /// As many bytes as [`GemmPlan::workspace_bytes`] says, at a multiple of 256; for no other use at the same time.
    pub workspace: u64,
}

/// The elements that a matrix spans in memory, from its first to its last.
fn span(matrix: &Matrix, rows: usize, columns: usize, batch: usize) -> Option<usize> {
    let last_row = rows.checked_sub(1)?.checked_mul(matrix.leading)?;
    let last_matrix = batch.checked_sub(1)?.checked_mul(matrix.batch_stride)?;
    last_row.checked_add(last_matrix)?.checked_add(columns)
}

impl Gemm {
    /// One product of matrices without gaps: f32 sums, nothing added, nothing done after.
    pub fn dense(m: usize, n: usize, k: usize, operands: Element, result: Element) -> Gemm {
        Gemm {
            m,
            n,
            k,
            a: Matrix::new(operands, k),
            b: Matrix::new(operands, n),
            c: Matrix::new(result, n),
            batch: 1,
            compute: Compute::F32,
            alpha: 1.0,
            beta: 0.0,
            epilogue: Epilogue::None,
            alignment: 16,
        }
    }

    /// Rows and columns in memory of a, b and c.
    fn shapes(&self) -> [(&'static str, &Matrix, usize, usize); 3] {
        let stored = |matrix: &Matrix, rows, columns| if matrix.transposed { (columns, rows) } else { (rows, columns) };
        let (a, b) = (stored(&self.a, self.m, self.k), stored(&self.b, self.k, self.n));
        [("a", &self.a, a.0, a.1), ("b", &self.b, b.0, b.1), ("c", &self.c, self.m, self.n)]
    }

    /// Refuses what makes no sense, so that the library is asked for products only that memory can hold.
    fn check(&self) -> Result<(), CudaError> {
        let refuse = |expected: String, got: String| {
            let hint = "this is a defect of what planned the product";
            Err(CudaError::Argument { what: format!("plan a product ({self:?})"), expected, got, hint })
        };
        if self.m == 0 || self.n == 0 || self.k == 0 || self.batch == 0 {
            return refuse("m, n, k and batch of at least 1".into(), "a zero".into());
        }
        if i32::try_from(self.batch).is_err() {
            return refuse(format!("a batch of at most {}", i32::MAX), format!("{}", self.batch));
        }
        if self.a.element != self.b.element {
            return refuse("a and b of one type".into(), format!("{:?} and {:?}", self.a.element, self.b.element));
        }
        if self.c.transposed {
            return refuse("a result that is not transposed".into(), "a transposed one".into());
        }
        for (name, matrix, rows, columns) in self.shapes() {
            if matrix.leading < columns || span(matrix, rows, columns, self.batch).is_none() {
                return refuse(format!("rows of {name} at least {columns} apart"), format!("{}", matrix.leading));
            }
        }
        if self.batch > 1 && self.c.batch_stride < span(&self.c, self.m, self.n, 1).unwrap_or(usize::MAX) {
            return refuse("results that do not overlap".into(), format!("{} apart", self.c.batch_stride));
        }
        if self.batch > 1 && (self.epilogue.has_bias() || self.epilogue.auxiliary().is_some()) {
            return refuse("no bias and no auxiliary matrix in a batch".into(), format!("{:?}", self.epilogue));
        }
        if let Some(leading) =
            self.epilogue.auxiliary().filter(|leading| *leading < self.n || !leading.is_multiple_of(8))
        {
            let expected = format!("rows of the auxiliary matrix at least {} apart, and a multiple of 8", self.n);
            return refuse(expected, format!("{leading}"));
        }
        let widest = self.a.element.bytes().max(self.c.element.bytes());
        if !self.alignment.is_power_of_two() || self.alignment < widest {
            return refuse(
                format!("an alignment that is a power of two of at least {widest}"),
                format!("{}", self.alignment),
            );
        }
        Ok(())
    }
}

/// cuBLASLt on one device.
#[derive(Clone)]
pub struct Blas {
    device: Device,
    opened: Arc<Opened>,
}

struct Opened {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: a cuBLASLt handle may be used from any thread.
unsafe impl Send for Opened {}
// SAFETY: and from several at once.
unsafe impl Sync for Opened {}

impl Drop for Opened {
    fn drop(&mut self) {
        if let (Ok(_), Ok(lib)) = (self.context.bind(), Functions::get()) {
            // SAFETY: the handle was made by this value, and its context is current.
            unsafe { (lib.cublasLtDestroy)(self.handle) };
        }
    }
}

impl fmt::Debug for Blas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blas({:?})", self.device)
    }
}

impl Blas {
    /// Loads cuBLASLt and opens it on the device.
    pub fn open(device: &Device) -> Result<Blas, CudaError> {
        let lib = Functions::get()?;
        device.context.outside_capture("open cuBLASLt")?;
        device.context.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the device's context is current, the pointer is to a local.
        let status = unsafe { (lib.cublasLtCreate)(&mut handle) };
        lib.check(status, || "open cuBLASLt".into())?;
        let opened = Arc::new(Opened { context: device.context.clone(), handle });
        let weak: Weak<dyn Any + Send + Sync> = Arc::downgrade(&opened) as Weak<dyn Any + Send + Sync>;
        device.context.register(weak);
        Ok(Blas { device: device.clone(), opened })
    }

    /// cuBLASLt's version: 130100 is 13.1.0 (in CUDA 12 and before: 120100).
    pub fn version() -> Result<usize, CudaError> {
        // SAFETY: it takes nothing and may be called at any time.
        Ok(unsafe { (Functions::get()?.cublasLtGetVersion)() })
    }

    /// Plans a product: `choice` is a number among the heuristic's candidates, 0 being what it thinks best.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if the product makes no sense or there is no such candidate; [`CudaError::Call`] if cuBLASLt
    /// has no algorithm for it within the workspace.
    pub fn plan(&self, gemm: &Gemm, workspace_bytes: usize, choice: usize) -> Result<GemmPlan, CudaError> {
        let descriptions = Descriptions::new(gemm)?;
        let candidates = self.candidates(gemm, &descriptions, workspace_bytes)?;
        let Some(chosen) = candidates.get(choice) else {
            return Err(no_candidate(gemm, choice, candidates.len()));
        };
        Ok(GemmPlan {
            blas: self.clone(),
            gemm: *gemm,
            descriptions: Mutex::new(descriptions),
            chosen: *chosen,
            choice,
        })
    }

    /// The choice, of the heuristic's candidates, that takes the least time on these operands, whose contents are lost. The
    /// workspace must have `workspace_bytes`. Bits depend on the choice: see the module's documentation.
    pub fn fastest(&self, gemm: &Gemm, workspace_bytes: usize, operands: &Operands) -> Result<usize, CudaError> {
        self.device.context.outside_capture("measure products")?;
        let count = self.candidates(gemm, &Descriptions::new(gemm)?, workspace_bytes)?.len();
        let mut fastest = Err(no_candidate(gemm, 0, 0));
        let mut least = f32::INFINITY;
        for choice in 0..count {
            let plan = self.plan(gemm, workspace_bytes, choice)?;
            // The first run loads the candidate's kernels. One that fails is none.
            let run = || plan.run(operands, Queue::Compute);
            match run().and_then(|()| measure(&self.device, MEASURED_RUNS, run)) {
                Ok(milliseconds) if milliseconds < least => (least, fastest) = (milliseconds, Ok(choice)),
                Err(error) if fastest.is_err() => fastest = Err(error),
                _ => {}
            }
        }
        fastest
    }

    fn candidates(
        &self,
        gemm: &Gemm,
        descriptions: &Descriptions,
        workspace_bytes: usize,
    ) -> Result<Vec<HeuristicResult>, CudaError> {
        let lib = Functions::get()?;
        self.device.context.bind()?;
        let mut preference = Object::preference()?;
        preference.set(ffi::PREFERENCE_MAX_WORKSPACE_BYTES, workspace_bytes as u64)?;
        // Sums are f32, also where k is split: partial sums in a 16-bit result are left out.
        let reductions = match gemm.c.element {
            Element::F32 => ffi::REDUCTION_INPLACE | ffi::REDUCTION_COMPUTE_TYPE | ffi::REDUCTION_OUTPUT_TYPE,
            Element::F16 | Element::Bf16 => ffi::REDUCTION_COMPUTE_TYPE,
        };
        preference.set(ffi::PREFERENCE_REDUCTION_SCHEME_MASK, reductions)?;
        for operand in 0..4 {
            preference.set(ffi::PREFERENCE_MIN_ALIGNMENT_A_BYTES + operand, gemm.alignment.min(256) as u32)?;
        }
        let empty = HeuristicResult {
            algorithm: ffi::Algorithm { data: [0; 8] },
            workspace_bytes: 0,
            state: ffi::SUCCESS,
            waves: 0.0,
            reserved: [0; 4],
        };
        let mut results = vec![empty; CANDIDATES];
        let mut found: c_int = 0;
        // SAFETY: handle and descriptions are alive, the context is current, and there is room for as many results.
        let status = unsafe {
            (lib.cublasLtMatmulAlgoGetHeuristic)(
                self.opened.handle,
                descriptions.product.handle,
                descriptions.b.handle,
                descriptions.a.handle,
                descriptions.c.handle,
                descriptions.c.handle,
                preference.handle,
                CANDIDATES as c_int,
                results.as_mut_ptr(),
                &mut found,
            )
        };
        lib.check(status, || format!("find an algorithm for a product ({gemm:?})"))?;
        results.truncate(found.max(0) as usize);
        results.retain(|result| result.state == ffi::SUCCESS && result.workspace_bytes <= workspace_bytes);
        Ok(results)
    }
}

fn no_candidate(gemm: &Gemm, choice: usize, count: usize) -> CudaError {
    CudaError::Argument {
        what: format!("plan a product ({gemm:?})"),
        expected: format!("one of cuBLASLt's {count} candidates"),
        got: format!("number {choice}"),
        hint: "a choice is good for the GPU and library that it was measured with; more workspace may allow more candidates",
    }
}

/// The mean milliseconds of `run` on the compute queue.
pub(crate) fn measure(device: &Device, runs: usize, run: impl Fn() -> Result<(), CudaError>) -> Result<f32, CudaError> {
    let (begin, end): (Event, Event) = (device.event()?, device.event()?);
    device.record(&begin, Queue::Compute)?;
    for _ in 0..runs {
        run()?;
    }
    device.record(&end, Queue::Compute)?;
    Ok(Event::milliseconds_between(&begin, &end)? / runs as f32)
}

/// A product as cuBLASLt is told of it. No device is needed for it.
struct Descriptions {
    product: Object,
    a: Object,
    b: Object,
    c: Object,
}

impl Descriptions {
    fn new(gemm: &Gemm) -> Result<Descriptions, CudaError> {
        gemm.check()?;
        let mut product = Object::product(match gemm.compute {
            Compute::F32 => ffi::COMPUTE_32F,
            Compute::Tf32 => ffi::COMPUTE_32F_FAST_TF32,
        })?;
        // Our b is cuBLASLt's A, and our a its B.
        for (attribute, matrix) in [(ffi::DESC_TRANSA, &gemm.b), (ffi::DESC_TRANSB, &gemm.a)] {
            if matrix.transposed {
                product.set(attribute, ffi::OP_T)?;
            }
        }
        product.set(ffi::DESC_EPILOGUE, gemm.epilogue.code())?;
        // The heuristic looks at how the addresses are aligned; the true ones come with each run.
        if gemm.epilogue.has_bias() {
            product.set(ffi::DESC_BIAS_POINTER, EPILOGUE_ALIGNMENT as u64)?;
        }
        if let Some(leading) = gemm.epilogue.auxiliary() {
            product.set(ffi::DESC_EPILOGUE_AUX_LD, leading as i64)?;
            product.set(ffi::DESC_EPILOGUE_AUX_POINTER, EPILOGUE_ALIGNMENT as u64)?;
        }
        let layout = |(_, matrix, rows, columns): (&str, &Matrix, usize, usize)| {
            let element = match matrix.element {
                Element::F32 => ffi::R_32F,
                Element::F16 => ffi::R_16F,
                Element::Bf16 => ffi::R_16BF,
            };
            // A row here is a column there.
            let mut layout = Object::layout(element, columns, rows, matrix.leading)?;
            layout.set(ffi::LAYOUT_BATCH_COUNT, gemm.batch as i32)?;
            layout.set(ffi::LAYOUT_STRIDED_BATCH_OFFSET, matrix.batch_stride as i64)?;
            Ok::<Object, CudaError>(layout)
        };
        let [a, b, c] = gemm.shapes();
        Ok(Descriptions { product, a: layout(a)?, b: layout(b)?, c: layout(c)? })
    }
}

/// A product with its algorithm, ready to run any number of times.
pub struct GemmPlan {
    blas: Blas,
    gemm: Gemm,
    descriptions: Mutex<Descriptions>,
    chosen: HeuristicResult,
    choice: usize,
}

impl fmt::Debug for GemmPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GemmPlan").field("gemm", &self.gemm).field("choice", &self.choice).finish_non_exhaustive()
    }
}

impl GemmPlan {
    /// Bytes of workspace that a run needs.
    pub fn workspace_bytes(&self) -> usize {
        self.chosen.workspace_bytes
    }

    /// The number of the candidate that was taken.
    pub fn choice(&self) -> usize {
        self.choice
    }

    /// Puts the product into a queue. It can be captured.
    ///
    /// # Errors
    /// [`CudaError::Range`] where a matrix does not lie in device memory, [`CudaError::Argument`] for an address that is not
    /// aligned as was said.
    pub fn run(&self, operands: &Operands, queue: Queue) -> Result<(), CudaError> {
        let gemm = &self.gemm;
        self.check(operands)?;
        let lib = Functions::get()?;
        let context = &self.blas.device.context;
        context.bind()?;
        let pointer = |address: u64| ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        let mut descriptions = lock(&self.descriptions);
        if gemm.epilogue.has_bias() {
            descriptions.product.set(ffi::DESC_BIAS_POINTER, operands.bias)?;
        }
        if gemm.epilogue.auxiliary().is_some() {
            descriptions.product.set(ffi::DESC_EPILOGUE_AUX_POINTER, operands.auxiliary)?;
        }
        // SAFETY: handle and descriptions are alive, the context is current, and everything that the product reads or writes
        // was found to lie in allocated device memory.
        let status = unsafe {
            (lib.cublasLtMatmul)(
                self.blas.opened.handle,
                descriptions.product.handle,
                ptr::from_ref(&gemm.alpha).cast::<c_void>(),
                pointer(operands.b),
                descriptions.b.handle,
                pointer(operands.a),
                descriptions.a.handle,
                ptr::from_ref(&gemm.beta).cast::<c_void>(),
                pointer(operands.c),
                descriptions.c.handle,
                pointer(operands.c),
                descriptions.c.handle,
                &self.chosen.algorithm,
                pointer(if self.chosen.workspace_bytes == 0 { 0 } else { operands.workspace }),
                self.chosen.workspace_bytes,
                context.stream(queue),
            )
        };
        lib.check(status, || format!("run a product ({gemm:?})"))
    }

    fn check(&self, operands: &Operands) -> Result<(), CudaError> {
        let gemm = &self.gemm;
        let context = &self.blas.device.context;
        let in_memory = |name: &str, address: u64, bytes: usize, alignment: usize| {
            if !address.is_multiple_of(alignment as u64) {
                return Err(CudaError::Argument {
                    what: "run a product".into(),
                    expected: format!("{name} at a multiple of {alignment}"),
                    got: format!("{address:#x}"),
                    hint: "say in the plan how the matrices are aligned",
                });
            }
            context.in_range(address, bytes, || format!("run a product with {name}"))
        };
        for ((name, matrix, rows, columns), address) in
            gemm.shapes().into_iter().zip([operands.a, operands.b, operands.c])
        {
            let elements = span(matrix, rows, columns, gemm.batch).unwrap_or(usize::MAX);
            in_memory(name, address, elements.saturating_mul(matrix.element.bytes()), gemm.alignment)?;
        }
        let element = gemm.c.element.bytes();
        if gemm.epilogue.has_bias() {
            in_memory("the bias", operands.bias, gemm.n * element, EPILOGUE_ALIGNMENT)?;
        }
        if let Some(leading) = gemm.epilogue.auxiliary() {
            let bytes = ((gemm.m - 1) * leading + gemm.n) * element;
            in_memory("the auxiliary matrix", operands.auxiliary, bytes, EPILOGUE_ALIGNMENT)?;
        }
        match self.chosen.workspace_bytes {
            0 => Ok(()),
            bytes => in_memory("the workspace", operands.workspace, bytes, 256),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every function is found and every description can be made: the library checks attributes and their lengths. No
    /// device is needed for that.
    #[test]
    fn every_product_can_be_described() {
        match Blas::version() {
            Ok(version) => println!("cuBLASLt {version}"),
            Err(error) => {
                println!("every_product_can_be_described: SKIPPED: {error}");
                assert!(matches!(error, CudaError::Library { .. }), "{error}");
                return;
            }
        }
        let epilogues = [
            Epilogue::None,
            Epilogue::Bias,
            Epilogue::GeluTanh,
            Epilogue::BiasGeluTanh,
            Epilogue::BiasGeluTanhKept { leading: 24 },
            Epilogue::GeluTanhGradient { leading: 24 },
            Epilogue::GeluTanhGradientBiasGradient { leading: 24 },
        ];
        for (element, compute, epilogue) in [Element::F32, Element::F16, Element::Bf16]
            .into_iter()
            .flat_map(|element| [Compute::F32, Compute::Tf32].map(|compute| (element, compute)))
            .flat_map(|(element, compute)| epilogues.map(|epilogue| (element, compute, epilogue)))
        {
            let mut gemm = Gemm { compute, epilogue, ..Gemm::dense(16, 24, 32, element, Element::F32) };
            gemm.a = Matrix { transposed: true, leading: 16, ..gemm.a };
            let mut descriptions = Descriptions::new(&gemm).unwrap();
            descriptions.product.set(ffi::DESC_BIAS_POINTER, 256_u64).unwrap();
            descriptions.product.set(ffi::DESC_EPILOGUE_AUX_POINTER, 256_u64).unwrap();
        }
        // The library would not take an attribute of another length.
        let mut product = Object::product(ffi::COMPUTE_32F).unwrap();
        let error = product.set(ffi::DESC_EPILOGUE, 1_u64).unwrap_err();
        assert!(matches!(&error, CudaError::Call { name, .. } if name == "CUBLAS_STATUS_INVALID_VALUE"), "{error}");
        let mut preference = Object::preference().unwrap();
        preference.set(ffi::PREFERENCE_MAX_WORKSPACE_BYTES, 1_u64 << 20).unwrap();
        preference.set(ffi::PREFERENCE_REDUCTION_SCHEME_MASK, ffi::REDUCTION_COMPUTE_TYPE).unwrap();
        preference.set(ffi::PREFERENCE_MIN_ALIGNMENT_A_BYTES + 3, 16_u32).unwrap();
    }

    #[test]
    fn senseless_products_are_refused() {
        let good = Gemm::dense(16, 24, 32, Element::Bf16, Element::F32);
        good.check().unwrap();
        let bias = Epilogue::Bias;
        for (bad, expected) in [
            (Gemm { k: 0, ..good }, "at least 1"),
            (Gemm { a: Matrix { leading: 31, ..good.a }, ..good }, "rows of a at least 32 apart"),
            (Gemm { b: Matrix { transposed: true, leading: 24, ..good.b }, ..good }, "rows of b at least 32 apart"),
            (Gemm { b: Matrix { element: Element::F32, ..good.b }, ..good }, "a and b of one type"),
            (Gemm { c: Matrix { transposed: true, ..good.c }, ..good }, "not transposed"),
            (Gemm { batch: 2, ..good }, "do not overlap"),
            (Gemm { batch: 2, c: Matrix { batch_stride: 384, ..good.c }, epilogue: bias, ..good }, "no bias"),
            (Gemm { epilogue: Epilogue::GeluTanhGradient { leading: 25 }, ..good }, "multiple of 8"),
            (Gemm { alignment: 2, ..good }, "at least 4"),
            (Gemm { m: usize::MAX, ..good }, "rows of a"),
        ] {
            let error = bad.check().unwrap_err().to_string();
            assert!(error.contains(expected), "expected {expected:?} in {error:?}");
        }
    }

    #[test]
    fn spans_reach_from_the_first_to_the_last_element() {
        let matrix = Matrix { batch_stride: 1000, ..Matrix::new(Element::F32, 10) };
        assert_eq!(span(&matrix, 3, 7, 4), Some(3000 + 20 + 7));
        assert_eq!(span(&matrix, 1, 7, 1), Some(7));
    }
}
