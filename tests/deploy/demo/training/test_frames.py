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
    frame_list: tuple[str, ...] = getattr(frames, name)
    assert len({" ".join(frame.lower().split()) for frame in frame_list}) == len(frame_list)
    for frame in frame_list:
        fields = [field for _, field, _, _ in string.Formatter().parse(frame) if field is not None]
        assert {f.lower().replace("verbs", "verb") for f in fields} == FIELDS[name], frame


def test_training_has_relatives_of_held_out_parameter_frames() -> None:
    cut = len(frames.PARAMETERS) - len(frames.PARAMETERS) // 5
    known = {word for frame in frames.PARAMETERS[:cut] for word in frame.split()}
    unknown = {word for frame in frames.PARAMETERS[cut:] for word in frame.split()} - known
    assert not unknown
