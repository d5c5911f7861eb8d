//! The recipes that the project ships load, and say what they should.

use clip_host_recipe::{Kind, Recipe};

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
