use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::data::{Dataset, DatasetConfig, ImageCheck, Sample, load};
use crate::error::ExitStatus;

const QUESTION: &str = "<image>\nWhat is seen?\nA) cyst\nB) mass";

fn llava(question: &str, answer: &str) -> Value {
    json!({"id": "q", "image": "i.png", "conversations": [
        {"from": "human", "value": question}, {"from": "gpt", "value": answer},
    ]})
}

fn with(mut record: Value, changes: &[(&str, Value)]) -> Value {
    for (key, value) in changes {
        if value.is_null() {
            record.as_object_mut().unwrap().shift_remove(*key);
        } else {
            record[*key] = value.clone();
        }
    }
    record
}

/// The samples of a file of that name with these records, one in each line.
fn read(name: &str, records: &[Value]) -> Result<Vec<Sample>, String> {
    let folder = tempfile::tempdir().unwrap();
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    fs::write(folder.path().join(name), lines.join("\n")).unwrap();
    match load(&folder.path().join(name)) {
        Ok(dataset) => Ok(dataset.samples),
        Err(error) => {
            assert_eq!(error.status(), ExitStatus::Data);
            Err(error.to_string().replace(&folder.path().display().to_string(), ""))
        }
    }
}

fn expected() -> Sample {
    Sample {
        id: "q".into(),
        dataset: "set".into(),
        modality: "unknown".into(),
        modality_raw: "unknown".into(),
        question_type: "unknown".into(),
        question: "What is seen?".into(),
        options: vec!["cyst".into(), "mass".into()],
        answer: 1,
        image: "i.png".into(),
        reasoning: None,
    }
}

#[test]
fn one_question_in_every_shape_is_one_sample() {
    let user = |content: Value| json!({"role": "user", "content": content});
    let assistant = json!({"role": "assistant", "content": "B"});
    let parts = json!([{"type": "image"}, {"type": "text", "text": "What is seen?\nA) cyst\nB) mass"}]);
    let naming = |image: Value| {
        let mut part = json!({"type": "image"});
        part.as_object_mut().unwrap().extend(image.as_object().unwrap().clone());
        json!({"id": "q", "messages": [user(json!([part, {"type": "text", "text": "What is seen? A) cyst, B) mass"}])), assistant]})
    };
    for record in [
        llava(QUESTION, "B"),
        llava(QUESTION, "<answer> B</answer>"),
        llava(QUESTION, "mass"),
        llava("What is seen?\nA. cyst\nB. mass\n<image>", "B. mass"),
        llava("What is seen? (A) cyst (B) mass", "The answer is (B) mass."),
        llava(
            "<image>\nWhat is seen?\nOptions:\nA: cyst\nB: mass\nAnswer with the option's letter.",
            "Answer: B",
        ),
        with(llava(QUESTION, "B"), &[("image", json!(["i.png"]))]),
        with(llava(QUESTION, "B"), &[("image", Value::Null), ("images", json!("i.png"))]),
        with(
            llava(QUESTION, "B"),
            &[("image", Value::Null), ("images", json!([{"path": "i.png", "bytes": null}]))],
        ),
        with(llava(QUESTION, "A dense, round shape."), &[("answer", json!("B"))]),
        with(llava(QUESTION, "B"), &[("answer", json!("mass")), ("solution", json!("B"))]),
        with(llava(QUESTION, "Dense."), &[("answer", json!("B")), ("solution", json!("It is dense."))]),
        with(llava("<image>What is seen?", "B"), &[("options", json!(["cyst", "mass"]))]),
        with(llava(QUESTION, "B"), &[("options", json!({"A": "cyst", "B": "mass"}))]),
        json!({"id": "q", "image": "i.png", "answer": "B", "conversations": [{"from": "human", "value": QUESTION}]}),
        json!({"id": "q", "images": ["i.png"], "messages": [
            {"role": "system", "content": "Answer with a letter."}, user(json!(QUESTION)), assistant,
        ]}),
        json!({"id": "q", "images": ["i.png"], "messages": [user(parts.clone()), assistant]}),
        naming(json!({"image": "i.png"})),
        naming(json!({"path": "i.png"})),
        with(
            naming(json!({"type": "image_url", "image_url": {"url": "i.png"}})),
            &[("image", json!("i.png"))],
        ),
        json!({"id": "q", "images": ["i.png"], "prompt": [user(parts)], "completion": [assistant]}),
        json!({"id": "q", "image": "i.png", "prompt": "What is seen? A) cyst B) mass", "completion": "B"}),
    ] {
        assert_eq!(read("set.jsonl", std::slice::from_ref(&record)), Ok(vec![expected()]), "{record}");
    }
}

