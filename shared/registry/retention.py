"""Which checkpoints are kept, so that a long run does not fill the disk."""

from shared.registry import policy
from shared.registry.store import Registry

KEPT_STATES = 2
KEPT_BEST_VERSIONS = 5
KEPT_NEWEST_VERSIONS = 10


def prune(registry: Registry, run: str) -> None:
    """Removes the run's states but the last two, and versions that are neither among the newest ten nor among the best
    five on their evaluation set; the state of a version with a label stays, so that it can be continued."""
    versions = registry.versions()
    labelled = set(policy.labels(versions).values())
    kept_steps = {manifest.step for manifest in versions if manifest.version in labelled and manifest.run == run}
    for step in registry.states(run)[:-KEPT_STATES]:
        if step not in kept_steps:
            registry.remove_state(run, step)
    kept = {manifest.version for manifest in versions[-KEPT_NEWEST_VERSIONS:]}
    for evaluation_set in {manifest.evaluation_set for manifest in versions}:
        judged_alike = [manifest for manifest in versions if manifest.evaluation_set == evaluation_set]
        kept |= {manifest.version for manifest in policy.ranking(judged_alike)[:KEPT_BEST_VERSIONS]}
    for manifest in versions:
        if manifest.version not in kept:
            registry.remove_version(manifest.version)
