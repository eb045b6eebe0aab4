"""Requests made from /openapi.json by schemathesis: every answer is one that the document names.

The long run is the same command with more examples against a real server, see docs/log.md.
"""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance,unsupported_method"
)
NUM_OPERATIONS = 38


async def beat(engine: Any) -> None:
    """Heartbeats, so that the server stays healthy however long the run takes."""
    while True:
        engine.beat()
        await asyncio.sleep(1.0)


async def test_every_answer_is_one_that_the_document_names(start: Any, tmp_path: Path) -> None:
    server = await start(enable_prompt_logprobs=True, enable_admin_api=True)
    command = ["run", f"{server.url}/openapi.json", "--checks", CHECKS, "--no-color"]
    command += ["--phases", "examples,fuzzing", "--max-examples", "4", "--generation-deterministic"]
    beating = asyncio.create_task(beat(server.engine))
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).parent / "schemathesis",
        *command,
        cwd=tmp_path,  # it writes files where it runs
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(120):
        text = (await process.communicate())[0].decode()
    beating.cancel()
    assert process.returncode == 0, text
    tested = re.search(r"Tested: (\d+)", text)
    cases = re.search(r"(\d+) generated", text)
    assert tested is not None, text
    assert cases is not None, text
    assert int(tested[1]) == NUM_OPERATIONS
    assert int(cases[1]) >= 2 * NUM_OPERATIONS
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200
