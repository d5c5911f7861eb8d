//! Recipes that share a base: what lies over what, and errors in their own file's place.

use clip_host_recipe::{Part, Recipe, RecipeErrors};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const BASE: &str = r#"(
    seed: 7,
    data: (train: ["a.tar", "b.tar"], image_size: 64),
    model: (
        image_encoder: (plugin: "resnet", config: (preset: "resnet50"), weights: "resnet50.safetensors"),
        text_encoder: (plugin: "distilbert", config: (dim: 64, dropout: 0.1)),
        embed_dim: 256,
    ),
    loss: (plugin: "isogclr", config: (gamma: 0.8, rho: 8.0)),
    optimizer: (plugin: "radam", config: (variant: "original"), lr: 2e-4, weight_decay: 0.02, no_decay: ["1d"]),
    scheduler: (plugin: "cosine", config: (min_lr: 1e-6)),
    train: (epochs: 30, batch_size: 128),
)
"#;

/// A folder of recipe files, removed at the end.
struct Files(PathBuf);

impl Files {
    fn new(name: &str, files: &[(&str, &str)]) -> Files {
        let folder = std::env::temp_dir().join(format!("clip-host-include-{name}-{}", std::process::id()));
        for (file, text) in files {
            let path = folder.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Files(folder)
    }

    fn load(&self, file: &str, sets: &[&str]) -> Result<Recipe, RecipeErrors> {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Recipe::load(self.0.join(file), &sets)
    }

    /// What is wrong, with the folder's own path left out.
    fn wrong(&self, file: &str, sets: &[&str]) -> String {
        let folder = format!("{}{}", self.0.display(), std::path::MAIN_SEPARATOR);
        self.load(file, sets).expect_err("it is wrong").to_string().replace(&folder, "")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

fn config(map: &serde_json::Map<String, Value>) -> Value {
    Value::Object(map.clone())
}

#[test]
fn sections_are_merged_and_all_else_is_replaced() {
    let own = r#"(
        include: "base.ron",
        data: (train: ["c.tar"]),
        model: (text_encoder: (config: (dim: 32))),
        loss: (config: (gamma: 0.9, new: 1)),
        scheduler: (config: ()),
        train: (epochs: 2),
        precision: Bf16,
    )"#;
    let files = Files::new("merge", &[("base.ron", BASE), ("own.ron", own)]);
    let recipe = files.load("own.ron", &["train.batch_size=64", "loss.config.text=bare"]).unwrap();
    assert_eq!(recipe.seed, 7);
    assert_eq!(recipe.section::<Vec<String>>("data.train").unwrap(), ["c.tar"]);
    assert_eq!(recipe.section::<usize>("data.image_size").unwrap(), 64);
    assert_eq!(config(&recipe.model.image_encoder.choice.config), json!({"preset": "resnet50"}));
    assert_eq!(config(&recipe.model.text_encoder.choice.config), json!({"dim": 32, "dropout": 0.1}));
    let loss = json!({"gamma": 0.9, "rho": 8.0, "new": 1, "text": "bare"});
    assert_eq!((recipe.loss.plugin.as_str(), config(&recipe.loss.config)), ("isogclr", loss));
    assert_eq!((recipe.scheduler.plugin.as_str(), config(&recipe.scheduler.config)), ("cosine", json!({})));
    assert_eq!((recipe.train.epochs, recipe.train.batch_size), (2, 64));
    // What is recorded stands alone.
    let text = recipe.to_ron();
    assert!(!text.contains("include"), "{text}");
    let again = Recipe::parse("elsewhere/recipe.ron", &text, &[]).unwrap();
    assert_eq!(again, recipe);
    assert_eq!(again.differences(&recipe), []);
}

#[test]
fn another_plugin_leaves_the_bases_settings_of_its_own_behind() {
    let own = r#"(include: "base.ron", loss: (plugin: "clip"), optimizer: (plugin: "adamw", config: (amsgrad: true)),
        model: (image_encoder: (plugin: "vit")), scheduler: (plugin: "cosine", config: (warmup: 3)))"#;
    let files = Files::new("plugin", &[("base.ron", BASE), ("own.ron", own)]);
    let recipe = files.load("own.ron", &[]).unwrap();
    assert_eq!((recipe.loss.plugin.as_str(), config(&recipe.loss.config)), ("clip", json!({})));
    let image = &recipe.model.image_encoder;
    assert_eq!((config(&image.choice.config), &image.weights), (json!({}), &None));
    assert_eq!(recipe.optimizer.choice.plugin, "adamw");
    assert_eq!(config(&recipe.optimizer.choice.config), json!({"amsgrad": true}));
    assert_eq!((recipe.optimizer.lr, recipe.optimizer.weight_decay), (2e-4, 0.02));
    assert_eq!(recipe.optimizer.no_decay, ["1d"]);
    // The same plugin, said again, is the same plugin.
    assert_eq!(config(&recipe.scheduler.config), json!({"min_lr": 1e-6, "warmup": 3}));
}

#[test]
fn includes_nest_from_folder_to_folder_and_the_later_lies_over_the_earlier() {
    let own = r#"(include: ["shared/study.ron", "shared/fast.ron"], seed: 1)"#;
    let study = r#"(include: "../base.ron", optimizer: (lr: 1e-3), train: (epochs: 10, log_every: 5))"#;
    let fast = "(seed: 5, train: (epochs: 1))";
    let files = Files::new(
        "nest",
        &[("base.ron", BASE), ("own.ron", own), ("shared/study.ron", study), ("shared/fast.ron", fast)],
    );
    let recipe = files.load("own.ron", &[]).unwrap();
    assert_eq!((recipe.seed, recipe.optimizer.lr), (1, 1e-3));
    assert_eq!((recipe.train.epochs, recipe.train.log_every, recipe.train.batch_size), (1, 5, 128));
    // One file by two ways is no circle.
    let files = Files::new(
        "twice",
        &[("base.ron", BASE), ("a.ron", r#"(include: ["base.ron", "b.ron"])"#), ("b.ron", r#"(include: "base.ron")"#)],
    );
    assert_eq!(files.load("a.ron", &[]).unwrap().seed, 7);
    // An absolute path, and a recipe that is no file itself.
    let text = format!("(include: {:?}, seed: 2)", files.0.join("base.ron"));
    assert_eq!(Recipe::parse("nowhere.ron", &text, &[]).unwrap().seed, 2);
}

#[test]
fn errors_are_told_in_their_own_file() {
    let base = BASE.replace("epochs: 30", "epochs: 0").replace("embed_dim", "embed_dims");
    let own = "(\n    include: \"shared/base.ron\",\n    optimizer: (lr: -1.0),\n    sed: 3,\n)";
    let files = Files::new("places", &[("shared/base.ron", &base), ("own.ron", own)]);
    let text = files.wrong("own.ron", &["train.batch_size=1", "include=\"x.ron\""]);
    holds(
        &text,
        &[
            "own.ron:3:21: optimizer.lr: expected a finite number above 0, got -1.0",
            "own.ron:4:5: sed: unknown key `sed`",
            "did you mean `seed`? Valid keys: backend, data, eval, grid, include, loss",
            "shared/base.ron:7:9: model.embed_dims: unknown key `embed_dims`",
            "shared/base.ron:12:21: train.epochs: expected a whole number of at least 1, got 0",
            "12 |     train: (epochs: 0, batch_size: 128)",
            "--set:1:18: train.batch_size: expected a whole number of at least 2, got 1",
            "--set:1:1: include: an override comes after all files are read",
        ],
    );
    let order = ["own.ron:3", "own.ron:4", "base.ron:7", "base.ron:12", "--set"].map(|part| text.find(part).unwrap());
    assert!(order.is_sorted(), "{text}");
    // Names without quotes are texts in overrides only, not in files that are included.
    let files = Files::new(
        "quotes",
        &[("base.ron", &BASE.replace("\"radam\"", "radam")), ("own.ron", "(include: \"base.ron\")")],
    );
    holds(&files.wrong("own.ron", &[]), &["base.ron:10:25: optimizer.plugin: expected a string, got the name `radam`"]);
    files.load("own.ron", &["optimizer.plugin=radam"]).unwrap();
}

#[test]
fn plugins_complaints_are_told_where_the_setting_is() {
    let files = Files::new(
        "complaint",
        &[("base.ron", BASE), ("own.ron", "(include: \"base.ron\",\n loss: (config: (rho: 1)))")],
    );
    let recipe = files.load("own.ron", &[]).unwrap();
    let place = |path: &str| {
        let at = recipe.locate(path).unwrap();
        let file = Path::new(&at.source).file_name().unwrap().to_string_lossy().into_owned();
        (file, at.line, at.column)
    };
    assert_eq!(place("loss.config.rho"), ("own.ron".into(), 2, 23));
    assert_eq!(place("loss.config.gamma"), ("base.ron".into(), 9, 47));
    let error = recipe.error_at("loss.config.gamma", Part::Key, "unknown", None).to_string();
    holds(&error, &["base.ron:9:40: loss.config.gamma: unknown", "^^^^^"]);
}

#[test]
fn a_text_that_cannot_be_read_is_told_in_its_own_file() {
    let own = "(include: \"base.ron\")";
    let files = Files::new("syntax", &[("base.ron", &BASE.replace("seed: 7,", "seed 7,")), ("own.ron", own)]);
    holds(&files.wrong("own.ron", &[]), &["base.ron:2:10: expected ',' or ')', got '7'"]);
    let files = Files::new("list", &[("base.ron", "[1]"), ("own.ron", own)]);
    holds(&files.wrong("own.ron", &[]), &["base.ron:1:1: expected a section `(key: ..)`, got a list of 1", "hint:"]);
    let files = Files::new("again", &[("base.ron", &BASE.replace("seed: 7,", "seed: 7, seed: 7,")), ("own.ron", own)]);
    holds(&files.wrong("own.ron", &[]), &["base.ron:2:14: the key `seed` is set twice"]);
}

#[test]
fn a_file_that_is_missing_is_named_with_its_chain() {
    let files = Files::new(
        "missing",
        &[
            ("own.ron", "(\n include: \"shared/a.ron\")"),
            ("shared/a.ron", "(include: [\"b.ron\"])"),
            ("shared/b.ron", "(seed: 1,\n include: \"none.ron\")"),
        ],
    );
    holds(
        &files.wrong("own.ron", &[]),
        &[
            "shared/b.ron:2:11: include: cannot read the included recipe shared/none.ron: ",
            "shared/b.ron is included at shared/a.ron:1:12; shared/a.ron is included at own.ron:2:11",
            "hint: an included path starts from the folder of the file that includes it",
        ],
    );
    let files = Files::new("folder", &[("own.ron", "(include: \"shared\")"), ("shared/a.ron", "()")]);
    holds(
        &files.wrong("own.ron", &[]),
        &["own.ron:1:11: include: cannot read", "hint: name a recipe file, not a folder"],
    );
    for (include, got) in [("3", "the number 3"), ("[\"own.ron\", x]", "the name `x`"), ("(\"x\")", "a tuple of 1")] {
        let files = Files::new("form", &[("own.ron", &format!("(include: {include})"))]);
        holds(
            &files.wrong("own.ron", &[]),
            &["own.ron:1:", "include: expected the path of a recipe", got, "hint: write `include"],
        );
    }
}

#[test]
fn circles_are_told_with_their_whole_way() {
    let files = Files::new("self", &[("own.ron", "(include: \"own.ron\")")]);
    holds(
        &files.wrong("own.ron", &[]),
        &["own.ron:1:11: include: recipes include each other: own.ron includes own.ron"],
    );
    let files = Files::new(
        "circle",
        &[
            ("own.ron", "(include: \"a.ron\")"),
            ("a.ron", "(include: \"shared/b.ron\")"),
            ("shared/b.ron", "(seed: 1, include: \"../a.ron\")"),
        ],
    );
    holds(
        &files.wrong("own.ron", &[]),
        &[
            "shared/b.ron:1:20: include: recipes include each other: a.ron includes shared/b.ron includes shared/../a.ron",
            "shared/b.ron is included at a.ron:1:11; a.ron is included at own.ron:1:11",
            "hint: take one of these `include`s out",
        ],
    );
}
