"""`/docs`: the OpenAPI document as one HTML page that loads nothing else."""

import html
import json
from collections.abc import Mapping

from ..wire.schema import Json
from .field_docs import NO_EFFECT

_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "maxItems": "at most"}


# For a browser that asks for the page of a server with API keys. It tells nothing about the server.
KEY_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>API key</title><style>:root { color-scheme: light dark; }
body { font: 15px/1.5 sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem; }</style>
</head><body><p>The documentation of this server is for those who have an API key.</p>
<form><label>API key <input type="password" autocomplete="off"></label> <button>Show</button></form>
<p id="problem"></p>
<script>
document.querySelector("form").onsubmit = async event => {
  event.preventDefault();
  const key = document.querySelector("input").value;
  const reply = await fetch("/docs", {headers: {Authorization: "Bearer " + key}});
  const text = await reply.text();
  if (reply.ok) { document.open(); document.write(text); document.close(); }
  else document.getElementById("problem").textContent = "Refused: status " + reply.status;
};
</script></body></html>
"""
HOST = "HOST:PORT"  # stands in the examples for the address of the server


def docs_page(document: Json) -> str:
    """The page for an OpenAPI document made by `openapi`."""
    schemas = document["components"]["schemas"]
    operations = [_operation(path, methods) for path, methods in document["paths"].items()]
    bodies = [_schema(name, schema) for name, schema in sorted(schemas.items())]
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    text = html.escape(document["info"].get("description", ""))
    return _PAGE.format(
        title=title, text=text, operations="\n".join(operations), bodies="\n".join(bodies)
    )


def _operation(path: str, methods: Json) -> str:
    operation = list(methods.values())[-1]  # POST if the path has it
    names = " ".join(method.upper() for method in methods)
    summary = html.escape(operation["summary"][:1].upper() + operation["summary"][1:])
    parts = [f'<h3><span class="method">{names}</span> <code>{html.escape(path)}</code></h3>']
    parts.append(f"<p>{summary}.</p>")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if body:
        command = f"curl http://{HOST}{path} -d '{json.dumps(body['example'])}'"
        parts.append(f"<p>Body: {_type(body['schema'])}</p><pre>{html.escape(command)}</pre>")
    return "\n".join(parts)


def _schema(name: str, schema: Json) -> str:
    """The table of a struct's fields: required ones first, those without effect last."""
    required = schema.get("required", ())
    properties: Mapping[str, Json] = schema.get("properties", {})
    order = sorted(
        properties,
        key=lambda field: (field not in required, _is_minor(properties[field])),
    )
    rows = [_row(field, properties[field], field in required) for field in order]
    text = html.escape(schema.get("description", ""))
    head = "<tr><th>Field</th><th>Type</th><th>Default</th><th>Meaning</th></tr>"
    return f'<h3 id="{name}">{name}</h3><p>{text}</p><table>{head}{"".join(rows)}</table>'


def _is_minor(schema: Json) -> bool:
    text = str(schema.get("description", ""))
    return text == NO_EFFECT or text.startswith("Not supported")


def _row(field: str, schema: Json, is_required: bool) -> str:
    default = "<b>required</b>" if is_required else html.escape(schema.get("x-default", ""))
    cells = (
        f"<code>{html.escape(field)}</code>",
        _type(schema),
        default,
        html.escape(schema.get("description", "")),
    )
    minor = ' class="minor"' if _is_minor(schema) else ""
    return f"<tr{minor}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _type(schema: Json) -> str:
    """The type of a field in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        return " or ".join(map(_type, choices))
    if "enum" in schema:
        return html.escape(", ".join(repr(value) for value in schema["enum"] if value is not None))
    text = html.escape(str(schema.get("type", "anything")))
    if isinstance(schema.get("items"), dict) and schema["items"]:
        text += f" of {_type(schema['items'])}"
    limits = [f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema]
    return " ".join([text, *limits])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
h3 {{ margin: 2rem 0 0; }}
p {{ margin: .3rem 0; }}
table {{ border-collapse: collapse; }}
th, td {{ border-top: 1px solid #8886; padding: .2rem 1rem .2rem 0; vertical-align: top; }}
th {{ text-align: left; }}
pre {{ background: #8882; padding: .5rem; overflow-x: auto; }}
.method {{ font-size: 80%; color: #06c; }}
.minor {{ opacity: .6; }}
</style></head><body><h1>{title}</h1>
<p>{text}</p>
<p>Start with <code>POST /v1/chat/completions</code>, or point an OpenAI or Anthropic client at this
server. <a href="#bodies">Bodies</a> lists every field. The machine-readable form of this page is
<a href="/openapi.json">/openapi.json</a>.</p>
<h2>Routes</h2>
{operations}
<h2 id="bodies">Bodies</h2>
<p>Required fields come first. A field that is not set, or is null, has its default.</p>
{bodies}
</body></html>
"""
