from dataclasses import replace

import pytest

from shared.errors import FailedPrecondition
from tests.shared.registry.scenarios import make_manifest
from trainer_service.distillation.readiness import MOST_BITS_PER_BYTE, require_trained

VERSION = make_manifest(7, ())


@pytest.mark.parametrize("bits_per_byte", [MOST_BITS_PER_BYTE + 0.01, float("nan"), float("inf")])
def test_a_version_that_is_hardly_trained_is_refused_with_its_figure_and_the_way_out(bits_per_byte: float) -> None:
    version = replace(VERSION, bits_per_byte=bits_per_byte)
    with pytest.raises(FailedPrecondition) as refused:
        require_trained(version, force=False)
    assert f"Version 7 has {bits_per_byte:.2f} bits per byte" in str(refused.value)
    assert f"at most {MOST_BITS_PER_BYTE:g}" in str(refused.value)
    assert "--force (FORCE=1)" in str(refused.value)
    require_trained(version, force=True)


def test_a_trained_version_may_teach() -> None:
    require_trained(replace(VERSION, bits_per_byte=MOST_BITS_PER_BYTE), force=False)
