"""The command line as a user runs it, in processes of its own."""

import json
import os
import shutil
import time

import pytest

from preft_cli.app import app, main
from tests.cli.process import Preft, preft, preft_from_nothing
from tests.core.hub.conftest import hub  # noqa: F401
from tests.hf.training.test_trainers import tokenizer
from tests.hf.zoo import make_base, make_preft


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny base model and data for it."""
    path = tmp_path_factory.mktemp("cli")
    make_base().save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    rows = [{"prompt": f"w{i:02} w{i + 1:02} ", "response": f"w{i:02}"} for i in range(5, 45)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def train(place, output: str, *others: object) -> list[object]:
    return [
        "train", "--model", place / "base", "--data", place / "rows.jsonl", "--output", place / output, "--lr", 0.01,
        "--rank", 4, *others,
    ]  # fmt: skip


def test_train_then_inspect_then_generate(place):
    done = preft_from_nothing(*train(place, "a", "--steps", 30, "--method", "direft", "--eval-every", 10))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((place / "a" / "metrics.json").read_text())
    assert metrics["eval_loss"]["after"] < metrics["eval_loss"]["before"]
    assert (metrics["num_train_rows"], metrics["num_eval_rows"]) == (36, 4)
    history = json.loads((place / "a" / "history.json").read_text())
    assert [step for step, _ in history["eval_losses"]] == [10, 20, 30]

    facts = json.loads(preft("inspect", place / "a", "--json").stdout)
    assert (facts["method"], facts["rank"], facts["scaling"]) == ("direft", 4, 1.0)
    assert facts["base_model"] == str(place / "base")
    assert facts["num_parameters"] == 2 * (2 * 4 * 32 + 4)
    assert all(norm > 0 for norm in facts["norms"].values())
    assert "Largest updates" in preft("inspect", place / "a").stdout

    ask = ["generate", "--adapter", place / "a", "--prompt", "w10 w11 ", "--max-new-tokens", 4]
    adapted, base = preft(*ask), preft(*ask, "--base")
    assert adapted.returncode == 0, adapted.stderr
    assert adapted.stdout != base.stdout
    assert preft(*ask[:3], "--max-new-tokens", 4, input="w10 w11 ").stdout == adapted.stdout


def test_the_likeliest_token_whatever_the_base_model_asks_for(place, tmp_path):
    make_preft(make_base(), seed=3).save_pretrained(tmp_path / "a")
    ask = ["generate", "--adapter", tmp_path / "a", "--prompt", "w10 w11 w10 w11 ", "--max-new-tokens", 6, "--model"]
    expected = preft(*ask, place / "base").stdout
    shutil.copytree(place / "base", tmp_path / "base")
    settings = {"repetition_penalty": 5.0, "suppress_tokens": list(range(4, 40)), "no_repeat_ngram_size": 1}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    assert preft(*ask, tmp_path / "base").stdout == expected != "\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template: omit --chat"),
        ("{{ raise_exception('roles must be bot') }}", "refuses a user's message: roles must be bot"),
    ],
)
def test_a_prompt_that_cannot_be_a_message(place, tmp_path, template, message):
    make_preft(make_base()).save_pretrained(tmp_path / "a")
    make_base().save_pretrained(tmp_path / "base")
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(tmp_path / "base")
    ask = ["generate", "--adapter", tmp_path / "a", "--prompt", "w10 ", "--chat", "--model", tmp_path / "base"]
    done = preft(*ask)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_losses(place):
    options = ("--steps", 300, "--save-every", 40)
    run = Preft(*train(place, "cut", *options))
    while not list(place.glob("cut/checkpoints/checkpoint-*")):
        assert run.is_running(), run.wait().stderr
        time.sleep(0.02)
    run.interrupt()
    cut = run.wait(timeout=60)
    assert cut.returncode == 130, cut.stderr
    assert "--resume" in cut.stdout + cut.stderr
    last = max(int(name.removeprefix("checkpoint-")) for name in os.listdir(place / "cut" / "checkpoints"))
    assert 0 < last < 300

    again = preft(*train(place, "cut", *options))
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert preft(*train(place, "cut", *options, "--resume")).returncode == 0
    assert preft(*train(place, "whole", *options)).returncode == 0
    losses = [json.loads((place / name / "history.json").read_text())["losses"] for name in ("cut", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "nowhere"], 2, "nowhere cannot be read"),
        (["generate", "--adapter", "nowhere", "--prompt", "x"], 2, "nowhere cannot be read"),
        (["train", "--model", "x", "--data", "nowhere", "--output", "y"], 2, "nowhere cannot be read"),
        (["train", "--model", "x", "--data", "x", "--output", "y", "--method", "dora"], 2, "dora"),
        (["train", "--model", "x"], 2, "--data"),
        (["train", "--model", "x", "--data", "x", "--output", "y", "--lr", "nan"], 2, "not a finite number above 0"),
        (["distill", "x", "--data", "x", "--output", "y", "--lr", "-1"], 2, "not a finite number above 0"),
        (["fly"], 2, "fly"),
    ],
)
def test_mistakes_are_sentences(tmp_path, arguments, code, message):
    done = preft(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_mistakes_with_a_base_model_at_hand(place):
    missing = preft(*train(place, "b", "--resume"))
    assert missing.returncode == 2
    assert "no checkpoint to resume from" in missing.stderr
    unknown = preft("train", "--model", place / "none", "--data", place / "rows.jsonl", "--output", place / "c")
    assert unknown.returncode == 2
    assert "cannot be loaded" in unknown.stderr
    split = preft(*train(place, "d", "--eval-split", 0.9, "--max-length", 2))
    assert split.returncode == 2
    assert "more than 2 tokens" in split.stderr
    adapter = place / "tampered"
    make_preft(make_base()).save_pretrained(adapter)
    data = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(data)
    tampered = preft("inspect", adapter)
    assert tampered.returncode == 2
    assert "fingerprint" in tampered.stderr


def test_debug_shows_the_traceback():
    done = preft("inspect", "nowhere", env=os.environ | {"PREFT_DEBUG": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_resume_goes_on_with_the_same_run_alone_and_from_a_whole_checkpoint(place):
    options = ("--steps", 20, "--save-every", 5)
    assert preft(*train(place, "first", *options)).returncode == 0
    checkpoints = place / "first" / "checkpoints"
    (checkpoints / "checkpoint-20" / "trainer_state.json").write_text('{"epoch": 2')
    whole = json.loads((place / "first" / "history.json").read_text())

    (place / "other.jsonl").write_text((place / "rows.jsonl").read_text() + "\n")
    other = preft(*train(place, "first", *options, "--data", place / "other.jsonl", "--seed", 7, "--resume"))
    assert other.returncode == 2
    assert "seed was 0 and is 7" in other.stderr
    assert "data_sha256" in other.stderr

    assert preft(*train(place, "first", *options, "--resume")).returncode == 0
    assert json.loads((place / "first" / "history.json").read_text()) == whole


def test_a_run_that_diverges_is_said_and_saves_no_adapter(place):
    done = preft(*train(place, "diverged", "--steps", 40, "--lr", 1e30))
    assert done.returncode == 1
    assert "training diverged" in done.stderr
    assert "lower learning rate" in done.stderr
    assert not (place / "diverged" / "adapter_model.safetensors").exists()

    # what has no checkpoint cannot be resumed, and leaves the folder to a run that begins
    resumed = preft(*train(place, "diverged", "--steps", 40, "--lr", 1e30, "--resume"))
    assert resumed.returncode == 2
    assert "start without --resume" in resumed.stderr
    (place / "diverged" / "checkpoints" / "checkpoint-7").mkdir()
    again = preft(*train(place, "diverged", "--steps", 4))
    assert again.returncode == 0, again.stderr
    assert (place / "diverged" / "adapter_model.safetensors").exists()


def test_rows_beyond_the_context_are_refused(place):
    row = {"prompt": "w05 " * 200, "response": "w06"}
    (place / "long.jsonl").write_text((place / "rows.jsonl").read_text() + "\n" + json.dumps(row))
    done = preft(*train(place, "long", "--data", place / "long.jsonl"))
    assert done.returncode == 2
    assert "context 128" in done.stderr


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A plain LoRA of the tiny base model."""
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("lora")
    get_peft_model(make_base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(path)
    return path


def test_the_version_and_the_short_help(capsys):
    import preft_hf

    done = preft("--version")
    assert (done.returncode, done.stdout) == (0, f"preft {preft_hf.__version__}\n")
    for command in ([], ["train"], ["push"], ["plan"]):
        short, long = preft(*command, "-h"), preft(*command, "--help")
        assert short.returncode == 0
        assert short.stdout == long.stdout
        assert "--help" in short.stdout
    assert "preft doctor" in preft("-h").stdout


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_threads_wait_passively(given, expected, monkeypatch, capsys):
    # to be restored after the test
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("sys.argv", ["preft", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_an_adapter_is_no_base_model(place, lora, tmp_path):
    make_preft(make_base()).save_pretrained(tmp_path / "a")
    for folder, message in ((tmp_path / "a", "which is an adapter of"), (lora, "which is a plain LoRA of")):
        done = preft("train", "--model", folder, "--data", place / "rows.jsonl", "--output", tmp_path / "out")
        assert done.returncode == 2
        assert message in done.stderr
        assert "give the base model" in done.stderr
        assert not (tmp_path / "out").exists()
    for name in ("./base", "base", "/a/base"):
        done = preft(*train(place, "none"), "--base-name", name)
        assert done.returncode == 2
        assert f"--base-name is '{name}': give the Hub id" in done.stderr


def test_a_repository_of_an_adapter_is_no_base_model(place, tmp_path, monkeypatch):
    """transformers loads the adapter of one together with its base model."""
    from preft_hf.training.train_run import load_base

    model = make_preft(make_base())
    model.peft_config["default"].base_model_name_or_path = str(place / "base")
    model.save_pretrained(tmp_path / "a")
    tokenizer().save_pretrained(tmp_path / "a")
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: False)
    with pytest.raises(ValueError, match=r"which is an adapter of .*base: give the base model"):
        load_base(str(tmp_path / "a"))


def test_a_plain_lora_is_said_to_be_one(lora, place):
    for command in (["inspect", lora], ["generate", "--adapter", lora, "--prompt", "w05"], ["verify", lora]):
        done = preft(*command)
        said = done.stderr + done.stdout
        assert done.returncode in (1, 2)
        assert "a plain LoRA" in said
        assert "`preft distill` or `preft convert`" in said
        assert len(said) < 400


@pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")
def test_the_base_models_name_is_written_into_the_adapter(place, tmp_path, hub, capsys):  # noqa: F811
    base = [*train(place, "named", "--steps", 1), "--base-name", "org/base"]
    assert preft(*base).returncode == 0
    adapters = {"named": "org/base", "unnamed": str(place / "base")}
    assert preft(*train(place, "unnamed", "--steps", 1)).returncode == 0
    for name, expected in adapters.items():
        assert json.loads((place / name / "adapter_config.json").read_text())["base_model_name_or_path"] == expected
    for name, code in (("named", 0), ("unnamed", 1)):
        with pytest.raises(SystemExit) as stop:
            app(["push", str(place / name), "--to", f"org/{name}"])
        assert stop.value.code == code
    assert "a path on this machine" in (said := capsys.readouterr().err)
    assert "preft train --base-name org/model" in said
    assert len(hub.seen("commit")) == 1


def test_a_manifest_that_is_missing_is_said_to_be(tmp_path):
    for command in (["pull"], ["verify"]):
        done = preft(*command, "preft.toml", cwd=tmp_path)
        assert done.returncode == 2
        assert "there is no manifest preft.toml" in done.stderr
