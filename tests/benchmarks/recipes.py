"""The recipes that `learn.py` compares: steps from the classic one to the best one, for one 53M model and one text."""

import hashlib
import json
from dataclasses import dataclass, replace

from trainer_service.presets import PRESETS
from trainer_service.training.config import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """A way to train the model.

    against: the recipe that it is compared with; None for the first.
    teacher: the recipe whose model, of the same seed, teaches this one.
    windows_anywhere, attention_without_dropout: as in `former`.
    pytorch: trained with PyTorch, on the same batches.
    """

    name: str
    config: TrainingConfig
    against: "Recipe | None" = None
    teacher: "Recipe | None" = None
    windows_anywhere: bool = False
    attention_without_dropout: bool = False
    pytorch: bool = False

    def key(self, seed: int) -> str:
        """Returns a digest of everything that the outcome with a seed depends on, except the text."""
        parts = (
            json.dumps(replace(self.config, seed=seed).to_dict()),
            *(self.windows_anywhere, self.attention_without_dropout, self.pytorch),
            self.teacher.key(seed) if self.teacher else "",
        )
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]


def self_taught(name: str, config: TrainingConfig, generations: int, against: Recipe | None = None) -> list[Recipe]:
    """Returns a recipe without a teacher, and its further generations, each taught by the model of the one before."""
    chain = [Recipe(name, config, against)]
    for number in range(2, generations + 1):
        chain.append(Recipe(f"{name}, generation {number}", config, against=chain[-1], teacher=chain[-1]))
    return chain


def _recipes() -> list[Recipe]:
    # 53M parameters, untied head, dropout 0.1, 12 x 512 tokens, 3e-4 after 2,000 steps of warm-up, a cosine to a tenth.
    classic = replace(PRESETS["tinystories-53m"], max_steps=8000, evaluation_interval=500)
    regularised = replace(
        classic, max_steps=3000, batch_size=24, learning_rate=6e-4, warmup_steps=200, dropout=0.3, weight_decay=0.3
    )
    best = replace(PRESETS["tinystories-53m-plus"], evaluation_interval=500)
    unmasked = replace(best, masked_loss=0.0)
    muon = replace(unmasked, schedule="cosine", final_learning_rate_ratio=0.05, weight_decay=0.3)
    first = Recipe("classic, as it was", classic, windows_anywhere=True, attention_without_dropout=True)
    dropped = Recipe("dropout in attention", classic, first, windows_anywhere=True)
    ordered = Recipe("documents in a random order", classic, dropped)
    pytorch = Recipe("the same in PyTorch, as nanoGPT", classic, ordered, pytorch=True)
    stronger = Recipe("dropout 0.3, decay 0.3, 24 rows", regularised, ordered)
    matrices = Recipe("Muon, 12 rows, rate 1e-3", muon, stronger)
    decayed = Recipe("decay 2, a linear fall to 0", unmasked, matrices)
    chain = self_taught("masked inputs", best, 2, decayed)
    return [first, dropped, ordered, pytorch, stronger, matrices, decayed, *chain]


RECIPES = {recipe.name: recipe for recipe in _recipes()}
