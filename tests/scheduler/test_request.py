"""States change only along the table; derived facts about a request are right."""

import itertools

import pytest
from glimmer.scheduler.request import LEGAL_TRANSITIONS, Request, RequestState
from glimmer.shared.messages import Submit
from glimmer.shared.sampling import SamplingParams


def make(**sampling: object) -> Request:
    submit = Submit(1, 0, [5, 6], SamplingParams(4, **sampling))  # type: ignore[arg-type]
    return Request(submit, 1, 0, uses_cache=True)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RequestState, repeat=2)))
def test_only_legal_transitions_exist(old: RequestState, new: RequestState) -> None:
    request = make()
    request.state = old
    if new in LEGAL_TRANSITIONS[old]:
        request.move(new)
        assert request.state is new
    else:
        with pytest.raises(AssertionError, match=f"{old.value} -> {new.value}"):
            request.move(new)


def test_every_state_can_end_and_the_end_is_final() -> None:
    for state, following in LEGAL_TRANSITIONS.items():
        if state is RequestState.FINISHED:
            assert not following
        else:
            assert RequestState.FINISHED in following


@pytest.mark.parametrize(
    ("sampling", "counted"),
    [
        ({}, []),
        ({"input_penalty": True}, []),
        ({"presence_penalty": 1.0}, [7]),
        ({"repetition_penalty": 1.1, "input_penalty": True}, [5, 6, 7]),
    ],
)
def test_penalties_count_outputs_and_the_prompt_if_asked(
    sampling: dict[str, object], counted: list[int]
) -> None:
    request = make(**sampling)
    request.tokens.append(7)
    assert request.counted_ids() == counted


def test_a_token_id_beyond_32_bits_is_an_error() -> None:
    with pytest.raises(OverflowError):
        Request(Submit(1, 0, [1 << 40], SamplingParams(1)), 1, 0, uses_cache=True)
