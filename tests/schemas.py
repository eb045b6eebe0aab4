"""Random JSON schemas whose values are bounded, so that even noise reaches an end; and grammars
walked along by bytes and tags, as the checking process sees them."""

import json
import random
import re
from dataclasses import dataclass
from typing import Any

from glimmer.frontend.grammar.check_child import Library, Setup
from glimmer.frontend.grammar.source import GrammarSource, compose
from glimmer.frontend.grammar.tool_calls import TAGS
from glimmer.shared.grammar import END_TOKEN, make_matcher

Json = dict[str, Any]
_NAMES = ("name", "size", 'quo"te', "back\\slash", "größe", "a b", "x", "x1", "x12", "", "null")
_PATTERNS = (
    r"^[A-Z]{2}-\d{3}$",
    r"^(ab|c){1,7}d?$",
    r"^[^a-z\"\\]{1,4}$",
    r"^\w{1,3}(\.\w{1,3})?$",
)
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")

END = 256
TAG_IDS = {tag: END + 1 + n for n, tag in enumerate(TAGS)}
ADDED_IDS = {END_TOKEN: END, **TAG_IDS}
_TEXT_OF = {token_id: tag.encode() for tag, token_id in TAG_IDS.items()}
_CLOSING = frozenset((*b'"}],', END))


def random_schema(seed: int, free_keys: bool = True) -> Json:
    """A schema document; the same for the same seed. `free_keys`: with objects whose keys may be
    any text, of any length."""
    rng = random.Random(seed)
    definitions = {"leaf": _leaf(rng), "pair": _node(rng, 1, [])}
    schema = _node(rng, rng.randint(1, 3), ["#/$defs/leaf", "#/$defs/pair"])
    document = {"$defs": definitions, **schema}
    if not free_keys and _has_free_keys(document):
        return random_schema(seed + 1_000_000, free_keys)
    return document


def combined_schema(seed: int) -> Json:
    """An object whose properties come from all keywords that put schemas together."""
    rng = random.Random(seed)
    names = iter(rng.sample(_NAMES, len(_NAMES)))

    def part() -> Json:
        some = [next(names) for _ in range(rng.randint(1, 2))]
        properties = {name: _node(rng, rng.randrange(2), []) for name in some}
        return {"properties": properties, "required": some[:1]}

    found: Json = {"$defs": {"base": part()}, "type": "object"}
    kinds = {
        "$ref": lambda: "#/$defs/base",
        "properties": lambda: part()["properties"],
        "allOf": lambda: [part(), {"$ref": "#/$defs/base"}],
        "anyOf": lambda: [part(), {"required": []}],
        "oneOf": lambda: [part(), part()],
    }
    found |= {kind: kinds[kind]() for kind in rng.sample([*kinds], 2)}
    return combined_schema(seed + 1_000_000) if _has_free_keys(found) else found


def _has_free_keys(schema: Json) -> bool:
    return "additionalProperties': {" in str(schema)


