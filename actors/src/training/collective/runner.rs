//! A member with its replica, as a task: carries out what the protocol wants.
//!
//! Invariants:
//! 1. Shards are computed one after the other, on a thread of their own, while sums of those before
//!    travel.
//! 2. Every call is a task of the runner's own, and ends with it.
//! 3. A replica that refuses a shard or an update stops the runner; the reason is on the board.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::Collective;
use super::compute_thread::{ComputeThread, Outcome};
use crate::training::messages::{Epoch, Held, TrainerError};
use crate::training::protocol::exchange::{Action, Ask, Content, Contribution, Refusal, Report};
use crate::training::protocol::leader::StateDigest;
use crate::training::protocol::member::Member;
use crate::training::protocol::plan::{MemberId, Plan};
use crate::training::reduction::Partial;
use crate::training::replica::Replica;

/// Messages that wait for the runner, at most. It takes them between two shards' beginnings, so few do.
const INBOX_MAX: usize = 1024;
/// How often what failed is sent again, and how often it looks who is slow.
const TICK: Duration = Duration::from_millis(20);
/// A question for a sum is answered after this, whether the sum is there or not: however long a step takes, who asks
/// knows that this member lives.
pub(super) const NOT_YET_AFTER: Duration = Duration::from_secs(10);
/// A member is called slow after this, and after [`SLOW_FACTOR`] usual steps.
const SLOW_AFTER_MIN: Duration = Duration::from_millis(250);
const SLOW_FACTOR: u32 = 8;
/// After how long the same report is made once more.
const REPEATED_AFTER: Duration = Duration::from_secs(1);
/// Reports that are kept for a coordinator that does not listen now.
const REPORTS_MAX: usize = 64;

enum Input {
    Contribute(Contribution, oneshot::Sender<Result<(), Refusal>>),
    Ask(Ask, oneshot::Sender<Result<Arc<Partial>, Refusal>>),
    Adopt(Plan, oneshot::Sender<Result<(), Epoch>>),
    DigestBefore(u64, oneshot::Sender<Option<StateDigest>>),
}

/// The way to a runner. What is asked of one that has ended gives `None`.
#[derive(Clone)]
pub struct RunnerHandle(mpsc::Sender<Input>);

impl RunnerHandle {
    async fn request<T>(&self, input: impl FnOnce(oneshot::Sender<T>) -> Input) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.0.send(input(sender)).await.ok()?;
        answer.await.ok()
    }

    /// Another member's sums.
    pub async fn contribute(&self, contribution: Contribution) -> Option<Result<(), Refusal>> {
        self.request(|answer| Input::Contribute(contribution, answer))
            .await
    }

    /// A question for a sum; answered once it is there, or with [`Refusal::NotYet`] after a while.
    pub async fn ask(&self, ask: Ask) -> Option<Result<Arc<Partial>, Refusal>> {
        self.request(|answer| Input::Ask(ask, answer)).await
    }

    /// Follow this plan; refused with the epoch that it follows if that is later.
    pub async fn adopt(&self, plan: Plan) -> Option<Result<(), Epoch>> {
        self.request(|answer| Input::Adopt(plan, answer)).await
    }

    /// The state that it had before `step`.
    pub async fn digest_before(&self, step: u64) -> Option<Option<StateDigest>> {
        self.request(|answer| Input::DigestBefore(step, answer))
            .await
    }
}

/// What a runner shows to whoever looks after it.
#[derive(Debug, Clone, Default)]
pub struct Board {
    /// Grows with each report.
    pub number: u64,
    /// The step at which it stands.
    pub step: u64,
    /// The state before that step. It is told from here: the replica itself is busy while it computes.
    pub held: Option<Held>,
    /// How long the step before waited for samples, and how long it was computed.
    pub spent: (Duration, Duration),
    /// The latest reports with their numbers.
    pub reports: VecDeque<(u64, Report)>,
    /// When the last of them was made.
    reported_at: Option<Instant>,
    /// Why it has stopped.
    pub failed: Option<TrainerError>,
}

impl Board {
    fn report(&mut self, report: Report) {
        // The same again says nothing new, but with each step the coordinator forgets who was not reached.
        let is_old = |at: Instant| at.elapsed() >= REPEATED_AFTER;
        let last = self.reports.back().map(|(_, last)| *last);
        if last == Some(report) && !self.reported_at.is_some_and(is_old) {
            return;
        }
        self.reported_at = Some(Instant::now());
        self.number += 1;
        if self.reports.len() >= REPORTS_MAX {
            self.reports.pop_front();
        }
        self.reports.push_back((self.number, report));
    }
}

enum Done {
    Contributed(MemberId, Content, Option<Result<(), Refusal>>),
    Answered {
        to: MemberId,
        step: u64,
        bucket: u32,
        outcome: Option<Result<Partial, Refusal>>,
    },
}

/// Somebody who waits for a sum.
struct Asking {
    since: Instant,
    answer: oneshot::Sender<Result<Arc<Partial>, Refusal>>,
}

