//! What a command was about, for the audit log: ids and names, never arguments, environment, results or
//! hashes.

use mobula_core::order::WorkerEvent;

use crate::command::{Command, Response};

/// What `command`, which was answered with `response` if it was not refused, was about.
pub(crate) fn subject(command: &Command, response: Option<&Response>) -> String {
    match command {
        Command::RegisterNode { name, .. } => format!("worker {name}"),
        Command::NodeLost { node, .. } => node.to_string(),
        Command::NodeEvent { node, event, .. } => match event {
            WorkerEvent::Notice { .. } => format!("{node}, which was given notice"),
            _ => node.to_string(),
        },
        Command::DrainNode { node, on: true } => node.to_string(),
        Command::DrainNode { node, on: false } => format!("{node}, no longer"),
        Command::PreemptNode { node, .. } => node.to_string(),
        Command::SubmitJob { spec } => match response {
            Some(Response::JobSubmitted {
                job, created: true, ..
            }) => format!("{job} ({})", spec.name),
            Some(Response::JobSubmitted { job, .. }) => {
                format!("{job} ({}), which its key had named already", spec.name)
            }
            _ => format!("a job ({})", spec.name),
        },
        Command::StopJob { job } | Command::SetJobResult { job, .. } => job.to_string(),
        Command::CreateActors { job, actors, .. } => match response {
            Some(Response::ActorsCreated { actors }) if actors.len() == 1 => {
                format!("{} of {job}", actors[0])
            }
            _ => format!("{} actors of {job}", actors.len()),
        },
        Command::StopActor { actor, .. } | Command::YieldActor { actor, .. } => actor.to_string(),
        Command::Assign { assignments } => format!("{} actors", assignments.len()),
        Command::OpenSession { client } => match response {
            Some(Response::SessionOpened { session }) => format!("{session} ({client})"),
            _ => format!("a session ({client})"),
        },
        Command::CloseSession { session, .. } => session.to_string(),
        Command::CreateToken { id, role, .. } => format!("{role} token {id}"),
        Command::UseToken { .. } => match response {
            Some(Response::TokenAccepted { id, role }) => format!("{role} token {id}"),
            _ => "a token".to_owned(),
        },
        Command::RevokeToken { id } => format!("token {id}"),
        Command::Restored { .. } => "a backup".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::{ActorId, JobId, SessionId};

    #[test]
    fn a_subject_names_what_came_of_the_command() {
        let stop = Command::StopJob { job: JobId(3) };
        assert_eq!(subject(&stop, None), "job-3");
        let open = Command::OpenSession {
            client: "client/x".into(),
        };
        let session = SessionId(4);
        let opened = Response::SessionOpened { session };
        assert_eq!(subject(&open, None), "a session (client/x)");
        assert!(subject(&open, Some(&opened)).ends_with("(client/x)"));
        let create = Command::CreateActors {
            job: JobId(3),
            actors: Vec::new(),
            gang: false,
            get_or_create: false,
            creator: None,
        };
        let created = Response::ActorsCreated {
            actors: vec![ActorId(9)],
        };
        assert_eq!(subject(&create, Some(&created)), "actor-9 of job-3");
        assert_eq!(subject(&create, None), "0 actors of job-3");
    }

    #[test]
    fn no_part_of_a_secret_is_in_a_subject() {
        let create = Command::CreateToken {
            id: "client-1".into(),
            secret_hash: [0xab; 32],
            role: crate::Role::Client,
            expires_at_ms: 1,
            uses: None,
            ends_with: "wxyz".into(),
            principal: None,
        };
        assert_eq!(subject(&create, None), "client token client-1");
        let use_it = Command::UseToken {
            secret_hash: [0xab; 32],
        };
        assert_eq!(subject(&use_it, None), "a token");
    }
}
