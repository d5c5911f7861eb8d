//! Windows over a stage's images: how tokens are cut into them and put back, and which of a window's pairs attend.

use clip_host_plugin_api::prelude::*;

/// Added to the scores of tokens that only the cyclic shift made neighbours; timm's number.
const MASKED: f64 = -100.0;

/// The windows of a block. Pairs are (height, width), in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// The images.
    image: [usize; 2],
    /// A window.
    size: [usize; 2],
    /// How far the images are rolled up and left before they are cut.
    shift: [usize; 2],
    /// The images, filled up to whole windows.
    padded: [usize; 2],
}

impl Windows {
    /// Windows of `size` a side, `shifted` by half of it. Images that are not larger make one window, which is not
    /// shifted; each direction by itself.
    pub fn new(image: [usize; 2], size: usize, shifted: bool) -> Windows {
        let shift = if shifted { size / 2 } else { 0 };
        let sizes = image.map(|side| side.min(size));
        Windows {
            image,
            size: sizes,
            shift: image.map(|side| if side <= size { 0 } else { shift }),
            padded: [image[0].next_multiple_of(sizes[0]), image[1].next_multiple_of(sizes[1])],
        }
    }

    /// Tokens of a window.
    pub fn area(&self) -> usize {
        self.size[0] * self.size[1]
    }

    /// Windows of an image.
    pub fn count(&self) -> usize {
        self.grid()[0] * self.grid()[1]
    }

    fn grid(&self) -> [usize; 2] {
        [self.padded[0] / self.size[0], self.padded[1] / self.size[1]]
    }

    /// Images `[batch, height, width, channels]` as windows `[batch · windows, tokens, channels]`.
    pub fn cut<'g>(&self, x: Tensor<'g>) -> Tensor<'g> {
        let (batch, channels) = (x.size(0), x.size(3));
        let x = roll(x, self.shift, Direction::Back);
        let after = [0, self.padded[0] - self.image[0], self.padded[1] - self.image[1], 0];
        let x = if after == [0; 4] { x } else { x.pad(&[0; 4], &after, 0.0) };
        let ([rows, columns], [height, width]) = (self.grid(), self.size);
        let x = x.reshape(&[batch, rows, height, columns, width, channels]).permute(&[0, 1, 3, 2, 4, 5]);
        x.reshape(&[batch * self.count(), self.area(), channels])
    }

    /// The images that [`Windows::cut`] was given, from their windows.
    pub fn join<'g>(&self, x: Tensor<'g>) -> Tensor<'g> {
        let (batch, channels) = (x.size(0) / self.count(), x.size(2));
        let ([rows, columns], [height, width]) = (self.grid(), self.size);
        let x = x.reshape(&[batch, rows, columns, height, width, channels]).permute(&[0, 1, 3, 2, 4, 5]);
        let mut x = x.reshape(&[batch, self.padded[0], self.padded[1], channels]);
        for axis in 0..2 {
            if self.padded[axis] != self.image[axis] {
                x = x.slice(axis as isize + 1, 0, self.image[axis]);
            }
        }
        roll(x, self.shift, Direction::Forth)
    }

    /// Rows of a table of relative positions: one for each offset between two tokens of a window.
    pub fn offsets(&self) -> usize {
        (2 * self.size[0] - 1) * (2 * self.size[1] - 1)
    }

    /// The table's row for each pair of a window's tokens, `[tokens · tokens]`.
    pub fn offset_ids<'g>(&self, graph: &'g Graph) -> Tensor<'g> {
        let [height, width] = self.size;
        let token = |i: usize| (i / width, i % width);
        let id = |query: usize, key: usize| {
            let ((y, x), (key_y, key_x)) = (token(query), token(key));
            (y + height - 1 - key_y) * (2 * width - 1) + (x + width - 1 - key_x)
        };
        let area = self.area();
        let ids = (0..area * area).map(|pair| id(pair / area, pair % area) as f64);
        graph.literal(ids.collect(), &[area * area], DType::I32)
    }

    /// What is added to the scores of each window's pairs, `[windows, 1, tokens, tokens]`; nothing if there is no shift.
    pub fn mask<'g>(&self, graph: &'g Graph) -> Option<Tensor<'g>> {
        if self.shift == [0, 0] {
            return None;
        }
        // Along a shifted side, the last window has tokens of the end and, rolled behind them, of the beginning.
        let side = |axis: usize, at: usize| {
            let (size, shift, padded) = (self.size[axis], self.shift[axis], self.padded[axis]);
            if shift == 0 { 0 } else { usize::from(at >= padded - size) + usize::from(at >= padded - shift) }
        };
        let (columns, width) = (self.grid()[1], self.size[1]);
        let region = |token: usize| {
            let (window, token) = (token / self.area(), token % self.area());
            let y = window / columns * self.size[0] + token / width;
            let x = window % columns * width + token % width;
            (3 * side(0, y) + side(1, x)) as f64
        };
        let (count, area) = (self.count(), self.area());
        let regions: Vec<f64> = (0..count * area).map(region).collect();
        let query = graph.literal(regions, &[count, 1, area, 1], DType::F32);
        let key = query.reshape(&[count, 1, 1, area]);
        Some((1.0 - query.eq(key)) * MASKED)
    }
}

/// Where a roll moves the tokens to.
#[derive(Clone, Copy, PartialEq)]
enum Direction {
    /// Up and to the left.
    Back,
    /// Down and to the right.
    Forth,
}

/// Moves images `[batch, height, width, channels]` by that many tokens; what leaves them comes back at the other side. They
/// are continued on that side first, so that the result is a slice, which costs nothing.
fn roll(x: Tensor<'_>, by: [usize; 2], direction: Direction) -> Tensor<'_> {
    let axes = [(1, by[0]), (2, by[1])].into_iter().filter(|(_, by)| *by > 0);
    let mut continued = x;
    for (axis, by) in axes.clone() {
        let size = x.size(axis as isize);
        let parts = match direction {
            Direction::Back => [continued, continued.slice(axis as isize, 0, by)],
            Direction::Forth => [continued.slice(axis as isize, size - by, size), continued],
        };
        continued = Tensor::concat(&parts, axis).unwrap_or(continued);
    }
    axes.fold(continued, |rolled, (axis, by)| {
        let start = if direction == Direction::Back { by } else { 0 };
        rolled.slice(axis as isize, start, start + x.size(axis as isize))
    })
}
