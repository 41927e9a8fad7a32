//! What servers of endpoints say and read in the same way: their description, refusals, and how long a request waits.

use std::time::Duration;

use super::http::RepositoryChange;
use super::oip::{InferRequest, OipError, Parameter, ServerMetadata, wrong_parameter};

/// The parameter that says how long a request waits, in microseconds.
pub(super) const TIMEOUT: &str = "timeout";

/// What a server of endpoints says about itself.
pub(super) fn server_metadata() -> ServerMetadata {
    let extensions = [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "model_repository",
        "statistics",
    ];
    ServerMetadata {
        name: "mobula".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: extensions.map(str::to_owned).to_vec(),
    }
}

/// Why a model comes and goes in another way. An endpoint's token is for asking it; what it answers with is the
/// cluster's to decide.
pub(super) fn repository_fixed(
    model: &str,
    change: RepositoryChange,
    is_endpoint: bool,
) -> OipError {
    let instead = match change {
        RepositoryChange::Load if is_endpoint => format!(
            "`mobula rollout start {model}` takes another version into service, step by step"
        ),
        RepositoryChange::Load => {
            format!("`mobula serve deploy {model}` makes an endpoint of a registered model")
        }
        RepositoryChange::Unload => {
            format!("`mobula serve delete {model}` takes an endpoint down")
        }
    };
    OipError::RepositoryFixed { instead }
}

/// How long the caller waits: the parameter `timeout`, in microseconds as Triton has it; 0 is for ever.
pub(super) fn time_limit(request: &InferRequest) -> Result<Option<Duration>, OipError> {
    match request.parameters.get(TIMEOUT) {
        None | Some(Parameter::Int(0)) => Ok(None),
        Some(Parameter::Int(micros)) if *micros > 0 => {
            Ok(Some(Duration::from_micros(micros.unsigned_abs())))
        }
        Some(other) => {
            let expected = "a number of microseconds";
            Err(wrong_parameter(TIMEOUT, expected, &other.to_json()).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_number_of_microseconds() {
        let limit = |value: Parameter| {
            let mut request = InferRequest::default();
            request.parameters.insert(TIMEOUT.to_owned(), value);
            time_limit(&request).map_err(|error| error.to_string())
        };
        assert_eq!(time_limit(&InferRequest::default()), Ok(None));
        assert_eq!(limit(Parameter::Int(0)), Ok(None));
        let micros = Duration::from_micros(7);
        assert_eq!(limit(Parameter::Int(7)), Ok(Some(micros)));
        assert!(limit(Parameter::Int(-1)).unwrap_err().contains("got -1"));
        let long = limit(Parameter::String("x".repeat(1 << 20))).unwrap_err();
        assert!(long.contains("a number of microseconds"), "{long}");
        // Errors are kept for callers who come back for them.
        assert!(long.len() < 200, "{} bytes", long.len());
    }
}
