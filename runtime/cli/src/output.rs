//! What is printed: tables for people, JSON for programs.

use mobula_core::JobId;
use serde::Serialize;
use serde_json::Value;

/// Prints `value` as indented JSON.
pub(crate) fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// An error and what caused it. A cause whose text is part of what was said is not said again.
pub(crate) fn causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Prints rows under a header, columns padded to their widest cell.
pub(crate) fn print_table(header: &[&str], rows: &[Vec<String>]) {
    let widths: Vec<usize> = header
        .iter()
        .enumerate()
        .map(|(column, title)| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([title.chars().count()]).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(header.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

/// A job's result of at most so many characters is shown as it is.
const RESULT_SHOWN_MAX: usize = 160;
/// A part of a longer one, if it is at most so long.
const PART_SHOWN_MAX: usize = 80;

/// A job's result for people, one line for each: as it is if it is short; else its members, of which the long ones are
/// counted, and where all of it is.
pub(crate) fn result_lines(job: JobId, result: &str) -> Vec<String> {
    if result.chars().count() <= RESULT_SHOWN_MAX {
        return vec![result.to_owned()];
    }
    let mut lines = match serde_json::from_str(result) {
        Ok(Value::Object(members)) => {
            let widest = members.keys().map(|key| key.chars().count()).max();
            let width = widest.unwrap_or(0);
            members
                .iter()
                .map(|(key, value)| format!("{key:<width$}  {}", part(value)))
                .collect()
        }
        Ok(value) => vec![part(&value)],
        Err(_) => vec![cut(result)],
    };
    lines.push(format!("(all of it: `mobula jobs show {job} --json`)"));
    lines
}

fn part(value: &Value) -> String {
    let text = value.to_string();
    match value {
        _ if text.chars().count() <= PART_SHOWN_MAX => text,
        Value::Array(items) => format!("[{} items]", items.len()),
        Value::Object(members) => format!("{{{} members}}", members.len()),
        _ => cut(&text),
    }
}

fn cut(text: &str) -> String {
    let begin: String = text.chars().take(PART_SHOWN_MAX).collect();
    format!("{begin}…")
}

/// A duration since `from_ms` until `to_ms` (or now), for people.
pub(crate) fn age(from_ms: u64, to_ms: u64) -> String {
    let seconds = to_ms.saturating_sub(from_ms) / 1000;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A size for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `-` for nothing.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let cause = || anyhow::anyhow!("no such file");
        let twice = cause().context("a.toml: no such file").context("no job");
        assert_eq!(causes(&twice), "no job: a.toml: no such file");
        let once = cause().context("a.toml cannot be read");
        assert_eq!(causes(&once), "a.toml cannot be read: no such file");
    }

    #[test]
    fn long_results_are_told_by_their_members() {
        let job = JobId(7);
        assert_eq!(result_lines(job, "{\"pi\":3.14}"), ["{\"pi\":3.14}"]);
        let long = serde_json::json!({
            "loss": 0.5,
            "pauses_ms": vec![1; 64],
            "text": "ä".repeat(200),
        });
        let text = format!("\"{}…", "ä".repeat(79));
        let expected = [
            "loss       0.5".to_owned(),
            "pauses_ms  [64 items]".to_owned(),
            format!("text       {text}"),
            "(all of it: `mobula jobs show job-7 --json`)".to_owned(),
        ];
        assert_eq!(result_lines(job, &long.to_string()), expected);
        let list = serde_json::json!(vec![1; 100]).to_string();
        assert_eq!(result_lines(job, &list)[0], "[100 items]");
    }

    #[test]
    fn ages_are_short() {
        assert_eq!(age(0, 90_000), "90s");
        assert_eq!(age(0, 600_000), "10m");
        assert_eq!(age(5, 0), "0s");
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (8 << 20, "8.0 MiB"),
            (3 << 40, "3.0 TiB"),
            (5000 << 40, "5000.0 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
