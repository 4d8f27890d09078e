//! `Run`: the run directory. Opens, refuses or continues it, and keeps it whole under a kill at any moment.
//!
//! Files and names are those of the contract; `records.jsonl` is the interface between running and reporting. What the
//! files contain is the recipes' business; only `timings.jsonl` (and `seconds` in the summary) holds times.

mod files;
pub mod provenance;
mod stop;
mod tensorboard;

pub use files::{JsonLines, write_atomic};
pub use stop::Stop;

use super::config::{Command, RunConfig};
use crate::backend::isa;
use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tensorboard::{EventFile, Shown};

const LOCK: &str = ".lock";

/// An open run directory. One process at a time holds it.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    command: Command,
    stop: Stop,
    started: Instant,
    resumed: bool,
    done: HashSet<String>,
    provenance: Map<String, Value>,
    records: JsonLines,
    metrics: JsonLines,
    completions: JsonLines,
    validation: JsonLines,
    warnings: JsonLines,
    timings: JsonLines,
    events: EventFile,
    /// Of validation: TensorBoard shows them as a run of its own, in the same charts.
    validation_events: EventFile,
    updates_per_step: u64,
    /// Steps between those whose completions TensorBoard shows; 0: none.
    text_every: u64,
    /// Completions of the present step, where TensorBoard shows them.
    shown: Vec<Value>,
    /// Held, never read: the system gives the lock back when the process ends, however it ends.
    _lock: File,
}

/// How a run directory is opened.
#[derive(Debug, Clone, Default)]
pub struct Opening {
    /// Whether an unfinished run of the same configuration may be continued.
    pub resume: bool,
    /// The command line, for provenance.
    pub command_line: Vec<String>,
    /// Raised when the run should save and end.
    pub stop: Stop,
}

impl Run {
    /// Opens `config.out` (absent: a new directory `runs/COMMAND-TIME`), writes `config.toml` and `run.json`.
    ///
    /// # Errors
    /// A usage error when the directory is in use, is no directory, is not empty without `resume`, or holds a run of
    /// another configuration with it.
    pub fn open(command: Command, config: &RunConfig, opening: Opening) -> Result<Self> {
        let dir = directory(command, config, opening.resume)?;
        if dir.exists() && !dir.is_dir() {
            return Err(usage_at("the run directory is a file", &dir, "name another with `--out`"));
        }
        fs::create_dir_all(&dir)
            .map_err(|error| Error::io("cannot create the run directory", &dir, error))?;
        // Refused before the lock file appears, so that a foreign directory is left as it was.
        let is_empty = is_empty(&dir)?;
        if !is_empty {
            refuse_foreign(&dir, command, config, opening.resume)?;
        }
        let lock = lock(&dir)?;
        let mut run = Self {
            command,
            stop: opening.stop,
            started: Instant::now(),
            resumed: !is_empty,
            done: HashSet::new(),
            provenance: Map::new(),
            records: JsonLines::new(dir.join("records.jsonl")),
            metrics: JsonLines::new(dir.join("metrics.jsonl")),
            completions: JsonLines::new(dir.join("completions.jsonl")),
            validation: JsonLines::new(dir.join("validation.jsonl")),
            warnings: JsonLines::new(dir.join("warnings.jsonl")),
            timings: JsonLines::new(dir.join("timings.jsonl")),
            events: EventFile::new(&dir.join("tensorboard")),
            validation_events: EventFile::new(&dir.join("tensorboard/validation")),
            updates_per_step: if config.train.recipe.is_grpo() {
                config.train.grpo.num_updates as u64
            } else {
                1
            },
            text_every: config.train.log_text_every as u64,
            shown: Vec::new(),
            dir,
            _lock: lock,
        };
        if is_empty {
            write_atomic(&run.dir.join("config.toml"), config.to_toml(command)?.as_bytes())?;
        }
        run.start_provenance(config, &opening.command_line)?;
        run.recover_records()?;
        run.timings.recover()?;
        Ok(run)
    }