def _node(rng: random.Random, depth: int, refs: list[str]) -> Json:
    if refs and rng.random() < 0.1:
        return {"$ref": rng.choice(refs)}
    if depth == 0:
        return _leaf(rng)
    match rng.randrange(8):
        case 0:
            return _leaf(rng)
        case 1:
            return {"anyOf": [_node(rng, depth - 1, refs) for _ in range(rng.randint(1, 3))]}
        case 2:
            low = rng.randrange(3)
            return {
                "type": "array",
                "items": _node(rng, depth - 1, refs),
                "minItems": low,
                "maxItems": low + rng.randrange(3),
            }
        case 3:
            parts = [_node(rng, depth - 1, refs) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": 1}
        case 4:
            limits = {"minProperties": rng.randrange(2), "maxProperties": rng.randint(1, 3)}
            extra = _node(rng, depth - 1, refs)
            return {"type": "object", "additionalProperties": extra, **limits}
    return _object(rng, depth, refs)


def _object(rng: random.Random, depth: int, refs: list[str]) -> Json:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    schema: Json = {
        "type": "object",
        "properties": {name: _node(rng, depth - 1, refs) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    if rng.random() < 0.2:
        schema = {"allOf": [schema, {"required": names[:1]}]}
    return schema


def _leaf(rng: random.Random) -> Json:
    low = rng.randint(-1200, 1200)
    match rng.randrange(12):
        case 0:
            return {"type": "integer"}
        case 1:
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 2000)}
        case 2:
            return {"type": "integer", rng.choice(("exclusiveMinimum", "exclusiveMaximum")): low}
        case 3:
            return {"type": "number", "minimum": low / 8, "exclusiveMaximum": low / 8 + 0.5}
        case 4:
            return {"type": "number"}
        case 5:
            least = rng.randrange(4)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(9)}
        case 6:
            return {"type": "string", "maxLength": 8}
        case 7:
            return {"type": "string", "pattern": rng.choice(_PATTERNS)}
        case 8:
            return {"type": "string", "format": rng.choice(_FORMATS)}
        case 9:
            values = ["a", "", 'q"\\', 1, -2.5, None, True, {"k": [1, "é"]}, []]
            return {"enum": rng.sample(values, rng.randint(1, 4))}
        case 10:
            return {"type": rng.sample(["boolean", "null", "integer"], 2)}
    return {"const": rng.choice(["fixed", 7, None, [1, 2]])}


_MATCHES = dict(zip(_PATTERNS, ("AB-123", "abcd", "A_!", "a_1.b"), strict=True))
_EXAMPLES = {
    "date": "2024-02-28",
    "time": "12:30:00Z",
    "date-time": "2024-02-28T12:30:00Z",
    "uuid": "01234567-89ab-cdef-0123-456789abcdef",
    "ipv4": "10.0.0.255",
    "email": "first.last@example.org",
}


def instance(schema: Json, root: Json, rng: random.Random) -> Any:
    """A value that is valid under a schema of `random_schema`, its keys in the declared order."""
    if "$ref" in schema:
        return instance(root["$defs"][schema["$ref"].rpartition("/")[2]], root, rng)
    if "anyOf" in schema:
        return instance(rng.choice(schema["anyOf"]), root, rng)
    if "allOf" in schema:
        first, second = schema["allOf"]
        return instance({**first, "required": first["required"] + second["required"]}, root, rng)
    if "enum" in schema or "const" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    kind = schema["type"] if isinstance(schema["type"], str) else rng.choice(schema["type"])
    match kind:
        case "array" if "prefixItems" in schema:
            return [instance(part, root, rng) for part in schema["prefixItems"]]
        case "array":
            count = rng.randint(schema["minItems"], schema["maxItems"])
            return [instance(schema["items"], root, rng) for _ in range(count)]
        case "object":
            return _object_of(schema, root, rng)
        case "string":
            return _string_of(schema, rng)
    return _number_of(kind, schema, rng)


def _object_of(schema: Json, root: Json, rng: random.Random) -> Json:
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        return {'ke"y': instance(extra, root, rng)}
    names = [n for n in schema["properties"] if n in schema["required"] or rng.random() < 0.5]
    return {name: instance(schema["properties"][name], root, rng) for name in names}


def _string_of(schema: Json, rng: random.Random) -> str:
    if "pattern" in schema:
        return _MATCHES[schema["pattern"]]
    if "format" in schema:
        return _EXAMPLES[schema["format"]]
    count = rng.randint(schema.get("minLength", 0), schema["maxLength"])
    return "".join(rng.choice('aé"\\\n\U0001f600 ') for _ in range(count))


def _number_of(kind: str, schema: Json, rng: random.Random) -> Any:
    if kind in ("null", "boolean"):
        return None if kind == "null" else rng.random() < 0.5
    low = schema.get("minimum", schema.get("exclusiveMaximum", 0) - 5)
    if "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + 1
    return low if kind == "number" else rng.randint(int(low), schema.get("maximum", int(low) + 4))


