//! `mobula data`: what data is labelled as.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::policy::client;
use mobula_actors::registry::policy::data::{DataRecord, LabelChange};
use mobula_actors::registry::statement;
use mobula_core::clock::Clock;

use crate::args::{AdminSigning, DataCommand, Format, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

pub(crate) async fn run(target: &Target, command: DataCommand) -> anyhow::Result<()> {
    match command {
        DataCommand::Label {
            data,
            labels,
            remove,
            name,
            signing,
            format,
        } => {
            let digest = digest_of(&data)?;
            let cluster = connect(target).await?;
            let known = client::data_record(&cluster, &digest).await?;
            let mut all: BTreeSet<String> = labels.into_iter().collect();
            all.extend(known.iter().flat_map(|known| known.labels.clone()));
            if let Some(label) = remove.iter().find(|label| !all.contains(*label)) {
                bail!("the data has no label `{label}`: see `mobula data show {digest}`");
            }
            all.retain(|label| !remove.contains(label));
            let change = LabelChange {
                name: name_of(name, known.as_ref(), &data, &digest),
                data: digest,
                labels: all,
                expected_revision: known.map_or(0, |known| known.revision),
                envelope: None,
            };
            label(&cluster, change, &signing, format).await
        }
        DataCommand::Show { data, format } => {
            let digest = digest_of(&data)?;
            let Some(record) = client::data_record(&connect(target).await?, &digest).await? else {
                bail!("{digest} is not labelled: see `mobula data list`");
            };
            print(&[record], format, true)
        }
        DataCommand::List(format) => {
            print(&client::data(&connect(target).await?).await?, format, false)
        }
    }
}

async fn label(
    cluster: &Cluster,
    change: LabelChange,
    signing: &AdminSigning,
    format: Format,
) -> anyhow::Result<()> {
    let LabelChange {
        data,
        name,
        labels,
        expected_revision,
        ..
    } = &change;
    let signed = statement::labels(data, name, labels, *expected_revision);
    let envelope = signing.envelope(cluster, signed).await?;
    let record = client::label(cluster, LabelChange { envelope, ..change }).await?;
    print(&[record], format, true)
}

/// The name that was given, that of before, or that of the file.
fn name_of(given: Option<String>, known: Option<&DataRecord>, data: &str, digest: &str) -> String {
    let file = || {
        let name = Path::new(data).file_name().filter(|_| data != digest);
        name.map(|name| name.to_string_lossy().into_owned())
    };
    given
        .or_else(|| known.map(|known| known.name.clone()))
        .or_else(file)
        .unwrap_or_default()
}

/// BLAKE3, in hex, of the file `text`, or `text` itself if it is such a digest.
pub(super) fn digest_of(text: &str) -> anyhow::Result<String> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() == 64 && text.bytes().all(is_digit) {
        return Ok(text.to_owned());
    }
    let read = || {
        let mut hasher = blake3::Hasher::new();
        std::io::copy(&mut std::fs::File::open(text)?, &mut hasher)?;
        Ok::<_, std::io::Error>(hasher.finalize().to_hex().to_string())
    };
    read().with_context(|| {
        format!("`{text}` is neither 64 lower-case hexadecimal digits nor a file that can be read")
    })
}

fn print(records: &[DataRecord], format: Format, only_one: bool) -> anyhow::Result<()> {
    if format.json {
        return match records {
            [record] if only_one => print_json(record),
            _ => print_json(&records),
        };
    }
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = records
        .iter()
        .map(|record| {
            let labels: Vec<&str> = record.labels.iter().map(String::as_str).collect();
            vec![
                record.digest.clone(),
                or_dash(Some(&record.name).filter(|name| !name.is_empty())),
                or_dash(Some(labels.join(",")).filter(|labels| !labels.is_empty())),
                age(record.since_ms, now_ms),
            ]
        })
        .collect();
    print_table(&["BLAKE3", "NAME", "LABELS", "AGE"], &rows);
    Ok(())
}
