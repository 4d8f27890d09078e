//! A report: what it says (`ReportData`), as tables in Markdown and as one self-contained HTML page with plots.
//!
//! Whoever has numbers fills in a `ReportData`; nothing here reads a run, computes a statistic or touches the network.

mod html;
mod markdown;
mod plot;

pub use html::to_html;
pub use markdown::to_markdown;

/// The sentence that stands on every report.
pub const DISCLAIMER: &str = "Research software. Not a medical device, not for clinical use.";

/// Everything a report shows, in the order it shows it.
#[derive(Debug, Clone, Default)]
pub struct ReportData {
    /// Heading.
    pub title: String,
    /// One line below it: what was compared, on how many items.
    pub subtitle: String,
    /// A few figures in large type.
    pub headlines: Vec<Headline>,
    /// What a reader must know to read the numbers rightly.
    pub notes: Vec<String>,
    /// Tables.
    pub tables: Vec<Table>,
    /// Plots.
    pub figures: Vec<Figure>,
    /// Single items with pictures and answers.
    pub cards: Vec<Card>,
    /// Tables for a closer look, after everything else.
    pub details: Vec<Table>,
    /// Where the numbers come from: names and values, folded away at the end.
    pub provenance: Vec<(String, String)>,
}

/// A figure in large type.
#[derive(Debug, Clone, Default)]
pub struct Headline {
    /// The figure, as text.
    pub value: String,
    /// What it is.
    pub label: String,
    /// What it is to be compared with.
    pub detail: String,
}

/// A table.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// How to read it.
    pub caption: String,
    /// Names of the columns; the first names the rows.
    pub head: Vec<String>,
    /// Rows, as long as the head.
    pub rows: Vec<Vec<Cell>>,
}

/// One cell.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// Words, on the left.
    Text(String),
    /// A number as text, on the right.
    Number(String),
    /// A share in [0, 1], shown in per cent over a bar, with its 95 % interval.
    Share(f64, Option<[f64; 2]>),
    /// Not measured.
    Missing,
}

/// A plot of one or more curves.
#[derive(Debug, Clone, Default)]
pub struct Figure {
    /// Heading.
    pub title: String,
    /// How to read it.
    pub caption: String,
    /// Name and unit of the horizontal axis.
    pub x_label: String,
    /// Name and unit of the vertical axis.
    pub y_label: String,
    /// Ends of the vertical axis; absent: those of the data.
    pub y_range: Option<[f64; 2]>,
    /// How points are joined.
    pub shape: Shape,
    /// The curves; a name has the same colour in all plots of a report.
    pub series: Vec<Series>,
}

/// How the points of a plot are joined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Shape {
    /// By straight lines, points marked.
    #[default]
    Line,
    /// Each value holds from the point before up to its own: the share of items with at least this radius.
    Steps,
    /// Every point faint, a moving mean drawn through.
    Noisy,
}

/// One curve.
#[derive(Debug, Clone, Default)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Its points by rising `x`.
    pub points: Vec<Point>,
}

/// One point of a curve.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Point {
    /// Horizontal.
    pub x: f64,
    /// Vertical.
    pub y: f64,
    /// Interval of `y`, shown as a band.
    pub interval: Option<[f64; 2]>,
}

/// One item: pictures, question, and what was answered.
#[derive(Debug, Clone, Default)]
pub struct Card {
    /// The question.
    pub question: String,
    /// Modality, question type, id.
    pub detail: String,
    /// Texts of the options in order.
    pub options: Vec<String>,
    /// Index of the right one.
    pub answer: Option<usize>,
    /// Pictures side by side.
    pub pictures: Vec<Picture>,
    /// Answers side by side.
    pub answers: Vec<Answer>,
}

/// A picture of a card.
#[derive(Debug, Clone, Default)]
pub struct Picture {
    /// What it shows.
    pub caption: String,
    /// The PNG file.
    pub png: Vec<u8>,
}

/// An answer of a card.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Whose, and to which picture.
    pub label: String,
    /// The letter read from it, or "none".
    pub prediction: String,
    /// Whether it is right.
    pub correct: bool,
    /// The model's own words.
    pub completion: String,
}

impl ReportData {
    /// Leaves all pictures out.
    #[must_use]
    pub fn without_pictures(mut self) -> Self {
        for card in &mut self.cards {
            card.pictures.clear();
        }
        self
    }

    /// Names of all curves in order of appearance: each has one colour throughout.
    fn series_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for series in self.figures.iter().flat_map(|figure| &figure.series) {
            if !names.contains(&series.name.as_str()) {
                names.push(&series.name);
            }
        }
        names
    }
}

/// A share in per cent with one decimal: `93.1`.
pub fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

#[cfg(test)]
mod tests;
