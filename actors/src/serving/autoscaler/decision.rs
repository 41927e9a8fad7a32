//! From an endpoint's load to its number of replicas. Pure: time and load come in.
//!
//! Invariants:
//! 1. A decision is within the policy's bounds at its time. Where these leave room, the replicas at most
//!    double within the policy's window of scaling up, and at most half of them end within that of
//!    scaling down.
//! 2. A burst (twice the target over a tenth of the window) only adds, and nothing is taken away until
//!    a whole window has passed without one.
//! 3. Replicas are taken away when nine tenths of the targets are enough for fewer, and never so that a
//!    number remains that was too few for the same rate of requests before: a constant load does not flap.
//! 4. While a rollout or an experiment is under way, nothing is taken away.

use serde::{Deserialize, Serialize};

use super::load::Load;
use super::policy::Policy;
use super::windows::{Average, Windows};

/// A burst: so much of the target, in percent, over the short window.
const PANIC_PERCENT: u64 = 200;

/// What fewer replicas would have must be below so much of the targets, in percent.
const FEWER_PERCENT: u64 = 90;

/// Answers must be faster than so much of the objective, in percent, before replicas are taken away.
const CALM_PERCENT: u64 = 80;

/// Requests for which there is no room, in percent of those that come, from which on there are too few replicas.
const REFUSED_PERCENT: u64 = 1;

/// What a rate of requests counts as the same that it was, down to so many percent of it.
const SAME_RATE_PERCENT: u64 = 80;

/// Why the number of replicas was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A request came and there was no replica.
    Wake,
    /// More were in flight than the target.
    InFlight,
    /// More came in a second than the target.
    Rate,
    /// Answers took longer than the objective.
    Latency,
    /// Far more were in flight than the target, for a short time.
    Burst,
    /// Fewer are enough.
    Fewer,
    /// Nothing was asked for a long time.
    Idle,
    /// There were fewer than the policy allows now.
    Floor,
    /// There were more than the policy allows now.
    Ceiling,
    /// Models computed for more of the time than the target.
    Busy,
    /// Processes used more of their memory than the target.
    Memory,
    /// Requests were refused that the replicas would not have answered in time.
    Refused,
}

/// The numbers that a decision rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Replicas that answered.
    pub ready: u32,
    /// Requests in flight at that moment.
    pub in_flight: u64,
    /// Their average over the window, in thousandths.
    pub stable_in_flight_milli: u64,
    /// Their average over a tenth of the window, in thousandths.
    pub burst_in_flight_milli: u64,
    /// Requests that came, in thousandths a second: over the window, or a tenth of it if that is more.
    pub rate_milli: u64,
    /// The 99th percentile of answers over the window, in microseconds; absent without answers.
    pub p99_us: Option<u64>,
    /// The target of requests in flight that held.
    pub target_in_flight: u32,
    /// The replicas that the load asked for, before any limit.
    pub wanted: u32,
    /// The fewest that the policy asked for at that time.
    pub floor: u32,
    /// The most that it had room for.
    pub ceiling: u32,
    /// The fewest that were allowed: by the policy's bounds and by how fast replicas may end.
    pub allowed_min: u32,
    /// The most that were allowed: by the policy's bounds and by how fast replicas may be added.
    pub allowed_max: u32,
    /// Replicas whose model computed, on average over the window, in thousandths.
    pub busy_milli: u64,
    /// The memory in use where it is scarcest, in percent; 0 if no replica said.
    pub memory_percent: u8,
    /// Requests that were refused for want of room over a tenth of the window, in thousandths a second.
    pub refused_milli: u64,
}

/// A change of the number of replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The version of the model that was active.
    pub version: u64,
    /// How many there were.
    pub from: u32,
    /// How many there are since.
    pub to: u32,
    /// Why.
    pub cause: Cause,
    /// In numbers.
    pub figures: Figures,
}

/// What an endpoint has, and has had.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// The replicas that it shall have now.
    pub replicas: u32,
    /// The version of its model.
    pub version: u64,
    /// The latest changes, oldest first.
    pub changes: &'a [Change],
    /// Whether a rollout or an experiment is under way or being cleaned up.
    pub is_rolling_out: bool,
}

