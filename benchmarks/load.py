"""Measure time and memory to open a large checkpoint, beside transformers on the same files.

    python benchmarks/load.py [--keep FOLDER] [--runs N]

Writes a random LLaVA of about one billion parameters (CLIP ViT-L/14-336, a Llama of width 2048) in bf16
shards, as transformers stores one, and opens it in processes of their own, alternating: by Pumice in bf16,
by transformers with dtype="auto"; once also until the first logits of a picture and a question. Memory is the
peak of resident memory, libraries and mapped files included. Needs transformers, 5 GB of memory, 2 of disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pumice.threads import usable_cores

RUNS = 3
CHILD = """
import json, resource, sys, time
folder, who, ask = sys.argv[1], sys.argv[2], sys.argv[3] == "ask"
import torch
torch.set_num_threads(int(sys.argv[4]))
if who == "pumice":
    from pumice.formats.load import open_model
else:
    from transformers import LlavaForConditionalGeneration
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if who == "pumice":
    model = open_model(folder, dtype=torch.bfloat16, template="v1").model
else:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
seconds = time.perf_counter() - start
if ask:
    ids = torch.randint(5, 9000, (1, 16), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if who == "pumice":
            from pumice.tokens import IMAGE_TOKEN
            held = torch.cat((torch.full((1, 576), IMAGE_TOKEN), ids), 1)
            model.decoder.logits(model(held, model.encode(pixels))[:, -1:])
        else:
            held = torch.cat((torch.full((1, 576), model.config.image_token_id), ids), 1)
            model(input_ids=held, pixel_values=pixels.to(model.dtype), logits_to_keep=1)
    seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak": peak / 1024, "before": before / 1024}))
"""


def write(folder: Path) -> int:
    """The checkpoint; returns its number of parameters."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    decoder = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32064, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=decoder, image_token_index=32000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="500MB")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{n}": n for n in range(3, 32000)} | {"<image>": 32000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<image>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}\n')
    pictures = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 336},
        "do_center_crop": True, "crop_size": {"height": 336, "width": 336}, "do_convert_rgb": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters())


def measure(folder: Path, who: str, ask: bool) -> dict[str, float]:
    command = [
        sys.executable, "-c", CHILD, str(folder), who, "ask" if ask else "load", str(usable_cores())
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{who} failed:\n{process.stderr}")
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--keep", type=Path, help="write the checkpoint here, or use the one that is here")
    parser.add_argument("--runs", type=int, default=RUNS, help="of which the median is told")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / "model"
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{write(folder) / 1e9:.2f} billion parameters", file=sys.stderr)
        print("| | opened, s | peak, MB | peak with the first logits, MB |\n|---|---|---|---|")
        figures_by_model: dict[tuple[str, bool], list[dict[str, float]]] = {}
        for number in range(options.runs):
            for who in ("pumice", "transformers"):
                for ask in (False, True)[: 1 if number else 2]:  # peaks do not vary: one answer is enough
                    figures_by_model.setdefault((who, ask), []).append(measure(folder, who, ask))
        for who in ("pumice", "transformers"):
            seconds = statistics.median(run["seconds"] for run in figures_by_model[who, False])
            opened = statistics.median(run["peak"] for run in figures_by_model[who, False])
            print(f"| {who} | {seconds:.2f} | {opened:.0f} | {figures_by_model[who, True][0]['peak']:.0f} |")


if __name__ == "__main__":
    main()
