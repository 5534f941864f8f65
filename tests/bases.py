"""The architectures of transformers that are proven, as tiny bases: the matrix, the self-test and README's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    EncoderDecoderConfig,
    FalconConfig,
    FSMTConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LEDConfig,
    LlamaConfig,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MptConfig,
    MT5Config,
    OPTConfig,
    PegasusConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    StableLmConfig,
    T5Config,
    T5GemmaConfig,
    UMT5Config,
    XLMRobertaConfig,
)

from server.engine.base_model import BaseModel, wrap_base

VOCABULARY = 99
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": VOCABULARY - 1, "initializer_range": 0.2,
}  # fmt: skip
DEBERTA: dict[str, Any] = {
    **COMMON, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
"""As DeBERTa-v3."""

BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.2,
}  # fmt: skip

T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "initializer_factor": 1.5,
}  # fmt: skip


def t5gemma() -> T5GemmaConfig:
    stack = {**GROUPED, "head_dim": 8, "attn_logit_softcapping": 5.0}
    config = T5GemmaConfig(encoder=stack, decoder=stack, vocab_size=VOCABULARY)
    config.decoder_start_token_id = 1
    return config


def led() -> LEDConfig:
    return LEDConfig(**BART, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=8)


def fsmt() -> FSMTConfig:
    sizes = {name: size for name, size in BART.items() if name not in {"vocab_size", "decoder_start_token_id"}}
    return FSMTConfig(**sizes, langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY)


def bert_to_bert() -> PreTrainedConfig:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**COMMON), BertConfig(**COMMON))
    config.decoder_start_token_id = 1
    return config


@dataclass(frozen=True)
class TinyBase:
    """One architecture."""

    name: str
    """As README has it."""
    config: Callable[[], PreTrainedConfig]
    generates: bool = True
    note: str = ""
    """How it is served or what of it was covered, for README; where it is refused, the reason."""
    targets: list[str] | str = "all-linear"
    lora: dict[str, Any] = field(default_factory=dict)
    """Other options of peft's LoraConfig that it needs."""
    generation: dict[str, Any] = field(default_factory=dict)
    """What its generation_config says."""

    def build(self) -> Any:
        """Random weights, always the same; biases and norms too, so that one that is forgotten is seen."""
        torch.manual_seed(1)
        config = self.config()
        kind: Any = AutoModelForCausalLM if self.generates else AutoModel
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else kind
        model = kind.from_config(config, attn_implementation="eager")
        for name, value in self.generation.items():
            setattr(model.generation_config, name, value)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    def wrap(self) -> BaseModel:
        return wrap_base(self.build())

    def save(self, directory: Path) -> Path:
        """As a transformers directory, without a tokenizer."""
        self.build().save_pretrained(directory)
        return directory


