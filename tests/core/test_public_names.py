"""The public names of preft_core's packages: each exists, and its docstring explains every argument."""

import inspect
import re
from importlib import import_module

import pytest

import preft_core.adapter
from preft_core.format import adapter

PACKAGES = ["preft_core.rule", "preft_core.format", "preft_core.ops", "preft_core.pool", "preft_core.hub"]
PUBLIC = [(package, name) for package in PACKAGES for name in import_module(package).__all__]


def functions_of(value):
    """Yields (name, function) of a function, or of the public methods and the constructor of a class."""
    if inspect.isfunction(value):
        yield value.__name__, value
    elif inspect.isclass(value):
        for name, member in vars(value).items():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and not name.startswith("_"):
                yield f"{value.__name__}.{name}", function


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_a_public_name_is_documented(package, name):
    value = getattr(import_module(package), name)
    if not callable(value):
        return
    assert inspect.getdoc(value)
    for full_name, function in functions_of(value):
        text = inspect.getdoc(function)
        assert text, full_name
        for parameter in inspect.signature(function).parameters.values():
            # tensors' dimensions are no part of their name in prose
            word = re.sub("_[A-Z]+$", "", parameter.name)
            assert parameter.name in ("self", "cls") or re.search(rf"\b{word}\b|\b{parameter.name}\b", text), (
                full_name,
                parameter.name,
            )


def test_the_former_name_of_the_adapter_module_has_the_same_names():
    assert preft_core.adapter.__all__ == adapter.__all__
    for name in adapter.__all__:
        assert getattr(preft_core.adapter, name) is getattr(adapter, name)
