//! What the agent says about itself and its hosts to whoever looks: metrics, and spans.

use std::collections::BTreeMap;

use mobula_core::codec;
use mobula_core::id::HostId;
use mobula_core::span::Span;
use mobula_wire::host::{AgentMessage, HostAnswer, HostMetrics, HostQuestion};
use mobula_wire::session::{ANSWER_BYTES_MAX, HostSpans, Question};

use crate::agent::{Agent, Input};
use crate::gather::Gather;
use crate::metrics::{HostNow, Now};

/// How long hosts may take to answer: they do so between two messages, so a busy one is quick too.
const HOSTS_WAIT: std::time::Duration = std::time::Duration::from_secs(1);

/// Logs of one job in one answer: all that a worker keeps.
const LOG_FILES_MAX: usize = 2_000;

impl Agent {
    /// The leader wants to know something.
    pub(crate) fn handle_question(&mut self, session: u64, request: u64, question: Question) {
        let (for_hosts, job) = match &question {
            Question::Metrics => (HostQuestion::Metrics, None),
            Question::Spans { job } => (HostQuestion::Spans, Some(*job)),
            Question::Logs { job } => {
                let mut files = self.logs.of_job(*job);
                // At some 40 bytes each more are not kept.
                files.truncate(LOG_FILES_MAX);
                let answer = Ok(codec::encode_plain(&files));
                return self.session.send_answer(session, request, answer);
            }
            Question::LogPiece {
                job,
                name,
                offset,
                limit_bytes,
            } => {
                let bytes = self.logs.read_named(*job, name, *offset, *limit_bytes);
                self.metrics.read_log(bytes.len());
                return self.session.send_answer(session, request, Ok(bytes));
            }
        };
        let hosts: Vec<HostId> = self
            .streams
            .keys()
            .copied()
            .filter(|host| job.is_none() || self.pool.job_of(*host) == job)
            .collect();
        let (number, complete) =
            self.gathers
                .open((session, request), question, hosts.iter().copied());
        if let Some(gather) = complete {
            return self.finish(gather);
        }
        let mut lost = Vec::new();
        for host in hosts {
            let ask = AgentMessage::Ask {
                request: number,
                question: for_hosts,
            };
            let is_told = self
                .streams
                .get(&host)
                .is_some_and(|stream| stream.try_send(ask).is_ok());
            if !is_told {
                lost.extend(self.gathers.lost(host));
            }
        }
        for gather in lost {
            self.finish(gather);
        }
        let to_self = self.to_self.clone();
        self.tasks.spawn(async move {
            tokio::time::sleep(HOSTS_WAIT).await;
            // Nobody waits when the agent has ended.
            let _ = to_self.send(Input::GatherDue(number)).await;
        });
    }

    /// A host answered.
    pub(crate) fn handle_answer(&mut self, host: HostId, request: u64, answer: HostAnswer) {
        if let Some(gather) = self.gathers.answer(request, host, answer) {
            self.finish(gather);
        }
    }

    /// A host will not answer any more.
    pub(crate) fn handle_silence(&mut self, host: HostId) {
        for gather in self.gathers.lost(host) {
            self.finish(gather);
        }
    }

    pub(crate) fn handle_gather_due(&mut self, number: u64) {
        if let Some(gather) = self.gathers.expire(number) {
            self.finish(gather);
        }
    }

    fn finish(&mut self, gather: Gather) {
        let (session, request) = gather.asked;
        let result = match gather.question {
            Question::Metrics => self.metrics_text(gather.answers),
            Question::Spans { job } => {
                let own = HostSpans {
                    host: None,
                    spans: self.spans.of_job(job),
                };
                Ok(encode_spans(own, gather.answers))
            }
            Question::Logs { .. } | Question::LogPiece { .. } => {
                unreachable!("logs are read without the hosts")
            }
        };
        self.session.send_answer(session, request, result);
    }

