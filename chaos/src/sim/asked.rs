//! What is asked of a head's core, and what becomes of it: each question is kept with whom its answer
//! is for, looked at after every step, checked, and handed out.
//!
//! Invariant: an answer is checked against the log before anybody hears it.

use mobula_core::codec::encode_plain;
use mobula_core::control::ModuleId;
use mobula_core::id::SessionId;
use mobula_head::raft::{ChangeError, Outcome, ProposeError};
use mobula_head::simulation::{CoreFault, HeadCore, View};
use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

use super::network::Place;
use super::operator::OperatorTask;
use super::options::{MILLISECOND, Micros, SECOND};
use super::packet::{Answer, Ask, Packet, Question, Reply, Request};
use super::violation::Violation;
use super::world::{Event, World};

/// How long a read may take before it is asked again, and in all; as in `RaftHandle::read`.
const READ_ATTEMPT: Micros = 100 * MILLISECOND;
const ANSWER_TIMEOUT: Micros = 10 * SECOND;

/// Whom an answer is for.
#[derive(Debug, Clone)]
pub(crate) enum For {
    Client {
        client: usize,
        operation: u64,
        attempt: u32,
    },
    /// The registration of a worker in a session.
    Registration {
        worker: usize,
        session: u64,
    },
    /// An event of a worker.
    Event {
        session: u64,
        sequence: u64,
    },
    /// The standing orders for a new session.
    Greeting {
        session: u64,
    },
    Placement,
    Health,
    Control,
    /// What the operator asked, and when: an answer to what it has given up is not one to what it asks
    /// now.
    Operator(OperatorTask, Micros),
    Nobody,
}

pub(crate) enum Waiting {
    Proposal(Receiver<Result<Outcome, ProposeError>>),
    Read {
        answer: Receiver<Result<View, ProposeError>>,
        question: Option<Question>,
        asked_at: Micros,
        /// What had been acknowledged to anybody when it was asked first.
        floor: u64,
    },
    Change(Receiver<Result<(), ChangeError>>),
    Transfer(Receiver<Result<u64, ChangeError>>),
    /// A change of a module behind this revision.
    Watch {
        module: ModuleId,
        seen: u64,
    },
}

/// Something that the core was asked.
pub(crate) struct Asked {
    pub(crate) waiting: Waiting,
    pub(crate) whose: For,
    pub(crate) deadline: Micros,
}

impl World {
    /// What a client, or a worker, asks a head from outside.
    pub(crate) fn take_request(&mut self, raft_id: u64, request: Request) -> Result<(), CoreFault> {
        let whose = match request.client {
            Some(client) => For::Client {
                client,
                operation: request.operation,
                attempt: request.attempt,
            },
            None => For::Nobody,
        };
        match request.ask {
            Ask::Change {
                session,
                seq,
                module,
                payload,
            } => self.propose(raft_id, whose, session, seq, module, payload),
            Ask::Look(question) => self.look(raft_id, whose, Some(question)),
            Ask::Watch { module, seen } => {
                self.watch(raft_id, whose, module, seen);
                Ok(())
            }
        }
    }

    pub(crate) fn propose(
        &mut self,
        raft_id: u64,
        whose: For,
        session: SessionId,
        seq: u64,
        module: ModuleId,
        payload: Vec<u8>,
    ) -> Result<(), CoreFault> {
        let (now, deadline) = (self.instant(), self.now + ANSWER_TIMEOUT);
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return Ok(());
        };
        let Some(core) = head.core.as_mut() else {
            return Ok(());
        };
        let answer = core.propose(session, seq, module, payload, now)?;
        head.asked.push(Asked {
            waiting: Waiting::Proposal(answer),
            whose,
            deadline,
        });
        Ok(())
    }

    pub(crate) fn look(
        &mut self,
        raft_id: u64,
        whose: For,
        question: Option<Question>,
    ) -> Result<(), CoreFault> {
        let (now, at, floor) = (self.instant(), self.now, self.acknowledged);
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return Ok(());
        };
        let Some(core) = head.core.as_mut() else {
            return Ok(());
        };
        let answer = core.read(now)?;
        head.asked.push(Asked {
            waiting: Waiting::Read {
                answer,
                question,
                asked_at: at,
                floor,
            },
            whose,
            deadline: at + ANSWER_TIMEOUT,
        });
        Ok(())
    }

    pub(crate) fn give_head_a_turn(&mut self, raft_id: u64) {
        let now = self.now;
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return;
        };
        let is_watch = |asked: &Asked| matches!(asked.waiting, Waiting::Watch { .. });
        if head.core.is_some() && !head.is_woken && !head.asked.iter().all(is_watch) {
            head.is_woken = true;
            let (at, life) = (head.busy_until.max(now + 50), head.life);
            self.at(at, Event::HeadWake(raft_id, life));
        }
    }

    pub(crate) fn collect_answers(&mut self, raft_id: u64) -> Result<(), Violation> {
        let now = self.now;
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return Ok(());
        };
        let mut ready = Vec::new();
        let mut index = 0;
        let Some(core) = head.core.as_ref() else {
            return Ok(());
        };
        while index < head.asked.len() {
            let asked = &mut head.asked[index];
            let outcome = poll(&mut asked.waiting, core, asked.deadline <= now);
            match outcome {
                None => index += 1,
                Some(outcome) => {
                    let asked = head.asked.remove(index);
                    ready.push((asked, outcome));
                }
            }
        }
        for (asked, outcome) in ready {
            self.hand_out(raft_id, asked, outcome)?;
        }
        Ok(())
    }

    pub(crate) fn ask_reads_again(&mut self, raft_id: u64) {
        let (now, at) = (self.instant(), self.now);
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return;
        };
        let Some(core) = head.core.as_mut() else {
            return;
        };
        for asked in &mut head.asked {
            if let Waiting::Read {
                answer, asked_at, ..
            } = &mut asked.waiting
                && *asked_at + READ_ATTEMPT <= at
                && let Ok(again) = core.read(now)
            {
                *answer = again;
                *asked_at = at;
            }
        }
    }

    fn hand_out(&mut self, raft_id: u64, asked: Asked, outcome: Polled) -> Result<(), Violation> {
        match &outcome {
            Polled::Proposal(Ok(outcome)) => self.check_outcome(raft_id, outcome)?,
            Polled::View(Ok(view)) => {
                let Waiting::Read { floor, .. } = asked.waiting else {
                    unreachable!("a view answers a read");
                };
                self.check_view(raft_id, view, floor)?;
            }
            _ => {}
        }
        match asked.whose {
            For::Client {
                client,
                operation,
                attempt,
            } => {
                let question = match asked.waiting {
                    Waiting::Read { question, .. } => question,
                    _ => None,
                };
                let answer = self.answer_for_client(outcome, question);
                let reply = Packet::Reply(Reply {
                    operation,
                    attempt,
                    answer,
                });
                self.send_at(self.now, Place::Head(raft_id), Place::Client(client), reply);
            }
            For::Operator(task, since) => self.operator_hears(raft_id, (task, since), outcome)?,
            For::Nobody => {}
            whose => self.duty_hears(raft_id, whose, outcome),
        }
        Ok(())
    }
}

