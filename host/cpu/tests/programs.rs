//! The shapes of real programs: blocks of encoders, losses, updates of states in place.

mod support;

use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::ir::{Conv, DType, Init, Layout, Pool};
use support::Case;

const ZERO: Init = Init::Constant(0.0);

fn conv(stride: usize, padding: usize) -> Conv {
    Conv { stride: [stride; 2], padding: [padding; 2], dilation: [1; 2], groups: 1, layout: Layout::Nchw }
}

/// Convolution, batch norm with running statistics.
fn conv_bn<'g>(g: &'g Graph, x: Tensor<'g>, name: &str, out: usize, kernel: usize, stride: usize) -> Tensor<'g> {
    let n = |what: &str| format!("{name}.{what}");
    let weight = g.param(&n("weight"), &[out, x.size(1), kernel, kernel], ZERO);
    let y = x.conv2d(weight, conv(stride, kernel / 2));
    let (gain, bias) = (g.param(&n("pos.gain"), &[out], ZERO), g.param(&n("bias"), &[out], ZERO));
    let (mean, var) = (g.state(&n("mean"), &[out], ZERO), g.state(&n("var"), &[out], ZERO));
    let batch_mean = y.mean(&[0, 2, 3], true);
    let batch_var = (y - batch_mean).square().mean(&[0, 2, 3], true).reshape(&[out]);
    g.update(mean, mean * 0.9 + batch_mean.reshape(&[out]).detach() * 0.1);
    g.update(var, var * 0.9 + batch_var.detach() * 0.1);
    y.batch_norm(gain, bias, 1e-5)
}

#[test]
fn residual_blocks() {
    for seed in 0..3 {
        let case = Case::new(seed, |g, _| {
            let x = g.input("x", &[3, 3, 18, 14], DType::F32);
            let x = conv_bn(g, x, "stem", 8, 3, 2).relu();
            let pool = Pool {
                kernel: [3; 2],
                stride: [2; 2],
                padding: [1; 2],
                count_include_pad: false,
                layout: Layout::Nchw,
            };
            let mut x = x.max_pool2d(pool);
            for block in 0..2 {
                let y = conv_bn(g, x, &format!("b{block}.1"), 8, 1, 1).relu();
                let y = conv_bn(g, y, &format!("b{block}.2"), 8, 3, 1 + block).relu();
                let y = conv_bn(g, y, &format!("b{block}.3"), 16, 1, 1);
                let short = conv_bn(g, x, &format!("b{block}.short"), 16, 1, 1 + block);
                x = (y + short).relu();
            }
            let features = x.mean(&[2, 3], false);
            let y = features.linear(g.param("head", &[5, 16], ZERO), Some(g.param("head.bias", &[5], ZERO)));
            g.output("features", features);
            g.output("y", y.l2_normalize());
        });
        // Statistics of few numbers magnify rounding.
        case.tolerance(2e-3).check();
    }
}

fn transformer_layer<'g>(g: &'g Graph, x: Tensor<'g>, mask: Tensor<'g>, heads: usize, dropout: f64) -> Tensor<'g> {
    let (b, t, d) = (x.size(0), x.size(1), x.size(2));
    let matrix =
        |name: &str, out: usize, inner: usize| g.param(name, &[out, inner], ZERO) * (1.0 / (inner as f64).sqrt());
    let vector = |name: &str, n: usize| g.param(name, &[n], ZERO);
    let split = |x: Tensor<'g>| x.reshape(&[b, t, heads, d / heads]).permute(&[0, 2, 1, 3]);
    let linear = |x: Tensor<'g>, name: &str, out: usize| {
        let inner = x.size(-1);
        x.linear(matrix(&format!("{name}.weight"), out, inner), Some(vector(&format!("{name}.bias"), out)))
    };
    let (q, k, v) = (split(linear(x, "q", d)), split(linear(x, "k", d)), split(linear(x, "v", d)));
    let y = q.attention(k, v, Some(mask)).permute(&[0, 2, 1, 3]).reshape(&[b, t, d]);
    let x = x + linear(y, "out", d).dropout(dropout);
    let x = x.layer_norm(vector("norm1.gain", d), vector("norm1.bias", d), 1e-5);
    let y = linear(linear(x, "up", 2 * d).gelu(), "down", d);
    (x + y.dropout(dropout)).layer_norm(vector("norm2.gain", d), vector("norm2.bias", d), 1e-5)
}

