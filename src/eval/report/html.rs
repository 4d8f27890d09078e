//! A report as one self-contained HTML page: no network, no script; light or dark as the reader's system wants it.

use super::{Answer, Card, Cell, DISCLAIMER, Figure, Headline, ReportData, Shape, Table, percent, plot};
use crate::error::Result;
use base64::Engine as _;
use std::fmt::Write as _;

const STYLE: &str = include_str!("style.css");

/// The report as an HTML page.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn to_html(report: &ReportData) -> Result<String> {
    let mut page = String::new();
    let title = escape(&report.title);
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n<p class=\"badge\">{DISCLAIMER}</p>\n<h1>{title}</h1>\n"
    );
    if !report.subtitle.is_empty() {
        let _ = writeln!(page, "<p class=\"subtitle\">{}</p>", escape(&report.subtitle));
    }
    page.push_str("</header>\n");
    write_headlines(&mut page, &report.headlines);
    if !report.notes.is_empty() {
        page.push_str("<ul class=\"notes\">\n");
        for note in &report.notes {
            let _ = writeln!(page, "<li>{}</li>", escape(note));
        }
        page.push_str("</ul>\n");
    }
    for table in &report.tables {
        write_table(&mut page, table);
    }
    write_figures(&mut page, report)?;
    if !report.cards.is_empty() {
        page.push_str("<section>\n<h2>Examples</h2>\n");
        for card in &report.cards {
            write_card(&mut page, card);
        }
        page.push_str("</section>\n");
    }
    for table in &report.details {
        write_table(&mut page, table);
    }
    write_provenance(&mut page, &report.provenance);
    page.push_str("</main>\n</body>\n</html>\n");
    Ok(page)
}

/// Text that is only text, in content and in attributes.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

fn write_headlines(page: &mut String, headlines: &[Headline]) {
    if headlines.is_empty() {
        return;
    }
    page.push_str("<div class=\"headlines\">\n");
    for headline in headlines {
        let _ = writeln!(
            page,
            "<div><p class=\"label\">{}</p><p class=\"value\">{}</p><p class=\"detail\">{}</p></div>",
            escape(&headline.label),
            escape(&headline.value),
            escape(&headline.detail)
        );
    }
    page.push_str("</div>\n");
}

fn write_table(page: &mut String, table: &Table) {
    let _ = writeln!(
        page,
        "<section>\n<h2>{}</h2>\n<div class=\"scroll\"><table>\n<thead><tr>",
        escape(&table.title)
    );
    for (column, name) in table.head.iter().enumerate() {
        let is_text = column == 0
            || (!table.rows.is_empty()
                && table.rows.iter().all(|row| matches!(row.get(column), Some(Cell::Text(_)))));
        let class = if is_text { "" } else { " class=\"right\"" };
        let _ = write!(page, "<th scope=\"col\"{class}>{}</th>", escape(name));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            write_cell(page, cell, column == 0);
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
    if !table.caption.is_empty() {
        let _ = writeln!(page, "<p class=\"caption\">{}</p>", escape(&table.caption));
    }
    page.push_str("</section>\n");
}

fn write_cell(page: &mut String, cell: &Cell, names_row: bool) {
    let _ = match cell {
        Cell::Text(text) if names_row => write!(page, "<th scope=\"row\">{}</th>", escape(text)),
        Cell::Text(text) => write!(page, "<td>{}</td>", escape(text)),
        Cell::Number(text) => write!(page, "<td class=\"right\">{}</td>", escape(text)),
        Cell::Missing => write!(page, "<td class=\"right missing\">–</td>"),
        Cell::Share(share, interval) => {
            let width = percent(share.clamp(0.0, 1.0));
            let text = percent(*share);
            let interval = interval.map_or_else(String::new, |[low, high]| {
                format!("<small>{}–{}</small>", percent(low), percent(high))
            });
            write!(page, "<td class=\"share\" style=\"--share:{width}%\"><b>{text}</b>{interval}</td>")
        }
    };
}

fn write_figures(page: &mut String, report: &ReportData) -> Result<()> {
    if report.figures.is_empty() {
        return Ok(());
    }
    let names = report.series_names();
    page.push_str("<section>\n<h2>Plots</h2>\n<div class=\"figures\">\n");
    for figure in &report.figures {
        let _ = writeln!(page, "<figure>\n<h3>{}</h3>", escape(&figure.title));
        match plot::svg(figure, &names)? {
            Some(svg) => page.push_str(&svg),
            None => page.push_str("<p class=\"missing\">No finite values.</p>\n"),
        }
        write_legend(page, figure, &names);
        let smoothing =
            if figure.shape == Shape::Noisy { " Faint: the values; strong: their moving mean." } else { "" };
        let _ = writeln!(page, "<figcaption>{}{smoothing}</figcaption>\n</figure>", escape(&figure.caption));
    }
    page.push_str("</div>\n</section>\n");
    Ok(())
}

fn write_legend(page: &mut String, figure: &Figure, names: &[&str]) {
    page.push_str("<ul class=\"legend\">");
    for series in &figure.series {
        let index = names.iter().position(|name| *name == series.name).unwrap_or(0);
        let _ = write!(
            page,
            "<li><i style=\"background:{}\"></i>{}</li>",
            plot::colour(index),
            escape(&series.name)
        );
    }
    page.push_str("</ul>\n");
}

fn write_card(page: &mut String, card: &Card) {
    page.push_str("<article>\n");
    if !card.pictures.is_empty() {
        page.push_str("<div class=\"pictures\">\n");
        for picture in &card.pictures {
            let data = base64::engine::general_purpose::STANDARD.encode(&picture.png);
            let caption = escape(&picture.caption);
            let _ = writeln!(
                page,
                "<figure><img alt=\"{caption}\" src=\"data:image/png;base64,{data}\"><figcaption>{caption}</figcaption></figure>"
            );
        }
        page.push_str("</div>\n");
    }
    let _ = writeln!(
        page,
        "<div class=\"words\">\n<p class=\"detail\">{}</p>\n<h3>{}</h3>",
        escape(&card.detail),
        escape(&card.question)
    );
    if !card.options.is_empty() {
        page.push_str("<ol class=\"options\" type=\"A\">\n");
    }
    for (index, option) in card.options.iter().enumerate() {
        let class = if card.answer == Some(index) { " class=\"right-option\"" } else { "" };
        let _ = writeln!(page, "<li{class}>{}</li>", escape(option));
    }
    if !card.options.is_empty() {
        page.push_str("</ol>\n");
    }
    page.push_str("<div class=\"answers\">\n");
    for answer in &card.answers {
        write_answer(page, answer);
    }
    page.push_str("</div>\n</div>\n</article>\n");
}

fn write_answer(page: &mut String, answer: &Answer) {
    let (class, verdict) = if answer.correct { ("good", "right") } else { ("bad", "wrong") };
    let _ = writeln!(
        page,
        "<div class=\"answer {class}\"><p><b>{}</b> <span>{} · {verdict}</span></p><p class=\"completion\">{}</p></div>",
        escape(&answer.label),
        escape(&answer.prediction),
        escape(&answer.completion)
    );
}

fn write_provenance(page: &mut String, provenance: &[(String, String)]) {
    if provenance.is_empty() {
        return;
    }
    page.push_str("<details>\n<summary>Where the numbers come from</summary>\n<dl>\n");
    for (name, value) in provenance {
        let _ = writeln!(page, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value));
    }
    page.push_str("</dl>\n</details>\n");
}
