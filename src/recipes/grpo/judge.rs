//! What completions are worth: every reward function that is asked for, one column each.
//!
//! Accuracy and format always have a column; penalties have one where they have a weight, and a reward command as many as
//! it names. Advantages are made of the columns that have a weight.
//!
//! Deviation: TRL lets a column of weight 0 make up for a reward that is missing elsewhere; here it is only watched.

use super::group::Group;
use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Completion;
use crate::recipes::config::{GrpoSettings, RewardAggregation, RunConfig, TargetName};
use crate::recipes::lesson::Lesson;
use crate::reward::command::{Line, RewardCommand};
use crate::reward::overlong::Overlong;
use crate::reward::repetition::Repetition;
use crate::train::advantage::{summary, weighted_sum};
use std::cell::RefCell;
use std::time::Duration;

/// One reward function.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// What logs call it.
    pub name: String,
    /// Its weight in the sum.
    pub weight: f64,
    /// Whether a command gives it, or does not.
    pub is_external: bool,
}

/// The reward functions of a run.
#[derive(Debug)]
pub struct Judge {
    columns: Vec<Column>,
    overlong: Option<Overlong>,
    repetition: Option<Repetition>,
    /// Asked by one step at a time.
    command: Option<RefCell<RewardCommand>>,
}

/// A completion in words.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    /// The question it answers.
    pub sample: &'a Sample,
    /// Its words.
    pub text: &'a str,
    /// Its tokens, with the one that ended it.
    pub num_tokens: usize,
    /// Whether one did.
    pub is_finished: bool,
}

impl Judge {
    /// The judge of a configuration; a reward command is started, and tried on the right completion of `sample`, on the
    /// thread that will train.
    ///
    /// # Errors
    /// Those of [`RewardCommand::start`].
    pub fn open(config: &RunConfig, sample: &Sample) -> Result<Self> {
        let settings = &config.train.grpo;
        let overlong = settings.overlong(config.max_new_tokens);
        let repetition = settings.repetition();
        let own = |name: &str, weight| Column { name: name.to_owned(), weight, is_external: false };
        let mut columns =
            vec![own("accuracy", settings.accuracy_weight), own("format", settings.format_weight)];
        columns.extend(overlong.map(|_| own("overlong", settings.overlong_weight)));
        columns.extend(repetition.map(|_| own("repetition", settings.repetition_weight)));
        let command = match &settings.reward_command {
            Some(command) if config.train.recipe.is_grpo() => Some(started(config, command, sample)?),
            _ => None,
        };
        let names = command.iter().flat_map(RewardCommand::names);
        let weight = settings.reward_command_weight;
        columns.extend(names.map(|name| Column { is_external: true, ..own(name, weight) }));
        Ok(Self { columns, overlong, repetition, command: command.map(RefCell::new) })
    }

    /// The reward functions, in the order of their columns: accuracy, format, then the others.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The names of what a reward command gives; none without one.
    pub fn command_names(&self) -> Option<Vec<String>> {
        self.command.as_ref().map(|command| command.borrow().names().to_vec())
    }

    /// Takes leave of a reward command: it must have said all it had to say.
    ///
    /// # Errors
    /// When it answered more than it was asked.
    pub fn finish(&self) -> Result<()> {
        self.command.as_ref().map_or(Ok(()), |command| command.borrow_mut().finish())
    }

    /// The weights of the columns that advantages are made of.
    pub(super) fn weights(&self) -> Vec<f64> {
        self.columns.iter().map(|column| column.weight).filter(|weight| *weight != 0.0).collect()
    }

    /// The rewards of completion `c` in those columns.
    pub(super) fn row(&self, group: &Group, c: usize) -> Vec<f64> {
        let columns = self.columns.iter().enumerate().filter(|(_, column)| column.weight != 0.0);
        columns.map(|(k, _)| group.column(k)[c]).collect()
    }

