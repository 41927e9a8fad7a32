//! What is seen of an upload: a bar on a terminal, a few lines elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};
use mobula::UploadProgress;

/// A file below this is there before anybody could read a line about it.
const SHOWN_BYTES_MIN: u64 = 1024 * 1024;

/// Draws on standard error what it is told.
pub(crate) fn shown() -> impl Fn(&UploadProgress) + Send + Sync + 'static {
    let is_terminal = std::io::stderr().is_terminal();
    let bar: Mutex<Option<ProgressBar>> = Mutex::new(None);
    let lines = Mutex::new(Quarters::default());
    move |progress| {
        if is_terminal {
            draw(
                &mut bar.lock().expect("nobody panics while drawing"),
                progress,
            );
        } else if let Some(line) = lines
            .lock()
            .expect("nobody panics while counting")
            .line(progress)
        {
            eprintln!("{line}");
        }
    }
}

fn draw(shown: &mut Option<ProgressBar>, progress: &UploadProgress) {
    if progress.sent_bytes == 0 {
        let style = ProgressStyle::with_template(
            "uploading {msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left",
        )
        .expect("the template is well-formed");
        let bar = ProgressBar::new(progress.size_bytes).with_style(style);
        bar.set_message(name_of(progress));
        *shown = Some(bar);
    }
    if let Some(bar) = shown {
        bar.set_position(progress.sent_bytes);
        if progress.sent_bytes >= progress.size_bytes {
            bar.finish_and_clear();
            *shown = None;
        }
    }
}

/// At most five lines a file: its beginning, and each quarter.
#[derive(Debug, Default)]
struct Quarters {
    passed: u64,
}

impl Quarters {
    fn line(&mut self, progress: &UploadProgress) -> Option<String> {
        let UploadProgress {
            sent_bytes,
            size_bytes,
            ..
        } = progress;
        if *size_bytes < SHOWN_BYTES_MIN {
            return None;
        }
        let mebibytes = *size_bytes as f64 / (1024.0 * 1024.0);
        let name = name_of(progress);
        if *sent_bytes == 0 {
            self.passed = 0;
            return Some(format!("uploading {name} ({mebibytes:.1} MiB)"));
        }
        let quarters = sent_bytes.saturating_mul(4) / size_bytes;
        if quarters <= self.passed {
            return None;
        }
        self.passed = quarters;
        Some(format!("uploading {name}: {} %", quarters * 25))
    }
}

fn name_of(progress: &UploadProgress) -> String {
    let name = progress.path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gets_a_few_lines_however_large_the_file() {
        let size_bytes = 100 << 30;
        let mut quarters = Quarters::default();
        let mut at = |sent_bytes| {
            quarters.line(&UploadProgress {
                path: "/x/program".into(),
                sent_bytes,
                size_bytes,
            })
        };
        let lines: Vec<String> = (0..=1000)
            .filter_map(|n| at(size_bytes / 1000 * n))
            .collect();
        let last = at(size_bytes);
        assert_eq!(lines[0], "uploading program (102400.0 MiB)");
        let all = lines.len() + usize::from(last.is_some());
        assert_eq!(all, 5, "{lines:?} {last:?}");
        // The next file begins anew.
        assert!(at(0).is_some());
        assert_eq!(
            at(size_bytes / 2).as_deref(),
            Some("uploading program: 50 %")
        );
    }

    #[test]
    fn a_small_file_is_not_spoken_of() {
        let progress = UploadProgress {
            path: "/x/small".into(),
            sent_bytes: 0,
            size_bytes: 1000,
        };
        assert_eq!(Quarters::default().line(&progress), None);
    }
}
