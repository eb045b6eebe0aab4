"""The document says what the server does, and the page says the same."""

import json
import re
from typing import Any

from glimmer.frontend.api.docs_page import docs_page
from glimmer.frontend.api.openapi import openapi
from glimmer.frontend.routes import all_routes
from glimmer.shared.config import ServeConfig

DOCUMENT = openapi(all_routes(ServeConfig()))


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values())) if value else own
    if isinstance(value, list):
        return set().union(*map(references, value))
    return set()


def test_every_reference_leads_somewhere() -> None:
    names = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert references(DOCUMENT) <= names
    assert references(DOCUMENT) >= {
        "#/components/schemas/ChatBody",
        "#/components/schemas/MessagesBody",
        "#/components/schemas/ResponsesBody",
        "#/components/schemas/Refusal",
    }


def test_limits_are_those_of_the_structs() -> None:
    completion = DOCUMENT["components"]["schemas"]["CompletionBody"]
    assert completion["required"] == ["prompt"]
    assert {"minimum": -2, "maximum": 2, "type": "number"} in completion["properties"][
        "presence_penalty"
    ]["anyOf"]
    chat = DOCUMENT["paths"]["/v1/chat/completions"]["post"]
    assert chat["responses"].keys() == {"200", "400", "408", "413", "415", "429", "500", "503"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    ids = [o["operationId"] for path in DOCUMENT["paths"].values() for o in path.values()]
    assert len(set(ids)) == len(ids)


async def test_the_examples_work(server: Any) -> None:
    for path, methods in DOCUMENT["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body is not None:
            example = body["content"]["application/json"]["example"]
            assert (await server.post(path, example))[0] == 200, path


async def test_it_is_served_with_its_page(server: Any) -> None:
    status, text = await server.get("/openapi.json")
    assert (status, json.loads(text)) == (200, DOCUMENT)
    status, page = await server.get("/docs")
    assert status == 200
    for path in DOCUMENT["paths"]:
        assert f"<code>{path}</code>" in page
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert all(link.startswith(("#", "/openapi.json")) for link in links)
    for link in links:
        assert link == "/openapi.json" or f'id="{link[1:]}"' in page


def test_every_field_has_a_meaning_and_required_fields_come_first() -> None:
    for tgi in (False, True):
        document = openapi(all_routes(ServeConfig(use_tgi_api=tgi)))
        for schema in document["components"]["schemas"].values():
            assert all(about["description"] for about in schema["properties"].values())
    page = docs_page(DOCUMENT)
    chat = page[page.index('id="ChatBody"') :]
    assert chat.index(">messages<") < chat.index(">model<") < chat.index(">user<")
    assert chat.index(">temperature<") < chat.index(">bad_words<"), "without effect: last"
    assert "<td><b>required</b></td><td>The conversation so far" in chat


async def test_a_browser_is_led_to_the_page(server: Any) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    url = server.url + "/"
    async with server.session.get(url, headers=browser, allow_redirects=False) as reply:
        assert (reply.status, reply.headers["Location"]) == (302, "/docs")
    async with server.session.get(url, headers=browser) as reply:
        assert (reply.status, reply.content_type) == (200, "text/html")
    async with server.session.get(url) as reply:
        assert reply.status == 200
        assert "/docs" in await reply.text()
    async with server.session.head(url) as reply:
        assert reply.status == 200
    assert (await server.post("/", {"inputs": "x"}))[0] == 200


def test_the_page_escapes_what_it_shows() -> None:
    schemas = {"A": {"description": "<b>", "properties": {"x": {"enum": ["<i>"]}}}}
    info = {"title": "<t>", "version": "1"}
    page = docs_page({"info": info, "paths": {}, "components": {"schemas": schemas}})
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<t>" not in page
