"""`docs/tracing-a-request.md` shows the messages of one real prompt. This test sends that prompt
through the real tokenizer, scheduler core and a tiny model, and compares the page with them.

After a change of messages, `pytest tests/e2e/test_trace.py --update-trace` rewrites the page.
"""

import textwrap
from pathlib import Path

import msgspec
import pytest
from engine import Engine
from glimmer.shared.messages import Finished, Message, Part, StepPlan, StepResult, Submit, Tokens
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.shared.transport import encode
from transformers import AutoTokenizer

PAGE = Path(__file__).parent.parent.parent / "docs" / "tracing-a-request.md"
BODY = """\
POST /v1/chat/completions
{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}"""

TEMPLATE = """\
# Tracing a request

This page follows one prompt through a tiny test model and prints every message.
`tests/e2e/test_trace.py` sends the prompt and compares its messages with this page. The types are
in `shared/messages.py`, which says who sends each of them and when. Fields with default values
are left out.

## 1. HTTP to `Submit`

```
{body}
```

`frontend/api/openai.py` decodes and checks the body. `frontend/text/tokenizer.py` renders the
chat template to `{prompt}` and encodes it to {count} ids. `frontend/engine/client.py` draws a
request id and a seed. It sends {submit_bytes} bytes of MessagePack to the scheduler:

```
{submit}
```

## 2. Step 0: the prompt

`scheduler/core.py` puts the request into the queue and then gives it a row and pages.
`scheduler/batch.py` makes this plan. The chunk ends with the last known token, so the step
samples a token (`sample=True`):

```
{plan0}
```

The scheduler does not wait for the result. It sends the next plan at once (look-ahead). The plan
names only the row: the row's next input is the token that step 0 samples, which the worker has.

```
{plan1}
```

The worker (`workers/step.py`) applies plan 0 to its rows, runs the model
(`workers/model/glm4_moe_lite.py`), samples, and answers:

```
{result0}
```

The scheduler forwards the token to the frontend, where `frontend/text/detokenize.py` turns it
into text:

```
{tokens0}
```

## 3. Step 1: one more token

```
{result1}
```

This is the second of two allowed tokens, so the scheduler sends no third plan. It sends the token
and then `Finished`. Each `Submit` is answered by exactly one `Finished`:

```
{tokens1}
{finished}
```

The frontend writes the reply: one JSON body, or the last events of a stream.

## Messages that this request did not need

| message | sender to receiver | when |
|---|---|---|
| `Hello` | every process to launcher and scheduler | first, with its version |
| `Progress` | every process to launcher | at start: the current stage |
| `Ready` | every process to launcher; worker to scheduler; scheduler to frontends | it can work |
| `Heartbeat` | scheduler to frontends and launcher | every second: progress, queue, pages |
| `Counts` | frontend to launcher | every second and at a scrape: its counters and histograms |
| `LauncherBeat` | launcher to frontends | every second and after `Counts`: restarts, sums |
| `Abort` | frontend to scheduler | the client left, or a stop string was found |
| `AbortNamed` | frontend to the other frontends | `/abort_request`: one may have the request |
| `FlushCache` | frontend to scheduler | `/flush_cache` |
| `WorkerFailed` | worker or scheduler to launcher | a rank cannot continue, or does not answer |
| `PeerLost` | launcher to the others | a process died |
| `Reload` | launcher to frontends | SIGHUP: read key and certificate files again |
| `Reloaded` | frontend to launcher | files were read again, or the reason why old contents stay |
| `Shutdown` | launcher to all | drain, or stop now |
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
