"""Whatever goes wrong between a process and its object storage: an operation happens whole or not at all.

A real S3 server stands behind a proxy that fails requests; a witness reads past the proxy.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from shared.errors import CorruptCheckpoint, RunOwnershipLost, StoreFailed
from shared.registry import bucket
from shared.registry.fence import Fence
from shared.registry.history import HistoryWriter
from shared.registry.registry import Checkpoint, Registry
from tests.object_storage.proxy import Fault, FaultyProxy, Request
from tests.object_storage.server import MISSING, ObjectServer
from tests.registries import own_registry
from tests.shared.registry.scenarios import RUN, View, make_line, publish, write_model

pytestmark = pytest.mark.slow
pytest.importorskip("obstore", reason=MISSING)


class Site:
    """A registry that is reached through the proxy, and its witness."""

    def __init__(self, server: ObjectServer, proxy: FaultyProxy, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.proxy = proxy
        self._patch = patch
        self._folder = folder
        self._server = server
        self._place = server.place()
        self._numbers = count()

    def limit(self, request_s: float, repeated_s: float) -> None:
        """Changes how long a request may take, and how long the library repeats it."""
        self._patch.setattr(bucket, "_REQUEST_S", request_s)
        self._patch.setattr(bucket, "_RETRY_S", repeated_s)
        self._patch.setattr(bucket, "_PAUSE_S", 0.0)

    def begin(self) -> tuple[Registry, Fence]:
        """Returns a new registry with a version and a state, and the fence of their run."""
        self._place = self._server.place()
        self.proxy.clear()
        registry = self.open()
        fence = registry.take_over(RUN)
        publish(registry, fence)
        registry.write_state(fence, 1, write_model)
        return registry, fence

    def open(self) -> Registry:
        """Returns the registry as a new process on a new machine sees it."""
        return self._open(self.proxy.endpoint)

    def witness(self) -> Registry:
        """Returns the registry as one sees it whom no fault meets."""
        return self._open(self._place.endpoint)

    def view(self) -> View:
        """Returns what a witness sees; fails if anything visible is damaged."""
        registry = self.witness()
        items = set()
        for checkpoint in registry.checkpoints():
            registry.check(checkpoint)
            # The manifest of a state has its time.
            manifest = registry.store.manifest(checkpoint.name).decode() if checkpoint.run is None else ""
            items.add(f"{checkpoint}: {manifest}")
        for name in registry.runs():
            run = registry.store.run(name)
            items |= {f"{text} of {name}: {run.texts[text]}" for text in run.texts}
            if run.history_written_at is not None:
                items.add(f"history of {name}: {registry.store.read_history(name)!r}")
        texts = {group: registry.store.read(group) for group in ("serving", "holds")}
        items |= {f"{name} in {group}: {found[name]}" for group, found in texts.items() for name in found}
        return frozenset(items)

    def _open(self, endpoint: str) -> Registry:
        for name, value in self._place.behind(endpoint).settings.items():
            self._patch.setenv(name, value)
        self._patch.setenv("GPTLOOP_VAR", str(self._folder / str(next(self._numbers))))
        return own_registry()


@pytest.fixture
def site(
    object_server: ObjectServer, object_proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Site:
    return Site(object_server, object_proxy, tmp_path, monkeypatch)


def _write_line(registry: Registry, fence: Fence) -> None:
    HistoryWriter(registry.store, fence, 2, None).append(make_line(3), synced=True)


# Something that a process does as the owner of a run.
Act = Callable[[Registry, Fence], object]

OPERATIONS: dict[str, Act] = {
    "publish": publish,
    "state": lambda registry, fence: registry.write_state(fence, 2, write_model),
    "take-over": lambda registry, _: registry.take_over(RUN),
    "policy": lambda registry, _: registry.decisions.set_policy("latest"),
    "hold": lambda registry, _: registry.holds.add("job", 1),
    "history": _write_line,
    "end": lambda registry, _: registry.end_run(RUN),
    "remove-version": lambda registry, _: registry.remove(Checkpoint(1)),
    "remove-state": lambda registry, _: registry.remove(Checkpoint(1, RUN)),
}
operations = pytest.mark.parametrize("act", OPERATIONS.values(), ids=OPERATIONS.keys())


def _after(site: Site, act: Act) -> tuple[View, View]:
    """Returns what a witness sees before and after an operation that nothing disturbs."""
    registry, fence = site.begin()
    before = site.view()
    act(registry, fence)
    after = site.view()
    assert after != before
    return before, after


@operations
@pytest.mark.parametrize(
    "fault", [Fault.RESET, Fault.DONE_THEN_RESET, Fault.DONE_THEN_500, Fault.CONFLICT_409], ids=lambda each: each.name
)
def test_an_operation_succeeds_once_although_each_request_fails_once(site: Site, fault: Fault, act: Act) -> None:
    _, after = _after(site, act)
    site.limit(60.0, 10.0)
    registry, fence = site.begin()
    rule = site.proxy.inject(fault, _first_of_each(fault is Fault.CONFLICT_409), times=None)
    act(registry, fence)
    assert rule.hits
    assert site.view() == after


@operations
@pytest.mark.parametrize("fault", [Fault.ERROR_503, Fault.DONE_THEN_500], ids=lambda each: each.name)
def test_storage_that_fails_from_any_request_on_leaves_an_operation_whole_or_undone(
    site: Site, fault: Fault, act: Act
) -> None:
    before, after = _after(site, act)
    site.limit(60.0, 0.0)
    failures = 0
    for number in count():
        registry, fence = site.begin()
        rule = site.proxy.inject(fault, _from(number), times=None)
        try:
            act(registry, fence)
        except StoreFailed as error:
            _check_sentence(error)
            failures += 1
        seen = site.view()
        assert seen in (before, after)
        site.proxy.clear()
        if not rule.hits:
            assert seen == after
            break
        # The next process goes on from what there is.
        registry = site.open()
        assert publish(registry).version == 2 + (len(seen) != len(before) and act is OPERATIONS["publish"])
    assert failures


@pytest.mark.parametrize("fault", [Fault.SILENCE, Fault.DONE_THEN_SILENCE], ids=lambda each: each.name)
@pytest.mark.parametrize("act", [OPERATIONS["publish"], OPERATIONS["state"]], ids=["publish", "state"])
def test_a_commit_that_is_never_answered_is_found_or_repeated(site: Site, fault: Fault, act: Act) -> None:
    _, after = _after(site, act)
    _, fence = site.begin()
    site.limit(5.0, 0.0)
    impatient = site.open()
    rule = site.proxy.inject(fault, lambda request: request.conditional)
    act(impatient, fence)
    assert rule.hits == 1
    assert site.view() == after


def test_a_number_whose_creation_was_not_confirmed_is_given_once(site: Site) -> None:
    registry, fence = site.begin()
    for fault in (Fault.DONE_THEN_500, Fault.DONE_THEN_RESET, Fault.CONFLICT_409, Fault.RESET):
        expected = registry.versions()[-1].version + 1
        rule = site.proxy.inject(fault, lambda request: request.conditional and "/versions/" in request.path)
        assert publish(registry, fence).version == expected
        assert rule.hits == 1
        assert [each.version for each in site.open().versions()] == list(range(1, expected + 1))


def test_an_owner_that_was_replaced_while_its_commit_was_not_answered_publishes_nothing(site: Site) -> None:
    registry, fence = site.begin()
    later: list[Fence] = []

    def takes_over(request: Request) -> bool:
        if not (request.conditional and "/versions/" in request.path) or later:
            return False
        later.append(site.witness().take_over(RUN))
        return True

    site.proxy.inject(Fault.RESET, takes_over)
    with pytest.raises(RunOwnershipLost):
        publish(registry, fence)
    assert [each.version for each in site.open().versions()] == [1]
    assert publish(registry, later[0]).version > 1


@pytest.mark.parametrize("fault", [Fault.ALTERED_BODY, Fault.TORN_BODY], ids=lambda each: each.name)
def test_a_file_that_arrives_altered_or_torn_is_fetched_again(site: Site, fault: Fault) -> None:
    site.begin()
    reader = site.open()
    rule = site.proxy.inject(fault, lambda request: request.reads("/files/"))
    folder = reader.verified(reader.version(1))
    assert rule.hits == 1
    assert (folder / "model.safetensors").stat().st_size == 256 * 40


def test_a_file_that_always_arrives_altered_is_named_and_never_used(site: Site) -> None:
    site.begin()
    reader = site.open()
    site.proxy.inject(Fault.ALTERED_BODY, lambda request: request.reads("/files/"), times=None)
    for _ in range(2):
        with pytest.raises(CorruptCheckpoint, match="has changed") as refused:
            reader.fetch(reader.version(1))
        _check_sentence(refused.value)
    site.proxy.clear()
    assert reader.fetch(reader.version(1)).is_dir()


def test_a_file_that_comes_too_slowly_fails_with_a_sentence(site: Site) -> None:
    site.begin()
    site.limit(5.0, 0.0)
    reader = site.open()
    version = reader.version(1)
    site.proxy.inject(Fault.SLOW_BODY, lambda request: request.reads("/files/"), times=None)
    with pytest.raises(StoreFailed) as refused:
        reader.fetch(version)
    _check_sentence(refused.value)
    site.proxy.clear()
    assert reader.fetch(version).is_dir()


def test_storage_that_refuses_every_creation_ends_a_publication(site: Site) -> None:
    registry, fence = site.begin()
    site.limit(60.0, 0.0)
    for fault in (Fault.PRECONDITION_412, Fault.CONFLICT_409):
        site.proxy.inject(fault, lambda request: request.conditional and "/versions/" in request.path, times=None)
        with pytest.raises(StoreFailed) as refused:
            publish(registry, fence)
        _check_sentence(refused.value)
        site.proxy.clear()
    assert [each.version for each in site.open().versions()] == [1]


def _check_sentence(error: Exception) -> None:
    text = str(error)
    assert "s3://" in text and text.endswith(".") and "\n" not in text and len(text) < 400, text


def _from(number: int) -> Callable[[Request], bool]:
    """Matches all requests from one on, counted from now."""
    numbers = count()
    return lambda _: next(numbers) >= number


def _first_of_each(conditional: bool) -> Callable[[Request], bool]:
    """Matches each request when it comes for the first time, or each conditional one."""
    seen: set[Request] = set()

    def matches(request: Request) -> bool:
        if request in seen or (conditional and not request.conditional):
            return False
        seen.add(request)
        return True

    return matches
