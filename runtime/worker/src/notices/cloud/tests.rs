//! Each cloud's notices against a stub of its metadata service on this machine.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;

/// A request, as the stub got it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    /// `GET /path?query`.
    line: String,
    /// The header lines, in lower case.
    headers: String,
}

/// What the stub does with a request.
enum Reply {
    Answer(u16, &'static str, String),
    /// It never answers.
    Silence,
}

type Handler = Arc<dyn Fn(&Asked) -> Reply + Send + Sync>;

/// A metadata service on this machine.
struct Stub {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    handler: Arc<Mutex<Handler>>,
    // Ends with the test.
    _server: JoinSet<()>,
}

impl Stub {
    async fn start(handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let handler: Arc<Mutex<Handler>> = Arc::new(Mutex::new(Arc::new(handler)));
        let mut server = JoinSet::new();
        let (log, answers) = (Arc::clone(&asked), Arc::clone(&handler));
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut socket, _)) = listener.accept().await {
                let (log, answers) = (Arc::clone(&log), Arc::clone(&answers));
                connections.spawn(async move {
                    let mut text = String::new();
                    let mut buffer = [0; 4096];
                    while !text.contains("\r\n\r\n") {
                        let Ok(length @ 1..) = socket.read(&mut buffer).await else {
                            return;
                        };
                        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
                    }
                    let (line, headers) = text.split_once("\r\n").unwrap();
                    let asked = Asked {
                        line: line.trim_end_matches(" HTTP/1.1").to_owned(),
                        headers: headers.to_lowercase(),
                    };
                    log.lock().unwrap().push(asked.clone());
                    let answers = Arc::clone(&answers.lock().unwrap());
                    match answers(&asked) {
                        Reply::Silence => std::future::pending().await,
                        Reply::Answer(status, extra, body) => {
                            let head = format!(
                                "HTTP/1.1 {status} x\r\n{extra}content-length: {}\r\n\
                                 connection: close\r\n\r\n",
                                body.len()
                            );
                            let _ = socket.write_all(format!("{head}{body}").as_bytes()).await;
                        }
                    }
                });
            }
        });
        Stub {
            address,
            asked,
            handler,
            _server: server,
        }
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    fn answer_with(&self, handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) {
        *self.handler.lock().unwrap() = Arc::new(handler);
    }

    fn lines(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().map(|asked| asked.line.clone()).collect()
    }
}

fn ok(body: &str) -> Reply {
    Reply::Answer(200, "", body.to_owned())
}

fn status(status: u16) -> Reply {
    Reply::Answer(status, "", String::new())
}

const LEAVES_AT: &str = r#"{"action": "terminate", "time": "2017-09-18T08:22:00Z"}"#;
const LEAVES: Said = Said::Leaves {
    deadline_ms: 1_505_722_920_000,
};

