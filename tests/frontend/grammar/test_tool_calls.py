"""Calls in GLM's format: tags in place, required parameters there, values by their schemas."""

import json
import random
import re
from typing import Any

import jsonschema_rs
import pytest
from glimmer.frontend.grammar.source import FieldError, GrammarSource
from glimmer.frontend.parsers.schemas import Schemas
from glimmer.frontend.parsers.values import argument_type
from schemas import Walks, instance, random_schema

PAIR = re.compile(r"<arg_key>(.*?)</arg_key><arg_value>(.*?)</arg_value>", re.DOTALL)
WEATHER = {
    "type": "object",
    "$defs": {"Unit": {"enum": ["c", "f"]}, "Text": {"type": "string"}},
    "properties": {
        "city": {"type": "string", "description": "where"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/Unit"},
        "note": {"anyOf": [{"$ref": "#/$defs/Text"}, {"type": "null"}]},
        "place": {
            "type": "object",
            "properties": {"lat": {"type": "integer"}},
            "required": ["lat"],
        },
        "zip": {"type": "string", "pattern": r"^\d{5}$"},
        "any": {},
    },
    "required": ["city", "unit", "zip"],
}


def write(parameters: Any, walks: Walks, name: str = "f", strict: bool = False) -> str:
    function = {"name": name, "parameters": parameters, "strict": strict}
    return walks.text(GrammarSource(None, "must", False, (function,), ("tool",)))


def calls(
    parameters: Any, walks: Walks, count: int = 20, strict: bool = False
) -> list[dict[str, str]]:
    """Arguments of random calls, as texts; each call has been checked as a whole."""
    text, found = write(parameters, walks, strict=strict), []
    for seed in range(count):
        out = walks.walk(text, seed)
        if out is not None:
            body = re.fullmatch(r"<tool_call>f(.*)</tool_call>", out, re.DOTALL)
            assert body, out
            pairs = PAIR.findall(body[1])
            rest = PAIR.sub("", body[1])
            assert rest == "", out
            assert len({key for key, _ in pairs}) == len(pairs), out
            found.append(dict(pairs))
    assert len(found) > count / 2
    return found


def test_parameters_are_typed_ordered_and_there(walks: Walks) -> None:
    found = calls(WEATHER, walks)
    order = list(WEATHER["properties"])
    for arguments in found:
        assert {"city", "unit", "zip"} <= arguments.keys()
        assert list(arguments) == [name for name in order if name in arguments]
        assert arguments["unit"] in ("c", "f")  # an enum's texts without quotes
        assert re.fullmatch(r"[0-9]{5}", arguments["zip"])
        assert 1 <= json.loads(arguments.get("days", "1")) <= 9
        assert isinstance(json.loads(arguments.get("place", '{"lat": 1}'))["lat"], int)
    assert any("days" in a for a in found)
    assert any("days" not in a for a in found)


def test_string_parameters_are_free_text(walks: Walks) -> None:
    texts = {
        a["s"] for a in calls({"properties": {"s": {"type": "string"}}, "required": ["s"]}, walks)
    }
    assert any("\n" in t or '"' in t or "\\" in t or "<" in t for t in texts)


def test_no_parameters_no_arguments(walks: Walks) -> None:
    for parameters in ({}, {"type": "object"}, {"type": "object", "properties": {}}):
        assert walks.walk(write(parameters, walks, "a b"), 1) == "<tool_call>a b</tool_call>"


def test_undeclared_parameters_only_where_all_are(walks: Walks) -> None:
    free = {"type": "object", "additionalProperties": {"type": "boolean"}}
    text = write(free, walks)
    values = [pair for seed in range(30) for pair in PAIR.findall(walks.walk(text, seed) or "")]
    assert values
    assert {value for _, value in values} == {"true", "false"}
    declared = {"properties": {"a": {"type": "null"}}, "additionalProperties": True}
    assert all(a.keys() <= {"a"} for a in calls(declared, walks))


def test_nullable_strings_enums_and_type_lists(walks: Walks) -> None:
    schema = {
        "allOf": [{"$ref": "#/$defs/Base"}],
        "$defs": {"Base": {"properties": {"x": {"type": ["integer", "null"]}}, "required": ["x"]}},
    }
    assert {type(json.loads(a["x"])) for a in calls(schema, walks, 40)} == {int, type(None)}
    schema = {
        "properties": {"x": {"enum": ["a", 1, None]}, "y": {"const": "k"}},
        "required": ["x", "y"],
    }
    found = calls(schema, walks)
    assert {a["x"] for a in found} == {"a", "1", "null"}
    assert {a["y"] for a in found} == {"k"}
    assert calls({"required": ["z"]}, walks)[0].keys() == {"z"}


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"type": "array"}, "type must be object"),
        ({"properties": 3}, "properties must be"),
        ({"required": [3]}, "must hold strings"),
        ({"required": ["x"], "additionalProperties": False}, "required but not allowed"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "#/properties/a: unique"),
        ({"properties": {"a": {"enum": "x"}}}, "enum"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "leads back"),
        ({"$ref": "#"}, "leads back"),
        ({"properties": {"a": {"type": "string", "minLength": 10**7}}}, "minLength"),
        ({"properties": {"a": {"type": "string", "pattern": "a)|(b"}}}, "parentheses"),
        ({"properties": {"a": {"type": "string", "pattern": "a(?=b)"}}}, "not a valid pattern"),
        ({"properties": {"a": False}, "required": ["a"]}, "required but not allowed"),
        ({"patternProperties": {"^x": {}}}, "patternProperties"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"properties": {"a": {"type": "float"}}}, "type must be among"),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "type must be object"),
    ],
)
def test_wrong_parameters_of_strict_functions_are_refused(
    parameters: Any, problem: str, walks: Walks
) -> None:
    with pytest.raises(FieldError, match=problem):
        write(parameters, walks, strict=True)


