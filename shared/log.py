"""Log lines in LightLLM's format, with the name of the process. They go to stderr only."""

import logging
import sys


def setup_logging(process: str, level: str) -> None:
    """Configure the root logger of this process. `process` is a name such as "worker-0"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            f"%(levelname)s %(asctime)s [{process} %(filename)s:%(lineno)d] %(message)s",
            datefmt="%m-%d %H:%M:%S",
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False  # a full disk or closed stderr must not reach a request
