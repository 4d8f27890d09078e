//! A report as Markdown: the tables and notes, without plots and pictures.

use super::{Cell, DISCLAIMER, ReportData, Table, percent};
use std::fmt::Write as _;

/// The report as Markdown.
pub fn to_markdown(report: &ReportData) -> String {
    let mut text = format!("# {}\n\n", escape(&report.title));
    if !report.subtitle.is_empty() {
        let _ = writeln!(text, "{}\n", escape(&report.subtitle));
    }
    let _ = writeln!(text, "**{DISCLAIMER}**\n");
    for note in &report.notes {
        let _ = writeln!(text, "- {}", escape(note));
    }
    if !report.notes.is_empty() {
        text.push('\n');
    }
    for table in report.tables.iter().chain(&report.details) {
        write_table(&mut text, table);
    }
    if !report.provenance.is_empty() {
        text.push_str("## Provenance\n\n");
        for (name, value) in &report.provenance {
            let _ = writeln!(text, "- {}: {}", escape(name), escape(value));
        }
    }
    text
}

fn write_table(text: &mut String, table: &Table) {
    let _ = writeln!(text, "## {}\n", escape(&table.title));
    let mut rows = vec![table.head.iter().map(|name| escape(name)).collect::<Vec<_>>()];
    rows.extend(table.rows.iter().map(|row| row.iter().map(cell_text).collect()));
    let is_left = |column: usize| {
        column == 0 || table.rows.iter().all(|row| matches!(row.get(column), Some(Cell::Text(_))))
    };
    // Columns are padded, so that the file reads well as it is.
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..table.head.len()).map(|column| width(column).unwrap_or(0).max(3)).collect();
    for (index, row) in rows.iter().enumerate() {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = if is_left(column) {
                write!(text, "| {cell:<width$} ")
            } else {
                write!(text, "| {cell:>width$} ")
            };
        }
        text.push_str("|\n");
        if index == 0 {
            for (column, width) in widths.iter().enumerate() {
                let _ = write!(text, "|{}{}", "-".repeat(width + 1), if is_left(column) { "-" } else { ":" });
            }
            text.push_str("|\n");
        }
    }
    text.push('\n');
    if !table.caption.is_empty() {
        let _ = writeln!(text, "{}\n", escape(&table.caption));
    }
}

fn cell_text(cell: &Cell) -> String {
    match cell {
        Cell::Text(text) | Cell::Number(text) => escape(text),
        Cell::Share(share, Some([low, high])) => {
            format!("{} % [{}, {}]", percent(*share), percent(*low), percent(*high))
        }
        Cell::Share(share, None) => format!("{} %", percent(*share)),
        Cell::Missing => "-".to_owned(),
    }
}

/// One line that cannot break a table or become markup.
fn escape(text: &str) -> String {
    let mut safe = String::new();
    for character in text.chars() {
        match character {
            '\n' | '\r' => safe.push(' '),
            '|' | '*' | '<' | '`' | '\\' => {
                safe.push('\\');
                safe.push(character);
            }
            other => safe.push(other),
        }
    }
    safe
}