@pytest.mark.parametrize("parameters", [{"type": "array"}, {"type": "string"}])
def test_parameters_that_are_no_object_are_always_refused(parameters: Any, walks: Walks) -> None:
    with pytest.raises(FieldError, match="type must be object"):
        write(parameters, walks)


UNUSUAL: dict[str, Any] = {  # a parameter's schema, and what all values of it must look like
    "unique items": ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, list),
    "names": ({"type": "object", "propertyNames": {"pattern": "^x"}, "maxProperties": 2}, dict),
    "names by pattern": ({"patternProperties": {"^.*$": {"type": "integer"}}}, dict),
    "multiple of": ({"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 9}, int),
    "not": ({"type": "boolean", "not": {"const": True}}, bool),
    "if": ({"type": "string", "if": {"minLength": 3}, "then": {"pattern": "^a"}}, str),
    "format": ({"type": "string", "format": "iri-reference"}, str),
    "look-ahead": ({"type": "string", "pattern": "^(?=.*x).+$"}, str),
    "letters": ({"type": "string", "pattern": r"^\p{L}+$", "maxLength": 9}, str),
    "both": ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 9}, str),
    "long": ({"type": "string", "maxLength": 10**30}, str),
    "float": ({"type": "float", "minimum": 0, "exclusiveMinimum": True}, (int, float)),
    "dict": ({"type": "dict", "properties": {"a": {"type": "any"}}, "required": ["a"]}, dict),
    "tuple": ({"type": "tuple", "items": {"type": "int"}, "maxItems": 2}, list),
    "nothing": ({"type": "integer", "minimum": 9, "maximum": 1}, int),
    "tuples of old": ({"type": "array", "items": [{"type": "null"}], "maxItems": 1}, list),
    "elsewhere": ({"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}, dict),
    "all of": ({"allOf": [{"$ref": "#/$defs/mode"}], "default": "on"}, str),
    "two patterns": ({"type": "string", "allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}, str),
    "no type": ({"maxLength": 3}, str),
}


def value_of(parameters: Any, arguments: dict[str, str], key: str) -> Any:
    """As the reader of calls understands it."""
    return json.loads(argument_type(Schemas(parameters), key).to_json(arguments[key]))


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_no_grammar_holds_is_left_out_and_the_rest_enforced(case: str, walks: Walks) -> None:
    schema, kind = UNUSUAL[case]
    parameters = {
        "type": "dict",
        "$defs": {"mode": {"type": "string", "enum": ["on", "off"]}},
        "properties": {"x": schema, "mode": {"type": "string", "enum": ["on", "off"]}},
        "required": ["x", "mode"],
        "not": {"required": ["y"]},
    }
    for arguments in calls(parameters, walks, 20):
        assert list(arguments) == ["x", "mode"]
        assert value_of(parameters, arguments, "mode") in ("on", "off")
        value = value_of(parameters, arguments, "x")
        if not schema.keys() & {"maxLength"} or schema.get("type"):
            assert isinstance(value, kind), arguments
        if case == "both":
            assert re.fullmatch("[a-z]+", value)
        if case == "multiple of":
            assert 1 <= value <= 9
        if case == "names by pattern":
            assert all(isinstance(number, int) for number in value.values())
        if case == "all of":
            assert value in ("on", "off")  # without quotes, as the reader expects them


def test_patterns_that_match_anywhere_leave_room(walks: Walks) -> None:
    schema = {"properties": {"x": {"type": "string", "pattern": "^https?://"}}, "required": ["x"]}
    assert any(len(arguments["x"]) > 8 for arguments in calls(schema, walks))


def test_parameters_may_have_branches(walks: Walks) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}},
        "required": ["kind"],
        "anyOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"$ref": "#/$defs/B"},
            {"type": "null"},
        ],
        "$defs": {"B": {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}},
    }
    for strict in (False, True):
        found = {tuple(arguments) for arguments in calls(schema, walks, strict=strict)}
        assert found == {("kind", "a"), ("kind", "b")}


