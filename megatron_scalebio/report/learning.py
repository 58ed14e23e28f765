"""Whether the models of a search learned: weights from models that did not say little."""

import numpy as np

from megatron_scalebio.report.history import History

FEWEST = 20  # steps, below which nothing is said
_PART = 5  # the first fifth of the steps is compared with the last
_SURE = 2.0  # standard errors


def stood_still(history: History) -> str:
    """A sentence, if the validation loss fell by less than its own noise; else "".

    Each step has its loss from a batch of its own: two neighbours differ by their noise, and next
    to nothing of the trend.
    """
    loss_T = history.scalars["validation_loss"]
    loss_T = loss_T[np.isfinite(loss_T)]
    count = len(loss_T) // _PART
    if len(loss_T) < FEWEST:
        return ""
    first, last = float(loss_T[:count].mean()), float(loss_T[-count:].mean())
    noise = float(np.sqrt(np.mean(np.diff(loss_T) ** 2) / count))  # of last - first
    if first - last > _SURE * noise:
        return ""
    return (
        f"the validation loss did not fall by more than its noise: {first:.4g} in the first fifth "
        f"of the steps, {last:.4g} in the last, ± {_SURE * noise:.2g}. Models that learn nothing "
        "say little about the sources: raise lr, or make more steps"
    )
