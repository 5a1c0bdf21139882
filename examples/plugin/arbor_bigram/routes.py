"""The way to the trainer that learns on command: a text goes in, its loss comes back."""

from typing import Annotated, Any

import msgspec
from litestar import post

from arbor_core.http import ApiError


class Text(msgspec.Struct, forbid_unknown_fields=True):
    number: Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)]
    text: str


def routes(services):
    @post("/v1/bigram/{job_id:str}/texts", status_code=200, opt={"scopes": ("train",)})
    async def learn(job_id: str, data: Text, owner: str) -> dict[str, float]:
        """Have a text counted. Who sends number n has got the loss of n - 1."""
        session = await services.commands(job_id, owner)
        if data.number - 1 > session.acknowledged:
            await session.acknowledge(data.number - 1)
        await session.send(data.text.encode(), data.number)
        if result := await session.result(data.number, seconds=30):
            return msgspec.json.decode(result.payload)
        raise ApiError(504, f"Text {data.number} waits for the job to run: send it again.", "result_pending")

    @post("/v1/bigram/{job_id:str}/finish", status_code=200, opt={"scopes": ("train",)})
    async def finish(job_id: str, owner: str) -> dict[str, Any]:
        """End with what was learned, once the texts that came before this are counted."""
        return await services.ask(job_id, owner, "finish")

    return [learn, finish]
