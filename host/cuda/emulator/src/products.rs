//! What the vendor's libraries do, term by term in f64.

use crate::State;
use clip_host_cuda::launch::{Convolution, Product};
use clip_host_cuda::machine::{MachineError, Result};
use clip_host_cuda_driver::Element;
use clip_host_cuda_driver::blas::Matrix;
use clip_host_cuda_driver::dnn::Direction;

/// Numbers as they lie in memory.
fn read(bytes: &[u8], element: Element) -> Vec<f64> {
    match element {
        Element::F32 => {
            bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        Element::Bf16 => {
            let wide = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            bytes.chunks_exact(2).map(|b| f64::from(wide(b))).collect()
        }
        Element::F16 => bytes.chunks_exact(2).map(|b| half(u16::from_le_bytes([b[0], b[1]]))).collect(),
    }
}

/// The value of a 16-bit IEEE number.
fn half(bits: u16) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + mantissa / 1024.0) * 2f64.powi(exponent - 15),
    };
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
}

/// Rounded once, as a library's f32 sum is.
fn write(bytes: &mut [u8], at: usize, element: Element, value: f64) {
    let value = value as f32;
    match element {
        Element::F32 => bytes[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes()),
        Element::Bf16 => {
            let bits = value.to_bits();
            let rounded = if value.is_nan() { 0x7fff } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 };
            bytes[2 * at..2 * at + 2].copy_from_slice(&rounded.to_le_bytes());
        }
        Element::F16 => bytes[2 * at..2 * at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
    }
}

/// The place of element (i, j) of matrix `z`.
fn place(matrix: &Matrix, z: usize, i: usize, j: usize) -> usize {
    let (row, col) = if matrix.transposed { (j, i) } else { (i, j) };
    z * matrix.batch_stride + row * matrix.leading + col
}

/// `c = a · b`, one or a batch of them.
pub(crate) fn multiply(state: &mut State, product: &Product, addresses: &[u64]) -> Result<()> {
    let gemm = &product.gemm;
    for (argument, address) in product.arguments.iter().zip(addresses).take(3) {
        if address % gemm.alignment as u64 != 0 || argument.bytes == 0 {
            let why =
                format!("an operand is at {address:#x}, the product was promised multiples of {}", gemm.alignment);
            return Err(MachineError::new("a product", why));
        }
    }
    let mut operand = |number: usize, matrix: &Matrix| -> Result<Vec<f64>> {
        let bytes = state.slice(addresses[number], product.arguments[number].bytes)?;
        Ok(read(bytes, matrix.element))
    };
    let (a, b) = (operand(0, &gemm.a)?, operand(1, &gemm.b)?);
    let c = state.slice(addresses[2], product.arguments[2].bytes)?;
    let mut right = vec![0.0; gemm.k * gemm.n];
    let mut row = vec![0.0; gemm.n];
    for z in 0..gemm.batch {
        // Rows without gaps, so that the inner loop is one over neighbours.
        for (k, right) in right.chunks_exact_mut(gemm.n).enumerate() {
            right.iter_mut().enumerate().for_each(|(j, v)| *v = b[place(&gemm.b, z, k, j)]);
        }
        for i in 0..gemm.m {
            row.fill(0.0);
            for (k, right) in right.chunks_exact(gemm.n).enumerate() {
                let left = a[place(&gemm.a, z, i, k)];
                row.iter_mut().zip(right).for_each(|(sum, v)| *sum += left * v);
            }
            for (j, sum) in row.iter().enumerate() {
                write(c, place(&gemm.c, z, i, j), gemm.c.element, f64::from(gemm.alpha) * sum);
            }
        }
    }
    // What a library leaves in its workspace is nobody's.
    if let (Some(argument), Some(&address)) = (product.arguments.get(3), addresses.get(3)) {
        state.slice(address, argument.bytes)?.fill(crate::POISON);
    }
    Ok(())
}

/// A convolution or one of its gradients: every term of the sum goes where the direction says.
pub(crate) fn convolve(state: &mut State, convolution: &Convolution, addresses: &[u64]) -> Result<()> {
    let conv = &convolution.conv;
    let written = match conv.direction {
        Direction::InputGradient => 0,
        Direction::WeightGradient => 1,
        Direction::Forward => 2,
    };
    let counts = conv.elements();
    let mut tensors = [const { Vec::new() }; 3];
    for number in 0..3 {
        let (argument, address) = (&convolution.arguments[number], addresses[number]);
        if address % 16 != 0 || argument.bytes != counts[number] * conv.element.bytes() {
            let why =
                format!("operand {number} at {address:#x} has {} bytes, expected {}", argument.bytes, counts[number]);
            return Err(MachineError::new("a convolution", why));
        }
        tensors[number] = match number == written {
            true => vec![0.0; counts[number]],
            false => read(state.slice(address, argument.bytes)?, conv.element),
        };
    }
    let ([h, w], [oh, ow], [kh, kw]) = (conv.input, conv.output, conv.kernel);
    let (c, k) = (conv.channels, conv.filters);
    let (of_c, of_k) = (c / conv.groups, k / conv.groups);
    for n in 0..conv.batch {
        for (oy, ox) in (0..oh).flat_map(|oy| (0..ow).map(move |ox| (oy, ox))) {
            for (r, s) in (0..kh).flat_map(|r| (0..kw).map(move |s| (r, s))) {
                let place = |o: usize, f: usize, axis: usize| {
                    (o * conv.stride[axis] + f * conv.dilation[axis]).checked_sub(conv.padding[axis])
                };
                let (Some(iy), Some(ix)) = (place(oy, r, 0), place(ox, s, 1)) else { continue };
                if iy >= h || ix >= w {
                    continue;
                }
                for filter in 0..k {
                    let xi = ((n * h + iy) * w + ix) * c + filter / of_k * of_c;
                    let wi = ((filter * kh + r) * kw + s) * of_c;
                    let yi = ((n * oh + oy) * ow + ox) * k + filter;
                    let [x, weight, y] = &mut tensors;
                    let (x, weight) = (&mut x[xi..xi + of_c], &mut weight[wi..wi + of_c]);
                    match conv.direction {
                        Direction::Forward => y[yi] += x.iter().zip(&*weight).map(|(x, w)| x * w).sum::<f64>(),
                        Direction::InputGradient => x.iter_mut().zip(&*weight).for_each(|(x, w)| *x += y[yi] * w),
                        Direction::WeightGradient => weight.iter_mut().zip(&*x).for_each(|(w, x)| *w += y[yi] * x),
                    }
                }
            }
        }
    }
    let bytes = state.slice(addresses[written], convolution.arguments[written].bytes)?;
    for (at, value) in tensors[written].iter().enumerate() {
        write(bytes, at, conv.element, *value);
    }
    if let (Some(argument), Some(&address)) = (convolution.arguments.get(3), addresses.get(3)) {
        state.slice(address, argument.bytes)?.fill(crate::POISON);
    }
    Ok(())
}
