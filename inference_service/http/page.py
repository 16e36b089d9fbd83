"""The page: its files, and the JSON that it reads and sends."""

import asyncio
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from inference_service.grpc.admin import AdminServicer
from inference_service.http.body import read_body
from inference_service.http.curves import Curves, Last
from inference_service.versions.catalogue import Catalogue
from shared.errors import NotFound
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from shared.service.access.tokens import Callers
from shared.text import excerpt

FILES = Path(__file__).parent.parent / "web"

# The numbers of versions have 64 bits.
_MAX_NUMBER = 2**63 - 1
_MAX_DIGITS = 19


class _Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Policy(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    label: str


class _Rollback(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int | None = Field(None, le=_MAX_NUMBER)


def page_routes(admin: AdminServicer, catalogue: Catalogue, registry: Registry, callers: Callers) -> list[BaseRoute]:
    """Returns the routes of the page."""
    curves = Curves(registry.histories)
    files = _Files(directory=FILES)

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    async def server(_: Request) -> Response:
        needed = {"clients": callers.clients_need_token, "operators": callers.operators_need_token}
        return JSONResponse({"version": version("gptloop"), "needs_token": needed})

    async def runs(_: Request) -> Response:
        versions = catalogue.versions
        lasts = await asyncio.to_thread(_read_lasts, curves, registry)
        return JSONResponse({"runs": [_run(last, ended, versions) for last, ended in lasts]})

    async def run(request: Request) -> Response:
        name, after = request.path_params["run"], request.query_params.get("after", "")
        return await asyncio.to_thread(lambda: JSONResponse(curves.since(name, after)))

    async def versions(_: Request) -> Response:
        answer = await admin.ListVersions(pb.ListVersionsRequest(), None)
        return _json(answer, runs={each.version: each.run for each in catalogue.versions})

    async def load(request: Request) -> Response:
        return _json(await admin.LoadVersion(pb.LoadVersionRequest(version=await _number(request)), None))

    async def unload(request: Request) -> Response:
        return _json(await admin.UnloadVersion(pb.UnloadVersionRequest(version=await _number(request)), None))

    async def promote(request: Request) -> Response:
        return _json(await admin.PromoteVersion(pb.PromoteVersionRequest(version=await _number(request)), None))

    async def set_policy(request: Request) -> Response:
        body = await read_body(request, _Policy)
        return _json(await admin.SetPolicy(pb.SetPolicyRequest(label=body.label), None))

    async def roll_back(request: Request) -> Response:
        body = await read_body(request, _Rollback)
        return _json(await admin.RollBack(pb.RollBackRequest(version=body.version), None))

    return [
        Route("/", page),
        Mount("/web", files),
        Route("/api/server", server),
        Route("/api/runs", runs),
        Route("/api/runs/{run}", run),
        Route("/api/versions", versions),
        Route("/api/versions/{number}/load", load, methods=["POST"]),
        Route("/api/versions/{number}/unload", unload, methods=["POST"]),
        Route("/api/versions/{number}/promote", promote, methods=["POST"]),
        Route("/api/policy", set_policy, methods=["POST"]),
        Route("/api/rollback", roll_back, methods=["POST"]),
    ]


class _Files(StaticFiles):
    """The files of the page; a browser asks each time whether its copy is the current one."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


async def _number(request: Request) -> int:
    """Returns the version in the path; the body has nothing to say, but must be sent as JSON."""
    await read_body(request, _Nothing)
    text = request.path_params["number"]
    if not (text.isascii() and text.isdecimal()):
        raise HTTPException(404)
    # Python refuses to read thousands of digits.
    if len(text) > _MAX_DIGITS or int(text) > _MAX_NUMBER:
        raise NotFound(f"There is no version {excerpt(text)}.")
    return int(text)


def _json(message: Message, **more: Any) -> JSONResponse:
    return JSONResponse(MessageToDict(message, preserving_proto_field_name=True) | more)


def _read_lasts(curves: Curves, registry: Registry) -> list[tuple[Last, bool]]:
    lasts, ended = curves.lasts(), registry.ended()
    return [(last, last.run in ended) for last in lasts]


def _run(last: Last, ended: bool, versions: list[VersionManifest]) -> dict[str, Any]:
    """Describes a run; its last step is known once it has a version."""
    own = [each for each in versions if each.run == last.run]
    max_steps = own[-1].training.get("max_steps") if own else None
    return asdict(last) | {"ended": ended, "max_steps": max_steps, "versions": [each.version for each in own]}
