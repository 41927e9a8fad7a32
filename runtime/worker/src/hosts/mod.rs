//! Host processes: which actor runs in which ([`pool`]), how one is launched ([`launcher`],
//! [`program`], [`files`], [`limits`]), its certificate after the first one ([`renewal`]), the process itself
//! ([`process`]), whether somebody has stopped it ([`stopped`]), the agent's end of its socket
//! ([`connection`]), and what callers of a killed one hear ([`graves`]).

pub(crate) mod action;
pub(crate) mod connection;
pub(crate) mod devices;
pub(crate) mod ended;
pub(crate) mod files;
pub(crate) mod graves;
pub(crate) mod launcher;
pub(crate) mod limits;
pub(crate) mod pool;
pub(crate) mod process;
pub(crate) mod program;
pub(crate) mod renewal;
pub(crate) mod stopped;
