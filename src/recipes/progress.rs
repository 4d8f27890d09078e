//! How a recipe says how far it is. Recipes never print: whoever calls them decides what becomes of these calls.

use std::sync::Mutex;

/// A listener for the progress of one run. All methods take `&self`, so that closures deep in a recipe can report.
pub trait Progress: Sync {
    /// A phase of `total` items or steps begins, of which `done` were done before.
    fn start(&self, total: usize, done: usize, what: &str);

    /// The transfer of a file of `total` bytes begins, a phase whose unit is bytes; `done` are there already.
    fn start_transfer(&self, file: &str, total: u64, done: u64) {
        self.start(total as usize, done as usize, file);
    }

    /// `done` of the phase are done; `figures` are running numbers such as `("accuracy", 0.93)`.
    fn tick(&self, done: usize, figures: &[(&str, f64)]);

    /// How fast the step that a tick is about to tell of went: tokens a second (0 where none are counted), and the seconds of its
    /// phases.
    fn pace(&self, _tokens_per_second: f64, _phases: &[(&str, f64)]) {}

    /// The phase is over.
    fn finish(&self) {}

    /// Something a reader should know: items skipped, a control that is not at chance.
    fn note(&self, text: &str);

    /// One row of the result table, as soon as it is known. The first row of a table is its head.
    fn row(&self, cells: &[String]);
}

/// Listens to nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _total: usize, _done: usize, _what: &str) {}
    fn tick(&self, _done: usize, _figures: &[(&str, f64)]) {}
    fn note(&self, _text: &str) {}
    fn row(&self, _cells: &[String]) {}
}

/// Keeps notes and rows, for tests and for callers that show them later.
#[derive(Debug, Default)]
pub struct Kept {
    /// Notes in order.
    pub notes: Mutex<Vec<String>>,
    /// Rows in order.
    pub rows: Mutex<Vec<Vec<String>>>,
}

impl Progress for Kept {
    fn start(&self, _total: usize, _done: usize, _what: &str) {}
    fn tick(&self, _done: usize, _figures: &[(&str, f64)]) {}
    fn note(&self, text: &str) {
        self.notes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(text.to_owned());
    }
    fn row(&self, cells: &[String]) {
        self.rows.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(cells.to_vec());
    }
}
