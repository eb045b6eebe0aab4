"""`glimmer serve` with the fake worker instead of the real one; started by `overhead.py`."""

import sys

from ..cli import serve

if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], worker_module="glimmer.deploy.bench.fake_worker"))
