"""What README.md and docs/ say that the code knows better: tables between markers, made from it.

    python -m tests.documents

writes them anew; tests/test_documents.py holds them to the code. A part begins with `<!-- NAME: … -->` and ends with
`<!-- end of NAME -->`.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from server.bases import resolve_base
from server.config import ServerConfig
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS
from server.service import Service
from tests.bases import ENCODER_DECODERS, readme_table
from tests.exactness.test_checkpoint_matrix import KINDS
from tests.exactness.test_encoder_decoders import SPECS as TWO_STACKS_SPECS
from tests.exactness.test_mixed_batch import SPECS
from tests.support import Spec, live_server, save_tiny_base, service_for
from tests.test_architecture import ADAPTERS

ROOT = Path(__file__).parent.parent
BASE_NAMES = {
    "tiny-llama": "Llama", "tiny-tied-llama": "tied Llama", "smollm2": "SmolLM2", "tiny-gpt2": "GPT-2",
    "tiny-bert": "BERT", "minilm": "MiniLM", "tiny-distilbert": "DistilBERT", "tiny-electra": "ELECTRA",
}  # fmt: skip
"""As the table of checkpoints has them, in its order; others stand there as the tests name them."""
TRIED: tuple[Mapping[str, Sequence[Spec]], ...] = (
    KINDS, SPECS, {base.name: TWO_STACKS_SPECS for base in ENCODER_DECODERS},
)  # fmt: skip
"""Base -> the checkpoints that a test holds to `peft` on it. A further test's list is added here."""
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def saved(spec: Spec) -> set[str]:
    """Modules that are its own."""
    return set(spec.options.get("modules_to_save", ()))


CHECKPOINTS: Mapping[str, Callable[[Spec], bool]] = {
    "text: chat, completion, translation (`CAUSAL_LM`)": lambda s: s.task == CAUSAL_LM,
    "text made of another (`SEQ_2_SEQ_LM`)": lambda s: s.task == SEQ_2_SEQ_LM,
    "classes (`SEQ_CLS`)": lambda s: s.task == SEQ_CLS and s.labels > 1,
    "a value (`SEQ_CLS` of one label)": lambda s: s.task == SEQ_CLS and s.labels == 1,
    "tags (`TOKEN_CLS`)": lambda s: s.task == TOKEN_CLS,
    "embeddings (`FEATURE_EXTRACTION`)": lambda s: s.task == FEATURE_EXTRACTION,
    "`target_modules`: names": lambda s: isinstance(s.targets, list),
    "`target_modules`: `all-linear`": lambda s: s.targets == "all-linear",
    "`target_modules`: a regular expression": lambda s: isinstance(s.targets, str) and s.targets != "all-linear",
    "`exclude_modules`": lambda s: "exclude_modules" in s.options,
    "`layers_to_transform`, `layers_pattern`": lambda s: "layers_to_transform" in s.options,
    "`rank_pattern`, `alpha_pattern`": lambda s: bool(s.options.keys() & {"rank_pattern", "alpha_pattern"}),
    "`use_rslora`": lambda s: "use_rslora" in s.options,
    "DoRA (`use_dora`)": lambda s: "use_dora" in s.options,
    "AdaLoRA": lambda s: s.name.startswith("adalora"),
    "`lora_bias`": lambda s: "lora_bias" in s.options,
    "`bias`: `lora_only`": lambda s: s.options.get("bias") == "lora_only",
    "`bias`: `all`": lambda s: s.options.get("bias") == "all",
    "`fan_in_fan_out`": lambda s: "fan_in_fan_out" in s.options,
    "LoRA on the embedding": lambda s: any(name in s.targets for name in EMBEDDINGS),
    "LoRA on the language-model head": lambda s: "lm_head" in s.targets,
    "an embedding or a language-model head of its own": lambda s: bool(saved(s) & {*EMBEDDINGS, "lm_head"}),
    "`trainable_token_indices`": lambda s: "trainable_token_indices" in s.options,
    "more or fewer tokens than the base": lambda s: s.vocabulary > 0,
    "`ensure_weight_tying`": lambda s: "ensure_weight_tying" in s.options,
    "more than one layer of a head in `modules_to_save`": lambda s: len(saved(s) - {*EMBEDDINGS, "lm_head"}) > 1,
    "saved in float16 or bfloat16": lambda s: s.name.endswith(("-float16", "-bfloat16")),
}
"""What a checkpoint has, as README says it -> whether a test's checkpoint has it. A new kind gets a line here."""


def checkpoint_table() -> str:
    """On which bases a checkpoint of each kind is held to `peft`, in mixed batches."""
    tried: dict[str, list[Spec]] = {}
    for of_base in TRIED:
        for base, specs in of_base.items():
            tried.setdefault(base, []).extend(specs)
    order = [*BASE_NAMES, *(base for base in tried if base not in BASE_NAMES)]
    rows = []
    for kind, has in CHECKPOINTS.items():
        bases = [BASE_NAMES.get(base, base) for base in order if any(map(has, tried.get(base, ())))]
        rows.append(f"| {kind} | {', '.join(bases)} |")
    return "\n".join(["| a checkpoint with | equals `peft` on |", "| --- | --- |", *rows])


def flag_table() -> str:
    """Every setting of the server."""
    rows = []
    for item in dataclasses.fields(ServerConfig):
        default = "" if item.default == "" else f"`{str(item.default).lower()}`"
        rows.append(f"| `--{item.name.replace('_', '-')}` | {default} | {item.metadata['help']} |")
    return "\n".join(["| flag | default | |", "| --- | --- | --- |", *rows])


