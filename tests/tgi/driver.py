"""A stand-in for TGI's router over the server's gRPC. Batches are scripted, so that a test knows what ran together.

Run by TGI's Python. Its argument is JSON: {"model", "sockets", "world_size", "environment", "arguments"}. It starts
the shards, then responds to JSON lines on stdin: {"op": "run", "requests": [...]}, {"op": "control", "request": ...}.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from text_generation_server.pb import generate_pb2 as pb
from text_generation_server.pb import generate_pb2_grpc as pb_grpc

from tgi_patch.server.control import ask

BLOCK = {"paged": 16, "flashdecoding-ipex": 64}
NUM_BLOCKS = 256
GREEDY = pb.NextTokenChooserParameters(temperature=1.0, repetition_penalty=1.0, top_p=1.0, typical_p=1.0)


class Server:
    def __init__(self, model, sockets, world_size, environment, arguments):
        self.world_size = world_size
        self.control = Path(sockets) / "control"
        shared = dict(
            os.environ, OMP_NUM_THREADS="1", CUDA_MEMORY_FRACTION="0.05", PREFT_CONTROL_DIR=str(self.control)
        )
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": environment.pop("MASTER_PORT", "29555")} | environment
        shared["WORLD_SIZE"] = str(world_size)
        self.block_size = BLOCK[shared["ATTENTION"]]
        command = [sys.executable, str(Path(__file__).with_name("shard.py")), "serve", model]
        command += ["--uds-path", f"{sockets}/tgi", *arguments, *(["--sharded"] if world_size > 1 else [])]
        self.processes = [
            subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stdout=sys.stderr)
            for rank in range(world_size)
        ]
        self.stubs = [self._connect(f"{sockets}/tgi-{rank}") for rank in range(world_size)]
        self.free = list(range(1, NUM_BLOCKS))
        self.next_id = 1
        self.chunks = self.call("Info", pb.InfoRequest()).support_chunking

    def _connect(self, path):
        deadline = time.monotonic() + 120
        while not os.path.exists(path):
            if any(process.poll() is not None for process in self.processes):
                raise SystemExit("a shard ended: see above")
            if time.monotonic() > deadline:
                raise SystemExit("the server did not start in 120 s")
            time.sleep(0.1)
        channel = grpc.insecure_channel(f"unix://{path}")
        grpc.channel_ready_future(channel).result(timeout=30)
        return pb_grpc.TextGenerationServiceStub(channel)

    def call_all(self, method, request):
        futures = [getattr(stub, method).future(request) for stub in self.stubs]
        try:
            return [future.result(timeout=120) for future in futures]
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                # a crash shows as a closed connection: the log has to say which side closed it
                codes = [process.poll() for process in self.processes]
                print(f"{method}: {error.details()}; exit codes of the shards: {codes}", file=sys.stderr, flush=True)
            raise

    def call(self, method, request):
        return self.call_all(method, request)[0]

    def warm_up(self, max_prefill_tokens):
        request = self.request({"text": "<5> <6> <7>", "new": 4}, with_blocks=False)
        batch = pb.Batch(id=0, requests=[request], size=1, max_tokens=64, max_blocks=8)
        self.call_all(
            "Warmup",
            pb.WarmupRequest(
                batch=batch, max_input_tokens=200, max_prefill_tokens=max_prefill_tokens, max_total_tokens=256
            ),
        )
        self.call_all("ClearCache", pb.ClearCacheRequest())

    def request(self, spec, with_blocks=True):
        blocks = []
        if with_blocks:
            length = len(spec["text"].split()) + spec["new"] + 8
            blocks = [self.free.pop(0) for _ in range(-(-length // self.block_size))]
        size = self.block_size
        slots = [slot for block in blocks for slot in range(block * size, (block + 1) * size)]
        fields = {} if spec.get("chunk") is None else {"chunk_len": spec["chunk"]}
        if spec.get("adapter") is not None:
            fields["adapter_id"] = spec["adapter"]
        made = pb.Request(
            id=self.next_id,
            input_chunks=pb.Input(chunks=[pb.InputChunk(text=spec["text"])]),
            inputs=spec["text"],
            truncate=200,
            add_special_tokens=False,
            parameters=GREEDY,
            stopping_parameters=pb.StoppingCriteriaParameters(max_new_tokens=spec["new"], ignore_eos_token=True),
            blocks=blocks,
            slots=slots,
            cache_len=spec.get("cached", 0),
            prefill_logprobs=spec.get("logprobs", False),
            **fields,
        )
        self.next_id += 1
        return made


@dataclass
class Run:
    """Runs requests in one continuous batch; each joins at its step `arrive`."""

    server: Server
    specs: list
    tokens: dict = field(default_factory=dict)
    index: dict = field(default_factory=dict)
    blocks: dict = field(default_factory=dict)
    done: set = field(default_factory=set)
    cached: object = None
    most: int = 0
    prompt_tokens: int = 0
    batch_id: int = 100

    def run(self):
        waiting = sorted(range(len(self.specs)), key=lambda i: self.specs[i].get("arrive", 0))
        step = 0
        while waiting or self.cached is not None:
            arrivals = [i for i in waiting if self.specs[i].get("arrive", 0) <= step]
            waiting = [i for i in waiting if i not in arrivals]
            if arrivals:
                self.prefill(arrivals)
            elif self.cached is not None:
                self.take(self.server.call_all("Decode", pb.DecodeRequest(batches=[self.cached])))
            self.shrink(step)
            step += 1
        return [self.tokens[i] for i in range(len(self.specs))]

    def prefill(self, arrivals):
        requests = []
        for i in arrivals:
            request = self.server.request(self.specs[i])
            self.index[request.id] = i
            self.blocks[i] = list(request.blocks)
            self.tokens[i] = []
            requests.append(request)
        self.batch_id += 1
        batch = pb.Batch(id=self.batch_id, requests=requests, size=len(requests), max_tokens=512, max_blocks=64)
        if self.cached is not None and self.server.chunks:
            self.take(self.server.call_all("Prefill", pb.PrefillRequest(batch=batch, cached_batch=self.cached)))
            return
        before = self.cached
        self.take(self.server.call_all("Prefill", pb.PrefillRequest(batch=batch)))
        self.shrink(-1)
        if before is not None:
            batches = [before, *([self.cached] if self.cached is not None else [])]
            self.take(self.server.call_all("Decode", pb.DecodeRequest(batches=batches)))

    def take(self, responses):
        for response in responses:
            for generation in response.generations:
                i = self.index[generation.request_id]
                self.tokens[i] += list(generation.tokens.ids)
                self.prompt_tokens += len(generation.prefill_tokens.ids)
                self.most = max(self.most, len(generation.tokens.ids))
                if generation.HasField("generated_text"):
                    self.done.add(generation.request_id)
        self.cached = responses[0].batch if responses[0].HasField("batch") else None

    def shrink(self, step):
        if self.cached is None:
            self.give_back(self.index)
            return
        dropped = {r for r, i in self.index.items() if 0 <= self.specs[i].get("drop", 1 << 30) <= step}
        keep = [r for r in self.cached.request_ids if r not in self.done | dropped]
        if keep and len(keep) < len(self.cached.request_ids):
            request = pb.FilterBatchRequest(batch_id=self.cached.id, request_ids=keep)
            self.cached = self.server.call("FilterBatch", request).batch
        elif not keep:
            self.server.call_all("ClearCache", pb.ClearCacheRequest(id=self.cached.id))
            self.cached = None
        self.give_back([r for r in self.index if self.cached is None or r not in self.cached.request_ids])

    def give_back(self, requests):
        for request in list(requests):
            self.server.free += self.blocks.pop(self.index[request], [])


def main():
    setting = json.loads(sys.argv[1])
    responses = os.fdopen(os.dup(1), "w")
    prefill_tokens = setting.pop("max_prefill_tokens", 512)
    server = Server(**setting)
    try:
        server.warm_up(prefill_tokens)
        print(json.dumps({"ready": True, "chunks": server.chunks}), file=responses, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            try:
                if command["op"] == "run":
                    run = Run(server, command["requests"])
                    response = {"tokens": run.run(), "most": run.most, "prompt_tokens": run.prompt_tokens}
                else:
                    ranks = range(server.world_size)
                    response = {"ranks": [ask(server.control, rank, command["request"]) for rank in ranks]}
            except grpc.RpcError as error:
                server.call_all("ClearCache", pb.ClearCacheRequest())
                response = {"error": f"{error.code().name}: {error.details()}"}
            print(json.dumps(response), file=responses, flush=True)
    finally:
        for process in server.processes:
            process.kill()
        for process in server.processes:
            process.wait(timeout=20)


if __name__ == "__main__":
    main()
