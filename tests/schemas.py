"""Random JSON schemas whose values are bounded, so that even noise reaches an end."""

import random
from typing import Any

Json = dict[str, Any]
_NAMES = ("name", "size", 'quo"te', "back\\slash", "größe", "a b", "x", "x1", "x12", "", "null")
_PATTERNS = (r"^[A-Z]{2}-\d{3}$", r"(ab|c){1,7}d?", r"[^a-z\"\\]{1,4}", r"^\w{1,3}(\.\w{1,3})?$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


def random_schema(seed: int, free_keys: bool = True) -> Json:
    """A schema document; the same for the same seed. `free_keys`: with objects whose keys may be
    any text, of any length."""
    rng = random.Random(seed)
    definitions = {"leaf": _leaf(rng), "pair": _node(rng, 1, [])}
    schema = _node(rng, rng.randint(1, 3), ["#/$defs/leaf", "#/$defs/pair"])
    document = {"$defs": definitions, **schema}
    if not free_keys and "additionalProperties': {" in str(document):
        return random_schema(seed + 1_000_000, free_keys)
    return document


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
