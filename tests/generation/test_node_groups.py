"""Servers larger than a machine: vLLM's own parser and configuration read what each machine is started with."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rto_megatron.cli.pool import _group
from rto_megatron.errors import RecipeError
from rto_megatron.generation.vllm.start.server import NodeGroup, ServerOptions, _command, _environment

OPTIONS = ServerOptions(
    Path("model"),
    Path("token"),
    Path("log"),
    host="10.0.0.7",
    tensor_parallel=16,
    group=NodeGroup(2, 0, "n3:20011"),
)


def test_vllm_reads_the_command_of_the_leader_and_of_its_followers() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for rank in (0, 1):
        command = _command(replace(OPTIONS, group=NodeGroup(2, rank, "n3:20011")), 8000)
        assert command[:2] == [sys.executable, "-m"]
        is_leader = rank == 0
        start = "vllm.entrypoints.openai.api_server" if is_leader else "vllm.entrypoints.cli.main"
        assert command[2] == start
        given = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3 if is_leader else 4 :])
        validate_parsed_serve_args(given)
        assert (given.nnodes, given.node_rank, given.master_addr, given.master_port) == (2, rank, "n3", 20011)
        assert (given.tensor_parallel_size, given.headless) == (16, not is_leader)
        assert (given.model if is_leader else given.model_tag) == "model"


def test_a_server_on_one_machine_says_nothing_of_others() -> None:
    assert not {"--nnodes", "--headless", "--master-addr"} & set(_command(replace(OPTIONS, group=None), 8000))


def test_workers_talk_on_the_address_that_the_server_listens_on() -> None:
    assert _environment(OPTIONS)["VLLM_HOST_IP"] == "10.0.0.7"


@pytest.mark.parametrize(
    ("name", "ours", "theirs"), [("OMP_WAIT_POLICY", "PASSIVE", "ACTIVE"), ("THP_MEM_ALLOC_ENABLE", "1", "0")]
)
def test_threads_of_a_server_on_a_cpu_sleep_and_its_pages_are_huge_unless_the_user_says(
    monkeypatch: pytest.MonkeyPatch, name: str, ours: str, theirs: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert _environment(OPTIONS)[name] == ours
    monkeypatch.setenv(name, theirs)
    assert _environment(OPTIONS)[name] == theirs


@pytest.mark.parametrize(
    ("nodes", "rank", "leader"), [(1, 1, None), (1, 0, "n1:1"), (2, 0, None), (2, 2, "n1:1")]
)
def test_contradictory_groups_are_refused(nodes: int, rank: int, leader: str | None) -> None:
    with pytest.raises(RecipeError, match="on several machines"):
        _group(nodes, rank, leader)


def test_a_group_is_what_was_named() -> None:
    assert _group(1, 0, None) is None
    assert _group(2, 1, "n1:1") == NodeGroup(2, 1, "n1:1")
