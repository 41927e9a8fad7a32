//! Plants one defect after the other in the head and lets the simulator look for it.
//!
//! `cargo xtask mutants [NAME…] [--minutes T] [--seed N] [--clean-seeds M]`: all of them, or those
//! that are named. Ends
//! with 1 if one was not found in time, and with 2 if the simulator finds something where nothing
//! is planted.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use mobula_chaos::sim::{Campaign, EVENTS_MAX, run, run_many};
use mobula_core::mutant::{Mutant, plant};

/// Seeds that run without any defect first: what fails there would be "found" everywhere.
const CLEAN_SEEDS: u64 = 500;

struct Arguments {
    mutants: Vec<Mutant>,
    minutes: f64,
    first_seed: u64,
    clean_seeds: u64,
}

fn arguments() -> Result<Arguments, String> {
    let mut found = Arguments {
        mutants: Vec::new(),
        minutes: 10.0,
        first_seed: 1,
        clean_seeds: CLEAN_SEEDS,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--minutes" => {
                let text = value()?;
                found.minutes = text.parse().map_err(|_| format!("`{text}`: no number"))?;
            }
            "--seed" => {
                let text = value()?;
                found.first_seed = text.parse().map_err(|_| format!("`{text}`: no seed"))?;
            }
            "--clean-seeds" => {
                let text = value()?;
                found.clean_seeds = text.parse().map_err(|_| format!("`{text}`: no number"))?;
            }
            name => {
                let known = Mutant::ALL.iter().find(|mutant| mutant.name() == name);
                let all: Vec<_> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
                let unknown =
                    || format!("no defect is called `{name}`; there are {}", all.join(", "));
                found.mutants.push(*known.ok_or_else(unknown)?);
            }
        }
    }
    if found.mutants.is_empty() {
        found.mutants = Mutant::ALL.to_vec();
    }
    Ok(found)
}

/// How one hunt ended.
struct Hunted {
    seeds: u64,
    elapsed: Duration,
    /// The rule that was broken.
    found: Option<&'static str>,
}

/// Looks for one defect as long as the campaign says. What fails without the defect as well is not its
/// doing, and the hunt goes on behind it.
fn hunt(mutant: Mutant, campaign: &Campaign) -> Hunted {
    let began = Instant::now();
    let mut hunted = Hunted {
        seeds: 0,
        elapsed: Duration::ZERO,
        found: None,
    };
    let mut campaign = campaign.clone();
    let time_max = campaign.time_max.unwrap_or(Duration::MAX);
    loop {
        campaign.time_max = Some(time_max.saturating_sub(began.elapsed()));
        let summary = run_many(&campaign, || plant(Some(mutant)), |_| {});
        hunted.seeds += summary.seeds;
        let failed = summary.failures.first();
        let by_defect = failed.filter(|report| is_clean(report.seed));
        hunted.found = by_defect.and_then(|report| Some(report.violation.as_ref()?.rule));
        hunted.elapsed = began.elapsed();
        if hunted.found.is_some() || failed.is_none() {
            return hunted;
        }
        campaign.first_seed += summary.seeds;
    }
}

/// Whether nothing is wrong with a seed where nothing is planted.
fn is_clean(seed: u64) -> bool {
    let clean = run(seed, EVENTS_MAX, false).violation.is_none();
    if !clean {
        println!("seed {seed} fails where nothing is planted, too");
    }
    clean
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::FAILURE;
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let campaign = Campaign {
        first_seed: arguments.first_seed,
        seeds: None,
        time_max: Some(Duration::from_secs_f64(arguments.minutes.max(0.0) * 60.0)),
        events_max: EVENTS_MAX,
        threads,
        stops_at_failure: true,
    };
    let clean = Campaign {
        seeds: Some(arguments.clean_seeds),
        time_max: None,
        stops_at_failure: false,
        ..campaign.clone()
    };
    let nothing = run_many(&clean, || plant(None), |_| {});
    for report in &nothing.failures {
        if let Some(violation) = &report.violation {
            println!(
                "nothing is planted, and seed {} fails: {violation}",
                report.seed
            );
        }
    }
    if nothing.failed > 0 {
        println!("{} of {} seeds fail", nothing.failed, nothing.seeds);
        return ExitCode::from(2);
    }
    println!(
        "nothing planted: {} seeds in {:.1} s ({:.0} an hour a core), nothing found",
        nothing.seeds,
        nothing.elapsed.as_secs_f64(),
        nothing.seeds_per_core_hour(threads)
    );
    println!("{:<26} {:>6} {:>8}  how", "defect", "seeds", "seconds");
    let mut missed = 0;
    for mutant in &arguments.mutants {
        let hunted = hunt(*mutant, &campaign);
        missed += usize::from(hunted.found.is_none());
        println!(
            "{:<26} {:>6} {:>8.1}  {}",
            mutant.name(),
            hunted.seeds,
            hunted.elapsed.as_secs_f64(),
            hunted.found.unwrap_or("NOT FOUND")
        );
    }
    let all = arguments.mutants.len();
    println!(
        "{} of {all} found, {threads} threads, {} minutes each at the most",
        all - missed,
        arguments.minutes
    );
    if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
