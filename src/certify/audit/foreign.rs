//! Audit of Cohen-style TSV files: which (n, alpha) explain every printed radius by a whole count.

use super::{AuditOptions, AuditReport, CANDIDATE_ALPHA, CANDIDATE_N, MAX_PROBLEMS, Pair};
use crate::certify::radius::radius;
use crate::error::{Error, Result};
use crate::stats::{binomial, normal};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;

/// Longest radius in characters: no file prints more, and formatting has limits of its own.
const MOST_DIGITS: usize = 32;

/// How a file prints its radii.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RadiusFormat {
    /// Python's `{:.3}`: three significant digits, trailing zeros dropped, at least one digit after the point.
    General,
    /// A fixed number of decimals.
    Fixed(usize),
}

impl RadiusFormat {
    /// `value` as the file would print it.
    pub fn print(self, value: f64) -> String {
        match self {
            Self::Fixed(decimals) => format!("{value:.decimals$}"),
            Self::General if value == 0.0 => "0.0".to_owned(),
            Self::General => print_general(value),
        }
    }

    /// The distances from `value` down and up to the nearest other printable values.
    fn steps(self, value: f64) -> (f64, f64) {
        match self {
            Self::Fixed(decimals) => (10f64.powi(-(decimals as i32)), 10f64.powi(-(decimals as i32))),
            Self::General => {
                let text = format!("{value:.2e}");
                let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
                let up = 10f64.powi(exponent.parse::<i32>().unwrap_or(0) - 2);
                (if mantissa == "1.00" { up / 10.0 } else { up }, up)
            }
        }
    }
}

