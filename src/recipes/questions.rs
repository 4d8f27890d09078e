//! The questions that a training learns from and those that it is examined on: whatever is wrong with either is told in one
//! list, and none of these is one of those.

use super::config::RunConfig;
use super::inputs;
use super::items::{self, Decoded};
use super::progress::Progress;
use super::run::Stop;
use super::scratch;
use super::validation::own_config;
use crate::data::{Dataset, ImageCheck, Sample, problem};
use crate::error::{Error, Result};
use crate::model::hub;
use crate::pixels::RgbImage8;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

/// The questions of a training.
#[derive(Debug)]
pub struct Questions {
    /// Those that it learns from.
    pub trained: Dataset,
    /// Those of `[train.validation]`; none without validation.
    pub examined: Option<Dataset>,
    /// Image files of both that cannot be read: their questions are left out.
    pub damaged: BTreeSet<PathBuf>,
}

impl Questions {
    /// Those that `config` names, none of which stops a run on its way: whatever is wrong with records and images of both is
    /// refused in one list, or left out where `config` allows it. Each image is decoded once to see.
    ///
    /// # Errors
    /// The list; when nothing is left, or what is examined is trained on; when no model can be where one is named; when asked
    /// to stop.
    pub fn sound(config: &RunConfig, stop: &Stop, progress: &dyn Progress) -> Result<Self> {
        let Self { mut trained, mut examined, .. } = Self::survey(config)?;
        let others = |examined: &Option<Dataset>| {
            examined.iter().flat_map(|set| &set.skipped).cloned().collect::<Vec<_>>()
        };
        // A slip elsewhere is told before images are looked at, but for what is wrong with the records themselves.
        if trained.skipped.is_empty() && others(&examined).is_empty() {
            let named = config.model.as_deref().filter(|model| *model != scratch::TINY);
            named.map_or(Ok(()), hub::check_place)?;
        }
        let mut shown = Vec::new();
        if !config.train.captions {
            shown.push(&mut trained);
        }
        shown.extend(&mut examined);
        let Decoded { seen, damaged } =
            items::leave_out_damaged(&mut shown, RgbImage8::sha256, stop, progress)?;
        let own = problem::distinct(&trained.skipped);
        let all = problem::distinct(trained.skipped.iter().chain(&others(&examined)));
        let is_empty = |set: &Dataset| set.samples.is_empty();
        if !config.data.dataset().skip_invalid
            || is_empty(&trained)
            || examined.as_ref().is_some_and(is_empty)
        {
            problem::refuse(&all)?;
        }
        items::require_some(&trained, "train on")?;
        if let Some(examined) = &examined {
            items::require_some(examined, "validate on")?;
        }
        inputs::note_left_out(&own, progress);
        // Those of a file that both sets are in are told already.
        let more = all.len() - own.len();
        if more > 0 {
            let more = problem::counted(more);
            progress.note(&format!("{more} in the validation data: the records are left out"));
        }
        if let Some(examined) = &examined {
            let is_same_source = config.train.validation.data.is_none();
            Pictures(&seen).keep_apart(examined, &trained, is_same_source, progress)?;
        }
        Ok(Self { trained, examined, damaged })
    }

    /// The same once more without looking: the image files that cannot be read are known.
    ///
    /// # Errors
    /// When a source cannot be read.
    pub fn again(config: &RunConfig, damaged: &BTreeSet<PathBuf>) -> Result<Self> {
        let mut questions = Self::survey(config)?;
        if !config.train.captions {
            items::leave_out(&mut questions.trained, |image| damaged.contains(image));
        }
        if let Some(examined) = &mut questions.examined {
            items::leave_out(examined, |image| damaged.contains(image));
        }
        Ok(Self { damaged: damaged.clone(), ..questions })
    }

    /// What the sources hold, without a look into images.
    fn survey(config: &RunConfig) -> Result<Self> {
        let trained = config.data.dataset().survey(ImageCheck::Exist)?;
        let settings = &config.train.validation;
        let mut examined = None;
        if settings.every > 0 {
            let mut questions = own_config(config).data.dataset().survey(ImageCheck::Exist)?;
            if settings.limit > 0 {
                questions.samples = spread(&questions.samples, settings.limit);
            }
            examined = Some(questions);
        }
        Ok(Self { trained, examined, damaged: BTreeSet::new() })
    }
}

