"""Every message survives the wire; nothing else gets through."""

import msgpack
import msgspec
import pytest
from glimmer.shared import messages, transport
from glimmer.shared.errors import CodecError
from glimmer.shared.messages import Message, PrefillChunk, RowAdmit, RowResult, TokenLogprob
from glimmer.shared.sampling import SamplingParams
from glimmer.shared.transport import decode, encode
from hypothesis import given
from hypothesis import strategies as st

MESSAGE_TYPES = [
    t for t in vars(messages).values() if isinstance(t, type) and t in Message.__subclasses__()
]
SAMPLING = SamplingParams(
    max_new_tokens=7,
    temperature=0.5,
    stop_token_ids=(3, 4),
    logit_bias=((1, -2.5),),
    seed=2**63 - 1,
)
GRAMMAR = messages.Grammar("start: /a/", "guided_regex", 7, (8, 9))
LOGPROB = TokenLogprob(5, -0.25, 1, [(5, -0.25), (6, -9999.0)])


def example(kind: type[Message]) -> Message:
    """An instance with every field set to something that is not its default."""
    by_type = {
        int: 3,
        float: 1.5,
        str: "text",
        bool: True,
        SamplingParams: SAMPLING,
        list[int]: [0, 2**40],
        list[float]: [0.5, 2.0**40],
        list[messages.GpuState]: [messages.GpuState("GPU-1", False, 2)],
        messages.StepTimes: messages.StepTimes([1, 2], 0.5),
    }
    by_name = {
        "admitted": [RowAdmit(1, SAMPLING, [4, 5], 64, 2, [7], GRAMMAR, [8, 9])],
        "grammar": GRAMMAR,
        "dropped": ["a", "b"],
        "appended": [messages.PagesAppended(2, [9])],
        "prefill": [PrefillChunk(0, 64, [1, 2, 3], False, 4)],
        "rows": [RowResult([5], [LOGPROB])],
        "prompt_logprobs": [[LOGPROB], []],
    }
    if kind is messages.Tokens:
        by_name["rows"] = [messages.TokenRow(2**61, [5], [LOGPROB], [LOGPROB])]
    fields = msgspec.structs.fields(kind)
    return kind(**{f.name: by_type.get(f.type, by_name.get(f.name)) for f in fields})


def test_the_list_of_types_is_complete() -> None:
    assert len(MESSAGE_TYPES) == 19
    assert set(MESSAGE_TYPES) == set(messages.AnyMessage.__args__)


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda t: t.__name__)
def test_every_message_round_trips(kind: type[Message]) -> None:
    message = example(kind)
    data = encode(message)
    assert decode(data) == message
    assert msgpack.unpackb(data)[0] == kind.__name__


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda t: t.__name__)
def test_a_wrong_type_in_any_field_is_refused(kind: type[Message]) -> None:
    fields = msgpack.unpackb(encode(example(kind)))
    for i in range(1, len(fields)):
        wrong = {"not": "this"}
        with pytest.raises(CodecError):
            decode(msgpack.packb([*fields[:i], wrong, *fields[i + 1 :]]))
    with pytest.raises(CodecError):
        decode(msgpack.packb([*fields, "one too many"]))


@given(st.binary(max_size=200))
def test_random_bytes_raise_only_codec_errors(data: bytes) -> None:
    try:
        decode(data)
    except CodecError:
        return
    raise AssertionError("random bytes decoded to a message")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",  # array header announcing four billion items
        b"\x91" * 5000 + b"\xc0",  # nesting
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01x\x94.",  # another serializer's
        msgpack.packb(["Abort", [1]]) + b"\x00",  # trailing bytes
        msgpack.packb(["NoSuchMessage", 1]),
        msgpack.packb({"Abort": [1]}),
    ],
)
def test_hostile_bytes_are_codec_errors(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


def test_a_message_over_the_size_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(messages.Abort(list(range(100))))
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", len(data) - 1)
    with pytest.raises(CodecError, match="limit"):
        decode(data)
