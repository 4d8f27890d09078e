//! Questions, certificates, configurations, run directories and reference numbers.

use super::damage::{damaged, edits, json_damage};
use super::{for_all, memory_for, on_small_stack, refusal, survive};
use crate::tiny::tiny_checkpoint;
use proptest::prelude::*;
use safemed::certify::audit::{AuditOptions, audit_file};
use safemed::data::select::read_split;
use safemed::data::{DatasetConfig, ImageCheck};
use safemed::recipes::config::{Command, RunConfig};
use safemed::recipes::parity_io::check_all;
use safemed::recipes::run::{Opening, Run};
use serde_json::{Value, json};

fn omnimedvqa() -> Value {
    json!([{
        "question_id": "a_1", "question": "What is seen?", "question_type": "Disease Diagnosis", "dataset": "X",
        "modality_type": "CT(Computed Tomography)", "image_path": "Images/X/a.png", "gt_answer": "Nodule",
        "option_A": "Nodule", "option_B": "None", "option_C": null, "reasoning": "A spot."
    }])
}

fn med_r1() -> Value {
    json!([{"image": "Images/X/a.png", "problem": "What is seen? A)Nodule, B)None, C)Bleed", "solution": "<answer> A </answer>"}])
}

fn llava() -> Value {
    json!([{"id": "a", "image": "Images/X/a.png", "options": ["Nodule", "None"], "reasoning": "A spot.", "conversations": [
        {"from": "human", "value": "<image>\nWhat is seen?\nA) Nodule\nB) None"},
        {"from": "gpt", "value": "<think>Round.</think><answer> A</answer>"}
    ]}])
}

fn messages() -> Value {
    json!([{"id": 3, "images": ["Images/X/a.png"], "modality": "CT", "answer": "Nodule", "messages": [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is seen? (A) Nodule (B) None"}]},
        {"role": "assistant", "content": "The answer is A. Nodule"}
    ]}])
}

#[test]
fn damaged_questions_and_splits_are_refused_or_read() {
    let dir = tempfile::tempdir().unwrap();
    let (file, split) = (dir.path().join("CT_test.json"), dir.path().join("split"));
    let files = [omnimedvqa(), med_r1(), llava(), messages()];
    let load = |skip_invalid: bool| {
        let config = DatasetConfig { data: Some(file.clone()), skip_invalid, ..DatasetConfig::default() };
        config.load(ImageCheck::Ignore)
    };
    for sound in &files {
        std::fs::write(&file, sound.to_string()).unwrap();
        assert_eq!(load(false).unwrap().samples.len(), 1);
    }
    for_all(500, &(0..files.len(), json_damage(), any::<bool>()), |(which, damage, skips)| {
        let bytes = damage.apply(&files[which]);
        std::fs::write(&file, &bytes).unwrap();
        let read = survive(memory_for(bytes.len()), || load(skips));
        for sample in read.iter().flat_map(|read| &read.samples) {
            assert!(sample.answer < sample.options.len());
            assert!(
                sample.image.is_relative() && !sample.image.components().any(|part| part.as_os_str() == "..")
            );
        }
        std::fs::write(&split, &bytes).unwrap();
        survive(memory_for(bytes.len()), || read_split(&split));
    });
}

#[test]
fn damaged_lines_of_questions_are_refused_or_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("CT_test.jsonl");
    let records = [omnimedvqa(), med_r1(), llava(), messages()].map(|mut array| array[0].take());
    let lines = |record: &Value| {
        let more: Vec<String> = (0..3)
            .map(|n| {
                let mut record = record.clone();
                record["id"] = json!(n);
                record["question_id"] = json!(n.to_string());
                format!("{record}\n")
            })
            .collect();
        more.concat()
    };
    let load = |skip_invalid: bool| {
        let config = DatasetConfig { data: Some(file.clone()), skip_invalid, ..DatasetConfig::default() };
        config.load(ImageCheck::Ignore)
    };
    for sound in &records {
        std::fs::write(&file, lines(sound)).unwrap();
        assert_eq!(load(false).unwrap().samples.len(), 3);
    }
    for_all(400, &(0..records.len(), edits(), any::<bool>()), |(which, edits, skips)| {
        let bytes = damaged(lines(&records[which]).as_bytes(), &edits);
        std::fs::write(&file, &bytes).unwrap();
        let read = survive(memory_for(bytes.len()), || load(skips));
        for sample in read.iter().flat_map(|read| &read.samples) {
            assert!(sample.answer < sample.options.len());
        }
    });
}