/// A member and its replica.
pub struct Runner<C> {
    member: Member,
    compute: ComputeThread,
    collective: C,
    inbox: mpsc::Receiver<Input>,
    board: watch::Sender<Board>,
    under_way: JoinSet<Done>,
    /// In the order in which they asked.
    asking: BTreeMap<u64, Asking>,
    next_token: u64,
    step_begun: Instant,
    usual_step: Option<Duration>,
    /// Since when others keep it waiting, as of the last tick.
    waiting_since: Option<Instant>,
    slow_reported: bool,
}

impl<C: Collective> Runner<C> {
    /// A runner for `member`, whose state `held` `replica` holds; the way to it, and what it shows.
    pub fn new(
        member: Member,
        held: Held,
        replica: Arc<Mutex<Replica>>,
        collective: C,
    ) -> (Self, RunnerHandle, watch::Receiver<Board>) {
        let (sender, inbox) = mpsc::channel(INBOX_MAX);
        let (board, shown) = watch::channel(Board {
            step: member.step(),
            held: Some(held),
            ..Board::default()
        });
        let runner = Runner {
            member,
            compute: ComputeThread::start(replica),
            collective,
            inbox,
            board,
            under_way: JoinSet::new(),
            asking: BTreeMap::new(),
            next_token: 0,
            step_begun: Instant::now(),
            usual_step: None,
            waiting_since: None,
            slow_reported: false,
        };
        (runner, RunnerHandle(sender), shown)
    }

    /// Runs until nobody holds a handle any more, or the replica refuses something.
    pub async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.act();
            let outcome = tokio::select! {
                input = self.inbox.recv() => match input {
                    Some(input) => {
                        self.take(input);
                        Ok(())
                    }
                    None => return,
                },
                Some(done) = self.under_way.join_next() => match done {
                    Ok(done) => {
                        self.done(done);
                        Ok(())
                    }
                    // Only dropping the runner aborts them.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                outcome = self.compute.outcome() => self.computed(outcome),
                _ = tick.tick() => {
                    self.look_around();
                    Ok(())
                }
            };
            if let Err(error) = outcome {
                self.board.send_modify(|board| {
                    board.number += 1;
                    board.failed = Some(error);
                });
                return;
            }
        }
    }

    fn take(&mut self, input: Input) {
        // Whoever asked may be gone; then nobody misses the answer.
        match input {
            Input::Contribute(contribution, answer) => {
                let _ = answer.send(self.member.contribute(contribution));
            }
            Input::Ask(ask, answer) => {
                let token = self.next_token;
                self.next_token += 1;
                match self.member.ask(token, ask) {
                    Some(outcome) => {
                        let _ = answer.send(outcome);
                    }
                    None => {
                        let since = Instant::now();
                        self.asking.insert(token, Asking { since, answer });
                    }
                }
            }
            Input::Adopt(plan, answer) => {
                let _ = answer.send(self.member.adopt(plan));
            }
            Input::DigestBefore(step, answer) => {
                let _ = answer.send(self.member.digest_before(step));
            }
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Contributed(to, content, outcome) => {
                self.member.contributed(to, &content, outcome);
            }
            Done::Answered {
                to,
                step,
                bucket,
                outcome,
            } => self.member.answered(to, step, bucket, outcome),
        }
    }

    fn computed(&mut self, outcome: Outcome) -> Result<(), TrainerError> {
        match outcome {
            Outcome::Computed(step, sums) => self
                .member
                .computed(step, sums?)
                .map_err(|error| TrainerError::Unfit(error.to_string()))?,
            Outcome::Superseded(step, shard) => self.member.superseded(step, shard),
            Outcome::Applied(applied) => {
                let (held, spent) = applied?;
                self.member.applied(held.short());
                let took = self.step_begun.elapsed();
                self.usual_step = Some(usual_after(self.usual_step, took));
                (self.step_begun, self.slow_reported) = (Instant::now(), false);
                self.waiting_since = None;
                // Nobody is woken for a step: who listens for news looks here when there are some.
                self.board.send_if_modified(|board| {
                    (board.step, board.spent) = (held.step, spent);
                    board.held = Some(held);
                    false
                });
            }
        }
        Ok(())
    }

    fn act(&mut self) {
        while let Some(action) = self.member.poll_action() {
            match action {
                Action::Compute { step, shard } => self.compute.compute(step, shard),
                Action::Apply { root } => self.compute.apply(self.member.step(), root),
                Action::Contribute { to, contribution } => {
                    let collective = self.collective.clone();
                    self.under_way.spawn(async move {
                        let content = contribution.content();
                        let outcome = collective.contribute(to, contribution).await;
                        Done::Contributed(to, content, outcome.inspect_err(told).ok())
                    });
                }
                Action::Ask { to, ask } => {
                    let collective = self.collective.clone();
                    self.under_way.spawn(async move {
                        let outcome = collective.ask(to, ask).await;
                        Done::Answered {
                            to,
                            step: ask.step,
                            bucket: ask.bucket,
                            outcome: outcome.inspect_err(told).ok(),
                        }
                    });
                }
                Action::Answer { token, answer } => {
                    if let Some(asking) = self.asking.remove(&token) {
                        // The asking member may be gone.
                        let _ = asking.answer.send(answer);
                    }
                }
                Action::Report(report) => {
                    self.board.send_modify(|board| board.report(report));
                }
            }
        }
    }

    /// Lets those know that this member lives who have waited for a sum for long: they ask once more.
    fn say_not_yet(&mut self) {
        while let Some(first) = self.asking.first_entry()
            && first.get().since.elapsed() >= NOT_YET_AFTER
        {
            // The asking member may be gone.
            let _ = first.remove().answer.send(Err(Refusal::NotYet));
        }
    }

    fn look_around(&mut self) {
        self.say_not_yet();
        if self.member.is_resting() {
            self.member.retry();
        }
        let limit = self.usual_step.map_or(SLOW_AFTER_MIN * 8, |usual| {
            SLOW_AFTER_MIN.max(usual * SLOW_FACTOR)
        });
        if !self.member.is_waiting() {
            self.waiting_since = None;
            return;
        }
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if self.slow_reported || since.elapsed() < limit {
            return;
        }
        let step = self.member.step();
        for peer in self.member.awaited() {
            self.slow_reported = true;
            self.board
                .send_modify(|board| board.report(Report::Slow { peer, step }));
        }
    }
}

