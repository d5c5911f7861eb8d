//! Where a kernel's operands and results are, and how they are read and written.

use super::{Load, Out, Program, STREAM, Source};
use crate::memory::Address;
use crate::walk::{Cols, Rows, table};
use clip_host_compiler::kernel::{Element, Fused, Instr, Output, Pattern, Rank, Rounding, Store};
use clip_host_plugin_api::ir::NodeId;

impl Program {
    pub(super) fn prepare_loads(&mut self, kernel: &Fused, place: &impl Fn(NodeId) -> Address) {
        let outer = kernel.dims.len() - kernel.inner;
        for input in &kernel.inputs {
            let element = input.dtype;
            let address = place(input.source).plus(input.offset, element);
            let (rows, cols) = match (&input.pattern, input.rank) {
                (_, Rank::Scalar) => (Rows::Linear(0), Cols::Stride(0)),
                (Pattern::Same, Rank::Row) => (Rows::Linear(1), Cols::Stride(0)),
                (Pattern::Same, Rank::Full) => (Rows::Linear(kernel.cols), Cols::Unit),
                (Pattern::Column, _) => (Rows::Linear(0), Cols::Unit),
                (Pattern::Strided(strides), rank) => {
                    let split = strides.len().min(outer);
                    let (row_strides, col_strides) = strides.split_at(split);
                    let row_dims = &kernel.dims[..split];
                    let rows = Rows::Strided { dims: row_dims.to_vec(), strides: row_strides.to_vec() };
                    let cols = match (rank, col_strides) {
                        (Rank::Row, _) | (_, []) => Cols::Stride(0),
                        (_, [1]) => Cols::Unit,
                        (_, [stride]) => Cols::Stride(*stride),
                        _ => Cols::Table(table(&kernel.dims[outer..], col_strides)),
                    };
                    (rows, cols)
                }
            };
            let source = match (input.rank, &input.pattern) {
                (Rank::Full | Rank::Row, Pattern::Same) if element == Element::Bf16 => Source::Widened,
                _ if element != Element::F32 => Source::Gathered,
                (Rank::Full | Rank::Row, Pattern::Same) => Source::Direct,
                (Rank::Full, Pattern::Column) if self.tile_rows == 1 => Source::Direct,
                (Rank::Full, Pattern::Column) => Source::Repeated,
                _ => Source::Gathered,
            };
            self.loads.push(Load { address, element, rows, cols, source });
        }
        // A result that is an operand itself must not be read where another result has replaced it.
        for output in &kernel.outputs {
            if let Instr::Load(load) = kernel.code[output.value].0
                && let block = self.loads[load].address.block
                && kernel.outputs.iter().any(|o| place(o.target).block == block && block > 0)
                && matches!(self.loads[load].source, Source::Direct)
            {
                self.loads[load].source = Source::Gathered;
            }
        }
    }

    pub(super) fn prepare_outputs(&mut self, kernel: &Fused, place: &impl Fn(NodeId) -> Address) {
        let mut partial = 0;
        let segments = self.rows / kernel.segment().max(1);
        for output in &kernel.outputs {
            self.outs.push(Out {
                address: place(output.target),
                value: output.value,
                store: output.store,
                element: output.dtype,
                rounding: output.rounding,
                direct: false,
                streamed: self.is_streamed(kernel, output, place),
                partial,
            });
            partial += match output.store {
                Store::Each => 0,
                Store::SumRows { .. } | Store::MaxRows { .. } => segments * self.chunks_per_segment * self.cols,
                Store::SumAll | Store::MaxAll => self.tasks,
            };
        }
        self.partials = vec![0.0; partial];
    }

    /// Whether a result is written past the caches: if it is large, and no leaf, whose lines are read, and so cached, just
    /// before.
    fn is_streamed(&self, kernel: &Fused, output: &Output, place: &impl Fn(NodeId) -> Address) -> bool {
        let bytes = self.rows * self.cols * output.dtype.bytes();
        let to = place(output.target);
        let is_full = output.store == Store::Each && kernel.code[output.value].1 == Rank::Full;
        let is_nearest = output.rounding == Rounding::Nearest;
        is_full
            && is_nearest
            && matches!(output.dtype, Element::F32 | Element::Bf16)
            && bytes >= STREAM
            && to.block == 0
    }
}
