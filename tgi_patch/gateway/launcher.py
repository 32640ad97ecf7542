"""The command line and the variables of text-generation-launcher, read as the launcher reads them."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tgi_patch.settings import (
    Settings,
    SettingsError,
    check_ids,
    check_prefix_caching,
    parse_adapters,
    read_settings,
)

LAUNCHER = "text-generation-launcher"
READ = {"--model-id", "--num-shard", "--sharded", "--lora-adapters", "--api-key", "--payload-limit"}
"""Arguments of the launcher that the gateway reads too."""
PAYLOAD_BYTES = "2000000"
"""The launcher's default of --payload-limit."""
SAGEMAKER = {
    "HF_MODEL_ID": "MODEL_ID",
    "HF_MODEL_REVISION": "REVISION",
    "SM_NUM_GPUS": "NUM_SHARD",
    "HF_MODEL_QUANTIZE": "QUANTIZE",
    "HF_MODEL_TRUST_REMOTE_CODE": "TRUST_REMOTE_CODE",
}
"""SageMaker's variables and the launcher's, as in TGI's sagemaker-entrypoint.sh."""


@dataclass(frozen=True)
class Plan:
    """How the service is started.

    Attributes:
        command: the launcher's, with an inner port on loopback
        environment: the launcher's
        host, port: of the gateway
        upstream: URL of the router
        base_ids: names of the base model
        others: ids of TGI's own LORA_ADAPTERS
        world_size: number of shards
        api_key: what requests have to send as a bearer token; empty is nothing
        body_bytes: size limit of a request body
    """

    command: list[str]
    environment: dict[str, str]
    host: str
    port: int
    upstream: str
    base_ids: set[str]
    others: set[str]
    world_size: int
    api_key: str = field(default="", repr=False)
    body_bytes: int = int(PAYLOAD_BYTES)


def become_launcher_if_disabled(arguments: Sequence[str]) -> None:
    """Replaces this process by TGI's launcher if PREFT_DISABLE=1, whatever else is set. Returns otherwise."""
    try:
        disabled = read_settings().disabled
    except SettingsError:
        return
    if disabled:
        arguments, environment = normalised(arguments, os.environ)
        os.execvpe(LAUNCHER, [LAUNCHER, *arguments], environment)


def normalised(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Returns the launcher's arguments and environment. SageMaker runs `IMAGE serve` with its own variables.

    Raises:
        SettingsError: SageMaker names no model.
    """
    rest = [argument for argument in arguments if argument != "--"]
    if rest != ["serve"]:
        return rest, dict(environment)
    renamed = {name: environment[given] for given, name in SAGEMAKER.items() if environment.get(given)}
    if not (renamed | dict(environment)).get("MODEL_ID"):
        raise SettingsError("`serve` is SageMaker's command, and HF_MODEL_ID is not set: set it to the model to serve")
    return ["--port", "8080"], {**environment, **renamed}


def make_plan(settings: Settings, arguments: Sequence[str], environment: dict[str, str]) -> Plan:
    """Returns how to start the launcher behind the gateway.

    Raises:
        SettingsError: arguments or variables that cannot be followed.
    """
    rest, given = _split(arguments)
    port = public_port(arguments, environment)
    inner = settings.router_port or (port + 10_000 if port < 50_000 else port - 10_000)
    if settings.admin_port in {port, inner}:
        taken = f"{port} is the gateway's and {inner} the router's"
        raise SettingsError(f"PREFT_ADMIN_PORT is {settings.admin_port}, and {taken}: choose another")
    model = given.get("--model-id") or environment.get("MODEL_ID") or "bigscience/bloom-560m"
    others = set(parse_adapters(given.get("--lora-adapters") or environment.get("LORA_ADAPTERS") or ""))
    limit = given.get("--payload-limit") or environment.get("PAYLOAD_LIMIT") or PAYLOAD_BYTES
    if not limit.isdecimal():
        raise SettingsError(f"--payload-limit is {limit!r}: it must be a number of bytes")
    environment = dict(environment, PORT=str(inner))
    if settings.active:
        check_ids(settings.adapters, {model, *settings.base_models}, others)
        check_prefix_caching(environment.get("PREFIX_CACHING", ""))
        environment |= {"PREFIX_CACHING": "0", "PREFT_CONTROL_DIR": str(settings.control)}
    return Plan(
        command=[LAUNCHER, *rest, "--port", str(inner), "--hostname", "127.0.0.1"],
        environment=environment,
        host=given.get("--hostname") or settings.host,
        port=port,
        upstream=f"http://127.0.0.1:{inner}",
        base_ids={model, *settings.base_models},
        others=others,
        world_size=num_shards(
            given.get("--sharded") or environment.get("SHARDED") or "",
            given.get("--num-shard") or environment.get("NUM_SHARD") or "",
            environment,
        ),
        api_key=given.get("--api-key") or environment.get("API_KEY") or "",
        body_bytes=int(limit),
    )


def public_port(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Returns the port that the launcher would listen on.

    Raises:
        SettingsError: it is not a port.
    """
    text = _split(arguments)[1].get("--port") or environment.get("PORT") or "3000"
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise SettingsError(f"--port is {text!r}: it must be a port from 1 to 65535")
    return int(text)


def num_shards(sharded: str, num_shard: str, environment: Mapping[str, str]) -> int:
    """Returns how many shards the launcher starts.

    Source: find_num_shards and num_cuda_devices of the launcher of TGI 3.3.7. The launcher counts the devices that a
        variable names, and asks nvidia-smi only if that is NVIDIA_VISIBLE_DEVICES=all or void, as in its image.
    """
    if num_shard.isdecimal():
        return int(num_shard)
    if sharded == "false":
        return 1
    devices = environment.get("CUDA_VISIBLE_DEVICES")
    if devices is None and "NVIDIA_VISIBLE_DEVICES" in environment:
        devices = environment["NVIDIA_VISIBLE_DEVICES"]
        if devices.strip() in {"all", "void"}:
            return _count_devices(environment)
    elif devices is None:
        devices = environment.get("ZE_AFFINITY_MASK")
    return 1 if devices is None else len(devices.split(","))


def _count_devices(environment: Mapping[str, str]) -> int:
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, env=dict(environment), capture_output=True, text=True).stdout
    except OSError:
        return 1
    return max(sum(bool(line.strip()) for line in shown.splitlines()), 1)


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the launcher's arguments without port and host, and the values of those that the gateway reads."""
    rest: list[str] = []
    given: dict[str, str] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        name, sign, value = argument.partition("=")
        if argument.startswith("-p") and not sign and len(argument) > 2:
            name, sign, value = "-p", "=", argument[2:]
        name = {"-p": "--port"}.get(name, name)
        if name not in {"--port", "--hostname", *READ}:
            rest.append(argument)
            continue
        if not sign:
            if not pending:
                raise SettingsError(f"{name} has no value: give one")
            value = pending.pop(0)
        given[name] = value
        if name in READ:
            rest += [name, value]
    return rest, given
