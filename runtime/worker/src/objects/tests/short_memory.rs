//! Memory that does not suffice: what goes to disk and comes back, and what is refused.

use std::os::unix::fs::{FileExt, MetadataExt};

use mobula_core::object::ObjectError;
use mobula_wire::store::StoreReply;

use super::stage::{MIB, Node, PATIENCE, ca, content};

#[tokio::test]
async fn what_memory_has_no_room_for_goes_to_disk_and_comes_back_checked() {
    let node = Node::start(&ca(), "one", 4 * MIB, 64 * MIB);
    let mut writer = node.host(1, 3).await;
    let mut objects = Vec::new();
    for sequence in 1..=10 {
        let bytes = content(sequence, MIB);
        objects.push(writer.put(sequence, &bytes).await.unwrap());
    }
    let metrics = *node.metrics.borrow();
    assert!(metrics.used_bytes <= 4 * MIB, "{metrics:?}");
    assert!(metrics.spills_total >= 6, "{metrics:?}");
    assert!(
        writer
            .heard
            .contains(&StoreReply::Reclaimed { object: objects[0] }),
        "the least recently used goes first"
    );
    let mut reader = node.host(2, 3).await;
    for (index, object) in objects.iter().enumerate() {
        let opening = reader.open(*object);
        // The writer is a process of its own: it gives memory back meanwhile.
        let opened = tokio::select! {
            opened = opening => opened.unwrap(),
            never = async { loop { let reply = writer.reply().await; writer.heard.extend(reply); } } => never,
        };
        assert!(opened.bytes == content(index as u64 + 1, MIB), "{object}");
        reader.close(*object).await;
    }
    assert!(node.metrics.borrow().restores_total > 0);

    // A bit of everything on the disk turns over.
    node.until("moves are over", |metrics| {
        metrics.waiting_requests == 0 && metrics.spilled_objects > 0
    })
    .await;
    let file = node.spill_file();
    let size_bytes = file.metadata().unwrap().len();
    for offset in (777..size_bytes).step_by(MIB as usize) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    }
    let mut errors = Vec::new();
    for (index, object) in objects.iter().enumerate() {
        let opening = reader.open(*object);
        let opened = tokio::select! {
            opened = opening => opened,
            never = async { loop { let reply = writer.reply().await; writer.heard.extend(reply); } } => never,
        };
        match opened {
            Ok(opened) => {
                assert!(opened.bytes == content(index as u64 + 1, MIB), "{object}");
                reader.close(*object).await;
            }
            Err(error) => errors.push(error.to_string()),
        }
    }
    let corrupt = node.metrics.borrow().corrupt_total;
    assert!(corrupt > 0, "something was on disk");
    assert_eq!(errors.len() as u64, corrupt);
    assert!(errors[0].contains("digest differs"), "{errors:?}");
    for object in objects {
        writer.free(object).await;
    }
    node.until("the disk is empty", |metrics| {
        metrics.objects == 0 && metrics.spilled_bytes == 0
    })
    .await;
    // It is given back when nobody waits for it any more.
    let emptied = async {
        while file.metadata().unwrap().blocks() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, emptied).await.unwrap();
}

#[tokio::test]
async fn full_memory_and_a_full_disk_are_told_apart() {
    let node = Node::start(&ca(), "one", 2 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let error = writer.put(1, &content(1, 3 * MIB)).await.unwrap_err();
    let expected = ObjectError::StoreFull {
        node: "one".into(),
        needed_bytes: 3 * MIB,
        used_bytes: 0,
        limit_bytes: 2 * MIB,
    };
    assert_eq!(error, expected, "at once: it can never fit");
    assert!(error.to_string().contains("worker.object_store_bytes"));
    let mut reader = node.host(2, 3).await;
    for sequence in 1..=2 {
        let object = writer.put(sequence, &content(sequence, MIB)).await.unwrap();
        reader.open(object).await.unwrap();
    }
    // Both are read, so that neither may go.
    let error = writer.put(3, &content(3, MIB)).await.unwrap_err();
    assert!(matches!(error, ObjectError::StoreFull { .. }), "{error}");
    drop(reader);
    // One may go to disk, and no more.
    writer.put(4, &content(4, MIB)).await.unwrap();
    let error = writer.put(5, &content(5, MIB)).await.unwrap_err();
    assert!(matches!(error, ObjectError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("free space"), "{error}");
}
