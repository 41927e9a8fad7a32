//! Detached actors: they outlive the job that made them, are called by others of their namespace and by
//! nobody else, and survive what any actor survives.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::examples::example;
use crate::extra_worker::ExtraWorker;
use crate::heads::leader;
use crate::support::{TestCluster, kill_9, mobula, runs, signal, text_of, wait_for};

/// What the jobs of these tests do: `open`, `sell <times>`, `close`.
struct Shop {
    cluster: TestCluster,
    program: PathBuf,
}

impl Shop {
    fn on(cluster: TestCluster) -> Self {
        Shop {
            cluster,
            program: example("detached"),
        }
    }

    /// Starts a job in the namespace `shop`; its id.
    fn begin(&self, words: &[&str]) -> String {
        self.begin_with(&[], words)
    }

    fn begin_with(&self, options: &[&str], words: &[&str]) -> String {
        let program = self.program.to_str().unwrap();
        let mut arguments = vec!["submit", "--json", program, "--namespace", "shop"];
        arguments.extend(options);
        arguments.push("--");
        arguments.extend(words);
        let submitted: Value = serde_json::from_str(&self.cluster.ok(&arguments)).unwrap();
        format!("job-{}", submitted["job"])
    }

    /// Runs a job to its end; how many were sold by then.
    fn run(&self, words: &[&str]) -> u64 {
        let job = self.begin(words);
        self.cluster.result_of(&job).as_u64().unwrap()
    }

    /// The till, as `actors list` shows it, if it lives.
    fn till(&self) -> Option<Value> {
        let output = self.cluster.run(&["actors", "list", "--json"]);
        // A head that is being started again cannot answer.
        let actors: Value = serde_json::from_slice(&output.stdout).ok()?;
        let tills: Vec<&Value> = actors
            .as_array()?
            .iter()
            .filter(|actor| actor["name"] == "till" && actor["state"] != "ended")
            .collect();
        assert!(tills.len() <= 1, "{tills:?}");
        tills.first().map(|till| (*till).clone())
    }

    fn running_till(&self) -> Value {
        wait_for("a till that runs", || {
            self.till().filter(|till| till["state"] == "running")
        })
    }
}

fn pid_of(till: &Value) -> u32 {
    u32::try_from(till["pid"].as_u64().unwrap()).unwrap()
}

#[test]
fn it_outlives_its_job_serves_others_and_ends_when_it_is_stopped() {
    let shop = Shop::on(TestCluster::up(1));
    let cluster = &shop.cluster;
    assert_eq!(shop.run(&["open"]), 0);
    let till = shop.running_till();
    assert_eq!(
        (&till["namespace"], &till["detached"]),
        (&json!("shop"), &json!(true))
    );
    let home = format!("job-{}", till["job"]);
    let shown = cluster.json(&["jobs", "show", &home]);
    let facts = ["state", "driver", "namespace", "detached_actors", "name"].map(|key| &shown[key]);
    assert_eq!(
        facts,
        [
            &json!("running"),
            &json!(0),
            &json!("shop"),
            &json!(1),
            &json!("detached-shop")
        ]
    );
    let explained = cluster.ok(&["explain", &home]);
    assert!(
        explained.contains("lives with its detached actors"),
        "{explained}"
    );

    // Another job calls it and finds what the one before left; and once more from nothing but its disk.
    assert_eq!(shop.run(&["sell", "3"]), 3);
    kill_9(pid_of(&till));
    assert_eq!(shop.run(&["sell", "4"]), 7);

    // A job of another namespace, or of none, cannot find it, call it, stop it, or be told where it is.
    let program = example("neighbours");
    let program = program.to_str().unwrap();
    let till = shop.running_till();
    let known = json!({
        "job": till["job"],
        "actor": till["id"],
        "incarnation": till["incarnation"],
        "object": [],
    });
    let known = known.to_string();
    for namespace in [&[][..], &["--namespace", "farm"]] {
        let mut arguments = vec!["submit", "--json", program];
        arguments.extend(namespace);
        arguments.extend(["--", "try", &known]);
        let submitted: Value = serde_json::from_str(&cluster.ok(&arguments)).unwrap();
        let tried = cluster.result_of(&format!("job-{}", submitted["job"]));
        for attempt in [
            "call its actor",
            "find its actor",
            "resolve its actor",
            "stop its actor",
            "start an actor in it",
            "list its actors",
            "stop it",
        ] {
            assert_eq!(tried[attempt], "permission_denied", "{attempt}: {tried}");
        }
    }

    // Another principal's job may not enter at all.
    let made = cluster.json(&["tokens", "create", "--role", "client", "--principal", "bob"]);
    let token = cluster.dir().join("stranger.token");
    std::fs::write(&token, made["token"].as_str().unwrap()).unwrap();
    let stranger = mobula()
        .args(["--api", cluster.api(), "--token-file"])
        .arg(&token)
        .arg("submit")
        .arg(&shop.program)
        .args(["--namespace", "shop", "--", "open"])
        .output()
        .unwrap();
    let refused = text_of(&stranger);
    assert!(!stranger.status.success(), "{refused}");
    assert!(refused.contains("belongs to `operator`"), "{refused}");

    // Closing it ends its job, and leaves no process.
    let pid = pid_of(&shop.running_till());
    assert_eq!(shop.run(&["close"]), 7);
    let ended = cluster.wait_job(&home);
    assert_eq!(ended["state"], "stopped", "{ended}");
    wait_for("the end of its process", || (!runs(pid)).then_some(()));
    // The name is free, and the next till is another one.
    assert_eq!(shop.run(&["open"]), 0);
    let listed = cluster.ok(&["actors", "list"]);
    assert!(listed.contains("shop (detached)"), "{listed}");
    let next = shop.running_till();
    let stopped = cluster.ok(&["actors", "stop", &format!("actor-{}", next["id"])]);
    assert!(stopped.contains("is stopping"), "{stopped}");
    cluster.wait_job(&format!("job-{}", next["job"]));
}

