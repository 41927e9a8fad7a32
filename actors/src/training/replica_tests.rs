//! Replicas that step together, keep states, and refuse.

use mobula_storage::checkpoint::CheckpointSource;

use super::*;
use crate::device::ComputeDevice;
use crate::training::optimizer::OptimizerSpec;
use crate::training::reduction::TreeReducer;

fn spec() -> TrainSpec {
    TrainSpec {
        steps: 4,
        virtual_shards: 4,
        global_batch: 32,
        ..TrainSpec::digits_mlp("a")
    }
}

/// An order of the first driver.
fn order(number: u64) -> KeepOrder {
    KeepOrder {
        driver_incarnation: 1,
        number,
    }
}

fn root(replica: &Replica) -> Partial {
    let step = replica.held().unwrap().step;
    let first = replica.compute(step, 0).unwrap();
    let mut reducer = TreeReducer::new(4, 8, first.grads.len());
    reducer.offer(first).unwrap();
    (1..4)
        .rev()
        .filter_map(|shard| {
            let sums = replica.compute(step, shard).unwrap();
            reducer.offer(sums).unwrap()
        })
        .next()
        .unwrap()
}

/// Also in a program with the feature, on a machine without a GPU.
#[test]
fn a_replica_without_the_device_that_the_job_asks_for_says_what_to_do() {
    let spec = TrainSpec {
        device: ComputeDevice::Cuda,
        ..spec()
    };
    if ComputeDevice::Cuda.open().is_ok() {
        return;
    }
    let mut replica = Replica::new(spec);
    let error = replica.prepare(None).unwrap_err().to_string();
    assert!(error.contains("leave the device out"), "{error}");
    assert_eq!(replica.held(), None);
}

#[test]
fn replicas_with_equal_sums_stay_equal() {
    let spec = spec();
    let (mut a, mut b) = (Replica::new(spec.clone()), Replica::new(spec));
    let held = a.prepare(None).unwrap();
    assert_eq!(b.prepare(Some(&a.state().unwrap())).unwrap(), held);
    for step in 0..3 {
        assert_eq!(a.compute(step, 2), b.compute(step, 2));
        let sums = root(&a);
        let [(ours, held), (theirs, also_held)] = [&mut a, &mut b].map(|r| r.apply(&sums).unwrap());
        assert_eq!(held, also_held);
        assert_eq!((ours.step, ours.loss_mean), (theirs.step, theirs.loss_mean));
        assert_eq!(ours.gradient_norm, theirs.gradient_norm);
    }
    assert_eq!(a.held(), b.held());
}

#[test]
fn the_state_after_one_step_is_kept_while_others_are_taken() {
    let mut replica = Replica::new(spec());
    assert!(!replica.keep(order(1), 0), "there is none yet");
    replica.prepare(None).unwrap();
    assert!(replica.keep(order(2), 2));
    assert!(matches!(replica.kept(2), Kept::Coming));
    let mut after = Vec::new();
    for _ in 0..3 {
        let sums = root(&replica);
        replica.apply(&sums).unwrap();
        after.push(replica.state().unwrap());
    }
    let Kept::Here(kept) = replica.kept(2) else {
        panic!("it was asked for in time");
    };
    assert_eq!(kept.read(0..kept.length_bytes()), after[1]);
    assert!(matches!(replica.kept(1), Kept::Never));
    assert!(!replica.keep(order(3), 2), "that step is over");
    assert!(matches!(replica.kept(2), Kept::Never));
    assert!(replica.keep(order(4), 3), "it is there now");
    assert!(matches!(replica.kept(3), Kept::Here(_)));
    replica.release(order(3));
    assert!(
        matches!(replica.kept(3), Kept::Here(_)),
        "another one was meant"
    );
    replica.release(order(4));
    assert!(matches!(replica.kept(3), Kept::Never));
}

#[test]
fn what_is_kept_for_a_checkpoint_and_for_those_who_join_do_not_touch_each_other() {
    let mut replica = Replica::new(spec());
    replica.prepare(None).unwrap();
    assert!(replica.keep(order(2), 2) && replica.share(order(1), 1));
    let mut after = Vec::new();
    for _ in 0..3 {
        let sums = root(&replica);
        replica.apply(&sums).unwrap();
        after.push(replica.state().unwrap());
    }
    let Kept::Here(shared) = replica.shared(1) else {
        panic!("it was asked for in time");
    };
    assert_eq!(shared.read(0..shared.length_bytes()), after[0]);
    assert!(matches!(replica.shared(2), Kept::Never));
    replica.unshare(order(1));
    assert!(matches!(replica.shared(1), Kept::Never));
    let Kept::Here(kept) = replica.kept(2) else {
        panic!("it is kept still");
    };
    assert_eq!(kept.read(0..kept.length_bytes()), after[1]);
    assert!(!replica.share(order(3), 2), "that step is over");
}

