"""`lavin-rt bench serve`: what it asks, and its verdicts on figures that are known."""

from __future__ import annotations

import argparse
import copy

import pytest

pytest.importorskip("httpx", reason="needs the extra test")

from lavin_bench.serve_load import TASKS, faults, requests
from lavin_rt.cli import main

OPTIONS = argparse.Namespace(requests=200, alone=40)
GOOD = {
    "many_clients": {"answered": 200},
    "one_client": [{"answered": 20}, {"answered": 20}],
    "counted": 240,
    "worst_grey_levels": 2,
    "times_per_second": 1.3,
    "memory": {"growth": 1.03},
}


def test_requests_are_over_all_tasks_two_speeds_and_many_seeds():
    asked = requests(200, 20)
    assert {one["task"] for one in asked} == set(TASKS) and {one["speed"] for one in asked} == {"exact", "fast"}
    assert len({one["seed"] for one in asked}) > 190 and asked == requests(200, 20)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("many_clients", "answered"), 199, "239 answered"),
        (("counted",), 241, "241 by the service"),
        (("worst_grey_levels",), 3, "3 grey levels"),
        (("times_per_second",), 1.29, "1.29 times"),
        (("memory", "growth"), 1.031, "memory grew"),
    ],
)
def test_verdicts(where, value, words):
    assert not faults(GOOD, OPTIONS)
    figures = copy.deepcopy(GOOD)
    place = figures
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    [fault] = faults(figures, OPTIONS)
    assert words in fault


@pytest.mark.parametrize("given", [["--clients", "0"], ["--alone", "300"], ["--memory", "50"], ["--memory", "-1"]])
def test_options_that_do_not_fit(given, capsys):
    assert main(["bench", "serve", *given]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
