"""Seams on a small program made for the test: all or nothing, every place, every original back."""

import functools
import importlib
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft_core.seam import PatchError, Seam, apply, check, check_sources, digest_of

CORE = """
class Model:
    def forward(self, x):
        return x + 1

    @staticmethod
    def scale(x):
        return 2 * x

    @classmethod
    def name(cls):
        return cls.__name__


class Child(Model):
    pass


def load(x):
    return f"loaded {x}"


def other(x):
    return load(x) + "!"
"""
USER = """
from serverlike.core import load
from serverlike.core import load as fetch


def run(x):
    return load(x), fetch(x)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    folder = tmp_path / "serverlike"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(CORE)
    (folder / "user.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("serverlike.core"), importlib.import_module("serverlike.user")
    for name in [name for name in sys.modules if name.partition(".")[0] == "serverlike"]:
        del sys.modules[name]


def wrapped(original):
    return lambda *arguments: ("patched", original(*arguments))


def seams(core) -> list[Seam]:
    return [
        Seam("serverlike.core:Model.forward", digest_of(core.Model.forward), wrapped, "adds what the test sees"),
        Seam("serverlike.core:Model.scale", digest_of(core.Model.scale), wrapped, "a static method stays one"),
        Seam("serverlike.core:Model.name", digest_of(core.Model.name), wrapped, "a class method stays one"),
        Seam(
            "serverlike.core:load",
            digest_of(core.load),
            wrapped,
            "is imported by name elsewhere",
            ("serverlike.user:load", "serverlike.user:fetch"),
        ),
    ]


def everything(core, user):
    model = core.Child()
    return model.forward(1), model.scale(2), model.name(), core.Model.name(), core.other("x"), user.run("y")


def test_every_place_is_replaced_and_restored(program):
    core, user = program
    before, objects = everything(core, user), (dict(vars(core.Model)), dict(vars(core)), dict(vars(user)))
    applied = apply(seams(core))
    with pytest.raises(TypeError):
        core.other("x")  # load gives a tuple now
    assert core.Child().forward(1) == ("patched", 2)
    assert core.Model.scale(2) == core.Model().scale(2) == ("patched", 4)
    assert core.Child.name() == ("patched", "Child")
    assert user.run("y") == (("patched", "loaded y"), ("patched", "loaded y"))
    applied.revert()
    applied.revert()
    assert everything(core, user) == before
    after = (vars(core.Model), vars(core), vars(user))
    for old, new in zip(objects, after, strict=True):
        assert all(new[name] is value for name, value in old.items())


def test_an_inherited_method_is_put_on_its_own_class_and_taken_off(program):
    core, _ = program
    seam = Seam("serverlike.core:Child.forward", digest_of(core.Child.forward), wrapped, "only for the child")
    with apply([seam]):
        assert core.Child().forward(1) == ("patched", 2)
        assert core.Model().forward(1) == 2
    assert "forward" not in vars(core.Child)


def test_all_faults_are_said_and_nothing_is_changed(program):
    core, user = program
    good = seams(core)
    bad = [
        replace(good[0], digest="0" * 16),
        good[1],
        replace(good[3], uses=("serverlike.user:load",)),
        Seam("serverlike.core:Model.gone", "0" * 16, wrapped, "is not there"),
        Seam("serverlike.nothing:load", "0" * 16, wrapped, "nor is its module"),
        Seam("serverlike.core:Gone.forward", "0" * 16, wrapped, "nor its class"),
        good[1],
    ]
    before = everything(core, user)
    with pytest.raises(PatchError) as caught:
        apply(bad)
    message = str(caught.value)
    for part in (
        "nothing was patched",
        f"Model.forward has digest {good[0].digest}, and the seam was made for 0000",
        "serverlike.user:fetch holds serverlike.core:load too",
        "has no Model.gone",
        "serverlike.nothing cannot be imported",
        "has no Gone",
        "Model.scale has two seams",
    ):
        assert part in message
    assert everything(core, user) == before


def test_another_patch_is_noticed(program):
    core, user = program
    user.load = lambda x: x
    assert check(seams(core)) == ["serverlike.user:load is not serverlike.core:load: another patch has replaced it"]


def test_a_replacement_that_cannot_be_made_undoes_the_rest(program):
    core, user = program

    def broken(original):
        raise RuntimeError("no replacement")

    before = everything(core, user)
    with pytest.raises(RuntimeError, match="no replacement"):
        apply([*seams(core)[:3], replace(seams(core)[3], replacement=broken)])
    assert everything(core, user) == before


def test_applied_twice_is_refused(program):
    core, _ = program
    plain = seams(core)
    hidden = [replace(seam, replacement=lambda f: functools.wraps(f)(lambda *x: f(*x))) for seam in plain]
    for made in (plain, hidden):
        with apply(made), pytest.raises(PatchError, match=r"Model\.forward is patched already"):
            apply(made)
        assert check(made) == []


WITHOUT_A_GPU = """
import functools