#[test]
fn transformer() {
    for (seed, (b, t, d, heads)) in [(2, 5, 8, 2), (3, 7, 12, 3), (1, 1, 4, 1), (4, 16, 64, 4)].into_iter().enumerate()
    {
        let case = Case::new(seed as u64, |g, _| {
            let ids = g.input("ids9", &[b, t], DType::I32);
            let lengths = g.input("pos.lengths", &[b, 1, 1, 1], DType::F32);
            let table = g.param("tokens", &[9, d], ZERO);
            let x = table.gather(ids) + g.param("positions", &[t, d], ZERO);
            let mask = g.iota(&[b, 1, 1, t], 3).lt(lengths * t as f64 * 0.4 + 1.0).where_(0.0, -1e9);
            let y = transformer_layer(g, x, mask, heads, 0.1);
            g.output("y", y);
            g.output("first", y.slice(1, 0, 1).squeeze(1));
        });
        case.tolerance(5e-4).check();
    }
}

#[test]
fn clip_loss() {
    for (seed, (n, d)) in [(5, 6), (1, 4), (70, 16), (33, 3)].into_iter().enumerate() {
        let case = Case::new(seed as u64, |g, _| {
            let (a, b) = (g.input("a", &[n, d], DType::F32), g.input("b", &[n, d], DType::F32));
            let scale = g.param("scale", &[], ZERO);
            let logits = a.l2_normalize().matmul(b.l2_normalize().t()) * scale.exp();
            let loss = (logits.cross_entropy_diagonal() + logits.t().cross_entropy_diagonal()) * 0.5;
            g.output("loss", loss);
            g.output("accuracy", logits.diagonal().eq(logits.max(&[-1], false)).mean_all());
        });
        case.tolerance(2e-4).check();
    }
}

/// The individualised temperatures: tables of a temperature, an average and its gradient for each sample.
#[test]
fn table_loss() {
    for (seed, (n, d, rows)) in [(4, 6, 4), (2, 3, 9), (24, 8, 200), (70, 5, 5000)].into_iter().enumerate() {
        let mut case = Case::new(seed as u64, |g, _| {
            let (a, b) = (g.input("a", &[n, d], DType::F32), g.input("b", &[n, d], DType::F32));
            let ids = g.input("ids_given", &[n], DType::I32);
            let (s, tau, u) =
                (g.state("s", &[rows], ZERO), g.state("pos.tau", &[rows], ZERO), g.state("u", &[rows], ZERO));
            let sim = a.l2_normalize().matmul(b.l2_normalize().t());
            let off = g.eye(n).eq(0.0);
            let diff = sim - sim.diagonal().unsqueeze(1);
            let t = tau.gather(ids).unsqueeze(1);
            let weights = (diff.detach() / t).exp() * off;
            let old = s.gather(ids);
            let gamma = 0.8;
            let average = old * (1.0 - gamma) + weights.mean(&[1], false) * gamma;
            let loss = (weights.detach() * diff * off / (average.unsqueeze(1).detach().abs() + 1.0))
                .sum(&[1], false)
                .mean_all();
            let grad_tau = average.abs().ln() + 0.5 - (weights * diff / t).mean(&[1], false);
            let momentum = u.gather(ids) * 0.9 + grad_tau * 0.1;
            g.update(s, s.scatter(ids, average.detach()));
            g.update(u, u.scatter(ids, momentum.detach()));
            g.update(tau, tau.scatter(ids, (tau.gather(ids) - momentum * 0.01).clamp(0.005, 1.0).detach()));
            g.output("loss", loss);
            g.output("mean_tau", tau.mean_all());
            g.output("old_s", s);
        });
        // Ids of a batch differ.
        case.values.insert("ids_given".into(), (0..n).map(|i| (i * 7 % rows.max(1)) as f64).collect());
        if rows == 4 || rows == 9 {
            case.values.insert("ids_given".into(), (0..n).rev().map(|i| i as f64).collect());
        }
        case.tolerance(3e-4).check();
    }
}

