"""Encoder-decoders of tests/bases.py: LoRA on encoder, decoder and cross-attention, mixed batches, as `peft` alone."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.errors import InvalidAdapter
from server.cli import main
from server.engine.request import SEQ_2_SEQ_LM, SamplingParams
from server.engine.request import Sequence as EngineSequence
from tests.bases import ENCODER_DECODERS, VOCABULARY, TinyBase
from tests.exactness.test_base_matrix import record
from tests.support import Runner, Spec, make_adapter, peft_model, random_ids, relative

NEW_TOKENS = 20
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0)
LENGTHS = (5, 21, 40)
"""Of sources: less, about as much and more than what is generated; the last two lie on more than one page."""
SPECS = (
    Spec("everywhere", SEQ_2_SEQ_LM, 8, "all-linear"),
    Spec("wide", SEQ_2_SEQ_LM, 16, "all-linear"),
    Spec("encoder", SEQ_2_SEQ_LM, 4, r"(.*\.)?encoder\..*(q|q_proj|v|v_proj|fc1|wo)"),
    Spec("crossing", SEQ_2_SEQ_LM, 3, r".*(EncDecAttention|encoder_attn)\.(q|k|v|o|q_proj|k_proj|v_proj|out_proj)"),
)
Row = tuple[str | None, list[int]]


class Case:
    """A saved base, its adapters, and what peft makes of each."""

    def __init__(self, base: TinyBase, folder: Path, specs: tuple[Spec, ...] = SPECS) -> None:
        self.location = base.save(folder / "base")
        self.checkpoints = {spec.name: make_adapter(self.location, folder, spec) for spec in specs}
        self.names: list[str | None] = [None, *self.checkpoints]
        self.models = {
            name: peft_model(self.location, self.checkpoints[name] if name else None, SEQ_2_SEQ_LM)
            for name in self.names
        }
        self._tokens: dict[tuple[str | None, tuple[int, ...], tuple[int, ...]], list[int]] = {}
        self.rows: list[Row] = [(name, random_ids(n, n, VOCABULARY)) for n in LENGTHS for name in self.names]

    def runner(self, **settings: Any) -> Runner:
        runner = Runner(self.location, **settings)
        for checkpoint in self.checkpoints.values():
            runner.load(checkpoint)
        return runner

    def logits(self, name: str | None, source: list[int], target: list[int]) -> Tensor:
        """Of the token after `target`."""
        with torch.no_grad():
            output = self.models[name](
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]), use_cache=False
            )
        last: Tensor = output.logits[0, -1]
        return last

    def tokens(self, name: str | None, source: list[int], start: tuple[int, ...]) -> list[int]:
        """Greedily, by transformers' own `generate`."""
        key = (name, tuple(source), start)
        if key not in self._tokens:
            self._tokens[key] = self._generate(name, source, start)
        return self._tokens[key]

    def _generate(self, name: str | None, source: list[int], start: tuple[int, ...]) -> list[int]:
        inputs, count = torch.tensor([source]), NEW_TOKENS + len(start) - 1
        output = self.models[name].generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, num_beams=1,
            max_new_tokens=count, min_new_tokens=count,
            forced_eos_token_id=None,
        )  # fmt: skip
        ids: list[int] = output[0].tolist()
        assert ids[: len(start)] == list(start)
        return ids[len(start) :]

    def serve(self, rows: list[Row]) -> list[EngineSequence]:
        """All in one batch, and checked."""
        runner = self.runner()
        sequences = [runner.submit(SEQ_2_SEQ_LM, source, name, GREEDY) for name, source in rows]
        runner.drain()
        self.check(rows, sequences)
        return sequences

    def check(self, rows: list[Row], sequences: list[EngineSequence]) -> None:
        for (name, source), sequence in zip(rows, sequences, strict=True):
            assert sequence.output_ids == self.tokens(name, source, tuple(sequence.prompt_ids)), (name, len(source))


