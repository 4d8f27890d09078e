//! What an examination in training costs: its questions are counted beforehand, and its dearest batch is measured.
//!
//! Deviation: every answer counts as right and none breaks under attack, so that no question is spared anything. Where answers
//! are wrong an examination takes less time.

use super::probe::{Figures, note_peak};
use super::subject::Subject;
use super::workload::{self, Item, Workload};
use crate::backend::restart_peak_memory;
use crate::data::{Dataset, ImageCheck, Sample};
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::recipes::answers::Feigned;
use crate::recipes::attack::{self, Setting};
use crate::recipes::config::{Command, RunConfig};
use crate::recipes::eval::{self, EvalSettings};
use crate::recipes::inputs;
use crate::recipes::items::CACHE_BYTES;
use crate::recipes::progress::Silent;
use crate::recipes::run::{Opening, Run};
use crate::recipes::validation;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::Instant;

/// The questions of validation, counted.
#[derive(Debug, Clone)]
pub struct ExamWork {
    /// In the order in which they are asked.
    asked: Vec<Asked>,
    /// Bytes of images that one examination comes to keep.
    pub image_bytes: usize,
    /// Bytes of features that it comes to keep.
    pub feature_bytes: usize,
}

/// One question of validation.
#[derive(Debug, Clone)]
struct Asked {
    id: String,
    item: Item,
    /// What it costs, in units of the mean question.
    load: f64,
}

impl ExamWork {
    /// Counts an examination on `questions`, of which there are some.
    ///
    /// # Errors
    /// When an image is missing or damaged.
    pub fn count(config: &RunConfig, subject: &Subject, questions: &Dataset) -> Result<Self> {
        let sorted: Vec<Sample> = inputs::in_item_order(&questions.samples).into_iter().cloned().collect();
        let sorted = Dataset::new(questions.root.clone(), sorted);
        let items = Workload::items(config, subject, &sorted, None)?;
        let loads = workload::loads(subject, &items, 1)?;
        let mean = loads.iter().sum::<f64>() / loads.len() as f64;
        let (mut known, mut image_bytes, mut tokens, mut most) = (HashSet::new(), 0, 0, 0);
        for (sample, item) in sorted.samples.iter().zip(&items) {
            if known.insert(&sample.image) {
                image_bytes += item.image_bytes;
                tokens += item.image;
                most = most.max(item.image);
            }
        }
        // A blank image is looked at besides.
        let feature_bytes = (tokens + most) * workload::feature_bytes_of_token(subject);
        let asked = sorted.samples.iter().zip(items).zip(loads);
        Ok(Self {
            asked: asked
                .map(|((sample, item), load)| Asked { id: sample.id.clone(), item, load: load / mean })
                .collect(),
            image_bytes: image_bytes.min(CACHE_BYTES),
            feature_bytes: feature_bytes.min(config.feature_bytes()),
        })
    }

    /// Number of questions.
    pub fn num_questions(&self) -> usize {
        self.asked.len()
    }

    /// Tokens of the longest right answer.
    pub fn longest_answer(&self) -> usize {
        self.asked.iter().map(|asked| asked.item.completion).max().unwrap_or(1)
    }

    /// The batch that holds the most at once in a training by `config`, to be measured: with answers that the model ends where
    /// it does, or of `longest` tokens each.
    ///
    /// # Errors
    /// When the prompt has an unknown name.
    pub fn probe(&self, config: &RunConfig, longest: Option<usize>) -> Result<ExamProbe> {
        let mut own = validation::own_config(config);
        let is_attacked = config.train.validation.num_steps > 0;
        let batch_size = if is_attacked { Setting::of(&own)?.batch_size } else { own.batch_size };
        if let Some(longest) = longest {
            own.max_new_tokens = longest.min(own.max_new_tokens);
        }
        let batch = &self.asked[self.dearest(batch_size)];
        Ok(ExamProbe {
            config: own,
            ids: batch.iter().map(|asked| asked.id.clone()).collect(),
            share: batch.iter().map(|asked| asked.load).sum(),
            is_longest: longest.is_some(),
        })
    }

    /// Where the questions of the dearest batch stand.
    fn dearest(&self, batch_size: usize) -> Range<usize> {
        // Images of one size are attacked together, others one after the other.
        let together = |batch: &[Asked]| {
            let mut by_size: HashMap<[usize; 2], f64> = HashMap::new();
            for asked in batch {
                *by_size.entry(asked.item.size).or_default() += asked.load;
            }
            by_size.into_values().fold(0.0, f64::max)
        };
        let (mut dearest, mut most) = (0, -1.0);
        for (place, batch) in self.asked.chunks(batch_size).enumerate() {
            let load = together(batch);
            if load > most {
                (dearest, most) = (place, load);
            }
        }
        let count = self.asked.len();
        let start = dearest * batch_size;
        if batch_size > 1 || count < 2 {
            return start..(start + batch_size).min(count);
        }
        // A question alone would be asked about no other image.
        let start = start.min(count - 2);
        start..start + 2
    }
}

