//! The gradient that training uses against central finite differences, in f64.
//!
//! A `detach` makes the two differ, by mistake or on purpose: weights that come from moving averages are held constant in
//! all global contrastive losses. So the differences are taken twice, of the value itself and of the value with all that
//! is detached held at what it was. The rules must agree with the second; where the first is another, the formula
//! detaches something that matters, which a loss has to declare.

use super::numbers::Values;
use super::report::Fault;
use clip_host_plugin_api::gradient::differentiate;
use clip_host_plugin_api::interpret::interpret;
use clip_host_plugin_api::ir::{DType, Fragment, Node, NodeId, Op};

/// The largest difference that rounding and curvature may make, as a share of the largest gradient.
pub const TOLERANCE: f64 = 1e-5;

/// A formula's output with values for all its leaves.
pub struct Point<'f> {
    pub fragment: &'f Fragment,
    pub output: &'f str,
    /// Weights of the output's elements; 1 for a loss.
    pub cotangent: Vec<f64>,
    pub values: Values,
    /// Seed of the random ops.
    pub seed: u64,
}

/// How far differences are from the gradient, as shares of the largest gradient.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distance {
    /// With what is detached held constant.
    pub held: f64,
    /// Of the value itself.
    pub value: f64,
}

impl Point<'_> {
    fn weigh(&self, fragment: &Fragment, results: &[Vec<f64>]) -> Option<f64> {
        let output = &results[fragment.output(self.output)? as usize];
        Some(output.iter().zip(&self.cotangent).map(|(y, weight)| y * weight).sum())
    }

    fn value(&self, fragment: &Fragment, values: &Values) -> Result<f64, Fault> {
        let results = interpret(fragment, values, self.seed).map_err(told)?;
        self.weigh(fragment, &results).ok_or_else(|| Fault::told(format!("there is no output `{}`", self.output)))
    }

    /// The gradient by the rules, for each leaf.
    pub fn gradient(&self, wrt: &[NodeId]) -> Result<Vec<Vec<f64>>, Fault> {
        let mut program = self.fragment.clone();
        let target = program.output(self.output).ok_or_else(|| Fault::told("the output is missing"))?;
        let shape = program.nodes[target as usize].shape.clone();
        let seed = program.nodes.len() as NodeId;
        let op = Op::Input { name: "cotangent".into() };
        program.nodes.push(Node { op, inputs: vec![], shape, dtype: DType::F32 });
        let program = differentiate(&program, &[(target, seed)], wrt)
            .map_err(|error| Fault::told(error).during("differentiating the formula"))?;
        let mut values = self.values.clone();
        values.insert("cotangent".into(), self.cotangent.clone());
        let results = interpret(&program, &values, self.seed).map_err(told)?;
        let gradient = |i: usize| program.output(&format!("grad.{i}")).map(|id| results[id as usize].clone());
        (0..wrt.len()).map(|i| gradient(i).ok_or_else(|| Fault::told("a gradient is missing"))).collect()
    }

    /// The fragment in which every detached value is an input, and the values with those.
    fn held(&self, pick: impl Fn(NodeId) -> bool) -> Result<(Fragment, Values), Fault> {
        let results = interpret(self.fragment, &self.values, self.seed).map_err(told)?;
        let (mut fragment, mut values) = (self.fragment.clone(), self.values.clone());
        for (id, node) in fragment.nodes.iter_mut().enumerate() {
            if matches!(node.op, Op::Detach) && pick(id as NodeId) {
                let name = format!("held.{id}");
                values.insert(name.clone(), results[id].clone());
                (node.op, node.inputs) = (Op::Input { name }, vec![]);
            }
        }
        Ok((fragment, values))
    }

    /// Compares the gradient with differences, element by element of each leaf, at most `most` of one, evenly spread.
    pub fn compare(&self, wrt: &[(String, NodeId)], most: usize) -> Result<Vec<(String, Distance)>, Fault> {
        let gradients = self.gradient(&wrt.iter().map(|leaf| leaf.1).collect::<Vec<_>>())?;
        let (held, held_values) = self.held(|_| true)?;
        let mut found = Vec::new();
        let mut scale = 1e-6f64;
        for ((name, _), gradient) in wrt.iter().zip(&gradients) {
            let count = gradient.len().min(most).max(1);
            for at in (0..count).map(|i| i * gradient.len() / count) {
                let x = self.values.get(name).and_then(|values| values.get(at)).copied().unwrap_or_default();
                let step = 1e-6 * x.abs().max(1.0);
                let slope = |fragment: &Fragment, values: &Values| -> Result<f64, Fault> {
                    let mut values = values.clone();
                    let mut ends = [0.0; 2];
                    for (end, x) in ends.iter_mut().zip([x + step, x - step]) {
                        if let Some(values) = values.get_mut(name) {
                            values[at] = x;
                        }
                        *end = self.value(fragment, &values)?;
                    }
                    Ok((ends[0] - ends[1]) / (2.0 * step))
                };
                let slopes = (slope(&held, &held_values)?, slope(self.fragment, &self.values)?);
                scale = scale.max(gradient[at].abs()).max(slopes.0.abs()).max(slopes.1.abs());
                found.push((name.clone(), gradient[at], slopes));
            }
        }
        Ok(wrt
            .iter()
            .map(|(name, _)| {
                let own = found.iter().filter(|(leaf, ..)| leaf == name);
                let distance = own.fold(Distance::default(), |worst, (_, gradient, (held, value))| {
                    // `f64::max` passes over NaN, which is as far as can be.
                    let far = |slope: &f64| Some((slope - gradient).abs() / scale).filter(|d| !d.is_nan());
                    let far = |slope| far(slope).unwrap_or(f64::INFINITY);
                    Distance { held: worst.held.max(far(held)), value: worst.value.max(far(value)) }
                });
                (name.clone(), distance)
            })
            .collect())
    }

    /// Compares the slope along one direction in the space of all leaves: for formulas with many.
    pub fn compare_along(&self, wrt: &[(String, NodeId)], direction: &[Vec<f64>]) -> Result<Distance, Fault> {
        let gradients = self.gradient(&wrt.iter().map(|leaf| leaf.1).collect::<Vec<_>>())?;
        let dot = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let expected: f64 = gradients.iter().zip(direction).map(|(g, d)| dot(g, d)).sum();
        // What the slope would be if no terms cancelled.
        let terms = gradients.iter().zip(direction).flat_map(|(g, d)| g.iter().zip(d));
        let scale = terms.map(|(g, d)| (g * d).powi(2)).sum::<f64>().sqrt().max(1e-6);
        let slope = |fragment: &Fragment, values: &Values| -> Result<f64, Fault> {
            let step = 1e-6;
            let mut ends = [0.0; 2];
            for (end, by) in ends.iter_mut().zip([step, -step]) {
                let mut moved = values.clone();
                for ((name, _), direction) in wrt.iter().zip(direction) {
                    let values = moved.get_mut(name).into_iter().flatten();
                    values.zip(direction).for_each(|(x, d)| *x += by * d);
                }
                *end = self.value(fragment, &moved)?;
            }
            Ok((ends[0] - ends[1]) / (2.0 * step))
        };
        let (held, held_values) = self.held(|_| true)?;
        let far = |slope: f64| Some((slope - expected).abs() / scale).filter(|d| !d.is_nan()).unwrap_or(f64::INFINITY);
        let value = far(slope(self.fragment, &self.values)?);
        let held = far(slope(&held, &held_values)?);
        Ok(Distance { held, value })
    }

    /// The detached nodes that matter: those through which, were they not detached, some of the value's slope in a leaf
    /// would flow. As `plugins inspect --fragment` numbers them.
    pub fn culprits(&self, leaf: &str) -> Result<Vec<NodeId>, Fault> {
        let detached = self.fragment.nodes.iter().enumerate().filter(|(_, node)| matches!(node.op, Op::Detach));
        let end = |fragment: &Fragment, mut values: Values| {
            for (i, x) in values.get_mut(leaf).into_iter().flatten().enumerate() {
                // Another direction for each element.
                *x += 1e-3 * ((i * 7919 % 13) as f64 - 6.0) / 6.0;
            }
            self.value(fragment, &values)
        };
        let (fragment, values) = self.held(|_| true)?;
        let all_held = end(&fragment, values)?;
        let mut culprits = Vec::new();
        for (id, _) in detached {
            let (fragment, values) = self.held(|other| other as usize != id)?;
            if (end(&fragment, values)? - all_held).abs() > 1e-9 * all_held.abs().max(1.0) {
                culprits.push(id as NodeId);
            }
        }
        Ok(culprits)
    }
}

fn told(error: clip_host_plugin_api::interpret::InterpretError) -> Fault {
    Fault::told(error).during("computing the formula in f64")
}

/// The node of a leaf.
pub fn node(fragment: &Fragment, leaf: &str) -> Option<NodeId> {
    let position = fragment.nodes.iter().position(|node| match &node.op {
        Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } => name == leaf,
        _ => false,
    });
    position.map(|id| id as NodeId)
}