DECODERS = (
    TinyBase("Llama", lambda: LlamaConfig(**GROUPED)),
    TinyBase("Mistral", lambda: MistralConfig(**GROUPED, sliding_window=4), note="sliding window"),
    TinyBase(
        "Mixtral",
        lambda: MixtralConfig(**GROUPED, num_local_experts=4),
        note="LoRA on attention",
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    TinyBase("Qwen2", lambda: Qwen2Config(**GROUPED)),
    TinyBase("Qwen3", lambda: Qwen3Config(**GROUPED, head_dim=8)),
    TinyBase(
        "Gemma 2",
        lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
        note="soft caps, every other layer windowed",
    ),
    TinyBase(
        "Gemma 3",
        lambda: Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
        note="two kinds of rotary positions, alternating windows; text",
    ),
    TinyBase("Phi", lambda: PhiConfig(**COMMON)),
    TinyBase("Phi-3", lambda: Phi3Config(**GROUPED, sliding_window=4), note="fused projections, sliding window"),
    TinyBase("GPT-2", lambda: GPT2Config(**GPT), note="layers that lie transposed", lora={"fan_in_fan_out": True}),
    TinyBase("GPT-J", lambda: GPTJConfig(**GPT, rotary_dim=4)),
    TinyBase("GPT-NeoX", lambda: GPTNeoXConfig(**COMMON), note="fused query, key and value"),
    TinyBase(
        "OPT",
        lambda: OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16),
        note="learned positions, from 2; a projection before and after",
    ),
    TinyBase("StableLM", lambda: StableLmConfig(**GROUPED)),
)
ENCODERS = (
    TinyBase("BERT", lambda: BertConfig(**COMMON), False),
    TinyBase("RoBERTa", lambda: RobertaConfig(**{**COMMON, "pad_token_id": 1, "bos_token_id": 0}), False),
    TinyBase("XLM-R", lambda: XLMRobertaConfig(**{**COMMON, "pad_token_id": 1, "bos_token_id": 0}), False),
    TinyBase(
        "DistilBERT",
        lambda: DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        ),
        False,
    ),
    TinyBase("ELECTRA", lambda: ElectraConfig(**COMMON, embedding_size=16), False, note="embeddings of another width"),
    TinyBase(
        "ModernBERT",
        lambda: ModernBertConfig(
            **{**COMMON, "num_hidden_layers": 3}, local_attention=6, cls_token_id=1, sep_token_id=2
        ),
        False,
        note="every third layer sees all, the others a window",
    ),
)
PADDED_ENCODERS = (
    TinyBase(
        "DeBERTa-v2",
        lambda: DebertaV2Config(**DEBERTA),
        False,
        note="attention of its own, as DeBERTa-v3 has it",
    ),
)
ENCODER_DECODERS = (
    TinyBase("T5", lambda: T5Config(**T5), note="biases by distance"),
    TinyBase(
        "T5 1.1, Flan-T5",
        lambda: T5Config(**{**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        note="gated; a language-model head of its own",
    ),
    TinyBase("mT5", lambda: MT5Config(**T5)),
    TinyBase("UMT5", lambda: UMT5Config(**T5), note="each layer's own biases by distance"),
    TinyBase("BART", lambda: BartConfig(**BART), generation={"forced_bos_token_id": 0}),
    TinyBase("mBART", lambda: MBartConfig(**BART, scale_embedding=True), generation={"forced_bos_token_id": 9}),
    TinyBase("Pegasus", lambda: PegasusConfig(**{**BART, "decoder_start_token_id": 0, "pad_token_id": 0})),
    TinyBase(
        "Marian",
        lambda: MarianConfig(**{**BART, "decoder_start_token_id": 1}),
        note="tokens that are never generated",
        generation={"bad_words_ids": [[token] for token in range(1, 40, 3) if token != 2]},
    ),
    TinyBase(
        "M2M-100, NLLB",
        lambda: M2M100Config(**BART),
        note="positions that skip padding; a forced first token",
        generation={"forced_bos_token_id": 7},
    ),
)
REFUSED = (
    TinyBase("BLOOM", lambda: BloomConfig(**GPT, hidden_size=32), note="computes attention by itself"),
    TinyBase(
        "Falcon",
        lambda: FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        ),
        note="computes attention by itself",
    ),
    TinyBase(
        "GPT-Neo",
        lambda: GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        ),
        note="computes attention by itself",
    ),
    TinyBase(
        "MPT",
        lambda: MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
        note="computes attention by itself",
    ),
    TinyBase("LongT5", lambda: LongT5Config(**T5), note="computes attention by itself"),
    TinyBase("LED", led, note="computes attention by itself"),
    TinyBase("T5Gemma", t5gemma, note="attention over an encoder's output with a soft cap"),
    TinyBase("FSMT", fsmt, note="a language-model head that is no linear layer"),
    TinyBase("EncoderDecoderModel", bert_to_bert, note="shows no hidden states before its head"),
)

SERVED = {
    "decoder": DECODERS,
    "encoder": ENCODERS,
    "encoder, padded, with a pass for each adapter": PADDED_ENCODERS,
    "encoder-decoder": ENCODER_DECODERS,
    "refused": REFUSED,
}
"""How, as README's table says."""


def readme_table() -> str:
    """What is proven for bases, in Markdown."""
    rows = [f"| {base.name} | {how} | {base.note} |" for how, bases in SERVED.items() for base in bases]
    return "\n".join(["| base | served as | |", "| --- | --- | --- |", *rows])
