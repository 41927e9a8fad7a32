//! Numbers in the units in which they are given at the command line, for errors: whoever wrote `--window 25h` is not told of
//! 90000000.
//!
//! Invariant: a text is the number to its last digit, and that of a time is taken where one is given.

/// A time in milliseconds as an option takes it, such as `250ms`, `90s` or `24h`: in the largest unit of which it is a whole
/// number.
pub(crate) fn millis(ms: u64) -> String {
    let units = [(3_600_000, "h"), (60_000, "m"), (1_000, "s")];
    let unit = units.iter().find(|(unit_ms, _)| is_whole(ms, *unit_ms));
    unit.map_or_else(
        || format!("{ms}ms"),
        |(unit_ms, name)| format!("{}{name}", ms / unit_ms),
    )
}

/// A short time in microseconds as an option takes it: `500us` or `2ms`.
pub(crate) fn micros(us: u64) -> String {
    if is_whole(us, 1_000) {
        return format!("{}ms", us / 1_000);
    }
    format!("{us}us")
}

/// An amount of memory, such as `128 MiB`; in KiB or bytes if it is no whole number of those.
pub(crate) fn memory(bytes: u64) -> String {
    let units = [(1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = units.iter().find(|(unit, _)| is_whole(bytes, *unit));
    unit.map_or_else(
        || format!("{bytes} bytes"),
        |(unit, name)| format!("{} {name}", bytes / unit),
    )
}

/// A share or a chance in basis points as a number from 0 to 1, such as `0.05`.
pub(crate) fn share(basis_points: u32) -> String {
    (f64::from(basis_points) / 1e4).to_string()
}

fn is_whole(value: u64, unit: u64) -> bool {
    value >= unit && value.is_multiple_of(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_in_the_largest_unit_that_they_are_whole_in() {
        for (ms, expected) in [
            (0, "0ms"),
            (250, "250ms"),
            (1_000, "1s"),
            (90_000, "90s"),
            (1_500, "1500ms"),
            (1_200_000, "20m"),
            (86_400_000, "24h"),
        ] {
            assert_eq!(millis(ms), expected);
        }
        for (us, expected) in [(0, "0us"), (500, "500us"), (50_001, "50001us")] {
            assert_eq!(micros(us), expected);
        }
        assert_eq!(micros(2_000_000), "2000ms");
        for (bytes, expected) in [
            (7, "7 bytes"),
            (1 << 16, "64 KiB"),
            (1 << 27, "128 MiB"),
            ((1 << 20) + 1, "1048577 bytes"),
        ] {
            assert_eq!(memory(bytes), expected);
        }
        for (basis_points, expected) in [(0, "0"), (1, "0.0001"), (500, "0.05"), (2_000, "0.2")] {
            assert_eq!(share(basis_points), expected);
        }
    }
}
