//! Several parts at once: who may start, one progress for all.
//!
//! A small model gains little from a second thread inside an operation, so independent parts run side by side, each
//! on one thread. Results do not depend on it: a part computes the same bytes on any number of threads.

use super::progress::Progress;
use crate::backend::with_threads;
use crate::error::{Error, Result};
use std::sync::{Condvar, Mutex, PoisonError};

/// What a part does, telling its own progress.
pub(super) type Work<'a> = Box<dyn Fn(&dyn Progress) -> Result<()> + Sync + 'a>;

/// One part of a larger job.
pub(super) struct Part<'a> {
    /// What it is called in the progress.
    pub(super) name: String,
    /// The part that must be done first, by its place in the list.
    pub(super) after: Option<usize>,
    /// Expected cost, in any unit.
    pub(super) weight: f64,
    /// The work.
    pub(super) work: Work<'a>,
}

struct State {
    started: Vec<bool>,
    done: Vec<bool>,
    share: Vec<f64>,
    total: Vec<usize>,
    figure: Vec<Option<(String, f64)>>,
    pace: Vec<Option<Pace>>,
    failed: Option<Error>,
}

/// How fast a step went: tokens a second, and the seconds of its phases.
#[derive(Debug, Clone, PartialEq)]
struct Pace {
    tokens_per_second: f64,
    phases: Vec<(String, f64)>,
}

impl Pace {
    fn new(tokens_per_second: f64, phases: &[(&str, f64)]) -> Self {
        let phases = phases.iter().map(|(name, seconds)| ((*name).to_owned(), *seconds)).collect();
        Self { tokens_per_second, phases }
    }

    /// That of parts side by side, whose tokens a second add up.
    fn together(parts: &[Option<Self>]) -> Self {
        let mut all = Self::new(0.0, &[]);
        for part in parts.iter().flatten() {
            // A step too short for the clock has no speed that could be added.
            if part.tokens_per_second.is_finite() {
                all.tokens_per_second += part.tokens_per_second;
            }
            for (name, seconds) in &part.phases {
                match all.phases.iter_mut().find(|(known, _)| known == name) {
                    Some((_, sum)) => *sum += seconds,
                    None => all.phases.push((name.clone(), *seconds)),
                }
            }
        }
        all
    }
}

/// Figures as listeners take them.
fn lent(figures: &[(String, f64)]) -> Vec<(&str, f64)> {
    figures.iter().map(|(name, value)| (name.as_str(), *value)).collect()
}

struct Board<'a> {
    parts: &'a [Part<'a>],
    state: Mutex<State>,
    changed: Condvar,
    listener: &'a dyn Progress,
}

/// Steps of the common progress.
const STEPS: usize = 1000;

/// Runs all parts on `workers` threads, earlier ones first.
///
/// # Errors
/// The first failure; parts under way are finished or stopped, none is started after it.
pub(super) fn run_all(parts: &[Part<'_>], workers: usize, listener: &dyn Progress, what: &str) -> Result<()> {
    let count = parts.len();
    let board = Board {
        parts,
        state: Mutex::new(State {
            started: vec![false; count],
            done: vec![false; count],
            share: vec![0.0; count],
            total: vec![1; count],
            figure: vec![None; count],
            pace: vec![None; count],
            failed: None,
        }),
        changed: Condvar::new(),
        listener,
    };
    listener.start(STEPS, 0, what);
    std::thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(|| {
                while let Some(index) = board.next() {
                    let result = with_threads(Some(1), || {
                        (board.parts[index].work)(&Listener { board: &board, index })
                    });
                    board.finish(index, result);
                }
            });
        }
    });
    listener.finish();
    let state = board.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    state.failed.map_or(Ok(()), Err)
}

