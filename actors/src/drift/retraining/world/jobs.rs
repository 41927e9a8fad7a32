//! The worker of a test's head: it runs the drivers of retrainings' jobs, and ends them as a test says.

use std::collections::BTreeMap;

use mobula_core::order::WorkerEvent;
use mobula_core::{ExitReason, HostId, JobId};
use mobula_scheduler::{
    ActorView, Command as SchedulerCommand, Query as SchedulerQuery, QueryResponse, placement_pass,
};

use super::World;
use crate::drift::retraining::next::job_view;
use crate::drift::retraining::state::tests::new_version;
use crate::drift::retraining::tables::history;
use crate::registry::NewVersion;

impl World {
    fn driver(&self, job: u64) -> Option<ActorView> {
        let actor = job_view(&self.tables, JobId(job))?.driver?;
        let query = SchedulerQuery::Actor { actor };
        match mobula_scheduler::answer(&self.tables, 0, query) {
            Ok(QueryResponse::Actor(view)) => Some(view),
            _ => None,
        }
    }

    fn event(&mut self, event: WorkerEvent) {
        let (node, incarnation) = self.node;
        let command = SchedulerCommand::NodeEvent {
            node,
            incarnation,
            event,
        };
        self.scheduler(&command).unwrap();
    }

    /// Places the job's driver, and has it run.
    fn start_job(&mut self, job: u64) -> Option<ActorView> {
        if let Some(command) = placement_pass(&self.tables, self.now_ms) {
            self.scheduler(&command).unwrap();
        }
        let view = self.driver(job).filter(|view| view.state == "assigned")?;
        self.event(WorkerEvent::ActorStarted {
            actor: view.actor,
            incarnation: view.incarnation,
            host: HostId(1),
            call_address: "127.0.0.1:7000".into(),
            pid: 7,
        });
        self.driver(job)
    }

    fn exit(&mut self, driver: &ActorView, reason: ExitReason) {
        self.event(WorkerEvent::ActorExited {
            actor: driver.actor,
            incarnation: driver.incarnation,
            reason,
        });
    }

    /// Ends the drivers of jobs that are to stop.
    pub(super) fn stop_what_is_stopping(&mut self) {
        for row in history(&self.tables, "digits") {
            let Some(job) = mobula_scheduler::job_of_key(&self.tables, &row.job_key()) else {
                continue;
            };
            if let Some(driver) = self.driver(job.0).filter(|view| view.state == "stopping") {
                self.exit(&driver, ExitReason::Stopped);
            }
        }
    }

    /// The job registers a version of this accuracy, or none, and ends well. Of a job that is over, nothing.
    pub(in crate::drift::retraining) fn end_job(&mut self, job: u64, accuracy: Option<f64>) {
        self.digests += 1;
        let digest = char::from_digit(self.digests % 10, 10).unwrap();
        match accuracy {
            Some(accuracy) => self.end_job_with(job, digest, accuracy),
            None => self.complete(job, "{}"),
        }
    }

    /// The same with weights of this digest.
    pub(in crate::drift::retraining) fn end_job_with(
        &mut self,
        job: u64,
        weights: char,
        accuracy: f64,
    ) {
        self.digests += 1;
        let version = NewVersion {
            digest: format!("{:064x}", self.digests),
            job,
            metrics: BTreeMap::from([("accuracy".to_owned(), accuracy)]),
            ..new_version(weights)
        };
        let version = self.register(version);
        let result = format!(r#"{{"model":"digits","model_version":{version}}}"#);
        self.complete(job, &result);
    }

    fn complete(&mut self, job: u64, result: &str) {
        let Some(driver) = self.start_job(job) else {
            return;
        };
        let command = SchedulerCommand::SetJobResult {
            job: JobId(job),
            actor: driver.actor,
            incarnation: driver.incarnation,
            result_json: result.into(),
        };
        self.scheduler(&command).unwrap();
        self.exit(&driver, ExitReason::Completed);
    }

    pub(in crate::drift::retraining) fn fail_job(&mut self, job: u64, why: &str) {
        if let Some(driver) = self.start_job(job) {
            self.exit(&driver, ExitReason::Failed(why.into()));
        }
    }
}
