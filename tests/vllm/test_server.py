"""vLLM's OpenAI server with the plugin: several processes, adapters loaded and unloaded while it serves."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.hf.zoo import make_base, make_preft
from tests.tgi.server_process import some_ids
from tests.vllm.engine_process import make_model, server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def ask(client, model, ids, new=8, **others):
    body = {"model": model, "prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body | {"return_token_ids": True} | others)


def tokens(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def test_the_server_loads_serves_and_unloads_adapters(tmp_path):
    model = make_model("llama")
    paths = model.adapters.paths
    make_preft(make_base("llama"), "lora").save_pretrained(tmp_path / "small")
    edit = shutil.copytree(paths["edit"], tmp_path / "edit")
    with server(model, "--lora-modules", f"wide={paths['wide']}", f"edit={edit}") as client:
        load = lambda name, path: client.post(  # noqa: E731
            "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}
        )
        assert load("few", paths["few"]).status_code == 200
        models = [served["id"] for served in client.get("/v1/models").json()["data"]]
        assert models == ["base", "wide", "edit", "few"]

        cases = [(name, some_ids(7 + 5 * i, i)) for i, name in enumerate(["wide", None, "few", "edit"] * 3)]
        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda case: ask(client, case[0] or "base", case[1]), cases))
        for (name, ids), answer in zip(cases, answers, strict=True):
            assert tokens(answer) == model.expected(name, ids, 8), name

        # refused with a reason, and the server goes on
        ids = some_ids(9, 50)
        assert ask(client, "nobody", ids).status_code == 404
        answer = load("small", tmp_path / "small")
        assert answer.status_code >= 400
        assert "the model has" in answer.text
        answer = ask(client, "wide", ids, use_beam_search=True, n=2)
        assert answer.status_code == 400
        assert "prefill-only" in answer.text

        # a name that comes to stand for other content: nothing of the first one is found in the cache
        long = some_ids(70, 51)
        assert tokens(ask(client, "few", long)) == model.expected("few", long, 8)
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "few"}).status_code == 200
        assert ask(client, "few", long).status_code == 404
        assert load("few", paths["stable"]).status_code == 200
        assert tokens(ask(client, "few", long)) == model.expected("stable", long, 8)
        assert tokens(ask(client, "base", long)) == model.expected(None, long, 8)

        # content that changes where it is served from
        shutil.copytree(paths["stable"], edit, dirs_exist_ok=True)
        answer = ask(client, "edit", ids)
        assert answer.status_code == 400
        assert "stands for" in answer.text
        assert tokens(ask(client, "wide", ids)) == model.expected("wide", ids, 8)
