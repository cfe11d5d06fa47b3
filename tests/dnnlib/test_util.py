"""The published names, and the version of this code."""

import copy
import pickle
import re

import pytest

import dnnlib
import dnnlib.util
from dnnlib.download import open_url
from dnnlib.util import EasyDict, code_version


def test_published_names():
    assert dnnlib.EasyDict is dnnlib.util.EasyDict is EasyDict
    assert dnnlib.util.open_url is open_url


def test_items_are_attributes():
    options = EasyDict(a=1)
    options.b = options.a + 1
    options["c"] = 3
    assert options == {"a": 1, "b": 2, "c": 3} and options.c == 3
    del options.a
    assert "a" not in options
    with pytest.raises(AttributeError, match="a"):
        options.a  # noqa: B018
    assert getattr(options, "a", None) is None
    for again in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert type(again) is EasyDict and again == options


def test_code_version():
    assert re.fullmatch(rf"{re.escape(dnnlib.__version__)}(\+[0-9a-f]+)?", code_version())
