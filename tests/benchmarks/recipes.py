"""The recipes that `learn.py` compares: steps from the classic one to the best one, for one 53M model and one text."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from trainer_service.presets import PRESETS
from trainer_service.training.config import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """A way to train the model.

    against: the recipe that it is compared with; none for the first.
    teacher: the recipe whose model, of the same seed, teaches this one.
    windows_anywhere, attention_without_dropout: as in `former`.
    pytorch: trained with PyTorch, on the same batches.
    """

    name: str
    config: TrainingConfig
    against: str = ""
    teacher: str = ""
    windows_anywhere: bool = False
    attention_without_dropout: bool = False
    pytorch: bool = False

    def key(self, seed: int) -> str:
        """Returns a digest of everything that the outcome with a seed depends on, except the text."""
        values = asdict(replace(self, config=replace(self.config, seed=seed), against=""))
        parts = [json.dumps(values), *([RECIPES[self.teacher].key(seed)] if self.teacher else [])]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _recipes() -> list[Recipe]:
    # 53M parameters, untied head, dropout 0.1, 12 x 512 tokens, 3e-4 after 2,000 steps of warm-up, a cosine to a tenth.
    classic = replace(PRESETS["tinystories-53m"], max_steps=8000, evaluation_interval=500)
    regularised = replace(
        classic, max_steps=3000, batch_size=24, learning_rate=6e-4, warmup_steps=200, dropout=0.3, weight_decay=0.3
    )
    best = replace(PRESETS["tinystories-53m-plus"], evaluation_interval=500)
    decayed = replace(best, masked_loss=0.0)
    muon = replace(decayed, schedule="cosine", final_learning_rate_ratio=0.05, weight_decay=0.3)
    return [
        Recipe("classic, as it was", classic, windows_anywhere=True, attention_without_dropout=True),
        Recipe("dropout in attention", classic, "classic, as it was", windows_anywhere=True),
        Recipe("documents in a random order", classic, "dropout in attention"),
        Recipe("the same in PyTorch, as nanoGPT", classic, "documents in a random order", pytorch=True),
        Recipe("dropout 0.3, decay 0.3, 24 rows", regularised, "documents in a random order"),
        Recipe("Muon, 12 rows, rate 1e-3", muon, "dropout 0.3, decay 0.3, 24 rows"),
        Recipe("decay 2, a linear fall to 0", decayed, "Muon, 12 rows, rate 1e-3"),
        Recipe("masked inputs", best, "decay 2, a linear fall to 0"),
        Recipe("generation 2", best, "masked inputs", teacher="masked inputs"),
        Recipe("generation 3", best, "generation 2", teacher="generation 2"),
    ]


RECIPES = {recipe.name: recipe for recipe in _recipes()}
