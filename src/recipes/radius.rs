//! `safemed radius`: counts to radii, one or a table of them, without a model.

use super::config::keys::parse_number;
use super::job::Outcome;
use crate::certify::{RadiusRow, radius};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::BufRead;

/// Digits after the first in a printed number: 15 significant ones in all.
const DECIMALS: usize = 14;

/// The radius of one count.
///
/// # Errors
/// A usage error for `n = 0`, a count above `n`, `alpha` outside (0, 1) or `sigma` not positive.
pub fn one(count: u64, n: u64, alpha: f64, sigma: f64) -> Result<Outcome> {
    let row = radius(count, n, alpha, sigma)?;
    let text = format!(
        "p_lower  {}\nradius   {}{}\n",
        digits(row.p_lower),
        digits(row.radius),
        if row.abstain { "  (abstains: the bound is below one half)" } else { "" }
    );
    Ok(Outcome::new(summary(row, json!({"count": count, "n": n, "alpha": alpha, "sigma": sigma})), text))
}

/// The radii of rows `count n alpha sigma`, tab-separated and without a head, as rows `p_lower abstain radius`.
///
/// # Errors
/// A data error with the line for a row that is none, or whose numbers are out of range.
pub fn table(input: impl BufRead) -> Result<Outcome> {
    let (mut text, mut rows) = (String::new(), Vec::new());
    for (index, line) in input.lines().enumerate() {
        let at = |what: String| Error::data(format!("{what}\n  --> standard input, line {}", index + 1));
        let line = line.map_err(|error| at(format!("cannot read the row: {error}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let (count, n, alpha, sigma) = row_of(&line).ok_or_else(|| {
            at(format!(
                "`{}` is no row of four tab-separated numbers `count n alpha sigma`",
                line.trim_end().escape_debug()
            ))
        })?;
        let row = radius(count, n, alpha, sigma).map_err(|error| at(error.to_string()))?;
        let _ = writeln!(text, "{}\t{}\t{}", digits(row.p_lower), u8::from(row.abstain), digits(row.radius));
        rows.push(summary(row, json!({})));
    }
    Ok(Outcome::new(json!({"command": "radius", "n": rows.len(), "rows": rows}), text))
}

fn row_of(line: &str) -> Option<(u64, u64, f64, f64)> {
    let cells: Vec<&str> = line.split('\t').map(str::trim).collect();
    let &[count, n, alpha, sigma] = cells.as_slice() else { return None };
    Some((count.parse().ok()?, n.parse().ok()?, parse_number(alpha)?, parse_number(sigma)?))
}

fn summary(row: RadiusRow, mut given: Value) -> Value {
    given["p_lower"] = json!(row.p_lower);
    given["abstain"] = json!(row.abstain);
    given["radius"] = json!(row.radius);
    given
}

/// A number with 15 significant digits, in scientific notation where it is very small or large; zero is `0`.
fn digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{value:.DECIMALS$e}");
    // The exponent after rounding: 0.99999… may have become 1.
    let exponent = scientific.split_once('e').and_then(|(_, exponent)| exponent.parse::<i32>().ok());
    match exponent {
        Some(exponent @ -4..=14) => format!("{value:.*}", (DECIMALS as i32 - exponent) as usize),
        _ => scientific,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_fifteen_significant_digits() {
        assert_eq!(digits(1.0 / 3.0), "0.333333333333333");
        assert_eq!(digits(200.0 / 3.0), "66.6666666666667");
        assert_eq!(digits(0.999_999_999_999_999_9), "1.00000000000000");
        assert_eq!(digits(2.5e-10), "2.50000000000000e-10");
        assert_eq!(digits(0.0), "0");
        for value in [0.123_456_789_012_345_67, 3.811_5, 1e-300, 7.0e20] {
            let read: f64 = digits(value).parse().unwrap();
            assert!((read / value - 1.0).abs() < 5e-15, "{value}");
        }
    }

    #[test]
    fn rows_come_back_in_order_and_small_budgets_abstain() {
        let input = "100\t100\t0.001\t0.25\r\n0\t1\t0.001\t1/4\n\n10\t10\t0.0009765625\t0.5\n";
        let outcome = table(input.as_bytes()).unwrap();
        let lines: Vec<Vec<&str>> = outcome.text.lines().map(|line| line.split('\t').collect()).collect();
        let radius: f64 = lines[0][2].parse().unwrap();
        assert!((radius - 0.25 * 1.5005).abs() < 2e-5 && lines[0][1] == "0", "{lines:?}");
        assert_eq!(lines[1], ["0", "1", "0"]);
        assert_eq!(lines[2], ["0.500000000000000", "0", "0"]);
        assert_eq!(outcome.summary["rows"][1]["abstain"], true);
    }

    #[test]
    fn a_bad_row_is_located() {
        for (bad, words) in [
            ("1\t2\t0.5", "four"),
            ("1.5\t2\t0.5\t1", "four"),
            ("3\t2\t0.5\t1", "3"),
            ("1\t2\t1\t1", "alpha"),
            ("1\t2\tnan\t1", "four"),
            ("1\t2\t0.5\t0", "sigma"),
        ] {
            let error = table(format!("1\t2\t0.5\t1\n{bad}\n").as_bytes()).unwrap_err();
            assert_eq!(error.status(), crate::error::ExitStatus::Data);
            let text = error.to_string();
            assert!(text.contains("line 2") && text.contains(words), "{bad}: {text}");
        }
    }
}