#[test]
fn what_the_turns_do_not_tell_comes_from_fields_or_from_the_name() {
    let told = with(
        llava(QUESTION, "B"),
        &[
            ("id", json!(7)),
            ("modality", json!("MR (Mag-netic Resonance Imaging)")),
            ("question_type", json!("Lesion Grading")),
            ("dataset", json!("D")),
        ],
    );
    let untold = with(llava(QUESTION, "B"), &[("id", Value::Null)]);
    let samples = read("ultrasound_train.jsonl", &[told, untold]).unwrap();
    let of = |sample: &Sample| {
        [&sample.id, &sample.modality, &sample.modality_raw, &sample.question_type, &sample.dataset]
            .map(String::clone)
    };
    assert_eq!(of(&samples[0]), ["7", "MRI", "MR (Mag-netic Resonance Imaging)", "Lesion Grading", "D"]);
    let name = "ultrasound_train";
    assert_eq!(of(&samples[1]), [&format!("{name}_000001"), "Ultrasound", "ultrasound", "unknown", name]);
}

#[test]
fn no_id_is_invented_in_place_of_one_that_cannot_be_read() {
    for (id, what) in
        [(json!({"a": 1}), "an object"), (json!(true), "true or false"), (json!([7]), "an array")]
    {
        let error = read("set.jsonl", &[with(llava(QUESTION, "B"), &[("id", id.clone())])]).unwrap_err();
        let expected = format!("/set.jsonl:1: record 1: `id` is {what}, a text or a number was expected");
        assert!(error.starts_with("1 problem") && error.contains(&expected), "{id}: {error}");
    }
    let mut absent = llava(QUESTION, "B");
    absent["id"] = Value::Null;
    assert_eq!(read("set.jsonl", &[absent]).unwrap()[0].id, "set_000000");
}

#[test]
fn a_reasoning_is_kept_and_its_right_letter_moves_with_the_options() {
    let record = llava(QUESTION, "<think>Dense. So option B.</think>\n<answer>B</answer>");
    let [sample] = <[Sample; 1]>::try_from(read("set.json", std::slice::from_ref(&record)).unwrap()).unwrap();
    assert_eq!(sample.reasoning.as_deref(), Some("Dense. So option {answer}."));
    assert_eq!(sample.with_options_permuted(&[1, 0]).reasoning_text(), "Dense. So option A.");
    for (changes, reasoning) in [
        (vec![("reasoning", json!("Round."))], "Round."),
        (vec![("cot", json!("<think>Round.</think>"))], "Round."),
        (vec![("solution", json!("<think> Round. </think><answer> B</answer>"))], "Round."),
    ] {
        let samples = read("set.json", &[with(record.clone(), &changes)]).unwrap();
        assert_eq!(samples[0].reasoning.as_deref(), Some(reasoning), "{changes:?}");
    }
    let after = read("set.json", &[llava(QUESTION, "<answer>B</answer><think>Dense.</think>")]).unwrap();
    assert_eq!(after[0].reasoning.as_deref(), Some("Dense."));
}