/// `limit` of the questions at even distances in the order of their ids, so that no source or type is left out.
fn spread(samples: &[Sample], limit: usize) -> Vec<Sample> {
    let sorted = inputs::in_item_order(samples);
    let count = sorted.len().min(limit);
    (0..count).map(|i| sorted[i * sorted.len() / count].clone()).collect()
}

/// What the image files show, by hashes of their pixels: two files may hold one picture.
struct Pictures<'a>(&'a BTreeMap<PathBuf, String>);

/// A picture: its hash, or where it lies if nobody looked.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Picture<'a> {
    Shows(&'a str),
    At(PathBuf),
}

impl<'a> Pictures<'a> {
    fn of(&self, set: &Dataset, sample: &Sample) -> Picture<'a> {
        let path = set.image_path(sample);
        self.0.get(&path).map_or(Picture::At(path), |hash| Picture::Shows(hash))
    }

    /// Refuses questions of `examined` that are in `trained`, and says which are close to it.
    ///
    /// Of one source ids name the questions, and copies under other ids are the source's own: they are told. Ids of two sources
    /// say nothing, and may be made up: there a copy is the same question.
    fn keep_apart(
        &self,
        examined: &Dataset,
        trained: &Dataset,
        is_same_source: bool,
        progress: &dyn Progress,
    ) -> Result<()> {
        let num_asked = examined.samples.len();
        let copies = self.copies(examined, trained);
        let of_ids = same_ids(examined, trained);
        let refused = if is_same_source { &of_ids } else { &copies };
        if let Some((first, other)) = refused.first() {
            let name = in_training(first, other);
            let help = if is_same_source {
                "keep them apart with `--split` for training and `train.validation.split`; `safemed data split` makes both"
            } else {
                "leave them out of training with `--split`, or of validation with `train.validation.split`"
            };
            return Err(Error::data(format!(
                "{} of {num_asked} validation questions are trained on, among them `{first}`{name}\n   = help: {help}",
                refused.len()
            )));
        }
        if let Some((first, other)) = copies.first() {
            progress.note(&format!(
                "{} of {num_asked} validation questions are trained on under other ids (the same words about the same pixels), among them `{first}`{}: what they say of the model is too good",
                copies.len(),
                in_training(first, other)
            ));
        }
        let shown: HashSet<Picture<'_>> =
            trained.samples.iter().map(|sample| self.of(trained, sample)).collect();
        let is_shown = |sample: &&Sample| shown.contains(&self.of(examined, sample));
        let shared = examined.samples.iter().filter(is_shown).count() - copies.len();
        if shared > 0 {
            progress.note(&format!(
                "{shared} of {num_asked} validation questions are about images that are trained on with other questions"
            ));
        }
        Ok(())
    }

    /// The questions of `examined` that are in `trained` too, in the same words about the same picture, by the ids that they
    /// have here and there.
    fn copies<'b>(&self, examined: &'b Dataset, trained: &'b Dataset) -> Vec<(&'b str, &'b str)> {
        let mut known = HashMap::new();
        for sample in &trained.samples {
            known.entry((wording(sample), self.of(trained, sample))).or_insert(sample.id.as_str());
        }
        let found = examined.samples.iter().filter_map(|sample| {
            Some((sample.id.as_str(), *known.get(&(wording(sample), self.of(examined, sample)))?))
        });
        found.collect()
    }
}

/// What a question is called in training, where it has another name.
fn in_training(own: &str, other: &str) -> String {
    if own == other { String::new() } else { format!(" (in training `{other}`)") }
}

/// The ids that both sets have, each twice as [`Pictures::copies`] tells them. Of one source they name the same questions.
fn same_ids<'a>(examined: &'a Dataset, trained: &'a Dataset) -> Vec<(&'a str, &'a str)> {
    let known: HashSet<&str> = trained.samples.iter().map(|sample| sample.id.as_str()).collect();
    let ids = examined.samples.iter().map(|sample| sample.id.as_str());
    ids.filter(|id| known.contains(id)).map(|id| (id, id)).collect()
}

