//! Who may read what, from where, and what is left when somebody ends.

use std::os::unix::fs::{FileExt, MetadataExt};

use mobula_core::codec;
use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_net::descriptor::connect_descriptors;
use mobula_wire::store::{STORE_MESSAGE_BYTES_MAX, StoreReply, StoreRequest};

use super::stage::{MIB, Node, ca, content};

#[tokio::test]
async fn hosts_of_one_node_read_the_same_memory() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let object = writer.put(1, b"in place").await.unwrap();
    let arena = writer.blocks[&object];
    let written_in = writer.arenas[&arena].metadata().unwrap().ino();
    for number in 2..4 {
        let mut reader = node.host(number, 3).await;
        let opened = reader.open(object).await.unwrap();
        assert_eq!(opened.bytes, b"in place");
        assert_eq!(opened.inode, written_in, "one file, no copy");
        let file = reader.arenas.last_key_value().unwrap().1;
        assert!(file.write_at(b"x", 0).is_err(), "readers cannot write");
        let again = reader.open(object).await.unwrap();
        assert_eq!(again.inode, written_in);
    }
    let metrics = *node.metrics.borrow();
    assert_eq!((metrics.objects, metrics.arenas), (1, 1));
}

#[tokio::test]
async fn another_job_gets_nothing() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let object = writer.put(1, b"secret").await.unwrap();
    let mut stranger = node.host(2, 4).await;
    let Err(error) = stranger.open(object).await else {
        panic!("it was given away");
    };
    assert_eq!(error, ObjectError::Freed { object });
    stranger.free(object).await;
    let opened = writer.open(object).await.unwrap();
    assert_eq!(opened.bytes, b"secret", "nor can it free it");
}

#[tokio::test]
async fn freed_memory_comes_back_once_nobody_reads_it() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let mut reader = node.host(2, 3).await;
    let object = writer.put(1, b"read").await.unwrap();
    reader.open(object).await.unwrap();
    reader.open(object).await.unwrap();
    writer.free(object).await;
    // By an answer on the same socket we know that it has been taken in.
    assert!(writer.open(object).await.is_err());
    reader.close(object).await;
    let Err(error) = reader.open(object).await else {
        panic!("a freed object was opened");
    };
    assert_eq!(error, ObjectError::Freed { object });
    assert_eq!(node.metrics.borrow().objects, 1, "it is still read");
    reader.close(object).await;
    writer.hear(StoreReply::Reclaimed { object }).await;
    node.until("the arena is returned", |metrics| metrics.used_bytes == 0)
        .await;
    reader
        .hear(StoreReply::Forget {
            arena: *reader.arenas.keys().next().unwrap(),
        })
        .await;
    // A reader that is killed lets go too.
    let object = writer.put(2, b"more").await.unwrap();
    reader.open(object).await.unwrap();
    writer.free(object).await;
    drop(reader);
    writer.hear(StoreReply::Reclaimed { object }).await;
    let process = ProcessId(2);
    writer.hear(StoreReply::ProcessGone { process }).await;
}

#[tokio::test]
async fn an_ended_owner_leaves_nothing_and_a_result_outlives_its_writer() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut reader = node.host(1, 3).await;
    let mut writer = node.host(2, 3).await;
    let owned = writer.put(1, b"owned").await.unwrap();
    let result = writer.put_result(2, b"result").await;
    assert_eq!(writer.open(result).await.unwrap().bytes, b"result");
    drop(writer);
    let process = ProcessId(2);
    reader.hear(StoreReply::ProcessGone { process }).await;
    let Err(error) = reader.open(owned).await else {
        panic!("its owner has ended");
    };
    assert!(matches!(error, ObjectError::Lost { .. }), "{error}");
    assert_eq!(reader.open(result).await.unwrap().bytes, b"result");
    reader.close(result).await;
    reader.free(result).await;
    node.until("nothing is left", |metrics| metrics.used_bytes == 0)
        .await;
}

#[tokio::test]
async fn an_object_goes_from_node_to_node_once_and_is_checked() {
    let ca = ca();
    let one = Node::start(&ca, "one", 16 * MIB, MIB);
    let two = Node::start(&ca, "two", 16 * MIB, MIB);
    let mut writer = one.host(1, 3).await;
    let size_bytes = 3 * MIB + 77;
    let bytes = content(1, size_bytes);
    let object = writer.put(1, &bytes).await.unwrap();
    let mut readers = Vec::new();
    for number in 2..6 {
        readers.push(two.host(number, 3).await);
    }
    let opens = readers
        .iter_mut()
        .map(|reader| reader.open_at(object, &one.agent, size_bytes));
    let mut inodes = Vec::new();
    for opened in futures::future::join_all(opens).await {
        let opened = opened.unwrap();
        assert!(opened.bytes == bytes);
        inodes.push(opened.inode);
    }
    inodes.dedup();
    assert_eq!(inodes.len(), 1, "one copy on the node");
    let metrics = *two.metrics.borrow();
    assert_eq!(
        (metrics.fetches_total, metrics.fetched_bytes_total),
        (1, size_bytes)
    );
    let unknown = writer.id(99);
    let mut stranger = two.host(9, 4).await;
    for (host, id) in [(&mut readers[0], unknown), (&mut stranger, object)] {
        let Err(error) = host.open_at(id, &one.agent, size_bytes).await else {
            panic!("{id} was opened");
        };
        assert!(
            matches!(error, ObjectError::Lost { .. } | ObjectError::Freed { .. }),
            "{error}"
        );
    }
    // The owner's word goes to the node that has it.
    readers[0]
        .send(StoreRequest::Free {
            object,
            agent: one.agent.clone(),
        })
        .await;
    writer.hear(StoreReply::Reclaimed { object }).await;
    drop(one);
    let gone = readers[1]
        .open_at(writer.id(98), "127.0.0.1:1", size_bytes)
        .await;
    assert!(matches!(gone, Err(ObjectError::Lost { .. })));
}

