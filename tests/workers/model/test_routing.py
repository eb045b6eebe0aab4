"""Routing can be watched from outside, and only while somebody watches."""

import pytest
import torch
from glimmer.workers.model import moe
from glimmer.workers.model.routing import count_distinct, recorded_routing


def test_each_routing_is_recorded_in_order() -> None:
    route = moe.route
    weight = torch.eye(4)
    with recorded_routing() as seen:
        for experts in ([0, 1, 1], [2, 2, 2]):
            found, _ = moe.route(weight[experts], weight, torch.zeros(4), 1, 1, 1, True, 1.0)
            assert found.flatten().tolist() == experts
    assert [ids.flatten().tolist() for ids in seen] == [[0, 1, 1], [2, 2, 2]]
    assert count_distinct(seen) == [2, 1]
    assert moe.route is route


def test_an_error_ends_the_recording() -> None:
    route = moe.route
    with pytest.raises(KeyError), recorded_routing():
        raise KeyError
    assert moe.route is route
