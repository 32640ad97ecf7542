"""What an operator sets: one table of cases that are taken, one of those that are refused."""

import re
from pathlib import Path

import pytest

from preft_core.pool.layout import Bucket
from tgi_patch import patches
from tgi_patch.settings import FIXES, SettingsError, parse_adapters, read_settings


def test_nothing_set_is_tgi_with_its_faults_mended():
    settings = read_settings({"PATH": "/bin"})
    assert not settings.active
    assert settings.fixes == FIXES


def test_all_of_it(tmp_path):
    (tmp_path / "a.json").write_text('{"adapters": {"filed": "org/c"}}')
    settings = read_settings(
        {
            "PREFT_ADAPTERS": "org/a, b=org/b@v1,c=/data/c",
            "PREFT_ADAPTERS_FILE": str(tmp_path / "a.json"),
            "PREFT_RESERVE": "lora:9,direft:4,lora:12",
            "PREFT_SLOTS": "12",
            "PREFT_ADAPTER_SOURCE": "hub",
            "PREFT_ALLOWED_ORGS": "acme,example",
            "PREFT_BASE_MODEL": "meta-llama/x",
            "PREFT_CONTROL_DIR": str(tmp_path),
            "PREFT_LORA_FIXES": "none",
        }
    )
    assert settings.active
    assert settings.adapters == {"org/a": "org/a", "b": "org/b@v1", "c": "/data/c", "filed": "org/c"}
    assert settings.reserve == (Bucket("linear", 16), Bucket("block", 8))
    assert (settings.slots, settings.lazy, settings.fixes) == (12, True, ())
    assert settings.organisations == ("acme", "example")
    assert settings.control == Path(tmp_path)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PREFT_SLOTS": "0"}, "PREFT_SLOTS is '0'"),
        ({"PREFT_SLOTS": "many"}, "PREFT_SLOTS is 'many'"),
        ({"PREFT_DISABLE": "yes"}, "PREFT_DISABLE is 'yes'"),
        ({"PREFT_ADAPTERS": "a=b=c"}, "'a=b=c' is not id"),
        ({"PREFT_ADAPTERS": "a=x/y,a=x/z"}, "'a' is listed twice"),
        ({"PREFT_ADAPTERS": "__base__=x/y"}, "names that begin with __"),
        ({"PREFT_ADAPTERS_FILE": "nowhere.toml"}, "PREFT_ADAPTERS_FILE: nowhere.toml"),
        ({"PREFT_RESERVE": "lora:129"}, "PREFT_RESERVE has 'lora:129'"),
        ({"PREFT_RESERVE": "dora:8"}, "PREFT_RESERVE has 'dora:8'"),
        ({"PREFT_ADAPTER_SOURCE": "hub", "PREFT_RESERVE": "lora:8"}, "PREFT_ALLOWED_ORGS is empty"),
        ({"PREFT_ADAPTER_SOURCE": "hub", "PREFT_ALLOWED_ORGS": "*"}, "PREFT_RESERVE is empty"),
        ({"PREFT_ADAPTERS": "a/b,c/d", "PREFT_MAX_ADAPTERS": "1"}, "2 adapters are listed"),
        ({"PREFT_PREFIX_CACHE": "1"}, "PREFT_PREFIX_CACHE is set and there are no PreFT adapters"),
        ({"PREFT_PREFIX_TOKENS": "0"}, "PREFT_PREFIX_TOKENS is '0'"),
        ({"PREFT_LORA_FIXES": "graph"}, "PREFT_LORA_FIXES has graph"),
        ({"PREFT_SLOT": "3"}, "PREFT_SLOT is not a variable of PreFT"),
    ],
)
def test_what_cannot_be_used_is_said(variables, said):
    with pytest.raises(SettingsError) as caught:
        read_settings(variables)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"PREFT_ADAPTERS_FILE": "gone.toml"},
        {"PREFT_ADAPTERS": "a=b=c"},
        {"PREFT_SLOTS": "many"},
        {"PREFT_SLOT": "3"},
        {"PREFT_ADAPTER_SOURCE": "hub"},
        {"PREFT_PREFIX_CACHE": "1"},
    ],
)
def test_the_kill_switch_works_whatever_else_is_wrong(wrong):
    with pytest.raises(SettingsError):
        read_settings(wrong)
    settings = read_settings(wrong | {"PREFT_DISABLE": "1"})
    assert settings.disabled
    assert not settings.active


@pytest.mark.parametrize("service", ["PREFT", "PREFT_ADMIN", "PREFT_ROUTER"])
def test_variables_of_a_kubernetes_service_do_not_stop_the_start(service):
    """Kubernetes sets them in every pod of the namespace for a Service called preft, preft-admin or preft-router."""
    linked = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "80",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.0.0.1:80",
        "PORT_80_TCP": "tcp://10.0.0.1:80",
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_PORT": "80",
        "PORT_80_TCP_ADDR": "10.0.0.1",
    }
    environment = {f"{service}_{name}": value for name, value in linked.items()}
    assert read_settings(environment) == read_settings({})
    # a name of that shape with another value is a misspelt variable
    with pytest.raises(SettingsError, match="PREFT_RUTER_PORT is not a variable"):
        read_settings({"PREFT_RUTER_PORT": "13000"})


def test_all_faults_are_said_at_once():
    with pytest.raises(SettingsError, match=r"PREFT_RESERVE.*PREFT_SLOTS"):
        read_settings({"PREFT_SLOTS": "x", "PREFT_RESERVE": "x"})


def test_the_grammar_of_tgi():
    assert parse_adapters("") == {}
    assert parse_adapters("org/a@v2,local=/d/e") == {"org/a": "org/a@v2", "local": "/d/e"}


def test_the_docs_name_every_variable_fix_and_seam():
    root = Path(__file__).parents[2]
    docs = "".join((root / "docs" / page).read_text() for page in ("how-to/tgi.md", "reference/environment.md"))
    source = (root / "tgi_patch" / "settings.py").read_text()
    variables = set(re.findall(r"PREFT_[A-Z_]+", source)) - {"PREFT_TGI_PYTHON", "PREFT_CACHE"}
    targets = {seam.target.rpartition(":")[2] for seam in patches.SEAMS}
    missing = [name for name in sorted(variables | set(FIXES) | targets) if f"`{name}" not in docs]
    assert not missing
