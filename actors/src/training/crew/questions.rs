//! What the crew asks its trainers beside their news: which bits they hold, and to keep what a driver leaves.

use std::time::Duration;

use tokio::time::Instant;

use super::{Crew, Event, Happened, NOBODY, Slot, TrainerLink};
use crate::training::messages::{Epoch, Handover};
use crate::training::protocol::leader::StateDigest;
use crate::training::protocol::plan::MemberId;

/// How long is waited for somebody to come to the step that is asked about, and how often it is asked.
const VOTE_MAX: Duration = Duration::from_secs(2);
const VOTE_PAUSE: Duration = Duration::from_millis(20);

/// A trainer that holds the very bits that were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Witness {
    /// Which trainer.
    pub slot: usize,
    /// Where it runs.
    pub node: String,
    /// Whether its node will be taken away too.
    pub is_doomed: bool,
}

impl<L: TrainerLink> Crew<L> {
    /// Asks all who follow in the background what they held before `step`. Who is not there yet is waited
    /// for: the votes of some may not decide against those of the others.
    pub(in crate::training) fn ask_digests(&mut self, step: u64) {
        let following = self.which(Slot::follows).into_iter();
        let asked: Vec<(MemberId, L)> = following
            .filter_map(|index| {
                let slot = &self.slots[index];
                Some((slot.member?, slot.link.clone()))
            })
            .collect();
        self.tasks.spawn(async move {
            let end = Instant::now() + VOTE_MAX;
            let answers = asked.iter().map(|(member, link)| async move {
                loop {
                    match link.digest_before(step).await {
                        Ok(Some(digest)) => return Some((*member, digest)),
                        Ok(None) if Instant::now() < end => tokio::time::sleep(VOTE_PAUSE).await,
                        Ok(None) | Err(_) => return None,
                    }
                }
            });
            let said = futures::future::join_all(answers).await;
            Event {
                slot: NOBODY,
                ticket: 0,
                what: Happened::Judged {
                    step,
                    said: said.into_iter().flatten().collect(),
                },
            }
        });
    }

    /// Who of those who take part holds the state with `digest` before `step`, within `limit`, and of whom the node
    /// was given notice; and why others do not. Those behind are waited for.
    pub(in crate::training) async fn witnesses(
        &self,
        step: u64,
        digest: StateDigest,
        limit: Duration,
    ) -> Vec<Result<Witness, String>> {
        let ready = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.is_ready());
        let asked = ready.map(|(index, slot)| async move {
            let epoch = slot
                .adopted
                .as_ref()
                .map_or(self.first_epoch, |plan| plan.epoch);
            let ask = async {
                // Its own word comes before what its news will say some time.
                let news = slot.link.news(epoch, 0).await;
                let news = news.map_err(|error| format!("its news: {error}"))?;
                if Some(news.member) != slot.member {
                    return Err("it has taken over a state from somebody else".to_owned());
                }
                loop {
                    let found = slot.link.digest_before(step).await;
                    match found.map_err(|error| format!("its state: {error}"))? {
                        Some(found) if found == digest => return Ok(news),
                        Some(found) => return Err(format!("it has {found:?} and not {digest:?}")),
                        None => tokio::time::sleep(VOTE_PAUSE).await,
                    }
                }
            };
            let asked = tokio::time::timeout(limit, ask).await;
            let answer = asked.unwrap_or_else(|_| Err(format!("not known within {limit:?}")));
            let news = answer.map_err(|why| {
                format!(
                    "trainer-{index} on {} does not count: whether it holds the state before step {step}: {why}",
                    slot.node
                )
            })?;
            Ok(Witness {
                slot: index,
                node: slot.node.clone(),
                is_doomed: news.notice_ms.is_some(),
            })
        });
        futures::future::join_all(asked).await
    }

    /// Gives `handover` to the trainers of `slots` within `limit`. Answers how many have it.
    pub(in crate::training) async fn entrust(
        &self,
        slots: &[usize],
        epoch: Epoch,
        handover: &Handover,
        limit: Duration,
    ) -> usize {
        let given = slots.iter().map(|index| async {
            let link = &self.slots[*index].link;
            let given = tokio::time::timeout(limit, link.entrust(epoch, handover.clone())).await;
            matches!(given, Ok(Ok(())))
        });
        let given = futures::future::join_all(given).await;
        given.into_iter().filter(|is_given| *is_given).count()
    }
}