    /// What completions are worth on average: of each the weighted sum of its rewards, if it was given one; none when none was.
    /// `steps` of training came before.
    ///
    /// # Errors
    /// Those of a reward command.
    pub fn mean_reward(&self, lesson: &Lesson<'_>, steps: u64, all: &[Said<'_>]) -> Result<Option<f64>> {
        let rewards = self.rewards(lesson, steps, all)?;
        let weights: Vec<f64> = self.columns.iter().map(|column| column.weight).collect();
        // What has no weight makes up for nothing.
        let weighted = |row: &Vec<f64>| -> Vec<f64> {
            row.iter().zip(&weights).map(|(r, weight)| if *weight == 0.0 { f64::NAN } else { *r }).collect()
        };
        let totals: Vec<f64> = rewards.iter().map(|row| weighted_sum(&weighted(row), &weights)).collect();
        let mean = summary(&totals).mean;
        Ok((!mean.is_nan()).then_some(mean))
    }

    /// Reads and rewards the completions of `samples`, a group each. A reward command is asked about all of them at once, and so item by item by an
    /// adversary that lowers the expected reward.
    pub(super) fn groups(
        &self,
        lesson: &Lesson<'_>,
        frozen: &Assistant,
        step: u64,
        samples: &[&Sample],
        completions: Vec<Vec<Completion>>,
    ) -> Result<Vec<Group>> {
        let texts = completions
            .iter()
            .map(|group| group.iter().map(|completion| frozen.text_of(completion)).collect())
            .collect::<Result<Vec<Vec<String>>>>()?;
        let all: Vec<Said<'_>> = samples
            .iter()
            .zip(completions.iter().zip(&texts))
            .flat_map(|(sample, (completions, texts))| {
                completions.iter().zip(texts).map(move |(completion, text)| Said {
                    sample,
                    text,
                    num_tokens: completion.ids.len(),
                    is_finished: completion.is_finished,
                })
            })
            .collect();
        let rewards = self.rewards(lesson, step + 1, &all)?;
        drop(all);
        let mut rows = rewards.into_iter();
        let groups = completions.into_iter().zip(texts).map(|(completions, texts)| {
            let rows: Vec<Vec<f64>> = rows.by_ref().take(completions.len()).collect();
            self.group(&lesson.config.grpo, completions, texts, &rows)
        });
        Ok(groups.collect())
    }

    /// The rewards of each completion, in the order of their columns.
    fn rewards(&self, lesson: &Lesson<'_>, steps: u64, all: &[Said<'_>]) -> Result<Vec<Vec<f64>>> {
        let asked = self.ask(steps, all, &|| lesson.exit.is_wanted())?;
        let rows = all.iter().zip(asked).map(|(said, asked)| {
            let mut row = self.own_rewards(lesson, said);
            row.extend(asked);
            row
        });
        Ok(rows.collect())
    }

    /// The rewards that need no command, in the order of their columns.
    fn own_rewards(&self, lesson: &Lesson<'_>, said: &Said<'_>) -> Vec<f64> {
        let Said { sample, text, num_tokens, is_finished } = *said;
        let rewards = lesson.config.grpo.rewards();
        let score = rewards.score(text, sample.answer, sample.options.as_slice(), lesson.format());
        // A completion that never ended is not well-formed, whatever its text.
        let format = if is_finished { score.format } else { 0.0 };
        let mut row = vec![score.accuracy, format];
        row.extend(self.overlong.map(|overlong| overlong.reward(num_tokens)));
        row.extend(self.repetition.map(|repetition| repetition.reward(text)));
        row
    }

    /// What the command says, one row for each completion; empty rows without one.
    fn ask(&self, steps: u64, all: &[Said<'_>], is_stopped: &dyn Fn() -> bool) -> Result<Vec<Vec<f64>>> {
        let Some(command) = &self.command else { return Ok(vec![Vec::new(); all.len()]) };
        let images: Vec<_> = all.iter().map(|said| said.sample.image.to_string_lossy()).collect();
        let lines: Vec<Line<'_>> = all
            .iter()
            .zip(&images)
            .enumerate()
            .map(|(index, (said, image))| Line {
                index,
                count: all.len(),
                completion: said.text,
                is_finished: said.is_finished,
                num_tokens: said.num_tokens,
                ..line_about(said.sample, image, steps)
            })
            .collect();
        command.borrow_mut().ask(&lines, is_stopped)
    }

    fn group(
        &self,
        settings: &GrpoSettings,
        completions: Vec<Completion>,
        texts: Vec<String>,
        rows: &[Vec<f64>],
    ) -> Group {
        let column = |k: usize| rows.iter().map(|row| row[k]).collect::<Vec<f64>>();
        let mut group = Group {
            accuracy: column(0),
            format: column(1),
            others: (2..self.columns.len()).map(column).collect(),
            total: Vec::new(),
            is_flat: false,
            completions,
            texts,
            seeds: Vec::new(),
        };
        let weights = self.weights();
        let sums = (0..rows.len()).map(|c| weighted_sum(&self.row(&group, c), &weights));
        group.total = sums.collect();
        group.is_flat = match settings.reward_aggregation {
            RewardAggregation::SumThenNormalize => is_flat(&group.total),
            RewardAggregation::NormalizeThenSum => {
                let weighted = self.columns.iter().enumerate().filter(|(_, column)| column.weight != 0.0);
                weighted.map(|(k, _)| group.column(k)).all(is_flat)
            }
        };
        group
    }
}

