//! Rewards from a program of the user's, over JSON lines.
//!
//! The program is started once. For each completion it reads one [`Line`] from its standard input and must write one
//! line to its standard output, in the same order: `{"reward": NUMBER}`, or `{"rewards": {"NAME": NUMBER, ...}}` for
//! several at once; `null` in place of a number gives none. It may read ahead: the lines of a batch are written while
//! answers are read, and each says how many there are. It should end when its input does.
//!
//! The very first line is a trial (`step` 0): it shows whether the program works, and its answer fixes the names.

use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The name of what `{"reward": NUMBER}` gives.
pub const NAME: &str = "command";

/// Longest answer, in bytes.
const LONGEST: u64 = 1 << 20;

/// Answers that may wait to be read; a program that writes more waits itself.
const WAITING: usize = 256;

/// Lines of standard error that an error repeats, and how long each may be, in characters.
const LAST_WORDS: (usize, usize) = (10, 300);

/// How often a wait for an answer looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// Time in which a surplus line that was written together with an answer is there.
const SURPLUS: Duration = Duration::from_millis(50);

/// Time in which a program that closes its output or is told to end has ended.
const GOODBYE: Duration = Duration::from_secs(2);

/// One completion, as the program is told of it. Texts are as they were shown: options in the order of this step.
#[derive(Debug, Clone, Serialize)]
pub struct Line<'a> {
    /// Step of the training, from 1; of a validation the steps that came before it. 0 for the trial, and for the validation
    /// before the first step.
    pub step: u64,
    /// Place in the batch, from 0.
    pub index: usize,
    /// Lines of the batch: the program may wait for all before it answers.
    pub count: usize,
    /// The question's id.
    pub id: &'a str,
    /// Data set it belongs to.
    pub dataset: &'a str,
    /// Modality under its usual name.
    pub modality: &'a str,
    /// Question type.
    pub question_type: &'a str,
    /// Path of the image below the data's root.
    pub image: &'a str,
    /// The question.
    pub question: &'a str,
    /// Texts of the options in order.
    pub options: &'a [String],
    /// Right letter.
    pub answer: char,
    /// The reasoning that the data gives, letters fitting the order of the options; none where it gives none.
    pub reasoning: Option<String>,
    /// What the model wrote, without the token that ends it.
    pub completion: &'a str,
    /// Whether it ended by itself.
    pub is_finished: bool,
    /// Its tokens, the one that ends it included.
    pub num_tokens: usize,
}

/// The running program. It is told to end, or else killed, when this is dropped.
#[derive(Debug)]
pub struct RewardCommand {
    child: Child,
    /// None once it is told to end.
    pipes: Option<Pipes>,
    last_words: Arc<Mutex<VecDeque<String>>>,
    timeout: Duration,
    names: Vec<String>,
}

#[derive(Debug)]
struct Pipes {
    input: ChildStdin,
    answers: Receiver<std::io::Result<String>>,
}

/// Rewards of one answer by name; none where the program gave none.
type Answer = Vec<(String, Option<f64>)>;

/// The next answer, if it comes within `timeout` and before `is_stopped` says so.
fn within<T>(
    answers: &Receiver<T>,
    timeout: Duration,
    is_stopped: &dyn Fn() -> bool,
) -> std::result::Result<T, RecvTimeoutError> {
    let started = Instant::now();
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        match answers.recv_timeout(left.min(LOOK)) {
            Err(RecvTimeoutError::Timeout) if !left.is_zero() && !is_stopped() => {}
            found => return found,
        }
    }
}

