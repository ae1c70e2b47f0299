"""What is said where TensorRT is missing, too old, or another version than a plan's."""

from __future__ import annotations

import signal
import sys
import threading
import types

import pytest
from support.checks import refusal

from lavin_rt.artifact.tensorrt_library import check_version, import_tensorrt, signals_noted, version_numbers
from lavin_rt.process import Terminated, terminating


@pytest.fixture
def interruptible():
    """As on a terminal: what runs in the background ignores SIGINT, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    message = refusal(import_tensorrt, "running a TensorRT artifact")
    assert message.startswith("running a TensorRT artifact needs the package tensorrt") and "[tensorrt]" in message


@pytest.mark.parametrize(
    ("version", "fits"), [("10.14.1.48", False), ("8.6.1", False), ("10.15.0", True), ("11.4.0.106", True)]
)
def test_age(monkeypatch, version, fits):
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__=version))
    if fits:
        assert import_tensorrt("it").__version__ == version
    else:
        assert refusal(import_tensorrt, "it") == f"it needs TensorRT 10.15 or newer; {version} is installed"


def test_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.10: cannot open', name='tensorrt.tensorrt')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert "installed but cannot be loaded: libnvinfer.so.10" in refusal(import_tensorrt, "it")


@pytest.mark.parametrize(
    ("built", "installed", "fits"),
    [
        ("10.16.1.11", "10.16.1.11", True),
        ("10.16.1.11", "10.16.1.12", True),
        ("10.16.1.11", "10.16.2.0", False),
        ("10.16.1.11", "11.4.0.106", False),
        (None, "11.4.0.106", False),
        ("new", "11.4.0.106", False),
        pytest.param("1" * 5000, "11.4.0.106", False, id="more digits than Python reads"),
    ],
)
def test_versions_of_plans(built, installed, fits):
    if fits:
        check_version(built, installed)
    else:
        assert installed in refusal(check_version, built, installed)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_call_into_tensorrt_waits_for_its_end(number):
    after = []
    with pytest.raises(KeyboardInterrupt) as caught, terminating(), signals_noted() as noted:
        signal.raise_signal(number)
        after.append(list(noted))
    assert after == [[number]] and isinstance(caught.value, Terminated) == (number == signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_only_the_main_threads_signals_are_noted():
    found = []

    def other():
        with signals_noted() as noted:
            found.append((noted, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [([], signal.default_int_handler)]


def test_version_numbers():
    assert version_numbers("10.16.1.11") == (10, 16, 1, 11)
    assert version_numbers("11.4.0rc1.2") == (11, 4, 0)
    assert version_numbers("") == ()