/// Three significant digits as Python's float formatting writes them without a presentation type.
fn print_general(value: f64) -> String {
    // Rust's scientific notation rounds exactly, as Python's does.
    let text = format!("{value:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let digits = mantissa.replace('.', "");
    let digits = digits.trim_end_matches('0');
    if (-4..2).contains(&exponent) {
        let decimals = (digits.len() as i32 - 1 - exponent).max(1) as usize;
        // Read back from the rounded digits, so that rounding happens once.
        let rounded: f64 = text.parse().unwrap_or(value);
        return format!("{rounded:.decimals$}");
    }
    let (first, rest) = digits.split_at(1);
    let point = if rest.is_empty() { "" } else { "." };
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{first}{point}{rest}e{sign}{:02}", exponent.abs())
}

/// The counts (all of them, a range) out of `n` draws whose certified radius prints as `text`; none if there is none.
///
/// # Errors
/// `alpha` outside (0, 1), `n = 0`, or `sigma` not a positive finite number.
pub fn counts_printing(
    text: &str,
    format: RadiusFormat,
    n: u64,
    alpha: f64,
    sigma: f64,
) -> Result<Option<RangeInclusive<u64>>> {
    let unanimous = radius(n, n, alpha, sigma)?;
    let Some(value) = text.parse::<f64>().ok().filter(|v| v.is_finite() && *v >= 0.0) else {
        return Ok(None);
    };
    if unanimous.abstain {
        return Ok(None);
    }
    let (down, up) = format.steps(value);
    // Where the count's radius, printed, stands to the text; abstaining counts stand below everything.
    let printed = |count: u64| -> Result<f64> {
        let row = radius(count, n, alpha, sigma)?;
        Ok(if row.abstain { f64::NEG_INFINITY } else { format.print(row.radius).parse().unwrap_or(f64::NAN) })
    };
    // The search by tails lands within rounding of the end; printing settles it.
    let mut first = first_count_reaching((value - 0.5 * down).max(0.0), n, alpha, sigma);
    while first > 1 && printed(first - 1)? >= value {
        first -= 1;
    }
    while first <= n && printed(first)? < value {
        first += 1;
    }
    if first > n || format.print(radius(first, n, alpha, sigma)?.radius) != text {
        return Ok(None);
    }
    let mut last = first_count_reaching(value + 0.5 * up, n, alpha, sigma).clamp(first, n);
    while last > first && printed(last)? > value {
        last -= 1;
    }
    while last < n && printed(last + 1)? <= value {
        last += 1;
    }
    Ok(Some(first..=last))
}

/// The first count whose radius is at least `at_least`, or `n + 1`, by bisection over counts.
fn first_count_reaching(at_least: f64, n: u64, alpha: f64, sigma: f64) -> u64 {
    let p = normal::distribution(at_least / sigma);
    // A count's bound reaches p exactly when that many successes are no more probable than alpha at p.
    let (mut low, mut high) = (0, n + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if binomial::upper_tail(middle, n, p) <= alpha {
            high = middle;
        } else {
            low = middle;
        }
    }
    high
}

/// One row of the file.
struct Row {
    line: usize,
    abstained: bool,
    radius: String,
}

/// Tries every candidate pair on every row.
pub(super) fn audit(text: &str, path: &Path, options: &AuditOptions) -> Result<AuditReport> {
    let sigma = noise_level(path, options.sigma)?;
    let candidates = candidates(options)?;
    let (rows, mut notes) = read(text, path)?;
    let radii: BTreeSet<&str> =
        rows.iter().filter(|row| !row.abstained).map(|row| row.radius.as_str()).collect();
    let formats = formats(&radii);
    let mut problems: Vec<String> = Vec::new();
    if formats.is_empty() && !radii.is_empty() {
        problems.push("the radii follow no known way of printing (`{:.3}` or fixed decimals)".to_owned());
    }
    let bad_abstentions = rows.iter().filter(|r| r.abstained && r.radius.parse() != Ok(0.0)).map(|r| r.line);
    let bad_abstentions: Vec<usize> = bad_abstentions.collect();
    problems.extend(
        bad_abstentions.iter().take(MAX_PROBLEMS).map(|line| format!("line {line}: abstained with a radius")),
    );

    let mut best: Option<(usize, Pair, BTreeSet<&str>)> = None;
    let mut consistent = Vec::new();
    let mut ambiguous = Vec::new();
    for format in &formats {
        for &pair in &candidates {
            let ranges: Vec<(&str, Option<RangeInclusive<u64>>)> = radii
                .par_iter()
                .map(|&radius| Ok((radius, counts_printing(radius, *format, pair.n, pair.alpha, sigma)?)))
                .collect::<Result<_>>()?;
            let failed: BTreeSet<&str> =
                ranges.iter().filter(|(_, range)| range.is_none()).map(|&(r, _)| r).collect();
            let failing_rows =
                rows.iter().filter(|r| !r.abstained && failed.contains(r.radius.as_str())).count();
            let exact = rows.len() - failing_rows - bad_abstentions.len();
            if exact == rows.len() && !consistent.contains(&pair) {
                consistent.push(pair);
                let several =
                    ranges.iter().filter(|(_, r)| r.as_ref().is_some_and(|r| r.start() < r.end())).count();
                ambiguous.push((pair, several));
            }
            if best.as_ref().is_none_or(|(most, ..)| exact > *most) {
                best = Some((exact, pair, failed));
            }
        }
    }
    if radii.is_empty() && bad_abstentions.is_empty() {
        consistent.clone_from(&candidates);
        notes.push("every row abstained: nothing in the file tells one setting from another".to_owned());
    }
    let pass = !consistent.is_empty();
    let exact = if pass { rows.len() } else { best.as_ref().map_or(0, |(exact, ..)| *exact) };
    if let Some((_, pair, failed)) = best.filter(|_| !pass) {
        let at = format!("n = {}, alpha = {}", pair.n, pair.alpha);
        let bad = rows.iter().filter(|r| !r.abstained && failed.contains(r.radius.as_str()));
        problems
            .extend(bad.map(|r| format!("line {}: no whole count prints `{}` at {at}", r.line, r.radius)));
        problems.truncate(MAX_PROBLEMS);
    }
    let smallest_n = consistent.iter().map(|pair| pair.n).min();
    notes.extend(ambiguity(&consistent, &ambiguous, radii.len()));
    Ok(AuditReport {
        rows: rows.len(),
        exact,
        consistent,
        pass,
        smallest_n,
        sigma: Some(sigma),
        problems,
        notes,
    })
}

/// Says what the consistent pairs leave open.
fn ambiguity(consistent: &[Pair], several: &[(Pair, usize)], num_radii: usize) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(smallest) = consistent.iter().map(|pair| pair.n).min() {
        let at_smallest =
            consistent.iter().filter(|pair| pair.n == smallest).map(|pair| pair.alpha.to_string());
        let alphas = at_smallest.collect::<Vec<_>>();
        if consistent.iter().any(|pair| pair.n > smallest) {
            notes.push(format!(
                "n = {smallest} explains the file; larger n that fit too cannot be told apart from it by so few digits"
            ));
        }
        if alphas.len() > 1 {
            notes.push(format!("at n = {smallest} these alpha cannot be told apart: {}", alphas.join(", ")));
        }
    }
    for (pair, count) in several.iter().filter(|(_, count)| *count > 0) {
        notes.push(format!(
            "n = {}, alpha = {}: {count} of {num_radii} different radii are printed by more than one count",
            pair.n, pair.alpha
        ));
    }
    notes
}

