#!/usr/bin/env python
"""Converts checkpoints between Hugging Face and Megatron format; the same as `rto convert`.

Usage: .venv/bin/python tools/convert_checkpoint.py hf-to-megatron SOURCE TARGET [--verify logits] (--help tells more)
"""

import sys

from rto_megatron.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
