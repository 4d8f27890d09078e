use super::*;
use crate::error::ExitStatus as Status;
use std::path::Path;

const LONG: Duration = Duration::from_secs(30);

fn line(step: u64, index: usize, count: usize, completion: &str) -> Line<'_> {
    Line {
        step,
        index,
        count,
        id: "q7",
        dataset: "d",
        modality: "CT",
        question_type: "t",
        image: "i.png",
        question: "Where?",
        options: &[],
        answer: 'A',
        reasoning: None,
        completion,
        is_finished: true,
        num_tokens: 3,
    }
}

fn shell(script: &str, timeout: Duration) -> Result<RewardCommand> {
    let command = ["sh", "-c", script].map(str::to_owned);
    RewardCommand::start(&command, timeout, &line(0, 0, 1, "<answer> A</answer>"))
}

/// The line that a script writes into `file`, sooner or later.
fn written(file: &Path) -> String {
    let until = Instant::now() + LONG;
    while Instant::now() < until {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if text.ends_with('\n') {
            return text;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("the script never wrote");
}

#[test]
fn every_line_gets_its_answer_whoever_waits_for_whom() {
    let texts: Vec<String> = (0..400).map(|i| "x".repeat(1000 + i)).collect();
    let lines: Vec<Line<'_>> = texts.iter().enumerate().map(|(i, text)| line(1, i, 400, text)).collect();
    let lengths: Vec<f64> = lines.iter().map(|l| serde_json::to_string(l).unwrap().len() as f64).collect();
    // More than a pipe holds, read line by line; read as a whole before the first answer; answered at great length.
    let padding = "y".repeat(4000);
    let by_line = "while IFS= read -r l; do echo \"{\\\"reward\\\": ${#l}}\"; done";
    let as_a_whole = "read -r l; echo '{\"reward\": 0}'; all=; i=0; \
        while [ $i -lt 400 ]; do IFS= read -r l; all=\"$all {\\\"reward\\\":${#l}}\"; i=$((i+1)); done; \
        for answer in $all; do echo \"$answer\"; done; read -r l";
    let at_length = format!(
        "while IFS= read -r l; do echo \"{{\\\"reward\\\": ${{#l}}, \\\"why\\\": \\\"{padding}\\\"}}\"; done"
    );
    for script in [by_line, as_a_whole, &at_length] {
        let mut command = shell(script, LONG).unwrap();
        assert_eq!(command.names(), [NAME]);
        let rewards = command.ask(&lines, &|| false).unwrap();
        assert_eq!(rewards.concat(), lengths, "{script}");
    }
    // A batch after another, and an empty one.
    let mut command = shell(by_line, LONG).unwrap();
    assert_eq!(command.ask(&lines[..3], &|| false).unwrap().concat(), lengths[..3]);
    assert!(command.ask(&[], &|| false).unwrap().is_empty());
    assert_eq!(command.ask(&lines[3..9], &|| false).unwrap().concat(), lengths[3..9]);
}

#[test]
fn rewards_have_names_and_may_be_missing() {
    let script = "read -r l; echo '{\"rewards\": {\"b\": 1, \"a\": null}}'; read -r l; \
        echo '{\"rewards\": {\"a\": 2.5}}'; read -r l; echo '{\"rewards\": {\"a\": -1, \"b\": 0.1}, \"note\": []}'; \
        read -r l; echo '{\"rewards\": {\"c\": 1}}'; read -r l";
    let mut command = shell(script, LONG).unwrap();
    assert_eq!(command.names(), ["b", "a"]);
    let rewards = command.ask(&[line(1, 0, 2, "x"), line(1, 1, 2, "y")], &|| false).unwrap();
    assert!(rewards[0][0].is_nan());
    assert_eq!((rewards[0][1], &rewards[1]), (2.5, &vec![0.1, -1.0]));
    let error = command.ask(&[line(2, 0, 1, "z")], &|| false).unwrap_err();
    assert!(error.to_string().contains("gave a reward `c`, its first answer gave `b`, `a`"), "{error}");
}

#[test]
fn a_broken_command_is_found_at_its_trial() {
    let once = |answer: &str| format!("while read -r l; do echo '{answer}'; done");
    for (script, status, words) in [
        ("exit 3".to_owned(), Status::Usage, "ended (exit status: 3)"),
        ("echo no such module >&2; exit 1".to_owned(), Status::Usage, "\n   |  no such module\n   = help"),
        ("kill -9 $$".to_owned(), Status::Usage, "signal: 9"),
        ("read -r l; echo '{\"reward\": 1}'".to_owned(), Status::Usage, "ended (exit status: 0) while"),
        ("exec >&-; sleep 60".to_owned(), Status::Usage, "closed its output"),
        (once("hello"), Status::Usage, "answered no JSON (expected value at line 1 column 1): hello"),
        (once(""), Status::Usage, "answered no JSON"),
        (once("{\"reward\": 1} {}"), Status::Usage, "answered no JSON (trailing characters"),
        (once("{\"reward\": NaN}"), Status::NonFinite, "write null where no reward"),
        (once("{\"rewards\": {\"a\": -Infinity}}"), Status::NonFinite, "not finite: {\"rewards\""),
        (once("{\"reward\": 1e999}"), Status::Usage, "number out of range"),
        (once("{\"reward\": \"1\"}"), Status::Usage, "`reward` with something else than a number"),
        (once("{\"rewards\": {\"a\": true}}"), Status::Usage, "`a` with something else"),
        (once("{\"score\": 1}"), Status::Usage, "neither `reward` nor `rewards`"),
        (once("[1]"), Status::Usage, "neither `reward` nor `rewards`"),
        (once("{\"reward\": 1, \"rewards\": {\"a\": 1}}"), Status::Usage, "both"),
        (once("{\"rewards\": {}}"), Status::Usage, "no object with names"),
        (once("{\"rewards\": [1]}"), Status::Usage, "no object with names"),
        (once("{\"rewards\": {\"accuracy\": 1}}"), Status::Usage, "which is another"),
        (once("{\"rewards\": {\"a/b\": 1}}"), Status::Usage, "calls a reward `a/b`"),
        (once("{\"rewards\": {\"\": 1}}"), Status::Usage, "calls a reward ``"),
        (
            "while read -r l; do echo '{\"reward\": 1}'; echo '{\"reward\": 1}'; done".to_owned(),
            Status::Usage,
            "more lines than it was asked",
        ),
        ("echo hello; cat >&2".to_owned(), Status::Usage, "no JSON"),
        ("head -c 1500000 /dev/zero | tr '\\0' x; sleep 60".to_owned(), Status::Usage, "more than 1 MiB"),
        ("yes '{\"reward\": 1}'".to_owned(), Status::Usage, "more lines than it was asked"),
    ] {
        let error = shell(&script, LONG).unwrap_err();
        assert_eq!(error.status(), status, "{script}: {error}");
        let text = error.to_string();
        assert!(text.contains(words), "{script}: {text}");
        assert!(text.contains("--> before the first step, question `q7`"), "{script}: {text}");
        assert!(text.contains("\n   = help: "), "{script}: {text}");
    }
    let absent = ["no-such-program-anywhere".to_owned()];
    let error = RewardCommand::start(&absent, LONG, &line(0, 0, 1, "")).unwrap_err();
    assert_eq!(error.status(), Status::Usage);
    assert!(error.to_string().contains("--> no-such-program-anywhere"), "{error}");
}

#[test]
fn a_fault_later_names_step_question_and_line() {
    let answer = "read -r l; echo '{\"reward\": 1}';";
    let lines = [line(4, 0, 3, "x"), line(4, 1, 3, "y"), line(4, 2, 3, "z")];
    for (script, status, words) in [
        (
            format!("{answer} {answer} read -r l; echo why >&2; exit 7"),
            Status::Data,
            "ended (exit status: 7)",
        ),
        (
            format!("{answer} {answer} read -r l; echo why >&2; echo NaN; read -r l"),
            Status::NonFinite,
            "finite",
        ),
        (
            format!("{answer} {answer} read -r l; echo why >&2; echo x; read -r l"),
            Status::Data,
            "answered no JSON",
        ),
    ] {
        let error = shell(&script, LONG).unwrap().ask(&lines, &|| false).unwrap_err();
        assert_eq!(error.status(), status, "{error}");
        let text = error.to_string();
        assert!(text.contains(words), "{text}");
        assert!(
            text.contains("\n  --> step 4, question `q7`, line 2 of 3\n   |  why\n   = help: "),
            "{text}"
        );
    }
    // More than was asked, seen before it can be taken for the next answer.
    let dir = tempfile::tempdir().unwrap();
    let (file, go) = (dir.path().join("said"), dir.path().join("go"));
    let script = format!(
        "{answer} {answer} while [ ! -e {} ]; do sleep 0.01; done; echo '{{\"reward\": 5}}'; echo so > {}; read -r l; read -r l",
        go.display(),
        file.display()
    );
    let mut command = shell(&script, LONG).unwrap();
    command.ask(&lines[..1], &|| false).unwrap();
    std::fs::write(&go, "").unwrap();
    written(&file);
    thread::sleep(4 * SURPLUS);
    let error = command.ask(&lines[..1], &|| false).unwrap_err();
    assert!(error.to_string().contains("more lines"), "{error}");
    // And after the last question, when nothing else would notice.
    let twice = "while read -r l; do printf '{\"reward\": 1}\\n{\"reward\": 2}\\n'; done";
    let mut command = shell(&format!("{answer} {twice}"), LONG).unwrap();
    let error = command.ask(&lines, &|| false).and_then(|_| command.finish()).unwrap_err();
    assert!(error.to_string().contains("more lines"), "{error}");
    let mut command = shell(&format!("{answer} {answer} read -r l"), LONG).unwrap();
    command.ask(&lines[..1], &|| false).and_then(|_| command.finish()).unwrap();
    // Of many words the last are kept, each cut.
    let words = "i=0; while [ $i -lt 40 ]; do echo \"word $i\" >&2; i=$((i+1)); done; exit 1";
    let text = shell(words, LONG).unwrap_err().to_string();
    assert!(
        text.contains("word 30\n") && text.contains("word 39\n") && !text.contains("word 29\n"),
        "{text}"
    );
}

/// Whether a process is there and no zombie.
#[cfg(target_os = "linux")]
fn lives(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    !stat.is_empty() && !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z')
}

/// Whether a process ends: one that was killed may need a moment for it on a busy machine.
#[cfg(target_os = "linux")]
fn ends(pid: &str) -> bool {
    let until = Instant::now() + LONG;
    while lives(pid) && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    !lives(pid)
}

#[cfg(target_os = "linux")]
#[test]
fn a_command_that_hangs_is_killed_with_what_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let short = Duration::from_secs(2);
    // It neither reads nor answers, and its child holds every pipe.
    let script = format!("sleep 600 & echo $! > {}; wait", file.display());
    let error = shell(&script, short).unwrap_err();
    assert!(error.to_string().contains("did not answer within 2 s"), "{error}");
    assert!(ends(&written(&file)));
    // It reads one line of more than a pipe holds.
    std::fs::remove_file(&file).unwrap();
    let script =
        format!("read -r l; echo '{{\"reward\": 1}}'; sleep 600 & echo $! > {}; wait", file.display());
    let mut command = shell(&script, short).unwrap();
    let text = "x".repeat(1 << 20);
    let error = command.ask(&[line(1, 0, 2, &text), line(1, 1, 2, &text)], &|| false).unwrap_err();
    assert!(error.to_string().contains("line 1 of 2"), "{error}");
    assert!(ends(&written(&file)));
    let error = command.ask(&[line(1, 0, 1, "x")], &|| false).unwrap_err();
    assert!(error.to_string().contains("has ended"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_command_ends_with_its_input_or_is_made_to() {
    let dir = tempfile::tempdir().unwrap();
    let (file, pid) = (dir.path().join("bye"), dir.path().join("pid"));
    let answering = "while read -r l; do echo '{\"reward\": 1}'; done;";
    let polite = format!("{answering} sleep 0.2; echo bye > {}", file.display());
    drop(shell(&polite, LONG).unwrap());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "bye\n");
    let deaf = format!("echo $$ > {}; {answering} while true; do sleep 600; done", pid.display());
    let command = shell(&deaf, LONG).unwrap();
    let number = written(&pid);
    assert!(lives(&number));
    drop(command);
    assert!(ends(&number));
}

#[cfg(target_os = "linux")]
#[test]
fn a_command_does_not_outlive_the_thread_that_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    let script =
        format!("echo $$ > {}; while read -r l; do echo '{{\"reward\": 1}}'; done; sleep 600", pid.display());
    // As when the process is killed: nothing is dropped.
    thread::spawn(move || std::mem::forget(shell(&script, LONG).unwrap())).join().unwrap();
    let number = written(&pid);
    assert!(ends(&number));
}
