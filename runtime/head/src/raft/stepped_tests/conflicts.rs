//! A member that holds committed entries, and a leader that lacks them or seems to.

use mobula_core::config::RaftConfig;
use mobula_storage::raft_log::{CommittedConflict, RaftLog};
use raft::prelude::{Message, MessageType, Snapshot};

use super::{Frames, Stepped, copy_of};
use crate::raft::test_group::member;
use crate::simulation::Change;

/// Lets head 1 stand, and be elected by those who have no leader.
fn elect_head_1(group: &mut Stepped) {
    group.ticks(1, 2 * RaftConfig::default().election_ticks);
    assert!(group.heads[&1].status().leads);
}

/// Three heads, of which 1 and 2 were started on older copies of their disks and go on without 3, which is
/// down and has more; and the last entry of the copies.
fn restored_majority() -> (Stepped, u64) {
    let mut group = Stepped::of(3);
    let older = [1_u64, 2].map(|raft_id| (raft_id, copy_of(&group.disks[&raft_id])));
    let held = group.heads[&1].log().last().index;
    assert_eq!(group.heads[&2].log().last().index, held);
    group.propose(3);
    group.carry(|_| true);
    group.ticks(1, 3);
    assert!(group.committed(3) >= held + 3);
    group.heads.clear();
    for (raft_id, disk) in older {
        group.disks.insert(raft_id, disk);
        group.start(raft_id, true);
    }
    elect_head_1(&mut group);
    (group, held)
}

#[test]
fn a_head_does_not_follow_a_leader_that_lacks_what_is_committed_and_can_be_asked_for_it_later() {
    let (mut group, held) = restored_majority();
    let leads_in = group.heads[&1].status().term;
    group.start(3, true);
    let entry = group.heads[&3].log().entry(held + 1).unwrap();
    let fault = group.ticks_until_end_of(3).expect("an end of head 3");
    assert!(fault.is_divergence(), "{fault}");
    let what = format!(
        "entry {} is committed in its log with term {}, and head 1, the leader of term {leads_in}, has \
         one of term {leads_in} there",
        held + 1,
        entry.term
    );
    assert_eq!(fault.to_string(), what);

    // Each start under that leader ends so, and one without it lasts and has everything.
    group.start(3, true);
    let again = group.ticks_until_end_of(3).expect("an end of head 3");
    assert_eq!(again.to_string(), what);
    group.heads.clear();
    group.post.messages.lock().clear();
    group.start(3, true);
    group.ticks(3, 4 * RaftConfig::default().election_ticks);
    let status = group.heads[&3].status();
    assert!(!status.leads && status.applied >= held + 3, "{status:?}");
    assert_eq!(group.heads[&3].log().entry(held + 1).unwrap(), entry);
}

#[test]
fn a_leader_that_has_written_more_than_it_lost_is_not_followed_either() {
    let (mut group, held) = restored_majority();
    group.propose(10);
    group.carry(|_| true);
    // A new leader begins behind all that it holds, and asks its way back.
    group.heads.clear();
    group.start(1, true);
    group.start(2, true);
    elect_head_1(&mut group);
    group.start(3, true);
    assert!(group.heads[&1].log().last().index > group.heads[&3].log().last().index);
    let fault = group.ticks_until_end_of(3).expect("an end of head 3");
    let log = RaftLog::open(group.disks[&3].clone()).unwrap();
    let noted = log.committed_conflict().unwrap().expect("a note");
    assert_eq!(fault.to_string(), noted.to_string());
    let lacked = held + 1..=held + 3;
    assert!(lacked.contains(&noted.index), "{noted}");
}

#[test]
fn an_end_of_the_log_that_is_not_committed_is_replaced_as_ever() {
    let mut group = Stepped::of(3);
    let committed = group.committed(1);
    group.propose(3);
    // Nobody hears of them.
    group.post.messages.lock().clear();
    let tail = group.heads[&1].log().last();
    assert_eq!((tail.index, group.committed(1)), (committed + 3, committed));
    group.heads.remove(&1);
    // So long that head 3 gives up on its leader, and not so long that it stands itself.
    group.ticks(3, RaftConfig::default().election_ticks);
    group.ticks(2, 40);
    assert!(group.heads[&2].status().leads);
    group.start(1, true);
    group.ticks(2, 6);
    assert_eq!(group.committed(1), group.committed(2));
    let entry = group.heads[&1].log().entry(committed + 1).unwrap();
    assert!(entry.term > tail.term, "{entry:?}");
}

