"""`python stock_client.py URL MODEL STEPS`: `ArborGRPO.compile` of arbor-ai 0.2.17 on dspy 3.4.1, unchanged.

Runs in an environment of its own (`make clients`). The two modules are loaded by their paths, because the package
imports its whole server. Prints a JSON object of what the client has seen.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy

ROLLOUTS = 4
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
WORDS = ("one", "two", "three", "four")


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

    def format_user_message_content(self, signature: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> str:
        return str(inputs["question"])

    def format_assistant_message_content(self, signature: Any, outputs: dict[str, Any], *_: Any, **__: Any) -> str:
        return str(outputs["answer"])

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        return {"answer": completion}


def metric(example: Any, prediction: Any, trace: Any = None) -> float:
    """Share of the words that stand where they stood."""
    words = str(prediction.answer).split()
    asked = example.question.split()
    return sum(one == other for one, other in zip(words, asked, strict=False)) / len(asked)


def questions(count: int, seed: int) -> list[Any]:
    numbers = random.Random(seed)
    return [
        dspy.Example(question=" ".join(numbers.sample(WORDS, len(WORDS))), answer="").with_inputs("question")
        for _ in range(count)
    ]


def main(url: str, model: str, steps: int) -> None:
    provider, optimizer = client_module("arbor_provider"), client_module("grpo_optimizer")
    adapter = Plain()
    dspy.configure(adapter=adapter)
    lm = dspy.LM(
        f"openai/arbor:{model}",
        provider=provider.ArborProvider(),
        api_base=f"{url}/v1/",
        api_key="unused",
        max_tokens=32,
        cache=False,
        **SAMPLING,
    )
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    grpo = optimizer.ArborGRPO(
        metric=metric,
        adapter=adapter,
        exclude_demos=True,
        num_threads=2,
        num_train_steps=steps,
        num_dspy_examples_per_grpo_step=2,
        num_rollouts_per_grpo_step=ROLLOUTS,
        num_steps_for_val=2,
        report_train_scores=False,
        checkpoint="improvements",
        train_kwargs={**SAMPLING, "max_steps": steps + 3, "lora_config": None},
    )
    program = grpo.compile(student=program, trainset=questions(6, 0), valset=questions(3, 1))
    after = program(question="one two three four").answer
    print(
        json.dumps(
            {
                "model": program.lm.model,
                "answer": after,
                "validation": grpo.validation_scores,
                "sent": sorted(grpo.fulfilled_batch_ids),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
