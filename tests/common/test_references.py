"""Objects named in run configs and scenario files."""

import json

import pytest

from prunecast.common.references import configured_callable, load_callable, typed


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


def test_values_of_a_run_config_have_their_type():
    assert typed("timeout", 5, float, RuntimeError) == 5.0
    assert typed("seed", 5, int, RuntimeError) == 5
    for value, kind in ((True, int), (True, float), ("5", int), (2.5, int), (None, str)):
        with pytest.raises(
            RuntimeError, match=f"^knob = .* in the run config is no {kind.__name__}"
        ):
            typed("knob", value, kind, RuntimeError)


def test_a_callable_that_a_run_config_lacks_is_named():
    assert configured_callable({"model": "json:loads"}, "model", RuntimeError) is json.loads
    for config in ({}, {"model": ""}, {"model": 3}):
        with pytest.raises(RuntimeError, match="the run config lacks 'model'"):
            configured_callable(config, "model", RuntimeError)
    with pytest.raises(RuntimeError, match="model in the run config: module 'json' has no 'net'"):
        configured_callable({"model": "json:net"}, "model", RuntimeError)
