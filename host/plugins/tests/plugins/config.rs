//! Settings against the schemas that schemars makes, through the contract's own descriptor.

use clip_host_plugin_api::describe::{Descriptor, Kind};
use clip_host_plugin_api::schemars::{self, JsonSchema};
use clip_host_plugins::config::{ConfigError, complete};
use clip_host_recipe::Part;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[derive(Serialize, Deserialize, JsonSchema, Debug, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Documented {
    /// The first.
    Alpha,
    /// The second.
    Beta,
}

#[derive(Serialize, Deserialize, JsonSchema, Debug, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Plain {
    Fast,
    Slow,
}

#[derive(Serialize, Deserialize, JsonSchema, Debug, PartialEq)]
#[serde(rename_all = "snake_case")]
enum WithData {
    None,
    Fixed { at: f64 },
    Number(f64),
}

#[derive(Serialize, Deserialize, JsonSchema, Debug, Default, PartialEq)]
#[serde(default, deny_unknown_fields)]
struct Inner {
    /// How many.
    count: u32,
    depth: Option<f64>,
}

#[derive(Serialize, Deserialize, JsonSchema, Debug, PartialEq)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    #[schemars(range(min = 0.001, max = 1.0))]
    rate: f64,
    #[schemars(range(min = 0.0))]
    limit: Option<f64>,
    #[schemars(inner(range(max = 0.9999)))]
    betas: [f64; 2],
    documented: Documented,
    plain: Plain,
    perhaps: Option<Plain>,
    inner: Inner,
    perhaps_inner: Option<Inner>,
    data: WithData,
    layers: Vec<usize>,
    pair: (f64, u8),
    name: String,
    amsgrad: bool,
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    open: f64,
    sizes: Vec<[u32; 2]>,
    table: BTreeMap<String, f64>,
    steps: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            rate: 0.1,
            limit: None,
            betas: [0.9, 0.999],
            documented: Documented::Alpha,
            plain: Plain::Fast,
            perhaps: None,
            inner: Inner { count: 3, depth: None },
            perhaps_inner: None,
            data: WithData::None,
            layers: vec![3, 4],
            pair: (1.0, 1),
            name: "x".into(),
            amsgrad: false,
            open: 0.5,
            sizes: vec![],
            table: BTreeMap::new(),
            steps: 10,
        }
    }
}

fn descriptor<T: Serialize + JsonSchema>(defaults: T) -> Descriptor {
    Descriptor {
        kind: Kind::Optimizer,
        id: "thing".into(),
        version: "0.1.0".into(),
        doc: String::new(),
        abi: 1,
        ir: 1,
        schema: schemars::schema_for!(T).to_value(),
        defaults: serde_json::to_value(defaults).expect("defaults are JSON"),
        held_constant: None,
    }
}

fn check(config: Value) -> Result<Value, Vec<ConfigError>> {
    complete(&descriptor(Settings::default()), config.as_object().expect("an object"))
}

/// The one error of a config: its path, message and hint.
#[track_caller]
fn only(config: Value) -> (String, String, String) {
    match check(config).expect_err("there is a mistake").as_slice() {
        [error] => (error.path.clone(), error.message.clone(), error.hint.clone().unwrap_or_default()),
        errors => panic!("expected one error, got {errors:#?}"),
    }
}

#[test]
fn nothing_given_gives_the_defaults() {
    let complete = check(json!({})).expect("sound");
    assert_eq!(serde_json::from_value::<Settings>(complete).expect("the struct"), Settings::default());
}

#[test]
fn what_is_given_arrives_in_the_settings_struct() {
    let complete = check(json!({
        "rate": 1, "limit": 2, "betas": [0, 0.5], "documented": "beta", "plain": "slow", "perhaps": "slow",
        "inner": { "depth": 2 }, "perhaps_inner": { "count": 5 }, "data": { "fixed": { "at": 3 } }, "layers": [],
        "pair": [2, 255], "name": "y", "amsgrad": true, "open": 0.25, "sizes": [[1, 2], [3, 4]], "table": { "a": 1 },
    }))
    .expect("sound");
    // Whole numbers for floats become floats: equal settings are equal values.
    assert_eq!(complete["rate"].to_string(), "1.0");
    assert_eq!(complete["betas"].to_string(), "[0.0,0.5]");
    let expected = Settings {
        rate: 1.0,
        limit: Some(2.0),
        betas: [0.0, 0.5],
        documented: Documented::Beta,
        plain: Plain::Slow,
        perhaps: Some(Plain::Slow),
        inner: Inner { count: 0, depth: Some(2.0) },
        perhaps_inner: Some(Inner { count: 5, depth: None }),
        data: WithData::Fixed { at: 3.0 },
        layers: vec![],
        pair: (2.0, 255),
        name: "y".into(),
        amsgrad: true,
        open: 0.25,
        sizes: vec![[1, 2], [3, 4]],
        table: BTreeMap::from([("a".into(), 1.0)]),
        steps: 10,
    };
    assert_eq!(serde_json::from_value::<Settings>(complete).expect("the struct"), expected);
}

#[test]
fn null_is_what_an_option_takes() {
    assert!(check(json!({ "limit": null, "perhaps": null, "perhaps_inner": null })).is_ok());
    assert_eq!(only(json!({ "rate": null })).1, "expected number, got null");
    assert!(check(json!({ "data": "none" })).is_ok());
    assert!(check(json!({ "data": { "number": 2 } })).is_ok());
}

