//! Strided views: how a value is read out of another one's memory without moving it.

use clip_host_plugin_api::ir::NodeId;

/// A logical tensor inside the contiguous memory of `root`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    pub root: NodeId,
    pub offset: usize,
    /// (size, stride) of each logical dimension, in elements.
    pub dims: Vec<(usize, usize)>,
}

impl View {
    /// The whole of a tensor.
    pub fn contiguous(root: NodeId, shape: &[usize]) -> Self {
        View { root, offset: 0, dims: contiguous_dims(shape) }
    }

    pub fn elements(&self) -> usize {
        self.dims.iter().map(|d| d.0).product()
    }

    /// The same elements in the same order, whatever their shape: equal for views that differ by reshapes only.
    pub fn order(&self) -> Self {
        View { root: self.root, offset: self.offset, dims: merge(&self.dims) }
    }

    /// Whether the elements lie one after the other (from `offset` on).
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for &(size, stride) in self.dims.iter().rev() {
            if size != 1 && stride != expected {
                return false;
            }
            expected *= size;
        }
        true
    }

    pub fn permute(mut self, axes: &[usize]) -> Self {
        self.dims = axes.iter().map(|&a| self.dims[a]).collect();
        self
    }

    pub fn broadcast(mut self, shape: &[usize]) -> Self {
        for (dim, &size) in self.dims.iter_mut().zip(shape) {
            if dim.0 != size {
                *dim = (size, 0);
            }
        }
        self
    }

    pub fn slice(mut self, starts: &[usize], ends: &[usize]) -> Self {
        for (dim, (start, end)) in self.dims.iter_mut().zip(starts.iter().zip(ends)) {
            self.offset += start * dim.1;
            dim.0 = end - start;
        }
        self
    }

    /// The same elements in the same order under another shape, if strides can say so.
    pub fn reshape(&self, shape: &[usize]) -> Option<Self> {
        let merged = merge(&self.dims);
        Some(View { root: self.root, offset: self.offset, dims: split(&merged, shape)? })
    }
}

/// Row-major dims of a shape.
pub fn contiguous_dims(shape: &[usize]) -> Vec<(usize, usize)> {
    let mut dims: Vec<(usize, usize)> = shape.iter().map(|&s| (s, 0)).collect();
    let mut stride = 1;
    for dim in dims.iter_mut().rev() {
        dim.1 = stride;
        stride *= dim.0;
    }
    dims
}

/// Joins neighbouring dimensions that one stride describes; ones disappear.
pub fn merge(dims: &[(usize, usize)]) -> Vec<(usize, usize)> {
    let mut merged: Vec<(usize, usize)> = Vec::new();
    for &(size, stride) in dims.iter().filter(|d| d.0 != 1) {
        match merged.last_mut() {
            Some(last) if last.1 == stride * size => *last = (last.0 * size, stride),
            _ => merged.push((size, stride)),
        }
    }
    merged
}

/// Splits merged dimensions into a shape; `None` where a new dimension would straddle two old ones.
pub fn split(merged: &[(usize, usize)], shape: &[usize]) -> Option<Vec<(usize, usize)>> {
    let mut old = merged.iter().rev().copied();
    let (mut left, mut stride) = old.next().unwrap_or((1, 1));
    let mut dims = Vec::with_capacity(shape.len());
    for &size in shape.iter().rev() {
        if size == 1 {
            dims.push((1, 0));
            continue;
        }
        while left == 1 {
            (left, stride) = old.next()?;
        }
        if left % size != 0 {
            return None;
        }
        dims.push((size, stride));
        left /= size;
        stride *= size;
    }
    dims.reverse();
    Some(dims)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_follows_strides() {
        let view = View::contiguous(0, &[4, 6]).permute(&[1, 0]);
        assert!(!view.is_contiguous());
        assert_eq!(view.reshape(&[2, 3, 4]).map(|v| v.dims), Some(vec![(2, 3), (3, 1), (4, 6)]));
        assert_eq!(view.reshape(&[24]), None);
        let rows = View::contiguous(0, &[4, 1]).broadcast(&[4, 6]);
        assert_eq!(rows.reshape(&[2, 2, 6]).map(|v| v.dims), Some(vec![(2, 2), (2, 1), (6, 0)]));
        assert!(View::contiguous(0, &[4, 6]).slice(&[1, 0], &[3, 6]).is_contiguous());
        assert_eq!(View::contiguous(0, &[4, 6]).slice(&[1, 0], &[3, 6]).offset, 6);
    }
}
