"""Teach a model to give one answer more often than others, by rewards alone.

    python examples/grpo.py MODEL [WORD [STEPS]]

Replace QUESTION and reward() by a task of your own. Needs a running server (arbor-serve) with arbor-grpo, and
`pip install openai`. OPENAI_BASE_URL and OPENAI_API_KEY are respected.
"""

import os
import sys
from typing import Any

import openai

if len(sys.argv) < 2:
    sys.exit(__doc__)
model, word = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "Red"
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 40
CONFIG = {"num_generations": 8, "groups_per_step": 2, "learning_rate": 3e-4, "lora": False, "max_steps": steps}
QUESTION: Any = [{"role": "user", "content": "Name a colour."}]
client = openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:7453/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "unused"),
)


def reward(answer: str) -> float:
    return float(answer == f"{word}.")


def grpo(route: str, **body: Any) -> Any:
    """One of the routes below /v1/fine_tuning/grpo, which the package has no methods for."""
    return client.post(f"/fine_tuning/grpo/{route}", body=body, cast_to=object)


status = grpo("initialize", model=model, trainer_config=CONFIG)
job, used = status["job_id"], set[int]()
print("Job", job)
while status["status"] in ("created", "running", "paused"):
    for batch in status["pending_batch_ids"]:
        used.add(batch)
        answers = client.chat.completions.create(model=job, messages=QUESTION, n=8, temperature=1, max_tokens=12)
        scores = [reward(choice.message.content or "") for choice in answers.choices]
        named = [{"completion_id": answers.id, "index": index, "reward": score} for index, score in enumerate(scores)]
        taken = grpo("rewards", job_id=job, batch_id=batch, rewards=named)
        print(f"Step {taken['policy_version']}: {sum(scores):g} of 8" + ("" if taken["accepted"] else ", not used"))
    # Answered when there is an id that is not among those known, or the state has changed; else after 20 seconds.
    status = grpo("status", job_id=job, wait=20, known=sorted(used))
    status["pending_batch_ids"] = [batch for batch in status["pending_batch_ids"] if batch not in used]

if status["status"] != "succeeded":
    sys.exit(f"The job {status['status']}: {status['error']}")
answers = client.chat.completions.create(model=job, messages=QUESTION, temperature=0, max_tokens=12)
print(answers.choices[0].message.content)