    /// Refuses what [`Run::open`] would refuse, without touching the directory: for the time before weights are read.
    ///
    /// # Errors
    /// Those of [`Run::open`], but for a directory in use.
    pub fn check(command: Command, config: &RunConfig, resume: bool) -> Result<()> {
        let dir = directory(command, config, resume)?;
        if dir.exists() && !dir.is_dir() {
            return Err(usage_at("the run directory is a file", &dir, "name another with `--out`"));
        }
        if dir.exists() && !is_empty(&dir)? {
            refuse_foreign(&dir, command, config, resume)?;
        }
        Ok(())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path inside the directory.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.dir.join(relative)
    }

    /// Whether an earlier process began this run.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Whether someone asked to stop.
    pub fn stop_requested(&self) -> bool {
        self.stop.requested()
    }

    /// What is raised when someone asks to stop.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// [`Error::Stopped`] when someone asked to stop. Call it between items or steps, when everything is saved.
    pub fn check_stop(&self) -> Result<()> {
        self.stop.check()
    }

    /// Seconds since this process opened the run.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Notes a fact that the numbers depend on, such as the hash of the data, in `run.json`.
    ///
    /// # Errors
    /// A usage error when the run was begun with another value: the records would mix two experiments.
    pub fn provenance(&mut self, key: &str, value: Value) -> Result<()> {
        match self.provenance.get(key) {
            Some(old) if *old == value => Ok(()),
            Some(old) => Err(usage_at(
                &format!("`{key}` is {value}, but this run began with {old}"),
                &self.dir.join("run.json"),
                "begin a new run with another `--out`",
            )),
            None => {
                self.provenance.insert(key.to_owned(), value);
                self.write_provenance()
            }
        }
    }

    /// Ids of the items whose records are already there.
    pub fn done_ids(&self) -> &HashSet<String> {
        &self.done
    }

    /// Appends the record of one item, with a field `id` that is not done yet.
    pub fn record(&mut self, record: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(record).map_err(anyhow::Error::from)?;
        let id = id_of(&value, self.records.path())?.to_owned();
        if self.done.contains(&id) {
            return Err(Error::Other(anyhow::anyhow!("item `{id}` was recorded twice")));
        }
        self.records.append(&value)?;
        self.done.insert(id);
        Ok(())
    }

    /// All records so far, in the order written.
    pub fn records(&self) -> Result<Vec<Value>> {
        self.records.read()
    }

    /// Puts the records into the order of the items and returns them: the file no longer depends on the order of work.
    ///
    /// # Errors
    /// A data error when an item has no record, or a record no item.
    pub fn finish_records(&mut self, order: &[String]) -> Result<Vec<Value>> {
        let path = self.records.path().to_path_buf();
        let mut by_id: HashMap<String, Value> = HashMap::new();
        for value in self.records.read()? {
            by_id.insert(id_of(&value, &path)?.to_owned(), value);
        }
        let mut sorted = Vec::with_capacity(order.len());
        for id in order {
            sorted.push(by_id.remove(id).ok_or_else(|| {
                Error::data(format!("item `{id}` has no record\n  --> {}", path.display()))
            })?);
        }
        if let Some(id) = by_id.keys().min() {
            let count = by_id.len();
            return Err(Error::data(format!(
                "{count} records belong to no item of this data, among them `{id}`\n  --> {}",
                path.display()
            )));
        }
        self.records.replace(&sorted)?;
        Ok(sorted)
    }

    /// Writes `summary.json`.
    pub fn summary(&self, summary: &impl Serialize) -> Result<()> {
        self.write_json("summary.json", summary)
    }

    /// Writes a file of the directory as a whole; folders on the way are made.
    pub fn write(&self, relative: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
        write_atomic(&self.path(relative), bytes)
    }

    /// Writes a JSON file, indented.
    pub fn write_json(&self, relative: impl AsRef<Path>, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
        text.push('\n');
        self.write(relative, text.as_bytes())
    }

    /// Notes how long `what` took, in `timings.jsonl`.
    pub fn timing(&mut self, what: &str, seconds: f64, figures: &[(&str, f64)]) -> Result<()> {
        let mut line = Map::new();
        line.insert("what".to_owned(), json!(what));
        line.insert("seconds".to_owned(), json!(seconds));
        line.extend(figures.iter().map(|(name, value)| ((*name).to_owned(), json!(value))));
        self.timings.append(&Value::Object(line))
    }

    /// Appends a training step of one update, with a field `step`, to `metrics.jsonl` and the TensorBoard events. Its
    /// completions and pictures are written before.
    pub fn metrics(&mut self, metrics: &impl Serialize) -> Result<()> {
        self.updates(std::slice::from_ref(metrics))
    }

