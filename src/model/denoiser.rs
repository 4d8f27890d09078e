//! A denoiser in front of a model: a small convolutional network that takes Gaussian noise off the pixels.
//!
//! Denoised smoothing (Salman et al. 2020) certifies a model that was never trained under noise by putting such a network
//! before it: denoiser and model together are the function that is smoothed, so the certificates hold as ever. The network
//! works at half resolution on blocks of 2 x 2 pixels (Zhang et al. 2018, FFDNet) and predicts the noise (Zhang et al. 2017,
//! DnCNN). It does not know how much noise there is: it is one fixed function of the pixels.

use super::parameters::{Build, Builder, Parameters, Source};
use super::patches::Patchify;
use super::tensor_file::{Numbers, TensorFile};
use super::tokenizer::write_text;
use super::weights;
use crate::error::{Error, Result};
use crate::files;
use crate::nn::activation::{Activation, activate};
use crate::nn::convolution::{Planes, convolve};
use crate::nn::linear::Linear;
use crate::rng;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file of weights in a denoiser's directory.
pub const TENSOR_FILE: &str = "model.safetensors";

/// The file of a denoiser's shape and noise.
pub const CONFIG_FILE: &str = "config.json";
/// What `config.json` calls such a directory.
const MODEL_TYPE: &str = "safemed_denoiser";
/// Values of a block of 2 x 2 pixels.
const BLOCK: usize = 12;

/// Shape of a denoiser, and the noise it was trained under.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenoiserConfig {
    /// Always `safemed_denoiser`.
    pub model_type: String,
    /// Channels of the layers between.
    pub width: usize,
    /// Convolutions.
    pub depth: usize,
    /// Standard deviation of the noise in training, for pixels in [0, 1].
    pub sigma: f64,
}

impl DenoiserConfig {
    /// A denoiser of this shape, for noise of standard deviation `sigma`.
    pub fn new(width: usize, depth: usize, sigma: f64) -> Self {
        Self { model_type: MODEL_TYPE.to_owned(), width, depth, sigma }
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::data(what));
        if self.model_type != MODEL_TYPE {
            return wrong(format!("`model_type` is `{}` and not `{MODEL_TYPE}`", self.model_type));
        }
        if !(1..=4096).contains(&self.width) || !(2..=64).contains(&self.depth) {
            return wrong(format!(
                "`width` {} and `depth` {} must be in 1..=4096 and 2..=64",
                self.width, self.depth
            ));
        }
        if !(self.sigma > 0.0 && self.sigma.is_finite()) {
            return wrong(format!("`sigma` must be a positive finite number: {}", self.sigma));
        }
        Ok(())
    }
}

/// The network.
#[derive(Debug, Clone)]
pub struct Denoiser {
    config: DenoiserConfig,
    layers: Vec<Linear>,
    parameters: Parameters,
}

impl Denoiser {
    fn build(config: DenoiserConfig, source: Source<'_>, trains: bool, device: &Device) -> Result<Self> {
        config.check()?;
        let trains: &dyn Fn(&str) -> bool = if trains { &|_| true } else { &|_| false };
        let mut builder = Builder::new(Build::plain(source, trains), device.clone());
        let DenoiserConfig { width, depth, .. } = config;
        let layers = (0..depth)
            .map(|index| {
                let input = if index == 0 { BLOCK } else { width };
                let output = if index + 1 == depth { BLOCK } else { width };
                builder.linear(&format!("layers.{index}"), &[output, input, 3, 3], true)
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, layers, parameters: builder.finish() })
    }

    /// A denoiser to be trained: it predicts no noise as yet.
    ///
    /// # Errors
    /// When the configuration makes no sense.
    pub fn untrained(config: DenoiserConfig, seed: u64, device: &Device) -> Result<Self> {
        let last = format!("layers.{}.weight", config.depth.saturating_sub(1));
        let source = |name: &str, shape: &[usize]| -> Result<Numbers<'_>> {
            let mut values = vec![0f32; shape.iter().product()];
            if name.ends_with("weight") && name != last {
                // Keeps the variance through a layer that halves it (He et al. 2015).
                let deviation = (2.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
                let mut stream = rng::stream(seed, "initial weights", &[rng::key_of(name)]);
                rng::fill_standard_normal(&mut stream, &mut values);
                for value in &mut values {
                    *value *= deviation;
                }
            }
            Ok(values.into())
        };
        Self::build(config, &source, true, device)
    }

