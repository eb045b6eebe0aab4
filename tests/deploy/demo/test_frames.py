import string

import pytest
from glimmer.deploy.demo import frames

FIELDS = {
    "REQUESTS": {"intent", "params"},
    "PARAMETERS_FIRST": {"intent", "params"},
    "PARAMETERS": {"p", "v"},
    "DESCRIPTIONS": {"verb"},
    "OPENERS": set(),
    "CLOSERS": set(),
    "DESCRIPTION_ENDS": set(),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_frame_stands_once_and_has_its_fields(name: str) -> None:
    made: tuple[str, ...] = getattr(frames, name)
    assert len({" ".join(frame.lower().split()) for frame in made}) == len(made)
    for frame in made:
        found = {(f or "").lower().replace("verbs", "verb") for _, f, _, _ in
                 string.Formatter().parse(frame) if f is not None}  # fmt: skip
        assert found == FIELDS[name], frame
