//! The penalty on completions that say the same words again (Yeo et al. 2025, arXiv 2502.03373, appendix C.2).

use std::collections::HashSet;

/// What counts as said again, and what it costs at most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Repetition {
    /// Words that stand together; at least 1.
    pub ngram_size: usize,
    /// Penalty when all but one n-gram are repeats, in the limit; below 0.
    pub max_penalty: f64,
}

impl Repetition {
    /// The penalty, in (`max_penalty`, 0], of a text.
    ///
    /// `max_penalty` x (1 - distinct n-grams / all n-grams), of lower-case words between white space; 0 for a text of
    /// fewer words than one n-gram has.
    pub fn reward(self, text: &str) -> f64 {
        let lower = text.to_lowercase();
        let words: Vec<&str> = lower.split_whitespace().collect();
        // `windows` takes no empty ones.
        let size = self.ngram_size.max(1);
        let all = (words.len() + 1).saturating_sub(size);
        let distinct = words.windows(size).collect::<HashSet<_>>().len();
        // Without the case, no repeat would be worth -0.
        if distinct == all { 0.0 } else { (1.0 - distinct as f64 / all as f64) * self.max_penalty }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_repeated_n_grams_is_punished() {
        let of = |ngram_size, text| Repetition { ngram_size, max_penalty: -1.0 }.reward(text);
        for (ngram_size, text, expected) in [
            // Too short for one n-gram.
            (3, "", 0.0),
            (3, "one two", 0.0),
            (1, " \n\t ", 0.0),
            // No repeat.
            (3, "one two three", 0.0),
            (2, "a b a c a d", 0.0),
            // Four pairs, of which `a b` stands twice: 1 - 3/4.
            (2, "a b c a b", -0.25),
            // Two words alike: 1 - 1/2. Case and white space make no difference.
            (1, "Lung\n LUNG", -0.5),
            // n equal words are n - 1 pairs, all one: 1 - 1/9.
            (2, "no no no no no no no no no no", -8.0 / 9.0),
            // Punctuation belongs to its word.
            (1, "lung lung.", 0.0),
        ] {
            assert!((of(ngram_size, text) - expected).abs() < 1e-15, "{text}: {}", of(ngram_size, text));
            assert!(of(ngram_size, text).is_sign_positive() || expected < 0.0, "-0 for {text}");
        }
    }

    #[test]
    fn the_largest_penalty_scales_it() {
        let half = Repetition { ngram_size: 1, max_penalty: -0.5 };
        assert_eq!(half.reward("x x x x"), -0.375);
    }
}
