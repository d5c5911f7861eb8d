//! Rows of unit length.

use crate::EvalError;

/// Scales each row of `rows` (`[n, dim]`) to unit L2 norm; sums are in f64.
///
/// # Errors
/// If the length is no multiple of `dim`, or a row has no direction. `what` names the rows in the error.
pub fn normalize(what: &'static str, rows: &[f32], dim: usize) -> Result<Vec<f32>, EvalError> {
    if dim == 0 || !rows.len().is_multiple_of(dim) {
        return Err(EvalError::Shape {
            what,
            expected: format!("a multiple of the dimension {dim}"),
            got: rows.len().to_string(),
            hint: "embeddings are given row by row",
        });
    }
    let mut unit = Vec::with_capacity(rows.len());
    for (row, values) in rows.chunks_exact(dim).enumerate() {
        let squared: f64 = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        if !squared.is_finite() || squared == 0.0 {
            return Err(EvalError::NoDirection { what, row, got: format!("a squared norm of {squared}") });
        }
        let scale = 1.0 / squared.sqrt();
        unit.extend(values.iter().map(|&x| (f64::from(x) * scale) as f32));
    }
    Ok(unit)
}

/// The product of two rows, summed from the first element to the last: the order that tiles use as well, so that the
/// same pair has the same bits everywhere.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (x, y)| sum + x * y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_unit_rows_and_bad_ones_are_named() {
        assert_eq!(normalize("image", &[3.0, 4.0, 0.0, -2.0], 2), Ok(vec![0.6, 0.8, 0.0, -1.0]));
        let error = normalize("image", &[1.0, 0.0, f32::NAN, 1.0], 2).unwrap_err();
        assert!(error.to_string().contains("row 1") && error.to_string().contains("hint:"), "{error}");
        assert!(normalize("image", &[0.0, 0.0], 2).is_err());
        assert!(normalize("image", &[1.0, 0.0, 1.0], 2).is_err());
        assert!(normalize("image", &[1.0], 0).is_err());
        // A squared norm that only f64 can hold.
        let huge = 2f32.powi(100);
        assert_eq!(normalize("image", &[3.0 * huge, 4.0 * huge], 2), Ok(vec![0.6, 0.8]));
    }
}
