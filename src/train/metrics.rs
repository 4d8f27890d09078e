//! Running means of the numbers that a training step reports.
//!
//! Writing them anywhere is left to the recipes.

/// Means by name, in the order in which the names first came.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunningMeans {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    name: String,
    sum: f64,
    weight: f64,
}

impl RunningMeans {
    /// Adds one value with weight 1. A NaN says that there was nothing to measure and is left out.
    pub fn add(&mut self, name: &str, value: f64) {
        self.add_weighted(name, value, 1.0);
    }

    /// Adds the mean `value` of `weight` things, such as a mean over tokens and their number.
    pub fn add_weighted(&mut self, name: &str, value: f64, weight: f64) {
        if value.is_nan() || weight <= 0.0 {
            return;
        }
        match self.entries.iter_mut().find(|entry| entry.name == name) {
            Some(entry) => {
                entry.sum += value * weight;
                entry.weight += weight;
            }
            None => self.entries.push(Entry { name: name.to_owned(), sum: value * weight, weight }),
        }
    }

    /// The mean under `name`, when anything was added.
    pub fn mean(&self, name: &str) -> Option<f64> {
        self.entries.iter().find(|entry| entry.name == name).map(|entry| entry.sum / entry.weight)
    }

    /// All means so far, and starts anew.
    pub fn take(&mut self) -> Vec<(String, f64)> {
        self.entries.drain(..).map(|entry| (entry.name, entry.sum / entry.weight)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_weighted_skip_nan_and_start_anew() {
        let mut means = RunningMeans::default();
        means.add("loss", 1.0);
        means.add_weighted("kl", 2.0, 3.0);
        means.add("loss", f64::NAN);
        means.add("loss", 3.0);
        means.add_weighted("kl", 6.0, 1.0);
        means.add_weighted("empty", 9.0, 0.0);
        assert_eq!(means.mean("loss"), Some(2.0));
        assert_eq!(means.mean("empty"), None);
        assert_eq!(means.take(), [("loss".to_owned(), 2.0), ("kl".to_owned(), 3.0)]);
        assert_eq!(means.take(), []);
    }
}
