//! What the documents tell people to do with the chart works, and their links lead somewhere.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::render::{render, text, yaml};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every document of ours, with its text.
fn documents() -> Vec<(PathBuf, String)> {
    let mut files: Vec<_> = ["", "docs", "charts/ecr-cname"]
        .into_iter()
        .flat_map(|dir| fs::read_dir(root().join(dir)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    files.sort();
    assert!(files.len() >= 7, "{files:?}");
    files.into_iter().map(|file| (file.clone(), fs::read_to_string(file).unwrap())).collect()
}

/// The blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

/// YAML that is no manifest is for the chart.
#[tokio::test]
async fn the_values_in_documents_are_values_of_the_chart() {
    let mut rendered = 0;
    for (file, document) in documents() {
        for block in blocks(&document, "yaml") {
            if block.contains("apiVersion:") || file.ends_with("CONTRIBUTING.md") {
                continue;
            }
            let values = yaml(block).remove(0);
            render(&values).await.unwrap_or_else(|error| panic!("{}: {error:#}\n{block}", file.display()));
            rendered += 1;
        }
    }
    assert!(rendered >= 3, "only {rendered}");
}

/// What a document sets on the command line is known to the chart.
#[tokio::test]
async fn the_commands_in_documents_set_values_of_the_chart() {
    let mut commands = 0;
    for (file, document) in documents() {
        for block in blocks(&document, "sh") {
            let block = block.replace("\\\n", " ");
            for line in block.lines().filter(|line| line.starts_with("helm install ")) {
                let words: Vec<_> = line.split_whitespace().map(|word| word.trim_matches('\'')).collect();
                let set: Vec<&str> =
                    words.windows(2).filter(|pair| pair[0] == "--set").flatten().copied().collect();
                text(&set).await.unwrap_or_else(|error| panic!("{}: {error:#}\n{line}", file.display()));
                commands += 1;
            }
        }
    }
    assert!(commands >= 4, "only {commands}");
}

#[test]
fn links_lead_somewhere() {
    let documents = documents();
    let mut links = 0;
    for (file, document) in &documents {
        for link in document.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { file.clone() } else { file.parent().unwrap().join(path) };
            let found = target.canonicalize();
            let found = found.unwrap_or_else(|_| panic!("{}: {link} leads nowhere", file.display()));
            if !anchor.is_empty() {
                let anchors = anchors(&fs::read_to_string(found).unwrap());
                assert!(anchors.contains(anchor), "{}: {link} leads to no heading", file.display());
            }
            links += 1;
        }
    }
    assert!(links > 20, "only {links}");
}

/// The anchors that headings get: lower case, spaces to hyphens, punctuation left out.
fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|heading| {
            let title = heading.trim_start_matches('#').trim().to_lowercase();
            title
                .chars()
                .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
        .collect()
}
