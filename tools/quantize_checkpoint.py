#!/usr/bin/env python
"""Quantises a checkpoint for serving in vLLM; the same as `rto quantize`.

Usage: .venv/bin/python tools/quantize_checkpoint.py SOURCE TARGET --prompts prompts.jsonl (--help tells more)
"""

import sys

from rto_megatron.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "quantize")
    main()