def test_parameters_of_which_nothing_is_known_may_be_anything(walks: Walks) -> None:
    for pointer in ("http://example.org/parameters.json", "#"):
        text = write({"$ref": pointer}, walks)
        assert any(PAIR.search(walks.walk(text, seed) or "") for seed in range(30))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_schemas_are_kept_to_and_understood(first: int, walks: Walks) -> None:
    """Of strict functions, and of others that say what no grammar can hold besides."""
    for seed in range(first, first + 20):
        schema = random_schema(seed, free_keys=False)
        definitions = schema.pop("$defs")
        parameters = {"$defs": definitions, "properties": {"v": schema}, "required": ["v"]}
        validator = jsonschema_rs.validator_for(parameters)
        odd = {**parameters, "properties": {"v": {**schema, "not": {"const": "?"}, "if": {}}}}
        for given, strict in ((parameters, True), (odd, False)):
            if not strict and "'pattern'" in str(parameters):
                continue  # some of those are left out
            text = write(given, walks, strict=strict)
            found = [PAIR.findall(out) for n in range(3) if (out := walks.walk(text, n))]
            for pairs in found:
                value = value_of(given, dict(pairs), "v")
                assert validator.is_valid({"v": value}), f"{pairs} under {schema}"
            assert found


TEXTS: list[tuple[Any, list[str], list[str]]] = [  # a parameter, values that fit, others
    ({"type": "string"}, ["", "a\nb", '"', "</arg>", "12"], []),
    ({"type": "string", "pattern": "b"}, ["abc", "b", "\nb"], ["ac", ""]),
    ({"type": "string", "pattern": "^a|b$"}, ["ax", "xb"], ["xa", "bx"]),
    ({"type": "string", "pattern": r"^(a|b\|)[|)]\$$"}, ["a|$", "b|)$"], ["a|", "c|$"]),
    ({"type": "string", "pattern": "^é+$", "maxLength": 2}, ["é", "éé"], ["ééé", ""]),
    ({"type": "string", "minLength": 2}, ["ab", "a\n"], ["a"]),
    ({"type": "string", "format": "date", "pattern": "^2"}, ["2024-01-28"], ["1999-01-01", "2x"]),
    ({"type": "string", "format": "hostname"}, ["anything goes"], []),
    ({"type": "string", "enum": ["a", "bc", "b"], "maxLength": 1}, ["a", "b"], ["bc", '"a"']),
    ({"enum": ["a", 1, None, 10**30]}, ["a", "1", "null", str(10**30)], ['"a"', "2"]),
    ({"const": {"k": [1, "x"]}}, ['{"k": [1, "x"]}'], ['{"k":[1,"x"]}']),
    ({"type": ["string", "integer"], "maxLength": 2}, ["ab", "1234"], ["abc"]),
    ({"type": ["integer", "null"]}, ["12", "null"], ["a", '"1"']),
    ({"anyOf": [{"type": "string", "pattern": "^x"}, {"type": "object"}]},
     ["xy", "{}"], ["[]", "y"]),
    ({"allOf": [{"type": "string"}, {"maxLength": 3}, {"pattern": "b"}, {"pattern": "^a"}]},
     ["ab", "a\nb"], ["acbd", "b"]),
    ({"$ref": "#/$defs/word", "minLength": 2}, ["abc"], ["a", "Ab"]),
    ({"type": "array", "items": {"$ref": "#/$defs/word"}}, ['["a", "b"]', "[]"], ['["A"]', "a"]),
    ({"maxLength": 2}, ["ab", "12"], ["abc"]),
    ({"minimum": 2}, ["3"], ["1"]),
    ({}, ["x", "[1"], []),
    (True, ["x"], []),
]  # fmt: skip


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: json.dumps(case[0])[:60])
def test_values(case: tuple[Any, list[str], list[str]], walks: Walks) -> None:
    schema, valid, invalid = case
    word = {"type": "string", "pattern": "^[a-z]+$"}
    parameters = {"$defs": {"word": word}, "properties": {"v": schema}, "required": ["v"]}
    for strict in (True, False):
        text = write(parameters, walks, strict=strict)

        def call(value: str) -> str:
            pair = f"<arg_key>v</arg_key><arg_value>{value}</arg_value>"
            return f"<tool_call>f{pair}</tool_call>"

        assert [v for v in valid if not walks.takes(text, call(v))] == []
        assert [v for v in invalid if walks.takes(text, call(v))] == []


