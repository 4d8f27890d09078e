use super::*;

fn sample() -> ReportData {
    let point = |x: f64, y: f64| Point { x, y, interval: Some([y - 0.05, y + 0.05]) };
    let series = |name: &str, ys: &[f64]| Series {
        name: name.to_owned(),
        points: ys.iter().enumerate().map(|(index, y)| point(index as f64 * 2.0, *y)).collect(),
    };
    ReportData {
        title: "Attack & defence <b>".to_owned(),
        subtitle: "320 items".to_owned(),
        headlines: vec![Headline {
            value: "81.2 %".into(),
            label: "under attack".into(),
            detail: "of at_grpo".into(),
        }],
        notes: vec!["7 items were left out".to_owned()],
        tables: vec![Table {
            title: "Models".to_owned(),
            caption: "n = 320".to_owned(),
            head: ["model", "clean", "attacked", "steps"].map(str::to_owned).to_vec(),
            rows: vec![
                vec![
                    Cell::Text("sft|cot".into()),
                    Cell::Share(0.965, Some([0.94, 0.98])),
                    Cell::Share(0.208, None),
                    Cell::Number("50".into()),
                ],
                vec![Cell::Text("x".into()), Cell::Missing, Cell::Missing, Cell::Missing],
            ],
        }],
        figures: vec![
            Figure {
                title: "Accuracy under attack".to_owned(),
                y_range: Some([0.0, 1.0]),
                series: vec![series("sft", &[0.95, 0.6, 0.2]), series("at_grpo", &[0.96, 0.9, 0.8])],
                ..Figure::default()
            },
            Figure {
                shape: Shape::Steps,
                series: vec![series("at_grpo", &[0.9, 0.5, 0.0])],
                ..Figure::default()
            },
        ],
        cards: vec![Card {
            question: "Which \"region\"?".to_owned(),
            options: ["upper-left", "lower-right"].map(str::to_owned).to_vec(),
            answer: Some(1),
            pictures: vec![Picture { caption: "clean".into(), png: vec![1, 2, 3] }],
            answers: vec![Answer {
                label: "under attack".into(),
                prediction: "A".into(),
                correct: false,
                completion: "<think> scan CT</think><answer> A</answer>".into(),
            }],
            ..Card::default()
        }],
        details: Vec::new(),
        provenance: vec![("seed".into(), "0".into())],
    }
}

#[test]
fn the_page_is_self_contained_and_text_stays_text() {
    let page = to_html(&sample()).unwrap();
    for banned in ["http://", "https://", "<script", "<link", "@import", "url("] {
        let found: Vec<&str> =
            page.match_indices(banned).map(|(at, _)| &page[at..(at + 60).min(page.len())]).collect();
        // The namespace of SVG is a name, not an address that is visited.
        assert!(found.iter().all(|text| text.starts_with("http://www.w3.org/2000/svg")), "{found:?}");
    }
    assert!(page.contains("Attack &amp; defence &lt;b&gt;"));
    assert!(page.contains("&lt;think&gt; scan CT"));
    assert!(page.contains(DISCLAIMER));
    assert!(page.contains("data:image/png;base64,AQID"));
    assert!(page.contains("--share:96.5%"));
}

#[test]
fn pictures_can_be_left_out() {
    let page = to_html(&sample().without_pictures()).unwrap();
    assert!(!page.contains("base64"));
    assert!(page.contains("Which &quot;region&quot;?"));
}

#[test]
fn a_curve_has_one_colour_in_every_plot() {
    let report = sample();
    let names = report.series_names();
    assert_eq!(names, ["sft", "at_grpo"]);
    let second = plot::colour(1).to_uppercase();
    for figure in &report.figures {
        let svg = plot::svg(figure, &names).unwrap().unwrap();
        assert!(svg.contains(&second), "{}", figure.title);
        assert!(svg.contains("currentColor") && !svg.contains("#010203"));
    }
}

#[test]
fn plots_survive_odd_numbers() {
    let of = |points: Vec<Point>| Figure {
        series: vec![Series { name: "a".into(), points }],
        shape: Shape::Noisy,
        ..Figure::default()
    };
    let at = |x, y| Point { x, y, interval: None };
    assert_eq!(plot::svg(&of(vec![]), &["a"]).unwrap(), None);
    assert_eq!(plot::svg(&of(vec![at(f64::NAN, 1.0)]), &["a"]).unwrap(), None);
    for points in [
        vec![at(0.0, 0.0)],
        vec![at(5.0, 1e-12), at(5.0, 1e-12)],
        vec![at(0.0, 1e9), at(1.0, -1e9), at(2.0, f64::INFINITY)],
    ] {
        assert!(plot::svg(&of(points), &["a"]).unwrap().is_some());
    }
}

#[test]
fn markdown_tables_are_aligned_and_cannot_be_broken_by_their_text() {
    let text = to_markdown(&sample());
    let table: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(
        table,
        [
            "| model    |               clean | attacked | steps |",
            "|----------|--------------------:|---------:|------:|",
            "| sft\\|cot | 96.5 % [94.0, 98.0] |   20.8 % |    50 |",
            "| x        |                   - |        - |     - |",
        ]
    );
    assert!(text.contains(DISCLAIMER));
}
