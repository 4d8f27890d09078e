//! Keys and values of past rows, kept by row.
//!
//! A row belongs to one place of one sequence. Sequences name the rows they see, so a prompt's rows serve every
//! completion sampled from it, without copies.

use super::config::TextConfig;
use crate::nn::rows;
use candle_core::{DType, Device, Result, Tensor};

/// One layer's keys and values.
#[derive(Debug, Clone)]
pub struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl LayerCache {
    /// Writes rows in place.
    pub(super) fn write(&self, places: &[u32], keys: &Tensor, values: &Tensor) -> Result<()> {
        rows::write(&self.keys, places, keys)?;
        rows::write(&self.values, places, values)
    }

    /// `[capacity, num_kv_heads · head_dim]`.
    pub(super) fn keys(&self) -> &Tensor {
        &self.keys
    }

    /// `[capacity, num_kv_heads · head_dim]`.
    pub(super) fn values(&self) -> &Tensor {
        &self.values
    }
}

/// The cache of every layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
}

impl KvCache {
    /// Room for `capacity` rows.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(config: &TextConfig, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        let shape = (capacity, config.num_kv_heads * config.head_dim);
        let layer = || {
            Ok(LayerCache {
                keys: Tensor::zeros(shape, dtype, device)?,
                values: Tensor::zeros(shape, dtype, device)?,
            })
        };
        Ok(Self { layers: (0..config.num_layers).map(|_| layer()).collect::<Result<_>>()? })
    }

    /// Layer `index`.
    pub(super) fn layer(&self, index: usize) -> &LayerCache {
        &self.layers[index]
    }
}
