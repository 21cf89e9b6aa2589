"""What a session may be asked for: a wrong value is refused by its FEDn name, before anything is stored."""

from __future__ import annotations

from typing import Any

import pytest

from fl_server.core.model import ClientId, InvalidConfig, SessionConfig, SessionId, Task, TaskKind


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "rounds: 0, "),
        ({"rounds": 2.0}, "rounds: 2.0, "),
        ({"rounds": "3"}, "rounds: '3', "),
        ({"rounds": True}, "rounds: True, "),
        ({"min_clients": 0}, "clients_required: 0, "),
        ({"requested_clients": -1}, "requested_clients: -1, "),
        ({"min_clients": 3, "requested_clients": 2}, "requested_clients: 2, below clients_required 3"),
        ({"buffer_size": 0}, "buffer_size: 0, -1 or at least 1 needed"),
        ({"buffer_size": -2}, "buffer_size: -2, "),
        ({"buffer_size": None}, "buffer_size: None, "),
        ({"round_retries": -1}, "round_retries: -1, "),
        ({"round_timeout_s": 0.0}, "round_timeout: 0.0, "),
        ({"round_timeout_s": None}, "round_timeout: None, "),
        ({"validation_timeout_s": float("inf")}, "validation_timeout_s: inf, "),
        ({"selection_timeout_s": float("nan")}, "selection_timeout_s: nan, "),
        ({"retry_wait_s": -0.1}, "retry_wait_s: -0.1, "),
        ({"rejoin_window_s": -1}, "rejoin_window_s: -1, "),
        ({"min_clients": 2, "client_ids": frozenset({"a"})}, "client_ids: 1, below clients_required 2"),
        ({"aggregator": "x"}, "aggregator: 'x' is unknown; known: fedavg, fedopt"),
        ({"aggregator": ["fedavg"]}, "aggregator: ['fedavg'] is unknown; known: fedavg, fedopt"),
        ({"aggregator": "fedopt", "aggregator_kwargs": {"eta": 1}}, "aggregator_kwargs: eta is unknown to fedopt; "),
        ({"aggregator": "fedopt", "aggregator_kwargs": {"tau": 0}}, "aggregator_kwargs: tau: 0, "),
    ],
)
def test_a_wrong_value_is_refused_and_the_message_begins_with_its_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        SessionConfig(**{"rounds": 1, **given})
    assert str(refused.value).startswith(message)


def test_zero_is_a_wait_and_a_window_but_no_timeout() -> None:
    config = SessionConfig(rounds=1, retry_wait_s=0, rejoin_window_s=0, round_retries=0, requested_clients=0)
    assert config.min_updates == 1


@pytest.mark.parametrize(("buffer_size", "min_updates"), [(-1, 3), (2, 2), (5, 3)])
def test_a_buffer_smaller_than_clients_required_lowers_the_updates_that_are_needed(
    buffer_size: int, min_updates: int
) -> None:
    assert SessionConfig(rounds=1, min_clients=3, buffer_size=buffer_size).min_updates == min_updates


@pytest.mark.parametrize("name", ["c", "a/b", "ü", ""])
def test_a_task_id_gives_the_task_back(name: str) -> None:
    task = Task(SessionId("s"), 3, 2, TaskKind.TRAIN, ClientId(name))
    assert Task.parse(task.id) == task


@pytest.mark.parametrize("text", ["", "s/1/1/train", "s/x/1/train/c", "s/1/1/dance/c"])
def test_what_is_no_task_id_names_no_task(text: str) -> None:
    assert Task.parse(text) is None
