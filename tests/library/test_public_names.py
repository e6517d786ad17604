"""What a user finds in `help()`: every public name, argument and attribute is described."""

from __future__ import annotations

import inspect
import pydoc
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import fam_optim
from fam_optim import FAM

NAMES = sorted(fam_optim.__all__)


def described(docstring: str, section: str) -> str:
    """The lines of a section of a docstring, "Args" say, up to the next one."""
    found = re.search(rf"^{section}:\n((?:[ ]+.*\n?|\n)*)", docstring, flags=re.MULTILINE)
    return found[1] if found else ""


def names_in(section: str) -> list[str]:
    """The names that the section describes: those before a colon, at its own indentation."""
    heads = re.findall(r"^ {4}([*\w, ]+): \S", section, flags=re.MULTILINE)
    return [name.strip() for head in heads for name in head.split(",")]


def arguments(of: Any) -> list[str]:
    """The arguments of a function or of a class's constructor, as a docstring names them."""
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [star.get(p.kind, "") + p.name for p in inspect.signature(of).parameters.values()]


def test_all_lists_what_the_package_offers() -> None:
    public = {
        name for name, value in vars(fam_optim).items() if name[0] != "_" and not inspect.ismodule(value)
    }
    assert public == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_described_in_the_order_of_the_signature(name: str) -> None:
    function = getattr(fam_optim, name)
    docstring = inspect.getdoc(function) or ""
    assert names_in(described(docstring, "Args")) == arguments(function)


METHODS = [name for name, value in vars(FAM).items() if name[0] != "_" and inspect.isfunction(value)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_its_own_is_described(name: str) -> None:
    method = getattr(FAM, name)
    docstring = method.__doc__ or ""
    assert docstring and docstring != getattr(Optimizer, name, FAM).__doc__
    if name not in vars(Optimizer) or name == "step":  # others take what the base optimizer's take
        wanted = [argument for argument in arguments(method) if argument != "self"]
        assert names_in(described(inspect.cleandoc(docstring), "Args")) == wanted


def test_every_attribute_is_described() -> None:
    model = nn.Linear(3, 2)
    fam = FAM(model.parameters(), torch.optim.SGD, model, lr=0.1)
    own = {name for name in ({*vars(fam)} | {*vars(FAM)}) if name[0] != "_" and name not in METHODS}
    internal = {"regularizer", "defaults", "for_model"}  # FAM's own affair, torch's, and a constructor
    assert own - internal == set(names_in(described(inspect.getdoc(FAM) or "", "Attributes")))


def test_help_says_what_it_is_and_how_to_call_it_first() -> None:
    page = pydoc.plain(pydoc.render_doc(FAM)).splitlines()
    ends = [i for i, line in enumerate(page) if line.startswith(" |  )")]
    if ends:  # from Python 3.13 on the signature has a line for each argument
        page[3 : ends[0] + 1] = [" |  FAM(...)"]
    assert any("Keeps layers of a network flat" in line for line in page[:8])
    assert any(">>> loss = optimizer.step(" in line for line in page[:12])
    undescribed = [name for name in vars(FAM) if name[0] != "_" and not getattr(FAM, name).__doc__]
    assert undescribed == []