/// What a question says: its text, its options in an order that does not depend on theirs, the text of the right one.
type Wording<'a> = (&'a str, Vec<&'a str>, &'a str);

fn wording(sample: &Sample) -> Wording<'_> {
    let mut options: Vec<&str> = sample.options.iter().map(|text| text.trim()).collect();
    options.sort_unstable();
    (sample.question.trim(), options, sample.answer_text().trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pixels::decode::encode_png;
    use crate::recipes::progress::{Kept, Silent};
    use serde_json::json;
    use std::fs;
    use std::path::Path;
    use std::result::Result;

    fn sample(id: usize) -> Sample {
        Sample { id: format!("q{id:02}"), ..Sample::for_test(id) }
    }

    /// What is said of the two sets when their images are decoded.
    fn kept_apart(
        examined: &Dataset,
        trained: &Dataset,
        is_same_source: bool,
    ) -> Result<Vec<String>, String> {
        let (mut one, mut other) = (examined.clone(), trained.clone());
        let decoded = items::leave_out_damaged(
            &mut [&mut one, &mut other],
            RgbImage8::sha256,
            &Stop::default(),
            &Silent,
        );
        let kept = Kept::default();
        Pictures(&decoded.unwrap().seen)
            .keep_apart(examined, trained, is_same_source, &kept)
            .map_err(|error| error.to_string())?;
        Ok(kept.notes.into_inner().unwrap())
    }

    #[test]
    fn a_limit_takes_questions_at_even_distances() {
        let samples: Vec<Sample> = (0..10).rev().map(sample).collect();
        let ids = |limit| -> Vec<String> { spread(&samples, limit).into_iter().map(|s| s.id).collect() };
        assert_eq!(ids(4), ["q00", "q02", "q05", "q07"]);
        assert_eq!(ids(1), ["q00"]);
        assert_eq!(ids(10), ids(99));
        assert_eq!(ids(10).len(), 10);
    }

    #[test]
    fn questions_that_are_trained_on_are_refused_by_name() {
        let trained = Dataset::new("r", (0..5).map(sample).collect());
        let apart = Dataset::new("r", (5..9).map(sample).collect());
        assert_eq!(kept_apart(&apart, &trained, true), Ok(Vec::new()));
        let other = Dataset::new("r", vec![Sample { question: "another?".into(), ..sample(3) }]);
        let text = kept_apart(&other, &trained, true).unwrap_err();
        assert!(text.starts_with("1 of 1 validation questions are trained on"), "{text}");
        assert!(text.contains("among them `q03`\n   = help: keep them apart"), "{text}");
    }

    /// Pictures of 8 pixels a side in two folders.
    fn folders() -> (tempfile::TempDir, [PathBuf; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let png =
            |side: usize, value: u8| encode_png(&RgbImage8::filled(side, side, [value; 3]).unwrap()).unwrap();
        let [here, there] = ["here", "there"].map(|name| dir.path().join(name));
        for (folder, name, bytes) in [
            (&there, "0.png", png(8, 1)),
            (&there, "1.png", png(8, 2)),
            (&there, "3.png", Vec::new()),
            (&there, "copy.png", png(8, 1)),
            (&here, "0.png", png(8, 3)),
            (&here, "copy.png", png(8, 1)),
            (&here, "larger.png", png(80, 1)),
            // Bytes behind the picture are none of it.
            (&here, "again.png", [png(8, 1), vec![0; 9]].concat()),
            (&here, "empty.png", Vec::new()),
        ] {
            fs::create_dir_all(folder).unwrap();
            fs::write(folder.join(name), bytes).unwrap();
        }
        (dir, [here, there])
    }

    #[test]
    fn questions_of_another_source_are_compared_by_what_they_say_and_show() {
        let (_dir, [here, there]) = folders();
        let trained = Dataset::new(&there, (0..4).map(sample).collect());
        let said = |root: &PathBuf, own: Sample| {
            let dataset = Dataset::new(root, vec![sample(7), own]);
            kept_apart(&dataset, &trained, false)
        };
        let copy = Sample { id: "own".into(), image: "copy.png".into(), ..sample(0) };
        // Made-up ids are the same by chance.
        assert_eq!(said(&here, sample(0)), Ok(Vec::new()));
        assert_eq!(said(&here, Sample { image: "larger.png".into(), ..sample(0) }), Ok(Vec::new()));
        // Files of no picture are alike, and say nothing.
        assert_eq!(said(&here, Sample { image: "empty.png".into(), ..sample(3) }), Ok(Vec::new()));
        // The image is known, the question is not.
        let told = Ok(vec![
            "1 of 2 validation questions are about images that are trained on with other questions"
                .to_owned(),
        ]);
        assert_eq!(said(&here, Sample { question: "which?".into(), ..copy.clone() }), told);
        assert_eq!(said(&here, Sample { options: vec!["x".into(), "z".into()], ..copy.clone() }), told);
        assert_eq!(said(&here, Sample { answer: 1, ..copy.clone() }), told);
        let moved = Sample { options: vec![" y".into(), "x".into()], answer: 1, ..copy.clone() };
        let again = Sample { image: "again.png".into(), ..copy.clone() };
        for own in [copy, moved, again] {
            let text = said(&here, own).unwrap_err();
            assert!(
                text.starts_with("1 of 2 validation questions are trained on, among them `own`"),
                "{text}"
            );
            assert!(text.contains(" (in training `q00`)\n   = help: leave them out"), "{text}");
        }
        // No file is there: it can only be the same one.
        assert_eq!(said(&here, sample(2)), Ok(Vec::new()));
        assert!(said(&there, sample(2)).unwrap_err().contains("among them `q02`\n"));
    }

    #[test]
    fn copies_within_a_source_are_told_with_both_ids() {
        let (_dir, [_, there]) = folders();
        let trained = Dataset::new(&there, (0..2).map(sample).collect());
        let copy = Sample { id: "own".into(), image: "copy.png".into(), ..sample(0) };
        let other = Sample { id: "two".into(), question: "which?".into(), ..copy.clone() };
        let notes = kept_apart(&Dataset::new(&there, vec![copy, other]), &trained, true).unwrap();
        let [first, second] = notes.as_slice() else { panic!("{notes:?}") };
        assert!(first.starts_with("1 of 2 validation questions are trained on under other ids"), "{first}");
        assert!(first.contains("among them `own` (in training `q00`)"), "{first}");
        assert!(second.starts_with("1 of 2 validation questions are about images"), "{second}");
    }

    /// A folder with an image that is sound and two that cannot be read.
    fn images() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let png = encode_png(&RgbImage8::filled(8, 8, [9; 3]).unwrap()).unwrap();
        fs::write(dir.path().join("sound.png"), &png).unwrap();
        fs::write(dir.path().join("torn.png"), &png[..png.len() / 2]).unwrap();
        fs::write(dir.path().join("ruined.png"), "no image").unwrap();
        dir
    }

    /// Writes a question in each line, with its id, image and right option, which may be none of them.
    fn write(file: &Path, question: &str, records: &[[&str; 3]]) {
        let lines = records.iter().map(|[id, image, answer]| {
            let record = json!({
                "question_id": id, "question": question, "question_type": "Disease Diagnosis",
                "modality_type": "CT", "image_path": image, "gt_answer": answer, "option_A": "cyst",
                "option_B": "None",
            });
            record.to_string()
        });
        fs::write(file, lines.collect::<Vec<_>>().join("\n")).unwrap();
    }

    /// The ids of both sets and what was noted about them, or why they are refused.
    fn looked_at(config: &RunConfig) -> Result<([Vec<String>; 2], Vec<String>), String> {
        let kept = Kept::default();
        let found = Questions::sound(config, &Stop::default(), &kept).map_err(|error| error.to_string())?;
        // Whoever knows what is damaged finds the same questions.
        let again = Questions::again(config, &found.damaged).unwrap();
        assert_eq!((&again.trained.samples, &again.damaged), (&found.trained.samples, &found.damaged));
        let ids_of = |set: Option<Dataset>| -> Vec<String> {
            let samples = set.map(|set| set.samples).unwrap_or_default();
            samples.into_iter().map(|sample| sample.id).collect()
        };
        let ids = [Some(found.trained), found.examined].map(ids_of);
        assert_eq!(ids_of(again.examined), ids[1]);
        Ok((ids, kept.notes.into_inner().unwrap()))
    }

    #[test]
    fn what_is_wrong_with_the_data_of_training_and_of_validation_is_one_list() {
        let dir = images();
        let [own, other] = ["t.jsonl", "v.jsonl"].map(|name| dir.path().join(name));
        let records = [["a", "sound.png", "cyst"], ["b", "torn.png", "cyst"], ["c", "sound.png", "mass"]];
        write(&own, "What?", &records);
        let records = [
            ["d", "sound.png", "cyst"],
            ["e", "torn.png", "cyst"],
            ["f", "gone.png", "cyst"],
            ["g", "ruined.png", "None"],
            ["h", "sound.png", "mass"],
        ];
        write(&other, "Where?", &records);
        let mut config = RunConfig::default();
        config.data.data = Some(own);
        config.train.validation.every = 1;
        config.train.validation.data = Some(other);
        let text = looked_at(&config).unwrap_err();
        assert!(text.starts_with("5 problems in the data"), "{text}");
        for words in [
            "t.jsonl:3: record 3 (`c`): `gt_answer` is none of the options",
            "t.jsonl:2: record 2 (`b`): the image cannot be decoded",
            "torn.png, the image of 2 questions)",
            "v.jsonl:5: record 5 (`h`): `gt_answer` is none of the options",
            "v.jsonl:3: record 3 (`f`): image file is missing",
            "v.jsonl:4: record 4 (`g`): ",
        ] {
            assert!(text.contains(words), "{words}\n---\n{text}");
        }
        config.data.skip_invalid = true;
        let ([trained, asked], notes) = looked_at(&config).unwrap();
        assert_eq!((trained, asked), (vec!["a".to_owned()], vec!["d".to_owned()]));
        assert_eq!(
            notes,
            [
                "2 problems: the records are left out",
                "3 problems in the validation data: the records are left out",
                "1 of 1 validation questions are about images that are trained on with other questions"
            ]
        );
    }

    #[test]
    fn what_is_wrong_with_a_file_of_both_is_told_once() {
        let dir = images();
        let file = dir.path().join("q.jsonl");
        let records = [
            ["a", "sound.png", "cyst"],
            ["b", "torn.png", "cyst"],
            ["c", "sound.png", "cyst"],
            ["d", "torn.png", "cyst"],
            ["e", "sound.png", "mass"],
        ];
        write(&file, "What?", &records);
        let split = |name: &str, ids: [&str; 2]| {
            let file = dir.path().join(name);
            fs::write(&file, json!(ids).to_string()).unwrap();
            Some(file)
        };
        let mut config = RunConfig::default();
        config.data.data = Some(file);
        config.data.split = split("t.json", ["a", "b"]);
        config.train.validation.every = 1;
        config.train.validation.split = split("v.json", ["c", "d"]);
        let text = looked_at(&config).unwrap_err();
        assert!(text.starts_with("2 problems in the data"), "{text}");
        assert!(text.contains("record 5 (`e`)") && text.contains("record 2 (`b`)"), "{text}");
        let lenient = |config: &RunConfig| {
            let mut config = config.clone();
            config.data.skip_invalid = true;
            looked_at(&config).unwrap()
        };
        let ([trained, asked], notes) = lenient(&config);
        assert_eq!((trained, asked), (vec!["a".to_owned()], vec!["c".to_owned()]));
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert_eq!(notes[0], "2 problems: the records are left out");
        // Captions stand in for images, which nobody looks at.
        config.train.validation.every = 0;
        config.train.captions = true;
        let ([trained, asked], notes) = lenient(&config);
        assert_eq!((trained.len(), asked.len()), (2, 0));
        assert_eq!(notes, ["1 problem: the records are left out"]);
    }
}