def read_json(text: str) -> Any:
    """The value. A number beyond all doubles, which JSON allows, becomes a large one."""
    return json.loads(text, parse_float=lambda number: min(max(float(number), -1e300), 1e300))


def changed(value: Any, rng: random.Random) -> Any:
    """The value with one change somewhere."""
    if isinstance(value, list) and value and rng.random() < 0.7:
        n = rng.randrange(len(value))
        return [
            *value[:n],
            *([changed(value[n], rng)] if rng.random() < 0.8 else []),
            *value[n + 1 :],
        ]
    if isinstance(value, dict) and value and rng.random() < 0.7:
        name = rng.choice(list(value))
        if rng.random() < 0.3:
            return {key: part for key, part in value.items() if key != name}
        return {**value, name: changed(value[name], rng)}
    others = [None, True, 5000, -2.25, "other", "", [None], {"unknown": 1}, f"{value}x"]
    return rng.choice([other for other in others if other != value])


# --- grammars ---


@dataclass(frozen=True)
class Walks:
    """What grammars allow."""

    library: Library

    def text(self, source: GrammarSource) -> str:
        """The grammar of a source. Raises FieldError."""
        return compose(source, TAG_IDS, self.library.problem)

    def walk(self, grammar: str, seed: int) -> str | None:
        """A random text of the grammar, tags included; None if it does not end. AssertionError
        when the walk gets stuck."""
        matcher = make_matcher(self.library.tokenizer, grammar)
        rng, out = random.Random(seed), b""
        for _ in range(3000):
            mask = matcher.compute_bitmask()
            assert not matcher.is_error(), matcher.get_error()
            legal = _ids(mask)
            assert legal, f"stuck after {out!r}"
            last = [i for i in legal if i in _CLOSING]
            token = rng.choice(last if last and rng.random() < 0.5 else legal)
            if token == END:
                return out.decode()
            assert matcher.consume_token(token), f"token {token} after {out!r}"
            out += _TEXT_OF.get(token) or bytes([token])
        return None

    def longest(self, grammar: str, favourites: bytes, limit: int) -> str | None:
        """The text of a model that goes on as long as it can: with its favourite bytes, then any
        others, and only then with those that close something. None if it is longer than `limit`."""
        matcher = make_matcher(self.library.tokenizer, grammar)
        rank = {byte: n - 1000 for n, byte in enumerate(favourites)}
        rank |= dict.fromkeys((*_CLOSING, *_TEXT_OF), 1000) | {END: 2000}
        out = b""
        while len(out) < limit:
            mask = matcher.compute_bitmask()
            assert not matcher.is_error(), matcher.get_error()
            legal = _ids(mask)
            token = min(legal, key=lambda i: rank.get(i, i))
            if token == END:
                return out.decode()
            matcher.consume_token(token)
            out += _TEXT_OF.get(token) or bytes([token])
        return None

    def takes(self, grammar: str, text: str) -> bool:
        """Whether the grammar allows exactly this text, in which tags are tags."""
        ids: list[int] = []
        for n, part in enumerate(_split(text)):
            ids += [TAG_IDS[part]] if n % 2 else part.encode()
        matcher = make_matcher(self.library.tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def _ids(mask: bytes) -> list[int]:
    return [i for i in range(END + 1 + len(TAGS)) if mask[i >> 3] >> (i & 7) & 1]


def _split(text: str) -> list[str]:
    """Text, tag, text, tag, ..., text."""
    return re.split("(" + "|".join(TAGS) + ")", text)


def make_walks() -> Walks:
    """With a vocabulary of the bytes, an end token and the tags."""
    return Walks(Library(Setup(320, ADDED_IDS, memory_mb=1024, timeout_s=60)))
