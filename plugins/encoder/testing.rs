//! What the encoders' tests share: golden files and comparison with them. Included by path.

use clip_host_plugin_api::ir::{Fragment, Op};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;

/// The tensors of a golden file as f64.
pub struct Golden(BTreeMap<String, Vec<f64>>);

impl Golden {
    /// Reads `tests/golden/encoders/NAME.safetensors`.
    pub fn read(name: &str) -> Golden {
        let path = format!("{}/../../../tests/golden/encoders/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
        let values = |dtype: Dtype, data: &[u8]| -> Vec<f64> {
            match dtype {
                Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
                Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
                other => panic!("{path}: a tensor of {other:?}"),
            }
        };
        let tensors = file.tensors().into_iter();
        Golden(tensors.map(|(name, view)| (name, values(view.dtype(), view.data()))).collect())
    }

    pub fn get(&self, name: &str) -> &[f64] {
        self.0.get(name).unwrap_or_else(|| panic!("the golden file has no `{name}`"))
    }

    /// The tensors whose names begin with `prefix`, without it.
    pub fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a [f64])> {
        self.0.iter().filter_map(move |(name, v)| Some((name.strip_prefix(prefix)?, v.as_slice())))
    }
}

/// Fails unless |x − y| ≤ absolute + relative · max|y|. The golden values were computed in f64 and rounded to f32, we
/// compute in f64: what remains is that rounding, far inside the golden files' own tolerance (2e-5 and 2e-4).
pub fn assert_close(what: &str, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{what}: number of elements");
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let tolerance = 1e-9 + 2e-7 * largest;
    for (i, (x, y)) in got.iter().zip(expected).enumerate() {
        // Written so that a NaN fails.
        assert!((x - y).abs() <= tolerance, "{what}[{i}]: {x} is not {y} (tolerance {tolerance:e})");
    }
}

/// Names and shapes of the parameters.
pub fn params(fragment: &Fragment) -> BTreeMap<&str, &[usize]> {
    let named = fragment.nodes.iter().filter_map(|node| match &node.op {
        Op::Param { name, .. } => Some((name.as_str(), node.shape.as_slice())),
        _ => None,
    });
    named.collect()
}

/// Number of trained values.
pub fn count(fragment: &Fragment) -> usize {
    params(fragment).values().map(|shape| shape.iter().product::<usize>()).sum()
}

/// Every range that the settings' schema states is also checked by the plugin itself: `refuses` gets the settings with
/// one number just above its range.
pub fn assert_ranges_checked<C: schemars::JsonSchema + serde::Serialize + Default>(
    refuses: impl Fn(serde_json::Value) -> bool,
) {
    let schema = schemars::schema_for!(C).to_value();
    let defaults = serde_json::to_value(C::default()).expect("settings are JSON");
    let properties = schema["properties"].as_object().expect("a schema of a struct");
    let mut checked = 0;
    for (name, property) in properties {
        assert!(property.get("description").is_some(), "`{name}` has no documentation");
        let (maximum, list) = match (property.get("maximum"), property["items"].get("maximum")) {
            (Some(maximum), _) => (maximum, false),
            (None, Some(maximum)) => (maximum, true),
            (None, None) => continue,
        };
        let above = match defaults[name].is_f64() {
            true => serde_json::json!(maximum.as_f64().expect("a number") + 0.01),
            false => serde_json::json!(maximum.as_f64().expect("a number") as u64 + 1),
        };
        let mut settings = defaults.clone();
        match list {
            true => settings[name][1] = above,
            false => settings[name] = above,
        }
        assert!(refuses(settings), "`{name}` may exceed its range");
        checked += 1;
    }
    assert!(checked > 0, "no range was found: {schema}");
}
