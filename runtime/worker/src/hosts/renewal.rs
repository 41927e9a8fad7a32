//! When the certificates of hosts are renewed.
//!
//! Invariants:
//! 1. A certificate is asked for again at about half of its life, and again and again after that
//!    until there is one or the host is gone: an outage of all heads of half its life costs nothing.
//! 2. A host is asked for once at a time, and at most once in [`PAUSE_MIN`].

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use mobula_core::id::{HostId, JobId};
use mobula_net::identity::Credentials;
use rand::Rng;
use tokio::time::Instant;

/// Between two attempts for one host: certificates of seconds are for tests.
const PAUSE_MIN: Duration = Duration::from_millis(200);

/// The longest pause after a refusal: heads may come back at any time.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A host's certificate, and whose it is.
#[derive(Debug, Clone)]
pub(crate) struct HostCertificate {
    pub(crate) job: JobId,
    pub(crate) credentials: Credentials,
}

/// The certificates of the hosts that run.
#[derive(Debug, Default)]
pub(crate) struct Renewals {
    certificates: BTreeMap<HostId, HostCertificate>,
    /// Hosts that are not being asked for.
    due: BTreeMap<(Instant, HostId), ()>,
}

impl Renewals {
    /// A host has this certificate now.
    pub(crate) fn hold(&mut self, host: HostId, certificate: HostCertificate) {
        let left = left_of(&certificate.credentials);
        // Half of what is left, more or less: hosts that started together do not come together.
        let wait = left.mul_f64(rand::rng().random_range(0.4..0.6));
        self.schedule(host, wait);
        self.certificates.insert(host, certificate);
    }

    /// There is no next certificate yet.
    pub(crate) fn failed(&mut self, host: HostId) {
        if let Some(certificate) = self.certificates.get(&host) {
            let wait = (left_of(&certificate.credentials) / 8).min(RETRY_MAX);
            self.schedule(host, wait);
        }
    }

    /// A host is gone; the last certificate that it had.
    pub(crate) fn forget(&mut self, host: HostId) -> Option<HostCertificate> {
        self.due.retain(|(_, due), ()| *due != host);
        self.certificates.remove(&host)
    }

    /// When the next is due.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.due.first_key_value().map(|((at, _), ())| *at)
    }

    /// One that is due. It is not given again before [`Renewals::hold`] or [`Renewals::failed`].
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<(HostId, HostCertificate)> {
        let entry = self.due.first_entry()?;
        if entry.key().0 > now {
            return None;
        }
        let ((_, host), ()) = entry.remove_entry();
        Some((host, self.certificates.get(&host)?.clone()))
    }

    fn schedule(&mut self, host: HostId, wait: Duration) {
        self.due.retain(|(_, due), ()| *due != host);
        self.due
            .insert((Instant::now() + wait.max(PAUSE_MIN), host), ());
    }
}

fn left_of(credentials: &Credentials) -> Duration {
    credentials
        .not_after()
        .duration_since(SystemTime::now())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_net::identity::{ClusterCa, Identity, Role, Validity};

    fn certificate(ca: &ClusterCa, ttl: Duration) -> HostCertificate {
        let identity = Identity::new("test", Role::Host, "node-1.host-1", 1).with_job(3);
        HostCertificate {
            job: JobId(3),
            credentials: ca
                .issue_with_new_key(&identity, Validity::for_ttl(ttl))
                .unwrap(),
        }
    }

    #[test]
    fn a_certificate_is_due_at_half_life_and_until_there_is_another() {
        let ca = ClusterCa::create("test").unwrap();
        let hour = Duration::from_secs(3600);
        let mut renewals = Renewals::default();
        let begin = Instant::now();
        renewals.hold(HostId(1), certificate(&ca, hour));
        let first = renewals.next_at().unwrap();
        let range = begin + hour.mul_f64(0.39)..begin + hour.mul_f64(0.61);
        assert!(range.contains(&first));
        assert!(renewals.take_due(begin).is_none());
        let (host, _) = renewals.take_due(first).unwrap();
        assert_eq!(host, HostId(1));
        // While it is being asked for, it is not due.
        assert_eq!(renewals.next_at(), None);
        renewals.failed(host);
        let second = renewals.next_at().unwrap();
        assert!(second <= Instant::now() + RETRY_MAX);
        renewals.take_due(second).unwrap();
        renewals.hold(host, certificate(&ca, hour));
        assert!(renewals.next_at().is_some());
        renewals.forget(host);
        assert_eq!(renewals.next_at(), None);
        // An answer that comes too late is for nobody.
        renewals.failed(host);
        assert_eq!(renewals.next_at(), None);
    }

    #[test]
    fn one_that_has_ended_is_not_asked_for_without_a_pause() {
        let ca = ClusterCa::create("test").unwrap();
        let mut renewals = Renewals::default();
        let begin = Instant::now();
        renewals.hold(HostId(1), certificate(&ca, Duration::ZERO));
        assert!(renewals.next_at().unwrap() >= begin + PAUSE_MIN);
    }
}
