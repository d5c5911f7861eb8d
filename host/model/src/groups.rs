//! Which parameters are updated together, at which rate, with which weight decay; which not at all.

use crate::assemble::ParamSlot;
use crate::{ModelError, ModelSpec};
use clip_host_plugin_api::ir::{Fragment, Op};
use clip_host_plugin_api::optimizer::ScalarsRequest;

/// Parameters with settings of their own. A parameter belongs to the first group that names it.
#[derive(Clone, Debug)]
pub struct ParamGroup {
    /// Names, in which `*` stands for any text.
    pub params: Vec<String>,
    /// What the learning rate is multiplied by.
    pub lr_scale: f64,
    /// In place of the model's, for those that decay.
    pub weight_decay: Option<f64>,
    /// They keep their first values, and no gradient is computed for them.
    pub freeze: bool,
    /// They keep their first values for so many epochs.
    pub freeze_epochs: u64,
}

/// The patterns of `no_decay` that need not match: they stand in every recipe that says nothing else.
const DEFAULTS: [&str; 2] = ["1d", "*.bias"];

/// The group that a parameter belongs to, and its number.
pub(crate) fn group_of<'s>(spec: &'s ModelSpec, name: &str) -> Option<(usize, &'s ParamGroup)> {
    spec.groups.iter().enumerate().find(|(_, group)| group.params.iter().any(|pattern| matches(pattern, name)))
}

/// Refuses the first pattern that matches no parameter.
pub(crate) fn check_patterns(spec: &ModelSpec, names: &[String]) -> Result<(), ModelError> {
    let groups = spec.groups.iter().enumerate().flat_map(|(number, group)| {
        let key = move |index| format!("optimizer.groups[{number}].params[{index}]");
        group.params.iter().enumerate().map(move |(index, pattern)| (key(index), pattern))
    });
    let no_decay = spec.no_decay.iter().enumerate().filter(|(_, pattern)| !DEFAULTS.contains(&pattern.as_str()));
    let no_decay = no_decay.map(|(index, pattern)| (format!("optimizer.no_decay[{index}]"), pattern));
    for (key, pattern) in groups.chain(no_decay) {
        if !names.iter().any(|name| matches(pattern, name)) {
            return Err(ModelError::Pattern { key, pattern: pattern.clone(), choices: choices(pattern, names) });
        }
    }
    Ok(())
}

/// The names that begin most like a pattern, and what all names begin with.
fn choices(pattern: &str, names: &[String]) -> String {
    const NEAREST: usize = 3;
    let common = |name: &str| pattern.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    let mut nearest: Vec<&str> = names.iter().map(String::as_str).collect();
    nearest.sort_by_key(|name| std::cmp::Reverse(common(name)));
    nearest.truncate(NEAREST);
    let mut parts: Vec<String> =
        names.iter().filter_map(|name| Some(format!("{}.*", name.split_once('.')?.0))).collect();
    parts.dedup();
    format!("the nearest names are {}; all are of {}", nearest.join(", "), parts.join(", "))
}

/// Whether a parameter decays: not if a pattern of `no_decay` matches it.
pub(crate) fn decays(no_decay: &[String], name: &str, dims: usize) -> bool {
    !no_decay.iter().any(|pattern| match pattern.as_str() {
        "1d" => dims == 1,
        pattern => matches(pattern, name),
    })
}

/// `*` stands for any run of characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => {
            let Some(tail) = name.strip_prefix(start) else { return false };
            (0..=tail.len()).any(|i| tail.is_char_boundary(i) && matches(rest, &tail[i..]))
        }
    }
}

/// Parameters that share a flat tensor, or one that stands alone.
pub(crate) struct Group {
    pub name: String,
    pub weight_decay: f64,
    /// Number of the set of scalars that it is updated with.
    pub set: usize,
    /// It is frozen at first.
    pub late: bool,
    pub members: Vec<usize>,
    pub flat: bool,
}

pub(crate) struct Groups {
    pub groups: Vec<Group>,
    pub sets: Vec<ScalarSet>,
}

/// The optimizer's scalars as some parameters see them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScalarSet {
    /// What the learning rate is multiplied by.
    pub lr_scale: f64,
    /// The epoch that steps count from.
    pub from_epoch: u64,
}

/// The input that an optimizer's scalar comes in by.
pub(crate) fn scalar_input(set: usize, name: &str) -> String {
    match set {
        0 => format!("scalar.{name}"),
        set => format!("scalar.{set}.{name}"),
    }
}

/// The input that is 0 as long as the parameters of a set are frozen, then 1.
pub(crate) fn active_input(set: usize) -> String {
    format!("active.{set}")
}