def test_names_that_begin_alike(walks: Walks) -> None:
    names = ("get", "get_more", "g")
    functions = tuple({"name": name, "parameters": {}} for name in names)
    text = walks.text(GrammarSource(None, "must", True, functions, names))
    for name in names:
        assert walks.takes(text, f"<tool_call>{name}</tool_call>" * 2)
    assert not walks.takes(text, "<tool_call>get_</tool_call>")


def test_one_hundred_tools_with_shared_definitions(walks: Walks) -> None:
    shared = {f"d{n}": {"enum": [f"value {k} of {n}" for k in range(20)]} for n in range(20)}
    properties = {f"p{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n}"}} for n in range(6)}
    parameters = {"$defs": shared, "properties": properties, "required": ["p0"]}
    functions = tuple({"name": f"tool_{n}", "parameters": parameters} for n in range(100))
    fields = tuple(map(str, range(100)))
    text = walks.text(GrammarSource(None, "may", True, functions, fields))
    assert len(text) < 50_000, "equal parts are written once"
    pair = '<arg_key>p0</arg_key><arg_value>["value 3 of 0"]</arg_value>'
    assert walks.takes(text, f"Let me see.<tool_call>tool_99{pair}</tool_call>")


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_valid_arguments_are_taken(first: int, walks: Walks) -> None:
    for seed in range(first, first + 50):
        schema, rng = random_schema(seed), random.Random(seed)
        value = instance(schema, schema, rng)
        defs = schema.pop("$defs")
        parameters = {"$defs": defs, "properties": {"v": schema}, "required": ["v"]}
        text = write(parameters, walks, strict=True)
        written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        pair = f"<arg_key>v</arg_key><arg_value>{written}</arg_value>"
        assert walks.takes(text, f"<tool_call>f{pair}</tool_call>"), f"{written} under {schema}"


@pytest.mark.parametrize("favourites", [b"0", b".e-1", b'"a'])
def test_calls_have_an_end(favourites: bytes, walks: Walks) -> None:
    """Also for a model that would rather go on for ever."""
    for seed in range(20):
        schema = random_schema(seed, free_keys=False)
        defs = schema.pop("$defs")
        parameters = {"$defs": defs, "properties": {"v": schema}, "required": ["v"]}
        function = {"name": "f", "parameters": parameters, "strict": seed % 2 == 0}
        text = walks.text(GrammarSource(None, "must", False, (function,), ("0",)))
        out = walks.longest(text, favourites, 10_000)
        assert out is not None, f"a model that prefers {favourites!r} never ends {schema}"
        assert out.startswith("<tool_call>f<arg_key>v</arg_key><arg_value>")


KEYWORDS = [
    *"type enum const properties required additionalProperties items prefixItems pattern".split(),
    *"format minLength maxLength minimum maximum exclusiveMaximum minItems maxItems not".split(),
    *"minProperties maxProperties allOf anyOf oneOf $ref patternProperties nullable".split(),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**9, 2.5, "a", "integer", "any", "#/$defs/x", "http://x/y"),
    *([], {}, ["a", 1], [{}], {"a": 1}, ["a", "b"], "^[a-z]+$", r"^\p{L}$", "^(a{99}){99}$"),
]


def nonsense(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(VALUES)
    if rng.random() < 0.3:
        return [nonsense(rng, depth - 1) for _ in range(rng.randrange(3))]
    names = KEYWORDS if rng.random() < 0.8 else ["a", "b", "c"]
    return {name: nonsense(rng, depth - 1) for name in rng.sample(names, rng.randint(1, 3))}


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_nonsense_is_never_refused(first: int, walks: Walks) -> None:
    for seed in range(first, first + 25):
        rng = random.Random(seed)
        properties = {name: nonsense(rng, 4) for name in "abc"}
        document = {"$defs": {"x": nonsense(rng, 3)}, "type": "object", "properties": properties}
        text = write(document, walks)
        assert walks.takes(text, "<tool_call>f</tool_call>")
        walks.walk(text, seed)
