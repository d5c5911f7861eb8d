//! What the vendor's libraries take over from rendered kernels, where a machine has them: products.
//!
//! They ask for more than the plan does: both operands of one type, a unit stride in each, one stride along the batch. What
//! does not fit is first copied to scratch, in the form that does.

use crate::launch::{Access, Address, Argument, Block, Product, Work};
use crate::render::Draft;
use crate::render::own::{self, Source, Target};
use clip_host_compiler::kernel::{Element, Operand};
use clip_host_cuda_driver::{Compute, Element as LibraryElement, blas};

/// What a library made ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The machine's number for it.
    pub number: usize,
    /// Bytes that it needs besides its operands, at a multiple of 256.
    pub workspace: usize,
}

/// The vendor's libraries, as far as a machine has them.
pub trait Libraries {
    /// Makes a product ready; `None` if there is no library, or it does not know such a product.
    fn product(&self, gemm: &blas::Gemm) -> Option<Ready>;
}

/// No libraries: every kernel is rendered.
#[derive(Clone, Copy, Debug)]
pub struct Rendered;

impl Libraries for Rendered {
    fn product(&self, _: &blas::Gemm) -> Option<Ready> {
        None
    }
}

/// Work before functions have numbers.
#[derive(Debug)]
pub enum Item {
    Draft(Draft),
    Work(Work),
}

/// Scratch that is handed out from its start.
#[derive(Default)]
struct Scratch {
    used: usize,
}

impl Scratch {
    fn take(&mut self, bytes: usize) -> Address {
        let at = Address { block: Block::Scratch, offset: self.used };
        self.used += bytes.next_multiple_of(256);
        at
    }
}

fn library_element(element: Element) -> Option<LibraryElement> {
    match element {
        Element::F32 => Some(LibraryElement::F32),
        Element::Bf16 => Some(LibraryElement::Bf16),
        Element::I32 => None,
    }
}

/// The widest access that all addresses allow, up to 256 bytes.
fn alignment(addresses: &[Address]) -> usize {
    addresses.iter().map(|a| 1 << a.offset.trailing_zeros().min(8)).min().unwrap_or(256)
}

/// How a matrix of a batch lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Form {
    transposed: bool,
    leading: usize,
    batch_stride: usize,
}

/// The form of `[.., rows, cols]`, if a library can read it. Dimensions of size 1 have no stride of their own.
fn form(dims: &[(usize, usize)]) -> Option<Form> {
    let (lead, last) = dims.split_at(dims.len() - 2);
    let [(rows, row_stride), (cols, col_stride)] = [last[0], last[1]];
    let (row_stride, col_stride) = match (rows, cols) {
        (1, 1) => (1, 1),
        (1, _) if col_stride == 1 => (cols, 1),
        (1, _) => (1, col_stride),
        (_, 1) if row_stride == 1 => (1, rows),
        (_, 1) => (row_stride, 1),
        _ => (row_stride, col_stride),
    };
    let (transposed, leading) = match () {
        _ if col_stride == 1 && row_stride >= cols => (false, row_stride),
        _ if row_stride == 1 && col_stride >= rows => (true, col_stride),
        _ => return None,
    };
    Some(Form { transposed, leading, batch_stride: batch_stride(lead)? })
}

/// The one stride that all leading dimensions are walked with.
fn batch_stride(lead: &[(usize, usize)]) -> Option<usize> {
    let mut walked: Option<(usize, usize)> = None;
    for &(size, stride) in lead.iter().rev().filter(|d| d.0 != 1) {
        walked = match walked {
            None => Some((size, stride)),
            Some((inner, step)) if stride == inner * step => Some((inner * size, step)),
            Some(_) => return None,
        };
    }
    Some(walked.map_or(0, |w| w.1))
}

/// An operand as a library takes it: where it is, or where it is copied to.
struct Prepared {
    at: Address,
    form: Form,
    /// What the product reads.
    argument: Argument,
    copy: Option<Draft>,
}

fn prepare(source: &Source, element: Element, scratch: &mut Scratch) -> Prepared {
    let reads = |at, bytes, node| Argument { at, bytes, access: Access::Read, align: element.bytes(), node };
    if source.element == element
        && let Some(form) = form(&source.view.dims)
    {
        let argument = reads(source.at, source.reach() * element.bytes(), source.node);
        return Prepared { at: source.at, form, argument, copy: None };
    }
    let bytes = source.elements() * element.bytes();
    let at = scratch.take(bytes);
    let dims = source.view.dims.len();
    let [rows, cols] = [source.view.dims[dims - 2].0, source.view.dims[dims - 1].0];
    // A transposed operand stays so: neighbours are read and written together.
    let transposed = source.view.dims[dims - 1].1 != 1 && source.view.dims[dims - 2].1 == 1;
    let mut order = source.view.dims.clone();
    if transposed {
        order.swap(dims - 2, dims - 1);
    }
    let view = Operand { dims: order, ..source.view.clone() };
    let from = Source { view: &view, at: source.at, element: source.element, node: source.node };
    let copy = own::copy(&from, Target { at, element, node: None });
    let leading = if transposed { rows } else { cols };
    let form = Form { transposed, leading, batch_stride: rows * cols };
    Prepared { at, form, argument: reads(at, bytes, None), copy: Some(copy) }
}

/// A batched product by the library, if it takes it.
pub fn matmul(libraries: &dyn Libraries, a: &Source, b: &Source, to: Target) -> Option<Vec<Item>> {
    let rank = a.view.dims.len();
    let (m, k, n) = (a.view.dims[rank - 2].0, a.view.dims[rank - 1].0, b.view.dims[rank - 1].0);
    let batch: usize = a.view.dims[..rank - 2].iter().map(|d| d.0).product();
    // As on the CPU: a product with a rounded operand rounds the other one.
    let element = match (a.element, b.element) {
        (Element::F32, Element::F32) => Element::F32,
        _ => Element::Bf16,
    };
    let mut scratch = Scratch::default();
    let (left, right) = (prepare(a, element, &mut scratch), prepare(b, element, &mut scratch));
    let matrix = |form: Form| {
        Some(blas::Matrix {
            element: library_element(element)?,
            transposed: form.transposed,
            leading: form.leading,
            batch_stride: form.batch_stride,
        })
    };
    let gemm = blas::Gemm {
        a: matrix(left.form)?,
        b: matrix(right.form)?,
        c: blas::Matrix {
            element: library_element(to.element)?,
            transposed: false,
            leading: n,
            batch_stride: if batch > 1 { m * n } else { 0 },
        },
        batch,
        compute: Compute::F32,
        alignment: alignment(&[left.at, right.at, to.at]),
        ..blas::Gemm::dense(m, n, k, LibraryElement::F32, LibraryElement::F32)
    };
    let ready = libraries.product(&gemm)?;
    let bytes = batch * m * n * to.element.bytes();
    let result = Argument { at: to.at, bytes, access: Access::Write, align: to.element.bytes(), node: to.node };
    let mut arguments = vec![left.argument, right.argument, result];
    if ready.workspace > 0 {
        let at = scratch.take(ready.workspace);
        arguments.push(Argument { at, bytes: ready.workspace, access: Access::Write, align: 256, node: None });
    }
    let copies = [left.copy, right.copy].into_iter().flatten().map(Item::Draft);
    let product = Item::Work(Work::Product(Product { gemm, ready: ready.number, arguments }));
    Some(copies.chain([product]).collect())
}
