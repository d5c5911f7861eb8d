//! Pieces of CUDA C, and a kernel's text with the memory that it is called with.

use crate::launch::{Access, Address, Argument};
use clip_host_compiler::kernel::Element;
use clip_host_plugin_api::ir::NodeId;
use std::fmt::Write;

/// The C type of an element in memory.
pub fn c_type(element: Element) -> &'static str {
    match element {
        Element::F32 => "float",
        Element::I32 => "int",
        Element::Bf16 => "bf16",
        Element::F16 => "f16",
    }
}

/// A float's exact text.
pub fn literal(value: f32) -> String {
    if value.is_finite() { format!("{value:e}f") } else { format!("__uint_as_float({:#010x}u)", value.to_bits()) }
}

/// The index type that `count` elements need, with room for a grid's step beyond them.
pub fn index_type(count: usize) -> &'static str {
    if count < 1 << 30 { "u32" } else { "u64" }
}

/// Blocks along an axis of a grid. More than 32 bits hold are more than the scheduler lets through.
pub fn blocks(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Offsets from which terms are 64 bits wide: two sums below it, added, still fit 32.
const WIDE: usize = 1 << 31;

/// `Σ coordinate[d] · factor[d]`, where the coordinates are those of `flat` over `dims`, outermost first. It is as wide as its
/// value needs, however narrow `flat` is: few elements may lie far apart.
pub fn dot(flat: &str, dims: &[usize], factors: &[usize]) -> String {
    let mut terms = Vec::new();
    let mut behind: usize = dims.iter().product();
    let reach: usize = dims.iter().zip(factors).map(|(size, factor)| size.saturating_sub(1) * factor).sum();
    let suffix = if reach >= WIDE { "ull" } else { "" };
    for (d, (&size, &factor)) in dims.iter().zip(factors).enumerate() {
        behind /= size.max(1);
        if factor == 0 || size == 1 {
            continue;
        }
        let mut term = flat.to_string();
        if behind != 1 {
            term = format!("{term} / {behind}");
        }
        // Nothing is further out than the first dimension.
        if dims[..d].iter().any(|&s| s != 1) {
            term = format!("{term} % {size}");
        }
        // A sum is as wide as its widest term.
        terms.push(if factor == 1 { format!("({term})") } else { format!("({term}) * {factor}{suffix}") });
    }
    if terms.is_empty() { "0".into() } else { terms.join(" + ") }
}

/// A launch before its text has a function: what renderers give.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Of the function: parameters and body, from the opening parenthesis on.
    pub text: String,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub arguments: Vec<Argument>,
    pub in_place: bool,
}

/// Collects a kernel's parameters with its arguments.
#[derive(Default)]
pub struct Parameters {
    text: Vec<String>,
    pub arguments: Vec<Argument>,
}

impl Parameters {
    /// A parameter to read from.
    pub fn read(&mut self, name: &str, element: Element, at: Address, elements: usize, node: Option<NodeId>) {
        self.text.push(format!("const {} *{name}", c_type(element)));
        let (bytes, align) = (elements * element.bytes(), element.bytes());
        self.arguments.push(Argument { at, bytes, access: Access::Read, align, node });
    }

    /// A parameter to write to.
    pub fn write(
        &mut self,
        name: &str,
        element: Element,
        at: Address,
        elements: usize,
        node: Option<NodeId>,
        access: Access,
    ) {
        self.text.push(format!("{} *{name}", c_type(element)));
        let (bytes, align) = (elements * element.bytes(), element.bytes());
        self.arguments.push(Argument { at, bytes, access, align, node });
    }

    /// Memory that is no value of the program.
    pub fn raw(&mut self, declaration: &str, at: Address, bytes: usize, access: Access, align: usize) {
        self.text.push(declaration.into());
        self.arguments.push(Argument { at, bytes, access, align, node: None });
    }

    /// Makes the last parameter's accesses as wide as `align` bytes.
    pub fn widen_last(&mut self, align: usize) {
        if let Some(last) = self.arguments.last_mut() {
            last.align = last.align.max(align);
        }
    }

    /// Whether some argument's memory is both read and written.
    pub fn overlap(&self) -> bool {
        let range = |a: &Argument| (a.at.block, a.at.offset, a.at.offset + a.bytes);
        self.arguments.iter().filter(|a| a.access != Access::Read).any(|written| {
            let (block, start, end) = range(written);
            self.arguments.iter().filter(|a| a.access == Access::Read).any(|read| {
                let (other, from, to) = range(read);
                other == block && from < end && start < to
            })
        })
    }

    /// The parameter list. Where nothing that is written is read, the compiler may know it.
    pub fn list(&self) -> String {
        let restrict = !self.overlap();
        let mut list = String::new();
        for (i, parameter) in self.text.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            let parameter = if restrict { parameter.replace('*', "*__restrict__ ") } else { parameter.clone() };
            // Writing to a String cannot fail.
            let _ = write!(list, "{comma}{parameter}");
        }
        list
    }

    /// The draft of a launch with this body (statements, without the outer braces).
    pub fn draft(self, threads: u32, grid: [u32; 3], body: &str) -> Draft {
        let in_place = self.overlap();
        let text = format!("({})\n{{\n{body}}}\n", self.list());
        Draft { text, grid, block: [threads, 1, 1], arguments: self.arguments, in_place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_beyond_32_bits_are_computed_in_64() {
        // 1,000 rows of a table with 5,000,000 columns, one element of each.
        assert_eq!(dot("i", &[1000, 1], &[5_000_000, 1]), "(i) * 5000000ull");
        assert_eq!(dot("i", &[100, 4], &[5_000_000, 1]), "(i / 4) * 5000000 + (i % 4)");
    }

    #[test]
    fn grids_beyond_32_bits_are_not_cut() {
        assert_eq!(blocks((1 << 32) + 1), u32::MAX);
    }
}