    /// The same for a step of several updates: a line for each, all of one `step`.
    pub fn updates(&mut self, metrics: &[impl Serialize]) -> Result<()> {
        let lines: Vec<Value> = metrics
            .iter()
            .map(|line| serde_json::to_value(line).map_err(anyhow::Error::from))
            .collect::<std::result::Result<_, _>>()?;
        self.metrics.append_all(&lines)?;
        let step = lines.last().and_then(|line| line["step"].as_u64()).unwrap_or(0);
        let completions = std::mem::take(&mut self.shown);
        let pictures = self.path(pictures_of(step));
        self.events.write([Shown { metrics: &lines, completions: &completions, pictures, at: None }])
    }

    /// All metrics so far.
    pub fn read_metrics(&self) -> Result<Vec<Value>> {
        self.metrics.read()
    }

    /// Appends one sampled completion, with a field `step`.
    pub fn completion(&mut self, completion: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(completion).map_err(anyhow::Error::from)?;
        self.completions.append(&value)?;
        if shows_text(&value, self.text_every) {
            self.shown.push(value);
        }
        Ok(())
    }

    /// Appends one examination of the model in training, with a field `step`, to `validation.jsonl` and the events.
    pub fn validation(&mut self, line: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(line).map_err(anyhow::Error::from)?;
        self.validation.append(&value)?;
        self.validation_events.write([self.examined(&value)])
    }