impl Standing<'_> {
    /// The fewest and the most replicas that it may have next.
    #[must_use]
    pub fn allowed(&self, policy: &Policy, now_ms: u64) -> (u32, u32) {
        let within = |window_ms: u64| {
            self.changes
                .iter()
                .filter(move |change| change.at_ms + window_ms > now_ms)
                .map(|change| change.from)
                .chain([self.replicas])
        };
        let most = within(policy.down_window_ms).max().unwrap_or(self.replicas);
        let fewest = within(policy.up_window_ms).min().unwrap_or(self.replicas);
        let (floor, ceiling) = policy.bounds(now_ms);
        let low = (most / 2).clamp(floor, ceiling);
        let high = (fewest.max(1) * 2).clamp(floor, ceiling);
        // What is there may stay as long as the bounds have room for it.
        let stay = self.replicas.clamp(floor, ceiling);
        let (low, high) = (low.min(stay), high.max(stay));
        if self.is_rolling_out {
            let low = low.max(self.replicas).max(1);
            return (low, high.max(low));
        }
        (low, high)
    }

    /// The fewest replicas that were not too few for this rate of requests, as far as is known.
    fn proven(&self, rate_milli: u64) -> u32 {
        let was_too_few = |change: &&Change| {
            let by_load = matches!(
                change.cause,
                Cause::InFlight
                    | Cause::Rate
                    | Cause::Latency
                    | Cause::Burst
                    | Cause::Busy
                    | Cause::Memory
                    | Cause::Refused
            );
            by_load
                && change.version == self.version
                && change.figures.rate_milli > 0
                && rate_milli * 100 >= change.figures.rate_milli * SAME_RATE_PERCENT
        };
        let too_few = self.changes.iter().filter(was_too_few);
        too_few.map(|change| change.from + 1).max().unwrap_or(0)
    }
}

/// The replicas that answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Answering {
    /// How many.
    pub ready: u32,
    /// The memory in use where it is scarcest, in percent; 0 if none of them said.
    pub memory_percent: u8,
}

/// A number of replicas to go over to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// How many replicas.
    pub to: u32,
    /// Why.
    pub cause: Cause,
    /// In numbers.
    pub figures: Figures,
}

/// Decides for one endpoint.
#[derive(Debug, Default)]
pub struct Autoscaler {
    windows: Windows,
    /// When a burst was last seen.
    burst_ms: Option<u64>,
    /// What was seen at the last look.
    seen: Figures,
}

impl Autoscaler {
    /// What to do after this reading of the load, if anything.
    pub fn decide(
        &mut self,
        policy: &Policy,
        standing: Standing<'_>,
        Answering {
            ready,
            memory_percent,
        }: Answering,
        load: Load,
        now_ms: u64,
    ) -> Option<Choice> {
        self.windows.observe(now_ms, load, policy.stable_window_ms);
        let stable = self.windows.average(policy.stable_window_ms);
        let burst = self.windows.average(policy.panic_window_ms());
        let (allowed_min, allowed_max) = standing.allowed(policy, now_ms);
        let (floor, ceiling) = policy.bounds(now_ms);
        let rate_of = |average: Option<Average>| average.map_or(0, |average| average.rate_milli);
        let mut figures = Figures {
            ready,
            in_flight: load.in_flight,
            stable_in_flight_milli: stable.map_or(0, |average| average.in_flight_milli),
            burst_in_flight_milli: burst.map_or(0, |average| average.in_flight_milli),
            rate_milli: rate_of(stable).max(rate_of(burst)),
            p99_us: stable.and_then(|average| average.p99_us),
            target_in_flight: policy.target_in_flight,
            wanted: standing.replicas,
            floor,
            ceiling,
            allowed_min,
            allowed_max,
            busy_milli: stable.map_or(0, |average| average.busy_milli),
            memory_percent,
            refused_milli: burst.map_or(0, |average| average.refused_milli),
        };
        let is_bursting = self.sees_burst(policy, standing.replicas, &figures, burst, now_ms);
        let is_calm = stable.is_some_and(|average| average.is_whole) && !is_bursting;
        // Who has just begun to look has seen nothing that could be called an average.
        let sees_enough = burst.is_some_and(|average| average.is_whole);
        let (wanted, cause) = wakes(standing.replicas, &figures)
            // Before anything that may ask for more: what is known of memory and times is old then.
            .or_else(|| is_calm.then(|| self.idle(policy, &standing, &figures))?)
            .or_else(|| {
                let refused = by_refused(ready, burst);
                let more = || more(policy, standing.replicas, &figures, is_bursting, refused);
                sees_enough.then(more)?
            })
            .or_else(|| {
                let rate_milli = rate_of(stable);
                is_calm.then(|| self.fewer(policy, &standing, &figures, rate_milli))?
            })
            .unwrap_or((standing.replicas, Cause::Fewer));
        figures.wanted = wanted;
        self.seen = figures;
        let to = wanted.clamp(allowed_min, allowed_max);
        let cause = match standing.replicas {
            replicas if replicas < floor => Cause::Floor,
            replicas if replicas > ceiling => Cause::Ceiling,
            // Under way a rollout needs a replica.
            0 if load.in_flight == 0 && wanted == 0 => Cause::Floor,
            _ => cause,
        };
        (to != standing.replicas).then_some(Choice { to, cause, figures })
    }

