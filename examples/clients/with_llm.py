"""llm: the command line, with a picture, and with a schema."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import DOG, KEY, MODEL, URL

with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "extra-openai-models.yaml").write_text(
        f"- model_id: pumice\n  model_name: {MODEL}\n  api_base: {URL}\n"
        "  vision: true\n  supports_schema: true\n  supports_tools: true\n"
    )

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "pumice", "--key", KEY, *arguments]
        env = {**os.environ, "LLM_USER_PATH": folder}
        return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    print("picture:", llm("What is it?", "-a", str(DOG)))
    print("history:", llm("Are you sure?", "-c"))
    print("whole:", llm("What is a dog?", "--no-stream"))
    print("tool:", llm("What time is it?", "-T", "llm_time"))
    print("schema:", llm("A dog.", "--schema", "name, age int"))
