"""Objects named in run configs and scenario files."""

import json

import pytest

from prunecast.common.references import load_callable


def test_functions_and_methods_are_found():
    assert load_callable("json:loads") is json.loads
    assert load_callable("json:JSONDecoder.decode") is json.JSONDecoder.decode


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("json", "is not of the form"),
        (":loads", "is not of the form"),
        ("json:", "is not of the form"),
        ("nowhere.at_all:net", "there is no module 'nowhere.at_all'"),
        ("json:nothing", "module 'json' has no 'nothing'"),
        ("json:decoder.NaN", "is no function or class"),
    ],
)
def test_what_names_nothing_callable_is_refused(reference, says):
    with pytest.raises(ValueError, match=says):
        load_callable(reference)


def test_what_a_module_itself_needs_is_not_blamed_on_the_reference(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        load_callable("needs_more:net")
