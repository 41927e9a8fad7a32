//! Secrets of jobs: sealed before they are proposed, opened in the orders that go to workers.
//!
//! Invariants:
//! 1. No secret is in a command, a table or a snapshot but sealed, bound to its name.
//! 2. An opened secret goes to a worker that was told to run the job, over its session, and nowhere
//!    else; what `Debug` prints of an order or a command shows the names only.

use mobula_core::error::Rejection;
use mobula_core::id::Term;
use mobula_core::order::Order;
use mobula_core::secret::Secret;
use mobula_core::spec::JobSpec;
use mobula_wire::session::HeadMessage;

use crate::context::HeadContext;

impl HeadContext {
    /// Seals what came in a request; refuses what no process could be given.
    pub(crate) fn seal_secrets(&self, spec: &mut JobSpec) -> Result<(), Rejection> {
        for (name, secret) in &mut spec.secrets {
            if std::str::from_utf8(secret.reveal()).is_err() || secret.reveal().contains(&0) {
                return Err(Rejection::invalid(format!(
                    "the secret `{}` is not text, or contains NUL, and cannot be an environment \
                     variable: encode it (base64), or put it into a file of your own store",
                    name.escape_debug()
                )));
            }
            *secret = Secret::new(self.at_rest.seal(secret.reveal(), name));
        }
        Ok(())
    }

    /// The message that carries an order which came from the tables.
    pub(crate) fn order_message(&self, term: Term, mut order: Order) -> HeadMessage {
        if let Order::Start(start) = &mut order {
            let actor = start.actor;
            start.secrets.retain(|name, secret| {
                match self.at_rest.open(secret.reveal(), name) {
                    Ok(opened) => {
                        *secret = Secret::new(opened);
                        true
                    }
                    Err(error) => {
                        // Tables of another cluster: the program will miss it, and say so.
                        tracing::error!(%actor, name, %error, "a secret cannot be opened");
                        false
                    }
                }
            });
        }
        HeadMessage::Order { term, order }
    }
}
