"""Routes in vLLM's own HTTP server: train, checkpoint and their status, a few lines over the mount's `ctl` and `status.json`; and
what weightfs itself asks of the engine after weights changed, so that VLLM_SERVER_DEV_MODE need not be set.

vLLM loads it only if VLLM_PLUGINS names it: VLLM_PLUGINS=weightfs,weightfs_http.
"""

import asyncio
import hashlib
import os
import secrets

from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from .identity import model_directory
from .mount import HTTP, NoMount, Refused, find


def authorised(request: Request):
    """vLLM guards only /v1 with its API keys. These routes change the model: they are guarded by the same keys."""
    digests = getattr(request.app.state, "weightfs_keys", ())
    if not digests:
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = hashlib.sha256(token.encode()).digest()
    known = [secrets.compare_digest(given, digest) for digest in digests]
    if scheme.lower() != "bearer" or not any(known):
        raise HTTPException(401, "Unauthorized")


router = APIRouter(dependencies=[Depends(authorised)], tags=["weightfs"])


async def on_mount(request: Request, action, status_code=200):
    """Answers with what `action(mount)` returns; what weightfs refuses becomes the HTTP status that fits, with its sentence (not
    by an exception: vLLM takes paths out of those)."""

    def act():
        try:
            return status_code, action(find(request.app.state.weightfs_model))
        except NoMount as e:
            return 503, {"detail": str(e)}
        except Refused as e:
            return HTTP.get(e.errno, 500), {"detail": str(e)}

    code, content = await run_in_threadpool(act)
    return JSONResponse(content, code)


@router.post("/train")
async def train(request: Request, job: dict = Body()):
    """Queues a training job: {"samples": […], "config": {…}} (docs/training.md)."""

    def queue(mount):
        queued = mount.train(job)
        return {"job": queued.get("id"), **{key: queued.get(key) for key in ("state", "steps", "notes")}}

    return await on_mount(request, queue, 202)


@router.post("/checkpoint")
async def checkpoint(request: Request, message: str = Body("", embed=True)):
    """Commits the newest step. Answers when it is durable."""

    def commit(mount):
        status = mount.commit(message)
        return {"committed": status["committed"], "says": (status.get("last_command") or {}).get("says")}

    return await on_mount(request, commit)


@router.get("/train/status")
async def train_status(request: Request):
    """What `status.json` of the mount says of training."""
    keys = ("state", "step", "view", "dirty", "committed", "job", "jobs_queued", "jobs", "last_command", "last_error")

    def look(mount):
        status = mount.status()
        return {key: status.get(key) for key in keys}

    return await on_mount(request, look)


@router.post("/weightfs/pause")
async def pause(request: Request, seconds: float = Body(30, embed=True, gt=0, le=3600)):
    """Requests in flight stand still; they go on with /weightfs/resume, and after `seconds` in any case: whoever asked may
    have died. Who is alive asks again before that, and only the time begins anew."""
    client, state = engine(request), request.app.state
    if not end_lease(state):
        await client.pause_generation(mode="keep")

    async def lease():
        await asyncio.sleep(seconds)
        # From here on it cannot be prolonged.
        state.weightfs_paused = False
        await client.resume_generation()

    state.weightfs_lease, state.weightfs_paused = asyncio.create_task(lease()), True
    return {"paused": True}


@router.post("/weightfs/resume")
async def resume(request: Request):
    end_lease(request.app.state)
    await engine(request).resume_generation()
    return {"paused": False}


def end_lease(state):
    """Do requests stand still by our doing? They do not go on by themselves any more."""
    task, state.weightfs_lease = getattr(state, "weightfs_lease", None), None
    paused, state.weightfs_paused = getattr(state, "weightfs_paused", False), False
    if task is not None:
        task.cancel()
    return paused


@router.post("/weightfs/updated")
async def updated(request: Request, step: int = Body(embed=True)):
    """The weights are those of `step`: what was computed with older ones is forgotten. Running requests are computed anew
    from their tokens, and go on."""
    client = engine(request)
    done = await client.reset_prefix_cache(True, False)
    if hasattr(client, "update_weight_version"):
        await client.update_weight_version(str(step))
    return {"success": bool(done), "step": step}


def engine(request: Request):
    client = getattr(request.app.state, "weightfs_engine", None)
    if client is None:
        raise HTTPException(503, "this server has no engine")
    return client


class WeightfsEndpoints:
    name = "weightfs_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client, state, args) -> None:
        # As vLLM has it: keys that were given take the place of the environment's.
        keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        keys = [keys] if isinstance(keys, str) else keys
        state.weightfs_keys = [hashlib.sha256(key.encode()).digest() for key in keys if key]
        state.weightfs_engine = engine_client
        state.weightfs_model = model_directory(engine_client.vllm_config) if engine_client else args.model
