"""The study's command line: which parts run, and what is refused."""

import pytest

from benchmarks.quality.__main__ import PARTS, parse
from benchmarks.quality.methods import METHODS, RANKS
from benchmarks.quality.tasks import TASKS


def test_everything_runs_by_default():
    options = parse([])
    assert options.parts == list(PARTS)
    assert (options.tasks, options.methods, options.ranks) == (list(TASKS), list(METHODS), list(RANKS))


@pytest.mark.parametrize("narrowed", [["--tasks", "devil"], ["--methods", "lora,lora-p"], ["--ranks", "4,64"]])
def test_an_option_of_one_part_leaves_the_others_alone(narrowed):
    """Else `--ranks 64` would go on with hours of distillation after its runs."""
    options = parse(narrowed)
    assert options.parts == ["sft"]
    assert [str(value) for value in getattr(options, narrowed[0][2:])] == narrowed[1].split(",")
    assert parse([*narrowed, "--parts", "rl,sft"]).parts == ["rl", "sft"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "devil,gods"], "--tasks: has gods: give some of cities, devil, chatterbot"),
        (["--parts", "all"], "--parts: has all: give some of sft"),
        (["--ranks", "4,x"], "--ranks: has x: give some of 1, 4, 16, 64"),
        (["--device", "gpu"], "--device: invalid choice: 'gpu'"),
        (["--parts", "rl", "--ranks", "4"], "--ranks is for the part sft, and --parts is rl: leave one out"),
    ],
)
def test_what_does_not_fit_is_said(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
