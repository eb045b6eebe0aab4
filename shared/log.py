"""Log lines: LightLLM's shape, to stderr, with the process's name. Never to files of our own."""

import logging
import sys


def setup_logging(process: str, level: str) -> None:
    """Configure the root logger of this process, e.g. process="worker-0"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            f"%(levelname)s %(asctime)s [{process} %(filename)s:%(lineno)d] %(message)s",
            datefmt="%m-%d %H:%M:%S",
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False  # a full disk or closed stderr must not reach a request
