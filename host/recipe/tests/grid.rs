//! Grids: the recipes of all combinations, and what is wrong with them.

use clip_host_recipe::{Grid, Recipe, RecipeErrors};
use serde_json::json;

const BASE: &str = r#"(
    data: (),
    model: (image_encoder: (plugin: "resnet"), text_encoder: (plugin: "distilbert"), embed_dim: 16),
    loss: (plugin: "isogclr", config: (gamma: 0.8)),
    optimizer: (plugin: "radam", config: (variant: "original"), lr: 2e-4, weight_decay: 0.02),
    train: (epochs: 3, batch_size: 8),
    grid: (
        loss: ["clip", (config: (gamma: 0.5), plugin: "isogclr")],
        optimizer: [
            (plugin: "adamw", config: (amsgrad: true)),
            (name: "radam_high", lr: 1e-3),
        ],
        seed: [0, 5],
    ),
)
"#;

fn sets(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| text.to_string()).collect()
}

fn load(text: &str, overrides: &[&str]) -> Result<Grid, RecipeErrors> {
    Grid::parse("grid.ron", text, &sets(overrides))
}

#[track_caller]
fn wrong(text: &str, overrides: &[&str], parts: &[&str]) {
    let found = load(text, overrides).expect_err("it is wrong").to_string();
    for part in parts {
        assert!(found.contains(part), "{part:?} is not in:\n{found}");
    }
}

#[test]
fn every_combination_is_a_recipe() {
    let grid = load(BASE, &["train.epochs=1"]).unwrap();
    let axes: Vec<(&str, Vec<&str>)> =
        grid.axes.iter().map(|axis| (axis.key.as_str(), axis.names.iter().map(String::as_str).collect())).collect();
    let expected =
        [("loss", vec!["clip", "isogclr"]), ("optimizer", vec!["adamw", "radam_high"]), ("seed", vec!["s0", "s5"])];
    assert_eq!(axes, expected);
    assert_eq!(grid.seed_axis(), Some(2));
    let names: Vec<&str> = grid.cells.iter().map(|cell| cell.name.as_str()).collect();
    let expected = [
        "clip_adamw_s0",
        "clip_adamw_s5",
        "clip_radam_high_s0",
        "clip_radam_high_s5",
        "isogclr_adamw_s0",
        "isogclr_adamw_s5",
        "isogclr_radam_high_s0",
        "isogclr_radam_high_s5",
    ];
    assert_eq!(names, expected);
    let cell = &grid.cells[1].recipe;
    assert_eq!((cell.seed, cell.train.epochs), (5, 1));
    assert_eq!((cell.loss.plugin.as_str(), cell.loss.config.len()), ("clip", 0));
    assert_eq!(serde_json::Value::Object(cell.optimizer.choice.config.clone()), json!({"amsgrad": true}));
    assert_eq!((cell.optimizer.lr, cell.optimizer.weight_decay), (2e-4, 0.02));
    let cell = &grid.cells[6].recipe;
    assert_eq!(serde_json::Value::Object(cell.loss.config.clone()), json!({"gamma": 0.5}));
    assert_eq!(cell.optimizer.choice.plugin, "radam");
    assert_eq!(serde_json::Value::Object(cell.optimizer.choice.config.clone()), json!({"variant": "original"}));
    assert_eq!((cell.optimizer.lr, cell.seed), (1e-3, 0));
    // A cell is a recipe like any other.
    let alone = Recipe::parse("recipe.ron", &cell.to_ron(), &[]).unwrap();
    assert_eq!(&alone, cell);
}

#[test]
fn axes_can_be_overridden_and_added() {
    let grid = load(BASE, &["grid.seed=[3]", "grid.loss=[vicreg, clip]", "grid.precision=[F32, Bf16]"]).unwrap();
    let names: Vec<&str> = grid.cells.iter().map(|cell| cell.name.as_str()).take(2).collect();
    assert_eq!((grid.cells.len(), names), (8, vec!["vicreg_adamw_s3_f32", "vicreg_adamw_s3_bf16"]));
    let plain = &BASE[..BASE.find("    grid:").unwrap()];
    let grid = load(&format!("{plain})"), &["grid.seed=[1, 2]"]).unwrap();
    assert_eq!((grid.cells.len(), grid.cells[1].name.as_str(), grid.cells[1].recipe.seed), (2, "s2", 2));
    wrong(&format!("{plain})"), &[], &["grid.ron:1:1: grid: the key `grid` is missing", "`clip-host run` runs it"]);
}

