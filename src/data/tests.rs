use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::error::ExitStatus;

/// A root with the given files; `name` relative to it.
fn root_with(files: &[(&str, String)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn record(id: &str, image: &str) -> Value {
    json!({
        "dataset": "D & 1", "question_id": id, "question_type": "Disease Diagnosis", "question": "What?",
        "gt_answer": "cyst", "image_path": image, "option_A": "nodule", "option_B": "cyst", "option_C": "None",
        "option_D": "both", "modality_type": "OCT (Optical Coherence Tomography",
    })
}

fn with(mut record: Value, changes: &[(&str, Value)]) -> Value {
    for (key, value) in changes {
        record[*key] = value.clone();
    }
    record
}

fn without(mut record: Value, key: &str) -> Value {
    record.as_object_mut().unwrap().shift_remove(key);
    record
}

const OPEN: &str = "QA_information/Open-access";

#[test]
fn omnimedvqa_is_read_with_the_dirt_it_is_shipped_with() {
    let dirty = json!([
        record("D_0", "Images/D & 1/a (1)%#.png"),
        without(without(record("D_1", "Images/D & 1/b.png"), "option_C"), "option_D"),
        with(record("D_2", "Images/D & 1/b.png"), &[("option_C", Value::Null), ("option_E", json!("fifth"))]),
        with(record("D_3", "Images/D & 1/b.png"), &[("gt_answer", json!(" CYST "))]),
        with(
            without(record("D_4", "Images/D & 1/b.png"), "modality_type"),
            &[("modality", json!("ultrasound"))]
        ),
        with(
            record("D_5", "Images/D & 1/b.png"),
            &[("modality_type", json!("Endoscopy")), ("reasoning", json!("seen {answer}"))]
        ),
        with(
            record("D_6", "Images/D & 1/b.png"),
            &[("option_A", json!("Cyst")), ("gt_answer", json!("cyst"))]
        ),
        with(record("D_7", "Images/D & 1/b.png"), &[("option_C", json!("both"))]),
    ]);
    let folder = root_with(&[
        ("OmniMedVQA/QA_information/Open-access/b.json", format!("\u{feff}{dirty}")),
        (
            "OmniMedVQA/QA_information/Open-access/a.json",
            json!([without(record("A_0", "Images/x.png"), "dataset")]).to_string(),
        ),
        ("OmniMedVQA/QA_information/Open-access/.hidden.json", "no json".into()),
        ("OmniMedVQA/QA_information/Restricted-access/r.json", json!([{}, {}]).to_string()),
    ]);
    let dataset = load(folder.path()).unwrap();
    assert_eq!(dataset.root, folder.path().join("OmniMedVQA"));
    assert_eq!(dataset.restricted, 2);
    let samples = &dataset.samples;
    assert_eq!(
        samples.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(),
        ["A_0", "D_0", "D_1", "D_2", "D_3", "D_4", "D_5", "D_6", "D_7"]
    );
    assert_eq!(samples[0].dataset, "a");
    assert_eq!(
        (samples[1].modality.as_str(), samples[1].modality_raw.as_str()),
        ("OCT", "OCT (Optical Coherence Tomography")
    );
    assert_eq!(samples[1].image, Path::new("Images/D & 1/a (1)%#.png"));
    assert_eq!(samples[2].options, ["nodule", "cyst"]);
    assert_eq!(samples[3].options, ["nodule", "cyst", "both", "fifth"]);
    assert!(samples[..7].iter().all(|sample| sample.answer == 1));
    assert_eq!(samples[5].modality, "Ultrasound");
    assert_eq!((samples[6].modality.as_str(), samples[6].reasoning_text().as_str()), ("Endoscopy", "seen B"));
    assert_eq!(samples[7].answer, 1, "the same text goes before the same text in another case");
    assert_eq!(samples[8].answer, 1, "wrong options may be alike");
    // The root may be given as any of three folders.
    for inner in ["OmniMedVQA", "OmniMedVQA/QA_information"] {
        assert_eq!(load(&folder.path().join(inner)).unwrap().samples, *samples);
    }
    let single = load(&folder.path().join("OmniMedVQA/QA_information/Open-access/a.json")).unwrap();
    assert_eq!((single.root, single.samples.len()), (folder.path().join("OmniMedVQA"), 1));
}

#[test]
fn every_problem_is_told_at_once_with_its_file_record_and_line() {
    let good = record("G_0", "Images/g.png");
    let bad = [
        good.clone(),
        json!(7),
        with(record("B_2", "Images/g.png"), &[("question", json!(3)), ("option_A", json!(["x"]))]),
        with(record("B_3", "Images/g.png"), &[("gt_answer", json!("abscess"))]),
        without(without(without(record("B_4", "../x.png"), "option_B"), "option_C"), "option_D"),
        with(without(record("B_5", "/etc/x.png"), "question_type"), &[("question_typ", json!("x"))]),
        without(record("B_6", "Images/g.png"), "modality_type"),
        good.clone(),
        with(record("B_8", "Images/g.png"), &[("option_D", json!("cyst"))]),
        with(
            record("B_9", "Images/g.png"),
            &[("option_A", json!("Cyst")), ("option_C", json!("CYST")), ("option_B", json!("x"))],
        ),
    ];
    let lines: Vec<String> = bad.iter().map(Value::to_string).collect();
    let folder = root_with(&[
        (&format!("{OPEN}/a.json"), format!("[\n{}\n]", lines.join(",\n"))),
        (&format!("{OPEN}/b.json"), " \n".into()),
        (&format!("{OPEN}/c.json"), "[{\"a\": 1},\n {]".into()),
        (&format!("{OPEN}/d.json"), "{\n\"a\": 1\n}".into()),
        (&format!("{OPEN}/e.json"), "[]".into()),
    ]);
    let error = load(folder.path()).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Data);
    let text = error.to_string();
    for expected in [
        "16 problems in the data",
        "a.json:3: record 2: an object was expected, found a number",
        "a.json:4: record 3 (`B_2`): `question` is a number, a text was expected",
        "a.json:4: record 3 (`B_2`): `option_A` is an array, a text was expected",
        "a.json:5: record 4 (`B_3`): `gt_answer` is none of the options: `abscess`, options are `nodule`, `cyst`, `None`, `both`",
        "a.json:6: record 5 (`B_4`): `image_path` leaves the data root: `../x.png`",
        "a.json:6: record 5 (`B_4`): 1 option(s), two or more",
        "a.json:7: record 6 (`B_5`): `question_type` is missing (did you mean `question_type` by `question_typ`?)",
        "a.json:7: record 6 (`B_5`): `image_path` leaves the data root: `/etc/x.png`",
        "a.json:8: record 7 (`B_6`): `modality_type` is missing",
        "a.json:9: record 8 (`G_0`): id stands twice: also",
        "a.json:10: record 9 (`B_8`): `gt_answer`: `cyst` is the text of 2 options",
        "a.json:11: record 10 (`B_9`): `gt_answer`: `cyst` is the text of 2 options",
        "b.json: empty file",
        "c.json:2: not JSON",
        "d.json: an array of records, or one record in each line, was expected, found an object",
        "e.json: no record in the file",
    ] {
        assert!(text.contains(expected), "{expected}\n---\n{text}");
    }
    let config = DatasetConfig {
        omnimedvqa: Some(folder.path().into()),
        skip_invalid: true,
        ..DatasetConfig::default()
    };
    let dataset = config.load(ImageCheck::Ignore).unwrap();
    assert_eq!((dataset.samples.len(), dataset.skipped.len()), (1, 16));
}

#[test]
fn missing_images_are_told_before_work_or_left_out_on_request() {
    let records = [("A_0", "here"), ("A_1", "gone"), ("A_2", "gone")]
        .map(|(id, image)| record(id, &format!("Images/{image}.png")).to_string());
    let folder = root_with(&[
        (&format!("{OPEN}/a.json"), format!("[{}]", records.join(",\n"))),
        ("Images/here.png", "x".into()),
    ]);
    let config = DatasetConfig { omnimedvqa: Some(folder.path().into()), ..DatasetConfig::default() };
    assert_eq!(config.load(ImageCheck::Ignore).unwrap().samples.len(), 3);
    let text = config.load(ImageCheck::Exist).unwrap_err().to_string();
    let gone = folder.path().join("Images/gone.png").display().to_string();
    for (line, id) in [(2, "A_1"), (3, "A_2")] {
        let expected = format!("a.json:{line}: record {line} (`{id}`): image file is missing: {gone}\n");
        assert!(text.starts_with("2 problems") && text.contains(&expected), "{expected}\n---\n{text}");
    }
    let lenient = DatasetConfig { skip_invalid: true, ..config.clone() }.load(ImageCheck::Exist).unwrap();
    assert_eq!((lenient.samples.len(), lenient.skipped.len()), (1, 2));
    // What is not selected need not be there.
    fs::write(folder.path().join("s.json"), "[\"A_0\"]").unwrap();
    let selected = DatasetConfig { split: Some("s.json".into()), ..config.clone() };
    assert_eq!(selected.load(ImageCheck::Exist).unwrap().samples.len(), 1);
    // What is wrong with records is told in the same list, and before a split that names what they leave out.
    let torn = format!("{}\n{{\"question_id\": \"A_3\", \n", records.join("\n"));
    fs::write(folder.path().join(OPEN).join("a.json"), torn).unwrap();
    let text = config.load(ImageCheck::Exist).unwrap_err().to_string();
    assert!(text.starts_with("3 problems") && text.contains("a.json:4: record 4: not JSON"), "{text}");
    assert!(text.contains("a.json:3: record 3 (`A_2`): image file is missing"), "{text}");
    fs::write(folder.path().join("s.json"), "[\"A_3\"]").unwrap();
    let text = selected.load(ImageCheck::Exist).unwrap_err().to_string();
    assert!(text.starts_with("1 problem in") && text.contains("not JSON"), "{text}");
    let surveyed = config.survey(ImageCheck::Exist).unwrap();
    assert_eq!((surveyed.samples.len(), surveyed.skipped.len()), (1, 3));
    assert_eq!(surveyed.problem(&surveyed.samples[0], "x").line, Some(1));
    assert_eq!(
        Dataset::new("r", Vec::new()).problem(&surveyed.samples[0], "x").file,
        Path::new("r/Images/here.png")
    );
}

fn ten() -> tempfile::TempDir {
    let records: Vec<Value> = (0..10)
        .map(|n| {
            let modality = if n < 6 { "CT(Computed Tomography)" } else { "MR (Mag-netic Resonance Imaging)" };
            let kind = if n % 2 == 0 { "Lesion Grading" } else { "Disease Diagnosis" };
            with(
                record(&format!("T_{}", 9 - n), "Images/x.png"),
                &[("modality_type", json!(modality)), ("question_type", json!(kind))],
            )
        })
        .collect();
    root_with(&[(&format!("{OPEN}/t.json"), json!(records).to_string())])
}

fn ids(config: &DatasetConfig) -> Vec<String> {
    config.load(ImageCheck::Ignore).unwrap().samples.into_iter().map(|sample| sample.id).collect()
}

#[test]
fn filters_keep_the_order_and_say_what_there_is() {
    let folder = ten();
    let all = DatasetConfig { data: Some(folder.path().into()), ..DatasetConfig::default() };
    let by = |modality: Option<&str>, kind: Option<&str>, limit| DatasetConfig {
        modality: modality.map(str::to_owned),
        question_type: kind.map(str::to_owned),
        limit,
        ..all.clone()
    };
    assert_eq!(ids(&by(Some("mr"), None, None)), ["T_3", "T_2", "T_1", "T_0"]);
    assert_eq!(
        ids(&by(Some("CT(Computed Tomography)"), Some("lesion grading"), None)),
        ["T_9", "T_7", "T_5"]
    );
    assert_eq!(ids(&by(Some("CT"), Some("Lesion Grading"), Some(2))), ["T_9", "T_7"]);
    let error = by(Some("MRT"), None, None).load(ImageCheck::Ignore).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Usage);
    assert!(error.to_string().contains("did you mean `MRI`? there are `CT`, `MRI`"), "{error}");
    let error = by(None, Some("Disease Diagnoses"), None).load(ImageCheck::Ignore).unwrap_err();
    assert!(error.to_string().contains("did you mean `Disease Diagnosis`?"), "{error}");
    assert_eq!(by(None, None, Some(0)).load(ImageCheck::Ignore).unwrap_err().status(), ExitStatus::Usage);
    assert_eq!(DatasetConfig::default().load(ImageCheck::Ignore).unwrap_err().status(), ExitStatus::Usage);
}