def metric_table(service: Service) -> str:
    """Every series of a server that is ready."""
    rows = []
    for family in service.metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(["| series | kind | |", "| --- | --- | --- |", *sorted(rows)])


def first_line(file: Path) -> str:
    """Of its docstring."""
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text, f"{file} has no docstring"
    return text.splitlines()[0]


def library_table() -> str:
    """adapters/, in the order in which a file may import others."""
    files = {name: ROOT / "adapters" / f"{name}.py" for name in ADAPTERS}
    there = {name: file if file.exists() else ROOT / "adapters" / name / "__init__.py" for name, file in files.items()}
    rows = [f"| {n} | `{name}` | {first_line(file)} |" for n, (name, file) in enumerate(there.items(), 1)]
    return "\n".join(["| | adapters/ | |", "| ---: | --- | --- |", *rows])


def program_table() -> str:
    """server/, file by file."""
    rows = []
    for folder in ("", "engine", "api", "training"):
        for file in sorted((ROOT / "server" / folder).glob("*.py")):
            if not file.stem.startswith("__"):
                rows.append(f"| `{file.relative_to(ROOT / 'server')}` | {first_line(file)} |")
    return "\n".join(["| server/ | |", "| --- | --- |", *rows])


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of SmolLM2 and its example translate-fr, by the formulas that docs/operating.md gives."""

    rank: int
    pairs: int
    """Σ (d_in + d_out) over the layers that the adapter changes."""
    adapter_bytes: int
    page_bytes: int
    pages: int


def sizes() -> Sizes:
    """From the base's and the adapter's config alone."""
    base = json.loads((Path(resolve_base("smollm2").location) / "config.json").read_text())
    adapter = json.loads((ROOT / "examples/smollm2/translate-fr/adapter_config.json").read_text())
    settings = ServerConfig()
    d, inner, layers = base["hidden_size"], base["intermediate_size"], base["num_hidden_layers"]
    head = d // base["num_attention_heads"]
    kv = base["num_key_value_heads"] * head
    widths = {
        "q_proj": d + d, "k_proj": d + kv, "v_proj": d + kv, "o_proj": d + d,
        "gate_proj": d + inner, "up_proj": d + inner, "down_proj": inner + d,
    }  # fmt: skip
    pairs = layers * sum(widths[name] for name in adapter["target_modules"])
    page_bytes = 2 * layers * kv * settings.block_size * 4
    return Sizes(adapter["r"], pairs, adapter["r"] * pairs * 2, page_bytes, settings.kv_cache_bytes // page_bytes)


def sizing_text() -> str:
    """The worked example."""
    s, settings = sizes(), ServerConfig()
    tokens, thousand = s.pages * settings.block_size, s.adapter_bytes * 1000
    pages = (
        f"SmolLM2 has 30 layers, 3 heads of 64 for keys and values, and is held in float32. A page of "
        f"{settings.block_size} tokens takes 2 · 30 · 3 · 64 · {settings.block_size} · 4 = {s.page_bytes:,} bytes, so "
        f"the default gigabyte holds {s.pages:,} pages, {tokens:,} tokens: {settings.max_num_seqs} sequences of "
        f"{tokens // settings.max_num_seqs} tokens each."
    )
    adapter = (
        f"Its example `translate-fr` has rank {s.rank} on all seven linear layers, Σ (d_in + d_out) = {s.pairs:,}, in "
        f"16 bits: {s.rank} · {s.pairs:,} · 2 = {s.adapter_bytes:,} bytes. A thousand such adapters take "
        f"{thousand / 2**30:.1f} GiB, {'more' if thousand > settings.max_cpu_lora_bytes else 'less'} than the default "
        f"`--max-cpu-lora-bytes` of {settings.max_cpu_lora_bytes >> 30} GiB."
    )
    return "\n\n".join(textwrap.fill(part, 120, break_on_hyphens=False) for part in (pages, adapter))


def parts(service: Service) -> dict[str, tuple[str, str]]:
    """Name -> the file that has it, and what it must say. service: ready."""
    return {
        "bases": ("README.md", f"\n{readme_table()}\n"),
        "checkpoints": ("README.md", f"\n{checkpoint_table()}\n"),
        "flags": ("docs/operating.md", f"\n{flag_table()}\n"),
        "metrics": ("docs/operating.md", f"\n{metric_table(service)}\n"),
        "sizing": ("docs/operating.md", sizing_text()),
        "library": ("docs/architecture.md", f"\n{library_table()}\n"),
        "program": ("docs/architecture.md", f"\n{program_table()}\n"),
    }


def marked(name: str) -> re.Pattern[str]:
    """Finds the part's markers (groups 1 and 3) and what stands between (2)."""
    return re.compile(rf"(<!-- {name}: [^\n]* -->\n)(.*?)(\n<!-- end of {name} -->)", re.DOTALL)


def main() -> None:
    with TemporaryDirectory() as folder:
        service = service_for(save_tiny_base("tiny-llama", Path(folder)), "tiny")
        with live_server(service):
            made = parts(service)
    for name, (file, text) in made.items():
        before = (ROOT / file).read_text()
        after, count = marked(name).subn(lambda found, text=text: found[1] + text + found[3], before)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{file} has {count} parts named {name}")
        (ROOT / file).write_text(after)


if __name__ == "__main__":
    main()
