//! The coordinator with trainers in this process, which die, lag, err and leave on schedule. The oracle is
//! the same job run alone.

mod fake_trainer;
mod giving;
mod helping;
mod joining;

use std::collections::BTreeMap;

use mobula_core::{Incarnation, JobId};
use mobula_storage::checkpoint::{
    CheckpointReader, CheckpointSource, CheckpointWriter, SaveRequest,
};

use self::fake_trainer::{FakeTrainer, Fault, trainers};
use super::*;
use crate::checkpoint::sharing;
use crate::checkpoint::spread::Spread;
use crate::training::collective::InProcess;
use crate::training::data::Files;
use crate::training::job::now_ms;
use crate::training::local::LocalTrainer;
use crate::training::messages::News;
use crate::training::models::ModelSpec;
use crate::training::numerics::Numerics;
use crate::training::random::{Purpose, Stream};
use crate::training::replica::{Kept, load};
use crate::training::snapshot::StateSnapshot;

fn spec(steps: u64, min: u32, max: u32) -> TrainSpec {
    let mut spec = TrainSpec {
        steps,
        global_batch: 64,
        // Large enough that every trainer owns a bucket and so sends something in every step, which is when
        // faults happen.
        model: ModelSpec::Mlp {
            hidden: vec![256, 192],
        },
        ..TrainSpec::digits_mlp("a")
    };
    spec.workers = crate::training::spec::WorkerRange { min, max };
    spec
}

fn expected(spec: &TrainSpec) -> String {
    let workload = load(spec, &Files::local()).unwrap();
    let mut alone = LocalTrainer::new(&workload).unwrap();
    alone.run(1).unwrap();
    alone.state().weights_blake3()
}

type Tested = Coordinator<FakeTrainer, InProcess>;

fn coordinator(spec: &TrainSpec, driver_incarnation: u64, trainers: &[FakeTrainer]) -> Tested {
    let workload = load(spec, &Files::local()).unwrap();
    let state = TrainState::initial(&workload);
    Coordinator::new(
        &workload,
        state,
        Epoch::first_of(driver_incarnation),
        trainers.to_vec(),
        trainers[0].others.clone(),
        Counters::default(),
        JobLog::Silent,
    )
    .unwrap()
}

