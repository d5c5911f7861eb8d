//! Every plugin that comes with the host: it loads, its schema and defaults hold, and it keeps its contract.

use crate::fixtures::{self, FirstParty};
use clip_host_plugin_api::describe::Kind;
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsRequest};
use clip_host_plugin_api::scheduler::{Progress, ScheduleRequest};
use clip_host_plugins::{Plugin, Registry, inspect};
use serde_json::Value;

/// Asks a plugin what a run would ask it. All answers are checked on the way.
fn exercise(plugin: &Plugin, config: Value) {
    let fail = |error: clip_host_plugins::PluginError| panic!("{error}");
    match plugin.kind() {
        Kind::Loss => {
            let request = LossRequest { config, batch: 4, embed_dim: 8, dataset_size: 100 };
            plugin.fragment(&Request::Loss(request)).unwrap_or_else(fail);
        }
        Kind::Optimizer => {
            for step in [1, 2, 10, 100_000] {
                let request = ScalarsRequest { config: config.clone(), step, lr: 2e-4 };
                let answer = plugin.scalars(&request).unwrap_or_else(|error| panic!("{error}"));
                assert!(!answer.scalars.is_empty());
            }
            let info = ParamInfo { name: "weight".into(), shape: vec![3, 5], weight_decay: 0.02 };
            plugin.fragment(&Request::Optimizer(OptimizerRequest { config, info })).unwrap_or_else(fail);
        }
        Kind::Encoder => {
            // Images or texts: an encoder takes the one and refuses the other.
            let inputs = [InputShape::Image { height: 224, width: 224 }, InputShape::Text { length: 30 }];
            let answers = inputs.map(|input| {
                [true, false].map(|training| {
                    let request = EncoderRequest { config: config.clone(), batch: 2, input, training };
                    plugin.fragment(&Request::Encoder(request)).map(|_| ()).map_err(|error| error.to_string())
                })
            });
            let [images, texts] = &answers;
            assert!(images.iter().all(Result::is_ok) != texts.iter().all(Result::is_ok), "{answers:?}");
            assert!(images.iter().all(Result::is_err) != texts.iter().all(Result::is_err), "{answers:?}");
        }
        Kind::Scheduler => {
            let mut state = Value::Null;
            for step in [0, 1, 50, 99] {
                let (steps_per_epoch, total_steps, epochs, epoch) = (10, 100, 10, step / 10);
                let progress = Progress {
                    base_lr: 2e-4,
                    step,
                    steps_per_epoch,
                    total_steps,
                    epoch,
                    epochs,
                    metric: None,
                    evaluations: 0,
                };
                let request = ScheduleRequest { config: config.clone(), progress, state };
                let answer = plugin.schedule(&request).unwrap_or_else(|error| panic!("{error}"));
                assert!(answer.lr <= 2e-4 * (1.0 + 1e-12), "{} at step {step}", answer.lr);
                state = answer.state;
            }
        }
    }
}

#[test]
fn every_first_party_plugin_keeps_its_contract() {
    let plugins = fixtures::first_party_plugins();
    assert!(plugins.len() > 10, "{plugins:?}");
    let packages: Vec<&str> = plugins.iter().map(|plugin| plugin.package.as_str()).collect();
    let folder = fixtures::first_party(&packages);
    let files: Vec<_> = packages.iter().map(|package| fixtures::first_party_library(&folder, package)).collect();
    let registry = Registry::search(&files, None, None);
    assert_eq!(registry.list().len(), plugins.len());
    for FirstParty { kind, id, package } in &plugins {
        let kinds = [Kind::Loss, Kind::Optimizer, Kind::Encoder, Kind::Scheduler];
        let kind = kinds.into_iter().find(|k| k.to_string() == *kind).expect("folders are named by kinds");
        let plugin = registry.get(kind, id).unwrap_or_else(|error| panic!("{package}: {error}"));
        // What the defaults are, the schema must allow: given in full they come out as they went in.
        let defaults = plugin.descriptor().defaults.as_object().cloned().unwrap_or_default();
        let complete = plugin.complete(&defaults).unwrap_or_else(|errors| panic!("{package}: {errors:#?}"));
        assert_eq!(complete.as_object(), Some(&defaults), "{package}");
        exercise(&plugin, complete);
        assert!(!plugin.descriptor().doc.is_empty(), "{package}");
        for setting in inspect::settings(plugin.descriptor()) {
            assert!(!setting.doc.is_empty(), "{package}: `{}` is not documented", setting.name);
        }
    }
}
