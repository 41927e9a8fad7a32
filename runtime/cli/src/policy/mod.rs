//! `mobula policy`, and what it shares with `mobula data` and `mobula approvals`.

pub(crate) mod approvals;
pub(crate) mod data;

use std::path::Path;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::envelope::Envelope;
use mobula_actors::registry::policy::approvals::Subject;
use mobula_actors::registry::policy::data::DataSet;
use mobula_actors::registry::policy::file::PolicyFile;
use mobula_actors::registry::policy::gate::{Decision, Request};
use mobula_actors::registry::policy::{client, engine};
use mobula_actors::registry::search::Selector;
use mobula_actors::registry::statement;
use mobula_core::clock::Clock;
use serde::Serialize;
use serde_json::json;

use crate::args::{ActionArgument, AdminSigning, PolicyCommand, SubjectArguments, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::models::name::VersionName;
use crate::output::{age, print_json, print_table};

/// The policies as `--json` prints them.
#[derive(Serialize)]
struct PolicyJson {
    revision: u64,
    since_ms: Option<u64>,
    text: String,
    policies: Vec<engine::Listed>,
}

impl PolicyJson {
    fn of(file: PolicyFile) -> anyhow::Result<Self> {
        Ok(PolicyJson {
            revision: file.revision,
            since_ms: (file.revision > 0).then_some(file.since_ms),
            policies: engine::list(&file.text)?,
            text: file.text,
        })
    }
}

pub(crate) async fn run(target: &Target, command: PolicyCommand) -> anyhow::Result<()> {
    match command {
        PolicyCommand::Show(format) => {
            let file = client::policy_file(&connect(target).await?).await?;
            if format.json {
                return print_json(&PolicyJson::of(file)?);
            }
            print!("// The shipped policies.\n\n{}", engine::BASE);
            match file.revision {
                0 => println!("\n// No others were ever set."),
                revision => println!(
                    "\n// Revision {revision}, set {} ago.\n\n{}",
                    age(file.since_ms, SystemClock.now_ms()),
                    file.text.trim_end()
                ),
            }
            Ok(())
        }
        PolicyCommand::Schema => {
            print!("{}", engine::SCHEMA);
            Ok(())
        }
        PolicyCommand::Set {
            file,
            signing,
            revision,
            format,
        } => {
            let text = read_checked(&file)?;
            set(target, &text, &signing, revision, format.json).await
        }
        PolicyCommand::Remove { signing, format } => {
            set(target, "", &signing, None, format.json).await
        }
        PolicyCommand::Check { file, format } => {
            let text = read_checked(&file)?;
            let policies = engine::check(&text)?;
            if format.json {
                return print_json(&json!({ "policies": policies }));
            }
            println!("{} policies: {}", policies.len(), policies.join(", "));
            Ok(())
        }
        PolicyCommand::Explain {
            subject,
            principal,
            endpoint,
            rollout,
            format,
        } => {
            let cluster = connect(target).await?;
            let subject = resolve(&cluster, &subject).await?;
            let request = request(subject, endpoint, rollout);
            let decision = client::explain(&cluster, &principal, request).await?;
            if format.json {
                return print_json(&decision);
            }
            print_decision(&decision);
            Ok(())
        }
    }
}

/// The policies in a file, which a head would accept.
fn read_checked(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    engine::check(&text).with_context(|| path.display().to_string())?;
    Ok(text)
}

async fn set(
    target: &Target,
    text: &str,
    signing: &AdminSigning,
    revision: Option<u64>,
    json: bool,
) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let revision = match revision {
        Some(revision) => revision,
        None => client::policy_file(&cluster).await?.revision,
    };
    let envelope = signing
        .envelope(&cluster, statement::policy_file(text, revision))
        .await?;
    let file = client::set_policy_file(&cluster, text, revision, envelope).await?;
    let shown = PolicyJson::of(file)?;
    if json {
        return print_json(&shown);
    }
    let ids: Vec<&str> = shown
        .policies
        .iter()
        .map(|policy| policy.id.as_str())
        .collect();
    println!(
        "revision {}: {} are in force",
        shown.revision,
        ids.join(", ")
    );
    Ok(())
}

impl AdminSigning {
    /// `statement` with the admin's signature, if a key was given.
    pub(crate) async fn envelope(
        &self,
        cluster: &Cluster,
        statement: Vec<u8>,
    ) -> anyhow::Result<Option<Envelope>> {
        let Some(key) = &self.sign_with else {
            return Ok(None);
        };
        key.envelope(cluster, statement).await.map(Some)
    }
}

/// What `arguments` name.
async fn resolve(cluster: &Cluster, arguments: &SubjectArguments) -> anyhow::Result<Subject> {
    let what = arguments.what.as_str();
    if arguments.to.is_some() && arguments.action != ActionArgument::Promote {
        bail!("--to is about promotions: leave it out");
    }
    if arguments.action == ActionArgument::Train {
        let data = data::digest_of(what)?;
        return Ok(Subject::Train { data });
    }
    let name: VersionName = what.parse().map_err(|why: String| anyhow::anyhow!(why))?;
    let model = name.model;
    if name.selector == Selector::Newest {
        bail!("say which version of `{model}`, as `{model}:1`: see `mobula models show {model}`");
    }
    let view = mobula_actors::registry::client::view(cluster, &model, name.selector).await?;
    let version = view.version.version;
    Ok(match arguments.action {
        ActionArgument::Deploy => Subject::Deploy { model, version },
        _ => {
            let to = arguments
                .to
                .context("say which stage: --to staging or --to production")?
                .into();
            Subject::Promote { model, version, to }
        }
    })
}

fn request(subject: Subject, endpoint: Option<String>, rollout: bool) -> Request {
    match subject {
        Subject::Train { data } => Request::Train {
            data: DataSet {
                digest: data,
                files: Vec::new(),
            },
            parent: None,
        },
        Subject::Promote { model, version, to } => Request::Promote {
            model,
            version,
            to,
            signers: Vec::new(),
        },
        Subject::Deploy { model, version } => Request::Deploy {
            endpoint: endpoint.unwrap_or_else(|| model.clone()),
            model,
            version,
            rollout,
        },
    }
}

fn print_decision(decision: &Decision) {
    let word = match decision.permitted {
        true => "permitted",
        false => "forbidden",
    };
    println!("{word}: {}", decision.subject);
    let rows: Vec<Vec<String>> = decision
        .policies
        .iter()
        .map(|policy| {
            let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
            vec![policy.id.clone(), text(&policy.reason), text(&policy.next)]
        })
        .collect();
    print_table(&["POLICY", "REASON", "NEXT"], &rows);
    if let Some(refusal) = decision.refusal() {
        println!("{refusal}");
    }
}
