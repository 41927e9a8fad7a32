//! The decoders of what processes say to each other: as [`decoders`](super::decoders), a part of them.

#![allow(
    unreachable_pub,
    reason = "a test of the workspace includes this file as a private module"
)]

use bytes::{Bytes, BytesMut};
use mobula_core::codec;
use mobula_wire::call::{CallRequest, CalleeMessage, CallerMessage};
use mobula_wire::frame::{Decoded, FrameKind, FrameLimits, decode_frame, encode_frame};
use mobula_wire::hello::{HelloRefusal, Lane, StreamHello};
use mobula_wire::host::{AgentMessage, HostBootstrap, HostMessage};
use mobula_wire::object::{Changes, Next, Reference, Settled, WireValue};
use mobula_wire::raft::{RaftHello, RaftRefusal, SnapshotAnswer, SnapshotOffer, StateClaim};
use mobula_wire::same_machine::Offer;
use mobula_wire::session::{HeadMessage, HostSpans, LogFile, WorkerMessage};
use mobula_wire::store::{PeerReply, PeerRequest, StoreReply, StoreRequest};
use mobula_wire::task::{BroughtValues, TaskHead};

use super::decoders::{Decoder, message, no_seeds, one_of, seed_of};

/// All of them.
pub const WIRE_DECODERS: &[Decoder] = &[
    Decoder {
        name: "wire_frame",
        run: wire_frame,
        seeds: wire_frame_seeds,
    },
    Decoder {
        name: "wire_hello",
        run: wire_hello,
        seeds: wire_hello_seeds,
    },
    Decoder {
        name: "wire_call",
        run: wire_call,
        seeds: wire_call_seeds,
    },
    Decoder {
        name: "wire_session",
        run: wire_session,
        seeds: wire_session_seeds,
    },
    Decoder {
        name: "wire_host",
        run: wire_host,
        seeds: wire_host_seeds,
    },
    Decoder {
        name: "wire_raft",
        run: wire_raft,
        seeds: no_seeds,
    },
    Decoder {
        name: "wire_object",
        run: wire_object,
        seeds: wire_object_seeds,
    },
    Decoder {
        name: "wire_store",
        run: wire_store,
        seeds: no_seeds,
    },
    Decoder {
        name: "wire_task",
        run: wire_task,
        seeds: wire_task_seeds,
    },
];

fn wire_frame(bytes: &[u8]) {
    for limits in [FrameLimits::HELLO, FrameLimits::CONTROL, FrameLimits::CALL] {
        let mut buffer = BytesMut::from(bytes);
        while let Ok(Decoded::Frame(frame)) = decode_frame(&mut buffer, limits) {
            let mut written = BytesMut::new();
            encode_frame(frame.kind, &frame.payload, limits, &mut written)
                .expect("what was accepted is within the limits");
            assert_eq!(
                decode_frame(&mut written, limits),
                Ok(Decoded::Frame(frame))
            );
        }
    }
}

fn wire_frame_seeds() -> Vec<Vec<u8>> {
    let mut buffer = BytesMut::new();
    for kind in [FrameKind::Hello, FrameKind::Message, FrameKind::Chunk] {
        encode_frame(kind, b"payload", FrameLimits::CONTROL, &mut buffer).expect("it is small");
    }
    vec![buffer.to_vec()]
}

fn wire_hello(bytes: &[u8]) {
    one_of(
        bytes,
        &[
            |bytes| drop(StreamHello::accept(bytes, "c-1")),
            |bytes| drop(HelloRefusal::decode(bytes)),
            message::<Offer>,
        ],
    );
}

fn wire_hello_seeds() -> Vec<Vec<u8>> {
    let hello = StreamHello::new(Lane::Call, "c-1").encode();
    vec![[vec![0], hello].concat()]
}

fn wire_call(bytes: &[u8]) {
    let shared = Bytes::copy_from_slice(bytes);
    if let Ok(message) = CallerMessage::decode(shared.clone()) {
        let mut head = BytesMut::new();
        let payload = message.encode_head(&mut head);
        head.extend_from_slice(&payload);
        assert_eq!(CallerMessage::decode(head.freeze()), Ok(message));
    }
    if let Ok(message) = CalleeMessage::decode(shared) {
        let mut head = BytesMut::new();
        let payload = message.encode_head(&mut head);
        head.extend_from_slice(&payload);
        assert_eq!(CalleeMessage::decode(head.freeze()), Ok(message));
    }
}

