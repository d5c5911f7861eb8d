//! Every gradient rule against central finite differences in f64, and composites against their definitions.

use clip_host_plugin_api::ir::{Conv, DType, Layout, Pool};
use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::testing::Harness;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> f64 {
        self.0 = clip_host_plugin_api::interpret::mix(self.0);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
    fn size(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() * (high - low + 1) as f64) as usize
    }
    fn values(&mut self, n: usize, low: f64, high: f64) -> Vec<f64> {
        (0..n).map(|_| low + (high - low) * self.next()).collect()
    }
}

/// Checks `f` over inputs of the given shapes with values in `low..high`; the output is weighted, so that a gradient
/// that ignores its cotangent is found.
fn check<F>(name: &str, shapes: &[Vec<usize>], low: f64, high: f64, f: F)
where
    F: for<'g> Fn(&'g Graph, &[Tensor<'g>]) -> Tensor<'g>,
{
    let mut rng = Rng(name.bytes().fold(7, |h, b| h * 31 + u64::from(b)));
    let graph = Graph::new();
    let names: Vec<String> = (0..shapes.len()).map(|i| format!("x{i}")).collect();
    let inputs: Vec<Tensor> = names.iter().zip(shapes).map(|(n, s)| graph.input(n, s, DType::F32)).collect();
    let y = f(&graph, &inputs);
    let weights = graph.input("weights", &y.shape(), DType::F32);
    graph.output("sum", (y * weights).sum_all());
    let count = y.shape().iter().product();
    let mut harness = Harness::new(graph.finish().unwrap_or_else(|e| panic!("{name}: {e}")));
    harness.set("weights", rng.values(count, -1.0, 1.0));
    for (n, s) in names.iter().zip(shapes) {
        harness.set(n, rng.values(s.iter().product(), low, high));
    }
    let wrt: Vec<&str> = names.iter().map(String::as_str).collect();
    let error = harness.gradient_error("sum", &wrt).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(error < 2e-6, "{name}: gradient error {error:e}");
}

fn shape(rng: &mut Rng) -> Vec<usize> {
    (0..rng.size(1, 4)).map(|_| rng.size(1, 4)).collect()
}

#[test]
fn elementwise() {
    let mut rng = Rng(1);
    for _ in 0..3 {
        let s = shape(&mut rng);
        let one = [s.clone()];
        let two = [s.clone(), s.clone()];
        check("neg", &one, -2.0, 2.0, |_, x| -x[0]);
        check("exp", &one, -2.0, 2.0, |_, x| x[0].exp());
        check("ln", &one, 0.2, 3.0, |_, x| x[0].ln());
        check("sqrt", &one, 0.2, 3.0, |_, x| x[0].sqrt());
        check("recip", &one, 0.3, 3.0, |_, x| x[0].recip());
        check("tanh", &one, -2.0, 2.0, |_, x| x[0].tanh());
        check("erf", &one, -3.0, 3.0, |_, x| x[0].erf());
        check("sin", &one, -3.0, 3.0, |_, x| x[0].sin());
        check("cos", &one, -3.0, 3.0, |_, x| x[0].cos());
        check("abs", &one, -2.0, 2.0, |_, x| x[0].abs());
        check("sigmoid", &one, -4.0, 4.0, |_, x| x[0].sigmoid());
        check("gelu", &one, -3.0, 3.0, |_, x| x[0].gelu());
        check("quick_gelu", &one, -3.0, 3.0, |_, x| x[0].quick_gelu());
        check("relu", &one, -2.0, 2.0, |_, x| x[0].relu());
        check("clamp", &one, -2.0, 2.0, |_, x| x[0].clamp(-1.0, 1.0));
        check("add", &two, -2.0, 2.0, |_, x| x[0] + x[1]);
        check("sub", &two, -2.0, 2.0, |_, x| x[0] - x[1]);
        check("mul", &two, -2.0, 2.0, |_, x| x[0] * x[1]);
        check("div", &two, 0.4, 2.0, |_, x| x[0] / x[1]);
        check("maximum", &two, -2.0, 2.0, |_, x| x[0].maximum(x[1]));
        check("minimum", &two, -2.0, 2.0, |_, x| x[0].minimum(x[1]));
        check("pow", &two, 0.4, 2.0, |_, x| x[0].pow(x[1]));
        check("where", &two, -2.0, 2.0, |_, x| x[0].lt(0.3).where_(x[0] * x[1], x[1]));
    }
}

#[test]
fn reductions_and_rows() {
    let mut rng = Rng(2);
    for _ in 0..4 {
        let s = [rng.size(1, 3), rng.size(2, 4), rng.size(2, 5)].to_vec();
        let one = [s.clone()];
        check("sum", &one, -2.0, 2.0, |_, x| x[0].sum(&[0, 2], false));
        check("mean", &one, -2.0, 2.0, |_, x| x[0].mean(&[1], true));
        check("max", &one, -2.0, 2.0, |_, x| x[0].max(&[-1], false));
        check("logsumexp", &one, -2.0, 2.0, |_, x| x[0].logsumexp());
        check("softmax", &one, -2.0, 2.0, |_, x| x[0].softmax());
        check("log_softmax", &one, -2.0, 2.0, |_, x| x[0].log_softmax());
        check("l2_normalize", &one, -2.0, 2.0, |_, x| x[0].l2_normalize());
        let n = s[2];
        check("layer_norm", &[s.clone(), vec![n], vec![n]], -2.0, 2.0, |_, x| x[0].layer_norm(x[1], x[2], 1e-5));
        let c = s[1];
        check("batch_norm", &[s.clone(), vec![c], vec![c]], -2.0, 2.0, |_, x| x[0].batch_norm(x[1], x[2], 1e-5));
        check("diagonal", &[vec![n, n]], -2.0, 2.0, |_, x| x[0].diagonal());
        check("cross_entropy", &[vec![n, n]], -2.0, 2.0, |_, x| x[0].cross_entropy_diagonal());
    }
}

#[test]
fn movement() {
    let mut rng = Rng(3);
    for _ in 0..4 {
        let s = [rng.size(1, 3), rng.size(2, 4), rng.size(2, 5)].to_vec();
        let one = [s.clone()];
        check("reshape", &one, -2.0, 2.0, |_, x| x[0].reshape(&[x[0].shape().iter().product()]));
        check("permute", &one, -2.0, 2.0, |_, x| x[0].permute(&[2, 0, 1]));
        check("broadcast", &[vec![s[1], 1]], -2.0, 2.0, |_, x| x[0].expand_to(&[3, x[0].size(0), 4]));
        check("slice", &one, -2.0, 2.0, |_, x| x[0].slice(1, 1, 2));
        check("pad", &one, -2.0, 2.0, |_, x| x[0].pad(&[1, 0, 2], &[0, 1, 1], 0.5));
        check("concat", &[s.clone(), s.clone()], -2.0, 2.0, |_, x| {
            Tensor::concat(&[x[0], x[1], x[0]], 1).unwrap_or(x[0])
        });
    }
}

#[test]
fn products_and_windows() {
    let mut rng = Rng(4);
    for _ in 0..3 {
        let (b, m, k, n) = (rng.size(1, 3), rng.size(1, 4), rng.size(1, 4), rng.size(1, 4));
        check("matmul", &[vec![b, m, k], vec![b, k, n]], -2.0, 2.0, |_, x| x[0].matmul(x[1]));
        check("linear", &[vec![b, m, k], vec![n, k], vec![n]], -2.0, 2.0, |_, x| x[0].linear(x[1], Some(x[2])));
        let d = [b, 2, m + 1, k];
        check("attention", &[d.to_vec(), d.to_vec(), d.to_vec()], -1.0, 1.0, |_, x| x[0].attention(x[1], x[2], None));
    }
    for layout in [Layout::Nchw, Layout::Nhwc] {
        for (stride, padding, dilation, groups) in [(1, 1, 1, 1), (2, 1, 1, 2), (2, 0, 2, 1), (1, 2, 2, 4)] {
            let conv = Conv { stride: [stride; 2], padding: [padding; 2], dilation: [dilation; 2], groups, layout };
            let shapes = [layout.shape(2, 4, 6, 5), vec![4, 4 / groups, 3, 2]];
            check("conv2d", &shapes, -1.0, 1.0, |_, x| x[0].conv2d(x[1], conv));
        }
        for (kernel, stride, padding, count_include_pad) in [(2, 2, 0, true), (3, 2, 1, true), (3, 1, 1, false)] {
            let pool =
                Pool { kernel: [kernel; 2], stride: [stride; 2], padding: [padding; 2], count_include_pad, layout };
            let shapes = [layout.shape(2, 3, 6, 5)];
            check("max_pool2d", &shapes, -1.0, 1.0, |_, x| x[0].max_pool2d(pool));
            check("avg_pool2d", &shapes, -1.0, 1.0, |_, x| x[0].avg_pool2d(pool));
        }
    }
}

#[test]
fn tables() {
    let ids = |g: &'static str, v: Vec<f64>| (g, v);
    for (_, values) in [ids("distinct", vec![0.0, 3.0, 1.0]), ids("repeated", vec![2.0, 2.0, 0.0])] {
        check("gather", &[vec![4, 3]], -1.0, 1.0, |g, x| x[0].gather(g.literal(values.clone(), &[3], DType::I32)));
    }
}

#[test]
fn mistakes_are_told_with_their_place() {
    let graph = Graph::new();
    let a = graph.input("a", &[2, 3], DType::F32);
    let b = graph.input("b", &[4, 5], DType::F32);
    let _ = a + b;
    let error = graph.finish().unwrap_err().to_string();
    assert!(error.contains("[2, 3] and [4, 5] do not broadcast") && error.contains("gradients.rs:"), "{error}");
}

#[test]
fn projection_replaces_the_parameter_and_passes_the_gradient() {
    let graph = Graph::new();
    let t = graph.param("t", &[], Init::Constant(3.0));
    let t = graph.project(t, |t| t.clamp(0.0, 1.0));
    graph.output("y", t * t);
    let mut harness = Harness::new(graph.finish().unwrap());
    let step = harness.step(Some(("y", None)), &["t"]).unwrap();
    assert_eq!((step.outputs["y"][0], step.grads["t"][0], harness.values["t"][0]), (1.0, 2.0, 1.0));
}

/// What [`Harness::fill`] gives each leaf is what the host would give a loss.
#[test]
fn leaves_are_filled_with_what_their_contract_allows() {
    #[derive(Default, Serialize, Deserialize, JsonSchema)]
    struct Nothing {}
    struct Any;
    impl Plugin for Any {
        type Config = Nothing;
        const ID: &'static str = "any";
        const DOC: &'static str = "Reads a few of its inputs.";
    }
    impl Loss for Any {
        fn build<'g>(_: &Nothing, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
            let scale = graph.param("scale", &[], Init::Constant(2.0));
            let table = graph.state("table", &[inputs.dataset_size], Init::Normal { std: 1.0 });
            let mine = table.gather(inputs.image_ids).mean_all();
            Ok(inputs.image_features.sum_all() * scale + mine + inputs.step)
        }
    }
    let filled = |seed| {
        let mut harness = Harness::loss::<Any>(&Nothing {}, 3, 4, 10).expect("there is nothing to refuse");
        harness.fill(seed);
        harness.values
    };
    let values = filled(1);
    for row in values["image_features"].chunks(4) {
        assert!((row.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-12, "{row:?} has no unit length");
    }
    assert_eq!(values["image_ids"], [0.0, 1.0, 2.0]);
    assert_eq!((&values["scale"], &values["step"]), (&vec![2.0], &vec![0.0]), "starts and clocks stay");
    assert!(values["table"].len() == 10 && values["table"].iter().all(|x| (-1.0..1.0).contains(x)));
    assert_ne!(values["image_features"], values["text_features"]);
    assert_eq!(values, filled(1));
    assert_ne!(values["table"], filled(2)["table"]);
}
