"""The format: what is written is what is read, and everything else is refused with all its faults."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from preft_core.format.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    AdapterError,
    check_header,
    check_shapes,
    config_faults,
    fingerprint,
    load_adapter,
    parse_config,
    publish_files,
    read_config,
    read_header,
    save_adapter,
)
from preft_core.format.plain_lora import to_lora
from preft_core.hub import source
from preft_core.hub.push_pull import pull_adapter
from tests.hf.zoo import make_base, make_preft

METHODS = ["lora", "direft", "loreft"]


def config_of(method: str = "lora", **fields: object) -> AdapterConfig:
    alpha = None if method == "loreft" else 8.0
    targets = ("q_proj",) if method == "lora" else None
    return AdapterConfig(method=method, r=2, lora_alpha=alpha, target_modules=targets, **fields)  # type: ignore[arg-type]


def tensors_of(method: str = "lora", dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        "lora": {"preft_A": (2, 6), "preft_B": (5, 2)},
        "direft": {"preft_A": (2, 6), "preft_B": (6, 2), "preft_bias": (2,)},
        "loreft": {"preft_A": (2, 6), "preft_R": (2, 6), "preft_bias": (2,)},
    }[method]
    inner = "q_proj" if method == "lora" else "preft"
    return {
        f"base_model.model.model.layers.{i}.{inner}.{leaf}": torch.randn(shape, generator=generator).to(dtype)
        for i in (0, 1)
        for leaf, shape in leaves.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_bit_identical(tmp_path, method, dtype):
    tensors = tensors_of(method, dtype)
    mark = save_adapter(tmp_path, config_of(method), tensors)
    adapter = load_adapter(tmp_path)
    assert adapter.fingerprint == mark == adapter.config.fingerprint
    assert list(adapter.tensors) == sorted(tensors)
    assert all(torch.equal(adapter.tensors[name], tensors[name]) for name in tensors)
    assert dataclasses.replace(adapter.config, fingerprint=None) == config_of(method)
    assert adapter.num_bytes == sum(t.nbytes for t in tensors.values())
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]


def test_fingerprint_is_of_the_function_and_nothing_else():
    tensors = tensors_of()
    mark = fingerprint(config_of(), tensors)
    backwards = dict(reversed(tensors.items()))
    assert fingerprint(config_of(base_model_name_or_path="elsewhere", init_weights=False), backwards) == mark
    others = [
        fingerprint(dataclasses.replace(config_of(), lora_alpha=9.0), tensors),
        fingerprint(dataclasses.replace(config_of(), use_rslora=True), tensors),
        fingerprint(config_of(), {name.replace("layers.1", "layers.2"): t for name, t in tensors.items()}),
        fingerprint(config_of(), {name: t.half() for name, t in tensors.items()}),
    ]
    for name in tensors:
        changed = {key: t.clone() for key, t in tensors.items()}
        changed[name].view(torch.int32).flatten()[-1] ^= 1
        others.append(fingerprint(config_of(), changed))
    assert len({mark, *others}) == len(others) + 1


GOOD = json.loads(json.dumps(dataclasses.asdict(config_of())))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", True),
        ("r", 2.0),
        ("r", 10_000_000),
        ("method", "dora"),
        ("method", ["lora"]),
        ("lora_alpha", -1),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("lora_dropout", 1.0),
        ("target_modules", []),
        ("target_modules", "(unclosed"),
        ("target_modules", [1]),
        ("target_modules", None),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", [True]),
        ("use_rslora", 1),
        ("task_type", "SEQ_CLS"),
        ("format_version", 0),
        ("format_version", 2),
        ("fingerprint", "md5:0"),
        ("peft_type", "LORA"),
        ("base_model_name_or_path", 7),
        ("inference_mode", "yes"),
        ("auto_mapping", []),
    ],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(AdapterError, match=field):
        parse_config(GOOD | {field: value})
    assert parse_config(GOOD) == config_of()


def test_unknown_and_missing_fields_and_all_faults_together():
    data = GOOD | {"r": 0, "method": "x", "lora_alhpa": 3}
    del data["format_version"]
    with pytest.raises(AdapterError, match=r"'lora_alhpa', did you mean 'lora_alpha'.*format_version.*method.*r is 0"):
        parse_config(data)
    with pytest.raises(AdapterError, match="JSON object"):
        parse_config([])
    assert config_faults({"lora_alpha": None, "method": "lora"}, resolved=False) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"r": NaN}', "NaN"),
        ('{"r": 1, "r": 2}', "duplicate key"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (" " * (2 << 20), "more than"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    (tmp_path / CONFIG_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterError, match=message):
        read_config(tmp_path)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_config(tmp_path / "nowhere")


def write_header(path, header, num_bytes: int = 0) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))


def info(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        ({"a": info(dtype="F64")}, 16, "dtype F64"),
        ({"a": info(dtype="I8")}, 16, "dtype I8"),
        ({"a": info(shape=(2, 3))}, 16, "not the size"),
        ({"a": info(shape=(-2, -2))}, 16, "non-negative integers"),
        ({"a": info(shape=(1 << 60, 1 << 60))}, 16, "non-negative integers"),
        ({"a": info(offsets=(4, 20))}, 20, "begins at byte 4"),
        ({"a": info(), "b": info(offsets=(8, 24))}, 24, "begins at byte 8"),
        ({"a": info()}, 12, "truncated or padded"),
        ({"a": info()}, 20, "truncated or padded"),
        ({"a": {"dtype": "F32"}}, 0, "exactly dtype"),
        (b'{"a": 1, "a": 2}', 0, "duplicate key"),
        ([], 0, "not a JSON object"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, header, num_bytes, message):
    write_header(tmp_path / "file", header, num_bytes)
    with pytest.raises(AdapterError, match=message):
        read_header(tmp_path / "file")


def test_a_header_longer_than_its_file_is_never_read(tmp_path):
    for claimed in (0, 1 << 40, (1 << 64) - 1):
        (tmp_path / "file").write_bytes(struct.pack("<Q", claimed) + b"{}")
        with pytest.raises(AdapterError, match=str(claimed)):
            read_header(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(AdapterError, match="truncated"):
        read_header(tmp_path / "file")


def rename(old: str, new: str):
    return lambda tensors: tensors.update({name.replace(old, new): tensors.pop(name) for name in list(tensors)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename("preft_A", "lora_A"), "does not have the form"),
        (rename("base_model.model.", ""), "does not have the form"),
        (rename("layers.0.", "layers..0"), "does not have the form"),
        (lambda t: t.pop(min(t)), "missing preft_A"),
        (lambda t: t.update({min(t): t[min(t)][:1]}), r"preft_A \[1, 6\]"),
        (lambda t: t.update({max(t): t[max(t)].T.contiguous()}), "preft_B"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_weights_that_do_not_fit_the_config(tmp_path, edit, message):
    tensors = tensors_of()
    edit(tensors)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match=message):
        check_header(config_of(), read_header(tmp_path / WEIGHTS_NAME))
    with pytest.raises(AdapterError, match=message):
        save_adapter(tmp_path / "new", config_of(), tensors)
    assert not (tmp_path / "new" / CONFIG_NAME).exists()


def test_shapes_against_a_base_model():
    expected = {"a": {"preft_A": (2, 6)}, "b": {"preft_A": (2, 6)}, "c": {"preft_A": (2, 6)}}
    found = {"a": {"preft_A": (2, 6)}, "b": {"preft_A": (2, 7)}, "d": {"preft_A": (2, 6)}}
    with pytest.raises(AdapterError, match=r"missing c.preft_A; unexpected d.preft_A; b.preft_A has shape \[2, 7\]"):
        check_shapes(config_of(), found, expected)
    check_shapes(config_of(), expected, expected)


def test_values_that_cannot_be_used(tmp_path):
    tensors = tensors_of("loreft")
    rotation = next(name for name in tensors if name.endswith("preft_R"))
    tensors[rotation][1] = 3 * tensors[rotation][0]
    with pytest.raises(AdapterError, match="linearly dependent"):
        save_adapter(tmp_path, config_of("loreft"), tensors)
    tensors = tensors_of()
    tensors[min(tensors)][0, 0] = float("inf")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        save_adapter(tmp_path, config_of(), tensors)
    assert os.listdir(tmp_path) == []


def test_tampering_is_found(tmp_path):
    save_adapter(tmp_path, config_of(), tensors_of())
    data = bytearray((tmp_path / WEIGHTS_NAME).read_bytes())
    data[-3] ^= 1
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    with pytest.raises(AdapterError, match="fingerprint"):
        load_adapter(tmp_path)
    save_adapter(tmp_path, config_of(), tensors_of())
    config = json.loads((tmp_path / CONFIG_NAME).read_text()) | {"lora_alpha": 80.0}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="fingerprint"):
        load_adapter(tmp_path)


def test_a_loaded_adapter_stays_when_its_file_is_written_over(tmp_path):
    save_adapter(tmp_path, config_of(), tensors_of())
    adapter = load_adapter(tmp_path)
    size = (tmp_path / WEIGHTS_NAME).stat().st_size
    # as `cp` does: the same file, cut to nothing and filled again
    (tmp_path / WEIGHTS_NAME).write_bytes(bytes(size))
    assert fingerprint(adapter.config, adapter.tensors) == adapter.fingerprint


def test_a_directory_that_is_gone_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "_download", lambda *_: pytest.fail("adapters/tone is a stranger's on the Hub"))
    mark = save_adapter("adapters/tone", config_of(), tensors_of())
    found = source.find_adapter("adapters/tone")
    assert found.location == "adapters/tone"
    # a served adapter is loaded when it is used, wherever the process is then
    monkeypatch.chdir(tmp_path / "adapters")
    assert found.load().fingerprint == mark
    shutil.rmtree("tone")
    with pytest.raises(AdapterError, match="cannot be read"):
        found.load()


def test_a_pickle_is_refused(tmp_path):
    save_adapter(tmp_path, config_of(), tensors_of())
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter(tmp_path)


FILE = save(tensors_of(), {"format": "pt"})


@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), cuts=st.integers(0, 3))
def test_mutated_files_give_an_adapter_or_an_adapter_error(tmp_path, seed, cuts):
    source = random.Random(seed)
    data = bytearray(FILE)
    for _ in range(source.randint(1, 8)):
        # half of the changes hit the header, where the reader's decisions are
        where = source.randrange(8 + 800) if source.random() < 0.5 else source.randrange(len(data))
        data[where % len(data)] = source.randrange(256)
    for _ in range(cuts):
        del data[source.randrange(len(data) + 1) :]
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(GOOD))
    try:
        adapter = load_adapter(tmp_path)
    except AdapterError:
        return
    assert adapter.num_bytes <= len(FILE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=5000)
@given(field=st.sampled_from([*GOOD, "surprise"]), value=json_values)
def test_any_json_gives_a_config_or_an_adapter_error(field, value):
    try:
        config = parse_config(GOOD | {field: value})
    except AdapterError:
        return
    assert config.scaling > 0


def test_publishing_is_all_or_refused(tmp_path, monkeypatch):
    old, new = tmp_path / "adapter", tmp_path / "new"
    save_adapter(old, config_of(), tensors_of(seed=1))
    save_adapter(new, config_of(), tensors_of(seed=2))
    replace, done = os.replace, []

    def stop_at_the_second(source, target):
        if done:
            raise OSError(28, "no space left")
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("preft_core.format.staging.os.replace", stop_at_the_second)
        publish_files(new, old)
    with pytest.raises(AdapterError, match="interrupted"):
        load_adapter(old)


def test_a_killed_save_leaves_the_old_the_new_or_an_error(tmp_path):
    """A process saves two adapters in turn and is killed at a random moment, again and again."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); from tests.core.format.test_adapter import *\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for seed in (1, 2): save_adapter(sys.argv[1], config_of(), tensors_of(seed=seed))"
    )
    marks = {fingerprint(config_of(), tensors_of(seed=seed)) for seed in (1, 2)}
    root = str(Path(__file__).parents[3])
    seen = set()
    for delay in (0.02, 0.031, 0.047):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), root], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        try:
            seen.add(load_adapter(tmp_path).fingerprint)
        except AdapterError as error:
            seen.add("refused" if re.search("interrupted|cannot be read", str(error)) else str(error))
    assert seen <= {*marks, "refused"}


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_both_files_are_for_those_whom_the_umask_lets_read(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_adapter(tmp_path / "a", config_of(), tensors_of())
        pull_adapter(str(tmp_path / "a"), tmp_path / "copy")
        to_lora(tmp_path / "a", tmp_path / "lora")
        make_preft(make_base()).save_pretrained(str(tmp_path / "peft"))
    finally:
        os.umask(before)
    for file in tmp_path.glob("*/adapter_*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file
