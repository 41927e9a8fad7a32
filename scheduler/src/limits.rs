//! Every bound of the scheduler's tables and passes, in one place, each with its reason.
//!
//! Invariant: a table grows only up to the bound named here; past it a command is refused with
//! `Overloaded`, or the oldest finished row goes.

/// Workers known at once, lost ones included. A pass looks at each of them for each request.
pub const NODES_MAX: u64 = 10_000;

/// Actors that have not ended, in the whole cluster: at about 1 KiB a row, 128 MiB of tables.
pub const LIVE_ACTORS_MAX: u64 = 1 << 17;

/// Jobs that have not ended; each has at least a driver process somewhere.
pub const LIVE_JOBS_MAX: u64 = 10_000;

/// Namespaces with a living job in them: each is a row of some hundred bytes.
pub const NAMESPACES_MAX: u64 = 1024;

/// Jobs in one namespace that keep detached actors: creating one compares its creator's job with each
/// of them, and a namespace has few programs.
pub const DETACHED_JOBS_MAX: usize = 64;

/// Ended jobs kept for people to look at; the oldest goes first, with its actors.
pub const FINISHED_JOBS_KEPT: u64 = 10_000;

/// Ended actors kept for people to look at (drivers stay as long as their job).
pub const FINISHED_ACTORS_KEPT: u64 = 50_000;

/// Actors that one command may create, so that an entry applies within milliseconds.
pub const ACTORS_PER_COMMAND_MAX: usize = 1024;

/// Actors in one gang: it is placed within one pass and one log entry.
pub const GANG_MEMBERS_MAX: usize = 256;

/// Constructor arguments of all actors in one command together: the size of a control frame.
pub const COMMAND_INIT_BYTES_MAX: usize = 1024 * 1024;

/// What jobs and actors that have not ended hold in the tables together, constructors' arguments included: a quarter
/// of what one head can receive as a snapshot (1 GiB). With those below, the answers that sessions keep, and what is
/// bounded in number and small, these tables stay below that: a head that fell behind could never be brought up to
/// date otherwise. What other modules hold is bounded by them, in number.
pub const LIVING_BYTES_MAX: u64 = 256 << 20;

/// Results may go so far beyond, so that jobs still end with one where actors have taken all there is.
pub const RESULTS_HEADROOM_BYTES: u64 = 32 << 20;

/// What ended jobs hold; the oldest goes first. All that are kept may have 6 KiB each.
pub const ENDED_JOBS_BYTES_MAX: u64 = 64 << 20;

/// What ended actors hold; the oldest goes first. All that are kept may have 1 KiB each.
pub const ENDED_ACTORS_BYTES_MAX: u64 = 64 << 20;

/// Arguments and environment of a job together: they are replicated and sent with each start.
pub const JOB_SPEC_BYTES_MAX: usize = 64 * 1024;

/// Arguments of a job, and variables in its environment: each costs eight bytes and more in a row,
/// however short it is.
pub const JOB_SPEC_ENTRIES_MAX: usize = 4096;

/// A job's result: a summary. Bulk results belong into objects or checkpoints.
pub const RESULT_BYTES_MAX: usize = 64 * 1024;

/// Objects that one job keeps: a name for each of its parts, not one for each of its steps.
pub const KEPT_JOB_MAX: u64 = 1000;

/// Their bytes: 256 KiB of digests in the tables.
pub const KEPT_JOB_BYTES_MAX: u64 = 64 << 30;

/// Objects that all jobs together keep: at some 200 bytes a row, 20 MB.
pub const KEPT_TOTAL_MAX: u64 = 100_000;

/// Their bytes: 16 MiB of digests, and half a million blobs, which one sweep of the store can take in.
pub const KEPT_TOTAL_BYTES_MAX: u64 = 4 << 40;

/// Names of nodes, jobs, actors, clients, tokens; keys of labels and placement.
pub const NAME_BYTES_MAX: usize = 128;

/// Labels of a node, and custom resources that it offers.
pub const LABELS_MAX: usize = 64;

/// Calls that may wait in front of one actor: at 1 KiB a call, a gigabyte.
pub const MAILBOX_CAPACITY_MAX: u32 = 1 << 20;

/// Labels, values and custom resources that one request names: 32 KiB of names at the most.
pub const REQUEST_NAMES_MAX: usize = 256;

/// The text inside an exit reason; a longer one is cut, its host's log has all of it. A thousand actors that
/// fail alike leave it twice in each of their rows.
pub const EXIT_TEXT_BYTES_MAX: usize = 1024;

/// Sessions open at once: each may hold [`SESSION_WINDOW`] responses, of [`SESSION_ANSWERS_BYTES_MAX`] together.
pub const SESSIONS_MAX: u64 = 10_000;

/// Those of them that one principal's clients, or the processes of one job, may have: whoever opens one for each
/// command leaves others as many.
pub const SESSIONS_OF_HOLDER_MAX: u64 = SESSIONS_MAX / 2;

/// Responses kept in a session, so that this many calls may overlap.
pub const SESSION_WINDOW: u64 = 64;

/// What the responses of one session have together; the oldest go first, and the newest stays, also where it alone has
/// more. A window of the longest refusals (half a KiB each) fits, and so does the text of the policies (32 KiB): all
/// sessions together have 391 MiB at the most, but for those whose newest answer is larger (all that is known of a
/// version can be 47 KiB).
pub const SESSION_ANSWERS_BYTES_MAX: u64 = 40 * 1024;

/// A session unused for this long, in log time, is forgotten.
pub const SESSION_IDLE_MS: u64 = 60 * 60 * 1000;

/// A session's last use is written at most this often, to spare a write with each command.
pub const SESSION_TOUCH_MS: u64 = 60 * 1000;

/// Join and client tokens at once.
pub const TOKENS_MAX: u64 = 10_000;

/// How much of a token's end is kept for people: 24 bits of a secret of 256.
pub const TOKEN_END_BYTES_MAX: usize = 4;

/// Rows that are cleaned up in passing by one command, so that no command takes long.
pub const SWEEP_ROWS: usize = 128;

/// How often one placement pass asks a node whether it takes an actor: tenths of a second. Only
/// different requests count, so a thousand of them on a thousand nodes.
pub const PASS_CHECKS: usize = 1 << 20;

/// A pass stops looking once it has placed this many; the next pass goes on. Keeps entries small.
pub const PASS_ASSIGNMENTS: usize = 256;

/// Rows of one answer to a list query; the next page begins after the last row.
pub const PAGE_ROWS: usize = 1000;

/// How long actors may take to end when their job ends or is stopped, in milliseconds.
pub const JOB_STOP_GRACE_MS: u64 = 10_000;

/// How long actors may take to leave a draining node, in milliseconds.
pub const DRAIN_GRACE_MS: u64 = 30_000;

/// The largest grace that a command may ask for, and the longest back-off before a restart, in
/// milliseconds: one day.
pub const GRACE_MS_MAX: u64 = 24 * 60 * 60 * 1000;

/// The largest encoded command or query.
pub const PAYLOAD_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Starts of an actor that are remembered; the output of older ones is no longer found.
pub const STARTS_KEPT_MAX: usize = 16;