raise RuntimeError("no GPU")


def decorated(function):
    return functools.wraps(function)(lambda *x: function(*x))


try:
    import gpu
except ImportError:

    class Model:
        @decorated
        @staticmethod
        def forward(x):
            # a comment
            def inner():
                return x

            return inner()
            # the last line

        async def call(self):
            return [1,
                    2]
else:

    class Model:
        def forward(x):
            return gpu.run(x)
"""


def test_sources_are_compared_without_an_import(program, tmp_path):
    """The digests are those of the live objects, though no module of the program can be imported."""
    core, _ = program
    assert check_sources(seams(core)) == check(seams(core)) == []
    package = tmp_path / "nogpu" / "models"
    package.mkdir(parents=True)
    (tmp_path / "nogpu" / "__init__.py").write_text("raise RuntimeError('no GPU')")
    (package / "__init__.py").write_text("from nogpu.models.core import Model as Renamed")
    (package / "core.py").write_text(WITHOUT_A_GPU)
    live = {}
    import linecache

    text = WITHOUT_A_GPU.replace('raise RuntimeError("no GPU")', "")
    linecache.cache["<live>"] = (len(text), None, text.splitlines(True), "<live>")
    exec(compile(text, "<live>", "exec"), live)
    model = live["Model"]
    good = [
        Seam("nogpu.models.core:Model.forward", digest_of(model.forward), wrapped, "", ("nogpu.models:Renamed",)),
        Seam("nogpu.models.core:Model.call", digest_of(model.call), None, ""),
        Seam("nogpu.models.core:decorated", digest_of(live["decorated"]), None, ""),
    ]
    assert check_sources(good) == []
    assert not [name for name in sys.modules if name.startswith("nogpu")]
    bad = [
        replace(good[0], uses=("nogpu.models:Model",)),
        replace(good[1], digest="0" * 16),
        Seam("nogpu.models.core:Model.gone", "0" * 16, None, ""),
        Seam("nogpu.other:f", "0" * 16, None, ""),
        Seam("notinstalled.core:f", "0" * 16, None, ""),
    ]
    said = "; ".join(check_sources(bad))
    for part in (
        "nogpu.models does not import Model",
        f"Model.call has digest {good[1].digest}, and the seam was made for 0000",
        "nogpu.models.core has no Model.gone",
        "the module nogpu.other is not installed",
        "the module notinstalled.core is not installed",
    ):
        assert part in said


@given(st.text(alphabet=" \t", max_size=5), st.sampled_from(["return x + 1", "return x + 2", "return  x + 1"]))
def test_the_digest_is_of_the_source(blanks, line):
    first, second = {}, {}
    import linecache

    for scope, body in ((first, "return x + 1"), (second, line + blanks)):
        text, name = f"def f(x):\n    {body}\n", f"<seam {id(scope)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, "exec"), scope)
    assert (digest_of(first["f"]) == digest_of(second["f"])) == (line == "return x + 1")


def test_seam_needs_the_standard_library_alone():
    import ast
    from pathlib import Path

    import preft_core.seam

    tree = ast.parse(Path(preft_core.seam.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)