#[test]
fn two_jobs_that_create_it_at_once_get_the_same_and_stopping_either_leaves_it() {
    let shop = Shop::on(TestCluster::up(1));
    let jobs: Vec<String> = std::thread::scope(|scope| {
        let begin = || shop.begin(&["open", "sell", "20"]);
        let handles = [(); 3].map(|()| scope.spawn(begin));
        handles
            .into_iter()
            .map(|handle| handle.join().unwrap())
            .collect()
    });
    let results: Vec<u64> = jobs
        .iter()
        .map(|job| shop.cluster.result_of(job).as_u64().unwrap())
        .collect();
    assert!(results.contains(&60), "{results:?}");
    let keeping = shop.cluster.json(&["jobs", "list"]);
    let keeping: Vec<&Value> = keeping
        .as_array()
        .unwrap()
        .iter()
        .filter(|job| job["detached_actors"].is_u64())
        .collect();
    assert_eq!(keeping.len(), 1, "{keeping:?}");

    // A job that is stopped amid its calls takes nothing along.
    let busy = shop.begin(&["open", "sell", "1000000"]);
    wait_for("some sales", || (shop.run(&["open"]) > 60).then_some(()));
    shop.cluster.ok(&["jobs", "stop", &busy]);
    shop.cluster.wait_job(&busy);
    let sold = shop.run(&["open"]);
    assert_eq!(shop.run(&["sell", "1"]), sold + 1);
    // All of it ends with its own job.
    let home = format!("job-{}", shop.running_till()["job"]);
    shop.cluster.ok(&["jobs", "stop", &home]);
    assert_eq!(shop.cluster.wait_job(&home)["state"], "stopped");
}

