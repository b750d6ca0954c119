"""The paths that the server answers."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .errors import RequestError
from .generating import Generator
from .metrics import Metrics
from .reading import chat_prompt, check, check_ids, check_name, completion_prompts, tokens
from .scheduler import Scheduler
from .schemas import Chat, Completion, Detokenize, Tokenize
from .served import Served


def create_app(served: Served, scheduler: Scheduler, metrics: Metrics, engine: str) -> FastAPI:
    """The application, without `Gate`. engine: the version of ONNX Runtime GenAI."""
    app = FastAPI(title="onnx_server", docs_url=None, redoc_url=None, openapi_url=None)
    generator = Generator(served, scheduler, metrics)
    started = int(time.time())
    card = {
        "id": served.name,
        "object": "model",
        "created": started,
        "owned_by": "onnxruntime-genai",
        "root": served.name,
        "parent": None,
        "max_model_len": served.context,
    }

    @app.post("/v1/completions")
    async def completions(http: Request, request: Completion) -> Response:
        check(request, served)
        return await generator.answer(http, request, completion_prompts(request, served))

    @app.post("/v1/chat/completions")
    async def chat(http: Request, request: Chat) -> Response:
        check(request, served)
        return await generator.answer(http, request, [chat_prompt(request, served)])

    @app.post("/tokenize")
    def tokenize(request: Tokenize) -> dict[str, Any]:
        found = tokens(request, served)
        texts = [served.vocabulary.token(number) for number in found] if request.return_token_strs else None
        return {"count": len(found), "max_model_len": served.context, "tokens": found, "token_strs": texts}

    @app.post("/detokenize")
    def detokenize(request: Detokenize) -> dict[str, str]:
        check_name(request.model, served)
        check_ids(request.tokens, served, "tokens")
        return {"prompt": served.vocabulary.decode(request.tokens, skip_special=False)}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        check_name(name, served)
        return card

    @app.get("/health")
    def health() -> Response:
        return Response(status_code=200 if scheduler.alive else 503)

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": engine}

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        found = RequestError(400, f"{where}: {first['msg']}" if where else str(first["msg"]), where or None)
        return JSONResponse(found.body(), 400)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        found = RequestError(error.status_code, str(error.detail))
        return JSONResponse(found.body(), error.status_code, error.headers)

    return app
