//! `mobula explain`.

use anyhow::bail;
use mobula_core::id::{ActorId, JobId};
use mobula_wire::control::ExplainRequest;
use mobula_wire::control::explain_request::Subject;

use crate::args::{ExplainArguments, Target};
use crate::connect::connect;
use crate::output::{print_json, print_table};

fn subject(id: &str) -> anyhow::Result<Subject> {
    if id.starts_with("job-") {
        return Ok(Subject::Job(id.parse::<JobId>()?.0));
    }
    if id.starts_with("actor-") {
        return Ok(Subject::Actor(id.parse::<ActorId>()?.0));
    }
    bail!("`{id}` does not say what is meant: write job-<number> or actor-<number>")
}

pub(crate) async fn run(target: &Target, arguments: ExplainArguments) -> anyhow::Result<()> {
    let subject = subject(&arguments.id)?;
    let cluster = connect(target).await?;
    let reply = cluster
        .control()
        .read("explain", |mut client| {
            let request = ExplainRequest {
                subject: Some(subject),
            };
            async move { client.explain(request).await }
        })
        .await?;
    if arguments.format.json {
        return print_json(&reply);
    }
    println!("{} is {}: {}", reply.subject, reply.state, reply.verdict);
    if !reply.nodes.is_empty() {
        let rows: Vec<Vec<String>> = reply
            .nodes
            .iter()
            .map(|node| {
                let fits = if node.fits { "yes" } else { "no" };
                vec![node.name.clone(), fits.to_owned(), node.reason.clone()]
            })
            .collect();
        print_table(&["NODE", "FITS", "REASON"], &rows);
    }
    if let Some(problem) = &reply.storage_problem {
        println!(
            "the object store does not answer, and what is loaded or saved there waits: {problem}"
        );
    }
    if !reply.next_step.is_empty() {
        println!("next: {}", reply.next_step);
    }
    Ok(())
}
