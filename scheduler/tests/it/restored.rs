//! Tables that came from a backup.

use mobula_core::control::{Caller, StateModule};
use mobula_core::{ErrorCode, SessionId};
use mobula_scheduler::{Command, Response, Scheduler};

use crate::cluster::Cluster;

#[test]
fn ids_that_may_have_been_given_out_since_the_backup_are_left_out() {
    let mut cluster = Cluster::new();
    let open = || Command::OpenSession { client: "c".into() };
    let opened = |number| Response::SessionOpened {
        session: SessionId(number),
    };
    assert_eq!(cluster.ok(open()), opened(1));
    let restored = Command::Restored { ids_left_out: 100 };
    assert_eq!(cluster.ok(restored.clone()), Response::Done);
    assert_eq!(cluster.ok(open()), opened(102));
    let refused = Scheduler.authorize(&Caller::Client, &restored.encode());
    assert_eq!(refused.unwrap_err().code, ErrorCode::PermissionDenied);
}
