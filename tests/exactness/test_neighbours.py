"""What a sequence leaves behind, and what it ends in, must not reach others' answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.request import CAUSAL_LM, SEQ_CLS, SamplingParams
from tests.support import (
    Runner,
    Spec,
    make_adapter,
    peft_model,
    peft_values,
    random_ids,
    relative,
    rewrite_tensors,
)

CHAT = Spec("broken", CAUSAL_LM, 4, ["q_proj", "v_proj"])
SORT = Spec("sort", SEQ_CLS, 8, ["q_proj", "v_proj"], labels=3)
GREEDY = SamplingParams(max_tokens=20, min_tokens=20, temperature=0.0)


def test_values_that_are_not_finite_stay_with_their_sequence(base_location: dict[str, str], tmp_path: Path) -> None:
    """An adapter may overflow in fp32 although each of its weights is finite. Masked keys are multiplied too."""
    checkpoint = make_adapter(base_location["tiny-llama"], tmp_path, CHAT)
    rewrite_tensors(checkpoint, lambda t: t.update({k: v.sign() * 3e38 for k, v in t.items() if "lora_B" in k}))
    prompts = [random_ids(n, n) for n in (5, 21)]
    alone = Runner(base_location["tiny-llama"])
    expected = [alone.submit(CAUSAL_LM, ids, None, GREEDY) for ids in prompts]
    alone.drain()

    runner = Runner(base_location["tiny-llama"], max_num_seqs=4)
    runner.load(checkpoint)
    for _ in range(3):  # at first beside it, then on the pages that it left
        broken = runner.submit(CAUSAL_LM, random_ids(40, 1), "broken", GREEDY)
        others = [runner.submit(CAUSAL_LM, ids, None, GREEDY) for ids in prompts]
        runner.drain()
        assert [s.output_ids for s in others] == [s.output_ids for s in expected]
        last = runner.outputs[broken.id][-1]
        assert (last.finish_reason, last.token_id) == ("error", None)
        assert "not finite" in (last.error or "")


def test_a_classification_that_overflows_is_an_error_of_its_own(base_location: dict[str, str], tmp_path: Path) -> None:
    runner = Runner(base_location["tiny-llama"])
    for name in ("sort", "broken"):
        checkpoint = make_adapter(base_location["tiny-llama"], tmp_path / name, SORT)
        if name == "broken":
            rewrite_tensors(checkpoint, lambda t: t.update({k: v.sign() * 3e38 for k, v in t.items() if "lora_B" in k}))
        runner.load(checkpoint, name)
    rows = {name: runner.submit(SEQ_CLS, random_ids(9, 3), name) for name in ("sort", "broken")}
    runner.drain()
    assert runner.values(rows["sort"]).shape == (3,)
    last = runner.outputs[rows["broken"].id][-1]
    assert (last.finish_reason, last.values) == ("error", None)
    assert "not finite" in (last.error or "")


@pytest.mark.parametrize("ending", [[], [0], [0, 0, 0]], ids=len)
def test_padding_at_the_end_of_a_text_is_passed_over_as_by_peft(
    base_location: dict[str, str], tmp_path: Path, ending: list[int]
) -> None:
    location = base_location["tiny-llama"]
    checkpoint = make_adapter(location, tmp_path, SORT)
    ids = [*random_ids(9, 3), *ending]
    runner = Runner(location)
    runner.load(checkpoint)
    assert runner.base.pad_id == 0
    row = runner.submit(SEQ_CLS, ids, "sort")
    beside = runner.submit(SEQ_CLS, random_ids(30, 4), "sort")
    runner.drain()
    model = peft_model(location, checkpoint, SEQ_CLS, 3)
    assert relative(runner.values(row), peft_values(model, SEQ_CLS, ids, "last")) < 1e-4
    assert relative(runner.values(beside), runner.values(row)) > 1e-2
