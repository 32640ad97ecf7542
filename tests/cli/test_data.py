import json
from pathlib import Path

import pytest

from preft_hf.demo.cities import city_rows, field_accuracy, num_right_fields
from preft_hf.training import train_run as finetune
from preft_hf.training.data import collate, encode_turns
from preft_hf.training.train_run import FinetuneOptions
from preft_hf.training.turns import DataError, Turn, read_turns
from tests.hf.training.test_trainers import tokenizer


def test_pairs_and_messages(tmp_path):
    chat = [
        {"role": "user", "content": "w05"},
        {"role": "assistant", "content": "w06"},
        {"role": "user", "content": "w07"},
        {"role": "assistant", "content": "w08"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"prompt": "w05 ", "response": "w06 "}) + "\n\n" + json.dumps({"messages": chat}) + "\n"
    )
    turns = read_turns(file)
    assert turns == [Turn("w05 ", "w06 ", 1), Turn(chat[:1], chat[1], 3), Turn(chat[:3], chat[3], 3)]
    encoded, num_long = encode_turns(turns, tokenizer(), 64)
    assert num_long == 0
    assert encoded == [
        {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
        {"input_ids": [5, 3, 6, 2], "labels": [-100, -100, 6, 2]},
        {"input_ids": [5, 3, 6, 2, 7, 3, 8, 2], "labels": [-100] * 6 + [8, 2]},
    ]
    batch = collate(encoded[:2], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 0], [5, 3, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100], [-100, -100, 6, 2]]


def test_a_byte_order_mark_and_unusual_separators_are_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a\u2028b\x85c", "response": f"w{i}"} for i in range(2)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_bytes(text.encode("utf-8-sig"))
    assert read_turns(file) == [Turn("a\u2028b\x85c", f"w{i}", i + 1) for i in range(2)]


def test_wrong_lines_are_named_together(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a"}\n{"prompt": "a", "response": "b"}\nnot json\n[]\n{"messages": [{"role": "user"}]}\n'
    )
    with pytest.raises(DataError, match=r"line 1: .*response.*line 3: .*line 4: is no JSON object; line 5: .*content"):
        read_turns(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="no row"):
        read_turns(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_turns(tmp_path / "nowhere")


def test_long_rows_are_counted_and_never_cut():
    turns = [Turn("w05 " * 10, "w06", 1), Turn("w05 ", "w06 ", 2)]
    samples, num_long = encode_turns(turns, tokenizer(), 8)
    assert (len(samples), num_long) == (1, 1)
    with pytest.raises(DataError, match="all 1 turns have more than 8 tokens"):
        encode_turns(turns[:1], tokenizer(), 8)


def test_a_template_that_rewrites_the_prompt_is_refused():
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }} {% endfor %}"
    with pytest.raises(DataError, match=r"line 4: .*writes the prompt differently"):
        encode_turns([Turn([{"role": "user", "content": "w05"}], "w06", 4)], words, 64)
    words.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_turns([Turn([{"role": "user", "content": "w05"}], "w06", 4)], words, 64)


def test_cities_are_the_same_for_a_seed_and_never_twice():
    rows = city_rows(300, seed=3)
    assert city_rows(100, seed=3) == rows[:100]
    assert city_rows(100, seed=4) != rows[:100]
    assert len({row.prompt for row in rows}) == 300
    assert all(row.prompt.endswith("\n") and " / " in row.response and row.response.endswith("k") for row in rows)
    with pytest.raises(ValueError, match="num_rows is 99999999"):
        city_rows(99_999_999)


def test_fields():
    expected = "TUMBES / Peru ~ 97k"
    assert num_right_fields(expected + "\nmore", expected) == 3
    assert num_right_fields("TUMBES / Chile ~ 97k", expected) == 2
    assert num_right_fields("TUMBES", expected) == 1
    assert num_right_fields("", expected) == 0
    row = city_rows(1)[0]
    assert field_accuracy([row.response], [row]) == 1.0


def test_turns_of_one_conversation_are_held_out_together():
    turns = [Turn(f"w{line:02} " * (turn + 1), "w05", line) for line in range(1, 11) for turn in range(4)]
    options = FinetuneOptions(
        "m", Path("rows.jsonl"), Path("out"), "lora", 4, None, 1e-3, None, 1.0, 4, 64, 0.2, 0, 0, 0, "float32", False
    )
    trained, held_out = finetune.split(turns, options.eval_split, options.seed, options.data)
    assert len(held_out) == 8
    assert len({turn.line for turn in held_out}) == 2
    assert {turn.line for turn in held_out}.isdisjoint(turn.line for turn in trained)
    assert len(trained) + len(held_out) == 40
