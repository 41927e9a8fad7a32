//! Content encodings of bodies: gzip, and deflate (the zlib format, RFC 9110), within bounds.

use std::io::{Read, Write};

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, header};
use flate2::Compression;
use flate2::read::{GzDecoder, ZlibDecoder};
use flate2::write::{GzEncoder, ZlibEncoder};

use super::oip::OipError;

/// The encodings, as a header value.
pub(super) const SUPPORTED: &str = "gzip, deflate";

/// Bodies below this leave as they are: they fit one packet either way.
const DEFLATE_MIN_BYTES: usize = 1024;

/// How a body is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentEncoding {
    Identity,
    Gzip,
    Deflate,
}

/// The encoding a client accepts for its answer; the first it names that exists here.
pub(super) fn accepted(headers: &HeaderMap) -> ContentEncoding {
    let values = headers.get_all(header::ACCEPT_ENCODING);
    let named = values
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|list| list.split(','));
    for item in named {
        let (name, quality) = item.split_once(';').unwrap_or((item, ""));
        let quality = quality
            .trim()
            .strip_prefix("q=")
            .and_then(|value| value.parse::<f32>().ok());
        if quality == Some(0.0) {
            continue;
        }
        match name.trim().to_ascii_lowercase().as_str() {
            "gzip" => return ContentEncoding::Gzip,
            "deflate" => return ContentEncoding::Deflate,
            _ => {}
        }
    }
    ContentEncoding::Identity
}

/// Whether a request's content is encoded, in a way that is known or not.
pub(super) fn is_encoded(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|encoding| !matches!(name_of(encoding).as_str(), "" | "identity"))
}

fn name_of(encoding: &HeaderValue) -> String {
    String::from_utf8_lossy(encoding.as_bytes())
        .trim()
        .to_ascii_lowercase()
}

/// Undoes a request's content encoding.
///
/// # Errors
/// An unknown encoding, damaged data, or more than `max_bytes` of content.
pub(super) fn inflate(
    headers: &HeaderMap,
    body: Bytes,
    max_bytes: usize,
) -> Result<Bytes, OipError> {
    let Some(encoding) = headers.get(header::CONTENT_ENCODING) else {
        return Ok(body);
    };
    let name = name_of(encoding);
    match name.as_str() {
        "" | "identity" => Ok(body),
        "gzip" => read_bounded(GzDecoder::new(&body[..]), max_bytes),
        "deflate" => read_bounded(ZlibDecoder::new(&body[..]), max_bytes),
        _ => Err(OipError::UnsupportedEncoding { encoding: name }),
    }
}

fn read_bounded(decoder: impl Read, max_bytes: usize) -> Result<Bytes, OipError> {
    let limit_bytes = max_bytes as u64;
    let mut content = Vec::new();
    decoder
        .take(limit_bytes + 1)
        .read_to_end(&mut content)
        .map_err(|error| OipError::BodyUnreadable {
            reason: error.to_string(),
        })?;
    if content.len() > max_bytes {
        return Err(OipError::BodyTooLarge { limit_bytes });
    }
    Ok(content.into())
}

/// Encodes an answer if that is worth it, and names the encoding used.
pub(super) fn deflate(encoding: ContentEncoding, body: Vec<u8>) -> (Vec<u8>, Option<&'static str>) {
    if body.len() < DEFLATE_MIN_BYTES {
        return (body, None);
    }
    let in_memory = "writing to memory cannot fail";
    match encoding {
        ContentEncoding::Identity => (body, None),
        ContentEncoding::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(&body).expect(in_memory);
            (encoder.finish().expect(in_memory), Some("gzip"))
        }
        ContentEncoding::Deflate => {
            let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(&body).expect(in_memory);
            (encoder.finish().expect(in_memory), Some("deflate"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn the_first_encoding_that_exists_is_used() {
        for (value, expected) in [
            ("gzip, deflate", ContentEncoding::Gzip),
            ("br, deflate;q=0.5, gzip", ContentEncoding::Deflate),
            ("gzip;q=0, *", ContentEncoding::Identity),
            ("GZIP", ContentEncoding::Gzip),
        ] {
            assert_eq!(
                accepted(&headers(header::ACCEPT_ENCODING, value)),
                expected,
                "{value}"
            );
        }
        assert_eq!(accepted(&HeaderMap::new()), ContentEncoding::Identity);
    }

    #[test]
    fn a_body_is_encoded_unless_it_says_that_it_is_not() {
        for (value, expected) in [
            ("gzip", true),
            ("Deflate", true),
            ("br", true),
            ("identity", false),
            (" IDENTITY ", false),
            ("", false),
        ] {
            let headers = headers(header::CONTENT_ENCODING, value);
            assert_eq!(is_encoded(&headers), expected, "{value:?}");
        }
        assert!(!is_encoded(&HeaderMap::new()));
    }

    #[test]
    fn bodies_round_trip_within_the_limit() {
        let content = vec![7u8; 5_000];
        for (encoding, name) in [
            (ContentEncoding::Gzip, "gzip"),
            (ContentEncoding::Deflate, "deflate"),
        ] {
            let (small, used) = deflate(encoding, content.clone());
            assert_eq!(used, Some(name));
            assert!(small.len() < 100);
            let headers = headers(header::CONTENT_ENCODING, name);
            let small = Bytes::from(small);
            assert_eq!(inflate(&headers, small.clone(), 5_000).unwrap(), content);
            let error = inflate(&headers, small.clone(), 4_999).unwrap_err();
            assert_eq!(error, OipError::BodyTooLarge { limit_bytes: 4_999 });
            let damaged = inflate(&headers, small.slice(..10), 5_000).unwrap_err();
            assert_eq!(damaged.status(), 400);
        }
        assert_eq!(
            deflate(ContentEncoding::Gzip, vec![0; 10]),
            (vec![0; 10], None)
        );
        let unknown = headers(header::CONTENT_ENCODING, "br");
        assert_eq!(
            inflate(&unknown, Bytes::new(), 10).unwrap_err().status(),
            415
        );
    }
}
