"""`docs/tracing-a-request.md` shows one real prompt's messages. This test sends that prompt through
the real tokenizer, scheduler core and model, and compares.

After a change of messages: `pytest tests/e2e/test_trace.py --update-trace` writes the page anew.
"""

import textwrap
from pathlib import Path

import msgspec
import pytest
from engine import Engine
from glimmer.shared.codec import encode
from glimmer.shared.messages import Finished, Message, Part, StepPlan, StepResult, Submit, Tokens
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from transformers import AutoTokenizer

PAGE = Path(__file__).parent.parent.parent / "docs" / "tracing-a-request.md"
BODY = """\
POST /v1/chat/completions
{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}"""

TEMPLATE = """\
# Tracing a request

The messages of one prompt through the demo model, as they really are: `tests/e2e/test_trace.py`
runs it and compares this page. Follow along in `shared/messages.py`, where each type says who sends
it and when.

## In: HTTP to `Submit`
```
{body}
```
`frontend/api/openai.py` decodes and checks it; `frontend/text/tokenizer.py` renders the
chat template to `{prompt}` and makes {count} ids of it.
`frontend/engine/client.py` draws a request id and a seed and sends
{submit_bytes} bytes of MessagePack:
```
{submit}
```

## Step 0: the prompt
`Scheduler.step` in `scheduler/core.py` puts the request in the queue, finds a row and pages for it,
and `scheduler/batch.py` makes this plan. The chunk holds the last known token, so one is sampled:
```
{plan0}
```
Before its result is there, the next plan is made and sent (look-ahead): the row decodes, from a
token that only the worker knows yet:
```
{plan1}
```
`workers/runner.py` applies the plan to its rows, runs `workers/model/glm4_moe_lite.py`, samples:
```
{result0}
```
The scheduler passes the token on, and `frontend/text/detokenize.py` makes text of it:
```
{tokens0}
```

## Step 1: one token more
```
{result1}
```
That was the last of two tokens, so there is no third plan. `Finished` follows the last `Tokens`,
exactly once:
```
{tokens1}
{finished}
```
`frontend/wire/sse.py` or a whole JSON body tells the client.

## Messages that this request did not need
| message | from, to | when |
|---|---|---|
| `Hello`, `Progress`, `Ready` | each process, to launcher, scheduler | start: who, how far, ready |
| `Heartbeat` | scheduler, to frontends and launcher | every second: progress, queue, pages |
| `Abort` | frontend, to scheduler | the client left, or a stop string was seen |
| `AbortNamed` | frontend, to the other frontends | `/abort_request`: one may have that request |
| `FlushCache` | frontend, to scheduler | `/flush_cache` |
| `LoadGrammar` | scheduler, to worker rank 0 | a request needs a grammar that is not there yet |
| `GrammarLoaded` | worker rank 0, to scheduler | now its rows may be admitted |
| `WorkerFailed` | worker or scheduler, to launcher | a rank cannot go on, or does not answer |
| `PeerLost` | launcher, to the others | a process died |
| `Shutdown` | launcher, to all | drain, or stop now |
"""


def show(value: object) -> str:
    """A message with those fields that differ from their defaults, by name."""
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if not isinstance(value, Message | Part | SamplingParams):
        return repr(value)
    fields = [
        f"{field.name}={show(getattr(value, field.name))}"
        for field in msgspec.structs.fields(value)
        if field.required or getattr(value, field.name) not in (field.default, [])
    ]
    return f"{type(value).__name__}({', '.join(fields)})"


def render(tiny_model: Path, runtime_dir: Path) -> str:
    """The page as it should be."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    stop = load_model_spec(tiny_model).eos_token_ids
    sampling = SamplingParams(max_new_tokens=2, seed=7, stop_token_ids=stop)
    engine = Engine(tiny_model, runtime_dir)
    engine.generate([ids], sampling)
    of_kind = {
        kind.__name__.lower(): [
            "\n".join(textwrap.wrap(show(m), 96, subsequent_indent="    "))
            for m in engine.messages
            if isinstance(m, kind)
        ]
        for kind in (Submit, StepPlan, StepResult, Tokens, Finished)
    }
    assert [len(found) for found in of_kind.values()] == [1, 2, 2, 2, 1]
    return TEMPLATE.format(
        body=BODY,
        prompt=prompt,
        count=len(ids),
        submit_bytes=len(encode(next(m for m in engine.messages if isinstance(m, Submit)))),
        submit=of_kind["submit"][0],
        plan0=of_kind["stepplan"][0],
        plan1=of_kind["stepplan"][1],
        result0=of_kind["stepresult"][0],
        result1=of_kind["stepresult"][1],
        tokens0=of_kind["tokens"][0],
        tokens1=of_kind["tokens"][1],
        finished=of_kind["finished"][0],
    )


def test_the_page_shows_what_really_happens(
    tiny_model: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    page = render(tiny_model, tmp_path)
    if pytestconfig.getoption("--update-trace"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page