#[test]
fn lines_of_strangers_are_refused_with_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("q.jsonl");
    let load =
        || DatasetConfig { data: Some(file.clone()), ..DatasetConfig::default() }.load(ImageCheck::Ignore);
    let line = |id: &str, image: &str, question: &str| {
        let mut record = llava()[0].take();
        (record["id"], record["image"]) = (json!(id), json!(image));
        record["conversations"][0]["value"] = json!(format!("{question}\nA) Nodule\nB) None"));
        record.to_string()
    };
    let good = |id: &str| line(id, "a.png", "What?");
    let huge = "y ".repeat(5 << 20);
    let cases: [(Vec<u8>, &str); 11] = [
        (Vec::new(), "empty file"),
        (b"\xef\xbb\xbf\n".to_vec(), "empty file"),
        (
            [good("a"), good("b"), good("c")[..40].to_owned()].join("\n").into(),
            "q.jsonl:3: record 3: not JSON: EOF",
        ),
        ([good("a").as_bytes(), b"\n\"\xff\xfe\""].concat(), "q.jsonl:2: record 2: not UTF-8"),
        (
            [good("a"), line("b", "a.png", &huge), "{".repeat(10 << 20)].join("\n").into(),
            "q.jsonl:3: record 3: not JSON",
        ),
        ([good("a"), good("b"), good("a")].join("\n").into(), "q.jsonl:3: record 3 (`a`): id stands twice"),
        (line("a", "/etc/passwd", "What?").into(), "(`a`): `image` leaves the data root: `/etc/passwd`"),
        (line("a", "x/../../y.png", "What?").into(), "(`a`): `image` leaves the data root"),
        (
            line("a", &format!("data:{huge}"), "What?").into(),
            "(`a`): `image` is no file under the data root: `data:y",
        ),
        (format!("{{\"messages\": {}", "[".repeat(1 << 20)).into(), "q.jsonl:1: not JSON"),
        (
            good("a")
                .replace("<think>Round.", &"x".repeat(1 << 20))
                .replace("\"reasoning\":\"A spot.\",", "")
                .into(),
            "do not stand there once each",
        ),
    ];
    for (bytes, words) in &cases {
        std::fs::write(&file, bytes).unwrap();
        let text = on_small_stack(|| refusal(memory_for(bytes.len()), load));
        assert!(text.contains(words), "{words}: {}", &text[..text.len().min(2000)]);
    }
    // Long is not wrong.
    std::fs::write(&file, [good("a"), line("b", "a.png", &huge)].join("\n")).unwrap();
    let read = survive(memory_for(11 << 20), load).unwrap();
    assert_eq!(read.samples[1].question.len(), huge.len() - 1);
    // Nor is an answer that leads nowhere for long.
    std::fs::write(
        &file,
        good("a").replace("<answer> A<", &format!("<answer>{}<", "answer: ".repeat(1 << 17))),
    )
    .unwrap();
    assert!(refusal(memory_for(2 << 20), load).contains("no option is meant"));
}

/// A record of nine draws in ten for B; what follows from its counts is left out, so that it does not recompute.
fn certificate() -> Value {
    json!({
        "id": "x", "answer": "B", "prediction": "B", "abstained": false, "correct": true, "radius": 0.2, "p_lower": 0.8,
        "sigma": 0.25, "mode": "cohen", "n0": 10, "n": 100, "alpha": 0.001,
        "counts_selection": {"A": 1, "B": 9, "none": 0}, "counts": {"A": 10, "B": 90, "none": 0},
        "draws_selection": [0, 10], "draws_estimation": [10, 110]
    })
}

#[test]
fn damaged_certificates_are_refused_or_audited() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sigma_0.25");
    let options = AuditOptions { n: vec![100, 1000], ..AuditOptions::default() };
    let table =
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.373\t1\t0:01\n1\t2\t-1\t0.0\t0\t0:01\n";
    for_all(200, &(any::<bool>(), json_damage(), edits()), |(is_ours, damage, edits)| {
        let bytes = if is_ours { damage.apply(&certificate()) } else { damaged(table.as_bytes(), &edits) };
        std::fs::write(&path, &bytes).unwrap();
        survive(memory_for(bytes.len()), || audit_file(&path, &options));
    });
    for radius in [
        "0.".to_owned() + &"0".repeat(70_000),
        "1e308".to_owned(),
        "-1".to_owned(),
        "nan".to_owned(),
        "9".repeat(30),
    ] {
        std::fs::write(&path, format!("label\tpredict\tradius\n1\t1\t{radius}\n")).unwrap();
        survive(memory_for(80_000), || audit_file(&path, &options));
    }
    for (key, value) in [
        ("counts", json!({"A": u64::MAX, "B": u64::MAX})),
        ("n", json!(u64::MAX)),
        ("draws_estimation", json!([u64::MAX, 0])),
    ] {
        let mut record = certificate();
        record[key] = value;
        std::fs::write(&path, record.to_string()).unwrap();
        assert!(!survive(memory_for(1000), || audit_file(&path, &options)).unwrap().pass);
    }
    // Everything as large as a count can be, and consistent.
    let mut record = certificate();
    let n = u64::MAX - 10;
    record["n"] = json!(n);
    record["counts"] = json!({"A": n / 2, "B": n - n / 2});
    record["draws_estimation"] = json!([10, u64::MAX]);
    std::fs::write(&path, record.to_string()).unwrap();
    survive(memory_for(1000), || audit_file(&path, &options));
}