    /// What was seen at the last look.
    #[must_use]
    pub fn seen(&self) -> &Figures {
        &self.seen
    }

    fn sees_burst(
        &mut self,
        policy: &Policy,
        replicas: u32,
        figures: &Figures,
        burst: Option<Average>,
        now_ms: u64,
    ) -> bool {
        let capacity_milli =
            u64::from(replicas.max(1)) * u64::from(policy.target_in_flight) * 1_000;
        let is_burst = burst.is_some_and(|average| average.is_whole)
            && figures.burst_in_flight_milli * 100 >= capacity_milli * PANIC_PERCENT;
        if is_burst {
            self.burst_ms = Some(now_ms);
        }
        let lasts = |since: &u64| now_ms.saturating_sub(*since) < policy.stable_window_ms;
        self.burst_ms = self.burst_ms.filter(lasts);
        self.burst_ms.is_some()
    }

    /// No replica, if nothing was asked for long.
    fn idle(
        &self,
        policy: &Policy,
        standing: &Standing<'_>,
        figures: &Figures,
    ) -> Option<(u32, Cause)> {
        let is_idle = figures.in_flight == 0
            && standing.replicas > 0
            && self.windows.idle_ms() >= policy.idle_ms;
        is_idle.then_some((0, Cause::Idle))
    }

    /// Fewer replicas than there are, if they are enough.
    fn fewer(
        &self,
        policy: &Policy,
        standing: &Standing<'_>,
        figures: &Figures,
        rate_milli: u64,
    ) -> Option<(u32, Cause)> {
        let slo_us = policy.slo_p99_ms.map(|slo_ms| u64::from(slo_ms) * 1_000);
        let is_slow = slo_us
            .zip(figures.p99_us)
            .is_some_and(|(slo_us, p99_us)| p99_us * 100 >= slo_us * CALM_PERCENT);
        let memory = policy.target_memory_percent;
        let is_tight =
            memory.is_some_and(|target| memory_above(figures.memory_percent, target, CALM_PERCENT));
        if is_slow || is_tight {
            return None;
        }
        let wanted = enough(
            figures.stable_in_flight_milli,
            policy.target_in_flight,
            FEWER_PERCENT,
        )
        .max(by_rate(policy, rate_milli, FEWER_PERCENT))
        .max(by_busy(policy, figures.busy_milli, FEWER_PERCENT))
        .max(standing.proven(rate_milli))
        // The last one stays until the endpoint is idle.
        .max(1);
        (wanted < standing.replicas).then_some((wanted, Cause::Fewer))
    }
}

fn wakes(replicas: u32, figures: &Figures) -> Option<(u32, Cause)> {
    (replicas == 0 && figures.in_flight > 0).then_some((1, Cause::Wake))
}

/// More replicas than there are, if the load asks for more.
fn more(
    policy: &Policy,
    replicas: u32,
    figures: &Figures,
    is_bursting: bool,
    refused: u32,
) -> Option<(u32, Cause)> {
    let burst_milli = if is_bursting {
        figures.burst_in_flight_milli
    } else {
        0
    };
    let target = policy.target_in_flight;
    let slo = policy.slo_p99_ms.zip(figures.p99_us);
    let too_slow = slo.map_or(0, |(slo_ms, p99_us)| {
        by_latency(replicas, p99_us, u64::from(slo_ms) * 1_000)
    });
    let candidates = [
        (
            enough(figures.stable_in_flight_milli, target, 100),
            Cause::InFlight,
        ),
        (by_rate(policy, figures.rate_milli, 100), Cause::Rate),
        (too_slow, Cause::Latency),
        (by_busy(policy, figures.busy_milli, 100), Cause::Busy),
        (by_memory(policy, replicas, figures), Cause::Memory),
        (enough(burst_milli, target, 100), Cause::Burst),
        (refused, Cause::Refused),
    ];
    // Of equals the first, which is the plainest.
    let most = candidates
        .into_iter()
        .rev()
        .max_by_key(|(count, _)| *count)?;
    (most.0 > replicas).then_some(most)
}