    fn metrics_text(&self, mut answers: BTreeMap<HostId, HostAnswer>) -> Result<Vec<u8>, String> {
        let hosts = self.processes.iter().filter_map(|(host, process)| {
            let counted = match answers.remove(host) {
                Some(HostAnswer::Metrics(counted)) => Some(counted),
                _ => None,
            };
            let now = HostNow {
                job: self.pool.job_of(*host)?,
                usage: usage(process.pid()),
                counted: counted.filter(HostMetrics::is_well_formed),
            };
            Some((*host, now))
        });
        let hosts = hosts.collect();
        let status = self.status.borrow().clone();
        let now = Now {
            connected: status.connected,
            stale_messages: status.stale_messages,
            actors: self.pool.actor_count(),
            waiting_actors: self.pool.waiting_count(),
            outbox: self.session.outbox.read(crate::outbox::Outbox::len),
            hosts,
            gpus: self.gpus.latest(),
        };
        let text = self.metrics.text(now).map_err(|error| error.to_string())?;
        if text.len() > ANSWER_BYTES_MAX {
            return Err(format!(
                "the metrics of this worker have {} bytes, the limit is {ANSWER_BYTES_MAX}: too \
                 many hosts",
                text.len()
            ));
        }
        Ok(text.into_bytes())
    }
}

/// All that fits into an answer: where it is too much, each process's oldest spans are left out.
fn encode_spans(own: HostSpans, answers: BTreeMap<HostId, HostAnswer>) -> Vec<u8> {
    let of_hosts = answers
        .into_iter()
        .filter_map(|(host, answer)| match answer {
            HostAnswer::Spans(spans) => Some(HostSpans {
                host: Some(host),
                spans,
            }),
            HostAnswer::Metrics(_) => None,
        });
    let mut all: Vec<HostSpans> = std::iter::once(own).chain(of_hosts).collect();
    loop {
        let bytes = codec::encode_plain(&all);
        if bytes.len() <= ANSWER_BYTES_MAX {
            return bytes;
        }
        for process in &mut all {
            let half: Vec<Span> = process.spans.split_off(process.spans.len().div_ceil(2));
            process.spans = half;
        }
    }
}

/// Resident bytes and milliseconds of CPU time of a process, as the kernel counts them.
fn usage(pid: u32) -> Option<(u64, u64)> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows it is numbers.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let page_bytes = system_constant(libc::_SC_PAGESIZE)?;
    let ticks_per_second = system_constant(libc::_SC_CLK_TCK)?;
    Some((pages * page_bytes, ticks * 1000 / ticks_per_second))
}

/// A number of the system that is larger than 0.
fn system_constant(name: libc::c_int) -> Option<u64> {
    // SAFETY: sysconf takes a number and gives one; it touches no memory of ours.
    let value = unsafe { libc::sysconf(name) };
    u64::try_from(value).ok().filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::id::JobId;

    #[test]
    fn the_kernel_says_what_a_process_uses() {
        let (bytes, _) = usage(std::process::id()).unwrap();
        assert!(bytes > 100_000, "{bytes}");
        assert_eq!(usage(u32::MAX), None);
    }

    #[test]
    fn an_answer_fits_into_its_frame_whatever_was_recorded() {
        let span = Span::new(&"x".repeat(100), "user", JobId(1), 1, 2).with("k", "v".repeat(400));
        let many = HostAnswer::Spans(vec![span; 4000]);
        let own = HostSpans {
            host: None,
            spans: Vec::new(),
        };
        let bytes = encode_spans(own, BTreeMap::from([(HostId(1), many)]));
        assert!(bytes.len() <= ANSWER_BYTES_MAX);
        let read: Vec<HostSpans> = codec::decode(&bytes, ANSWER_BYTES_MAX).unwrap();
        assert!(read[1].spans.len() >= 500, "{}", read[1].spans.len());
    }
}
