//! Windows as 0/1 matrices.

use clip_host_plugin_api::ir::{Conv, Pool};

/// A sliding window; pairs are (height, width).
pub struct Window {
    pub kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    dilation: [usize; 2],
    pub input: [usize; 2],
    pub output: [usize; 2],
}

impl Window {
    pub fn of_conv(conv: &Conv, x: &[usize], weight: &[usize], y: &[usize]) -> Window {
        let Conv { stride, padding, dilation, .. } = *conv;
        let kernel = [weight[2], weight[3]];
        Window { kernel, stride, padding, dilation, input: [x[2], x[3]], output: [y[2], y[3]] }
    }

    pub fn of_pool(pool: &Pool, x: &[usize], y: &[usize]) -> Window {
        let Pool { kernel, stride, padding, .. } = *pool;
        Window { kernel, stride, padding, dilation: [1; 2], input: [x[2], x[3]], output: [y[2], y[3]] }
    }

    /// A window of one element that moves by one: every output is its input.
    pub fn is_identity(&self) -> bool {
        (self.kernel, self.stride, self.padding) == ([1; 2], [1; 2], [0; 2])
    }

    /// The 0/1 matrix `[output, input]` of one tap along a dimension, and which outputs it is inside for.
    pub fn selection(&self, d: usize, k: usize) -> (Vec<f32>, Vec<f32>) {
        let (input, output) = (self.input[d], self.output[d]);
        let mut matrix = vec![0.0; output * input];
        let mut valid = vec![0.0; output];
        for o in 0..output {
            let at = (o * self.stride[d] + k * self.dilation[d]).checked_sub(self.padding[d]);
            if let Some(at) = at.filter(|&at| at < input) {
                matrix[o * input + at] = 1.0;
                valid[o] = 1.0;
            }
        }
        (matrix, valid)
    }
}
