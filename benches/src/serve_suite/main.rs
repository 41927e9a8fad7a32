//! The serving suite: what an endpoint answers, how long it takes, where that time goes, and what happens when more is
//! asked than it can do.
//!
//! `cargo xtask bench serve` builds and starts it; see `benches/README.md`.

mod changes;
mod endpoint;
mod load;
mod parts;
mod target;
mod texts;

use std::path::PathBuf;
use std::time::Duration;

use mobula_benches::results::Results;

use endpoint::{Digits, Identity, RayServe};
use load::{Arrivals, Outcomes};
use target::Target;

/// What a part may end with.
type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Callers that ask one thing after the other.
const CALLERS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// Callers in a quick run.
const CALLERS_QUICK: [usize; 3] = [1, 8, 512];

/// Callers that keep an endpoint of two replicas as busy as it gets: more only wait longer.
const BUSY_CALLERS: usize = 64;

/// The same where the model takes the time: two full batches at each replica, one that is computed and one that waits.
const BUSY_CALLERS_WIDE: usize = 512;

/// A crowd whose callers wait no longer than so many times the 99th percentile of one who asks alone.
const CROWD: usize = 512;
const PATIENCE: [u32; 3] = [20, 10, 5];

/// The share of the most that was answered at which a service should be run, and at which its latencies count.
const USUAL_LOAD: f64 = 0.7;

/// How much more than the most that was answered is asked when overload is measured.
const OVERLOAD: f64 = 2.0;

/// What can be measured alone.
const PARTS: [&str; 8] = [
    "router", "identity", "texts", "endpoint", "open", "ingress", "wide", "changes",
];

/// How much is measured, and where the figures go.
#[derive(Debug, Clone)]
struct Options {
    /// Of [`PARTS`]; empty for all.
    only: Vec<String>,
    /// For each row.
    round: Duration,
    callers: &'static [usize],
    /// Asked while versions change.
    requests: u64,
    /// Where Mobula's programs are.
    programs: PathBuf,
    /// A tritonserver with the model `identity`, `ip:port` of its HTTP.
    triton: Option<String>,
    /// A Python that has Ray Serve.
    ray_python: Option<PathBuf>,
    /// The folder of a text encoder.
    encoder: Option<PathBuf>,
    output: Option<PathBuf>,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let programs = own.parent().ok_or("this program lies in no folder")?;
        let mut options = Options {
            only: Vec::new(),
            round: Duration::from_secs(5),
            callers: &CALLERS,
            requests: 1_000_000,
            programs: programs.to_owned(),
            triton: None,
            ray_python: None,
            encoder: None,
            output: None,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("`{arg}` needs a value"));
            match arg.as_str() {
                "--quick" => {
                    options.round = Duration::from_secs(1);
                    options.callers = &CALLERS_QUICK;
                    options.requests = 50_000;
                }
                "--only" => {
                    let part = value()?;
                    if !PARTS.contains(&part.as_str()) {
                        return Err(format!("`{part}` is none of {}", PARTS.join(", ")));
                    }
                    options.only.push(part);
                }
                "--triton" => options.triton = Some(value()?),
                "--ray-python" => options.ray_python = Some(value()?.into()),
                "--encoder" => options.encoder = Some(value()?.into()),
                "--output" => options.output = Some(value()?.into()),
                unknown => {
                    return Err(format!(
                        "unknown argument `{unknown}`: there are --quick, --only PART, --triton IP:PORT, --ray-python FILE, \
                         --encoder FOLDER and --output FILE"
                    ));
                }
            }
        }
        if options.encoder.is_none() && options.only.iter().any(|part| part == "texts") {
            return Err("`texts` needs --encoder FOLDER, or --peers, which fetches one".to_owned());
        }
        Ok(options)
    }

    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == part)
    }
}

fn main() -> Outcome {
    let options = Options::parse(std::env::args().skip(1))?;
    let mut results = Results::begin("serve");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(measure(&options, &mut results))?;
    if let Some(path) = &options.output {
        results.save(path)?;
        println!("written to {}", path.display());
    }
    Ok(())
}

async fn measure(options: &Options, results: &mut Results) -> Outcome {
    if options.wants("router") {
        parts::in_process(options.round, results).await?;
    }
    if options.wants("identity") {
        identity(options, results).await?;
    }
    let encoder = options.encoder.as_ref().filter(|_| options.wants("texts"));
    if let Some(folder) = encoder {
        texts::by_themselves(folder, options.round, results)?;
    }
    let of_a_cluster = ["identity", "endpoint", "open", "ingress", "wide", "changes"];
    if encoder.is_none() && !of_a_cluster.iter().any(|part| options.wants(part)) {
        return Ok(());
    }
    let digits = Digits::deploy(&options.programs).await?;
    if options.wants("identity") {
        let target = digits.identity()?;
        closed(options, results, "identity, 2 replicas", &target).await?;
    }
    if let Some(folder) = encoder {
        let target = digits.encoder(folder, &texts::question())?;
        closed(options, results, "a text, 2 replicas", &target).await?;
    }
    if options.wants("endpoint") {
        parts::of_an_endpoint(options.round, results, &digits.target).await?;
        closed(options, results, "digits, 2 replicas", &digits.target).await?;
    }
    if options.wants("open") {
        open(options, results, "digits", BUSY_CALLERS, &digits.target).await?;
    }
    if options.wants("ingress") {
        let target = digits.through_ingress()?;
        open(
            options,
            results,
            "digits through an ingress",
            BUSY_CALLERS,
            &target,
        )
        .await?;
    }
    if options.wants("wide") {
        let wide = digits.wide().await?;
        open(options, results, "wide", BUSY_CALLERS_WIDE, &wide).await?;
    }
    if options.wants("changes") {
        changes::measure(results, &digits, options.requests).await?;
    }
    Ok(())
}

