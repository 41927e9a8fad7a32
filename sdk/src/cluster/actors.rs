//! What can be asked of a cluster about its actors.

use std::time::Duration;

use mobula_core::id::{ActorId, Incarnation, JobId};
use mobula_core::spec::ActorSpec;
use mobula_wire::control as api;

use super::{Cluster, millis};
use crate::actor::{Actor, ActorBuilder, ActorRef, GroupBuilder, Init};
use crate::error::{Error, Result};

impl Cluster {
    /// Describes an actor to create: `cluster.actor(Counter::new(5)).spawn().await?`.
    pub fn actor<A: Actor>(&self, init: Init<A>) -> ActorBuilder<A> {
        ActorBuilder::new(self.clone(), init)
    }

    /// Actors that are placed all at once or not at all.
    pub fn group<A: Actor>(
        &self,
        members: impl IntoIterator<Item = ActorBuilder<A>>,
    ) -> GroupBuilder<A> {
        GroupBuilder::new(self.clone(), members.into_iter().collect())
    }

    /// The living actor that has this name: in this job's namespace, or, if it is in none, in the job.
    pub async fn get_actor<A: Actor>(&self, name: &str) -> Result<ActorRef<A>> {
        let job = self.required_job()?;
        self.find_named(api::NamedActor {
            job: job.0,
            name: name.to_owned(),
            namespace: None,
        })
        .await
    }

    /// The living actor that has this name in a namespace. For processes outside the cluster, which need
    /// no job for it; a job's own processes may look into their own namespace only, and are refused
    /// with [`PermissionDenied`](mobula_core::ErrorCode::PermissionDenied) elsewhere.
    pub async fn get_actor_in<A: Actor>(&self, namespace: &str, name: &str) -> Result<ActorRef<A>> {
        self.find_named(api::NamedActor {
            job: 0,
            name: name.to_owned(),
            namespace: Some(namespace.to_owned()),
        })
        .await
    }

    async fn find_named<A: Actor>(&self, named: api::NamedActor) -> Result<ActorRef<A>> {
        let name = named.name.clone();
        let request = api::ResolveActorRequest {
            target: Some(api::resolve_actor_request::Target::Named(named)),
            ..Default::default()
        };
        let actor = self.find_actor(request).await?;
        if actor.type_name != A::TYPE_NAME {
            return Err(Error::NotInCluster(format!(
                "the actor `{name}` is a `{}`, not a `{}`",
                actor.type_name,
                A::TYPE_NAME
            )));
        }
        Ok(ActorRef::from_id(self, ActorId(actor.id)))
    }

    pub(crate) async fn create_actors(
        &self,
        specs: Vec<ActorSpec>,
        gang: bool,
        get_or_create: bool,
    ) -> Result<Vec<ActorId>> {
        let job = self.required_job()?;
        let actors = specs
            .into_iter()
            .map(api::ActorSpec::try_from)
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|rejection| Error::NotInCluster(rejection.message))?;
        let creator = self.holder.map(|(actor, incarnation)| api::Creator {
            actor: actor.0,
            incarnation: incarnation.0,
        });
        let reply = self
            .control()
            .mutate("create actors", |mut api, stamp| {
                let request = api::CreateActorsRequest {
                    stamp: Some(stamp),
                    job: job.0,
                    actors: actors.clone(),
                    gang,
                    get_or_create,
                    creator,
                };
                async move { api.create_actors(request).await }
            })
            .await?;
        Ok(reply.actors.into_iter().map(ActorId).collect())
    }

    /// Everything about an actor once it runs or has ended, in a start newer than `after`; or as
    /// it is when `wait` is over.
    pub async fn resolve_actor(
        &self,
        actor: ActorId,
        after: Incarnation,
        wait: Duration,
    ) -> Result<api::Actor> {
        self.find_actor(api::ResolveActorRequest {
            target: Some(api::resolve_actor_request::Target::Actor(actor.0)),
            after_incarnation: after.0,
            timeout_ms: millis(wait),
            or_over: false,
        })
        .await
    }

    /// Whether the start `incarnation` of an actor is over: as soon as it is, or when `wait` is.
    ///
    /// The head learns of the end of a process in milliseconds; a caller on another machine would have to
    /// conclude it from silence.
    pub async fn is_actor_over(
        &self,
        actor: ActorId,
        incarnation: Incarnation,
        wait: Duration,
    ) -> Result<bool> {
        let found = self.find_actor(api::ResolveActorRequest {
            target: Some(api::resolve_actor_request::Target::Actor(actor.0)),
            after_incarnation: incarnation.0,
            timeout_ms: millis(wait),
            or_over: true,
        });
        let found = found.await?;
        let is_another = found.incarnation != Some(incarnation.0);
        Ok(is_another || found.state == "pending" || found.state == "ended")
    }

    async fn find_actor(&self, request: api::ResolveActorRequest) -> Result<api::Actor> {
        self.control()
            .read("find an actor", |mut api| {
                let request = request.clone();
                async move { api.resolve_actor(request).await }
            })
            .await
    }

    /// Those of the actors that run or have ended, as soon as there is one; none if there is none
    /// until `wait` is over.
    pub(crate) async fn await_actors(
        &self,
        actors: &[ActorId],
        wait: Duration,
    ) -> Result<Vec<api::Actor>> {
        let request = api::AwaitActorsRequest {
            actors: actors.iter().map(|actor| actor.0).collect(),
            timeout_ms: millis(wait),
        };
        let reply = self
            .control()
            .read("find actors", |mut api| {
                let request = request.clone();
                async move { api.await_actors(request).await }
            })
            .await?;
        Ok(reply.actors)
    }

    /// The actors of one job, or of all.
    pub async fn list_actors(&self, job: Option<JobId>) -> Result<Vec<api::Actor>> {
        let mut actors = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = api::ListActorsRequest {
                job: job.map(|job| job.0),
                page_size: 0,
                page_token,
            };
            let page = self
                .control()
                .read("list actors", |mut api| {
                    let request = request.clone();
                    async move { api.list_actors(request).await }
                })
                .await?;
            actors.extend(page.actors);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(actors);
            }
        }
    }

    /// Ends an actor for good: it may take `grace` to finish and tidy up.
    pub async fn stop_actor(&self, actor: ActorId, grace: Duration) -> Result<()> {
        self.control()
            .mutate("stop an actor", |mut api, stamp| {
                let request = api::StopActorRequest {
                    stamp: Some(stamp),
                    actor: actor.0,
                    grace_ms: millis(grace),
                };
                async move { api.stop_actor(request).await }
            })
            .await
            .map(|api::Empty {}| ())
    }

    /// An actor leaves a node that was given notice or is draining; the head starts it elsewhere.
    pub async fn yield_actor(&self, actor: ActorId, incarnation: Incarnation) -> Result<()> {
        self.control()
            .mutate("yield an actor", |mut api, stamp| {
                let request = api::YieldActorRequest {
                    stamp: Some(stamp),
                    actor: actor.0,
                    incarnation: incarnation.0,
                };
                async move { api.yield_actor(request).await }
            })
            .await
            .map(|api::Empty {}| ())
    }
}
