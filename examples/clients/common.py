"""What every script needs: the server's address, a key, the model's name, and a picture."""

import base64
import os
from pathlib import Path

HOST = os.environ["PUMICE_HOST"]  # such as http://127.0.0.1:8000
URL = f"{HOST}/v1"
KEY = "none"
MODEL = "pumice-tiny"
DOG = Path(__file__).parents[1] / "dog.jpg"
PICTURE = "data:image/jpeg;base64," + base64.b64encode(DOG.read_bytes()).decode()
