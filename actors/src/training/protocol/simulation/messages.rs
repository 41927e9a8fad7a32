//! How members' messages travel, and what becomes of their actions.

use super::{DRIVER, Event, Made, Reply, World};
use crate::training::protocol::exchange::{Action, Ask, Contribution, Refusal, Report};
use crate::training::protocol::plan::MemberId;
use crate::training::reduction::Partial;

impl World {
    pub(super) fn contribution(&mut self, to: MemberId, contribution: Contribution) {
        let from = contribution.from;
        let made = Made::Contribute(contribution.content());
        let reply = self
            .copy(to)
            .map(|copy| Reply::Contributed(copy.member.contribute(contribution)));
        self.reply(from, to, made, reply);
        self.act(to);
    }

    pub(super) fn question(&mut self, to: MemberId, ask: Ask) {
        let token = self.next;
        self.next += 1;
        let made = Made::Ask(ask.step, ask.bucket);
        assert!(!to.is_driver(), "{} asks the driver's copy", ask.from);
        let Some(copy) = self.copy(to) else {
            self.reply(ask.from, to, made, None);
            return;
        };
        match copy.member.ask(token, ask) {
            Some(answer) => {
                let answer = answer.map(|sum| Partial::clone(&sum));
                self.reply(ask.from, to, made, Some(Reply::Asked(answer)));
            }
            None => {
                copy.tokens.insert(token, ask);
                // Before a call's deadline the owner says that it lives, if that arrives.
                let reply = token
                    .is_multiple_of(2)
                    .then_some(Reply::Asked(Err(Refusal::NotYet)));
                self.at(200, Event::Returned(ask.from, to, made, reply));
            }
        }
        self.act(to);
    }

    pub(super) fn reply(&mut self, to: MemberId, from: MemberId, made: Made, reply: Option<Reply>) {
        let lost = reply.is_some() && self.rng.percent(self.loss_percent);
        let (reply, delay) = match lost {
            true => (None, 60),
            false => (reply, self.rng.below(self.delay_max)),
        };
        self.at(delay, Event::Returned(to, from, made, reply));
    }

    pub(super) fn returned(
        &mut self,
        to: MemberId,
        from: MemberId,
        made: Made,
        reply: Option<Reply>,
    ) {
        if let Some(copy) = self.copy(to) {
            match (made, reply) {
                (Made::Contribute(content), reply) => {
                    let outcome = reply.map(|reply| match reply {
                        Reply::Contributed(outcome) => outcome,
                        Reply::Asked(_) => unreachable!("a contribution is answered as one"),
                    });
                    copy.member.contributed(from, &content, outcome);
                }
                (Made::Ask(step, bucket), reply) => {
                    let outcome = reply.map(|reply| match reply {
                        Reply::Asked(outcome) => outcome,
                        Reply::Contributed(_) => unreachable!("a question is answered as one"),
                    });
                    copy.member.answered(from, step, bucket, outcome);
                }
            }
        }
        self.act(to);
    }

    /// Carries out what a member wants.
    pub(super) fn act(&mut self, who: MemberId) {
        while let Some(action) = self.copy(who).and_then(|copy| copy.member.poll_action()) {
            match action {
                Action::Compute { step, shard } => {
                    let toy = &self.copy(who).unwrap().toy;
                    assert_eq!(toy.step, step, "a shard of the state's own step");
                    let sums = toy.gradient(shard);
                    *self.ordered.entry((step, shard)).or_default() += 1;
                    let time = 1 + self.rng.below(5);
                    self.at(time, Event::Computed(who, step, sums));
                }
                Action::Contribute { to, contribution } => {
                    let made = Made::Contribute(contribution.content());
                    let event = Event::Contribute(to, contribution);
                    self.call(who, to, made, event);
                }
                Action::Ask { to, ask } => {
                    let made = Made::Ask(ask.step, ask.bucket);
                    self.call(who, to, made, Event::Ask(to, ask));
                }
                Action::Answer { token, answer } => {
                    let copy = self.copy(who).unwrap();
                    let Some(ask) = copy.tokens.remove(&token) else {
                        continue;
                    };
                    let answer = Reply::Asked(answer.map(|sum| Partial::clone(&sum)));
                    let made = Made::Ask(ask.step, ask.bucket);
                    self.reply(ask.from, who, made, Some(answer));
                }
                Action::Apply { root } => {
                    let time = 1 + self.rng.below(3);
                    self.at(time, Event::Applied(who, root));
                }
                Action::Report(report) => self.report(who, report),
            }
        }
    }

    pub(super) fn call(&mut self, from: MemberId, to: MemberId, made: Made, event: Event) {
        if self.rng.percent(self.loss_percent) {
            self.at(60, Event::Returned(from, to, made, None));
            return;
        }
        if self.rng.percent(self.loss_percent) {
            self.send(event.clone());
        }
        self.send(event);
    }

    pub(super) fn report(&mut self, who: MemberId, report: Report) {
        let Some(driver) = &self.driver else {
            return;
        };
        let incarnation = driver.incarnation;
        match report {
            // The driver hears of a loss from the process's end.
            Report::Unreachable { .. } | Report::Reached { .. } | Report::Slow { .. } => {}
            Report::Dissent { step, .. } => self.at(3, Event::Judge(incarnation, step)),
            Report::Behind { .. } if who.slot == DRIVER => {
                self.count("driver behind");
                self.driver = None;
                self.at(0, Event::StartDriver);
            }
            Report::Behind { .. } => {
                self.count("behind");
                self.drop_member(who);
                self.trainers[who.slot as usize].copy = None;
                self.at(5, Event::Greet(incarnation, who.slot));
            }
        }
    }
}
