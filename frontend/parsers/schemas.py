"""What a tool's JSON schema says about the types of its arguments.

For reading values only, so it takes all that a schema mentions: branches are united, and what it
does not understand says nothing. Never raises, and looks at each part of a schema once.
"""

from typing import Any

Json = dict[str, Any]
_ORDER = ("null", "integer", "number", "boolean", "object", "array", "string")
_NAMES = {  # what schemas in the wild call the types
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
_MAX_REFERENCES = 16  # that lead to one another


def usual_types(declared: Any) -> list[str]:
    """A schema's type or types by their usual names: all if it has another one, such as "any"."""
    names = declared if isinstance(declared, list) else [declared]
    found = [_NAMES.get(name.lower(), "") if isinstance(name, str) else "" for name in names]
    return list(_ORDER if "" in found else dict.fromkeys(found))


class Schemas:
    """All schemas of one document, by reference into it; `root` is the document."""

    def __init__(self, root: Any) -> None:
        self.root = root
        # By the id of a schema, which is kept so that no other one gets its id.
        self._types: dict[int, tuple[Json, frozenset[str]]] = {}

    def types(self, schema: Any) -> frozenset[str]:
        """All types that a value may have, as far as the schema tells; empty: any."""
        schema = self.resolve(schema)
        if not schema:
            return frozenset()
        if id(schema) not in self._types:
            self._types[id(schema)] = schema, frozenset()  # if it leads back to itself
            self._types[id(schema)] = schema, self._find_types(schema)
        return self._types[id(schema)][1]

    def property(self, schema: Any, key: str) -> Any:
        """The schema of one property of an object; {} where nothing is known."""
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
        found = {_NAMES.get(name.lower(), "") for name in names if isinstance(name, str)}
        if not any(found):
            values = schema.get("enum")
            found = {_type_of(value) for value in values} if isinstance(values, list) else set()
            if "const" in schema:
                found.add(_type_of(schema["const"]))
        try:
            for branch in _branches(schema):
                found |= self.types(branch)
        except RecursionError:
            found = set()
        found.discard("")
        if schema.get("nullable") is True and found:
            found.add("null")
        if not found:
            found = {k for k, n in (("object", "properties"), ("array", "items")) if n in schema}
        return frozenset(found)

    def _property(self, schema: Any, key: str, seen: set[int]) -> Any:
        schema = self.resolve(schema)
        if id(schema) in seen:
            return {}
        seen.add(id(schema))
        properties = schema.get("properties")
        if isinstance(properties, dict) and key in properties:
            return properties[key]
        for branch in _branches(schema):
            if found := self._property(branch, key, seen):
                return found
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