#[test]
fn those_that_are_created_while_the_leader_goes_are_there_once() {
    let cluster = TestCluster::up_with(1, &["--heads", "3"], &[]);
    let program = example("many_shops");
    let enough = cluster.dir().join("enough");
    let submitted = cluster.ok(&[
        "submit",
        "--json",
        "--namespace",
        "mall",
        // Its driver sees no error: it is not started again.
        "--max-restarts",
        "0",
        program.to_str().unwrap(),
        "--",
        enough.to_str().unwrap(),
    ]);
    let submitted: Value = serde_json::from_str(&submitted).unwrap();
    // The names of those that have not ended; a head that has lost its leader may not answer.
    let open = || -> Option<Vec<Value>> {
        let output = cluster.run(&["actors", "list", "--json"]);
        let actors: Value = serde_json::from_slice(&output.stdout).ok()?;
        let is_open = |actor: &&Value| actor["detached"] == true && actor["state"] != "ended";
        Some(actors.as_array()?.iter().filter(is_open).cloned().collect())
    };
    let wait_for_shops = |count: usize| {
        wait_for(&format!("{count} shops"), || {
            let shops = open()?;
            (shops.len() >= count).then_some(shops.len())
        })
    };
    wait_for_shops(20);
    let lost = leader(&cluster);
    kill_9(cluster.pid(&lost));
    let then = wait_for_shops(1);
    // So it went in the midst of it.
    wait_for_shops(then + 50);
    std::fs::write(&enough, "").unwrap();
    let opened = cluster.result_of(&format!("job-{}", submitted["job"]));
    assert_ne!(leader(&cluster), lost);

    let shops = open().unwrap();
    assert_eq!(
        shops.len() as u64,
        opened,
        "none twice, none without its creator's word"
    );
    let names: BTreeSet<&str> = shops
        .iter()
        .filter_map(|shop| shop["name"].as_str())
        .collect();
    assert_eq!(names.len(), shops.len());
    let homes: BTreeSet<u64> = shops
        .iter()
        .filter_map(|shop| shop["job"].as_u64())
        .collect();
    assert_eq!(homes.len(), 1, "creators in which all is equal share a job");
    let home = format!("job-{}", shops[0]["job"]);
    let shown = cluster.json(&["jobs", "show", &home]);
    assert_eq!(shown["detached_actors"], opened, "{shown}");
    cluster.ok(&["jobs", "stop", &home]);
    assert_eq!(cluster.wait_job(&home)["state"], "stopped");
    assert_eq!(open().unwrap(), Vec::<Value>::new());
}

/// A stopped process keeps its connections and has not ended: its machine's worker alone can tell.
#[test]
fn one_whose_process_is_stopped_for_ever_starts_again_in_another() {
    let shop = Shop::on(TestCluster::up(0));
    let cluster = &shop.cluster;
    let limit = "stopped_process_limit_ms = 1000";
    let _worker = ExtraWorker::start(cluster, "impatient", limit);
    shop.run(&["open"]);
    assert_eq!(shop.run(&["sell", "3"]), 3);
    let till = shop.running_till();
    let stopped = pid_of(&till);
    signal(stopped, libc::SIGSTOP);
    let next = wait_for("the till in another process", || {
        let next = shop.till()?;
        (next["state"] == "running" && next["pid"] != till["pid"]).then_some(next)
    });
    assert_eq!(next["id"], till["id"]);
    assert!(!runs(stopped));
    assert_eq!(next["exit_code"], "unavailable", "{next}");
    let reason = next["exit_reason"].as_str().unwrap();
    assert!(reason.contains("was stopped (SIGSTOP"), "{reason}");
    assert!(reason.contains("limit_ms is 1000"), "{reason}");
    let metrics = cluster.ok(&["metrics", "impatient"]);
    let killed = "mobula_worker_stopped_hosts_killed_total 1";
    assert!(metrics.lines().any(|line| line == killed), "{metrics}");
    assert_eq!(shop.run(&["sell", "4"]), 7);
}

#[test]
fn it_starts_elsewhere_when_its_worker_and_the_leader_die_and_its_callers_go_on() {
    let shop = Shop::on(TestCluster::up_with(3, &["--heads", "3"], &[]));
    let cluster = &shop.cluster;
    shop.run(&["open"]);
    let till = shop.running_till();
    let nodes = cluster.json(&["nodes", "list"]);
    let nodes = nodes.as_array().unwrap();
    let home = nodes
        .iter()
        .find(|node| node["id"] == till["node"])
        .unwrap();
    // A driver that needs a whole worker cannot stand beside the till.
    let cpus = home["capacity"]["cpu_milli"].as_f64().unwrap() / 1000.0;
    let cpus = cpus.to_string();
    let seller = shop.begin_with(&["--cpus", &cpus], &["sell", "300"]);
    wait_for("the first sales", || {
        (shop.run(&["open"]) > 0).then_some(())
    });
    kill_9(cluster.pid(&leader(cluster)));
    kill_9(cluster.pid(home["name"].as_str().unwrap()));
    // Each sale has counted once, wherever the till was.
    let sold = cluster.result_of(&seller);
    assert_eq!(sold, 300, "{}", cluster.logs());
    // The last of them may have been before the kill.
    let moved = wait_for("the till elsewhere", || {
        let moved = shop.running_till();
        (moved["node"] != till["node"]).then_some(moved)
    });
    assert_eq!(moved["id"], till["id"]);
    assert_eq!(moved["job"], till["job"]);
}