/// The pairs to try, smallest n first.
fn candidates(options: &AuditOptions) -> Result<Vec<Pair>> {
    let mut n = if options.n.is_empty() { CANDIDATE_N.to_vec() } else { options.n.clone() };
    n.sort_unstable();
    n.dedup();
    let alpha = if options.alpha.is_empty() { CANDIDATE_ALPHA.to_vec() } else { options.alpha.clone() };
    if n.contains(&0) || alpha.iter().any(|a| !(*a > 0.0 && *a < 1.0)) {
        return Err(Error::usage("an audit needs n of at least 1 and alpha strictly between 0 and 1"));
    }
    Ok(n.iter().flat_map(|&n| alpha.iter().map(move |&alpha| Pair { n, alpha })).collect())
}

/// The noise level: as given, else the number after the last `sigma_` of the path.
fn noise_level(path: &Path, given: Option<f64>) -> Result<f64> {
    let from_path = || {
        let text = path.to_string_lossy();
        let (_, after) = text.rsplit_once("sigma_")?;
        let end = after.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(after.len());
        after[..end].trim_end_matches('.').parse::<f64>().ok()
    };
    match given.or_else(from_path) {
        Some(sigma) if sigma > 0.0 && sigma.is_finite() => Ok(sigma),
        Some(sigma) => Err(Error::usage(format!("sigma must be a positive finite number: {sigma}"))),
        None => Err(Error::usage(format!(
            "the noise level of the file is not known\n  --> {}\n   = help: add `--sigma S`, or name the file `sigma_S`",
            path.display()
        ))),
    }
}

/// The ways of printing that every radius of the file follows.
fn formats(radii: &BTreeSet<&str>) -> Vec<RadiusFormat> {
    let mut formats = vec![RadiusFormat::General];
    let decimals = |text: &str| text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    if let Some(first) = radii.first() {
        formats.push(RadiusFormat::Fixed(decimals(first)));
    }
    formats.retain(|format| {
        radii
            .iter()
            .all(|&text| text.parse::<f64>().is_ok_and(|value| value >= 0.0 && format.print(value) == text))
    });
    formats
}

