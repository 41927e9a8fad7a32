//! The folder that a test and its program share, in which each leaves files for the other.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

/// What the test and this program leave for each other.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    /// Tells the test something, whole or not at all.
    pub(crate) fn tell(&self, name: &str, what: &Value) -> std::io::Result<()> {
        let hidden = self.0.join(format!(".{name}"));
        std::fs::write(&hidden, what.to_string())?;
        std::fs::rename(hidden, self.0.join(name))
    }

    /// Waits for a file of the test, which ends this program if it takes too long.
    pub(crate) async fn wait_for(&self, name: &str) {
        while !self.0.join(name).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
