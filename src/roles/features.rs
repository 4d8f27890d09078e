//! What the vision tower says about images, remembered while it cannot change.

use super::policy;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::positions::image_tokens;
use crate::model::vlm::Features;
use candle_core::Tensor;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

/// Features of images seen before, by what the images show. Good for one model only, whose vision tower does not train.
///
/// On the CPU an image's features are the same bytes in any batch, so that remembering them changes no result.
#[derive(Debug)]
pub struct FeatureCache {
    capacity_bytes: usize,
    state: Mutex<State>,
}

/// What names an image: a hash of its pixels and its height and width.
type Key = ([u8; 32], [usize; 2]);

#[derive(Debug, Default)]
struct State {
    known: HashMap<Key, Features>,
    /// In the order of arrival: the first goes first.
    order: VecDeque<Key>,
    bytes: usize,
}

impl FeatureCache {
    /// A cache of at most `capacity_bytes` of features.
    pub fn new(capacity_bytes: usize) -> Self {
        Self { capacity_bytes, state: Mutex::default() }
    }

    /// As [`policy::encode`], without computing what is remembered.
    ///
    /// # Errors
    /// As [`policy::encode`].
    pub fn encode(&self, assistant: &Assistant, pixels: &[Tensor]) -> Result<Features> {
        if self.capacity_bytes == 0 {
            return policy::encode(assistant, pixels);
        }
        let locked = || self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut keys, mut images) = (Vec::new(), Vec::new());
        for tensor in pixels {
            let (count, _, height, width) = tensor.dims4()?;
            for row in 0..count {
                let image = tensor.narrow(0, row, 1)?;
                let values = image.flatten_all()?.to_vec1::<f32>()?;
                keys.push((*blake3::hash(bytemuck::cast_slice(&values)).as_bytes(), [height, width]));
                images.push(image);
            }
        }
        let mut found: HashMap<Key, Features> = {
            let state = locked();
            keys.iter().filter_map(|key| Some((*key, state.known.get(key)?.clone()))).collect()
        };
        let mut new: Vec<usize> = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            if !found.contains_key(key) && new.iter().all(|&other| keys[other] != *key) {
                new.push(index);
            }
        }
        if !new.is_empty() {
            let unknown: Vec<Tensor> = new.iter().map(|&index| images[index].clone()).collect();
            let computed = policy::encode(assistant, &unknown)?.detach();
            let merge = assistant.vlm.config().vision.spatial_merge_size;
            let mut start = 0;
            for (&index, grid) in new.iter().zip(policy::grids_of(assistant, &unknown)?) {
                let rows = start..start + image_tokens(grid, merge) as u32;
                start = rows.end;
                let own = computed.select(&rows.collect::<Vec<u32>>())?;
                found.insert(keys[index], own.clone());
                self.remember(&mut locked(), keys[index], own);
            }
        }
        let parts: Vec<&Features> = keys.iter().map(|key| &found[key]).collect();
        Ok(Features::joined(&parts)?)
    }

    fn remember(&self, state: &mut State, key: Key, features: Features) {
        let size = features.bytes();
        if size > self.capacity_bytes || state.known.contains_key(&key) {
            return;
        }
        while state.bytes + size > self.capacity_bytes {
            let Some(oldest) = state.order.pop_front() else { break };
            state.bytes -= state.known.remove(&oldest).map_or(0, |gone| gone.bytes());
        }
        state.bytes += size;
        state.order.push_back(key);
        state.known.insert(key, features);
    }
}
