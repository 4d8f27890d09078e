//! Which questions are asked about which pictures, and why nobody can guess them.

use rand::Rng;
use rand::seq::SliceRandom;

use super::scene::Scene;
use crate::data::sample::{MODALITIES, QUESTION_TYPES};
use crate::rng::{self, Stream};

/// The least number of questions in which all is exactly balanced: 5 types x 8 values x 4 letters.
pub const TEST_MULTIPLE: usize = 160;

const LETTERS: usize = 4;

/// Which quadrant a lesion lies in.
const QUADRANTS: [&str; 4] = ["upper-left", "upper-right", "lower-left", "lower-right"];
/// What a lesion's shape stands for: round, long, ring, star.
const DISEASES: [&str; 4] = ["nodule", "plaque", "abscess", "carcinoma"];
const GRADES: [&str; 4] = ["none", "small", "medium", "large"];
const COUNTS: [&str; 4] = ["one", "two", "three", "four"];

/// The words a question of type `kind_index` (the order of [`QUESTION_TYPES`]) can have as its answer.
pub fn values(kind_index: usize) -> &'static [&'static str] {
    match kind_index {
        0 => &MODALITIES,
        1 => &QUADRANTS,
        2 => &DISEASES,
        3 => &GRADES,
        _ => &COUNTS,
    }
}

/// How a question of type `kind_index` reads: always the same, so that its words tell nothing.
pub fn question_text(kind_index: usize) -> &'static str {
    match kind_index {
        0 => "Which imaging modality is shown?",
        1 => "Where is the lesion in this image?",
        2 => "Which disease does the lesion show?",
        3 => "What size is the lesion here?",
        _ => "How many lesions are visible?",
    }
}

/// One question with its four options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) kind_index: usize,
    pub(super) options: [&'static str; LETTERS],
    pub(super) answer: usize,
}

impl Question {
    pub(super) fn kind(&self) -> &'static str {
        QUESTION_TYPES[self.kind_index]
    }
}

/// One image to draw, with the one or two questions it answers.
#[derive(Debug, Clone)]
pub(super) struct Picture {
    /// Index into [`MODALITIES`].
    pub(super) modality: usize,
    pub(super) scene: Scene,
    pub(super) questions: Vec<Question>,
    /// What names its random numbers.
    key: (u64, [u64; 2]),
}

impl Picture {
    /// The random numbers of its texture.
    pub(super) fn stream(&self) -> Stream {
        rng::stream(self.key.0, "phantom_texture", &self.key.1)
    }

    /// A picture that shows value `value` of question type `kind_index` (1 to 4) in a given modality.
    pub(super) fn example(seed: u64, modality: usize, kind_index: usize, value: usize) -> Self {
        let key = (seed, [u64::MAX, (modality * 16 + kind_index * 4 + value) as u64]);
        let mut stream = rng::stream(seed, "phantom_example", &key.1);
        Self { modality, scene: Scene::showing(kind_index, value, &mut stream), questions: Vec::new(), key }
    }
}

/// The pictures of one split that answer `count` questions, in random order.
///
/// Each question but those for the modality has a picture of its own; a question for the modality joins one of
/// them, so one picture in four answers two questions.
pub(super) fn pictures(seed: u64, split: u64, count: usize) -> Vec<Picture> {
    let mut stream = rng::stream(seed, "phantom_plan", &[split]);
    let of_kind = |kind: usize| (count + 4 - kind) / 5;
    let mut pictures: Vec<Picture> = Vec::new();
    for kind in 1..5 {
        for (value, question) in questions(kind, of_kind(kind), &mut stream) {
            let scene = Scene::showing(kind, value, &mut stream);
            pictures.push(Picture { modality: 0, scene, questions: vec![question], key: (seed, [split, 0]) });
        }
    }
    pictures.shuffle(&mut stream);
    let about_modality = questions(0, of_kind(0), &mut stream);
    // Too few pictures for the modality questions occur only in the tiniest splits: those get pictures of their own.
    while pictures.len() < about_modality.len() {
        let scene = Scene::showing(1, stream.random_range(0..4), &mut stream);
        pictures.push(Picture { modality: 0, scene, questions: Vec::new(), key: (seed, [split, 0]) });
    }
    let asked = about_modality.len();
    for (picture, (value, question)) in pictures.iter_mut().zip(about_modality) {
        picture.modality = value;
        picture.questions.push(question);
    }
    let mut others: Vec<usize> = (0..pictures.len() - asked).map(|index| index % MODALITIES.len()).collect();
    others.shuffle(&mut stream);
    for (picture, modality) in pictures[asked..].iter_mut().zip(others) {
        picture.modality = modality;
    }
    pictures.shuffle(&mut stream);
    for (index, picture) in pictures.iter_mut().enumerate() {
        picture.key.1[1] = index as u64;
    }
    pictures
}

/// `count` questions of one type with the index of their value. Values go round; the letter moves on by one with
/// each round, so that any 4 in a row have all letters and every value meets every letter equally often.
fn questions(kind_index: usize, count: usize, stream: &mut Stream) -> Vec<(usize, Question)> {
    let words = values(kind_index);
    (0..count)
        .map(|number| {
            let (value, round) = (number % words.len(), number / words.len());
            let answer = (value + round) % LETTERS;
            let mut others: Vec<&'static str> =
                words.iter().copied().filter(|word| *word != words[value]).collect();
            others.shuffle(stream);
            others.truncate(LETTERS - 1);
            others.insert(answer, words[value]);
            let mut options = [""; LETTERS];
            options.copy_from_slice(&others);
            (value, Question { kind_index, options, answer })
        })
        .collect()
}
