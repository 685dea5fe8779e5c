"""gradio: `load_chat` with a picture."""

import gradio
from common import DOG, KEY, MODEL, URL
from gradio_client import Client, handle_file

page = gradio.load_chat(URL, model=MODEL, token=KEY, file_types=["image"])
_, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
client = Client(address, verbose=False)
message = {"text": "What is it?", "files": [handle_file(str(DOG))]}
answer = client.predict(message, api_name="/open_api_stream")
assert answer and "Error" not in str(answer), answer
print("picture:", answer)
page.close()
