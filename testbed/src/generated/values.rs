//! The comments in `values.yaml`, as tables.
//!
//! `# == ` begins a section, `# -- ` the text of the value below it.

use std::fmt::Write as _;

use anyhow::{Result, bail, ensure};

/// A Markdown table for each section, with a line for each value.
pub(super) fn tables(yaml: &str) -> Result<String> {
    let mut tables = String::new();
    let mut text: Option<String> = None;
    // The keys above the present line, each with its indentation.
    let mut parents: Vec<(usize, &str)> = Vec::new();
    for (number, line) in yaml.lines().enumerate() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(title) = line.strip_prefix("# == ") {
            write!(tables, "\n### {title}\n\n| value | default | meaning |\n|---|---|---|\n")?;
        } else if let Some(first) = trimmed.strip_prefix("# -- ") {
            text = Some(first.to_owned());
        } else if let Some(more) = trimmed.strip_prefix("# ") {
            if let Some(text) = &mut text {
                *text = format!("{text} {more}");
            }
        } else if trimmed.is_empty() {
            ensure!(text.is_none(), "values.yaml:{}: a comment that belongs to no value", number + 1);
        } else if let Some((key, default)) = trimmed.split_once(':') {
            parents.retain(|(of, _)| *of < indent);
            parents.push((indent, key));
            let default = default.trim();
            match (text.take(), default.is_empty()) {
                (Some(text), false) => {
                    let path: Vec<&str> = parents.iter().map(|(_, key)| *key).collect();
                    let cell = |text: &str| text.replace('|', "\\|");
                    writeln!(tables, "| `{}` | `{}` | {} |", path.join("."), cell(default), cell(&text))?;
                }
                (None, true) => {}
                (Some(_), true) => bail!("values.yaml:{}: write the default on one line", number + 1),
                (None, false) => bail!("values.yaml:{}: {key} has no comment", number + 1),
            }
        } else {
            bail!("values.yaml:{}: not understood: {line}", number + 1);
        }
    }
    Ok(tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_a_line() -> Result<()> {
        let yaml = "# Not of interest.\n\n# == All\n\na:\n  # -- What it\n  # is, x|y.\n  b: {c: [1]}\n# d: example\n";
        assert_eq!(
            tables(yaml)?,
            "\n### All\n\n| value | default | meaning |\n|---|---|---|\n| `a.b` | `{c: [1]}` | What it is, x\\|y. |\n"
        );
        Ok(())
    }

    #[test]
    fn a_value_without_a_text_is_an_error() {
        assert!(tables("a: 1\n").is_err());
        assert!(tables("# -- Text.\n\na: 1\n").is_err());
    }
}
