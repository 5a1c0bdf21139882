"""Requests to generations: names to adapters, prompts to tokens, parameters to sampling."""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from arbor_core.engine import ApiError
from arbor_transformers.generation.detokenizer import Detokenizer, StopStrings, TokenText
from arbor_transformers.generation.loop import GenerationLoop
from arbor_transformers.generation.prompts import Prompts
from arbor_transformers.generation.sampler import Sampling
from arbor_transformers.generation.sequence import Generation
from arbor_transformers.model.loading import Loaded
from arbor_transformers.model.lora import Adapter, AdapterRows, load_adapter, read_ends
from arbor_transformers.model.update import copy_weights, read_weights

from .delta_queue import DeltaQueue
from .requests import ChatRequest, CompletionRequest, Request
from .responses import Answer, ChatAnswer, CompletionAnswer


class Service:
    """Everything behind the routes.

    Args:
        loaded: Model and tokenizers.
        loop: Runs generations.
        lora: The engine's adapters.
        context: Tokens of prompt and answer together.
        unread: Deltas that may wait for a connection.
    """

    def __init__(
        self, name: str, loaded: Loaded, loop: GenerationLoop, lora: AdapterRows, context: int, unread: int
    ) -> None:
        self.name, self.loaded, self.loop, self.lora = name, loaded, loop, lora
        self.context, self.unread = context, unread
        self.ends = loaded.ends
        self.adapters: dict[str, Adapter] = {}
        self.prompts = Prompts(loaded.tokenizer, loaded.vocabulary)
        self.texts = TokenText(loaded.tokenizer_of_answers)
        self.texts_of_loop = TokenText(loaded.tokenizer_of_loop)
        self.encoder = ThreadPoolExecutor(1, "encoder")
        self.loading = asyncio.Lock()
        self.reader = ThreadPoolExecutor(1, "reader")

    def adapter(self, model: str) -> Adapter | None:
        """The adapter that a model's name stands for; None for the base model."""
        if model == self.name:
            return None
        try:
            return self.adapters[model]
        except KeyError:
            message = f"The model '{model}' does not exist on this engine."
            raise ApiError(404, message, "model_not_found", "model") from None

    async def load(self, name: str, path: str) -> None:
        """Load an adapter under a name. The same name again is only right with the same directory."""
        async with self.loading:
            await self._load(name, path)

    async def _load(self, name: str, path: str) -> None:
        known = self.adapters.get(name)
        if known is not None and known.path == path:
            return
        if known is not None or name == self.name or not name:
            message = f"The name '{name}' is taken. Load new weights under a new name, or unload the old ones first."
            raise ApiError(400, message, "adapter_exists", "lora_name")
        events = asyncio.get_running_loop()
        adapter = await events.run_in_executor(self.reader, load_adapter, name, path, self.loaded.model)
        await asyncio.wrap_future(self.loop.call(lambda: self.lora.attach(adapter)))
        self.adapters[name] = adapter

    def unload(self, name: str) -> None:
        """Forget an adapter. Generations that run on it hold it until they end."""
        if name not in self.adapters:
            raise ApiError(404, f"The adapter '{name}' is not loaded.", "model_not_found", "lora_name")
        del self.adapters[name]

    async def update(self, path: str, version: int) -> None:
        """Replace the model's weights by those of a directory; generations that run go on with them."""
        async with self.loading:
            events = asyncio.get_running_loop()
            pairs = await events.run_in_executor(self.reader, read_weights, path, self.loaded.model)
            learned = read_ends(Path(path), self.loaded.vocabulary)
            await asyncio.wrap_future(self.loop.replace_weights(partial(copy_weights, pairs), version))
            self.ends = self.loaded.ends | learned

    async def chat(self, request: ChatRequest) -> tuple[Answer, list[Generation], DeltaQueue]:
        """The generations of a conversation, not yet submitted."""
        adapter = self.adapter(request.model)
        tools = None if request.tool_choice == "none" else request.tools
        extras = request.chat_template_kwargs or {}
        prompt = await self._encoded(lambda: self.prompts.chat(request.messages, tools, extras))
        return self._prepared(request, [prompt], adapter, ChatAnswer)

    async def completions(self, request: CompletionRequest) -> tuple[Answer, list[Generation], DeltaQueue]:
        """The generations of plain prompts, not yet submitted."""
        adapter = self.adapter(request.model)
        prompts = [await self._encoded(partial(self.prompts.plain, prompt)) for prompt in request.prompts]
        return self._prepared(request, prompts, adapter, CompletionAnswer)

    async def _encoded(self, encode: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        # In a thread: a long prompt takes a while, and the other streams must go on.
        return await asyncio.get_running_loop().run_in_executor(self.encoder, encode)

    def _prepared(
        self, request: Request, prompts: list[tuple[int, ...]], adapter: Adapter | None, kind: type[Answer]
    ) -> tuple[Answer, list[Generation], DeltaQueue]:
        answer = kind(
            request.model,
            self.texts,
            prompts,
            logprobs=request.alternatives is not None,
            token_ids=bool(request.return_token_ids),
            usage=bool(request.stream_options and request.stream_options.include_usage),
        )
        queue, n = DeltaQueue(self._unread(request, len(prompts))), request.n or 1
        sampling = self._sampling(request, adapter)
        generations = [
            Generation(
                prompt=prompt,
                sampling=sampling,
                choice=at * n + i,
                max_tokens=self._room(request, len(prompt)),
                adapter=adapter,
                sink=queue,
                streams=bool(request.stream),
                text=Detokenizer(self.texts_of_loop),
                stops=StopStrings(request.stops),
            )
            for at, prompt in enumerate(prompts)
            for i in range(n)
        ]
        return answer, generations, queue

    def _unread(self, request: Request, prompts: int) -> int:
        """Limit of the queue: every choice must be able to report once."""
        count, most = prompts * (request.n or 1), self.loop.max_batch + self.loop.max_waiting
        if count > most:
            message = (
                f"The request asks for {count} sequences; this engine takes {most} at once. Send several requests."
            )
            raise ApiError(400, message, "invalid_value", "n" if prompts == 1 else "prompt")
        return self.unread + count

    def _room(self, request: Request, used: int) -> int:
        """How many tokens may be generated after a prompt."""
        default = 16 if isinstance(request, CompletionRequest) else self.context
        wanted = request.limit
        if used >= self.context or (wanted is not None and used + wanted > self.context):
            counts = f"{used} in the prompt and {wanted} in the completion" if wanted else f"{used} in the prompt"
            message = f"This model's maximum context length is {self.context} tokens, but you requested {counts}."
            raise ApiError(400, message, "context_length_exceeded", "messages" if default > 16 else "prompt")
        return min(default if wanted is None else wanted, self.context - used)

    def _sampling(self, request: Request, adapter: Adapter | None) -> Sampling:
        def given(value: float | None, default: float) -> float:
            return default if value is None else value

        learned = adapter.ends if adapter else frozenset()
        ends = frozenset() if request.ignore_eos else self.ends | learned
        return Sampling(
            temperature=given(request.temperature, 1.0),
            top_k=max(request.top_k or 0, 0),
            top_p=given(request.top_p, 1.0),
            min_p=given(request.min_p, 0.0),
            presence_penalty=given(request.presence_penalty, 0.0),
            frequency_penalty=given(request.frequency_penalty, 0.0),
            repetition_penalty=given(request.repetition_penalty, 1.0),
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            seed=random.getrandbits(63) if request.seed is None else request.seed,
            top_logprobs=request.alternatives or 0,
            min_tokens=request.min_tokens or 0,
            stop_ids=ends | set(request.stop_token_ids or []),
        )
