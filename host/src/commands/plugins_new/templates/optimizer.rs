//! An optimizer for clip-host: say here what yours computes, and where it was published.
//!
//! With gradient g, learning rate lr, step t from 1, and a running average m that starts at 0:
//!
//! ```text
//! m ← β·m + (1 − β)·g
//! p ← p − lr·weight_decay·p − lr·m / (1 − βᵗ)
//! ```

use clip_host_plugin_api::prelude::*;

/// Settings of `my_optimizer`: what a recipe's `config: (…)` may hold.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
pub struct MyOptimizerConfig {
    /// Decay of the running average of gradients.
    #[schemars(range(min = 0.0, max = 0.9999))]
    pub beta: f64,
}

impl Default for MyOptimizerConfig {
    fn default() -> Self {
        MyOptimizerConfig { beta: 0.9 }
    }
}

/// The optimizer.
pub struct MyOptimizer;

impl Plugin for MyOptimizer {
    type Config = MyOptimizerConfig;
    const ID: &'static str = "my_optimizer";
    const DOC: &'static str = "Descent along a running average of gradients, with decoupled decay.";
}

impl Optimizer for MyOptimizer {
    /// Numbers that depend on the step and the learning rate only, in double precision.
    fn scalars(config: &MyOptimizerConfig, step: u64, lr: f64) -> Vec<(&'static str, f64)> {
        let correction = 1.0 - config.beta.powf(step as f64);
        vec![("lr", lr), ("step_size", lr / correction)]
    }

    /// The parameter's new value.
    fn build<'g>(
        config: &MyOptimizerConfig,
        graph: &'g Graph,
        update: &ParamUpdate<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        let average = graph.state("average", &update.shape(), Init::Constant(0.0));
        let new = average * config.beta + update.grad * (1.0 - config.beta);
        graph.update(average, new);
        let decay = update.param * update.scalar("lr")? * update.info.weight_decay;
        Ok(update.param - decay - new * update.scalar("step_size")?)
    }
}

export_plugin!(optimizer, MyOptimizer);

#[cfg(test)]
mod tests {
    use super::*;
    use clip_host_plugin_api::testing::Harness;

    /// Minimises ½‖p − target‖², whose gradient is p − target; the parameter after so many steps.
    fn minimise(mut param: Vec<f64>, target: &[f64], lr: f64, steps: u64) -> Vec<f64> {
        let config = MyOptimizerConfig::default();
        let mut harness = Harness::optimizer::<MyOptimizer>(&config, &[param.len()], 0.0)
            .expect("the settings are good");
        for step in 1..=steps {
            let grad: Vec<f64> = param.iter().zip(target).map(|(p, t)| p - t).collect();
            harness.set("param", param).set("grad", grad);
            for (name, value) in MyOptimizer::scalars(&config, step, lr) {
                harness.set(&format!("scalar.{name}"), [value]);
            }
            let mut outputs = harness
                .step(None, &[])
                .expect("the update can be evaluated")
                .outputs;
            param = outputs
                .remove("param")
                .expect("an update has one output, `param`");
        }
        param
    }

    #[test]
    fn it_finds_the_minimum_of_a_parabola() {
        let (start, target) = (vec![5.0, -3.0, 0.5], [1.0, 2.0, 0.5]);
        let found = minimise(start, &target, 0.05, 1000);
        let error = found
            .iter()
            .zip(target)
            .map(|(p, t)| (p - t).abs())
            .fold(0.0, f64::max);
        assert!(error < 1e-6, "{found:?} is {error:e} from {target:?}");
    }

    #[test]
    fn the_first_step_is_the_learning_rate_times_the_gradient() {
        let after = minimise(vec![5.0], &[1.0], 0.25, 1);
        assert!((after[0] - 4.0).abs() < 1e-12, "{after:?}");
    }
}