    /// How TensorBoard shows an examination: at the update that it came after.
    fn examined<'a>(&self, line: &'a Value) -> Shown<'a> {
        let at = line["step"].as_u64().map(|step| step * self.updates_per_step);
        Shown { metrics: std::slice::from_ref(line), at, ..Shown::default() }
    }

    /// All examinations so far.
    pub fn read_validation(&self) -> Result<Vec<Value>> {
        self.validation.read()
    }

    /// Writes the pictures of a training step, PNG files by name, and what they are about.
    pub fn pictures(&self, step: u64, files: &[(&str, Vec<u8>)], about: &impl Serialize) -> Result<()> {
        let folder = pictures_of(step);
        for (name, png) in files {
            self.write(format!("{folder}/{name}.png"), png)?;
        }
        self.write_json(format!("{folder}/about.json"), about)
    }

    /// Removes the pictures of the steps after `step`.
    fn remove_pictures_after(&self, step: u64) -> Result<()> {
        let Ok(entries) = fs::read_dir(self.path("images")) else { return Ok(()) };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let of_step = name.strip_prefix("step-").and_then(|number| number.parse::<u64>().ok());
            if of_step.is_some_and(|of_step| of_step > step) {
                fs::remove_dir_all(&path).map_err(|error| Error::io("cannot remove", &path, error))?;
            }
        }
        Ok(())
    }

    /// Appends one warning about the course of training, with a field `step`.
    pub fn warning(&mut self, warning: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(warning).map_err(anyhow::Error::from)?;
        self.warnings.append(&value)
    }

    /// All warnings so far.
    pub fn read_warnings(&self) -> Result<Vec<Value>> {
        self.warnings.read()
    }

    /// Brings the logs of training to the disk: call it before a checkpoint appears, which is worth nothing without the log of
    /// the steps before it.
    pub fn sync_logs(&self) -> Result<()> {
        [&self.metrics, &self.completions, &self.validation, &self.warnings]
            .into_iter()
            .try_for_each(JsonLines::sync)
    }

    /// Takes metrics, events, examinations, warnings, completions and pictures back to the end of `step` (the last checkpoint's; 0: to the beginning),
    /// so that a resumed run writes what an uninterrupted one would have.
    pub fn rewind_to(&mut self, step: u64) -> Result<()> {
        let within = |value: &Value| value["step"].as_u64().is_some_and(|at| at <= step);
        self.metrics.keep_while(within)?;
        self.completions.keep_while(within)?;
        self.validation.keep_while(within)?;
        self.validation_events.restart()?;
        let lines = self.validation.read()?;
        let shown: Vec<Shown<'_>> = lines.iter().map(|line| self.examined(line)).collect();
        self.validation_events.write(shown)?;
        self.warnings.keep_while(within)?;
        let metrics = self.metrics.read()?;
        // Lines of one step stand together, one for each of its updates.
        let by_step = || metrics.chunk_by(|a, b| a["step"] == b["step"]);
        let steps = (1..=step).zip(by_step()).filter(|(step, lines)| lines[0]["step"] == *step).count();
        if steps as u64 != step || by_step().count() as u64 != step {
            return Err(Error::data(format!(
                "the checkpoint is of step {step}, but only {steps} of the steps before it are logged\n  --> {}\n   = help: begin with another `--out`",
                self.metrics.path().display()
            )));
        }
        self.remove_pictures_after(step)?;
        self.shown.clear();
        self.events.restart()?;
        let completions = self.completions.read()?;
        let mut rest = completions.as_slice();
        let steps = (1..=step).zip(by_step()).map(|(step, lines)| {
            let (own, others) = rest.split_at(rest.iter().take_while(|line| line["step"] == step).count());
            rest = others;
            let is_shown = own.first().is_some_and(|line| shows_text(line, self.text_every));
            let pictures = self.dir.join(pictures_of(step));
            Shown { metrics: lines, completions: if is_shown { own } else { &[] }, pictures, at: None }
        });
        self.events.write(steps)
    }

    fn start_provenance(&mut self, config: &RunConfig, command_line: &[String]) -> Result<()> {
        let path = self.dir.join("run.json");
        if self.resumed && path.exists() {
            let text = fs::read(&path).map_err(|error| Error::io("cannot read", &path, error))?;
            self.provenance = serde_json::from_slice(&text).map_err(|error| {
                Error::data(format!("the provenance cannot be read: {error}\n  --> {}", path.display()))
            })?;
            let kernels = isa().word();
            if let Some(other) = self.provenance.get("kernels").filter(|began| **began != json!(kernels)) {
                tracing::warn!(
                    "this run began with {other} kernels and goes on with {kernels}: its bytes are those of neither alone"
                );
            }
            let part = json!({
                "version": provenance::VERSION, "git_commit": provenance::GIT_COMMIT, "command_line": command_line,
                "kernels": kernels,
            });
            let parts = self.provenance.entry("continued").or_insert_with(|| json!([]));
            if let Some(parts) = parts.as_array_mut() {
                parts.push(part);
            }
        } else {
            let facts = json!({
                "version": provenance::VERSION,
                "git_commit": provenance::GIT_COMMIT,
                "command": self.command.word(),
                "command_line": command_line,
                "seed": config.seed,
                "device": provenance::device_name(config.backend()),
                "dtype": config.dtype.word(),
                "arithmetic": config.arithmetic.word(),
                "threads": config.threads.unwrap_or_else(all_threads),
                "architecture": std::env::consts::ARCH,
                "instruction_sets": provenance::instruction_sets(),
                "kernels": isa().word(),
                "crates": provenance::crate_versions(),
            });
            if let Value::Object(facts) = facts {
                self.provenance = facts;
            }
        }
        self.write_provenance()
    }

    fn write_provenance(&self) -> Result<()> {
        self.write_json("run.json", &self.provenance)
    }

    fn recover_records(&mut self) -> Result<()> {
        let values = self.records.recover()?;
        for value in values {
            let id = id_of(&value, self.records.path())?.to_owned();
            if !self.done.insert(id.clone()) {
                return Err(Error::data(format!(
                    "item `{id}` has two records\n  --> {}",
                    self.records.path().display()
                )));
            }
        }
        Ok(())
    }
}

/// Threads of this machine that a run uses when not told otherwise.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// The folder of a training step's pictures, within the run directory.
fn pictures_of(step: u64) -> String {
    format!("images/step-{step}")
}

/// Whether TensorBoard shows a completion, as one of a step that is a multiple of `every`.
fn shows_text(completion: &Value, every: u64) -> bool {
    every > 0 && completion["step"].as_u64().is_some_and(|step| step.is_multiple_of(every))
}

fn id_of<'a>(record: &'a Value, path: &Path) -> Result<&'a str> {
    record["id"]
        .as_str()
        .ok_or_else(|| Error::data(format!("a record has no text field `id`\n  --> {}", path.display())))
}

fn usage_at(message: &str, path: &Path, help: &str) -> Error {
    Error::usage(format!("{message}\n  --> {}\n   = help: {help}", path.display()))
}

