"""Run a script on the pretend CUDA device: python run.py LIBRARY SCRIPT [ARGUMENT ...]."""

import ctypes
import importlib
import runpy
import sys
from pathlib import Path

# Before torch, which looks for a device's hooks once.
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
importlib.import_module("cuda")
sys.path.append(str(Path(__file__).parents[1]))
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
