"""What is said when a run goes on elsewhere."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT
from transformer.runtime import environment as fingerprint


def of_another_process(**environment):
    program = "import json; from transformer.runtime import environment; print(json.dumps(environment.fingerprint()))"
    command = [sys.executable, "-c", program]
    if cores := environment.pop("cores", None):
        command = ["taskset", "-c", cores, *command]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_the_same_host_is_the_same():
    here = fingerprint.fingerprint()
    assert {"code", "Python", "jax", "jaxlib", "XLA_FLAGS", "devices", "CPU", "cores"} <= here.keys()
    assert here["devices"] == "8 x cpu"
    assert fingerprint.diff(here, dict(here)) == []


def test_other_flags_and_cores_are_another():
    """XLA splits its work by the cores that a process may use, which changes the last bits."""
    other = of_another_process(XLA_FLAGS="--xla_force_host_platform_device_count=2", cores="0")
    result = fingerprint.diff(fingerprint.fingerprint(), other)
    assert "devices: 8 x cpu → 2 x cpu" in result
    assert any(each.startswith("XLA_FLAGS: ") for each in result)
    if len(os.sched_getaffinity(0)) > 1:
        assert f"cores: {len(os.sched_getaffinity(0))} → 1" in result
    assert not any(each.startswith(("code", "jax:", "Python")) for each in result)


def test_what_only_one_of_them_has_is_named():
    assert fingerprint.diff({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == [
        "a: 1 → none",
        "b: 2 → 3",
        "c: none → 4",
    ]
    assert fingerprint.diff({"a": ""}, {"a": "x"}) == ["a: none → x"]


def test_what_differs_is_said_in_words():
    here = {"code": "1", "jax": "0.10", "cores": "2"}
    assert fingerprint.changed_parts(here, here) == fingerprint.changed_parts({}, here) == ""
    assert fingerprint.changed_parts(here, {**here, "code": "2"}) == "other code"
    assert fingerprint.changed_parts(here, {**here, "code": "2", "jax": "0.11"}) == "other code and other packages"
    assert fingerprint.changed_parts(here, {**here, "cores": "4"}) == "another machine or other settings"


def test_an_unrecorded_host_is_not_logged():
    assert fingerprint.diff({}, fingerprint.fingerprint()) == []
