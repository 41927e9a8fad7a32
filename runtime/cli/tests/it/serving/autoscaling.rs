//! An endpoint on processes that scales with what is asked of it, and one whose replica hangs.

use serde_json::{Value, json};

use super::served::{Served, request_of};
use crate::observe::assert_serving_exported;
use crate::support::{kill_9, signal, wait_for};

/// The least that tells load from none while the machine is busy with other tests.
const QUICK: [&str; 8] = [
    "--window",
    "4s",
    "--idle-after",
    "3s",
    "--up-window",
    "1s",
    "--down-window",
    "2s",
];

fn explained(served: &Served) -> Value {
    served.cluster.json(&["serve", "explain", "digits"])
}

fn scale(served: &Served, options: &[&str]) -> Value {
    let arguments = [&["serve", "scale", "digits"], options].concat();
    served.cluster.json(&arguments)
}

/// How the number of replicas was changed: from, to, why.
fn changes(explained: &Value) -> Vec<(u64, u64, String)> {
    let changes = explained["changes"].as_array().unwrap().iter();
    let number = |value: &Value| value.as_u64().unwrap();
    changes
        .map(|change| {
            let cause = change["cause"].as_str().unwrap().to_owned();
            (number(&change["from"]), number(&change["to"]), cause)
        })
        .collect()
}

fn wait_asleep(served: &Served) {
    wait_for("the last replica to end", || {
        let is_asleep = explained(served)["replicas_running"] == 0
            && served.actors("serving/digits/v1/replica-").is_empty();
        is_asleep.then_some(())
    });
}

#[test]
fn an_endpoint_sleeps_wakes_with_a_request_and_grows_with_the_load() {
    let served = Served::up(2);
    let options = ["--replicas", "0..3", "--target-rate", "10"];
    // So that only the rate counts: how many are in flight depends on the machine.
    let others = ["--target-in-flight", "10000"];
    let set = scale(&served, &[&options[..], &others, &QUICK].concat());
    assert_eq!(set["policy"]["replicas_max"], 3, "{set}");
    wait_asleep(&served);
    // Whoever sends requests here must not be told to go elsewhere.
    for path in ["/v2/health/ready", "/v2/models/digits/ready"] {
        assert_eq!(served.get(path).status, 200, "{path}");
    }

    // The first request is answered by a replica that did not exist when it came.
    let one = request_of(served.image(0));
    let answer = served.infer(&one);
    assert_eq!(answer.status, 200, "{}", answer.json());
    let woken = changes(&explained(&served));
    assert!(woken.contains(&(0, 1, "wake".to_owned())), "{woken:?}");

    let grown = wait_for("the replicas to become three", || {
        for status in served.infer_at_once(&one, 50) {
            assert_eq!(status, 200);
        }
        let explained = explained(&served);
        (explained["replicas_running"] == 3).then_some(explained)
    });
    let last = grown["changes"].as_array().unwrap().last().unwrap();
    assert_eq!(last["to"], 3, "{last}");
    assert!(
        last["figures"]["rate_milli"].as_u64().unwrap() > 20_000,
        "{last}"
    );
    let text = served.cluster.ok(&["serve", "explain", "digits"]);
    assert!(
        text.contains("more requests a second than the target"),
        "{text}"
    );

    // The router is on one of them, and the replicas are where there is room.
    let exported = ["worker-1", "worker-2"]
        .map(|worker| served.cluster.ok(&["metrics", worker]))
        .concat();
    assert_serving_exported(&exported);
    let head = served.cluster.ok(&["metrics"]);
    for line in [
        "ml_model_deployments_active 1",
        "mobula_endpoint_replicas_wanted{endpoint=\"digits\"} ",
        "ml_training_jobs_total{state=\"succeeded\"} 1",
        // One image again and again may have filled a window, which then looks like nothing else.
        "mobula_drift_endpoints_drifting ",
    ] {
        assert!(
            head.lines().any(|found| found.starts_with(line)),
            "no `{line}`: {head}"
        );
    }

    // Nothing is asked any more: half of them, one, none.
    wait_asleep(&served);
    let all = changes(&explained(&served));
    assert_eq!(all.last().map(|change| change.1), Some(0), "{all:?}");
    for (from, to, cause) in &all {
        assert!(*to <= 2 * (*from).max(1) && *to >= from / 2, "{all:?}");
        assert!(*to != 0 || cause == "idle", "{all:?}");
    }
    // The number survives its router.
    let router = served.actors("serving/digits/router")[0]["pid"].as_u64();
    kill_9(u32::try_from(router.unwrap()).unwrap());
    wait_for("another router to wake the endpoint", || {
        let listed = served.cluster.json(&["serve", "list"]);
        let url = listed[0]["url"].as_str()?.to_owned();
        let answer = served.try_infer(&url, &one).ok()?;
        (answer.status == 200).then_some(())
    });
}