fn directory(command: Command, config: &RunConfig, resume: bool) -> Result<PathBuf> {
    match &config.out {
        Some(dir) => Ok(dir.clone()),
        None if resume => Err(Error::usage(
            "`--resume` needs to know which run to continue\n   = help: name its directory with `--out`",
        )),
        None => {
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
            let stamp = format!("runs/{command}-{}", timestamp(seconds));
            let free = (1..).map(|n| if n == 1 { stamp.clone() } else { format!("{stamp}-{n}") });
            Ok(free.map(PathBuf::from).find(|dir| !dir.exists()).unwrap_or_else(|| PathBuf::from(&stamp)))
        }
    }
}

/// `YYYYMMDD-HHMMSS` in UTC (days to civil date after H. Hinnant's algorithm).
pub(super) fn timestamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

fn is_empty(dir: &Path) -> Result<bool> {
    let entries =
        fs::read_dir(dir).map_err(|error| Error::io("cannot read the run directory", dir, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("cannot read the run directory", dir, error))?;
        // A kill between lock and configuration leaves these two, and nothing worth keeping.
        if entry.file_name() != LOCK && entry.file_name() != "config.toml.tmp" {
            return Ok(false);
        }
    }
    Ok(true)
}

fn refuse_foreign(dir: &Path, command: Command, config: &RunConfig, resume: bool) -> Result<()> {
    if !resume {
        return Err(usage_at(
            "the run directory is not empty",
            dir,
            "add `--resume` to continue the run in it, or name another with `--out`",
        ));
    }
    let path = dir.join("config.toml");
    if !path.exists() {
        return Err(usage_at("the directory holds no run to continue", dir, "name another with `--out`"));
    }
    let earlier_command = fs::read(dir.join("run.json"))
        .ok()
        .and_then(|text| serde_json::from_slice::<Value>(&text).ok())
        .and_then(|facts| facts["command"].as_str().map(str::to_owned));
    if let Some(earlier) = earlier_command.filter(|earlier| earlier != command.word()) {
        return Err(usage_at(
            &format!("the directory holds a run of `{earlier}`, not of `{command}`"),
            dir,
            "name another with `--out`",
        ));
    }
    let earlier = RunConfig::load_any(Some(&path), &[])?;
    let (old, new) = (earlier.identity(command)?, config.identity(command)?);
    if old == new {
        return Ok(());
    }
    Err(usage_at(
        &format!("the directory holds a run of another configuration: {}", differences(&old, &new)),
        &path,
        "set the keys back to continue it, or name another directory with `--out`",
    ))
}

/// The keys in which two resolved configurations differ, with both values.
fn differences(old: &str, new: &str) -> String {
    let flat = |text: &str| {
        let mut keys = std::collections::BTreeMap::new();
        flatten("", &toml::Value::Table(text.parse().unwrap_or_default()), &mut keys);
        keys
    };
    let (old, new) = (flat(old), flat(new));
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let absent = "absent".to_owned();
    let changed: Vec<String> = names
        .into_iter()
        .filter(|name| old.get(*name) != new.get(*name))
        .map(|name| {
            let value =
                |keys: &std::collections::BTreeMap<String, String>| keys.get(name).unwrap_or(&absent).clone();
            format!("`{name}` was {} and is {}", value(&old), value(&new))
        })
        .collect();
    changed.join("; ")
}

fn flatten(prefix: &str, value: &toml::Value, into: &mut std::collections::BTreeMap<String, String>) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table {
                let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(&path, value, into);
            }
        }
        other => {
            into.insert(prefix.to_owned(), other.to_string());
        }
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file =
        File::create(&path).map_err(|error| Error::io("cannot lock the run directory", &path, error))?;
    let mut locked = file.try_lock();
    // A child that this process is just starting holds the lock of a run that has ended until it is another program.
    for _ in 0..20 {
        if !matches!(locked, Err(TryLockError::WouldBlock)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        locked = file.try_lock();
    }
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(usage_at(
            "another process is writing to this run directory",
            dir,
            "wait for it, or name another with `--out`",
        )),
        // Some network file systems know no locks; the run is then as safe as without them.
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(error)) => Err(Error::io("cannot lock the run directory", &path, error)),
    }
}

#[cfg(test)]
mod tests;
