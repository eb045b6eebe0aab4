"""Which lines of a key file are keys, and which key a request has."""

from pathlib import Path

import pytest
from glimmer.frontend.access.keys import Key, KeyRing, Limits, load_keys, parse_keys
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError
from glimmer.shared.secrets import key_digest
from multidict import CIMultiDict

A, B = key_digest("key of a"), key_digest("key of b")
NONE = Limits()


def test_a_file_has_names_digests_limits_and_comments() -> None:
    text = f"""
    # who: digest
    alice:{A} requests=8 tokens_per_minute=60000  # the first one
    ops:{B.upper()} admin
    """
    alice, ops = parse_keys(text, Limits(requests=2, queued_tokens=5))
    assert alice == Key("alice", A, False, Limits(8, 5, 60000))
    assert ops == Key("ops", B, True, NONE), "limits of flags are not for admins"
    assert parse_keys("", NONE) == ()


def test_a_user_may_have_two_keys() -> None:
    keys = parse_keys(f"a:{A} requests=1\na:{B} requests=1", NONE)
    assert [key.name for key in keys] == ["a", "a"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a", "line 1: a needs the SHA-256"),
        ("\na:sk-secret", "line 2: a needs the SHA-256"),
        (f"a b:{A}", "line 1: a needs the SHA-256"),
        (f":{A}", "line 1: needs name:sha256"),
        (f"{'n' * 65}:{A}", "a name has up to 64"),
        (f"a#1:{A}", "line 1: a needs"),
        (f"a:{A} requests=0", "unknown word requests=0; there are: admin, requests=NUMBER"),
        (f"a:{A} requests=-1", "unknown word"),
        (f"a:{A} requests=x", "unknown word"),
        (f"a:{A} requests={1 << 41}", "unknown word"),
        (f"a:{A} speed=1", "unknown word speed=1"),
        (f"a:{A}\nb:{A}", "the key of b is there twice"),
        (f"a:{A}\na:{B} requests=1", "the lines of a have different limits"),
        (f"a:{A}\na:{B} admin", "the lines of a have different limits"),
        ("\n".join(f"a{n}:{n:064x}" for n in range(4097)), "4097 keys, at most 4096"),
    ],
)
def test_a_line_that_is_wrong_is_named_and_no_key_is_shown(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_keys(text, NONE)
    assert problem in str(error.value)
    assert "secret" not in str(error.value)
    assert A not in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not a text file"),
        (b"#" * ((1 << 20) + 1), "more than"),
        (b"a:b", "line 1: a needs"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as error:
        load_keys(ServeConfig(api_key_file=str(path)))
    assert str(error.value).startswith(f"--api_key_file {path}: ")


def test_keys_of_flags_and_file_are_together(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice:{A}\nops:{key_digest('o')} admin requests=3")
    keys = load_keys(
        ServeConfig(
            api_key=(B,),
            admin_api_key=(key_digest("root"),),
            api_key_file=str(path),
            key_max_requests=7,
        )
    )
    assert [(k.name, k.is_admin, k.limits.requests) for k in keys] == [
        ("api_key#1", False, 7),
        ("admin_api_key#1", True, None),
        ("alice", False, 7),
        ("ops", True, 3),
    ]


RING = KeyRing([Key("a", A), Key("b", B, is_admin=True)])


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer key of a"}, "a"),
        ({"Authorization": "bearer  key of a "}, "a"),
        ({"X-Api-Key": "key of b"}, "b"),
        ({"x-api-key": "key of b", "Authorization": "Bearer key of a"}, "b"),
        ({"x-api-key": "key of a", "Authorization": "Bearer key of b"}, "b"),
        ({"x-api-key": "wrong", "Authorization": "Bearer key of a"}, "a"),
        ({"x-api-key": "key of a", "Authorization": "Basic wrong"}, "a"),
    ],
)
def test_a_key_is_found_in_either_header(headers: dict[str, str], name: str) -> None:
    key = RING.find(CIMultiDict(headers))
    assert key is not None
    assert key.name == name


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "key of a"},
        {"Authorization": "Basic key of a"},
        {"Authorization": f"Bearer {A}"},
        {"Authorization": "Bearer key of A"},
        {"x-api-key": ""},
        {"x-api-key": "key of a\udcff"},
        {"Cookie": "key of a"},
    ],
)
def test_nothing_else_is_a_key(headers: dict[str, str]) -> None:
    assert RING.find(CIMultiDict(headers)) is None


def test_without_keys_none_is_right() -> None:
    ring = KeyRing([])
    assert ring.find(CIMultiDict({"x-api-key": "key of a", "Authorization": "Bearer "})) is None
    ring.replace([Key("a", A)])
    assert ring.find(CIMultiDict({"x-api-key": "key of a"})) is not None
