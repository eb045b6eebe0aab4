"""Routing can be watched from outside, and only while somebody watches."""

import pytest
import torch
from glimmer.workers.model import moe
from glimmer.workers.model.routing import count_distinct, recorded_routing


def test_each_routing_is_recorded_in_order() -> None:
    route = moe.norm_route
    weight = torch.eye(4)
    with recorded_routing() as seen:
        for experts in ([0, 1, 1], [2, 2, 2]):
            given = weight[experts], torch.ones(4), 1e-6, weight, torch.zeros(4)
            _, found, _ = moe.norm_route(*given, 1, 1, 1, True, 1.0)
            assert found.flatten().tolist() == experts
    assert [ids.flatten().tolist() for ids in seen] == [[0, 1, 1], [2, 2, 2]]
    assert count_distinct(seen) == [2, 1]
    assert moe.norm_route is route


def test_an_error_ends_the_recording() -> None:
    route = moe.norm_route
    with pytest.raises(KeyError), recorded_routing():
        raise KeyError
    assert moe.norm_route is route
