from redis import Redis

from trainer_service.jobs.job_store import LEASE_S
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue

GPU = Offer(gpus=2, memory_bytes=80 << 30, ranks=2)


def test_a_worker_is_alive_while_it_renews_its_lease(queue: JobQueue, admin: Redis) -> None:
    workers = queue.store.workers
    workers.renew("a", GPU)
    workers.renew("b", Offer())
    assert 0 < int(str(admin.ttl(queue.store.keys.worker("a")))) <= LEASE_S
    assert sorted(workers.offers(), key=str) == sorted([GPU, Offer()], key=str) and workers.count() == 2
    admin.delete(queue.store.keys.worker("b"))  # as if its lease had ended
    assert workers.offers() == [GPU]
    assert admin.smembers(queue.store.keys.workers) == {b"a"}
    workers.end("a")
    assert workers.count() == 0
