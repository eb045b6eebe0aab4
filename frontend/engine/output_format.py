"""Fields of a body that constrain the text of a reply -> `OutputFormat`: OpenAI's response_format,
LightLLM's guided_* and regular_constraint, and the spellings of vLLM and SGLang."""

from typing import Any

from ..grammar.source import FormatKind, OutputFormat
from ..wire.schema import FORMAT_FIELDS, SamplingFields, decode_text, wrong

_FIELDS: dict[str, FormatKind] = {
    "guided_json": "json_schema",
    "guided_grammar": "grammar",
    "guided_regex": "regex",
    "regular_constraint": "regex",
    "guided_choice": "choice",
    "json_schema": "json_schema",  # SGLang's names
    "regex": "regex",
    "ebnf": "grammar",
}
_STRUCTURED: dict[str, FormatKind] = {  # keys of structured_outputs
    "json": "json_schema",
    "grammar": "grammar",
    "regex": "regex",
    "choice": "choice",
    "json_object": "json_object",
}
assert set(_FIELDS) <= set(FORMAT_FIELDS), "else a field would be ignored"
_MAX_CHOICES = 10_000
_HARMLESS = (  # other keys of it, without effect
    *("disable_any_whitespace", "disable_additional_properties", "disable_fallback"),
)


def output_format(fields: SamplingFields, prefix: str = "") -> OutputFormat | None:
    """The format that a request demands; None for free text. `prefix` stands before the fields'
    names in errors. Raises RequestError for wrong values and for formats that exclude each
    other."""
    formats = [
        _format(prefix + name, kind, getattr(fields, name))
        for name, kind in _FIELDS.items()
        if _is_set(getattr(fields, name))
    ]
    formats += _structured(fields.structured_outputs, f"{prefix}structured_outputs")
    formats += _response_format(getattr(fields, "response_format", None))
    if len(formats) > 1:
        raise wrong(formats[1].field, f"cannot be combined with {formats[0].field}")
    if not formats:
        return None
    if fields.allowed_token_ids:
        raise wrong(f"{prefix}allowed_token_ids", f"cannot be combined with {formats[0].field}")
    return formats[0]


def _is_set(value: Any) -> bool:
    return value is not None and value != ""  # LightLLM's clients send empty texts


def _structured(value: Any, field: str) -> list[OutputFormat]:
    if value is None:
        return []
    if not isinstance(value, dict):
        raise wrong(field, "must be an object")
    for key in value:
        if key not in (*_STRUCTURED, *_HARMLESS) and value[key] is not None:
            raise wrong(f"{field}.{key:.80}", "is not supported")
    return [
        _format(f"{field}.{key}", _STRUCTURED[key], source)
        for key, source in value.items()
        if key in _STRUCTURED and _is_set(source) and source is not False
    ]


def _response_format(value: Any) -> list[OutputFormat]:
    if value is None:
        return []
    field = "response_format"
    kind = value.get("type")
    match kind:
        case "text":
            return []
        case "json_object":
            return [OutputFormat("json_object", None, field)]
        case "json_schema":
            spec = value.get("json_schema")
            if not isinstance(spec, dict):
                raise wrong(f"{field}.json_schema", "must be {name, schema}")
            name = spec.get("name")
            if name is not None and not isinstance(name, str):
                raise wrong(f"{field}.json_schema.name", "must be a string")
            if not isinstance(spec.get("strict"), bool | None):
                raise wrong(f"{field}.json_schema.strict", "must be a boolean")
            schema = spec.get("schema")
            return [_format(f"{field}.json_schema.schema", "json_schema", schema)]
    raise wrong(f"{field}.type", "must be text, json_object or json_schema")


def _format(field: str, kind: FormatKind, value: Any) -> OutputFormat:
    match kind:
        case "json_schema":
            return OutputFormat(kind, _schema(field, value), field)
        case "json_object":
            return OutputFormat(kind, None, field)
        case "choice":
            if not isinstance(value, list) or not 0 < len(value) <= _MAX_CHOICES:
                raise wrong(field, f"must be a list of 1 to {_MAX_CHOICES} texts")
            if not all(isinstance(text, str) and text for text in value):
                raise wrong(field, "must hold texts that are not empty")
        case _:
            if not isinstance(value, str):
                raise wrong(field, "must be a string")
            if kind == "grammar" and value.strip() == "json":
                return OutputFormat("json", None, field)
    return OutputFormat(kind, value, field)


def _schema(field: str, value: Any) -> Any:
    """A JSON schema: an object, or its text."""
    if isinstance(value, str):
        value = decode_text(value, field, Any)
    if not isinstance(value, dict | bool):
        raise wrong(field, "must be a JSON schema: an object")
    return value
