//! The scheduler's views as messages of the control API.

use mobula_core::id::HostId;
use mobula_core::span::Span;
use mobula_scheduler::{ActorView, Explanation, JobView, NodeView, TokenView};
use mobula_wire::control as api;

pub(super) fn job(view: JobView) -> api::Job {
    api::Job {
        id: view.job.0,
        name: view.name,
        state: view.state,
        driver: view.driver.map_or(0, |driver| driver.0),
        restarts: view.restarts,
        submitted_ms: view.submitted_ms,
        started_ms: view.started_ms,
        ended_ms: view.ended_ms,
        result_json: view.result,
        exit_reason: view.exit_reason,
        pending_reason: None,
        namespace: view.namespace.map(|namespace| namespace.name),
        detached_actors: view.detached_actors,
        storage_problem: None,
    }
}

pub(super) fn actor(view: ActorView) -> api::Actor {
    api::Actor {
        id: view.actor.0,
        job: view.job.0,
        name: view.name.unwrap_or_default(),
        type_name: view.type_name,
        state: view.state,
        node: view.node.map(|node| node.0),
        incarnation: (view.incarnation.0 != 0).then_some(view.incarnation.0),
        call_address: view.call_address,
        pid: view.pid,
        restarts: view.restarts,
        exit_reason: view.exit_reason,
        namespace: view.namespace.map(|namespace| namespace.name),
        detached: view.detached,
        exit_code: view.exit_code,
    }
}

pub(super) fn node(view: NodeView) -> api::Node {
    api::Node {
        id: view.node.0,
        name: view.name,
        state: view.state,
        incarnation: view.incarnation.0,
        capacity: Some(view.capacity.into()),
        free: Some(view.free.into()),
        labels: view.labels.into_iter().collect(),
        actors: u64::from(view.actors),
        deadline_ms: view.deadline_ms,
        version: view.version,
    }
}

pub(super) fn explanation(explanation: Explanation) -> api::ExplainReply {
    let nodes = explanation
        .nodes
        .into_iter()
        .map(|verdict| api::NodeVerdict {
            node: verdict.node.0,
            name: verdict.name,
            fits: verdict.fits,
            reason: verdict.reason,
        });
    api::ExplainReply {
        subject: explanation.subject,
        state: explanation.state,
        verdict: explanation.verdict,
        nodes: nodes.collect(),
        next_step: explanation.next_step,
        storage_problem: None,
    }
}

pub(super) fn token(view: TokenView) -> api::TokenInfo {
    api::TokenInfo {
        id: view.token,
        role: view.role.to_string(),
        expires_at_ms: view.expires_at_ms,
        expired: view.expired,
        uses_left: view.uses_left,
        ends_with: view.ends_with,
        principal: view.principal,
    }
}

/// A span, and where it was recorded.
pub(super) fn span(span: Span, node: &str, host: Option<HostId>) -> api::Span {
    api::Span {
        name: span.name,
        category: span.category,
        start_us: span.start_us,
        end_us: span.end_us,
        actor: span.actor.map(|(actor, _)| actor.0),
        incarnation: span.actor.map(|(_, incarnation)| incarnation.0),
        node: node.to_owned(),
        host: host.map(|host| host.0),
        detail: span.detail.into_iter().collect(),
    }
}
