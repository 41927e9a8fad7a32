//! States from others who give all, some or nothing, and from the driver.

use std::cell::RefCell;
use std::convert::Infallible;

use super::*;
use crate::training::parts::parts_of;

const PART: usize = 10;

fn state(parts: usize) -> Vec<u8> {
    (0..parts * PART).map(|at| (at * at % 251) as u8).collect()
}

/// What was asked for and sent: the parts of an order by number with those who were asked, or the number of a part.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Fetch(std::ops::Range<usize>, Vec<u32>),
    Receive(usize),
}

/// The calls that give a state of so many parts, which trainers 3, 5 and 7 keep; `answer` says what is missing and who has
/// failed of the order that begins with a part.
async fn calls(
    parts: usize,
    answer: impl Fn(usize) -> (Vec<usize>, Vec<u32>),
) -> Result<Vec<Call>, String> {
    let state = state(parts);
    let shared = SharedState {
        step: 4,
        parts: parts_of(&state, PART),
        from: vec![3, 5, 7],
    };
    let calls = RefCell::new(Vec::new());
    let (noted, answer, held) = (&calls, &answer, &state);
    let fetch = |order: Vec<Piece>, from: Vec<u32>| async move {
        let first = order[0].offset as usize / PART;
        let range = first..first + order.len();
        noted.borrow_mut().push(Call::Fetch(range, from));
        let (missing, failed) = answer(first);
        let missing = missing.iter().map(|part| (part * PART) as u64);
        Ok(Fetched {
            missing: missing.collect(),
            failed,
        })
    };
    let receive = |offset: u64, bytes: Vec<u8>| async move {
        let begin = offset as usize;
        if bytes != held[begin..begin + PART] {
            return Err(format!("other bytes from byte {offset} on"));
        }
        noted.borrow_mut().push(Call::Receive(begin / PART));
        Ok(())
    };
    deliver(&state, Some(&shared), fetch, receive).await?;
    Ok(calls.into_inner())
}

#[tokio::test]
async fn a_part_that_nobody_gives_comes_from_the_driver_and_those_behind_it_from_the_others() {
    let calls = calls(40, |first| match first {
        16 => (vec![20, 22], Vec::new()),
        _ => (Vec::new(), Vec::new()),
    });
    let all = vec![3, 5, 7];
    let expected = [
        Call::Fetch(0..16, all.clone()),
        Call::Fetch(16..32, all.clone()),
        Call::Receive(20),
        Call::Receive(22),
        Call::Fetch(32..40, all),
    ];
    assert_eq!(calls.await.unwrap(), expected);
}

#[tokio::test]
async fn who_has_failed_in_an_order_is_not_asked_in_the_next() {
    let calls = calls(66, |first| match first {
        0 => (Vec::new(), vec![5]),
        32 => (vec![47], vec![3, 7]),
        _ => (Vec::new(), Vec::new()),
    });
    let mut expected = vec![
        Call::Fetch(0..16, vec![3, 5, 7]),
        Call::Fetch(16..32, vec![3, 7]),
        Call::Fetch(32..48, vec![3, 7]),
        Call::Receive(47),
    ];
    // Nobody is left to be asked.
    expected.extend((48..66).map(Call::Receive));
    assert_eq!(calls.await.unwrap(), expected);
}

#[tokio::test]
async fn what_is_missing_and_was_not_asked_for_is_not_sent() {
    let calls = calls(20, |first| (vec![19 - first, 1000], Vec::new()));
    let all = vec![3, 5, 7];
    let expected = [Call::Fetch(0..16, all.clone()), Call::Fetch(16..20, all)];
    assert_eq!(calls.await.unwrap(), expected);
}

async fn nobody(_: Vec<Piece>, _: Vec<u32>) -> Result<Fetched, Infallible> {
    unreachable!("nobody shares it")
}

#[tokio::test]
async fn a_state_that_nobody_shares_comes_from_the_driver_in_order() {
    let state = vec![7; 2 * PART_BYTES + 5];
    let sent = RefCell::new(Vec::new());
    let noted = &sent;
    let receive = |offset: u64, bytes: Vec<u8>| async move {
        noted.borrow_mut().push((offset, bytes.len()));
        Ok::<_, Infallible>(())
    };
    deliver(&state, None, nobody, receive).await.unwrap();
    let bytes = PART_BYTES as u64;
    let expected = [(0, PART_BYTES), (bytes, PART_BYTES), (2 * bytes, 5)];
    assert_eq!(sent.into_inner(), expected);
}
