"""`multilora train`."""

from __future__ import annotations

import argparse
import logging
import sys

from server.logs import set_up_logging
from server.training.recipe import InvalidRecipe, load_recipe

logger = logging.getLogger(__name__)

TOO_BAD, WRONG, INTERRUPTED = 1, 2, 130
"""Exit statuses."""


def run_training(given: argparse.Namespace) -> int:
    """Train as the flags say. Returns the exit status."""
    set_up_logging("info")
    try:
        recipe = load_recipe(vars(given))
        from server.bases import BaseNotFound  # noqa: PLC0415  -- a wrong flag shall not wait for torch
        from server.engine.base_model import UnsupportedBase  # noqa: PLC0415
        from server.engine.device import DeviceNotAvailable  # noqa: PLC0415
        from server.training.checkpoint import InvalidCheckpoint  # noqa: PLC0415
        from server.training.data import InvalidData  # noqa: PLC0415
        from server.training.publish import PublishError  # noqa: PLC0415
        from server.training.run import Interrupted, TooBad, train  # noqa: PLC0415
    except InvalidRecipe as error:
        return _say(error, WRONG)
    except ModuleNotFoundError as error:
        return _say(f"{error}: training needs pip install 'multilora[train]'", WRONG)
    try:
        result = train(recipe)
    except (
        InvalidRecipe,
        InvalidData,
        InvalidCheckpoint,
        BaseNotFound,
        DeviceNotAvailable,
        FloatingPointError,
        UnsupportedBase,
        OSError,
    ) as error:
        return _say(error, WRONG)
    except (TooBad, PublishError) as error:
        return _say(error, TOO_BAD)
    except (Interrupted, KeyboardInterrupt) as error:
        return _say(error, INTERRUPTED)
    figures = "  ".join(f"{name} {value:.4g}" for name, value in {**result.metrics, **result.baseline}.items())
    logger.info("%s: %s", result.directory, figures)
    return 0


def _say(error: object, status: int) -> int:
    sys.stderr.write(f"multilora: {error}\n")
    return status
