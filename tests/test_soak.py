"""The short form of `python -m lavin_bench.soak`."""

from __future__ import annotations

import pytest

from lavin_bench.soak import plan, soak


def test_calls_are_mixed_and_the_same_every_time():
    calls = plan(400)
    assert calls == plan(400) and calls[:100] == plan(100)
    for name, count in (("task", 6), ("size", 3), ("speed", 4), ("queries", 2), ("guidance", 2), ("thread", 2)):
        assert len({call[name] for call in calls}) == count


@pytest.mark.slow
def test_a_few_calls_leave_nothing_and_give_what_a_fresh_process_gives():
    record = soak(calls=40, settled=20, kinds=2)
    assert record["descriptors"] <= 0 and not record["different"] and record["compared"] == 2