/// Starts a reward command and tries it on a right answer.
fn started(config: &RunConfig, command: &[String], sample: &Sample) -> Result<RewardCommand> {
    let timeout = Duration::from_secs_f64(config.train.grpo.reward_command_timeout);
    let is_cot = config.train.target == TargetName::Cot;
    let template: PromptTemplate = config.prompt.parse()?;
    let completion = template.target(sample, is_cot);
    let image = sample.image.to_string_lossy();
    let trial = Line { completion: &completion, ..line_about(sample, &image, 0) };
    RewardCommand::start(command, timeout, &trial)
}

/// The line about a question, without a completion.
fn line_about<'a>(sample: &'a Sample, image: &'a str, step: u64) -> Line<'a> {
    Line {
        step,
        index: 0,
        count: 1,
        id: &sample.id,
        dataset: &sample.dataset,
        modality: &sample.modality,
        question_type: &sample.question_type,
        image,
        question: &sample.question,
        options: &sample.options,
        answer: sample.answer_letter(),
        reasoning: sample.reasoning.is_some().then(|| sample.reasoning_text()),
        completion: "",
        is_finished: true,
        num_tokens: 0,
    }
}

/// Whether no reward that was given differs from another.
fn is_flat(rewards: &[f64]) -> bool {
    let mut given = rewards.iter().filter(|reward| !reward.is_nan());
    given.next().is_none_or(|first| given.all(|other| other == first))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(weights: &[f64]) -> Judge {
        let columns = weights.iter().enumerate().map(|(k, weight)| Column {
            name: format!("c{k}"),
            weight: *weight,
            is_external: false,
        });
        Judge { columns: columns.collect(), overlong: None, repetition: None, command: None }
    }

    fn group(judge: &Judge, aggregation: RewardAggregation, rows: &[Vec<f64>]) -> Group {
        let settings = GrpoSettings { reward_aggregation: aggregation, ..GrpoSettings::default() };
        let completions = vec![Completion::default(); rows.len()];
        judge.group(&settings, completions, vec![String::new(); rows.len()], rows)
    }

    #[test]
    fn columns_with_a_weight_are_summed_and_missing_ones_left_out() {
        let nan = f64::NAN;
        let judge = judge(&[1.0, 0.0, 0.5, 2.0]);
        assert_eq!(judge.weights(), [1.0, 0.5, 2.0]);
        let rows = [vec![1.0, 9.0, -0.5, 3.0], vec![0.0, 9.0, nan, 1.0], vec![nan, 9.0, nan, nan]];
        let group = group(&judge, RewardAggregation::SumThenNormalize, &rows);
        assert_eq!(judge.row(&group, 0), [1.0, -0.5, 3.0]);
        assert_eq!(group.total[..2], [6.75, 2.0]);
        assert!(group.total[2].is_nan(), "what is only watched makes up for nothing");
        assert!(!group.is_flat);
    }

    #[test]
    fn a_group_is_flat_when_nothing_tells_its_completions_apart() {
        use RewardAggregation::{NormalizeThenSum, SumThenNormalize};
        let nan = f64::NAN;
        for (weights, rows, flat_sums, flat_columns) in [
            ([1.0, 1.0], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], true, true),
            // Equal in sum, not by themselves.
            ([1.0, 1.0], [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], true, false),
            ([1.0, 1.0], [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], false, false),
            // What has no weight tells nobody apart.
            ([1.0, 0.0], [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]], true, true),
            // One that was given, or none, has nothing beside it.
            ([1.0, 0.0], [[nan, 0.0], [1.0, 0.0], [nan, 0.0]], true, true),
            ([1.0, 0.0], [[nan, 0.0], [nan, 0.0], [nan, 0.0]], true, true),
            ([1.0, 0.0], [[nan, 0.0], [1.0, 0.0], [0.0, 0.0]], false, false),
        ] {
            let rows = rows.map(|row| row.to_vec());
            let judge = judge(&weights);
            assert_eq!(group(&judge, SumThenNormalize, &rows).is_flat, flat_sums, "{rows:?}");
            assert_eq!(group(&judge, NormalizeThenSum, &rows).is_flat, flat_columns, "{rows:?}");
        }
    }
}
