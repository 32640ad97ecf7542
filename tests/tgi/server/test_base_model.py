"""Base models whose config TGI's transformers reads otherwise than the transformers that wrote it."""

import json
from types import SimpleNamespace

import pytest

from tests.hf.many_adapters import crowd
from tests.tgi.server.test_serving import check
from tests.tgi.server_process import make_tiny_model, request, serving, some_ids
from tgi_patch.server.base_model import check_rope
from tgi_patch.server.target_modules import UnsupportedModel

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("parameters", "read", "missing"),
    [
        ({"rope_theta": 10000.0, "rope_type": "default"}, {"rope_theta": 10000.0}, {}),
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 10000.0}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_type": "default"}, {}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": None}, {"rope_scaling": LLAMA3}),
        ({"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}, {}),
        (
            {"rope_theta": 5e5, **LLAMA3},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 4.0}},
            {"rope_scaling": LLAMA3},
        ),
        (
            {"rope_theta": 1.0, **LONG, "original_max_position_embeddings": 64},
            {
                "rope_theta": 1.0,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
                "original_max_position_embeddings": 64,
            },
            {},
        ),
        ({"rope_theta": 1.0, "partial_rotary_factor": 1.0}, {"rope_theta": 1.0}, {}),
        ({"rope_theta": 1.0, "partial_rotary_factor": 0.5}, {"rope_theta": 1.0}, {"partial_rotary_factor": 0.5}),
        (
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {},
        ),
        (
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 2e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {"rope_local_base_freq": 2e4},
        ),
        (
            {"full_attention": {"rope_theta": 1e6}, "chunked_attention": {"rope_theta": 2e4}},
            {"rope_theta": 1e6},
            {"rope_theta of chunked_attention": 2e4},
        ),
    ],
)
def test_rope_parameters_are_refused_where_tgi_read_something_else(parameters, read, missing):
    config = SimpleNamespace(rope_parameters=parameters, **read)
    if not missing:
        check_rope(config, "org/base")
        return
    with pytest.raises(UnsupportedModel) as caught:
        check_rope(config, "org/base")
    assert json.dumps(missing)[1:-1] in str(caught.value)


def test_a_config_of_transformers_4_has_no_such_field():
    check_rope(SimpleNamespace(rope_theta=5e5, rope_scaling=None), "org/base")
    check_rope(None, "org/base")


@pytest.mark.tgi
def test_a_model_saved_by_transformers_5_is_served_right_or_not_at_all():
    model = make_tiny_model("llama", crowd("llama", rope_theta=3.0))
    file = model.directory / "config.json"
    saved = json.loads(file.read_text())
    assert "rope_theta" not in saved
    with pytest.raises(AssertionError, match=r'add "rope_theta": 3\.0 to config\.json'), serving(model):
        pass
    ids = some_ids(40, 1)
    file.write_text(json.dumps(saved | {"rope_theta": 3.0}))
    with serving(model, "flashdecoding-ipex") as server:
        check(server, model, [(name, ids, 6, {}) for name in (None, "wide", "edit")])
    # TGI alone serves it with its default
    file.write_text(json.dumps(saved))
    with serving(model, "flashdecoding-ipex", PREFT_DISABLE="1") as server:
        assert server.run([request(ids, new=12)]) != [model.expected(None, ids, 12)]
