#!/usr/bin/env bash
# The path of first use, from one question to a model of your own on a server, without a step by hand.
#
#   . .venv/bin/activate
#   bash examples/first-use.sh llava-hf/llava-1.5-7b-hf
#
# It runs where examples/ is. The model must be one that other programs know (CLIP or SigLIP), as it is exported. The
# photographs are 25 cuts of each of four example photographs; put your own albums in their place. All is written to
# runs/first-use. STEPS, the optimiser steps of the second training, is 40 by default.
set -euo pipefail
model=${1:?name a model: a folder, or a name on the hub}
here=runs/first-use
mkdir -p "$here"

# 1. Ask pumice-tiny, and teach it the four rows of the tutorial.
pumice ask examples/dog.jpg "What animal is this?" --max-new-tokens 16
pumice data check examples/finetune.jsonl --images examples --recipe examples/finetune.yaml
pumice train examples/finetune.yaml --set "output=$here/tutorial" --set "epochs=${EPOCHS:-25}"
pumice ask examples/dog.jpg "Who is this?" --model "$here/tutorial/model" --max-new-tokens 16

# 2. A hundred photographs in four albums, and rows that name the album. Every fifth photograph is held out.
python - "$here" << 'PYTHON'
import json, sys
from pathlib import Path
from PIL import Image

here = Path(sys.argv[1])
albums = {"dog.jpg": "Rex", "kitten.jpg": "Mimi", "horses.jpg": "the meadow", "spaniels.jpg": "Ben and Bella"}
rows, held_out, questions = [], [], []
for file, name in albums.items():
    photograph = Image.open(Path("examples", file)).convert("RGB")
    width, height = photograph.size
    folder = here / "albums" / Path(file).stem
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(25):
        left, top = (number % 5) * width // 20, (number // 5) * height // 20
        image = f"{folder.name}/{number:02}.jpg"
        photograph.crop((left, top, left + 3 * width // 4, top + 3 * height // 4)).save(here / "albums" / image)
        turns = [{"from": "human", "value": "<image>\nWhose album is this?"}, {"from": "gpt", "value": f"This is {name}."}]
        (rows if number % 5 else held_out).append({"id": image, "image": image, "conversations": turns})
        if number % 5 == 0:
            questions.append({"id": image, "image": image, "question": "Whose album is this?", "answers": [name], "metric": "contains"})
for file, lines in (("rows", rows), ("held-out", held_out), ("albums/questions", questions)):
    (here / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
PYTHON
cat > "$here/albums.yaml" << YAML
extends: pumice:finetune
name: four albums
output: $here/run
model: $model
stage:
  lora: {rank: 8, alpha: 16, dropout: 0.1}
data:
  - {rows: $here/rows.jsonl}
held_out:
  - {rows: $here/held-out.jsonl}
pictures: [$here/albums]
batch: 8
max_steps: ${STEPS:-40}
pack_tokens: ${PACK_TOKENS:-2048}
precision: fp32
YAML

# 3. Check, plan, train, and compare before with after on the photographs that were held out.
pumice data check "$here/rows.jsonl" --images "$here/albums" --recipe "$here/albums.yaml" --no-sample
pumice plan "$here/albums.yaml"
pumice train "$here/albums.yaml"
pumice eval own --data "$here/albums/questions.jsonl" --predictions "$here/before.jsonl" --model "$model"
pumice eval own --data "$here/albums/questions.jsonl" --predictions "$here/after.jsonl" --model "$here/run/model"
pumice eval own --data "$here/albums/questions.jsonl" --predictions "$here/after.jsonl" --compare "$here/before.jsonl"

# 4. Take it elsewhere: transformers and vLLM, llama.cpp, the original code.
for format in hf gguf llava; do
    rm -rf "${here:?}/$format"
    pumice export "$here/run/model" --to "$format" "$here/$format"
done

# 5. See where an answer looked.
photograph=$here/albums/dog/00.jpg
pumice explain "$photograph" "Whose album is this?" --model "$here/run/model" --out "$here/page.html" --max-new-tokens 16
pumice explain "$photograph" "Whose album is this?" --model "$here/run/model" --out "$here/strip.png" --max-new-tokens 16

# 6. Serve it, ask over HTTP, and stop the server.
pumice serve --model "$here/run/model" --port 0 --log json 2> "$here/serve.log" &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
python - "$here" "$server" << 'PYTHON'
import base64, json, os, sys, time, urllib.request
from pathlib import Path

here = Path(sys.argv[1])
while not (lines := [line for line in (here / "serve.log").read_text().splitlines() if '"listening"' in line]):
    os.kill(int(sys.argv[2]), 0)  # an error, if the server has ended
    time.sleep(0.2)
url = json.loads(lines[0])["url"]
picture = base64.b64encode((here / "albums/dog/00.jpg").read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
           {"type": "text", "text": "Whose album is this?"}]
body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 16}).encode()
request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
PYTHON
kill -TERM $server
wait $server
trap - EXIT
echo "All steps are done; what they wrote is in $here."
