use super::*;
use crate::training::messages::Epoch;
use crate::training::protocol::buckets::Buckets;
use crate::training::protocol::exchange::{Refusal, Report};
use crate::training::protocol::gather::TreeShape;
use crate::training::protocol::leader::{Leader, LeaderShape};
use crate::training::protocol::member::MemberShape;
use crate::training::protocol::plan::{DRIVER_SLOT, Plan};

fn member(slot: u32) -> MemberId {
    MemberId {
        slot,
        incarnation: 1,
        entry: 1,
    }
}

/// A member of two at the first step, and the other one. Each owns a bucket.
fn one_of_two() -> (Member, MemberId) {
    let (copy, other, _) = led_pair();
    (copy, other)
}

/// The same, with their leader.
fn led_pair() -> (Member, MemberId, Leader) {
    let shape = MemberShape {
        tree: TreeShape {
            shard_count: 8,
            samples_per_shard: 2,
        },
        buckets: Buckets::new(2, 1),
        steps: 10,
        history: 1,
    };
    let bucket_count = shape.buckets.count();
    assert_eq!(bucket_count, 2);
    let leader_shape = LeaderShape {
        shard_count: 8,
        bucket_count,
        members_min: 1,
        lead_max: 5,
        steps: 10,
    };
    let (me, other) = (member(0), member(1));
    let mut leader = Leader::new(leader_shape, Epoch::first_of(1), 0);
    leader.seat([me, other]);
    let mut copy = Member::new(me, shape, 0, [7; 16]);
    copy.adopt(leader.plan().clone()).unwrap();
    (copy, other, leader)
}

/// Which shards it orders now, and which sums it sends.
fn done(member: &mut Member) -> (Vec<u32>, Vec<Subtree>) {
    let (mut shards, mut sent) = (Vec::new(), Vec::new());
    while let Some(action) = member.poll_action() {
        match action {
            Action::Compute { shard, .. } => shards.push(shard),
            Action::Contribute { contribution, .. } => {
                sent.extend(contribution.content().subtrees);
            }
            _ => {}
        }
    }
    (shards, sent)
}

/// A shard of a gradient of two values.
fn computed(member: &mut Member, step: u64, shard: u32) {
    let sums = Partial::of_shard(shard, 1.0, 2, vec![1.0, 2.0]);
    member.computed(step, sums).unwrap();
}

/// What it reports and asks now.
fn said(member: &mut Member) -> (Vec<Report>, Vec<(MemberId, Ask)>) {
    let (mut reports, mut asks) = (Vec::new(), Vec::new());
    while let Some(action) = member.poll_action() {
        match action {
            Action::Report(report) => reports.push(report),
            Action::Ask { to, ask } => asks.push((to, ask)),
            _ => {}
        }
    }
    (reports, asks)
}

/// Whom it asks now.
fn asked(member: &mut Member) -> Vec<MemberId> {
    let (_, asks) = said(member);
    asks.into_iter().map(|(to, _)| to).collect()
}

#[test]
fn the_drivers_copy_is_not_asked_though_it_is_further() {
    let (mut copy, other) = one_of_two();
    let driver = member(DRIVER_SLOT);
    assert_eq!(asked(&mut copy), [other], "for the bucket that it owns");
    // Both have taken the step, and ask for sums of the next one.
    let further = |from, bucket| Ask {
        from,
        step: 1,
        digest: [8; 16],
        bucket,
        at_once: false,
    };
    assert_eq!(copy.ask(1, further(driver, 0)), None);
    assert_eq!(asked(&mut copy), []);
    assert!(copy.ahead.is_some(), "the step was begun");
    assert_eq!(copy.ask(2, further(other, 0)), None);
    assert_eq!(asked(&mut copy), [other], "for the other bucket");
    assert_eq!(copy.ask(3, further(driver, 1)), None);
    assert_eq!(copy.ahead, Some((other, 1)), "who can be asked counts");
}

