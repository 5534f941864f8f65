"""The largest memory that a server's process ever had (VmHWM of /proc), over what it must hold.

    python -m benchmarks.memory                         # about one minute
    python -m benchmarks.memory --adapters 1 64
    python -m benchmarks.memory --python /somewhere/bin/python      # where nothing is installed but what serving needs

`multilora serve` in a process of its own with n adapters of rank 16 in fp16 in its directory; 32 requests at once, over
all adapters, then the process is asked for its peak. It must hold the base's weights, each once and as narrow as is
exact, the adapters, and the cache's pages that were used; 400 MB more are granted for Python, torch, transformers and
whatever else. Linux only.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig

from benchmarks.common import Verdicts, arguments, around, cut_prompts, introduce, save_adapter, served
from benchmarks.machine import base_needs
from benchmarks.peers import AT_ONCE, BASE, run_server
from server.bases import resolve_base
from server.config import ServerConfig
from server.engine.base_model import BaseModel, load_base
from server.engine.request import CAUSAL_LM

GRANTED_MB = 400.0
PROMPT = 128
NEW_TOKENS = 32
MB = 1e6


def page_bytes(location: str, block_size: int) -> int:
    config = AutoConfig.from_pretrained(location)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * config.num_key_value_heads * width * 4 * block_size)


def measure(count: int, python: str, base: BaseModel, base_bytes: float, verdicts: Verdicts) -> None:
    location = resolve_base(BASE).location
    block_size = ServerConfig().block_size
    lengths = around(PROMPT, AT_ONCE)
    pages = sum(-(-(n + NEW_TOKENS) // block_size) for n in lengths) * page_bytes(location, block_size)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            save_adapter(base.layout, Path(folder) / f"a{i}", i, CAUSAL_LM)
        adapters = sum(file.stat().st_size for file in Path(folder).glob("*/adapter_model.safetensors"))
        flags = ("--max-loras", str(count), "--max-cpu-loras", str(count), "--max-num-seqs", str(AT_ONCE))
        with served(Path(folder), *flags, python=python) as server:
            ready = server.status_kb("VmHWM") * 1024
            run_server(server, cut_prompts(location, lengths), [f"a{i % count}" for i in range(AT_ONCE)], NEW_TOKENS)
            peak, now = server.status_kb("VmHWM") * 1024, server.status_kb("VmRSS") * 1024
            of_files = server.status_kb("RssFile") * 1024
    needed = base_bytes + adapters + pages
    note = (
        f"peak {peak / MB:.0f} MB (when ready {ready / MB:.0f}; now {now / MB:.0f}, {of_files / MB:.0f} of it mapped "
        f"files) − base {base_bytes / MB:.0f}, adapters {adapters / MB:.0f}, pages {pages / MB:.0f}"
    )
    verdicts.at_most(f"{count} adapters: MB beside base, adapters and pages", (peak - needed) / MB, GRANTED_MB, note)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=None, help="in the directory (default 8 64, quick 8)"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the server (default: this one)")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("the peak of a process is read from /proc: Linux only")
    introduce("the peak memory of a server's process")
    base = load_base(resolve_base(BASE).location)
    base_bytes = base_needs(base.model)[1]
    verdicts = Verdicts()
    for count in options.adapters or ((8,) if options.quick else (8, 64)):
        measure(count, options.python, base, base_bytes, verdicts)
    verdicts.summary()


if __name__ == "__main__":
    main()