/// What became of something that was asked.
pub(crate) enum Polled {
    Proposal(Result<Outcome, ProposeError>),
    View(Result<View, ProposeError>),
    Change(Result<(), ChangeError>),
    Transfer,
    /// The revision of a watched module.
    Revision(u64),
}

fn poll(waiting: &mut Waiting, core: &HeadCore, is_late: bool) -> Option<Polled> {
    const LATE: ProposeError = ProposeError::Unknown("no answer in time");
    fn take<T>(answer: &mut Receiver<T>, is_late: bool) -> Option<Option<T>> {
        match answer.try_recv() {
            Ok(value) => Some(Some(value)),
            Err(TryRecvError::Closed) => Some(None),
            Err(TryRecvError::Empty) if is_late => Some(None),
            Err(TryRecvError::Empty) => None,
        }
    }
    Some(match waiting {
        Waiting::Proposal(answer) => Polled::Proposal(take(answer, is_late)?.unwrap_or(Err(LATE))),
        Waiting::Read { answer, .. } => Polled::View(take(answer, is_late)?.unwrap_or(Err(LATE))),
        Waiting::Change(answer) => {
            Polled::Change(take(answer, is_late)?.unwrap_or(Err(LATE.into())))
        }
        Waiting::Transfer(answer) => {
            take(answer, is_late)?;
            Polled::Transfer
        }
        Waiting::Watch { module, seen } => {
            let revision = core.module_revision(*module);
            if revision <= *seen && !is_late {
                return None;
            }
            Polled::Revision(revision)
        }
    })
}

impl World {
    fn answer_for_client(&self, outcome: Polled, question: Option<Question>) -> Answer {
        let refused = |error: ProposeError| match error {
            ProposeError::NotLeader { leader } => Answer::No(leader),
            ProposeError::Overloaded(_) | ProposeError::TooLarge { .. } => Answer::No(None),
            ProposeError::Unknown(_) | ProposeError::Stopped => Answer::Unknown,
        };
        match outcome {
            Polled::Proposal(Ok(outcome)) => Answer::Applied {
                index: outcome.index,
                result: outcome.result,
            },
            Polled::View(Ok(view)) => {
                let applied = applied_in(&view);
                let question = question.expect("clients read with a question");
                let found = match question {
                    Question::Scheduler(query) => {
                        encode_plain(&mobula_scheduler::answer(&view, 0, query))
                    }
                    Question::Module(id, payload) => {
                        let module = self.modules.iter().find(|module| module.id() == id);
                        let module = module.expect("clients ask modules that there are");
                        encode_plain(&module.query(&view, 0, &payload))
                    }
                };
                Answer::Seen { applied, found }
            }
            Polled::Proposal(Err(error)) | Polled::View(Err(error)) => refused(error),
            Polled::Revision(revision) => Answer::Watched { revision },
            Polled::Change(_) | Polled::Transfer => Answer::Unknown,
        }
    }
}

/// The entry up to which a view of the tables goes.
pub(crate) fn applied_in(view: &View) -> u64 {
    let log = mobula_storage::raft_log::LogView::new(view.base());
    log.applied().expect("memory can be read").index
}
