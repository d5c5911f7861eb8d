//! Numbers to try a formula with, and the formula in f32 as training runs it.

use super::report::Fault;
use clip_host_model::replay::Compiled;
use clip_host_plugin_api::interpret::uniform;
use clip_host_plugin_api::ir::{Fragment, Op};
use std::collections::HashMap;

/// A stream of random numbers, the same in every process.
pub struct Random {
    seed: u64,
    next: u64,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Random { seed, next: 0 }
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        self.next += 1;
        uniform(self.seed, 0, self.next)
    }

    /// Uniform in [−1, 1).
    pub fn signed(&mut self) -> f64 {
        2.0 * self.unit() - 1.0
    }

    pub fn many(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.signed()).collect()
    }
}

/// Values of a fragment's inputs by name.
pub type Values = HashMap<String, Vec<f64>>;

/// Names and shapes of the leaves of a kind that some op reads, in order.
pub fn leaves(fragment: &Fragment, pick: impl Fn(&Op) -> Option<&String>) -> Vec<(String, Vec<usize>)> {
    let read = |id: usize| fragment.nodes.iter().any(|node| node.inputs.iter().any(|&input| input as usize == id));
    let leaf = fragment.nodes.iter().enumerate().filter(|(id, _)| read(*id));
    leaf.filter_map(|(_, node)| Some((pick(&node.op)?.clone(), node.shape.clone()))).collect()
}

pub fn params(fragment: &Fragment) -> Vec<(String, Vec<usize>)> {
    leaves(fragment, |op| match op {
        Op::Param { name, .. } => Some(name),
        _ => None,
    })
}

pub fn states(fragment: &Fragment) -> Vec<(String, Vec<usize>)> {
    // Not `leaves`: a state that nothing reads is what one wants to know of.
    let states = fragment.nodes.iter().filter_map(|node| match &node.op {
        Op::State { name, .. } => Some((name.clone(), node.shape.clone())),
        _ => None,
    });
    states.collect()
}

/// Compiles a fragment; with `of`, the gradient of that output, weighted by the input `cotangent`.
pub fn compile(fragment: &Fragment, of: Option<&str>, wrt: &[String]) -> Result<Compiled, Fault> {
    let seeds: Vec<_> = of.iter().map(|output| (output.to_string(), Some("cotangent".to_string()))).collect();
    Compiled::new(fragment, &seeds, wrt).map_err(|error| Fault::told(error).during("compiling the formula"))
}

/// Sets the inputs of an f32 formula; ids are whole numbers.
pub fn set(compiled: &mut Compiled, values: &Values) -> Result<(), Fault> {
    for (name, values) in values {
        match name.ends_with("_ids") {
            true => compiled.set_ids(name, values),
            false => compiled.set(name, values),
        }
        .map_err(Fault::told)?;
    }
    Ok(())
}

/// First values of parameters and states, as training draws them.
pub fn first_values(fragment: &Fragment) -> Result<Values, Fault> {
    let compiled = compile(fragment, None, &[])?;
    let kept = compiled.kept();
    Ok(kept.map(|(name, _, values)| (name.into(), values.iter().map(|&v| f64::from(v)).collect())).collect())
}

/// A fault if one of the values is NaN or infinite.
pub fn finite(attempted: &str, what: &str, values: &[f32], hint: &str) -> Result<(), Fault> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let got = match values.len() {
                1 => values[at].to_string(),
                count => format!("{} at element {at} of {count}", values[at]),
            };
            Err(Fault::new(format!("computing {attempted} in f32"), format!("{what} to be finite"), got, hint))
        }
    }
}

/// Sees to it that every state has an update, without which it is a constant; says which states there are.
pub fn declared(fragment: &Fragment) -> Result<String, Fault> {
    for (id, node) in fragment.nodes.iter().enumerate() {
        if let Op::State { name, .. } = &node.op
            && !fragment.updates.iter().any(|&(state, _)| state as usize == id)
        {
            return Err(Fault::new(
                format!("looking for what moves the state `{name}`"),
                "an update",
                "none, so that it stays what it is at first",
                "`graph.update(state, value)` moves it; what never changes is `graph.full` or `graph.literal`",
            ));
        }
    }
    let states = states(fragment);
    let named: Vec<String> = states.iter().take(4).map(|(name, shape)| format!("`{name}` {shape:?}")).collect();
    Ok(match states.len() {
        0 => "It keeps no state.".into(),
        count @ ..=4 => format!("It keeps {}.", named[..count].join(", ")),
        count => format!("It keeps {} and {} more.", named.join(", "), count - 4),
    })
}