fn wire_call_seeds() -> Vec<Vec<u8>> {
    use mobula_core::id::{ActorId, Incarnation};
    let request = CallerMessage::Request(CallRequest {
        call: 1,
        actor: ActorId(2),
        incarnation: Incarnation(3),
        method: "add".into(),
        timeout_ms: Some(5),
        key: None,
        window: Some(4),
        arguments: Bytes::from_static(b"\x01\x02"),
    });
    let item = CalleeMessage::Item {
        call: 1,
        sequence: 2,
        value: Bytes::from_static(b"v"),
    };
    let mut buffers = [BytesMut::new(), BytesMut::new()];
    let payloads = [
        request.encode_head(&mut buffers[0]),
        item.encode_head(&mut buffers[1]),
    ];
    let whole = |(head, payload): (&BytesMut, Bytes)| [head.as_ref(), payload.as_ref()].concat();
    buffers.iter().zip(payloads).map(whole).collect()
}

fn wire_session(bytes: &[u8]) {
    one_of(
        bytes,
        &[
            message::<WorkerMessage>,
            message::<HeadMessage>,
            message::<Vec<HostSpans>>,
            message::<Vec<LogFile>>,
        ],
    );
}

fn wire_session_seeds() -> Vec<Vec<u8>> {
    use mobula_core::id::{ActorId, Incarnation, Term};
    let renewed = HeadMessage::Renewed {
        term: Term(3),
        sequence: 9,
    };
    let standing = HeadMessage::OrdersComplete {
        term: Term(3),
        standing: vec![(ActorId(1), Incarnation(2))],
        is_last: true,
    };
    vec![
        seed_of(0, &WorkerMessage::Renew { sequence: 1 }),
        seed_of(1, &renewed),
        seed_of(1, &standing),
    ]
}

fn wire_host(bytes: &[u8]) {
    one_of(
        bytes,
        &[message::<AgentMessage>, message::<HostMessage>, |bytes| {
            drop(serde_json::from_slice::<HostBootstrap>(bytes));
        }],
    );
}

fn wire_host_seeds() -> Vec<Vec<u8>> {
    let certificate = AgentMessage::Certificate {
        certificate_pem: "PEM".into(),
    };
    vec![seed_of(0, &certificate)]
}

fn wire_raft(bytes: &[u8]) {
    one_of(
        bytes,
        &[
            message::<RaftHello>,
            message::<RaftRefusal>,
            message::<SnapshotOffer>,
            message::<StateClaim>,
            message::<SnapshotAnswer>,
        ],
    );
}

fn wire_object(bytes: &[u8]) {
    one_of(
        bytes,
        &[
            message::<Reference>,
            message::<Changes>,
            message::<Next>,
            message::<Settled>,
            message::<WireValue>,
        ],
    );
}

fn wire_object_seeds() -> Vec<Vec<u8>> {
    use mobula_core::object::{ObjectId, ProcessId};
    let owner = ProcessId(7);
    let changes = Changes {
        holder: ProcessId(8),
        owner,
        changes: Vec::new(),
    };
    let reference = Reference {
        object: ObjectId { owner, sequence: 1 },
        owner: "127.0.0.1:1".into(),
        transit: 3,
        agent: String::new(),
    };
    vec![seed_of(0, &reference), seed_of(1, &changes)]
}

fn wire_store(bytes: &[u8]) {
    one_of(
        bytes,
        &[
            message::<StoreRequest>,
            message::<StoreReply>,
            message::<PeerRequest>,
            message::<PeerReply>,
        ],
    );
}

fn wire_task(bytes: &[u8]) {
    if let Ok((head, values, arguments)) = TaskHead::split(Bytes::copy_from_slice(bytes)) {
        let written = Bytes::from(head.join(&values, &arguments));
        let again = TaskHead::split(written).expect("what was written is read again");
        message::<BroughtValues>(&values);
        assert_eq!(again, (head, values, arguments));
    }
}

fn wire_task_seeds() -> Vec<Vec<u8>> {
    let values = codec::encode_plain(&BroughtValues::new());
    vec![TaskHead { attempt: 2 }.join(&values, b"arguments")]
}
