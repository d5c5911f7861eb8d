//! From IR fragments to a luminal graph: splicing, verification, differentiation.
//!
//! The assembled program is a [`luminal::graph::Graph`] whose nodes are [`operator::IrOperator`]s. Every pass over it,
//! autograd included, is a [`luminal::compiler_utils::Compiler`]; passes are written as functional rewrites
//! ([`rewrite`]), which also remove dead nodes and common subexpressions.

pub mod autograd;
pub mod operator;
pub mod oracle;
pub mod program;
pub mod rewrite;
#[cfg(feature = "luminal-cuda")]
pub mod stock_cuda;