/// AWS with a token that it gave, and `action` and `rebalance` behind it.
fn aws(action: Option<&'static str>, rebalance: bool) -> impl Fn(&Asked) -> Reply {
    move |asked| {
        let is_known = asked.headers.contains("x-aws-ec2-metadata-token: token-1");
        match asked.line.as_str() {
            "PUT /latest/api/token" => {
                assert!(
                    asked
                        .headers
                        .contains("x-aws-ec2-metadata-token-ttl-seconds: 21600")
                );
                ok("token-1")
            }
            _ if !is_known => status(401),
            "GET /latest/meta-data/spot/instance-action" => action.map_or(status(404), ok),
            _ if rebalance => ok(r#"{"noticeTime": "2017-09-18T08:22:00Z"}"#),
            _ => status(404),
        }
    }
}

#[tokio::test]
async fn aws_says_when_the_machine_leaves_and_that_it_does_not_any_more() {
    let stub = Stub::start(aws(None, false)).await;
    let mut service = aws::Aws::new(client().unwrap(), stub.endpoint());
    assert_eq!(service.ask().await, Ok(Said::Nothing));
    stub.answer_with(aws(None, true));
    assert_eq!(service.ask().await, Ok(Said::Advised));
    // A question about advice that fails takes none back.
    stub.answer_with(|asked| match asked.line.as_str() {
        "GET /latest/meta-data/spot/instance-action" => status(404),
        _ => status(500),
    });
    assert_eq!(service.ask().await, Ok(Said::Advised));
    stub.answer_with(aws(Some(LEAVES_AT), true));
    assert_eq!(service.ask().await, Ok(LEAVES));
    stub.answer_with(aws(None, false));
    assert_eq!(service.ask().await, Ok(Said::Nothing));
    let tokens = stub.lines().iter().filter(|l| l.starts_with("PUT")).count();
    assert_eq!(tokens, 1, "a token is used as long as it lasts");
}

#[tokio::test]
async fn aws_renews_a_token_that_has_expired() {
    let stub = Stub::start(aws(Some(LEAVES_AT), false)).await;
    let mut service = aws::Aws::new(client().unwrap(), stub.endpoint());
    assert_eq!(service.ask().await, Ok(LEAVES));
    // The old one is known no more.
    stub.answer_with(|asked| match asked.line.as_str() {
        "PUT /latest/api/token" => ok("token-2"),
        _ if asked.headers.contains("token: token-2") => ok(LEAVES_AT),
        _ => status(401),
    });
    assert_eq!(service.ask().await, Ok(LEAVES));
    // One that is never accepted is no reason to ask for ever.
    stub.answer_with(|asked| match asked.line.as_str() {
        "PUT /latest/api/token" => ok("token-3"),
        _ => status(401),
    });
    let refused = service.ask().await.unwrap_err();
    assert!(
        matches!(refused, CloudError::Status { status: 401, .. }),
        "{refused}"
    );
}

#[tokio::test]
async fn nonsense_makes_up_no_notice() {
    let garbage = [
        "",
        "soon",
        "{}",
        r#"{"action": "terminate", "time": "tomorrow"}"#,
    ];
    for text in garbage {
        let stub = Stub::start(aws(Some(text), false)).await;
        let mut service = aws::Aws::new(client().unwrap(), stub.endpoint());
        let error = service.ask().await.unwrap_err();
        assert!(
            matches!(error, CloudError::Malformed { .. }),
            "{text}: {error}"
        );

        let stub = Stub::start(move |_| ok(text)).await;
        let mut service = gcp::Gcp::new(client().unwrap(), stub.endpoint(), 30_000);
        let error = service.ask().await.unwrap_err();
        assert!(
            matches!(error, CloudError::Malformed { .. }),
            "{text}: {error}"
        );

        let mut service = azure::Azure::new(client().unwrap(), stub.endpoint(), 30_000);
        let error = service.ask().await.unwrap_err();
        assert!(
            matches!(error, CloudError::Malformed { .. }),
            "{text}: {error}"
        );
    }
    let stub = Stub::start(|_| ok("no token\nat all")).await;
    let mut service = aws::Aws::new(client().unwrap(), stub.endpoint());
    let error = service.ask().await.unwrap_err();
    assert!(error.to_string().contains("is no token"), "{error}");
    let stub = Stub::start(|_| ok(&"x".repeat(ANSWER_BYTES_MAX + 1))).await;
    let mut service = gcp::Gcp::new(client().unwrap(), stub.endpoint(), 30_000);
    let error = service.ask().await.unwrap_err().to_string();
    assert!(error.contains("longer than"), "{error}");
    let stub = Stub::start(|_| status(503)).await;
    let mut service = aws::Aws::new(client().unwrap(), stub.endpoint());
    let error = service.ask().await.unwrap_err();
    assert!(
        matches!(error, CloudError::Status { status: 503, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_service_that_never_answers_is_given_up_in_time() {
    let stub = Stub::start(|_| Reply::Silence).await;
    let request = client().unwrap().get(stub.endpoint());
    let error = ask(request, Duration::from_millis(50)).await.err().unwrap();
    assert!(matches!(error, CloudError::Unreachable(_)), "{error}");
    // A port that was free a moment ago, with nobody behind it.
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut service = aws::Aws::new(client().unwrap(), format!("http://{free}"));
    let error = service.ask().await.unwrap_err();
    assert!(matches!(error, CloudError::Unreachable(_)), "{error}");
}

/// GCP with `value` under `tag`.
fn gcp(value: &'static str, tag: &'static str) -> impl Fn(&Asked) -> Reply {
    move |asked| {
        assert!(
            asked.headers.contains("metadata-flavor: google"),
            "{asked:?}"
        );
        Reply::Answer(200, tag, value.to_owned())
    }
}

#[tokio::test]
async fn gcp_is_asked_to_answer_when_something_changes() {
    let stub = Stub::start(gcp("FALSE", "etag: a1\r\n")).await;
    let mut service = gcp::Gcp::new(client().unwrap(), stub.endpoint(), 30_000);
    assert_eq!(service.ask().await, Ok(Said::Nothing));
    stub.answer_with(gcp("TRUE", "etag: b2\r\n"));
    let before = now_ms();
    let Ok(said @ Said::Leaves { deadline_ms }) = service.ask().await else {
        panic!("it is taken away");
    };
    assert!((before + 30_000..=now_ms() + 30_000).contains(&deadline_ms));
    assert_eq!(service.ask().await, Ok(said), "the deadline stands");
    stub.answer_with(gcp("FALSE", "etag: ../x\r\n"));
    assert_eq!(service.ask().await, Ok(Said::Nothing), "withdrawn");
    service.ask().await.unwrap();
    let path = "GET /computeMetadata/v1/instance/preempted";
    let wait = |tag: &str| format!("{path}?wait_for_change=true&timeout_sec=60&last_etag={tag}");
    assert_eq!(
        stub.lines(),
        [
            path.to_owned(),
            wait("a1"),
            wait("b2"),
            wait("b2"),
            path.to_owned()
        ],
        "a strange tag is not passed on"
    );
}

#[tokio::test]
async fn gcp_is_asked_at_once_when_a_long_question_breaks_off() {
    let stub = Stub::start(gcp("FALSE", "etag: a1\r\n")).await;
    let mut service = gcp::Gcp::new(client().unwrap(), stub.endpoint(), 30_000);
    service.ask().await.unwrap();
    stub.answer_with(|asked| {
        if asked.line.contains("wait_for_change") {
            // Less than it announces: the connection breaks off.
            return Reply::Answer(200, "content-length: 99\r\n", String::new());
        }
        ok("TRUE")
    });
    let said = service.ask().await.unwrap();
    assert!(matches!(said, Said::Leaves { .. }), "{said:?}");
}

/// Azure, as machine `vm-7`, with these events.
fn azure(events: &'static str) -> impl Fn(&Asked) -> Reply {
    azure_as("vm-7", events)
}

fn azure_as(name: &'static str, events: &'static str) -> impl Fn(&Asked) -> Reply {
    move |asked| {
        assert!(asked.headers.contains("metadata: true"), "{asked:?}");
        if asked.line.contains("/compute/name") {
            return ok(name);
        }
        ok(&format!(
            r#"{{"DocumentIncarnation": 1, "Events": [{events}]}}"#
        ))
    }
}

#[tokio::test]
async fn azure_events_count_that_end_this_machine() {
    let preempt = r#"{"EventId": "A", "EventType": "Preempt", "ResourceType": "VirtualMachine",
        "Resources": ["vm-6", "vm-7"], "EventStatus": "Scheduled",
        "NotBefore": "Mon, 18 Sep 2017 08:22:00 GMT"}"#;
    let stub = Stub::start(azure("")).await;
    let mut service = azure::Azure::new(client().unwrap(), stub.endpoint(), 30_000);
    assert_eq!(service.ask().await, Ok(Said::Nothing));
    stub.answer_with(azure(preempt));
    assert_eq!(service.ask().await, Ok(LEAVES));
    stub.answer_with(azure(
        r#"{"EventId": "B", "EventType": "Preempt", "Resources": ["vm-8"], "NotBefore": ""},
           {"EventId": "C", "EventType": "Freeze", "Resources": ["vm-7"], "NotBefore": ""}"#,
    ));
    assert_eq!(
        service.ask().await,
        Ok(Said::Nothing),
        "another machine, and a freeze"
    );
    stub.answer_with(azure(
        r#"{"EventId": "D", "EventType": "Terminate", "Resources": ["vm-7"], "NotBefore": ""}"#,
    ));
    let said = service.ask().await.unwrap();
    assert!(
        matches!(said, Said::Leaves { .. }),
        "it has begun: {said:?}"
    );
    assert_eq!(service.ask().await.unwrap(), said, "the deadline stands");
    stub.answer_with(azure(
        r#"{"EventId": "E", "EventType": "Preempt", "Resources": ["vm-7"], "NotBefore": "soon"}"#,
    ));
    let error = service.ask().await.unwrap_err();
    assert!(matches!(error, CloudError::Malformed { .. }), "{error}");
    stub.answer_with(azure(""));
    assert_eq!(service.ask().await, Ok(Said::Nothing), "withdrawn");
}

#[tokio::test]
async fn azure_events_of_machines_whose_names_only_resemble_this_ones_do_not_count() {
    let others = r#"{"EventId": "A", "EventType": "Preempt",
        "Resources": ["dev-vm-7", "group_vm-7", "vm-70", "vm-", ""], "NotBefore": ""}"#;
    let stub = Stub::start(azure(others)).await;
    let mut service = azure::Azure::new(client().unwrap(), stub.endpoint(), 30_000);
    assert_eq!(service.ask().await, Ok(Said::Nothing));

    // Machines of a scale set are called by its name and their number in it.
    let other = r#"{"EventId": "B", "EventType": "Preempt",
        "Resources": ["web-group_7", "group_77", "7"], "NotBefore": ""}"#;
    stub.answer_with(azure_as("group_7", other));
    let mut service = azure::Azure::new(client().unwrap(), stub.endpoint(), 30_000);
    assert_eq!(service.ask().await, Ok(Said::Nothing));
    stub.answer_with(azure_as(
        "group_7",
        r#"{"EventId": "C", "EventType": "Preempt", "Resources": ["GROUP_7"],
            "NotBefore": "Mon, 18 Sep 2017 08:22:00 GMT"}"#,
    ));
    assert_eq!(service.ask().await, Ok(LEAVES));

    // A machine that does not know its name counts all: better a notice that is another one's than none.
    stub.answer_with(azure_as("", others));
    let mut service = azure::Azure::new(client().unwrap(), stub.endpoint(), 30_000);
    let said = service.ask().await.unwrap();
    assert!(matches!(said, Said::Leaves { .. }), "{said:?}");
}

/// A service that says what it was told to say.
struct Scripted(VecDeque<Result<Said, CloudError>>);

impl Service for Scripted {
    async fn ask(&mut self) -> Result<Said, CloudError> {
        match self.0.pop_front() {
            Some(said) => said,
            None => std::future::pending().await,
        }
    }

    fn pause(&self) -> Duration {
        Duration::ZERO
    }
}

/// What the agent is told.
#[derive(Debug, PartialEq)]
enum Heard {
    Notice(Option<u64>),
    Advice(bool),
}

#[tokio::test(start_paused = true)]
async fn the_agent_hears_of_changes_and_a_failure_withdraws_nothing() {
    let leaves = |deadline_ms| Ok(Said::Leaves { deadline_ms });
    let away = || Err(CloudError::Unreachable("no route".to_owned()));
    let script = [
        Ok(Said::Nothing),
        Ok(Said::Advised),
        leaves(500),
        away(),
        away(),
        leaves(500),
        leaves(400),
        Ok(Said::Advised),
        Ok(Said::Nothing),
    ];
    let expected = [
        Heard::Advice(true),
        Heard::Notice(Some(500)),
        Heard::Advice(false),
        Heard::Notice(Some(400)),
        Heard::Notice(None),
        Heard::Advice(true),
        Heard::Advice(false),
    ];
    let (inputs, mut told) = mpsc::channel(16);
    let watch = watch(Scripted(script.into()), NoticeSource::Aws, inputs);
    let heard = async {
        let mut heard = Vec::new();
        for _ in 0..7 {
            match told.recv().await {
                Some(Input::Notice(change)) => {
                    assert_eq!(change.source, NoticeSource::Aws);
                    heard.push(Heard::Notice(change.deadline_ms));
                }
                Some(Input::Advice(change)) => {
                    assert_eq!(change.source, NoticeSource::Aws);
                    heard.push(Heard::Advice(change.stands));
                }
                other => panic!("expected a notice or advice, got {other:?}"),
            }
        }
        heard
    };
    tokio::select! {
        () = watch => panic!("it watches as long as somebody listens"),
        heard = heard => assert_eq!(heard, expected),
    }
}

#[test]
fn clouds_are_named() {
    for cloud in [Cloud::Aws, Cloud::Gcp, Cloud::Azure] {
        assert_eq!(cloud.to_string().parse(), Ok(cloud));
    }
    let error = "oracle".parse::<Cloud>().unwrap_err().to_string();
    assert!(error.contains("use aws, gcp or azure"), "{error}");
}