const CONFIG: &str = r#"
seed = 7
model = "dir"
device = "cpu"
batch_size = 8
[data]
omnimedvqa = "data"
shard = "1/4"
window = "40/400"
[attack]
epsilon = "8/255"
num_steps = 10
[certify]
sigma = 0.25
n = 1000
[train]
recipe = "at_grpo"
learning_rate = 1e-5
[train.grpo]
group_size = 4
"#;

#[test]
fn damaged_configurations_are_refused_or_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let load = || RunConfig::load_any(Some(&path), &[])?.to_toml(Command::Train);
    std::fs::write(&path, CONFIG).unwrap();
    load().unwrap();
    for_all(300, &edits(), |edits| {
        let bytes = damaged(CONFIG.as_bytes(), &edits);
        std::fs::write(&path, &bytes).unwrap();
        survive(memory_for(bytes.len()), load);
    });
    let dotted = format!("{}x = 1", "a.".repeat(50_000));
    for text in ["x = ".to_owned() + &"[".repeat(100_000), "x = ".to_owned() + &"{a=".repeat(100_000), dotted]
    {
        std::fs::write(&path, &text).unwrap();
        // The parser keeps every token of a text that it will refuse.
        on_small_stack(|| refusal(memory_for(8 * text.len()), load));
    }
}

#[test]
fn damaged_run_directories_are_refused_or_continued() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let config = RunConfig { out: Some(out.clone()), ..RunConfig::default() };
    let open = |resume: bool| Run::open(Command::Train, &config, Opening { resume, ..Opening::default() });
    let mut run = open(false).unwrap();
    run.record(&json!({"id": "a"})).unwrap();
    for step in 1..4 {
        run.metrics(&json!({"step": step, "loss": 0.5, "more": {"x": [1, null]}})).unwrap();
        run.completion(&json!({"step": step, "text": "x"})).unwrap();
    }
    drop(run);
    let names = ["run.json", "metrics.jsonl", "records.jsonl", "completions.jsonl", "config.toml"];
    let sound = names.map(|name| std::fs::read(out.join(name)).unwrap());
    for_all(
        60,
        &(0..names.len(), edits(), json_damage(), any::<bool>()),
        |(which, edits, damage, by_bytes)| {
            for (name, bytes) in names.iter().zip(&sound) {
                std::fs::write(out.join(name), bytes).unwrap();
            }
            let bytes = match serde_json::from_slice::<Value>(&sound[which]) {
                Ok(value) if !by_bytes => damage.apply(&value),
                _ => damaged(&sound[which], &edits),
            };
            std::fs::write(out.join(names[which]), &bytes).unwrap();
            survive(memory_for(bytes.len()), || {
                let mut run = open(true)?;
                run.rewind_to(2)?;
                run.metrics(&json!({"step": 3}))?;
                run.read_metrics()
            });
        },
    );
}

#[test]
fn damaged_reference_numbers_are_refused_or_compared() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for folder in ["checkpoints/t", "expected", "tokenizer/t", "images"] {
        std::fs::create_dir_all(at(folder)).unwrap();
    }
    tiny_checkpoint(&at("checkpoints/t"));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(at("checkpoints/t").join(name), at("tokenizer/t").join(name)).unwrap();
    }
    let picture = image::RgbImage::from_fn(32, 32, |x, y| image::Rgb([x as u8, y as u8, 9]));
    picture.save(at("images/a.png")).unwrap();
    let header = br#"{"c.resized_u8.0":{"dtype":"U8","shape":[3,32,32],"data_offsets":[0,3072]}}"#;
    std::fs::write(at("expected/t.safetensors"), super::tensors::file(header, &[7; 3072])).unwrap();
    let pad = json!("<|vision_start|><|image_pad|><|vision_end|>A");
    let sound = [
        (
            "expected/t.json",
            json!({"cases": {"c": {
                "images": ["a.png"], "prompt": pad, "input_ids": [1, 2, 262, 262, 262, 262, 3], "image_grid_thw": [[1, 4, 4]],
                "position_ids": [[0, 1, 2], [0, 1, 2], [0, 1, 2]], "rope_delta": -1
            }}}),
        ),
        (
            "chat_cases.json",
            json!([{"family": "qwen3_vl", "case": "c", "add_generation_prompt": true, "add_vision_id": false,
            "text": "x", "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}]}]}]),
        ),
        (
            "tokenizer/t_cases.json",
            json!({"cases": [{"ids": [1, 2], "text": "ab", "decoded": "ab", "decoded_skip_special": "ab"}],
            "decode_only": [{"ids": [5], "decoded": "x"}]}),
        ),
    ];
    for (name, value) in &sound {
        std::fs::write(at(name), value.to_string()).unwrap();
    }
    for_all(80, &(0..sound.len(), json_damage()), |(which, damage)| {
        let (name, value) = &sound[which];
        let bytes = damage.apply(value);
        std::fs::write(at(name), &bytes).unwrap();
        survive(memory_for(bytes.len()), || check_all(dir.path()));
        std::fs::write(at(name), value.to_string()).unwrap();
    });
}