/// Servers that answer with what they are sent.
async fn identity(options: &Options, results: &mut Results) -> Outcome {
    {
        let ours = Identity::start(&options.programs)?;
        let name = "identity, the protocol alone";
        closed(options, results, name, &ours.target).await?;
    }
    if let Some(triton) = &options.triton {
        let target = Target::identity(triton, "");
        closed(options, results, "identity, tritonserver", &target).await?;
    }
    if let Some(python) = &options.ray_python {
        let ray = RayServe::start(python)?;
        closed(options, results, "identity, Ray Serve", &ray.target).await?;
    }
    Ok(())
}

/// Callers that each wait for their answer.
async fn closed(options: &Options, results: &mut Results, name: &str, target: &Target) -> Outcome {
    for callers in options.callers {
        load::closed(target, *callers, options.round / 10).await?;
        let outcomes = load::closed(target, *callers, options.round).await?;
        let row = format!("{name}, {callers} callers");
        results.rate(&row, outcomes.answered_per_second(), &outcomes.answered);
        tell_the_rest(results, &row, &outcomes);
    }
    Ok(())
}

/// Requests that come when they come, as those of many independent people do.
async fn open(
    options: &Options,
    results: &mut Results,
    model: &str,
    busy_callers: usize,
    target: &Target,
) -> Outcome {
    load::closed(target, busy_callers, options.round / 2).await?;
    let alone = load::closed(target, 1, options.round).await?;
    let row = format!("{model}, 1 callers");
    results.rate(&row, alone.answered_per_second(), &alone.answered);
    let p99_alone = alone.answered.value_at_quantile(0.99).max(1) as f64;
    // What an endpoint can do; and what this machine, generator and all, can do over as many connections as a crowd has.
    let mut most = Vec::new();
    for callers in [busy_callers, load::CONNECTIONS] {
        let outcomes = load::closed(target, callers, options.round).await?;
        let row = format!("{model}, the most: {callers} callers");
        most.push((callers, outcomes.answered_per_second()));
        tell_beside_one(results, &row, &outcomes, p99_alone);
    }
    hurried(options, results, model, p99_alone, target).await?;
    let [few, crowd] = [most[0], most[1]];
    for (name, share, (connections, of)) in [
        ("usual load", USUAL_LOAD, few),
        ("usual load", USUAL_LOAD, crowd),
        ("overload", OVERLOAD, crowd),
    ] {
        let arrivals = Arrivals {
            per_second: of * share,
            seed: 7,
            connections,
        };
        let outcomes = load::open(target, arrivals, options.round).await?;
        let row = format!(
            "{model}, open loop, {name}: {share} of the most with {connections} callers, seed 7"
        );
        tell_beside_one(results, &row, &outcomes, p99_alone);
        for (callers, most) in &most {
            let goodput = outcomes.answered_per_second() / most.max(f64::MIN_POSITIVE) * 100.0;
            let row = format!("{row}: goodput of the most with {callers} callers");
            results.figure(&row, goodput, "%");
        }
    }
    Ok(())
}

/// A crowd that is in a hurry: who would be answered later than that is refused, and asks again at once.
async fn hurried(
    options: &Options,
    results: &mut Results,
    model: &str,
    p99_alone: f64,
    target: &Target,
) -> Outcome {
    for patience in PATIENCE {
        let limit = Duration::from_nanos(p99_alone as u64) * patience;
        let outcomes = load::closed(&target.within(limit), CROWD, options.round).await?;
        let row = format!(
            "{model}, {CROWD} callers, each for at most {patience} times the p99 of one, {} µs",
            limit.as_micros()
        );
        tell_beside_one(results, &row, &outcomes, p99_alone);
    }
    Ok(())
}

/// All of a row, its 99th percentile also in those of a caller who asks alone, in nanoseconds.
fn tell_beside_one(results: &mut Results, row: &str, outcomes: &Outcomes, p99_alone: f64) {
    results.rate(row, outcomes.answered_per_second(), &outcomes.answered);
    tell_the_rest(results, row, outcomes);
    let times = outcomes.answered.value_at_quantile(0.99) as f64 / p99_alone;
    results.figure(
        &format!("{row}: p99 in those of one caller"),
        times,
        "times",
    );
}

fn tell_the_rest(results: &mut Results, row: &str, outcomes: &Outcomes) {
    if !outcomes.refused.is_empty() {
        let per_second = outcomes.per_second(&outcomes.refused);
        results.rate(&format!("{row}: refused"), per_second, &outcomes.refused);
    }
    if outcomes.late > 0 {
        let late = outcomes.late as f64;
        results.figure(&format!("{row}: late"), late, "requests");
    }
    if outcomes.unanswered > 0 {
        let unanswered = outcomes.unanswered as f64;
        results.figure(&format!("{row}: without an answer"), unanswered, "requests");
    }
}