/// Reads the rows, with remarks on flags that do not fit. Columns are found by their names.
fn read(text: &str, path: &Path) -> Result<(Vec<Row>, Vec<String>)> {
    let bad = |line: usize, what: &str| Error::data(format!("{what}\n  --> {}:{line}", path.display()));
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let (_, header) = lines.next().ok_or_else(|| bad(1, "nothing to audit: the file is empty"))?;
    let names: Vec<&str> = header.split('\t').map(str::trim).collect();
    let column = |name: &str| names.iter().position(|&n| n == name);
    let (Some(label), Some(predict), Some(radius)) = (column("label"), column("predict"), column("radius"))
    else {
        let help =
            "an audit reads our records.jsonl, or tab-separated `idx label predict radius correct time`";
        return Err(bad(1, &format!("no columns `label`, `predict` and `radius`\n   = help: {help}")));
    };
    let (mut rows, mut wrong_flags) = (Vec::new(), 0);
    for (index, line) in lines {
        let fields: Vec<&str> = line.split('\t').map(str::trim).collect();
        let field = |at: usize| fields.get(at).copied().ok_or_else(|| bad(index + 1, "too few columns"));
        let whole = |at: usize| {
            field(at)?
                .parse::<i64>()
                .map_err(|_| bad(index + 1, "`label` and `predict` must be whole numbers"))
        };
        let (label, predict, radius) = (whole(label)?, whole(predict)?, field(radius)?);
        let is_radius = radius.parse::<f64>().is_ok_and(|value| value.is_finite() && value >= 0.0);
        if radius.len() > MOST_DIGITS || !is_radius {
            return Err(bad(index + 1, &format!("not a radius: `{radius}`")));
        }
        if let Some(flag) = column("correct") {
            let correct = predict >= 0 && predict == label;
            wrong_flags += usize::from(field(flag)? != if correct { "1" } else { "0" });
        }
        rows.push(Row { line: index + 1, abstained: predict < 0, radius: radius.to_owned() });
    }
    if rows.is_empty() {
        return Err(bad(1, "nothing to audit: a header without rows"));
    }
    let notes =
        if wrong_flags == 0 { vec![] } else { vec![format!("`correct` is wrong in {wrong_flags} rows")] };
    Ok((rows, notes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    #[test]
    fn general_format_is_pythons() {
        // Left and right: a value and what CPython 3.11 prints for '{:.3}'.
        for (value, text) in [
            (976.0, "9.76e+02"),
            (99.96, "1e+02"),
            (9.995, "9.99"),
            (0.0, "0.0"),
            (1.0, "1.0"),
            (9.76e-5, "9.76e-05"),
            (0.0001, "0.0001"),
            (0.000_123_45, "0.000123"),
            (1234.5, "1.23e+03"),
            (2.5, "2.5"),
            (0.125, "0.125"),
            (0.0125, "0.0125"),
            (0.9996, "1.0"),
            (0.1, "0.1"),
            (10.0, "10.0"),
            (12.34, "12.3"),
            (1e-5, "1e-05"),
        ] {
            assert_eq!(RadiusFormat::General.print(value), text, "{value}");
        }
        assert_eq!(RadiusFormat::Fixed(4).print(0.952_86), "0.9529");
    }

    fn file(
        n: u64,
        alpha: f64,
        sigma: f64,
        format: RadiusFormat,
        counts: impl IntoIterator<Item = u64>,
    ) -> String {
        let mut text = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n".to_owned();
        for (i, count) in counts.into_iter().enumerate() {
            let row = radius(count, n, alpha, sigma).unwrap();
            let (predict, correct) = if row.abstain { (-1, 0) } else { (3, u8::from(i % 2 == 0)) };
            let label = if correct == 1 { 3 } else { 4 };
            writeln!(text, "{i}\t{label}\t{predict}\t{}\t{correct}\t0:00:01.5", format.print(row.radius))
                .unwrap();
        }
        text
    }

    fn audited(text: &str) -> AuditReport {
        audit(text, Path::new("noise_0.50/test/sigma_0.25"), &AuditOptions::default()).unwrap()
    }

    #[test]
    fn the_settings_of_a_file_are_found_unaided() {
        for format in [RadiusFormat::General, RadiusFormat::Fixed(4)] {
            for (n, alpha) in [(100, 0.001), (1000, 0.01), (10_000, 0.05)] {
                let counts = (0..60).map(|i| n - i * n / 240);
                let report = audited(&file(n, alpha, 0.25, format, counts));
                assert!(report.pass && report.exact == 60, "{report:?}");
                assert!(report.consistent.contains(&Pair { n, alpha }), "{report:?}");
                let at_n: Vec<f64> = report.consistent.iter().filter(|p| p.n == n).map(|p| p.alpha).collect();
                assert_eq!((report.smallest_n, at_n), (Some(n), vec![alpha]));
                assert!(report.notes.iter().all(|note| !note.contains("`correct`")));
            }
        }
    }

    #[test]
    fn one_impossible_radius_fails_the_file_and_is_named() {
        let text = file(100, 0.001, 0.25, RadiusFormat::Fixed(4), [100, 99, 98, 10]);
        let options = AuditOptions { n: vec![100], alpha: vec![0.001], sigma: None };
        let audit = |text: &str| audit(text, Path::new("sigma_0.25.tsv"), &options).unwrap();
        assert_eq!(audit(&text).exact, 4);
        let unanimous = RadiusFormat::Fixed(4).print(radius(100, 100, 0.001, 0.25).unwrap().radius);
        let report = audit(&text.replace(&unanimous, "0.3752"));
        assert_eq!((report.rows, report.exact, report.pass), (4, 3, false));
        assert!(report.problems[0].contains("line 2") && report.problems[0].contains("0.3752"), "{report:?}");
        let report = audit(&text.replace("-1\t0.0000", "-1\t0.1000"));
        assert_eq!((report.exact, report.pass), (3, false));
        assert!(report.problems[0].contains("line 5"), "{report:?}");
    }

    #[test]
    fn wrong_flags_are_remarked_and_bad_files_refused() {
        let text = file(100, 0.001, 0.25, RadiusFormat::General, [100, 99]);
        assert!(audited(&text.replace("\t1\t0:", "\t7\t0:")).notes[0].contains("1 rows"));
        let fails =
            |text: &str, path: &str| audit(text, Path::new(path), &AuditOptions::default()).unwrap_err();
        assert!(matches!(fails(&text, "results.tsv"), Error::Usage(_)));
        for bad in [
            "idx\tlabel\tpredict\tcorrect\ttime\n0\t1\t1\t1\t0",
            "label\tpredict\tradius\n",
            "label\tpredict\tradius\n1\t1\tx",
        ] {
            assert!(matches!(fails(bad, "sigma_0.5"), Error::Data(_)), "{bad}");
        }
    }

    /// The published files, where they are at hand.
    fn published(name: &str) -> Option<String> {
        let dir = crate::files::shared()?.join("data/published_certificates");
        std::fs::read_to_string(dir.join(name)).ok()
    }

    #[test]
    fn published_radii_invert_to_the_known_counts() {
        let Some(text) = published("published_radii.tsv") else { return };
        let mut rows = 0;
        for line in text.lines().skip(1) {
            let f: Vec<&str> = line.split('\t').collect();
            let format = if f[4] == "{:.3}" { RadiusFormat::General } else { RadiusFormat::Fixed(4) };
            let number = |at: usize| f[at].parse::<f64>().unwrap();
            let (n, low, high) = (f[1].parse().unwrap(), f[5].parse().unwrap(), f[6].parse().unwrap());
            let found = counts_printing(f[3], format, n, number(2), number(0)).unwrap();
            assert_eq!(found, Some(low..=high), "{line}");
            let ours = radius(low, n, number(2), number(0)).unwrap().radius;
            assert!((ours / number(8) - 1.0).abs() < 1e-10, "{line}: {ours}");
            rows += 1;
        }
        assert_eq!(rows, 733);
    }

    #[test]
    fn published_groups_tell_their_alpha() {
        let Some(text) = published("published_radii.tsv") else { return };
        for (sigma, alpha, format) in [
            ("0.25", "0.01", "{:.3}"),
            ("1.00", "0.01", "{:.3}"),
            ("0.12", "0.001", "{:.3}"),
            ("0.50", "0.001", "{:.4f}"),
        ] {
            let mut file = "label\tpredict\tradius\n".to_owned();
            for f in text.lines().skip(1).map(|line| line.split('\t').collect::<Vec<_>>()) {
                if (f[0], f[2], f[4]) == (sigma, alpha, format) {
                    writeln!(file, "1\t1\t{}", f[3]).unwrap();
                }
            }
            let options =
                AuditOptions { n: vec![100_000], alpha: vec![], sigma: Some(sigma.parse().unwrap()) };
            let report = audit(&file, Path::new("f"), &options).unwrap();
            let alpha = alpha.parse().unwrap();
            assert_eq!(report.consistent, [Pair { n: 100_000, alpha }], "sigma {sigma} {format}");
        }
    }
}