#[test]
fn whatever_is_no_question_about_one_image_is_told_with_its_line() {
    let turn = |from: &str, value: Value| json!({"from": from, "value": value});
    let of = |turns: Value| json!({"id": "q", "image": "i.png", "conversations": turns});
    let (human, gpt) = (turn("human", json!(QUESTION)), turn("gpt", json!("B")));
    for (record, words) in [
        (json!(7), "an object was expected, found a number"),
        (
            with(llava(QUESTION, "B"), &[("image", Value::Null)]),
            "no image: `image` or `images` is missing, 1 `<image>`",
        ),
        (with(llava(QUESTION, "B"), &[("image", json!([]))]), "no image"),
        (with(llava(QUESTION, "B"), &[("image", json!(["i.png", "k.png"]))]), "2 images"),
        (with(llava(QUESTION, "B"), &[("images", json!(["k.png"]))]), "2 images"),
        (with(llava(QUESTION, "B"), &[("image", json!(3))]), "`image` holds a number"),
        (with(llava(QUESTION, "B"), &[("image", json!(" "))]), "`image` is blank"),
        (
            with(llava(QUESTION, "B"), &[("image", json!("../i.png"))]),
            "`image` leaves the data root: `../i.png`",
        ),
        (with(llava(QUESTION, "B"), &[("image", json!("/i.png"))]), "`image` leaves the data root: `/i.png`"),
        (with(llava(QUESTION, "B"), &[("image", json!("https://x/i.png"))]), "no file under the data root"),
        (
            with(llava(QUESTION, "B"), &[("image", json!("data:image/png;base64,AA"))]),
            "no file under the data root",
        ),
        (llava("<image><image>\nWhat? A) x B) y", "B"), "2 `<image>` in the question, but 1 image"),
        (llava("What is <image> this? A) x B) y", "B"), "`<image>` stands within the question"),
        (
            with(llava(QUESTION, "<image> B"), &[("answer", json!("B"))]),
            "`<image>` stands in a turn of the assistant",
        ),
        (llava("<video>What? A) x B) y", "B"), "`<video>` in the question"),
        (llava("<image>", "B"), "the question is blank"),
        (llava("<image>\nWhat is seen?", "B"), "the question has no options of the form"),
        (llava("What? A) x B) y B) z", "B"), "`B)` stands there twice"),
        (llava(QUESTION, "It is dense."), "the assistant's turn: no option is meant by `It is dense.`"),
        (llava(QUESTION, "C"), "the assistant's turn: the answer is C, but there are 2 options"),
        (
            llava(QUESTION, "A) mass"),
            "the assistant's turn: the answer has the letter A, but the text of option B",
        ),
        (llava(QUESTION, ""), "the answer is blank"),
        (llava(QUESTION, "<think>x"), "`<think>` and `</think>` do not stand there once each"),
        (
            with(llava(QUESTION, "A"), &[("answer", json!("B"))]),
            "`answer` is option B, the assistant's answer option A",
        ),
        (
            with(of(json!([human])), &[("answer", json!("A")), ("solution", json!("<answer>B</answer>"))]),
            "`answer` is option A, `solution` option B",
        ),
        (
            with(llava(QUESTION, "It is dense."), &[("answer", json!("B")), ("solution", json!("cyst"))]),
            "`answer` is option B, `solution` option A",
        ),
        (
            with(llava(QUESTION, "A"), &[("answer", json!("B")), ("solution", json!("It is dense."))]),
            "`answer` is option B, the assistant's answer option A",
        ),
        (
            with(llava(QUESTION, "A"), &[("solution", json!("mass"))]),
            "`solution` is option B, the assistant's answer option A",
        ),
        (llava("What? A) cyst, B) mass, C) cyst", "cyst"), "the assistant's turn: `cyst` is the text of 2"),
        (with(llava(QUESTION, "B"), &[("answer", json!(1))]), "`answer` is a number"),
        (with(llava(QUESTION, "B"), &[("solution", json!("Z"))]), "`solution`: the answer is Z"),
        (
            with(llava(QUESTION, "B"), &[("options", json!(["x", "y"]))]),
            "`options` are not those in the question",
        ),
        (with(llava("What? A) x B) y B) z", "B"), &[("options", json!(["x", "y"]))]), "stands there twice"),
        (with(llava(QUESTION, "B"), &[("modality", json!(1))]), "`modality` is a number"),
        (of(json!([human, gpt, human, gpt])), "2 questions and 2 answers in one record"),
        (of(json!([human, gpt, gpt])), "1 questions and 2 answers"),
        (of(json!([human])), "no answer: neither"),
        (of(json!([gpt, human])), "the assistant speaks before the user"),
        (of(json!([])), "no turn of the user"),
        (of(json!("x")), "`conversations` is a text"),
        (of(json!([7])), "`conversations`, turn 1: an object was expected"),
        (of(json!([turn("tool", json!("x"))])), "turn 1: unknown speaker `tool`"),
        (of(json!([{"value": "x"}])), "turn 1: nobody speaks"),
        (of(json!([{"from": "human"}])), "turn 1: nothing is said"),
        (of(json!([turn("human", json!({"a": 1}))])), "its content is an object"),
        (of(json!([turn("human", json!([{"type": "video"}]))])), "a part of type `video`"),
        (of(json!([turn("human", json!([{"type": "text"}]))])), "a part of type `text` has no text"),
        (of(json!([turn("human", json!(["x"]))])), "a part without `type`"),
        (of(json!([turn("human", json!([{"type": "image", "image": 3}]))])), "an image is a number"),
    ] {
        let good = with(llava(QUESTION, "B"), &[("id", json!("good"))]);
        let error = read("set.jsonl", &[good.clone(), record.clone()]).unwrap_err();
        let id = if record.is_object() { " (`q`)" } else { "" };
        assert!(error.starts_with("1 problem in the data\n"), "{record}: {error}");
        assert!(error.contains(&format!("/set.jsonl:2: record 2{id}: ")), "{record}: {error}");
        assert!(error.contains(words), "{record}: {error}");
    }
}

