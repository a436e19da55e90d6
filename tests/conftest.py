"""Shared settings: one device preparation before anything imports megatron.core."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
pytest_plugins = ["pool_server"]

from rto_megatron.platform.device import prepare  # noqa: E402 -- after the settings above

prepare()
