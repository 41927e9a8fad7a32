//! Parts from those who give them, who do not, and who give others.

use std::cell::RefCell;

use super::*;

fn state(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * at % 251) as u8).collect()
}

/// The piece as those have it who hold `state`.
fn read(state: &[u8], piece: Piece) -> Vec<u8> {
    let range = piece.range();
    state[range.start as usize..range.end as usize].to_vec()
}

#[test]
fn parts_cover_every_byte_once() {
    for length in [0, 1, 9, 10, 11, 100] {
        let bytes = state(length);
        let parts = parts_of(&bytes, 10);
        assert_eq!(parts.len(), length.div_ceil(10));
        let joined: Vec<u8> = parts.iter().flat_map(|part| read(&bytes, *part)).collect();
        assert_eq!(joined, bytes);
        for part in parts {
            assert_eq!(part.chunk.blake3, Digest::of(&read(&bytes, part)));
        }
    }
}

async fn nobody(_: usize, _: Piece) -> Result<Vec<u8>, String> {
    unreachable!("there is nobody to be asked, or nothing to ask for")
}

const LIMIT: Duration = Duration::from_secs(45);

/// All bytes, where all came.
fn joined(pulled: Pulled) -> Vec<u8> {
    let parts = pulled.parts.into_iter();
    parts.flat_map(|part| part.expect("it came")).collect()
}

#[tokio::test]
async fn every_giver_gives_its_share_and_few_parts_are_under_way() {
    let bytes = state(1000);
    let parts = parts_of(&bytes, 10);
    let counts = RefCell::new(vec![(0usize, 0usize, 0usize); 3]);
    let begin = |giver: usize| {
        let mut counts = counts.borrow_mut();
        let (now, most, all) = &mut counts[giver];
        (*now, *all) = (*now + 1, *all + 1);
        *most = (*most).max(*now);
    };
    let (begin, ended, given) = (&begin, &counts, &bytes);
    let ask = |giver: usize, piece: Piece| async move {
        begin(giver);
        tokio::task::yield_now().await;
        ended.borrow_mut()[giver].0 -= 1;
        Ok::<_, String>(read(given, piece))
    };
    let pulled = pull(&parts, 3, LIMIT, ask).await;
    assert!(pulled.failed.is_empty());
    assert_eq!(joined(pulled), bytes);
    for (now, most, all) in counts.borrow().iter() {
        assert_eq!((*now, *most), (0, IN_FLIGHT_EACH));
        assert!(*all >= 10, "{all} of 100 parts");
    }
    let nothing = pull(&[], 3, LIMIT, nobody).await;
    assert!(joined(nothing).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_part_that_one_does_not_give_is_asked_of_another() {
    let bytes = state(400);
    let parts = parts_of(&bytes, 10);
    let asked = RefCell::new(vec![0usize; 4]);
    let (counts, held) = (&asked, &bytes);
    let ask = |giver: usize, piece: Piece| async move {
        counts.borrow_mut()[giver] += 1;
        let mut part = read(held, piece);
        match giver {
            0 => return Err("it does not keep it".to_owned()),
            1 => part[3] ^= 1,
            2 => std::future::pending::<()>().await,
            _ => tokio::task::yield_now().await,
        }
        Ok(part)
    };
    let begun = Instant::now();
    let pulled = pull(&parts, 4, LIMIT, ask).await;
    let took = begun.elapsed();
    // Those who do not are asked for nothing after that, in this order or another.
    assert_eq!(pulled.failed, [0, 1, 2]);
    assert_eq!(joined(pulled), bytes);
    assert_eq!(asked.into_inner(), [2, 2, 1, parts.len()]);
    // Who says nothing is not waited for until its time is over.
    assert!((ANOTHER_AFTER..PART_MAX).contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn who_takes_long_and_has_nobody_beside_it_is_waited_for_and_stays() {
    let bytes = state(30);
    let parts = parts_of(&bytes, 10);
    let held = &bytes;
    let ask = |_: usize, piece: Piece| async move {
        tokio::time::sleep(2 * ANOTHER_AFTER).await;
        Ok::<_, String>(read(held, piece))
    };
    let pulled = pull(&parts, 1, LIMIT, ask).await;
    assert!(pulled.failed.is_empty());
    assert_eq!(joined(pulled), bytes);
    // What did not come in time is missing, and what did is there.
    let pulled = pull(&parts, 1, 3 * ANOTHER_AFTER, ask).await;
    let came: Vec<bool> = pulled.parts.iter().map(Option::is_some).collect();
    assert_eq!(came, [true, false, false]);
    assert!(
        pulled.reason.starts_with("no answer within 6s"),
        "{pulled:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn on_a_slow_way_that_all_share_every_part_is_asked_once_and_comes() {
    let bytes = state(120);
    let parts = parts_of(&bytes, 10);
    let (way, asked) = (tokio::sync::Mutex::new(()), RefCell::new(0));
    let (taken, count, held) = (&way, &asked, &bytes);
    let ask = |_: usize, piece: Piece| async move {
        *count.borrow_mut() += 1;
        let _turn = taken.lock().await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        Ok::<_, String>(read(held, piece))
    };
    let pulled = pull(&parts, 3, LIMIT, ask).await;
    assert!(pulled.failed.is_empty());
    assert_eq!(joined(pulled), bytes);
    assert_eq!(asked.into_inner(), parts.len());
}

#[tokio::test]
async fn what_nobody_gives_is_missing_and_nothing_else() {
    let bytes = state(50);
    let parts = parts_of(&bytes, 20);
    let held = &bytes;
    let ask = |_: usize, piece: Piece| async move {
        match piece.offset {
            20 => Ok::<_, String>(vec![7; 20]),
            _ => Ok(read(held, piece)),
        }
    };
    let pulled = pull(&parts, 2, LIMIT, ask).await;
    let expected = [
        Some(read(&bytes, parts[0])),
        None,
        Some(read(&bytes, parts[2])),
    ];
    assert_eq!(pulled.parts, expected);
    let why = "one part says little of who does not give it";
    assert!(pulled.failed.is_empty(), "{why}");
    assert!(
        pulled.reason.starts_with("20 bytes with hash "),
        "{pulled:?}"
    );
    let pulled = pull(&parts, 0, LIMIT, nobody).await;
    assert!(pulled.parts.len() == 3 && pulled.parts.iter().all(Option::is_none));
}