#[test]
fn what_is_computed_beside_a_slow_member_holds_the_own_sums_up_in_no_step() {
    let (mut copy, slow, mut leader) = led_pair();
    let subtree = |level, index| Subtree { level, index };
    assert_eq!(done(&mut copy), (vec![0, 1, 2, 3], vec![]));
    assert_eq!(leader.back_up(slow, 0), 4);
    copy.adopt(leader.plan().clone()).unwrap();
    for shard in 0..3 {
        computed(&mut copy, 0, shard);
        assert_eq!(done(&mut copy), (vec![], vec![]), "its own come first");
    }
    computed(&mut copy, 0, 3);
    assert_eq!(done(&mut copy), (vec![4], vec![subtree(2, 0)]));
    for shard in 4..7 {
        computed(&mut copy, 0, shard);
        assert_eq!(done(&mut copy), (vec![shard + 1], vec![]));
    }
    computed(&mut copy, 0, 7);
    assert_eq!(done(&mut copy), (vec![], vec![subtree(3, 0)]));
    let sum = Partial {
        subtree: subtree(3, 0),
        loss_sum: 8.0,
        count: 16,
        grads: vec![8.0],
    };
    copy.answered(slow, 0, 1, Some(Ok(sum)));
    assert!(matches!(copy.poll_action(), Some(Action::Apply { .. })));
    copy.applied([8; 16]);
    // In the next step each computes its own.
    assert_eq!(done(&mut copy), (vec![0, 1, 2, 3], vec![]));
    for shard in 0..3 {
        computed(&mut copy, 1, shard);
    }
    assert_eq!(done(&mut copy), (vec![], vec![]));
    computed(&mut copy, 1, 3);
    assert_eq!(done(&mut copy), (vec![], vec![subtree(2, 0)]));
}

#[test]
fn by_a_plan_without_seats_nobody_is_asked() {
    let (mut copy, other) = one_of_two();
    assert_eq!(asked(&mut copy), [other]);
    let further = Ask {
        from: other,
        step: 1,
        digest: [8; 16],
        bucket: 0,
        at_once: false,
    };
    assert_eq!(copy.ask(1, further), None);
    assert_eq!(asked(&mut copy), [other], "it has the other bucket's");
    copy.adopt(Plan {
        epoch: copy.epoch(),
        ..Plan::default()
    })
    .unwrap();
    copy.retry();
    assert_eq!(asked(&mut copy), []);
}

#[test]
fn an_owner_that_has_no_sum_yet_is_asked_again_and_is_not_out_of_reach() {
    let (mut copy, peer) = one_of_two();
    let (_, asks) = said(&mut copy);
    let [(_, question)] = asks[..] else {
        panic!("{asks:?}");
    };
    assert!(!question.at_once, "nothing has failed");
    let (step, bucket) = (question.step, question.bucket);
    for _ in 0..100 {
        copy.answered(peer, step, bucket, Some(Err(Refusal::NotYet)));
        assert_eq!(said(&mut copy), (vec![], vec![(peer, question)]));
    }
}

#[test]
fn after_a_call_that_failed_the_first_question_is_for_a_sign_of_life() {
    let (mut copy, peer) = one_of_two();
    let (_, asks) = said(&mut copy);
    let (_, question) = asks[0];
    let (step, bucket) = (question.step, question.bucket);
    copy.answered(peer, step, bucket, None);
    let report = Report::Unreachable { peer };
    assert_eq!(said(&mut copy), (vec![report], vec![]));
    copy.retry();
    let first = Ask {
        at_once: true,
        ..question
    };
    assert_eq!(said(&mut copy), (vec![], vec![(peer, first)]));
    copy.answered(peer, step, bucket, Some(Err(Refusal::NotYet)));
    let report = Report::Reached { peer };
    assert_eq!(said(&mut copy), (vec![report], vec![(peer, question)]));
    // Asked that itself, it says so without waiting for the sum.
    let asked_itself = |at_once| Ask {
        from: peer,
        at_once,
        ..question
    };
    assert_eq!(copy.ask(1, asked_itself(false)), None);
    assert_eq!(copy.ask(2, asked_itself(true)), Some(Err(Refusal::NotYet)));
}
