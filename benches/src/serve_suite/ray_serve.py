"""Ray Serve with an application that answers with the bytes that it is sent.

Prints `serving at IP:PORT`, and serves until standard input ends.
"""

import socket
import sys

import ray
from ray import serve
from starlette.responses import Response


# Two replicas, as the endpoints of the suite have; each takes more requests at once than Ray's default of five.
@serve.deployment(num_replicas=2, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1})
class Identity:
    async def __call__(self, request):
        return Response(await request.body(), media_type="application/octet-stream")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


port = free_port()
ray.init(include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(Identity.bind())
print(f"serving at 127.0.0.1:{port}", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
