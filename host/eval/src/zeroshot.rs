//! Zero-shot classification (Radford et al. 2021): a class is the mean embedding of its prompts.

use crate::EvalError;
use crate::embedding::{dot, normalize};

/// Class weights `[classes, dim]` from prompt embeddings `[classes, templates, dim]`: the mean over templates of unit
/// rows, at unit length again.
///
/// # Errors
/// If lengths do not fit, or a prompt or a mean has no direction.
pub fn class_weights(prompts: &[f32], classes: usize, templates: usize, dim: usize) -> Result<Vec<f32>, EvalError> {
    if classes == 0 || templates == 0 || prompts.len() != classes * templates * dim {
        return Err(EvalError::Shape {
            what: "prompt embeddings",
            expected: format!("{classes} classes × {templates} templates × {dim}, none of them 0"),
            got: prompts.len().to_string(),
            hint: "every class has every template",
        });
    }
    let unit = normalize("prompt embeddings", prompts, dim)?;
    let mut sums = Vec::with_capacity(classes * dim);
    for class in unit.chunks_exact(templates * dim) {
        sums.extend((0..dim).map(|d| {
            let sum: f64 = (0..templates).map(|t| f64::from(class[t * dim + d])).sum();
            (sum / templates as f64) as f32
        }));
    }
    normalize("class means", &sums, dim)
}

/// Fraction of images whose class is among the `k` most similar ones, for each of `ks`. `images` is `[n, dim]` of any
/// length, `weights` `[classes, dim]` of unit length. Among equal similarities the earlier class ranks first.
///
/// # Errors
/// If lengths do not fit, a label is no class, or an image has no direction.
pub fn top_k(images: &[f32], labels: &[u32], weights: &[f32], dim: usize, ks: &[usize]) -> Result<Vec<f64>, EvalError> {
    let images = normalize("image embeddings", images, dim)?;
    let shape =
        |what, expected: String, got: usize, hint| EvalError::Shape { what, expected, got: got.to_string(), hint };
    let (n, classes) = (images.len() / dim, weights.len() / dim);
    if n == 0 || labels.len() != n {
        return Err(shape(
            "labels",
            format!("one for each of {n} images, at least one"),
            labels.len(),
            "one class each",
        ));
    }
    if classes == 0 || !weights.len().is_multiple_of(dim) {
        return Err(shape("class weights", format!("rows of {dim}"), weights.len(), "use `class_weights`"));
    }
    let mut hits = vec![0usize; ks.len()];
    for (image, &label) in images.chunks_exact(dim).zip(labels) {
        let label = label as usize;
        if label >= classes {
            return Err(shape("label", format!("0 to {}", classes - 1), label, "labels count from 0"));
        }
        let own = dot(image, &weights[label * dim..(label + 1) * dim]);
        let rank = weights.chunks_exact(dim).enumerate().filter(|(class, weight)| {
            let score = dot(image, weight);
            score > own || (score == own && *class < label)
        });
        let rank = rank.count();
        hits.iter_mut().zip(ks).for_each(|(hits, &k)| *hits += usize::from(rank < k));
    }
    Ok(hits.into_iter().map(|hits| hits as f64 / n as f64).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        assert!(class_weights(&[1.0; 5], 2, 1, 3).is_err());
        assert!(class_weights(&[], 0, 1, 3).is_err());
        assert!(class_weights(&[1.0, 0.0, -1.0, 0.0], 1, 2, 2).is_err());
        let weights = [1.0, 0.0, 0.0, 1.0];
        assert_eq!(top_k(&[2.0, 1.0, 1.0, 3.0], &[0, 0], &weights, 2, &[1, 2]), Ok(vec![0.5, 1.0]));
        assert!(top_k(&[2.0, 1.0], &[2], &weights, 2, &[1]).is_err());
        assert!(top_k(&[2.0, 1.0], &[], &weights, 2, &[1]).is_err());
    }
}
