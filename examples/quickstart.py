"""Fine-tune a model on a JSONL file of your own, then chat with it.

    python examples/quickstart.py data.jsonl [MODEL [KEY=VALUE ...]]

KEY=VALUE are hyperparameters (docs/fine-tuning.md), values as JSON: n_epochs=5 lora=null.
Needs a running server (arbor-serve) and `pip install openai`. OPENAI_BASE_URL and OPENAI_API_KEY are respected.
"""

import json
import os
import sys
import time
from itertools import takewhile
from pathlib import Path

import openai

if len(sys.argv) < 2:
    sys.exit(__doc__)
path, model = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tiny"
hyperparameters = {key: json.loads(value) for key, value in (argument.split("=", 1) for argument in sys.argv[3:])}
client = openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:7453/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "unused"),
)

file = client.files.create(file=path, purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model=model,
    training_file=file.id,
    method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
)
print("Job", job.id)

shown: set[str] = set()
while not job.finished_at:
    time.sleep(0.5)
    job = client.fine_tuning.jobs.retrieve(job.id)
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)  # newest first
    for event in reversed(list(takewhile(lambda event: event.id not in shown, events))):
        print(event.message)
        shown.add(event.id)

if job.status != "succeeded":
    sys.exit(f"The job {job.status}: {job.error.message if job.error else ''}")
print(f"Chatting with {job.fine_tuned_model}; an empty line ends it.")
while question := input("> "):
    messages = [{"role": "user", "content": question}]
    stream = client.chat.completions.create(model=job.fine_tuned_model, messages=messages, temperature=0, stream=True)
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
