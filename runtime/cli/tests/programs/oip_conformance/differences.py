"""The answers that differ from a tritonserver's, and those of endpoints that differ from the protocol's server's; by
`group: name` of the probe, and why."""

MALFORMED = "a malformed request is the caller's to mend, which is what 400 says; with 500 clients blame, and retry, the server"
NOT_FOUND = "what is not there is 404 in every call, as in the calls where a tritonserver says so too"
VERSION = "a version that is no number is not there, which is NOT_FOUND, as by HTTP"
WRAPPED = "a value that does not fit is refused; a tritonserver takes what is left of its bits, and answers for another value"
NO_JSON = "JSON has no such value, and parsers refuse the tritonserver's text; the message names the binary form, which carries it"
TWICE = "which of two wishes for one output counts is not said anywhere"
ORDER = "the protocol has no order; the tritonserver's is that of its model's code, ours that of the request"
SMALL = "an answer below 1 KiB leaves as it is, as it takes one packet either way"
DAMAGED = "damaged data is not read as if it were whole"
FIXED = "503 invites to try again, which cannot help; the message names the command that does it"

DIFFERENCES = {
    **dict.fromkeys(
        [
            "model: identity/versions/7/ready",
            "model: unknown model/ready",
            "model: identity/versions/7/stats",
            "model: unknown model/stats",
            "gRPC: model: ModelStatistics, version 7",
            "gRPC: model: ModelStatistics, unknown model",
        ],
        NOT_FOUND,
    ),
    **dict.fromkeys(
        [f"gRPC: model: {call}, version one" for call in ("ModelMetadata", "ModelConfig", "ModelStatistics")], VERSION
    ),
    "gRPC: model: ModelReady, version one": "a version that is not there is not ready, whatever it is called",
    **dict.fromkeys(
        [
            "infer: refused: a body that is no JSON",
            "infer: refused: JSON that is cut off",
            "infer: refused: JSON that is a list",
            "infer: refused: no inputs",
            "infer: refused: inputs that are no list",
            "infer: refused: an input without a name",
            "infer: refused: an input without a shape",
            "infer: refused: an input without a datatype",
            "infer: refused: a dimension below zero",
            "infer: refused: a shape of text",
            "infer: refused: fewer values than the shape",
            "infer: refused: more values than the shape",
            "infer: refused: text among numbers",
            "infer: refused: null among numbers",
            "infer: refused: truth among numbers",
            "infer: refused: data that is no list",
            "infer: refused: an id that is no text",
            "infer: binary: binary_data_output that is a number",
            "infer: binary: binary_data that is text",
            "infer: binary: binary_data_size that is text",
            "infer: binary: binary_data_size below zero",
            "infer: binary: a header length that is one short",
            "compression: a deflate request that is cut off",
            "datatypes: UINT8 of -1",
            "datatypes: INT64 of 9223372036854775808",
            "datatypes: INT32 of 1.5",
            "datatypes: BOOL of 1",
            "datatypes: BYTES of 1",
            "classification: below zero",
            "classification: as text",
            "repository: index, ready that is text",
            "repository: index, no JSON",
        ],
        MALFORMED,
    ),
    **dict.fromkeys(
        [
            "infer: refused: a number too large for FP32",
            "datatypes: UINT8 of 256",
            "datatypes: INT8 of 128",
            "gRPC: datatypes: UINT8 of 256",
            "gRPC: datatypes: INT8 of 128",
        ],
        WRAPPED,
    ),
    **dict.fromkeys(["infer: binary: NaN in, JSON out", "datatypes: BYTES that are no UTF-8, JSON out"], NO_JSON),
    **dict.fromkeys(["infer: refused: an output twice", "gRPC: infer: an output twice"], TWICE),
    **dict.fromkeys(
        ["infer: JSON: two outputs in the other order", "gRPC: infer: two outputs in the other order"], ORDER
    ),
    **dict.fromkeys(
        [
            "compression: a gzip answer",
            "compression: gzip both ways, binary",
            "compression: a deflate answer",
            "compression: deflate both ways, binary",
            "compression: a small answer in any of two encodings",
        ],
        SMALL,
    ),
    "compression: a gzip request that is cut off": DAMAGED,
    "compression: an unknown encoding": "415 is the status of a content encoding that is not known (RFC 9110)",
    "infer: binary: raw bytes without JSON, two rows": "the bytes of whole rows leave no doubt about their number",
    "datatypes: FP16 as JSON": "a number of JSON has a nearest FP16, so it is taken, as for FP32",
    "datatypes: BYTES without JSON": "a single text is the only element of a shape with an open dimension",
    "gRPC: infer: a raw tensor too many": "bytes that belong to no input are a mistake of the caller's",
    **dict.fromkeys(
        [
            "repository: load of a model",
            "repository: load of an unknown model",
            "repository: unload of a model",
            "repository: unload of an unknown model",
            "repository: load with another configuration",
            "gRPC: repository: Load of a model",
            "gRPC: repository: Load of an unknown model",
            "gRPC: repository: Unload of a model",
            "gRPC: repository: Unload of an unknown model",
        ],
        FIXED,
    ),
}

BATCH = "the first dimension of a graph, if it is open, is the batch"
OWN = "an endpoint's token shows that endpoint, and no other"

AT_AN_ENDPOINT = {
    "datatypes: no elements": f"{BATCH}, and a batch has a row at the least",
    "classification: of a model that does not batch": f"{BATCH}, and each row has classes of its own",
    **dict.fromkeys(
        [
            "repository: index",
            "repository: index, an empty object",
            "repository: index of what is ready",
            "gRPC: repository: index",
            "gRPC: repository: index of what is ready",
        ],
        OWN,
    ),
}
