//! A job with files and environment of its own: counts words in the files that were shipped with
//! it, beside each other, and returns the counts as the job's result.
//!
//! `mobula submit target/debug/examples/word_count --follow --file LICENSE --file README.md:readme
//! --env WORD=the -- LICENSE readme`

use std::collections::BTreeMap;

use mobula::prelude::*;

struct Counter;

#[mobula::actor]
impl Counter {
    fn new() -> Self {
        Counter
    }

    /// How often `word` stands in a file of the job's working directory.
    async fn count(&self, file: String, word: String) -> Result<u64, String> {
        let text = std::fs::read_to_string(&file).map_err(|error| format!("{file}: {error}"))?;
        let words = text.split(|c: char| !c.is_alphanumeric());
        let found = words.filter(|found| found.eq_ignore_ascii_case(&word));
        Ok(found.count() as u64)
    }
}

#[mobula::main]
async fn main(cluster: Cluster, files: Vec<String>) -> mobula::Result<BTreeMap<String, u64>> {
    let word = std::env::var("WORD").unwrap_or_else(|_| "the".to_owned());
    let mut counters = Vec::new();
    for _ in &files {
        counters.push(cluster.actor(Counter::new()).spawn().await?);
    }
    let mut counts = BTreeMap::new();
    for (file, counter) in files.into_iter().zip(&counters) {
        match counter.count(file.clone(), word.clone()).await {
            Ok(count) => {
                println!("{file}: {count} times `{word}`");
                counts.insert(file, count);
            }
            // A file that is not there will not be there at a second try either.
            Err(CallFailure::User(reason)) => return Err(reason.into()),
            Err(CallFailure::System(error)) => return Err(error),
        }
    }
    Ok(counts)
}