#[test]
fn an_unknown_key_names_the_nearest_and_all() {
    let errors = check(json!({ "beta": [0.9, 0.99] })).expect_err("unknown");
    let text = errors[0].to_string();
    for part in ["optimizer plugin `thing`", "`beta`", "did you mean `betas`?", "Valid keys: amsgrad, betas, data"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(errors[0].part, Part::Key);
    let (path, _, hint) = only(json!({ "inner": { "cuont": 3 } }));
    assert_eq!((path.as_str(), hint.as_str()), ("inner.cuont", "did you mean `count`? Valid keys: count, depth"));
}

#[test]
fn ranges_are_shown() {
    let range = |config| only(config).1;
    assert_eq!(range(json!({ "rate": 2.0 })), "expected a value at least 0.001, at most 1, got 2.0");
    assert_eq!(range(json!({ "limit": -1 })), "expected a value at least 0, got -1");
    assert_eq!(range(json!({ "open": 0 })), "expected a value greater than 0, less than 1, got 0");
    assert_eq!(range(json!({ "pair": [1.0, 256] })), "expected a value at least 0, at most 255, got 256");
    assert_eq!(
        range(json!({ "steps": 4294967296u64 })),
        "expected a value at least 0, at most 4294967295, got 4294967296"
    );
    assert_eq!(range(json!({ "steps": -1 })), "expected a value at least 0, at most 4294967295, got -1");
}

#[test]
fn types_are_told_with_the_place() {
    let cases = [
        (json!({ "rate": "fast" }), "rate", "expected number, got \"fast\""),
        (json!({ "betas": [0.9, true] }), "betas[1]", "expected number, got true"),
        (json!({ "betas": [0.9, 1.0] }), "betas[1]", "expected a value at most 0.9999, got 1.0"),
        (json!({ "betas": [0.9] }), "betas", "expected a list of 2 numbers, got 1"),
        (json!({ "betas": 0.9 }), "betas", "expected list of 2 numbers, got 0.9"),
        (json!({ "sizes": [[1, 2], [3, "4"]] }), "sizes[1][1]", "expected integer, got \"4\""),
        (json!({ "layers": [1.5] }), "layers[0]", "expected integer, got 1.5"),
        (json!({ "amsgrad": 1 }), "amsgrad", "expected true or false, got 1"),
        (json!({ "inner": 3 }), "inner", "expected object, got 3"),
        (json!({ "perhaps_inner": { "count": "x" } }), "perhaps_inner.count", "expected integer, got \"x\""),
        (json!({ "perhaps": "sloow" }), "perhaps", "expected `fast` or `slow`, got \"sloow\""),
        (json!({ "documented": "gamma" }), "documented", "expected `alpha` or `beta`, got \"gamma\""),
        (json!({ "documented": 3 }), "documented", "expected `alpha` or `beta`, got 3"),
        (json!({ "perhaps": 3 }), "perhaps", "expected `fast`, `slow` or null, got 3"),
        (json!({ "data": { "fixed": { "at": "x" } } }), "data.fixed.at", "expected number, got \"x\""),
        (json!({ "data": { "fixed": {} } }), "data.fixed.at", "expected number, got nothing"),
        (json!({ "data": 3 }), "data", "expected `none`, `fixed: …` or `number: …`, got 3"),
        (json!({ "table": { "a": "x" } }), "table.a", "expected number, got \"x\""),
    ];
    for (config, path, message) in cases {
        let got = only(config.clone());
        assert_eq!((got.0.as_str(), got.1.as_str()), (path, message), "{config}");
    }
    assert_eq!(only(json!({ "plain": "slo" })).2, "did you mean `slow`?");
    assert_eq!(only(json!({ "layers": [3.0] })).2, "write it without a fraction: 3");
}

#[test]
fn all_mistakes_are_told_at_once() {
    let errors = check(json!({ "rate": 2, "betas": [2, "x"], "nmae": "y", "plain": "x" })).expect_err("five");
    let mut paths: Vec<&str> = errors.iter().map(|error| error.path.as_str()).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["betas[0]", "betas[1]", "nmae", "plain", "rate"]);
}

#[test]
fn a_plugin_without_settings_takes_none() {
    #[derive(Serialize, Deserialize, JsonSchema)]
    struct Unit;
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Empty {}
    for descriptor in [descriptor(Unit), descriptor(Empty {})] {
        assert!(complete(&descriptor, &serde_json::Map::new()).is_ok());
        let given = serde_json::Map::from_iter([("rate".to_string(), json!(1))]);
        let errors = complete(&descriptor, &given).expect_err("there are no settings");
        assert_eq!(errors[0].hint.as_deref(), Some("there are no keys here"));
    }
}

#[test]
fn a_setting_without_default_must_be_given() {
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Needs {
        rate: f64,
    }
    let mut needs = descriptor(Needs { rate: 1.0 });
    needs.defaults = Value::Null;
    let errors = complete(&needs, &serde_json::Map::new()).expect_err("missing");
    assert_eq!((errors[0].path.as_str(), errors[0].message.as_str()), ("rate", "expected number, got nothing"));
}
