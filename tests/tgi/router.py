"""A stand-in for TGI's launcher and router: an HTTP face over the server's gRPC, with batches that grow and shrink.

Run by TGI's Python as `text-generation-launcher`. It has just what a client of TGI sees: generate, generate_stream and
the OpenAI routes. Like the router, it fails every request of a batch when a call fails.
"""

import argparse
import asyncio
import json
import os
import queue
import tempfile
import threading

import grpc
from aiohttp import web
from driver import Run, Server
from text_generation_server.pb import generate_pb2 as pb


class Engine(Run):
    """Batches in a thread; each request has a queue of (token ids, failure) for the event loop."""

    def __init__(self, server, loop):
        super().__init__(server, [])
        self.loop = loop
        self.waiting = queue.Queue()
        self.listeners = {}
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while True:
            arrivals = [self.waiting.get()] if self.cached is None else []
            while not self.waiting.empty():
                arrivals.append(self.waiting.get())
            indices = []
            for spec, listener in arrivals:
                self.specs.append(spec)
                indices.append(len(self.specs) - 1)
                self.listeners[indices[-1]] = listener
            try:
                if indices:
                    self.prefill(indices)
                else:
                    self.take(self.server.call_all("Decode", pb.DecodeRequest(batches=[self.cached])))
                self.deliver()
                self.shrink(0)
            except grpc.RpcError as error:
                for i in list(self.listeners):
                    self.tell(i, None, error.details())
                    self.listeners.pop(i, None)
                self.server.call_all("ClearCache", pb.ClearCacheRequest())
                self.cached = None
                self.give_back(self.index)

    def deliver(self):
        done = {self.index[r] for r in self.done}
        for i in list(self.listeners):
            if self.tokens.get(i):
                self.tell(i, self.tokens[i], None)
                self.tokens[i] = []
            if i in done:
                self.tell(i, None, None)
                self.listeners.pop(i)

    def tell(self, i, tokens, failure):
        self.loop.call_soon_threadsafe(self.listeners[i].put_nowait, (tokens, failure))


async def tokens_of(request, spec):
    listener = asyncio.Queue()
    request.app["engine"].waiting.put((spec, listener))
    try:
        while True:
            tokens, failure = await listener.get()
            if failure is not None:
                raise RuntimeError(failure)
            if tokens is None:
                return
            for token in tokens:
                yield token
    finally:
        # a client that went away: its request leaves the batch
        spec["drop"] = 0


def text_of(token):
    return f"<{token}>"


async def generate(request):
    body = await request.json()
    parameters = body.get("parameters") or {}
    spec = {
        "text": body["inputs"],
        "new": parameters.get("max_new_tokens", 5),
        "adapter": parameters.get("adapter_id"),
    }
    if request.path == "/generate_stream" or body.get("stream"):
        return await streamed(
            request, spec, lambda t: {"token": {"id": t, "text": text_of(t)}, "generated_text": None}
        )
    try:
        ids = [token async for token in tokens_of(request, spec)]
    except RuntimeError as error:
        return web.json_response({"error": str(error), "error_type": "generation"}, status=424)
    tokens = [{"id": i, "text": text_of(i), "logprob": 0.0, "special": False} for i in ids]
    answer = {"generated_text": " ".join(map(text_of, ids)), "details": {"tokens": tokens}}
    return web.json_response([answer] if request.path == "/" else answer)


async def openai(request):
    body = await request.json()
    chat = "chat" in request.path
    text = " ".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
    name = None if body["model"] == "tgi" else body["model"]
    spec = {"text": text, "new": body.get("max_tokens", 5), "adapter": name}
    shared = {"id": "", "created": 0, "model": body["model"], "system_fingerprint": "stand-in"}
    if body.get("stream"):
        return await streamed(
            request,
            spec,
            lambda t: (
                shared
                | {
                    "object": "chat.completion.chunk",
                    "choices": [
                        {"index": 0, "delta": {"role": "assistant", "content": text_of(t)}, "finish_reason": None}
                    ],
                }
            ),
        )
    try:
        said = "".join([text_of(token) async for token in tokens_of(request, spec)])
    except RuntimeError as error:
        return web.json_response({"error": {"message": str(error), "http_status_code": 424}}, status=424)
    choice = {"index": 0, "finish_reason": "length", "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    kind = "chat.completion" if chat else "text_completion"
    return web.json_response(shared | {"object": kind, "choices": [choice], "usage": usage})


async def streamed(request, spec, event):
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    try:
        async for token in tokens_of(request, spec):
            await response.write(f"data:{json.dumps(event(token))}\n\n".encode())
    except RuntimeError as error:
        await response.write(f"data:{json.dumps({'error': str(error), 'error_type': 'generation'})}\n\n".encode())
    if request.path.startswith("/v1/"):
        await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def application(options):
    app = web.Application()
    sockets = tempfile.mkdtemp(prefix="preft-r-")
    control = os.environ["PREFT_CONTROL_DIR"]
    environment = {"PREFT_CONTROL_DIR": control}
    server = await asyncio.to_thread(Server, options.model_id, sockets, options.num_shard, environment, [])
    await asyncio.to_thread(server.warm_up, 64)
    app["engine"] = Engine(server, asyncio.get_running_loop())

    async def end(app):
        for process in server.processes:
            process.kill()

    async def fine(request):
        return web.json_response({"model_id": options.model_id, "in_flight": len(app["engine"].listeners)})

    async def metrics(request):
        return web.Response(text="# HELP tgi_request_count Requests\ntgi_request_count 1\n")

    app.on_cleanup.append(end)
    for path in ("/", "/generate", "/generate_stream"):
        app.router.add_post(path, generate)
    for path in ("/v1/chat/completions", "/v1/completions"):
        app.router.add_post(path, openai)
    for path in ("/health", "/info"):
        app.router.add_get(path, fine)
    app.router.add_get("/metrics", metrics)
    return app


parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--hostname")
parser.add_argument("--model-id")
parser.add_argument("--num-shard", type=int, default=1)
options = parser.parse_args()
web.run_app(application(options), host=options.hostname, port=options.port, handler_cancellation=True, print=None)
