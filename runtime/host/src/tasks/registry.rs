//! The tasks that a program knows, found by name: every `#[mobula::task]` submits one at link time.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::actor::MethodError;
use crate::registry::DuplicateTypeError;
use crate::reply::ItemSender;
use crate::tasks::context::TaskContext;

/// One execution of a task.
#[derive(Debug)]
pub struct TaskCall {
    /// Its encoded arguments.
    pub arguments: Bytes,
    /// Values of objects that they refer to, for [`brought`](crate::objects::brought).
    pub values: Bytes,
    /// What it knows about itself.
    pub context: TaskContext,
    /// Where several values go, if the caller takes them.
    pub items: Option<ItemSender>,
}

/// Runs a task: encoded arguments in, the encoded value out.
pub type TaskFunction = fn(TaskCall) -> BoxFuture<'static, Result<Vec<u8>, MethodError>>;

/// One task.
#[derive(Clone, Copy)]
pub struct TaskType {
    /// Its name, unique within the program.
    pub name: &'static str,
    /// Runs it.
    pub run: TaskFunction,
}

inventory::collect!(TaskType);

/// Tasks by name. Clones are the same.
#[derive(Clone, Default)]
pub struct TaskRegistry(Arc<HashMap<&'static str, TaskFunction>>);

impl TaskRegistry {
    /// All tasks that are linked into this program.
    pub fn of_this_program() -> Result<Self, DuplicateTypeError> {
        static LINKED: LazyLock<Result<TaskRegistry, DuplicateTypeError>> =
            LazyLock::new(|| TaskRegistry::new(inventory::iter::<TaskType>.into_iter().copied()));
        LINKED.clone()
    }

    /// Only these tasks.
    pub fn new(types: impl IntoIterator<Item = TaskType>) -> Result<Self, DuplicateTypeError> {
        let mut tasks = HashMap::new();
        for TaskType { name, run } in types {
            if tasks.insert(name, run).is_some() {
                return Err(DuplicateTypeError { kind: "task", name });
            }
        }
        Ok(TaskRegistry(Arc::new(tasks)))
    }

    /// The task of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<TaskFunction> {
        self.0.get(name).copied()
    }

    /// All names, in order.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.0.keys().copied().collect();
        names.sort_unstable();
        names
    }
}

impl std::fmt::Debug for TaskRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_taken_once() {
        let task = TaskType {
            name: "a",
            run: |_| Box::pin(std::future::ready(Ok(Vec::new()))),
        };
        let error = TaskRegistry::new([task, task]).unwrap_err();
        assert_eq!(
            error,
            DuplicateTypeError {
                kind: "task",
                name: "a"
            }
        );
        let registry = TaskRegistry::new([task]).unwrap();
        assert_eq!(registry.names(), ["a"]);
        assert!(registry.get("b").is_none());
    }
}
