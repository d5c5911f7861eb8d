//! Loading, overriding and writing whole recipes; every class of error with its place and hint.

use clip_host_recipe::{Backend, Dtype, Part, Precision, Recipe, RecipeError, RecipeErrors};
use serde::{Deserialize, Serialize};

const GOOD: &str = r#"// a comment
(
    seed: 7,
    data: (
        train: [Tar("data/train-{00000..00004}.tar"), Csv(path: "pairs.csv", sep: '\t')],
        image_size: 64,
        mean: (0.48, 0.45, 0.40),
    ),
    model: (
        image_encoder: (plugin: "resnet", config: (depth: 18, width: Some(0.5), stem: Small, layers: (2, 2))),
        text_encoder: (plugin: "distilbert"),
        embed_dim: 256,
    ),
    loss: (plugin: "isogclr", config: (rho_image: 8, nested: (deep: [1, 2.5, "x"]), none: None)),
    optimizer: (plugin: "radam", config: (betas: (0.9, 0.999)), lr: 2e-4, weight_decay: 0.02),
    train: (epochs: 30, batch_size: 128),
)
"#;

fn sets(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| text.to_string()).collect()
}

fn load(text: &str, overrides: &[&str]) -> Result<Recipe, RecipeErrors> {
    Recipe::parse("mine.ron", text, &sets(overrides))
}

fn errors(text: &str, overrides: &[&str]) -> Vec<RecipeError> {
    load(text, overrides).expect_err("the recipe is wrong").0
}

/// The only error: its place, and all of its text.
fn only(text: &str, overrides: &[&str]) -> (usize, usize, String) {
    let errors = errors(text, overrides);
    assert_eq!(errors.len(), 1, "{}", RecipeErrors(errors));
    let at = errors[0].location.clone().expect("a place");
    (at.line, at.column, errors[0].to_string())
}

#[track_caller]
fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

#[test]
fn a_recipe_loads() {
    let recipe = load(GOOD, &[]).unwrap();
    assert_eq!(recipe.seed, 7);
    assert_eq!(recipe.model.embed_dim, 256);
    assert_eq!(recipe.optimizer.lr, 2e-4);
    assert_eq!(recipe.optimizer.no_decay, ["1d", "*.bias"]);
    assert_eq!(recipe.optimizer.clip_grad_norm, None);
    assert_eq!(recipe.optimizer.clip_grad_value, None);
    assert!(recipe.optimizer.groups.is_empty());
    assert_eq!(recipe.scheduler.plugin, "constant");
    assert_eq!(recipe.train.log_every, 10);
    assert_eq!(recipe.train.checkpoint_every_steps, None);
    assert_eq!(recipe.backend, Backend::Auto);
    assert_eq!(recipe.precision, Precision::F32);
    assert_eq!((recipe.optimizer.state_dtype, recipe.model.text_encoder.weights_dtype), (Dtype::F32, Dtype::F32));
    let config = serde_json::Value::Object(recipe.model.image_encoder.choice.config.clone());
    let expected = serde_json::json!({"depth": 18, "width": 0.5, "stem": "Small", "layers": [2, 2]});
    assert_eq!(config, expected);
    let config = serde_json::Value::Object(recipe.loss.config.clone());
    let expected = serde_json::json!({"rho_image": 8, "nested": {"deep": [1, 2.5, "x"]}, "none": null});
    assert_eq!(config, expected);
}

#[test]
fn decay_groups_are_the_studies() {
    let optimizer = load(GOOD, &[]).unwrap().optimizer;
    assert!(optimizer.decays("image.layer1.0.conv1.weight", 4));
    assert!(!optimizer.decays("image.bn1.weight", 1));
    assert!(!optimizer.decays("text.head.bias", 2));
    assert!(optimizer.decays("loss.temperature", 0));
    assert!(optimizer.decays("bias_table", 2));
    let set = ["optimizer.no_decay=[\"text.*.embeddings*\", \"loss.temperature\"]"];
    let optimizer = load(GOOD, &set).unwrap().optimizer;
    assert!(!optimizer.decays("text.x.embeddings.weight", 2));
    assert!(!optimizer.decays("text.x.y.embeddings", 2));
    assert!(optimizer.decays("text.embeddings", 2));
    assert!(!optimizer.decays("loss.temperature", 0));
    assert!(optimizer.decays("loss.temperature2", 0));
    assert!(optimizer.decays("a.bias", 1));
}

