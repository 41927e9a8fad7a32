//! `mobula audit export`, `prove` and `verify`: the log of what was decided about models.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail};
use mobula_actors::registry::audit_file::{Exporter, proof_to_text, verify as verify_text};
use mobula_actors::registry::client;
use mobula_actors::registry::merkle::to_hex;
use serde_json::json;

use crate::args::{AuditCommand, Target};
use crate::connect::connect;
use crate::output::print_json;

/// The largest file that is checked: all entries that a log keeps, at the largest that they are.
const FILE_BYTES_MAX: u64 = 4 << 30;

pub(crate) async fn run(target: &Target, command: AuditCommand) -> anyhow::Result<()> {
    match command {
        AuditCommand::Export { file, format } => export(target, &file, format.json).await,
        AuditCommand::Prove { sequence } => {
            let proof = client::proof(&connect(target).await?, sequence).await?;
            print!("{}", proof_to_text(&proof));
            Ok(())
        }
        AuditCommand::Verify { file, root, format } => verify(&file, root.as_deref(), format.json),
    }
}

async fn export(target: &Target, path: &Path, as_json: bool) -> anyhow::Result<()> {
    let unusable = || format!("{} cannot be written", path.display());
    let cluster = connect(target).await?;
    let mut page = client::events(&cluster, 0).await?;
    let (ends, root) = (page.ends, to_hex(&page.root));
    let mut exporter = Exporter::default();
    while let Some(next) = exporter.push(&page) {
        let previous = page.events.last().map(|event| event.sequence);
        page = client::events(&cluster, next).await?;
        if page.ends.dropped + 1 > next || page.events.is_empty() {
            bail!("entries behind {previous:?} were dropped before they could be read: try again");
        }
    }
    let mut file = std::fs::File::create_new(path).with_context(unusable)?;
    file.write_all(exporter.finish().as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(unusable)?;
    if as_json {
        return print_json(&json!({
            "file": path,
            "first": ends.dropped + 1,
            "size": ends.size,
            "root": root,
        }));
    }
    println!("{} entries in {}", ends.size - ends.dropped, path.display());
    println!("root {root}");
    Ok(())
}

fn verify(path: &Path, root: Option<&str>, as_json: bool) -> anyhow::Result<()> {
    let unreadable = || format!("{} cannot be read", path.display());
    let size = std::fs::metadata(path).with_context(unreadable)?.len();
    if size > FILE_BYTES_MAX {
        bail!(
            "{} has {size} bytes, the limit is {FILE_BYTES_MAX}",
            path.display()
        );
    }
    // Altered bytes may be no text any more; what they are part of is found all the same.
    let bytes = std::fs::read(path).with_context(unreadable)?;
    let intact = verify_text(&String::from_utf8_lossy(&bytes), root)?;
    if as_json {
        return print_json(&intact);
    }
    println!(
        "{} entries from {} on, of {}: each is what it was",
        intact.entries, intact.first, intact.size
    );
    println!("root {}", intact.root);
    Ok(())
}