    /// Reads a directory that [`Denoiser::save`] wrote; nothing trains.
    ///
    /// # Errors
    /// A data error for what is missing or damaged.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let text = files::read_text(&path, "cannot read the denoiser's")?;
        let at = |what: String| Error::data(format!("{what}\n  --> {}", path.display()));
        let config: DenoiserConfig = serde_json::from_str(&text).map_err(|error| {
            at(format!(
                "this is no denoiser: {error}\n   = help: `train.recipe = \"denoiser\"` makes one; `--denoiser` names its checkpoint"
            ))
        })?;
        config.check().map_err(|error| at(error.to_string()))?;
        let file = TensorFile::open(&dir.join(TENSOR_FILE))?;
        let source = |name: &str, shape: &[usize]| {
            if file.shape(name).is_some_and(|found| found != shape) {
                return Err(Error::data(format!(
                    "`{name}` is not {shape:?}\n  --> {}",
                    file.path().display()
                )));
            }
            file.numbers(name)
        };
        Self::build(config, &source, false, device)
    }

    /// Writes `config.json` and `model.safetensors`; the weights are those of PyTorch's `Conv2d`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|error| Error::io("cannot create the directory", dir, error))?;
        let mut tensors = self.parameters.tensors()?;
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        weights::save_file(&dir.join(TENSOR_FILE), &tensors, &[("format", "pt")])?;
        let text = serde_json::to_string_pretty(&self.config).map_err(anyhow::Error::from)?;
        write_text(&dir.join(CONFIG_FILE), &(text + "\n"))
    }

    /// Shape and noise.
    pub fn config(&self) -> &DenoiserConfig {
        &self.config
    }

    /// The weights by name.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The pixels without what is taken for noise; not clipped.
    ///
    /// # Shapes
    /// - `pixels`: `[batch, 3, height, width]`, sides even
    /// - returns: same
    ///
    /// # Errors
    /// When a side is odd.
    pub fn apply(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, _, height, width) = pixels.dims4()?;
        // Blocks of 2 x 2 as PyTorch's `pixel_unshuffle` orders them.
        let blocks = Patchify {
            patch_size: 2,
            temporal_patch_size: 1,
            spatial_merge_size: 1,
            mean: [0.0; 3],
            std: [1.0; 3],
        };
        let planes = Planes { batch, height: height / 2, width: width / 2 };
        let mut rows = blocks.apply(pixels)?;
        for (index, layer) in self.layers.iter().enumerate() {
            rows = convolve(&rows, planes, layer)?;
            if index + 1 < self.layers.len() {
                rows = activate(&rows, Activation::Silu)?;
            }
        }
        let noise = rows
            .reshape(vec![batch, height / 2, width / 2, 3, 2, 2])?
            .permute(vec![0, 3, 1, 4, 2, 5])?
            .reshape((batch, 3, height, width))?;
        pixels - noise
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::recompute::{Memory, Stage, loss_and_gradients};
    use candle_core::Var;
    use serde_json::Value;

    /// As `scripts/golden/denoiser.py` makes them.
    fn sines(count: usize, step: f64, scale: f64) -> Vec<f32> {
        (0..count).map(|i| (scale * (step * (i + 1) as f64).sin()) as f32).collect()
    }

    fn golden() -> (Value, Denoiser, Tensor) {
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden/denoiser.json")).unwrap();
        let number = |key: &str| golden[key].as_u64().unwrap() as usize;
        let source = |name: &str, shape: &[usize]| -> Result<Numbers<'_>> {
            let index: f64 = name.split('.').nth(1).unwrap().parse().unwrap();
            let count = shape.iter().product();
            let is_weight = name.ends_with("weight");
            let (step, scale) = if is_weight { (0.7 + index, 0.3) } else { (1.1 + index, 0.1) };
            Ok(sines(count, step, scale).into())
        };
        let config = DenoiserConfig::new(number("width"), number("depth"), 0.25);
        let denoiser = Denoiser::build(config, &source, false, &Device::Cpu).unwrap();
        let shape: Vec<usize> = serde_json::from_value(golden["shape"].clone()).unwrap();
        let pixels =
            sines(shape.iter().product(), 0.37, 0.5).into_iter().map(|v| v + 0.5).collect::<Vec<_>>();
        let pixels = Tensor::from_vec(pixels, shape, &Device::Cpu).unwrap();
        (golden, denoiser, pixels)
    }

    fn assert_close(ours: &Tensor, theirs: &Value) {
        let ours: Vec<f32> = ours.flatten_all().unwrap().to_vec1().unwrap();
        let theirs: Vec<f32> = serde_json::from_value(theirs.clone()).unwrap();
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() < 2e-6 * (1.0 + b.abs()), "{a} is not {b}");
        }
    }

    #[test]
    fn values_and_pixel_gradients_are_those_of_the_same_network_in_pytorch() {
        let (golden, denoiser, pixels) = golden();
        assert_close(&denoiser.apply(&pixels).unwrap(), &golden["denoised"]);
        let pixels = Var::from_tensor(&pixels).unwrap();
        let weights =
            Tensor::from_vec(sines(pixels.elem_count(), 0.9, 1.0), pixels.shape(), &Device::Cpu).unwrap();
        let stages: Vec<Stage<'_>> = vec![Box::new(|state| Ok(vec![denoiser.apply(&state[0])?]))];
        for memory in [Memory::Keep, Memory::Recompute] {
            let loss = |state: &[Tensor]| (&state[0] * &weights)?.sum_all();
            let tensors = [pixels.as_tensor().clone()];
            let (_, gradients) = loss_and_gradients(&stages, &tensors, loss, &[], memory).unwrap();
            assert_close(gradients.get(&pixels).unwrap(), &golden["pixel_gradient"]);
        }
    }

    #[test]
    fn an_image_is_the_same_bytes_alone_and_among_others() {
        let (_, denoiser, pixels) = golden();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let alone = flat(&denoiser.apply(&pixels.narrow(0, 1, 1).unwrap()).unwrap());
        assert_eq!(flat(&denoiser.apply(&pixels).unwrap())[alone.len()..], alone);
        assert!(denoiser.apply(&pixels.narrow(3, 0, 5).unwrap()).is_err(), "an odd side");
    }

    #[test]
    fn what_is_saved_is_read_back_and_what_is_damaged_is_refused_with_its_path() {
        let (_, denoiser, pixels) = golden();
        let dir = tempfile::tempdir().unwrap();
        denoiser.save(dir.path()).unwrap();
        let again = Denoiser::load(dir.path(), &Device::Cpu).unwrap();
        let values =
            |d: &Denoiser| d.apply(&pixels).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&again), values(&denoiser));
        let refused = |what: &str| {
            let error = Denoiser::load(dir.path(), &Device::Cpu).unwrap_err();
            assert!(matches!(error, Error::Data(_)), "{error}");
            assert!(error.to_string().contains(what) && error.to_string().contains("-->"), "{error}");
        };
        let write = |text: &str| std::fs::write(dir.path().join("config.json"), text).unwrap();
        let config = |width: u64, depth: u64, sigma: f64| {
            format!(r#"{{"model_type":"safemed_denoiser","width":{width},"depth":{depth},"sigma":{sigma}}}"#)
        };
        for (text, what) in [
            (config(6, 3, 0.25), "layers.0.weight"),
            (config(5, 4, 0.25), "layers."),
            (config(5, 3, 0.0), "sigma"),
            (config(0, 3, 0.25), "width"),
            (config(5, 1_000_000_000_000, 0.25), "depth"),
            (config(5, 3, 0.25).replace("safemed_denoiser", "qwen2_vl"), "model_type"),
            (r#"{"model_type":"qwen2_vl"}"#.to_owned(), "no denoiser"),
        ] {
            write(&text);
            refused(what);
        }
    }

    #[test]
    fn an_untrained_denoiser_changes_nothing() {
        let (_, _, pixels) = golden();
        let denoiser = Denoiser::untrained(DenoiserConfig::new(8, 4, 0.25), 3, &Device::Cpu).unwrap();
        assert_eq!(denoiser.parameters().trained().len(), 8);
        let found = denoiser.apply(&pixels).unwrap();
        assert_eq!(
            (found - pixels).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(),
            0.0
        );
    }
}
