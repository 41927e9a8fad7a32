//! Where the values of a job's secrets come from: a file, or a variable of this process. Never an
//! argument, which every user of the machine can see, and never the text of a job file, which is
//! kept and shared.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;

/// The table of a job file.
const TABLE: &str = "[secrets]";

/// Where one secret's value is, in a job file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    /// A file's path, relative to the job file.
    file: Option<String>,
    /// A variable of the process that submits.
    env: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    secrets: BTreeMap<String, Reference>,
}

/// The values for `--secret NAME=@FILE` and `--secret NAME`.
pub(crate) fn from_arguments(arguments: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    arguments
        .iter()
        .map(|text| match text.split_once('=') {
            None => Ok((text.clone(), from_env(text, text)?)),
            Some((name, value)) => {
                let Some(path) = value.strip_prefix('@') else {
                    bail!(
                        "the secret `{name}` is in the arguments, where every user of this machine \
                         sees it: give `--secret {name}=@FILE`, or `--secret {name}` to take it from \
                         the environment"
                    );
                };
                Ok((name.to_owned(), from_file(name, Path::new(path))?))
            }
        })
        .collect()
}

/// Takes the table `[secrets]` out of a job file's text: the values that it refers to, and the text
/// without it, in which every other line keeps its number. `folder` is where the job file lies.
pub(crate) fn take_from_toml(
    text: &str,
    folder: &Path,
) -> anyhow::Result<(BTreeMap<String, String>, String)> {
    let mut table = String::new();
    let mut rest = String::new();
    let mut is_inside = false;
    for line in text.lines() {
        if line.trim_start().starts_with('[') {
            is_inside = line.trim().split('#').next().unwrap_or_default().trim() == TABLE;
        }
        let target = if is_inside { &mut table } else { &mut rest };
        target.push_str(line);
        target.push('\n');
        if is_inside {
            rest.push('\n');
        }
    }
    if table.is_empty() {
        return Ok((BTreeMap::new(), text.to_owned()));
    }
    // What the parser says might quote a secret that somebody wrote here after all.
    let Table { secrets } = toml::from_str(&table).map_err(|_| {
        anyhow::anyhow!(
            "the table {TABLE} is wrong: write each secret as NAME = {{ file = \"path\" }} or NAME = \
             {{ env = \"VARIABLE\" }}, and never its value"
        )
    })?;
    let mut values = BTreeMap::new();
    for (name, reference) in secrets {
        let value = match (reference.file, reference.env) {
            (Some(file), None) => from_file(&name, &folder.join(file))?,
            (None, Some(variable)) => from_env(&name, &variable)?,
            _ => bail!("the secret `{name}` needs either `file` or `env`"),
        };
        values.insert(name, value);
    }
    Ok((values, rest))
}

fn from_env(name: &str, variable: &str) -> anyhow::Result<String> {
    std::env::var(variable).with_context(|| {
        format!("the secret `{name}` is to come from the variable {variable}, which has no text")
    })
}

/// A file's text without the line end that editors put there.
fn from_file(name: &str, path: &Path) -> anyhow::Result<String> {
    let mut text = std::fs::read_to_string(path)
        .with_context(|| format!("the secret `{name}` cannot be read from {}", path.display()))?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_from_files_and_never_from_the_text() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hunter2\n").unwrap();
        let text = "name = \"a\"\n[secrets] # where they are\nTOKEN = { file = \"token\" }\n\n[model.mlp]\nhidden = [64]\n";
        let (values, rest) = take_from_toml(text, dir.path()).unwrap();
        assert_eq!(values, [("TOKEN".to_owned(), "hunter2".to_owned())].into());
        assert_eq!(rest, "name = \"a\"\n\n\n\n[model.mlp]\nhidden = [64]\n");
        let (none, same) = take_from_toml("name = \"a\"", dir.path()).unwrap();
        assert_eq!((none.len(), same.as_str()), (0, "name = \"a\""));
        for wrong in [
            "[secrets]\nTOKEN = \"hunter2\"\n",
            "[secrets]\nTOKEN = { value = \"hunter2\" }\n",
            "[secrets]\nTOKEN = {}\n",
            "[secrets]\nTOKEN = { file = \"absent\" }\n",
        ] {
            let error = format!("{:#}", take_from_toml(wrong, dir.path()).unwrap_err());
            assert!(!error.contains("hunter2"), "{error}");
        }
        let file = format!("TOKEN=@{}", dir.path().join("token").display());
        let values = from_arguments(&[file]).unwrap();
        assert_eq!(values["TOKEN"], "hunter2");
        let shown = from_arguments(&["TOKEN=hunter2".to_owned()]).unwrap_err();
        assert!(!format!("{shown:#}").contains("hunter2"));
    }
}