#[test]
fn a_split_selects_its_ids_and_strangers_in_it_are_refused() {
    let folder = ten();
    let config = DatasetConfig {
        data: Some(folder.path().into()),
        split: Some("s.json".into()),
        ..DatasetConfig::default()
    };
    let split = |text: &str| fs::write(folder.path().join("s.json"), text).unwrap();
    split("[\"T_0\", \"T_5\"]");
    assert_eq!(ids(&config), ["T_5", "T_0"]);
    for (text, expected) in [
        ("[\"T_0\", \"Z_1\", \"Z_2\"]", "2 of the 3 ids in the split are not in the data: `Z_1`, `Z_2`\n"),
        ("[\"T_0\", 7]", "entry 2 of the split is a number"),
        ("[\"T_0\", \"T_0\"]", "names `T_0` twice"),
        ("[]", "empty"),
        ("{}", "no JSON list"),
    ] {
        split(text);
        let error = config.load(ImageCheck::Ignore).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Data);
        assert!(error.to_string().contains(expected), "{error}");
    }
    split("[\"T_1\"]");
    let train = DatasetConfig {
        split: None,
        train_split: Some("s.json".into()),
        modality: Some("CT".into()),
        ..config
    };
    assert_eq!(train.load_train().unwrap().unwrap().samples[0].id, "T_1");
}