/// What is wrong with what the program did.
#[derive(Debug)]
enum Fault {
    /// It answered something else than it should: what, and what to do.
    Wrong(String, &'static str),
    /// It answered a number that is none.
    NotFinite(String),
    /// It did not answer in time.
    Late,
    /// Its output ended.
    Ended,
}

impl RewardCommand {
    /// Starts `command`, a program and its arguments, and tries it on one line. `timeout` is the longest wait for one
    /// answer.
    ///
    /// On Linux the program is killed when the thread that starts it ends, however it ends: call this on the thread
    /// that will ask.
    ///
    /// # Errors
    /// A usage error when it cannot be started or answers the trial wrongly; a non-finite error when it answers NaN.
    pub fn start(command: &[String], timeout: Duration, trial: &Line<'_>) -> Result<Self> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(Error::usage("the reward command names no program"));
        };
        let mut spawn = Command::new(program);
        spawn.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Python holds answers back when its output is no terminal, unless it is told not to.
        spawn.env("PYTHONUNBUFFERED", "1");
        #[cfg(unix)]
        apart(&mut spawn);
        let mut child = spawn.spawn().map_err(|error| {
            Error::usage(format!(
                "cannot start the reward command: {error}\n  --> {program}\n   = help: name a program that `PATH` finds, or its path, then its arguments one by one"
            ))
        })?;
        let last_words = Arc::new(Mutex::new(VecDeque::new()));
        let (sender, answers) = sync_channel(WAITING);
        let pipes = match (child.stdin.take(), child.stdout.take(), child.stderr.take()) {
            (Some(input), Some(output), Some(errors)) => {
                thread::spawn(move || read_answers(output, &sender));
                let kept = Arc::clone(&last_words);
                thread::spawn(move || keep_last_words(errors, &kept));
                Some(Pipes { input, answers })
            }
            _ => None,
        };
        let mut started = Self { child, pipes, last_words, timeout, names: Vec::new() };
        started.try_out(trial).map_err(|error| match error {
            // Nothing but the setting can be wrong as yet.
            Error::Data(text) => Error::Usage(text),
            other => other,
        })?;
        Ok(started)
    }