/// What a step usually takes, after one that took so long. One that waited for somebody slow says little of what is usual:
/// else the next one would have to wait much longer before that is told.
fn usual_after(usual: Option<Duration>, took: Duration) -> Duration {
    let Some(usual) = usual else {
        return took;
    };
    let most = (usual * 2).max(SLOW_AFTER_MIN / SLOW_FACTOR);
    (usual * 7 + took.min(most)) / 8
}

fn told(error: &super::Unreachable) {
    tracing::debug!(%error, "a message is sent again");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::collective::InProcess;
    use crate::training::protocol::leader::Leader;
    use crate::training::shape::{leader_shape, member_shape};
    use crate::training::spec::TrainSpec;

    #[tokio::test(start_paused = true)]
    async fn who_asks_while_a_step_takes_long_hears_that_the_sum_is_not_there_yet() {
        let spec = TrainSpec::digits_mlp("a");
        let mut replica = Replica::new(spec.clone());
        let held = replica.prepare(None).unwrap();
        let value_count = replica.value_count();
        let [me, other] = [0, 1].map(|slot| MemberId {
            slot,
            incarnation: 1,
            entry: 1,
        });
        let shape = leader_shape(&spec, value_count);
        let mut leader = Leader::new(shape, Epoch::first_of(1), held.step);
        leader.seat([me, other]);
        let shape = member_shape(&spec, value_count);
        let mut member = Member::new(me, shape, held.step, held.short());
        member.adopt(leader.plan().clone()).unwrap();
        let replica = Arc::new(Mutex::new(replica));
        // Without the shards of the other one there is no sum.
        let question = Ask {
            from: other,
            step: held.step,
            digest: held.short(),
            bucket: 0,
            at_once: false,
        };
        let (runner, handle, _board) = Runner::new(member, held, replica, InProcess::default());
        let mut task = JoinSet::new();
        task.spawn(runner.run());
        let begun = Instant::now();
        for times in 1..=10 {
            let answer = tokio::time::timeout(2 * NOT_YET_AFTER, handle.ask(question));
            let answer = answer.await.expect("it says that it lives");
            assert_eq!(answer, Some(Err(Refusal::NotYet)));
            assert!(
                begun.elapsed() >= times * NOT_YET_AFTER,
                "as seldom as can be"
            );
        }
    }

    #[test]
    fn one_step_that_waited_does_not_make_long_steps_usual_and_many_do() {
        let ms = Duration::from_millis;
        let usual = usual_after(None, ms(100));
        assert_eq!(usual, ms(100));
        assert!(usual_after(Some(usual), ms(60_000)) < ms(115));
        assert!(usual_after(Some(Duration::ZERO), ms(100)) > Duration::ZERO);
        let after = |steps| (0..steps).fold(usual, |usual, _| usual_after(Some(usual), ms(1000)));
        assert!(after(5) * SLOW_FACTOR < ms(2000));
        assert!(after(40) > ms(900));
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_report_is_made_again_after_a_while() {
        let report = Report::Unreachable {
            peer: MemberId::default(),
        };
        let mut board = Board::default();
        board.report(report);
        board.report(report);
        assert_eq!(board.number, 1);
        tokio::time::advance(REPEATED_AFTER).await;
        board.report(report);
        board.report(report);
        assert_eq!(board.number, 2);
        let peer = MemberId::default();
        board.report(Report::Reached { peer });
        board.report(report);
        assert_eq!(board.number, 4);
    }
}