#[test]
fn shards_are_disjoint_complete_and_know_the_whole() {
    let folder = ten();
    let whole =
        DatasetConfig { data: Some(folder.path().into()), limit: Some(9), ..DatasetConfig::default() };
    let mut joined = Vec::new();
    for index in 0..4 {
        let config = DatasetConfig { shard: Some(format!("{index}/4").parse().unwrap()), ..whole.clone() };
        let part = config.load(ImageCheck::Ignore).unwrap();
        assert_eq!(part.population().len(), 9);
        joined.extend(part.samples.into_iter().map(|sample| sample.id));
    }
    // By stride over the sorted ids T_1..T_9.
    assert_eq!(joined[..3], ["T_9", "T_5", "T_1"]);
    joined.sort_unstable();
    let mut expected = ids(&whole);
    expected.sort_unstable();
    assert_eq!(joined, expected);
    for wrong in ["4/4", "0/0", "1", "a/b", "-1/2"] {
        assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
    }
}

#[test]
fn med_r1_split_files_are_detected_and_read() {
    let text = json!([
        {"image": "Images/Chest CT Scan/a (6).png", "problem": "Which? A)Mammogram, B)PET, x, C)CT", "solution": "<answer> C </answer>"},
        {"image": "Images/MIAS/b.png", "problem": "Which? A)x, B)y", "solution": "<answer> A </answer>"},
    ]);
    let folder = root_with(&[
        ("Splits/CT(Computed Tomography)_test.json", text.to_string()),
        ("Images/MIAS/b.png", "x".into()),
    ]);
    let dataset = load(&folder.path().join("Splits")).unwrap();
    assert_eq!(dataset.root, folder.path());
    let first = &dataset.samples[0];
    assert_eq!(
        (first.dataset.as_str(), first.modality.as_str(), first.question_type.as_str()),
        ("Chest CT Scan", "CT", "unknown")
    );
    assert_eq!(
        (first.options.len(), first.answer_text(), first.id.as_str()),
        (3, "CT", "CT(Computed Tomography)_test_000000")
    );
    // A root given beside it wins.
    let config = DatasetConfig {
        omnimedvqa: Some("elsewhere".into()),
        data: Some(folder.path().join("Splits/CT(Computed Tomography)_test.json")),
        ..DatasetConfig::default()
    };
    assert_eq!(config.load(ImageCheck::Ignore).unwrap().root, Path::new("elsewhere"));
    let broken = json!([{"image": "i.png", "problem": "Q A)x, B)y", "solution": "<answer> C </answer>"}, {"problem": "Q", "solution": "x"}]);
    fs::write(folder.path().join("Splits/CT(Computed Tomography)_test.json"), broken.to_string()).unwrap();
    let text = load(&folder.path().join("Splits")).unwrap_err().to_string();
    assert!(
        text.contains("4 problems") && text.contains("`solution` is C, but there are 2 options"),
        "{text}"
    );
}

