//! What the vendor's libraries take over from rendered kernels, where a machine has them: products and convolutions.
//!
//! They ask for more than the plan does: operands of one type, a unit stride in each, one stride along the batch, filters with
//! their channels last. What does not fit is first copied to scratch, in the form that does; what they write in another form
//! than the plan's, after.

use crate::launch::{Access, Address, Argument, Block, Convolution, Product, Work};
use crate::render::Draft;
use crate::render::own::{self, Source, Target};
use clip_host_compiler::kernel::{Element, Operand};
use clip_host_cuda_driver::dnn::{self, Direction};
use clip_host_cuda_driver::{Compute, Element as LibraryElement, blas};
use clip_host_plugin_api::ir::Conv;

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

    /// Makes a convolution ready; `None` if there is no library, or it does not know such a convolution.
    fn convolution(&self, conv: &dnn::Conv) -> Option<Ready>;
}

/// No libraries: every kernel is rendered.
#[derive(Clone, Copy, Debug)]
pub struct Rendered;

impl Libraries for Rendered {
    fn product(&self, _: &blas::Gemm) -> Option<Ready> {
        None
    }

    fn convolution(&self, _: &dnn::Conv) -> Option<Ready> {
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
        Element::F16 => Some(LibraryElement::F16),
        Element::I32 => None,
    }
}

/// What a product's operands are given as. As on the CPU: one with a rounded operand rounds the other one.
fn common(operands: [Element; 2]) -> Element {
    let halves = [Element::F16, Element::Bf16];
    halves.into_iter().find(|half| operands.contains(half)).unwrap_or(Element::F32)
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
    let element = common([a.element, b.element]);
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

/// Images and filters are at multiples of this many bytes.
const IMAGE_ALIGNMENT: usize = 16;

/// A convolution's sizes: `[batch, height, width, channels]` of x and y, `[out, in / groups, height, width]` of w.
pub struct Sizes<'a> {
    pub conv: &'a Conv,
    pub x: &'a [usize],
    pub w: &'a [usize],
    pub y: &'a [usize],
}

/// The dimensions of a contiguous tensor: size and stride of each.
pub(crate) fn dense(sizes: &[usize]) -> Vec<(usize, usize)> {
    let mut stride = 1;
    let mut dims: Vec<(usize, usize)> = Vec::new();
    for &size in sizes.iter().rev() {
        dims.push((size, stride));
        stride *= size;
    }
    dims.reverse();
    dims
}

/// Whether dimensions are walked as those of a contiguous tensor.
fn is_dense(dims: &[(usize, usize)]) -> bool {
    let sizes: Vec<usize> = dims.iter().map(|d| d.0).collect();
    dims.iter().zip(dense(&sizes)).all(|(dim, expected)| dim.0 == 1 || dim.1 == expected.1)
}

/// An image or a filter as cuDNN takes it. `order` gives the dimensions in its order.
fn image(source: &Source, element: Element, order: [usize; 4], scratch: &mut Scratch) -> (Argument, Option<Draft>) {
    let view = Operand { dims: order.map(|d| source.view.dims[d]).to_vec(), ..source.view.clone() };
    let bytes = source.elements() * element.bytes();
    let reads = |at, node| Argument { at, bytes, access: Access::Read, align: IMAGE_ALIGNMENT, node };
    if source.element == element && is_dense(&view.dims) && source.at.offset.is_multiple_of(IMAGE_ALIGNMENT) {
        return (reads(source.at, source.node), None);
    }
    let at = scratch.take(bytes);
    let from = Source { view: &view, at: source.at, element: source.element, node: source.node };
    (reads(at, None), Some(own::copy(&from, Target { at, element, node: None })))
}

/// What a convolution reads, in the order of its op's inputs.
const PLAIN: [usize; 4] = [0, 1, 2, 3];
/// Filters with their channels last.
const KRSC: [usize; 4] = [0, 2, 3, 1];

