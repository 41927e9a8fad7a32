//! The table under requests in any order, sensible or not, with moves that end well or badly and
//! whenever: every request is answered once, memory stays within its limit, and nothing is left when
//! everybody has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_wire::store::{StoreReply, StoreRequest};
use proptest::prelude::*;
use proptest::sample::Index;
use tokio::sync::{mpsc, oneshot};

use super::super::link::{Answer, Linked};
use super::super::memory::Block;
use super::super::spill::OnDisk;
use super::super::table::{Action, Limits, Opener, PEERS, Table};

const LIMIT_BYTES: u64 = 16 * 4096;

/// Processes: two of one job, one of another.
const JOBS: [JobId; 3] = [JobId(1), JobId(1), JobId(2)];

#[derive(Debug, Clone)]
enum Step {
    Request(usize, Asked),
    PeerOpens(Index),
    PeerCloses(Index),
    /// A move is over, well or not.
    Moved(Index, bool),
    Restart(usize),
    Later(u64),
}

#[derive(Debug, Clone)]
enum Asked {
    Grant(u64),
    Withdraw(u64),
    Return(Index),
    Publish(Index, u64, bool),
    Open(Index),
    OpenElsewhere(u64, u64),
    Close(Index),
    Free(Index),
    Watch(u64, bool),
    Unwatch(u64),
}

fn asked() -> impl Strategy<Value = Asked> {
    prop_oneof![
        4 => (1..10_000_u64).prop_map(Asked::Grant),
        1 => (0..20_u64).prop_map(Asked::Withdraw),
        1 => any::<Index>().prop_map(Asked::Return),
        6 => (any::<Index>(), 0..9000_u64, any::<bool>())
            .prop_map(|(arena, bytes, owned)| Asked::Publish(arena, bytes, owned)),
        4 => any::<Index>().prop_map(Asked::Open),
        2 => (0..9_u64, 1..20_000_u64).prop_map(|(id, bytes)| Asked::OpenElsewhere(id, bytes)),
        3 => any::<Index>().prop_map(Asked::Close),
        3 => any::<Index>().prop_map(Asked::Free),
        1 => (0..4_u64, any::<bool>()).prop_map(|(process, here)| Asked::Watch(process, here)),
        1 => (0..4_u64).prop_map(Asked::Unwatch),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..JOBS.len(), asked()).prop_map(|(link, asked)| Step::Request(link, asked)),
        2 => any::<Index>().prop_map(Step::PeerOpens),
        2 => any::<Index>().prop_map(Step::PeerCloses),
        8 => (any::<Index>(), prop::bool::weighted(0.8)).prop_map(|(at, is_well)| Step::Moved(at, is_well)),
        1 => (0..JOBS.len()).prop_map(Step::Restart),
        2 => (0..4000_u64).prop_map(Step::Later),
    ]
}

struct Process {
    link: u64,
    id: ProcessId,
    answers: mpsc::Receiver<Answer>,
    arenas: Vec<u64>,
    last_request: u64,
    unanswered: BTreeSet<u64>,
    answered: BTreeSet<u64>,
    sequence: u64,
}

struct World {
    table: Table,
    now: Instant,
    processes: Vec<Process>,
    moves: Vec<Action>,
    objects: Vec<ObjectId>,
    peers: Vec<(ObjectId, oneshot::Receiver<Result<Block, ObjectError>>)>,
    on_disk: BTreeMap<u64, u64>,
    links: u64,
}

impl World {
    fn new() -> World {
        let limits = Limits {
            node: "one".into(),
            agent: "here".into(),
            memory_bytes: LIMIT_BYTES,
            arena_bytes: 2 * 4096,
            spill_bytes: 12_000,
        };
        let mut world = World {
            table: Table::new(limits),
            now: Instant::now(),
            processes: Vec::new(),
            moves: Vec::new(),
            objects: Vec::new(),
            peers: Vec::new(),
            on_disk: BTreeMap::new(),
            links: 0,
        };
        for index in 0..JOBS.len() {
            let process = world.start(index);
            world.processes.push(process);
        }
        world
    }

