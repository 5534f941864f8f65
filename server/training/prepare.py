"""What a training begins with: the task, padding, and examples to learn from and to hold out. No model yet."""

from __future__ import annotations

import logging

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from server.bases import BaseSource
from server.engine.base_model import generates, read_pooling
from server.training.classification import SINGLE_LABEL, TextClassification
from server.training.data import InvalidData
from server.training.embedding import TextEmbedding
from server.training.examples import Examples, TrainingTask, held_out
from server.training.generation import TextGeneration
from server.training.recipe import InvalidRecipe, Recipe
from server.training.tagging import TextTagging

logger = logging.getLogger(__name__)


def make_task(
    recipe: Recipe, source: BaseSource, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> TrainingTask:
    """Raises InvalidRecipe when the base has no such task."""
    decoder = generates(config)
    if recipe.task == "SEQ_CLS":
        return TextClassification(tokenizer, recipe.labels or ())
    if recipe.task == "TOKEN_CLS":
        return TextTagging(tokenizer, recipe.labels or ())
    if recipe.task == "FEATURE_EXTRACTION":
        return TextEmbedding(tokenizer, read_pooling(source.location) or ("last" if decoder else "mean"))
    if not decoder:
        raise InvalidRecipe(f"{recipe.base} is an encoder: it cannot generate, so CAUSAL_LM is not for it")
    return TextGeneration(tokenizer, recipe.chat, recipe.eval_samples, recipe.max_new_tokens)


def choose_padding(tokenizer: PreTrainedTokenizerBase, of_config: int | None) -> None:
    """Let `tokenizer` pad as the base says, else with a token that ends no text. Raises InvalidRecipe.

    A decoder's classifier reads the last token that is no padding, and the server the last one.
    """
    last = tokenizer("a")["input_ids"][-1]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    known = [of_config] if of_config is not None else [token for token in special if token not in (None, last)]
    if not known:
        raise InvalidRecipe("the base's tokenizer has no special token with which a batch could be padded")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known[0])


def longest(recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of an example: what was asked for, as far as the base has positions."""
    positions = getattr(config, "max_position_embeddings", recipe.max_length)
    return min(recipe.max_length, positions, tokenizer.model_max_length)


def split_examples(recipe: Recipe, task: TrainingTask, limit: int) -> Examples:
    """limit: in tokens, of each text. Raises InvalidData."""
    examples = task.read(recipe.data)
    if recipe.eval_data:
        test = task.read(recipe.eval_data)
        seen = {example.source for example in test}
        learn = [example for example in examples if example.source not in seen]
        if len(learn) < len(examples):
            logger.warning("%d examples are held out as well: nothing is learnt of them", len(examples) - len(learn))
    else:
        sides = [held_out(example.source, recipe.eval_fraction) for example in examples]
        learn = [example for example, out in zip(examples, sides, strict=True) if not out]
        test = [example for example, out in zip(examples, sides, strict=True) if out]
    total = len(learn) + len(test)
    learn, test = ([e for e in part if e.length <= limit] for part in (learn, test))
    too_long = total - len(learn) - len(test)
    if too_long:
        logger.warning("%d examples of more than %d tokens are left out", too_long, limit)
    if not learn:
        raise InvalidData(f"{recipe.data}: nothing is left to learn from")
    if (recipe.patience or recipe.min_metric is not None) and not test:
        raise InvalidData("patience and min-metric need held-out examples, and there are none")
    if task.problem_type == SINGLE_LABEL and len({example.target for example in learn}) == 1:
        raise InvalidData(f"{recipe.data}: all examples to learn from have the label {learn[0].expected!r}")
    return Examples(learn, test, too_long)
