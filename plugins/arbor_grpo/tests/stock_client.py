"""`python stock_client.py URL OPTIONS`: `ArborGRPO.compile` of arbor-ai 0.2.17 on dspy 3.4.1, unchanged.

Runs in an environment of its own (`make clients`). The two modules are loaded by their paths, because the package
imports its whole server. OPTIONS is the JSON of an `Options`; prints a JSON object of what the client has seen.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
WORDS = ("one", "two", "three", "four")
INSTRUCTION = "Say one of the words."


@dataclass
class Options:
    """What to train."""

    model: str
    steps: int
    wanted: str | None
    """The answer to all questions; None: the question."""
    examples: int = 2
    rollouts: int = 4
    validate_every: int = 2
    validation: int = 3
    max_tokens: int = 32
    train: dict[str, Any] = field(default_factory=dict)
    """More of `train_kwargs`."""


def client_module(name: str) -> ModuleType:
    """A module of arbor-ai's client, without its package."""
    path = Path(str(distribution("arbor-ai").locate_file(f"arbor/integrations/dspy/{name}.py")))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Plain(dspy.ChatAdapter):  # type: ignore[misc] # dspy has no types where this is checked
    """The question is the message, the message is the answer: any model can do it."""

    def format_system_message(self, signature: Any) -> str:
        return INSTRUCTION

    def format_user_message_content(self, signature: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> str:
        return str(inputs["question"])

    def format_assistant_message_content(self, signature: Any, outputs: dict[str, Any], *_: Any, **__: Any) -> str:
        return str(outputs["answer"])

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        return {"answer": completion}


def metric(example: Any, prediction: Any, trace: Any = None) -> float:
    """Share of the wanted words that stand where they should; nothing for an answer of another length."""
    said, wanted = str(prediction.answer).split(), example.answer.split()
    right = sum(one == other for one, other in zip(said, wanted, strict=False))
    return right / len(wanted) if len(said) == len(wanted) else 0.0


def questions(count: int, seed: int, wanted: str | None) -> list[Any]:
    numbers = random.Random(seed)
    asked = [numbers.sample(WORDS, len(WORDS)) for _ in range(count)]
    return [
        dspy.Example(question=" ".join(words), answer=wanted or " ".join(words)).with_inputs("question")
        for words in asked
    ]


def main(url: str, options: Options) -> None:
    provider, optimizer = client_module("arbor_provider"), client_module("grpo_optimizer")
    adapter = Plain()
    dspy.configure(adapter=adapter)
    lm = dspy.LM(
        f"openai/arbor:{options.model}",
        provider=provider.ArborProvider(),
        api_base=f"{url}/v1/",
        api_key="unused",
        max_tokens=options.max_tokens,
        cache=False,
        **SAMPLING,
    )
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    grpo = optimizer.ArborGRPO(
        metric=metric,
        adapter=adapter,
        exclude_demos=True,
        num_threads=4,
        num_train_steps=options.steps,
        num_dspy_examples_per_grpo_step=options.examples,
        num_rollouts_per_grpo_step=options.rollouts,
        num_steps_for_val=options.validate_every,
        checkpoint="improvements",
        train_kwargs={**SAMPLING, "max_steps": 10 * options.steps, **options.train},
    )
    program = grpo.compile(
        student=program,
        trainset=questions(16, 0, options.wanted),
        valset=questions(options.validation, 1, options.wanted),
    )
    after = program(question="one two three four").answer
    again = dspy.LM(
        program.lm.model, api_base=f"{url}/v1", api_key="unused", cache=False, max_tokens=options.max_tokens
    )
    seen = {
        "model": program.lm.model,
        "answer": after,
        "another": again("one two three four")[0],
        "validation": [score for _, score in sorted(grpo.validation_scores.items())],
        "sent": sorted(grpo.fulfilled_batch_ids),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Options(**json.loads(sys.argv[2])))