    fn start(&mut self, index: usize) -> Process {
        self.links += 1;
        let (sender, answers) = mpsc::channel(4096);
        let id = ProcessId(self.links);
        let linked = Linked {
            link: self.links,
            job: JOBS[index],
            process: id,
            answers: sender,
        };
        self.table.linked(linked, self.now);
        Process {
            link: self.links,
            id,
            answers,
            arenas: Vec::new(),
            last_request: 0,
            unanswered: BTreeSet::new(),
            answered: BTreeSet::new(),
            sequence: 0,
        }
    }

    fn restart(&mut self, index: usize) {
        self.table.unlinked(self.processes[index].link);
        let process = self.start(index);
        self.processes[index] = process;
    }

    fn object(&self, at: Index) -> Option<ObjectId> {
        (!self.objects.is_empty()).then(|| *at.get(&self.objects))
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Request(index, asked) => self.ask(index, asked),
            Step::PeerOpens(at) => {
                if let Some(object) = self.object(at) {
                    let (answer, opened) = oneshot::channel();
                    let opener = Opener::Peer(answer);
                    self.table.open(opener, object, JOBS[0], 0, "", self.now);
                    self.peers.push((object, opened));
                }
            }
            Step::PeerCloses(at) => {
                if !self.peers.is_empty() {
                    let (object, mut opened) = self.peers.swap_remove(at.index(self.peers.len()));
                    // Dropped before it was answered, it has nothing to close.
                    if let Ok(Ok(_)) = opened.try_recv() {
                        self.table.close(PEERS, object);
                    }
                }
            }
            Step::Moved(at, is_well) => {
                if !self.moves.is_empty() {
                    let action = self.moves.swap_remove(at.index(self.moves.len()));
                    self.moved(action, is_well);
                }
            }
            Step::Restart(index) => self.restart(index),
            Step::Later(ms) => self.now += Duration::from_millis(ms),
        }
        self.table.pump(self.now);
        self.look();
    }

    fn ask(&mut self, index: usize, asked: Asked) {
        let objects = self.objects.clone();
        let any_object = |at: Index| (!objects.is_empty()).then(|| *at.get(&objects));
        let process = &mut self.processes[index];
        let request = process.last_request + 1;
        let arena = |at: Index| match process.arenas.is_empty() {
            true => 999,
            false => *at.get(&process.arenas),
        };
        let request = match asked {
            Asked::Grant(size_bytes) => StoreRequest::Grant {
                request,
                size_bytes,
            },
            Asked::Withdraw(request) => {
                // Answered or not: nobody waits for it any more.
                process.unanswered.remove(&request);
                StoreRequest::Withdraw { request }
            }
            Asked::Return(at) => StoreRequest::ReturnArena { arena: arena(at) },
            Asked::Publish(at, size_bytes, is_owned_here) => {
                process.sequence += 1;
                let object = ObjectId {
                    owner: process.id,
                    sequence: process.sequence,
                };
                self.objects.push(object);
                StoreRequest::Publish {
                    object,
                    arena: arena(at),
                    offset: 0,
                    size_bytes,
                    is_owned_here,
                }
            }
            Asked::Open(at) => {
                let Some(object) = any_object(at) else {
                    return;
                };
                StoreRequest::Open {
                    request,
                    object,
                    agent: "here".into(),
                    size_bytes: 1,
                }
            }
            Asked::OpenElsewhere(sequence, size_bytes) => {
                let owner = ProcessId(1 << 40);
                let object = ObjectId { owner, sequence };
                self.objects.push(object);
                StoreRequest::Open {
                    request,
                    object,
                    agent: "there".into(),
                    size_bytes,
                }
            }
            Asked::Close(at) => match any_object(at) {
                Some(object) => StoreRequest::Close { object },
                None => return,
            },
            Asked::Free(at) => match any_object(at) {
                Some(object) => StoreRequest::Free {
                    object,
                    agent: "here".into(),
                },
                None => return,
            },
            Asked::Watch(process, is_here) => StoreRequest::Watch {
                process: ProcessId(process),
                agent: if is_here { "here" } else { "there" }.into(),
            },
            Asked::Unwatch(process) => StoreRequest::Unwatch {
                process: ProcessId(process),
            },
        };
        if let StoreRequest::Grant { request, .. } | StoreRequest::Open { request, .. } = &request {
            process.last_request = *request;
            process.unanswered.insert(*request);
        }
        let link = process.link;
        if !self.table.request(link, request, self.now) {
            // As the service does with who breaks the protocol.
            self.restart(index);
        }
    }

    fn moved(&mut self, action: Action, is_well: bool) {
        match action {
            Action::Spill(object, block) => {
                let offset = self.on_disk.keys().next_back().map_or(0, |last| last + 1);
                let on_disk = OnDisk {
                    offset,
                    size_bytes: block.size_bytes,
                    digest: blake3::hash(&[]),
                };
                let result = match is_well {
                    true => {
                        self.on_disk.insert(offset, block.size_bytes);
                        Ok(on_disk)
                    }
                    false => Err("the disk is full".to_owned()),
                };
                self.table.spilled(object, result, self.now);
            }
            Action::Restore(object, _, on_disk) => {
                assert!(self.on_disk.contains_key(&on_disk.offset), "it is there");
                self.loaded(object, is_well);
            }
            Action::Fetch(object, ..) => self.loaded(object, is_well),
            _ => unreachable!("only moves wait"),
        }
    }

    fn loaded(&mut self, object: ObjectId, is_well: bool) {
        let lost = || ObjectError::Lost {
            object,
            reason: "a test says so".into(),
        };
        let result = if is_well { Ok(()) } else { Err(lost()) };
        self.table.loaded(object, result);
    }

    /// Takes in what the table wants done and said.
    fn look(&mut self) {
        for action in self.table.take_actions() {
            match action {
                Action::Remove(on_disk) => {
                    let removed = self.on_disk.remove(&on_disk.offset);
                    assert_eq!(removed, Some(on_disk.size_bytes), "removed once");
                }
                Action::FreeAt(..) | Action::Watch(..) | Action::Unwatch(..) => {}
                moving => self.moves.push(moving),
            }
        }
        for process in &mut self.processes {
            while let Ok((reply, descriptor)) = process.answers.try_recv() {
                let (request, has_descriptor) = match reply {
                    StoreReply::Granted { request, arena, .. } => {
                        process.arenas.push(arena);
                        (request, true)
                    }
                    StoreReply::Opened {
                        request,
                        arena_bytes,
                        ..
                    } => (request, arena_bytes.is_some()),
                    StoreReply::Refused { request, .. } => (request, false),
                    _ => continue,
                };
                assert_eq!(descriptor.is_some(), has_descriptor);
                let was_asked = request <= process.last_request;
                assert!(was_asked, "{request} was never asked");
                assert!(
                    process.answered.insert(request),
                    "{request} is answered twice"
                );
                process.unanswered.remove(&request);
            }
        }
        let metrics = self.table.metrics();
        assert!(metrics.used_bytes <= LIMIT_BYTES, "{metrics:?}");
        let on_disk: u64 = self.on_disk.values().sum();
        assert!(metrics.spilled_bytes <= on_disk, "{metrics:?}");
    }

    /// Lets everything that is under way come to its end.
    fn settle(&mut self) {
        for _ in 0..1000 {
            while let Some(action) = self.moves.pop() {
                self.moved(action, true);
                self.look();
            }
            self.now += Duration::from_secs(1);
            self.table.pump(self.now);
            self.look();
            if self.moves.is_empty() && !self.table.is_waited_for() {
                return;
            }
        }
        panic!("it never comes to rest: {:?}", self.table.metrics());
    }
}

proptest! {
    #[test]
    fn every_request_is_answered_and_nothing_is_left(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
        }
        world.settle();
        for process in &world.processes {
            prop_assert!(process.unanswered.is_empty(), "{:?}", process.unanswered);
        }
        for process in std::mem::take(&mut world.processes) {
            world.table.unlinked(process.link);
        }
        for (object, mut opened) in std::mem::take(&mut world.peers) {
            if let Ok(Ok(_)) = opened.try_recv() {
                world.table.close(PEERS, object);
            }
        }
        world.settle();
        world.table.job_ended(JOBS[0]);
        world.table.job_ended(JOBS[2]);
        world.settle();
        let metrics = world.table.metrics();
        prop_assert_eq!((metrics.objects, metrics.used_bytes, metrics.arenas), (0, 0, 0));
        prop_assert_eq!((metrics.spilled_bytes, metrics.objects_bytes), (0, 0));
        prop_assert!(world.on_disk.is_empty(), "{:?}", world.on_disk);
    }
}
