//! Floors: imports go down only, siblings never import each other; and every module says what it is.

use std::fs;
use std::path::{Path, PathBuf};

/// Floor of each module of the crate's root, ground first. Modules of one floor are siblings.
const FLOORS: [&[&str]; 6] = [
    &["error", "files", "backend", "rng"],
    &["nn", "pixels", "stats"],
    &["attack", "certify", "train", "reward", "eval", "data", "model"],
    &["roles"],
    &["recipes"],
    &["cli"],
];

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module))
}

/// Whether code of module `from` may name module `to`.
fn may_import(from: &str, to: &str) -> bool {
    match (floor_of(from), floor_of(to)) {
        (Some(from_floor), Some(to_floor)) => {
            from == to || to_floor < from_floor || (from_floor, to_floor) == (0, 0)
        }
        // A name that is no module: a macro or an item of the crate's root.
        (_, None) => true,
        (None, _) => false,
    }
}

fn source_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let entries = fs::read_dir(folder).expect("the sources are beside the tests");
    for path in entries.map(|entry| entry.expect("a readable entry").path()) {
        if path.is_dir() {
            files.extend(source_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The text without line comments, so that prose may name any module.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Names that begin the paths of `text` after a root prefix: `x` of `x::y`, `x` and `y` of `{x::z, y}`.
fn heads(text: &str) -> Vec<String> {
    let ident =
        |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let text = text.trim_start();
    let Some(group) = text.strip_prefix('{') else { return vec![ident(text)] };
    let mut found = Vec::new();
    let (mut depth, mut expects_name) = (1, true);
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => expects_name = true,
            c if expects_name && !c.is_whitespace() => {
                found.push(ident(&group[at..]));
                expects_name = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}

/// Modules of the root that `code` names, by `crate::` or by climbing `super::` from a module `depth` levels down.
fn imports(code: &str, depth: usize) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            found.extend(heads(&code[at + "crate::".len()..]));
        }
    }
    let climb = "super::".repeat(depth);
    for (at, _) in code.match_indices(&climb) {
        let rest = &code[at + climb.len()..];
        if !code[..at].ends_with("super::") && !rest.starts_with("super::") {
            found.extend(heads(rest));
        }
    }
    found
}

/// Module and depth of a source file: `src/nn/kernel/mod.rs` is two levels below the root.
fn place(relative: &Path) -> (String, usize) {
    let parts: Vec<String> =
        relative.iter().map(|part| part.to_string_lossy().trim_end_matches(".rs").to_owned()).collect();
    let depth = parts.len() - usize::from(parts.last().is_some_and(|name| name == "mod"));
    (parts[0].clone(), depth)
}

#[test]
fn imports_go_down_only_and_never_to_a_sibling() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut breaches = Vec::new();
    let mut seen = 0;
    for file in source_files(&root) {
        let relative = file.strip_prefix(&root).unwrap();
        let (module, depth) = place(relative);
        if ["lib", "main", "process"].contains(&module.as_str()) {
            continue;
        }
        assert!(floor_of(&module).is_some(), "`{module}` stands on no floor: add it to FLOORS");
        for to in imports(&code(&fs::read_to_string(&file).unwrap()), depth) {
            seen += usize::from(floor_of(&to).is_some());
            if !may_import(&module, &to) {
                breaches.push(format!("src/{} imports `{to}`", relative.display()));
            }
        }
    }
    assert!(seen > 50, "the scan finds imports at all: {seen}");
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

#[test]
fn the_scan_reads_every_form_of_import() {
    let found = |text: &str, depth| imports(&code(text), depth);
    assert_eq!(found("use crate::model::Vlm;", 1), ["model"]);
    assert_eq!(
        found("use crate::{\n  data::{Sample, Dataset},\n  eval, model::vlm as v\n};", 1),
        ["data", "eval", "model"]
    );
    assert_eq!(found("let x = crate::nn::linear();", 2), ["nn"]);
    assert_eq!(found("pub(crate) fn f(m: &crate::model::Vlm) {}", 1), ["model"]);
    assert_eq!(found("use super::super::model::Vlm;", 2), ["model"]);
    assert_eq!(found("use super::{error, model};", 1), ["error", "model"]);
    assert_eq!(found("use super::ball; // not crate::model", 2), Vec::<String>::new());
    assert!(may_import("cli", "error") && may_import("roles", "model") && may_import("nn", "nn"));
    assert!(!may_import("attack", "model") && !may_import("model", "roles") && !may_import("nn", "stats"));
}

#[test]
fn every_module_says_what_it_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut silent = Vec::new();
    for file in source_files(&root) {
        let text = fs::read_to_string(&file).unwrap();
        let is_test = file
            .file_stem()
            .is_some_and(|name| name == "tests" || name.to_string_lossy().ends_with("_tests"));
        let lines = text.lines().take_while(|line| line.starts_with("//!")).count();
        if !is_test && (lines == 0 || text.contains("//! (placeholder)")) {
            silent.push(file.strip_prefix(&root).unwrap().display().to_string());
        }
    }
    assert!(silent.is_empty(), "without a module comment: {}", silent.join(", "));
}
