//! A parity report as a command's outcome: the contract's object, and a table by quantity for people.

use super::ParityReport;
use crate::error::Result;
use crate::recipes::job::Outcome;
use crate::recipes::parity_io::Check;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The report as JSON and as text; a check that does not hold makes the outcome a failed one.
///
/// # Errors
/// When the report cannot be written as JSON.
pub fn outcome(report: &ParityReport) -> Result<Outcome> {
    let summary = serde_json::to_value(report).map_err(anyhow::Error::from)?;
    let mut outcome = Outcome::new(summary, render(report));
    let failed: Vec<&str> =
        report.checks.iter().filter(|check| !check.pass).map(|check| check.name.as_str()).collect();
    if let Some(first) = failed.first() {
        outcome.check_failed = Some(format!(
            "{} of {} comparisons are out of tolerance, the first is `{first}`",
            failed.len(),
            report.checks.len()
        ));
    }
    Ok(outcome)
}

/// Worst first within a quantity: the difference as a share of what is allowed.
fn excess(check: &Check) -> f64 {
    if check.max_abs_diff == 0.0 { 0.0 } else { check.max_abs_diff / check.tolerance }
}

fn render(report: &ParityReport) -> String {
    let mut by_quantity: BTreeMap<&str, Vec<&Check>> = BTreeMap::new();
    for check in &report.checks {
        by_quantity.entry(quantity_of(&check.name)).or_default().push(check);
    }
    let mut text = format!(
        "{:<20} {:>6} {:>6} {:>12} {:>10}  worst\n",
        "quantity", "checks", "failed", "difference", "allowed"
    );
    for (quantity, checks) in &by_quantity {
        let failed = checks.iter().filter(|check| !check.pass).count();
        let Some(worst) = checks.iter().max_by(|a, b| excess(a).total_cmp(&excess(b))) else { continue };
        let _ = writeln!(
            text,
            "{quantity:<20} {:>6} {failed:>6} {:>12} {:>10}  {}",
            checks.len(),
            short(worst.max_abs_diff),
            short(worst.tolerance),
            worst.name.strip_suffix(&format!("/{quantity}")).unwrap_or(&worst.name),
        );
    }
    for check in report.checks.iter().filter(|check| !check.pass) {
        let _ = writeln!(
            text,
            "FAILED {}: {} where {} is allowed",
            check.name,
            short(check.max_abs_diff),
            short(check.tolerance)
        );
    }
    let mut unchecked: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for item in &report.not_checked {
        unchecked.entry((quantity_of(&item.name), &item.reason)).or_default().push(&item.name);
    }
    for ((quantity, reason), names) in unchecked {
        let _ = writeln!(text, "NOT CHECKED {quantity} ({}): {reason}: {}", names.len(), names.join(", "));
    }
    let passed = report.checks.iter().filter(|check| check.pass).count();
    let _ = writeln!(
        text,
        "{passed} of {} comparisons within tolerance, {} not checked",
        report.checks.len(),
        report.not_checked.len()
    );
    text
}

fn quantity_of(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(_, quantity)| quantity)
}

/// A whole number as it is, anything else with three significant digits.
fn short(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e9 { format!("{value}") } else { format!("{value:.2e}") }
}

#[cfg(test)]
mod tests {
    use super::super::unchecked;
    use super::*;

    #[test]
    fn the_worst_of_each_quantity_and_what_was_left_out_are_shown() {
        let checks = vec![
            Check::new("a", "x", "logits", 1e-6, 1e-4),
            Check::new("a", "y", "logits", 2e-4, 1e-4),
            Check::new("a", "x", "tokens", 0.0, 0.0),
        ];
        let not_checked = vec![unchecked("a", "x", "lora_logits", "no adapters")];
        let mut report = ParityReport { checks, pass: false, not_checked };
        let failed = outcome(&report).unwrap();
        let line = |words: &str| failed.text.lines().find(|line| line.starts_with(words)).unwrap().to_owned();
        assert!(line("logits").contains("2.00e-4") && line("logits").ends_with("a/y"), "{}", failed.text);
        assert!(line("tokens").contains(" 1      0 "));
        assert!(line("FAILED").contains("a/y/logits"));
        assert!(line("NOT CHECKED").contains("no adapters: a/x/lora_logits"));
        assert!(failed.check_failed.unwrap().contains("1 of 3"));
        assert_eq!(failed.summary["checks"][1]["pass"], false);
        report.checks.remove(1);
        report.pass = true;
        let passed = outcome(&report).unwrap();
        assert_eq!((passed.check_failed, &passed.summary["pass"]), (None, &true.into()));
    }
}