/// How many replicas are enough for so much, at so many percent of the target.
fn enough(milli: u64, target: u32, percent: u64) -> u32 {
    let count = (milli * 100).div_ceil(u64::from(target) * 1_000 * percent);
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn by_rate(policy: &Policy, rate_milli: u64, percent: u64) -> u32 {
    policy
        .target_rate
        .map_or(0, |target| enough(rate_milli, target, percent))
}

fn by_busy(policy: &Policy, busy_milli: u64, percent: u64) -> u32 {
    policy
        .target_busy_percent
        .map_or(0, |target| enough(busy_milli * 100, target, percent))
}

/// One more, where memory is scarcer than the target: how much of it requests take, and how much each replica takes
/// without them, nobody knows.
fn by_memory(policy: &Policy, replicas: u32, figures: &Figures) -> u32 {
    let is_scarce = policy
        .target_memory_percent
        .is_some_and(|target| memory_above(figures.memory_percent, target, 100));
    if is_scarce { replicas + 1 } else { 0 }
}

/// Whether memory in use is above so many percent of the target.
fn memory_above(used_percent: u8, target_percent: u32, percent: u64) -> bool {
    u64::from(used_percent) * 100 > u64::from(target_percent) * percent
}

/// One more at least, and in proportion to how much too slow answers are, where they are too slow.
fn by_latency(replicas: u32, p99_us: u64, slo_us: u64) -> u32 {
    if p99_us <= slo_us {
        return 0;
    }
    let proportional = (u64::from(replicas) * p99_us).div_ceil(slo_us.max(1));
    let doubled = replicas.max(1) * 2;
    u32::try_from(proportional).unwrap_or(u32::MAX).min(doubled)
}

/// One more than answer now at least, and in proportion to what they have no room for: of a model that takes long, so few requests
/// are let in that they never look like many in flight.
fn by_refused(ready: u32, lately: Option<Average>) -> u32 {
    let Some(lately) = lately else {
        return 0;
    };
    let (came, refused) = (lately.rate_milli, lately.refused_milli);
    if ready == 0 || refused == 0 || refused * 100 < came * REFUSED_PERCENT {
        return 0;
    }
    let answered = came.saturating_sub(refused).max(1);
    let proportional = (u64::from(ready) * came).div_ceil(answered);
    let proportional = u32::try_from(proportional).unwrap_or(u32::MAX);
    proportional.clamp(ready + 1, ready * 2)
}

impl Cause {
    /// In words.
    #[must_use]
    pub fn said(self) -> &'static str {
        match self {
            Cause::Wake => "a request came and there was no replica",
            Cause::InFlight => "more requests in flight than the target",
            Cause::Rate => "more requests a second than the target",
            Cause::Latency => "answers slower than the objective",
            Cause::Burst => "a burst of requests",
            Cause::Fewer => "fewer replicas are enough",
            Cause::Idle => "nothing was asked",
            Cause::Floor => "fewer replicas than the policy allows now",
            Cause::Ceiling => "more replicas than the policy allows now",
            Cause::Busy => "models computed for more of the time than the target",
            Cause::Memory => "more memory in use than the target",
            Cause::Refused => "requests for which there was no room",
        }
    }
}

impl Figures {
    /// The numbers in words.
    #[must_use]
    pub fn said(&self) -> String {
        let milli = |number: u64| number as f64 / 1e3;
        let p99 = self.p99_us.map_or_else(
            || "no answer".to_owned(),
            |p99_us| format!("p99 {:.1} ms", milli(p99_us)),
        );
        format!(
            "{} in flight (average {:.1}, lately {:.1}; target {} a replica), {:.1} a second, {p99}, {} \
             answering, {:.2} computing, {} % of the memory in use, {:.1} refused a second: wanted {}, allowed {} to {}",
            self.in_flight,
            milli(self.stable_in_flight_milli),
            milli(self.burst_in_flight_milli),
            self.target_in_flight,
            milli(self.rate_milli),
            self.ready,
            milli(self.busy_milli),
            self.memory_percent,
            milli(self.refused_milli),
            self.wanted,
            self.allowed_min,
            self.allowed_max
        )
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