#[test]
fn all_problems_of_all_files_come_at_once_and_can_be_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
    let good = llava(QUESTION, "B").to_string();
    let bad = with(llava("What?", "B"), &[("id", json!("bad")), ("image", Value::Null)]).to_string();
    write("a.jsonl", format!("{good}\n{bad}\n{{\"id\": \"to"));
    write(
        "b.json",
        format!(
            "[\n{}]",
            json!({"id": "m", "images": ["k.png"], "messages": [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "B"}]})
        ),
    );
    write("c.jsonl", good);
    let error = load(folder.path()).unwrap_err().to_string();
    for words in [
        "4 problems",
        "a.jsonl:2: record 2 (`bad`): no image",
        "a.jsonl:2: record 2 (`bad`): the question has no options",
        "a.jsonl:3: record 3: not JSON: EOF while parsing a string at column 10",
        "c.jsonl:1: record 1 (`q`): id stands twice",
    ] {
        assert!(error.contains(words), "{words}\n---\n{error}");
    }
    let config =
        DatasetConfig { data: Some(folder.path().into()), skip_invalid: true, ..DatasetConfig::default() };
    let Dataset { samples, skipped, root, .. } = config.load(ImageCheck::Ignore).unwrap();
    assert_eq!((samples.len(), skipped.len(), root.as_path()), (2, 4, folder.path()));
    // Images lie beside the file, or where they are said to lie.
    fs::write(folder.path().join("i.png"), "x").unwrap();
    assert_eq!(config.load(ImageCheck::Exist).unwrap().samples[0].image, Path::new("i.png"));
    let strict = DatasetConfig { data: Some(folder.path().join("b.json")), skip_invalid: false, ..config };
    let error = strict.load(ImageCheck::Exist).unwrap_err().to_string();
    assert!(error.contains("b.json:2: record 1 (`m`): image file is missing: "), "{error}");
    assert!(error.contains("k.png\n"), "{error}");
}
