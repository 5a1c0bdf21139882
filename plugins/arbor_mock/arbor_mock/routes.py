"""The routes of the trainer `mock_commands`: send commands, wait for results, acknowledge them."""

from typing import Annotated, Any

import msgspec
from litestar import Request, get, post
from msgspec import Meta, Struct

from arbor_core import Services
from arbor_core.http import query

from .config import MockCommand

JOB = "/v1/mock/jobs/{job_id:str}"
MAX_WAIT_SECONDS = 30.0
SCOPES = {"scopes": ("train",)}


class CommandRequest(MockCommand, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command, and its place among the others."""

    number: Annotated[int, Meta(ge=1, lt=1 << 53)]


class CommandAnswer(Struct):
    """A command that was taken."""

    number: int
    repeated: bool


class ResultsQuery(Struct):
    """Which results, and how long to wait for the first."""

    after: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
    seconds: Annotated[float, Meta(ge=0, le=MAX_WAIT_SECONDS)] = 0.0


class Results(Struct):
    """Results in the order of their commands, and the number up to which they were acknowledged."""

    data: list[dict[str, Any]]
    acknowledged: int


class AcknowledgeRequest(Struct, forbid_unknown_fields=True):
    """The number up to which the client has got the results."""

    up_to: Annotated[int, Meta(ge=0, lt=1 << 53)]


def routes(services: Services) -> list[Any]:
    """The handlers."""

    @post(f"{JOB}/commands", operation_id="sendMockCommand", status_code=200, opt=SCOPES)
    async def send(job_id: str, data: CommandRequest, owner: str) -> CommandAnswer:
        """Send a command; the same again changes nothing."""
        session = await services.commands(job_id, owner)
        sent = await session.send(msgspec.json.encode(MockCommand(data.do, data.n)), data.number)
        return CommandAnswer(sent.number, sent.repeated)

    @get(f"{JOB}/results", operation_id="listMockResults", opt={**SCOPES, "query": ResultsQuery})
    async def follow(request: Request[Any, Any, Any], job_id: str, owner: str) -> Results:
        """The results of the commands after one, as they come."""
        wanted = query(request, ResultsQuery)
        session = await services.commands(job_id, owner)
        found = await session.follow(wanted.after, wanted.seconds)
        data = [{"number": result.number, **msgspec.json.decode(result.payload)} for result in found]
        return Results(data, session.acknowledged)

    @post(f"{JOB}/acknowledge", operation_id="acknowledgeMockResults", status_code=200, opt=SCOPES)
    async def acknowledge(job_id: str, data: AcknowledgeRequest, owner: str) -> Results:
        """Say up to which command results were got; they are dropped."""
        session = await services.commands(job_id, owner)
        await session.acknowledge(data.up_to)
        return Results([], session.acknowledged)

    @post(f"{JOB}/finish", operation_id="finishMockJob", status_code=200, opt=SCOPES)
    async def finish(job_id: str, owner: str) -> dict[str, Any]:
        """No more commands follow: the job ends when those that came are executed."""
        return await services.ask(job_id, owner, "finish")

    return [send, follow, acknowledge, finish]