#[test]
fn the_resolved_recipe_loads_back() {
    let overrides = [
        "backend=Cuda(device: 1)",
        "precision=bf16",
        "train.steps=5",
        "train.checkpoint_every_steps=20",
        "loss.path=x/libloss \"q\".so",
        "loss.config.text=\"tab\\t, \\\" and \\\\ \\u{7f} é\"",
        "optimizer.clip_grad_norm=1",
        "optimizer.clip_grad_value=0.5",
        "optimizer.state_dtype=Bf16",
        "train.grad_scaler=(init_scale: 1024, growth_interval: 10)",
        "model.text_encoder.weights_dtype=bf16",
        "optimizer.groups=[(params: [\"text.*\"], lr: 1e-5), (params: [\"a\", \"b\"], weight_decay: 0.0, freeze_epochs: 2), (params: [\"c\"], freeze: true)]",
        "plugins.path=[\"extra\"]",
        "eval.batch_size=Some(16)",
        "data.augment=Some((scale: (0.5, 1.0), flip: true, policy: Rand(ops: 2)))",
        "data.table={\"a b\": 1, \"c\": -1e-300}",
    ];
    let recipe = load(GOOD, &overrides).unwrap();
    assert_eq!(recipe.backend, Backend::Cuda { device: 1, tf32: false });
    assert_eq!(recipe.precision, Precision::Bf16);
    assert_eq!((recipe.optimizer.state_dtype, recipe.model.text_encoder.weights_dtype), (Dtype::Bf16, Dtype::Bf16));
    let text = recipe.to_ron();
    let again = load(&text, &[]).unwrap_or_else(|e| panic!("{text}\n{e}"));
    assert_eq!(recipe, again, "{text}");
    assert_eq!(again.to_ron(), text);
    assert_ne!(load(GOOD, &[]).unwrap(), again);
    holds(
        &text,
        &[
            "checkpoint_every_steps: Some(20)",
            "no_decay: [\"1d\", \"*.bias\"]",
            "clip_grad_value: Some(0.5)",
            "freeze: true",
            "freeze_epochs: 2",
            "threads: 0",
            "Tar(\"data/train-{00000..00004}.tar\")",
        ],
    );
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Shards {
    Tar(String),
    Csv { path: String, sep: char },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Data {
    train: Vec<Shards>,
    image_size: u32,
    mean: [f32; 3],
    #[serde(default)]
    workers: Option<usize>,
}

#[test]
fn another_crate_reads_its_section() {
    let mut recipe = load(GOOD, &["data.workers=3"]).unwrap();
    let data: Data = recipe.section("data").unwrap();
    let tar = Shards::Tar("data/train-{00000..00004}.tar".into());
    let csv = Shards::Csv { path: "pairs.csv".into(), sep: '\t' };
    assert_eq!(data, Data { train: vec![tar, csv], image_size: 64, mean: [0.48, 0.45, 0.40], workers: Some(3) });
    recipe.resolve_data(&data).unwrap();
    let again = load(&recipe.to_ron(), &[]).unwrap();
    assert_eq!(again.section::<Data>("data").unwrap(), data);
    assert_eq!(again.section::<u32>("data.image_size").unwrap(), 64);
}

#[test]
fn a_section_reports_all_that_is_wrong_with_it() {
    let text = GOOD.replace("image_size: 64", "image_sise: 64, workers: -1").replace("0.45, 0.40", "blue");
    let recipe = load(&text, &["data.train[0]=Tarr(\"x\")", "data.wrokers=2"]).unwrap();
    let errors = recipe.section::<Data>("data").unwrap_err();
    let shown = errors.to_string();
    assert_eq!(errors.0.len(), 5, "{shown}");
    holds(
        &shown,
        &[
            "mine.ron:6:9: data.image_sise: unknown key `image_sise`",
            "did you mean `image_size`?",
            "mine.ron:6:34: data.workers: expected a whole number from 0, got the number -1",
            "mine.ron:7:22: data.mean[1]: expected a number, got the name `blue`",
            "--set:1:15: data.train[0]: unknown name `Tarr`",
            "did you mean `Tar`? Valid names: Csv, Tar",
            "--set:1:6: data.wrokers: unknown key `wrokers`",
        ],
    );
}

#[test]
fn an_unknown_key() {
    let (line, column, text) = only(&GOOD.replace("weight_decay", "wieght_decay"), &[]);
    assert_eq!((line, column), (15, 75));
    holds(
        &text,
        &[
            "mine.ron:15:75: optimizer.wieght_decay: unknown key `wieght_decay`",
            "\n15 |     optimizer:",
            "^^^^^^^^^^^^\n",
            "hint: did you mean `weight_decay`? Valid keys: clip_grad_norm, clip_grad_value, config, groups, lr, no_decay",
        ],
    );
    let caret = text.lines().nth(3).unwrap();
    assert_eq!(caret.find('^'), text.lines().nth(2).unwrap().find("wieght"));
    let (line, column, text) = only(&GOOD.replace("loss:", "los:"), &[]);
    assert_eq!((line, column), (14, 5));
    holds(&text, &["did you mean `loss`?"]);
}

#[test]
fn a_wrong_type() {
    let (line, column, text) = only(&GOOD.replace("epochs: 30", "epochs: 30.0"), &[]);
    assert_eq!((line, column), (16, 21));
    holds(&text, &["train.epochs: expected a whole number from 0, got the number 30.0", "hint: write it as 30"]);
    let (_, _, text) = only(&GOOD.replace("lr: 2e-4", "lr: \"2e-4\""), &[]);
    holds(&text, &["optimizer.lr: expected a number, got the string", "hint: write it without quotes: 2e-4"]);
    let (_, _, text) = only(&GOOD.replace("\"radam\"", "radam"), &[]);
    holds(&text, &["optimizer.plugin: expected a string, got the name `radam`", "hint: texts are written in quotes"]);
    let (_, _, text) = only(&GOOD.replace("train: (epochs: 30, batch_size: 128)", "train: 3"), &[]);
    holds(&text, &["train: expected a section `(key: ..)`, got the number 3"]);
    let (_, _, text) = only(&GOOD.replace("(rho_image", "Iso(rho_image"), &[]);
    holds(&text, &["loss.config: expected a section `(key: ..)`, got `Iso(..)`"]);
}

#[test]
fn a_number_out_of_range() {
    for (set, message) in [
        ("train.batch_size=1", "expected a whole number of at least 2, got 1"),
        ("train.epochs=0", "expected a whole number of at least 1, got 0"),
        ("train.steps=0", "expected a whole number of at least 1 or `None`, got 0"),
        ("train.checkpoint_every_steps=0", "expected a whole number of at least 1 or `None`, got 0"),
        ("train.log_every=0", "expected a whole number of at least 1, got 0"),
        ("model.embed_dim=0", "expected a whole number of at least 1, got 0"),
        ("eval.batch_size=0", "expected a whole number of at least 1 or `None`, got 0"),
        ("optimizer.lr=0", "expected a finite number above 0, got 0.0"),
        ("optimizer.lr=inf", "expected a finite number above 0, got inf"),
        ("optimizer.lr=NaN", "expected a finite number above 0, got NaN"),
        ("optimizer.weight_decay=-0.1", "expected a finite number of at least 0, got -0.1"),
        ("optimizer.clip_grad_norm=0", "expected a finite number above 0 or `None`, got 0.0"),
        ("loss.config.rho=inf", "expected a finite number, got the number inf"),
        ("loss.sha256=abc", "expected 64 hexadecimal digits, got 3 characters"),
        ("loss.plugin=\"\"", "expected the id of a plugin, got an empty string"),
        ("seed=-1", "expected a whole number from 0, got the number -1"),
        ("seed=99999999999999999999", "expected a whole number from 0, got the number 99999999999999999999"),
        ("backend=Cuda(device: 5000000000)", "expected a whole number from 0 to 4294967295, got the number 5000000000"),
    ] {
        let (line, _, text) = only(GOOD, &[set]);
        assert_eq!(line, 1);
        let path = set.split('=').next().unwrap();
        holds(&text, &["--set:1:", path, message]);
    }
    let (line, column, _) = only(&GOOD.replace("128", "1"), &[]);
    assert_eq!((line, column), (16, 37));
}

#[test]
fn an_unknown_name() {
    let (_, _, text) = only(GOOD, &["backend=Gpu"]);
    holds(&text, &["backend: unknown name `Gpu`", "Auto, Cpu, Cuda"]);
    let (_, _, text) = only(GOOD, &["precision=f61"]);
    holds(&text, &["unknown name `f61`", "Valid names: Bf16, F32, Fp16"]);
    let (_, _, text) = only(GOOD, &["train.grad_scaler=(growth: 3)"]);
    holds(&text, &["train.grad_scaler.growth: unknown key `growth`", "growth_factor"]);
    let (_, _, text) = only(GOOD, &["optimizer.state_dtype=F8"]);
    holds(&text, &["optimizer.state_dtype: unknown name `F8`", "Bf16, F32"]);
    let (_, _, text) = only(GOOD, &["backend=Cuda(devise: 1)"]);
    holds(&text, &["backend.devise: unknown key `devise`", "did you mean `device`?"]);
    for (set, precision) in [("f32", Precision::F32), ("BF16", Precision::Bf16), ("\"Bf16\"", Precision::Bf16)] {
        assert_eq!(load(GOOD, &[&format!("precision={set}")]).unwrap().precision, precision);
    }
    assert_eq!(load(GOOD, &["backend=Cuda"]).unwrap().backend, Backend::Cuda { device: 0, tf32: false });
}

#[test]
fn a_missing_key_and_a_missing_section() {
    let (line, column, text) = only(&GOOD.replace("embed_dim: 256,", ""), &[]);
    assert_eq!((line, column), (9, 12));
    holds(&text, &["model.embed_dim: the key `embed_dim` is missing"]);
    let found = errors("()", &[]);
    let paths: Vec<&str> = found.iter().map(|error| error.path.as_str()).collect();
    assert_eq!(paths, ["data", "model", "loss", "optimizer", "train"]);
    let found = errors("(optimiser: (), data: ())", &[]);
    let paths: Vec<&str> = found.iter().map(|error| error.path.as_str()).collect();
    assert_eq!(paths, ["model", "loss", "train", "optimiser"]);
}

#[test]
fn a_syntax_error() {
    for (from, to, place, message) in [
        ("embed_dim: 256,", "embed_dim 256,", (12, 19), "expected ':' after the key `embed_dim`, got '2'"),
        ("seed: 7,", "seed: 7", (4, 5), "is a comma missing at the end of the line before?"),
        ("\"resnet\"", "\"resnet", (11, 33), "is a quote missing? The string that ends here begins in line 10"),
        ("// a", "/* a", (1, 1), "the comment that begins here is never closed"),
        ("2e-4", "2e-4x", (15, 69), "`2e-4x` is not a number"),
        ("seed: 7", "seed: 7, seed: 8", (3, 14), "the key `seed` is set twice"),
        ("seed: 7", "seed: b\"x\"", (3, 11), "byte strings have no use"),
        ("'\\t'", "'tab'", (5, 83), "one character"),
    ] {
        let (line, column, text) = only(&GOOD.replacen(from, to, 1), &[]);
        holds(&text, &[message]);
        assert_eq!((line, column), place, "{text}");
    }
    let deep = format!("(seed: {}1{})", "[".repeat(100_000), "]".repeat(100_000));
    holds(&errors(&deep, &[])[0].message, &["nested more than 100 deep"]);
    holds(&errors("[1]", &[])[0].message, &["expected a section", "a list of 1"]);
    holds(&errors("", &[])[0].message, &["got the end of the text"]);
}

#[test]
fn all_errors_at_once() {
    let text = GOOD
        .replace("epochs: 30", "epochs: 0, epoch: 3")
        .replace("embed_dim: 256", "embed_dims: 256")
        .replace("lr: 2e-4", "lr: -1")
        .replace("seed: 7", "seed: seven");
    let found = errors(&text, &["train.batch_size=many", "optimzer.lr=1", "seed.x=1", "data.train[5]=1", "train"]);
    let paths: Vec<&str> = found.iter().map(|error| error.path.as_str()).collect();
    let expected = [
        "seed",
        "model.embed_dims",
        "train.epochs",
        "train.epoch",
        "train.batch_size",
        "optimizer.lr",
        "optimzer",
        "",
        "",
    ];
    let mut both = (paths.clone(), expected.to_vec());
    both.0.sort_unstable();
    both.1.sort_unstable();
    // `seed.x` makes a section of the name `seven`, and so is part of the one error about `seed`.
    assert_eq!(both.0, both.1, "{}", RecipeErrors(found.clone()));
}

#[test]
fn overrides() {
    let recipe = load(
        GOOD,
        &[
            "optimizer.plugin=adamw",
            "optimizer.config=()",
            "optimizer.config.betas=(0.9, 0.95)",
            "optimizer.lr = 1e-3",
            "loss.plugin=dynamic-temperature",
            "scheduler.plugin=cosine",
            "scheduler.config.warmup_steps=100",
            "model.image_encoder.config.layers[1]=3",
            "data.train[0]=Tar(\"other.tar\")",
            "data.train[1].path=rows/pairs.csv",
            "train.epochs=2",
        ],
    )
    .unwrap();
    assert_eq!(recipe.optimizer.choice.plugin, "adamw");
    let config = |map: &serde_json::Map<String, serde_json::Value>| serde_json::Value::Object(map.clone());
    assert_eq!(config(&recipe.optimizer.choice.config), serde_json::json!({"betas": [0.9, 0.95]}));
    assert_eq!(recipe.optimizer.lr, 1e-3);
    assert_eq!(recipe.loss.plugin, "dynamic-temperature");
    assert_eq!(config(&recipe.scheduler.config), serde_json::json!({"warmup_steps": 100}));
    assert_eq!(recipe.model.image_encoder.choice.config["layers"], serde_json::json!([2, 3]));
    let data: Data = recipe.section("data").unwrap();
    assert_eq!(data.train[0], Shards::Tar("other.tar".into()));
    assert_eq!(data.train[1], Shards::Csv { path: "rows/pairs.csv".into(), sep: '\t' });
    assert_eq!(recipe.train.epochs, 2);
}

#[test]
fn overrides_that_cannot_be() {
    for (set, place, message) in [
        ("train", 1, "expected `=` and a value"),
        ("=3", 1, "expected a key before `=`"),
        ("train..epochs=3", 7, "expected keys joined by `.`"),
        ("train.=3", 7, "a key is expected after `.`"),
        ("data.train[x]=3", 12, "expected an index from 0, got `x`"),
        ("data.train[2]=3", 11, "`data.train` is a list of 2 and has no [2]\n"),
        ("data.train[2]=3", 11, "hint: its indexes are 0 to 1"),
        ("train[0]=3", 6, "`train` is a section `(key: ..)` and has no [0]"),
        ("seed.x=3", 6, "`seed` is the number 7 and has no key `x`"),
        ("train.epochz=3", 7, "did you mean `epochs`?"),
        ("trian.epochs=3", 1, "did you mean `train`?"),
        ("train=(epochs: 3, batch_size: [", 32, "expected a value, got the end of the text"),
        ("train.epochs=three", 14, "expected a whole number from 0, got the name `three`"),
    ] {
        let (line, column, text) = only(GOOD, &[set]);
        assert_eq!((line, column), (1, place), "{text}");
        holds(&text, &["--set:1:", message, set]);
    }
}

#[test]
fn a_plugins_complaint_is_shown_in_place() {
    let recipe = load(GOOD, &["loss.config.tau=3"]).unwrap();
    let at = recipe.locate("loss.config.rho_image").unwrap();
    assert_eq!((at.source.as_str(), at.line, at.column), ("mine.ron", 14, 51));
    let text = recipe.error_at("loss.config.rho_image", Part::Key, "unknown key", Some("try rho".into())).to_string();
    holds(&text, &["mine.ron:14:40: loss.config.rho_image: unknown key", "^^^^^^^^^\n", "hint: try rho"]);
    let text = recipe.error_at("loss.config.tau", Part::Value, "must be below 1", None).to_string();
    holds(&text, &["--set:1:17: loss.config.tau: must be below 1", "loss.config.tau=3"]);
    // Not set: the nearest key around it.
    let at = recipe.locate("loss.config.gamma").unwrap();
    assert_eq!((at.line, at.column, at.width), (14, 31, 6));
    assert_eq!(recipe.locate("scheduler.config.x").unwrap().line, 2);
}

#[test]
fn a_file_that_cannot_be_read() {
    let folder = std::env::temp_dir().join(format!("clip-host-recipe-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let text = Recipe::load(folder.join("none.ron"), &[]).unwrap_err().to_string();
    holds(&text, &["cannot read the recipe", "none.ron", "hint:"]);
    let text = Recipe::load(&folder, &[]).unwrap_err().to_string();
    holds(&text, &["cannot read the recipe"]);
    let file = folder.join("latin1.ron");
    std::fs::write(&file, b"(\n  name: \"\xe9\")").unwrap();
    let text = Recipe::load(&file, &[]).unwrap_err().to_string();
    holds(&text, &["is not UTF-8 text (line 2, byte 11)"]);
    std::fs::write(&file, format!("\u{FEFF}{}", GOOD.replace('\n', "\r\n"))).unwrap();
    assert_eq!(Recipe::load(&file, &[]).unwrap(), load(GOOD, &[]).unwrap());
    std::fs::remove_dir_all(&folder).unwrap();
}