    /// The names of its rewards, in the order of its first answer.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Rewards by line, then by name; NaN where it gave none.
    ///
    /// # Errors
    /// A data error when the program ends, is late, or answers anything but what it should; a non-finite error when it
    /// answers NaN; [`Error::Stopped`] when `is_stopped` says so while it is waited for. The program has ended then.
    pub fn ask(&mut self, lines: &[Line<'_>], is_stopped: &dyn Fn() -> bool) -> Result<Vec<Vec<f64>>> {
        let answers = self.answers(lines, is_stopped)?;
        let mut rewards = Vec::with_capacity(lines.len());
        for (answer, line) in answers.into_iter().zip(lines) {
            let mut row = vec![f64::NAN; self.names.len()];
            for (name, reward) in answer {
                let Some(place) = self.names.iter().position(|known| *known == name) else {
                    let what = format!(
                        "gave a reward `{name}`, its first answer gave `{}`",
                        self.names.join("`, `")
                    );
                    let help = "name the same rewards in every answer, with null where there is none";
                    return Err(self.blame(&Fault::Wrong(what, help), line));
                };
                row[place] = reward.unwrap_or(f64::NAN);
            }
            rewards.push(row);
        }
        Ok(rewards)
    }

    fn try_out(&mut self, trial: &Line<'_>) -> Result<()> {
        let answer = self.answers(std::slice::from_ref(trial), &|| false)?.pop().unwrap_or_default();
        thread::sleep(SURPLUS);
        if let Err(fault) = self.is_silent() {
            return Err(self.blame(&fault, trial));
        }
        for (name, _) in &answer {
            if let Some(what) = wrong_name(name) {
                let help = "name each reward with letters, digits, `_`, `-` and `.`";
                return Err(self.blame(&Fault::Wrong(what, help), trial));
            }
        }
        self.names = answer.into_iter().map(|(name, _)| name).collect();
        Ok(())
    }

    /// One answer to each line: lines are written by a thread of their own, so that neither side ever waits for the
    /// other to read.
    fn answers(&mut self, lines: &[Line<'_>], is_stopped: &dyn Fn() -> bool) -> Result<Vec<Answer>> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, line).map_err(anyhow::Error::from)?;
            text.push(b'\n');
        }
        if let (Err(fault), Some(first)) = (self.is_silent(), lines.first()) {
            return Err(self.blame(&fault, first));
        }
        let Some(Pipes { mut input, answers }) = self.pipes.take() else {
            return Err(Error::data("the reward command has ended"));
        };
        let mut read = Vec::with_capacity(lines.len());
        let result = thread::scope(|scope| {
            // What it does not read it cannot answer either: that is the error to tell.
            let writer = scope.spawn(|| input.write_all(&text).and_then(|()| input.flush()).is_ok());
            for line in lines {
                let answer = match within(&answers, self.timeout, is_stopped) {
                    Err(RecvTimeoutError::Timeout) if is_stopped() => {
                        self.kill();
                        return Err(Error::Stopped);
                    }
                    Ok(Ok(text)) => read_answer(&text),
                    Ok(Err(error)) => Err(Fault::Wrong(error.to_string(), "write one short line for each")),
                    Err(RecvTimeoutError::Timeout) => Err(Fault::Late),
                    Err(RecvTimeoutError::Disconnected) => Err(Fault::Ended),
                };
                match answer {
                    Ok(answer) => read.push(answer),
                    // It is killed in here, so that the writer is not left waiting for it to read.
                    Err(fault) => return Err(self.blame(&fault, line)),
                }
            }
            let is_read = writer.join().unwrap_or(false);
            match lines.last() {
                Some(last) if !is_read => {
                    let what = "answered every line but did not read them".to_owned();
                    Err(self.blame(&Fault::Wrong(what, "read a line, then answer it"), last))
                }
                _ => Ok(()),
            }
        });
        result?;
        self.pipes = Some(Pipes { input, answers });
        // Another line is there already where each was answered twice: the answers are not those of their lines.
        if let (Err(fault @ Fault::Wrong(..)), Some(last)) = (self.is_silent(), lines.last()) {
            return Err(self.blame(&fault, last));
        }
        Ok(read)
    }

    /// Looks once more, after a moment, for lines that nobody asked for.
    ///
    /// # Errors
    /// A data error when there is one: rewards may have been those of other completions.
    pub fn finish(&mut self) -> Result<()> {
        thread::sleep(SURPLUS);
        match self.is_silent() {
            Err(Fault::Wrong(what, help)) => {
                self.kill();
                Err(Error::data(format!(
                    "the reward command {what}\n  --> after the last step\n   = help: {help}"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Whether nothing is there to read while nothing was asked.
    fn is_silent(&self) -> std::result::Result<(), Fault> {
        let Some(pipes) = &self.pipes else { return Ok(()) };
        match pipes.answers.try_recv() {
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => Err(Fault::Ended),
            Ok(_) => Err(Fault::Wrong(
                "wrote more lines than it was asked".to_owned(),
                "write exactly one line for each that is read, and all other output to standard error",
            )),
        }
    }

    /// The error that `fault` is at `line`; ends the program.
    fn blame(&mut self, fault: &Fault, line: &Line<'_>) -> Error {
        let (what, help) = match fault {
            Fault::Wrong(what, help) => (what.clone(), *help),
            Fault::NotFinite(what) => (what.clone(), "write null where no reward can be given"),
            Fault::Late => (
                format!("did not answer within {} s", self.timeout.as_secs_f64()),
                "flush each answer as it is written; raise reward_command_timeout if it needs longer",
            ),
            Fault::Ended => {
                let how =
                    self.ended().map_or_else(|| "closed its output".to_owned(), |s| format!("ended ({s})"));
                (
                    format!("{how} while it was still needed"),
                    "it must answer line after line until its input ends; see what it wrote to standard error",
                )
            }
        };
        self.kill();
        let place = match line.step {
            0 => "before the first step".to_owned(),
            step => format!("step {step}"),
        };
        let mut text = format!(
            "the reward command {what}\n  --> {place}, question `{}`, line {} of {}",
            line.id,
            line.index + 1,
            line.count
        );
        for words in &*self.last_words.lock().unwrap_or_else(PoisonError::into_inner) {
            text.push_str("\n   |  ");
            text.push_str(words);
        }
        text.push_str("\n   = help: ");
        text.push_str(help);
        match fault {
            Fault::NotFinite(_) => Error::NonFinite(text),
            _ => Error::Data(text),
        }
    }

    /// How it ended, waiting a moment for it.
    fn ended(&mut self) -> Option<ExitStatus> {
        let until = Instant::now() + GOODBYE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }

    /// Kills it with whatever it has started, unless it has ended.
    fn kill(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            #[cfg(unix)]
            let _ = rustix::process::kill_process_group(
                rustix::process::Pid::from_child(&self.child),
                rustix::process::Signal::KILL,
            );
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // Its last words are on their way: the reader is done when the pipe is closed.
        for _ in 0..20 {
            if Arc::strong_count(&self.last_words) == 1 {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for RewardCommand {
    fn drop(&mut self) {
        // The end of its input tells it to end.
        self.pipes = None;
        if self.ended().is_none() {
            self.kill();
        }
    }
}

/// Puts the program into a process group of its own and ties its life to that of this process.
#[cfg(unix)]
fn apart(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // A Ctrl-C at the terminal asks the run to stop after its step, for which the program is still needed.
    command.process_group(0);
    #[cfg(target_os = "linux")]
    {
        let follow = || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
                .map_err(std::io::Error::from)
        };
        #[expect(unsafe_code, reason = "nothing else reaches a child whose parent is killed")]
        // SAFETY: between fork and exec it makes one system call, and neither allocates nor locks.
        unsafe {
            command.pre_exec(follow);
        }
    }
}

/// Hands on each line of the program's output until it ends or nobody listens.
fn read_answers(output: ChildStdout, answers: &SyncSender<std::io::Result<String>>) {
    let mut output = BufReader::new(output);
    loop {
        let mut line = Vec::new();
        let answer = match output.by_ref().take(LONGEST + 1).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(length) if length as u64 > LONGEST => {
                Err(std::io::Error::other("answered a line of more than 1 MiB"))
            }
            Ok(_) => Ok(String::from_utf8_lossy(&line).trim().to_owned()),
            Err(error) => Err(std::io::Error::other(format!("cannot be read: {error}"))),
        };
        let is_last = answer.is_err();
        if answers.send(answer).is_err() || is_last {
            return;
        }
    }
}

/// Keeps the last lines of standard error.
fn keep_last_words(errors: ChildStderr, kept: &Mutex<VecDeque<String>>) {
    let (lines, characters) = LAST_WORDS;
    let mut errors = BufReader::new(errors);
    loop {
        let mut line = Vec::new();
        match errors.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line);
        let line: String = line.trim_end().chars().take(characters).collect();
        tracing::debug!("reward command: {line}");
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == lines {
            kept.pop_front();
        }
        kept.push_back(line);
    }
}

fn read_answer(text: &str) -> std::result::Result<Answer, Fault> {
    const HELP: &str = "write {\"reward\": NUMBER} or {\"rewards\": {\"NAME\": NUMBER}} to standard output, and everything else to standard error";
    let shown: String = text.chars().take(200).collect();
    let wrong = |what: String| Fault::Wrong(format!("{what}: {shown}"), HELP);
    let value: Value = serde_json::from_str(text).map_err(|error| {
        // What Python's json module writes for numbers that JSON does not have.
        if ["NaN", "Infinity"].iter().any(|word| text.contains(word)) {
            Fault::NotFinite(format!("answered a number that is not finite: {shown}"))
        } else {
            wrong(format!("answered no JSON ({error})"))
        }
    })?;
    let number = |name: &str, value: &Value| match value {
        Value::Null => Ok(None),
        Value::Number(number) => Ok(number.as_f64()),
        _ => Err(wrong(format!("answered `{name}` with something else than a number or null"))),
    };
    match (value.get("reward"), value.get("rewards")) {
        (Some(reward), None) => Ok(vec![(NAME.to_owned(), number("reward", reward)?)]),
        (None, Some(Value::Object(rewards))) if !rewards.is_empty() => {
            rewards.iter().map(|(name, value)| Ok((name.clone(), number(name, value)?))).collect()
        }
        (None, Some(_)) => Err(wrong("answered `rewards` that are no object with names".to_owned())),
        (Some(_), Some(_)) => Err(wrong("answered both `reward` and `rewards`".to_owned())),
        (None, None) => Err(wrong("answered neither `reward` nor `rewards`".to_owned())),
    }
}

/// What is wrong with a name for a column of a log, if anything.
fn wrong_name(name: &str) -> Option<String> {
    const TAKEN: [&str; 6] =
        ["accuracy", "accuracy_adversarial", "accuracy_clean", "format", "overlong", "repetition"];
    if TAKEN.contains(&name) {
        return Some(format!("calls a reward `{name}`, which is another's name"));
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let is_name = (1..=64).contains(&name.len()) && name.chars().all(is_plain);
    (!is_name).then(|| format!("calls a reward `{}`", name.chars().take(80).collect::<String>()))
}

#[cfg(all(test, unix))]
mod tests;
