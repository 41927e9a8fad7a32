//! Durations as people write them.

/// Milliseconds of a duration such as `500ms`, `10s`, `5m`, `24h`.
pub(crate) fn parse_duration_ms(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => {
            return Err(format!(
                "`{text}` is not a duration: write 500ms, 10s, 5m or 24h"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a duration: write 500ms or 10s"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("`{text}` is too long: write a shorter one, such as 24h"))
}

/// Minutes, also parts of one: up to some seventy days, so that they fit any clock.
pub(crate) fn parse_minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.0..=1e5).contains(&minutes) => Ok(minutes),
        _ => Err(format!(
            "`{text}` is not a number of minutes: write 10 or 0.5, and 100000 at the most"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_name_their_unit() {
        assert_eq!(parse_duration_ms("500ms"), Ok(500));
        assert_eq!(parse_duration_ms("24h"), Ok(86_400_000));
        assert!(parse_duration_ms("10").is_err());
        assert!(parse_duration_ms("s").is_err());
    }

    #[test]
    fn minutes_are_finite_and_none_is_negative() {
        assert_eq!(parse_minutes("0.5"), Ok(0.5));
        for text in ["-1", "nan", "inf", "1e6", "5m", ""] {
            assert!(parse_minutes(text).is_err(), "{text}");
        }
    }
}
