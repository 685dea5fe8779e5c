"""inspect-ai: a task with several choices and logprobs."""

import os
import tempfile

from common import KEY, MODEL, URL
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes

os.environ |= {"PUMICE_BASE_URL": URL, "PUMICE_API_KEY": KEY}
samples = [Sample("What barks?", target="dog"), Sample("What purrs?", target="cat")]
task = Task(dataset=samples, scorer=includes())
with tempfile.TemporaryDirectory() as logs:
    model = f"openai-api/pumice/{MODEL}"
    [log] = eval(task, model=model, num_choices=2, log_format="json", log_dir=logs, display="none")
assert log.status == "success", log.error
assert all(len(sample.output.choices) == 2 for sample in log.samples)
print("choices:", [choice.message.text[:40] for choice in log.samples[0].output.choices])
