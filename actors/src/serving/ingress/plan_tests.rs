use mobula_core::control::{Controller, ModuleId, StateModule};
use mobula_core::id::JobId;
use mobula_core::label::Labels;
use mobula_core::resource::Resources;
use mobula_scheduler::{Command, Scheduler};

use super::*;
use crate::serving::controller::ServingController;
use crate::serving::state::Serving;
use crate::serving::test_tables::TestTables;

/// A worker joins; with an ingress if it is told where.
fn join(tables: &mut TestTables, name: &str, boot_id: &str, ingress: Option<&str>) {
    let mut labels = Labels::new();
    if let Some(address) = ingress {
        labels.insert(ADDRESS_LABEL.into(), address.into());
        labels.insert(NODE_LABEL.into(), name.into());
    }
    let command = Command::RegisterNode {
        name: name.into(),
        boot_id: boot_id.into(),
        capacity: Resources::cpu_milli(1_000),
        labels,
        version: "0".into(),
    };
    tables.apply(&Scheduler, &command.encode()).unwrap();
}

/// What the controller proposes, applied.
fn reconcile(tables: &mut TestTables) -> usize {
    let proposals = ServingController.reconcile(&tables.tables, 0);
    for proposal in &proposals {
        let module: &dyn StateModule = match proposal.module {
            ModuleId::SCHEDULER => &Scheduler,
            _ => &Serving,
        };
        tables.apply(module, &proposal.payload).unwrap();
    }
    proposals.len()
}

/// Names of the platform's actors that have not ended.
fn living_names(tables: &TestTables) -> Vec<String> {
    let query = Query::ListActors {
        job: Some(JobId::SYSTEM),
        after: None,
        limit: 0,
    };
    let Ok(QueryResponse::Actors(actors)) = mobula_scheduler::answer(&tables.tables, 0, query)
    else {
        panic!("a list of actors is one")
    };
    let living = actors.into_iter().filter(|actor| actor.state != "ended");
    living.filter_map(|actor| actor.name).collect()
}

#[test]
fn each_worker_that_was_told_has_an_ingress_and_no_other() {
    let mut tables = TestTables::default();
    join(&mut tables, "one", "a", Some("0.0.0.0:8000"));
    join(&mut tables, "two", "b", Some("0.0.0.0:8000"));
    join(&mut tables, "three", "c", None);
    assert_eq!(reconcile(&mut tables), 1);
    assert_eq!(
        living_names(&tables),
        [ingress_name("one"), ingress_name("two")]
    );
    assert_eq!(reconcile(&mut tables), 0);
    let told = |tables: &TestTables, node: &str| address_of(&tables.tables, node);
    assert_eq!(told(&tables, "one").as_deref(), Some("0.0.0.0:8000"));
    assert_eq!(told(&tables, "three"), None);
    assert_eq!(told(&tables, "four"), None);

    // Started again elsewhere, and started again without.
    join(&mut tables, "one", "d", Some("0.0.0.0:9000"));
    join(&mut tables, "two", "e", None);
    assert_eq!(told(&tables, "one").as_deref(), Some("0.0.0.0:9000"));
    assert_eq!(reconcile(&mut tables), 1);
    assert_eq!(living_names(&tables), [ingress_name("one")]);
    assert_eq!(reconcile(&mut tables), 0);
}

#[test]
fn an_ingress_is_pinned_to_its_worker() {
    let spec = spec("one");
    let labels = |name: &str| Labels::from([(NODE_LABEL.to_owned(), name.to_owned())]);
    let fits = |labels: &Labels| {
        mobula_core::label::first_unmet(&spec.placement.selector, labels).is_none()
    };
    assert!(fits(&labels("one")));
    assert!(!fits(&labels("two")) && !fits(&Labels::new()));
    assert!(spec.isolated);
}
