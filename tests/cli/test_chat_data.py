"""Rows of messages: what is trained is what the chat template writes for them, nothing is left out in silence."""

import json
from typing import Any

import pytest

from preft_hf import expand_turns
from preft_hf.training.data import encode_prompts, encode_turns
from preft_hf.training.turns import DataError, Turn, read_turns
from tests.hf.training.test_trainers import tokenizer

CHAT = (
    "{% for tool in tools or [] %}{{ 'w50 ' + tool.function.name + ' ' }}{% endfor %}"
    "{% for m in messages %}{{ {'user': 'w60 ', 'assistant': 'w61 ', 'tool': 'w62 '}[m.role] }}"
    "{% if m.reasoning_content and loop.last %}{{ 'w59 ' + m.reasoning_content + ' ' }}{% endif %}"
    "{% if m.content %}{{ m.content + ' ' }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ 'w51 ' + call.function.name + ' ' + call.function.arguments + ' ' }}"
    "{% endfor %}{{ 'w02 ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w61 ' }}{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "w20", "arguments": "w21"}}]
TOOLS = [{"type": "function", "function": {"name": "w22"}}]
USER = {"role": "user", "content": "w05"}


def chat_tokenizer(template: str = CHAT) -> Any:
    words = tokenizer()
    words.chat_template = template
    return words


def write(path, *rows: Any) -> Any:
    file = path / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize("content", ["", None, "missing", "w33"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_samples_are_what_the_template_writes(tools, content, tmp_path):
    called: dict[str, Any] = {"role": "assistant", "content": content, "tool_calls": CALL}
    if content == "missing":
        del called["content"]
    answer = {"role": "assistant", "content": "w31", "reasoning_content": "w40"}
    row = {"messages": [USER, called, {"role": "tool", "content": "w30"}, answer], "tools": tools}
    words = chat_tokenizer()
    samples, num_long = encode_turns(read_turns(write(tmp_path, row)), words, 64)
    assert num_long == 0
    assert len(samples) == 2
    for sample, turn in zip(samples, expand_turns(row["messages"]), strict=True):
        served = words.apply_chat_template(turn["prompt"], tools=tools, tokenize=False, add_generation_prompt=True)
        whole = words.apply_chat_template([*turn["prompt"], *turn["completion"]], tools=tools, tokenize=False)
        prompt = words(served, add_special_tokens=False)["input_ids"]
        assert sample["input_ids"] == words(whole, add_special_tokens=False)["input_ids"]
        assert sample["labels"] == [-100] * len(prompt) + sample["input_ids"][len(prompt) :]
        assert sample["input_ids"][: len(prompt)] == prompt
    said = [words.decode([label for label in sample["labels"] if label != -100]).split() for sample in samples]
    assert said == [[*(["w33"] if content == "w33" else []), "w51", "w20", "w21", "w02"], ["w59", "w40", "w31", "w02"]]
    assert ("w22" in words.decode(samples[0]["input_ids"])) == (tools is not None)


def test_tools_reach_prompts_that_wait_for_an_answer(tmp_path):
    turns = read_turns(write(tmp_path, {"messages": [USER], "tools": TOOLS}), prompts_alone=True)
    assert turns == [Turn([USER], "", 1, TOOLS)]
    assert encode_prompts(turns, chat_tokenizer(), 64) == ([[50, 22, 60, 5, 2, 61]], 0)
    empty = {"role": "assistant", "content": ""}
    answered = [{"messages": [USER, empty]}, {"messages": [USER, empty | {"tool_calls": CALL}]}]
    turns = read_turns(write(tmp_path, *answered), prompts_alone=True)
    assert [turn.is_open for turn in turns] == [True, False]


def test_what_cannot_be_kept_is_refused_by_its_line(tmp_path):
    answer = {"role": "assistant", "content": "w06"}
    good = {"messages": [USER, answer]}
    rows = [good, good | {"tools": "[]"}, good | {"documents": ["w07"]}]
    rows += [{"prompt": "w05", "response": "w06", "tools": TOOLS}]
    with pytest.raises(
        DataError, match=r"jsonl: line 2: 'tools' is no list.*line 3: has documents.*line 4: .*'tools'"
    ):
        read_turns(write(tmp_path, *rows))
    plain = "{% for m in messages %}{{ m.content }} w02 {% endfor %}"
    for part in ({"tool_calls": CALL}, {"reasoning_content": "w40"}):
        turns = read_turns(write(tmp_path, good, {"messages": [USER, answer | part]}))
        with pytest.raises(DataError, match=rf"data: line 2: .* leaves {next(iter(part))} of message 1 out"):
            encode_turns(turns, chat_tokenizer(plain), 64)


def test_messages_that_the_template_refuses_are_named_by_their_line():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    words = chat_tokenizer(template + "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    system = [{"role": "system", "content": "w04"}, USER]
    # no content, which the template cannot do without
    calls = {"role": "assistant", "content": None, "tool_calls": CALL}
    turns = [Turn(system, "w06", 1), Turn([USER], "w06", 2), Turn(system, "w06", 3), Turn([USER, calls], "w06", 4)]
    message = r"line 1: .*System role not supported.*; line 3: .*System role.*; line 4: .*no attribute 'content'"
    with pytest.raises(DataError, match=message):
        encode_turns(turns, words, 64)
    with pytest.raises(DataError, match=message):
        encode_prompts(turns, words, 64)


def test_rows_that_are_no_text_are_named_by_their_line(tmp_path):
    half = '{"prompt": "a\\ud83d", "response": "b"}'
    in_messages = json.dumps({"messages": [USER, {"role": "assistant", "content": "\udc00"}]})
    whole = '{"prompt": "a\\ud83d\\ude00", "response": "b"}'
    deep = '{"prompt": "a", "response": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(DataError) as caught:
        read_turns(write(tmp_path, whole, half, in_messages, deep))
    assert "line 1" not in str(caught.value)
    for expected in (r"line 2: has '\ud83d', half of a character", r"line 3: has '\udc00'", "line 4: its lists"):
        assert expected in str(caught.value)
    assert read_turns(write(tmp_path, whole)) == [Turn("a\U0001f600", "b", 1)]


def test_marked_messages_are_context_and_are_not_learned(tmp_path):
    answers = [{"role": "assistant", "content": f"w{30 + i}"} for i in range(6)]
    marks: list[dict[str, Any]] = [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_weight": 0.0}]
    marks += [{"weight": 1, "train": True, "loss": True, "loss_weight": 1.0}, {"loss": None}]
    messages = [m for answer, mark in zip(answers, marks, strict=True) for m in (USER | {"weight": 0}, answer | mark)]
    turns = read_turns(write(tmp_path, {"messages": messages, "id": 7, "system": None}))
    plain = [m for answer in answers for m in (USER, answer)]
    assert turns == [Turn(plain[:9], answers[4], 1), Turn(plain[:11], answers[5], 1)]
    samples, _ = encode_turns(turns, chat_tokenizer(), 64)
    learned = [[label for label in sample["labels"] if label >= 0] for sample in samples]
    assert learned == [[34, 2], [35, 2]]
    asked = [USER, answers[0] | {"train": False}, USER]
    assert read_turns(write(tmp_path, {"messages": asked}), prompts_alone=True) == [
        Turn([USER, answers[0], USER], "", 1)
    ]


ANSWER = {"role": "assistant", "content": "w06"}
NOT_READ: dict[str, tuple[dict[str, Any], str]] = {
    "weight": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight is 0.5: it is 1 or 0"),
    "train": ({"messages": [USER, ANSWER | {"train": "no"}]}, "train is 'no': it is True or False"),
    "loss": ({"messages": [USER, ANSWER | {"loss": "no"}]}, "loss is 'no': it is True or False"),
    "loss_weight": ({"messages": [USER, ANSWER | {"loss_weight": 0.5}]}, "loss_weight is 0.5: it is 1 or 0"),
    "a learned prompt": ({"messages": [USER | {"train": True}, ANSWER]}, "train is True on a message of user"),
    "loss_mask": ({"messages": [USER, ANSWER | {"loss_mask": 0}]}, "loss_mask: mark what is not learned"),
    "nothing learned": ({"messages": [USER, ANSWER | {"weight": 0}]}, "each assistant message is marked"),
    "weight of a row": ({"prompt": "w05", "response": "w06", "weight": 0}, "weight, which is not read beside prompt"),
    "system": ({"prompt": "w05", "response": "w06", "system": "w04"}, "has system, .*system prompt into 'prompt'"),
    "a system row": ({"messages": [USER, ANSWER], "system": "w04"}, "has system, which is not read beside messages"),
    "images": ({"messages": [USER, ANSWER], "images": ["a.png"]}, "has images, .*text alone"),
    "two forms": ({"messages": [USER, ANSWER], "prompt": "w05"}, "has prompt, which is not read beside messages"),
    "empty": ({"messages": [USER, ANSWER | {"content": ""}]}, "an assistant message is empty"),
    "empty, then not": (
        {"messages": [USER, ANSWER | {"content": None, "tool_calls": []}]},
        "has no text in 'content'",
    ),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_refused(name, tmp_path):
    row, message = NOT_READ[name]
    with pytest.raises(DataError, match=rf"line 2: .*{message}"):
        read_turns(write(tmp_path, {"messages": [USER, ANSWER]}, row))


def test_a_part_of_any_message_that_the_template_leaves_out_is_refused(tmp_path):
    turns = read_turns(write(tmp_path, {"messages": [USER | {"images": ["a.png"], "id": 3}, ANSWER]}))
    for encode in (encode_turns, encode_prompts):
        with pytest.raises(DataError, match=r"line 1: .*leaves images of message 0 out"):
            encode(turns, chat_tokenizer(), 64)
    for value in (False, 0, 0.0):
        turns = read_turns(write(tmp_path, {"messages": [USER, ANSWER | {"loss_scale": value}]}))
        with pytest.raises(DataError, match=r"line 1: .*leaves loss_scale of message 1 out"):
            encode_turns(turns, chat_tokenizer(), 64)
    # what stands for nothing
    empty = {"tool_calls": [], "refusal": None, "audio": {}, "note": "", "name": "w01"}
    turns = read_turns(write(tmp_path, {"messages": [USER | empty, ANSWER | empty]}))
    assert len(encode_turns(turns, chat_tokenizer(), 64)[0]) == 1
    # reasoning of an earlier turn is left out by most templates
    messages = [USER, ANSWER | {"reasoning_content": "w40", "train": False}, USER, ANSWER]
    assert len(encode_turns(read_turns(write(tmp_path, {"messages": messages})), chat_tokenizer(), 64)[0]) == 1
