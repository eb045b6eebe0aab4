"""`--metric_gateway`: sends the server's metrics to a Prometheus push gateway at intervals. The
first HTTP process does it for all."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from prometheus_client import push_to_gateway
from prometheus_client.exposition import basic_auth_handler, default_handler

from ...shared.config import ServeConfig, monitor_credentials
from ..context import Frontend

_TIMEOUT_S = 10.0
logger = logging.getLogger(__name__)


async def push_forever(frontend: Frontend) -> None:
    """Push until cancelled. An outage of the gateway is logged once."""
    config, is_failing = frontend.config, False
    while True:
        if frontend.totals is not None:
            await frontend.totals.refresh()
        try:
            await asyncio.to_thread(push_once, frontend)
            is_failing = False
        except OSError as error:  # HTTP errors of the gateway are OSErrors too
            if not is_failing:
                logger.warning("cannot push metrics to %s: %s", config.metric_gateway, error)
            is_failing = True
        await asyncio.sleep(config.push_interval)


def push_once(frontend: Frontend) -> None:
    """Push once; this replaces the group's previous push. Raises OSError when it fails."""
    config = frontend.config
    assert config.metric_gateway, "only called with a gateway"
    push_to_gateway(
        config.metric_gateway,
        config.job_name,
        frontend.metrics.registry,
        grouping_key(config),
        _TIMEOUT_S,
        handler=_with_credentials if config.enable_monitor_auth else default_handler,
    )


def grouping_key(config: ServeConfig) -> dict[str, str]:
    """The labels by which the gateway tells this server's metrics from others'."""
    return dict(pair.split("=", 1) for pair in config.grouping_key)


def _with_credentials(
    url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
) -> Callable[[], None]:
    user, password = monitor_credentials()
    handler: Any = basic_auth_handler
    send: Callable[[], None] = handler(url, method, timeout, headers, data, user, password)
    return send