#[test]
fn bounds_and_limits_that_an_operator_sets_hold_at_once() {
    let served = Served::up(1);
    let one = request_of(served.image(0));
    scale(&served, &["--replicas", "1"]);
    wait_for("one replica", || {
        let running = served.actors("serving/digits/v1/replica-").len();
        (running == 1).then_some(())
    });
    assert_eq!(served.infer(&one).status, 200);
    let shown = scale(&served, &["--rate-limit", "1"]);
    assert_eq!(shown["policy"]["rate_limit"], 1, "{shown}");
    let refused = wait_for("a request above the limit", || {
        let answer = served.infer(&one);
        (answer.status != 200).then_some(answer)
    });
    assert_eq!(refused.status, 429, "{}", refused.json());
    assert_eq!(refused.headers["retry-after"], "1");
    let error = refused.json()["error"].to_string();
    assert!(error.contains("1 requests a second"), "{error}");
    scale(&served, &["--rate-limit", "none"]);

    for (options, expected) in [
        (["--replicas", "5..2"], "5..2 replicas are not possible"),
        (["--replicas", "1..65"], "1 to 64"),
        (["--idle-after", "1ms"], "(`--idle-after`) of 1ms"),
        (["--schedule", "mondays 2..3"], "is no schedule"),
    ] {
        let arguments = [&["serve", "scale", "digits"], &options[..]].concat();
        let text = served.cluster.refused(&arguments);
        assert!(text.contains(expected), "{text}");
    }
    let text = served.cluster.refused(&["serve", "explain", "faces"]);
    assert!(text.contains("mobula serve list"), "{text}");
}

#[test]
fn a_replica_that_hangs_costs_no_answer() {
    let served = Served::up(2);
    let pid_of = |name: &str| {
        wait_for("the process of a replica", || {
            let actors = served.actors(name);
            u32::try_from(actors.first()?["pid"].as_u64()?).ok()
        })
    };
    let mut request = request_of(served.image(0));
    // Microseconds, as Triton's clients send them.
    request["parameters"] = json!({"timeout": 3_000_000});
    assert_eq!(served.infer(&request).status, 200);
    let hung = pid_of("serving/digits/v1/replica-1");
    assert_ne!(hung, pid_of("serving/digits/v1/replica-2"));
    signal(hung, libc::SIGSTOP);
    for round in 0..10 {
        for status in served.infer_at_once(&request, 4) {
            assert_eq!(status, 200, "{round}");
        }
    }
    signal(hung, libc::SIGCONT);

    // With all of them away there is nobody to answer, and the caller is told in its own time.
    let mut brief = request.clone();
    brief["parameters"] = json!({"timeout": 200_000});
    let both = ["serving/digits/v1/replica-1", "serving/digits/v1/replica-2"].map(pid_of);
    both.iter().for_each(|pid| signal(*pid, libc::SIGSTOP));
    let answer = served.infer(&brief);
    both.iter().for_each(|pid| signal(*pid, libc::SIGCONT));
    assert!([503, 504].contains(&answer.status), "{}", answer.json());
    for wrong in [json!("soon"), json!(-1), json!(0.5)] {
        brief["parameters"] = json!({"timeout": wrong});
        let answer = served.infer(&brief);
        let error = answer.json()["error"].to_string();
        assert_eq!(answer.status, 400, "{error}");
        assert!(error.contains("number of microseconds"), "{error}");
    }
    wait_for("answers as before", || {
        (served.infer(&request).status == 200).then_some(())
    });
}