/// A convolution of points or one of its gradients as a product, which it is; `None` if it is none.
fn of_points(
    libraries: &dyn Libraries,
    sizes: &Sizes,
    direction: Direction,
    inputs: [&Source; 2],
    to: Target,
) -> Option<Vec<Item>> {
    let Conv { stride, padding, groups, .. } = *sizes.conv;
    let is_product = sizes.w[2..] == [1, 1] && stride == [1, 1] && padding == [0, 0] && groups == 1;
    let inputs_are_dense = inputs.iter().all(|source| is_dense(&source.view.dims));
    if !is_product || !inputs_are_dense {
        return None;
    }
    let (points, c, k) = (sizes.x[..3].iter().product::<usize>(), sizes.x[3], sizes.y[3]);
    let view = |source: &Source, dims: [(usize, usize); 2]| Operand { dims: dims.to_vec(), ..source.view.clone() };
    let (left, right) = match direction {
        // x · wᵀ
        Direction::Forward => ([(points, c), (c, 1)], [(c, 1), (k, c)]),
        // dy · w
        Direction::InputGradient => ([(points, k), (k, 1)], [(k, c), (c, 1)]),
        // dyᵀ · x
        Direction::WeightGradient => ([(k, 1), (points, k)], [(points, c), (c, 1)]),
    };
    let [a, b] = match direction {
        Direction::WeightGradient => [inputs[1], inputs[0]],
        _ => inputs,
    };
    let (a_view, b_view) = (view(a, left), view(b, right));
    matmul(libraries, &Source { view: &a_view, ..*a }, &Source { view: &b_view, ..*b }, to)
}

/// A convolution or one of its gradients by the library, if it takes it. `inputs` are those of the op: x and w, y's gradient
/// and w, or x and y's gradient.
pub fn convolution(
    libraries: &dyn Libraries,
    sizes: &Sizes,
    direction: Direction,
    inputs: [&Source; 2],
    to: Target,
) -> Option<Vec<Item>> {
    if let Some(items) = of_points(libraries, sizes, direction, inputs, to) {
        return Some(items);
    }
    let element = common([inputs[0].element, inputs[1].element]);
    let (x, w, y) = (sizes.x, sizes.w, sizes.y);
    let conv = dnn::Conv {
        batch: x[0],
        input: [x[1], x[2]],
        channels: x[3],
        kernel: [w[2], w[3]],
        filters: w[0],
        output: [y[1], y[2]],
        stride: sizes.conv.stride,
        padding: sizes.conv.padding,
        dilation: sizes.conv.dilation,
        groups: sizes.conv.groups,
        element: library_element(element)?,
        compute: Compute::F32,
        direction,
    };
    let ready = libraries.convolution(&conv)?;
    // It writes the type of its operands, as in PyTorch's autocast.
    let result = element;

    let mut scratch = Scratch::default();
    let (orders, written) = match direction {
        Direction::Forward => ([PLAIN, KRSC], 2),
        Direction::InputGradient => ([PLAIN, KRSC], 0),
        Direction::WeightGradient => ([PLAIN, PLAIN], 1),
    };
    let (first, first_copy) = image(inputs[0], element, orders[0], &mut scratch);
    let (second, second_copy) = image(inputs[1], element, orders[1], &mut scratch);
    let mut items: Vec<Item> = [first_copy, second_copy].into_iter().flatten().map(Item::Draft).collect();

    let shape: &[usize] = [x, w, y][written];
    let count: usize = shape.iter().product();
    // Filters have the plan's order if they are a point or have one channel.
    let in_order = written != 1 || w[2] * w[3] == 1 || w[1] == 1;
    let direct = in_order && result == to.element && to.at.offset.is_multiple_of(IMAGE_ALIGNMENT);
    let (at, node) = if direct { (to.at, to.node) } else { (scratch.take(count * result.bytes()), None) };
    let writes = Argument { at, bytes: count * result.bytes(), access: Access::Write, align: IMAGE_ALIGNMENT, node };
    let mut arguments = match direction {
        Direction::Forward => vec![first, second, writes],
        // y's gradient comes first, w second.
        Direction::InputGradient => vec![writes, second, first],
        Direction::WeightGradient => vec![first, writes, second],
    };
    if ready.workspace > 0 {
        let at = scratch.take(ready.workspace);
        arguments.push(Argument { at, bytes: ready.workspace, access: Access::Write, align: 256, node: None });
    }
    items.push(Item::Work(Work::Convolution(Convolution { conv, ready: ready.number, arguments })));
    if !direct {
        let (k, c, r, s) = (w[0], w[1], w[2], w[3]);
        let dims = match in_order {
            true => dense(shape),
            // [k, c, r, s] over memory in the order k, r, s, c.
            false => vec![(k, r * s * c), (c, 1), (r, s * c), (s, c)],
        };
        let view = Operand { source: 0, offset: 0, dims };
        let from = Source { at, element: result, view: &view, node: None };
        items.push(Item::Draft(own::copy(&from, to)));
    }
    Some(items)
}
