//! `mobula chaos sim`: a seed is a run, whoever runs it and however often, and a failing one names the
//! command that does it again.

use std::process::Output;

use crate::support::{mobula, text_of};

fn simulate(arguments: &[&str]) -> Output {
    mobula()
        .args(["chaos", "sim"])
        .args(arguments)
        .output()
        .unwrap()
}

/// What is behind `name` in the lines of a run's report.
fn line_of(output: &Output, name: &str) -> String {
    let text = text_of(output);
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no line `{name}` in: {text}"))
        .trim()
        .to_owned()
}

#[test]
fn a_seed_is_a_run_in_any_process() {
    let traces: Vec<String> = (0..2)
        .map(|_| {
            let output = simulate(&["--seed", "17"]);
            assert!(output.status.success(), "{}", text_of(&output));
            assert_eq!(line_of(&output, "result"), "every promise was kept");
            line_of(&output, "trace")
        })
        .collect();
    assert_eq!(traces[0], traces[1]);
    let other = simulate(&["--seed", "18"]);
    assert_ne!(line_of(&other, "trace"), traces[0]);
}

#[test]
fn a_failing_seed_prints_one_command_that_repeats_it() {
    // Cut short, any run is one that does not end.
    let one = simulate(&["--seed", "17", "--events-max", "500"]);
    assert_eq!(one.status.code(), Some(1), "{}", text_of(&one));
    let command = line_of(&one, "again");
    assert_eq!(
        command,
        "mobula chaos sim --seed 17 --verbose --events-max 500"
    );
    let words: Vec<&str> = command.split(' ').skip(3).collect();
    let again = simulate(&words);
    assert_eq!(line_of(&again, "trace"), line_of(&one, "trace"));
    assert_eq!(line_of(&again, "result"), line_of(&one, "result"));

    let many = simulate(&["--seed", "17", "--seeds", "2", "--events-max", "500"]);
    assert_eq!(many.status.code(), Some(1), "{}", text_of(&many));
    let text = text_of(&many);
    assert!(text.contains(&command), "{text}");
    assert!(text.contains("--seed 18"), "{text}");
}