/// Elementwise optimizers update all parameters of one rate and weight decay in one flat tensor.
pub(crate) fn group_params(
    spec: &ModelSpec,
    params: &mut [ParamSlot],
    projected: &[bool],
) -> Result<Groups, ModelError> {
    let request = ScalarsRequest { config: spec.optimizer.config.clone(), step: 1, lr: 0.0 };
    let elementwise = spec.optimizer.plugin.scalars(&request)?.elementwise;
    let mut groups: Vec<Group> = Vec::new();
    let mut sets = vec![ScalarSet { lr_scale: 1.0, from_epoch: 0 }];
    for (index, param) in params.iter_mut().enumerate() {
        let own = group_of(spec, &param.name);
        let wanted =
            own.map_or(sets[0], |(_, group)| ScalarSet { lr_scale: group.lr_scale, from_epoch: group.freeze_epochs });
        let set = sets.iter().position(|set| *set == wanted).unwrap_or_else(|| {
            sets.push(wanted);
            sets.len() - 1
        });
        let late = wanted.from_epoch > 0;
        let weight_decay = match decays(&spec.no_decay, &param.name, param.shape.len()) {
            true => own.and_then(|(_, group)| group.weight_decay).unwrap_or(spec.weight_decay),
            false => 0.0,
        };
        if !elementwise || projected[index] {
            let name = param.name.clone();
            groups.push(Group { name, weight_decay, set, late, members: vec![index], flat: false });
            continue;
        }
        let decay = if weight_decay != 0.0 { "decay" } else { "no_decay" };
        let half = if param.half { "half." } else { "" };
        let name = match own {
            Some((number, _)) => format!("params.group{number}.{half}{decay}"),
            None => format!("params.{half}{decay}"),
        };
        param.storage = name.clone();
        match groups.iter_mut().find(|g| g.flat && g.name == name) {
            Some(group) => group.members.push(index),
            None => {
                groups.push(Group { name, weight_decay, set, late, members: vec![index], flat: true });
            }
        }
    }
    for group in groups.iter().filter(|g| g.flat) {
        let mut offset = 0;
        for &member in &group.members {
            params[member].offset = offset;
            offset += params[member].elements();
        }
    }
    Ok(Groups { groups, sets })
}

/// Refuses an update of joined parameters that looks beyond the element: a sum would run over all of them, and a state of
/// another shape could not be told apart by parameter.
pub(crate) fn check_elementwise(plugin: &str, fragment: &Fragment) -> Result<(), ModelError> {
    let shape = fragment.output("param").map(|id| &fragment.nodes[id as usize].shape);
    for node in &fragment.nodes {
        let got = match &node.op {
            Op::State { name, .. } if Some(&node.shape) != shape => {
                format!("a state `{name}` of shape {:?}", node.shape)
            }
            Op::Input { .. } | Op::State { .. } | Op::Constant { .. } | Op::Random { .. } => continue,
            Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select | Op::Cast | Op::Detach => continue,
            Op::Reshape | Op::Broadcast => continue,
            op => format!("the op `{}`", op.name()),
        };
        return Err(ModelError::NotElementwise { plugin: plugin.into(), got });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clip_host_plugin_api::graph::{Graph, Tensor};
    use clip_host_plugin_api::ir::{DType, Init};

    /// Checks the update that `build` makes of parameter and gradient; the error's words.
    fn update(build: impl for<'g> FnOnce(&'g Graph, Tensor<'g>, Tensor<'g>) -> Tensor<'g>) -> Option<String> {
        let graph = Graph::new();
        let input = |name| graph.input(name, &[6], DType::F32);
        let new = build(&graph, input("param"), input("grad"));
        graph.output("param", new);
        let fragment = graph.finish().expect("the update builds");
        check_elementwise("optimizer plugin `x`", &fragment).err().map(|error| error.to_string())
    }

    #[test]
    fn updates_of_joined_parameters_stay_with_the_element() {
        let momentum = update(|graph, param, grad| {
            let state = graph.state("buffer", &[6], Init::Constant(0.0));
            let rate = graph.input("scalar.lr", &[], DType::F32);
            graph.update(state, state * 0.9 + grad.abs().sqrt().clamp(0.0, 1.0));
            grad.gt(0.0).where_(param - state * rate, param)
        });
        assert_eq!(momentum, None);
        let norm = update(|_, param, grad| param - grad / grad.square().sum_all());
        assert!(norm.is_some_and(|text| text.contains("the op `sum`") && text.contains("ELEMENTWISE")));
        let count = update(|graph, param, grad| {
            let state = graph.state("count", &[], Init::Constant(0.0));
            graph.update(state, state + 1.0);
            param - grad / state
        });
        assert!(count.is_some_and(|text| text.contains("a state `count` of shape []")));
    }

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, name, expected) in [
            ("a.weight", "a.weight", true),
            ("a.weight", "a.weights", false),
            ("*.weight", "a.b.weight", true),
            ("a.*.weight", "a.b.c.weight", true),
            ("a.*.weight", "a.weight", false),
            ("a*", "a", true),
            ("*", "", true),
            ("*é*", "caffé.x", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn choices_begin_like_the_pattern() {
        let names = ["image.conv.weight", "image.bn.weight", "text.words.weight", "text.head.bias"].map(String::from);
        let text = choices("text.wrods.*", &names);
        assert!(text.starts_with("the nearest names are text.words.weight, text.head.bias,"), "{text}");
        assert!(text.ends_with("all are of image.*, text.*"), "{text}");
    }
}