async fn run(spec: &TrainSpec, trainers: &[FakeTrainer]) -> Tested {
    let mut coordinator = coordinator(spec, 1, trainers);
    let work = async {
        while coordinator.state().step < spec.steps {
            coordinator.advance().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .expect("the job ends");
    coordinator
}

#[tokio::test]
async fn undisturbed_trainers_give_the_oracles_bits() {
    let spec = spec(12, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = run(&spec, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    assert_eq!(coordinator.confirm().await, 3);
    // A busy machine may make an answer slow; nothing else may happen.
    let slow_orders = coordinator.counters().slow_orders;
    let expected = Counters {
        slow_orders,
        ..Counters::default()
    };
    assert_eq!(coordinator.counters(), expected);
}

#[tokio::test]
async fn any_number_of_trainers_ends_in_the_same_bits() {
    let hash = expected(&spec(12, 1, 1));
    for count in [1, 2, 3, 4, 5, 7, 8] {
        let spec = spec(12, count, count);
        let trainers = trainers(&spec, vec![vec![]; count as usize]);
        let mut coordinator = run(&spec, &trainers).await;
        assert_eq!(coordinator.digest(), hash, "{count} trainers");
        assert_eq!(coordinator.confirm().await, count as usize);
    }
}

#[tokio::test]
async fn the_gpus_of_those_who_say_so_count_on_average() {
    let spec = spec(12, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = run(&spec, &trainers).await;
    let mut usage = |gpus: [Option<f64>; 3]| {
        for (index, gpu_utilization) in gpus.into_iter().enumerate() {
            let news = News {
                number: 0,
                member: coordinator.crew.slots()[index].member.unwrap(),
                step: spec.steps,
                reports: Vec::new(),
                spent: Default::default(),
                cpu: Duration::from_secs(2),
                notice_ms: None,
                gpu_utilization,
            };
            coordinator.heard(index, &news);
        }
        coordinator.usage()
    };
    let seen = usage([Some(0.25), None, Some(0.75)]);
    assert_eq!((seen.trainers, seen.cpu), (3, Duration::from_secs(6)));
    assert_eq!(seen.gpu_utilization, Some(0.5));
    // What a trainer does not say any more counts no more.
    assert_eq!(usage([None, None, Some(0.75)]).gpu_utilization, Some(0.75));
    assert_eq!(usage([None; 3]).gpu_utilization, None);
}

#[tokio::test]
async fn each_fault_is_survived_and_counted() {
    // More steps than trainers may be ahead of the coordinator's copy, which counts the faults.
    let spec = spec(90, 2, 2);
    let hash = expected(&spec);
    let after = async |fault| {
        let trainers = trainers(&spec, [vec![], vec![(5, fault)]]);
        let coordinator = run(&spec, &trainers).await;
        let log = trainers[1].inner.lock().log.clone();
        (coordinator.digest().to_owned(), coordinator.counters(), log)
    };
    for fault in [Fault::Crash, Fault::CrashAfter] {
        let (digest, counters, _) = after(fault).await;
        assert_eq!(
            (digest, counters.trainers_lost),
            (hash.clone(), 1),
            "{fault:?}"
        );
        assert!(
            (1..=8).contains(&counters.reassigned_shards),
            "{fault:?}: its half of one step at most, {counters:?}"
        );
    }
    let (digest, counters, _) = after(Fault::Slow).await;
    assert_eq!((digest, counters.trainers_lost), (hash.clone(), 0));
    let (digest, counters, log) = after(Fault::FlippedBit).await;
    assert_eq!((digest, counters.digest_mismatches), (hash.clone(), 1));
    assert_eq!(log, ["prepare", "prepare"]);
    let (digest, counters, log) = after(Fault::Notice).await;
    assert_eq!(
        (digest, counters.handoffs, counters.trainers_lost),
        (hash.clone(), 1, 0)
    );
    assert_eq!(log[..2], ["prepare", "leave"]);
}

#[tokio::test]
async fn when_all_trainers_die_no_step_is_lost() {
    let spec = spec(80, 2, 2);
    let faults = vec![(4, Fault::Crash), (70, Fault::CrashAfter)];
    let trainers = trainers(&spec, vec![faults; 2]);
    let coordinator = run(&spec, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    let counters = coordinator.counters();
    assert!(counters.trainers_lost >= 2, "{counters:?}");
    assert!(counters.trainer_restarts >= 3, "{counters:?}");
}

#[tokio::test]
async fn random_faults_never_change_the_bits() {
    let spec = spec(100, 2, 4);
    let hash = expected(&spec);
    let mut disturbances = 0;
    for seed in 0..12 {
        let stream = Stream::new(seed, Purpose::DataOrder, "faults", 0);
        let kinds = [
            Fault::Crash,
            Fault::CrashAfter,
            Fault::FlippedBit,
            Fault::Notice,
        ];
        let faults = (0..4u32).map(|trainer| {
            let faults = (1..90).filter_map(|step| {
                let bits = stream.bits(step, trainer);
                bits.is_multiple_of(17)
                    .then(|| (step, kinds[(bits >> 8) as usize % kinds.len()]))
            });
            faults.collect()
        });
        let trainers = trainers(&spec, faults);
        let coordinator = run(&spec, &trainers).await;
        assert_eq!(coordinator.digest(), hash, "seed {seed}");
        let counters = coordinator.counters();
        disturbances += counters.trainers_lost + counters.handoffs + counters.digest_mismatches;
    }
    assert!(disturbances > 60, "only {disturbances} disturbances");
}

#[tokio::test]
async fn trainers_that_do_not_reach_each_other_stop_nobody() {
    let spec = spec(20, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    trainers[0].inner.lock().cut_off = vec![1];
    trainers[1].inner.lock().cut_off = vec![0];
    let mut spec_of_two = spec.clone();
    spec_of_two.workers.min = 2;
    let coordinator = run(&spec_of_two, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    // The third one may do for both what they cannot do for each other, before one of them is left out.
    let counters = coordinator.counters();
    assert!(counters.trainers_lost + counters.slow_orders >= 1);
}

#[tokio::test]
async fn a_machine_that_computes_other_bits_is_refused_until_it_is_started_anew() {
    let spec = spec(200, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    trainers[1].inner.lock().computes_otherwise = true;
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.counters().trainers_refused == 0 {
        assert!(coordinator.state().step < spec.steps, "it is asked at once");
        coordinator.advance().await.unwrap();
    }
    assert_eq!(coordinator.crew.slots()[1].refused, Some(1));
    // Greeted again, it is not even sent the state.
    coordinator.greeted(1, trainers[1].greeting());
    assert_eq!(trainers[1].inner.lock().log, ["prepare"]);
    // The machine was mended, and its process started anew.
    trainers[1].crash(&mut trainers[1].inner.lock());
    trainers[1].inner.lock().computes_otherwise = false;
    coordinator.greeted(1, trainers[1].greeting());
    while coordinator.ready_count() < 2 {
        assert!(coordinator.state().step < spec.steps, "it is let in");
        coordinator.advance().await.unwrap();
    }
    assert_eq!(coordinator.counters().trainers_refused, 1);
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test]
async fn where_bits_may_differ_such_a_machine_takes_part_and_is_counted() {
    let mut spec = spec(20, 2, 2);
    spec.numerics = Numerics::Mixed;
    let trainers = trainers(&spec, vec![vec![]; 2]);
    trainers[1].inner.lock().computes_otherwise = true;
    let coordinator = run(&spec, &trainers).await;
    let counters = coordinator.counters();
    assert_eq!((counters.trainers_refused, counters.trainers_mixed), (0, 1));
}

#[tokio::test]
async fn a_newer_driver_stops_an_older_one() {
    let spec = spec(200, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut old = coordinator(&spec, 5, &trainers);
    for _ in 0..3 {
        old.advance().await.unwrap();
    }
    let mut new = coordinator(&spec, 9, &trainers);
    new.advance().await.unwrap();
    let fenced = loop {
        if let Err(error) = old.advance().await {
            break error;
        }
    };
    assert_eq!(fenced, CoordinatorError::Fenced(9));
    while new.state().step < spec.steps {
        new.advance().await.unwrap();
    }
    assert_eq!(new.digest(), expected(&spec));
}

#[tokio::test]
async fn a_damaged_coordinator_is_outvoted() {
    let spec = spec(50, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    coordinator.advance().await.unwrap();
    coordinator.advance().await.unwrap();
    coordinator.state.params[0] += 1.0;
    coordinator.digest = coordinator.state.weights_blake3();
    let digest = short_digest(&coordinator.digest);
    let shape = member_shape(&spec, coordinator.state.params.len());
    coordinator.member = Member::new(coordinator.me, shape, 2, digest);
    // What was asked with the right bits may still be answered.
    coordinator.calls = JoinSet::new();
    coordinator.publish();
    let error = coordinator.advance().await.unwrap_err();
    assert!(
        matches!(
            error,
            CoordinatorError::Outvoted {
                count: 2,
                step: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn unfit_data_ends_the_job_with_its_reason() {
    let spec = spec(5, 1, 1);
    let absent = TrainSpec {
        dataset: toml::from_str("[csv]\nfiles = [\"/nowhere.csv\"]\n").unwrap(),
        ..spec.clone()
    };
    let mut coordinator = coordinator(&spec, 1, &trainers(&absent, [vec![]]));
    let error = coordinator.advance().await.unwrap_err().to_string();
    assert!(
        error.starts_with("trainer-0 on worker-0: cannot read data file /nowhere.csv"),
        "{error}"
    );
}

#[tokio::test]
async fn a_witness_holds_the_very_bits_and_says_whether_its_machine_stays() {
    let spec = spec(40, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.state().step < 5 {
        coordinator.advance().await.unwrap();
    }
    let limit = Duration::from_secs(10);
    let slots = |witnesses: Vec<Witness>| -> Vec<(usize, bool)> {
        let slots = witnesses.iter();
        slots.map(|one| (one.slot, one.is_doomed)).collect()
    };
    // They are ahead of the copy by now, and know what they held where it stands.
    trainers[1].inner.lock().notice_ms = Some(1);
    let witnesses = coordinator.witnesses(limit).await;
    assert_eq!(slots(witnesses), [(0, false), (1, true), (2, false)]);
    let in_an_hour = now_ms() + 3_600_000;
    assert!(
        !coordinator.stays(1, in_an_hour),
        "a state of one chunk is saved alone"
    );
    trainers[2].crash(&mut trainers[2].inner.lock());
    let witnesses = coordinator.witnesses(limit).await;
    assert_eq!(slots(witnesses), [(0, false), (1, true)]);
    // A copy with other bits has none.
    coordinator.digest = blake3::hash(b"other").to_hex().to_string();
    assert_eq!(coordinator.witnesses(limit).await, []);
}

async fn follow_to(step: u64, coordinator: &mut Tested) {
    while coordinator.state().step < step {
        coordinator.advance().await.unwrap();
    }
}

#[tokio::test]
async fn trainers_keep_the_state_of_a_save_and_store_their_share_of_it() {
    let spec = spec(200, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(3, &mut coordinator).await;
    // None of them has taken that step yet, however far ahead they are.
    let step = 3 + coordinator.lead_max() + 1;
    coordinator.prepare_save(step, "worker-0");
    follow_to(step, &mut coordinator).await;
    let helpers = coordinator.helpers(step);
    let names: Vec<String> = helpers.iter().map(|helper| helper.name()).collect();
    assert_eq!(names, ["trainer-1 on worker-1", "trainer-2 on worker-2"]);
    assert!(coordinator.helpers(step + 1).is_empty());

    let blobs = &trainers[0].blobs;
    let writer = CheckpointWriter::new(blobs.clone()).with_chunk_bytes(10_000);
    let state: Arc<dyn CheckpointSource> = Arc::new(StateSnapshot::of(coordinator.state()));
    let request = SaveRequest {
        job: JobId(1),
        step,
        incarnation: Incarnation(1),
        parent: None,
        sections: Vec::new(),
        metadata: BTreeMap::new(),
    };
    let prepared = writer.prepare(request, Arc::clone(&state)).await.unwrap();
    let missing = prepared.missing();
    let spread = Spread::default();
    let uploaded = sharing::upload(&writer, &state, step, missing, &helpers, &spread).await;
    for share in uploaded.unwrap().shares {
        // On a machine that is busy with other tests, one may be slow enough for the leader to do its part.
        let is_slow = matches!(&share.failed, Some(why) if why.starts_with("nothing was heard"));
        assert!(
            is_slow || share.bytes > 0 && share.failed.is_none(),
            "{share}"
        );
    }
    let saved = writer.finish(prepared).await.unwrap();
    let read = CheckpointReader::new(blobs.clone(), 1 << 30)
        .load(&saved.handle.reference)
        .await
        .unwrap();
    assert!(read.bytes == coordinator.state().to_bytes());
    // They keep it no more, and whoever asked again would be told.
    let kept = trainers[1].inner.lock().replica.lock().kept(step);
    assert!(matches!(kept, Kept::Never));
}

#[tokio::test]
async fn trainers_whose_machines_all_go_stay_until_the_save_is_shared_and_then_leave() {
    let mut spec = spec(200, 2, 2);
    // More than a chunk, with its moments.
    spec.model = ModelSpec::Mlp {
        hidden: vec![1024, 768],
    };
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(2, &mut coordinator).await;
    let in_an_hour = now_ms() + 3_600_000;
    assert!(
        coordinator.stays(0, in_an_hour),
        "the driver may need it soon"
    );
    assert!(!coordinator.stays(1, 1), "its time is over");
    for trainer in &trainers {
        trainer.inner.lock().notice_ms = Some(1);
    }
    let step = coordinator.gather("worker-0");
    follow_to(step, &mut coordinator).await;
    // A step behind the one that is saved would be lost with them.
    let further = tokio::time::timeout(Duration::from_millis(100), coordinator.advance()).await;
    assert!(further.is_err());
    let helpers = coordinator.helpers(step);
    let names: Vec<String> = helpers.iter().map(|helper| helper.name()).collect();
    assert_eq!(names, ["trainer-1 on worker-1"]);
    let has_left = |trainer: &FakeTrainer| trainer.inner.lock().log.contains(&"leave");
    assert!(!trainers.iter().any(has_left));
    coordinator.disperse();
    while !trainers.iter().any(has_left) {
        assert!(
            coordinator.state().step < spec.steps,
            "they leave in the end"
        );
        coordinator.advance().await.unwrap();
    }
}

#[tokio::test]
async fn of_a_small_state_only_a_trainer_behind_which_nobody_goes_on_stays_for_the_driver() {
    let spec = spec(200, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(2, &mut coordinator).await;
    assert!(!coordinator.can_be_shared());
    let in_an_hour = now_ms() + 3_600_000;
    assert!(!coordinator.stays(0, in_an_hour), "the other one goes on");
    trainers[0].inner.lock().notice_ms = Some(in_an_hour);
    while coordinator.ready_count() == 2 {
        coordinator.advance().await.unwrap();
    }
    assert!(coordinator.stays(1, in_an_hour), "nobody else does");
    // What it has done by then is what the copy comes to.
    trainers[1].inner.lock().notice_ms = Some(in_an_hour);
    let step = coordinator.gather_here();
    follow_to(step, &mut coordinator).await;
    assert_eq!(coordinator.ready_count(), 1);
}

#[tokio::test]
async fn halted_trainers_come_to_the_gate_keep_what_is_left_with_them_and_go_on_when_they_may() {
    let spec = spec(200, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(2, &mut coordinator).await;
    let gate = coordinator.halt();
    follow_to(gate, &mut coordinator).await;
    // Behind the gate there is nothing to follow to.
    let further = tokio::time::timeout(Duration::from_millis(100), coordinator.advance()).await;
    assert!(further.is_err());
    let handover = Handover {
        step: gate,
        metadata: BTreeMap::from([("history".to_owned(), "{}".to_owned())]),
    };
    let limit = Duration::from_secs(10);
    let witnesses = coordinator.witnesses(limit).await;
    let slots: Vec<usize> = witnesses.iter().map(|witness| witness.slot).collect();
    assert_eq!(slots, [0, 1]);
    assert_eq!(coordinator.entrust(&slots, &handover, limit).await, 2);
    for trainer in &trainers {
        let inner = trainer.inner.lock();
        assert_eq!(inner.replica.lock().step(), Some(gate));
        assert_eq!(inner.handover.as_ref(), Some(&handover));
    }
    coordinator.disperse();
    follow_to(gate + 1, &mut coordinator).await;
}
