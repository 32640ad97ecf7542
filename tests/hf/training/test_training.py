"""Training sees what serving does: prompt adapted, response base, gradients of the two-phase computation."""

import copy

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from preft_core.ops import orthonormal_rows
from preft_hf import PrefillMaskCollator, expand_turns
from preft_hf.forward.caches import cache_argument
from preft_hf.layers.checkpointing import CheckpointWithPhase
from tests.hf.cases import case, prompt
from tests.hf.zoo import METHODS, make_base, make_preft

LENGTHS = [(9, 4), (9, 1), (7, 6)]
"""(row length, prompt length)"""


def batch(padding: str = "right") -> dict[str, Tensor]:
    """Returns three rows of different length and prompt, padded."""
    width = max(length for length, _ in LENGTHS)
    ids, labels, mask = (torch.zeros(len(LENGTHS), width, dtype=torch.long) for _ in range(3))
    labels -= 100
    for i, (length, num_prompt) in enumerate(LENGTHS):
        where = slice(0, length) if padding == "right" else slice(width - length, width)
        row = prompt(1, length, seed=20 + i)[0]
        ids[i, where], mask[i, where] = row, 1
        labels[i, where] = row.masked_fill(torch.arange(length) < num_prompt, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def rows(lengths: list[tuple[int, int]] = LENGTHS) -> list[tuple[Tensor, int]]:
    return [(prompt(1, length, seed=20 + i), num_prompt) for i, (length, num_prompt) in enumerate(lengths)]


def two_phase_loss(adapted, base, lengths: list[tuple[int, int]] = LENGTHS) -> Tensor:
    """The loss by hand: each row alone, its prompt through the adapted model, its response through the base model."""
    losses = []
    for ids, num_prompt in rows(lengths):
        cache = DynamicCache(config=base.config)
        first = adapted(input_ids=ids[:, :num_prompt], **cache_argument(cache), use_cache=True).logits[:, -1:]
        rest = base(input_ids=ids[:, num_prompt:], **cache_argument(cache), use_cache=True).logits
        logits = torch.cat([first, rest[:, :-1]], 1)
        losses.append(cross_entropy(logits[0], ids[0, num_prompt:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    ("architecture", "method"), [(a, m) for a in ("llama", "gpt2", "qwen2", "gemma3_text", "lfm2") for m in METHODS]
)
def test_loss_is_that_of_the_two_phases(architecture, method, padding):
    c, inputs = case(architecture, method), batch(padding)
    # what transformers' callers pass with left padding
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = two_phase_loss(c.adapted, c.base)
        found = c.model(**inputs).loss
        wrong = c.adapted(**inputs).loss
    assert abs(found - expected) < 1e-5
    assert abs(wrong - expected) > 1e-3


def differentiable_copy(base, model, method: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Returns a model with the adapter on every token, written with plain hooks, and its weights as leaves."""
    adapted = copy.deepcopy(base)
    config = model.peft_config["default"]
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    for path in {name.rpartition(".")[0] for name in leaves}:
        part = {name.rpartition(".")[2]: t for name, t in leaves.items() if name.rpartition(".")[0] == path}
        module = path.removeprefix("base_model.model.")
        if method == "lora":
            adapted.get_submodule(module).register_forward_hook(
                lambda m, args, out, p=part: out + config.scaling * (args[0] @ p["preft_A"].T) @ p["preft_B"].T
            )
        elif method == "direft":
            adapted.get_submodule(module.removesuffix(".preft")).register_forward_hook(
                lambda m, args, h, p=part: h + config.scaling * (h @ p["preft_A"].T + p["preft_bias"]) @ p["preft_B"].T
            )
        else:

            def edit(m, args, h, p=part):
                q = orthonormal_rows(p["preft_R"])
                return h + (h @ p["preft_A"].T + p["preft_bias"] - h @ q.T) @ q

            adapted.get_submodule(module.removesuffix(".preft")).register_forward_hook(edit)
    return adapted, leaves


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clear(model) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_those_of_the_two_phases(architecture, method):
    base = make_base(architecture).double()
    model = make_preft(copy.deepcopy(base), method).double().train()
    adapted, leaves = differentiable_copy(base, model, method)
    two_phase_loss(adapted, base).backward()
    model(**batch()).loss.backward()
    found = {name.removesuffix(".default"): grad for name, grad in gradients(model).items()}
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        scale = leaf.grad.abs().max()
        # Llama's norm and rotary angles are float32 in a model of doubles: the CPU decides in the seventh digit
        assert (found[name] - leaf.grad).abs().max() <= 1e-5 * scale + 1e-12, name
    assert any(leaf.grad.abs().max() > 1e-6 for leaf in leaves.values())


def checkpointed(model, use_reentrant: bool) -> None:
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        # its name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_gradient(method, when, use_reentrant):
    plain = make_preft(make_base(), method).train()
    other = {name: t[:2] for name, t in batch("left").items()}
    (plain(**batch()).loss + plain(**other).loss).backward()
    expected = gradients(plain)

    base = make_base()
    if when == "before":
        checkpointed(base.train(), use_reentrant)
    model = make_preft(base, method).train()
    if when == "after":
        checkpointed(model.get_base_model(), use_reentrant)
    # two forwards with different masks before one backward: each is recomputed under its own
    (model(**batch()).loss + model(**other).loss).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-6 * grad.abs().max() + 1e-9, name


def test_checkpointing_without_its_guard_would_fail(monkeypatch):
    """The guard matters: a recomputation that meets no phase, or another's, does not pass in silence."""
    model = make_preft(make_base()).train()
    checkpointed(model.get_base_model(), use_reentrant=False)
    monkeypatch.setattr(
        CheckpointWithPhase, "__call__", lambda self, function, *args: self.checkpoint(function, *args)
    )
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        model(**batch()).loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_and_accumulation(method):
    model = make_preft(make_base(), method).train()
    model(**batch()).loss.backward()
    expected = gradients(model)
    clear(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() <= 0.1 * expected[name].norm() + 1e-6, name
    clear(model)
    whole = batch()
    counts = (whole["labels"] != -100).sum(-1)
    for i in range(3):
        part = {name: tensor[i : i + 1] for name, tensor in whole.items()}
        (model(**part).loss * counts[i] / counts.sum()).backward()
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, expected[name], atol=1e-6, rtol=1e-4), name


def packed(lengths: list[tuple[int, int]] = LENGTHS) -> dict[str, Tensor]:
    """The rows one after the other in one row, told apart by their positions."""
    ids = torch.cat([ids for ids, _ in rows(lengths)], 1)
    labels = torch.cat([ids.masked_fill(torch.arange(ids.shape[1]) < n, -100) for ids, n in rows(lengths)], 1)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids, _ in rows(lengths)])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


@pytest.mark.parametrize("method", METHODS)
def test_padding_free_rows_equal_the_samples_alone(method):
    c = case("llama", method)
    longer = [(9, 4), (9, 2), (7, 6)]
    with torch.no_grad():
        # transformers keeps the sequences apart by their positions where no cache is asked for, as in training
        found = c.model(**packed(longer), use_cache=False).loss
        assert abs(found - two_phase_loss(c.adapted, c.base, longer)) < 1e-5
        # a prompt of one token looks like plain text whose first label was taken off
        with pytest.raises(ValueError, match="no prompt token"):
            c.model(**packed(), use_cache=False)
        found = c.model(**packed(), prefill_mask=packed()["labels"] == -100, use_cache=False).loss
        assert abs(found - two_phase_loss(c.adapted, c.base)) < 1e-5


def test_padding_free_rows_of_plain_text_are_refused():
    """TRL takes the label off the first token of each sequence, which would look like a prompt of one token."""
    inputs = packed()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["position_ids"] == 0, -100)
    with pytest.raises(ValueError, match=r"rows \[0\] .* no prompt token"):
        make_preft(make_base()).train()(**inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("give_mask", [True, False])
def test_compiled_training_equals_eager(method, give_mask):
    model = make_preft(make_base(), method).train()
    inputs = batch()
    if give_mask:
        inputs["prefill_mask"] = (inputs["labels"] == -100) & (inputs["attention_mask"] == 1)
    loss = model(**inputs).loss
    loss.backward()
    expected = gradients(model)
    clear(model)
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = compiled(**inputs).loss
    found.backward()
    assert abs(found - loss) < 1e-6
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, expected[name], atol=1e-6, rtol=1e-4), name
    before = len(graphs)
    longer = {name: tensor.clone() for name, tensor in inputs.items()}
    longer["labels"][0, 4:6] = -100
    if give_mask:
        longer["prefill_mask"][0, 4:6] = True
    assert abs(compiled(**longer).loss - model(**longer).loss) < 1e-6
    assert len(graphs) == before
    torch._dynamo.reset()


def test_the_collator_adds_the_mask_that_labels_imply():
    collator = PrefillMaskCollator(lambda features: batch())
    inputs = collator([])
    mask = inputs["prefill_mask"]
    assert mask.dtype == torch.bool
    assert mask.sum(-1).tolist() == [n for _, n in LENGTHS]
    model = make_preft(make_base()).train()
    logits = model(**inputs).logits
    labels = inputs.pop("labels")
    assert torch.equal(model(**inputs).logits, logits)
    plain = PrefillMaskCollator(lambda features: {"input_ids": labels, "labels": batch()["input_ids"]})
    with pytest.raises(ValueError, match="no prompt token"):
        plain([])


def test_expand_turns():
    turns = [{"role": role, "content": str(i)} for i, role in enumerate(["system", "user", "assistant"] * 2)]
    samples = expand_turns(turns)
    assert samples == [
        {"prompt": turns[:2], "completion": [turns[2]]},
        {"prompt": turns[:5], "completion": [turns[5]]},
    ]
    samples[0]["prompt"][0]["content"] = "changed"
    assert turns[0]["content"] == "0"
