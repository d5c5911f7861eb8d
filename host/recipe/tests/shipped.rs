//! The recipes that the project ships load, and say what they should.

use clip_host_recipe::{Grid, Kind, Recipe};

fn shipped(name: &str, sets: &[&str]) -> Recipe {
    let path = format!("{}/../../recipes/{name}", env!("CARGO_MANIFEST_DIR"));
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Recipe::load(path, &sets).unwrap_or_else(|errors| panic!("{errors}"))
}

#[test]
fn the_main_job() {
    let recipe = shipped("isogclr_radam.ron", &["optimizer.plugin=adamw"]);
    assert_eq!((recipe.loss.plugin.as_str(), recipe.optimizer.choice.plugin.as_str()), ("isogclr", "adamw"));
    let again = Recipe::parse("again", &recipe.to_ron(), &[]).unwrap();
    assert_eq!(again, recipe);
    assert!(recipe.data().is_some_and(|data| matches!(data.kind, Kind::Struct(None, _))));
}

#[test]
fn the_studys_run() {
    let recipe = shipped("cc3m/isogclr_radam.ron", &["data.train=[Tar(\"data/cc3m/cc3m-train-{0000..0019}.tar\")]"]);
    assert_eq!((recipe.train.epochs, recipe.train.batch_size, recipe.model.embed_dim), (30, 128, 256));
    assert_eq!((recipe.optimizer.lr, recipe.optimizer.weight_decay), (2e-4, 0.02));
    assert_eq!(recipe.section::<usize>("data.image_size").unwrap(), 256);
    assert_eq!(recipe.scheduler.config["warmup_lr"], serde_json::json!(1e-5));
    assert_eq!(recipe.scheduler.config["min_lr"], serde_json::json!(1e-6));
    assert_eq!(recipe.loss.config["gamma"], serde_json::json!(0.8));
    let again = Recipe::parse("again", &recipe.to_ron(), &[]).unwrap();
    assert_eq!(again, recipe);

    let vit = shipped("cc3m/isogclr_radam_vit.ron", &[]);
    assert_eq!(vit.model.image_encoder.choice.config["preset"], serde_json::json!("vit_base_patch32_224"));
    assert_eq!(vit.section::<usize>("data.image_size").unwrap(), 224);
    assert_eq!((&vit.loss, &vit.scheduler, &vit.train), (&recipe.loss, &recipe.scheduler, &recipe.train));
}

#[test]
fn the_studys_grids() {
    let grid = |name: &str| {
        let path = format!("{}/../../recipes/{name}", env!("CARGO_MANIFEST_DIR"));
        Grid::load(path, &[]).unwrap_or_else(|errors| panic!("{errors}"))
    };
    let names = |grid: &Grid| -> Vec<String> { grid.axes.iter().map(|axis| axis.names.join(" ")).collect() };
    let four = grid("cc3m/grid_5x4.ron");
    assert_eq!(names(&four), ["clip cyclip sogclr isogclr dynamic_temperature", "adamw radam novograd adafactor"]);
    let three = grid("cc3m/grid_5x3.ron");
    assert_eq!(names(&three), ["clip sogclr cyclip vicreg onlineclr", "adamw sgd adam"]);
    assert_eq!((four.cells.len(), three.cells.len()), (20, 15));
    for cell in four.cells.iter().chain(&three.cells) {
        let recipe = &cell.recipe;
        assert_eq!(
            (recipe.train.epochs, recipe.train.batch_size, recipe.optimizer.lr),
            (30, 128, 2e-4),
            "{}",
            cell.name
        );
    }
    // The study's own run is one of the cells.
    let run = shipped("cc3m/isogclr_radam.ron", &[]);
    let cell = four.cells.iter().find(|cell| cell.name == "isogclr_radam").unwrap();
    assert_eq!(cell.recipe.differences(&run), []);

    let sample = grid("grid_sample.ron");
    let cell = sample.cells.iter().find(|cell| cell.name == "isogclr_radam").unwrap();
    let run = shipped("isogclr_radam.ron", &["train.epochs=3", "scheduler.config.warmup_steps=20"]);
    assert_eq!(cell.recipe.differences(&run), []);
}
