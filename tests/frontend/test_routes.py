"""The table of routes."""

import pytest
from glimmer.frontend.api import generate, tgi
from glimmer.frontend.routes import all_routes
from glimmer.shared.config import ServeConfig

ROUTES = all_routes(ServeConfig())


def test_each_path_is_there_once_with_one_handler() -> None:
    assert len({route.path for route in ROUTES}) == len(ROUTES)
    for route in ROUTES:
        assert (route.handler is None) != (route.generating is None), route.path
        assert set(route.methods.split()) <= {"GET", "POST"}, route.path
        assert route.generating is None or route.body is not None, route.path


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: str(route.path))
def test_each_has_a_summary(route: object) -> None:
    assert getattr(route, "summary", ""), route


def test_tgi_changes_three_routes() -> None:
    other = all_routes(ServeConfig(use_tgi_api=True))
    changed = [b for a, b in zip(ROUTES, other, strict=True) if a != b]
    assert [route.path for route in changed] == ["/", "/generate", "/generate_stream"]
    assert {route.body for route in changed} == {tgi.TgiBody}
    assert ROUTES[1].generating is generate.generate
