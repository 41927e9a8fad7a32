"""Sends the probes to the protocol's server alone and to endpoints of a cluster, compares what comes back, and prints the
section of the page about it.

usage: endpoints.py SERVER TOKEN ENDPOINTS.json

The file has the address and the token of each endpoint, by its name, which is its model's. Exits with 1 when an answer
differs and no reason is given, or a reason is given and nothing differs.
"""

import http.client
import json
import pathlib
import re
import sys

from differences import AT_AN_ENDPOINT
from probes import PROBES, Http
from run import cell, faults_of, label_of, send_grpc, send_http, words_of

# The models that no registered version can be: BF16 is not served, and texts only of encoders, which answer numbers.
NOT_REGISTERED = ["typed_bf16", "typed_bytes"]

# Who is asked about no model, or about one that is not there.
FIRST = "identity"
UNKNOWN = "nobody"

# A call that is not answered in time is no difference, and there may be hundreds of them.
LATE = "DEADLINE_EXCEEDED"

HEAD = """
## At an endpoint

The same calls were sent to endpoints of a cluster and to the implementation above, which has no cluster, and are compared as
above. Each endpoint is a model of the same name: an ONNX file that copies its inputs, registered, deployed with one replica, and
asked at its router. Calls about no model, or about one that is not there, go to `identity`; those about `typed_bf16` and
`typed_bytes` to nobody, as no version takes such tensors and gives them back.
`runtime/cli/tests/it/serving/conformance/endpoints.rs` sends them; the commands above are for this section too.
"""


def model_of(probe):
    """The model that a call names."""
    if isinstance(probe, Http):
        found = re.match("/v2/(repository/)?models/([^/]+)", probe.path)
        return found[2] if found else UNKNOWN
    messages = probe.message if isinstance(probe.message, list) else [probe.message]
    named = [getattr(message, "model_name", "") or getattr(message, "name", "") for message in messages]
    return next(filter(None, named), UNKNOWN)


def answers_of(probe, server, endpoint):
    """What the server and the endpoint, each an address and a token, say."""
    send = send_http if isinstance(probe, Http) else send_grpc
    try:
        said = [send(address, probe, token) for address, token in (server, endpoint)]
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"{label_of(probe)}: {error!r}")
    if any(answer["status"] == LATE for answer, _ in said):
        sys.exit(f"{label_of(probe)}: no answer in time: {said}")
    return said


def main():
    address, token, file = sys.argv[1:]
    endpoints = json.loads(pathlib.Path(file).read_text())
    sent, wrong = [], []
    for probe in PROBES:
        model = model_of(probe)
        if model in NOT_REGISTERED:
            continue
        endpoint = endpoints[FIRST if model == UNKNOWN else model]
        alone, deployed = answers_of(probe, (address, token), (endpoint["address"], endpoint["token"]))
        label = label_of(probe)
        wrong.extend(faults_of(label, AT_AN_ENDPOINT, ("alone", alone), ("endpoint", deployed)))
        sent.append((label, alone[0], deployed[0]))
    labels = [label for label, _, _ in sent]
    wrong.extend(f"no call {label} is sent" for label in AT_AN_ENDPOINT if label not in labels)
    differing = len(AT_AN_ENDPOINT)
    print(HEAD)
    print(f"{len(sent)} calls; {len(sent) - differing} are answered alike, {differing} are not, each for a reason.")
    print("\n| call | without a cluster | endpoint | why |\n|---|---|---|---|")
    for label, alone, deployed in sent:
        if reason := AT_AN_ENDPOINT.get(label):
            print(f"| {cell(label)} | {words_of(alone)} | {words_of(deployed)} | {cell(reason)} |")
    for each in wrong:
        print(each, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
