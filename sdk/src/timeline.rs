//! The timeline of a job: what took how long, and where.
//!
//! [`Timeline::to_chrome_trace`] writes it in the Trace Event Format, which Perfetto
//! (<https://ui.perfetto.dev>) and `chrome://tracing` show: one process for each of ours, one track for
//! each actor.
//!
//! Invariant: on the track of an actor or a host every span lies wholly inside the one that encloses
//! it. Clocks of machines differ by a little, and so a span that reaches out of its place is shortened
//! to it. Waits and transfers go on beside each other, and are drawn so.

use std::collections::BTreeMap;

use mobula_core::id::{ActorId, HostId, JobId};
use mobula_wire::control as api;
use serde_json::{Value, json};

/// What took how long in a job, as far as anyone remembers: a head knows what it saw since it began
/// to lead, a process what it recorded since its start.
#[derive(Debug, Clone)]
pub struct Timeline {
    reply: api::TimelineReply,
}

/// Where a span is drawn: a process, and a track in it.
type Place = (String, String);

impl Timeline {
    pub(crate) fn new(reply: api::TimelineReply) -> Self {
        Timeline { reply }
    }

    /// Its spans, in order of their beginnings; times are microseconds since the Unix epoch.
    #[must_use]
    pub fn spans(&self) -> &[api::Span] {
        &self.reply.spans
    }

    /// The timeline in the Trace Event Format, as JSON: complete events (`"ph": "X"`), pairs of
    /// asynchronous ones (`"b"` and `"e"`) for what may overlap, with times in microseconds, and names
    /// for processes and tracks.
    #[must_use]
    pub fn to_chrome_trace(&self) -> Value {
        let mut numbers = Numbers::default();
        let mut events = Vec::new();
        let mut open: BTreeMap<Place, Vec<u64>> = BTreeMap::new();
        for (number, span) in self.reply.spans.iter().enumerate() {
            let place = place(JobId(self.reply.job), span);
            let now_us = self.reply.now_us.max(span.start_us);
            let end_us = span.end_us.unwrap_or(now_us).max(span.start_us);
            if OVERLAPPING.contains(&span.category.as_str()) {
                let (process, track) = numbers.of(&place);
                let event = |phase: &str, at_us: u64| {
                    json!({
                        "name": span.name, "cat": span.category, "ph": phase, "id": number,
                        "ts": at_us, "pid": process, "tid": track,
                    })
                };
                let mut begin = event("b", span.start_us);
                begin["args"] = arguments(span);
                events.extend([begin, event("e", end_us)]);
                continue;
            }
            let enclosing = open.entry(place.clone()).or_default();
            // Those that were over before this one began enclose it no more.
            while enclosing.last().is_some_and(|end| *end <= span.start_us) {
                enclosing.pop();
            }
            let end_us = enclosing.last().map_or(end_us, |outer| end_us.min(*outer));
            enclosing.push(end_us);
            let (process, track) = numbers.of(&place);
            events.push(json!({
                "name": span.name,
                "cat": span.category,
                "ph": "X",
                "ts": span.start_us,
                "dur": end_us - span.start_us,
                "pid": process,
                "tid": track,
                "args": arguments(span),
            }));
        }
        let mut all = numbers.names();
        all.append(&mut events);
        json!({ "displayTimeUnit": "ms", "traceEvents": all })
    }
}

/// Kinds of spans that go on beside others of their kind: tasks that wait, slots that were asked for,
/// objects on their way.
const OVERLAPPING: [&str; 3] = ["queue", "lease", "transfer"];

fn place(job: JobId, span: &api::Span) -> Place {
    let process = match (span.node.as_str(), span.host) {
        ("", _) => job.to_string(),
        (node, Some(host)) => format!("{node} {}", HostId(host)),
        (node, None) => format!("{node} agent"),
    };
    let track = match span.actor {
        Some(actor) => ActorId(actor).to_string(),
        // Tracks of their own, because what an agent does may overlap.
        None => match span.detail.get("host") {
            Some(host) => host.clone(),
            None => span.category.clone(),
        },
    };
    (process, track)
}