/// AdamW over flat memory, parameters as slices of it.
#[test]
fn flat_update() {
    for (seed, (m, n)) in [(3, 5), (40, 70), (300, 130)].into_iter().enumerate() {
        let total = m * n + n + 7;
        let case = Case::new(seed as u64, |g, _| {
            let flat = g.state("flat", &[total], ZERO);
            let (first, second) = (g.state("m", &[total], ZERO), g.state("pos.v", &[total], ZERO));
            let (rate, decay) = (
                g.input("pos.rate", &[], DType::F32),
                g.literal((0..total).map(|i| f64::from(u8::from(i < m * n))).collect(), &[total], DType::F32),
            );
            let weight = flat.slice(0, 0, m * n).reshape(&[m, n]);
            let bias = flat.slice(0, m * n, m * n + n);
            let x = g.input("x", &[4, m], DType::F32);
            let y = (x.matmul(weight) + bias).tanh();
            g.output("y", y);
            // A stand-in for the gradient: made of parts, as the real one.
            let dw = x.t().matmul(y * 0.1).reshape(&[m * n]);
            let grad = Tensor::concat(&[dw, y.sum(&[0], false), flat.slice(0, m * n + n, total) * 0.5], 0).unwrap();
            let norm = grad.square().sum_all().sqrt();
            let grad = grad * (1.0 / (norm + 1e-6)).minimum(1.0);
            let new_first = first * 0.9 + grad * 0.1;
            let new_second = second * 0.99 + grad.square() * 0.01;
            let step = new_first / (new_second.sqrt() + 1e-8);
            g.update(first, new_first);
            g.update(second, new_second);
            g.update(flat, flat * (1.0 - rate * 0.1 * decay) - rate * step);
            g.output("norm", norm);
        });
        case.forward_only().tolerance(2e-4).check();
    }
}

/// States whose new values depend on each other's old ones.
#[test]
fn chained_states() {
    for (seed, n) in [6, 5000].into_iter().enumerate() {
        let case = Case::new(seed as u64, |g, _| {
            let state = |name: &str| g.state(name, &[n], ZERO);
            let (a, b, c, d, e, f) = (state("a"), state("b"), state("c"), state("d"), state("e"), state("f"));
            let x = g.input("x", &[n], DType::F32);
            // Swapped; shifted along; read in another order.
            g.update(a, b);
            g.update(b, a);
            g.update(c, d);
            g.update(d, c + x);
            g.update(e, e.reshape(&[2, n / 2]).t().reshape(&[n]) * 0.5 + f);
            g.update(f, Tensor::concat(&[f.slice(0, 1, n), x.slice(0, 0, 1)], 0).unwrap());
            g.output("old_a", a);
            g.output("old_d", d.slice(0, 1, 3));
            g.output("after", (c * 2.0 + d).sum_all());
            g.output("turned", f.reshape(&[2, n / 2]).t());
        });
        case.forward_only().check();
    }
}

/// Row values updated beside a large matrix, and a state that takes an input as it is.
#[test]
fn row_states() {
    for (seed, (rows, cols)) in [(3, 4), (7, 3000), (1, 3000), (64, 100), (2500, 2)].into_iter().enumerate() {
        let case = Case::new(seed as u64, |g, _| {
            let x = g.input("x", &[rows, cols], DType::F32);
            let scale = g.state("scale", &[rows, 1], ZERO);
            let seen = g.state("seen", &[rows, cols], ZERO);
            let column = g.state("column", &[cols], ZERO);
            let new = scale * 0.9 + 0.1;
            g.update(scale, new);
            g.output("scaled", x * new);
            g.output("both", x * new + x * scale);
            g.update(seen, x);
            g.update(column, column * 0.5 + x.mean(&[0], false));
            g.output("columns", x * column);
        });
        case.check();
        // Without the gradients' row sums, tiles hold parts of rows.
        case.forward_only().check();
    }
}

#[test]
fn concatenation_in_place() {
    for seed in 0..6 {
        let case = Case::new(seed, |g, rng| {
            let n = rng.pick(&[3, 17, 3000]);
            let x = g.input("x", &[n, 2], DType::F32);
            let (a, b) = (x.tanh(), x.slice(1, 0, 1));
            let joined = Tensor::concat(&[a, x, a, a.exp(), b.expand_to(&[n, 2])], 0).unwrap();
            let outer = Tensor::concat(&[joined, a.exp().sum(&[0], true), joined * 2.0], 0).unwrap();
            let sideways = Tensor::concat(&[a, a.exp(), b], 1).unwrap();
            let state = g.state("flat", &[2 * n], ZERO);
            g.update(state, Tensor::concat(&[state.slice(0, n, 2 * n) * 0.5, state.slice(0, 0, n) + 1.0], 0).unwrap());
            g.output("outer", outer);
            g.output("joined", joined.sum(&[0], false));
            g.output("sideways", sideways * 3.0);
            g.output("part", a);
        });
        case.check();
    }
}