#[tokio::test]
async fn who_breaks_the_protocol_is_cut_off() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    for bad in 0..5u64 {
        let mut host = node.host(10 + bad, 3).await;
        let mine = host.put(1, b"x").await.unwrap();
        let arena = host.blocks[&mine];
        let object = host.id(2);
        let publish = |arena, offset, object| StoreRequest::Publish {
            object,
            arena,
            offset,
            size_bytes: 1,
            is_owned_here: true,
        };
        let request = match bad {
            0 => publish(arena, u64::MAX, object),
            1 => publish(arena + 1000, 0, object),
            2 => publish(arena, 0, mine),
            3 => publish(
                arena,
                0,
                ObjectId {
                    owner: ProcessId(999),
                    sequence: 1,
                },
            ),
            _ => StoreRequest::ReturnArena { arena },
        };
        host.send(request).await;
        while let Some(reply) = host.reply().await {
            assert!(
                matches!(reply, StoreReply::ProcessGone { .. }),
                "case {bad}: {reply:?}"
            );
        }
    }
    node.until("nothing is left of them", |metrics| metrics.used_bytes == 0)
        .await;
    let socket = node.directory.path().join("objects.sock");
    let (mut sender, mut receiver) = connect_descriptors(&socket, STORE_MESSAGE_BYTES_MAX)
        .await
        .unwrap();
    let hello = StoreRequest::Hello {
        key: "guessed".into(),
        process: ProcessId(1),
    };
    sender
        .send(&codec::encode_plain(&hello), None)
        .await
        .unwrap();
    assert!(receiver.receive().await.unwrap().is_none());
}

#[tokio::test]
async fn the_end_of_a_job_leaves_nothing_of_it() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut other = node.host(1, 4).await;
    let kept = other.put(1, b"of another job").await.unwrap();
    let mut writer = node.host(2, 3).await;
    let result = writer.put_result(1, b"result").await;
    let mut reader = node.host(3, 3).await;
    reader.open(result).await.unwrap();
    drop(writer);
    reader
        .hear(StoreReply::ProcessGone {
            process: ProcessId(2),
        })
        .await;
    assert_eq!(reader.open(result).await.unwrap().bytes, b"result");
    reader.close(result).await;
    node.store.job_ended(JobId(3));
    let Err(error) = reader.open(result).await else {
        panic!("its job is over");
    };
    assert_eq!(error, ObjectError::Freed { object: result });
    // Both are there as long as somebody may read them.
    reader.put_result(2, b"late").await;
    assert!(reader.open(result).await.is_err());
    assert_eq!(node.metrics.borrow().objects, 3);
    drop(reader);
    node.until("the job's last process has ended", |metrics| {
        metrics.objects == 1
    })
    .await;
    assert_eq!(other.open(kept).await.unwrap().bytes, b"of another job");
    // Told again, when there is nothing of it.
    node.store.job_ended(JobId(3));
    assert_eq!(other.open(kept).await.unwrap().bytes, b"of another job");
}

#[tokio::test]
async fn the_end_of_a_process_is_told_to_who_watches_it_on_any_node() {
    let ca = ca();
    let one = Node::start(&ca, "one", 16 * MIB, MIB);
    let two = Node::start(&ca, "two", 16 * MIB, MIB);
    let watched = one.host(1, 3).await;
    let other = one.host(2, 3).await;
    let mut near = one.host(3, 3).await;
    let mut far = two.host(4, 3).await;
    let mut stranger = two.host(5, 4).await;
    let gone = |process| StoreReply::ProcessGone { process };
    let never = ProcessId(99);
    for host in [&mut near, &mut far] {
        for process in [watched.process, other.process, never] {
            host.watch(process, &one.agent).await;
        }
        host.hear(gone(never)).await;
        assert!(!host.heard.contains(&gone(watched.process)));
    }
    // Of another job it is told as little as of one that never was.
    stranger.watch(watched.process, &one.agent).await;
    stranger.hear(gone(watched.process)).await;
    let process = watched.process;
    drop(watched);
    near.hear(gone(process)).await;
    far.hear(gone(process)).await;
    // With its agent a node's processes are gone too.
    let process = other.process;
    one.stop().await;
    far.hear(gone(process)).await;
    drop(other);
    let mut late = two.host(6, 3).await;
    late.watch(process, &far.agent).await;
    late.hear(gone(process)).await;
}

#[tokio::test]
async fn an_object_may_be_asked_for_before_its_writers_word_has_arrived() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let mut reader = node.host(2, 3).await;
    let object = writer.id(1);
    let writing = async {
        node.until("the question is there first", |metrics| {
            metrics.waiting_requests == 1
        })
        .await;
        writer.put(1, b"late").await.unwrap();
        writer
    };
    let (opened, writer) = tokio::join!(reader.open(object), writing);
    assert_eq!(opened.unwrap().bytes, b"late");
    // With its writer the word is gone for good.
    let never = writer.id(2);
    let ending = async {
        node.until("the next question waits", |metrics| {
            metrics.waiting_requests == 1
        })
        .await;
        drop(writer);
    };
    let (opened, ()) = tokio::join!(reader.open(never), ending);
    assert!(matches!(opened, Err(ObjectError::Lost { .. })));
}
