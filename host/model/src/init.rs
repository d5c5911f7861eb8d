//! First values of parameters and states: a function of the run's seed and the tensor's name only.

use clip_host_plugin_api::interpret::mix;
use clip_host_plugin_api::ir::Init;

/// Fills a tensor with its first values.
pub fn fill(init: Init, seed: u64, name: &str, values: &mut [f32]) {
    let mut state = name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
    // Uniform in (0, 1), 53 bits.
    let mut uniform = move || {
        state = mix(state);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut normal = {
        let mut uniform = uniform;
        // Box and Muller 1958.
        move || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
    };
    match init {
        Init::Constant(value) => values.fill(value as f32),
        Init::Normal { std } => values.iter_mut().for_each(|v| *v = (normal() * std) as f32),
        Init::TruncatedNormal { std } => values.iter_mut().for_each(|v| {
            let mut draw = normal();
            while draw.abs() > 2.0 {
                draw = normal();
            }
            *v = (draw * std) as f32;
        }),
        Init::Uniform { bound } => values.iter_mut().for_each(|v| *v = ((2.0 * uniform() - 1.0) * bound) as f32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_their_moments_and_depend_on_the_name() {
        let moments = |init| {
            let mut values = vec![0.0; 40_000];
            fill(init, 1, "w", &mut values);
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32;
            (mean, var.sqrt(), values[0])
        };
        let (mean, std, first) = moments(Init::Normal { std: 0.5 });
        assert!(mean.abs() < 0.01 && (std - 0.5).abs() < 0.01, "{mean} {std}");
        let (mean, std, _) = moments(Init::Uniform { bound: 1.0 });
        assert!(mean.abs() < 0.02 && (std - 0.577).abs() < 0.01, "{mean} {std}");
        let (_, std, _) = moments(Init::TruncatedNormal { std: 1.0 });
        assert!((std - 0.88).abs() < 0.01, "{std}");
        let mut other = vec![0.0; 1];
        fill(Init::Normal { std: 0.5 }, 1, "v", &mut other);
        assert_ne!(first, other[0]);
    }
}
