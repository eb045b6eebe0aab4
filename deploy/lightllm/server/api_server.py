"""`python -m glimmer.server.api_server ...` is `glimmer serve ...`, so that a launch script for
`lightllm.server.api_server` needs one word changed."""

import sys

from glimmer.deploy.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
