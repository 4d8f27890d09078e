//! Weights of a model trained from scratch, drawn by name.

use crate::error::Result;
use crate::rng;
use candle_core::{Device, Tensor};

/// The initial value of the parameter `name`: ones for norms, zeros for biases, normal values otherwise.
///
/// Linear layers have standard deviation `1 / sqrt(3 · fan_in)` (the variance of PyTorch's default); those that write
/// to the residual stream start near zero, so that every block starts near the identity.
///
/// # Errors
/// When the tensor cannot be made.
pub fn initial_value(seed: u64, name: &str, shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product();
    let is_norm =
        shape.len() == 1 && (name.contains("norm") || name.contains("ln_q")) && name.ends_with("weight");
    let fan_in: usize = shape.iter().skip(1).product();
    let standard_deviation = if is_norm || shape.len() == 1 {
        0.0
    } else if name.contains("embed_tokens") {
        0.3
    } else if name.contains("pos_embed") || name == "lm_head.weight" {
        0.02
    } else if ["o_proj", "down_proj", "attn.proj", "linear_fc2", "fc2"].iter().any(|end| name.contains(end))
        && !name.contains("merger")
    {
        0.008
    } else {
        1.0 / (3.0 * fan_in as f32).sqrt()
    };
    let mut values = vec![if is_norm { 1.0 } else { 0.0 }; count];
    if standard_deviation > 0.0 {
        rng::fill_standard_normal(
            &mut rng::stream(seed, "initial weights", &[rng::key_of(name)]),
            &mut values,
        );
        for value in &mut values {
            *value *= standard_deviation;
        }
    }
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
