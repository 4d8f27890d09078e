use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use statrs::distribution::{ChiSquared, ContinuousCDF};

use super::scene::Scene;
use super::*;
use crate::data::{Dataset, DatasetConfig, ImageCheck, Sample, sample, stats};
use crate::rng;

fn small(seed: u64) -> PhantomConfig {
    PhantomConfig { seed, size: 16, train: 330, validation: 165, test: 320, ..PhantomConfig::default() }
}

fn make(config: &PhantomConfig) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    generate(config, folder.path(), &mut |_, _| {}).unwrap();
    folder
}

fn split_of(folder: &tempfile::TempDir, name: &str) -> Dataset {
    let config = DatasetConfig {
        omnimedvqa: Some(folder.path().into()),
        split: Some(format!("splits/{name}.json").into()),
        ..DatasetConfig::default()
    };
    config.load(ImageCheck::Exist).unwrap()
}

fn bytes_under(folder: &std::path::Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path.strip_prefix(folder).unwrap().to_path_buf(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// The probability that independence gives a table at least as uneven as this one (Pearson's chi-square).
fn independence(pairs: impl Iterator<Item = (String, String)>) -> f64 {
    let (mut cells, mut rows, mut columns) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut n = 0.0;
    for (row, column) in pairs {
        *cells.entry((row.clone(), column.clone())).or_insert(0.0) += 1.0;
        *rows.entry(row).or_insert(0.0) += 1.0;
        *columns.entry(column).or_insert(0.0) += 1.0;
        n += 1.0;
    }
    let mut statistic = 0.0;
    for (row, row_total) in &rows {
        for (column, column_total) in &columns {
            let expected: f64 = row_total * column_total / n;
            let found = cells.get(&(row.clone(), column.clone())).copied().unwrap_or(0.0);
            statistic += (found - expected).powi(2) / expected;
        }
    }
    let freedom = ((rows.len() - 1) * (columns.len() - 1)).max(1) as f64;
    1.0 - ChiSquared::new(freedom).unwrap().cdf(statistic)
}

#[test]
fn the_layout_is_omnimedvqas_and_our_reader_takes_it() {
    let folder = make(&small(1));
    let (train, validation, test) =
        (split_of(&folder, "train"), split_of(&folder, "validation"), split_of(&folder, "test"));
    assert_eq!((train.samples.len(), validation.samples.len(), test.samples.len()), (330, 165, 320));
    for set in [&train, &test] {
        let stats = stats::describe(set, None);
        assert_eq!(
            stats.by_modality.keys().map(String::as_str).collect::<std::collections::BTreeSet<_>>(),
            MODALITIES.into()
        );
        assert_eq!(
            stats.by_question_type.values().copied().collect::<std::collections::BTreeSet<_>>().len(),
            1
        );
        assert_eq!(stats.by_num_options, BTreeMap::from([(4, stats.n)]));
        assert!(stats.images < stats.n, "some images answer two questions");
    }
    for sample in &test.samples {
        assert!(sample.question.split_whitespace().count() <= 8);
        assert!(sample.options.iter().all(|option| option.split_whitespace().count() == 1));
        assert_eq!(sample.caption(), format!("scan {}; finding {}", sample.modality, sample.answer_text()));
        assert_eq!(sample.reasoning_text(), format!("{} {}", sample.caption(), sample.answer_letter()));
    }
    let image = image::open(test.image_path(&test.samples[0])).unwrap();
    assert_eq!((image.width(), image.height(), image.color()), (16, 16, image::ColorType::Rgb8));
}

#[test]
fn no_image_is_in_two_splits_neither_by_path_nor_by_pixels() {
    let folder = make(&small(2));
    let hash =
        |path: &std::path::Path| Ok(*blake3::hash(image::open(path).unwrap().to_rgb8().as_raw()).as_bytes());
    let names = ["train", "validation", "test"].map(|name| split_of(&folder, name));
    for (first, second) in [(0, 1), (0, 2), (1, 2)] {
        let leak = split::leak(&names[first], &names[second], Some(&hash)).unwrap().all;
        assert_eq!((leak.shared_paths, leak.shared_pixels), (0, Some(0)));
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
    let on = |threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        bytes_under(pool.install(|| make(&small(seed))).path())
    };
    let first = on(1, 5);
    assert_eq!(first, on(3, 5));
    let other = on(2, 6);
    assert_eq!(first.keys().next(), other.keys().next());
    let same = first.iter().filter(|(name, bytes)| other.get(*name) == Some(bytes)).count();
    assert!(same < 5, "{same} files are the same under another seed");
}

#[test]
fn values_meet_letters_equally_often_in_every_split_of_full_rounds() {
    let folder = make(&PhantomConfig { train: 480, validation: 160, test: 320, ..small(7) });
    for name in ["train", "validation", "test"] {
        let mut counts: BTreeMap<(String, String, char), usize> = BTreeMap::new();
        let set = split_of(&folder, name);
        for sample in &set.samples {
            let key = (sample.question_type.clone(), sample.answer_text().to_owned(), sample.answer_letter());
            *counts.entry(key).or_default() += 1;
        }
        assert_eq!(counts.len(), 4 * 16 + 32);
        for ((kind, value, letter), count) in counts {
            let values = if kind == sample::MODALITY_RECOGNITION { 8 } else { 4 };
            assert_eq!(count, set.samples.len() / 5 / values / 4, "{name}: {value} {letter}");
        }
    }
    // A split of broken rounds still has even letters.
    let stats = stats::describe(&split_of(&make(&small(7)), "train"), None);
    let (low, high) = (stats.by_letter.values().min().unwrap(), stats.by_letter.values().max().unwrap());
    assert!(high - low <= 5, "{low} to {high}");
}

/// Something about a question that can be seen without its image, by name.
type Feature<'a> = (&'a str, Box<dyn Fn(&Sample) -> String + 'a>);

/// The proof of blindness: no rule that looks at everything but the image does better than guessing.
#[test]
fn whoever_does_not_look_guesses() {
    let folder = make(&PhantomConfig { train: 3200, test: 1600, ..small(11) });
    let (train, test) = (split_of(&folder, "train"), split_of(&folder, "test"));
    let described = stats::describe(&test, Some(&train));
    assert_eq!(described.chance, 0.25);
    let margin = 3.0 * (0.25 * 0.75 / 1600.0f64).sqrt();
    for blind in [&described.letter_prior, &described.option_prior] {
        assert!((blind.all.accuracy - 0.25).abs() < margin, "{blind:?}");
        for score in blind.by_question_type.values() {
            assert!((score.accuracy - 0.25).abs() < margin * 5f64.sqrt(), "{blind:?}");
        }
    }
    let both = || train.samples.iter().chain(&test.samples);
    let letter = |sample: &Sample| sample.answer_letter().to_string();
    let number = |sample: &Sample| sample.id[8..].parse::<usize>().unwrap();
    let image =
        |sample: &Sample| sample.image.file_stem().unwrap().to_str().unwrap().parse::<usize>().unwrap();
    let features: [Feature<'_>; 7] = [
        ("question", Box::new(|sample| sample.question.clone())),
        ("modality", Box::new(|sample| sample.modality.clone())),
        ("id", Box::new(move |sample| (number(sample) % 10).to_string())),
        ("id by tens", Box::new(move |sample| (number(sample) / 480).to_string())),
        ("file name", Box::new(move |sample| (image(sample) % 10).to_string())),
        ("first option", Box::new(|sample| sample.options[0].clone())),
        ("last option", Box::new(|sample| sample.options[3].clone())),
    ];
    for (name, feature) in &features {
        let p = independence(both().map(|sample| (feature(sample), letter(sample))));
        assert!(p > 1e-3, "{name} tells the letter: p = {p}");
    }
    for kind in sample::QUESTION_TYPES {
        let of_kind = || both().filter(|sample| sample.question_type == kind);
        // Which value is right: from the number of the file, from the id, and but for modality itself from it.
        for (name, feature) in &features[1..5] {
            if *name == "modality" && kind == sample::MODALITY_RECOGNITION {
                continue;
            }
            let p = independence(of_kind().map(|sample| (feature(sample), sample.answer_text().to_owned())));
            assert!(p > 1e-3, "{name} tells the answer of {kind}: p = {p}");
        }
        // Whether an option is right: from its text, from its place, and from both.
        let options = || of_kind().flat_map(|sample| (0..4).map(move |place| (sample, place)));
        let right = |sample: &Sample, place: usize| (sample.answer == place).to_string();
        let text = |sample: &Sample, place: usize| sample.options[place].clone();
        let p = independence(options().map(|(sample, place)| (text(sample, place), right(sample, place))));
        assert!(p > 1e-3, "an option's text tells that it is right in {kind}: p = {p}");
        let p = independence(
            options()
                .map(|(sample, place)| (format!("{}{place}", text(sample, place)), right(sample, place))),
        );
        assert!(p > 1e-3, "text and place tell what is right in {kind}: p = {p}");
    }
    // The letter before says nothing about the next.
    let p = independence(both().zip(both().skip(1)).map(|(before, after)| (letter(before), letter(after))));
    assert!(p > 1e-3, "the order tells the letter: p = {p}");
}

/// Connected regions of lesion as (pixels, mean x, mean y, whether it has a hole), largest first.
fn regions(scene: &Scene) -> Vec<(usize, f32, f32, bool)> {
    let size = 64;
    let mask = scene.mask(size);
    let inside: Vec<bool> = mask.values.iter().map(|value| *value > 0.5).collect();
    let flood = |start: usize, seen: &mut Vec<bool>, wanted: bool| {
        let (mut stack, mut pixels) = (vec![start], Vec::new());
        seen[start] = true;
        while let Some(at) = stack.pop() {
            pixels.push(at);
            let (x, y) = (at % size, at / size);
            let near = [
                (x > 0, at.wrapping_sub(1)),
                (x + 1 < size, at + 1),
                (y > 0, at.wrapping_sub(size)),
                (y + 1 < size, at + size),
            ];
            for (exists, next) in near {
                if exists && !seen[next] && inside[next] == wanted {
                    seen[next] = true;
                    stack.push(next);
                }
            }
        }
        pixels
    };
    let mut seen = vec![false; size * size];
    let mut outside = vec![false; size * size];
    flood(0, &mut outside, false);
    let mut found = Vec::new();
    for start in 0..size * size {
        if inside[start] && !seen[start] {
            let pixels = flood(start, &mut seen, true);
            let mean = |of: fn(usize) -> usize| {
                pixels.iter().map(|&at| of(at) as f32).sum::<f32>() / pixels.len() as f32
            };
            let (x, y) = (mean(|at| at % 64), mean(|at| at / 64));
            let middle = y.round() as usize * size + x.round() as usize;
            found.push((pixels.len(), x, y, !inside[middle] && !outside[middle]));
        }
    }
    found.sort_by_key(|region| std::cmp::Reverse(region.0));
    found
}

#[test]
fn what_the_answer_says_is_what_is_drawn() {
    for seed in 0..40 {
        let mut stream = rng::stream(seed, "test", &[]);
        for value in 0..4 {
            let place = regions(&Scene::showing(1, value, &mut stream));
            assert_eq!(place.len(), 1);
            assert_eq!((place[0].1 > 32.0, place[0].2 > 32.0), (value % 2 == 1, value / 2 == 1));
            let shape = regions(&Scene::showing(2, value, &mut stream));
            assert_eq!((shape.len(), shape[0].3), (1, value == 2), "only the ring has a hole");
            let size = regions(&Scene::showing(3, value, &mut stream));
            let expected = [0..1, 30..55, 125..185, 330..500][value].clone();
            assert!(expected.contains(&size.first().map_or(0, |region| region.0)), "{value}: {size:?}");
            assert_eq!(regions(&Scene::showing(4, value, &mut stream)).len(), value + 1);
        }
    }
}

#[test]
fn lesions_stand_out_in_every_modality_and_quadrant() {
    for (modality, name) in MODALITIES.iter().enumerate() {
        for quadrant in 0..4 {
            let scene = Scene::showing(1, quadrant, &mut rng::stream(9, "test", &[quadrant as u64]));
            let draw = |contrast| {
                modality::render(
                    modality,
                    &scene,
                    64,
                    contrast,
                    &mut rng::stream(3, "test", &[modality as u64]),
                )
            };
            let (with, without, mask) = (draw(1.5), draw(1e-6), scene.mask(64));
            let (mut sum, mut n) = (0.0, 0.0);
            for (at, cover) in mask.values.iter().enumerate() {
                let difference: f32 = (0..3)
                    .map(|c| (f32::from(with[3 * at + c]) - f32::from(without[3 * at + c])).abs())
                    .sum();
                if *cover > 0.9 {
                    sum += difference / 765.0;
                    n += 1.0;
                } else if *cover == 0.0 {
                    assert_eq!(difference, 0.0, "nothing but the lesion may depend on the contrast");
                }
            }
            assert!(sum / n > 0.12, "{name} quadrant {quadrant}: {}", sum / n);
        }
    }
}

#[test]
fn an_unfinished_folder_is_completed_a_finished_one_kept_and_any_other_refused() {
    let config = small(4);
    let folder = make(&config);
    let whole = bytes_under(folder.path());
    fs::remove_file(folder.path().join("QA_information/Open-access/Phantom.json")).unwrap();
    fs::write(folder.path().join("Images/Phantom/000003.png"), "torn").unwrap();
    generate(&config, folder.path(), &mut |_, _| {}).unwrap();
    assert_eq!(bytes_under(folder.path()), whole);
    let mut calls = 0;
    generate(&config, folder.path(), &mut |_, _| calls += 1).unwrap();
    assert_eq!(calls, 0);
    let status = |config: &PhantomConfig, out: &std::path::Path| {
        generate(config, out, &mut |_, _| {}).unwrap_err().status()
    };
    assert_eq!(status(&small(5), folder.path()), crate::error::ExitStatus::Usage);
    let foreign = tempfile::tempdir().unwrap();
    fs::write(foreign.path().join("thesis.txt"), "x").unwrap();
    assert_eq!(status(&config, foreign.path()), crate::error::ExitStatus::Usage);
    let mut last = (0, 0);
    generate(&config, &foreign.path().join("new/deep"), &mut |done, total| last = (done, total)).unwrap();
    assert!(last.0 == last.1 && last.1 > 600, "{last:?}");
}

#[test]
fn values_out_of_range_are_named_and_a_multiple_is_proposed() {
    let keys =
        |config: PhantomConfig| config.check().into_iter().map(|problem| problem.key).collect::<Vec<_>>();
    assert!(keys(PhantomConfig::default()).is_empty());
    let bad = PhantomConfig { size: 8, contrast: f32::NAN, test: 200, ..PhantomConfig::default() };
    assert_eq!(keys(bad.clone()), ["size", "contrast", "test"]);
    assert!(bad.check()[2].to_string().contains("use 160 or 320"));
    assert_eq!(
        keys(PhantomConfig { train: 0, validation: 0, test: 0, ..PhantomConfig::default() }),
        ["train"]
    );
    // Even the tiniest split is complete.
    for count in 1..12 {
        let questions: usize =
            plan::pictures(1, 0, count).iter().map(|picture| picture.questions.len()).sum();
        assert_eq!(questions, count);
    }
}

#[test]
fn the_contact_sheet_shows_every_modality_in_a_row() {
    let sheet =
        image::load_from_memory(&contact_sheet(&PhantomConfig::default()).unwrap()).unwrap().to_rgb8();
    assert_eq!(sheet.dimensions(), (16 * 64, 8 * 64));
    let row_means: Vec<f64> = (0..8)
        .map(|row| {
            (row * 64..row * 64 + 64)
                .flat_map(|y| (0..1024).map(move |x| (x, y)))
                .map(|(x, y)| f64::from(sheet.get_pixel(x, y)[0]))
                .sum()
        })
        .collect();
    assert!((1..8).all(|row| (row_means[row] - row_means[row - 1]).abs() > 1e4), "{row_means:?}");
    assert!(contact_sheet(&PhantomConfig { size: 1, ..PhantomConfig::default() }).is_err());
}