fn arguments(span: &api::Span) -> Value {
    let mut arguments: BTreeMap<&str, Value> = span
        .detail
        .iter()
        .map(|(key, value)| (key.as_str(), json!(value)))
        .collect();
    if let Some(incarnation) = span.incarnation {
        arguments.insert("incarnation", json!(incarnation));
    }
    if span.end_us.is_none() {
        arguments.insert("unfinished", json!(true));
    }
    json!(arguments)
}

/// Numbers for processes and tracks, in the order in which they first appear.
#[derive(Default)]
struct Numbers {
    processes: BTreeMap<String, usize>,
    tracks: BTreeMap<Place, usize>,
}

impl Numbers {
    fn of(&mut self, place: &Place) -> (usize, usize) {
        let next = self.processes.len() + 1;
        let process = *self.processes.entry(place.0.clone()).or_insert(next);
        let next = self.tracks.len() + 1;
        let track = *self.tracks.entry(place.clone()).or_insert(next);
        (process, track)
    }

    fn names(&self) -> Vec<Value> {
        let named = |what: &str, process: usize, track: usize, name: &str| {
            json!({
                "name": what,
                "ph": "M",
                "pid": process,
                "tid": track,
                "args": { "name": name },
            })
        };
        let processes = self
            .processes
            .iter()
            .map(|(name, number)| named("process_name", *number, 0, name));
        let tracks = self.tracks.iter().map(|((process, name), number)| {
            named("thread_name", self.processes[process], *number, name)
        });
        processes.chain(tracks).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(name: &str, start_us: u64, end_us: Option<u64>, actor: Option<u64>) -> api::Span {
        api::Span {
            name: name.into(),
            category: "actor".into(),
            start_us,
            end_us,
            actor,
            ..Default::default()
        }
    }

    #[test]
    fn what_goes_on_side_by_side_is_not_cut() {
        let wait = |name: &str, start_us, end_us| api::Span {
            category: "queue".into(),
            node: "worker-1".into(),
            host: Some(2),
            ..span(name, start_us, Some(end_us), None)
        };
        let reply = api::TimelineReply {
            job: 3,
            now_us: 1_000,
            spans: vec![wait("first", 0, 100), wait("second", 50, 400)],
        };
        let trace = Timeline::new(reply).to_chrome_trace();
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |phase: &str, number: u64| {
            let found = |e: &&Value| e["ph"] == phase && e["id"] == number;
            events.iter().find(found).unwrap()["ts"].clone()
        };
        assert_eq!((of("b", 0), of("e", 0)), (json!(0), json!(100)));
        assert_eq!((of("b", 1), of("e", 1)), (json!(50), json!(400)));
    }

    #[test]
    fn spans_nest_on_their_tracks_and_what_goes_on_ends_now() {
        let reply = api::TimelineReply {
            job: 3,
            now_us: 1_000,
            spans: vec![
                span("count", 0, Some(900), None),
                span("counter", 10, None, Some(7)),
                span("start", 10, Some(60), Some(7)),
                // Another machine's clock: it would reach beyond what encloses it.
                span("run", 60, Some(1_200), Some(7)),
                span("task", 70, Some(80), Some(7)),
            ],
        };
        let trace = Timeline::new(reply).to_chrome_trace();
        let events = trace["traceEvents"].as_array().unwrap();
        let complete: Vec<&Value> = events.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(complete.len(), 5);
        assert_eq!(complete[1]["dur"], 990);
        assert_eq!(complete[1]["args"]["unfinished"], true);
        assert_eq!(complete[3]["dur"], 940, "shortened to its place");
        let names: Vec<&str> = events
            .iter()
            .filter(|e| e["ph"] == "M")
            .map(|e| e["args"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["job-3", "actor", "actor-7"]);
    }
}
