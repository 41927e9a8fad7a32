//! The actor types that a program knows, found by name.
//!
//! Every `#[mobula::actor]` submits one [`ActorType`] at link time, so that the same binary that
//! asks for an actor can construct it wherever it is started again.

use std::collections::BTreeMap;

use futures::future::BoxFuture;

use crate::actor::ActorBody;
use crate::context::ActorContext;
use crate::tasks::registry::TaskRegistry;

/// Why a constructor brought no actor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstructError {
    /// The arguments are not what the constructor takes; starting again cannot help.
    #[error("constructor arguments: {0}")]
    BadArguments(String),
    /// The constructor returned an error.
    #[error("{0}")]
    Failed(String),
}

/// A constructor: encoded arguments in, an actor out.
pub type Constructor =
    fn(Vec<u8>, ActorContext) -> BoxFuture<'static, Result<ActorBody, ConstructError>>;

/// One type of actors.
#[derive(Clone, Copy)]
pub struct ActorType {
    /// Its name, unique within the program.
    pub name: &'static str,
    /// Makes one.
    pub constructor: Constructor,
    /// Whether it keeps state: that is restored before the constructor runs.
    pub durable: bool,
}

inventory::collect!(ActorType);

/// Two actor types, or two tasks, of one program have the same name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "two {kind}s of this program are named `{name}`: give one of them another name with \
     #[mobula::{kind}(name = \"...\")]"
)]
pub struct DuplicateTypeError {
    /// `actor` or `task`.
    pub kind: &'static str,
    /// The name.
    pub name: &'static str,
}

/// Actor types and tasks by name.
#[derive(Clone, Default)]
pub struct Registry {
    types: BTreeMap<&'static str, ActorType>,
    tasks: TaskRegistry,
}

impl Registry {
    /// All types and tasks that are linked into this program.
    pub fn of_this_program() -> Result<Self, DuplicateTypeError> {
        let types = Registry::new(inventory::iter::<ActorType>.into_iter().copied())?;
        Ok(types.with_tasks(TaskRegistry::of_this_program()?))
    }

    /// Only these types.
    pub fn new(types: impl IntoIterator<Item = ActorType>) -> Result<Self, DuplicateTypeError> {
        let mut registry = Registry::default();
        for actor_type in types {
            if registry.types.insert(actor_type.name, actor_type).is_some() {
                return Err(DuplicateTypeError {
                    kind: "actor",
                    name: actor_type.name,
                });
            }
        }
        Ok(registry)
    }

    /// The same types, and these tasks.
    #[must_use]
    pub fn with_tasks(self, tasks: TaskRegistry) -> Self {
        Registry { tasks, ..self }
    }

    /// The tasks.
    #[must_use]
    pub fn tasks(&self) -> &TaskRegistry {
        &self.tasks
    }

    /// The type of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<ActorType> {
        self.types.get(name).copied()
    }

    /// The names of all actor types, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.types.keys().map(|name| (*name).to_owned()).collect()
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.types.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_taken_once() {
        let actor_type = ActorType {
            name: "a",
            constructor: |_, _| {
                Box::pin(std::future::ready(Err(ConstructError::Failed(
                    String::new(),
                ))))
            },
            durable: false,
        };
        let error = Registry::new([actor_type, actor_type]).unwrap_err();
        assert_eq!(
            error,
            DuplicateTypeError {
                kind: "actor",
                name: "a"
            }
        );
        let registry = Registry::new([actor_type]).unwrap();
        assert_eq!(registry.names(), ["a"]);
        assert!(registry.get("b").is_none());
    }
}
