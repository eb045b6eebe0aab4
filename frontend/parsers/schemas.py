"""The types that a tool's JSON schema declares for its arguments.

Used to read values, not to validate them: the types of all branches are united, and unknown
keywords are ignored. Never raises, and reads each part of a schema once.
"""

from typing import Any

Json = dict[str, Any]
_ORDER = ("null", "integer", "number", "boolean", "object", "array", "string")
_NAMES = {  # names that tools use for the types
    **{name: name for name in _ORDER},
    **dict.fromkeys(("str", "text", "varchar", "char", "enum", "date", "datetime"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "uint", "uint32", "uint64", "long"), "integer"),
    **dict.fromkeys(("short", "unsigned"), "integer"),
    **dict.fromkeys(("float", "float32", "float64", "double"), "number"),
    "bool": "boolean",
    **dict.fromkeys(("dict", "map", "hashmap"), "object"),
    **dict.fromkeys(("arr", "list", "tuple", "sequence", "arraylist"), "array"),
    "none": "null",
}
_MAX_REFERENCES = 16  # in a chain


def usual_types(declared: Any) -> list[str]:
    """A schema's type or types by their usual names. All types if a name is unknown, such as
    "any"."""
    names = declared if isinstance(declared, list) else [declared]
    types = [_NAMES.get(name.lower(), "") if isinstance(name, str) else "" for name in names]
    return list(_ORDER if "" in types else dict.fromkeys(types))


class Schemas:
    """All schemas of one document, by reference into it; `root` is the document."""

    def __init__(self, root: Any) -> None:
        self.root = root
        # By the id of a schema. The schema is kept, so that no other object gets its id.
        self._types: dict[int, tuple[Json, frozenset[str]]] = {}

    def types(self, schema: Any) -> frozenset[str]:
        """All types that a value may have according to the schema; empty: any."""
        schema = self.resolve(schema)
        if not schema:
            return frozenset()
        if id(schema) not in self._types:
            self._types[id(schema)] = schema, frozenset()  # if it refers to itself
            self._types[id(schema)] = schema, self._find_types(schema)
        return self._types[id(schema)][1]

    def property(self, schema: Any, key: str) -> Any:
        """The schema of one property of an object; {} if there is none."""
        try:
            return self._property(schema, key, set())
        except RecursionError:
            return {}

    def resolve(self, schema: Any) -> Json:
        """The schema behind `$ref`s that point into the document."""
        for _ in range(_MAX_REFERENCES):
            if not isinstance(schema, dict):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            schema = self.root
            for step in reference.removeprefix("#").split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                schema = schema.get(step) if isinstance(schema, dict) else None
        return {}

    def _find_types(self, schema: Json) -> frozenset[str]:
        declared = schema.get("type")
        names = declared if isinstance(declared, list) else [declared]
        types = {_NAMES.get(name.lower(), "") for name in names if isinstance(name, str)}
        if not any(types):
            values = schema.get("enum")
            types = {_type_of(value) for value in values} if isinstance(values, list) else set()
            if "const" in schema:
                types.add(_type_of(schema["const"]))
        try:
            for branch in _branches(schema):
                types |= self.types(branch)
        except RecursionError:
            types = set()
        types.discard("")
        if schema.get("nullable") is True and types:
            types.add("null")
        if not types:
            types = {k for k, n in (("object", "properties"), ("array", "items")) if n in schema}
        return frozenset(types)

    def _property(self, schema: Any, key: str, seen: set[int]) -> Any:
        schema = self.resolve(schema)
        if id(schema) in seen:
            return {}
        seen.add(id(schema))
        properties = schema.get("properties")
        if isinstance(properties, dict) and key in properties:
            return properties[key]
        for branch in _branches(schema):
            if schema_of_key := self._property(branch, key, seen):
                return schema_of_key
        return schema.get("additionalProperties", {})


def _branches(schema: Json) -> list[Any]:
    lists = (schema.get(key) for key in ("anyOf", "oneOf", "allOf"))
    return [branch for branches in lists if isinstance(branches, list) for branch in branches]


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
    return "object" if isinstance(value, dict) else "array"
