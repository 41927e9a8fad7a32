//! Groups of drivers: the traps of consensus, one test each.

use std::time::Duration;

use mobula_core::config::RaftConfig;
use mobula_core::error::ErrorCode;
use mobula_core::id::SessionId;

use super::membership::GroupChange;
use super::proposals::{ChangeError, ProposeError};
use super::test_group::{TestGroup, add, eventually, member, open_session, sum};

fn short_log() -> RaftConfig {
    RaftConfig {
        compact_entries: 50,
        keep_entries: 10,
        ..RaftConfig::default()
    }
}

fn refusal(error: ChangeError) -> String {
    match error {
        ChangeError::Refused(rejection) => {
            assert_eq!(rejection.code, ErrorCode::FailedPrecondition);
            rejection.message
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn three_heads_lose_their_leader_and_every_acknowledged_command_counts_once() {
    let mut group = TestGroup::of(3, RaftConfig::default()).await;
    let session = open_session(&group.leader().await.handle).await;
    for seq in 1..=20 {
        assert_eq!(group.add(session, seq, 1).await, seq);
    }
    let lost = group.leader().await.raft_id;
    group.stop(lost).await;
    // The last one again, as a client does that got no answer: it is known to the new leader.
    assert_eq!(group.add(session, 20, 1).await, 20);
    for seq in 21..=40 {
        assert_eq!(group.add(session, seq, 1).await, seq);
    }
    group.restart(lost);
    assert_eq!(group.add(session, 41, 1).await, 41);
    group.converge().await;
}

#[tokio::test]
async fn a_network_that_loses_a_tenth_costs_time_only() {
    let mut group = TestGroup::of(3, RaftConfig::default()).await;
    let seed = rand::random();
    println!("seed {seed}");
    group.lose(100, seed);
    let session = open_session_anyhow(&group).await;
    let mut restarted = 0;
    for seq in 1..=60 {
        assert_eq!(group.add(session, seq, 1).await, seq, "seed {seed}");
        if seq % 20 == 10 {
            let leader = group.leader().await.raft_id;
            group.stop(leader).await;
            group.restart(leader);
            restarted += 1;
        }
    }
    assert_eq!(restarted, 3);
    group.lose(0, seed);
    group.converge().await;
}

/// Opens a session through whichever head leads.
async fn open_session_anyhow(group: &TestGroup) -> SessionId {
    use mobula_core::control::ModuleId;
    use mobula_scheduler::{Command, Response};
    loop {
        let command = Command::OpenSession {
            client: "test".into(),
        };
        let handle = &group.leader().await.handle;
        let proposed = handle.propose(
            SessionId::INTERNAL,
            0,
            ModuleId::SCHEDULER,
            command.encode(),
        );
        if let Ok(outcome) = proposed.await
            && let Response::SessionOpened { session } =
                Response::decode(&outcome.result.unwrap()).unwrap()
        {
            return session;
        }
    }
}

#[tokio::test]
async fn a_change_that_vanishes_while_another_is_pending_is_made_in_the_end() {
    let group = TestGroup::new(RaftConfig::default()).await;
    let ids = [
        group.allocate().await,
        group.allocate().await,
        group.allocate().await,
    ];
    // All at once: raft lets one through and makes empty entries of the others.
    let changes = ids.map(|raft_id| group.change(GroupChange::AddLearner(member(raft_id))));
    for made in futures::future::join_all(changes).await {
        made.unwrap();
    }
    let view = group.leader().await.handle.group().borrow().clone();
    assert_eq!(view.learners, ids);
    let rows: Vec<u64> = view.members.iter().map(|member| member.raft_id).collect();
    assert_eq!(rows, ids, "rows come with the changes");
}

#[tokio::test]
async fn a_learner_is_promoted_only_when_it_has_caught_up() {
    let mut group = TestGroup::new(short_log()).await;
    for _ in 0..300 {
        group.add(SessionId::INTERNAL, 0, 1).await;
    }
    group.lose_snapshots(u32::MAX);
    let learner = group.add_learner().await;
    let refused = group.change(GroupChange::Promote(learner)).await;
    let why = refusal(refused.unwrap_err());
    assert!(why.contains("has not caught up"), "{why}");
    assert!(why.contains("at most 200 may be missing"), "{why}");
    group.lose_snapshots(0);
    group.promote(learner).await;
    let view = group.leader().await.handle.group().borrow().clone();
    assert_eq!(view.voters, [1, learner]);
    // Added again by a late repetition it stays what it is.
    group
        .change(GroupChange::AddLearner(member(learner)))
        .await
        .unwrap();
    assert_eq!(
        group.leader().await.handle.group().borrow().voters,
        [1, learner]
    );
    let stranger = group.change(GroupChange::Promote(99_999)).await;
    assert!(refusal(stranger.unwrap_err()).contains("must join first"));
    group.converge().await;
}

#[tokio::test]
async fn a_leader_hands_over_before_it_is_removed_and_its_id_never_comes_back() {
    let mut group = TestGroup::of(3, RaftConfig::default()).await;
    let first = group.leader().await.raft_id;
    let refused = group.change(GroupChange::Remove(first)).await;
    assert_eq!(refused, Err(ChangeError::IsLeader(first)));
    let next = group
        .leader()
        .await
        .handle
        .transfer_leadership(None)
        .await
        .unwrap();
    assert_ne!(next, first);
    eventually("the other leads", || async {
        group.leader().await.raft_id == next
    })
    .await;
    group.change(GroupChange::Remove(first)).await.unwrap();
    let view = group.leader().await.handle.group().borrow().clone();
    assert!(!view.contains(first) && view.member(first).is_none());
    assert_eq!(view.removed, [first]);
    let back = group.change(GroupChange::AddLearner(member(first))).await;
    assert!(refusal(back.unwrap_err()).contains("never comes back"));
    // What it still says moves nobody.
    group.add(SessionId::INTERNAL, 0, 1).await;
    group.stop(first).await;
    group.add(SessionId::INTERNAL, 0, 1).await;
    group.converge().await;
}

#[tokio::test]
async fn a_removal_that_would_stop_the_group_is_refused() {
    let mut group = TestGroup::of(3, RaftConfig::default()).await;
    let leader = group.leader().await.raft_id;
    let others: Vec<u64> = group
        .heads
        .keys()
        .copied()
        .filter(|id| *id != leader)
        .collect();
    group.stop(others[0]).await;
    eventually("the leader to notice", || async {
        let progress = group.leader().await.handle.progress().await.unwrap();
        let dead = progress.members.iter().find(|m| m.raft_id == others[0]);
        dead.is_some_and(|member| !member.active)
    })
    .await;
    let refused = group.change(GroupChange::Remove(others[1])).await;
    assert!(
        refusal(refused.unwrap_err()).contains("only 1 of 2 voters are alive, and 2 are needed")
    );
    // The dead one may go: the two that live are a majority of themselves.
    group.change(GroupChange::Remove(others[0])).await.unwrap();
    group.add(SessionId::INTERNAL, 0, 1).await;
    assert!(
        refusal(
            group
                .change(GroupChange::Remove(others[0]))
                .await
                .unwrap_err()
        )
        .contains("is not in the group")
    );
}

#[tokio::test]
async fn a_follower_that_was_away_past_the_compaction_gets_a_snapshot() {
    let mut group = TestGroup::of(3, short_log()).await;
    let leader = group.leader().await.raft_id;
    let away = group
        .heads
        .keys()
        .copied()
        .find(|id| *id != leader)
        .unwrap();
    group.stop(away).await;
    let before = group.network.lock().snapshots;
    for _ in 0..300 {
        group.add(SessionId::INTERNAL, 0, 1).await;
    }
    let first = group
        .leader()
        .await
        .handle
        .leadership()
        .borrow()
        .first_log_index;
    assert!(
        first > 100,
        "the log still begins at {first}: nothing to show"
    );
    // Lost and damaged ones are sent again.
    group.lose_snapshots(1);
    group.damage_snapshots(1);
    group.restart(away);
    for _ in 0..30 {
        group.add(SessionId::INTERNAL, 0, 1).await;
    }
    let caught_up = &group.heads[&away].handle;
    eventually("it to catch up", || async {
        caught_up.read().await.is_ok_and(|view| sum(&view) == 330)
    })
    .await;
    // It is counted a moment after it is taken.
    eventually("to have done so by snapshot", || async {
        group.network.lock().snapshots > before
    })
    .await;
    // After a restart its log begins at the snapshot.
    group.stop(away).await;
    group.restart(away);
    group.add(SessionId::INTERNAL, 0, 1).await;
    group.converge().await;
}

#[tokio::test]
async fn reads_see_what_was_acknowledged_on_every_head_and_none_without_a_leader() {
    let group = TestGroup::of(3, RaftConfig::default()).await;
    for round in 1..=20 {
        let leader = &group.leader().await.handle;
        add(leader, SessionId::INTERNAL, 0, 1).await.unwrap();
        for head in group.heads.values() {
            let view = head.handle.read().await.unwrap();
            assert_eq!(sum(&view), round, "head {}", head.raft_id);
        }
    }
    // A follower that hears nobody must not answer from what it has.
    let leader = group.leader().await.raft_id;
    let lonely = group
        .heads
        .values()
        .find(|head| head.raft_id != leader)
        .unwrap();
    group.cut(lonely.raft_id);
    let read = tokio::time::timeout(Duration::from_secs(2), lonely.handle.read()).await;
    assert!(!matches!(read, Ok(Ok(_))), "a read without a leader");
    // Nor a leader that was cut off, while another may lead.
    group.heal();
    let old = group.leader().await.raft_id;
    group.cut(old);
    let read = tokio::time::timeout(Duration::from_secs(2), group.heads[&old].handle.read()).await;
    assert!(
        !matches!(read, Ok(Ok(_))),
        "a read of a leader that was cut off"
    );
    group.add(SessionId::INTERNAL, 0, 1).await;
    group.heal();
    // A leader that has just begun answers too, once it has committed in its term.
    let view = group.leader().await.handle.read().await.unwrap();
    assert_eq!(sum(&view), 21);
}

#[tokio::test]
async fn a_follower_proposes_nothing_and_names_the_leader() {
    let group = TestGroup::of(3, RaftConfig::default()).await;
    let leader = group.leader().await.raft_id;
    let follower = group
        .heads
        .values()
        .find(|head| head.raft_id != leader)
        .unwrap();
    let refused = follower
        .handle
        .propose(SessionId::INTERNAL, 0, super::test_group::COUNTER, vec![1])
        .await
        .unwrap_err();
    assert_eq!(
        refused,
        ProposeError::NotLeader {
            leader: Some(leader)
        }
    );
    let refused = follower
        .handle
        .change_group(GroupChange::Remove(leader))
        .await;
    assert!(matches!(
        refused,
        Err(ChangeError::Propose(ProposeError::NotLeader { .. }))
    ));
    assert_eq!(sum(&group.leader().await.handle.read().await.unwrap()), 0);
}

/// The learner's own answer may overtake the report that its snapshot was sent. raft then keeps the
/// learner in state probe until it has something to send to it, and a quiet group has nothing.
#[tokio::test]
async fn a_learner_of_a_quiet_group_is_promoted_whichever_end_of_its_snapshot_comes_first() {
    for delay in [Duration::ZERO, Duration::from_millis(200)] {
        let mut group = TestGroup::new(RaftConfig::default()).await;
        group.delay_reports(delay);
        let learner = group.add_learner().await;
        group.promote(learner).await;
        group.converge().await;
    }
}

#[tokio::test]
async fn a_group_grows_to_five_and_shrinks_to_one() {
    let mut group = TestGroup::of(5, short_log()).await;
    for _ in 0..100 {
        group.add(SessionId::INTERNAL, 0, 1).await;
    }
    while group.heads.len() > 1 {
        let leader = group.leader().await.raft_id;
        let gone = group
            .heads
            .keys()
            .copied()
            .find(|id| *id != leader)
            .unwrap();
        eventually("a removal", || async {
            group.change(GroupChange::Remove(gone)).await.is_ok()
        })
        .await;
        group.stop(gone).await;
        group.add(SessionId::INTERNAL, 0, 1).await;
    }
    let view = group.leader().await.handle.read().await.unwrap();
    assert_eq!(sum(&view), 104);
}