/// A snapshot that head 1, which leads, sends a new head 4, and the frames; head 3 hears of nothing
/// meanwhile.
fn snapshot_without_head_3(group: &mut Stepped) -> (Message, Frames) {
    group.start(4, false);
    let _added = group.ask(1, Change::AddLearner(member(4)));
    for _ in 0..RaftConfig::default().election_ticks {
        loop {
            let Some(message) = group.post.messages.lock().pop_front() else {
                break;
            };
            let now = group.now;
            if message.to != 3
                && let Some(head) = group.heads.get_mut(&message.to)
            {
                head.step(message, now).unwrap();
                head.settle().unwrap();
            }
        }
        if let Some(snapshot) = group.post.snapshots.lock().pop_front() {
            return snapshot;
        }
        let leader = group.heads.get_mut(&1).unwrap();
        leader.tick();
        leader.settle().unwrap();
    }
    panic!("no snapshot was sent to head 4");
}

#[test]
fn a_snapshot_replaces_nothing_of_which_a_leader_was_found_to_lack_a_part() {
    let mut group = Stepped::of(3);
    let noted = CommittedConflict {
        index: group.committed(3),
        own_term: group.heads[&3].status().term,
        leader: 2,
        term: group.heads[&3].status().term + 1,
        leaders_entry_term: 0,
        committed: group.committed(3),
    };
    let log = group.heads[&3].log();
    log.note_committed_conflict(noted).unwrap();
    group.propose(3);
    group.carry(|message| message.to != 3);
    let (mut message, frames) = snapshot_without_head_3(&mut group);
    message.to = 3;
    let index = message.get_snapshot().get_metadata().index;
    assert!(index > group.committed(3));

    let now = group.now;
    let mut refuses = group.heads.remove(&3).unwrap();
    let fault = refuses
        .snapshot_arrived(message.clone(), &frames, now)
        .unwrap_err();
    assert_eq!(fault.to_string(), noted.to_string());
    drop(refuses);

    // More is committed since the note: behind a leader that holds everything.
    group.start(3, true);
    let three = group.heads.get_mut(&3).unwrap();
    let past = CommittedConflict {
        committed: noted.committed - 1,
        ..noted
    };
    three.log().note_committed_conflict(past).unwrap();
    assert!(three.snapshot_arrived(message, &frames, now).unwrap());
    three.settle().unwrap();
    assert_eq!(group.committed(3), index);
}

/// A message of head 1 to head 3 that says of its log that entry `index` is one of `log_term`.
fn tells_of(kind: MessageType, term: u64, index: u64, log_term: u64) -> Message {
    let mut message = Message {
        from: 1,
        to: 3,
        term,
        ..Message::default()
    };
    message.set_msg_type(kind);
    if kind == MessageType::MsgSnapshot {
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        metadata.index = index;
        metadata.term = log_term;
        message.set_snapshot(snapshot);
    } else {
        message.index = index;
        message.log_term = log_term;
    }
    message
}

#[test]
fn what_is_compacted_of_an_earlier_term_or_the_same_is_no_conflict_and_another_entry_is_one() {
    let mut group = Stepped::of(3);
    let now = group.now;
    let three = group.heads.get_mut(&3).unwrap();
    let (status, truncated) = (three.status(), three.log().truncated());
    let (term, committed) = (status.term, status.committed);
    assert!(truncated.index > 1 && committed > truncated.index);
    let own_term = three.log().entry(committed).unwrap().term;
    for kind in [MessageType::MsgAppend, MessageType::MsgSnapshot] {
        let passes = [
            tells_of(kind, term, truncated.index - 1, own_term + 1),
            tells_of(kind, term, truncated.index, truncated.term),
            tells_of(kind, term, committed, own_term),
            tells_of(kind, term - 1, committed, own_term + 1),
        ];
        for message in passes {
            three.step(message, now).unwrap();
            three.settle().unwrap();
        }
    }
    assert_eq!(three.log().committed_conflict().unwrap(), None);
    let conflicts = [
        (MessageType::MsgAppend, 0, "has none there"),
        (MessageType::MsgAppend, own_term + 1, "has one of term"),
        (MessageType::MsgSnapshot, own_term + 1, "has one of term"),
    ];
    for (kind, log_term, said) in conflicts {
        let message = tells_of(kind, term + 1, committed, log_term);
        let three = group.heads.get_mut(&3).unwrap();
        let fault = three.step(message, now).unwrap_err().to_string();
        assert!(fault.contains(said), "{fault}");
        group.start(3, true);
    }
}