@pytest.fixture(params=ENCODER_DECODERS, ids=lambda base: base.name, scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("settings", [{}, {"kernel": "reference"}], ids=["kernels", "reference"])
def test_a_mixed_batch_equals_peft_alone(case: Case, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = case.runner(**settings)
    start = list(runner.base.stacks.start_ids) if runner.base.stacks else []
    first = {name: case.logits(name, case.rows[0][1], start) for name in case.names}
    for a, b in combinations(first.values(), 2):
        assert relative(a, b) > 1e-2, "the oracle's answers must differ, or nothing is tested"
    passes = record(runner, monkeypatch)
    sequences = [runner.submit(SEQ_2_SEQ_LM, source, name, GREEDY) for name, source in case.rows]
    runner.drain()
    by_id = {sequence.id: row for sequence, row in zip(sequences, case.rows, strict=True)}
    assert len(passes) == NEW_TOKENS
    for step in (0, 5, NEW_TOKENS - 1):
        batch, _, logits = passes[step]
        assert logits is not None
        assert len(batch.items) == len(case.rows) == len(logits)
        assert all(item.encodes == (step == 0) for item in batch.items), "a source is encoded once"
        for item, got in zip(batch.items, logits, strict=True):
            name, source = by_id[item.sequence.id]
            target = item.sequence.tokens(0, item.start + item.count)
            assert relative(got, case.logits(name, source, target)) < 1e-4, (name, len(source), step)
    case.check(case.rows, sequences)


def test_those_that_join_later_and_those_that_are_computed_again_give_the_same_tokens(case: Case) -> None:
    """Pages for about half of them: some wait, some are preempted, encode their source again and go on."""
    page = case.runner().engine.cache.bytes_per_block
    runner = case.runner(kv_cache_bytes=page * 16, max_num_batched_tokens=48)
    sequences = []
    for name, source in case.rows:
        sequences.append(runner.submit(SEQ_2_SEQ_LM, source, name, GREEDY))
        runner.engine.step()
        runner.engine.scheduler.check_integrity()
    runner.drain()
    assert runner.engine.scheduler.preemptions > 0
    assert runner.engine.scheduler.blocks.num_free == runner.engine.scheduler.blocks.num_blocks
    case.check(case.rows, sequences)


def test_padding_inside_a_source_and_the_longest_source(case: Case) -> None:
    runner = case.runner()
    pad = runner.base.pad_id
    assert pad is not None
    longest = min(runner.engine.max_model_len, 600)  # more than one pass of the encoder, where positions allow it
    with_padding = [pad, *random_ids(5, 5, VOCABULARY), pad, pad, *random_ids(4, 4, VOCABULARY), pad]
    rows: list[Row] = [
        (name, ids) for ids in (with_padding, [5], random_ids(longest, 1, VOCABULARY)) for name in case.names
    ]
    sequences = [runner.submit(SEQ_2_SEQ_LM, source, name, GREEDY) for name, source in rows]
    runner.drain()
    case.check(rows, sequences)


def test_other_kinds_of_checkpoints(tmp_path: Path) -> None:
    """DoRA, every bias, rank-stabilised, beside plain LoRA."""
    bart = next(base for base in ENCODER_DECODERS if base.name == "BART")
    specs = (
        Spec("dora", SEQ_2_SEQ_LM, 4, "all-linear", options={"use_dora": True}),
        Spec("biased", SEQ_2_SEQ_LM, 4, ["q_proj", "v_proj"], options={"bias": "all"}),
        Spec("stable", SEQ_2_SEQ_LM, 8, ["k_proj", "fc2"], options={"use_rslora": True}),
        Spec("plain", SEQ_2_SEQ_LM, 8, "all-linear"),
    )
    case = Case(bart, tmp_path, specs)
    case.serve(case.rows)


@pytest.mark.parametrize("name", ["T5", "T5 1.1, Flan-T5", "BART"])
def test_language_model_heads(name: str, tmp_path: Path) -> None:
    """LoRA on it, and one of its own, beside adapters without: on a tied head that is scaled, one apart, one biased."""
    base = next(base for base in ENCODER_DECODERS if base.name == name)
    specs = (
        Spec("adapted", SEQ_2_SEQ_LM, 4, ["k", "lm_head"] if "T5" in name else ["k_proj", "lm_head"]),
        Spec("own", SEQ_2_SEQ_LM, 4, "all-linear", options={"modules_to_save": ["lm_head"]}),
        Spec("plain", SEQ_2_SEQ_LM, 4, "all-linear"),
    )
    case = Case(base, tmp_path, specs)
    sequences = case.serve(case.rows)
    answers: dict[str | None, list[int]] = defaultdict(list)
    for (row, _), sequence in zip(case.rows, sequences, strict=True):
        answers[row] += sequence.output_ids
    assert len({tuple(ids) for ids in answers.values()}) == 4, "they must differ"


def test_an_embedding_that_two_stacks_share_is_refused(tmp_path: Path) -> None:
    bart = next(base for base in ENCODER_DECODERS if base.name == "BART")
    case = Case(bart, tmp_path, (Spec("embedding", SEQ_2_SEQ_LM, 4, ["q_proj", "shared"]),))
    with pytest.raises(InvalidAdapter, match="shared"):
        case.runner()


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_a_merged_adapter_is_pefts_too(name: str, tmp_path: Path) -> None:
    """Whose names have the body's before them on one, and on the other not."""
    base = next(base for base in ENCODER_DECODERS if base.name == name)
    case, out = Case(base, tmp_path, SPECS[:2]), tmp_path / "both"
    given = [f"{checkpoint}=0.5" for checkpoint in case.checkpoints.values()]
    assert main(["merge", *given, "--base", str(case.location), "--out", str(out)]) == 0
    case.checkpoints, case.names = {"both": out}, ["both"]
    case.models["both"] = peft_model(case.location, out, SEQ_2_SEQ_LM)
    runner = case.runner()
    rows: list[Row] = [("both", source) for _, source in case.rows[::3]]
    assert relative(case.logits("both", rows[0][1], [2]), case.logits(None, rows[0][1], [2])) > 1e-2
    sequences = [runner.submit(SEQ_2_SEQ_LM, source, name, GREEDY) for name, source in rows]
    runner.drain()
    case.check(rows, sequences)


def test_adapters_of_other_tasks_are_refused(tmp_path: Path) -> None:
    bart = next(base for base in ENCODER_DECODERS if base.name == "BART")
    case = Case(bart, tmp_path, (SPECS[0],))
    checkpoint = case.checkpoints["everywhere"]
    config = checkpoint / "adapter_config.json"
    config.write_text(config.read_text().replace("SEQ_2_SEQ_LM", "CAUSAL_LM"))
    with pytest.raises(InvalidAdapter, match=r"task_type 'CAUSAL_LM' is none of this base's: SEQ_2_SEQ_LM"):
        Runner(case.location).load(checkpoint)
