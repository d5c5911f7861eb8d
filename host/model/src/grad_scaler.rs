//! Scaling of the loss before it is differentiated, so that gradients lie within the range of f16 (Micikevicius et al. 2018,
//! "Mixed precision training"), as `torch.amp.GradScaler` does it.
//!
//! All of it is in the graph: the gradients' seed is the scale, gradients are divided by it, and where one of them is not
//! finite every tensor that stays keeps its value and the scale falls. The scale and its counters are persistent tensors.

use crate::ModelError;
use clip_host_graph::program::Program;
use clip_host_graph::rewrite::operator;
use clip_host_plugin_api::graph::Graph;
use clip_host_plugin_api::ir::{DType, Init, Node, Op};
use luminal::graph::NodeIndex;
use std::collections::HashMap;

/// The scale's settings, with the defaults of `torch.amp.GradScaler`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradScaler {
    /// The first scale.
    pub init_scale: f64,
    /// What it is multiplied by after `growth_interval` steps with finite gradients.
    pub growth_factor: f64,
    /// What it is multiplied by after a step with a gradient that is not finite.
    pub backoff_factor: f64,
    /// In steps.
    pub growth_interval: u64,
}

impl Default for GradScaler {
    fn default() -> Self {
        GradScaler { init_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

/// The output with the scale of the step.
pub(crate) const SCALE: &str = "loss_scale";
/// The state that counts skipped steps. An optimizer's steps are those that were not.
pub(crate) const SKIPPED: &str = "grad_scaler.skipped_steps";

impl GradScaler {
    /// The leaf of the scale, of the loss's shape.
    pub(crate) fn leaf(&self, program: &mut Program, loss: NodeIndex) -> NodeIndex {
        let shape = operator(&program.graph, loss).map_or(vec![], |o| o.shape.clone());
        let op = Op::State { name: "grad_scaler.scale".into(), init: Init::Constant(self.init_scale) };
        program.push(&Node { op, inputs: vec![], shape, dtype: DType::F32 }, &[])
    }

    /// Makes every update of the program depend on `finite` (0, or NaN where a gradient is not finite), and adds the scale's
    /// own.
    pub(crate) fn guard(&self, program: &mut Program, scale: NodeIndex, finite: NodeIndex) -> Result<(), ModelError> {
        for index in 0..program.updates.len() {
            let (leaf, new) = program.updates[index];
            program.updates[index].1 = select(program, finite, new, leaf)?;
        }
        let shape = operator(&program.graph, scale).map_or(vec![], |o| o.shape.clone());
        let graph = Graph::new();
        let before = graph.input("scale", &shape, DType::F32);
        let good = graph.input("finite", &[], DType::F32).eq(0.0);
        let tracker = graph.state("growth_tracker", &[], Init::Constant(0.0));
        let skipped = graph.state("skipped_steps", &[], Init::Constant(0.0));
        let steps = tracker + 1.0;
        let grows = steps.ge(self.growth_interval as f64);
        graph.update(tracker, good.where_(grows.where_(0.0, steps), 0.0));
        graph.update(skipped, good.where_(skipped, skipped + 1.0));
        let larger = before * self.growth_factor;
        // A scale that would be infinite stays as it is.
        let larger = (larger * 0.0).eq(0.0).where_(larger, before);
        let new = good.where_(grows.where_(larger, before), before * self.backoff_factor);
        graph.output("scale", new);
        let fragment = graph.finish()?;
        let bindings = HashMap::from([("scale".to_string(), scale), ("finite".to_string(), finite)]);
        let spliced = program.splice(&fragment, "grad_scaler", &bindings, |_, name| format!("grad_scaler.{name}"))?;
        if let Some(id) = fragment.output("scale") {
            program.updates.push((scale, spliced.nodes[id as usize]));
        }
        Ok(())
    }
}

/// `new` if `finite` is 0, else `old`.
fn select(program: &mut Program, finite: NodeIndex, new: NodeIndex, old: NodeIndex) -> Result<NodeIndex, ModelError> {
    let shape = operator(&program.graph, new).map_or(vec![], |o| o.shape.clone());
    let graph = Graph::new();
    let input = |name: &str| graph.input(name, &shape, DType::F32);
    let good = graph.input("finite", &[], DType::F32).eq(0.0);
    graph.output("kept", good.where_(input("new"), input("old")));
    let fragment = graph.finish()?;
    let bindings = [("finite", finite), ("new", new), ("old", old)].map(|(name, id)| (name.to_string(), id));
    let spliced = program.splice(&fragment, "grad_scaler", &bindings.into(), |_, name| name.to_string())?;
    Ok(fragment.output("kept").map_or(new, |id| spliced.nodes[id as usize]))
}
