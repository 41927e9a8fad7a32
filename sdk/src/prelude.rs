//! What most programs need: `use mobula::prelude::*;`

pub use crate::actor::{Actor, ActorRef, Init};
pub use crate::cluster::{Cluster, ContextExt, TaskContextExt};
pub use crate::error::CallFailure;
pub use crate::object::{ObjectRef, Waited};
pub use crate::stream::{ItemStream, StreamOf};
pub use crate::task::{Task, TaskBuilder};
pub use mobula_core::error::{CallError, Executed};
pub use mobula_core::id::{ActorId, Incarnation, JobId};
pub use mobula_host::{ActorContext, CallScope, Notice, StateError, TaskContext};