impl Board<'_> {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next part that may start; waits while one may become ready, none when all are taken.
    fn next(&self) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() || state.started.iter().all(|started| *started) {
                return None;
            }
            let is_ready =
                |i: &usize| !state.started[*i] && self.parts[*i].after.is_none_or(|after| state.done[after]);
            if let Some(index) = (0..self.parts.len()).find(is_ready) {
                state.started[index] = true;
                return Some(index);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, index: usize, result: Result<()>) {
        {
            let mut state = self.lock();
            state.done[index] = true;
            state.share[index] = 1.0;
            state.figure[index] = None;
            state.pace[index] = None;
            if let Err(error) = result {
                state.failed.get_or_insert(error);
            }
        }
        self.changed.notify_all();
        self.show();
    }

    fn show(&self) {
        let (done, figures, pace) = {
            let state = self.lock();
            let total: f64 = self.parts.iter().map(|part| part.weight).sum();
            let done: f64 =
                self.parts.iter().zip(&state.share).map(|(part, share)| part.weight * share).sum();
            let figures: Vec<(String, f64)> = state.figure.iter().flatten().cloned().collect();
            ((STEPS as f64 * done / total) as usize, figures, Pace::together(&state.pace))
        };
        self.listener.pace(pace.tokens_per_second, &lent(&pace.phases));
        self.listener.tick(done, &lent(&figures));
    }
}

/// One part's progress, as a share of the whole.
struct Listener<'a> {
    board: &'a Board<'a>,
    index: usize,
}

impl Progress for Listener<'_> {
    fn start(&self, total: usize, done: usize, _what: &str) {
        let mut state = self.board.lock();
        state.total[self.index] = total.max(1);
        state.share[self.index] = (done as f64 / total.max(1) as f64).min(1.0);
        // It was that of the phase before.
        state.pace[self.index] = None;
    }

    fn tick(&self, done: usize, figures: &[(&str, f64)]) {
        {
            let mut state = self.board.lock();
            state.share[self.index] = (done as f64 / state.total[self.index] as f64).min(1.0);
            let name = &self.board.parts[self.index].name;
            state.figure[self.index] =
                figures.last().map(|(figure, value)| (format!("[{name}] {figure}"), *value));
        }
        self.board.show();
    }

    fn pace(&self, tokens_per_second: f64, phases: &[(&str, f64)]) {
        self.board.lock().pace[self.index] = Some(Pace::new(tokens_per_second, phases));
    }

    fn note(&self, text: &str) {
        self.board.listener.note(&format!("{}: {text}", self.board.parts[self.index].name));
    }

    fn row(&self, cells: &[String]) {
        self.board.listener.row(cells);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    /// Keeps what is said about speed.
    #[derive(Default)]
    struct Paces(Mutex<Vec<Pace>>);

    impl Progress for Paces {
        fn start(&self, _total: usize, _done: usize, _what: &str) {}
        fn tick(&self, _done: usize, _figures: &[(&str, f64)]) {}
        fn pace(&self, tokens_per_second: f64, phases: &[(&str, f64)]) {
            self.0.lock().unwrap().push(Pace::new(tokens_per_second, phases));
        }
        fn note(&self, _text: &str) {}
        fn row(&self, _cells: &[String]) {}
    }

    #[test]
    fn parts_side_by_side_are_as_fast_as_all_of_them_together() {
        let barrier = Barrier::new(2);
        let both = &barrier;
        let part = |name: &str, tokens_per_second: f64, phases: &'static [(&'static str, f64)]| {
            let work: Work<'_> = Box::new(move |progress: &dyn Progress| {
                progress.start(2, 0, "train");
                progress.pace(tokens_per_second, phases);
                // Both are under way when the first of them tells of a step.
                both.wait();
                progress.tick(1, &[]);
                Ok(())
            });
            Part { name: name.to_owned(), after: None, weight: 1.0, work }
        };
        let parts = [
            part("plain", 100.0, &[("update", 1.0)]),
            part("robust", 50.0, &[("attack", 3.0), ("update", 2.0)]),
        ];
        let listener = Paces::default();
        run_all(&parts, 2, &listener, "demo").unwrap();
        let told = listener.0.into_inner().unwrap();
        let together = Pace::new(150.0, &[("update", 3.0), ("attack", 3.0)]);
        assert!(told.contains(&together), "{told:?}");
        // Of what is done nothing is left.
        assert!(told.contains(&Pace::new(0.0, &[])), "{told:?}");
    }

    #[test]
    fn a_step_without_a_speed_leaves_that_of_the_others() {
        let parts = [
            Some(Pace::new(f64::INFINITY, &[("update", 0.0)])),
            None,
            Some(Pace::new(f64::NAN, &[])),
            Some(Pace::new(30.0, &[("update", 0.5)])),
        ];
        assert_eq!(Pace::together(&parts), Pace::new(30.0, &[("update", 0.5)]));
    }
}
