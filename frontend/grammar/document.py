"""One schema document: what its references lead to, and schemas that are put together of others.

Wrong parts are refused, or, with a function that widens schemas (`widen.py`), left out.
"""

from collections.abc import Callable
from typing import Any

from .keywords import check_keywords
from .merge import ANNOTATIONS, Json, Schema, merge
from .problems import SourceError


class Document:
    """Schemas of the document `root`. Raises SourceError, unless there is `widen`, which each
    schema is put through before it is written."""

    def __init__(self, root: Any, widen: Callable[[Any], Schema] | None = None) -> None:
        self._root = root
        self._widen = widen

    def opened(self, schema: Any, where: str) -> Schema:
        """A schema whose own keywords can be written: widened, or checked."""
        if self._widen is not None:
            return self._widen(schema)
        if not isinstance(schema, dict | bool):
            raise SourceError("a schema must be an object or a boolean", where)
        if isinstance(schema, dict):
            check_keywords(schema, where)
        return schema

    def refuse(self, problem: str, where: str) -> None:
        """Raises SourceError, unless schemas are widened: the caller then takes anything."""
        if self._widen is None:
            raise SourceError(problem, where)

    def merge(self, a: Schema, b: Schema, where: str) -> Schema:
        """A schema that is valid where both are."""
        return merge(a, b, where, relaxed=self._widen is not None)

    def resolve(self, pointer: Any, where: str) -> Schema:
        """The schema that a $ref names, within the document."""
        try:
            return self._find(pointer, where)
        except SourceError as error:
            self.refuse(str(error), "")
            return True

    def _find(self, pointer: Any, where: str) -> Schema:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise SourceError(f"$ref {pointer!r:.80} must point into the schema itself", where)
        node = self._root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(part)] if isinstance(node, list) else node[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SourceError(f"$ref {pointer!r:.80} points at nothing", where) from None
        if not isinstance(node, dict | bool):
            raise SourceError(f"$ref {pointer!r:.80} points at no schema", where)
        return node

    def all_of(self, schema: Json, where: str) -> Schema:
        """A schema with allOf as one without."""
        whole: Schema = {k: v for k, v in schema.items() if k not in ("allOf", *ANNOTATIONS)}
        for number, part in enumerate(_parts(schema, "allOf", where)):
            place = f"{where}/allOf/{number}"
            whole = self.merge(whole, self.inlined(part, where), place)
        return whole

    def branches(self, schema: Json, key: str, where: str) -> dict[str, Schema]:
        """The schemas under anyOf or oneOf by place, each with the keywords beside it. Those that
        match nothing are left out, but some are left (none: anything, if schemas are widened)."""
        others = {k: v for k, v in schema.items() if k != key and k not in ANNOTATIONS}
        found = {}
        for number, part in enumerate(_parts(schema, key, where)):
            place = f"{where}/{key}/{number}"
            merged = self.merge(others, self.inlined(part, place), place) if others else part
            if merged is False or (isinstance(merged, dict) and merged.get("type") == []):
                continue
            found[place] = merged
        if not found:
            self.refuse("matches nothing", where)
        return found

    def inlined(self, schema: Any, where: str) -> Schema:
        """The schema without a $ref at its top."""
        seen: list[Any] = []
        while isinstance(schema, dict) and "$ref" in schema:
            pointer = schema["$ref"]
            if pointer in seen:
                self.refuse(f"$ref {pointer!r:.80} leads back to itself", where)
                return True
            seen.append(pointer)
            others = {k: v for k, v in schema.items() if k != "$ref" and k not in ANNOTATIONS}
            schema = self.merge(self.resolve(pointer, where), others, where)
        if not isinstance(schema, dict | bool):
            self.refuse("a schema must be an object or a boolean", where)
            return True
        return schema


def _parts(schema: Json, key: str, where: str) -> list[Any]:
    parts = schema[key]
    if not isinstance(parts, list) or not parts:
        raise SourceError(f"{key} must be a list of schemas", where)
    return parts
