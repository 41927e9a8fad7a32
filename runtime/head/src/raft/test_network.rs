//! The network between the heads of a test's group: it loses, cuts, delays and damages as it is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mobula_storage::snapshot::SnapshotInstall;
use mobula_wire::raft::StateClaim;
use parking_lot::Mutex;
use raft::prelude::Message;
use rand::Rng;
use rand::rngs::StdRng;
use tokio::sync::oneshot;

use super::GroupView;
use super::inputs::{Input, InputSender};
use super::snapshots::PinnedTables;
use super::transport::Peers;

/// What the network does to those who use it.
#[derive(Default)]
pub(super) struct Weather {
    pub(super) inboxes: BTreeMap<u64, InputSender>,
    /// Heads that nobody hears and that hear nobody.
    pub(super) cut: BTreeSet<u64>,
    /// Messages of a thousand that are lost.
    pub(super) loss: u32,
    /// Snapshots that will still be lost on their way.
    pub(super) lost_snapshots: u32,
    /// Snapshots whose bytes will still be damaged on their way.
    pub(super) damaged_snapshots: u32,
    /// How much later than its receiver's own answer the end of a snapshot is reported.
    pub(super) report_delay: Duration,
    /// Snapshots that arrived.
    pub(super) snapshots: u32,
    pub(super) rng: Option<StdRng>,
}

pub(super) type Network = Arc<Mutex<Weather>>;

/// What one head sends by.
pub(super) struct Wire {
    pub(super) from: u64,
    pub(super) network: Network,
    pub(super) inbox: InputSender,
}

impl Wire {
    fn way_to(&self, to: u64) -> Option<InputSender> {
        let mut weather = self.network.lock();
        if weather.cut.contains(&self.from) || weather.cut.contains(&to) {
            return None;
        }
        let loss = weather.loss;
        if let Some(rng) = &mut weather.rng
            && rng.random_range(0..1000) < loss
        {
            return None;
        }
        weather.inboxes.get(&to).cloned()
    }
}

impl Peers for Wire {
    fn send(&mut self, message: Message) {
        if let Some(inbox) = self.way_to(message.to) {
            let _ = inbox.send(Input::Step(Box::new(message)));
        }
    }

    fn send_snapshot(&mut self, message: Message, tables: PinnedTables) {
        let to = message.to;
        let target = self.way_to(to);
        let (network, inbox) = (self.network.clone(), self.inbox.clone());
        std::thread::spawn(move || {
            let arrived = target.is_some_and(|target| carry(&network, &target, message, tables));
            let delay = network.lock().report_delay;
            std::thread::sleep(delay);
            let _ = inbox.send(Input::SnapshotSent { to, arrived });
        });
    }

    fn send_claim(&mut self, claim: &StateClaim) {
        let all: Vec<u64> = self.network.lock().inboxes.keys().copied().collect();
        for to in all.into_iter().filter(|to| *to != self.from) {
            if let Some(inbox) = self.way_to(to) {
                let (from, claim) = (self.from, claim.clone());
                let _ = inbox.send(Input::Claim { from, claim });
            }
        }
    }

    fn set_group(&mut self, _: &GroupView) {}
}

fn carry(network: &Network, target: &InputSender, message: Message, tables: PinnedTables) -> bool {
    let mut is_damaged = false;
    {
        let mut weather = network.lock();
        if weather.lost_snapshots > 0 {
            weather.lost_snapshots -= 1;
            return false;
        }
        if weather.damaged_snapshots > 0 {
            weather.damaged_snapshots -= 1;
            is_damaged = true;
        }
    }
    let mut install = SnapshotInstall::new(1 << 30);
    let mut export = tables.export();
    while let Some(mut frame) = export.next_frame().unwrap() {
        if is_damaged {
            let middle = frame.len() / 2;
            frame[middle] ^= 1;
        }
        if install.push_frame(&frame).is_err() {
            assert!(is_damaged, "an undamaged frame was refused");
            return false;
        }
    }
    let (reply, installed) = oneshot::channel();
    let arrived = Input::SnapshotArrived {
        message: Box::new(message),
        install: Box::new(install),
        reply,
    };
    let taken = target.send(arrived).is_ok() && matches!(installed.blocking_recv(), Ok(Ok(())));
    network.lock().snapshots += u32::from(taken);
    taken
}
