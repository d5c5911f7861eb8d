//! What can be wrong with embeddings.

/// Why an evaluation has no result.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EvalError {
    /// A list that does not have the length that the others ask for.
    #[error("evaluation: {what}: expected {expected}, got {got}\nhint: {hint}")]
    Shape {
        /// Which list.
        what: &'static str,
        /// Its length as it should be.
        expected: String,
        /// Its length as it is.
        got: String,
        /// What to look at.
        hint: &'static str,
    },
    /// NaN, an infinity or a row of zeros, which has no direction.
    #[error(
        "evaluation: {what} row {row} has no direction: expected finite numbers that are not all 0, got {got}\n\
         hint: the model has diverged or collapsed; go back to an earlier checkpoint, or lower the learning rate"
    )]
    NoDirection {
        /// Which embeddings.
        what: &'static str,
        /// The first bad row.
        row: usize,
        /// Its squared norm.
        got: String,
    },
}
