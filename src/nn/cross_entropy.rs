//! Log-probabilities of given tokens, without ever holding the logits of all rows at once.

use super::linear::Linear;
use super::plain;
use candle_core::{Result, Tensor};

/// Log-probability in nats of `targets[r]` under `softmax(head(hidden[r]) / temperature)`, row by row.
///
/// # Shapes
/// - `hidden`: `[rows, hidden]`
/// - `head`: `[vocab, hidden]`, frozen or trainable
/// - `targets`: one token id per row
/// - returns: `[rows]`, float32
pub fn log_probs_of(hidden: &Tensor, head: &Linear, targets: &[u32], temperature: f64) -> Result<Tensor> {
    let logits = head.forward(hidden)?;
    let targets = Tensor::new(targets, hidden.device())?;
    plain::log_probs_of(&logits, &targets, temperature)
}
