//! What a compiled program is on a GPU: launches of rendered kernels over planned memory, in order.

use crate::render::PRELUDE;
use clip_host_cuda_driver::blas::Gemm;
use clip_host_cuda_driver::dnn::Conv;
use clip_host_plugin_api::ir::NodeId;

/// A piece of device memory that is taken once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Block {
    /// The plan's arena.
    Arena,
    /// The memory of one of the plan's leaves, by its index in [`Plan::leaves`](clip_host_compiler::plan::Plan::leaves).
    Leaf(usize),
    /// What one kernel of the plan leaves for its own later launches: partial sums, converted operands.
    Scratch,
    /// The step's seed and the error flags: see [`control`].
    Control,
    /// Pixels that were sent ahead, in one of two slots.
    Pixels(usize),
    /// The table that normalises them.
    Levels,
}

/// The control block's layout.
pub mod control {
    /// Byte offset of the seed, a u64.
    pub const SEED: usize = 0;
    /// Byte offset of the flag that is set when an id lies outside its table, a u32.
    pub const BAD_ID: usize = 8;
    /// Bytes of the block.
    pub const BYTES: usize = 64;
}

/// A place in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub block: Block,
    /// In bytes.
    pub offset: usize,
}

impl Address {
    /// The address `bytes` further.
    pub fn plus(self, bytes: usize) -> Address {
        Address { offset: self.offset + bytes, ..self }
    }
}

/// What a launch does with an argument's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Every byte of the range is written; what was there before is not read.
    Write,
    /// Parts of it are written, or it is read and written.
    Update,
}

/// One argument of a launch: always memory. Sizes are part of the kernel's text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Argument {
    pub at: Address,
    /// From the address on, how far the launch may reach.
    pub bytes: usize,
    pub access: Access,
    /// What the address must be a multiple of: the widest access.
    pub align: usize,
    /// Whose value it is; none for scratch and control.
    pub node: Option<NodeId>,
}

/// Work for the GPU: `grid` blocks of `block` threads of one function.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Index in [`Schedule::functions`].
    pub function: usize,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub arguments: Vec<Argument>,
    /// Whether elements may be read and written through two arguments: each by the thread that read it.
    pub in_place: bool,
}

/// A kernel's text. Equal texts are one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Unique among the functions of any program: it contains the text's hash.
    pub name: String,
    /// Parameters and body.
    pub text: String,
    /// Threads of a block.
    pub threads: u32,
}

impl Function {
    /// The function as CUDA C, with what it stands on.
    pub fn source(&self) -> String {
        PRELUDE.to_string() + &self.definition()
    }

    /// The function alone.
    pub fn definition(&self) -> String {
        let Function { name, text, threads } = self;
        format!("\nextern \"C\" __global__ void __launch_bounds__({threads}) {name}{text}")
    }
}

/// A product that the vendor's library computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    pub gemm: Gemm,
    /// The machine's number for it: see [`Libraries::product`](crate::library::Libraries::product).
    pub ready: usize,
    /// Left and right operand, result, and workspace if it needs one.
    pub arguments: Vec<Argument>,
}

/// A convolution that the vendor's library computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Convolution {
    pub conv: Conv,
    /// The machine's number for it: see [`Libraries::convolution`](crate::library::Libraries::convolution).
    pub ready: usize,
    /// x, w and y as cuDNN names them, one of which is written, and workspace if it needs one.
    pub arguments: Vec<Argument>,
}

/// One piece of work, in stream order.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    Launch(Launch),
    Product(Product),
    Convolution(Convolution),
}

impl Work {
    /// The memory that it works on.
    pub fn arguments(&self) -> &[Argument] {
        match self {
            Work::Launch(launch) => &launch.arguments,
            Work::Product(product) => &product.arguments,
            Work::Convolution(convolution) => &convolution.arguments,
        }
    }
}

/// A program for the GPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schedule {
    pub functions: Vec<Function>,
    /// The work, with the index of the plan's kernel that it belongs to.
    pub work: Vec<(Work, usize)>,
    /// Bytes of scratch.
    pub scratch: usize,
}