#[test]
fn what_an_axis_chooses_is_not_overridden() {
    for (set, place) in
        [("optimizer.plugin=sgd", "--set:1:1"), ("seed=3", "--set:1:1"), ("loss=(plugin: \"clip\")", "--set:1:1")]
    {
        wrong(BASE, &[set], &[place, "expected an override of what the grid does not choose", "`--cell` picks"]);
    }
    let grid = load(BASE, &["optimizer.weight_decay=0.5"]).unwrap();
    assert!(grid.cells.iter().all(|cell| cell.recipe.optimizer.weight_decay == 0.5));
}

#[test]
fn mistakes_in_axes_are_told_in_their_place() {
    for (from, to, parts) in [
        ("seed: [0, 5]", "sede: [0, 5]", &["grid.ron:13:9: grid: unknown axis `sede`", "did you mean `seed`?"][..]),
        ("seed: [0, 5]", "seed: 5", &["13:15: grid.seed: expected a list of at least one value, got the number 5"]),
        ("seed: [0, 5]", "seed: []", &["13:15: grid.seed: expected a list of at least one value"]),
        ("seed: [0, 5]", "seed: [5, 5]", &["13:19: grid.seed[1]: there is a value `s5` already", "name of its own"]),
        ("seed: [0, 5]", "seed: [\"x\"]", &["13:16: grid.seed[0]: expected a value with a `name` or a `plugin`"]),
        ("seed: [0, 5]", "seed: [-1]", &["13:16: seed: expected a whole number from 0, got the number -1"]),
        ("name: \"radam_high\"", "name: \"a/b\"", &["11:20: grid.optimizer[1]: expected a name of letters", "\"a/b\""]),
        ("name: \"radam_high\"", "name: \"..\"", &["11:20: grid.optimizer[1]: expected a name of letters"]),
        ("name: \"radam_high\", ", "", &["11:13: grid.optimizer[1]: expected a value with a `name`", "name: \"..\""]),
        ("lr: 1e-3", "lr: -1e-3", &["11:38: optimizer.lr: expected a finite number above 0, got -0.001"]),
        ("(amsgrad: true)", "3", &["10:39: optimizer.config: expected a section"]),
        ("epochs: 3", "epochs: 0", &["6:21: train.epochs: expected a whole number of at least 1, got 0"]),
    ] {
        let text = BASE.replace(from, to);
        assert_ne!(text, BASE);
        wrong(&text, &[], parts);
        // Once, not once for each cell.
        let found = load(&text, &[]).unwrap_err();
        assert_eq!(found.0.len(), 1, "{found}");
    }
    let text =
        BASE.replace("\"clip\"", "\"a_b\", \"a\"").replace("(plugin: \"adamw\",", "(name: \"b_c\", plugin: \"adamw\",");
    wrong(&text.replace("radam_high", "c"), &[], &["two combinations are called `a_b_c_s0`"]);
    wrong(BASE, &["grid=()"], &["grid: expected a section with a list for each axis"]);
}

#[test]
fn a_grid_is_not_run_as_one_recipe() {
    let found = Recipe::parse("grid.ron", BASE, &[]).unwrap_err().to_string();
    for part in ["grid.ron:7:5: grid: this recipe is a grid of runs", "hint: `clip-host grid`"] {
        assert!(found.contains(part), "{part:?} is not in:\n{found}");
    }
}

#[test]
fn differences_are_named_and_numbers_are_numbers() {
    let plain = format!("{})", &BASE[..BASE.find("    grid:").unwrap()]);
    let one = Recipe::parse("a.ron", &plain, &[]).unwrap();
    let changes = ["optimizer.lr=1e-3", "loss.config.gamma=0.80", "loss.config.rho=8", "train.steps=4", "data.x=[1]"];
    let other = Recipe::parse("b.ron", &plain, &sets(&changes)).unwrap();
    let shown: Vec<String> = one.differences(&other).iter().map(ToString::to_string).collect();
    let expected = [
        "data.x: not set here, [1] there",
        "loss.config.rho: not set here, 8 there",
        "optimizer.lr: 0.0002 here, 0.001 there",
        "train.steps: None here, Some(4) there",
    ];
    assert_eq!(shown, expected);
    let float = Recipe::parse("b.ron", &plain, &sets(&["loss.config.rho=8.0"])).unwrap();
    let int = Recipe::parse("b.ron", &plain, &sets(&["loss.config.rho=8"])).unwrap();
    assert_eq!(float.differences(&int), []);
}