#[test]
fn what_is_no_data_is_refused_with_what_is_expected() {
    let folder = root_with(&[("x/odd.json", "[{\"prompt\": 1, \"label\": 2}]".into())]);
    for (path, expected) in [
        ("nowhere", "no such data"),
        ("", "no supported data in this folder"),
        ("x", "format not recognised: its first record has the keys [prompt, label]"),
    ] {
        let error = load(&folder.path().join(path)).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Data);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn json_lines_are_read_as_arrays_are_in_every_format() {
    let omni = [record("D_0", "Images/a.png"), record("D_1", "Images/b.png")];
    let med_r1 = [
        json!({"image": "Images/X/b.png", "problem": "Which? A)x, B)y", "solution": "<answer> A </answer>"}),
    ];
    let in_lines =
        |records: &[Value]| records.iter().map(|record| format!("{record}\n")).collect::<Vec<_>>().concat();
    let as_array = |records: &[Value]| json!(records).to_string();
    let read = |layout: &dyn Fn(&[Value]) -> String, end: &str| {
        let folder = root_with(&[
            (&format!("{OPEN}/q.{end}"), layout(&omni)),
            (&format!("QA_information/Restricted-access/r.{end}"), layout(&[json!({}), json!({})])),
            (&format!("splits/CT_test.{end}"), layout(&med_r1)),
        ]);
        let whole = load(folder.path()).unwrap();
        (whole.samples, whole.restricted, load(&folder.path().join("splits")).unwrap().samples)
    };
    let expected = read(&as_array, "json");
    assert_eq!((expected.0.len(), expected.1, expected.2.len()), (2, 2, 1));
    for end in ["json", "jsonl", "JSONL"] {
        assert_eq!(read(&in_lines, end), expected, "{end}");
    }
    assert_eq!(read(&as_array, "jsonl"), expected);
}

#[test]
fn reasonings_are_read_from_columns_and_solutions() {
    let base = record("D_0", "Images/a.png");
    let med_r1 =
        |solution: &str| json!({"image": "i.png", "problem": "Which? A)x, B)y", "solution": solution});
    let spoken = |turn: Value| json!({"image": "i.png", "messages": [{"role": "user", "content": "Which? A)x, B)y"}, turn]});
    let solved =
        |letter: &str| json!(format!("<think> Round: option {letter}. </think><answer> {letter} </answer>"));
    for (records, expected) in [
        (with(base.clone(), &[("cot", json!("Round."))]), Some("Round.")),
        (with(base.clone(), &[("think", json!("<think>Round.</think>"))]), Some("Round.")),
        (with(base.clone(), &[("solution", solved("B"))]), Some("Round: option {answer}.")),
        (with(base.clone(), &[("chain_of_thought", json!("Round."))]), Some("Round.")),
        (with(base.clone(), &[("rationale", json!("Round.")), ("cot", json!("Oval."))]), Some("Oval.")),
        (with(base.clone(), &[("explanation", json!("Round."))]), Some("Round.")),
        (spoken(json!({"role": "assistant", "content": "B", "reasoning_content": "Round."})), Some("Round.")),
        (spoken(json!({"role": "assistant", "content": "B"})), None),
        (with(base.clone(), &[("reasoning", Value::Null), ("cot", json!(" "))]), None),
        // With a gap before the right option its letter in the file is another than here.
        (
            with(
                base.clone(),
                &[("option_B", Value::Null), ("option_C", json!("cyst")), ("solution", json!("C"))],
            ),
            None,
        ),
        (med_r1("<answer> B </answer>"), None),
        (med_r1(solved("B").as_str().unwrap()), Some("Round: option {answer}.")),
        (with(med_r1("<answer> B </answer>"), &[("thinking", json!("Round."))]), Some("Round.")),
    ] {
        let folder = root_with(&[("x.json", json!([records]).to_string())]);
        let dataset = load(&folder.path().join("x.json")).unwrap();
        assert_eq!(
            (dataset.samples[0].reasoning.as_deref(), dataset.samples[0].answer),
            (expected, 1),
            "{records}"
        );
    }
    for (records, words) in [
        (
            with(base.clone(), &[("solution", solved("C"))]),
            "`solution` answers option C, but `gt_answer` is option B",
        ),
        (with(base.clone(), &[("cot", json!(3))]), "`cot` is a number, a text was expected"),
        (with(base, &[("reasoning", json!("so <answer> B"))]), "holds a tag of its own: `<answer>`"),
        (med_r1("<think> x <answer> B </answer>"), "`solution`: `<think>` and `</think>` do not stand"),
    ] {
        let folder = root_with(&[("x.json", json!([records]).to_string())]);
        let error = load(&folder.path().join("x.json")).unwrap_err().to_string();
        assert!(error.contains(words), "{records}: {error}");
    }
}

#[test]
fn omnimedvqa_may_have_as_many_options_as_there_are_letters() {
    let own = [("option_E", json!("five")), ("option_F", json!("six")), ("gt_answer", json!("six"))];
    let records = json!([with(record("D_0", "Images/a.png"), &own)]).to_string();
    let folder = root_with(&[("x.json", records)]);
    let dataset = load(&folder.path().join("x.json")).unwrap();
    assert_eq!((dataset.samples[0].options.len(), dataset.samples[0].answer_letter()), (6, 'F'));
}

#[test]
fn options_in_lines_of_their_own_are_read_in_splits_too() {
    let text = json!([{"image": ["i.png"], "problem": "Which?\nA) x\nB) y", "solution": "B"}]);
    let folder = root_with(&[("x.json", text.to_string())]);
    let sample = load(&folder.path().join("x.json")).unwrap().samples.remove(0);
    assert_eq!(
        (sample.question.as_str(), sample.answer_text(), sample.image.as_path()),
        ("Which?", "y", Path::new("i.png"))
    );
}

/// Where shared data lies, when this machine has any.
fn shared(name: &str) -> Option<PathBuf> {
    Some(crate::files::shared()?.join(name)).filter(|path| path.exists())
}

#[test]
fn blind_priors_of_the_published_splits_are_reproduced() {
    let Some(splits) = shared("data/med_r1_splits") else { return };
    let score = |axis: &str, name: &str| {
        let of = |part| load(&splits.join(axis).join(part).join(format!("{name}_{part}.json"))).unwrap();
        let (train, test) = (of("train"), of("test"));
        let leak = split::leak(&train, &test, None).unwrap().all;
        let stats = stats::describe(&test, Some(&train));
        (
            stats.n,
            (1e4 * stats.option_prior.all.accuracy).round() / 100.0,
            (1e3 * leak.shared_paths as f64 / leak.test_images as f64).round() / 10.0,
        )
    };
    for (name, n, prior, leak) in [
        ("CT(Computed Tomography)", 3241, 99.04, 12.5),
        ("X-Ray", 1615, 93.56, 33.2),
        ("ultrasound", 2074, 77.87, 2.1),
        ("Dermoscopy", 1306, 92.88, 18.2),
        ("Fundus Photography", 1098, 94.63, 9.8),
        ("OCT (Optical Coherence Tomography", 848, 100.0, 30.8),
        ("Microscopy Images", 1110, 96.94, 27.8),
    ] {
        assert_eq!(score("modality", name), (n, prior, leak), "{name}");
    }
    for (name, n, prior) in [
        ("Lesion Grading", 436, 96.1),
        ("Other Biological Attributes", 704, 100.0),
        ("Modality Recognition", 2392, 82.32),
        ("Anatomy Identification", 3329, 76.27),
    ] {
        let (found_n, found, _) = score("question_type", name);
        assert_eq!((found_n, found), (n, prior), "{name}");
    }
    let test = load(&splits.join("modality/test")).unwrap();
    let stats = stats::describe(&test, None);
    assert_eq!(stats.n, 17_662);
    assert_eq!((1e4 * stats.chance).round(), 2698.0);
    assert_eq!(stats.by_modality["MRI"], 6370);
}

#[test]
fn the_mini_set_is_read_whole_and_its_splits_share_no_image() {
    let Some(root) = shared("data/minimed") else { return };
    let config = |split: &str| DatasetConfig {
        omnimedvqa: Some(root.clone()),
        split: Some(split.into()),
        ..DatasetConfig::default()
    };
    let all = DatasetConfig { split: None, ..config("") }.load(ImageCheck::Exist).unwrap();
    assert_eq!(all.samples.len(), 5871);
    let counts: BTreeMap<_, _> = stats::describe(&all, None).by_modality;
    assert_eq!(counts.len(), 8);
    let train = config("splits/train.json").load(ImageCheck::Ignore).unwrap();
    let test = config("splits/test.json").load(ImageCheck::Ignore).unwrap();
    assert_eq!(train.samples.len() + test.samples.len(), 5871);
    assert_eq!(split::leak(&train, &test, None).unwrap().all.shared_paths, 0);
}

fn questions(images: usize, per_image: usize) -> Vec<Sample> {
    let config = |n: usize, q: usize| {
        with(
            record(&format!("{n}_{q}"), &format!("Images/{n}.png")),
            &[("modality_type", json!(if n.is_multiple_of(3) { "CT" } else { "MRI" }))],
        )
    };
    let records: Vec<Value> =
        (0..images).flat_map(|n| (0..per_image).map(move |q| (n, q))).map(|(n, q)| config(n, q)).collect();
    let folder = root_with(&[(&format!("{OPEN}/q.json"), json!(records).to_string())]);
    load(folder.path()).unwrap().samples
}

#[test]
fn splits_keep_images_whole_and_shares_in_every_modality() {
    let samples = questions(300, 2);
    let parts =
        [split::Part::new("train", 0.7), split::Part::new("validation", 0.1), split::Part::new("test", 0.2)];
    let made = split::image_grouped(&samples, &parts, 5).unwrap();
    let sets: Vec<Dataset> = made
        .iter()
        .map(|(_, ids)| {
            Dataset::new("", samples.iter().filter(|sample| ids.contains(&sample.id)).cloned().collect())
        })
        .collect();
    assert_eq!(sets.iter().map(|set| set.samples.len()).collect::<Vec<_>>(), [420, 60, 120]);
    for set in &sets {
        let share = stats::describe(set, None).by_modality["CT"] as f64 / set.samples.len() as f64;
        assert!((share - 1.0 / 3.0).abs() < 0.02, "{share}");
    }
    assert_eq!(split::leak(&sets[0], &sets[2], None).unwrap().all.shared_paths, 0);
    // Order does not matter, the seed does.
    let mut reversed = samples.clone();
    reversed.reverse();
    let sorted = |mut ids: Vec<String>| {
        ids.sort_unstable();
        ids
    };
    let again = split::image_grouped(&reversed, &parts, 5).unwrap();
    assert_eq!(sorted(again[2].1.clone()), sorted(made[2].1.clone()));
    assert_ne!(split::image_grouped(&samples, &parts, 6).unwrap(), made);
    // What is written is read back as a split.
    let folder = tempfile::tempdir().unwrap();
    split::write(folder.path(), &made).unwrap();
    assert_eq!(select::read_split(&folder.path().join("test.json")).unwrap(), made[2].1);
    for wrong in [
        vec![("a", 0.5), ("b", 0.4)],
        vec![("a", 0.5), ("a", 0.5)],
        vec![("a", 1.5), ("b", -0.5)],
        vec![("../a", 1.0)],
    ] {
        let parts: Vec<_> = wrong.iter().map(|(name, share)| split::Part::new(*name, *share)).collect();
        assert!(split::image_grouped(&samples, &parts, 5).is_err(), "{wrong:?}");
    }
}

#[test]
fn leaks_are_found_by_path_and_by_pixels() {
    let samples = questions(4, 1);
    let train = Dataset::new("train", samples[..2].to_vec());
    let test = Dataset::new("test", samples[1..].to_vec());
    // Image 3 of the test set has the pixels of image 0 of the train set.
    let hash = |path: &Path| {
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap().replace('3', "0");
        Ok(*blake3::hash(name.as_bytes()).as_bytes())
    };
    let report = split::leak(&train, &test, Some(&hash)).unwrap();
    assert_eq!(report.all, split::Leak { test_images: 3, shared_paths: 1, shared_pixels: Some(2) });
    assert_eq!(
        report.by_modality["CT"],
        split::Leak { test_images: 1, shared_paths: 0, shared_pixels: Some(1) }
    );
    assert_eq!(split::leak(&train, &test, None).unwrap().all.shared_pixels, None);
}

#[test]
fn statistics_count_and_the_prior_never_uses_the_modality_it_is_asked_for() {
    let mut samples = questions(6, 1);
    for (n, sample) in samples.iter_mut().enumerate() {
        sample.question_type = sample::MODALITY_RECOGNITION.into();
        sample.options = vec!["CT".into(), "MRI".into()];
        sample.answer = n % 2;
        sample.modality = ["CT", "MRI"][n % 2].into();
    }
    let data = Dataset::new("", samples);
    let stats = stats::describe(&data, Some(&data));
    assert_eq!((stats.n, stats.images, stats.chance), (6, 6, 0.5));
    assert_eq!((stats.by_letter["A"], stats.by_num_options[&2]), (3, 6));
    assert_eq!(stats.letter_prior.all.accuracy, 0.5);
    assert_eq!(stats.option_prior.all.accuracy, 0.5);
    assert_eq!(stats.option_prior_within_modality.all.accuracy, 1.0);
    let json = serde_json::to_value(&stats).unwrap();
    assert_eq!((&json["option_prior"]["source"], &json["option_prior"]["n"]), (&json!("train"), &json!(6)));
    assert_eq!(
        serde_json::to_value(stats::describe(&data, None)).unwrap()["option_prior"]["source"],
        "leave_one_out"
    );
}

#[test]
fn the_configuration_refuses_unknown_keys_and_round_trips() {
    let config: DatasetConfig =
        toml::from_str("omnimedvqa = \"x\"\nshard = \"1/4\"\nlimit = 3\nquestion_type = \"Lesion Grading\"")
            .unwrap();
    assert_eq!(config.shard, Some(Shard { index: 1, count: 4 }));
    assert_eq!(toml::from_str::<DatasetConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
    assert!(toml::from_str::<DatasetConfig>("omnimedvqa_root = \"x\"").is_err());
    assert!(toml::from_str::<DatasetConfig>("shard = \"4/4\"").is_err());
}
