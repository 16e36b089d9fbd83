"""Which rank a process is, as each launcher says it."""

import json
from pathlib import Path

import pytest

from shared.errors import InvalidArgument
from trainer_service.ranks.place import DEFAULT_PORT, Place, find_place, without_place

MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
PODS = {"JOB_COMPLETION_INDEX": "1", "GPTLOOP_RANK_HOSTS": "run-0.run, run-1.run", "GPTLOOP_RANK_PORT": "6000"}
NCCL = {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "7000"}


def test_open_mpi_says_the_rank_and_knows_where_the_others_are() -> None:
    assert find_place(MPI) == Place(3, 4, None, local_rank=1)


def test_ranks_of_open_mpi_meet_where_the_hosts_are_listed() -> None:
    place = find_place(MPI | {"GPTLOOP_RANK_HOSTS": "a,a,b,b"})
    assert place == Place(3, 4, ("a", DEFAULT_PORT), local_rank=1)


def test_other_mpi_says_the_rank() -> None:
    assert find_place({"PMI_RANK": "0", "PMI_SIZE": "2"}) == Place(0, 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-[01-03,7],cpu1", "gpu-01"),
        ("node7", "node7"),
        ("a.site,b.site", "a.site"),
        ("rack[2,5]-n,x[1-2]", "rack2-n"),
    ],
)
def test_ranks_of_slurm_meet_on_its_first_node(nodes: str, first: str) -> None:
    place = find_place(SLURM | {"SLURM_JOB_NODELIST": nodes})
    assert place == Place(1, 4, (first, DEFAULT_PORT), local_rank=0)


def test_the_nodes_of_a_step_of_slurm_come_before_those_of_its_allocation() -> None:
    place = find_place(SLURM | {"SLURM_JOB_NODELIST": "a[1-4]", "SLURM_STEP_NODELIST": "a[3-4]"})
    assert place.meeting == ("a3", DEFAULT_PORT)


def test_mpirun_inside_an_allocation_of_slurm_counts_its_own_ranks() -> None:
    assert find_place(SLURM | MPI).rank == 3


def test_pods_of_a_job_count_themselves() -> None:
    assert find_place(PODS) == Place(1, 2, ("run-0.run", 6000))


def test_variables_of_mlx_come_first_and_stay(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["10.0.0.1:5000", "10.0.0.1:5001"], ["10.0.0.2:5000", "10.0.0.2:5001"]]))
    ring = find_place(MPI | {"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)})
    assert ring == Place(1, 2, ("10.0.0.1", 5000), has_variables=True)
    nccl = find_place(NCCL)
    assert nccl == Place(1, 2, ("10.0.0.1", 7000), has_variables=True)
    assert nccl.variables("cuda", ["10.0.0.1:7000", "10.0.0.2:7000"], tmp_path) == {}


def test_mlx_gets_a_hostfile_for_its_ring(tmp_path: Path) -> None:
    variables = find_place(PODS).variables("cpu", ["10.0.0.1:6000", "10.0.0.2:6000"], tmp_path)
    assert variables["MLX_RANK"] == "1"
    assert json.loads(Path(variables["MLX_HOSTFILE"]).read_text()) == [["10.0.0.1:6000"], ["10.0.0.2:6000"]]


def test_mlx_gets_the_address_of_rank_0_for_nccl(tmp_path: Path) -> None:
    variables = find_place(PODS).variables("cuda", ["10.0.0.1:6000", "10.0.0.2:6000"], tmp_path)
    own = {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "6000"}
    assert variables == own
    assert find_place(variables).meeting == ("10.0.0.1", 6000)


def test_a_local_rank_inherits_nothing_of_the_launcher_of_its_worker() -> None:
    assert without_place({"HOME": "/x"} | MPI | SLURM | PODS | NCCL) == {"HOME": "/x"}


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "start it by mlx.launch, mpirun or srun"),
        ({"MLX_RANK": "0"}, "MLX_WORLD_SIZE and NCCL_HOST_IP and NCCL_PORT is not"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/none"}, "which must be a list of lists of addresses"),
        (NCCL | {"MLX_RANK": "2"}, "MLX_RANK is 2, but must be from 0 to 1"),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "0"}, "must be from 1 to 1024"),
        (MPI | {"GPTLOOP_RANK_HOSTS": "a,b"}, "lists 2 hosts, but OMPI_COMM_WORLD_SIZE is 4"),
        (SLURM, "SLURM_JOB_NODELIST is '', but must be a list of nodes"),
        (SLURM | {"SLURM_JOB_NODELIST": "a["}, "must be a list of nodes"),
        ({"JOB_COMPLETION_INDEX": "0"}, "GPTLOOP_RANK_HOSTS is not"),
        (PODS | {"GPTLOOP_RANK_HOSTS": "a,,b"}, "separated by commas"),
        (PODS | {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX is 2, but must be from 0 to 1"),
        (PODS | {"GPTLOOP_RANK_PORT": "0"}, "GPTLOOP_RANK_PORT is 0, but must be from 1"),
    ],
)
def test_an_incomplete_environment_gets_a_sentence(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence.replace("[", r"\[")):
        find_place(environment)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[[]]", '[["host"]]', '[["a:b"]]', '[["a:99999"]]', "[1]"])
def test_a_wrong_hostfile_gets_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match="MLX_HOSTFILE names"):
        find_place({"MLX_RANK": "0", "MLX_HOSTFILE": str(path)})
