import string

import pytest
from glimmer.deploy.demo.training import frames

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


def test_training_has_relatives_of_held_out_parameter_frames() -> None:
    made = frames.PARAMETERS
    cut = len(made) - len(made) // 5
    known = {word for frame in made[:cut] for word in frame.split()}
    unknown = {word for frame in made[cut:] for word in frame.split()} - known
    assert not unknown