#[test]
fn an_order_that_comes_after_a_later_one_or_after_its_end_keeps_nothing_and_ends_nothing() {
    let mut replica = Replica::new(spec());
    replica.prepare(None).unwrap();
    assert!(replica.share(order(2), 3) && replica.keep(order(2), 3));
    assert!(!replica.share(order(1), 2) && !replica.keep(order(1), 2));
    replica.unshare(order(1));
    for kept in [replica.shared(3), replica.kept(3)] {
        assert!(matches!(kept, Kept::Coming), "{kept:?}");
    }
    replica.unshare(order(4));
    assert!(matches!(replica.shared(3), Kept::Never));
    for late in 2..=4 {
        assert!(!replica.share(order(late), 3), "order {late} has ended");
    }
    // Of a newer driver the first counts, and none of the older one any more.
    let newer = KeepOrder::before_all_of(2);
    assert!(replica.share(newer.next(), 2));
    replica.unshare(newer);
    assert!(!replica.share(order(100), 3));
    assert!(matches!(replica.shared(2), Kept::Coming));
    assert!(matches!(replica.shared(3), Kept::Never));
}

#[test]
fn a_late_end_of_an_earlier_order_leaves_what_a_later_one_keeps_of_the_same_step() {
    let mut replica = Replica::new(spec());
    replica.prepare(None).unwrap();
    let newer = KeepOrder::before_all_of(2).next();
    for (earlier, later) in [(order(1), order(2)), (order(3), newer)] {
        assert!(replica.keep(earlier, 0) && replica.keep(later, 0));
        replica.release(earlier);
        assert!(matches!(replica.kept(0), Kept::Here(_)), "{earlier:?}");
    }
    // What is still to come is not ended either.
    assert!(replica.keep(newer.next(), 2));
    for late in [order(100), newer] {
        replica.release(late);
        assert!(matches!(replica.kept(2), Kept::Coming), "{late:?}");
    }
    replica.release(newer.next());
    assert!(matches!(replica.kept(2), Kept::Never));
    assert!(!replica.keep(newer.next(), 2), "it has ended");
}

#[test]
fn a_refused_update_leaves_model_and_state_at_the_same_step() {
    let mut replica = Replica::new(spec());
    replica.prepare(None).unwrap();
    let good = root(&replica);
    let mut bad = good.clone();
    bad.grads[0] = f32::NAN;
    let before = (replica.held(), replica.compute(0, 1));
    let error = replica.apply(&bad).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    assert_eq!((replica.held(), replica.compute(0, 1)), before);
    assert_eq!(replica.apply(&good).unwrap().1.step, 1);
}

#[test]
fn a_state_that_an_update_has_made_useless_is_held_no_more() {
    // As no job may have it: one step is enough then.
    let mut replica = Replica::new(spec());
    replica.prepare(None).unwrap();
    let loaded = replica.loaded.as_mut().unwrap();
    let rates = TrainSpec {
        learning_rate: 1e30,
        clip_norm: None,
        optimizer: OptimizerSpec::Sgd { momentum: 0.0 },
        ..spec()
    };
    loaded.optimizer = Optimizer::new(&rates, loaded.workload.layout());
    loaded.state.moments.truncate(1);
    let mut sums = root(&replica);
    sums.grads.fill(1e12);
    let error = replica.apply(&sums).unwrap_err().to_string();
    assert!(
        error.contains("after its update dense.0.bias is not finite"),
        "{error}"
    );
    assert_eq!(replica.held(), None);
    assert_eq!(replica.state().unwrap_err(), TrainerError::Unprepared);
}

#[test]
fn an_update_is_counted_among_what_was_computed() {
    let mut replica = Replica::new(spec());
    replica.prepare(None).unwrap();
    let sums = root(&replica);
    let (_, shards) = replica.take_spent();
    assert!(shards > Duration::ZERO);
    assert_eq!(replica.take_spent(), (Duration::ZERO, Duration::ZERO));
    let (report, _) = replica.apply(&sums).unwrap();
    let (data, compute) = replica.take_spent();
    assert_eq!(data, Duration::ZERO, "no samples were fetched");
    assert!(compute >= report.took && report.took > Duration::ZERO);
}

#[test]
fn unprepared_and_unfit_are_told_apart() {
    let mut replica = Replica::new(spec());
    assert_eq!(replica.compute(0, 0).unwrap_err(), TrainerError::Unprepared);
    replica.prepare(None).unwrap();
    for (step, shard, expected) in [(2, 0, "at step 2"), (0, 4, "shard 4 of 4")] {
        let error = replica.compute(step, shard).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let mut other = TrainState::from_bytes(&replica.state().unwrap()).unwrap();
    other.fingerprint[0] ^= 1;
    let error = replica.prepare(Some(&other.to_bytes())).unwrap_err();
    assert!(error.to_string().contains("another job"), "{error}");
    let mut absent = Replica::new(TrainSpec {
        dataset: toml::from_str("[csv]\nfiles = [\"/nowhere.csv\"]\n").unwrap(),
        ..spec()
    });
    let error = absent.prepare(None).unwrap_err();
    assert!(error.to_string().contains("/nowhere.csv"), "{error}");
}
