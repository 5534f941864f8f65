"""BaseModel: one frozen transformers model, whatever its architecture, behind the few things the engine asks of it.

Knows nothing of adapters or sequences. Whether a base can be served at all is what the self-test finds out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from adapters.layout import BaseLayout, layout_of, with_token_layers
from server.engine.device import choose_dtype
from server.engine.encoder_decoder import EncoderDecoder, learn_encoder_decoder
from server.engine.positions import Positions, learn_positions
from server.engine.stack import CannotServe

CPU = torch.device("cpu")
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


class UnsupportedBase(Exception):
    """This base cannot be served exactly; the message says why."""


@dataclass
class BaseModel:
    """A base model for the packed forward pass. Engine's thread only."""

    model: nn.Module
    """With the language-model head, where there is one."""
    body: nn.Module
    """What adapters change."""
    causal: bool
    """Whether a token sees only what stands before it, in a decoder; such a base generates."""
    device: torch.device
    dtype: torch.dtype
    """Of weights and activations."""
    hidden_size: int
    vocabulary_size: int
    """Of what it generates."""
    input_vocabulary_size: int
    """Of what it reads."""
    max_positions: int
    """Tokens of the longest context; 0: its config names none."""
    pooling: str
    """How FEATURE_EXTRACTION makes one vector: mean, cls or last."""
    eos_ids: frozenset[int]
    pad_id: int | None
    layout: BaseLayout
    positions: Positions
    pooler: nn.Module | None = None
    stacks: EncoderDecoder | None = None
    """Where it has an encoder and a decoder."""
    _hidden: list[Tensor] = field(default_factory=list)
    _rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.stacks is not None:
            self.stacks.decoder.module.register_forward_hook(self._keep_rows)
        elif self.causal:
            source = _source_of_hidden_states(self.model, self.body)
            source.register_forward_hook(lambda _m, _a, out: self._hidden.append(out.last_hidden_state[0]))

    def prepare_for_rows(self) -> None:
        """From now on its forward takes packed rows: a pooler, which looks at a row's first token, stays out of it,
        positions of an encoder-decoder are those that it is told, and nobody waits for the device to warn of padding.
        """
        if self.pooler is not None:
            setattr(self.body, "pooler", None)  # noqa: B010  -- mypy takes it for a tensor
        if self.stacks is not None:
            self.stacks.encoder.enter()
            self.stacks.decoder.enter()
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                setattr(module, "warn_if_padding_and_no_attention_mask", lambda *_: None)  # noqa: B010

    @contextmanager
    def observe_hidden(self) -> Iterator[list[Tensor]]:
        """Meanwhile a decoder's last hidden states are here: [T, hidden_size]."""
        self._hidden.clear()
        yield self._hidden
        self._hidden.clear()

    def encode(self, input_ids: Tensor) -> Tensor:
        """What the encoder of an encoder-decoder makes of [1, T] token ids: [T, hidden_size]."""
        assert self.stacks is not None
        encoder: nn.Module = self.stacks.encoder.module
        hidden: Tensor = encoder(input_ids=input_ids).last_hidden_state[0]
        return hidden

    def decode(self, input_ids: Tensor, memory: Tensor, logit_rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `forward`, of the decoder of an encoder-decoder. memory: [S, hidden_size] of its encoder."""
        assert self.stacks is not None
        self._hidden.clear()
        self._rows = logit_rows
        if logit_rows is None:
            self.stacks.decoder.module(input_ids=input_ids, encoder_hidden_states=memory[None], use_cache=False)
            return self._hidden.pop(), None
        try:
            output = self.model(
                encoder_outputs=BaseModelOutput(memory[None]), decoder_input_ids=input_ids, use_cache=False
            )
        finally:
            self._rows = None
        return self._hidden.pop(), output.logits[0].float()

    def _keep_rows(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        """Of a decoder's hidden states only those whose logits are wanted go on to the language-model head."""
        hidden = output.last_hidden_state
        self._hidden[:] = [hidden[0]]
        if self._rows is not None:
            output.last_hidden_state = hidden[:, self._rows]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ids, position_ids: [1, T]. Hidden states [T, hidden_size], and logits of `logit_rows` in fp32.

        The model's own forward makes the logits, so that whatever it does after its head is done here too.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
        if not self.causal:
            hidden: Tensor = self.body(**arguments).last_hidden_state[0]
            return hidden, None
        self._hidden.clear()
        if logit_rows is None:
            self.body(**arguments, use_cache=False)
            return self._hidden.pop(), None
        logits = self.model(**arguments, use_cache=False, logits_to_keep=logit_rows).logits[0]
        return self._hidden.pop(), logits.float()


def load_base(location: str, device: torch.device = CPU, dtype: str = "auto") -> BaseModel:
    """Load a base from a directory or a hub id; dtype: a name that device.choose_dtype knows.

    Raises UnsupportedBase. Engine's thread.
    """
    config = read_config(location)
    model, report = model_class(config).from_pretrained(
        location,
        dtype=choose_dtype(dtype, device, saved_dtype(config)),
        attn_implementation="eager",
        output_loading_info=True,
    )
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise UnsupportedBase(f"the base lacks weights: {', '.join(sorted(missing)[:5])}")
    if report["missing_keys"]:
        model.pooler = None
    return wrap_base(model.to(device), read_pooling(location))


def read_config(location: str) -> PretrainedConfig:
    """Of the base at `location`. Raises UnsupportedBase where it says enough to know that it is not served."""
    config: PretrainedConfig = AutoConfig.from_pretrained(location)
    check_rope(config)
    return config


def check_rope(config: PretrainedConfig) -> None:
    """Raises UnsupportedBase for positions that depend on a sequence's neighbours."""
    moving = {"dynamic", "longrope"} & _rope_types(getattr(config, "rope_parameters", None))
    if moving:
        raise UnsupportedBase(f"rope type {sorted(moving)} depends on the longest sequence of a batch: not served")


def model_class(config: PretrainedConfig) -> Any:
    """With the language-model head, where the base generates."""
    if config.is_encoder_decoder:
        if config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise UnsupportedBase(f"{config.model_type} is an encoder-decoder that generates no text from text")
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if generates(config) else AutoModel


def saved_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Of the base's weights on the disk, where its config tells."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else None


def body_layout(model: Any) -> BaseLayout:
    """Of a transformers model whose layers are its own still. Raises UnsupportedBase."""
    config, head = model.config, model.get_output_embeddings()
    if generates(config) and not isinstance(head, nn.Linear):
        raise UnsupportedBase(f"{type(model).__name__} has a language-model head that is no linear layer")
    width = head.in_features if generates(config) else config.hidden_size  # a body may end in a projection
    whole = generates(config) and model.base_model is model
    layout = layout_of(model.base_model, "" if whole else model.base_model_prefix, width, generates(config), apart=head)
    layout = with_token_layers(layout, model, model.base_model)
    if config.is_encoder_decoder:  # of an embedding that both stacks share PEFT changes one name, which none looks at
        layout = replace(layout, encodes_first=True, embedding=None, tied=False)
    return layout


def wrap_base(model: Any, pooling: str | None = None) -> BaseModel:
    """Prepare a loaded transformers model: frozen and evaluating. Raises UnsupportedBase."""
    config = model.config
    causal = generates(config)
    body = model.base_model
    model.requires_grad_(False).eval()
    check_rope(config)
    layout = body_layout(model)
    pooler = getattr(body, "pooler", None)
    embedding = model.get_input_embeddings()
    pad_id = getattr(config, "pad_token_id", None)
    stacks = _learn_stacks(model, pad_id) if config.is_encoder_decoder else None
    positions = (
        learn_positions(body, embedding.num_embeddings, pad_id, embedding.weight.device)
        if stacks is None
        else Positions()
    )
    longest = getattr(config, "max_position_embeddings", None) or 0
    return BaseModel(
        model=model,
        body=body,
        causal=causal,
        device=embedding.weight.device,
        dtype=embedding.weight.dtype,
        hidden_size=layout.hidden_size,
        vocabulary_size=embedding.num_embeddings if stacks is None else model.get_output_embeddings().out_features,
        input_vocabulary_size=embedding.num_embeddings,
        max_positions=max(longest - positions.first, 0) if stacks is None else stacks.max_positions,
        pooling=pooling or ("last" if causal else "mean"),
        eos_ids=_eos_ids(model),
        pad_id=pad_id,
        layout=layout,
        positions=positions,
        pooler=pooler,
        stacks=stacks,
    )


def _learn_stacks(model: Any, pad_id: int | None) -> EncoderDecoder:
    try:
        return learn_encoder_decoder(model, pad_id)
    except CannotServe as error:
        raise UnsupportedBase(f"{type(model).__name__} {error}") from error
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UnsupportedBase(f"{type(model).__name__} is not understood as encoder and decoder: {error}") from error


def generates(config: PretrainedConfig) -> bool:
    """Whether this has a decoder with a language-model head, by its named architecture, else by its type."""
    if config.is_encoder_decoder:
        return True
    for name in config.architectures or []:
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return True
        if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
            return False
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def read_pooling(location: str) -> str | None:
    """sentence-transformers' pooling, from `1_Pooling/config.json` beside the model; None without that file.

    Raises UnsupportedBase for a mode that is not served.
    """
    file = Path(location) / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    modes = [
        mode for mode, on in json.loads(file.read_text()).items() if mode.startswith("pooling_mode") and on is True
    ]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UnsupportedBase(f"pooling {modes} is not served, only one of {sorted(POOLINGS)}")
    return POOLINGS[modes[0]]


@torch.inference_mode()
def _source_of_hidden_states(model: nn.Module, body: nn.Module) -> nn.Module:
    """The module whose output the model with its head takes: `body`, or the part of it that it calls instead."""
    called: list[nn.Module] = []

    def note(module: nn.Module, _arguments: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:
            called.append(module)

    hooks = [module.register_forward_hook(note) for module in body.modules()]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(body.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise UnsupportedBase(f"{type(model).__name__} shows no hidden states before its head")
    return called[-1]  # the outermost ends last


def _rope_types(parameters: Any) -> set[str]:
    """Of all layers: one object, or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    own = {parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set()
    return own.union(*nested)


def _eos_ids(model: Any) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