/// A batch of an examination, and how it is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExamProbe {
    /// The settings of runs in `validation/`.
    pub config: RunConfig,
    /// The ids of the questions.
    pub ids: Vec<String>,
    /// What they cost together, in units of the mean question.
    pub share: f64,
    /// Whether answers are as long as they may be, wherever the model would end them.
    pub is_longest: bool,
}

impl ExamProbe {
    /// Asks and attacks in this process, which keeps `beside` bytes of images for training; `is_cpu`: on the processor, where
    /// memory can be measured.
    pub(super) fn measure(
        &self,
        assistant: &Assistant,
        figures: &mut Figures,
        beside: usize,
        is_cpu: bool,
    ) -> Result<()> {
        let mut questions = self.config.data.dataset().load(ImageCheck::Exist)?;
        questions.samples.retain(|sample| self.ids.contains(&sample.id));
        let root = tempfile::tempdir().map_err(anyhow::Error::from)?;
        let config = RunConfig { out: Some(root.path().join("exam")), ..self.config.clone() };
        let is_attacked = config.train.validation.num_steps > 0;
        let command = if is_attacked { Command::Attack } else { Command::Eval };
        let mut run = Run::open(command, &config, Opening::default())?;
        let feigned = Some(Feigned { is_longest: self.is_longest });
        restart_peak_memory();
        let started = Instant::now();
        if is_attacked {
            let mut setting = Setting::of(&config)?;
            setting.asking.feigned = feigned;
            attack::under_attack(assistant, &questions, None, &setting, &mut run, &Silent)?;
        } else {
            let mut settings = EvalSettings::of(&config)?;
            settings.asking.feigned = feigned;
            eval::evaluate(assistant, &questions, None, &settings, &mut run, &Silent)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        figures.insert("seconds_exam".to_owned(), seconds);
        figures.insert("seconds_per_exam_item".to_owned(), seconds / self.share);
        note_peak(figures, "exam_peak_bytes", beside, is_cpu);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Questions of these loads, about images of these sides.
    fn work(loads: &[(f64, usize)]) -> ExamWork {
        let asked = loads.iter().enumerate().map(|(number, &(load, side))| Asked {
            id: format!("q{number}"),
            item: Item { size: [side, side], completion: 3 + number, ..Item::default() },
            load,
        });
        ExamWork { asked: asked.collect(), image_bytes: 0, feature_bytes: 0 }
    }

    #[test]
    fn the_dearest_batch_is_that_with_the_most_at_once() {
        let exam = work(&[(1.0, 8), (1.0, 8), (3.0, 9), (1.0, 8), (2.0, 8), (2.0, 8), (3.5, 10)]);
        assert_eq!(exam.dearest(2), 4..6);
        assert_eq!(exam.dearest(3), 3..6);
        assert_eq!(exam.dearest(100), 0..7);
        // One by one, a second question lends its image.
        assert_eq!(exam.dearest(1), 5..7);
        assert_eq!(work(&[(1.0, 8), (3.0, 8), (2.0, 8)]).dearest(1), 1..3);
        assert_eq!(work(&[(1.0, 8)]).dearest(1), 0..1);
        assert_eq!(exam.longest_answer(), 9);
    }

    #[test]
    fn a_probe_asks_as_the_examination_of_its_training_does() {
        let exam = work(&[(1.0, 8), (1.0, 8), (4.0, 8), (4.0, 8), (1.0, 8), (1.0, 8)]);
        let mut config = RunConfig { max_new_tokens: 50, ..RunConfig::default() };
        config.train.validation.every = 5;
        let probe = exam.probe(&config, None).unwrap();
        assert_eq!((probe.ids.len(), probe.share, probe.is_longest), (6, 12.0, false));
        assert_eq!(probe.config.max_new_tokens, 50);
        config.train.micro_batch_size = Some(2);
        let probe = exam.probe(&config, Some(7)).unwrap();
        assert_eq!(probe.ids, ["q2", "q3"]);
        assert_eq!((probe.share, probe.is_longest), (8.0, true));
        assert_eq!(probe.config.max_new_tokens, 7);
        assert_eq!(exam.probe(&config, Some(70)).unwrap().config.max_new_tokens, 50);
        // Without an attack nothing of training bounds the batch.
        config.train.validation.num_steps = 0;
        assert_eq!(exam.probe(&config, None).unwrap().ids.len(), 6);
    }
}
