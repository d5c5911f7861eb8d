//! Learning rates against open_clip's.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::scheduler::Scheduler;
use clip_host_plugin_api::serde_json::Value;
use clip_scheduler_linear_warmup_cosine::{LinearWarmupCosine, LinearWarmupCosineConfig};
use testing::{Case, at, check};

#[test]
fn open_clip() {
    let case = Case::load("schedulers", "openclip_cosine");
    let config = LinearWarmupCosineConfig { warmup_steps: case.count("warmup_steps") as u64 };
    check::<LinearWarmupCosine>("openclip_cosine", &config, case.count("total_steps") as u64);
}

/// A run that is no longer than its warm-up has a rate at every step.
#[test]
fn all_warmup() {
    let config = LinearWarmupCosineConfig { warmup_steps: 4 };
    let lr = |step| LinearWarmupCosine::lr(&config, &at(1.0, step, 4), &mut Value::Null).unwrap();
    assert_eq!([0, 1, 2, 3, 4, 9].map(lr), [0.25, 0.5, 0.75, 1.0, 1.0, 0.0]);
}
